//! Listeners that are closed in the kernel, whoever holds them: nobody is signalled, and nobody is spared.

use std::io;

use super::execute::{Run, World};
use super::progress::{Progress, Step};
use crate::model::{Listener, Socket, SocketId};
use crate::source::diag;

/// Why a socket that is closed in the kernel keeps its port.
pub(super) const STAYS_BOUND: &str = "a port that was bound by number stays bound until the process closes its \
                                      descriptor: others can bind it only if both sides set SO_REUSEADDR";

/// A socket that was not closed.
#[derive(Clone, Debug)]
pub(super) struct Unclosed {
    pub(super) id: SocketId,
    pub(super) reason: String,
    /// For want of permission.
    pub(super) denied: bool,
}

impl Run {
    /// Closes every listener of the plan, and looks what is left of them.
    pub(super) fn close_sockets(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        for Listener { socket, holders, .. } in &self.plan.listeners {
            match diag::destroy(socket) {
                Ok(()) => {
                    self.closed.push(socket.id);
                    for holder in holders {
                        (world.progress)(&Progress { process: &holder.process, step: Step::Closed });
                    }
                }
                Err(error) => self.unclosed.push(Unclosed::new(socket, &error)),
            }
        }
        self.look(world)
    }
}

impl Unclosed {
    fn new(socket: &Socket, error: &anyhow::Error) -> Unclosed {
        let is_refusal = |cause: &io::Error| cause.kind() == io::ErrorKind::PermissionDenied;
        let denied = error.chain().filter_map(|cause| cause.downcast_ref()).any(is_refusal);
        // What the kernel says of want of permission adds nothing to the sentence.
        let reason = if denied { error.to_string() } else { format!("{error:#}") };
        Unclosed { id: socket.id, reason, denied }
    }
}
