//! What a person sees and is asked: usage errors, the preview, the question, the list to pick from.

use std::io::Read;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::agent::Agent;
use crate::puppet::{Puppet, Sock, Stage};
use crate::subject::{binary, command, finish, portwatch, skip};
use crate::terminal::Terminal;
use crate::{Test, test};

fn target(sock: &Sock) -> String {
    format!("{}/tcp", sock.port())
}

fn on(terminal: &Terminal, arguments: &[&str]) -> Child {
    let mut command: Command = command(arguments);
    terminal.spawn(command.env("NO_COLOR", "1"))
}

/// Two servers that have nothing to do with one another, though the test started both.
fn strangers(stage: &Stage) -> [(Puppet, Sock); 2] {
    [(); 2].map(|()| {
        let puppet = stage.puppet();
        let sock = puppet.serve();
        (puppet, sock)
    })
}

/// The table without what varies: ages, and how wide it makes their column.
fn without_age(text: &str) -> Vec<Vec<&str>> {
    let is_age = |word: &&str| word.strip_suffix('s').is_some_and(|number| number.parse::<u32>().is_ok());
    text.lines().map(|line| line.split_whitespace().filter(|word| !is_age(word)).collect()).collect()
}

/// Runs with standard output in a pipe, and answers what it asks on the terminal; what it printed.
fn declined(mut kill: Command, prompt: &str, keys: &str) -> Value {
    let mut terminal = Terminal::new(100);
    kill.env("NO_COLOR", "1").env("TERM", "xterm").stdin(terminal.stdio()).stderr(terminal.stdio());
    let mut child = kill.stdout(Stdio::piped()).spawn().expect("portwatch");
    let mut stdout = child.stdout.take().expect("piped");
    terminal.answer(prompt, keys);
    assert_eq!(terminal.end(child), Some(1), "{}", terminal.said);
    assert!(terminal.said.ends_with("portwatch: nothing was signalled\n"), "{:?}", terminal.said);
    let mut text = String::new();
    stdout.read_to_string(&mut text).expect("standard output");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("not JSON ({error}): {text:?}"))
}

fn no_is_json_too() {
    let stage = Stage::new();
    let mut pair = strangers(&stage);
    pair.sort_by_key(|(_, sock)| sock.port());
    let [(one, first), (other, second)] = &pair;
    let (targets, pids) = ([target(first), target(second)], [one.pid, other.pid].map(|pid| pid.to_string()));
    let named = ["kill", "--json", &targets[0], &targets[1]];
    let since = ["kill", "--json", "--since", "1h", "--pid", &pids[0], "--pid", &pids[1]];
    // As of a dry run: nothing was done, and this would have been.
    let planned = |(puppet, sock): &(Puppet, Sock)| {
        json!({"port": sock.port(), "proto": "tcp", "status": "planned", "killed": [], "forced": [], "failed": [],
            "ghost": [], "still_listening": true, "remaining_pids": [puppet.pid], "elapsed_ms": 0, "diagnostics": null})
    };
    let want = Value::Array(pair.iter().map(planned).collect());
    let agent = Agent::start(&stage);
    let prompt = "this would end 2 unrelated processes; go on? [y/N] ";
    assert_eq!(declined(command(&named), prompt, "n\n"), want);
    assert_eq!(declined(agent.command(&named), prompt, "n\n"), want);
    assert_eq!(declined(command(&since), prompt, "n\n"), want);
    assert_eq!(declined(command(&[&named[..], &["-i"]].concat()), "esc leaves all alone", "\u{1b}"), json!([]));
    assert_eq!(portwatch(&[&named[..], &["--dry-run"]].concat()).expect(0).json(), want);
    assert!(one.is_alive() && other.is_alive());
}

pub(super) fn trials() -> Vec<Test> {
    vec![
        test("kill::a_bad_target_is_one_line_that_names_the_bad_part", || {
            for (target, complaint) in [
                ("0", "'0' is out of range; ports go from 1 to 65535"),
                ("65536", "'65536' is out of range; ports go from 1 to 65535"),
                ("80-", "'80-' is half a range; use FIRST-LAST such as 3000-3005"),
                ("9-3", "'9-3' runs backwards; the lower port comes first"),
                ("abc", "'abc' is not a port; use a number from 1 to 65535"),
                ("8000/xyz", "'xyz' in '8000/xyz' is not a protocol; use /tcp or /udp"),
            ] {
                let run = portwatch(&["kill", target]).expect(2);
                assert_eq!((run.text(), run.errors()), (String::new(), format!("portwatch: error: {complaint}\n")));
            }
        }),
        test("kill::nothing_named_is_a_usage_error_that_shows_what_is_listening", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            let sock = puppet.serve();
            let run = portwatch(&["kill", "--tcp"]).expect(2);
            assert_eq!(run.text(), "");
            let errors = run.errors();
            let mut lines = errors.lines();
            let first = "portwatch: error: name a port to free, as in `portwatch kill 8000`, or a selector such as --cwd; \
                         listening now:";
            assert_eq!(lines.next(), Some(first));
            assert_eq!(lines.next().map(|line| line.split_whitespace().next()), Some(Some("PROTO")));
            let port = sock.port().to_string();
            let of_puppet = |line: &str| line.split_whitespace().any(|word| word == port);
            assert!(lines.any(of_puppet), "{errors}");
            assert!(puppet.is_alive());
        }),
        test("kill::nothing_named_where_nothing_listens_says_so", || {
            let stage = Stage::new();
            let shell = stage.puppet();
            if !shell.unshare_net() {
                return;
            }
            let program = crate::subject::binary().to_str().expect("a path without surprises").to_owned();
            let script = stage.path("script");
            std::fs::write(&script, format!("exec {program} kill 2>&1")).expect("a script");
            let (code, said) = shell.run("sh", &[script.to_str().expect("UTF-8")]);
            let expected = "portwatch: error: name a port to free, as in `portwatch kill 8000`, or a selector such as \
                            --cwd; listening now:\nnothing\n";
            assert_eq!((code, String::from_utf8_lossy(&said).as_ref()), (2, expected));
        }),
        test("kill::a_selector_alone_picks_and_one_that_matches_nothing_is_no_failure", || {
            let stage = Stage::new();
            let [(one, _), (other, _)] = strangers(&stage);
            let glob = format!("{}/nowhere*", stage.path("").display());
            let run = portwatch(&["kill", "--cwd", &glob]).expect(0);
            let expected = "portwatch: nothing that matches the selectors is listening; nothing to free\n";
            assert_eq!((run.text().as_str(), run.errors().as_str()), ("", expected));
            let run = portwatch(&["kill", "--pid", &one.pid.to_string(), "--json"]).expect(0);
            assert_eq!(run.json()[0]["killed"], serde_json::json!([one.pid]));
            one.wait();
            assert!(other.is_alive());
        }),
        test("kill::the_plan_is_shown_before_anything_is_done", || {
            let stage = Stage::new();
            let master = stage.puppet_with_arguments(&["serving", "the", "world"]);
            let sock = master.serve();
            let second = master.tcp("127.0.0.2:0", "");
            let worker = master.fork();
            let ports = [target(&sock), target(&second)];
            let run = portwatch(&["kill", &ports[0], &ports[1], "--dry-run"]).expect(0);
            assert_eq!(run.errors(), "");
            let mut sorted = [sock, second];
            sorted.sort_by_key(|sock| (sock.address.ip(), sock.port()));
            let addresses = format!("{}/tcp,{}/tcp", sorted[0].address, sorted[1].address);
            let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.name);
            let user = user.unwrap_or_else(|| nix::unistd::geteuid().to_string());
            let name = std::fs::read_to_string(format!("/proc/{}/comm", master.pid)).expect("comm");
            let (first, rest) = (master.pid.to_string(), worker.pid.to_string());
            let row =
                |pid| vec![pid, name.trim(), user.as_str(), addresses.as_str(), "puppet", "serving", "the", "world"];
            let text = run.text();
            let table = without_age(&text);
            assert_eq!(table[0], ["PID", "NAME", "USER", "ADDRESS", "AGE", "COMMAND"]);
            assert_eq!(table[1..3], [row(&first), row(&rest)]);
            assert_eq!(table.len(), 5, "{text}");
            assert!(master.is_alive() && worker.is_alive());

            let run = portwatch(&["kill", &ports[0], &ports[1]]).expect(0);
            let errors = run.errors();
            assert_eq!(without_age(&errors)[1..3], [row(&first), row(&rest)], "{errors}");
            // What happened to each follows.
            assert!(errors.lines().skip(3).all(|line| line.contains(": ")), "{errors}");
        }),
        test("kill::no_row_of_the_plan_is_wider_than_the_terminal", || {
            let stage = Stage::new();
            let long = "x\u{4e16}\u{754c}".repeat(100);
            let server = stage.puppet_with_arguments(&[&long]);
            let sock = server.serve();
            let mut terminal = Terminal::new(80);
            let child = on(&terminal, &["kill", &target(&sock)]);
            assert_eq!(terminal.end(child), Some(0));
            let rows: Vec<&str> = terminal.said.lines().take(2).collect();
            let width = |row: &str| row.chars().map(|c| if c < '\u{2e80}' { 1 } else { 2 }).sum::<usize>();
            assert!(rows[1].ends_with('…') && (79..=80).contains(&width(rows[1])), "{:?}", terminal.said);
        }),
        test("confirm::one_own_process_is_not_asked_about", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.serve();
            let mut terminal = Terminal::new(100);
            let child = on(&terminal, &["kill", &target(&sock)]);
            assert_eq!(terminal.end(child), Some(0));
            assert!(!terminal.said.contains("[y/N]"), "{}", terminal.said);
            server.wait();
        }),
        test("confirm::a_master_and_its_workers_are_one", || {
            let stage = Stage::new();
            let master = stage.puppet();
            let sock = master.serve();
            let worker = master.fork();
            let mut terminal = Terminal::new(100);
            let child = on(&terminal, &["kill", &target(&sock)]);
            assert_eq!(terminal.end(child), Some(0));
            assert!(!terminal.said.contains("[y/N]"), "{}", terminal.said);
            worker.wait();
        }),
        test("confirm::unrelated_processes_are_asked_about_and_no_is_no", || {
            let stage = Stage::new();
            let [(one, first), (other, second)] = strangers(&stage);
            for (keys, code) in [("n\n", 1), ("\n", 1), ("\u{4}", 1), ("y\n", 0)] {
                let mut terminal = Terminal::new(100);
                let child = on(&terminal, &["kill", &target(&first), &target(&second)]);
                terminal.answer("\nthis would end 2 unrelated processes; go on? [y/N] ", keys);
                assert_eq!(terminal.end(child), Some(code), "{}", terminal.said);
                if code == 1 {
                    assert!(terminal.said.ends_with("\nportwatch: nothing was signalled\n"), "{:?}", terminal.said);
                    assert!(one.is_alive() && other.is_alive());
                }
            }
            one.wait();
            other.wait();
        }),
        test("confirm::no_is_json_too", no_is_json_too),
        test("confirm::it_is_asked_also_where_errors_go_elsewhere", || {
            let stage = Stage::new();
            let [(one, first), (other, second)] = strangers(&stage);
            let log = stage.path("log");
            for (is_controlled, keys, code) in [(false, "", 4), (true, "n\n", 1), (true, "y\n", 0)] {
                let mut terminal = Terminal::new(100);
                let mut shell = Command::new("sh");
                shell.args(["-c", "exec \"$@\" 2>\"$LOG\"", "sh"]).arg(binary()).env("LOG", &log);
                shell.args(["kill", &target(&first), &target(&second)]);
                shell.env("PORTWATCH_SOCKET", stage.path("no-agent"));
                let child = match is_controlled {
                    true => terminal.lead(&mut shell),
                    false => terminal.spawn_apart(&mut shell),
                };
                if is_controlled {
                    terminal.until(&one.pid.to_string());
                    terminal.answer("\nthis would end 2 unrelated processes; go on? [y/N] ", keys);
                }
                let code_seen = match is_controlled {
                    true => finish(child).code,
                    false => terminal.end(child),
                };
                let said = std::fs::read_to_string(&log).expect("the log");
                assert_eq!(code_seen, Some(code), "{said}");
                if code == 4 {
                    assert!(said.contains("/dev/tty") && said.contains("--yes"), "{said}");
                }
                if code != 0 {
                    assert!(one.is_alive() && other.is_alive(), "{said}");
                }
            }
            one.wait();
            other.wait();
        }),
        test("confirm::yes_is_not_asked", || {
            let stage = Stage::new();
            let [(one, first), (other, second)] = strangers(&stage);
            let mut terminal = Terminal::new(100);
            let child = on(&terminal, &["kill", &target(&first), &target(&second), "--yes"]);
            assert_eq!(terminal.end(child), Some(0));
            assert!(!terminal.said.contains("[y/N]"), "{}", terminal.said);
            one.wait();
            other.wait();
        }),
        test("confirm::somebody_elses_process_and_a_system_service_are_asked_about", || {
            if !rustix::process::geteuid().is_root() {
                return skip("root", "only root can become somebody else");
            }
            let stage = Stage::new();
            let server = stage.puppet();
            server.become_user(4321);
            server.set_name(b"sshd");
            let sock = server.serve();
            let mut terminal = Terminal::new(100);
            let child = on(&terminal, &["kill", &target(&sock)]);
            terminal.answer("this would end a process of 4321; sshd, a system service; go on? [y/N] ", "n\n");
            assert_eq!(terminal.end(child), Some(1));
            assert!(server.is_alive());
        }),
        test("pick::without_a_terminal_it_is_a_usage_error", || {
            let run = portwatch(&["kill", "-i"]).expect(2);
            let expected = "portwatch: error: --interactive needs a terminal to show the list on; name the port \
                            instead: portwatch kill PORT\n";
            assert_eq!((run.text().as_str(), run.errors().as_str()), ("", expected));
        }),
        test("pick::what_is_ticked_is_freed_and_the_rest_stays", || {
            let stage = Stage::new();
            let mut pair = strangers(&stage);
            pair.sort_by_key(|(_, sock)| sock.port());
            let [(one, first), (other, second)] = pair;
            let mut terminal = Terminal::new(100);
            let child = on(&terminal, &["kill", "-i", &target(&first), &target(&second)]);
            // The second line of two.
            terminal.answer("esc leaves all alone", "\u{1b}[B \r");
            assert_eq!(terminal.end(child), Some(0), "{}", terminal.said);
            other.wait();
            assert!(one.is_alive());
            assert!(terminal.said.contains(&format!("{} freed", target(&second))), "{}", terminal.said);
            assert!(terminal.is_cooked());
        }),
        test("pick::nothing_ticked_escape_and_interrupt_signal_nobody_and_leave_the_terminal_as_it_was", || {
            let stage = Stage::new();
            let [(one, first), (other, second)] = strangers(&stage);
            for keys in ["\r", "\u{1b}", "\u{3}"] {
                let mut terminal = Terminal::new(100);
                let child = on(&terminal, &["kill", "-i", &target(&first), &target(&second)]);
                terminal.answer("esc leaves all alone", keys);
                assert_eq!(terminal.end(child), Some(1), "{keys:?} {}", terminal.said);
                assert!(terminal.said.ends_with("portwatch: nothing was signalled\n"), "{:?}", terminal.said);
                let (shown, hidden) = (terminal.said.rfind("\u{1b}[?25h"), terminal.said.rfind("\u{1b}[?25l"));
                assert!(shown >= hidden && terminal.is_cooked(), "{:?}", terminal.said);
            }
            assert!(one.is_alive() && other.is_alive());
        }),
        test("pick::labels_are_harmless_and_do_not_wrap", || {
            let stage = Stage::new();
            let server = stage.puppet_with_arguments(&["\u{1b}]0;title\u{7}", &"long".repeat(100)]);
            server.set_name(b"\x1b[2Jx\n");
            let sock = server.serve();
            let mut terminal = Terminal::new(60);
            let child = on(&terminal, &["kill", "-i", &target(&sock)]);
            terminal.answer("esc", "\u{1b}");
            assert_eq!(terminal.end(child), Some(1));
            let said = &terminal.said;
            assert!(!said.contains("\u{1b}[2J") && !said.contains("\u{1b}]0"), "{said:?}");
            let label = said.lines().find(|line| line.contains(&sock.address.ip().to_string())).expect("a label");
            assert!(label.contains('…'), "{label:?}");
        }),
    ]
}
