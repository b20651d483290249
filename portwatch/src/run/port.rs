//! Which port a command is given: the one that was asked for, or the next one of a range that is free.
//!
//! Free is what a bind of one protocol succeeds on, as in [`crate::source::trial`]: of TCP unless UDP is asked for. Who has
//! the same port by the other protocol (QUIC beside a web server, mDNS) is in nobody's way. From the choice until the command listens, a lock on a
//! file named after the port keeps other runs of the same user from choosing it as well.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::errno::Errno;
use rustix::fs::{FlockOperation, flock};

use crate::model::Protocol;
use crate::source::trial::Bind;

/// `8000`, or `8000-8010`: any one of these; with `/tcp` or `/udp`, by that protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    pub first: u16,
    pub last: u16,
    /// As it was written.
    pub proto: Option<Protocol>,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
        let (numbers, proto) = match (text.strip_suffix("/tcp"), text.strip_suffix("/udp")) {
            (Some(numbers), _) => (numbers, Some(Protocol::Tcp)),
            (_, Some(numbers)) => (numbers, Some(Protocol::Udp)),
            (None, None) => (text, None),
        };
        let ends = match numbers.split_once('-') {
            None => port(numbers).map(|port| (port, port)),
            Some((first, last)) => port(first).zip(port(last)),
        };
        ends.filter(|(first, last)| first <= last)
            .map(|(first, last)| Ports { first, last, proto })
            .ok_or_else(|| "use a port such as 8000 or 5353/udp, or a range such as 8000-8010".to_owned())
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.first != self.last {
            write!(f, "-{}", self.last)?;
        }
        self.proto.map_or(Ok(()), |proto| write!(f, "/{proto}"))
    }
}

impl Ports {
    /// Where to look for a free one: a single port may `fall back` on those above it.
    pub fn candidates(self, fall_back: bool) -> RangeInclusive<u16> {
        if fall_back && self.first == self.last { self.first..=u16::MAX } else { self.first..=self.last }
    }

    /// By which it has to be free.
    pub fn protocol(self) -> Protocol {
        self.proto.unwrap_or(Protocol::Tcp)
    }

    /// One port of them.
    pub fn only(self, port: u16) -> Ports {
        Ports { first: port, last: port, ..self }
    }
}

/// A port that is ours to use. Keep it until the command listens.
#[derive(Debug)]
pub struct Claim {
    pub port: u16,
    /// `None`: there is no place for lock files.
    lock: Option<Lock>,
}

/// Why a port is not to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unclaimed {
    /// A bind fails.
    InUse,
    /// Another run has chosen it, and its command does not listen yet.
    Chosen,
}

impl Claim {
    /// Claims one port. `locks` is the directory of lock files.
    pub fn one(port: u16, proto: Protocol, locks: Option<&Path>) -> Result<Claim, Unclaimed> {
        let name = match proto {
            Protocol::Tcp => port.to_string(),
            Protocol::Udp => format!("{port}.udp"),
        };
        // Locked first: whoever let go of the lock may listen by now.
        let lock = match locks.map(|directory| Lock::take(directory.join(name))) {
            Some(Taken::ByOther) => return Err(Unclaimed::Chosen),
            Some(Taken::ByUs(lock)) => Some(lock),
            Some(Taken::NotAtAll) | None => None,
        };
        if refusal(port, proto) == Some(Errno::EADDRINUSE) {
            return Err(Unclaimed::InUse);
        }
        Ok(Claim { port, lock })
    }

    /// Claims the first of several that this user can bind.
    pub fn first_of(ports: RangeInclusive<u16>, proto: Protocol, locks: Option<&Path>) -> Option<Claim> {
        let is_allowed = |port: u16| ports.end() == ports.start() || refusal(port, proto) != Some(Errno::EACCES);
        ports.clone().filter(|port| is_allowed(*port)).find_map(|port| Claim::one(port, proto, locks).ok())
    }

    /// Whether other runs are kept from choosing it.
    pub fn is_locked(&self) -> bool {
        self.lock.is_some()
    }
}

/// On every address, IPv4 and IPv6: any listener on the port is in the way of one of them.
fn refusal(port: u16, proto: Protocol) -> Option<Errno> {
    let addresses: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    // With SO_REUSEADDR, one UDP socket would share the port with another.
    let reuseaddr = proto == Protocol::Tcp;
    let bind = |address| Bind { proto, reuseaddr, ..Bind::server(SocketAddr::new(address, port), Some(true)) };
    let refusals = addresses.map(|address| bind(address).refusal());
    let in_use = refusals.into_iter().flatten().find(|errno| *errno == Errno::EADDRINUSE);
    // The host may have no IPv6, but not no IPv4.
    in_use.or(refusals[0])
}

/// A locked file, which is removed when the lock is let go.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

enum Taken {
    ByUs(Lock),
    ByOther,
    /// No file can be made there.
    NotAtAll,
}

impl Lock {
    fn take(path: PathBuf) -> Taken {
        loop {
            let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
            let Ok(file) = file else { return Taken::NotAtAll };
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Taken::ByOther,
                Err(_) => return Taken::NotAtAll,
            }
            // Whoever had the lock removed its file: then this one is nobody's any more.
            let is_current =
                fs::metadata(&path).is_ok_and(|now| file.metadata().is_ok_and(|own| own.ino() == now.ino()));
            if is_current {
                return Taken::ByUs(Lock { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the descriptor is closed, so that nobody locks what is removed.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn ports_are_one_or_a_range() {
        for (text, want) in [
            ("8000", Some((8000, 8000, None))),
            ("8000-8010", Some((8000, 8010, None))),
            ("1-65535", Some((1, 65535, None))),
            ("8000/tcp", Some((8000, 8000, Some(Protocol::Tcp)))),
            ("53-5353/udp", Some((53, 5353, Some(Protocol::Udp)))),
            ("0", None),
            ("8010-8000", None),
            ("-8", None),
            ("8-", None),
            ("70000", None),
            ("web", None),
            ("8000,8001", None),
            ("8000/sctp", None),
            ("8000/", None),
            ("/udp", None),
            ("8000/udp/tcp", None),
        ] {
            let ports = text.parse::<Ports>().ok();
            assert_eq!(ports.map(|ports| (ports.first, ports.last, ports.proto)), want, "{text}");
            assert!(ports.is_none_or(|ports| ports.to_string() == text), "{text}");
        }
    }

    #[test]
    fn a_port_is_claimed_once() {
        let directory = tempfile::tempdir().unwrap();
        let locks = Some(directory.path());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let one = |port, locks| Claim::one(port, Protocol::Tcp, locks);
        assert_eq!(one(port, locks).unwrap_err(), Unclaimed::InUse);
        let next = Claim::first_of(port..=u16::MAX, Protocol::Tcp, locks).unwrap();
        assert!(next.port > port && next.is_locked());
        assert_eq!(one(next.port, locks).unwrap_err(), Unclaimed::Chosen);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        let chosen = next.port;
        drop(next);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        assert_eq!(one(chosen, Some(Path::new("/nonexistent"))).unwrap().port, chosen);
    }

    #[test]
    fn one_protocol_is_not_in_the_way_of_the_other() {
        let directory = tempfile::tempdir().unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = udp.local_addr().unwrap().port();
        let one = |proto| Claim::one(port, proto, Some(directory.path()));
        assert_eq!(one(Protocol::Udp).unwrap_err(), Unclaimed::InUse);
        // A client of somebody else's may have it by TCP: the kernel gives these ports to all.
        let tcp = one(Protocol::Tcp);
        assert!(tcp.is_ok() || TcpListener::bind(("0.0.0.0", port)).is_err(), "{tcp:?}");
        drop(udp);
        assert!(one(Protocol::Udp).is_ok_and(|claim| claim.is_locked()));
    }

    #[test]
    fn runs_at_once_choose_different_ports() {
        let directory = tempfile::tempdir().unwrap();
        let base = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ports = base.min(65000)..=u16::MAX;
        let chosen: Vec<Claim> = std::thread::scope(|scope| {
            let choose = || Claim::first_of(ports.clone(), Protocol::Tcp, Some(directory.path())).unwrap();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(choose)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let mut ports: Vec<u16> = chosen.iter().map(|claim| claim.port).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 8);
    }
}
