//! The whole way of a kill, for all who end processes: `kill` on the command line, the agent, and what goes by rules.
//!
//! ```text
//!  Selector ─► Choice::read ─► Job::prepare ─► (show it, ask) ─► Job::run ─► Outcomes
//!                                   └────────► Job::planned ───────────────► Outcomes of a dry run
//! ```
//! Who calls decides between the steps: what of the [`Choice`] is meant, whether somebody agrees to the [`Plan`], and
//! where progress is told. All of it blocks, for seconds where processes take their time.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context as _;
use globset::GlobMatcher;

use super::directories::Held;
use super::execute::{Options, World, execute, planned};
use super::guards::{Guards, Units};
use super::kin::Reach;
use super::outcome::{Outcome, Status};
use super::plan::{Plan, same_socket};
use super::progress::Progress;
use super::starters::Rule;
use super::stop::{StopError, Stopping, Whole};
use super::{aftermath, life};
use crate::cgroup::Manager;
use crate::engine::{self, Container, Engine};
use crate::model::{Listener, NetnsId, Protocol, Socket};
use crate::select::{Filters, Selector, Target};
use crate::source::{Scanner, netns, process, procfs, stat};
use crate::supervisor::systemd;

/// How long systemd may take to stop a unit: `DefaultTimeoutStopSec=` of 90 s, after which it sends SIGKILL, and a margin.
const STOP_UNIT: Duration = Duration::from_secs(100);

/// What a selector picks, and what is said of ports that nobody has.
#[derive(Clone, Debug)]
pub struct Choice {
    /// To be freed.
    pub selected: Vec<Listener>,
    /// On the same ports, and not picked: left alone. A port that one of these has is not free.
    pub left_out: Vec<Listener>,
    /// The ports that were spelt out: each is reported on, even where nobody has it.
    pub named: Vec<(u16, Option<Protocol>)>,
    selector: Selector,
}

/// How far a kill goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    pub reach: Reach,
    /// Stop containers rather than their processes.
    pub stop_containers: bool,
    /// Stop units rather than their processes.
    pub stop_units: bool,
    /// Close the sockets in the kernel and signal nobody; the rest counts for nothing then.
    pub close_sockets: bool,
}

/// A kill that is decided and not begun.
#[derive(Debug)]
pub struct Job {
    plan: Plan,
    guards: Guards,
    /// Where a container is involved and an engine answers.
    engine: Option<Engine>,
    left_out: Vec<Listener>,
    named: Vec<(u16, Option<Protocol>)>,
    selector: Selector,
    /// Which working directories of those who are ended are removed.
    remove_cwd: Option<GlobMatcher>,
    called_off: Arc<AtomicBool>,
}

impl Choice {
    /// Reads who has the ports now.
    ///
    /// # Errors
    /// When the host's sockets cannot be read, or not those of the network namespace that is meant ([`Scanner::scan_in`]).
    pub fn read(scanner: &mut Scanner, selector: &Selector) -> anyhow::Result<Choice> {
        let Filters { tcp, udp, netns, .. } = *selector.filters();
        // On any address: a listener on another one may be in the way all the same.
        let targets = selector.targets().iter().map(|target| Target { address: None, ..target.clone() }).collect();
        let ports = Selector::new(targets, Filters { tcp, udp, netns, ..Filters::default() });
        let snapshot = scanner.scan_in(netns, &|socket| ports.matches_socket(socket))?;
        let (selected, left_out) = snapshot
            .listeners
            .into_iter()
            .partition(|listener| selector.matches_socket(&listener.socket) && selector.matches(listener, snapshot.at));
        Ok(Choice { selected, left_out, named: selector.named_ports(), selector: selector.clone() })
    }

    /// These listeners and no others.
    pub(super) fn of(selected: Vec<Listener>, selector: &Selector) -> Choice {
        Choice { selected, left_out: Vec::new(), named: Vec::new(), selector: selector.clone() }
    }

    /// Whether there is nothing to report on.
    pub fn is_empty(&self) -> bool {
        self.selected.is_empty() && self.named.is_empty()
    }
}

impl Job {
    /// Plans to free what is chosen. `guards` say who is spared for the sake of the one who asks; what the host knows of
    /// units, containers and processes named by their PIDs is added here.
    ///
    /// # Errors
    /// When the processes of the host cannot be read.
    pub fn prepare(choice: Choice, terms: &Terms, guards: Guards) -> anyhow::Result<Job> {
        let Choice { selected, left_out, named, selector } = choice;
        let others: Vec<Socket> = left_out.iter().map(|listener| listener.socket.clone()).collect();
        if terms.close_sockets {
            let guards = Guards::open();
            let plan = Plan::new(selected, &others, &named, &guards, &life::stat_of).closing();
            let called_off = Arc::default();
            return Ok(Job { plan, guards, engine: None, left_out, named, selector, remove_cwd: None, called_off });
        }
        let units = Units::ask(&selected, terms.stop_units);
        let mut guards = guards.with_units(units).with_named(&selector.filters().pids);
        let mut engine = None;
        // A plain port costs no question.
        let may_publish = terms.stop_containers && !process::sees_all() && selected.iter().any(Listener::is_ghost);
        if may_publish {
            guards = guards.trusting_engine();
        }
        if may_publish || engine::is_involved_in(&selected) {
            let roster;
            (engine, roster) = engine::ask();
            guards = guards.with_containers(roster, terms.stop_containers);
        }
        let mut plan = Plan::new(selected, &others, &named, &guards, &life::stat_of);
        if terms.reach != Reach::Holders {
            let seen = process::boot_ns_now();
            let all = stat::all().context("cannot read the processes in /proc")?;
            plan.reach_out(terms.reach, &all, seen, &process::read_exact, &guards, &life::stat_of);
        }
        Ok(Job { plan, guards, engine, left_out, named, selector, remove_cwd: None, called_off: Arc::default() })
    }

    /// Removes the working directories of those who are ended as well, where they match the glob and
    /// [may be](crate::sweep) removed.
    pub fn removing(self, directories: Option<GlobMatcher>) -> Job {
        Job { remove_cwd: directories, ..self }
    }

    /// Once this is set, [`Self::run`] signals nobody any more, and ends with what it has done by then.
    pub fn until(self, called_off: Arc<AtomicBool>) -> Job {
        Job { called_off, ..self }
    }

    /// Ends as well what started the holders, as far as it is part of the same job.
    pub(super) fn with_starters(mut self, rule: &Rule<'_>) -> Job {
        let seen = process::boot_ns_now();
        let starters = rule.find(&self.plan.victims, &life::stat_of);
        self.plan.take_in(starters, seen, &self.guards, &life::stat_of);
        self
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The outcomes of a dry run.
    pub fn planned(self) -> Vec<Outcome> {
        let held = self.remove_cwd.as_ref().map(|_| Held::of(&self.plan));
        let victims: Vec<u32> = self.plan.victims.iter().map(|victim| victim.process.id.pid).collect();
        let selector = &self.selector;
        let mut outcomes = planned(self.plan, &|port| addresses(selector, port));
        Others { selector, named: &self.named }.correct(&mut outcomes, &self.left_out);
        if let (Some(held), Some(glob)) = (held, &self.remove_cwd) {
            held.preview(glob, &victims, &mut outcomes);
        }
        outcomes
    }

    /// Does it, and says what became of each port, and why where it is not free. `progress` is told of each process.
    ///
    /// # Errors
    /// When the host cannot be scanned. Signals may have been sent by then.
    pub fn run(
        mut self,
        scanner: &mut Scanner,
        options: Options,
        progress: &mut dyn FnMut(&Progress<'_>),
    ) -> anyhow::Result<Vec<Outcome>> {
        if !self.plan.closes {
            ask_managers(&mut self.plan);
        }
        let Job { plan, guards, engine, left_out, named, selector, remove_cwd, called_off } = self;
        // While they are there: afterwards nothing tells where they were.
        let held = remove_cwd.filter(|_| !plan.closes).map(|glob| (Held::of(&plan), glob));
        let ports: BTreeSet<(u16, Protocol)> = plan.groups.iter().map(|group| (group.port, group.proto)).collect();
        // Whoever takes the port counts, whatever the selectors say of addresses and holders.
        let wanted = selector.filters().netns;
        let is_of_interest = |socket: &Socket| {
            ports.contains(&(socket.port, socket.proto)) && wanted.is_none_or(|netns| netns == socket.netns)
        };
        let all_netns = is_elsewhere(wanted);
        // A port that was free in the beginning may not be when others have been freed.
        let had_to_wait = plan.groups.iter().any(|group| group.sockets.is_empty());
        let is_idle = plan.listeners.is_empty();
        let mut outcomes = execute(
            plan,
            options,
            &mut World {
                rescan: &mut || Ok(scanner.scan(all_netns, &is_of_interest)?.listeners),
                holds: &procfs::holds,
                guards: &guards,
                stop: &mut |wholes, grace| stop(engine.as_ref(), wholes, grace),
                addresses: &|port| addresses(&selector, port),
                progress,
                called_off: &called_off,
            },
        )?;
        let others = Others { selector: &selector, named: &named };
        if is_idle || !had_to_wait && left_out.is_empty() {
            others.correct(&mut outcomes, &left_out);
        } else {
            // What was left out may have gone with what was not: a server may listen at several addresses.
            let was_there = |found: &Listener| left_out.iter().any(|l| same_socket(l.socket.id, found.socket.id));
            let now = scanner.scan(all_netns, &is_of_interest)?.listeners;
            let (stay, came): (Vec<_>, Vec<_>) = now.into_iter().partition(was_there);
            others.correct(&mut outcomes, &stay);
            others.correct_free(&mut outcomes, &came);
        }
        if let Some((held, glob)) = held {
            held.sweep(&glob, options.grace, &mut outcomes);
        }
        aftermath::explain(&mut outcomes, scanner);
        Ok(outcomes)
    }
}

/// What is on ports that were named, and is not what was ended.
struct Others<'a> {
    selector: &'a Selector,
    named: &'a [(u16, Option<Protocol>)],
}

impl Others<'_> {
    /// Sets right what is said of ports on which the selectors leave out something that is there still. The same is said
    /// whether or not anybody else had the port: a kill that is repeated tells the same.
    fn correct(&self, outcomes: &mut [Outcome], left_out: &[Listener]) {
        for outcome in outcomes.iter_mut().filter(|outcome| self.is_named(outcome) && outcome.is_done()) {
            let (hindering, aside) = self.on_port(outcome, left_out);
            let unknown: Vec<&Listener> =
                hindering.iter().filter(|listener| self.selector.may_mean(listener)).copied().collect();
            match unknown.len() == hindering.len() {
                true => outcome.correct(&unknown, Status::Denied),
                false => outcome.correct(&hindering, Status::Partial),
            }
            if matches!(outcome.status, Status::Free | Status::Cleaned) {
                outcome.mention(&aside);
            }
        }
    }

    /// Sets right what is said of ports that were free, and that somebody took meanwhile.
    fn correct_free(&self, outcomes: &mut [Outcome], came: &[Listener]) {
        for outcome in outcomes.iter_mut().filter(|outcome| outcome.status == Status::Free) {
            outcome.correct(&self.on_port(outcome, came).0, Status::Respawned);
        }
    }

    fn is_named(&self, Outcome { port, proto, .. }: &Outcome) -> bool {
        self.named.iter().any(|(named, of)| named == port && of.is_none_or(|of| of == *proto))
    }

    /// Those on this port that keep it from being free, and those that do not.
    fn on_port<'l>(&self, outcome: &Outcome, all: &'l [Listener]) -> (Vec<&'l Listener>, Vec<&'l Listener>) {
        let Outcome { port, proto, netns, .. } = *outcome;
        let is_there =
            |l: &&Listener| (l.socket.port, l.socket.proto) == (port, proto) && (netns == 0 || netns == l.socket.netns);
        all.iter().filter(is_there).partition(|listener| self.selector.is_hindered_by(&listener.socket))
    }
}

/// Whether the selection reaches beyond our own network namespace. Another one by number is found like any other: by
/// reading all of them.
fn is_elsewhere(wanted: Option<NetnsId>) -> bool {
    wanted.is_none() || wanted != netns::own().ok()
}

/// Where a port that nobody has is to be free: in our own network namespace. Of another one there may be nothing to go by.
fn addresses(selector: &Selector, port: u16) -> Vec<IpAddr> {
    match selector.filters().netns {
        wanted @ Some(_) if is_elsewhere(wanted) => Vec::new(),
        _ => selector.named_addresses(port),
    }
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
