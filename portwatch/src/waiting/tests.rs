use std::sync::Arc;

use super::*;
use crate::model::{Holder, Process, ProcessId, Socket};
use crate::select::{Filters, builtin_sets, parse_targets};

const SECOND: u64 = 1_000_000_000;

/// `8000/tcp@127.0.0.1 python3:7`, a holder a word.
fn listener(text: &str) -> Listener {
    let (place, holders) = text.split_once(' ').unwrap_or((text, ""));
    let (place, address) = place.split_once('@').unwrap_or((place, "127.0.0.1"));
    let (port, proto) = place.split_once('/').unwrap_or((place, "tcp"));
    let holder = |(index, word): (usize, &str)| {
        let (name, pid) = word.split_once(':').unwrap();
        let id = ProcessId { pid: pid.parse().unwrap(), start: 10 * SECOND };
        let process = Arc::new(Process { uid: Some(1000), ..Process::bare(id, name) });
        Holder { process, fds: vec![3], binder: index == 0 }
    };
    Listener {
        socket: Socket {
            proto: if proto == "udp" { Protocol::Udp } else { Protocol::Tcp },
            ..Socket::example(address, port.parse().unwrap())
        },
        since: Some(20 * SECOND),
        holders: holders.split_whitespace().enumerate().map(holder).collect(),
    }
}

fn condition(words: &str, filters: Filters, goal: Goal, scope: Scope) -> Condition {
    let words: Vec<&str> = words.split_whitespace().collect();
    let selector = Selector::new(parse_targets(&words, &builtin_sets()).unwrap(), filters);
    Condition::new(selector, goal, scope, true)
}

/// Whether it is true, and the sentence, where the ports in `used` cannot be bound.
fn judge(condition: &Condition, listeners: &[&str], used: &[u16]) -> (bool, String) {
    let listeners: Vec<Listener> = listeners.iter().map(|text| listener(text)).collect();
    let look = condition.look(&listeners, 100 * SECOND, &mut |_, _, port| used.contains(&port));
    (look.is_true(), look.sentence(" after 30s", 0))
}

#[test]
fn bound_is_when_a_matching_listener_is_there() {
    use Scope::{All, Any};
    let (py, node) = ("8000 python3:7", "8080@:: node:9 node:10 node:11");
    for (words, scope, listeners, want, sentence) in [
        ("8000", All, &[py][..], true, "8000/tcp is bound by python3 (7) after 30s"),
        ("8000", All, &[], false, "nothing listens on 8000 after 30s"),
        ("8000", All, &[node], false, "nothing listens on 8000 after 30s"),
        ("8000/udp", All, &[py], false, "nothing listens on 8000/udp after 30s"),
        ("127.0.0.2:8000", All, &[py], false, "nothing listens on 127.0.0.2:8000 after 30s"),
        (
            "8000 8080",
            All,
            &[node, py],
            true,
            "8000/tcp is bound by python3 (7), 8080/tcp by node (9) and 2 more after 30s",
        ),
        ("8000 8080", All, &[py], false, "nothing listens on 8080 after 30s"),
        ("8000 8080", Any, &[py], true, "8000/tcp is bound by python3 (7) after 30s"),
        ("8000 8080", Any, &[], false, "nothing listens on 8000, 8080 after 30s"),
        ("7998-8002", All, &[py], false, "nothing listens on 7998-7999, 8001-8002 after 30s"),
        ("7998-8002", Any, &[py], true, "8000/tcp is bound by python3 (7) after 30s"),
        ("1-65535", All, &[py, node], false, "nothing listens on 1-7999, 8001-8079, 8081-65535 after 30s"),
        ("8000", All, &["8000"], true, "8000/tcp is bound by no visible process after 30s"),
        ("8000", All, &["8000 \x1b[31m:7"], true, "8000/tcp is bound by \\x1b[31m (7) after 30s"),
        ("8000", All, &[py, "8000/udp dns:8"], true, "8000/tcp is bound by python3 (7), 8000/udp by dns (8) after 30s"),
    ] {
        let condition = condition(words, Filters::default(), Goal::Bound, scope);
        assert_eq!(judge(&condition, listeners, &[]), (want, sentence.to_owned()), "{words} {scope:?} {listeners:?}");
    }
}

#[test]
fn free_is_when_nothing_matches_and_a_bind_would_succeed() {
    use Scope::{All, Any};
    let py = "8000 python3:7";
    let lingers = |port: &str, it: &str| {
        format!(
            "nothing listens on {port} any more, but {it} cannot be bound yet after 30s: connections or a bound socket \
             remain; see `portwatch diagnose {}`",
            port.replace(',', "")
        )
    };
    for (words, scope, listeners, used, want, sentence) in [
        ("8000", All, &[][..], &[][..], true, "8000 is free after 30s".to_owned()),
        ("8000", All, &[py], &[8000], false, "8000/tcp is still held by python3 (7) after 30s".to_owned()),
        ("8000", All, &[], &[8000], false, lingers("8000", "it")),
        ("8000 8080", All, &[], &[8000, 8080], false, lingers("8000, 8080", "they")),
        ("8000/udp", All, &[], &[], true, "8000/udp is free after 30s".to_owned()),
        ("8000/udp", All, &[], &[8000], false, lingers("8000/udp", "it")),
        ("8000/udp 8000/tcp", All, &[], &[8000], false, lingers("8000, 8000/udp", "they")),
        ("8000/udp 8001/udp", Any, &[], &[8000], true, "8001/udp is free after 30s".to_owned()),
        ("8000 8080/tcp", All, &[], &[], true, "8000, 8080/tcp are free after 30s".to_owned()),
        ("8000 8080", All, &[py], &[], false, "8000/tcp is still held by python3 (7) after 30s".to_owned()),
        ("8000 8080", Any, &[py], &[], true, "8080 is free after 30s".to_owned()),
        ("8000 8080", Any, &[py], &[8080], false, lingers("8080", "it")),
        ("8000 8080-8081", Any, &[py], &[8080], true, "8081 is free after 30s".to_owned()),
        ("3000-3005", All, &[], &[], true, "3000-3005 are free after 30s".to_owned()),
        // Of a wide range nobody binds each port, and clients have some of them.
        ("1-65535", All, &[], &[40000], true, "1-65535 are free after 30s".to_owned()),
        ("8000", All, &["8000"], &[], false, "8000/tcp is still held by no visible process after 30s".to_owned()),
    ] {
        let condition = condition(words, Filters::default(), Goal::Free, scope);
        assert_eq!(judge(&condition, listeners, used), (want, sentence), "{words} {scope:?} {listeners:?} {used:?}");
    }
}

#[test]
fn selectors_narrow_what_is_waited_for() {
    let py = "8000 python3:7";
    let filter = |pid| Filters { pids: vec![pid], ..Filters::default() };
    for (words, filters, goal, listeners, used, want, sentence) in [
        ("", filter(7), Goal::Bound, &[py][..], &[][..], true, "8000/tcp is bound by python3 (7) after 30s"),
        ("", filter(8), Goal::Bound, &[py], &[], false, "nothing that matches the selectors listens after 30s"),
        (
            "8000",
            filter(8),
            Goal::Bound,
            &[py],
            &[],
            false,
            "nothing that matches the selectors listens on 8000 after 30s",
        ),
        // The port is somebody else's, and that is what was asked for.
        (
            "8000",
            filter(8),
            Goal::Free,
            &[py],
            &[8000],
            true,
            "nothing that matches the selectors listens on 8000 after 30s",
        ),
        ("", filter(8), Goal::Free, &[py], &[], true, "nothing that matches the selectors listens after 30s"),
        ("", filter(7), Goal::Free, &[py], &[], false, "8000/tcp is still held by python3 (7) after 30s"),
        ("8000", Filters { udp: true, ..Filters::default() }, Goal::Free, &[py], &[], true, "8000 is free after 30s"),
    ] {
        let condition = condition(words, filters, goal, Scope::All);
        assert_eq!(judge(&condition, listeners, used), (want, sentence.to_owned()), "{words} {goal:?}");
    }
}

#[test]
fn the_bind_is_tried_as_a_new_server_would() {
    let v6 = Filters { ipv6: true, ..Filters::default() };
    let one = Filters { addresses: vec!["127.0.0.3".parse().unwrap()], ..Filters::default() };
    for (words, filters, want) in [
        ("80", Filters::default(), &["tcp 0.0.0.0:80", "tcp [::]:80"][..]),
        ("80", v6, &["tcp [::]:80"]),
        ("80", one, &["tcp 127.0.0.3:80"]),
        ("127.0.0.1:80 127.0.0.1:81/udp", Filters::default(), &["tcp 127.0.0.1:80", "udp 127.0.0.1:81"]),
        ("127.0.0.1:80", Filters { udp: true, ..Filters::default() }, &["udp 127.0.0.1:80"]),
        ("127.0.0.1:80/tcp", Filters { udp: true, ..Filters::default() }, &[]),
        ("80-81/tcp", Filters { ipv4: true, ..Filters::default() }, &["tcp 0.0.0.0:80", "tcp 0.0.0.0:81"]),
        ("80-96", Filters::default(), &[]),
    ] {
        let condition = condition(words, filters, Goal::Free, Scope::All);
        let mut tried = Vec::new();
        condition.look(&[], 0, &mut |proto, address, port| {
            tried.push(format!("{proto} {}", std::net::SocketAddr::new(address, port)));
            false
        });
        assert_eq!(tried, want, "{words}");
    }
    let elsewhere = Condition::new(
        condition("80", Filters::default(), Goal::Free, Scope::All).selector,
        Goal::Free,
        Scope::All,
        false,
    );
    assert!(elsewhere.look(&[], 0, &mut |_, _, _| true).is_true());
}

#[test]
fn an_age_comes_true_without_an_event() {
    let old = |seconds| Filters { older_than: Some(Duration::from_secs(seconds)), ..Filters::default() };
    let listeners = [listener("8000 python3:7"), listener("9000 node:8")];
    for (seconds, goal, now, want) in [
        (30, Goal::Bound, 20 * SECOND, Some(30_001)),
        (30, Goal::Bound, 49 * SECOND, Some(1_001)),
        (30, Goal::Bound, 50 * SECOND, Some(1)),
        (30, Goal::Bound, 51 * SECOND, None),
        (30, Goal::Free, 20 * SECOND, None),
    ] {
        let condition = condition("8000", old(seconds), goal, Scope::All);
        assert_eq!(condition.due(&listeners, now), want.map(Duration::from_millis), "{seconds} {goal:?} {now}");
    }
    assert_eq!(condition("8000", Filters::default(), Goal::Bound, Scope::All).due(&listeners, 0), None);
}

#[test]
fn spots_are_told_one_by_one() {
    let listeners: Vec<Listener> = ["8000 a:1", "8000/udp b:2", "8002 c:3", "9500 d:4"].map(listener).to_vec();
    let shown = |words: &str| {
        let condition = condition(words, Filters::default(), Goal::Bound, Scope::Any);
        let look = condition.look(&listeners, 100 * SECOND, &mut |_, _, _| false);
        let shown = look.spots().into_iter().map(|spot| {
            let proto = spot.proto.map_or("?".to_owned(), |proto| proto.to_string());
            let address = spot.address.map_or(String::new(), |address| format!("{address}:"));
            format!("{address}{}/{proto}={}", spot.port, spot.listeners.len())
        });
        shown.collect::<Vec<_>>().join(" ")
    };
    for (words, want) in [
        ("8000", "8000/tcp=1 8000/udp=1"),
        ("8000 8000", "8000/tcp=1 8000/udp=1"),
        ("8000-8002", "8000/tcp=1 8000/udp=1 8001/?=0 8002/tcp=1"),
        ("8001/udp 127.0.0.1:8002", "8001/udp=0 127.0.0.1:8002/tcp=1"),
        ("9000-9999", "9500/tcp=1"),
        ("", "8000/tcp=1 8000/udp=1 8002/tcp=1 9500/tcp=1"),
    ] {
        assert_eq!(shown(words), want, "{words}");
    }
}
