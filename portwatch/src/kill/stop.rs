//! What is stopped as a whole, by whoever runs it, instead of signalling the processes that hold a port: containers by
//! their engine, units by systemd.

use std::fmt;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::execute::{FORCE_WAIT, Run, SCAN_EVERY, World};
use super::progress::{Progress, Step};
use crate::cgroup::Manager;
use crate::engine::{Container, EngineError};
use crate::render::escape;
use crate::source::stat::has_ended;
use crate::supervisor::systemd;

/// Something that runs processes and can be stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whole {
    Container(Container),
    /// A unit of systemd, by its full name, which is hostile text.
    Unit {
        name: String,
        manager: Manager,
    },
}

impl Whole {
    pub fn is_same(&self, other: &Whole) -> bool {
        match (self, other) {
            (Whole::Container(one), Whole::Container(other)) => one.id == other.id,
            (one, other) => one == other,
        }
    }

    /// Whether systemd listens by it: a `.socket` unit.
    pub fn is_socket_unit(&self) -> bool {
        matches!(self, Whole::Unit { name, .. } if name.ends_with(".socket"))
    }
}

impl fmt::Display for Whole {
    /// `container web (5eed81bcd920)`, `unit web.service`, `user unit web.service`; fit for a terminal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Whole::Container(container) => write!(f, "container {container}"),
            Whole::Unit { name, manager: Manager::System } => write!(f, "unit {}", escape(name)),
            Whole::Unit { name, manager: Manager::User(_) } => write!(f, "user unit {}", escape(name)),
        }
    }
}

/// Why it was not stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopError {
    /// One sentence that names what it was about, fit for a terminal.
    pub message: String,
    /// For want of permission.
    pub denied: bool,
}

impl StopError {
    pub fn of_container(container: &Container, error: &EngineError) -> StopError {
        StopError { message: format!("cannot stop container {container}: {error}"), denied: error.denied }
    }
}

impl From<systemd::Error> for StopError {
    fn from(error: systemd::Error) -> StopError {
        StopError { denied: matches!(error, systemd::Error::Denied { .. }), message: error.to_string() }
    }
}

/// What became of something that was to be stopped: the units that are active still and start it again when something
/// happens.
pub type Stopping = Result<Vec<String>, StopError>;

/// Stops all of these, containers with so long until they are killed, and says what became of each. Returns when all is
/// over.
pub type Stopper<'a> = dyn FnMut(&[&Whole], Duration) -> Vec<Stopping> + 'a;

impl Run {
    /// Stops what the plan says, and waits until the ports are free: an engine says that a container has stopped once
    /// its processes are gone, and what publishes its ports may outlive that by a moment.
    pub(super) fn stop_wholes(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        if self.plan.stops.is_empty() {
            return Ok(());
        }
        // A service whose socket unit goes on would be started again by whoever connects.
        self.plan.stops.sort_by_key(|stop| !stop.what.is_socket_unit());
        let grace = if self.options.signal == Signal::KILL { Duration::ZERO } else { self.options.grace };
        for stop in &self.plan.stops {
            for process in &stop.processes {
                let step = Step::Stopping { what: stop.what.to_string() };
                (world.progress)(&Progress { process, step });
            }
        }
        let wholes: Vec<&Whole> = self.plan.stops.iter().map(|stop| &stop.what).collect();
        let began = Instant::now();
        self.stopped = (world.stop)(&wholes, grace);
        self.began = true;
        let done = self.plan.stops.iter().zip(&self.stopped).filter(|(_, result)| result.is_ok());
        for process in done.flat_map(|(stop, _)| &stop.processes) {
            let after = began.elapsed();
            let step = if has_ended(process.id) { Step::Ended { after } } else { Step::LetGo { after } };
            (world.progress)(&Progress { process, step });
        }
        self.look(world)?;
        let until = Instant::now() + FORCE_WAIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.is_awaiting_ports() {
                return Ok(());
            }
            self.pause(left, world);
            if self.is_blind() && self.scanned.elapsed() >= SCAN_EVERY {
                self.look(world)?;
            }
        }
    }

    /// Whether a port is still taken by a process of what was stopped, or by one of its that is not visible.
    fn is_awaiting_ports(&self) -> bool {
        let mut stopped = self.plan.stops.iter().zip(&self.stopped).filter(|(_, result)| result.is_ok());
        stopped.any(|(stop, _)| match stop.processes.is_empty() {
            true => stop.groups.iter().any(|&group| self.is_taken(group)),
            false => stop.processes.iter().any(|process| self.current.iter().any(|l| l.holds(process.id))),
        })
    }
}
