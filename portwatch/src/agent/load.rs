//! Who is connected, and how much of the agent each user may take: connections, requests a second, answers under way.
//!
//! Everything counts by uid, so that nobody gets more by connecting again, and nobody can shut the others out. Root has
//! places of its own and is not slowed. Nothing here waits for a clock: a bucket is filled when it is looked at.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

/// Connections at once: of all users, and of one that is not root.
const CONNECTIONS: usize = 1024;
const CONNECTIONS_OF_ONE: usize = 256;

/// Of all, those that only root may take: it can always look.
const RESERVED: usize = 64;

/// Descriptors that the agent needs for itself: probes, history, and what it opens to look at the host.
const DESCRIPTORS: usize = 128;

/// Requests of one user: so many a second, and so many at once after a rest.
const RATE: u32 = 1000;
const BURST: u32 = 2000;

/// Answers that are under way at once, each whole in memory until its peer has read it: of all users that are not root,
/// and of each.
const LISTS: Bound = Bound { all: 32, each: 8 };
const HISTORIES: Bound = Bound { all: 4, each: 1 };

struct Bound {
    all: usize,
    each: usize,
}

/// Users are forgotten when there are more than twice as many as were worth remembering the last time.
const FORGET: usize = 64;

/// What is under way; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Load(Rc<Totals>);

#[derive(Debug)]
struct Totals {
    users: RefCell<HashMap<u32, Rc<User>>>,
    connections: Cell<usize>,
    most: usize,
    forget_at: Cell<usize>,
    lists: Semaphore,
    histories: Semaphore,
}

#[derive(Debug)]
struct User {
    uid: u32,
    connections: Cell<usize>,
    bucket: RefCell<Bucket>,
    lists: Semaphore,
    histories: Semaphore,
}

/// What a peer asks for that is whole in memory until it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    List,
    History,
}

/// Permission to have one answer under way, until dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    _permits: [Option<SemaphorePermit<'a>>; 2],
    was_small: bool,
}

impl Turn<'_> {
    /// The answer took no memory to speak of: to give that back takes longer than to make it.
    pub(super) fn was_small(&mut self) {
        self.was_small = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.was_small {
            super::give_back_memory();
        }
    }
}

impl Load {
    /// For a process that may have so many descriptors.
    pub(super) fn new(descriptors: usize) -> Load {
        Load(Rc::new(Totals {
            users: RefCell::default(),
            connections: Cell::new(0),
            most: descriptors.saturating_sub(DESCRIPTORS).clamp(RESERVED + 1, CONNECTIONS),
            forget_at: Cell::new(FORGET),
            lists: Semaphore::new(LISTS.all),
            histories: Semaphore::new(HISTORIES.all),
        }))
    }

    pub(super) fn connections(&self) -> usize {
        self.0.connections.get()
    }

    /// Takes a place, if there is one.
    pub(super) fn enter(&self, uid: u32) -> Option<Place> {
        let totals = &self.0;
        let user = self.user(uid);
        let most = if uid == 0 { totals.most } else { totals.most - RESERVED };
        if totals.connections.get() >= most || (uid != 0 && user.connections.get() >= CONNECTIONS_OF_ONE) {
            return None;
        }
        totals.connections.set(totals.connections.get() + 1);
        user.connections.set(user.connections.get() + 1);
        Some(Place { load: self.clone(), user })
    }

    fn user(&self, uid: u32) -> Rc<User> {
        let mut users = self.0.users.borrow_mut();
        if users.len() >= self.0.forget_at.get() {
            let now = Instant::now();
            users.retain(|_, user| user.connections.get() > 0 || !user.bucket.borrow_mut().is_full(now));
            self.0.forget_at.set(FORGET.max(2 * users.len()));
        }
        let new = || {
            Rc::new(User {
                uid,
                connections: Cell::new(0),
                bucket: RefCell::new(Bucket::full(Instant::now())),
                lists: Semaphore::new(LISTS.each),
                histories: Semaphore::new(HISTORIES.each),
            })
        };
        Rc::clone(users.entry(uid).or_insert_with(new))
    }
}

/// A place among the connections; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    load: Load,
    user: Rc<User>,
}

impl Place {
    /// Whether one more request is within bounds.
    pub(super) fn may_ask(&self) -> bool {
        self.user.uid == 0 || self.user.bucket.borrow_mut().take(Instant::now())
    }

    /// Waits until one more answer may be under way: first for the user's others, so that who asks much waits alone.
    pub(super) async fn turn(&self, answer: Answer) -> Turn<'_> {
        let (own, all) = match answer {
            Answer::List => (&self.user.lists, &self.load.0.lists),
            Answer::History => (&self.user.histories, &self.load.0.histories),
        };
        // Never closed, so there is always a permit in the end.
        let own = own.acquire().await.ok();
        let all = if self.user.uid == 0 { None } else { all.acquire().await.ok() };
        Turn { _permits: [own, all], was_small: false }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let totals = &self.load.0;
        totals.connections.set(totals.connections.get() - 1);
        self.user.connections.set(self.user.connections.get() - 1);
    }
}

/// Tokens that come back with time.
#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn full(now: Instant) -> Bucket {
        Bucket { tokens: f64::from(BURST), at: now }
    }

    fn fill(&mut self, now: Instant) {
        let passed: Duration = now.saturating_duration_since(self.at);
        self.tokens = f64::from(BURST).min(self.tokens + passed.as_secs_f64() * f64::from(RATE));
        self.at = now;
    }

    fn is_full(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.tokens >= f64::from(BURST)
    }

    fn take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let is_there = self.tokens >= 1.0;
        if is_there {
            self.tokens -= 1.0;
        }
        is_there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_a_share_of_the_places_and_root_has_its_own() {
        let load = Load::new(8192);
        let enter = |uid, count| -> Vec<Place> { (0..count).map_while(|_| load.enter(uid)).collect() };
        let first = enter(1, 1000);
        assert_eq!((first.len(), load.connections()), (CONNECTIONS_OF_ONE, CONNECTIONS_OF_ONE));
        let others: Vec<Place> = (2..10).flat_map(|uid| enter(uid, 1000)).collect();
        assert_eq!(first.len() + others.len(), CONNECTIONS - RESERVED);
        assert!(load.enter(77).is_none());
        assert_eq!(enter(0, 1000).len(), RESERVED);
        drop(first);
        assert_eq!(enter(1, 1000).len(), CONNECTIONS_OF_ONE);
        drop(others);
        assert_eq!(load.connections(), 0);
    }

    #[test]
    fn few_descriptors_are_few_places() {
        let fill = |descriptors| {
            let load = Load::new(descriptors);
            (0..2000).map_while(|_| load.enter(0)).collect::<Vec<_>>().len()
        };
        assert_eq!([fill(8192), fill(1024), fill(64)], [CONNECTIONS, 1024 - DESCRIPTORS, RESERVED + 1]);
    }

    #[test]
    fn requests_are_counted_by_user_whatever_the_connection_and_come_back_with_time() {
        let load = Load::new(8192);
        let asked = || {
            let place = load.enter(1000).unwrap();
            (0..2 * BURST).take_while(|_| place.may_ask()).count()
        };
        // Some come back while this runs.
        assert!(asked() >= BURST as usize);
        assert!(asked() < BURST as usize / 2, "a new connection is no new user");
        let root = load.enter(0).unwrap();
        assert!((0..10 * BURST).all(|_| root.may_ask()));

        let begun = Instant::now();
        let mut bucket = Bucket::full(begun);
        let mut take = |at: Instant| std::iter::repeat_with(|| bucket.take(at)).take_while(|taken| *taken).count();
        assert_eq!(take(begun), BURST as usize);
        assert_eq!(take(begun + Duration::from_millis(500)), RATE as usize / 2);
        // A clock that went backwards gives nothing, and takes nothing.
        assert_eq!(take(begun), 0);
        assert_eq!(take(begun + Duration::from_hours(1)), BURST as usize);
    }

    #[test]
    fn users_are_forgotten_once_they_count_for_nothing() {
        let load = Load::new(8192);
        let stays = load.enter(1).unwrap();
        let busy = load.enter(2).unwrap();
        while busy.may_ask() {}
        drop(busy);
        for uid in 1000..10_000 {
            drop(load.enter(uid));
        }
        let users = load.0.users.borrow();
        assert!(users.len() <= 2 * FORGET, "{}", users.len());
        assert!(users.contains_key(&1));
        drop(stays);
    }
}
