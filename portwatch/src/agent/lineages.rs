//! Out of whom each listener came, as /proc showed when it opened: by the time that somebody asks, parents may be gone.

use std::collections::HashMap;

use crate::model::{Ancestor, Change, Listener};
use crate::source::stat;

/// Ancestors in all that are remembered: 16 MiB or so.
const MAX: usize = 1 << 18;

#[derive(Debug, Default)]
pub(super) struct Lineages {
    /// By the cookie of the socket, which no other ever has; of open listeners alone.
    lines: HashMap<u64, Vec<Ancestor>>,
    /// How many ancestors those are.
    count: usize,
}

impl Lineages {
    /// Reads whom the binder came from before that can change much more; forgets what has closed.
    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Opened { listener, .. } if self.count < MAX && listener.socket.id.cookie != 0 => {
                let Some(binder) = listener.binder().map(|binder| binder.process.id) else { return };
                // Of another process that has the number now, nothing is said.
                let stat = |pid| stat::read(pid).ok().filter(|stat| pid != binder.pid || stat.id().is_same(binder));
                let lineage = stat::lineage(binder.pid, &stat);
                // That it came from init is what /proc says at any time.
                if lineage.len() > 1 {
                    self.forget(listener);
                    self.count += lineage.len();
                    self.lines.insert(listener.socket.id.cookie, lineage);
                }
            }
            Change::Closed { listener, .. } => self.forget(listener),
            _ => {}
        }
    }

    fn forget(&mut self, listener: &Listener) {
        self.count -= self.lines.remove(&listener.socket.id.cookie).map_or(0, |line| line.len());
    }

    /// Of the binder, nearest first; nothing where it was open before the agent, or came from init.
    pub(super) fn of(&self, listener: &Listener) -> Vec<Ancestor> {
        self.lines.get(&listener.socket.id.cookie).cloned().unwrap_or_default()
    }
}
