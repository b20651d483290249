//! Out of whom each listener came, as /proc showed when it opened: by the time that somebody asks, parents may be gone.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::{Ancestor, Change, Listener, ProcessId};
use crate::source::stat;

/// Ancestors in all that are remembered: 16 MiB or so, where no two listeners share theirs.
const MAX: usize = 1 << 18;

/// Changes at once from which on it is a flood. Reading a line takes several files, and the task that owns the table has
/// the flood to take in.
const FLOOD: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Lineages {
    /// By the inode of the socket (kernels before 5.12 tell no cookie when one opens), with the binder; of open listeners
    /// alone.
    lines: HashMap<u64, (ProcessId, Arc<[Ancestor]>)>,
    /// How many ancestors those are.
    count: usize,
    /// Who opened one last: a server with many ports is looked at once.
    last: Option<(ProcessId, Arc<[Ancestor]>)>,
}

impl Lineages {
    /// Reads whom the binders came from before that can change much more; forgets what has closed.
    pub(super) fn apply(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Opened { listener, .. } if changes.len() < FLOOD => self.learn(listener),
                Change::Closed { listener, .. } => self.forget(listener),
                _ => {}
            }
        }
    }

    fn learn(&mut self, listener: &Listener) {
        let Some(binder) = listener.binder().map(|binder| binder.process.id) else { return };
        if self.count >= MAX || listener.socket.id.inode == 0 {
            return;
        }
        let line = self.read(binder);
        // That it came from init is what /proc says at any time.
        if line.len() > 1 {
            self.forget(listener);
            self.count += line.len();
            self.lines.insert(listener.socket.id.inode, (binder, line));
        }
    }

    fn read(&mut self, binder: ProcessId) -> Arc<[Ancestor]> {
        if let Some((last, line)) = &self.last
            && last.is_same(binder)
        {
            return Arc::clone(line);
        }
        // Of another process that has the number now, nothing is said.
        let stat = |pid| stat::read(pid).ok().filter(|stat| pid != binder.pid || stat.id().is_same(binder));
        let line: Arc<[Ancestor]> = stat::lineage(binder.pid, &stat).into();
        self.last = Some((binder, Arc::clone(&line)));
        line
    }

    fn forget(&mut self, listener: &Listener) {
        self.count -= self.lines.remove(&listener.socket.id.inode).map_or(0, |(_, line)| line.len());
    }

    /// Of the binder, nearest first; nothing where it was open before the agent, opened in a flood, or came from init.
    pub(super) fn of(&self, listener: &Listener) -> Vec<Ancestor> {
        let binder = listener.binder().map(|binder| binder.process.id);
        let known = self.lines.get(&listener.socket.id.inode);
        let known = known.filter(|(process, _)| binder.is_none_or(|binder| binder.is_same(*process)));
        known.map(|(_, line)| line.to_vec()).unwrap_or_default()
    }
}
