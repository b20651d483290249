//! What can be seen of the plan's ports between two full scans, and the one place where a kill waits.
//!
//! One poll(2) waits for everything: the ends of processes (pidfds), the ends of sockets (announced by the kernel), and
//! at most [`LOOK_EVERY`], after which the sockets are looked at. A `shutdown()`, or a socket that something in the
//! kernel still refers to, frees a port without any event: this bounds how late that is noticed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::plan::Plan;
use super::prove::Place;
use crate::model::{NetnsId, Process, Protocol, Socket};
use crate::source::diag::PortSocket;
use crate::source::netns;
use crate::source::released::Watch;

/// The longest that is waited without a look. A look costs some 0.1 ms of system time on a host with 1,000 listeners.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A watch for each network namespace that the plan reaches and that can be entered.
#[derive(Debug, Default)]
pub(super) struct Sight {
    watches: Vec<Watch>,
}

impl Sight {
    /// Never fails: what cannot be watched is left to full scans.
    pub(super) fn open(plan: &Plan) -> Sight {
        let own = netns::own().ok();
        let mut ports: BTreeMap<NetnsId, BTreeSet<(Protocol, u16)>> = BTreeMap::new();
        for group in &plan.groups {
            // 0: named, and nobody had it.
            let netns = if group.sockets.is_empty() { own.unwrap_or(0) } else { group.netns };
            ports.entry(netns).or_default().insert((group.proto, group.port));
        }
        let mut watches = Vec::new();
        for (netns, ports) in ports {
            let opened = if Some(netns) == own {
                Watch::open(&ports).ok()
            } else {
                namespace(netns, plan).and_then(|namespace| Watch::open_in(namespace, &ports).ok())
            };
            watches.extend(opened);
        }
        Sight { watches }
    }

    pub(super) fn sees(&self, netns: NetnsId) -> bool {
        self.watches.iter().any(|watch| watch.netns() == netns)
    }

    /// Waits until one of these is readable, the kernel announces the end of a socket, or `timeout` is over, which is
    /// never more than [`LOOK_EVERY`]. Says which are readable.
    pub(super) fn wait(&self, fds: &[BorrowedFd<'_>], timeout: Duration) -> Vec<bool> {
        let events = self.watches.iter().filter_map(Watch::events);
        let mut polled: Vec<PollFd<'_>> =
            fds.iter().copied().chain(events).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let nanoseconds = timeout.min(LOOK_EVERY).as_nanos();
        let timeout = Timespec { tv_sec: 0, tv_nsec: nanoseconds.try_into().unwrap_or(0) };
        // Interrupted, or no memory for the table: as if the time were over.
        let ready = poll(&mut polled, Some(&timeout)).unwrap_or(0);
        self.watches.iter().for_each(Watch::drain);
        polled.iter().take(fds.len()).map(|fd| ready > 0 && !fd.revents().is_empty()).collect()
    }

    /// The sockets on the ports now, and maybe others, in the namespaces that are [seen](Sight::sees). A namespace that
    /// fails to be looked at is no longer seen.
    pub(super) fn look(&mut self) -> Vec<Socket> {
        let mut found = Vec::new();
        self.watches.retain_mut(|watch| match watch.look() {
            Ok(sockets) => {
                found.extend(sockets);
                true
            }
            Err(_) => false,
        });
        found
    }

    /// What [`Watch::is_in_use`] says; nothing is known of a namespace that is not seen.
    pub(super) fn is_in_use(&self, netns: NetnsId, proto: Protocol, place: Place) -> bool {
        let watch = self.watches.iter().find(|watch| watch.netns() == netns);
        watch.is_some_and(|watch| watch.is_in_use(proto, place.0, place.1))
    }

    /// What [`Watch::remnants`] says; `None`: the namespace is not seen.
    pub(super) fn remnants(
        &mut self,
        netns: NetnsId,
        proto: Protocol,
        address: SocketAddr,
    ) -> Option<Option<Vec<PortSocket>>> {
        let watch = self.watches.iter_mut().find(|watch| watch.netns() == netns)?;
        // What cannot be listed is not known, and bind() failed all the same.
        Some(watch.remnants(proto, address).unwrap_or(Some(Vec::new())))
    }
}

/// A descriptor of a namespace: by one who holds a socket there, else by looking everywhere.
fn namespace(netns: NetnsId, plan: &Plan) -> Option<File> {
    let here = plan.listeners.iter().filter(|listener| listener.socket.netns == netns);
    let of = |process: &Process| {
        let file = File::open(format!("/proc/{}/ns/net", process.id.pid)).ok()?;
        let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().ok()?);
        (inode == u64::from(netns)).then_some(file)
    };
    here.flat_map(|listener| &listener.holders)
        .find_map(|holder| of(&holder.process))
        .or_else(|| netns::open(netns).ok())
}
