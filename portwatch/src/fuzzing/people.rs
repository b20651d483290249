//! What people write: targets, globs, the configuration; and how hostile text is shown.

use std::borrow::Cow;
use std::net::Ipv6Addr;
use std::ops::RangeInclusive;

use crate::config::sets_in;
use crate::model::{Process, ProcessId, Protocol, Socket, SocketId};
use crate::render;
use crate::select::{self, Selector, Sets, Target, builtin_sets, parse_targets};

use super::assert_one_line;

/// Words as on a command line, one a line.
pub fn targets(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let words: Vec<&str> = text.lines().collect();
    match parse_targets(&words, &builtin_sets()) {
        Ok(targets) => assert_targets(&targets),
        Err(bad) => assert_one_line(&bad.to_string()),
    }
}

/// Targets mean something, and their own text means the same.
fn assert_targets(targets: &[Target]) {
    let written: Vec<String> = targets.iter().map(Target::to_string).collect();
    assert_eq!(parse_targets(&written, &Sets::new()).as_deref(), Ok(targets));
    assert!(targets.iter().all(|target| !target.ports.is_empty() && *target.ports.start() > 0));
    let selector = Selector::new(targets.to_vec(), select::Filters::default());
    for target in targets.iter().take(8) {
        let (first, last) = (*target.ports.start(), *target.ports.end());
        for port in [first - 1, first, u16::midpoint(first, last), last, last.wrapping_add(1)] {
            let socket = socket(port, target);
            assert_eq!(selector.matches_socket(&socket), targets.iter().any(|target| target.covers(&socket)));
        }
    }
    let widest = |ports: &RangeInclusive<u16>| ports.len() <= Selector::NAMED_RANGE_MAX;
    for (port, proto) in selector.named_ports() {
        let names = |target: &Target| {
            widest(&target.ports) && target.ports.contains(&port) && (target.proto.is_none() || target.proto == proto)
        };
        assert!(selector.targets().iter().any(names), "{port}/{proto:?}");
        assert!(
            selector.targets().iter().all(|target| target.address.is_some())
                || !selector.named_addresses(port).is_empty()
        );
    }
}

/// A socket that the target is of, but for its port.
fn socket(port: u16, target: &Target) -> Socket {
    Socket {
        id: SocketId { inode: 1, cookie: 1 },
        proto: target.proto.unwrap_or(Protocol::Udp),
        mptcp: false,
        address: target.address.unwrap_or(Ipv6Addr::UNSPECIFIED.into()),
        port,
        v6only: None,
        netns: 1,
        uid: 0,
        backlog: None,
    }
}

/// A glob on the first line; the rest is what it is held against. Plain globs are matched here in another way.
pub fn glob(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (glob, subject) = text.split_once('\n').unwrap_or((&text, &text));
    for (compiled, backslash) in [(select::glob(glob), true), (select::unit_glob(glob), false)] {
        match compiled {
            Ok(matcher) => {
                let found = matcher.is_match(subject);
                let special: &[char] = if backslash { &['[', ']', '{', '}', '\\'] } else { &['[', ']', '{', '}'] };
                if !glob.contains(special) {
                    assert_eq!(found, matches(glob, subject), "{glob:?} {subject:?}");
                }
            }
            Err(why) => assert_one_line(&why),
        }
    }
}

/// Whether a glob of `*`, `?` (which is one byte) and plain characters matches.
fn matches(glob: &str, subject: &str) -> bool {
    let (glob, subject) = (glob.as_bytes(), subject.as_bytes());
    let (mut g, mut s) = (0, 0);
    // The last star, and how far it has reached: on a mismatch it takes one more.
    let mut star = None;
    while s < subject.len() {
        match glob.get(g) {
            Some(b'*') => {
                star = Some((g, s));
                g += 1;
            }
            Some(&c) if c == b'?' || c == subject[s] => (g, s) = (g + 1, s + 1),
            _ => {
                let Some((at, reached)) = star else { return false };
                star = Some((at, reached + 1));
                (g, s) = (at + 1, reached + 1);
            }
        }
    }
    glob[g..].iter().all(|&c| c == b'*')
}

/// The text of a configuration.
pub fn config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match sets_in(&text) {
        Ok(sets) => {
            for (name, targets) in &sets {
                assert!(!targets.is_empty());
                assert_eq!(parse_targets(&[format!("@{name}")], &sets).as_ref(), Ok(targets));
                assert_targets(targets);
            }
        }
        Err(bad) => {
            assert_one_line(&bad.what);
            assert!((1..=text.split('\n').count()).contains(&bad.line), "{bad:?}");
        }
    }
}

/// Text as a process may have it in its name or its arguments, shown and quoted.
pub fn text(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let escaped = render::escape(&text);
    assert_one_line(&escaped);
    assert!(matches!(render::escape(&escaped), Cow::Borrowed(same) if same == escaped));
    for columns in [0, 1, 2, 7, 80] {
        let cut = render::cut(&text, columns);
        assert!(render::width(&cut) <= columns, "{cut:?} in {columns}");
        assert!(cut == text || text.starts_with(cut.trim_end_matches('…')));
    }
    super::assert_shell(&crate::supervisor::quote(&text));
    let name = text.chars().take(15).collect::<String>();
    let mut process = Process::bare(ProcessId { pid: 7, start: 1 }, name);
    assert_one_line(&render::command_line(&process));
    process.command = text.split('\0').map(str::to_owned).collect();
    assert_one_line(&render::command_line(&process));
    let json = render::json::line(&text);
    assert_one_line(&json);
    assert_eq!(serde_json::from_str::<String>(&json).ok().as_deref(), Some(&*text));
}
