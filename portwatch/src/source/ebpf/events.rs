//! The probes: attached in one of three ways, then drained from their ring.
//!
//! Losses are found by counting, not by guessing: the programs count every record before they ask the ring for room,
//! and every one that found none. When the ring is empty and `produced - dropped` is more than was received, a record
//! is being written this very moment; when `dropped` rose, a snapshot must tell what the lost records would have.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use aya::Ebpf;
use aya::maps::{HashMap as BpfHashMap, Map, MapData, RingBuf};
use aya::programs::{
    BtfTracePoint, CgroupAttachMode, CgroupSock, FEntry, FExit, KProbe, Program, ProgramError, SockOps,
};
use aya_log::EbpfLogger;
use portwatch_ebpf::{COUNTER_SLOTS, Counters, Record, kind};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Kernel, PodConfig, brief, record};
use crate::model::{Attempt, BootNs, Event, Listener, Process, ProcessId, Protocol, SocketId};
use crate::source::{Refusal, Tier, diag, netns, process};

const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/bpf/events.bpf.o"));

/// Where a cgroup2 tree is mounted: alone, or beside version 1.
const CGROUP_ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Records taken from the ring before the caller gets to see them.
const BATCH: usize = 4096;

/// Processes remembered with their details.
const MAX_PROCESSES: usize = 16 << 10;

/// How long a record may stay between being counted and being readable before the counts are compared again.
const IN_FLIGHT: Duration = Duration::from_millis(5);

/// The attached probes of one tier and what they have told.
pub(crate) struct Probes {
    tier: Tier,
    /// Parts of the tier that this kernel refused.
    gaps: Vec<Refusal>,
    ring: AsyncFd<RingBuf<MapData>>,
    counters: CounterMap,
    holders: BpfHashMap<MapData, u32, u8>,
    udp_bound: BpfHashMap<MapData, u64, u8>,
    /// Cookies of UDP sockets that were bound since the start, or were there at the start; inodes where there is none.
    udp_known: HashSet<u64>,
    udp_known_inodes: HashSet<u64>,
    /// Processes put into `holders`, as far as userspace knows.
    watched: HashSet<u32>,
    processes: HashMap<ProcessId, Arc<Process>>,
    received: u64,
    lost: u64,
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    /// Holds the programs and their links.
    _ebpf: Ebpf,
}

impl Probes {
    /// Loads and attaches the programs of one tier; from then on nothing is missed.
    pub(crate) fn attach(kernel: &Kernel, tier: Tier, ring_bytes: Option<u32>) -> anyhow::Result<Probes> {
        let cgroup = CGROUP_ROOTS.iter().find_map(|root| open_cgroup2(root));
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
        let mut attach = Attach { ebpf: &mut ebpf, kernel, gaps: Vec::new(), tier };
        match tier {
            Tier::Fexit => attach.fexit()?,
            Tier::Kprobe => attach.kprobe(cgroup.as_ref())?,
            Tier::Tracepoint => attach.tracepoint(cgroup.as_ref())?,
            Tier::Poll => unreachable!("polling needs no programs"),
        }
        attach.common()?;
        let gaps = attach.gaps;

        let ring = RingBuf::try_from(take(&mut ebpf, "EVENTS")?)?;
        let counters = CounterMap::new(&take(&mut ebpf, "COUNTERS")?)?;
        let holders = BpfHashMap::try_from(take(&mut ebpf, "HOLDERS")?)?;
        let udp_bound = BpfHashMap::try_from(take(&mut ebpf, "UDP_BOUND")?)?;
        let logger = if level > 0 { EbpfLogger::init(&mut ebpf).ok() } else { None };
        Ok(Probes {
            tier,
            gaps,
            // SAFETY: the ring owns its descriptor and always names the same one, open for as long as it lives.
            ring: unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }
                .context("cannot poll the event ring")?,
            counters,
            holders,
            udp_bound,
            udp_known: HashSet::new(),
            udp_known_inodes: HashSet::new(),
            watched: HashSet::new(),
            processes: HashMap::new(),
            received: 0,
            lost: 0,
            logger,
            _ebpf: ebpf,
        })
    }

    pub(crate) fn tier(&self) -> Tier {
        self.tier
    }

    pub(crate) fn gaps(&self) -> &[Refusal] {
        &self.gaps
    }

    /// Records lost since the probes were attached.
    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }

    /// Waits until the kernel has something to tell; returns it, and how many records were lost before now. An empty
    /// batch comes only with a loss. Cancel safe: a record is taken only when it is about to be returned.
    pub(crate) async fn next(&mut self) -> anyhow::Result<(Vec<Event>, u64)> {
        loop {
            let events = self.drain();
            if events.len() >= BATCH {
                return Ok((events, 0));
            }
            let (lost, in_flight) = self.account();
            if !events.is_empty() || lost > 0 {
                return Ok((events, lost));
            }
            if in_flight {
                // Somebody is between counting a record and submitting it, or its drop: look again soon.
                if let Ok(guard) = tokio::time::timeout(IN_FLIGHT, self.ring.readable_mut()).await {
                    guard.context("cannot poll the event ring")?.clear_ready();
                }
                continue;
            }
            let mut guard = self.ring.readable_mut().await.context("cannot poll the event ring")?;
            guard.clear_ready();
        }
    }

    /// What is in the ring now, up to the first batch that reaches past `at`.
    pub(crate) fn pending(&mut self, at: BootNs) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            let batch = self.drain();
            let is_last = batch.last().is_none_or(|event| event.at() > at);
            events.extend(batch);
            if is_last {
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

    /// post_bind tells the cookie of a socket, but neither its inode nor its namespace (the task's is a guess): asks
    /// netlink for both. One dump serves the whole batch. A socket that is closed again, or in a namespace that is not
    /// ours, keeps the guess.
    fn name_anonymous(&mut self, events: &mut [Event]) {
        let Ok(netns) = netns::own() else { return };
        let Ok(sockets) = diag::dump_udp(netns) else { return };
        let inodes: HashMap<u64, u64> = sockets.iter().map(|socket| (socket.id.cookie, socket.id.inode)).collect();
        for event in events.iter_mut().filter(|event| is_anonymous(event)) {
            if let Event::Opened { socket, .. } = event
                && let Some(&inode) = inodes.get(&socket.id.cookie)
            {
                socket.id.inode = inode;
                socket.netns = netns;
                self.udp_known_inodes.insert(inode);
            }
        }
    }

    /// Compares what the kernel counted with what arrived: records lost since the last time, and whether one is still
    /// on its way.
    fn account(&mut self) -> (u64, bool) {
        let counters = self.counters.sum();
        let lost = counters.dropped.saturating_sub(self.lost);
        self.lost = counters.dropped;
        (lost, counters.produced > self.received + counters.dropped)
    }

    fn event(&mut self, record: &Record) -> Option<Event> {
        let at = record.at;
        let id = record::actor(record);
        Some(match record.kind {
            kind::OPENED => {
                let socket = record::socket(record)?;
                self.watched.insert(id.pid);
                if socket.proto == Protocol::Udp {
                    self.udp_known.insert(socket.id.cookie);
                    self.udp_known_inodes.insert(socket.id.inode);
                }
                Event::Opened { at, socket, by: self.actor(record) }
            }
            kind::CLOSED => {
                self.udp_known.remove(&record.cookie);
                self.udp_known_inodes.remove(&record.inode);
                Event::Closed { at, id: record::id(record), by: Some(self.actor(record)) }
            }
            kind::FORKED => {
                let parent = self.actor(record);
                self.watched.insert(record.child);
                let id = ProcessId { pid: record.child, start: record.child_start };
                let child = Arc::new(Process { id, ppid: parent.id.pid, ..Process::clone(&parent) });
                Event::Forked { at, parent: parent.id, child: self.remember(child) }
            }
            kind::EXECED => {
                self.processes.remove(&id);
                Event::Execed { at, process: self.actor(record) }
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

    /// The process behind a record, with all that can still be read of it.
    fn actor(&mut self, record: &Record) -> Arc<Process> {
        let id = record::actor(record);
        if let Some(process) = self.processes.get(&id) {
            return Arc::clone(process);
        }
        let process = process::read_exact(id)
            .unwrap_or_else(|| Process { uid: Some(record.task_uid), ..Process::bare(id, record::name(&record.comm)) });
        self.remember(Arc::new(process))
    }

    fn remember(&mut self, process: Arc<Process>) -> Arc<Process> {
        if self.processes.len() >= MAX_PROCESSES {
            self.processes.clear();
        }
        self.processes.insert(process.id, Arc::clone(&process));
        process
    }

    /// Forgets the processes that hold nothing any more. Call it before a snapshot is read: whatever they begin to
    /// hold meanwhile is in the snapshot, and [`Self::follow`] adds them again.
    pub(crate) fn forget_all_but(&mut self, holders: &HashSet<u32>) {
        let gone: Vec<u32> = self.watched.difference(holders).copied().collect();
        for pid in gone {
            self.watched.remove(&pid);
            let _ = self.holders.remove(&pid);
        }
    }

    /// Makes the kernel report forks, execs and exits of everyone who holds one of these, and the release of the UDP
    /// sockets among them.
    pub(crate) fn follow(&mut self, listeners: &[Listener]) {
        for listener in listeners {
            for holder in &listener.holders {
                // A full map is counted by the kernel for its own insertions; here the next snapshot will do.
                if self.watched.insert(holder.process.id.pid) {
                    let _ = self.holders.insert(holder.process.id.pid, 1, 0);
                }
            }
            // One that is closed by now stays in the map until its place is needed.
            let SocketId { cookie, inode } = listener.socket.id;
            if listener.socket.proto == Protocol::Udp {
                self.udp_known_inodes.insert(inode);
                if cookie != 0 && self.udp_known.insert(cookie) {
                    let _ = self.udp_bound.insert(cookie, 1, 0);
                }
            }
        }
    }

    /// Whether a UDP socket without a mark of bind() is known to be bound: seen when it was, or there from the start.
    pub(crate) fn knows_udp(&self, id: SocketId) -> bool {
        self.udp_known.contains(&id.cookie) || self.udp_known_inodes.contains(&id.inode)
    }

    /// The process, from memory or from /proc.
    pub(crate) fn details(&mut self, id: ProcessId) -> Arc<Process> {
        if let Some(process) = self.processes.get(&id) {
            return Arc::clone(process);
        }
        let process = process::read_exact(id).unwrap_or_else(|| Process::bare(id, "?"));
        self.remember(Arc::new(process))
    }
}

/// Attaching, one program after the other.
struct Attach<'a> {
    ebpf: &'a mut Ebpf,
    kernel: &'a Kernel,
    gaps: Vec<Refusal>,
    tier: Tier,
}

impl Attach<'_> {
    fn fexit(&mut self) -> anyhow::Result<()> {
        // MPTCP listeners pass the first alone; kernels before 6.5 have only the second.
        if self.kernel.has_listen_sk {
            self.exit_of("listen_sk_exit", "__inet_listen_sk")?;
        } else {
            self.exit_of("listen_exit", "inet_listen")?;
        }
        let udp = self.exit_of("bind4_exit", "__inet_bind").and_then(|()| {
            let btf = self.kernel.loader_btf()?;
            let program: &mut FEntry = typed(self.ebpf, "udp_unhash_entry")?;
            program
                .load("udp_lib_unhash", btf)
                .and_then(|()| program.attach())
                .map_err(|e| refused("fentry/udp_lib_unhash", &e))?;
            Ok(())
        });
        self.gap("UDP", udp);
        // A module on some kernels, and then absent from the kernel's own BTF.
        let udp6 = self.exit_of("bind6_exit", "__inet6_bind");
        self.gap("UDP over IPv6", udp6);
        let conflicts = self
            .exit_of("tcp_get_port_exit", "inet_csk_get_port")
            .and_then(|()| self.exit_of("udp_get_port_exit", "udp_lib_get_port"));
        self.gap("failed binds", conflicts);
        Ok(())
    }

    fn exit_of(&mut self, program: &str, function: &str) -> anyhow::Result<()> {
        let btf = self.kernel.loader_btf()?;
        let program: &mut FExit = typed(self.ebpf, program)?;
        program
            .load(function, btf)
            .and_then(|()| program.attach())
            .map_err(|error| refused(&format!("fexit/{function}"), &error))?;
        Ok(())
    }

    fn kprobe(&mut self, cgroup: Option<&File>) -> anyhow::Result<()> {
        self.probe_all("hash_enter", &["inet_hash", "inet6_hash"])?;
        match cgroup {
            Some(cgroup) => {
                let udp = self.udp_by_cgroup(cgroup);
                self.gap("UDP", udp);
            }
            None => self.limit("UDP is seen by snapshots only: no cgroup2 tree is mounted"),
        }
        let conflicts = self
            .probe_pair("tcp_get_port_enter", "tcp_get_port_leave", "inet_csk_get_port")
            .and_then(|()| self.probe_pair("udp_get_port_enter", "udp_get_port_leave", "udp_lib_get_port"));
        self.gap("failed binds", conflicts);
        Ok(())
    }

    /// Attaches a kprobe and its kretprobe.
    fn probe_pair(&mut self, enter: &str, leave: &str, function: &str) -> anyhow::Result<()> {
        self.probe_all(leave, &[function])?;
        self.probe_all(enter, &[function])
    }

    fn probe_all(&mut self, program: &str, functions: &[&str]) -> anyhow::Result<()> {
        let program: &mut KProbe = typed(self.ebpf, program)?;
        program.load().map_err(|error| refused(&format!("kprobe/{}", functions.join(",")), &error))?;
        for function in functions {
            program.attach(function, 0).map_err(|error| refused(&format!("kprobe/{function}"), &error))?;
        }
        Ok(())
    }

    fn tracepoint(&mut self, cgroup: Option<&File>) -> anyhow::Result<()> {
        let Some(cgroup) = cgroup else {
            self.limit(
                "no cgroup2 tree is mounted: ports of new listeners are read back, UDP is seen by snapshots only",
            );
            return Ok(());
        };
        let program: &mut SockOps = typed(self.ebpf, "listen_succeeded")?;
        program
            .load()
            .and_then(|()| program.attach(cgroup, CgroupAttachMode::Single))
            .map_err(|error| refused("sock_ops on the cgroup2 root", &error))?;
        let udp = self.udp_by_cgroup(cgroup);
        self.gap("UDP", udp);
        self.limit("failed binds are not seen without fexit or kprobes");
        Ok(())
    }

    fn udp_by_cgroup(&mut self, cgroup: &File) -> anyhow::Result<()> {
        // The release first, so that no bind goes without it.
        for name in ["udp_release", "udp_post_bind4", "udp_post_bind6"] {
            let program: &mut CgroupSock = typed(self.ebpf, name)?;
            program
                .load()
                .and_then(|()| program.attach(cgroup, CgroupAttachMode::Single))
                .map_err(|error| refused("post_bind and sock_release on the cgroup2 root", &error))?;
        }
        Ok(())
    }

    /// What all tiers share: the end of listening, and processes.
    fn common(&mut self) -> anyhow::Result<()> {
        for (program, tracepoint) in [
            ("state_changed", "inet_sock_set_state"),
            ("forked", "sched_process_fork"),
            ("execed", "sched_process_exec"),
            ("exited", "sched_process_exit"),
        ] {
            let btf = self.kernel.loader_btf()?;
            let program: &mut BtfTracePoint = typed(self.ebpf, program)?;
            program
                .load(tracepoint, btf)
                .and_then(|()| program.attach())
                .map_err(|error| refused(&format!("tp_btf/{tracepoint}"), &error))?;
        }
        Ok(())
    }

    fn limit(&mut self, reason: &str) {
        self.gaps.push(Refusal { tier: self.tier, reason: reason.to_owned() });
    }

    /// Notes a part that the tier can do without.
    fn gap(&mut self, part: &str, result: anyhow::Result<()>) {
        if let Err(error) = result {
            self.gaps.push(Refusal { tier: self.tier, reason: format!("{part}: {error:#}") });
        }
    }
}

/// Whether the event is of a socket whose inode the kernel program could not tell.
fn is_anonymous(event: &Event) -> bool {
    matches!(event, Event::Opened { socket, .. } if socket.id.inode == 0)
}

fn typed<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut T>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).with_context(|| format!("the probes' object lacks {name}"))?;
    Ok(program.try_into()?)
}

fn refused(what: &str, error: &ProgramError) -> anyhow::Error {
    log::debug!("{what}: {error}");
    let reason = brief(error);
    let why = if what.starts_with("kprobe/") && !Path::new("/sys/bus/event_source/devices/kprobe").exists() {
        " (this kernel is built without kprobes)"
    } else if what.starts_with('f') && reason.starts_with("EPERM") {
        " (the kernel refuses trampolines)"
    } else {
        ""
    };
    anyhow!("cannot load {what}: {reason}{why}")
}

fn take(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<Map> {
    ebpf.take_map(name).with_context(|| format!("the probes' object lacks the map {name}"))
}

/// The directory, if it is the root of a cgroup2 tree.
fn open_cgroup2(root: &str) -> Option<File> {
    let file = File::open(root).ok()?;
    let kind = rustix::fs::fstatfs(&file).ok()?.f_type;
    // CGROUP2_SUPER_MAGIC (include/uapi/linux/magic.h).
    (kind == 0x6367_7270).then_some(file)
}

/// The kernel's counters, mapped into memory: looking at them costs no system call.
struct CounterMap {
    slots: NonNull<Counters>,
}

// SAFETY: the mapping belongs to this value alone and is only read, by volatile loads.
unsafe impl Send for CounterMap {}

impl CounterMap {
    const BYTES: usize = COUNTER_SLOTS as usize * size_of::<Counters>();

    fn new(map: &Map) -> anyhow::Result<CounterMap> {
        let Map::Array(map) = map else { bail!("the probes' counters are no array") };
        // SAFETY: a fresh mapping at an address that the kernel chooses.
        let address = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                Self::BYTES,
                rustix::mm::ProtFlags::READ,
                rustix::mm::MapFlags::SHARED,
                map.fd().as_fd(),
                0,
            )
        }
        .context("cannot map the kernel's counters")?;
        Ok(CounterMap { slots: NonNull::new(address.cast()).context("the kernel's counters were mapped at null")? })
    }

    fn sum(&self) -> Counters {
        let mut sum = Counters::default();
        for slot in 0..COUNTER_SLOTS as usize {
            // SAFETY: within the mapping, aligned; the kernel may write at the same time, hence volatile.
            let counters = unsafe { self.slots.add(slot).read_volatile() };
            sum.produced += counters.produced;
            sum.dropped += counters.dropped;
        }
        sum
    }
}

impl Drop for CounterMap {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, not used after this.
        let _ = unsafe { rustix::mm::munmap(self.slots.as_ptr().cast(), Self::BYTES) };
    }
}
