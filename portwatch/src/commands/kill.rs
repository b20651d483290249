//! `portwatch kill`: frees ports by ending the processes that hold them.

mod destination;
mod interrupt;
pub(crate) mod leaks;
mod pick;
mod way;

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use globset::GlobMatcher;
use portwatch::kill::signal::SignalName;
use portwatch::kill::{self, Choice, Concern, Guards, Job, Options, Outcome, Plan, Reach, Terms, preview, text};
use portwatch::model::Protocol;
use portwatch::render::table::Detail;
use portwatch::render::{self, View, json};
use portwatch::select::{Filters, Selector, Target};
use portwatch::source::{Probe, Scanner, netns};
use portwatch::sweep::directory_glob;
use portwatch::wire::{Kill, Selection};
use rustix::process::Signal;

use self::leaks::LeakArgs;
use self::way::End;
pub(crate) use self::way::{Way, open_scanner};
use super::progress::Display;
use super::{Users, note, nothing, print, selector, view, view_on};
use crate::cli::{Globals, Selectors, TARGETS, duration};
use crate::exit_codes::{self, NO, USAGE, Usage};

#[derive(Debug, Args)]
#[command(after_help = format!("\
Examples:
  portwatch kill 8000
  portwatch kill 3000-3005 --dry-run
  portwatch kill 8000 -s INT --grace 30s --no-force
  portwatch kill --cwd '/home/al/project*' -y
  portwatch kill 8080-9500 --older-than 24h --cwd '/tmp/web_*' --remove-cwd '/tmp/web_*'
  portwatch kill -i --user al         pick from a list
  portwatch kill 80 --stop-unit       stop the service that would start it again
  portwatch kill --since before.json --yes --report leaks.json

-4, -6, --addr and an address say where a port is to be free: what others have on it elsewhere is left alone. Whoever else
the selectors leave out keeps a named port from being free: exit code 1.

With --since, all of it is ended that appeared since and is the caller's own, again and again until nothing more appears.
With a mark, so is what it came from and would start it again, if that started after the mark too:
a loop, a script, a supervisor. Never a shell that somebody types into, what portwatch came from, or
what ran before; other programs that have a terminal, or a unit of their own on a desktop, are named
and left alone, and the exit code is 1.
Containers that were made since go with --stop-container, whoever started them; those made before are left alone.

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
    #[arg(long, conflicts_with_all = ["tree", "since"])]
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
    /// Remove the working directories of those who were ended, where they match; as in a shell, * does not match /. Only a
    /// directory of the user that the process ran as, in which nobody runs; never a home or a mount point
    #[arg(long, value_name = "GLOB", value_parser = directory_glob, conflicts_with = "close_socket")]
    pub(crate) remove_cwd: Option<GlobMatcher>,
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
    /// Say nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) leaks: LeakArgs,
    #[command(flatten)]
    pub(crate) selectors: Selectors,
}

pub(crate) fn run(args: &KillArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let why_alone = args.why_alone(globals);
    if let (Some(option), true) = (why_alone, globals.agent) {
        let message = format!("{option} is carried out without the agent; leave out --agent");
        return Err(Usage(message).into());
    }
    let selector = selector(&args.targets, &args.selectors, globals)?;
    if args.interactive && !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Err(Usage(
            "--interactive needs a terminal to show the list on; name the port instead: portwatch kill PORT".to_owned(),
        )
        .into());
    }
    if selector.is_empty() && !args.interactive {
        return name_a_port(&selector, globals);
    }
    if selector.filters().since.is_some() && !args.interactive {
        return leaks::run(args, selector, globals);
    }
    let told = if why_alone.is_none() { Way::through_agent(args, &selector, globals)? } else { None };
    let way = match told {
        Some(way) => way,
        None => match Way::alone(args, &selector, globals)? {
            ControlFlow::Continue(way) => way,
            ControlFlow::Break(End::NothingThere(hidden)) => return nothing_there(args, &selector, hidden),
            ControlFlow::Break(End::NothingPicked) => return nothing_signalled(args, || Ok(Vec::new())),
        },
    };
    if way.plan().groups.is_empty() {
        return nothing_there(args, &selector, 0);
    }
    let concerns = match is_conversation() && !args.yes && !args.dry_run {
        true => way.concerns(args.interactive),
        false => Vec::new(),
    };
    let is_shown = !args.json && !args.quiet && !args.dry_run;
    if is_shown || !concerns.is_empty() {
        // Somebody who asked for a port to be freed gets it freed, also where nobody reads this.
        preview(way.plan()).or_else(|error| if concerns.is_empty() { Ok(()) } else { Err(error) })?;
    }
    if args.dry_run {
        if !args.json && !args.quiet {
            let users = Users::default();
            let name = |uid| users.name(uid);
            print(&summary(way.plan(), &view(&name)))?;
        }
        let mut outcomes = way.planned()?;
        outcomes.iter_mut().for_each(|outcome| outcome.addresses = selector.spelt_out_addresses(outcome.port));
        return report(args, &outcomes);
    }
    if !agreed(way.plan(), &concerns)? {
        return nothing_signalled(args, || way.declined(args, &selector, globals));
    }
    let mut display = Display::new(args.json || args.quiet);
    let run = way.run_until_signalled(args.options(), &mut |progress| display.show(progress));
    display.close();
    let (mut outcomes, signalled) = run?;
    outcomes.iter_mut().for_each(|outcome| outcome.addresses = selector.spelt_out_addresses(outcome.port));
    let code = report(args, &outcomes)?;
    Ok(signalled.map_or(code, interrupt::end_by))
}

/// Frees a port for a server that is to start there, as `portwatch kill PORT/PROTO` does, and tells of it on stderr alone.
/// The exit code that it would have: 0 where the port is free.
pub(crate) fn free(port: u16, proto: Protocol, yes: bool, grace: Duration, globals: &Globals) -> anyhow::Result<u8> {
    let target = Target { ports: port..=port, proto: Some(proto), address: None };
    let own = Some(netns::own()?);
    let selector = Selector::new(vec![target], Filters { netns: own, ..Filters::default() });
    let mut scanner = Scanner::open(globals.probe);
    let choice = Choice::read(&mut scanner, &selector)?;
    let job = Job::prepare(choice, &Terms::default(), Guards::current(false))?;
    let way = Way::Alone { job: Box::new(job), scanner };
    let concerns = if is_conversation() && !yes { way.concerns(false) } else { Vec::new() };
    preview(way.plan()).or_else(|error| if concerns.is_empty() { Ok(()) } else { Err(error) })?;
    if !agreed(way.plan(), &concerns)? {
        note("nothing was signalled");
        return Ok(NO);
    }
    let mut display = Display::new(false);
    let outcomes = way.run(Options { grace, ..Options::default() }, &mut |progress| display.show(progress))?;
    display.close();
    for outcome in &outcomes {
        note(&text::outcome(outcome));
    }
    Ok(kill::exit_code(&outcomes))
}

impl KillArgs {
    fn options(&self) -> Options {
        let SignalName(signal) = self.signal;
        Options {
            signal: if self.force { Signal::KILL } else { signal },
            grace: self.grace,
            force: !self.no_force,
            settle: self.settle,
            ..Options::default()
        }
    }

    /// The option that takes the rights, or the terminal, of who calls: the agent does not do that.
    fn why_alone(&self, globals: &Globals) -> Option<&'static str> {
        let options = [
            ("--interactive", self.interactive),
            ("--since", self.selectors.since.is_some()),
            ("--stop-container", self.stop_container),
            ("--stop-unit", self.stop_unit),
            ("--close-socket", self.close_socket),
            ("--remove-cwd", self.remove_cwd.is_some()),
            ("--probe", globals.probe != Probe::Auto),
        ];
        options.into_iter().find_map(|(option, given)| given.then_some(option))
    }

    /// What is asked of the agent.
    fn request(&self, selector: &Selector) -> Kill {
        let selection = Selection::of(selector);
        let Self { dry_run, force_self, .. } = *self;
        Kill { dry_run, force_self, ..Kill::new(selection, self.options(), self.reach()) }
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
fn name_a_port(selector: &Selector, globals: &Globals) -> anyhow::Result<ExitCode> {
    note("error: name a port to free, as in `portwatch kill 8000`, or a selector such as --cwd; listening now:");
    let listeners = super::read(selector, globals, false)?.listeners;
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

fn nothing_there(args: &KillArgs, selector: &Selector, hidden: usize) -> anyhow::Result<ExitCode> {
    if args.json {
        print("[]\n")?;
    } else if !args.quiet {
        note(&format!("{}; nothing to free", nothing(&args.targets, selector, "", hidden)));
    }
    Ok(ExitCode::SUCCESS)
}

/// `planned` are the outcomes of a dry run, for JSON.
fn nothing_signalled(
    args: &KillArgs,
    planned: impl FnOnce() -> anyhow::Result<Vec<Outcome>>,
) -> anyhow::Result<ExitCode> {
    if args.json {
        print_done(&json::array(&planned()?))?;
    }
    note("nothing was signalled");
    Ok(ExitCode::from(NO))
}

/// Who would be hit, and who would not although it holds the port.
pub(crate) fn summary(plan: &Plan, view: &View<'_>) -> String {
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

/// Whether there is somebody to ask: who types on a terminal and reads one, whatever standard error is.
fn is_conversation() -> bool {
    io::stdin().is_terminal() && (io::stderr().is_terminal() || io::stdout().is_terminal())
}

/// Whether nobody has to be asked, or somebody said yes.
fn agreed(plan: &Plan, concerns: &[Concern]) -> anyhow::Result<bool> {
    if concerns.is_empty() {
        return Ok(true);
    }
    let users = Users::default();
    let name = |uid| users.name(uid);
    let stderr = io::stderr();
    let (mut asked, question): (Box<dyn io::Write>, String) = match stderr.is_terminal() {
        true => {
            let question = preview::question(plan, concerns, &view_on(&stderr, &name));
            (Box::new(stderr), question)
        }
        // The plan went where nobody sees it now.
        false => {
            let terminal = File::options().write(true).open("/dev/tty");
            let terminal = terminal.context("nobody can be asked on /dev/tty; to go on without, add --yes")?;
            let view = view_on(&terminal, &name);
            let question = summary(plan, &view) + &preview::question(plan, concerns, &view);
            (Box::new(terminal), question)
        }
    };
    write!(asked, "{question} [y/N] ").and_then(|()| asked.flush()).context("cannot write to the terminal")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    if !answer.ends_with('\n') {
        // The end of input leaves the cursor behind the question.
        let _ = writeln!(asked);
    }
    Ok(matches!(answer.trim(), "y" | "Y" | "yes" | "Yes"))
}

fn report(args: &KillArgs, outcomes: &[Outcome]) -> anyhow::Result<ExitCode> {
    // What would happen is no failure.
    let code = if args.dry_run { ExitCode::SUCCESS } else { ExitCode::from(kill::exit_code(outcomes)) };
    let mut text = String::new();
    if args.json {
        text = json::array(outcomes);
    } else {
        for outcome in outcomes {
            let line = match args.dry_run {
                true => text::preview(outcome, args.options().signal),
                false => text::outcome(outcome),
            };
            if !args.quiet {
                text += &line;
                text.push('\n');
                text += &text::directories(outcome);
                text += &text::findings(outcome);
            } else if !outcome.is_done() {
                note(&line);
            }
        }
        if let Some(summary) = text::summary(outcomes).filter(|_| !args.quiet && !args.dry_run) {
            text += &summary;
            text.push('\n');
        }
    }
    print_done(&text)?;
    Ok(code)
}

/// The work is done: whether it succeeded does not depend on who reads of it.
fn print_done(text: &str) -> anyhow::Result<()> {
    match print(text) {
        Err(error) if !exit_codes::is_broken_pipe(&error) => Err(error),
        _ => Ok(()),
    }
}
