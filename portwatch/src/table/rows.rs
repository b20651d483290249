//! The rows and every index over them, kept in step: cookie, inode, port and process → row.
//!
//! Owns which row a socket identity means ([`Rows::find`]) and nothing of when rows come and go: that is the parent's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::model::{BootNs, Holder, Listener, NetnsId, Process, ProcessId, Protocol, Socket, SocketId};

/// Names a row for as long as the table lives; never reused, and in the order in which the rows came.
pub(super) type RowId = u64;

/// [`ProcessId::is_same`] as something to hash: that relation is an equivalence (same PID, same tick of the start).
pub(super) type ProcessKey = (u32, u64);

pub(super) fn key(id: ProcessId) -> ProcessKey {
    (id.pid, id.start / ProcessId::TICK_NS)
}

/// Everything known of which socket a row (or a closed row) is.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// 0 while unknown.
    inode: u64,
    /// The second only for MPTCP (parent and subflow, in the order of learning); 0 while unknown.
    cookies: [u64; 2],
    mptcp: bool,
}

impl Identity {
    pub(crate) fn new(id: SocketId, mptcp: bool) -> Self {
        Identity { inode: id.inode, cookies: [id.cookie, 0], mptcp }
    }

    /// Whether a socket with the same inode but an unknown cookie is this one: it is unless both cookies are known
    /// and cannot belong together.
    fn admits(&self, id: SocketId, mptcp: bool) -> bool {
        let [first, second] = self.cookies;
        id.cookie == 0 || first == 0 || ((self.mptcp || mptcp) && second == 0)
    }

    pub(crate) fn learn(&mut self, id: SocketId, mptcp: bool) {
        self.mptcp |= mptcp;
        if self.inode == 0 {
            self.inode = id.inode;
        }
        if id.cookie != 0
            && !self.cookies.contains(&id.cookie)
            && let Some(unknown) = self.cookies.iter_mut().find(|cookie| **cookie == 0)
        {
            *unknown = id.cookie;
        }
    }
}

/// What an identity means to an [`Index`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Same(u64),
    /// Another socket that had the same inode before: inode numbers are reused, cookies are not.
    Reused(u64),
    Unknown,
}

/// Cookie and inode → whatever is identified by them.
#[derive(Debug, Default)]
pub(crate) struct Index {
    by_cookie: HashMap<u64, u64>,
    by_inode: HashMap<u64, u64>,
}

impl Index {
    pub(crate) fn find<'a>(
        &self,
        id: SocketId,
        mptcp: bool,
        identity_of: impl FnOnce(u64) -> Option<&'a Identity>,
    ) -> Found {
        if let Some(&entry) = self.by_cookie.get(&id.cookie) {
            return Found::Same(entry);
        }
        match self.by_inode.get(&id.inode) {
            Some(&entry) if identity_of(entry).is_some_and(|identity| identity.admits(id, mptcp)) => Found::Same(entry),
            Some(&entry) => Found::Reused(entry),
            None => Found::Unknown,
        }
    }

    pub(crate) fn add(&mut self, identity: &Identity, entry: u64) {
        for cookie in identity.cookies.into_iter().filter(|&cookie| cookie != 0) {
            self.by_cookie.insert(cookie, entry);
        }
        if identity.inode != 0 {
            self.by_inode.insert(identity.inode, entry);
        }
    }

    /// Forgets `entry`, but not a later one that took over its inode.
    pub(crate) fn remove(&mut self, identity: &Identity, entry: u64) {
        for cookie in identity.cookies {
            if self.by_cookie.get(&cookie) == Some(&entry) {
                self.by_cookie.remove(&cookie);
            }
        }
        if self.by_inode.get(&identity.inode) == Some(&entry) {
            self.by_inode.remove(&identity.inode);
        }
    }
}

/// A Closed event that contradicts a later snapshot, until the next snapshot or Opened settles it.
#[derive(Clone, Debug)]
pub(super) struct Doubt {
    pub(super) at: BootNs,
    pub(super) by: Option<Arc<Process>>,
}

/// A listener and how new each part of what is known of it is.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) listener: Listener,
    pub(super) identity: Identity,
    /// Newest time at which it was known to listen.
    pub(super) as_of: BootNs,
    /// Newest Opened event; 0 where only snapshots showed it.
    pub(super) opened_at: BootNs,
    /// Oldest time at which it is known to have listened since it last began to.
    pub(super) began: BootNs,
    /// Newest Closed that this row outlived: an Opened that is older belongs to an earlier life of the socket.
    pub(super) closed_before: BootNs,
    pub(super) doubt: Option<Doubt>,
    /// In the first snapshot: nobody saw it begin, so a later Opened is listen(2) called again, not the beginning.
    pub(super) inherited: bool,
    /// Start of the newest snapshot whose holders this row has; 0 where none.
    pub(super) read_at: BootNs,
    /// Holders that events added, until a snapshot that began later has them (or has not).
    pub(super) fresh: Vec<(ProcessKey, BootNs)>,
    /// Who called listen or bind, where an event told.
    pub(super) binder: Option<ProcessKey>,
    /// Who held it last, once nobody does.
    pub(super) last_holder: Option<Holder>,
    /// The last holder exited and watchers were not told, because a Closed normally follows at once.
    pub(super) untold: bool,
}

impl Row {
    /// A row first known at `at`, not yet held by anyone.
    pub(super) fn new(socket: Socket, at: BootNs) -> Self {
        Row {
            identity: Identity::new(socket.id, socket.mptcp),
            listener: Listener { socket, since: None, holders: Vec::new() },
            as_of: at,
            opened_at: 0,
            began: at,
            closed_before: 0,
            doubt: None,
            inherited: false,
            read_at: 0,
            fresh: Vec::new(),
            binder: None,
            last_holder: None,
            untold: false,
        }
    }

    /// Who is to be named for it once it is gone.
    pub(super) fn keeper(&self) -> Option<Arc<Process>> {
        let holder = self.listener.binder().or(self.last_holder.as_ref());
        holder.map(|holder| Arc::clone(&holder.process))
    }
}

/// What is known of a process that holds something.
#[derive(Debug)]
struct Held {
    rows: BTreeSet<RowId>,
    /// When its details (name, command …) were true.
    details_at: BootNs,
}

type Port = (NetnsId, Protocol, u16);

#[derive(Debug, Default)]
pub(super) struct Rows {
    next: RowId,
    rows: BTreeMap<RowId, Row>,
    index: Index,
    by_port: HashMap<Port, BTreeSet<RowId>>,
    by_process: HashMap<ProcessKey, Held>,
    /// Rows that no snapshot has verified since the given time.
    unread: BTreeMap<RowId, BootNs>,
}

fn port_of(socket: &Socket) -> Port {
    (socket.netns, socket.proto, socket.port)
}

impl Rows {
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (RowId, &Row)> {
        self.rows.iter().map(|(&id, row)| (id, row))
    }

    pub(super) fn get(&self, id: RowId) -> Option<&Row> {
        self.rows.get(&id)
    }

    /// For everything but the identity, the endpoint and the holders, which are indexed.
    pub(super) fn get_mut(&mut self, id: RowId) -> Option<&mut Row> {
        self.rows.get_mut(&id)
    }

    pub(super) fn find(&self, id: SocketId, mptcp: bool) -> Found {
        self.index.find(id, mptcp, |row| self.rows.get(&row).map(|row| &row.identity))
    }

    pub(super) fn at_port(&self, netns: NetnsId, proto: Protocol, port: u16) -> impl Iterator<Item = &Row> {
        self.by_port.get(&(netns, proto, port)).into_iter().flatten().filter_map(|id| self.rows.get(id))
    }

    /// `row.listener.holders` must be empty: they come by [`Rows::set_holders`].
    pub(super) fn insert(&mut self, row: Row) -> RowId {
        let id = self.next;
        self.next += 1;
        self.index.add(&row.identity, id);
        self.by_port.entry(port_of(&row.listener.socket)).or_default().insert(id);
        self.rows.insert(id, row);
        id
    }

    pub(super) fn remove(&mut self, id: RowId) -> Option<Row> {
        let row = self.rows.remove(&id)?;
        self.index.remove(&row.identity, id);
        self.unlist_port(port_of(&row.listener.socket), id);
        for holder in &row.listener.holders {
            self.unlist_process(key(holder.process.id), id);
        }
        self.unread.remove(&id);
        Some(row)
    }

    /// Adds what `id` tells of the row's identity. Says which other row turns out to be the same socket.
    pub(super) fn learn(&mut self, row: RowId, id: SocketId, mptcp: bool) -> Option<RowId> {
        let known = self.rows.get_mut(&row)?;
        known.identity.learn(id, mptcp);
        let socket = &mut known.listener.socket;
        socket.mptcp |= mptcp;
        socket.id = SocketId { inode: known.identity.inode, cookie: known.identity.cookies[0] };
        let other = self.index.by_inode.get(&known.identity.inode).copied().filter(|&other| other != row);
        self.index.add(&known.identity, row);
        other
    }

    /// Gives the row the address, port and namespace of `socket`.
    pub(super) fn move_to(&mut self, id: RowId, socket: &Socket) {
        let Some(row) = self.rows.get_mut(&id) else { return };
        let own = &mut row.listener.socket;
        let old = port_of(own);
        (own.proto, own.netns, own.address, own.port) = (socket.proto, socket.netns, socket.address, socket.port);
        self.unlist_port(old, id);
        self.by_port.entry(port_of(socket)).or_default().insert(id);
    }

    /// Replaces the holders; `at` is when the details of those not known before were true.
    pub(super) fn set_holders(&mut self, id: RowId, mut holders: Vec<Holder>, at: BootNs) {
        let Some(row) = self.rows.get_mut(&id) else { return };
        holders.sort_by_key(|holder| holder.process.id);
        let old = std::mem::replace(&mut row.listener.holders, holders);
        for holder in &row.listener.holders {
            let held = self.by_process.entry(key(holder.process.id));
            held.or_insert_with(|| Held { rows: BTreeSet::new(), details_at: at }).rows.insert(id);
        }
        let now: BTreeSet<ProcessKey> = row.listener.holders.iter().map(|holder| key(holder.process.id)).collect();
        for gone in old.iter().map(|holder| key(holder.process.id)).filter(|old| !now.contains(old)) {
            self.unlist_process(gone, id);
        }
    }

    pub(super) fn held_by(&self, process: ProcessId) -> Vec<RowId> {
        self.by_process.get(&key(process)).map(|held| held.rows.iter().copied().collect()).unwrap_or_default()
    }

    pub(super) fn details_at(&self, process: ProcessKey) -> Option<BootNs> {
        self.by_process.get(&process).map(|held| held.details_at)
    }

    /// Notes that the details of `process` were true at `at`. Says whether that is news.
    pub(super) fn renew_details(&mut self, process: ProcessKey, at: BootNs) -> bool {
        match self.by_process.get_mut(&process) {
            Some(held) if held.details_at < at => {
                held.details_at = at;
                true
            }
            _ => false,
        }
    }

    /// Only a snapshot that began after `at` tells whether the row is right.
    pub(super) fn mark_unread(&mut self, id: RowId, at: BootNs) {
        let mark = self.unread.entry(id).or_default();
        *mark = at.max(*mark);
    }

    /// Rows of which a snapshot could tell something.
    pub(super) fn unread(&self) -> impl Iterator<Item = &Row> {
        self.unread.keys().filter_map(|id| self.get(*id))
    }

    /// A snapshot that began at `at` was applied.
    pub(super) fn verified(&mut self, at: BootNs) {
        self.unread.retain(|_, mark| *mark >= at);
    }

    fn unlist_port(&mut self, port: Port, id: RowId) {
        if let Some(rows) = self.by_port.get_mut(&port) {
            rows.remove(&id);
            if rows.is_empty() {
                self.by_port.remove(&port);
            }
        }
    }

    fn unlist_process(&mut self, process: ProcessKey, id: RowId) {
        if let Some(held) = self.by_process.get_mut(&process) {
            held.rows.remove(&id);
            if held.rows.is_empty() {
                self.by_process.remove(&process);
            }
        }
    }

    /// Panics where an index and the rows disagree.
    #[cfg(test)]
    pub(super) fn assert_consistent(&self) {
        for (&id, row) in &self.rows {
            let socket = &row.listener.socket;
            assert_eq!(self.find(socket.id, socket.mptcp), Found::Same(id), "{row:?}");
            assert!(self.by_port[&port_of(socket)].contains(&id), "{row:?}");
            for holder in &row.listener.holders {
                assert!(self.by_process[&key(holder.process.id)].rows.contains(&id), "{row:?}");
            }
        }
        let holders: usize = self.rows.values().map(|row| row.listener.holders.len()).sum();
        assert_eq!(self.by_process.values().map(|held| held.rows.len()).sum::<usize>(), holders);
        assert_eq!(self.by_port.values().map(BTreeSet::len).sum::<usize>(), self.rows.len());
        assert!(self.index.by_cookie.len() <= 2 * self.rows.len() && self.index.by_inode.len() <= self.rows.len());
        assert!(self.unread.keys().all(|id| self.rows.contains_key(id)));
    }
}
