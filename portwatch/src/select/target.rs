//! Targets as people type them: `8000`, `3000-3005/tcp`, `[::1]:8000`, `@dev`.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use crate::model::{Protocol, Socket};

/// One part of a TARGET: ports, perhaps of one protocol only, perhaps as served on one address only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Never empty, never with port 0.
    pub ports: RangeInclusive<u16>,
    pub proto: Option<Protocol>,
    /// Listeners that serve this address are meant, those bound to all addresses included.
    pub address: Option<IpAddr>,
}

impl Target {
    /// Whether the socket is one of those meant.
    pub fn covers(&self, socket: &Socket) -> bool {
        self.ports.contains(&socket.port)
            && self.proto.is_none_or(|proto| proto == socket.proto)
            && self.address.is_none_or(|address| socket.serves(address))
    }

    /// What is left of it without the ports of `other`: at most a piece below, one above, and those of the other protocol.
    fn minus(self, other: &Target) -> Vec<Target> {
        let overlaps = self.ports.start() <= other.ports.end() && other.ports.start() <= self.ports.end();
        let same_place = other.address.is_none() || other.address == self.address;
        let same_proto = other.proto.is_none() || self.proto.is_none() || other.proto == self.proto;
        if !(overlaps && same_place && same_proto) {
            return vec![self];
        }
        let (first, last) = (*self.ports.start(), *self.ports.end());
        let (from, to) = (first.max(*other.ports.start()), last.min(*other.ports.end()));
        let piece = |ports, proto| Target { ports, proto, address: self.address };
        let mut left = Vec::new();
        if first < from {
            left.push(piece(first..=from - 1, self.proto));
        }
        match (self.proto, other.proto) {
            (None, Some(Protocol::Tcp)) => left.push(piece(from..=to, Some(Protocol::Udp))),
            (None, Some(Protocol::Udp)) => left.push(piece(from..=to, Some(Protocol::Tcp))),
            _ => {}
        }
        if to < last {
            left.push(piece(to + 1..=last, self.proto));
        }
        left
    }
}

/// The targets without the ports of `except`, as far as whole ports are left out: of one that is left out on one address
/// only, the rest is still meant.
pub fn without(targets: Vec<Target>, except: &[Target]) -> Vec<Target> {
    except.iter().fold(targets, |targets, other| targets.into_iter().flat_map(|target| target.minus(other)).collect())
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            None => {}
        }
        write!(f, "{}", self.ports.start())?;
        if self.ports.end() != self.ports.start() {
            write!(f, "-{}", self.ports.end())?;
        }
        match self.proto {
            Some(proto) => write!(f, "/{proto}"),
            None => Ok(()),
        }
    }
}

/// The named sets that `@name` stands for.
pub type Sets = BTreeMap<String, Vec<Target>>;

/// The sets that exist without a configuration: `@dev`.
pub fn builtin_sets() -> Sets {
    let dev = [3000, 8000, 8080].map(|port| Target { ports: port..=port, proto: None, address: None });
    Sets::from([("dev".to_owned(), dev.to_vec())])
}

/// A target that means nothing, as a sentence that names the bad part and what would be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadTarget(String);

impl fmt::Display for BadTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadTarget {}

/// Reads every word. A comma separates whole targets: `127.0.0.1:3000,8080` is port 3000 on that address, and port
/// 8080 on any.
pub fn parse_targets<S: AsRef<str>>(words: &[S], sets: &Sets) -> Result<Vec<Target>, BadTarget> {
    let mut targets = Vec::new();
    for word in words {
        for part in word.as_ref().split(',') {
            match part.strip_prefix('@') {
                Some(name) => targets.extend_from_slice(set(name, sets)?),
                None => targets.push(parse_one(part, word.as_ref())?),
            }
        }
    }
    Ok(targets)
}

fn set<'a>(name: &str, sets: &'a Sets) -> Result<&'a [Target], BadTarget> {
    sets.get(name).map(Vec::as_slice).ok_or_else(|| {
        let known: Vec<String> = sets.keys().map(|known| format!("@{known}")).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        BadTarget(format!("no set of ports is named '@{}'; known: {known}", name.escape_debug()))
    })
}

fn parse_one(part: &str, word: &str) -> Result<Target, BadTarget> {
    if part.is_empty() {
        return Err(BadTarget(if word.is_empty() {
            "empty target; give a port such as 8000".to_owned()
        } else {
            format!("empty target in '{}'; give ports such as 3000,8080", word.escape_debug())
        }));
    }
    let (place, proto) = match part.rsplit_once('/') {
        Some((place, proto)) => (place, Some(parse_proto(proto, part)?)),
        None => (part, None),
    };
    let (address, ports) = split_address(place, part)?;
    Ok(Target { ports: parse_ports(ports, part)?, proto, address })
}

fn parse_proto(proto: &str, part: &str) -> Result<Protocol, BadTarget> {
    match proto {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        _ => Err(bad(proto, part, "is not a protocol; use /tcp or /udp")),
    }
}

/// `127.0.0.1:8000`, `[::1]:8000`, `:8000`, `8000`.
fn split_address<'a>(place: &'a str, part: &str) -> Result<(Option<IpAddr>, &'a str), BadTarget> {
    if let Some(rest) = place.strip_prefix('[') {
        let Some((address, ports)) = rest.split_once("]:") else {
            return Err(bad(place, part, "lacks a port; use [ADDRESS]:PORT"));
        };
        return match address.parse::<Ipv6Addr>() {
            Ok(address) => Ok((Some(address.into()), ports)),
            Err(_) => Err(bad(address, part, "is not an IPv6 address")),
        };
    }
    match place.rsplit_once(':') {
        None => Ok((None, place)),
        Some(("", ports)) => Ok((None, ports)),
        Some((address, _)) if address.contains(':') => {
            Err(bad(place, part, "is ambiguous; put an IPv6 address in brackets: [::1]:8000"))
        }
        Some((address, ports)) => match address.parse::<Ipv4Addr>() {
            Ok(address) => Ok((Some(address.into()), ports)),
            Err(_) => Err(bad(address, part, "is not an IP address")),
        },
    }
}

fn parse_ports(ports: &str, part: &str) -> Result<RangeInclusive<u16>, BadTarget> {
    let Some((first, last)) = ports.split_once('-') else {
        let port = parse_port(ports, part)?;
        return Ok(port..=port);
    };
    if first.is_empty() || last.is_empty() {
        return Err(bad(ports, part, "is half a range; use FIRST-LAST such as 3000-3005"));
    }
    let range = parse_port(first, part)?..=parse_port(last, part)?;
    if range.is_empty() {
        return Err(bad(ports, part, "runs backwards; the lower port comes first"));
    }
    Ok(range)
}

fn parse_port(port: &str, part: &str) -> Result<u16, BadTarget> {
    if port.is_empty() {
        return Err(bad(part, part, "lacks a port; give one such as 8000"));
    }
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad(port, part, "is not a port; use a number from 1 to 65535"));
    }
    match port.parse() {
        Ok(0) | Err(_) => Err(bad(port, part, "is out of range; ports go from 1 to 65535")),
        Ok(port) => Ok(port),
    }
}

fn bad(piece: &str, part: &str, why: &str) -> BadTarget {
    let whole = if piece == part { String::new() } else { format!(" in '{}'", part.escape_debug()) };
    BadTarget(format!("'{}'{whole} {why}", piece.escape_debug()))
}
