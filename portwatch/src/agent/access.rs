//! Who is at the other end of a connection: what the kernel says of it, and nothing that it says itself. Its uid is that
//! in our user namespace, whatever it is root of in its own.
//!
//! A PID may be used again once the peer has ended, and its connection live on in other hands. So the peer is pinned by a
//! pidfd, and what was read of it by PID counts only if it was alive afterwards.

use std::io;
use std::os::fd::OwnedFd;

use nix::sys::socket::{getsockopt, sockopt};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::net::UnixStream;

use crate::model::NetnsId;
use crate::source::{netns, process};

/// Who connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Effective uid when it connected, in our user namespace.
    pub(super) uid: u32,
    /// `None` where it ended before that could be read.
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
        let anonymous = Identity { uid: credentials.uid(), netns: None };
        let Some(pidfd) = pidfd_of(stream, pid) else { return Ok(anonymous) };
        let known = Identity { netns: netns::of_pid(pid).ok(), ..anonymous };
        // Alive now, so it was what we read about.
        Ok(if process::is_alive(&pidfd) { known } else { anonymous })
    }
}

/// Exactly the peer where the kernel gives that (6.5), else whoever has its PID, which is looked at at once.
fn pidfd_of(stream: &UnixStream, pid: u32) -> Option<OwnedFd> {
    if let Ok(pidfd) = getsockopt(stream, sockopt::PeerPidfd) {
        return Some(pidfd);
    }
    pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()
}
