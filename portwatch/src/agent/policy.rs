//! What the configuration allows to whom, as it is now.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::rc::Rc;

use nix::libc;
use tokio::net::UnixStream;

use super::access::Identity;
use crate::config::Access;

/// Shared by all connections: what is read anew counts for those that are there, too.
#[derive(Clone, Debug)]
pub(super) struct Policy(Rc<RefCell<Access>>);

impl Policy {
    pub(super) fn new(access: Access) -> Policy {
        Policy(Rc::new(RefCell::new(access)))
    }

    pub(super) fn set(&self, access: Access) {
        *self.0.borrow_mut() = access;
    }

    /// The uid whose listeners are all that the peer is told of; `None`: it is told of all.
    pub(super) fn only(&self, identity: Identity) -> Option<u32> {
        self.0.borrow().only(identity.uid)
    }

    /// Whether the peer may ask for kills at all.
    ///
    /// # Errors
    /// A sentence for the peer.
    pub(super) fn may_kill(&self, identity: Identity, stream: &UnixStream) -> Result<(), String> {
        self.0.borrow().may_kill(identity.uid, || groups_of(stream))
    }
}

/// The groups that the peer was in when it connected, as the kernel says: its primary one, then the others. Those of
/// another user namespace are told as they are in ours.
fn groups_of(stream: &UnixStream) -> io::Result<Vec<u32>> {
    let mut groups = vec![stream.peer_cred()?.gid()];
    groups.extend(supplementary_groups_of(stream)?);
    Ok(groups)
}

/// `SO_PEERGROUPS` (Linux 4.13), for which no crate here has a name.
fn supplementary_groups_of(stream: impl AsFd) -> io::Result<Vec<u32>> {
    // NGROUPS_MAX is 65536; few are in so many, and the kernel says how many there are.
    let mut groups = vec![0_u32; 64];
    loop {
        let mut bytes = libc::socklen_t::try_from(size_of_val(&*groups)).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `bytes` bytes to `groups`, and to `bytes` how many there are.
        let result = unsafe {
            libc::getsockopt(
                stream.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = bytes as usize / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_the_groups_of_a_peer() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        let (own, _other) = UnixStream::pair().unwrap();
        let mut told = groups_of(&own).unwrap();
        let mut want: Vec<u32> = nix::unistd::getgroups().unwrap().into_iter().map(nix::unistd::Gid::as_raw).collect();
        want.push(nix::unistd::getegid().as_raw());
        told.sort_unstable();
        want.sort_unstable();
        assert_eq!(told, want);
    }

    #[test]
    fn more_groups_than_expected_are_told_too() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        // Groups belong to a thread where the system call is made directly.
        let many: Vec<libc::gid_t> = (70_000..70_100).collect();
        let told = std::thread::spawn(move || {
            // SAFETY: the kernel reads as many groups as there are.
            let set = unsafe { libc::syscall(libc::SYS_setgroups, many.len(), many.as_ptr()) };
            assert_eq!(set, 0);
            let (own, _other) = std::os::unix::net::UnixStream::pair().unwrap();
            (supplementary_groups_of(&own).unwrap(), many)
        });
        let (told, many) = told.join().unwrap();
        assert_eq!(told, many);
    }
}
