//! Work with the powers of one ordinary user.
//!
//! A thread of its own gets the user's file-system ids and loses every group and capability. Not his real or effective uid:
//! then he could signal the thread, and thus end the whole process. In the kernel all of this belongs to the thread, and
//! ends with it; the system calls are made directly, for those of the C library change every thread.

use std::io;
use std::thread;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_thread_groups};

/// Runs `work` so that it can do to files what the user can, and no more.
///
/// # Errors
/// Where this process may not act as that user: then nothing was run.
pub(super) fn run_as<T: Send>(uid: u32, gid: u32, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("sweep".to_owned()).spawn_scoped(scope, || {
            become_user(uid, gid)?;
            Ok(work())
        })?;
        worker.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    let refused = || io::Error::from(io::ErrorKind::PermissionDenied);
    let is_own = Uid::effective().as_raw() == uid;
    // Groups first: to leave them takes a capability, and the others are lost with the uid. Whoever is an ordinary user
    // keeps those that are his anyway.
    let groups = set_thread_groups(&[]);
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setfsgid(gid);
    if !is_own && (groups.is_err() || setfsgid(gid) != gid) {
        return Err(refused());
    }
    setfsuid(uid);
    // Neither call tells whether it succeeded; both tell what was set before.
    if setfsuid(uid) != uid {
        return Err(refused());
    }
    let none = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?)
}
