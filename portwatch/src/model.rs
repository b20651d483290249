//! The vocabulary of portwatch as plain data: sockets, listeners, processes, events and changes.
//!
//! This module does no IO and imports nothing of the project. Times are nanoseconds since boot (`CLOCK_BOOTTIME`,
//! the clock of `bpf_ktime_get_boot_ns`); the renderers turn them into wall-clock time.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Nanoseconds since boot, suspended time included.
pub type BootNs = u64;

/// Inode number of a network namespace, as in `net:[4026531833]`.
pub type NetnsId = u32;

/// The transport of a listener. MPTCP listeners are TCP listeners with [`Listener::mptcp`] set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

/// Which socket it is, for as long as it lives.
///
/// The inode is what `/proc/PID/fd` shows (`socket:[INODE]`) and what a file descriptor holds; the cookie is the
/// kernel's `SO_COOKIE`, never reused. An MPTCP listener has two cookies (the socket that the process holds and the
/// subflow in the hash table) that share one inode. Either is 0 where the source could not tell it, never both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SocketId {
    pub inode: u64,
    pub cookie: u64,
}

/// A socket that listens (TCP in LISTEN) or is bound explicitly (UDP), without its holders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    pub id: SocketId,
    pub proto: Protocol,
    pub mptcp: bool,
    /// The bound address; `0.0.0.0` or `::` for all. IPv4-mapped addresses are kept as IPv6.
    pub address: IpAddr,
    pub port: u16,
    /// `Some(true)` for an IPv6 socket that refuses IPv4 (`IPV6_V6ONLY`); `None` where not known or not IPv6.
    pub v6only: Option<bool>,
    pub netns: NetnsId,
    /// Owner of the socket: the effective uid of its creator.
    pub uid: u32,
    /// Accept queue limit in connections, where known.
    pub backlog: Option<u32>,
}

impl Socket {
    /// A TCP listener for tests to change as they need.
    #[cfg(test)]
    pub(crate) fn example(address: &str, port: u16) -> Socket {
        Socket {
            id: SocketId { inode: 99, cookie: 7 },
            proto: Protocol::Tcp,
            mptcp: false,
            address: address.parse().unwrap(),
            port,
            v6only: None,
            netns: 1,
            uid: 1000,
            backlog: None,
        }
    }

    pub fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    /// Whether binding `address` would meet this socket on the same port. What is known of the dual stack counts; a `::` that
    /// is not known to refuse IPv4 takes it.
    pub fn overlaps(&self, address: IpAddr) -> bool {
        let dual = |address: Ipv6Addr, v6only: Option<bool>| address.is_unspecified() && v6only != Some(true);
        match (self.address.to_canonical(), address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(wanted)) => own == wanted || own.is_unspecified() || wanted.is_unspecified(),
            (IpAddr::V6(own), IpAddr::V6(wanted)) => own == wanted || own.is_unspecified() || wanted.is_unspecified(),
            (IpAddr::V6(own), IpAddr::V4(_)) => dual(own, self.v6only),
            (IpAddr::V4(_), IpAddr::V6(wanted)) => dual(wanted, None),
        }
    }

    /// Whether a client that connects (or sends) to `address` on this port reaches this socket.
    pub fn serves(&self, address: IpAddr) -> bool {
        // `::ffff:127.0.0.1` is 127.0.0.1, whichever side says so.
        match (self.address.to_canonical(), address.to_canonical()) {
            (own, wanted) if own == wanted => true,
            (IpAddr::V4(own), IpAddr::V4(_)) => own.is_unspecified(),
            (IpAddr::V6(own), IpAddr::V6(_)) => own.is_unspecified(),
            (IpAddr::V6(own), IpAddr::V4(_)) => own.is_unspecified() && self.v6only != Some(true),
            (IpAddr::V4(_), IpAddr::V6(_)) => false,
        }
    }
}

/// Which process it is, across PID reuse: a PID and when its thread-group leader started.
///
/// Kernel programs give the start in nanoseconds, `/proc/PID/stat` in 10 ms ticks (rounded down); compare identities
/// from different sources with [`ProcessId::is_same`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: u32,
    pub start: BootNs,
}

impl ProcessId {
    /// Length of the tick in which `/proc/PID/stat` counts (USER_HZ is 100 on every Linux architecture portwatch
    /// runs on): 10 ms.
    pub const TICK_NS: u64 = 10_000_000;

    /// Whether both name the same process, as exactly as the coarser of the two sources can tell.
    pub fn is_same(self, other: ProcessId) -> bool {
        self.pid == other.pid && self.start / Self::TICK_NS == other.start / Self::TICK_NS
    }
}

/// A process as it was last read. Strings come from the process and are hostile: renderers escape them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub id: ProcessId,
    /// 0 where not known.
    pub ppid: u32,
    /// Effective uid; `None` where the process was gone before it could be read.
    pub uid: Option<u32>,
    /// The kernel's `comm`, at most 15 bytes.
    pub name: String,
    /// argv; empty for kernel threads, zombies, and processes gone before they could be read.
    /// A fork shares it with its parent.
    pub command: Arc<[String]>,
    pub exe: Option<String>,
    pub cwd: Option<String>,
    /// cgroup v2 path (or the systemd hierarchy's), e.g. `/system.slice/nginx.service`.
    pub cgroup: Option<String>,
}

impl Process {
    /// What is known of a process that was gone before it could be read.
    pub fn bare(id: ProcessId, name: impl Into<String>) -> Self {
        Process {
            id,
            ppid: 0,
            uid: None,
            name: name.into(),
            command: Arc::default(),
            exe: None,
            cwd: None,
            cgroup: None,
        }
    }
}

/// A parent, or a parent's parent, and so on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    pub pid: u32,
    pub name: String,
}

/// A process that holds a listener through at least one file descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub process: Arc<Process>,
    /// Sorted; empty where only an event told of the holder.
    pub fds: Vec<u32>,
    /// Whether this process called listen (TCP) or bind (UDP). After a scan: the holder that started first.
    pub binder: bool,
}

/// A listening socket and every visible process that holds it. No holders: a *ghost*.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    pub socket: Socket,
    /// When it began to listen, where that was observed.
    pub since: Option<BootNs>,
    /// Sorted by pid.
    pub holders: Vec<Holder>,
}

impl Listener {
    pub fn is_ghost(&self) -> bool {
        self.holders.is_empty()
    }

    /// Whether a process of this user holds it, or its socket belongs to the user.
    pub fn is_of(&self, uid: u32) -> bool {
        self.socket.uid == uid || self.holders.iter().any(|holder| holder.process.uid == Some(uid))
    }

    pub fn binder(&self) -> Option<&Holder> {
        self.holders.iter().find(|h| h.binder).or_else(|| self.holders.first())
    }

    /// When it began to listen; where nobody saw that, when its binder started (it is at most that old). `None` where
    /// neither is known: a start of 0 is a process that was gone before it could be read.
    pub fn began(&self) -> Option<BootNs> {
        self.since.or_else(|| self.binder().map(|binder| binder.process.id.start).filter(|start| *start != 0))
    }

    pub fn holds(&self, id: ProcessId) -> bool {
        self.holders.iter().any(|h| h.process.id.is_same(id))
    }
}

/// Every listener at one moment, as far as the source could see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// When reading began: everything that happened before is in it.
    pub at: BootNs,
    pub listeners: Vec<Listener>,
    /// The network namespaces of which every socket was read, with or without holder. In other namespaces only held
    /// sockets were seen, and the absence of one says just that nobody visible holds it.
    pub complete: Vec<NetnsId>,
    /// Events lost before this snapshot (records that the kernel could not deliver): 0 for an ordinary refresh.
    pub lost: u64,
}

/// A fact from a source. Events may come late, twice, or out of order; `at` says when each was true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// `by` called listen (TCP) or bind (UDP), and it succeeded.
    Opened {
        at: BootNs,
        socket: Socket,
        by: Arc<Process>,
    },
    /// The socket stopped listening: closed, shut down or disconnected. `by` did it, where known.
    Closed {
        at: BootNs,
        id: SocketId,
        by: Option<Arc<Process>>,
    },
    /// A known holder forked; the child holds what the parent held.
    Forked {
        at: BootNs,
        parent: ProcessId,
        child: Arc<Process>,
    },
    /// A known holder replaced its program; descriptors marked close-on-exec are gone.
    Execed {
        at: BootNs,
        process: Arc<Process>,
    },
    /// What was known of a holder is not so any more: its user changed, of which the kernel tells nothing.
    Renewed {
        at: BootNs,
        process: Arc<Process>,
    },
    /// The last thread of a known holder exits.
    Exited {
        at: BootNs,
        id: ProcessId,
    },
    /// A bind or listen failed because the address is in use.
    Refused {
        at: BootNs,
        attempt: Attempt,
    },
    /// Something happened of which the source cannot tell enough: a snapshot must be read.
    Unsure {
        at: BootNs,
    },
    Snapshot(Snapshot),
}

impl Event {
    /// When it was true; for a snapshot, when reading began.
    pub fn at(&self) -> BootNs {
        match self {
            Event::Opened { at, .. }
            | Event::Closed { at, .. }
            | Event::Forked { at, .. }
            | Event::Execed { at, .. }
            | Event::Renewed { at, .. }
            | Event::Exited { at, .. }
            | Event::Refused { at, .. }
            | Event::Unsure { at }
            | Event::Snapshot(Snapshot { at, .. }) => *at,
        }
    }
}

/// A bind or listen that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    pub proto: Protocol,
    pub address: IpAddr,
    pub port: u16,
    pub netns: NetnsId,
    /// Positive errno, `EADDRINUSE` (98) as a rule.
    pub errno: i32,
    pub by: Arc<Process>,
}

impl Change {
    /// When it happened; for a resync, when the table was read anew.
    pub fn at(&self) -> BootNs {
        match self {
            Change::Opened { at, .. }
            | Change::Closed { at, .. }
            | Change::Holders { at, .. }
            | Change::Conflict { at, .. }
            | Change::Resync { at, .. } => *at,
        }
    }
}

/// What an event did to the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    Opened {
        at: BootNs,
        listener: Listener,
    },
    /// The listener as it was. `by` closed it, else its last holder.
    Closed {
        at: BootNs,
        listener: Listener,
        by: Option<Arc<Process>>,
    },
    /// The set of holders changed; the listener as it is now.
    Holders {
        at: BootNs,
        listener: Listener,
    },
    /// A failed bind, with the listener in its way where one is known.
    Conflict {
        at: BootNs,
        attempt: Attempt,
        held_by: Option<Listener>,
    },
    /// `lost` events were lost; the table was read anew.
    Resync {
        at: BootNs,
        lost: u64,
    },
}
