//! `portwatch kill`: frees ports by ending the processes that hold them.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use nix::unistd::Uid;
use portwatch::kill::signal::SignalName;
use portwatch::kill::{self, Guards, Options, Outcome, Plan, World, text};
use portwatch::model::{Listener, Socket};
use portwatch::render::json;
use portwatch::select::{Filters, Selector};
use portwatch::source::{Scanner, procfs, stat};
use rustix::process::Signal;

use super::progress::Display;
use super::{Users, columns, explain, note, print, selection, selector};
use crate::cli::{Globals, Netns, Selectors, TARGETS, duration};
use crate::exit_codes::{self, NO, Usage};

#[derive(Debug, Args)]
#[command(after_help = format!("\
Examples:
  portwatch kill 8000
  portwatch kill 3000-3005 --dry-run
  portwatch kill 8000 -s INT --grace 30s --no-force
  portwatch kill --cwd '/home/al/project*' -y

{TARGETS}"))]
pub(crate) struct KillArgs {
    /// Ports to free
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<String>,
    /// Show the plan and end nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Signal to begin with
    #[arg(short, long, default_value = "TERM", value_name = "SIGNAL")]
    pub(crate) signal: SignalName,
    /// Begin with SIGKILL
    #[arg(short = '9', long, conflicts_with_all = ["signal", "no_force"])]
    pub(crate) force: bool,
    /// How long a process may take to end before it gets SIGKILL
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = duration)]
    pub(crate) grace: Duration,
    /// Never go on to SIGKILL
    #[arg(long)]
    pub(crate) no_force: bool,
    /// How long to look for something that takes the port again, where something could
    #[arg(long, default_value = "250ms", value_name = "DURATION", value_parser = duration)]
    pub(crate) settle: Duration,
    /// Allow to end the ancestors of portwatch, such as the shell it runs in
    #[arg(long)]
    pub(crate) force_self: bool,
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
    /// Say nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) selectors: Selectors,
}

pub(crate) fn run(args: &KillArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let selector = selector(&args.targets, &args.selectors)?;
    if selector.is_empty() {
        return Err(Usage(
            "name a port to free, as in `portwatch kill 8000`, or a selector; \
            `portwatch list` shows what is listening"
                .to_owned(),
        )
        .into());
    }
    let SignalName(signal) = args.signal;
    let options = Options {
        signal: if args.force { Signal::KILL } else { signal },
        grace: args.grace,
        force: !args.no_force,
        settle: args.settle,
    };
    if std::fs::read_link("/proc/self").ok() != Some(std::process::id().to_string().into()) {
        anyhow::bail!(
            "/proc belongs to another pid namespace, so its PIDs mean nothing here; mount one of this namespace"
        );
    }
    let mut scanner = Scanner::open(globals.probe);
    if let Some(reason) = scanner.refusal() {
        explain(globals, &format!("holders are read from {}: {reason}", scanner.method()));
    }
    let all_netns = args.selectors.netns != Netns::Own;
    let guards = Guards::current(args.force_self);
    let (plan, left_out) = plan(&mut scanner, &selector, all_netns, &guards)?;
    if plan.groups.is_empty() {
        if args.json {
            print("[]\n")?;
        } else if !args.quiet {
            note(&format!("nothing is listening{}; nothing to free", selection(&args.targets, &selector)));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let must_ask = !args.yes && !args.dry_run && is_question(&plan);
    if must_ask || (!args.json && !args.quiet) {
        // Somebody who asked for a port to be freed gets it freed, also where nobody reads this.
        preview(&plan).or_else(|error| if must_ask { Err(error) } else { Ok(()) })?;
    }
    if args.dry_run {
        return report(args, &kill::planned(plan));
    }
    if must_ask && !is_confirmed(&plan)? {
        note("nothing was signalled");
        return Ok(ExitCode::from(NO));
    }
    let mut display = Display::new(args.json || args.quiet);
    let mut outcomes = kill::execute(
        plan,
        options,
        &mut World {
            rescan: &mut || Ok(scanner.scan(all_netns, &|socket| selector.matches_socket(socket))?.listeners),
            holds: &procfs::holds,
            guards: &guards,
            // Of a namespace where nobody has the port, there may be nothing to go by.
            addresses: &|port| match args.selectors.netns {
                Netns::Id(_) => Vec::new(),
                Netns::Own | Netns::All => selector.named_addresses(port),
            },
            progress: &mut |progress| display.show(progress),
        },
    )?;
    display.close();
    outcomes.iter_mut().for_each(|outcome| outcome.correct(&left_out));
    report(args, &outcomes)
}

/// The plan, and the listeners on the same ports that the selectors leave out: a port that one of these has is not free.
fn plan(
    scanner: &mut Scanner,
    selector: &Selector,
    all_netns: bool,
    guards: &Guards,
) -> anyhow::Result<(Plan, Vec<Listener>)> {
    let Filters { tcp, udp, netns, .. } = *selector.filters();
    let ports = Selector::new(selector.targets().to_vec(), Filters { tcp, udp, netns, ..Filters::default() });
    let snapshot = scanner.scan(all_netns, &|socket| ports.matches_socket(socket))?;
    let (selected, left_out): (Vec<Listener>, Vec<Listener>) = snapshot
        .listeners
        .into_iter()
        .partition(|listener| selector.matches_socket(&listener.socket) && selector.matches(listener, snapshot.at));
    let others: Vec<Socket> = left_out.iter().map(|listener| listener.socket.clone()).collect();
    let plan = Plan::new(selected, &others, &selector.named_ports(), guards, &|pid| stat::read(pid).ok());
    Ok((plan, left_out))
}

/// Shows who would be hit, and who would not although it holds the port.
fn preview(plan: &Plan) -> anyhow::Result<()> {
    let users = Users::default();
    let mut lines = String::new();
    if !plan.victims.is_empty() {
        let columns = io::stderr().is_terminal().then(|| columns(io::stderr()));
        lines = text::victims(plan, &|uid| users.name(uid).unwrap_or_else(|| uid.to_string()), columns);
    }
    lines += &text::refusals(plan);
    io::stderr().write_all(lines.as_bytes()).context("cannot write to standard error")
}

/// Whether there is somebody to ask and something to think about.
fn is_question(plan: &Plan) -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal() && plan.wants_confirmation(Uid::effective().as_raw())
}

fn is_confirmed(plan: &Plan) -> anyhow::Result<bool> {
    let count = plan.victims.len();
    let what = if count == 1 { "this process".to_owned() } else { format!("these {count} processes") };
    let mut stderr = io::stderr();
    write!(stderr, "end {what}? [y/N] ").and_then(|()| stderr.flush()).context("cannot write to standard error")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes" | "Yes"))
}

fn report(args: &KillArgs, outcomes: &[Outcome]) -> anyhow::Result<ExitCode> {
    let code = ExitCode::from(kill::exit_code(outcomes));
    let mut text = String::new();
    if args.json {
        text = json::array(outcomes);
    } else {
        for outcome in outcomes {
            let line = text::outcome(outcome);
            if !args.quiet {
                text += &line;
                text.push('\n');
            } else if !outcome.is_done() {
                note(&line);
            }
        }
        if let Some(summary) = text::summary(outcomes).filter(|_| !args.quiet) {
            text += &summary;
            text.push('\n');
        }
    }
    match print(&text) {
        // The work is done: whether it succeeded does not depend on who reads of it.
        Err(error) if !exit_codes::is_broken_pipe(&error) => Err(error),
        _ => Ok(code),
    }
}
