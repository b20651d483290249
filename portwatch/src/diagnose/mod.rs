//! Why a port is or stays taken, or would refuse a bind(), and the next command.
//!
//! [`read`] gathers [`Facts`] about some ports in the calling thread's network namespace: sockets of every state and
//! who holds them, where descriptors lie that no process holds, what the kernel itself serves, firewall rules, sysctls,
//! and last a real bind(). [`Facts::diagnose`] draws the conclusions: pure, so that each rule has its cases.
//!
//! What stands in the way of a bind(), tried on 6.18 (IPv4 TCP; the wildcard conflicts with every address):
//!
//! | on the port, without a listener | bind() | bind() with SO_REUSEADDR |
//! |---|---|---|
//! | connections that a server with SO_REUSEADDR accepted, in any state, TIME_WAIT too | EADDRINUSE | succeeds |
//! | the same, of a server that had not set it | EADDRINUSE | EADDRINUSE until they end |
//! | a client that the kernel gave the port | EADDRINUSE | EADDRINUSE |
//! | a client that bound the port with SO_REUSEADDR | EADDRINUSE | succeeds |
//! | a socket bound and not listening, with SO_REUSEADDR (without) | EADDRINUSE | succeeds (EADDRINUSE) |
//!
//! So it is the flag of the socket that left them which counts, and "TIME_WAIT is no matter with SO_REUSEADDR" is true
//! of servers alone that always set it.

mod bind;
mod facts;
pub mod firewall;
pub(crate) mod kernel;
mod rules;
pub(crate) mod stash;
pub(crate) mod sysctl;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

pub use self::bind::Trial;
pub use self::facts::{Attached, Extent, Facts, Published, read};
pub use self::kernel::Tunnel;
pub use self::stash::{Place, Stash};
pub use self::sysctl::Sysctls;
use crate::model::{NetnsId, Protocol};
use crate::source::{Scanner, netns};

/// The port that is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Question {
    pub port: u16,
    pub proto: Protocol,
    /// The address to bind; `None`: all addresses and loopback.
    pub address: Option<IpAddr>,
    /// Whether `::` is meant for IPv6 alone (`IPV6_V6ONLY`).
    pub v6only: bool,
}

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A listener that somebody visible holds.
    Held,
    /// A listener held by a process that the caller may not look into.
    OtherUser,
    /// A listener that no visible process holds: the kernel's own, in flight, in an io_uring.
    Ghost,
    /// A listener in another network namespace, which is in nobody's way here.
    OtherNamespace,
    /// Bound, and not listening.
    Bound,
    TimeWait,
    /// Connections from this port, in any other state.
    Connections,
    /// A container engine answers on the port.
    Published,
    /// A firewall rule or IPVS answers on the port.
    Dnat,
    /// The port takes a privilege that the caller lacks.
    Privileged,
    /// bind() is refused for another reason: no such address, a security policy, or none that can be seen.
    Refused,
    /// In `ip_local_reserved_ports`: never given to a client by chance.
    Reserved,
    /// In `ip_local_port_range`: given to clients by chance.
    Ephemeral,
}

impl Kind {
    /// Whether it stands in the way of a new server, rather than being good to know.
    pub fn is_obstacle(self) -> bool {
        !matches!(self, Kind::OtherNamespace | Kind::Reserved | Kind::Ephemeral)
    }

    /// Whether it says of somebody or something that it has the port.
    pub fn is_owner(self) -> bool {
        self.is_obstacle() && !matches!(self, Kind::Privileged | Kind::Refused)
    }

    /// The word of the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Held => "held",
            Kind::OtherUser => "other_user",
            Kind::Ghost => "ghost",
            Kind::OtherNamespace => "other_namespace",
            Kind::Bound => "bound",
            Kind::TimeWait => "time_wait",
            Kind::Connections => "connections",
            Kind::Published => "published",
            Kind::Dnat => "dnat",
            Kind::Privileged => "privileged",
            Kind::Refused => "refused",
            Kind::Reserved => "reserved",
            Kind::Ephemeral => "ephemeral",
        }
    }
}

/// One thing that was found, for people: not escaped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub kind: Kind,
    /// One sentence, without a full stop.
    pub message: String,
    /// What it is concluded from.
    pub evidence: String,
    /// The command to go on with, fit for a shell.
    pub next: Option<String>,
}

/// Everything found about one port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    pub port: u16,
    pub proto: Protocol,
    /// Whether a plain bind() (without SO_REUSEADDR) succeeded on every address tried; `None`: not tried.
    pub bindable: Option<bool>,
    pub bind: Vec<Trial>,
    pub findings: Vec<Finding>,
}

impl Diagnosis {
    /// Whether nothing stands in the way of a new server.
    pub fn is_free(&self) -> bool {
        self.bindable != Some(false) && !self.findings.iter().any(|finding| finding.kind.is_obstacle())
    }
}

/// The findings about one port in a network namespace, without firewall and bind(): a few readings of /proc and
/// netlink (tens of milliseconds), for the explanation of a kill that failed.
///
/// # Errors
/// When the namespace cannot be entered or its listeners cannot be read.
pub fn findings(port: u16, proto: Protocol, namespace: NetnsId, scanner: &mut Scanner) -> anyhow::Result<Vec<Finding>> {
    let question = Question { port, proto, address: None, v6only: false };
    let mut look = || {
        let facts = read(&[question], scanner, Extent::Sockets)?;
        Ok(facts.diagnose(question).findings)
    };
    if netns::own()? == namespace { look() } else { netns::enter(&netns::open(namespace)?, look) }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::source::Probe;

    #[test]
    fn a_listener_of_this_process_is_found_without_bind_and_firewall() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let own = netns::own().unwrap();
        let mut scanner = Scanner::open(Probe::Auto);
        let found = findings(port, Protocol::Tcp, own, &mut scanner).unwrap();
        assert_eq!(found[0].kind, Kind::Held);
        assert!(found[0].message.contains(&std::process::id().to_string()), "{found:?}");
        assert!(findings(port, Protocol::Tcp, 1, &mut scanner).is_err());
    }
}
