//! The settings of a network namespace that decide about ports.

use std::fs;
use std::ops::RangeInclusive;

/// `/proc/sys/net/ipv4` of the calling thread's network namespace. They hold for IPv6 as well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sysctls {
    /// `ip_local_port_range`: from here the kernel gives ports to clients.
    pub local_ports: Option<RangeInclusive<u16>>,
    /// `ip_local_reserved_ports`, as it is written there: never given to clients.
    pub reserved: String,
    /// `ip_unprivileged_port_start`: ports below take `CAP_NET_BIND_SERVICE`.
    pub unprivileged_start: Option<u16>,
}

impl Sysctls {
    /// What cannot be read stays unknown.
    pub(super) fn read() -> Sysctls {
        let read = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
        Sysctls {
            local_ports: parse_range(&read("ip_local_port_range")),
            reserved: read("ip_local_reserved_ports").trim().to_owned(),
            unprivileged_start: read("ip_unprivileged_port_start").trim().parse().ok(),
        }
    }

    pub(super) fn is_local(&self, port: u16) -> bool {
        self.local_ports.as_ref().is_some_and(|range| range.contains(&port))
    }

    pub(crate) fn is_reserved(&self, port: u16) -> bool {
        self.reserved.split(',').any(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            matches!((first.trim().parse(), last.trim().parse()), (Ok(first), Ok(last)) if (first..=last).contains(&port))
        })
    }
}

/// Two numbers with blanks between.
pub(crate) fn parse_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_whitespace().map(str::parse);
    Some(numbers.next()?.ok()?..=numbers.next()?.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_parsed() {
        assert_eq!(parse_range("32768\t60999\n"), Some(32768..=60999));
        assert_eq!(parse_range(""), None);
        let reserved = |text: &str, port| Sysctls { reserved: text.to_owned(), ..Sysctls::default() }.is_reserved(port);
        for (text, port, want) in [
            ("", 8000, false),
            ("8000", 8000, true),
            ("80,8000-8002", 8001, true),
            ("80,8000-8002", 8003, false),
            ("nonsense,-", 8000, false),
        ] {
            assert_eq!(reserved(text, port), want, "{text}");
        }
        assert!(Sysctls::read().local_ports.is_some());
    }
}
