//! Sockets of the kernel's own: network devices that receive on a UDP port, and kernel threads that serve one.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoBareUdp, InfoData, InfoGeneve, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;

use crate::model::Protocol;
use crate::source::{diag, stat};

/// A network device that receives on a UDP port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    pub device: String,
    /// `vxlan`, `geneve` …
    pub kind: String,
    /// `None`: this kind does not tell it to rtnetlink (WireGuard).
    pub port: Option<u16>,
}

/// A kernel thread and the port that it is known to serve.
pub(super) struct Service {
    /// How the thread's name begins.
    thread: &'static str,
    ports: &'static [(u16, Protocol)],
    pub(super) what: &'static str,
    pub(super) next: &'static str,
}

const SERVICES: &[Service] = &[
    Service {
        thread: "nfsd",
        ports: &[(2049, Protocol::Tcp), (2049, Protocol::Udp)],
        what: "the NFS server",
        next: "systemctl stop nfs-server",
    },
    Service {
        thread: "ksmbd",
        ports: &[(445, Protocol::Tcp)],
        what: "the SMB server ksmbd",
        next: "ksmbd.control --shutdown",
    },
    Service {
        thread: "nvmet",
        ports: &[(4420, Protocol::Tcp), (8009, Protocol::Tcp)],
        what: "an NVMe target",
        next: "nvmetcli clear",
    },
    Service {
        thread: "iscsi_np",
        ports: &[(3260, Protocol::Tcp)],
        what: "the iSCSI target",
        next: "targetcli clearconfig confirm=True",
    },
    Service {
        thread: "dlm_",
        ports: &[(21064, Protocol::Tcp)],
        what: "the lock manager DLM",
        next: "systemctl stop dlm",
    },
    Service { thread: "krxrpc", ports: &[(7001, Protocol::Udp)], what: "the AFS client", next: "umount -a -t afs" },
];

/// The service of a kernel thread that runs and is known to serve the port.
pub(super) fn service(port: u16, proto: Protocol, threads: &[String]) -> Option<(&'static Service, &str)> {
    let serves = SERVICES.iter().filter(|service| service.ports.contains(&(port, proto)));
    serves.into_iter().find_map(|service| {
        let thread = threads.iter().find(|name| name.starts_with(service.thread))?;
        Some((service, thread.as_str()))
    })
}

/// The names of the kernel threads that are to be seen.
pub(super) fn threads() -> Vec<String> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().map_while(Result::ok);
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| stat::read(pid).ok()).filter(|stat| stat.kernel_thread).map(|stat| stat.name).collect()
}

/// The kernel fills at most this much into one message of a dump.
const BUFFER_BYTES: usize = 64 * 1024;

/// The devices of the calling thread's network namespace that receive on a UDP port.
///
/// # Errors
/// Where rtnetlink is refused.
pub(super) fn tunnels() -> io::Result<Vec<Tunnel>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_DUMP | NLM_F_REQUEST;
    let mut request = NetlinkMessage::new(header, RouteNetlinkMessage::GetLink(LinkMessage::default()).into());
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut tunnels = Vec::new();
    loop {
        // The kernel answers a dump before it returns from send(), and queues what follows as it hands out a part.
        let length = socket.recv(&mut &mut buffer[..], libc::MSG_DONTWAIT)?;
        if read_links(&buffer[..length], &mut tunnels)? {
            return Ok(tunnels);
        }
    }
}

/// Reads the messages of one datagram; `Ok(true)` once the dump is done.
pub(crate) fn read_links(mut datagram: &[u8], tunnels: &mut Vec<Tunnel>) -> io::Result<bool> {
    while datagram.len() >= 16 {
        let message: NetlinkMessage<RouteNetlinkMessage> =
            NetlinkMessage::deserialize(datagram).map_err(|error| io::Error::other(error.to_string()))?;
        datagram = &datagram[(message.header.length as usize).max(16).next_multiple_of(4).min(datagram.len())..];
        match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => tunnels.extend(tunnel(&link)),
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) => return Err(diag::refusal(error.raw_code())),
            _ => {}
        }
    }
    Ok(false)
}

fn tunnel(link: &LinkMessage) -> Option<Tunnel> {
    let mut device = None;
    let mut found = None;
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device = Some(name.clone()),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(InfoKind::Wireguard) => found = Some(("wireguard", None)),
                        LinkInfo::Data(data) => found = udp_port(data).map(|(kind, port)| (kind, Some(port))).or(found),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let (kind, port) = found?;
    Some(Tunnel { device: device?, kind: kind.to_owned(), port })
}

fn udp_port(data: &InfoData) -> Option<(&'static str, u16)> {
    match data {
        InfoData::Vxlan(infos) => infos.iter().find_map(|info| match info {
            InfoVxlan::Port(port) => Some(("vxlan", *port)),
            _ => None,
        }),
        InfoData::Geneve(infos) => infos.iter().find_map(|info| match info {
            InfoGeneve::Port(port) => Some(("geneve", *port)),
            _ => None,
        }),
        InfoData::BareUdp(infos) => infos.iter().find_map(|info| match info {
            InfoBareUdp::Port(port) => Some(("bareudp", *port)),
            _ => None,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_read() {
        tunnels().unwrap();
    }

    #[test]
    fn a_service_needs_its_thread_and_its_port() {
        let threads = ["kthreadd", "nfsd"].map(str::to_owned);
        let what = |port, proto| service(port, proto, &threads).map(|(service, thread)| (service.what, thread));
        assert_eq!(what(2049, Protocol::Tcp), Some(("the NFS server", "nfsd")));
        assert_eq!(what(445, Protocol::Tcp), None);
        assert_eq!(what(2050, Protocol::Tcp), None);
    }
}
