use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use globset::{Glob, GlobBuilder};

use super::*;
use crate::model::{Change, Holder, ProcessId, SocketId};

fn targets(words: &str) -> Result<Vec<Target>, String> {
    let words: Vec<&str> = words.split(' ').collect();
    parse_targets(&words, &builtin_sets()).map_err(|bad| bad.to_string())
}

#[test]
fn targets_read_back_as_they_were_meant() {
    for (words, want) in [
        ("8000", "8000"),
        (":8000", "8000"),
        ("1 65535", "1 65535"),
        ("3000,8080", "3000 8080"),
        ("3000-3005", "3000-3005"),
        ("7-7", "7"),
        ("8000/tcp", "8000/tcp"),
        (":5353/udp", "5353/udp"),
        ("3000-3005/udp", "3000-3005/udp"),
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("127.0.0.1:3000-3005/tcp", "127.0.0.1:3000-3005/tcp"),
        ("[::1]:8000", "[::1]:8000"),
        ("[fe80::1]:3000-3005/udp,9", "[fe80::1]:3000-3005/udp 9"),
        ("@dev", "3000 8000 8080"),
        ("@dev,22 53/udp", "3000 8000 8080 22 53/udp"),
    ] {
        let got: Vec<String> = targets(words).unwrap().iter().map(Target::to_string).collect();
        assert_eq!(got.join(" "), want, "{words}");
    }
}

#[test]
fn a_bad_target_is_named_in_one_line() {
    for (words, want) in [
        ("", "empty target; give a port such as 8000"),
        ("80,,81", "empty target in '80,,81'; give ports such as 3000,8080"),
        ("80,", "empty target in '80,'; give ports such as 3000,8080"),
        ("0", "'0' is out of range; ports go from 1 to 65535"),
        ("0-80", "'0' in '0-80' is out of range; ports go from 1 to 65535"),
        ("65536", "'65536' is out of range; ports go from 1 to 65535"),
        ("99999999999999999999", "'99999999999999999999' is out of range; ports go from 1 to 65535"),
        ("80-", "'80-' is half a range; use FIRST-LAST such as 3000-3005"),
        ("-80", "'-80' is half a range; use FIRST-LAST such as 3000-3005"),
        ("9-3", "'9-3' runs backwards; the lower port comes first"),
        ("abc", "'abc' is not a port; use a number from 1 to 65535"),
        ("+80", "'+80' is not a port; use a number from 1 to 65535"),
        ("8000/xyz", "'xyz' in '8000/xyz' is not a protocol; use /tcp or /udp"),
        ("8000/", "'' in '8000/' is not a protocol; use /tcp or /udp"),
        ("/tcp", "'/tcp' lacks a port; give one such as 8000"),
        (":", "':' lacks a port; give one such as 8000"),
        ("localhost:80", "'localhost' in 'localhost:80' is not an IP address"),
        ("::1:80", "'::1:80' is ambiguous; put an IPv6 address in brackets: [::1]:8000"),
        ("[::1]", "'[::1]' lacks a port; use [ADDRESS]:PORT"),
        ("[1.2.3.4]:80", "'1.2.3.4' in '[1.2.3.4]:80' is not an IPv6 address"),
        ("@prod", "no set of ports is named '@prod'; known: @dev"),
        ("8\u{1b}[31m", "'8\\u{1b}[31m' is not a port; use a number from 1 to 65535"),
    ] {
        assert_eq!(targets(words), Err(want.to_owned()), "{words:?}");
    }
}

fn socket(proto: Protocol, address: &str, port: u16) -> Socket {
    Socket { proto, ..Socket::example(address, port) }
}

fn selector(words: &str, filters: Filters) -> Selector {
    Selector::new(if words.is_empty() { Vec::new() } else { targets(words).unwrap() }, filters)
}

#[test]
fn sockets_are_picked_by_targets() {
    use Protocol::{Tcp, Udp};
    for (words, proto, address, port, want) in [
        ("", Tcp, "0.0.0.0", 1, true),
        ("8000", Tcp, "127.0.0.1", 8000, true),
        ("8000", Udp, "::1", 8000, true),
        ("8000", Tcp, "127.0.0.1", 8001, false),
        ("8000/tcp", Udp, "127.0.0.1", 8000, false),
        ("8000/udp", Udp, "127.0.0.1", 8000, true),
        ("8080-9500", Tcp, "::", 8080, true),
        ("8080-9500", Tcp, "::", 9500, true),
        ("8080-9500", Tcp, "::", 9501, false),
        ("1-65535", Tcp, "::", 65535, true),
        ("127.0.0.1:8000", Tcp, "127.0.0.1", 8000, true),
        ("127.0.0.1:8000", Tcp, "0.0.0.0", 8000, true),
        ("127.0.0.1:8000", Tcp, "::", 8000, true),
        ("127.0.0.1:8000", Tcp, "127.0.0.2", 8000, false),
        ("127.0.0.1:8000", Tcp, "::1", 8000, false),
        ("[::1]:8000", Tcp, "::", 8000, true),
        ("[::1]:8000", Tcp, "0.0.0.0", 8000, false),
        ("127.0.0.1:8000", Tcp, "::ffff:127.0.0.1", 8000, true),
        ("127.0.0.1:8000", Tcp, "::ffff:0.0.0.0", 8000, true),
        ("[::ffff:127.0.0.1]:8000", Tcp, "127.0.0.1", 8000, true),
        ("[::ffff:127.0.0.1]:8000", Tcp, "0.0.0.0", 8000, true),
        ("[::ffff:127.0.0.1]:8000", Tcp, "127.0.0.2", 8000, false),
        ("127.0.0.1:8000 9000", Tcp, "10.0.0.1", 9000, true),
        ("127.0.0.1:8000 9000", Tcp, "10.0.0.1", 8000, false),
    ] {
        let got = selector(words, Filters::default()).matches_socket(&socket(proto, address, port));
        assert_eq!(got, want, "{words} {proto} {address} {port}");
    }
}

#[test]
fn sockets_are_picked_by_filters() {
    let v6 = socket(Protocol::Tcp, "::", 80);
    let v4 = socket(Protocol::Udp, "0.0.0.0", 80);
    let any = Filters::default;
    for (name, filters, want_v6, want_v4) in [
        ("none", any(), true, true),
        ("-4", Filters { ipv4: true, ..any() }, false, true),
        ("-6", Filters { ipv6: true, ..any() }, true, false),
        ("-4 -6", Filters { ipv4: true, ipv6: true, ..any() }, true, true),
        ("--tcp", Filters { tcp: true, ..any() }, true, false),
        ("--udp", Filters { udp: true, ..any() }, false, true),
        ("--tcp --udp", Filters { tcp: true, udp: true, ..any() }, true, true),
        ("--addr ::", Filters { addresses: vec!["::".parse().unwrap()], ..any() }, true, false),
        ("--addr ::1", Filters { addresses: vec!["::1".parse().unwrap()], ..any() }, false, false),
        ("--netns 1", Filters { netns: Some(1), ..any() }, true, true),
        ("--netns 2", Filters { netns: Some(2), ..any() }, false, false),
    ] {
        let selector = selector("", filters);
        assert_eq!((selector.matches_socket(&v6), selector.matches_socket(&v4)), (want_v6, want_v4), "{name}");
    }
}

#[test]
fn what_hinders_a_bind_depends_on_what_is_meant_by_the_port() {
    let any = Filters::default;
    let at = |address: &str| Filters { addresses: vec![address.parse().unwrap()], ..any() };
    let [v4, v6] = [Filters { ipv4: true, ..any() }, Filters { ipv6: true, ..any() }];
    let except = Filters { except: targets("127.0.0.1:8000").unwrap(), ..any() };
    for (words, filters, address, want) in [
        ("8000", any(), "127.0.0.1", true),
        ("8000", Filters { uids: vec![7], ..any() }, "127.0.0.1", true),
        ("8000", v4.clone(), "127.0.0.1", true),
        ("8000", v4.clone(), "::1", false),
        // It takes IPv4 as well.
        ("8000", v4, "::", true),
        ("8000", v6.clone(), "127.0.0.1", false),
        ("8000", v6.clone(), "0.0.0.0", false),
        ("8000", v6, "::1", true),
        ("8000", at("::1"), "127.0.0.1", false),
        ("8000", at("0.0.0.0"), "127.0.0.1", true),
        ("127.0.0.2:8000", any(), "127.0.0.1", false),
        ("127.0.0.2:8000", any(), "0.0.0.0", true),
        ("0.0.0.0:8000", any(), "127.0.0.1", true),
        ("[::]:8000", any(), "127.0.0.1", true),
        ("8000", except.clone(), "127.0.0.1", false),
        ("8000", except, "127.0.0.2", true),
    ] {
        let got = selector(words, filters.clone()).is_hindered_by(&socket(Protocol::Tcp, address, 8000));
        assert_eq!(got, want, "{words} {address} {filters:?}");
    }
}

const SECOND: u64 = 1_000_000_000;

fn holder(pid: u32, start: u64, uid: u32, command: &[&str], cwd: &str) -> Holder {
    let mut process = Process::bare(ProcessId { pid, start }, command.first().copied().unwrap_or("kthread"));
    process.uid = Some(uid);
    process.command = command.iter().map(|&arg| arg.to_owned()).collect();
    process.cwd = Some(cwd.to_owned());
    // The first one is a user's service, the second one in a session.
    let user = "/user.slice/user-1000.slice/user@1000.service/app.slice";
    process.cgroup = Some(if pid == 7 { format!(r"{user}/my\x2dweb@1.service") } else { format!("{user}/x.scope") });
    Holder { process: Arc::new(process), fds: vec![3], binder: pid == 7 }
}

#[test]
fn listeners_are_picked_by_what_holds_them() {
    let held = Listener {
        socket: socket(Protocol::Tcp, "127.0.0.1", 8000),
        since: None,
        holders: vec![
            holder(7, 10 * SECOND, 1000, &["python3", "-m", "http.server", "/srv/www"], "/home/al/web"),
            holder(8, 90 * SECOND, 33, &["worker"], "/"),
        ],
    };
    let seen = Listener { since: Some(95 * SECOND), ..held.clone() };
    let ghost = Listener { holders: Vec::new(), ..held.clone() };
    let glob = |glob: &str| vec![Glob::new(glob).unwrap().compile_matcher()];
    let unit = |glob: &str| vec![GlobBuilder::new(glob).backslash_escape(false).build().unwrap().compile_matcher()];
    let older = |seconds| Some(Duration::from_secs(seconds));
    let any = Filters::default;
    for (name, filters, want) in [
        ("none", any(), [true, true, true]),
        ("--user 1000", Filters { uids: vec![1000], ..any() }, [true, true, true]),
        ("--user 33", Filters { uids: vec![33], ..any() }, [true, true, false]),
        ("--user 0", Filters { uids: vec![0], ..any() }, [false, false, false]),
        ("--pid 8", Filters { pids: vec![5, 8], ..any() }, [true, true, false]),
        ("--pid 8 --user 1000", Filters { pids: vec![8], uids: vec![1000], ..any() }, [false, false, false]),
        ("--command python3", Filters { commands: glob("python3"), ..any() }, [true, true, false]),
        ("--command python", Filters { commands: glob("python"), ..any() }, [false, false, false]),
        ("--command *server*", Filters { commands: glob("*server*"), ..any() }, [true, true, false]),
        ("--command *www", Filters { commands: glob("python3 *www"), ..any() }, [true, true, false]),
        ("--cwd /home/*", Filters { cwds: glob("/home/*"), ..any() }, [true, true, false]),
        ("--cwd /home", Filters { cwds: glob("/home"), ..any() }, [false, false, false]),
        (r"--unit my\x2dweb@1", Filters { units: unit(r"my\x2dweb@1"), ..any() }, [true, true, false]),
        ("--unit my*@?.service", Filters { units: unit("my*@?.service"), ..any() }, [true, true, false]),
        ("--unit web", Filters { units: unit("web"), ..any() }, [false, false, false]),
        ("--unit *.scope", Filters { units: unit("*.scope"), ..any() }, [false, false, false]),
        ("--unit * --pid 8", Filters { units: unit("*"), pids: vec![8], ..any() }, [false, false, false]),
        ("--older-than 60s", Filters { older_than: older(60), ..any() }, [true, false, false]),
        ("--older-than 4s", Filters { older_than: older(4), ..any() }, [true, true, false]),
        ("--older-than 90s", Filters { older_than: older(90), ..any() }, [false, false, false]),
    ] {
        let selector = selector("8000", filters);
        let got = [&held, &seen, &ghost].map(|listener| selector.matches(listener, 100 * SECOND));
        assert_eq!(got, want, "{name}");
    }
}

#[test]
fn named_ports_are_those_that_a_status_is_owed_of() {
    use Protocol::{Tcp, Udp};
    let udp = Filters { udp: true, ..Filters::default() };
    let any = Filters::default;
    for (words, filters, want) in [
        ("", any(), vec![]),
        ("8000 80/tcp", any(), vec![(80, Some(Tcp)), (8000, None)]),
        ("8000 8000/tcp 8000", any(), vec![(8000, None)]),
        ("53/tcp 53/udp", any(), vec![(53, Some(Tcp)), (53, Some(Udp))]),
        ("3000-3002", any(), vec![(3000, None), (3001, None), (3002, None)]),
        ("3000-3999 22", any(), vec![(22, None)]),
        ("53 80/tcp", udp, vec![(53, Some(Udp))]),
    ] {
        assert_eq!(selector(words, filters).named_ports(), want, "{words}");
    }
}

#[test]
fn protocol_family_and_namespace_alone_name_nothing() {
    let narrow = Filters { tcp: true, ipv4: true, netns: Some(1), ..Filters::default() };
    assert!(selector("", narrow).is_empty());
    assert!(!selector("80", Filters::default()).is_empty());
    let address: IpAddr = "::".parse().unwrap();
    assert!(!selector("", Filters { addresses: vec![address], ..Filters::default() }).is_empty());
    assert!(!selector("", Filters { older_than: Some(Duration::ZERO), ..Filters::default() }).is_empty());
}

#[test]
fn the_addresses_of_a_port_are_those_that_were_named() {
    let all = ["0.0.0.0", "::"];
    let (v4, v6) = (Filters { ipv4: true, ..Filters::default() }, Filters { ipv6: true, ..Filters::default() });
    let on_loopback = Filters { addresses: vec!["::1".parse().unwrap()], ..Filters::default() };
    for (words, filters, want) in [
        ("8000", Filters::default(), &all[..]),
        ("7000-9000/tcp", Filters::default(), &all[..]),
        ("8000", v4, &all[..1]),
        ("8000", v6, &all[1..]),
        ("8000", on_loopback, &["::1"][..]),
        ("127.0.0.1:8000 [::1]:8000 9", Filters::default(), &["127.0.0.1", "::1"][..]),
        ("127.0.0.1:8000 8000", Filters::default(), &all[..]),
    ] {
        let selector = Selector::new(targets(words).unwrap(), filters);
        let got: Vec<String> = selector.named_addresses(8000).iter().map(IpAddr::to_string).collect();
        assert_eq!(got, want, "{words}");
    }
}

#[test]
fn what_was_given_to_another_user_is_not_told_of_any_more() {
    let held_by = |uid: u32| {
        let process = Arc::new(Process { uid: Some(uid), ..Process::bare(ProcessId { pid: 7, start: 1 }, "x") });
        let socket = Socket { uid: 0, id: SocketId { inode: 5, cookie: 5 }, ..Socket::example("127.0.0.1", 8000) };
        Listener { socket, since: None, holders: vec![Holder { process, fds: Vec::new(), binder: true }] }
    };
    let holders = |uid| Change::Holders { at: 1, listener: held_by(uid) };
    let mut selector = Selector::new(Vec::new(), Filters::default());
    selector.show_only(Some(1000));
    let mut shown = Shown::default();
    assert!(!shown.concerns(&holders(0), &selector));
    assert!(shown.concerns(&holders(1000), &selector));
    assert!(!shown.concerns(&holders(0), &selector));
    assert!(shown.concerns(&Change::Closed { at: 2, listener: held_by(0), by: None }, &selector));
}
