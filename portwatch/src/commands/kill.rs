//! `portwatch kill`: frees ports by ending the processes that hold them.

mod aftermath;
mod pick;

use std::collections::BTreeSet;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use nix::unistd::Uid;
use portwatch::cgroup::Manager;
use portwatch::engine::{self, Container, Engine};
use portwatch::kill::signal::SignalName;
use portwatch::kill::{
    self, Concern, Guards, Options, Outcome, Plan, Reach, StopError, Stopping, Units, Whole, World, concern, preview,
    text,
};
use portwatch::model::{Listener, Protocol, Socket};
use portwatch::render::table::Detail;
use portwatch::render::{self, View, json};
use portwatch::select::{Filters, Selector, Target};
use portwatch::source::stat::{self, Stat};
use portwatch::source::{Scanner, process, procfs};
use portwatch::supervisor::systemd;
use rustix::process::Signal;

use super::progress::Display;
use super::{Users, explain, note, print, selection, selector, view, view_on, works_alone};
use crate::cli::{Globals, Netns, Selectors, TARGETS, duration};
use crate::exit_codes::{self, NO, USAGE, Usage};

/// How long systemd may take to stop a unit: `DefaultTimeoutStopSec=` of 90 s, after which it sends SIGKILL, and a margin.
const STOP_UNIT: Duration = Duration::from_secs(100);

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
    let all_netns = args.selectors.netns != Netns::Own;
    let mut choice = read(&mut scanner, &selector, all_netns)?;
    if choice.selected.is_empty() && (args.interactive || selector.named_ports().is_empty()) {
        return nothing_there(args, &selector);
    }
    let mut named = selector.named_ports();
    if args.interactive {
        let Some(picked) = pick::pick(choice.selected)? else { return nothing_signalled() };
        choice.selected = picked.chosen;
        choice.left_out.extend(picked.others);
        // What was not picked is nobody's question.
        named.clear();
    }
    let Prepared { mut plan, guards, engine } = prepare(args, choice.selected, &choice.left_out, &named)?;
    let concerns = match is_conversation() && !args.yes && !args.dry_run {
        true => concern::concerns(&plan, Uid::effective().as_raw(), args.interactive, &stat_of),
        false => Vec::new(),
    };
    let is_shown = !args.json && !args.quiet && !args.dry_run;
    if is_shown || !concerns.is_empty() {
        // Somebody who asked for a port to be freed gets it freed, also where nobody reads this.
        preview(&plan).or_else(|error| if concerns.is_empty() { Ok(()) } else { Err(error) })?;
    }
    if args.dry_run {
        if !args.json && !args.quiet {
            let users = Users::default();
            let name = |uid| users.name(uid);
            print(&summary(&plan, &view(&name)))?;
        }
        return report(args, &kill::planned(plan));
    }
    if !concerns.is_empty() && !is_confirmed(&plan, &concerns)? {
        return nothing_signalled();
    }
    if !plan.closes {
        ask_managers(&mut plan);
    }
    let ports: BTreeSet<(u16, Protocol)> = plan.groups.iter().map(|group| (group.port, group.proto)).collect();
    // Whoever takes the port counts, whatever the selectors say of addresses and holders.
    let netns = selector.filters().netns;
    let is_of_interest = |socket: &Socket| {
        ports.contains(&(socket.port, socket.proto)) && netns.is_none_or(|netns| netns == socket.netns)
    };
    // A port that was free in the beginning may not be when others have been freed.
    let had_to_wait = plan.groups.iter().any(|g| g.sockets.is_empty()) && !plan.listeners.is_empty();
    let mut display = Display::new(args.json || args.quiet);
    let mut outcomes = kill::execute(
        plan,
        args.options(),
        &mut World {
            rescan: &mut || Ok(scanner.scan(all_netns, &is_of_interest)?.listeners),
            holds: &procfs::holds,
            guards: &guards,
            stop: &mut |wholes, grace| stop(engine.as_ref(), wholes, grace),
            // Of a namespace where nobody has the port, there may be nothing to go by.
            addresses: &|port| match args.selectors.netns {
                Netns::Id(_) => Vec::new(),
                Netns::Own | Netns::All => selector.named_addresses(port),
            },
            progress: &mut |progress| display.show(progress),
        },
    )?;
    display.close();
    let mut correct = |listeners: &[Listener], status| {
        outcomes.iter_mut().for_each(|o| o.correct(listeners, &selector.named_addresses(o.port), status));
    };
    correct(&choice.left_out, kill::Status::Partial);
    if had_to_wait {
        correct(&scanner.scan(all_netns, &is_of_interest)?.listeners, kill::Status::Respawned);
    }
    aftermath::explain(&mut outcomes, globals.probe);
    report(args, &outcomes)
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

/// What the selectors pick, and the listeners on the same ports that they leave out: a port that one of these has is
/// not free.
struct Choice {
    selected: Vec<Listener>,
    left_out: Vec<Listener>,
}

fn read(scanner: &mut Scanner, selector: &Selector, all_netns: bool) -> anyhow::Result<Choice> {
    let Filters { tcp, udp, netns, .. } = *selector.filters();
    // On any address: a listener on another one may be in the way all the same.
    let targets = selector.targets().iter().map(|target| Target { address: None, ..target.clone() }).collect();
    let ports = Selector::new(targets, Filters { tcp, udp, netns, ..Filters::default() });
    let snapshot = scanner.scan(all_netns, &|socket| ports.matches_socket(socket))?;
    let (selected, left_out) = snapshot
        .listeners
        .into_iter()
        .partition(|listener| selector.matches_socket(&listener.socket) && selector.matches(listener, snapshot.at));
    Ok(Choice { selected, left_out })
}

/// What is decided before anything is done.
struct Prepared {
    plan: Plan,
    guards: Guards,
    /// Where a container is involved and an engine answers.
    engine: Option<Engine>,
}

fn prepare(
    args: &KillArgs,
    selected: Vec<Listener>,
    left_out: &[Listener],
    named: &[(u16, Option<Protocol>)],
) -> anyhow::Result<Prepared> {
    let others: Vec<Socket> = left_out.iter().map(|listener| listener.socket.clone()).collect();
    if args.close_socket {
        let guards = Guards::open();
        let plan = Plan::new(selected, &others, named, &guards, &stat_of).closing();
        return Ok(Prepared { plan, guards, engine: None });
    }
    let units = Units::ask(&selected, args.stop_unit);
    let mut guards = Guards::current(args.force_self).with_units(units).with_named(&args.selectors.pids);
    let mut engine = None;
    // A plain port costs no question.
    if engine::is_involved_in(&selected) {
        let roster;
        (engine, roster) = engine::ask();
        guards = guards.with_containers(roster, args.stop_container);
    }
    let mut plan = Plan::new(selected, &others, named, &guards, &stat_of);
    let reach = args.reach();
    if reach != Reach::Holders {
        let seen = process::boot_ns_now();
        let all = stat::all().context("cannot read the processes in /proc")?;
        plan.reach_out(reach, &all, seen, &process::read_exact, &guards, &stat_of);
    }
    Ok(Prepared { plan, guards, engine })
}

/// Containers all at once, then the units one after the other, in the order given.
fn stop(engine: Option<&Engine>, wholes: &[&Whole], grace: Duration) -> Vec<Stopping> {
    let containers: Vec<&Container> = wholes
        .iter()
        .filter_map(|whole| match whole {
            Whole::Container(container) => Some(container),
            Whole::Unit { .. } => None,
        })
        .collect();
    let ids: Vec<&str> = containers.iter().map(|container| container.id.as_str()).collect();
    // Who plans to stop a container was told of it by an engine.
    let mut stopped = engine.map(|engine| engine.stop(&ids, grace)).unwrap_or_default().into_iter();
    let each = wholes.iter().map(|whole| match whole {
        Whole::Container(container) => match stopped.next() {
            Some(Err(error)) => Err(StopError::of_container(container, &error)),
            _ => Ok(Vec::new()),
        },
        Whole::Unit { name, manager } => {
            systemd::stop_unit(name, *manager, STOP_UNIT).map(|stopped| stopped.triggered_by).map_err(StopError::from)
        }
    });
    each.collect()
}

/// Learns which units start their processes again: where none does, nobody has to look out for that. A manager that does
/// not answer is asked once.
fn ask_managers(plan: &mut Plan) {
    let mut silent: Vec<Manager> = Vec::new();
    let mut known: Vec<(String, Manager, Option<bool>)> = Vec::new();
    for supervisor in plan.victims.iter_mut().filter_map(|victim| victim.supervisor.as_mut()) {
        let manager = supervisor.user_manager.map_or(Manager::System, Manager::User);
        let Some(unit) = supervisor.unit.clone().filter(|_| supervisor.restarts.is_none()) else { continue };
        if let Some((.., restarts)) = known.iter().find(|(name, of, _)| *name == unit && *of == manager) {
            supervisor.restarts = *restarts;
            continue;
        }
        if silent.contains(&manager) || !systemd::is_there(manager) {
            continue;
        }
        supervisor.ask();
        match supervisor.restarts {
            Some(_) => known.push((unit, manager, supervisor.restarts)),
            None => silent.push(manager),
        }
    }
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
