//! Who is at the other end of a connection, and whom it may end.
//!
//! All that counts is what the kernel says of the peer: its uid in our user namespace (whatever it is root of in its
//! own), and its pid namespace. It may end a process if kill(2) would let it — it is root, or its uid is the real or
//! saved uid of the process — and if the process is in its pid namespace or below: for the root of a container that has
//! our socket, the processes of the host do not exist.
//!
//! A PID may be used again once the peer has ended, and its connection live on in other hands. So the peer is pinned by a
//! pidfd, and what was read of it by PID counts only if it was alive afterwards.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;

use nix::sys::socket::{getsockopt, sockopt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::net::UnixStream;

use crate::model::NetnsId;
use crate::source::netns;

/// Who connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Effective uid when it connected, in our user namespace.
    pub(super) uid: u32,
    /// In our pid namespace; 0 where it is outside.
    pub(super) pid: u32,
    /// `None` where it ended before that could be read.
    pub(super) netns: Option<NetnsId>,
    /// Inode number of its pid namespace; `None` likewise.
    pub(super) pidns: Option<u64>,
}

/// Uids of a process that decide about signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Uids {
    real: u32,
    saved: u32,
}

impl Identity {
    /// The peer of a connection that was just accepted.
    ///
    /// # Errors
    /// When the kernel does not tell who it is.
    pub(super) fn of(stream: &UnixStream) -> io::Result<Identity> {
        let credentials = stream.peer_cred()?;
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        let anonymous = Identity { uid: credentials.uid(), pid, netns: None, pidns: None };
        let Some(pidfd) = pidfd_of(stream, pid) else { return Ok(anonymous) };
        let known = Identity { netns: netns::of_pid(pid).ok(), pidns: pidns_of(pid).ok(), ..anonymous };
        // Alive now, so it was what we read about.
        Ok(if is_alive(&pidfd) { known } else { anonymous })
    }

    /// Why it may not signal the process, if so. The answer holds for the process that has the PID now: whoever asks
    /// makes sure afterwards that it is the one meant.
    pub(super) fn refuse(&self, pid: u32) -> Option<String> {
        match self.may_signal(pid) {
            Ok(refusal) => refusal,
            Err(error) => Some(format!("not permitted: who owns process {pid} cannot be read: {error}")),
        }
    }

    fn may_signal(&self, pid: u32) -> io::Result<Option<String>> {
        let uids = uids_of(pid)?;
        if self.uid != 0 && self.uid != uids.real && self.uid != uids.saved {
            return Ok(Some(format!("not permitted: it runs as uid {}; try sudo", uids.real)));
        }
        let Some(own) = self.pidns else {
            return Ok(Some("not permitted: the one who asks has ended".to_owned()));
        };
        if !is_within(pid, own)? {
            return Ok(Some("not permitted: it is outside your pid namespace".to_owned()));
        }
        Ok(None)
    }
}

/// Exactly the peer where the kernel gives that (6.5), else whoever has its PID, which is looked at at once.
fn pidfd_of(stream: &UnixStream, pid: u32) -> Option<OwnedFd> {
    if let Ok(pidfd) = getsockopt(stream, sockopt::PeerPidfd) {
        return Some(pidfd);
    }
    pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()
}

fn is_alive(pidfd: &OwnedFd) -> bool {
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(0)
}

fn pidns_of(pid: u32) -> io::Result<u64> {
    Ok(fs::metadata(format!("/proc/{pid}/ns/pid"))?.ino())
}

/// Whether the process is in the pid namespace `wanted` or in one below it.
fn is_within(pid: u32, wanted: u64) -> io::Result<bool> {
    let mut namespace = OwnedFd::from(File::open(format!("/proc/{pid}/ns/pid"))?);
    loop {
        if rustix::fs::fstat(&namespace)?.st_ino == wanted {
            return Ok(true);
        }
        match parent_of(namespace.as_fd())? {
            Some(parent) => namespace = parent,
            None => return Ok(false),
        }
    }
}

/// The namespace above; `None` above our own.
fn parent_of(namespace: impl AsFd) -> io::Result<Option<OwnedFd>> {
    use std::os::fd::{AsRawFd as _, FromRawFd as _};
    // SAFETY: NS_GET_PARENT (ioctl_nsfs(2)) takes no argument and gives a new descriptor.
    let fd = unsafe { nix::libc::ioctl(namespace.as_fd().as_raw_fd(), nix::libc::NS_GET_PARENT) };
    if fd >= 0 {
        // SAFETY: the kernel has just made it, and nobody else knows of it.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }));
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
    let (real, _effective, saved) = (uids.next()??, uids.next()??, uids.next()??);
    Some(Uids { real, saved })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(uid: u32) -> Identity {
        let pid = std::process::id();
        Identity { uid, pid, netns: None, pidns: Some(pidns_of(pid).unwrap()) }
    }

    #[test]
    fn the_rule_is_that_of_kill() {
        let pid = std::process::id();
        let uids = uids_of(pid).unwrap();
        assert_eq!(own(uids.real).refuse(pid), None);
        assert_eq!(own(0).refuse(pid), None);
        let refusal = own(uids.real.wrapping_add(1).max(1)).refuse(pid).unwrap();
        assert!(refusal.starts_with("not permitted: it runs as uid"), "{refusal}");
        assert!(own(0).refuse(u32::MAX).unwrap().contains("cannot be read"));
    }

    #[test]
    fn nothing_outside_the_pid_namespace_may_be_ended() {
        let pid = std::process::id();
        let elsewhere = Identity { pidns: Some(1), ..own(0) };
        assert_eq!(elsewhere.refuse(pid).as_deref(), Some("not permitted: it is outside your pid namespace"));
        let gone = Identity { pidns: None, ..own(0) };
        assert!(gone.refuse(pid).is_some());
    }

    #[test]
    fn uids_are_read_from_their_line() {
        let status = "Name:\tx\\nUid:\t0\t0\t0\t0\nUmask:\t0022\nUid:\t1000\t0\t1001\t0\nGid:\t1\t1\t1\t1\n";
        assert_eq!(parse_uids(status), Some(Uids { real: 1000, saved: 1001 }));
        for broken in ["", "Uid:\n", "Uid:\t1\t2\n", "Uid:\tx\t0\t0\t0\n"] {
            assert_eq!(parse_uids(broken), None, "{broken}");
        }
    }
}
