//! `kill` frees ports, says what it did, and ends nobody else.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::agent::Agent;
use crate::puppet::{Puppet, Stage};
use crate::subject::{binary, command, finish, portwatch};
use crate::{Test, test};

/// Runs `kill --json` on a TCP port; the one outcome.
#[track_caller]
fn kill(port: u16, arguments: &[&str], code: i32) -> Value {
    let target = format!("{port}/tcp");
    let run = portwatch(&[&["kill", &target, "--json"], arguments].concat()).expect(code);
    let outcomes = run.json();
    assert_eq!(outcomes.as_array().map(Vec::len), Some(1), "{outcomes}");
    assert_eq!((&outcomes[0]["port"], &outcomes[0]["proto"]), (&json!(port), &json!("tcp")));
    assert!(outcomes[0]["elapsed_ms"].is_u64(), "{outcomes}");
    outcomes[0].clone()
}

/// What an outcome says, without what varies.
fn gist(outcome: &Value) -> (&str, Vec<u64>, Vec<u64>, bool, Vec<u64>) {
    let pids = |field: &str| -> Vec<u64> {
        let list = outcome[field].as_array().unwrap_or_else(|| panic!("no {field} in {outcome}"));
        let mut pids: Vec<u64> = list.iter().map(|pid| pid.as_u64().expect("a pid")).collect();
        pids.sort_unstable();
        pids
    };
    let status = outcome["status"].as_str().expect("a status");
    let still = outcome["still_listening"].as_bool().expect("still_listening");
    (status, pids("killed"), pids("forced"), still, pids("remaining_pids"))
}

fn pids(puppets: &[&Puppet]) -> Vec<u64> {
    let mut pids: Vec<u64> = puppets.iter().map(|puppet| u64::from(puppet.pid)).collect();
    pids.sort_unstable();
    pids
}

/// Runs `kill` with these arguments twice, alone and through an agent, on a port that two servers have: one on `[::1]`, whose
/// command line has `of-ours`, and another on 127.0.0.1, which is handed over with its address.
fn twice(arguments: &[&str], code: i32, check: impl Fn(&Puppet, &(Puppet, SocketAddr), &[Value; 2])) {
    let stage = Stage::new();
    let agent = Agent::start(&stage);
    for through_agent in [false, true] {
        let (server, other) = (stage.puppet_with_arguments(&["of-ours"]), stage.puppet());
        let address = other.serve().address;
        server.tcp(&format!("[::1]:{}", address.port()), "v6only");
        let target = format!("{}/tcp", address.port());
        let arguments = [&["kill", &target, "--json"], arguments].concat();
        let outcome = || {
            let run = if through_agent { agent.portwatch(&arguments) } else { portwatch(&arguments) };
            run.expect(code).json()[0].clone()
        };
        let outcomes = [outcome(), outcome()];
        let other = (other, address);
        check(&server, &other, &outcomes);
        server.wait();
        assert!(other.0.is_alive());
    }
}

pub fn trials() -> Vec<Test> {
    vec![
        test("kill::a_server_ends_at_sigterm_and_the_port_is_free", || {
            let stage = Stage::new();
            let (server, neighbour) = (stage.puppet(), stage.puppet());
            let sock = server.serve();
            neighbour.serve();
            let outcome = kill(sock.port(), &[], 0);
            assert_eq!(gist(&outcome), ("cleaned", pids(&[&server]), vec![], false, vec![]), "{outcome}");
            assert_eq!(server.wait(), Some(nix::libc::SIGTERM));
            neighbour.tcp(&sock.address.to_string(), "");
        }),
        test("kill::a_port_that_only_left_out_listeners_have_is_not_called_free", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.serve();
            for filter in [&["--command", "nosuch*"][..], &["--older-than", "1d"]] {
                let outcome = kill(sock.port(), filter, 1);
                assert_eq!(gist(&outcome), ("partial", vec![], vec![], true, pids(&[&server])), "{outcome}");
            }
            assert!(server.is_alive());
        }),
        test("kill::a_family_or_an_address_narrows_what_is_to_be_free", || {
            for filter in [&["-6"][..], &["--addr", "[::1]"], &["--addr", "::1"]] {
                twice(filter, 0, |server, other, outcomes| {
                    let note = format!("not meant and still held: {} by ", other.1);
                    for (outcome, status) in outcomes.iter().zip(["cleaned", "free"]) {
                        let message = outcome["diagnostics"]["message"].as_str().unwrap_or_default();
                        assert!(message.starts_with(&note), "{outcome}");
                        assert_eq!((gist(outcome).0, gist(outcome).3), (status, false), "{outcome}");
                    }
                    assert_eq!(gist(&outcomes[0]).1, pids(&[server]));
                });
            }
        }),
        test("kill::a_holder_that_is_left_out_keeps_the_port_whoever_else_is_ended", || {
            twice(&["--command", "puppet of-ours*"], 1, |server, other, outcomes| {
                assert_eq!(gist(&outcomes[0]).1, pids(&[server]));
                for outcome in outcomes {
                    let (status, _, _, still, remaining) = gist(outcome);
                    assert_eq!((status, still, remaining), ("partial", true, pids(&[&other.0])), "{outcome}");
                }
            });
        }),
        test("kill::what_is_left_out_and_goes_with_the_rest_is_not_told", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let port = server.serve().port();
            server.tcp(&format!("[::1]:{port}"), "v6only");
            let outcome = kill(port, &["-6"], 0);
            assert_eq!((gist(&outcome).0, &outcome["diagnostics"]), ("cleaned", &Value::Null), "{outcome}");
            server.wait();
        }),
        test("kill::a_dry_run_tells_what_a_kill_would_find", || {
            let stage = Stage::new();
            let (puppet, server) = (stage.puppet(), stage.puppet());
            // Bound, and nobody listens.
            let sock = puppet.bind("127.0.0.1:0", "");
            let preview = kill(sock.port(), &["--dry-run"], 0);
            let real = kill(sock.port(), &[], 1);
            assert_eq!((gist(&preview), gist(&real).0), (gist(&real), "stuck"), "{preview}");
            assert_eq!(preview["diagnostics"]["message"], real["diagnostics"]["message"]);
            let sock = server.serve();
            let said = |arguments: &[&str]| {
                let target = format!("{}/tcp", sock.port());
                portwatch(&[&["kill", &target, "--dry-run"], arguments].concat()).expect(0).text()
            };
            for (arguments, want) in [
                (&[][..], "would be freed: terminate "),
                (&["-9"], "would be freed: kill by force "),
                (&["-s", "KILL"], "would be freed: kill by force "),
                (&["-s", "INT"], "would be freed: send SIGINT to "),
                (&["--command", "nosuch*"], "would stay: held by "),
            ] {
                assert!(said(arguments).contains(want), "{arguments:?}: {}", said(arguments));
            }
            assert!(server.is_alive() && puppet.is_alive());
        }),
        test("kill::a_free_port_is_told_with_the_address_that_was_named", || {
            let stage = Stage::new();
            let port = stage.puppet().serve().port();
            let run = portwatch(&["kill", &format!("127.0.0.1:{port}/tcp")]).expect(0);
            assert_eq!(run.text(), format!("{port}/tcp is free already on 127.0.0.1\n"));
        }),
        test("kill::a_listener_on_another_address_counts_where_it_is_in_the_way", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let port = server.serve().port();
            let outcome = |target: String, code: i32| {
                portwatch(&["kill", &target, "--json", "--tcp"]).expect(code).json()[0].clone()
            };
            let taken = outcome(format!("0.0.0.0:{port}"), 1);
            assert_eq!(gist(&taken), ("partial", vec![], vec![], true, pids(&[&server])), "{taken}");
            let free = outcome(format!("127.0.0.2:{port}"), 0);
            assert_eq!(gist(&free), ("free", vec![], vec![], false, vec![]), "{free}");
            assert!(server.is_alive());
        }),
        test("kill::a_server_that_ignores_sigterm_is_forced_after_the_grace", || {
            let stage = Stage::new();
            let server = stage.puppet();
            server.ignore_term();
            let sock = server.serve();
            let outcome = kill(sock.port(), &["--grace", "200ms"], 0);
            assert_eq!(gist(&outcome), ("cleaned", pids(&[&server]), pids(&[&server]), false, vec![]), "{outcome}");
            assert!(outcome["elapsed_ms"].as_u64() >= Some(200), "{outcome}");
            assert_eq!(server.wait(), Some(nix::libc::SIGKILL));
        }),
        test("kill::no_force_leaves_a_server_that_ignores_sigterm", || {
            let stage = Stage::new();
            let server = stage.puppet();
            server.ignore_term();
            let sock = server.serve();
            let outcome = kill(sock.port(), &["--grace", "200ms", "--no-force"], 1);
            assert_eq!(gist(&outcome), ("partial", vec![], vec![], true, pids(&[&server])), "{outcome}");
            assert_eq!(outcome["failed"][0]["pid"], server.pid, "{outcome}");
            assert!(server.is_alive());
        }),
        test("kill::force_begins_with_sigkill", || {
            for flag in ["--force", "-9"] {
                let stage = Stage::new();
                let server = stage.puppet();
                server.ignore_term();
                let sock = server.serve();
                let outcome = kill(sock.port(), &[flag], 0);
                assert_eq!(gist(&outcome).0, "cleaned", "{outcome}");
                assert_eq!(server.wait(), Some(nix::libc::SIGKILL));
            }
        }),
        test("kill::every_holder_of_a_port_ends_and_no_other_child", || {
            let stage = Stage::new();
            let master = stage.puppet();
            let bystander = master.fork();
            let sock = master.serve();
            let worker = master.fork();
            let twin = stage.puppet();
            let outcome = kill(sock.port(), &["--yes"], 0);
            assert_eq!(gist(&outcome), ("cleaned", pids(&[&master, &worker]), vec![], false, vec![]), "{outcome}");
            master.wait();
            worker.wait();
            assert!(bystander.is_alive() && twin.is_alive());
        }),
        test("kill::clients_of_the_port_live", || {
            let stage = Stage::new();
            let (server, client) = (stage.puppet(), stage.puppet());
            let sock = server.tcp("127.0.0.1:0", "reuseaddr");
            client.connect(sock.address);
            server.accept(sock.fd);
            assert_eq!(gist(&kill(sock.port(), &[], 0)).1, pids(&[&server]));
            assert!(client.is_alive());
        }),
        test("kill::a_zombie_leader_whose_thread_serves_is_ended", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.serve();
            server.serve_from_thread();
            let outcome = kill(sock.port(), &["--grace", "500ms"], 0);
            assert_eq!(gist(&outcome).0, "cleaned", "{outcome}");
            server.wait();
        }),
        test("kill::udp_is_freed_when_asked_for_and_tcp_stays", || {
            let stage = Stage::new();
            let (tcp, udp) = (stage.puppet(), stage.puppet());
            let sock = tcp.serve();
            udp.udp(&sock.address.to_string(), "");
            let run = portwatch(&["kill", &format!("{}/udp", sock.port()), "--json"]).expect(0);
            assert_eq!(gist(&run.json()[0]).1, pids(&[&udp]));
            assert!(tcp.is_alive());
        }),
        test("kill::nothing_there_is_free_and_no_failure", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            // Bound and not listening: nobody else gets the port meanwhile, unless by SO_REUSEADDR, as servers do.
            let sock = puppet.bind("127.0.0.1:0", "reuseaddr");
            let outcome = kill(sock.port(), &[], 0);
            assert_eq!(gist(&outcome), ("free", vec![], vec![], false, vec![]), "{outcome}");
            assert!(puppet.is_alive());
        }),
        test("kill::a_dry_run_plans_and_ends_nobody", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.serve();
            let outcome = kill(sock.port(), &["--dry-run"], 0);
            assert_eq!(gist(&outcome).0, "planned", "{outcome}");
            assert!(gist(&outcome).1.is_empty(), "{outcome}");
            let text = portwatch(&["kill", &sock.port().to_string(), "--dry-run"]).expect(0);
            assert!(text.text().contains(&server.pid.to_string()), "{}", text.text());
            assert!(server.is_alive());
        }),
        test("kill::several_ports_have_an_outcome_each", || {
            let stage = Stage::new();
            let (first, second) = (stage.puppet(), stage.puppet());
            let (one, two) = (first.serve(), second.serve());
            let targets = [format!("{}/tcp", one.port()), format!("{}/tcp", two.port())];
            let run = portwatch(&["kill", &targets[0], &targets[1], "--json", "--yes"]).expect(0);
            let outcomes = run.json();
            let mut ports: Vec<u64> =
                outcomes.as_array().expect("an array").iter().map(|o| o["port"].as_u64().unwrap()).collect();
            ports.sort_unstable();
            let mut expected = vec![u64::from(one.port()), u64::from(two.port())];
            expected.sort_unstable();
            assert_eq!(ports, expected);
            first.wait();
            second.wait();
        }),
        test("kill::an_ancestor_that_holds_the_port_is_spared", || {
            let stage = Stage::new();
            let shell = stage.puppet();
            // Kept from the child: portwatch itself must not hold the port as well.
            let sock = shell.tcp("127.0.0.1:0", "cloexec");
            let program = binary().to_str().expect("a path without surprises").to_owned();
            let (code, output) = shell.run(&program, &["kill", &format!("{}/tcp", sock.port()), "--json"]);
            let outcome: Value = serde_json::from_slice(&output).expect("JSON");
            assert_eq!((code, gist(&outcome[0]).1, gist(&outcome[0]).3), (1, vec![], true), "{outcome}");
            assert_eq!(outcome[0]["failed"][0]["pid"], shell.pid, "{outcome}");
            assert!(shell.is_alive());
        }),
        test("kill::portwatch_never_ends_itself", || {
            let stage = Stage::new();
            let shell = stage.puppet();
            // Inherited: portwatch holds the port, as does its parent.
            let sock = shell.serve();
            let program = binary().to_str().expect("a path without surprises").to_owned();
            let (code, output) = shell.run(&program, &["kill", &format!("{}/tcp", sock.port()), "--json"]);
            let outcome: Value = serde_json::from_slice(&output).expect("JSON");
            assert!(code > 0, "{code} {outcome}");
            assert!(gist(&outcome[0]).1.is_empty(), "{outcome}");
            assert!(shell.is_alive());
        }),
        test("kill::the_one_who_takes_the_port_again_is_named", || {
            let stage = Stage::new();
            let supervisor = stage.puppet();
            let server = supervisor.fork();
            let sock = server.tcp("127.0.0.1:0", "reuseport");
            // Bound beforehand, so that the supervisor has the port the moment it listens.
            let spare = supervisor.bind(&sock.address.to_string(), "reuseport");
            let target = format!("{}/tcp", sock.port());
            let (run, _) = crate::gate::run(
                command(&["kill", &target, "--json"]),
                crate::gate::Moment::After(nix::libc::SYS_pidfd_send_signal),
                |_| true,
                || {
                    server.wait();
                    supervisor.listen(spare.fd);
                },
            );
            let outcome = run.expect(1).json()[0].clone();
            let (status, killed, _, still, remaining) = gist(&outcome);
            assert_eq!((status, still), ("respawned", true), "{outcome}");
            assert_eq!((killed, remaining), (pids(&[&server]), pids(&[&supervisor])), "{outcome}");
            assert!(supervisor.is_alive());
        }),
        test("kill::a_child_of_one_who_is_gone_when_its_signal_comes_is_found", || {
            let stage = Stage::new();
            let holder = stage.puppet();
            let sock = holder.serve();
            holder.ignore_term();
            let (pid, mut holder, mut child) = (holder.pid, Some(holder), None);
            let target = format!("{}/tcp", sock.port());
            let run =
                crate::gate::signals(command(&["kill", &target, "--json", "--grace", "100ms"]), |signalled, signal| {
                    if (signalled, signal) == (pid, nix::libc::SIGKILL)
                        && let Some(holder) = holder.take()
                    {
                        child = Some(holder.fork());
                        holder.exit();
                    }
                });
            let child = child.expect("no SIGKILL was about to be sent");
            let outcome = run.expect(0).json()[0].clone();
            assert_eq!(outcome["status"], "cleaned", "{outcome}");
            assert_eq!(child.wait(), Some(nix::libc::SIGKILL));
        }),
        test("kill::one_who_takes_the_port_before_it_is_proved_free_is_named_though_nobody_settles", || {
            let stage = Stage::new();
            let (server, stranger) = (stage.puppet(), stage.puppet());
            let sock = server.tcp("127.0.0.1:0", "reuseport");
            let spare = stranger.bind(&sock.address.to_string(), "reuseport");
            let target = format!("{}/tcp", sock.port());
            let (run, _) = crate::gate::run(
                command(&["kill", &target, "--json", "--settle", "0"]),
                crate::gate::Moment::After(nix::libc::SYS_pidfd_send_signal),
                |_| true,
                || {
                    server.wait();
                    stranger.listen(spare.fd);
                },
            );
            let outcome = run.expect(1).json()[0].clone();
            let (status, killed, _, still, remaining) = gist(&outcome);
            assert_eq!((status, still), ("respawned", true), "{outcome}");
            assert_eq!((killed, remaining), (pids(&[&server]), pids(&[&stranger])), "{outcome}");
            assert!(stranger.is_alive());
        }),
        test("kill::one_who_takes_a_free_port_while_another_is_freed_is_named", || {
            let stage = Stage::new();
            let (server, stranger) = (stage.puppet(), stage.puppet());
            let sock = server.serve();
            let spare = stranger.bind("127.0.0.1:0", "reuseport");
            let targets = [spare.port(), sock.port()].map(|port| format!("{port}/tcp"));
            let (run, _) = crate::gate::run(
                command(&["kill", &targets[0], &targets[1], "--json", "--settle", "0"]),
                crate::gate::Moment::After(nix::libc::SYS_pidfd_send_signal),
                |_| true,
                || stranger.listen(spare.fd),
            );
            let outcomes = run.expect(1).json();
            let of =
                |port: u16| outcomes.as_array().and_then(|all| all.iter().find(|o| o["port"] == port)).expect("one");
            assert_eq!(of(sock.port())["status"], "cleaned", "{outcomes}");
            let (status, killed, _, still, remaining) = gist(of(spare.port()));
            assert_eq!((status, still), ("respawned", true), "{outcomes}");
            assert_eq!((killed, remaining), (Vec::new(), pids(&[&stranger])), "{outcomes}");
            assert!(stranger.is_alive());
        }),
        test("kill::who_receives_the_socket_after_its_holder_ended_ends_as_well", || {
            let stage = Stage::new();
            let (giver, taker, deaf) = (stage.puppet(), stage.puppet(), stage.puppet());
            let (sock, other) = (giver.serve(), deaf.serve());
            // As long as this one lives, the kill goes on.
            deaf.ignore_term();
            taker.open_mailbox();
            giver.send_fd(sock.fd, &taker);
            let targets = [sock.port(), other.port()].map(|port| format!("{port}/tcp"));
            let run = command(&["kill", &targets[0], &targets[1], "--json", "--no-agent"]).spawn().expect("portwatch");
            giver.wait();
            // Until it has been looked, in vain, who else holds the socket: nothing tells.
            thread::sleep(Duration::from_millis(300));
            taker.receive_fd();
            taker.wait();
            deaf.close(other.fd);
            let outcomes = finish(run).expect(0).json();
            let outcomes = outcomes.as_array().expect("outcomes");
            let outcome = outcomes.iter().find(|outcome| outcome["port"] == sock.port()).expect("its outcome");
            let (status, killed, ..) = gist(outcome);
            assert_eq!((status, killed), ("cleaned", pids(&[&giver, &taker])), "{outcome}");
        }),
        test("kill::bad_usage_is_exit_two_and_says_why_in_one_line", || {
            for arguments in [
                &["kill"][..],
                &["kill", "http"],
                &["kill", "0"],
                &["kill", "70000"],
                &["kill", "8000", "--signal", "NONSENSE"],
                &["kill", "8000", "--grace", "soon"],
                &["kill", "8000", "--force", "--no-force"],
            ] {
                let run = portwatch(arguments).expect(2);
                assert_eq!(run.text(), "", "{arguments:?}");
                assert!(!run.errors().trim().is_empty(), "{arguments:?}");
            }
        }),
    ]
}
