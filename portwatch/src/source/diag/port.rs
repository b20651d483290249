//! Sockets of every state that have a local port, and the destruction of one that listens.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

use anyhow::{Context, anyhow, bail};
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6};
use netlink_packet_sock_diag::inet::{InetResponse, SocketId as DiagId, StateFlags};
use nix::libc;

use super::{Link, cookie_of, encode, inet_request, protocol_number, with_attribute};
use crate::model::{Protocol, Socket, SocketId};
use crate::source::netns;

/// A TCP state as `sock_diag` numbers it (include/net/tcp_states.h). A UDP socket is `Established` when it is
/// connected, else `Close`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    Established,
    SynSent,
    SynRecv,
    FinWait1,
    FinWait2,
    TimeWait,
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
    NewSynRecv,
    /// A TCP socket bound to a port, neither listening nor connected: told by kernels from 6.8 on.
    BoundInactive,
}

impl State {
    const ALL: [State; 12] = [
        State::Established,
        State::SynSent,
        State::SynRecv,
        State::FinWait1,
        State::FinWait2,
        State::TimeWait,
        State::Close,
        State::CloseWait,
        State::LastAck,
        State::Listen,
        State::Closing,
        State::NewSynRecv,
    ];

    fn of(number: u8) -> Option<State> {
        State::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }
}

/// The kernel's word, without its prefix.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Established => "ESTABLISHED",
            State::SynSent => "SYN_SENT",
            State::SynRecv => "SYN_RECV",
            State::FinWait1 => "FIN_WAIT1",
            State::FinWait2 => "FIN_WAIT2",
            State::TimeWait => "TIME_WAIT",
            State::Close => "CLOSE",
            State::CloseWait => "CLOSE_WAIT",
            State::LastAck => "LAST_ACK",
            State::Listen => "LISTEN",
            State::Closing => "CLOSING",
            State::NewSynRecv => "NEW_SYN_RECV",
            State::BoundInactive => "BOUND_INACTIVE",
        })
    }
}

/// A socket with a local port, in any state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSocket {
    /// The inode is 0 where no file belongs to it any more (`TIME_WAIT`, a closed connection that lingers).
    pub id: SocketId,
    pub proto: Protocol,
    pub state: State,
    pub local: SocketAddr,
    /// Port 0 where it has no peer.
    pub peer: SocketAddr,
    pub uid: u32,
}

/// `INET_DIAG_REQ_BYTECODE` (linux/inet_diag.h): a request attribute, the filter; and its operations.
const INET_DIAG_REQ_BYTECODE: u16 = 1;
const INET_DIAG_BC_JMP: u8 = 1;
const INET_DIAG_BC_S_GE: u8 = 2;
const INET_DIAG_BC_S_LE: u8 = 3;
/// `SOCK_DESTROY` (linux/sock_diag.h).
const SOCK_DESTROY: u16 = 21;

/// Every socket of the calling thread's network namespace whose local port is in `ports`, filtered in the kernel.
///
/// # Errors
/// Where netlink is refused.
pub fn dump_ports(proto: Protocol, ports: RangeInclusive<u16>) -> io::Result<Vec<PortSocket>> {
    Link::open()?.sockets(proto, ports)
}

impl Link {
    /// As [`dump_ports`], in the namespace of this link.
    pub(in crate::source) fn sockets(
        &mut self,
        proto: Protocol,
        ports: RangeInclusive<u16>,
    ) -> io::Result<Vec<PortSocket>> {
        // All states, the pseudo state `TCP_BOUND_INACTIVE` (bit 13, since 6.8) among them: a kernel passes over the
        // bits of those that it does not know.
        let rows = self.rows(proto, ports, StateFlags::from_bits_retain(u32::MAX))?;
        Ok(rows.iter().filter_map(|row| port_socket(row, proto)).collect())
    }

    fn rows(
        &mut self,
        proto: Protocol,
        ports: RangeInclusive<u16>,
        states: StateFlags,
    ) -> io::Result<Vec<InetResponse>> {
        let ports = [ports];
        let mut all = Vec::new();
        for family in [AF_INET, AF_INET6] {
            all.extend(self.dump(&port_request(family, proto, states.clone(), &ports))?);
        }
        // A dump can show a socket twice while others come and go.
        let key = |row: &InetResponse| (cookie_of(row.header.socket_id.cookie), row.header.state);
        all.sort_by_key(key);
        all.dedup_by_key(|row| key(row));
        Ok(all)
    }
}

/// `None`: in a state that is not known.
pub(crate) fn port_socket(row: &InetResponse, proto: Protocol) -> Option<PortSocket> {
    let header = &row.header;
    let id = &header.socket_id;
    let state = match State::of(header.state)? {
        // What the pseudo state asks for is shown as what it is: closed, and yet it has a port.
        State::Close if proto == Protocol::Tcp => State::BoundInactive,
        state => state,
    };
    Some(PortSocket {
        id: SocketId { inode: header.inode.into(), cookie: cookie_of(id.cookie) },
        proto,
        state,
        local: SocketAddr::new(id.source_address, id.source_port),
        peer: SocketAddr::new(id.destination_address, id.destination_port),
        uid: header.uid,
    })
}

/// A dump request, as bytes, for the sockets with these local ports alone: the kernel filters.
pub(in crate::source) fn port_request(
    family: u8,
    proto: Protocol,
    states: StateFlags,
    ports: &[RangeInclusive<u16>],
) -> Vec<u8> {
    let request = encode(inet_request(family, protocol_number(proto), states));
    with_attribute(request, INET_DIAG_REQ_BYTECODE, &port_filter(ports))
}

/// The program of `struct inet_diag_bc_op {u8 code; u8 yes; u16 no;}` that accepts these ports. `yes` and `no` are
/// jumps in bytes; the end itself accepts, four bytes past it reject. A comparison has its port in a second
/// operation's `no`.
fn port_filter(ranges: &[RangeInclusive<u16>]) -> Vec<u8> {
    // Per range: lower bound (8), upper bound (8), and a jump to the end (4), which the last does without.
    let end = (ranges.len() * 20).saturating_sub(4);
    let mut bytes = Vec::with_capacity(end);
    for (index, range) in ranges.iter().enumerate() {
        let is_last = index + 1 == ranges.len();
        for (code, port) in [(INET_DIAG_BC_S_GE, *range.start()), (INET_DIAG_BC_S_LE, *range.end())] {
            let next_range = if is_last { end + 4 } else { (index + 1) * 20 };
            let no = u16::try_from(next_range - bytes.len()).unwrap_or(u16::MAX);
            bytes.extend([code, 8]);
            bytes.extend(no.to_ne_bytes());
            bytes.extend([0, 0]);
            bytes.extend(port.to_ne_bytes());
        }
        if !is_last {
            let no = u16::try_from(end - bytes.len()).unwrap_or(u16::MAX);
            bytes.extend([INET_DIAG_BC_JMP, 4]);
            bytes.extend(no.to_ne_bytes());
        }
    }
    bytes
}

/// Ends listening on exactly this socket, in its network namespace, without touching a process (`SOCK_DESTROY`). The
/// cookie says which socket: one that came later is never hit.
///
/// What its holder sees: a blocked accept() returns EINVAL, poll() says POLLIN, POLLERR and POLLHUP, SO_ERROR is
/// ECONNABORTED; it keeps the descriptor, and may call listen() again. A port that was bound by number stays bound
/// until it closes the descriptor: others bind it only where both it and they set SO_REUSEADDR. (A port that the kernel
/// chose is free at once.) A UDP socket is not closed at all: its holder is told ECONNABORTED once, and the socket
/// stays bound and receives, so this function refuses UDP.
///
/// # Errors
/// `EPERM` in the chain without `CAP_NET_ADMIN`; a sentence for UDP, for MPTCP, for a kernel without
/// `CONFIG_INET_DIAG_DESTROY`, and for a socket that is gone.
pub fn destroy(socket: &Socket) -> anyhow::Result<()> {
    if socket.proto == Protocol::Udp {
        bail!("a UDP socket does not close so: its port would stay taken; end its holder instead");
    }
    if netns::own()? == socket.netns {
        return destroy_here(socket);
    }
    netns::enter(&netns::open(socket.netns)?, || destroy_here(socket))
}

/// Tries before giving up on one of several SO_REUSEPORT twins.
const MAX_TRIES: u16 = 4096;

fn destroy_here(socket: &Socket) -> anyhow::Result<()> {
    let endpoint = socket.endpoint();
    let gone = || anyhow!("the socket at {endpoint} is gone already");
    let what = || format!("cannot close the socket at {endpoint}");
    let mut link = Link::open().with_context(what)?;
    let listening = link.rows(socket.proto, socket.port..=socket.port, StateFlags::LISTEN).with_context(what)?;
    // The cookie that a process has of an MPTCP socket is not the one in the table: they share the inode.
    let is_it = |row: &&InetResponse| {
        let (inode, cookie) = (u64::from(row.header.inode), cookie_of(row.header.socket_id.cookie));
        (socket.id.cookie != 0 && cookie == socket.id.cookie) || (inode != 0 && inode == socket.id.inode)
    };
    let row = listening.iter().find(is_it).ok_or_else(gone)?;
    let mut id: DiagId = row.header.socket_id.clone();
    // The kernel looks up as for a packet from the destination named, then compares the cookie. Among twins it
    // chooses by a hash of both ends: another far port leads to another twin.
    for far in 0..MAX_TRIES {
        id.destination_port = far;
        match link.acknowledged(&destroy_request(row.header.family, socket.proto, &id)) {
            Ok(()) => return Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT | libc::ESTALE) => {}
                Some(libc::EPERM | libc::EACCES) => {
                    return Err(error)
                        .with_context(|| format!("{}: that takes root (CAP_NET_ADMIN); try sudo", what()));
                }
                Some(libc::EOPNOTSUPP) => {
                    bail!("{}: this kernel was built without CONFIG_INET_DIAG_DESTROY; end its holder instead", what())
                }
                Some(libc::EINVAL) if socket.mptcp => {
                    bail!("{}: the kernel closes no MPTCP socket so; end its holder instead", what())
                }
                _ => return Err(error).with_context(what),
            },
        }
    }
    Err(gone())
}

fn destroy_request(family: u8, proto: Protocol, id: &DiagId) -> Vec<u8> {
    let mut request = inet_request(family, protocol_number(proto), StateFlags::empty());
    request.socket_id = id.clone();
    let mut bytes = encode(request);
    bytes[4..6].copy_from_slice(&SOCK_DESTROY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;
    use crate::source::diag;

    #[test]
    fn every_state_of_a_port_is_read_and_no_other_port() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut found = dump_ports(Protocol::Tcp, port..=port).unwrap();
        found.sort_by_key(|socket| socket.state);
        let shown: Vec<_> = found.iter().map(|s| (s.state, s.local, s.peer)).collect();
        let unspecified = SocketAddr::from(([0, 0, 0, 0], 0));
        assert_eq!(
            shown,
            [
                (State::Established, accepted.local_addr().unwrap(), client.local_addr().unwrap()),
                (State::Listen, listener.local_addr().unwrap(), unspecified),
            ]
        );
        // Found by 6.8 and later; the assertion is that nothing else is.
        let bound =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
        rustix::net::bind(&bound, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let endpoint = SocketAddr::try_from(rustix::net::getsockname(&bound).unwrap()).unwrap();
        let found = dump_ports(Protocol::Tcp, endpoint.port()..=endpoint.port()).unwrap();
        assert!(found.iter().all(|s| (s.state, s.local) == (State::BoundInactive, endpoint)), "{found:?}");
        let port = other.local_addr().unwrap().port();
        assert_eq!(dump_ports(Protocol::Tcp, port..=port).unwrap().len(), 1);
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.connect("127.0.0.1:9").unwrap();
        let port = udp.local_addr().unwrap().port();
        let found = dump_ports(Protocol::Udp, port..=port).unwrap();
        assert_eq!(
            found.iter().map(|s| (s.state, s.peer)).collect::<Vec<_>>(),
            [(State::Established, udp.peer_addr().unwrap())]
        );
    }

    #[test]
    fn a_listener_is_destroyed_and_only_the_one_meant() {
        let listeners: Vec<TcpListener> = (0..4).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let sockets: Vec<Socket> = listeners
            .iter()
            .map(|listener| {
                let endpoint = listener.local_addr().unwrap();
                diag::dump().unwrap().sockets.into_iter().find(|s| s.endpoint() == endpoint).unwrap()
            })
            .collect();
        let stale = Socket { id: SocketId { inode: 1, cookie: u64::MAX }, ..sockets[1].clone() };
        assert!(destroy(&stale).unwrap_err().to_string().ends_with("is gone already"));
        match destroy(&sockets[0]) {
            Ok(()) => {}
            Err(error) => return eprintln!("NOT TESTED: SOCK_DESTROY: {error:#}"),
        }
        assert_eq!(listeners[0].accept().unwrap_err().raw_os_error(), Some(libc::EINVAL));
        let left = diag::dump().unwrap().sockets;
        for (index, socket) in sockets.iter().enumerate() {
            assert_eq!(left.iter().any(|s| s.id == socket.id), index != 0, "{socket:?}");
        }
        assert!(destroy(&sockets[0]).unwrap_err().to_string().ends_with("is gone already"));
    }

    #[test]
    fn one_of_several_twins_is_destroyed() {
        use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket, sockopt};
        let mut endpoint = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut twins = Vec::new();
        for _ in 0..8 {
            let twin = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
            sockopt::set_socket_reuseport(&twin, true).unwrap();
            bind(&twin, &endpoint).unwrap();
            listen(&twin, 1).unwrap();
            endpoint = SocketAddr::try_from(getsockname(&twin).unwrap()).unwrap();
            twins.push(twin);
        }
        let all = || diag::dump().unwrap().sockets.into_iter().filter(|s| s.endpoint() == endpoint);
        let cookie = sockopt::socket_cookie(&twins[5]).unwrap();
        let socket = all().find(|s| s.id.cookie == cookie).unwrap();
        if let Err(error) = destroy(&socket) {
            return eprintln!("NOT TESTED: SOCK_DESTROY: {error:#}");
        }
        assert_eq!((all().count(), all().any(|s| s.id.cookie == cookie)), (7, false));
    }

    #[test]
    fn what_would_not_help_is_refused() {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let endpoint = udp.local_addr().unwrap();
        let socket = diag::dump().unwrap().sockets.into_iter().find(|s| s.endpoint() == endpoint).unwrap();
        assert!(destroy(&socket).unwrap_err().to_string().contains("UDP"));
    }
}
