//! The diff of a snapshot against the table: start-up, recovery from loss, refresh and polling are all this.
//!
//! Rows that are gone come first and rows that are new last, so that an address is told free before it is told taken.

use std::collections::HashSet;
use std::sync::Arc;

use super::rows::{Found, Row, RowId, key};
use super::{Read, Table, closed_unseen, elect_binder, is_moved};
use crate::model::{BootNs, Change, Holder, Listener, Process, Snapshot};

impl Table {
    pub(super) fn snapshot(&mut self, snapshot: Snapshot, out: &mut Vec<Change>) {
        let Snapshot { at, listeners, complete, lost } = snapshot;
        let before = self.read.as_ref().map(|read| read.at);
        let repeated = before == Some(at);
        if lost > 0 && !repeated {
            out.push(Change::Resync { at, lost });
        }
        // An older one knows nothing that the newer did not.
        if before.is_some_and(|before| before >= at) {
            return;
        }
        for (gone_at, listener) in self.tombstones.settle_all() {
            out.push(closed_unseen(gone_at, *listener));
        }
        self.read = Some(Read { at, complete: complete.into_iter().collect(), after_loss: lost > 0 });
        self.leave_out(at, &listeners, out);
        let mut seen: HashSet<RowId> = HashSet::new();
        for listener in listeners {
            let (id, mptcp) = (listener.socket.id, listener.socket.mptcp);
            match self.rows.find(id, mptcp) {
                Found::Same(row) if seen.contains(&row) => self.learn(row, at, id, mptcp, out),
                Found::Same(row) => {
                    seen.insert(row);
                    self.refresh(row, at, listener, out);
                }
                // The snapshot saw it before it made room, while the rest was read, for the row that has its inode now.
                Found::Reused(_) => {}
                Found::Unknown => seen.extend(self.discover(at, before, listener, out)),
            }
        }
        self.rows.verified(at);
        self.unread = self.unread.filter(|&mark| mark >= at);
    }

    /// Deals with the rows that are not among `listeners`.
    fn leave_out(&mut self, at: BootNs, listeners: &[Listener], out: &mut Vec<Change>) {
        let (mut shown, mut reused) = (HashSet::new(), HashSet::new());
        for Listener { socket, .. } in listeners {
            match self.rows.find(socket.id, socket.mptcp) {
                Found::Same(row) => shown.insert(row),
                Found::Reused(row) => reused.insert(row),
                Found::Unknown => false,
            };
        }
        let absent: Vec<RowId> = self.rows.iter().map(|(id, _)| id).filter(|id| !shown.contains(id)).collect();
        for id in absent {
            let Some(row) = self.rows.get_mut(id) else { continue };
            if row.as_of >= at {
                let as_of = row.as_of;
                self.mark_row(id, as_of);
                continue;
            }
            let covered = self.read.as_ref().is_some_and(|read| read.covers(row.listener.socket.netns));
            if covered || reused.contains(&id) || row.doubt.is_some() {
                let (closed_at, by) = row.doubt.take().map_or((at, None), |doubt| (doubt.at, doubt.by));
                self.close(id, closed_at, by, out);
            } else {
                self.read_holders(id, at, Vec::new(), out);
            }
        }
    }

    /// A row that the snapshot shows too.
    fn refresh(&mut self, id: RowId, at: BootNs, listener: Listener, out: &mut Vec<Change>) {
        let Listener { socket, since, holders } = listener;
        let Some(row) = self.rows.get_mut(id) else { return };
        let moved = is_moved(&row.listener.socket, &socket);
        let newer = row.as_of < at;
        let was = (moved && newer).then(|| (row.listener.clone(), row.keeper()));
        if was.is_some() {
            (row.listener.since, row.began, row.inherited) = (since, since.unwrap_or(at), false);
            row.binder = None;
        } else if row.doubt.as_ref().is_some_and(|doubt| row.began <= doubt.at) {
            // It did stop listening; when it began again is not known.
            (row.listener.since, row.began) = (since, at);
        } else if row.listener.since.is_none() {
            row.listener.since = since;
        }
        row.doubt = None;
        if newer {
            let own = &mut row.listener.socket;
            own.backlog = socket.backlog.or(own.backlog);
            own.v6only = socket.v6only.or(own.v6only);
            own.uid = socket.uid;
            row.as_of = at;
        }
        if was.is_some() {
            self.rows.move_to(id, &socket);
        }
        self.learn(id, at, socket.id, socket.mptcp, out);
        if let Some((listener, by)) = was {
            out.push(Change::Closed { at, listener, by });
            let mut unheard = Vec::new();
            self.read_holders(id, at, holders, &mut unheard);
            if let Some(row) = self.rows.get(id) {
                out.push(Change::Opened { at, listener: row.listener.clone() });
            }
        } else {
            self.read_holders(id, at, holders, out);
        }
    }

    /// A listener of the snapshot that has no row. Says the row it gets.
    fn discover(
        &mut self,
        at: BootNs,
        before: Option<BootNs>,
        listener: Listener,
        out: &mut Vec<Change>,
    ) -> Option<RowId> {
        let Listener { socket, since, holders } = listener;
        if let Some(stone) = self.tombstones.find(socket.id, socket.mptcp)
            && stone.at > at
        {
            return None;
        }
        let closed_before = self.exhume(&socket, out);
        let mut row = Row::new(socket, at);
        row.listener.since = since;
        row.began = since.unwrap_or(at);
        row.closed_before = closed_before;
        row.inherited = before.is_none();
        let id = self.rows.insert(row);
        let mut unheard = Vec::new();
        self.read_holders(id, at, holders, &mut unheard);
        if before.is_some_and(|before| closed_before > before) {
            // It closed lately: it listens again, or the snapshot read while that close was in progress.
            self.mark_row(id, at);
        }
        if before.is_some()
            && let Some(row) = self.rows.get(id)
        {
            out.push(Change::Opened { at, listener: row.listener.clone() });
        }
        Some(id)
    }

    /// Gives a row the holders of a snapshot that began at `at`, and tells if they are not who watchers know of.
    fn read_holders(&mut self, id: RowId, at: BootNs, read: Vec<Holder>, out: &mut Vec<Change>) {
        let Some(row) = self.rows.get_mut(id) else { return };
        row.fresh.retain(|&(_, added)| added >= at);
        row.read_at = at;
        let read_any = !read.is_empty();
        let mut exited: Option<Holder> = None;
        let mut holders: Vec<Holder> = Vec::with_capacity(read.len());
        let (mut renewed, mut stirred) = (Vec::new(), false);
        for mut holder in read {
            if self.exited.contains(holder.process.id) {
                exited.get_or_insert(holder);
                continue;
            }
            let process = key(holder.process.id);
            stirred |= self.stirred.get(&process).is_some_and(|&stirred| stirred >= at);
            let newer = self.rows.details_at(process).is_none_or(|details_at| details_at <= at);
            let row = self.rows.get(id);
            let known = row.and_then(|row| row.listener.holders.iter().find(|known| key(known.process.id) == process));
            match known {
                Some(known) if !newer || is_poorer(&holder.process, &known.process) => {
                    holder.process = Arc::clone(&known.process);
                }
                _ => renewed.push(process),
            }
            holders.push(holder);
        }
        if stirred {
            self.rows.mark_unread(id, at);
        }
        let Some(row) = self.rows.get_mut(id) else { return };
        for holder in &row.listener.holders {
            let process = key(holder.process.id);
            let is_fresh = row.fresh.iter().any(|&(fresh, _)| fresh == process);
            if is_fresh && !holders.iter().any(|read| key(read.process.id) == process) {
                holders.push(holder.clone());
            }
        }
        elect_binder(&mut holders, row.binder);
        let known: HashSet<_> = row.listener.holders.iter().map(|holder| key(holder.process.id)).collect();
        let now: HashSet<_> = holders.iter().map(|holder| key(holder.process.id)).collect();
        let closing = read_any && holders.is_empty();
        if holders.is_empty() {
            row.last_holder = row.listener.binder().cloned().or(exited).or(row.last_holder.take());
        }
        if closing {
            // All have exited while the snapshot was read: as with the last Exited, a Closed normally follows.
            row.untold = true;
            self.rows.set_holders(id, holders, at);
            self.mark_row(id, at);
            return;
        }
        let tell = known != now || row.untold;
        row.untold = false;
        self.rows.set_holders(id, holders, at);
        for process in renewed {
            self.rows.renew_details(process, at);
        }
        if tell && let Some(row) = self.rows.get(id) {
            out.push(Change::Holders { at, listener: row.listener.clone() });
        }
    }
}

/// Whether `new` was gone before it could be read, and `old` was not.
fn is_poorer(new: &Process, old: &Process) -> bool {
    new.uid.is_none() && new.command.is_empty() && old.uid.is_some() && new.name == old.name
}
