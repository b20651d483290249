//! Where a socket lives that no process has a descriptor of: on its way in the queue of a unix socket (SCM_RIGHTS), or
//! registered with an io_uring.
//!
//! `/proc/PID/fdinfo` says how many descriptors a queue holds (5.5), and which files a ring has (their inodes: 6.x).
//! Which socket a queue holds is found by looking into it: the queue's first message is received with MSG_PEEK, which
//! leaves it there and hands out copies of its descriptors. That takes the right to ptrace its owner.

use std::collections::BTreeMap;
use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::model::{Process, ProcessId};
use crate::source::process;
use crate::source::procfs::parse_socket;

/// A place with descriptors, and the processes that have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stash {
    pub place: Place,
    /// Sorted by pid; more than one after fork.
    pub processes: Vec<Process>,
    /// The number of its own descriptor in the first of them.
    pub fd: u32,
    /// How many descriptors are in it.
    pub count: u32,
    /// The inodes of the sockets among them, as far as they could be seen.
    pub inodes: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Queue,
    Ring,
}

/// Every stash of the processes that can be seen. Reads the fdinfo of every socket on the host.
pub(super) fn read() -> Vec<Stash> {
    let mut found: BTreeMap<Key, Stash> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().map_while(Result::ok) {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        for (fd, own) in candidates(pid) {
            let place = if own.is_some() { Place::Queue } else { Place::Ring };
            let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")) else { continue };
            let Some((count, inodes)) = parse(&info, place) else { continue };
            let Some(process) = process::read(pid) else { continue };
            let key = match (own, inodes.first()) {
                (Some(own), _) => Key::Queue(own),
                (None, Some(&inode)) => Key::Ring(inode),
                (None, None) => Key::Unknown(pid, fd),
            };
            let known = found.entry(key);
            let stash = known.or_insert_with(|| {
                let inodes = own.map_or(inodes, |own| look_into(process.id, fd, own));
                Stash { place, processes: Vec::new(), fd, count, inodes }
            });
            if stash.processes.last().is_none_or(|last| last.id != process.id) {
                stash.processes.push(process);
            }
        }
    }
    let mut stashes: Vec<Stash> = found.into_values().collect();
    for stash in &mut stashes {
        stash.processes.sort_by_key(|process| process.id);
    }
    stashes
}

/// Which stash it is, in whatever processes it is found. Every ring has the same inode, that of all anonymous files: it
/// is told by what is in it.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Queue(u64),
    Ring(u64),
    Unknown(u32, u32),
}

/// Descriptors of rings, and of sockets with their inode (in the link: fdinfo has it from 5.14 on only).
fn candidates(pid: u32) -> Vec<(u32, Option<u64>)> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().map_while(Result::ok);
    let candidates = fds.filter_map(|entry| {
        let fd = entry.file_name().to_str()?.parse().ok()?;
        let target = fs::read_link(entry.path()).ok()?;
        match target.to_str()? {
            "anon_inode:[io_uring]" => Some((fd, None)),
            target => Some((fd, Some(parse_socket(target.as_bytes())?))),
        }
    });
    candidates.collect()
}

/// How many descriptors are in it, and the inodes of sockets where they are told. `None` where nothing is in it, or
/// the kernel does not say.
pub(crate) fn parse(info: &str, place: Place) -> Option<(u32, Vec<u64>)> {
    let name = match place {
        Place::Queue => "scm_fds:",
        Place::Ring => "UserFiles:",
    };
    let count = info.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()?;
    let inodes = match place {
        Place::Queue => Vec::new(),
        // After the count, a line for each: `    0: socket:[99]`.
        Place::Ring => info
            .lines()
            .skip_while(|line| !line.starts_with(name))
            .skip(1)
            .take_while(|line| line.starts_with(|c: char| c == ' ' || c.is_ascii_digit()))
            .filter_map(|line| parse_socket(line.split_once(": ")?.1.as_bytes()))
            .collect(),
    };
    (count > 0).then_some((count, inodes))
}

/// How long to wait for the descriptors to be closed again: some files of others' making (FUSE) can delay that.
const PATIENCE: Duration = Duration::from_secs(1);

/// SCM_MAX_FD (include/net/scm.h): the most descriptors that a message can have.
const MAX_FDS: usize = 253;

/// The inodes of the sockets in the first message of a queue; none where that may not be looked into.
fn look_into(process: ProcessId, fd: u32, own_inode: u64) -> Vec<u64> {
    let (send, receive) = mpsc::channel();
    let look = move || {
        let inodes = peek(process.pid, fd, own_inode).unwrap_or_default();
        // Nobody waits any more: then nobody wants to know.
        let _ = send.send(inodes);
    };
    if std::thread::Builder::new().name("peek".into()).spawn(look).is_err() {
        return Vec::new();
    }
    receive.recv_timeout(PATIENCE).unwrap_or_default()
}

fn peek(pid: u32, fd: u32, own_inode: u64) -> rustix::io::Result<Vec<u64>> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let queue = pidfd_getfd(&pidfd, i32::try_from(fd).unwrap_or(-1), PidfdGetfdFlags::empty())?;
    // Whoever has the number now: only this very socket is of interest.
    if rustix::fs::fstat(&queue)?.st_ino != own_inode {
        return Ok(Vec::new());
    }
    let mut byte = [0u8; 1];
    let mut room = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    recvmsg(&queue, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let mut inodes = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            inodes.extend(fds.filter_map(|fd: OwnedFd| rustix::fs::fstat(&fd).ok()).map(|stat| stat.st_ino));
        }
    }
    Ok(inodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_is_parsed() {
        let queue = |text: &str| parse(text, Place::Queue);
        assert_eq!(queue("pos:\t0\nscm_fds: 2\n"), Some((2, vec![])));
        assert_eq!(queue("pos:\t0\nscm_fds: 0\n"), None);
        assert_eq!(queue("pos:\t0\n"), None);
        let ring = |text: &str| parse(text, Place::Ring);
        let files =
            "SqThread:\t-1\nUserFiles:\t2\n    0: socket:[99]\n    1: /tmp/x\n    2: socket:[98]\nUserBufs:\t0\n";
        assert_eq!(ring(files), Some((2, vec![99, 98])));
        assert_eq!(ring("UserFiles:\t0\nUserBufs:\t0\n"), None);
        // Kernels before 6.8 or so print no inode.
        assert_eq!(ring("UserFiles:\t1\n    0: TCP\nUserBufs:\t0\n    0: socket:[4]\n"), Some((1, vec![])));
        assert_eq!(ring("UserFiles:\t1\n    0: /tmp/socket:[5\n"), Some((1, vec![])));
        assert_eq!(ring("UserFiles:\t1\n    0: socket:[+5]\n"), Some((1, vec![])));
    }
}
