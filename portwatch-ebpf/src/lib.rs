//! The ABI between portwatch and its kernel programs: the records they write, the offsets they need.
//!
//! Kernel code copies facts, userspace decides. Everything here is `repr(C)` plain data without padding, the same on
//! both sides; a change here is a change of the committed objects.
#![no_std]

/// What a [`Record`] tells.
pub mod kind {
    /// listen() (TCP) or bind() (UDP) succeeded.
    pub const OPENED: u8 = 1;
    /// A TCP socket left LISTEN, or a UDP socket lost its port.
    pub const CLOSED: u8 = 2;
    /// A holder forked: `child` and `child_start` name the new process.
    pub const FORKED: u8 = 3;
    /// A holder replaced its program.
    pub const EXECED: u8 = 4;
    /// The last thread of a holder exits.
    pub const EXITED: u8 = 5;
    /// A bind or listen failed with `errno`.
    pub const REFUSED: u8 = 6;
    /// Something happened that this record cannot tell whole: read a snapshot.
    pub const UNSURE: u8 = 7;
}

/// Bits of [`Record::flags`] and [`Held::flags`].
pub mod flag {
    /// `IPV6_V6ONLY` is set.
    pub const V6ONLY: u8 = 1;
    /// An MPTCP socket or a subflow of one.
    pub const MPTCP: u8 = 2;
    /// The port or the address was asked for by bind().
    pub const BOUND: u8 = 4;
}

/// `enum sk_state` of the kernel (include/net/tcp_states.h).
pub const TCP_CLOSE: u8 = 7;
pub const TCP_LISTEN: u8 = 10;

pub const IPPROTO_TCP: u16 = 6;
pub const IPPROTO_UDP: u16 = 17;
pub const IPPROTO_MPTCP: u16 = 262;

/// `AF_INET` and `AF_INET6` (include/linux/socket.h).
pub const AF_INET: u16 = 2;
pub const AF_INET6: u16 = 10;

/// Bytes in `task_struct.comm` (`TASK_COMM_LEN`).
pub const COMM_LEN: usize = 16;

/// One event, written to the ring `EVENTS`. Fields that do not apply are 0.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Nanoseconds since boot (`bpf_ktime_get_boot_ns`).
    pub at: u64,
    /// Position among the records of this CPU, the dropped ones counted.
    pub seq: u64,
    pub cookie: u64,
    pub inode: u64,
    /// Start of the acting task's thread-group leader, in nanoseconds since boot.
    pub start: u64,
    /// cgroup v2 id of the acting task.
    pub cgroup: u64,
    pub child_start: u64,
    pub netns: u32,
    /// Owner of the socket.
    pub uid: u32,
    /// Effective uid of the acting task.
    pub task_uid: u32,
    pub tgid: u32,
    pub tid: u32,
    pub child: u32,
    /// Accept queue limit, in connections.
    pub backlog: u32,
    pub errno: u16,
    pub cpu: u16,
    pub port: u16,
    pub protocol: u16,
    pub family: u16,
    pub kind: u8,
    pub flags: u8,
    /// IPv4 in the first four bytes, or IPv6; network byte order.
    pub address: [u8; 16],
    /// Name of the thread-group leader.
    pub comm: [u8; COMM_LEN],
}

/// One descriptor of a bound or listening socket, written by the `task_file` iterator.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub inode: u64,
    /// 0 where the kernel offers no cookie to iterators and nobody has asked for it yet.
    pub cookie: u64,
    /// Start of the thread-group leader, in nanoseconds since boot.
    pub start: u64,
    pub netns: u32,
    pub uid: u32,
    pub tgid: u32,
    pub fd: u32,
    pub backlog: u32,
    pub protocol: u16,
    pub family: u16,
    pub port: u16,
    pub state: u8,
    pub flags: u8,
    pub reserved: u32,
    pub address: [u8; 16],
}

/// Slots of the map of [`Counters`], a power of two; CPU n counts in slot n modulo this.
pub const COUNTER_SLOTS: u32 = 1024;

/// What one CPU has counted since the programs were loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records made, the dropped ones included.
    pub produced: u64,
    /// Records that found the ring full, and holders that found the map full.
    pub dropped: u64,
}

/// Some bits of one byte of a kernel struct; `mask` 0 where the kernel has no such field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bits {
    /// Byte offset in the struct.
    pub offset: u32,
    pub shift: u16,
    pub mask: u16,
}

/// Where the running kernel keeps what the programs read: byte offsets, found in its BTF before loading.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    pub skc_family: u32,
    pub skc_state: u32,
    pub skc_num: u32,
    pub skc_rcv_saddr: u32,
    pub skc_v6_rcv_saddr: u32,
    pub skc_net: u32,
    pub skc_cookie: u32,
    pub sk_protocol: u32,
    pub sk_socket: u32,
    pub sk_uid: u32,
    pub sk_max_ack_backlog: u32,
    pub net_inum: u32,
    pub socket_sk: u32,
    /// From a `struct socket` to the inode in the same allocation (`socket_alloc`).
    pub socket_inode: u32,
    pub inode_ino: u32,
    pub inode_sb: u32,
    pub sb_magic: u32,
    pub file_inode: u32,
    pub file_private_data: u32,
    pub task_tgid: u32,
    pub task_pid: u32,
    pub task_group_leader: u32,
    pub task_start_boottime: u32,
    pub task_comm: u32,
    pub task_signal: u32,
    pub task_nsproxy: u32,
    pub signal_live: u32,
    pub nsproxy_net_ns: u32,
    pub task_cred: u32,
    pub cred_euid: u32,
    pub task_cgroups: u32,
    pub css_set_dfl_cgrp: u32,
    pub cgroup_kn: u32,
    pub kernfs_id: u32,
    pub skc_ipv6only: Bits,
    pub sk_userlocks: Bits,
    pub tcp_is_mptcp: Bits,
}

/// What the kernel offers and the loader asks for, each 0 or 1: branches on these are decided by the verifier, so
/// that a helper the kernel does not know is never looked at.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `bpf_get_socket_cookie` in tracing programs (5.12).
    pub cookie_helper: u32,
    /// `bpf_sock_from_file` (5.11).
    pub sock_from_file: u32,
    /// Listening is learnt from the state tracepoint alone.
    pub listen_by_state: u32,
    /// With `listen_by_state`: a sock_ops program adds the final port.
    pub port_by_sock_ops: u32,
}

const _: () = assert!(size_of::<Record>() == 128);
const _: () = assert!(size_of::<Held>() == 72);
const _: () = assert!(size_of::<Counters>() == 16);
const _: () = assert!(size_of::<Offsets>() == 34 * 4 + 3 * 8);
const _: () = assert!(size_of::<Config>() == 16);
