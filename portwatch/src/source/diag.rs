//! Reads which sockets listen in the calling thread's network namespace: `sock_diag` over netlink, and
//! `/proc/net/{tcp,tcp6,udp,udp6}` where netlink is refused. Owns the requests, their parsing and that choice; who
//! holds the sockets is not its business.
//!
//! "Listens" is TCP in LISTEN, filtered in the kernel. UDP has no such state: what is read is every unconnected socket
//! with a port, whether it was bound explicitly or took its port at its first send. This tier cannot tell them apart.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;

use anyhow::Context;
use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla as _, NlasIterator,
};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_RAW, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId as DiagId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket as Netlink, SocketAddr as NetlinkAddr};
use nix::libc;
use procfs::FromBufReadSI;
use procfs::net::{TcpNetEntries, TcpState, UdpNetEntries, UdpState};

use crate::model::{NetnsId, Protocol, Socket, SocketId};
use crate::source::netns;

pub(crate) mod port;

pub(super) use port::port_request;
pub use port::{PortSocket, State, destroy, dump_ports};

/// Every listening socket of one network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dump {
    pub netns: NetnsId,
    pub sockets: Vec<Socket>,
    /// Why netlink did not serve and `/proc/net` was read instead, as a sentence. Those rows have no cookie (0), no
    /// backlog, and `v6only` and `mptcp` are not known.
    pub fallback: Option<String>,
}

/// Reads every listening socket of the calling thread's network namespace, each once.
///
/// # Errors
/// When neither netlink nor `/proc/net` can be read.
pub fn dump() -> anyhow::Result<Dump> {
    dump_as(true)
}

/// The same for those who only ask which sockets there are: that one is an MPTCP socket may be left out. To know that takes
/// longer than all the rest.
///
/// # Errors
/// As [`dump`].
pub fn dump_roughly() -> anyhow::Result<Dump> {
    dump_as(false)
}

fn dump_as(with_mptcp: bool) -> anyhow::Result<Dump> {
    let netns = netns::own().context("cannot read /proc/thread-self/ns/net; is /proc mounted?")?;
    let mut dump = Dump { netns, ..Dump::default() };
    for proto in [Protocol::Tcp, Protocol::Udp] {
        match dump_netlink(proto, netns, with_mptcp) {
            Ok(sockets) => dump.sockets.extend(sockets),
            Err(error) => {
                let rows = dump_proc_net(proto, netns)
                    .with_context(|| format!("cannot list {proto} sockets: sock_diag: {error}"))?;
                dump.sockets.extend(rows);
                dump.fallback = Some(format!("cannot list {proto} sockets by sock_diag: {error}; reading /proc/net"));
            }
        }
    }
    Ok(dump)
}

/// The UDP sockets alone, where netlink serves.
///
/// # Errors
/// When netlink is refused.
pub(super) fn dump_udp(netns: NetnsId) -> io::Result<Vec<Socket>> {
    dump_netlink(Protocol::Udp, netns, false)
}

/// How often a dump that the kernel calls inconsistent is read again.
const ATTEMPTS: usize = 4;

/// One message of a dump: the kernel fills at most 32 KiB.
const BUFFER_BYTES: usize = 64 * 1024;

/// Receive buffer wanted, in bytes: room for a few messages while one is parsed.
const SOCKET_BUFFER_BYTES: usize = 1024 * 1024;

/// More sockets than one namespace can have ports for: past this, something other than the kernel answers.
const MAX_SOCKETS: usize = 4 * 1024 * 1024;

/// `INET_DIAG_REQ_PROTOCOL` (linux/inet_diag.h): a request attribute for protocols past 255.
const INET_DIAG_REQ_PROTOCOL: u16 = 3;
/// `INET_DIAG_ULP_INFO` and within it `INET_ULP_INFO_NAME` (linux/inet_diag.h): the upper layer protocol.
const INET_DIAG_ULP_INFO: u16 = 19;
const INET_ULP_INFO_NAME: u16 = 1;
/// `NLA_TYPE_MASK` (linux/netlink.h): an attribute's type without its flags.
const NLA_TYPE_MASK: u16 = 0x3fff;

const NETLINK_HEADER_BYTES: usize = 16;

fn dump_netlink(proto: Protocol, netns: NetnsId, with_mptcp: bool) -> io::Result<Vec<Socket>> {
    let mut link = Link::open()?;
    let mut sockets: Vec<Socket> = Vec::new();
    let mut seen: HashSet<u64> = HashSet::new();
    for family in [AF_INET, AF_INET6] {
        for row in link.dump(&request(family, proto))? {
            // A dump walks hash chains in several reads; a chain that changes between two can show a socket twice.
            if let Some(socket) = socket_of(&row, proto, netns)
                && (socket.id.cookie == 0 || seen.insert(socket.id.cookie))
            {
                sockets.push(socket);
            }
        }
    }
    // Kernels before 6.15 or so name the upper layer protocol to CAP_NET_ADMIN only: where no row named one, ask for
    // MPTCP's own sockets. Kernels without that dump refuse or answer nothing, and MPTCP stays unknown.
    let is_silent = !sockets.is_empty() && !sockets.iter().any(|s| s.mptcp);
    if with_mptcp && proto == Protocol::Tcp && is_silent {
        let mut mptcp_inodes: HashSet<u32> = HashSet::new();
        for family in [AF_INET, AF_INET6] {
            let Ok(rows) = link.dump(&mptcp_request(family)) else { break };
            mptcp_inodes.extend(rows.iter().map(|row| row.header.inode).filter(|&inode| inode != 0));
        }
        for socket in &mut sockets {
            socket.mptcp = u32::try_from(socket.id.inode).is_ok_and(|inode| mptcp_inodes.contains(&inode));
        }
    }
    Ok(sockets)
}

fn protocol_number(proto: Protocol) -> u8 {
    match proto {
        Protocol::Tcp => IPPROTO_TCP,
        Protocol::Udp => IPPROTO_UDP,
    }
}

fn inet_request(family: u8, protocol: u8, states: StateFlags) -> InetRequest {
    let socket_id = if family == AF_INET { DiagId::new_v4() } else { DiagId::new_v6() };
    InetRequest { family, protocol, extensions: ExtensionFlags::empty(), states, socket_id }
}

fn request(family: u8, proto: Protocol) -> Vec<u8> {
    encode(match proto {
        Protocol::Tcp => inet_request(family, IPPROTO_TCP, StateFlags::LISTEN),
        Protocol::Udp => inet_request(family, IPPROTO_UDP, StateFlags::CLOSE),
    })
}

/// MPTCP is protocol 262: it does not fit the request and goes into an attribute. A kernel that does not know the
/// attribute looks at the request, which therefore names raw sockets: those never listen.
fn mptcp_request(family: u8) -> Vec<u8> {
    let request = encode(inet_request(family, IPPROTO_RAW, StateFlags::LISTEN));
    with_attribute(request, INET_DIAG_REQ_PROTOCOL, &libc::IPPROTO_MPTCP.to_ne_bytes())
}

/// The request with an attribute, whose value must be a multiple of four bytes and short.
fn with_attribute(mut bytes: Vec<u8>, kind: u16, value: &[u8]) -> Vec<u8> {
    bytes.extend(u16::try_from(4 + value.len()).unwrap_or(u16::MAX).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

fn encode(request: InetRequest) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// A netlink socket in the calling thread's network namespace.
pub(super) struct Link {
    socket: Netlink,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Link {
    pub(super) fn open() -> io::Result<Self> {
        let socket = Netlink::new(NETLINK_SOCK_DIAG)?;
        // A hint: a refusal only means more, smaller reads.
        let _ = socket.set_rx_buf_sz(libc::c_int::try_from(SOCKET_BUFFER_BYTES).unwrap_or(libc::c_int::MAX));
        socket.connect(&NetlinkAddr::new(0, 0))?;
        Ok(Link { socket, buffer: vec![0; BUFFER_BYTES], sequence: 0 })
    }

    /// Sends one dump request and reads its whole answer, again where the kernel says that it changed meanwhile.
    pub(super) fn dump(&mut self, request: &[u8]) -> io::Result<Vec<InetResponse>> {
        for _ in 0..ATTEMPTS {
            let mut rows = Vec::new();
            if self.dump_once(request, &mut rows)? {
                return Ok(rows);
            }
        }
        Err(io::Error::other(format!("the dump was interrupted {ATTEMPTS} times")))
    }

    /// Sends one request that the kernel answers with an acknowledgement or an error.
    fn acknowledged(&mut self, request: &[u8]) -> io::Result<()> {
        self.dump_once(request, &mut Vec::new()).map(drop)
    }

    /// `Ok(false)`: the kernel marked the answer as inconsistent.
    fn dump_once(&mut self, request: &[u8], rows: &mut Vec<InetResponse>) -> io::Result<bool> {
        self.sequence += 1;
        let mut request = request.to_vec();
        request[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        retry_interrupted(|| self.socket.send(&request, 0))?;
        let mut consistent = true;
        loop {
            // The kernel queues the next part before it hands out this one, so a dump never blocks: an empty queue is
            // an error (EAGAIN) and not something to wait for.
            let received = retry_interrupted(|| {
                self.socket.recv(&mut &mut self.buffer[..], libc::MSG_TRUNC | libc::MSG_DONTWAIT)
            })?;
            if received > self.buffer.len() {
                return Err(io::Error::other(format!("a message of {received} bytes was cut")));
            }
            if read_messages(&self.buffer[..received], self.sequence, rows, &mut consistent)? {
                return Ok(consistent);
            }
        }
    }
}

pub(super) fn retry_interrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Reads the messages of one datagram; `Ok(true)` once the dump is done.
pub(crate) fn read_messages(
    mut datagram: &[u8],
    sequence: u32,
    rows: &mut Vec<InetResponse>,
    consistent: &mut bool,
) -> io::Result<bool> {
    while datagram.len() >= NETLINK_HEADER_BYTES {
        let message: NetlinkMessage<SockDiagMessage> =
            NetlinkMessage::deserialize(datagram).map_err(|error| io::Error::other(error.to_string()))?;
        let length = (message.header.length as usize).max(NETLINK_HEADER_BYTES).next_multiple_of(4);
        datagram = &datagram[length.min(datagram.len())..];
        if message.header.sequence_number != sequence {
            continue; // The rest of an earlier dump that ended in an error.
        }
        *consistent &= message.header.flags & NLM_F_DUMP_INTR == 0;
        match message.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(row)) => rows.push(*row),
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(refusal(error.raw_code())),
            NetlinkPayload::Done(done) if done.code < 0 => return Err(refusal(done.code)),
            NetlinkPayload::Done(_) | NetlinkPayload::Error(_) => return Ok(true),
            NetlinkPayload::Overrun(_) => *consistent = false,
            _ => {}
        }
        if rows.len() > MAX_SOCKETS {
            return Err(io::Error::other(format!("more than {MAX_SOCKETS} sockets were answered")));
        }
    }
    Ok(false)
}

/// The kernel tells an errno as a negative number. (The library's own conversion overflows on the least of all.)
pub(crate) fn refusal(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code.saturating_abs())
}

/// `None` for a socket without port.
pub(crate) fn socket_of(row: &InetResponse, proto: Protocol, netns: NetnsId) -> Option<Socket> {
    let header = &row.header;
    let id = &header.socket_id;
    if id.source_port == 0 {
        return None;
    }
    let v6only = row.nlas.iter().find_map(|nla| match nla {
        Nla::SkV6Only(v6only) => Some(*v6only),
        _ => None,
    });
    Some(Socket {
        id: SocketId { inode: header.inode.into(), cookie: cookie_of(id.cookie) },
        proto,
        mptcp: row.nlas.iter().any(is_mptcp),
        address: id.source_address,
        port: id.source_port,
        v6only,
        netns,
        uid: header.uid,
        // For a socket that listens, the send queue field is the limit of its accept queue.
        backlog: (proto == Protocol::Tcp).then_some(header.send_queue),
    })
}

/// Two words in host order, the low one first: `SO_COOKIE`.
fn cookie_of([a, b, c, d, e, f, g, h]: [u8; 8]) -> u64 {
    u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32
}

fn is_mptcp(nla: &Nla) -> bool {
    let Nla::Other(ulp) = nla else { return false };
    if ulp.kind() & NLA_TYPE_MASK != INET_DIAG_ULP_INFO {
        return false;
    }
    let mut value = vec![0; ulp.value_len()];
    ulp.emit_value(&mut value);
    NlasIterator::new(&value[..])
        .map_while(Result::ok)
        .any(|inner| inner.kind() == INET_ULP_INFO_NAME && inner.value().starts_with(b"mptcp"))
}

/// `/proc/net` of the calling thread (`/proc/net` itself is that of the main thread).
fn dump_proc_net(proto: Protocol, netns: NetnsId) -> anyhow::Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for (suffix, required) in [("", true), ("6", false)] {
        let path = format!("/proc/thread-self/net/{proto}{suffix}");
        let file = match std::fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => continue, // No IPv6 here.
            Err(error) => return Err(error).with_context(|| format!("cannot open {path}")),
        };
        let rows = parse_proc_net(io::BufReader::new(file), proto).with_context(|| format!("cannot read {path}"))?;
        // As in a netlink dump, a socket can show twice while others come and go.
        let mut seen: HashSet<u64> = HashSet::new();
        let rows = rows.into_iter().filter(|&(_, _, inode)| inode == 0 || seen.insert(inode));
        sockets.extend(rows.map(|(endpoint, uid, inode)| Socket {
            id: SocketId { inode, cookie: 0 },
            proto,
            mptcp: false,
            address: endpoint.ip(),
            port: endpoint.port(),
            v6only: None,
            netns,
            uid,
            backlog: None,
        }));
    }
    Ok(sockets)
}

/// Address, uid and inode of the rows that listen.
pub(crate) fn parse_proc_net(table: impl io::BufRead, proto: Protocol) -> anyhow::Result<Vec<(SocketAddr, u32, u64)>> {
    let system = procfs::current_system_info();
    let mut rows: Vec<(SocketAddr, u32, u64)> = match proto {
        Protocol::Tcp => TcpNetEntries::from_buf_read(table, system)?
            .0
            .into_iter()
            .filter(|row| row.state == TcpState::Listen)
            .map(|row| (row.local_address, row.uid, row.inode))
            .collect(),
        Protocol::Udp => UdpNetEntries::from_buf_read(table, system)?
            .0
            .into_iter()
            .filter(|row| row.state == UdpState::Close)
            .map(|row| (row.local_address, row.uid, row.inode))
            .collect(),
    };
    rows.retain(|(endpoint, _, _)| endpoint.port() != 0);
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};

    use super::*;

    fn find(sockets: &[Socket], proto: Protocol, endpoint: SocketAddr) -> Vec<Socket> {
        sockets.iter().filter(|s| s.proto == proto && s.endpoint() == endpoint).cloned().collect()
    }

    #[test]
    fn netlink_and_proc_net_show_the_same_listeners() {
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let v6 = TcpListener::bind("[::1]:0").unwrap();
        let dual = TcpListener::bind("[::]:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect(udp.local_addr().unwrap()).unwrap();
        let client = TcpStream::connect(v4.local_addr().unwrap()).unwrap();

        let dump = dump().unwrap();
        assert_eq!(dump.fallback, None);
        assert_eq!(dump.netns, netns::own().unwrap());
        for (proto, endpoint, v6only) in [
            (Protocol::Tcp, v4.local_addr().unwrap(), None),
            // The kernel sets it on whatever is bound to an address that is IPv6 alone.
            (Protocol::Tcp, v6.local_addr().unwrap(), Some(true)),
            (Protocol::Tcp, dual.local_addr().unwrap(), Some(false)),
            (Protocol::Udp, udp.local_addr().unwrap(), None),
        ] {
            let found = find(&dump.sockets, proto, endpoint);
            assert_eq!(found.len(), 1, "{proto} {endpoint}: {found:?}");
            let socket = &found[0];
            assert!(socket.id.inode != 0 && socket.id.cookie != 0, "{socket:?}");
            assert_eq!(socket.v6only, v6only, "{endpoint}");
            assert_eq!(socket.uid, nix::unistd::geteuid().as_raw());
            assert_eq!(socket.backlog.is_some(), proto == Protocol::Tcp);

            let by_proc = find(&dump_proc_net(proto, dump.netns).unwrap(), proto, endpoint);
            let mut expected = socket.clone();
            (expected.id.cookie, expected.backlog, expected.v6only) = (0, None, None);
            assert_eq!(by_proc, [expected]);
        }
        assert_eq!(find(&dump.sockets, Protocol::Tcp, client.local_addr().unwrap()), []);
        assert_eq!(find(&dump.sockets, Protocol::Udp, connected.local_addr().unwrap()), []);
    }

    #[test]
    fn an_mptcp_listener_is_marked() {
        // SAFETY: plain system call; the descriptor is owned by the TcpListener made of it.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_MPTCP) };
        if fd < 0 {
            eprintln!("NOT TESTED: no MPTCP in this kernel: {}", io::Error::last_os_error());
            return;
        }
        // SAFETY: `fd` was just made and nothing else owns it.
        let listener = unsafe { <TcpListener as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        // SAFETY: plain system call on an owned descriptor; it binds to a port given by the kernel.
        assert_eq!(unsafe { libc::listen(fd, 7) }, 0);
        let plain = TcpListener::bind("127.0.0.1:0").unwrap();
        let dump = dump().unwrap();
        let found = find(&dump.sockets, Protocol::Tcp, listener.local_addr().unwrap());
        assert_eq!(found.iter().map(|s| (s.mptcp, s.backlog)).collect::<Vec<_>>(), [(true, Some(7))]);
        assert!(!find(&dump.sockets, Protocol::Tcp, plain.local_addr().unwrap())[0].mptcp);

        let mut link = Link::open().unwrap();
        let own_rows = link.dump(&mptcp_request(AF_INET)).unwrap();
        assert!(own_rows.iter().any(|row| u64::from(row.header.inode) == found[0].id.inode));
    }

    #[test]
    fn a_dump_of_thousands_is_whole() {
        let listeners: Vec<TcpListener> = (0..800).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let dump = dump().unwrap();
        for listener in &listeners {
            let endpoint = listener.local_addr().unwrap();
            assert_eq!(find(&dump.sockets, Protocol::Tcp, endpoint).len(), 1, "{endpoint}");
        }
    }

    #[test]
    fn proc_net_rows_are_parsed() {
        let header =
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let row = |local: &str, state: &str| {
            format!(
                "   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000  1000        0 99 1 0 100\n"
            )
        };
        let v6 = "00000000000000000000000001000000:1F90";
        for (proto, rows, expect) in [
            (Protocol::Tcp, String::new(), vec![]),
            (Protocol::Tcp, row("0100007F:1F90", "0A"), vec!["127.0.0.1:8080"]),
            (Protocol::Tcp, row("0100007F:1F90", "01") + &row("00000000:0050", "0A"), vec!["0.0.0.0:80"]),
            (Protocol::Tcp, row("0100007F:0000", "0A"), vec![]),
            (Protocol::Udp, row("0100007F:14E9", "07") + &row("0100007F:14EA", "01"), vec!["127.0.0.1:5353"]),
        ] {
            if cfg!(target_endian = "big") {
                continue; // The table has addresses in host order.
            }
            let rows = parse_proc_net((header.to_owned() + &rows).as_bytes(), proto).unwrap();
            let shown: Vec<String> = rows.iter().map(|(endpoint, _, _)| endpoint.to_string()).collect();
            assert_eq!(shown, expect);
            assert!(rows.iter().all(|&(_, uid, inode)| (uid, inode) == (1000, 99)));
        }
        let v6_row = row(v6, "0A").replace("00000000:0000 ", &format!("{}:0000 ", "0".repeat(32)));
        let rows = parse_proc_net((header.to_owned() + &v6_row).as_bytes(), Protocol::Tcp).unwrap();
        assert_eq!(rows[0].0, SocketAddr::from((Ipv6Addr::LOCALHOST, 8080)));
        assert!(parse_proc_net((header.to_owned() + "   0: nonsense\n").as_bytes(), Protocol::Tcp).is_err());
    }

    #[test]
    fn refusals_and_broken_answers_are_errors() {
        let error = |code: i32| {
            let mut bytes = vec![0; 36];
            bytes[..4].copy_from_slice(&36u32.to_ne_bytes());
            bytes[4..6].copy_from_slice(&2u16.to_ne_bytes()); // NLMSG_ERROR
            bytes[8..12].copy_from_slice(&1u32.to_ne_bytes());
            bytes[16..20].copy_from_slice(&code.to_ne_bytes());
            bytes
        };
        let read = |bytes: &[u8]| read_messages(bytes, 1, &mut Vec::new(), &mut true);
        assert_eq!(read(&error(-libc::EPERM)).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(read(&error(i32::MIN)).unwrap_err().raw_os_error(), Some(i32::MAX));
        assert!(read(&error(0)).unwrap(), "an acknowledgement ends the answer");
        let mut cut = error(0);
        cut[..4].copy_from_slice(&400u32.to_ne_bytes());
        read(&cut).unwrap_err();
        cut[..4].copy_from_slice(&0u32.to_ne_bytes());
        read(&cut).unwrap_err();
        assert!(!read(&[]).unwrap());
        assert_eq!(cookie_of([1, 0, 0, 0, 2, 0, 0, 0]), 0x2_0000_0001, "on a little-endian machine");
    }
}
