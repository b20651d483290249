//! Reads who holds which socket from `/proc/PID/fd`, and whole snapshots for the tier that needs no kernel programs.
//!
//! The walk costs system calls and nothing else: one `openat`, two `getdents`, one `readlinkat` per descriptor and one
//! look at the number of threads, without allocation per descriptor. A process that vanishes on the way is normal.
//! Processes that were forked meanwhile are walked too, else a listener handed from parent to child would seem lost.
//!
//! Three kinds of file table are read:
//! - the leader's, `/proc/PID/fd`: the only one as a rule, shared by all threads;
//! - that of a thread which has its own (`unshare(CLONE_FILES)`), told by `kcmp`;
//! - the threads' where the leader has exited: it is a zombie then, and its own `fd` is empty or may not be read.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use nix::libc;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RawDir};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use crate::model::{NetnsId, Process, ProcessId, Snapshot, Socket};
use crate::source::diag::Dump;
use crate::source::join::{HeldFd, join};
use crate::source::netns::{self, Namespaces};
use crate::source::{diag, process, stat};

/// The descriptors found, and how far the walk could see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldFds {
    pub fds: Vec<HeldFd>,
    /// How many processes' descriptors may not be read (that takes `CAP_SYS_PTRACE` for other users' processes).
    pub denied: usize,
}

/// A snapshot and what its reader ought to know of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    pub snapshot: Snapshot,
    /// How many processes' descriptors could not be read for want of permission.
    pub denied: usize,
    /// What could not be read, and why: sentences for people.
    pub notes: Vec<String>,
}

/// Every descriptor of every visible process that refers to a socket with one of these inodes.
pub fn held_fds(wanted: &HashSet<u64>) -> HeldFds {
    let mut held = HeldFds::default();
    if wanted.is_empty() {
        return held;
    }
    let Ok(proc) = open_dir(CWD, "/proc", OFlags::PATH) else { return held };
    let mut walked: Vec<u32> = Vec::new();
    for _ in 0..ROUNDS {
        let mut pids = Vec::new();
        // A descriptor of its own each time: the offset of a directory belongs to the descriptor.
        let Ok(listing) = open_dir(proc.as_fd(), ".", OFlags::RDONLY) else { break };
        let _ = for_each_number(listing.as_fd(), |pid| pids.push(pid));
        pids.retain(|pid| walked.binary_search(pid).is_err());
        if pids.is_empty() {
            break;
        }
        let found = walk_all(proc.as_fd(), &pids, wanted);
        held.fds.extend(found.fds);
        held.denied += found.denied;
        walked.extend(pids);
        walked.sort_unstable();
    }
    held
}

/// Whether a process holds a socket right now, through any of its threads. A process that is gone holds nothing.
///
/// # Errors
/// `PermissionDenied` where its descriptors may not be read, and what opening `/proc` gives.
pub fn holds(pid: u32, inode: u64) -> io::Result<bool> {
    let proc = open_dir(CWD, "/proc", OFlags::PATH)?;
    let wanted = HashSet::from([inode]);
    let mut walker = Walker::new(proc.as_fd(), &wanted);
    walker.visit(pid);
    match walker.held {
        HeldFds { fds, .. } if !fds.is_empty() => Ok(true),
        HeldFds { denied: 0, .. } => Ok(false),
        _ => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// Reads the listeners that `keep` accepts, with their holders: of the caller's network namespace, or of every one
/// that can be seen and entered.
///
/// # Errors
/// When the sockets of the caller's own namespace cannot be listed at all.
pub fn scan(all_netns: bool, keep: &dyn Fn(&Socket) -> bool) -> anyhow::Result<Scan> {
    let at = process::boot_ns_now();
    let others = if all_netns { netns::visible()? } else { Namespaces::default() };
    let dumped = dump_all(&others, keep, diag::dump)?;
    let mut scan = Scan { notes: dumped.notes, ..Scan::default() };

    let mut holders = Holders::default();
    holders.read(&inodes_of(&dumped.sockets));
    let ghosts = holders.without(&dumped.sockets);
    if !ghosts.is_empty() {
        // Closed between the two readings, rather than held by nobody? And one whose last known holder is gone may
        // have been handed on to a process that came after the walk.
        let still = dump_all(&others, keep, diag::dump_roughly)?;
        let alive: HashSet<u64> = inodes_of(&still.sockets);
        let (gone, left): (HashSet<u64>, HashSet<u64>) = ghosts.into_iter().partition(|inode| !alive.contains(inode));
        if holders.vanished && !left.is_empty() {
            holders.read(&left);
        }
        let read_again: HashSet<NetnsId> = still.complete.into_iter().collect();
        scan.snapshot.listeners = holders.join(dumped.sockets);
        scan.snapshot.listeners.retain(|listener| {
            let socket = &listener.socket;
            !(listener.is_ghost() && gone.contains(&socket.id.inode) && read_again.contains(&socket.netns))
        });
    } else {
        scan.snapshot.listeners = holders.join(dumped.sockets);
    }
    scan.snapshot.at = at;
    scan.snapshot.complete = dumped.complete;
    scan.denied = holders.denied;
    if holders.denied > 0 {
        scan.notes.push(format!(
            "the descriptors of {} process(es) may not be read (that takes CAP_SYS_PTRACE): their listeners show no holder",
            holders.denied
        ));
    }
    Ok(scan)
}

/// Listeners of several namespaces.
pub(super) struct Dumped {
    pub(super) sockets: Vec<Socket>,
    pub(super) complete: Vec<NetnsId>,
    pub(super) notes: Vec<String>,
}

/// Reads them by [`diag::dump`], or by [`diag::dump_roughly`].
pub(super) fn dump_all(
    others: &Namespaces,
    keep: &dyn Fn(&Socket) -> bool,
    dump: fn() -> anyhow::Result<Dump>,
) -> anyhow::Result<Dumped> {
    let own = dump()?;
    let mut all = Dumped { sockets: own.sockets, complete: vec![own.netns], notes: Vec::from_iter(own.fallback) };
    let mut refused = 0;
    let mut why = String::new();
    for id in others.ids().filter(|&id| id != own.netns) {
        // One at a time: anybody can make thousands. One that nobody is in any more is left out.
        let Some(namespace) = others.open(id).transpose() else { continue };
        match namespace.map_err(anyhow::Error::from).and_then(|namespace| netns::dump_in(&namespace, dump)) {
            Ok(dump) => {
                all.sockets.extend(dump.sockets);
                all.complete.push(dump.netns);
                all.notes.extend(dump.fallback);
            }
            Err(error) => {
                refused += 1;
                why = format!("{error:#}");
            }
        }
    }
    if refused > 0 {
        all.notes.push(format!("{refused} network namespace(s) were left out: {why} (that takes CAP_SYS_ADMIN)"));
    }
    if others.denied > 0 {
        let denied = others.denied;
        all.notes
            .push(format!("the network namespace of {denied} process(es) may not be read (that takes CAP_SYS_PTRACE)"));
    }
    all.sockets.retain(keep);
    Ok(all)
}

fn inodes_of(sockets: &[Socket]) -> HashSet<u64> {
    sockets.iter().map(|socket| socket.id.inode).filter(|&inode| inode != 0).collect()
}

/// Descriptors, and the processes behind them.
#[derive(Default)]
struct Holders {
    fds: Vec<HeldFd>,
    processes: HashMap<ProcessId, Arc<Process>>,
    denied: usize,
    /// Whether some holder was gone before it could be read.
    vanished: bool,
}

impl Holders {
    fn read(&mut self, wanted: &HashSet<u64>) {
        let held = held_fds(wanted);
        self.denied = self.denied.max(held.denied);
        let mut gone: HashSet<ProcessId> = HashSet::new();
        for fd in held.fds {
            let id = fd.process;
            if !self.processes.contains_key(&id) && !gone.contains(&id) {
                match process::read_exact(id) {
                    Some(process) => drop(self.processes.insert(id, Arc::new(process))),
                    None => drop(gone.insert(id)),
                }
            }
            if !gone.contains(&id) {
                self.fds.push(fd);
            }
        }
        self.vanished |= !gone.is_empty();
    }

    /// The inodes of the sockets that nobody holds.
    fn without(&self, sockets: &[Socket]) -> HashSet<u64> {
        let mut inodes = inodes_of(sockets);
        for fd in &self.fds {
            inodes.remove(&fd.inode);
        }
        inodes
    }

    fn join(&mut self, sockets: Vec<Socket>) -> Vec<crate::model::Listener> {
        let processes = &self.processes;
        join(sockets, std::mem::take(&mut self.fds), |id| {
            processes.get(&id).cloned().unwrap_or_else(|| Arc::new(Process::bare(id, "?")))
        })
    }
}

/// How often `/proc` is listed at most to find processes forked during the walk.
const ROUNDS: usize = 3;

/// From this many processes on, a walk is shared among threads.
const SHARE_FROM: usize = 64;

/// More threads than this only contend.
const MAX_WALKERS: usize = 8;

/// Processes that a walker takes at a time.
const BATCH: usize = 8;

/// `KCMP_FILES` (linux/kcmp.h).
const KCMP_FILES: libc::c_long = 2;

fn walk_all(proc: BorrowedFd<'_>, pids: &[u32], wanted: &HashSet<u64>) -> HeldFds {
    let helpers = if pids.len() < SHARE_FROM {
        0
    } else {
        std::thread::available_parallelism().map_or(1, |cores| cores.get().min(MAX_WALKERS)) - 1
    };
    let next = AtomicUsize::new(0);
    let walk = || {
        let mut walker = Walker::new(proc, wanted);
        loop {
            let from = next.fetch_add(BATCH, Relaxed);
            if from >= pids.len() {
                return walker.held;
            }
            for &pid in &pids[from..pids.len().min(from + BATCH)] {
                walker.visit(pid);
            }
        }
    };
    std::thread::scope(|scope| {
        // A thread that cannot be started is no loss: the others take its share.
        let helpers: Vec<_> = (0..helpers)
            .map_while(|_| std::thread::Builder::new().name("procfs".into()).spawn_scoped(scope, walk).ok())
            .collect();
        let mut held = walk();
        for found in helpers.into_iter().map(|helper| helper.join().unwrap_or_default()) {
            held.fds.extend(found.fds);
            held.denied += found.denied;
        }
        held
    })
}

struct Walker<'a> {
    proc: BorrowedFd<'a>,
    wanted: &'a HashSet<u64>,
    held: HeldFds,
    /// The one user whose processes may be looked into, where that is known beforehand.
    only_of: Option<u32>,
    /// Reused, so that walking does not allocate.
    path: String,
    found: Vec<(u64, u32)>,
}

impl<'a> Walker<'a> {
    fn new(proc: BorrowedFd<'a>, wanted: &'a HashSet<u64>) -> Self {
        let (held, path, found) = (HeldFds::default(), String::new(), Vec::new());
        Walker { proc, wanted, held, only_of: only_user_seen(), path, found }
    }

    /// Finds what one process holds, in all its file tables.
    fn visit(&mut self, pid: u32) {
        if let Some(own) = self.only_of {
            self.set_path(format_args!("{pid}"));
            match rustix::fs::statat(self.proc, self.path.as_str(), AtFlags::empty()) {
                Ok(status) if status.st_uid == own => {}
                Ok(_) => return self.held.denied += 1,
                Err(_) => return, // Gone.
            }
        }
        self.set_path(format_args!("{pid}/fd"));
        let leader = self.walk_table(pid, c"../stat");
        let refused = matches!(leader, Err(Errno::ACCESS | Errno::PERM));
        if leader.is_err() && !refused {
            return; // Gone.
        }
        self.set_path(format_args!("{pid}/task"));
        // A directory has a link per thread besides its own two.
        let links = rustix::fs::statat(self.proc, self.path.as_str(), AtFlags::empty()).map_or(0, |s| s.st_nlink);
        let read = links > 2 + 1 && self.visit_threads(pid, refused);
        if refused && !read {
            self.held.denied += 1;
        }
    }

    /// Reads the file tables of threads that do not share the leader's. Whether any could be read.
    fn visit_threads(&mut self, pid: u32, leader_refused: bool) -> bool {
        if leader_refused && !self.is_zombie(pid) {
            return false;
        }
        let mut threads: Vec<u32> = Vec::new();
        self.set_path(format_args!("{pid}/task"));
        if let Ok(tasks) = open_dir(self.proc, self.path.as_str(), OFlags::RDONLY) {
            let _ = for_each_number(tasks.as_fd(), |tid| threads.push(tid));
        }
        // One thread of each file table known, in the order that kcmp gives to the tables.
        let mut tables: Vec<u32> = vec![pid];
        let mut read = false;
        for tid in threads.into_iter().filter(|&tid| tid != pid) {
            match search_table(&tables, tid) {
                Ok(Ok(_)) => continue,
                Ok(Err(place)) => tables.insert(place, tid),
                // Not comparable (no kcmp here, or not permitted): threads share a table as a rule, so look only where
                // the leader cannot speak for them. Descriptors found twice are joined later.
                Err(_) if !self.is_zombie(pid) => break,
                Err(_) => {}
            }
            self.set_path(format_args!("{pid}/task/{tid}/fd"));
            read |= self.walk_table(pid, c"../../../stat").is_ok();
        }
        read
    }

    fn is_zombie(&mut self, pid: u32) -> bool {
        self.set_path(format_args!("{pid}"));
        let stat = open_dir(self.proc, self.path.as_str(), OFlags::PATH).map(|dir| stat::read_at(dir.as_fd(), c"stat"));
        matches!(stat, Ok(Some(stat)) if stat.state == 'Z')
    }

    /// Reads the table at `self.path`; `stat` leads from there to the stat file of the thread-group leader. It goes
    /// through the same descriptor, so that what was found is never ascribed to a process that has the number now.
    fn walk_table(&mut self, pid: u32, stat: &std::ffi::CStr) -> Result<(), Errno> {
        let table = open_dir(self.proc, self.path.as_str(), OFlags::RDONLY)?;
        let (wanted, found) = (self.wanted, &mut self.found);
        found.clear();
        let mut name = [0u8; 11];
        let mut target = [MaybeUninit::uninit(); 64];
        for_each_number(table.as_fd(), |fd| {
            let name = decimal(fd, &mut name);
            if let Ok((target, _)) = rustix::fs::readlinkat_raw(&table, name, &mut target)
                && let Some(inode) = parse_socket(target)
                && wanted.contains(&inode)
            {
                found.push((inode, fd));
            }
        })?;
        if let Some(stat) = (!found.is_empty()).then(|| stat::read_at(table.as_fd(), stat)).flatten() {
            let process = ProcessId { pid, start: stat.start };
            self.held.fds.extend(self.found.drain(..).map(|(inode, fd)| HeldFd { inode, process, fd }));
        }
        Ok(())
    }

    fn set_path(&mut self, path: std::fmt::Arguments<'_>) {
        self.path.clear();
        let _ = self.path.write_fmt(path); // Writing to a String cannot fail.
    }
}

/// The user whose processes' descriptors this thread may read, if it may read nobody else's: `/proc/PID` belongs to the
/// effective user of the process, and `fd` in it, which only its owner may open, to that one or to root.
fn only_user_seen() -> Option<u32> {
    let user = rustix::process::geteuid();
    let passes = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
    let has = rustix::thread::capabilities(None).ok()?.effective;
    (!user.is_root() && !has.intersects(passes)).then_some(user.as_raw())
}

/// Where a thread's file table is, or belongs, among known ones.
fn search_table(tables: &[u32], tid: u32) -> Result<Result<usize, usize>, Errno> {
    let (mut low, mut high) = (0, tables.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        match compare_tables(tables[middle], tid)? {
            Ordering::Equal => return Ok(Ok(middle)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(Err(low))
}

/// Compares the file tables of two threads, in an order that the kernel keeps for as long as it runs.
fn compare_tables(one: u32, other: u32) -> Result<Ordering, Errno> {
    // SAFETY: kcmp takes five numbers and touches no memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, i64::from(one), i64::from(other), KCMP_FILES, 0i64, 0i64) };
    match result {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::NOSYS)),
    }
}

fn open_dir(dir: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(dir, path, flags | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Gives every entry of a directory that is named by a number.
fn for_each_number(dir: BorrowedFd<'_>, mut each: impl FnMut(u32)) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); 32 * 1024];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        if let Some(number) = parse_number(entry?.file_name().to_bytes()) {
            each(number);
        }
    }
    Ok(())
}

fn parse_number(digits: &[u8]) -> Option<u32> {
    parse_digits(digits)?.try_into().ok()
}

/// The inode in `socket:[INODE]`.
pub(crate) fn parse_socket(target: &[u8]) -> Option<u64> {
    parse_digits(target.strip_prefix(b"socket:[")?.strip_suffix(b"]")?)
}

fn parse_digits(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |number, &digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

/// The number in decimal, as a C string at the end of `buffer`.
fn decimal(mut number: u32, buffer: &mut [u8; 11]) -> &std::ffi::CStr {
    buffer[10] = 0;
    let mut start = 10;
    loop {
        start -= 1;
        buffer[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    std::ffi::CStr::from_bytes_until_nul(&buffer[start..]).unwrap_or_default()
}

#[cfg(test)]
mod tests;
