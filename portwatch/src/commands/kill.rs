//! `portwatch kill`: frees ports by ending the processes that hold them.

mod pick;

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use nix::unistd::Uid;
use portwatch::kill::signal::SignalName;
use portwatch::kill::{
    self, Choice, Concern, Guards, Job, Options, Outcome, Plan, Reach, Terms, concern, preview, text,
};
use portwatch::model::Protocol;
use portwatch::render::table::Detail;
use portwatch::render::{self, View, json};
use portwatch::select::{Filters, Selector, Target};
use portwatch::source::stat::{self, Stat};
use portwatch::source::{Scanner, netns};
use rustix::process::Signal;

use super::progress::Display;
use super::{Users, explain, note, print, selection, selector, view, view_on, works_alone};
use crate::cli::{Globals, Selectors, TARGETS, duration};
use crate::exit_codes::{self, NO, USAGE, Usage};

/// How long [`free`] looks for something that takes the port again: the default of `--settle`.
const SETTLE: Duration = Duration::from_millis(250);

#[derive(Debug, Args)]
#[command(after_help = format!("\
Examples:
  portwatch kill 8000
  portwatch kill 3000-3005 --dry-run
  portwatch kill 8000 -s INT --grace 30s --no-force
  portwatch kill --cwd '/home/al/project*' -y
  portwatch kill -i --user al         pick from a list
  portwatch kill 80 --stop-unit       stop the service that would start it again

{TARGETS}"))]
pub(crate) struct KillArgs {
    /// Ports to free
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<String>,
    /// Show the plan and end nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Pick from a list of what is listening; targets and selectors narrow the list
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// End the descendants of the holders as well
    #[arg(long)]
    pub(crate) tree: bool,
    /// Signal the process groups of the holders, all members at once
    #[arg(long, conflicts_with = "tree")]
    pub(crate) group: bool,
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
    /// Stop the systemd unit that a holder runs in, over D-Bus, so that it is not started again. A .socket unit for which
    /// systemd itself holds the port is stopped as well. How long it may take is the unit's own setting
    #[arg(long, conflicts_with = "no_force")]
    pub(crate) stop_unit: bool,
    /// Close the listening sockets in the kernel, without a signal to anybody: their holders live on. For sockets that no
    /// process holds above all. Needs root, and a kernel with CONFIG_INET_DIAG_DESTROY; TCP alone
    #[arg(long, conflicts_with_all = ["tree", "group", "signal", "force", "no_force", "stop_container", "stop_unit"])]
    pub(crate) close_socket: bool,
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
    works_alone(globals)?;
    let selector = selector(&args.targets, &args.selectors)?;
    if args.interactive && !is_conversation() {
        return Err(Usage(
            "--interactive needs a terminal to show the list on; name the port instead: portwatch kill PORT".to_owned(),
        )
        .into());
    }
    if selector.is_empty() && !args.interactive {
        return name_a_port(&selector, args, globals);
    }
    if std::fs::read_link("/proc/self").ok() != Some(std::process::id().to_string().into()) {
        anyhow::bail!(
            "/proc belongs to another pid namespace, so its PIDs mean nothing here; mount one of this namespace"
        );
    }
    let mut scanner = Scanner::open(globals.probe);
    if let Some(reason) = scanner.refusal() {
        explain(globals, &format!("holders are read from {}: {reason}", scanner.method()));
    }
    let mut choice = Choice::read(&mut scanner, &selector)?;
    if choice.selected.is_empty() && (args.interactive || choice.is_empty()) {
        return nothing_there(args, &selector);
    }
    if args.interactive {
        let Some(picked) = pick::pick(choice.selected)? else { return nothing_signalled() };
        choice.selected = picked.chosen;
        choice.left_out.extend(picked.others);
        // What was not picked is nobody's question.
        choice.named.clear();
    }
    let job = Job::prepare(choice, &args.terms(), Guards::current(args.force_self))?;
    let concerns = match is_conversation() && !args.yes && !args.dry_run {
        true => concern::concerns(job.plan(), Uid::effective().as_raw(), args.interactive, &stat_of),
        false => Vec::new(),
    };
    let is_shown = !args.json && !args.quiet && !args.dry_run;
    if is_shown || !concerns.is_empty() {
        // Somebody who asked for a port to be freed gets it freed, also where nobody reads this.
        preview(job.plan()).or_else(|error| if concerns.is_empty() { Ok(()) } else { Err(error) })?;
    }
    if args.dry_run {
        if !args.json && !args.quiet {
            let users = Users::default();
            let name = |uid| users.name(uid);
            print(&summary(job.plan(), &view(&name)))?;
        }
        return report(args, &job.planned());
    }
    if !concerns.is_empty() && !is_confirmed(job.plan(), &concerns)? {
        return nothing_signalled();
    }
    let mut display = Display::new(args.json || args.quiet);
    let outcomes = job.run(&mut scanner, args.options(), &mut |progress| display.show(progress))?;
    display.close();
    report(args, &outcomes)
}

/// Frees a TCP port for a server that is to start there, as `portwatch kill PORT` does, and tells of it on stderr alone.
/// Whether it is free.
pub(crate) fn free(port: u16, yes: bool, grace: Duration, globals: &Globals) -> anyhow::Result<bool> {
    let target = Target { ports: port..=port, proto: Some(Protocol::Tcp), address: None };
    let own = Some(netns::own()?);
    let selector = Selector::new(vec![target], Filters { netns: own, ..Filters::default() });
    let mut scanner = Scanner::open(globals.probe);
    let choice = Choice::read(&mut scanner, &selector)?;
    let job = Job::prepare(choice, &Terms::default(), Guards::current(false))?;
    let concerns = match is_conversation() && !yes {
        true => concern::concerns(job.plan(), Uid::effective().as_raw(), false, &stat_of),
        false => Vec::new(),
    };
    preview(job.plan()).or_else(|error| if concerns.is_empty() { Ok(()) } else { Err(error) })?;
    if !concerns.is_empty() && !is_confirmed(job.plan(), &concerns)? {
        note("nothing was signalled");
        return Ok(false);
    }
    let mut display = Display::new(false);
    let options = Options { signal: Signal::TERM, grace, force: true, settle: SETTLE };
    let outcomes = job.run(&mut scanner, options, &mut |progress| display.show(progress))?;
    display.close();
    for outcome in &outcomes {
        note(&text::outcome(outcome));
    }
    Ok(kill::exit_code(&outcomes) == 0)
}

impl KillArgs {
    fn options(&self) -> Options {
        let SignalName(signal) = self.signal;
        Options {
            signal: if self.force { Signal::KILL } else { signal },
            grace: self.grace,
            force: !self.no_force,
            settle: self.settle,
        }
    }

    fn reach(&self) -> Reach {
        match (self.tree, self.group) {
            (true, _) => Reach::Tree,
            (_, true) => Reach::Group,
            _ => Reach::Holders,
        }
    }

    fn terms(&self) -> Terms {
        Terms {
            reach: self.reach(),
            stop_containers: self.stop_container,
            stop_units: self.stop_unit,
            close_sockets: self.close_socket,
        }
    }
}

/// Says that nothing was named, and what could be.
fn name_a_port(selector: &Selector, args: &KillArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    note("error: name a port to free, as in `portwatch kill 8000`, or a selector such as --cwd; listening now:");
    let (listeners, _) = super::read(selector, &args.selectors, globals, false)?;
    let users = Users::default();
    let name = |uid| users.name(uid);
    let table = match listeners.is_empty() {
        true => "nothing\n".to_owned(),
        false => render::table::table(&listeners, Detail::Listeners, &view_on(&io::stderr(), &name)),
    };
    // Nobody who reads it: the exit code says it, too.
    let _ = io::stderr().write_all(table.as_bytes());
    Ok(ExitCode::from(USAGE))
}

fn nothing_there(args: &KillArgs, selector: &Selector) -> anyhow::Result<ExitCode> {
    if args.json {
        print("[]\n")?;
    } else if !args.quiet {
        note(&format!("nothing is listening{}; nothing to free", selection(&args.targets, selector)));
    }
    Ok(ExitCode::SUCCESS)
}

fn nothing_signalled() -> anyhow::Result<ExitCode> {
    note("nothing was signalled");
    Ok(ExitCode::from(NO))
}

fn stat_of(pid: u32) -> Option<Stat> {
    stat::read(pid).ok()
}

/// Who would be hit, and who would not although it holds the port.
fn summary(plan: &Plan, view: &View<'_>) -> String {
    if plan.closes {
        return preview::closures(plan);
    }
    preview::victims(plan, view) + &preview::inside(plan) + &preview::stops(plan) + &preview::refusals(plan)
}

fn preview(plan: &Plan) -> anyhow::Result<()> {
    let users = Users::default();
    let name = |uid| users.name(uid);
    let stderr = io::stderr();
    let text = summary(plan, &view_on(&stderr, &name));
    stderr.lock().write_all(text.as_bytes()).context("cannot write to standard error")
}

/// Whether there is somebody to ask.
fn is_conversation() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

fn is_confirmed(plan: &Plan, concerns: &[Concern]) -> anyhow::Result<bool> {
    let users = Users::default();
    let name = |uid| users.name(uid);
    let mut stderr = io::stderr();
    let question = preview::question(plan, concerns, &view_on(&stderr, &name));
    write!(stderr, "{question} [y/N] ").and_then(|()| stderr.flush()).context("cannot write to standard error")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    if !answer.ends_with('\n') {
        // The end of input leaves the cursor behind the question.
        let _ = writeln!(stderr);
    }
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
                text += &text::findings(outcome);
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
