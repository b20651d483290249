//! The attached probes: their ring drained into events, and their losses found.
//!
//! Losses are found by counting, not by guessing: the programs count every record before they ask the ring for room,
//! and every one that found none. When the ring is empty and `produced - dropped` is more than was received, a record
//! is being written this very moment; when `dropped` rose, a snapshot must tell what the lost records would have. So it
//! must where the kernel skipped a program, which it counts itself ([`super::misses`]).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use aya::Ebpf;
use aya::maps::{HashMap as BpfHashMap, Map, MapData, RingBuf};
use aya_log::EbpfLogger;
use portwatch_ebpf::{Record, kind};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::attach::{Attached, attach, open_cgroup2};
use super::counters::CounterMap;
use super::links::CgroupLinks;
use super::misses::Misses;
use super::processes::Processes;
use super::{Kernel, PodConfig, brief, record};
use crate::model::{Attempt, BootNs, Event, Listener, Process, ProcessId, Protocol, Socket, SocketId};
use crate::source::{Refusal, Tier, diag, netns, process};

const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/bpf/events.bpf.o"));

/// Records taken from the ring before the caller gets to see them.
const BATCH: usize = 4096;

/// How long a record may stay between being counted and being readable before the counts are compared again.
const IN_FLIGHT: Duration = Duration::from_millis(5);

/// Between two looks for it where nobody else can be let run meanwhile.
const GLANCE: Duration = Duration::from_micros(50);

/// Of bpf(2), `BPF_MAP_UPDATE_ELEM`: only where there is none.
const BPF_NOEXIST: u64 = 1;

/// The parent of all kernel threads (`rest_init` in init/main.c starts it second).
const KTHREADD: u32 = 2;

/// The attached probes of one tier and what they have told.
pub(crate) struct Probes {
    tier: Tier,
    /// Parts of the tier that this kernel refused.
    gaps: Vec<Refusal>,
    sees_udp: bool,
    ring: AsyncFd<RingBuf<MapData>>,
    counters: CounterMap,
    holders: BpfHashMap<MapData, u32, u8>,
    udp_bound: BpfHashMap<MapData, u64, u64>,
    /// UDP sockets that were bound since the start, or were there at the start.
    udp: KnownUdp,
    /// Processes put into `holders`, as far as userspace knows.
    watched: HashSet<u32>,
    processes: Processes,
    received: u64,
    /// Records that found no room, as last looked at.
    dropped: u64,
    misses: Misses,
    /// The `comm` of portwatch itself.
    own_name: String,
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    links: CgroupLinks,
    /// Holds the programs and their links.
    ebpf: Ebpf,
}

impl Probes {
    /// Loads and attaches the programs of one tier; from then on nothing is missed.
    pub(crate) fn open(kernel: &Kernel, tier: Tier, ring_bytes: Option<u32>) -> anyhow::Result<Probes> {
        let cgroup = open_cgroup2();
        let mut config = PodConfig(kernel.config.0);
        config.0.listen_by_state = u32::from(tier == Tier::Tracepoint);
        config.0.port_by_sock_ops = u32::from(cgroup.is_some());
        let level: u8 = if log::log_enabled!(log::Level::Debug) { aya_log::Level::Debug as u8 } else { 0 };
        let mut loader = kernel.loader(&config)?;
        loader.override_global("AYA_LOG_LEVEL", &level, false);
        if let Some(bytes) = ring_bytes {
            loader.map_max_entries("EVENTS", bytes);
        }
        let mut ebpf =
            loader.load(OBJECT).map_err(|error| anyhow!("cannot load the probes' object: {}", brief(&error)))?;
        let Attached { gaps, sees_udp } = attach(&mut ebpf, kernel, tier, cgroup.as_ref())?;

        let ring = RingBuf::try_from(take(&mut ebpf, "EVENTS")?)?;
        let counters = CounterMap::new(&take(&mut ebpf, "COUNTERS")?)?;
        let holders = BpfHashMap::try_from(take(&mut ebpf, "HOLDERS")?)?;
        let udp_bound = BpfHashMap::try_from(take(&mut ebpf, "UDP_BOUND")?)?;
        let logger = if level > 0 { EbpfLogger::init(&mut ebpf).ok() } else { None };
        Ok(Probes {
            tier,
            gaps,
            sees_udp,
            // SAFETY: the ring owns its descriptor and always names the same one, open for as long as it lives.
            ring: unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }
                .context("cannot poll the event ring")?,
            counters,
            holders,
            udp_bound,
            udp: KnownUdp::default(),
            watched: HashSet::new(),
            processes: Processes::default(),
            own_name: process::read(std::process::id()).map(|own| own.name).unwrap_or_default(),
            received: 0,
            dropped: 0,
            misses: Misses::default(),
            logger,
            links: CgroupLinks::held(),
            ebpf,
        })
    }

    pub(crate) fn tier(&self) -> Tier {
        self.tier
    }

    pub(crate) fn gaps(&self) -> &[Refusal] {
        &self.gaps
    }

    /// Whether somebody took a probe off.
    pub(crate) fn is_broken(&self) -> bool {
        self.links.is_broken()
    }

    /// Events lost since the probes were attached: records without room, and skipped programs.
    pub(crate) fn lost(&self) -> u64 {
        self.dropped + self.misses.seen()
    }

    /// Waits until the kernel has something to tell; returns it, and how many events were lost before now. An empty
    /// batch comes only with a loss. Cancel safe: a record is taken only when it is about to be returned.
    pub(crate) async fn next(&mut self) -> anyhow::Result<(Vec<Event>, u64)> {
        loop {
            let missed = self.misses.look_if_due(&self.ebpf);
            let events = self.drain();
            if events.len() >= BATCH {
                return Ok((events, missed));
            }
            let (dropped, in_flight) = self.account();
            let lost = dropped + missed;
            if !events.is_empty() || lost > 0 {
                return Ok((events, lost));
            }
            // Somebody may be between counting a record and submitting it, or its drop: look again soon.
            let soon = in_flight.then(|| Instant::now() + IN_FLIGHT);
            let readable = match soon.into_iter().chain(self.misses.due()).min() {
                Some(again) => match tokio::time::timeout_at(again, self.ring.readable_mut()).await {
                    Ok(readable) => readable,
                    Err(_) => continue,
                },
                None => self.ring.readable_mut().await,
            };
            readable.context("cannot poll the event ring")?.clear_ready();
        }
    }

    /// What is in the ring now, up to the first batch that reaches past `at`.
    pub(crate) fn pending(&mut self, at: BootNs) -> Vec<Event> {
        let begun = std::time::Instant::now();
        let mut events = Vec::new();
        loop {
            let batch = self.drain();
            let is_done = match batch.last() {
                Some(last) => last.at() > at,
                // Somebody may be between counting a record and submitting it, which holds up all after it.
                None => !self.is_in_flight() || begun.elapsed() >= IN_FLIGHT,
            };
            if batch.is_empty() && !is_done {
                std::thread::sleep(GLANCE);
            }
            events.extend(batch);
            if is_done {
                return events;
            }
        }
    }

    /// Takes what is in the ring, up to a batch.
    fn drain(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while events.len() < BATCH {
            let Some(record) = self.ring.get_mut().next().and_then(|item| record::parse::<Record>(&item)) else {
                break;
            };
            self.received += 1;
            self.misses.expect();
            if let Some(event) = self.event(&record) {
                events.push(event);
            }
        }
        if events.iter().any(is_anonymous) {
            self.name_anonymous(&mut events);
        }
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
        events
    }

    /// post_bind tells the cookie of a socket, but not its inode, its IPV6_V6ONLY or its namespace (the task's is a
    /// guess): asks netlink for them. One dump serves the whole batch. A socket that is closed again, or in a namespace that is not
    /// ours, keeps the guess.
    fn name_anonymous(&mut self, events: &mut [Event]) {
        let Ok(netns) = netns::own() else { return };
        let Ok(sockets) = diag::dump_udp(netns) else { return };
        let by_cookie: HashMap<u64, &Socket> = sockets.iter().map(|socket| (socket.id.cookie, socket)).collect();
        for event in events.iter_mut().filter(|event| is_anonymous(event)) {
            if let Event::Opened { socket, .. } = event
                && let Some(&found) = by_cookie.get(&socket.id.cookie)
            {
                socket.id.inode = found.id.inode;
                socket.v6only = found.v6only;
                socket.netns = netns;
                self.udp.add(found.id);
            }
        }
    }

    /// Events lost since this was last looked at.
    pub(crate) fn losses(&mut self) -> u64 {
        self.account().0 + self.misses.look(&self.ebpf)
    }

    /// Compares what the kernel counted with what arrived: records dropped since the last time, and whether one is still
    /// on its way.
    fn account(&mut self) -> (u64, bool) {
        let counters = self.counters.sum();
        let dropped = counters.dropped.saturating_sub(self.dropped);
        self.dropped = counters.dropped;
        (dropped, counters.produced > self.received + counters.dropped)
    }

    fn is_in_flight(&self) -> bool {
        let counters = self.counters.sum();
        counters.produced > self.received + counters.dropped
    }

    fn event(&mut self, record: &Record) -> Option<Event> {
        let at = record.at;
        let id = record::actor(record);
        Some(match record.kind {
            kind::OPENED => {
                let socket = record::socket(record)?;
                if socket.proto == Protocol::Udp {
                    self.udp.add(socket.id);
                }
                // Of one that was not followed, what is remembered may be of before an exec.
                let is_news = self.watched.insert(id.pid);
                let by = if is_news { self.read(record) } else { None };
                Event::Opened { at, socket, by: by.unwrap_or_else(|| self.actor(record)) }
            }
            kind::CLOSED => {
                let socket = record::id(record);
                if self.udp.remove(socket) {
                    // Where `follow` put it there after the kernel had removed it. No other socket has this cookie.
                    let _ = self.udp_bound.remove(&socket.cookie);
                }
                Event::Closed { at, id: record::id(record), by: self.closer(record) }
            }
            kind::FORKED => {
                let parent = self.actor(record);
                self.watched.insert(record.child);
                let id = ProcessId { pid: record.child, start: record.child_start };
                let child = Arc::new(Process { id, ppid: parent.id.pid, ..Process::clone(&parent) });
                // Not remembered: it will soon be another's uid, name or command.
                Event::Forked { at, parent: parent.id, child }
            }
            kind::EXECED => {
                let bare = || Process { uid: Some(record.task_uid), ..Process::bare(id, record::name(&record.comm)) };
                let process = self.read(record).unwrap_or_else(|| self.remember(bare()));
                Event::Execed { at, process }
            }
            kind::EXITED => {
                self.watched.remove(&id.pid);
                Event::Exited { at, id }
            }
            kind::REFUSED => {
                let socket = record::socket(record)?;
                Event::Refused {
                    at,
                    attempt: Attempt {
                        proto: socket.proto,
                        address: socket.address,
                        port: socket.port,
                        netns: socket.netns,
                        errno: i32::from(record.errno),
                        by: self.actor(record),
                    },
                }
            }
            _ => Event::Unsure { at },
        })
    }

    /// Who closed a socket, unless it was let go of by someone who never held it: whoever reads a descriptor table
    /// (our own iterator, another portwatch) holds each file for a moment, and if its owner closes it in that moment,
    /// the reader's release is the last. Likewise the kernel, which ends sockets that were in flight.
    fn closer(&mut self, record: &Record) -> Option<Arc<Process>> {
        let process = self.actor(record);
        let is_portwatch = process.id.pid == std::process::id() || process.name == self.own_name;
        let is_kernel_thread = process.ppid == KTHREADD;
        (!is_portwatch && !is_kernel_thread).then_some(process)
    }

    /// The process behind a record, with all that can still be read of it.
    fn actor(&mut self, record: &Record) -> Arc<Process> {
        let id = record::actor(record);
        // Processes change their uid and their name; these two tell of it.
        let name = record::name(&record.comm);
        let is_current = |process: &&Arc<Process>| process.uid == Some(record.task_uid) && process.name == name;
        if let Some(process) = self.processes.get(id).filter(is_current) {
            return Arc::clone(process);
        }
        // Not remembered where it is gone, or there was no descriptor to read it by.
        let bare = || Process { uid: Some(record.task_uid), ..Process::bare(id, name) };
        self.read(record).unwrap_or_else(|| Arc::new(bare()))
    }

    /// The process behind a record as it is now.
    fn read(&mut self, record: &Record) -> Option<Arc<Process>> {
        process::read_exact(record::actor(record)).map(|process| self.remember(process))
    }

    fn remember(&mut self, process: Process) -> Arc<Process> {
        let process = Arc::new(process);
        self.processes.add(Arc::clone(&process), &self.watched);
        process
    }

    /// What was read of a process anew.
    pub(crate) fn learn(&mut self, process: &Arc<Process>) {
        if self.watched.contains(&process.id.pid) {
            self.processes.add(Arc::clone(process), &self.watched);
        }
    }

    /// Follows these processes and no others. Call it before a snapshot is read: whatever others begin to hold meanwhile
    /// is in the snapshot, and [`Self::follow`] adds them again. After a loss the kernel is asked whom it follows, too: of
    /// some it may have told only in what was lost, and one that ends while it is followed anew stays.
    pub(crate) fn follow_only(&mut self, holders: &HashSet<u32>, after_loss: bool) {
        let mut gone: HashSet<u32> = self.watched.difference(holders).copied().collect();
        if after_loss {
            gone.extend(self.holders.keys().filter_map(Result::ok).filter(|pid| !holders.contains(pid)));
        }
        for pid in gone {
            self.unfollow(pid);
        }
        for &pid in holders {
            self.follow_process(pid);
        }
    }

    /// Makes the kernel report forks, execs and exits of everyone who holds one of these, which are all that there are, and
    /// the release of the UDP sockets among them. Says whether it did not for somebody: what that one did since the
    /// snapshot was read is told by nobody.
    pub(crate) fn follow(&mut self, listeners: &[Listener], after_loss: bool) -> bool {
        // Once each, not once a socket; even if known: when a process ends, the kernel forgets its number by itself.
        let holders: HashSet<u32> = listeners.iter().flat_map(|l| &l.holders).map(|h| h.process.id.pid).collect();
        let news = holders.into_iter().filter(|&pid| self.follow_process(pid)).count();
        if self.sees_udp {
            if after_loss {
                // The end of some may have been lost.
                self.udp = KnownUdp::default();
            }
            for listener in listeners {
                // One that is closed by now stays in the map until its end is told.
                if listener.socket.proto == Protocol::Udp && self.udp.add(listener.socket.id) {
                    let _ = self.udp_bound.insert(listener.socket.id.cookie, listener.socket.id.inode, 0);
                }
            }
        }
        news > 0
    }

    /// Says whether the kernel did not follow it. Should the map be full, the next snapshot will do.
    fn follow_process(&mut self, pid: u32) -> bool {
        self.watched.insert(pid);
        self.holders.insert(pid, 1, BPF_NOEXIST).is_ok()
    }

    /// After a loss: learns of the bound UDP sockets whose record was lost, and which had no cookie yet to ask for them by.
    pub(crate) fn recall_udp(&mut self) {
        let inodes = self.udp_bound.iter().filter_map(|entry| Some(entry.ok()?.1));
        self.udp.inodes.extend(inodes.filter(|&inode| inode != 0));
    }

    /// Whether a UDP socket without a mark of bind() is known to be bound: seen when it was, or there from the start.
    /// Where UDP is not seen, all count.
    pub(crate) fn knows_udp(&self, id: SocketId) -> bool {
        // The programs remember it before they ask the ring for room: this stays true of a record that was lost.
        let is_remembered = || id.cookie != 0 && self.udp_bound.get(&id.cookie, 0).is_ok();
        !self.sees_udp || self.udp.contains(id) || is_remembered()
    }

    /// Whether UDP sockets raise events; else somebody has to look.
    pub(crate) fn sees_udp(&self) -> bool {
        self.sees_udp
    }

    /// Forgets a process that holds nothing.
    pub(crate) fn unfollow(&mut self, pid: u32) {
        self.watched.remove(&pid);
        let _ = self.holders.remove(&pid);
    }

    /// The process, from memory, if its execs are told, or from /proc.
    pub(crate) fn details(&mut self, id: ProcessId) -> Arc<Process> {
        if let Some(process) = self.processes.get(id).filter(|_| self.watched.contains(&id.pid)) {
            return Arc::clone(process);
        }
        match process::read_exact(id) {
            Some(process) => self.remember(process),
            None => Arc::new(Process::bare(id, "?")),
        }
    }
}

/// UDP sockets by cookie and inode, either of which may be unknown (0).
#[derive(Debug, Default)]
struct KnownUdp {
    inode_of: HashMap<u64, u64>,
    inodes: HashSet<u64>,
}

impl KnownUdp {
    /// Whether the cookie is new.
    fn add(&mut self, id: SocketId) -> bool {
        if id.inode != 0 {
            self.inodes.insert(id.inode);
        }
        id.cookie != 0 && self.inode_of.insert(id.cookie, id.inode).is_none()
    }

    /// Whether it was known by its cookie.
    fn remove(&mut self, id: SocketId) -> bool {
        self.inodes.remove(&id.inode);
        let Some(inode) = self.inode_of.remove(&id.cookie) else { return false };
        self.inodes.remove(&inode);
        true
    }

    fn contains(&self, id: SocketId) -> bool {
        self.inode_of.contains_key(&id.cookie) || self.inodes.contains(&id.inode)
    }
}

/// Whether the event is of a socket whose inode the kernel program could not tell.
fn is_anonymous(event: &Event) -> bool {
    matches!(event, Event::Opened { socket, .. } if socket.id.inode == 0)
}

fn take(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<Map> {
    ebpf.take_map(name).with_context(|| format!("the probes' object lacks the map {name}"))
}
