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
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::StateFlags;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket as Netlink, SocketAddr as NetlinkAddr};
use nix::libc;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

use super::diag::{Link, port_request, retry_interrupted, socket_of};
use super::netns;
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

/// `TCP_BOUND_INACTIVE` (net/tcp_states.h, since 6.8): bound, and neither listening nor connected. Older kernels show
/// no such socket and pass over the flag. It is asked for by this state, and answered with TCP_CLOSE.
const TCP_BOUND_INACTIVE: u8 = 13;
const TCP_CLOSE: u8 = 7;
const TCP_LISTEN: u8 = 10;

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

/// A socket on a port that does not listen there: bound, connected, or on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remnant {
    /// 0: no process has it any more, the kernel ends it in its own time.
    pub inode: u64,
    pub state: State,
    pub local: SocketAddr,
}

/// The state of a TCP socket, as `ss` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct State(u8);

impl State {
    pub const FIN_WAIT2: State = State(5);
    pub const TIME_WAIT: State = State(6);

    /// Whether it is bound and nothing else.
    pub fn is_bound(self) -> bool {
        matches!(self.0, TCP_BOUND_INACTIVE | TCP_CLOSE)
    }

    pub fn is_time_wait(self) -> bool {
        self == State::TIME_WAIT
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `enum` in net/tcp_states.h.
        f.write_str(match self.0 {
            1 => "ESTABLISHED",
            2 => "SYN_SENT",
            3 | 12 => "SYN_RECV",
            4 => "FIN_WAIT1",
            5 => "FIN_WAIT2",
            6 => "TIME_WAIT",
            8 => "CLOSE_WAIT",
            9 => "LAST_ACK",
            TCP_LISTEN => "LISTEN",
            11 => "CLOSING",
            // As `ss` shows those that are bound and nothing else.
            _ => "UNCONN",
        })
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
        for (proto, number, states) in
            [(Protocol::Tcp, IPPROTO_TCP, StateFlags::LISTEN), (Protocol::Udp, IPPROTO_UDP, StateFlags::CLOSE)]
        {
            let ranges = ranges(ports.iter().filter(|(p, _)| *p == proto).map(|&(_, port)| port));
            if !ranges.is_empty() {
                looks.extend(
                    [AF_INET, AF_INET6].map(|family| (proto, port_request(family, number, states.clone(), &ranges))),
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

    /// The sockets that listen (or, UDP, are bound) on the ports now, without who holds them. Where the ports are many
    /// and scattered, others between them as well.
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

    /// Binds a TCP socket as servers do, with `SO_REUSEADDR`, and lets go at once. It never listens.
    ///
    /// # Errors
    /// What bind(2) says: only `AddrInUse` means that the port is taken.
    pub fn probe(&self, address: SocketAddr, v6only: Option<bool>) -> io::Result<()> {
        match &self.namespace {
            None => probe(address, v6only),
            Some(namespace) => netns::enter(namespace, || Ok(probe(address, v6only)))
                .unwrap_or_else(|_| Err(io::ErrorKind::PermissionDenied.into())),
        }
    }

    /// The TCP sockets that could be why a bind to this address fails; `None`: one that listens is among them.
    ///
    /// # Errors
    /// What netlink says.
    pub fn remnants(&mut self, address: SocketAddr) -> io::Result<Option<Vec<Remnant>>> {
        let port = address.port();
        let states = StateFlags::from_bits_retain(u32::MAX);
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            for row in self.link.dump(&port_request(family, IPPROTO_TCP, states.clone(), &[port..=port]))? {
                let header = row.header;
                let local = SocketAddr::new(header.socket_id.source_address, header.socket_id.source_port);
                if overlap(local.ip(), address.ip()) {
                    found.push(Remnant { inode: header.inode.into(), state: State(header.state), local });
                }
            }
        }
        Ok((!found.iter().any(|r| r.state.0 == TCP_LISTEN)).then_some(found))
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

fn probe(address: SocketAddr, v6only: Option<bool>) -> io::Result<()> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if let (Some(v6only), false) = (v6only, address.is_ipv4()) {
        sockopt::set_ipv6_v6only(&socket, v6only)?;
    }
    Ok(bind(&socket, &address)?)
}

/// Whether two bound addresses can be in each other's way.
fn overlap(a: IpAddr, b: IpAddr) -> bool {
    a.to_canonical() == b.to_canonical() || a.is_unspecified() || b.is_unspecified()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use std::time::{Duration, Instant};

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

    #[test]
    fn ends_are_told_and_only_those_asked_for() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp6 = TcpListener::bind("[::1]:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
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
    fn a_bind_fails_exactly_where_a_server_would() {
        let taken = |watch: &Watch, address| match watch.probe(address, None) {
            Ok(()) => false,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
                true
            }
        };
        // Rust's own listeners set SO_REUSEADDR: what they leave behind is in nobody's way.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut watch = Watch::open(&ports(&[(Protocol::Tcp, address)])).unwrap();
        assert!(taken(&watch, address));
        assert_eq!(watch.remnants(address).unwrap(), None);
        let client = TcpStream::connect(address).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        drop(listener);
        // Another test's child, forked while it was open, has it until it execs.
        let until = Instant::now() + Duration::from_secs(10);
        while taken(&watch, address) {
            assert!(Instant::now() < until, "{address} stays taken");
            std::thread::yield_now();
        }
        // A client's own port is taken: its socket did not.
        let own = client.local_addr().unwrap();
        assert!(taken(&watch, own));
        let remnants = watch.remnants(own).unwrap().unwrap();
        assert_eq!(remnants.iter().map(|r| r.state.to_string()).collect::<Vec<_>>(), ["ESTABLISHED"]);
        drop(accepted);
    }
}
