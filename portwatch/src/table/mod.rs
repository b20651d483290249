//! The table of listeners: every event goes in by [`Table::apply`], and what it changed comes out. No IO, no clock,
//! no async; it cannot fail; an event that comes twice or late does no harm. Imports only the model.
//!
//! ```text
//!              Opened                 Closed                    Opened, newer
//!   unknown ──────────► row ─────────────────────► tombstone ──────────────────► row
//!      │   or Snapshot   │  or absent from Snapshot     ▲
//!      └─────────────────┼──── Closed (its Opened is late) ┘
//!                        └─ Forked, Execed, Exited, Snapshot: its holders
//! ```
//!
//! **Which socket.** A row owns an inode and a cookie; of MPTCP two cookies, since parent and subflow share the inode.
//! The cookie decides, where known. The same inode with another cookie is the other half of an MPTCP listener, else a
//! reused inode number: then the old socket has closed unseen. An inode of 0 is unknown until a snapshot teaches it.
//!
//! **Which is newer.** Each part of a row has the time of which it is known. Events are exact at their time; a snapshot
//! knows everything before it began and, being read one socket after another, a part of what came later. Hence:
//! - An Opened of an unknown socket that a snapshot, begun later, did not show: it came and went. It never becomes a row,
//!   but watchers are told of it, and of its Closed when that comes (`passing`), at the latest by the next snapshot.
//!   In a namespace that the snapshot saw only in part it does become a row: nothing says that it is gone.
//! - A Closed that is not older than anything known of the row ends it. Older than an Opened: the socket listens again.
//!   Older than a snapshot that showed it: either that too, or the snapshot read while the close was in progress:
//!   the row stays, in doubt, until an Opened or the next snapshot settles it.
//! - A Closed before its Opened leaves a tombstone; the Opened is told when it comes, together with its Closed.
//! - A row that a snapshot lacks is gone if that read all of its namespace, or if events were lost. Else the kernel's
//!   events are exact: it lives on without a visible holder, a ghost. A row opened while the snapshot was read stays.
//! - Holders: the snapshot's, plus those that newer events added, minus those known to have exited.
//! - The last holder exits: its Closed follows at once as a rule, so nothing is told. Where the row is still there in the
//!   next snapshot, it has become a ghost, and that is told.
//!
//! **What is not known.** [`Table::is_stale`] asks for a snapshot: a row just opened may be shared, a child may have
//! closed what it inherited, an exec has closed some descriptors. Closing a row takes its question away, so a burst of
//! short-lived listeners leaves none. A snapshot answers every question that arose before it began. So whatever the
//! order of delivery, the table that is not stale is right.
//!
//! Memory is bounded but for the rows. An event costs O(log rows), Forked, Execed and Exited that for each row held.

mod memory;
pub(crate) mod rows;
mod snapshot;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{
    Attempt, BootNs, Change, Event, Holder, Listener, NetnsId, Process, ProcessId, Protocol, Socket, SocketId,
};
use memory::{Exited, Recent, Tombstones};
use rows::{Doubt, Found, Identity, ProcessKey, Row, RowId, Rows, key};

/// Every listener, kept up to date by events.
#[derive(Debug, Default)]
pub struct Table {
    rows: Rows,
    tombstones: Tombstones,
    exited: Exited,
    /// When a process last forked or exec'd: a snapshot begun before may have read its descriptors before.
    stirred: Recent<ProcessKey, BootNs>,
    refused: Recent<(BootNs, ProcessKey, NetnsId, Protocol, u16), ()>,
    /// The latest snapshot applied.
    read: Option<Read>,
    /// Something happened then that no snapshot has answered, of no row in particular.
    unread: Option<BootNs>,
}

/// What the latest snapshot covered.
#[derive(Debug)]
struct Read {
    at: BootNs,
    complete: HashSet<NetnsId>,
    after_loss: bool,
}

impl Read {
    /// Whether a socket of that namespace that it did not show did not listen.
    fn covers(&self, netns: NetnsId) -> bool {
        self.after_loss || self.complete.contains(&netns)
    }
}

impl Table {
    pub fn new() -> Self {
        Table::default()
    }

    /// Takes in one event and says what it changed, in the order in which watchers are to be told.
    ///
    /// The rows of the first snapshot are the starting state, not news: they yield no [`Change::Opened`].
    pub fn apply(&mut self, event: Event) -> Vec<Change> {
        let mut out = Vec::new();
        match event {
            Event::Opened { at, socket, by } => self.opened(at, socket, by, &mut out),
            Event::Closed { at, id, by } => self.closed(at, id, by, &mut out),
            Event::Forked { at, parent, child } => self.forked(at, parent, child, &mut out),
            Event::Execed { at, process } => self.execed(at, process, &mut out),
            Event::Renewed { at, process } => self.renewed(at, &process, &mut out),
            Event::Exited { at, id } => self.exited(at, id, &mut out),
            Event::Refused { at, attempt } => self.refused(at, attempt, &mut out),
            Event::Unsure { at } => self.mark_unread(at),
            Event::Snapshot(snapshot) => self.snapshot(snapshot, &mut out),
        }
        out
    }

    /// In the order in which they became known.
    pub fn listeners(&self) -> impl Iterator<Item = &Listener> {
        self.rows.iter().map(|(_, row)| &row.listener)
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// By cookie where that is known, else by inode; either half of an MPTCP listener finds it.
    pub fn get(&self, id: SocketId) -> Option<&Listener> {
        match self.rows.find(id, false) {
            Found::Same(row) => self.rows.get(row).map(|row| &row.listener),
            Found::Reused(_) | Found::Unknown => None,
        }
    }

    /// Whether a [`crate::model::Snapshot`] that begins now could tell something that the events have not.
    pub fn is_stale(&self) -> bool {
        self.is_stale_about(&|_| true)
    }

    /// Whether it could tell something of these sockets: of a question about others the answer is known.
    pub fn is_stale_about(&self, of: &dyn Fn(&Socket) -> bool) -> bool {
        self.unread.is_some() || self.rows.unread().any(|row| of(&row.listener.socket))
    }

    /// Asks for a snapshot of the socket: somebody knows that its holders were others at `at`.
    pub fn doubt(&mut self, id: SocketId, at: BootNs) {
        if let Found::Same(row) = self.rows.find(id, false) {
            self.mark_row(row, at);
        }
    }

    /// Whether the process holds any listener.
    pub fn is_holder(&self, id: ProcessId) -> bool {
        !self.rows.held_by(id).is_empty()
    }

    /// The listeners in the way of binding `address` and `port`: the same protocol, namespace and port, and an address
    /// that overlaps, as a wildcard of either side does. Closest first: the same address, then the same family.
    pub fn listeners_at(&self, proto: Protocol, netns: NetnsId, address: IpAddr, port: u16) -> Vec<&Listener> {
        let rows = self.rows.at_port(netns, proto, port).map(|row| &row.listener);
        let mut found: Vec<&Listener> = rows.filter(|listener| listener.socket.overlaps(address)).collect();
        found.sort_by_key(|listener| {
            let own = listener.socket.address;
            Reverse((own == address, own.is_ipv4() == address.is_ipv4()))
        });
        found
    }

    fn opened(&mut self, at: BootNs, socket: Socket, by: Arc<Process>, out: &mut Vec<Change>) {
        match self.rows.find(socket.id, socket.mptcp) {
            Found::Same(row) => self.opened_again(row, at, &socket, by, out),
            Found::Reused(row) => {
                let as_of = self.rows.get(row).map_or(0, |row| row.as_of);
                if at > as_of {
                    self.close(row, at, None, out);
                    self.opened_new(at, socket, by, None, out);
                } else {
                    self.opened_new(at, socket, by, Some(as_of), out);
                }
            }
            Found::Unknown => {
                let read = self.read.as_ref().filter(|read| at < read.at && read.covers(socket.netns));
                let gone_at = read.map(|read| read.at);
                self.opened_new(at, socket, by, gone_at, out);
            }
        }
    }

    /// An Opened of a socket that has no row; by `gone_at` it had stopped listening again.
    fn opened_new(
        &mut self,
        at: BootNs,
        socket: Socket,
        by: Arc<Process>,
        gone_at: Option<BootNs>,
        out: &mut Vec<Change>,
    ) {
        if let Some(stone) = self.tombstones.find(socket.id, socket.mptcp)
            && stone.at >= at
        {
            if stone.told.is_none_or(|told| told < at) {
                stone.told = Some(stone.at);
                let (closed_at, closer) = (stone.at, stone.by.take());
                let listener = opened_by(at, socket, Arc::clone(&by));
                out.push(Change::Opened { at, listener: listener.clone() });
                out.push(Change::Closed { at: closed_at, listener, by: closer.or(Some(by)) });
            }
            return;
        }
        if let Some(gone_at) = gone_at {
            return self.pass(at, gone_at, opened_by(at, socket, by), out);
        }
        let mut row = Row::new(socket.clone(), at);
        row.closed_before = self.exhume(&socket, out);
        row.opened_at = at;
        row.binder = Some(key(by.id));
        row.listener.since = Some(at);
        let exited = self.exited.contains(by.id);
        if exited {
            row.last_holder = Some(Holder { process: Arc::clone(&by), fds: Vec::new(), binder: true });
            row.untold = true;
        } else {
            row.fresh.push((key(by.id), at));
        }
        let row = self.rows.insert(row);
        let listener = opened_by(at, socket, by);
        if !exited {
            self.rows.set_holders(row, listener.holders.clone(), at);
        }
        self.mark_row(row, at);
        out.push(Change::Opened { at, listener });
    }

    /// An Opened of a socket that has a row: told twice, listen(2) called again, or it stopped listening in between.
    fn opened_again(&mut self, id: RowId, at: BootNs, socket: &Socket, by: Arc<Process>, out: &mut Vec<Change>) {
        let Some(row) = self.rows.get_mut(id) else { return };
        let moved = is_moved(&row.listener.socket, socket);
        if at <= row.closed_before || (moved && at <= row.as_of) {
            return;
        }
        let doubt = row.doubt.take();
        let again = moved || doubt.as_ref().is_some_and(|doubt| row.began <= doubt.at);
        let was = again.then(|| (row.listener.clone(), row.keeper()));
        if again {
            (row.listener.since, row.began, row.inherited) = (Some(at), at, false);
            row.binder = None;
        } else if row.listener.since.is_some() || !row.inherited || at <= row.began {
            row.listener.since = Some(row.listener.since.map_or(at, |since| since.min(at)));
            row.began = row.began.min(at);
        }
        if at >= row.opened_at {
            let own = &mut row.listener.socket;
            own.backlog = socket.backlog.or(own.backlog);
            own.v6only = socket.v6only.or(own.v6only);
            row.opened_at = at;
        }
        row.as_of = row.as_of.max(at);
        if row.binder.is_none() && row.listener.since.is_some() {
            row.binder = Some(key(by.id));
        }
        let joins = at > row.read_at && !row.listener.holds(by.id) && !self.exited.contains(by.id);
        let mut holders = row.listener.holders.clone();
        if joins {
            row.fresh.push((key(by.id), at));
            holders.push(Holder { process: by, fds: Vec::new(), binder: false });
        }
        elect_binder(&mut holders, row.binder);
        self.rows.set_holders(id, holders, at);
        if moved {
            self.rows.move_to(id, socket);
        }
        self.learn(id, at, socket.id, socket.mptcp, out);
        if joins {
            self.mark_row(id, at);
        }
        let Some(row) = self.rows.get(id) else { return };
        if let Some((listener, keeper)) = was {
            let (closed_at, by) = doubt.map_or((at, None), |doubt| (doubt.at, doubt.by));
            out.push(Change::Closed { at: closed_at, listener, by: by.or(keeper) });
            out.push(Change::Opened { at, listener: row.listener.clone() });
        } else if joins {
            out.push(Change::Holders { at, listener: row.listener.clone() });
        }
    }

    fn closed(&mut self, at: BootNs, id: SocketId, by: Option<Arc<Process>>, out: &mut Vec<Change>) {
        if let Found::Same(row_id) = self.rows.find(id, false)
            && let Some(row) = self.rows.get_mut(row_id)
        {
            if at >= row.as_of {
                self.close(row_id, at, by, out);
            } else if at > row.closed_before {
                row.closed_before = at;
                if row.opened_at <= at {
                    let as_of = row.as_of;
                    row.doubt = Some(Doubt { at, by });
                    self.mark_row(row_id, as_of);
                } else if row.began <= at {
                    let listener = row.listener.clone();
                    let by = by.or_else(|| row.keeper());
                    row.began = row.opened_at;
                    row.listener.since = Some(row.opened_at);
                    out.push(Change::Closed { at, listener, by });
                    out.push(Change::Opened { at: row.opened_at, listener: row.listener.clone() });
                }
            }
            return;
        }
        if let Some(listener) = self.tombstones.settle(id, at) {
            let closer = by.clone().or_else(|| binder_of(&listener));
            out.push(Change::Closed { at, listener: *listener, by: closer });
            if let Some(stone) = self.tombstones.find(id, false) {
                (stone.at, stone.told) = (at, Some(at));
            }
        } else if let Some(stone) = self.tombstones.find(id, false) {
            if at > stone.at {
                (stone.at, stone.by) = (at, by);
            }
        } else {
            let forgotten = self.tombstones.bury(Identity::new(id, false), at, None, by, None);
            forget(forgotten, out);
        }
    }

    fn forked(&mut self, at: BootNs, parent: ProcessId, child: Arc<Process>, out: &mut Vec<Change>) {
        if self.exited.contains(child.id) {
            return;
        }
        if self.exited.contains(parent) {
            // Its rows are forgotten, and the child may hold them.
            self.mark_unread(at);
        }
        self.stir(parent, at);
        for id in self.rows.held_by(parent) {
            let Some(row) = self.rows.get_mut(id) else { continue };
            let before = at <= row.read_at || row.listener.since.is_some_and(|since| at < since);
            if before || row.listener.holds(child.id) {
                continue;
            }
            row.fresh.push((key(child.id), at));
            let mut holders = row.listener.holders.clone();
            let inherited = holders.iter().find(|holder| holder.process.id.is_same(parent));
            let fds = inherited.map(|holder| holder.fds.clone()).unwrap_or_default();
            holders.push(Holder { process: Arc::clone(&child), fds, binder: false });
            self.set_holders(id, holders, at, out);
            self.mark_row(id, at);
        }
    }

    fn execed(&mut self, at: BootNs, process: Arc<Process>, out: &mut Vec<Change>) {
        self.stir(process.id, at);
        // Descriptors may have closed, also where the process has been read since.
        for id in self.rows.held_by(process.id) {
            if self.rows.get(id).is_some_and(|row| row.read_at <= at) {
                self.mark_row(id, at);
            }
        }
        if self.rows.renew_details(key(process.id), at) {
            self.replace(at, &process, |old| *old != *process, out);
        }
    }

    /// A program may show another title or directory whenever it likes, of which nobody is told.
    fn renewed(&mut self, at: BootNs, process: &Arc<Process>, out: &mut Vec<Change>) {
        if self.rows.renew_details(key(process.id), at) {
            let is_told = |old: &Process| (old.uid, &old.name) != (process.uid, &process.name);
            self.replace(at, process, is_told, out);
        }
    }

    /// What is known of a holder, in every row that it holds.
    fn replace(
        &mut self,
        at: BootNs,
        process: &Arc<Process>,
        is_told: impl Fn(&Process) -> bool,
        out: &mut Vec<Change>,
    ) {
        for id in self.rows.held_by(process.id) {
            let Some(row) = self.rows.get_mut(id) else { continue };
            let holders = row.listener.holders.iter_mut();
            for holder in holders.filter(|holder| holder.process.id.is_same(process.id)) {
                let is_told = is_told(&holder.process);
                holder.process = Arc::clone(process);
                if is_told {
                    out.push(Change::Holders { at, listener: row.listener.clone() });
                    break;
                }
            }
        }
    }

    fn exited(&mut self, at: BootNs, id: ProcessId, out: &mut Vec<Change>) {
        if !self.exited.add(id) {
            return;
        }
        for row_id in self.rows.held_by(id) {
            let Some(row) = self.rows.get_mut(row_id) else { continue };
            let (gone, holders): (Vec<Holder>, Vec<Holder>) =
                row.listener.holders.iter().cloned().partition(|holder| holder.process.id.is_same(id));
            if holders.is_empty() {
                row.last_holder = gone.into_iter().next();
                row.untold = true;
                self.rows.set_holders(row_id, holders, at);
                self.mark_row(row_id, at);
            } else {
                self.set_holders(row_id, holders, at, out);
            }
        }
    }

    fn refused(&mut self, at: BootNs, attempt: Attempt, out: &mut Vec<Change>) {
        let refusal = (at, key(attempt.by.id), attempt.netns, attempt.proto, attempt.port);
        if self.refused.insert(refusal, ()).is_none() {
            let found = self.listeners_at(attempt.proto, attempt.netns, attempt.address, attempt.port);
            let held_by = found.first().map(|&listener| listener.clone());
            out.push(Change::Conflict { at, attempt, held_by });
        }
    }

    fn stir(&mut self, process: ProcessId, at: BootNs) {
        let newest = self.stirred.get(&key(process)).map_or(at, |&before| at.max(before));
        self.stirred.insert(key(process), newest);
    }

    /// Ends a row.
    fn close(&mut self, id: RowId, at: BootNs, by: Option<Arc<Process>>, out: &mut Vec<Change>) {
        let Some(mut row) = self.rows.remove(id) else { return };
        let by = by.or_else(|| row.keeper());
        if row.untold {
            // Watchers were not told that its last holder had exited: the exit and this close are one thing to them.
            row.listener.holders.extend(row.last_holder);
        }
        let forgotten = self.tombstones.bury(row.identity, at, Some(at), None, None);
        out.push(Change::Closed { at, listener: row.listener, by });
        forget(forgotten, out);
    }

    /// Tells of a listener that has come and, by `gone_at`, gone; its Closed is still to come.
    fn pass(&mut self, at: BootNs, gone_at: BootNs, listener: Listener, out: &mut Vec<Change>) {
        out.push(Change::Opened { at, listener: listener.clone() });
        self.exhume(&listener.socket, out);
        let identity = Identity::new(listener.socket.id, listener.socket.mptcp);
        let forgotten = self.tombstones.bury(identity, gone_at, Some(gone_at), None, Some(Box::new(listener)));
        forget(forgotten, out);
    }

    /// Takes away the tombstone of a socket that listens again. Says when it last did not; 0 if never.
    fn exhume(&mut self, socket: &Socket, out: &mut Vec<Change>) -> BootNs {
        let passing = self.tombstones.settle(socket.id, BootNs::MAX);
        let closed_at = self.tombstones.take(socket.id, socket.mptcp).unwrap_or(0);
        if let Some(listener) = passing {
            out.push(closed_unseen(closed_at, *listener));
        }
        closed_at
    }

    /// Adds to what identifies a row. A second row that is thereby found to be the same socket ends.
    fn learn(&mut self, row: RowId, at: BootNs, id: SocketId, mptcp: bool, out: &mut Vec<Change>) {
        if let Some(other) = self.rows.learn(row, id, mptcp) {
            self.close(other, at, None, out);
        }
    }

    fn set_holders(&mut self, row: RowId, holders: Vec<Holder>, at: BootNs, out: &mut Vec<Change>) {
        self.rows.set_holders(row, holders, at);
        if let Some(row) = self.rows.get_mut(row) {
            row.untold = false;
            out.push(Change::Holders { at, listener: row.listener.clone() });
        }
    }

    /// A question about one row that only a snapshot begun after `at` answers, and after the latest, as that did not.
    fn mark_row(&mut self, row: RowId, at: BootNs) {
        let at = self.read.as_ref().map_or(at, |read| at.max(read.at));
        self.rows.mark_unread(row, at);
    }

    /// The same of no row in particular: the latest snapshot has answered it if it began later.
    fn mark_unread(&mut self, at: BootNs) {
        if self.read.as_ref().is_none_or(|read| read.at <= at) {
            self.unread = self.unread.max(Some(at));
        }
    }
}

/// A socket that has stopped listening since and begun again elsewhere: these never change while it listens.
pub(crate) fn is_moved(old: &Socket, new: &Socket) -> bool {
    (old.proto, old.netns, old.address, old.port) != (new.proto, new.netns, new.address, new.port)
}

/// A listener as its Opened tells.
fn opened_by(at: BootNs, socket: Socket, by: Arc<Process>) -> Listener {
    Listener { socket, since: Some(at), holders: vec![Holder { process: by, fds: Vec::new(), binder: true }] }
}

fn binder_of(listener: &Listener) -> Option<Arc<Process>> {
    listener.binder().map(|holder| Arc::clone(&holder.process))
}

fn closed_unseen(at: BootNs, listener: Listener) -> Change {
    let by = binder_of(&listener);
    Change::Closed { at, listener, by }
}

/// Ends the wait for a Closed that outlasted the memory of closed sockets.
fn forget(stone: Option<memory::Tombstone>, out: &mut Vec<Change>) {
    if let Some((at, listener)) = stone.and_then(|stone| Some((stone.at, stone.passing?))) {
        out.push(closed_unseen(at, *listener));
    }
}

/// Flags one binder at most: the known one, else the flagged one that comes first, else whoever started first.
fn elect_binder(holders: &mut [Holder], known: Option<ProcessKey>) {
    let elected = (holders.iter().find(|holder| known == Some(key(holder.process.id))))
        .or_else(|| holders.iter().find(|holder| holder.binder))
        .or_else(|| holders.iter().min_by_key(|holder| (holder.process.id.start, holder.process.id.pid)))
        .map(|holder| key(holder.process.id));
    for holder in holders {
        holder.binder = Some(key(holder.process.id)) == elected;
    }
}
