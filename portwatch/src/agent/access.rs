//! Who is at the other end of a connection, and whom it may end. All that counts is what the kernel says of the peer, and
//! nothing that it says itself: its uid is that in our user namespace, whatever it is root of in its own.
//!
//! **Whom it may end**: those whom kill(2) would let it end (it is root, or its uid is the real or saved uid of the process)
//! that are in its pid namespace or below: for the root of a container that has our socket, the processes of the host do
//! not exist.
//!
//! A PID may be used again once the peer has ended, and its connection live on in other hands. So the peer is pinned by a
//! pidfd, and what was read of it by PID counts only if it was alive afterwards. A peer that has ended ends nobody.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{getsockopt, sockopt};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::net::UnixStream;

use crate::kill::{Guards, not_permitted};
use crate::model::{NetnsId, ProcessId};
use crate::source::{netns, process, stat};

/// Who connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Effective uid when it connected, in our user namespace.
    pub(super) uid: u32,
    /// `None` where it ended before that could be read, or is outside our pid namespace.
    pub(super) process: Option<ProcessId>,
    /// `None` likewise.
    pub(super) netns: Option<NetnsId>,
}

impl Identity {
    /// The peer of a connection that was just accepted.
    ///
    /// # Errors
    /// When the kernel does not tell who it is.
    pub(super) fn of(stream: &UnixStream) -> io::Result<Identity> {
        let credentials = stream.peer_cred()?;
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        let anonymous = Identity { uid: credentials.uid(), process: None, netns: None };
        let Some(pidfd) = pidfd_of(stream, pid) else { return Ok(anonymous) };
        let process = stat::read(pid).map(|stat| stat.id()).ok();
        let known = Identity { process, netns: netns::of_pid(pid).ok(), ..anonymous };
        // Alive now, so it was what we read about.
        Ok(if process::is_alive(&pidfd) { known } else { anonymous })
    }

    /// Its pid; 0 where that is not known.
    pub(super) fn pid(&self) -> u32 {
        self.process.map_or(0, |process| process.pid)
    }

    /// Whom a kill spares that it asks for, and whom it may end.
    ///
    /// # Errors
    /// A sentence for the peer, where it has ended or is outside our pid namespace.
    pub(super) fn guards(&self, force_self: bool) -> Result<Guards, String> {
        let gone =
            || "not permitted: the process that asks has ended, or is outside the agent's pid namespace".to_owned();
        let pid = self.pid();
        let pidfd = open_pidfd(pid).ok_or_else(gone)?;
        let namespace = File::open(format!("/proc/{pid}/ns/pid")).map_err(|_| gone())?;
        let power = Power { uid: known_uid(self.uid)?, namespace };
        let guards = Guards::for_peer(pid, force_self, &|pid| stat::read(pid).ok(), move |pid| power.refuse(pid));
        // Still the one that connected, and alive: all that was read was of it.
        let same = stat::read(pid).is_ok_and(|stat| self.process.is_some_and(|process| process.is_same(stat.id())));
        if same && process::is_alive(&pidfd) { Ok(guards) } else { Err(gone()) }
    }
}

/// What a peer may do to processes, for as long as one kill takes. Outlives the peer: the kill goes on without it.
#[derive(Debug)]
struct Power {
    uid: u32,
    /// Its pid namespace. Open, its inode number is nobody else's.
    namespace: File,
}

impl Power {
    /// Why the peer may not signal the process that has this PID now, if so.
    fn refuse(&self, pid: u32) -> Option<String> {
        match self.may_signal(pid) {
            Ok(refusal) => refusal,
            Err(error) => Some(format!("not permitted: who owns process {pid} cannot be read: {error}")),
        }
    }

    fn may_signal(&self, pid: u32) -> io::Result<Option<String>> {
        let uids = uids_of(pid)?;
        if self.uid != 0 && self.uid != uids.real && self.uid != uids.saved {
            return Ok(Some(not_permitted(Some(uids.effective))));
        }
        let is_within = is_within(pid, &self.namespace)?;
        Ok((!is_within).then(|| "not permitted: it is outside your pid namespace".to_owned()))
    }
}

/// Uids of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Uids {
    real: u32,
    effective: u32,
    saved: u32,
}

/// The uid, if it can be nobody else's: all that our user namespace has no number for are the same number to us.
fn known_uid(uid: u32) -> Result<u32, String> {
    let is_whole = |map: String| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]);
    let overflow = || fs::read_to_string("/proc/sys/kernel/overflowuid").ok()?.trim().parse().ok();
    if uid == overflow().unwrap_or(65534) && !fs::read_to_string("/proc/self/uid_map").is_ok_and(is_whole) {
        return Err("not permitted: your uid has no number in the agent's user namespace".to_owned());
    }
    Ok(uid)
}

/// The peer, where it has not ended yet.
fn pidfd_of(stream: &UnixStream, pid: u32) -> Option<OwnedFd> {
    pinned(getsockopt(stream, sockopt::PeerPidfd), pid)
}

/// Exactly the peer where the kernel gives that (SO_PEERPIDFD, 6.5): all errors but that it knows no such option are of
/// this peer. That it was reaped is EINVAL or ESRCH up to 6.15, and by then its PID may be somebody else's.
///
/// Older kernels leave whoever has its PID now: of a peer that connects and ends at once, and whose PID is given out anew
/// before its connection is accepted, that is another process, whose namespaces and ancestors are taken for those of the
/// one that asks. The uid is that of the connection even then.
fn pinned(told: nix::Result<OwnedFd>, pid: u32) -> Option<OwnedFd> {
    match told {
        Err(Errno::ENOPROTOOPT) => open_pidfd(pid),
        told => told.ok(),
    }
}

fn open_pidfd(pid: u32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()
}

/// Whether the process is in this pid namespace or in one below it.
fn is_within(pid: u32, wanted: &File) -> io::Result<bool> {
    let wanted = wanted.metadata()?;
    let mut namespace = File::open(format!("/proc/{pid}/ns/pid"))?;
    loop {
        let found = namespace.metadata()?;
        if (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()) {
            return Ok(true);
        }
        match parent_of(&namespace)? {
            Some(parent) => namespace = parent,
            None => return Ok(false),
        }
    }
}

/// The pid namespace above; `None` above our own.
fn parent_of(namespace: impl AsFd) -> io::Result<Option<File>> {
    // SAFETY: NS_GET_PARENT (ioctl_nsfs(2)) takes no argument and gives a new descriptor.
    let fd = unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), libc::NS_GET_PARENT) };
    if fd >= 0 {
        // SAFETY: the kernel has just made it, and nobody else knows of it.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }.into()));
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
        error => Err(error),
    }
}

fn uids_of(pid: u32) -> io::Result<Uids> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    parse_uids(&status).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no Uid line in its status"))
}

/// `Uid:` has the real, effective, saved and file-system uid. A name cannot forge the line: the kernel escapes it.
fn parse_uids(status: &str) -> Option<Uids> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let mut uids = line.split_ascii_whitespace().map(|uid| uid.parse().ok());
    Some(Uids { real: uids.next()??, effective: uids.next()??, saved: uids.next()?? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(uid: u32) -> Power {
        Power { uid, namespace: File::open("/proc/self/ns/pid").unwrap() }
    }

    #[test]
    fn the_rule_is_that_of_kill() {
        let pid = std::process::id();
        let uids = uids_of(pid).unwrap();
        assert_eq!(own(uids.real).refuse(pid), None);
        assert_eq!(own(0).refuse(pid), None);
        let refusal = own(uids.real.wrapping_add(1).max(1)).refuse(pid).unwrap();
        assert!(refusal.starts_with("not permitted: it runs as"), "{refusal}");
        assert!(own(0).refuse(u32::MAX).unwrap().contains("cannot be read"));
    }

    #[test]
    fn nothing_outside_the_pid_namespace_may_be_ended() {
        let pid = std::process::id();
        // Any other namespace of ours will do.
        let elsewhere = Power { uid: 0, namespace: File::open("/proc/self/ns/mnt").unwrap() };
        assert_eq!(elsewhere.refuse(pid).as_deref(), Some("not permitted: it is outside your pid namespace"));
    }

    #[test]
    fn a_peer_that_has_ended_ends_nobody() {
        let own = stat::read(std::process::id()).unwrap().id();
        let identity = |process| Identity { uid: 0, process, netns: None };
        assert!(identity(Some(own)).guards(false).is_ok());
        // The same number, and another process.
        let recycled = ProcessId { start: own.start + 2 * ProcessId::TICK_NS, ..own };
        for gone in [None, Some(recycled), Some(ProcessId { pid: u32::MAX, start: 1 })] {
            assert!(identity(gone).guards(false).is_err(), "{gone:?}");
        }
    }

    #[test]
    fn of_a_peer_that_was_reaped_nobody_is_pinned_who_has_its_pid_now() {
        let own = std::process::id();
        for errno in [Errno::EINVAL, Errno::ESRCH, Errno::ENODATA, Errno::EMFILE] {
            assert!(pinned(Err(errno), own).is_none(), "{errno}");
        }
        let old_kernel = pinned(Err(Errno::ENOPROTOOPT), own).unwrap();
        assert!(process::is_alive(&old_kernel));
        assert!(pinned(Ok(old_kernel), u32::MAX).is_some());
    }

    #[test]
    fn uids_are_read_from_their_line() {
        let status = "Name:\tx\\nUid:\t0\t0\t0\t0\nUmask:\t0022\nUid:\t1000\t0\t1001\t0\nGid:\t1\t1\t1\t1\n";
        assert_eq!(parse_uids(status), Some(Uids { real: 1000, effective: 0, saved: 1001 }));
        for broken in ["", "Uid:\n", "Uid:\t1\t2\n", "Uid:\tx\t0\t0\t0\n"] {
            assert_eq!(parse_uids(broken), None, "{broken}");
        }
    }
}
