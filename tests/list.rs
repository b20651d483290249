//! `list` equals the truth of /proc after every way in which a socket begins, changes hands or ends.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::agent::Agent;
use crate::oracle::truth;
use crate::puppet::Stage;
use crate::subject::{self, binary, check_list, command, finish, portwatch, rows, skip};
use crate::{Test, test};

/// However the directory of a server is written, and from where.
fn directories() {
    let stage = Stage::new();
    let base = fs::canonicalize(stage.path("")).expect("the stage");
    let work = base.join("work[1]");
    for directory in ["web_1", "web_2/deep", "work[1]/x"] {
        fs::create_dir_all(base.join(directory)).expect("a directory");
    }
    let places = ["web_1", "web_2", "web_2/deep", "work[1]", "work[1]/x"];
    let servers: Vec<_> = places
        .iter()
        .map(|place| {
            let puppet = stage.puppet();
            puppet.change_directory(&base.join(place));
            let sock = puppet.serve();
            (puppet, sock.port(), *place)
        })
        .collect();
    let agent = Agent::start(&stage);
    let found = |from: &Path, glob: &str, with_agent: bool| -> BTreeSet<&str> {
        let mut list = command(&["list", "--json", "--cwd", glob]);
        if with_agent {
            list.arg("--agent").env("PORTWATCH_SOCKET", &agent.socket);
        }
        let told = finish(list.current_dir(from).spawn().expect("portwatch")).expect(0).json();
        let ports: Vec<u64> =
            told.as_array().expect("rows").iter().map(|row| row["port"].as_u64().expect("a port")).collect();
        let is_found = |port: u16| ports.contains(&u64::from(port));
        servers.iter().filter(|(_, port, _)| is_found(*port)).map(|(_, _, place)| *place).collect()
    };
    let absolute = |rest: &str| format!("{}/{rest}", base.display());
    for (from, glob, want) in [
        (&base, "web_1", &["web_1"][..]),
        (&base, "./web_1/", &["web_1"]),
        (&base, "web_*", &["web_1", "web_2", "web_2/deep"]),
        (&base, "./web_?", &["web_1", "web_2"]),
        (&base, "{web_1,web_2/deep}/", &[]),
        (&base, "./{web_1,web_2/deep}/", &["web_1", "web_2/deep"]),
        (&base, "*/web_1/", &["web_1"]),
        (&work, ".", &["work[1]"]),
        (&work, "./", &["work[1]"]),
        (&work, "./*", &["work[1]/x"]),
        (&work, "x", &["work[1]/x"]),
        (&work, "../web_2", &["web_2"]),
        (&work, "../web_2/../web_1", &["web_1"]),
        (&work, &absolute("web_1/"), &["web_1"]),
        (&work, &absolute("./web_1//"), &["web_1"]),
        (&work, &absolute("web_1/../web_2"), &["web_2"]),
        (&work, "web_1", &[]),
    ] {
        for with_agent in [false, true] {
            let told = found(from, glob, with_agent);
            assert_eq!(told, want.iter().copied().collect(), "{glob} in {} ({with_agent})", from.display());
        }
    }
    let run = finish(command(&["list", "--cwd", "/tmp/*/.."]).spawn().expect("portwatch")).expect(2);
    assert!(run.errors().contains("'..' after a glob leads to no one directory"), "{}", run.errors());
    // Where one is may be nowhere, which matters to those alone who name it.
    let gone = base.join("gone");
    fs::create_dir(&gone).expect("a directory");
    let nowhere = |glob: &str| {
        let script = "cd \"$1\" && rmdir \"$1\" && exec \"$0\" list --no-agent --cwd \"$2\"";
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).arg(binary()).arg(&gone).arg(glob);
        let run = finish(shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("sh"));
        fs::create_dir(&gone).expect("the directory");
        run
    };
    nowhere("/nowhere/at/all").expect(0);
    let run = nowhere("x").expect(2);
    assert!(run.errors().contains("this directory is not known ("), "{}", run.errors());
}

pub fn trials() -> Vec<Test> {
    vec![
        test("list::addresses_of_every_family_are_told_apart", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            for (address, flags) in [
                ("127.0.0.1:0", ""),
                ("0.0.0.0:0", ""),
                ("[::1]:0", ""),
                ("[::]:0", "v6only"),
                ("[::]:0", "dual"),
                ("[::ffff:127.0.0.1]:0", "dual"),
            ] {
                puppet.tcp(address, flags);
                check_list(&format!("listening at {address} {flags}"), &stage, &[&puppet]);
            }
        }),
        test("list::a_bound_socket_is_no_listener_until_it_listens", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            let sock = puppet.bind("127.0.0.1:0", "");
            check_list("bind", &stage, &[&puppet]);
            puppet.listen(sock.fd);
            check_list("listen", &stage, &[&puppet]);
            puppet.close(sock.fd);
            check_list("close", &stage, &[&puppet]);
            assert!(truth(&stage, &[&puppet]).is_empty());
        }),
        test("list::listening_without_bind_shows_the_port_the_kernel_gave", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            let sock = puppet.socket("tcp4", "");
            assert_eq!(sock.port(), 0);
            assert_ne!(puppet.listen(sock.fd).port(), 0);
            check_list("listen without bind", &stage, &[&puppet]);
        }),
        test("list::shutdown_ends_a_listener_and_listen_begins_it_again", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            let sock = puppet.serve();
            puppet.shutdown(sock.fd);
            check_list("shutdown", &stage, &[&puppet]);
            puppet.listen(sock.fd);
            check_list("listen again", &stage, &[&puppet]);
        }),
        test("list::duplicates_are_descriptors_of_one_listener", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            let sock = puppet.serve();
            let copy = puppet.dup(sock.fd);
            check_list("dup", &stage, &[&puppet]);
            puppet.close(sock.fd);
            check_list("closing the first", &stage, &[&puppet]);
            puppet.close(copy);
            check_list("closing the last", &stage, &[&puppet]);
        }),
        test("list::holders_follow_fork_exec_and_exit", || {
            let stage = Stage::new();
            let parent = stage.puppet();
            let sock = parent.serve();
            let other = parent.tcp("127.0.0.1:0", "cloexec");
            let child = parent.fork();
            check_list("fork", &stage, &[&parent, &child]);
            child.exec();
            check_list("exec", &stage, &[&parent, &child]);
            child.set_cloexec(sock.fd, true);
            let grandchild = child.fork();
            check_list("fork of the child", &stage, &[&parent, &child, &grandchild]);
            child.exec();
            check_list("exec with close-on-exec", &stage, &[&parent, &child, &grandchild]);
            parent.close(other.fd);
            check_list("close", &stage, &[&parent, &child, &grandchild]);
            parent.exit();
            check_list("exit of the parent", &stage, &[&child, &grandchild]);
            grandchild.exit();
            check_list("exit of the last holder", &stage, &[&child]);
            assert!(truth(&stage, &[&child]).is_empty());
        }),
        test("list::a_descriptor_passed_over_a_socket_is_a_ghost_on_its_way", || {
            let stage = Stage::new();
            let (giver, taker) = (stage.puppet(), stage.puppet());
            taker.open_mailbox();
            let sock = giver.serve();
            giver.send_fd(sock.fd, &taker);
            check_list("sending", &stage, &[&giver, &taker]);
            giver.close(sock.fd);
            check_list("closing what was sent", &stage, &[&giver, &taker]);
            taker.receive_fd();
            check_list("receiving", &stage, &[&giver, &taker]);
        }),
        test("list::twins_by_reuseport_are_two_listeners", || {
            let stage = Stage::new();
            let (first, second) = (stage.puppet(), stage.puppet());
            let sock = first.tcp("127.0.0.1:0", "reuseport");
            second.tcp(&sock.address.to_string(), "reuseport");
            check_list("the second twin", &stage, &[&first, &second]);
            first.exit();
            check_list("the end of the first", &stage, &[&second]);
        }),
        test("list::mptcp_listeners_are_shown_once_and_as_such", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            let sock = match puppet.try_tcp("127.0.0.1:0", "mptcp") {
                Ok(sock) => sock,
                Err(refused) => return skip("mptcp", &refused.text),
            };
            check_list("listen", &stage, &[&puppet]);
            let run = portwatch(&["list", "--json", &sock.port().to_string()]).expect(0);
            assert_eq!(run.json()[0]["mptcp"], true, "{}", run.text());
            puppet.close(sock.fd);
            check_list("close", &stage, &[&puppet]);
        }),
        test("list::udp_sockets_are_shown_when_bound", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            let sock = puppet.udp("127.0.0.1:0", "");
            puppet.udp("[::]:0", "dual");
            puppet.udp("[::1]:0", "v6only");
            check_list("bind", &stage, &[&puppet]);
            let child = puppet.fork();
            puppet.close(sock.fd);
            check_list("fork and close", &stage, &[&puppet, &child]);
        }),
        test("list::clients_and_accepted_connections_are_no_listeners", || {
            let stage = Stage::new();
            let (server, client) = (stage.puppet(), stage.puppet());
            let sock = server.serve();
            client.connect(sock.address);
            server.accept(sock.fd);
            check_list("accept", &stage, &[&server, &client]);
            assert_eq!(truth(&stage, &[&server, &client]).len(), 1);
        }),
        test("list::a_zombie_leader_is_the_holder_while_its_thread_serves", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            puppet.serve();
            puppet.serve_from_thread();
            check_list("the leader's exit", &stage, &[&puppet]);
            puppet.serve();
            check_list("another listener", &stage, &[&puppet]);
        }),
        test("list::other_network_namespaces_are_listed_with_all_and_by_id", || {
            let stage = Stage::new();
            let (here, there) = (stage.puppet(), stage.puppet());
            if !there.unshare_net() {
                return;
            }
            let near = here.serve();
            let far = there.tcp(&near.address.to_string(), "");
            check_list("the same address in two namespaces", &stage, &[&here, &there]);
            let both = truth(&stage, &[&here, &there]);
            let only = |inode| -> BTreeSet<_> { both.iter().filter(|row| row.inode == inode).cloned().collect() };
            let listed = |arguments: &[&str]| {
                rows(&portwatch(&[&["list", "--json"], arguments].concat()).expect(0).json(), &stage, &[&here, &there])
            };
            assert_eq!(listed(&[]), only(near.inode));
            assert_eq!(listed(&["--netns", "self"]), only(near.inode));
            let id = only(far.inode).first().expect("the far one").netns.to_string();
            assert_eq!(listed(&["--netns", &id]), only(far.inode));
        }),
        test("list::a_namespace_of_ones_own_is_listed_whole_and_nothing_else", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            if !puppet.unshare_net() {
                return;
            }
            puppet.tcp("[::]:80", "dual");
            puppet.udp("0.0.0.0:53", "");
            let child = puppet.fork();
            let netns = std::fs::File::open(format!("/proc/{}/ns/net", puppet.pid)).expect("its namespace");
            let mut command = command(&["list", "--json"]);
            // SAFETY: setns is async-signal-safe and touches only the child.
            unsafe {
                command.pre_exec(move || {
                    rustix::thread::move_into_link_name_space(
                        std::os::fd::AsFd::as_fd(&netns),
                        Some(rustix::thread::LinkNameSpaceType::Network),
                    )
                    .map_err(Into::into)
                });
            }
            let output = finish(command.spawn().expect("portwatch")).expect(0).json();
            let listed = rows(&output, &stage, &[&puppet, &child]);
            assert_eq!(listed, truth(&stage, &[&puppet, &child]));
            assert_eq!(output.as_array().map(Vec::len), Some(2), "{output}");
        }),
        test("list::selectors_pick_by_port_protocol_address_and_pid", || {
            let stage = Stage::new();
            let (first, second) = (stage.puppet(), stage.puppet());
            let v4 = first.serve();
            let v6 = second.tcp("[::1]:0", "v6only");
            let udp = second.udp(&format!("127.0.0.1:{}", v4.port()), "");
            let (port4, port6) = (v4.port().to_string(), v6.port().to_string());
            let range = format!("{}-{}", v4.port().min(v6.port()), v4.port().max(v6.port()));
            let pid = second.pid.to_string();
            let cases: &[(&[&str], &[u64])] = &[
                (&[&port4], &[v4.inode, udp.inode]),
                (&[&format!(":{port4}")], &[v4.inode, udp.inode]),
                (&[&format!("{port4}/tcp")], &[v4.inode]),
                (&[&format!("{port4}/udp")], &[udp.inode]),
                (&[&port4, "--udp"], &[udp.inode]),
                (&[&format!("{port4},{port6}"), "--tcp"], &[v4.inode, v6.inode]),
                (&[&range, "-6"], &[v6.inode]),
                (&[&range, "-4", "--tcp"], &[v4.inode]),
                (&[&format!("127.0.0.1:{port4}"), "--tcp"], &[v4.inode]),
                (&[&format!("[::1]:{port6}")], &[v6.inode]),
                (&["--pid", &pid], &[v6.inode, udp.inode]),
                (&["--addr", "::1", &port6], &[v6.inode]),
            ];
            for (arguments, inodes) in cases {
                let run = portwatch(&[&["list", "--json"], *arguments].concat()).expect(0);
                let listed: BTreeSet<u64> =
                    rows(&run.json(), &stage, &[&first, &second]).iter().map(|row| row.inode).collect();
                assert_eq!(listed, inodes.iter().copied().collect(), "{arguments:?}");
            }
        }),
        test("list::every_process_detail_is_the_process_own", || {
            let stage = Stage::new();
            let puppet = stage.puppet_with_arguments(&["--port", "8000"]);
            puppet.set_name(b"my server");
            let sock = puppet.serve();
            let run = portwatch(&["list", "--json", &sock.port().to_string()]).expect(0);
            let holder = &run.json()[0]["holders"][0];
            assert_eq!(holder["name"], "my server");
            assert_eq!(holder["command"], serde_json::json!(["puppet", "--port", "8000"]));
            let link = |name: &str| std::fs::read_link(format!("/proc/{}/{name}", puppet.pid)).expect("a link");
            assert_eq!(holder["exe"].as_str(), link("exe").to_str());
            assert_eq!(holder["cwd"].as_str(), link("cwd").to_str());
            assert_eq!(holder["ppid"], std::process::id());
            assert_eq!(holder["binder"], true);
        }),
        test("list::nothing_to_show_is_one_friendly_line_and_an_empty_array", || {
            let run = portwatch(&["list", "1/tcp", "--pid", "1"]).expect(0);
            assert_eq!((run.text().as_str(), run.errors().lines().count()), ("", 1), "{}", run.errors());
            let run = portwatch(&["list", "--json", "1/tcp", "--pid", "1"]).expect(0);
            assert_eq!(run.json(), serde_json::json!([]));
        }),
        test("list::a_reader_that_went_away_is_no_error", || {
            for arguments in [&["list"][..], &["list", "--json"], &["status"]] {
                let (reader, writer) = std::io::pipe().expect("a pipe");
                drop(reader);
                let run = finish(command(arguments).stdout(Stdio::from(writer)).spawn().expect("portwatch"));
                if arguments[0] == "list" {
                    assert_eq!(run.code, Some(0), "{arguments:?}: {}", run.errors());
                }
                assert!(!run.errors().contains("panicked"), "{}", run.errors());
            }
        }),
        test("list::a_pipe_gets_no_colour_and_whole_command_lines", || {
            let stage = Stage::new();
            let long = "x".repeat(600);
            let puppet = stage.puppet_with_arguments(&[&long]);
            let sock = puppet.serve();
            let run = portwatch(&["list", &sock.port().to_string()]).expect(0);
            assert!(!run.text().contains('\u{1b}'), "{}", run.text());
            assert!(run.text().contains(&long), "{}", run.text());
            let lines = run.text().lines().filter(|line| line.contains(&sock.port().to_string())).count();
            assert_eq!(lines, 1, "{}", run.text());
        }),
        test("list::a_directory_is_found_however_its_path_is_written", directories),
        test("list::bad_usage_is_exit_two", || {
            for arguments in [&["list", "99999"][..], &["list", "http"], &["list", "9-3"], &["list", "--frobnicate"]] {
                let run = subject::portwatch(arguments).expect(2);
                assert_eq!(run.text(), "", "{arguments:?}");
            }
            portwatch(&["frobnicate"]).expect(2);
        }),
    ]
}
