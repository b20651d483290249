//! Containers that are stopped as a whole, by their engine, instead of signalling the processes that hold a port.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};

use super::execute::{FORCE_WAIT, LOOK_EVERY, Run, World};
use crate::engine::{Container, EngineError};
use crate::model::Process;

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
        // Before they are gone. No signal is sent through these: a wrong one, under a recycled PID, ends a wait late.
        let open = |process: &Arc<Process>| {
            let pid = i32::try_from(process.id.pid).ok().and_then(Pid::from_raw)?;
            pidfd_open(pid, PidfdFlags::empty()).ok()
        };
        let mut holders: Vec<_> = self.plan.stops.iter().flat_map(|stop| &stop.processes).filter_map(open).collect();
        let grace = if self.options.signal == Signal::KILL { Duration::ZERO } else { self.options.grace };
        let containers: Vec<&Container> = self.plan.stops.iter().map(|stop| &stop.container).collect();
        self.stopped = (world.stop)(&containers, grace);
        let until = Instant::now() + FORCE_WAIT;
        loop {
            self.look(world)?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.is_awaiting_ports() {
                return Ok(());
            }
            let limit = left.min(LOOK_EVERY);
            let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) };
            let mut fds: Vec<PollFd<'_>> = holders.iter().map(|holder| PollFd::new(holder, PollFlags::IN)).collect();
            // An error, such as a signal to portwatch itself, ends in another look.
            let _ = poll(&mut fds, Some(&timeout));
            let alive: Vec<bool> = fds.iter().map(|fd| fd.revents().is_empty()).collect();
            let mut alive = alive.into_iter();
            holders.retain(|_| alive.next().unwrap_or(true));
        }
    }

    /// Whether a port that a stopped container had is still taken by one of its processes.
    fn is_awaiting_ports(&self) -> bool {
        let stopped = self.plan.stops.iter().zip(&self.stopped).filter(|(_, result)| result.is_ok());
        stopped.flat_map(|(stop, _)| &stop.processes).any(|process| self.current.iter().any(|l| l.holds(process.id)))
    }
}
