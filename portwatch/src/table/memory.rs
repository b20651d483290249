//! What the table remembers of things that are gone, each bounded, oldest forgotten first: closed sockets, exited
//! processes and failed binds. They keep an event that comes late or twice from raising the dead.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;

use super::rows::{Found, Identity, Index, ProcessKey, key};
use crate::model::{BootNs, Listener, Process, ProcessId, SocketId};

/// Closed sockets, exited processes and failed binds that are remembered, of each. The kernel's buffers reorder by
/// microseconds, so seconds of the fastest burst are more than enough.
pub(super) const REMEMBERED: usize = 4096;

/// A socket that does not listen any more.
#[derive(Debug)]
pub(super) struct Tombstone {
    identity: Identity,
    /// It did not listen at this time; an Opened that is not newer is late.
    pub(super) at: BootNs,
    /// Watchers know of every life that began until then. Earlier than `at` where a Closed came before its Opened.
    pub(super) told: Option<BootNs>,
    /// Who closed it, for an Opened that is still to come.
    pub(super) by: Option<Arc<Process>>,
    /// Announced late, after a snapshot that had it no more: the Closed that is still to come.
    pub(super) passing: Option<Box<Listener>>,
}

/// Bounded memory of closed sockets.
#[derive(Debug, Default)]
pub(super) struct Tombstones {
    next: u64,
    stones: HashMap<u64, Tombstone>,
    order: VecDeque<u64>,
    index: Index,
    /// How many have `passing`, so that usually nobody looks.
    passing: usize,
}

impl Tombstones {
    pub(super) fn find(&mut self, id: SocketId, mptcp: bool) -> Option<&mut Tombstone> {
        match self.locate(id, mptcp) {
            Found::Same(stone) => self.stones.get_mut(&stone),
            _ => None,
        }
    }

    fn locate(&self, id: SocketId, mptcp: bool) -> Found {
        self.index.find(id, mptcp, |stone| self.stones.get(&stone).map(|stone| &stone.identity))
    }

    /// Forgets the socket: it listens again. Says when it last did not.
    pub(super) fn take(&mut self, id: SocketId, mptcp: bool) -> Option<BootNs> {
        let Found::Same(stone) = self.locate(id, mptcp) else { return None };
        self.remove(stone).map(|stone| stone.at)
    }

    /// Remembers one more. Returns the one that is forgotten for it, if that still waited for its Closed.
    pub(super) fn bury(
        &mut self,
        identity: Identity,
        at: BootNs,
        told: Option<BootNs>,
        by: Option<Arc<Process>>,
        passing: Option<Box<Listener>>,
    ) -> Option<Tombstone> {
        let id = self.next;
        self.next += 1;
        self.passing += usize::from(passing.is_some());
        self.index.add(&identity, id);
        self.stones.insert(id, Tombstone { identity, at, told, by, passing });
        self.order.push_back(id);
        // Stones taken away before stay in `order` until their turn: that bounds both.
        if self.order.len() <= REMEMBERED {
            return None;
        }
        let oldest = self.order.pop_front()?;
        self.remove(oldest).filter(|stone| stone.passing.is_some())
    }

    /// The listener that waits for a Closed, if it was open by `at`.
    pub(super) fn settle(&mut self, id: SocketId, at: BootNs) -> Option<Box<Listener>> {
        let Found::Same(stone) = self.locate(id, false) else { return None };
        let waiting = &mut self.stones.get_mut(&stone)?.passing;
        let listener = waiting.take_if(|listener| listener.since <= Some(at))?;
        self.passing -= 1;
        Some(listener)
    }

    /// Every listener whose Closed has not come, oldest first, with the time by which it must have been true.
    pub(super) fn settle_all(&mut self) -> Vec<(BootNs, Box<Listener>)> {
        if self.passing == 0 {
            return Vec::new();
        }
        self.passing = 0;
        let stones = &mut self.stones;
        let waiting = self.order.iter().filter_map(|id| {
            let stone = stones.get_mut(id)?;
            Some((stone.at, stone.passing.take()?))
        });
        waiting.collect()
    }

    fn remove(&mut self, id: u64) -> Option<Tombstone> {
        let stone = self.stones.remove(&id)?;
        self.passing -= usize::from(stone.passing.is_some());
        self.index.remove(&stone.identity, id);
        Some(stone)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        assert!(self.order.len() <= REMEMBERED && self.stones.len() <= self.order.len());
        self.stones.len()
    }
}

/// A bounded map that forgets the oldest key first.
#[derive(Debug)]
pub(super) struct Recent<K, V> {
    values: HashMap<K, V>,
    order: VecDeque<K>,
}

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Recent { values: HashMap::new(), order: VecDeque::new() }
    }
}

impl<K: Copy + Eq + Hash, V> Recent<K, V> {
    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.values.get(key)
    }

    /// Says what `key` had before.
    pub(super) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let before = self.values.insert(key, value);
        if before.is_none() {
            self.order.push_back(key);
            if self.order.len() > REMEMBERED
                && let Some(oldest) = self.order.pop_front()
            {
                self.values.remove(&oldest);
            }
        }
        before
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        assert_eq!(self.values.len(), self.order.len());
        self.order.len()
    }
}

/// Bounded memory of exited processes.
#[derive(Debug, Default)]
pub(super) struct Exited {
    starts: Recent<ProcessKey, BootNs>,
}

impl Exited {
    /// Says whether it is news.
    pub(super) fn add(&mut self, id: ProcessId) -> bool {
        let news = !self.contains(id);
        if news {
            self.starts.insert(key(id), id.start);
        }
        news
    }

    /// As exact as the starts are: two in whole ns that differ are a PID that was reused within one tick.
    pub(super) fn contains(&self, id: ProcessId) -> bool {
        let coarse = |start: BootNs| start.is_multiple_of(ProcessId::TICK_NS);
        self.starts.get(&key(id)).is_some_and(|&start| start == id.start || coarse(start) || coarse(id.start))
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.starts.len()
    }
}
