//! Out of whom each listener came, as /proc showed when it opened: by the time that somebody asks, parents may be gone.

use std::collections::HashMap;

use crate::model::{Ancestor, Change, Listener};
use crate::source::stat;

/// More is not remembered: 16 MiB or so.
const MAX: usize = 1 << 16;

/// By the cookie of the socket, which no other ever has; of open listeners alone.
#[derive(Debug, Default)]
pub(super) struct Lineages(HashMap<u64, Vec<Ancestor>>);

impl Lineages {
    /// Reads whom the binder came from before that can change much more; forgets what has closed.
    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Opened { listener, .. } if self.0.len() < MAX && listener.socket.id.cookie != 0 => {
                let Some(binder) = listener.binder().map(|binder| binder.process.id) else { return };
                // Of another process that has the number now, nothing is said.
                let stat = |pid| stat::read(pid).ok().filter(|stat| pid != binder.pid || stat.id().is_same(binder));
                let lineage = stat::lineage(binder.pid, &stat);
                // That it came from init is what /proc says at any time.
                if lineage.len() > 1 {
                    self.0.insert(listener.socket.id.cookie, lineage);
                }
            }
            Change::Closed { listener, .. } => {
                self.0.remove(&listener.socket.id.cookie);
            }
            _ => {}
        }
    }

    /// Of the binder, nearest first; nothing where it was open before the agent, or came from init.
    pub(super) fn of(&self, listener: &Listener) -> Vec<Ancestor> {
        self.0.get(&listener.socket.id.cookie).cloned().unwrap_or_default()
    }
}
