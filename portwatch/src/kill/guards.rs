//! Whom portwatch does not signal, whatever was selected, and what is done instead. Pure: it is handed what was read.

use crate::engine::roster::Role;
use crate::engine::{Container, Roster};
use crate::model::{Process, Socket};
use crate::source::stat::{self, Stat};

/// Whom portwatch does not signal.
#[derive(Clone, Debug, Default)]
pub struct Guards {
    own: u32,
    /// portwatch's process group; 0 where not known.
    pub(super) group: u32,
    ancestors: Vec<u32>,
    force_self: bool,
    roster: Roster,
    stop_containers: bool,
}

/// What is to be done about the holder of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Signal,
    /// Stop the container that it runs in, or holds the port for.
    Stop(Container),
    Refuse {
        reason: String,
        /// For want of permission.
        denied: bool,
    },
}

impl Guards {
    /// `own` is portwatch's pid; `force_self` gives up the protection of its ancestors.
    pub fn new(own: u32, force_self: bool, stat: &dyn Fn(u32) -> Option<Stat>) -> Guards {
        let group = stat(own).map_or(0, |own| own.process_group);
        Guards { own, group, ancestors: stat::ancestors(own, stat), force_self, ..Guards::default() }
    }

    /// The guards of this process, from `/proc`.
    pub fn current(force_self: bool) -> Guards {
        Guards::new(std::process::id(), force_self, &|pid| stat::read(pid).ok())
    }

    /// Adds what is known of containers. With `stop`, those of the holders are stopped; else whatever holds a port for a
    /// container is left alone, for the container would go on with a dead port.
    pub fn with_containers(self, roster: Roster, stop: bool) -> Guards {
        Guards { roster, stop_containers: stop, ..self }
    }

    pub(super) fn judge(&self, process: &Process, socket: &Socket, stat: &dyn Fn(u32) -> Option<Stat>) -> Verdict {
        if let Some(reason) = self.refuse(process.id.pid, stat) {
            return Verdict::Refuse { reason, denied: false };
        }
        let Some(link) = self.roster.link(process, socket) else { return Verdict::Signal };
        if self.stop_containers {
            return match (self.roster.obstacle(&link, socket), link.container) {
                (None, Some(container)) => Verdict::Stop(container.clone()),
                (Some((reason, denied)), _) => Verdict::Refuse { reason, denied },
                (None, None) => Verdict::Refuse { reason: link.describe(socket), denied: false },
            };
        }
        match link.role {
            Role::Proxy(_) => Verdict::Refuse { reason: self.roster.refusal(&link, socket), denied: false },
            Role::Inside(_) => Verdict::Signal,
        }
    }

    /// The name of the container that the process runs in, where an engine told it.
    pub(super) fn container_name(&self, process: &Process, socket: &Socket) -> Option<String> {
        Some(self.roster.link(process, socket)?.container?.name.clone())
    }

    /// Why this process must not be signalled, if so.
    pub fn refuse(&self, pid: u32, stat: &dyn Fn(u32) -> Option<Stat>) -> Option<String> {
        let reason = if pid <= 1 {
            "init is never signalled"
        } else if pid == self.own {
            "portwatch itself holds the port"
        } else if self.ancestors.contains(&pid) && !self.force_self {
            "portwatch was started by it; --force-self signals it all the same"
        } else if stat(pid).is_some_and(|s| s.kernel_thread) {
            "kernel threads are never signalled"
        } else {
            return None;
        };
        Some(reason.to_owned())
    }
}
