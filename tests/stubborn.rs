//! Processes that do not end, end late, or let go of a port without ending; and ports that are not free although
//! nobody listens. Whatever happens, exit code 0 means that bind() succeeds now.

mod blocked;
mod frozen;
mod fuse;

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::puppet::{Puppet, Stage, monotonic_ns};
use crate::subject::{Run, binary, portwatch, skip};
use crate::{Test, test};

/// A run of `kill --json` on the port of this address, and its only outcome: status, and what varies taken out.
#[track_caller]
fn kill(address: SocketAddr, arguments: &[&str], code: i32) -> Value {
    let target = format!("{}/tcp", address.port());
    let run = portwatch(&[&["kill", &target, "--json", "--settle", "0"], arguments].concat()).expect(code);
    let outcomes = run.json();
    assert_eq!(outcomes.as_array().map(Vec::len), Some(1), "{outcomes}");
    check_promise(code, &[address]);
    outcomes[0].clone()
}

/// Exit code 0: bind() succeeds, as servers call it.
#[track_caller]
fn check_promise(code: i32, addresses: &[SocketAddr]) {
    if code != 0 {
        return;
    }
    for address in addresses {
        TcpListener::bind(address).unwrap_or_else(|error| panic!("exit code 0, and bind {address}: {error}"));
    }
}

/// The same, as text: what a pipe gets on standard output and on standard error, times as `TIME`.
#[track_caller]
fn kill_text(address: SocketAddr, arguments: &[&str], code: i32, puppets: &[(&Puppet, &str)]) -> (String, String) {
    let target = format!("{}/tcp", address.port());
    let run = portwatch(&[&["kill", &target, "--settle", "0"], arguments].concat()).expect(code);
    check_promise(code, &[address]);
    let plain = |text: String| {
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "control characters in {text:?}");
        let mut text = text.replace(&address.port().to_string(), "PORT");
        for (puppet, name) in puppets {
            text = text.replace(&format!("scenarios ({})", puppet.pid), name);
            text = text.replace(&format!("exe ({})", puppet.pid), name);
        }
        text.split_inclusive(' ').flat_map(|word| word.split_inclusive('\n')).map(timeless).collect::<String>()
    };
    // What the plan looks like is another test's.
    let errors: String = run.errors().lines().skip_while(|line| !line.contains(": ")).flat_map(|l| [l, "\n"]).collect();
    (plain(run.text()), plain(errors))
}

/// `12ms` and `1.2s` become `TIME`.
fn timeless(word: &str) -> String {
    let end = word.trim_end_matches(|c: char| c.is_whitespace() || c == ':' || c == ';');
    let number = end.trim_end_matches("ms").trim_end_matches("µs").trim_end_matches('s');
    let is_time = number.len() < end.len() && number.parse::<f64>().is_ok();
    if is_time { format!("TIME{}", &word[end.len()..]) } else { word.to_owned() }
}

fn message(outcome: &Value) -> &str {
    outcome["diagnostics"]["message"].as_str().unwrap_or_else(|| panic!("no message: {outcome}"))
}

#[track_caller]
fn check_status(outcome: &Value, status: &str, killed: &[&Puppet], forced: &[&Puppet]) {
    let pids = |puppets: &[&Puppet]| {
        let mut pids: Vec<u32> = puppets.iter().map(|p| p.pid).collect();
        pids.sort_unstable();
        json!(pids)
    };
    let told = |field: &str| {
        let mut pids: Vec<u64> = outcome[field].as_array().expect(field).iter().flat_map(Value::as_u64).collect();
        pids.sort_unstable();
        json!(pids)
    };
    assert_eq!(outcome["status"], status, "{outcome}");
    assert_eq!((told("killed"), told("forced")), (pids(killed), pids(forced)), "{outcome}");
}

pub fn trials() -> Vec<Test> {
    let mut tests = resisting();
    tests.extend(releasing());
    tests.extend(blocked::trials());
    tests.extend(many());
    tests
}

/// Those who do not end when asked.
fn resisting() -> Vec<Test> {
    vec![
        test("stubborn::one_that_ignores_sigterm_is_told_so_and_forced", || {
            let stage = Stage::new();
            let server = stage.puppet();
            server.ignore_term();
            let sock = server.serve();
            let (out, err) = kill_text(sock.address, &["--grace", "100ms"], 0, &[(&server, "NAME")]);
            assert_eq!(out, "PORT/tcp freed: killed by force NAME in TIME; NAME: it ignores SIGTERM\n");
            assert_eq!(
                err,
                "NAME: SIGTERM sent\nNAME: still alive after TIME: it ignores SIGTERM\nNAME: SIGKILL sent\n\
                 NAME: ended in TIME\n"
            );
        }),
        test("stubborn::without_a_grace_sigkill_follows_at_once", || {
            let stage = Stage::new();
            let server = stage.puppet();
            server.ignore_term();
            let sock = server.serve();
            let outcome = kill(sock.address, &["--grace", "0"], 0);
            check_status(&outcome, "cleaned", &[&server], &[&server]);
            assert_eq!(outcome["diagnostics"], Value::Null, "{outcome}");
            assert_eq!(server.wait(), Some(nix::libc::SIGKILL));
        }),
        test("stubborn::no_force_says_why_it_is_still_there", || {
            let stage = Stage::new();
            let server = stage.puppet();
            server.ignore_term();
            let sock = server.serve();
            let (out, err) = kill_text(sock.address, &["--grace", "100ms", "--no-force"], 1, &[(&server, "NAME")]);
            assert_eq!(
                out,
                "PORT/tcp is still taken: NAME: still there after SIGTERM: it ignores SIGTERM; \
                 --no-force left those that outlived SIGTERM\n"
            );
            assert_eq!(err, "NAME: SIGTERM sent\n");
            assert!(server.is_alive());
        }),
        test("stubborn::every_way_to_write_a_signal", || {
            for name in ["TERM", "SIGTERM", "15", "term"] {
                let stage = Stage::new();
                let server = stage.puppet();
                let sock = server.serve();
                check_status(&kill(sock.address, &["-s", name], 0), "cleaned", &[&server], &[]);
                assert_eq!(server.wait(), Some(nix::libc::SIGTERM));
            }
            for name in ["KILL", "9"] {
                let stage = Stage::new();
                let server = stage.puppet();
                let sock = server.serve();
                check_status(&kill(sock.address, &["-s", name], 0), "cleaned", &[&server], &[&server]);
            }
        }),
        test("stubborn::a_stopped_server_is_continued_and_ends_in_peace", || {
            for force in [&[][..], &["--no-force"]] {
                let stage = Stage::new();
                let server = stage.puppet();
                let sock = server.serve();
                server.signal(Signal::STOP);
                server.await_state('T');
                let (out, err) = kill_text(sock.address, force, 0, &[(&server, "NAME")]);
                assert_eq!(out, "PORT/tcp freed: terminated NAME in TIME\n");
                assert_eq!(err, "NAME: SIGTERM sent, and SIGCONT, for it was stopped\nNAME: ended in TIME\n");
                assert_eq!(server.wait(), Some(nix::libc::SIGTERM));
            }
        }),
        test("stubborn::a_traced_server_is_left_to_its_tracer_or_forced", || {
            let stage = Stage::new();
            let (server, tracer) = (stage.puppet(), stage.puppet());
            let sock = server.serve();
            tracer.set_name(b"debugger");
            tracer.trace(&server);
            let outcome = kill(sock.address, &["--grace", "100ms", "--no-force"], 1);
            check_status(&outcome, "partial", &[], &[]);
            let reason = format!(
                "still there after SIGTERM: it is stopped by debugger ({}), which traces it: SIGTERM stays pending",
                tracer.pid
            );
            assert_eq!(outcome["failed"][0]["reason"], reason);
            check_status(&kill(sock.address, &["--grace", "0"], 0), "cleaned", &[&server], &[&server]);
            assert!(tracer.is_alive());
        }),
        test("stubborn::one_in_uninterruptible_sleep_is_named_and_sigkill_may_still_end_it", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.serve();
            // It handles the signal, so the signal has to wait for it; by default this sleep would end.
            server.release_on_term(-1);
            server.vfork(sock.fd);
            let outcome = kill(sock.address, &["--grace", "100ms", "--no-force"], 1);
            check_status(&outcome, "partial", &[], &[]);
            let reason = outcome["failed"][0]["reason"].as_str().expect("a reason");
            // Some kernels do not tell where it sleeps.
            let wchan = std::fs::read_to_string(format!("/proc/{}/wchan", server.pid)).unwrap_or_default();
            let place = if matches!(wchan.trim(), "" | "0") { String::new() } else { format!(", in {}", wchan.trim()) };
            let state = format!("still there after SIGTERM: it is in uninterruptible sleep (state D{place})");
            assert_eq!(reason, format!("{state}, where SIGTERM does not reach it"));
            // This sleep is killable.
            check_status(&kill(sock.address, &["--grace", "0"], 0), "cleaned", &[&server], &[&server]);
        }),
        test("stubborn::one_in_a_frozen_cgroup_is_told", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.serve();
            // It handles the signal: one that ends it by default would end it in any ice.
            server.release_on_term(-1);
            let Some(ice) = frozen::Ice::around(&server) else { return };
            let outcome = kill(sock.address, &["--grace", "100ms", "--no-force"], 1);
            check_status(&outcome, "partial", &[], &[]);
            assert_eq!(
                outcome["failed"][0]["reason"],
                "still there after SIGTERM: its cgroup is frozen (a paused container?), and SIGTERM waits until it thaws"
            );
            drop(ice);
            assert!(server.is_alive());
        }),
        test("stubborn::one_that_not_even_sigkill_ends_is_stuck", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.serve();
            let Some(disk) = fuse::Dead::mount(&stage.path("disk")) else { return };
            server.begin(&format!("look-up {}", stage.path("disk").join("file").display()));
            disk.await_request();
            let outcome = kill(sock.address, &["--grace", "100ms"], 1);
            check_status(&outcome, "stuck", &[], &[]);
            assert_eq!(outcome["diagnostics"]["findings"][0]["kind"], "held", "{outcome}");
            let reason = outcome["failed"][0]["reason"].as_str().expect("a reason");
            assert!(
                reason.starts_with("still there after SIGKILL: it is in uninterruptible sleep (state D, in ")
                    && reason.ends_with("), where SIGKILL does not reach it"),
                "{reason}"
            );
            assert_eq!((&outcome["still_listening"], &outcome["remaining_pids"]), (&json!(true), &json!([server.pid])));
            assert!(server.is_alive());
            drop(disk);
            server.wait();
        }),
        test("stubborn::gigabytes_are_torn_down_before_the_port_is_called_free", || {
            let available = fs::read_to_string("/proc/meminfo").expect("meminfo");
            let available = available.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
            let kibibytes: u64 =
                available.and_then(|text| text.split_whitespace().next()).and_then(|n| n.parse().ok()).unwrap_or(0);
            if kibibytes < 4 << 20 {
                return skip("memory", &format!("2 GiB are to be used, and {} MiB are available", kibibytes >> 10));
            }
            let stage = Stage::new();
            let server = stage.puppet();
            server.touch(2048);
            let sock = server.serve();
            let outcome = kill(sock.address, &["-9"], 0);
            check_status(&outcome, "cleaned", &[&server], &[&server]);
        }),
        test("stubborn::where_one_ends_and_another_does_not_both_are_told", || {
            let stage = Stage::new();
            let (polite, deaf) = (stage.puppet(), stage.puppet());
            let sock = polite.tcp("127.0.0.1:0", "reuseport");
            deaf.ignore_term();
            deaf.tcp(&sock.address.to_string(), "reuseport");
            let names = [(&polite, "POLITE"), (&deaf, "DEAF")];
            let (out, _) = kill_text(sock.address, &["--grace", "100ms", "--no-force"], 1, &names);
            assert_eq!(
                out,
                "PORT/tcp is still taken: terminated POLITE; DEAF: still there after SIGTERM: it ignores SIGTERM; \
                 --no-force left those that outlived SIGTERM\n\
                 1 port not: 1 process terminated, 1 still there\n"
            );
            polite.wait();
            assert!(deaf.is_alive());
            check_status(&kill(sock.address, &["-9"], 0), "cleaned", &[&deaf], &[&deaf]);
        }),
    ]
}

/// Those who close the port and go on.
fn releasing() -> Vec<Test> {
    vec![
        test("stubborn::a_port_that_is_let_go_of_is_noticed_at_once_and_its_server_lives", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.serve();
            server.release_on_term(sock.fd);
            let outcome = kill(sock.address, &["--grace", "60s"], 0);
            let late = Duration::from_nanos(monotonic_ns() - server.released_at());
            check_status(&outcome, "cleaned", &[], &[]);
            assert!(message(&outcome).ends_with("let go of the port and did not end yet"), "{outcome}");
            assert!(server.is_alive());
            // Generous, for a busy machine: the end of portwatch itself is in it. It is the grace that must not be.
            assert!(late < Duration::from_secs(10), "{late:?}");
            eprintln!("returned {late:?} after the close");
        }),
        test("stubborn::a_port_with_waiting_clients_is_noticed_as_well", || {
            let stage = Stage::new();
            let (server, client) = (stage.puppet(), stage.puppet());
            let sock = server.tcp("127.0.0.1:0", "reuseaddr");
            client.connect(sock.address);
            server.release_on_term(sock.fd);
            check_status(&kill(sock.address, &["--grace", "60s"], 0), "cleaned", &[], &[]);
            assert!(server.is_alive() && client.is_alive());
        }),
        test("stubborn::udp_that_is_let_go_of_is_noticed", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.udp("127.0.0.1:0", "");
            server.release_on_term(sock.fd);
            let target = format!("{}/udp", sock.port());
            let run = portwatch(&["kill", &target, "--json", "--settle", "0", "--grace", "60s"]).expect(0);
            check_status(&run.json()[0], "cleaned", &[], &[]);
            assert!(server.is_alive());
        }),
        test("stubborn::in_another_network_namespace_it_is_noticed_as_well", || {
            let stage = Stage::new();
            let server = stage.puppet();
            if !server.unshare_net() {
                return;
            }
            let sock = server.serve();
            server.release_on_term(sock.fd);
            let netns = fs::metadata(format!("/proc/{}/ns/net", server.pid)).expect("a namespace");
            let netns = std::os::unix::fs::MetadataExt::ino(&netns).to_string();
            let target = format!("{}/tcp", sock.port());
            let arguments = ["kill", &target, "--netns", &netns, "--json", "--settle", "0", "--grace", "60s"];
            let run = portwatch(&arguments).expect(0);
            check_status(&run.json()[0], "cleaned", &[], &[]);
            server.tcp(&sock.address.to_string(), "");
        }),
    ]
}

/// The first of the ports that a crowd has, in a network namespace of its own.
const FIRST_PORT: u16 = 10_001;
const CROWD: u16 = 300;

/// So many servers on a range of ports, one of which ignores SIGTERM: `portwatch` is run beside them.
fn crowd(files: Option<u64>) {
    let stage = Stage::new();
    let host = stage.puppet();
    if !host.unshare_net() {
        return;
    }
    let checker = host.fork();
    let servers: Vec<Puppet> = (0..CROWD).map(|_| host.fork()).collect();
    for (server, port) in servers.iter().zip(FIRST_PORT..) {
        server.tcp(&format!("127.0.0.1:{port}"), "");
    }
    servers[7].ignore_term();
    if let Some(files) = files {
        host.limit_files(files);
    }
    let range = format!("{FIRST_PORT}-{}", FIRST_PORT + CROWD - 1);
    let program = binary().to_str().expect("a path without surprises").to_owned();
    let started = Instant::now();
    let (code, output) = host.run(&program, &["kill", &range, "--json", "--yes", "--grace", "300ms", "--no-force"]);
    eprintln!("{CROWD} listeners in {:?}", started.elapsed());
    let outcomes: Value = serde_json::from_slice(&output).expect("JSON");
    let outcomes = outcomes.as_array().expect("an array");
    assert_eq!((code, outcomes.len()), (1, usize::from(CROWD)));
    for ((outcome, server), port) in outcomes.iter().zip(&servers).zip(FIRST_PORT..) {
        assert_eq!(outcome["port"], port);
        if port == FIRST_PORT + 7 {
            check_status(outcome, "partial", &[], &[]);
            assert!(server.is_alive());
        } else {
            check_status(outcome, "cleaned", &[server], &[]);
            checker.tcp(&format!("127.0.0.1:{port}"), "reuseaddr");
        }
    }
}

fn many() -> Vec<Test> {
    vec![
        test("stubborn::three_hundred_listeners_are_freed_but_for_one_that_refuses", || crowd(None)),
        test("stubborn::three_hundred_listeners_are_freed_with_few_descriptors", || crowd(Some(64))),
        test("stubborn::a_summary_counts_what_became_of_several", || {
            let stage = Stage::new();
            let (one, two) = (stage.puppet(), stage.puppet());
            let (first, second) = (one.serve(), two.serve());
            let run = portwatch(&["kill", &targets(&[first.address, second.address]), "--yes", "--settle", "0"]);
            let text = run.expect(0).text();
            assert_eq!(text.lines().last(), Some("2 ports freed: 2 processes terminated"), "{text}");
            check_promise(0, &[first.address, second.address]);
        }),
        test("stubborn::quiet_says_only_what_failed", || {
            let stage = Stage::new();
            let (polite, deaf) = (stage.puppet(), stage.puppet());
            deaf.ignore_term();
            let (first, second) = (polite.serve(), deaf.serve());
            let ports = targets(&[first.address, second.address]);
            let Run { code, stdout, stderr } =
                portwatch(&["kill", &ports, "-q", "--yes", "--no-force", "--grace", "100ms", "--settle", "0"]);
            let errors = String::from_utf8(stderr).expect("text");
            assert_eq!((code, stdout.len(), errors.lines().count()), (Some(1), 0, 1), "{errors}");
            assert!(errors.contains(&format!("{}/tcp is still taken", second.port())), "{errors}");
            check_promise(0, &[first.address]);
        }),
    ]
}

fn targets(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(|a| format!("{}/tcp", a.port())).collect::<Vec<_>>().join(",")
}
