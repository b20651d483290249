//! Random true histories, delivered out of order and twice, with snapshots read while they happen: whatever the order,
//! a table that is not stale equals the truth, and every life of every socket was told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use super::super::Table;
use super::super::memory::REMEMBERED;
use super::process;
use crate::model::{BootNs, Change, Event, Holder, Listener, Process, ProcessId, Protocol, Snapshot, Socket, SocketId};

/// xorshift64: seeded, so a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        if from.is_empty() { None } else { Some(from[self.below(from.len() as u64) as usize]) }
    }
}

/// What the kernel would know.
#[derive(Clone, Default)]
struct World {
    /// By cookie: the socket, and whether it listens.
    sockets: BTreeMap<u64, (Socket, bool)>,
    /// (pid, cookie): who holds which socket.
    held: BTreeSet<(u64, u64)>,
    processes: BTreeSet<u64>,
    next: u64,
}

fn who(pid: u64) -> Arc<Process> {
    process(&pid.to_string())
}

impl World {
    fn listener(&self, cookie: u64) -> Option<Listener> {
        let (socket, true) = self.sockets.get(&cookie)? else { return None };
        let held = self.held.iter().filter(|held| held.1 == cookie);
        let holders = held.map(|&(pid, _)| Holder { process: who(pid), fds: vec![3], binder: false });
        Some(Listener { socket: socket.clone(), since: None, holders: holders.collect() })
    }

    /// Something that happens at `at`, and what the kernel tells of it.
    fn step(&mut self, at: BootNs, random: &mut Random) -> Vec<Event> {
        let processes: Vec<u64> = self.processes.iter().copied().collect();
        let held: Vec<(u64, u64)> = self.held.iter().copied().collect();
        self.next += 1;
        match random.below(10) {
            0..=3 => {
                let Some(pid) = random.pick(&processes) else { return Vec::new() };
                // Inodes are few, so they are reused as soon as they are free.
                let in_use: BTreeSet<u64> = self.sockets.values().map(|(socket, _)| socket.id.inode).collect();
                let free: Vec<u64> = (1..60).filter(|inode| !in_use.contains(inode)).collect();
                let Some(inode) = random.pick(&free) else { return Vec::new() };
                let socket = Socket {
                    id: SocketId { inode, cookie: 1000 + self.next },
                    proto: Protocol::Tcp,
                    mptcp: false,
                    address: IpAddr::V4(Ipv4Addr::LOCALHOST),
                    port: random.below(5) as u16,
                    v6only: None,
                    netns: 1,
                    uid: 0,
                    backlog: None,
                };
                self.held.insert((pid, socket.id.cookie));
                self.sockets.insert(socket.id.cookie, (socket.clone(), true));
                vec![Event::Opened { at, socket, by: who(pid) }]
            }
            4 | 5 => {
                // shutdown(2), or listen(2) again, perhaps on another port.
                let Some((pid, cookie)) = random.pick(&held) else { return Vec::new() };
                let Some((socket, listens)) = self.sockets.get_mut(&cookie) else { return Vec::new() };
                *listens = !*listens;
                if !*listens {
                    return vec![Event::Closed { at, id: socket.id, by: Some(who(pid)) }];
                }
                socket.port = random.below(5) as u16;
                vec![Event::Opened { at, socket: socket.clone(), by: who(pid) }]
            }
            6 => {
                // close(2), of which the kernel tells if it was the last.
                let Some((pid, cookie)) = random.pick(&held) else { return Vec::new() };
                self.held.remove(&(pid, cookie));
                self.release(at, pid)
                    .into_iter()
                    .chain((self.held.iter().any(|held| held.1 == cookie)).then_some(Event::Unsure { at }))
                    .collect()
            }
            7 | 8 => {
                let Some(pid) = random.pick(&processes).filter(|_| processes.len() < 12) else { return Vec::new() };
                let child = 100 + self.next;
                self.processes.insert(child);
                let inherited: Vec<u64> = held.iter().filter(|held| held.0 == pid).map(|held| held.1).collect();
                self.held.extend(inherited.into_iter().map(|cookie| (child, cookie)));
                vec![Event::Forked { at, parent: who(pid).id, child: who(child) }]
            }
            _ => {
                let Some(pid) = random.pick(&processes).filter(|_| processes.len() > 2) else { return Vec::new() };
                self.processes.remove(&pid);
                self.held.retain(|held| held.0 != pid);
                let mut events = vec![Event::Exited { at, id: who(pid).id }];
                events.extend(self.release(at, pid));
                events
            }
        }
    }

    /// Sockets that nobody holds are gone.
    fn release(&mut self, at: BootNs, pid: u64) -> Vec<Event> {
        let held: BTreeSet<u64> = self.held.iter().map(|held| held.1).collect();
        let (kept, gone) = std::mem::take(&mut self.sockets).into_iter().partition(|(cookie, _)| held.contains(cookie));
        self.sockets = kept;
        let gone = BTreeMap::into_values(gone).filter(|(_, listened)| *listened);
        gone.map(|(socket, _)| Event::Closed { at, id: socket.id, by: Some(who(pid)) }).collect()
    }
}

/// What is compared: endpoint and holders by cookie.
fn summary<'a>(listeners: impl Iterator<Item = &'a Listener>) -> BTreeMap<u64, (u64, u16, Vec<u32>)> {
    let pids = |listener: &Listener| listener.holders.iter().map(|holder| holder.process.id.pid).collect();
    listeners.map(|l| (l.socket.id.cookie, (l.socket.id.inode, l.socket.port, pids(l)))).collect()
}

/// Plays one history. Says how often the table was not stale, and so compared, before the end.
fn play(seed: u64) -> usize {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut world = World { processes: [2, 3, 4].into(), ..World::default() };
    // (when it is delivered, event)
    let mut delivery: Vec<(BootNs, Event)> = Vec::new();
    let mut truth: Vec<(BootNs, World)> = Vec::new();
    // Short ones often end with a table that asks nothing, long ones tangle more.
    let steps = if seed.is_multiple_of(50) { 200 } else { 3 + random.below(25) };
    for step in 1..=steps {
        let at = step * 10;
        for event in world.step(at, &mut random) {
            for _ in 0..=random.below(4) / 3 {
                delivery.push((at + random.below(60), event.clone()));
            }
        }
        truth.push((at, world.clone()));
    }
    let world_at = |at: BootNs| truth.iter().rev().find(|(when, _)| *when < at).map(|(_, world)| world);
    // Each socket is read at its own moment. The last snapshot may be delivered among late events too.
    let mut starts: Vec<BootNs> = (0..1 + random.below(4)).map(|_| 5 + random.below(steps * 10)).collect();
    if random.below(4) > 0 {
        starts.push(steps * 10 + 5);
    }
    for at in starts {
        let ends = at + random.below(50);
        let cookies: BTreeSet<u64> = truth
            .iter()
            .filter(|(when, _)| *when < ends)
            .flat_map(|(_, world)| world.sockets.keys().copied())
            .collect();
        let read = |cookie| world_at(at + random.below(ends - at + 1)).and_then(|world| world.listener(cookie));
        let listeners: Vec<Listener> = cookies.into_iter().filter_map(read).collect();
        // Two moments can show two sockets with one inode: the source joins by inode, and shows one of them.
        let mut inodes = BTreeSet::new();
        let listeners = listeners.into_iter().filter(|listener| inodes.insert(listener.socket.id.inode)).collect();
        delivery
            .push((ends + random.below(40), Event::Snapshot(Snapshot { at, listeners, complete: vec![1], lost: 0 })));
    }
    delivery.sort_by_key(|(when, _)| *when);

    let mut table = Table::new();
    let mut lives: BTreeMap<u64, i32> = BTreeMap::new();
    let mut started = false;
    // The rows of the first snapshot are told by nothing.
    let mut note = |table: &Table, changes: Vec<Change>, first: bool| {
        for change in changes {
            match change {
                Change::Opened { listener, .. } => *lives.entry(listener.socket.id.cookie).or_default() += 1,
                Change::Closed { listener, .. } => *lives.entry(listener.socket.id.cookie).or_default() -= 1,
                _ => {}
            }
        }
        if first {
            for listener in table.listeners() {
                lives.insert(listener.socket.id.cookie, 1);
            }
        }
        for (cookie, balance) in &lives {
            assert!((0..=1).contains(balance), "seed {seed}: socket {cookie} told open {balance} times");
        }
    };
    for (_, event) in delivery.clone() {
        let first = !started && matches!(event, Event::Snapshot(_));
        let changes = table.apply(event);
        note(&table, changes, first);
        started |= first;
        table.rows.assert_consistent();
    }
    // A driver reads again while the table asks for it; once is enough when nothing happens any more.
    let end = steps * 10 + 1000;
    let last = world_at(end).expect("a world");
    let expect: Vec<Listener> = last.sockets.keys().filter_map(|&cookie| last.listener(cookie)).collect();
    let settled = usize::from(!table.is_stale());
    if settled == 1 {
        assert_eq!(summary(table.listeners()), summary(expect.iter()), "seed {seed}, not stale");
    }
    let snapshot = Snapshot { at: end, listeners: expect.clone(), complete: vec![1], lost: 0 };
    let changes = table.apply(Event::Snapshot(snapshot));
    note(&table, changes, false);
    assert_eq!(summary(table.listeners()), summary(expect.iter()), "seed {seed}, after the last snapshot");
    assert!(!table.is_stale(), "seed {seed}: stale after the last snapshot");
    // All of it once more: nothing is raised from the dead.
    for (_, event) in delivery {
        let changes = table.apply(event);
        note(&table, changes, false);
    }
    assert_eq!(summary(table.listeners()), summary(expect.iter()), "seed {seed}, told twice");
    let open: BTreeSet<u64> =
        lives.into_iter().filter(|(_, balance)| *balance == 1).map(|(cookie, _)| cookie).collect();
    let listening: BTreeSet<u64> = expect.iter().map(|listener| listener.socket.id.cookie).collect();
    assert_eq!(open, listening, "seed {seed}: told open");
    settled
}

#[test]
fn random_histories_end_in_the_truth() {
    let settled: usize = (1..=2000).map(play).sum();
    assert!(settled > 400, "only {settled} histories were not stale at their end");
}

fn id(pid: u32) -> ProcessId {
    who(u64::from(pid)).id
}

#[test]
fn memory_of_the_dead_is_bounded() {
    let mut table = Table::new();
    table.apply(Event::Snapshot(Snapshot { at: 1_000_000, complete: vec![1], ..Snapshot::default() }));
    let (mut opened, mut closed) = (0, 0);
    for n in 1..=3 * REMEMBERED as u64 {
        table.apply(Event::Exited { at: n, id: id(n as u32) });
        table.apply(Event::Closed { at: n, id: SocketId { inode: 0, cookie: n }, by: None });
        table.apply(Event::Forked { at: n, parent: id(n as u32), child: who(1) });
        // Announced late: its Closed never comes, and memory runs out.
        let [Event::Opened { socket, .. }] = &super::parse("open 5 c0 tcp 127.0.0.1:80 by 1")[..] else {
            panic!("open")
        };
        let socket = Socket { id: SocketId { inode: 0, cookie: 1_000_000 + n }, ..socket.clone() };
        for change in table.apply(Event::Opened { at: 5, socket, by: who(50_000) }) {
            match change {
                Change::Opened { .. } => opened += 1,
                Change::Closed { .. } => closed += 1,
                other => panic!("{other:?}"),
            }
        }
        assert!(table.tombstones.len() <= REMEMBERED && table.exited.len() <= REMEMBERED);
        assert!(table.stirred.len() <= REMEMBERED);
    }
    assert!(table.is_empty());
    assert_eq!(opened, 3 * REMEMBERED);
    closed += table.apply(Event::Snapshot(Snapshot { at: 2_000_000, ..Snapshot::default() })).len();
    assert_eq!(closed, opened, "each is told closed once: when it is forgotten, or at the next snapshot");
}
