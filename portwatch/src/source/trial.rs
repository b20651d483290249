//! Asks the kernel whether a TCP port can be bound, by binding it: the only answer that counts all that may be in the
//! way (connections, TIME_WAIT, sockets that are bound and do not listen).

use std::net::{IpAddr, SocketAddr};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

/// Whether a new server, which sets `SO_REUSEADDR` as servers do, would be told that the address is in use: in the
/// network namespace of the calling thread, at this moment.
///
/// Any other refusal (a privileged port, an address that is not of this host, no IPv6) says nothing about use, and is
/// no: the port is then as free as its listeners tell. The socket never listens and is gone on return, so it can only
/// be in the way of a server that does not set `SO_REUSEADDR` and binds within these microseconds.
pub fn is_in_use(address: IpAddr, port: u16) -> bool {
    let attempt = || -> Result<(), Errno> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        if address.is_ipv6() {
            // Else `::` would ask about IPv4 as well.
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        bind(&socket, &SocketAddr::new(address, port))
    };
    attempt() == Err(Errno::ADDRINUSE)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_port_is_in_use_until_a_bind_would_succeed() {
        let localhost = IpAddr::from(Ipv4Addr::LOCALHOST);
        let listener = TcpListener::bind((localhost, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(is_in_use(localhost, port));
        assert!(is_in_use(Ipv4Addr::UNSPECIFIED.into(), port));
        assert!(!is_in_use(Ipv4Addr::new(127, 0, 0, 2).into(), port));
        assert!(!is_in_use(Ipv6Addr::UNSPECIFIED.into(), port));
        drop(listener);
        assert!(!is_in_use(localhost, port));
    }

    #[test]
    fn connections_of_a_server_without_reuseaddr_keep_its_port() {
        let localhost = IpAddr::from(Ipv4Addr::LOCALHOST);
        // std sets SO_REUSEADDR, and an accepted connection inherits it.
        let listener = TcpListener::bind((localhost, 0)).unwrap();
        sockopt::set_socket_reuseaddr(&listener, false).unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        drop(listener);
        assert!(is_in_use(localhost, address.port()));
        // The client closes first, so its side is the one in TIME_WAIT, on another port.
        drop(client);
        drop(server);
        assert!(!is_in_use(localhost, address.port()));
    }

    #[test]
    fn another_refusal_is_not_use() {
        // 192.0.2.0/24 is for documentation (RFC 5737): nobody's address.
        assert!(!is_in_use(Ipv4Addr::new(192, 0, 2, 1).into(), 8000));
    }
}
