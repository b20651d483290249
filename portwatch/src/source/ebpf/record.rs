//! Records of the kernel programs, in the model's terms.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portwatch_ebpf::{
    AF_INET, AF_INET6, Held, IPPROTO_MPTCP, IPPROTO_TCP, IPPROTO_UDP, Record, TCP_CLOSE, TCP_LISTEN, flag,
};

use crate::model::{ProcessId, Protocol, Socket, SocketId};

/// Copies a record out of the kernel's bytes, which need not be aligned.
pub(crate) fn parse<T: Abi>(bytes: &[u8]) -> Option<T> {
    (bytes.len() >= size_of::<T>()).then(|| {
        // SAFETY: enough bytes for a T, read unaligned; `Abi` types are valid for any bytes.
        unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
    })
}

/// Types of the ABI that are plain integers.
///
/// # Safety
/// Any bytes must be a valid value.
pub(crate) unsafe trait Abi: Copy {}
// SAFETY: integers and arrays of integers only.
unsafe impl Abi for Record {}
// SAFETY: integers and arrays of integers only.
unsafe impl Abi for Held {}

/// The socket of a record, or `None` if it is of no protocol or family that portwatch follows.
pub(crate) fn socket(record: &Record) -> Option<Socket> {
    let proto = protocol(record.protocol)?;
    Some(Socket {
        id: id(record),
        proto,
        mptcp: record.flags & flag::MPTCP != 0,
        address: address(record.family, record.address)?,
        port: record.port,
        // post_bind tells neither the inode nor this.
        v6only: v6only(record.family, record.flags).filter(|_| record.inode != 0),
        netns: record.netns,
        uid: record.uid,
        backlog: (proto == Protocol::Tcp).then_some(record.backlog),
    })
}

pub(super) fn id(record: &Record) -> SocketId {
    SocketId { inode: record.inode, cookie: record.cookie }
}

pub(super) fn actor(record: &Record) -> ProcessId {
    ProcessId { pid: record.tgid, start: record.start }
}

/// `comm` as text; what is not UTF-8 becomes U+FFFD.
pub(crate) fn name(comm: &[u8]) -> String {
    let end = comm.iter().position(|&byte| byte == 0).unwrap_or(comm.len());
    String::from_utf8_lossy(&comm[..end]).into_owned()
}

/// Whether bind() left its mark on the socket: a port or an address was asked for.
pub(crate) fn is_bound(held: &Held) -> bool {
    held.flags & flag::BOUND != 0
}

/// The listener behind a held descriptor; `None` for TCP sockets that are only bound, and for clients. A UDP socket
/// that is not connected counts, bound or not: one bound to port 0 of every address looks like a client that was given
/// a port to send from ([`is_bound`] is false for both).
pub(crate) fn held_socket(held: &Held) -> Option<Socket> {
    let listens = match protocol(held.protocol)? {
        Protocol::Tcp => held.state == TCP_LISTEN,
        Protocol::Udp => is_bound(held) || held.state == TCP_CLOSE,
    };
    listens.then(|| any_socket(held))?
}

/// The TCP socket behind a held descriptor, where it is bound and neither listens nor is connected.
pub(crate) fn bound_socket(held: &Held) -> Option<Socket> {
    let is_bound = protocol(held.protocol)? == Protocol::Tcp && held.state == TCP_CLOSE && is_bound(held);
    is_bound.then(|| any_socket(held))?
}

fn any_socket(held: &Held) -> Option<Socket> {
    let proto = protocol(held.protocol)?;
    Some(Socket {
        id: SocketId { inode: held.inode, cookie: held.cookie },
        proto,
        mptcp: held.flags & flag::MPTCP != 0,
        address: address(held.family, held.address)?,
        port: held.port,
        v6only: v6only(held.family, held.flags),
        netns: held.netns,
        uid: held.uid,
        backlog: (proto == Protocol::Tcp).then_some(held.backlog),
    })
}

fn protocol(number: u16) -> Option<Protocol> {
    match number {
        IPPROTO_TCP | IPPROTO_MPTCP => Some(Protocol::Tcp),
        IPPROTO_UDP => Some(Protocol::Udp),
        _ => None,
    }
}

fn address(family: u16, bytes: [u8; 16]) -> Option<IpAddr> {
    match family {
        AF_INET => Some(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()),
        AF_INET6 => Some(Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

fn v6only(family: u16, flags: u8) -> Option<bool> {
    (family == AF_INET6).then_some(flags & flag::V6ONLY != 0)
}
