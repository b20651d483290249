//! Containers that are stopped as a whole, by their engine, instead of signalling the processes that hold a port.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::execute::{FORCE_WAIT, Run, SCAN_EVERY, World};
use crate::engine::{Container, EngineError};

/// Stops these containers, which have so long until they are killed, and says what became of each. Returns when all is
/// over.
pub type Stopper<'a> = dyn FnMut(&[&Container], Duration) -> Vec<Result<(), EngineError>> + 'a;

impl Run {
    /// Stops the containers of the plan, and waits until their ports are free: an engine says that a container has
    /// stopped once its processes are gone, and what publishes its ports may outlive that by a moment.
    pub(super) fn stop_containers(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        if self.plan.stops.is_empty() {
            return Ok(());
        }
        let grace = if self.options.signal == Signal::KILL { Duration::ZERO } else { self.options.grace };
        let containers: Vec<&Container> = self.plan.stops.iter().map(|stop| &stop.container).collect();
        self.stopped = (world.stop)(&containers, grace);
        self.began = true;
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

    /// Whether a port that a stopped container had is still taken by one of its processes.
    fn is_awaiting_ports(&self) -> bool {
        let stopped = self.plan.stops.iter().zip(&self.stopped).filter(|(_, result)| result.is_ok());
        stopped.flat_map(|(stop, _)| &stop.processes).any(|process| self.current.iter().any(|l| l.holds(process.id)))
    }
}
