//! Sockets that end, on a few ports: told by the kernel, looked at cheaply, and what is left of them that keeps a new
//! server from the port. Owns the netlink sockets for it; who holds what is not its business.
//!
//! The kernel announces each destroyed socket to the multicast groups of `NETLINK_SOCK_DIAG`, as `ss -E` shows. Anybody
//! may join. A socket is announced when its last reference is gone, mostly within a millisecond, from a work queue: a
//! half-open request or a `shutdown()` can let go of the port long before. Hence the look, a dump that the kernel
//! filters by port. The announcement only makes the look come earlier.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use anyhow::Context;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6};
use netlink_packet_sock_diag::inet::StateFlags;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket as Netlink, SocketAddr as NetlinkAddr};
use nix::libc;

use super::diag::{Link, PortSocket, State, port_request, retry_interrupted, socket_of};
use super::netns;
use super::trial::Bind;
use crate::model::{NetnsId, Protocol, Socket};

/// `enum sknetlink_groups` (linux/sock_diag.h): for TCP and UDP, of IPv4 and IPv6 each.
const SKNLGRP_INET_TCP_DESTROY: u32 = 1;
const SKNLGRP_INET_UDP_DESTROY: u32 = 2;
const SKNLGRP_INET6_TCP_DESTROY: u32 = 3;
const SKNLGRP_INET6_UDP_DESTROY: u32 = 4;

/// Where `struct inet_diag_msg` behind the netlink header has its ports, in network order.
const OFFSET_LOCAL_PORT: u32 = 20;
const OFFSET_REMOTE_PORT: u32 = 22;

/// Filters with more ranges than this become one range from the lowest to the highest port: each range costs a few
/// instructions per socket in the kernel.
const MAX_RANGES: usize = 64;

/// Watches ports of one network namespace.
pub struct Watch {
    netns: NetnsId,
    /// `None`: the namespace of whoever opened it.
    namespace: Option<File>,
    link: Link,
    looks: Vec<(Protocol, Vec<u8>)>,
    /// `None` where the kernel announces nothing.
    events: Option<Netlink>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("netns", &self.netns).finish_non_exhaustive()
    }
}

impl Watch {
    /// Watches ports of the calling thread's network namespace.
    ///
    /// # Errors
    /// When netlink is refused: nothing can be looked at.
    pub fn open(ports: &BTreeSet<(Protocol, u16)>) -> anyhow::Result<Watch> {
        let netns = netns::own().context("cannot read /proc/thread-self/ns/net; is /proc mounted?")?;
        let mut looks = Vec::new();
        // A UDP socket goes on to have its port once it has a peer.
        let of_udp = StateFlags::CLOSE | StateFlags::ESTABLISHED;
        for (proto, states) in [(Protocol::Tcp, StateFlags::LISTEN), (Protocol::Udp, of_udp)] {
            let ranges = ranges(ports.iter().filter(|(p, _)| *p == proto).map(|&(_, port)| port));
            if !ranges.is_empty() {
                looks.extend(
                    [AF_INET, AF_INET6].map(|family| (proto, port_request(family, proto, states.clone(), &ranges))),
                );
            }
        }
        // Kernels without the announcements, or without the module for them: the look alone serves.
        let events = subscribe(ports).ok();
        let mut watch =
            Watch { netns, namespace: None, link: Link::open().context("cannot open netlink")?, looks, events };
        watch.look().context("cannot list sockets by sock_diag")?;
        Ok(watch)
    }

    /// As [`Watch::open`], in another namespace.
    ///
    /// # Errors
    /// As [`Watch::open`], and where the namespace may not be entered.
    pub fn open_in(namespace: File, ports: &BTreeSet<(Protocol, u16)>) -> anyhow::Result<Watch> {
        let watch = netns::enter(&namespace, || Watch::open(ports))?;
        Ok(Watch { namespace: Some(namespace), ..watch })
    }

    pub fn netns(&self) -> NetnsId {
        self.netns
    }

    /// Readable when the kernel has announced an end on one of the ports. `None`: it announces nothing.
    pub fn events(&self) -> Option<BorrowedFd<'_>> {
        self.events.as_ref().map(AsFd::as_fd)
    }

    /// Takes away what was announced: all that matters is that there was something.
    pub fn drain(&self) {
        let Some(events) = &self.events else { return };
        // Any error ends it, an overrun among them: it only means that more was announced.
        while retry_interrupted(|| events.recv(&mut &mut [0u8; 512][..], libc::MSG_DONTWAIT | libc::MSG_TRUNC)).is_ok()
        {
        }
    }

    /// The sockets that listen (or, UDP, are bound, with a peer or without) on the ports now, without who holds them. Where
    /// the ports are many and scattered, others between them as well.
    ///
    /// # Errors
    /// What netlink says.
    pub fn look(&mut self) -> io::Result<Vec<Socket>> {
        let mut sockets = Vec::new();
        for (proto, request) in &self.looks {
            let rows = self.link.dump(request)?;
            sockets.extend(rows.iter().filter_map(|row| socket_of(row, *proto, self.netns)));
        }
        Ok(sockets)
    }

    /// Whether a server would be told that the address is in use: see [`Bind::is_in_use`].
    pub fn is_in_use(&self, proto: Protocol, endpoint: SocketAddr, v6only: Option<bool>) -> bool {
        let bind = Bind { proto, endpoint, reuseaddr: proto == Protocol::Tcp, v6only };
        bind.is_in_use(self.namespace.as_ref())
    }

    /// The sockets that could be why a bind to this address fails; `None`: one that listens (or, UDP, is bound without a
    /// peer) is among them.
    ///
    /// # Errors
    /// What netlink says.
    pub fn remnants(&mut self, proto: Protocol, address: SocketAddr) -> io::Result<Option<Vec<PortSocket>>> {
        let mut found = self.link.sockets(proto, address.port()..=address.port())?;
        found.retain(|socket| overlap(socket.local.ip(), address.ip()));
        let serves = if proto == Protocol::Tcp { State::Listen } else { State::Close };
        Ok((!found.iter().any(|socket| socket.state == serves)).then_some(found))
    }
}

/// The numbers as ranges, in order.
fn ranges(ports: impl Iterator<Item = u16>) -> Vec<RangeInclusive<u16>> {
    let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
    for port in ports {
        match ranges.last_mut() {
            Some(last) if last.end().checked_add(1) == Some(port) => *last = *last.start()..=port,
            _ => ranges.push(port..=port),
        }
    }
    match (ranges.first(), ranges.last()) {
        (Some(first), Some(last)) if ranges.len() > MAX_RANGES => vec![*first.start()..=*last.end()],
        _ => ranges,
    }
}

fn subscribe(ports: &BTreeSet<(Protocol, u16)>) -> io::Result<Netlink> {
    let mut socket = Netlink::new(NETLINK_SOCK_DIAG)?;
    let numbers: BTreeSet<u16> = ports.iter().map(|&(_, port)| port).collect();
    filter(&socket, &ranges(numbers.into_iter()))?;
    socket.bind(&NetlinkAddr::new(0, 0))?;
    for (proto, groups) in [
        (Protocol::Tcp, [SKNLGRP_INET_TCP_DESTROY, SKNLGRP_INET6_TCP_DESTROY]),
        (Protocol::Udp, [SKNLGRP_INET_UDP_DESTROY, SKNLGRP_INET6_UDP_DESTROY]),
    ] {
        if ports.iter().any(|(p, _)| *p == proto) {
            for group in groups {
                socket.add_membership(group)?;
            }
        }
    }
    Ok(socket)
}

/// Lets only announcements through that are of sockets without peer on these ports: on a busy host, connections end
/// by the thousand.
fn filter(socket: &Netlink, ranges: &[RangeInclusive<u16>]) -> io::Result<()> {
    const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let jump = |test: u32, value: u32, jt, jf| op(libc::BPF_JMP | test | libc::BPF_K, value, jt, jf);
    let mut program = vec![
        op(LOAD_HALF, OFFSET_REMOTE_PORT, 0, 0),
        jump(libc::BPF_JEQ, 0, 1, 0),
        op(RETURN, 0, 0, 0),
        op(LOAD_HALF, OFFSET_LOCAL_PORT, 0, 0),
    ];
    for range in ranges {
        program.extend([
            jump(libc::BPF_JGE, (*range.start()).into(), 0, 2),
            jump(libc::BPF_JGT, (*range.end()).into(), 1, 0),
            op(RETURN, u32::MAX, 0, 0),
        ]);
    }
    program.push(op(RETURN, 0, 0, 0));
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: the pointer and the size describe one sock_fprog, whose own pointer and length describe `program`; the
    // kernel copies both before it returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn op(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    // The codes of classic BPF fit into 16 bits.
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// Whether two bound addresses can be in each other's way.
fn overlap(a: IpAddr, b: IpAddr) -> bool {
    a.to_canonical() == b.to_canonical() || a.is_unspecified() || b.is_unspecified()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn ports(of: &[(Protocol, SocketAddr)]) -> BTreeSet<(Protocol, u16)> {
        of.iter().map(|(proto, address)| (*proto, address.port())).collect()
    }

    fn told(watch: &Watch, patience: i64) -> bool {
        let events = watch.events().unwrap();
        let ready = poll(&mut [PollFd::new(&events, PollFlags::IN)], Some(&Timespec { tv_sec: patience, tv_nsec: 0 }));
        watch.drain();
        ready.unwrap() > 0
    }

    fn seen(watch: &mut Watch) -> Vec<(Protocol, SocketAddr)> {
        let mut seen: Vec<_> = watch.look().unwrap().iter().map(|s| (s.proto, s.endpoint())).collect();
        seen.sort();
        seen
    }

    /// Nobody else is given this port meanwhile; with a port each, another test's listener may have the number of one in
    /// another family, and is told as well.
    fn on_one_port() -> std::io::Result<(TcpListener, TcpListener, UdpSocket)> {
        let tcp = TcpListener::bind("127.0.0.1:0")?;
        let port = tcp.local_addr()?.port();
        Ok((tcp, TcpListener::bind((Ipv6Addr::LOCALHOST, port))?, UdpSocket::bind(("127.0.0.1", port))?))
    }

    #[test]
    fn ends_are_told_and_only_those_asked_for() {
        let (tcp, tcp6, udp) = std::iter::repeat_with(on_one_port).flatten().next().unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut all = vec![
            (Protocol::Tcp, tcp.local_addr().unwrap()),
            (Protocol::Tcp, tcp6.local_addr().unwrap()),
            (Protocol::Udp, udp.local_addr().unwrap()),
        ];
        all.sort();
        let mut watch = Watch::open(&ports(&all)).unwrap();
        assert_eq!(seen(&mut watch), all);
        let client = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let (accepted, _) = tcp.accept().unwrap();
        drop((client, accepted, other));
        assert!(!told(&watch, 0));
        for end in [Box::new(tcp) as Box<dyn std::any::Any>, Box::new(tcp6), Box::new(udp)] {
            drop(end);
            assert!(told(&watch, 10), "no end was announced");
        }
        assert_eq!(seen(&mut watch), []);
    }

    #[test]
    fn a_look_is_filtered_by_any_set_of_ports() {
        let listeners: Vec<TcpListener> = (0..80).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let mut all: Vec<_> = listeners.iter().map(|l| (Protocol::Tcp, l.local_addr().unwrap())).collect();
        all.sort();
        for (count, step) in [(1, 1), (2, 1), (3, 2), (20, 3), (80, 1)] {
            let wanted: Vec<_> = all.iter().step_by(step).take(count).copied().collect();
            let mut watch = Watch::open(&ports(&wanted)).unwrap();
            let found: Vec<_> = seen(&mut watch).into_iter().filter(|s| all.contains(s)).collect();
            if wanted.len() <= MAX_RANGES {
                assert_eq!(found, wanted);
            } else {
                assert!(wanted.iter().all(|s| found.contains(s)));
            }
        }
    }

    #[test]
    fn ports_become_ranges() {
        for (given, expected) in [
            (vec![], vec![]),
            (vec![1, 2, 3, 5, 65534, 65535], vec![1..=3, 5..=5, 65534..=65535]),
            ((0..=MAX_RANGES as u16).map(|n| n * 2).collect(), vec![0..=2 * MAX_RANGES as u16]),
        ] {
            assert_eq!(ranges(given.into_iter()), expected);
        }
    }

    #[test]
    fn what_is_left_on_a_port_is_told_once_nobody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut watch = Watch::open(&ports(&[(Protocol::Tcp, address)])).unwrap();
        assert!(watch.is_in_use(Protocol::Tcp, address, None));
        assert_eq!(watch.remnants(Protocol::Tcp, address).unwrap(), None);
        let client = TcpStream::connect(address).unwrap();
        // A client's own port is taken: its socket did not set SO_REUSEADDR.
        let own = client.local_addr().unwrap();
        assert!(watch.is_in_use(Protocol::Tcp, own, None));
        // All addresses are in everybody's way, another address is not.
        for (ip, expected) in [(own.ip(), true), ([127, 0, 0, 2].into(), false), (Ipv6Addr::UNSPECIFIED.into(), true)] {
            let found = watch.remnants(Protocol::Tcp, SocketAddr::new(ip, own.port())).unwrap().unwrap();
            let is_found = found.iter().any(|socket| (socket.state, socket.local) == (State::Established, own));
            assert_eq!(is_found, expected, "{ip}: {found:?}");
        }
    }
}
