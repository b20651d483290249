//! Asks the kernel whether a port can be bound, by binding it: the only answer that counts all that may be in the way
//! (connections, TIME_WAIT, sockets that are bound and do not listen).
//!
//! The socket never listens and is gone on return. For these microseconds another bind() of the port may fail: one of
//! TCP that does not set `SO_REUSEADDR`, any of UDP.

use std::fs::File;
use std::net::SocketAddr;

use nix::errno::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

use super::netns;
use crate::model::Protocol;

/// A bind() to be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bind {
    pub proto: Protocol,
    pub endpoint: SocketAddr,
    /// `SO_REUSEADDR`: for TCP, what servers set. For UDP it shares the port with others that set it.
    pub reuseaddr: bool,
    /// `IPV6_V6ONLY`, `None`: as the namespace has it (`net.ipv6.bindv6only`). `::` asks about IPv4 as well where it is
    /// off. Nothing to IPv4.
    pub v6only: Option<bool>,
}

impl Bind {
    /// As most TCP servers do it: with `SO_REUSEADDR`.
    pub fn server(endpoint: SocketAddr, v6only: Option<bool>) -> Bind {
        Bind { proto: Protocol::Tcp, endpoint, reuseaddr: true, v6only }
    }

    /// Why it fails in the calling thread's network namespace, at this moment; `None`: it succeeds.
    pub fn refusal(self) -> Option<Errno> {
        let Bind { proto, endpoint, reuseaddr, v6only } = self;
        let family = if endpoint.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let kind = if proto == Protocol::Tcp { SocketType::STREAM } else { SocketType::DGRAM };
        let call = || -> rustix::io::Result<()> {
            let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
            if reuseaddr {
                sockopt::set_socket_reuseaddr(&socket, true)?;
            }
            if let (Some(v6only), true) = (v6only, endpoint.is_ipv6()) {
                sockopt::set_ipv6_v6only(&socket, v6only)?;
            }
            bind(&socket, &endpoint)
        };
        call().err().map(|errno| Errno::from_raw(errno.raw_os_error()))
    }

    /// Whether it would be told that the address is in use, in this network namespace (`None`: the calling thread's).
    ///
    /// Any other refusal (a privileged port, an address that is not of this host, no IPv6, a namespace that may not be
    /// entered) says nothing about use, and is no: the port is then as free as its listeners tell.
    pub fn is_in_use(self, namespace: Option<&File>) -> bool {
        let refusal = match namespace {
            None => self.refusal(),
            Some(namespace) => netns::enter(namespace, || Ok(self.refusal())).unwrap_or(None),
        };
        refusal == Some(Errno::EADDRINUSE)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn server(address: &str, port: u16, v6only: Option<bool>) -> Bind {
        Bind::server(SocketAddr::new(address.parse().unwrap(), port), v6only)
    }

    /// Another test's child, forked while a socket was open, has it until it execs.
    fn comes_free(bind: Bind) {
        let until = Instant::now() + Duration::from_secs(10);
        while bind.is_in_use(None) {
            assert!(Instant::now() < until, "{bind:?} stays refused");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_port_is_in_use_until_a_bind_would_succeed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        for (address, v6only, expected) in [
            ("127.0.0.1", None, true),
            ("0.0.0.0", None, true),
            ("127.0.0.2", None, false),
            ("::", Some(true), false),
            ("::", Some(false), true),
            // Nobody's address: for documentation (RFC 5737).
            ("192.0.2.1", None, false),
        ] {
            let bind = server(address, port, v6only);
            // Without IPv6, `::` is refused, but not for use.
            let expected = expected && bind.refusal() != Some(Errno::EAFNOSUPPORT);
            assert_eq!(bind.is_in_use(None), expected, "{bind:?}");
        }
        assert_eq!(server("192.0.2.1", port, None).refusal(), Some(Errno::EADDRNOTAVAIL));
        drop(listener);
        comes_free(server("127.0.0.1", port, None));
    }

    #[test]
    fn it_counts_whether_both_sides_set_reuseaddr() {
        // std sets SO_REUSEADDR, and an accepted connection inherits it.
        for (reuseaddr, stays) in [(true, [true, false]), (false, [true, true])] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            sockopt::set_socket_reuseaddr(&listener, reuseaddr).unwrap();
            let address = listener.local_addr().unwrap();
            let client = TcpStream::connect(address).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            drop(listener);
            if !stays[1] {
                comes_free(Bind::server(address, None));
            }
            let [plain, reusing] =
                [false, true].map(|reuseaddr| Bind { reuseaddr, ..Bind::server(address, None) }.is_in_use(None));
            assert_eq!([plain, reusing], stays, "the server had SO_REUSEADDR: {reuseaddr}");
            // The client closes first, so its side is the one in TIME_WAIT, on another port.
            drop(client);
            drop(accepted);
            comes_free(Bind::server(address, None));
        }
    }

    #[test]
    fn udp_is_tried_as_udp() {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let tcp = Bind { reuseaddr: false, ..Bind::server(udp.local_addr().unwrap(), None) };
        assert_eq!(Bind { proto: Protocol::Udp, ..tcp }.refusal(), Some(Errno::EADDRINUSE));
    }

    #[test]
    fn another_namespace_has_ports_of_its_own() {
        let (ready, is_ready) = mpsc::channel();
        let (finish, finished) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
                ready.send(Err(errno)).unwrap();
                return;
            }
            // Nobody else is in there. The kernel gives ports from another range.
            let _listener = TcpListener::bind("0.0.0.0:8000").unwrap();
            ready.send(Ok(File::open("/proc/thread-self/ns/net").unwrap())).unwrap();
            let _ = finished.recv();
        });
        match is_ready.recv().unwrap() {
            Err(errno) => eprintln!("NOT TESTED: cannot make a network namespace: {errno}"),
            Ok(namespace) => {
                let there = server("0.0.0.0", 8000, None);
                assert!(there.is_in_use(Some(&namespace)));
                let listener = TcpListener::bind("0.0.0.0:0").unwrap();
                let here = Bind::server(listener.local_addr().unwrap(), None);
                assert!(here.is_in_use(None) && !here.is_in_use(Some(&namespace)));
                let no_namespace = tempfile::tempfile().unwrap();
                assert!(!there.is_in_use(Some(&no_namespace)));
            }
        }
        drop(finish);
        thread.join().unwrap();
    }
}
