//! Out of whom each listener came, as /proc showed when it opened: by the time that somebody asks, parents may be gone.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::{Ancestor, Change, Listener, ProcessId};
use crate::source::stat;

/// More is not remembered: 16 MiB or so.
const MAX: usize = 1 << 16;

#[derive(Debug, Default)]
pub(super) struct Lineages {
    /// By the cookie of the socket, which no other ever has; of open listeners alone.
    known: HashMap<u64, Arc<[Ancestor]>>,
    /// Who opened one last: a server with many ports is looked at once.
    last: Option<(ProcessId, Arc<[Ancestor]>)>,
}

impl Lineages {
    /// Reads whom the binder came from before that can change much more; forgets what has closed.
    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Opened { listener, .. } if self.known.len() < MAX && listener.socket.id.cookie != 0 => {
                let Some(binder) = listener.binder().map(|binder| binder.process.id) else { return };
                let lineage = self.read(binder);
                // That it came from init is what /proc says at any time.
                if lineage.len() > 1 {
                    self.known.insert(listener.socket.id.cookie, lineage);
                }
            }
            Change::Closed { listener, .. } => {
                self.known.remove(&listener.socket.id.cookie);
            }
            _ => {}
        }
    }

    fn read(&mut self, binder: ProcessId) -> Arc<[Ancestor]> {
        if let Some((last, lineage)) = &self.last
            && last.is_same(binder)
        {
            return Arc::clone(lineage);
        }
        // Of another process that has the number now, nothing is said.
        let stat = |pid| stat::read(pid).ok().filter(|stat| pid != binder.pid || stat.id().is_same(binder));
        let lineage: Arc<[Ancestor]> = stat::lineage(binder.pid, &stat).into();
        self.last = Some((binder, Arc::clone(&lineage)));
        lineage
    }

    /// Of the binder, nearest first; nothing where it was open before the agent, or came from init.
    pub(super) fn of(&self, listener: &Listener) -> Vec<Ancestor> {
        self.known.get(&listener.socket.id.cookie).map(|lineage| lineage.to_vec()).unwrap_or_default()
    }
}
