//! `portwatch kill`: frees ports by ending the processes that hold them.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use nix::unistd::Uid;
use portwatch::engine::{self, Container, Engine, EngineError};
use portwatch::kill::signal::SignalName;
use portwatch::kill::{self, Guards, Options, Outcome, Plan, World, text};
use portwatch::model::{Listener, Process, Socket};
use portwatch::render::{self, json};
use portwatch::select::{Filters, Selector};
use portwatch::source::{Scanner, procfs, stat};
use rustix::process::Signal;

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
    /// Stop the container that a port leads into, or that its holder runs in, by the docker-compatible API: with its own
    /// stop signal, and SIGKILL after the grace. Without this, what publishes a container's port is left alone
    #[arg(long, conflicts_with = "no_force")]
    pub(crate) stop_container: bool,
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
    let Prepared { plan, left_out, guards, engine } =
        prepare(&mut scanner, &selector, all_netns, guards, args.stop_container)?;
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
    let mut outcomes = kill::execute(
        plan,
        options,
        &mut World {
            rescan: &mut || Ok(scanner.scan(all_netns, &|socket| selector.matches_socket(socket))?.listeners),
            holds: &procfs::holds,
            guards: &guards,
            stop: &mut |containers, grace| stop(engine.as_ref(), containers, grace),
            waiting: &mut |processes, left| progress(processes, left, args),
        },
    )?;
    if !args.json && !args.quiet && io::stderr().is_terminal() {
        // Over the line of progress.
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
    outcomes.iter_mut().for_each(|outcome| outcome.correct(&left_out));
    report(args, &outcomes)
}

/// What is known and decided before anything is done.
struct Prepared {
    plan: Plan,
    /// The listeners on the same ports that the selectors leave out: a port that one of these has is not free.
    left_out: Vec<Listener>,
    guards: Guards,
    /// Where a container is involved and an engine answers.
    engine: Option<Engine>,
}

fn prepare(
    scanner: &mut Scanner,
    selector: &Selector,
    all_netns: bool,
    mut guards: Guards,
    stop_containers: bool,
) -> anyhow::Result<Prepared> {
    let Filters { tcp, udp, netns, .. } = *selector.filters();
    let ports = Selector::new(selector.targets().to_vec(), Filters { tcp, udp, netns, ..Filters::default() });
    let snapshot = scanner.scan(all_netns, &|socket| ports.matches_socket(socket))?;
    let (selected, left_out): (Vec<Listener>, Vec<Listener>) = snapshot
        .listeners
        .into_iter()
        .partition(|listener| selector.matches_socket(&listener.socket) && selector.matches(listener, snapshot.at));
    let others: Vec<Socket> = left_out.iter().map(|listener| listener.socket.clone()).collect();
    let mut engine = None;
    // A plain port costs no question.
    if engine::is_involved_in(&selected) {
        let roster;
        (engine, roster) = engine::ask();
        guards = guards.with_containers(roster, stop_containers);
    }
    let plan = Plan::new(selected, &others, &selector.named_ports(), &guards, &|pid| stat::read(pid).ok());
    Ok(Prepared { plan, left_out, guards, engine })
}

fn stop(engine: Option<&Engine>, containers: &[&Container], grace: Duration) -> Vec<Result<(), EngineError>> {
    let ids: Vec<&str> = containers.iter().map(|container| container.id.as_str()).collect();
    match engine {
        Some(engine) => engine.stop(&ids, grace),
        // Who plans to stop a container was told of it by an engine.
        None => Vec::new(),
    }
}

/// Shows who would be hit, and who would not although it holds the port.
fn preview(plan: &Plan) -> anyhow::Result<()> {
    let users = Users::default();
    let mut lines = String::new();
    if !plan.victims.is_empty() {
        let columns = io::stderr().is_terminal().then(|| columns(io::stderr()));
        lines = text::victims(plan, &|uid| users.name(uid).unwrap_or_else(|| uid.to_string()), columns);
    }
    lines += &text::inside(plan);
    lines += &text::stops(plan);
    lines += &text::refusals(plan);
    io::stderr().write_all(lines.as_bytes()).context("cannot write to standard error")
}

/// Whether there is somebody to ask and something to think about.
fn is_question(plan: &Plan) -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal() && plan.wants_confirmation(Uid::effective().as_raw())
}

fn is_confirmed(plan: &Plan) -> anyhow::Result<bool> {
    let mut what = match plan.victims.len() {
        0 => Vec::new(),
        1 => vec!["end this process".to_owned()],
        count => vec![format!("end these {count} processes")],
    };
    what.extend(match &plan.stops[..] {
        [] => None,
        [one] => Some(format!("stop container {}", one.container.name)),
        many => Some(format!("stop these {} containers", many.len())),
    });
    let mut stderr = io::stderr();
    write!(stderr, "{}? [y/N] ", what.join(" and "))
        .and_then(|()| stderr.flush())
        .context("cannot write to standard error")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes" | "Yes"))
}

/// One line, rewritten in place, on a terminal only.
fn progress(processes: &[Arc<Process>], left: Duration, args: &KillArgs) {
    if args.json || args.quiet || !io::stderr().is_terminal() {
        return;
    }
    let who = match processes {
        [one] => format!("{} ({})", render::escape(&one.name), one.id.pid),
        many => format!("{} processes", many.len()),
    };
    let _ = write!(io::stderr(), "\r\x1b[Kwaiting for {who} to end, {:.0} s left", left.as_secs_f64().ceil());
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
    }
    match print(&text) {
        // The work is done: whether it succeeded does not depend on who reads of it.
        Err(error) if !exit_codes::is_broken_pipe(&error) => Err(error),
        _ => Ok(code),
    }
}
