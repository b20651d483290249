//! Kill through the agent: as alone for who asks, and only what who asks may end, whatever it says of itself.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

use nix::libc;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::agent::{Agent, Client, with_socket};
use crate::puppet::{Puppet, Sock, Stage, wait_readable};
use crate::subject::{Run, binary, finish, pidfd, plain_command, skip};
use crate::{Test, test};

/// Two ordinary users, nobody else's.
const ANN: u32 = 64_991;
const BEN: u32 = 64_992;

/// An agent, and a copy of the binary that everybody may run.
struct Scene {
    agent: Agent,
    stage: Stage,
}

impl Scene {
    /// `None`, loudly, where the tests themselves run as an ordinary user.
    fn new() -> Option<Scene> {
        if !rustix::process::geteuid().is_root() {
            skip("root", "only root can become somebody else");
            return None;
        }
        let stage = Stage::new();
        let copy = stage.path("portwatch");
        fs::copy(binary(), &copy).expect("copying the binary");
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("chmod");
        Some(Scene { agent: Agent::start(&stage), stage })
    }

    /// A server of this user.
    fn server(&self, uid: u32) -> (Puppet, Sock) {
        let puppet = self.stage.puppet();
        if uid != 0 {
            puppet.become_user(uid);
        }
        let sock = puppet.serve();
        (puppet, sock)
    }

    /// portwatch as this user, asking the agent.
    fn command(&self, uid: u32, arguments: &[&str]) -> Command {
        let mut command = plain_command(self.stage.path("portwatch"), &[arguments, &["--agent"]].concat());
        command.env("PORTWATCH_SOCKET", &self.agent.socket).uid(uid).gid(uid).current_dir("/");
        command
    }

    fn kill(&self, uid: u32, sock: &Sock) -> Run {
        let mut command = self.command(uid, &["kill", &target(sock), "--json"]);
        finish(command.spawn().expect("portwatch as somebody else"))
    }

    /// A connection of this user's, by the test itself.
    fn connect(&self, uid: u32) -> Client {
        let become_user = |uid: u32| {
            // SAFETY: takes integers, and changes this thread alone: the C library's function would change all of them.
            let result = unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) };
            assert_eq!(result, 0, "setresuid");
        };
        become_user(uid);
        let client = self.agent.connect();
        become_user(0);
        client.hello()
    }

    /// A connection of root's that has been told a plan and is asked whether to go on.
    fn planned(&self, sock: &Sock) -> Client {
        let mut client = self.agent.connect().hello();
        client.say(&request(sock, json!({"confirm": true})));
        let plan = client.hear();
        assert_eq!(plan["response"], "plan", "{plan}");
        client
    }
}

fn target(sock: &Sock) -> String {
    format!("{}/tcp", sock.port())
}

/// A request to free its port, with these fields as well.
fn request(sock: &Sock, fields: Value) -> String {
    let mut request = json!({"request": "kill", "selection": {"targets": [target(sock)]}});
    for (name, value) in fields.as_object().expect("fields") {
        request[name] = value.clone();
    }
    request.to_string()
}

/// The only outcome of a connection, after its progress.
fn outcome(client: &mut Client) -> Value {
    loop {
        let line = client.hear();
        match line["response"].as_str() {
            Some("progress") => {}
            Some("outcome") => {
                assert_eq!(client.hear(), json!({"response": "end", "count": 1}));
                return line;
            }
            _ => panic!("no outcome: {line}"),
        }
    }
}

#[track_caller]
fn check_denied(run: Run, why: &str) {
    let outcome = run.expect(3).json()[0].clone();
    assert_eq!((&outcome["status"], &outcome["still_listening"]), (&json!("denied"), &json!(true)), "{outcome}");
    let reason = outcome["failed"][0]["reason"].as_str().unwrap_or_default();
    assert!(reason.contains(why), "{outcome}");
}

/// Who may end whose server: kill(2)'s rule.
fn everybody_ends_what_kill_would_let_them() {
    let Some(scene) = Scene::new() else { return };
    for (who, whose) in [(0, 0), (0, ANN), (ANN, ANN)] {
        let (server, sock) = scene.server(whose);
        let run = scene.kill(who, &sock).expect(0);
        assert_eq!(run.json()[0]["killed"], json!([server.pid]), "{who} {whose}: {}", run.text());
        assert_eq!(server.wait(), Some(libc::SIGTERM));
    }
    for (who, whose) in [(ANN, 0), (ANN, BEN), (BEN, ANN)] {
        let (server, sock) = scene.server(whose);
        check_denied(scene.kill(who, &sock), "not permitted: it runs as ");
        assert!(server.is_alive(), "{who} ended a server of {whose}");
    }
}

/// Two processes of two users listen on one port: each user frees its own part.
fn of_a_mixed_port_each_ends_its_own() {
    let Some(scene) = Scene::new() else { return };
    let (of_ann, of_ben) = (scene.stage.puppet(), scene.stage.puppet());
    // Twins belong to one user when they bind.
    let sock = of_ann.tcp("127.0.0.1:0", "reuseport");
    of_ben.tcp(&sock.address.to_string(), "reuseport");
    of_ann.become_user(ANN);
    of_ben.become_user(BEN);
    let run = scene.kill(ANN, &sock).expect(1);
    let outcome = run.json()[0].clone();
    assert_eq!(outcome["status"], "partial", "{outcome}");
    assert_eq!((&outcome["killed"], &outcome["remaining_pids"]), (&json!([of_ann.pid]), &json!([of_ben.pid])));
    assert_eq!(outcome["failed"][0]["pid"], of_ben.pid, "{outcome}");
    of_ann.wait();
    check_denied(scene.kill(ANN, &sock), "not permitted");
    assert!(of_ben.is_alive());
    scene.kill(BEN, &sock).expect(0);
}

/// Relatives are nobody's to end either.
fn relatives_of_another_user_are_left_alone() {
    let Some(scene) = Scene::new() else { return };
    let parent = scene.stage.puppet();
    let (of_ann, of_ben) = (parent.fork(), parent.fork());
    of_ann.become_user(ANN);
    of_ben.become_user(BEN);
    parent.become_user(ANN);
    let sock = parent.serve();
    let mut command = scene.command(ANN, &["kill", &target(&sock), "--tree"]);
    let run = finish(command.spawn().expect("portwatch")).expect(0);
    assert!(run.errors().contains(&format!("({}): not permitted", of_ben.pid)), "{}", run.errors());
    parent.wait();
    of_ann.wait();
    assert!(of_ben.is_alive());
}

fn what_a_request_says_of_its_sender_is_an_error() {
    let Some(scene) = Scene::new() else { return };
    let (server, sock) = scene.server(0);
    let mut client = scene.agent.connect().hello();
    for (line, part) in [
        (request(&sock, json!({"uid": 0})), "unknown field `uid`"),
        (request(&sock, json!({"pid": 1})), "unknown field `pid`"),
        (request(&sock, json!({"victims": [server.pid]})), "unknown field `victims`"),
        (request(&sock, json!({"signal": "STOP"})), "no signal 'STOP'"),
        (request(&sock, json!({"grace_ms": u64::MAX})), "the agent waits 3600000 ms at most"),
        (json!({"request": "kill"}).to_string(), "this one picks everything"),
        (json!({"request": "kill", "selection": {"netns": "all"}}).to_string(), "this one picks everything"),
        (json!({"request": "confirm"}).to_string(), "no plan to confirm"),
    ] {
        let message = client.say(&line).hear_error("usage");
        assert!(message.contains(part), "{line}: {message}");
    }
    // A PID only narrows: who does not hold the port is not hit.
    let bystander = scene.stage.puppet();
    let narrowed = json!({"request": "kill", "selection": {"targets": [target(&sock)], "pids": [bystander.pid]}});
    client.say(&narrowed.to_string());
    assert_eq!(client.hear()["plan"]["victims"], json!([]));
    assert_eq!(outcome(&mut client)["status"], "partial");
    assert!(server.is_alive() && bystander.is_alive());
}

/// Root of a user namespace of its own is an ordinary user to everybody else.
fn root_of_another_user_namespace_is_who_it_is_outside() {
    let Some(scene) = Scene::new() else { return };
    let kill = |sock: &Sock| {
        let mut command = scene.command(ANN, &["kill", &target(sock), "--json"]);
        // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
        unsafe {
            command.pre_exec(|| {
                // Who has just become another user may not write its own files in /proc before that.
                if libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) < 0 || libc::unshare(libc::CLONE_NEWUSER) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                let write = |path: &std::ffi::CStr, text: &[u8]| {
                    let fd = libc::open(path.as_ptr(), libc::O_WRONLY);
                    let written = libc::write(fd, text.as_ptr().cast(), text.len());
                    libc::close(fd);
                    if written < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
                };
                write(c"/proc/self/uid_map", b"0 64991 1")?;
                if libc::geteuid() == 0 { Ok(()) } else { Err(std::io::ErrorKind::PermissionDenied.into()) }
            });
        }
        command.spawn().map(finish)
    };
    let (of_root, sock) = scene.server(0);
    match kill(&sock) {
        Ok(run) => check_denied(run, "not permitted: it runs as "),
        Err(error) => return skip("userns", &format!("no user namespace can be made: {error}")),
    }
    assert!(of_root.is_alive());
    let (of_ben, sock) = scene.server(BEN);
    check_denied(kill(&sock).expect("portwatch"), "not permitted");
    assert!(of_ben.is_alive());
    let (own, sock) = scene.server(ANN);
    kill(&sock).expect("portwatch").expect(0);
    own.wait();
}

/// Root of a container that has the socket: the processes outside do not exist for it.
fn nobody_reaches_out_of_its_pid_namespace() {
    let Some(scene) = Scene::new() else { return };
    let (program, variable) = scene.stage.recipe();
    let (name, value) = variable.split_once('=').expect("a variable");
    let mut container = Command::new("sh");
    // Its children are the first processes of the new namespace, where the first is init. It ends with its input.
    container.args(["-c", "\"$1\" & \"$1\" & read -r _", "sh"]).arg(&program).env(name, value);
    container.stdin(Stdio::piped()).stdout(Stdio::null());
    // SAFETY: unshare is a bare system call, which may be made between fork and exec.
    unsafe {
        container.pre_exec(|| match libc::unshare(libc::CLONE_NEWPID) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let mut shell = match container.spawn() {
        Ok(shell) => shell,
        Err(error) => return skip("root", &format!("no pid namespace can be made: {error}")),
    };
    let inmates = [scene.stage.admit(), scene.stage.admit()];
    let pid_inside = |puppet: &Puppet| {
        let status = fs::read_to_string(format!("/proc/{}/status", puppet.pid)).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).expect("NSpid").to_owned();
        line.split_ascii_whitespace().last().expect("a pid").to_owned()
    };
    let [one, two] = inmates;
    let (init, other) = if pid_inside(&one) == "1" { (one, two) } else { (two, one) };
    assert_eq!(pid_inside(&init), "1");
    let (socket, binary) = (scene.agent.socket.display().to_string(), scene.stage.path("portwatch"));
    let kill = |sock: &Sock| {
        let (code, stdout) =
            init.run(&binary.display().to_string(), &["kill", &target(sock), "--json", "--agent", "--socket", &socket]);
        Run { code: Some(code), stdout, stderr: Vec::new() }
    };
    let (outside, sock) = scene.server(0);
    check_denied(kill(&sock), "outside your pid namespace");
    assert!(outside.is_alive(), "a process of the host was ended");
    let own = other.serve();
    let run = kill(&own).expect(0);
    assert_eq!(run.json()[0]["killed"], json!([other.pid]), "{}", run.text());
    other.wait();
    // It reaps the one that was ended, without which init could not end.
    drop(shell.stdin.take());
    shell.wait().expect("the shell");
}

/// Between plan and signal, the PID of the planned process goes to one that holds the same socket, and is another user's.
fn a_pid_recycled_by_another_user_is_judged_anew() {
    let Some(scene) = Scene::new() else { return };
    let (maker, holder) = (scene.stage.puppet(), scene.stage.puppet());
    let sock = holder.serve();
    maker.open_mailbox();
    holder.send_fd(sock.fd, &maker);
    maker.receive_fd();
    holder.become_user(ANN);
    let pid = holder.pid;
    let mut client = scene.connect(ANN);
    client.say(&request(&sock, json!({"confirm": true})));
    let plan = client.hear();
    assert_eq!(plan["plan"]["victims"][0]["process"]["id"]["pid"], pid, "{plan}");
    assert_eq!(plan["plan"]["refused"][0]["process"]["id"]["pid"], maker.pid, "{plan}");
    holder.exit();
    let recycled = match maker.fork_as(pid) {
        Ok(recycled) => recycled,
        Err(refused) => return skip("kernel", &format!("no PID can be chosen here: {}", refused.text)),
    };
    client.say(r#"{"request":"confirm"}"#);
    let outcome = outcome(&mut client);
    assert_eq!((&outcome["status"], &outcome["killed"]), (&json!("denied"), &json!([])), "{outcome}");
    assert!(recycled.is_alive() && maker.is_alive(), "{outcome}");
}

fn who_hangs_up_before_it_agrees_has_asked_for_nothing() {
    let Some(scene) = Scene::new() else { return };
    let (server, sock) = scene.server(0);
    for _ in 0..20 {
        drop(scene.planned(&sock));
    }
    // Anything else than agreement is none.
    let mut client = scene.planned(&sock);
    let message = client.say(r#"{"request":"status"}"#).hear_error("usage");
    assert!(message.contains("nothing was signalled"), "{message}");
    assert_eq!(client.say(r#"{"request":"status"}"#).hear()["response"], "status");
    assert!(server.is_alive());
    // The places of all these are free again.
    let mut client = scene.planned(&sock);
    client.say(r#"{"request":"confirm"}"#);
    assert_eq!(outcome(&mut client)["status"], "cleaned");
    assert_eq!(server.wait(), Some(libc::SIGTERM));
}

fn a_kill_that_was_agreed_to_goes_on_without_its_client() {
    let Some(scene) = Scene::new() else { return };
    let (server, sock) = scene.server(0);
    server.ignore_term();
    let mut client = scene.agent.connect().hello();
    client.say(&request(&sock, json!({"grace_ms": 300})));
    while client.hear()["step"] != "sent" {}
    drop(client);
    // SIGTERM does not end it.
    assert_eq!(server.wait(), Some(libc::SIGKILL));
}

/// Who says so stops it, at the agent as in the program.
fn a_kill_stops_where_it_is_told_to() {
    let Some(scene) = Scene::new() else { return };
    let (server, sock) = scene.server(0);
    server.ignore_term();
    let mut client = scene.agent.connect().hello();
    client.say(r#"{"request":"stop"}"#).hear_error("usage");
    client.say(&request(&sock, json!({"grace_ms": 3_600_000})));
    while client.hear()["step"] != "sent" {}
    client.say(r#"{"request":"stop"}"#);
    let outcome = outcome(&mut client);
    assert_eq!((&outcome["status"], &outcome["still_listening"]), (&json!("partial"), &json!(true)), "{outcome}");
    let reason = "SIGTERM sent; the kill was called off while it was waited for";
    assert_eq!(outcome["failed"], json!([{"pid": server.pid, "reason": reason}]), "{outcome}");
    // The connection goes on, and what is said during a kill is answered after it.
    client.say(&request(&sock, json!({"grace_ms": 100, "force": false})));
    client.say(r#"{"request":"status"}"#);
    while client.hear()["response"] != "outcome" {}
    assert_eq!(client.hear(), json!({"response": "end", "count": 1}));
    assert_eq!(client.hear()["response"], "status");
    assert!(server.is_alive());
}

fn a_signal_stops_a_kill_through_the_agent() {
    let Some(scene) = Scene::new() else { return };
    for signal in [Signal::INT, Signal::TERM] {
        let (server, sock) = scene.server(0);
        server.ignore_term();
        let mut kill = scene.command(0, &["kill", &target(&sock), "--grace", "1s"]).spawn().expect("portwatch");
        let mut errors = BufReader::new(kill.stderr.take().expect("piped"));
        let mut line = String::new();
        while !line.contains("SIGTERM sent") {
            line.clear();
            assert!(errors.read_line(&mut line).expect("its stderr") > 0, "no signal was sent");
        }
        rustix::process::pidfd_send_signal(pidfd(&kill), signal).expect("signal");
        assert!(wait_readable(pidfd(&kill)), "portwatch goes on after {signal:?}");
        assert_eq!(kill.wait().expect("portwatch").signal(), Some(signal.as_raw()), "as alone");
        let mut said = String::new();
        std::io::Read::read_to_string(&mut kill.stdout.take().expect("piped"), &mut said).expect("its stdout");
        assert!(said.contains("the kill was called off"), "{said}");
        // Later than SIGKILL would have come: another kill of the same agent's takes its grace.
        let run = scene.agent.portwatch(&["kill", &target(&sock), "--grace", "1500ms", "--no-force"]);
        assert_eq!(run.code, Some(1), "{}", run.text());
        assert!(server.is_alive());
    }
}

fn two_kills_of_one_port_both_see_it_free() {
    let Some(scene) = Scene::new() else { return };
    let (server, sock) = scene.server(0);
    let mut clients = [scene.planned(&sock), scene.planned(&sock)];
    for client in &mut clients {
        client.say(r#"{"request":"confirm"}"#);
    }
    for client in &mut clients {
        let outcome = outcome(client);
        assert_eq!((&outcome["status"], &outcome["still_listening"]), (&json!("cleaned"), &json!(false)), "{outcome}");
    }
    server.wait();
}

/// The holder is who started portwatch: ended, it would take portwatch along, and whoever looks at it.
fn the_shell_of_the_client_is_spared() {
    let Some(scene) = Scene::new() else { return };
    let shell = scene.stage.puppet();
    let sock = shell.serve();
    let (binary, socket) = (scene.stage.path("portwatch"), scene.agent.socket.display().to_string());
    let arguments = ["kill", &target(&sock), "--json", "--agent", "--socket", &socket];
    let (code, stdout) = shell.run(&binary.display().to_string(), &arguments);
    let outcome = Run { code: Some(code), stdout, stderr: Vec::new() }.expect(1).json()[0].clone();
    assert_eq!(outcome["status"], "partial", "{outcome}");
    let reason = outcome["failed"][0]["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("--force-self"), "{outcome}");
    assert!(shell.is_alive());
}

fn the_agent_never_ends_itself() {
    let Some(scene) = Scene::new() else { return };
    let stage = Stage::new();
    let reserved = stage.puppet().bind("127.0.0.1:0", "reuseaddr");
    let agent = Agent::start_with(&stage, &["--metrics", &reserved.address.to_string()]);
    let run = agent.portwatch(&["kill", &target(&reserved), "--json", "--force-self"]).expect(1);
    assert!(run.text().contains("portwatch itself holds the port"), "{}", run.text());
    // Nor another one, for who may: that one is a process as any other.
    let mut command = scene.command(ANN, &["kill", &target(&reserved), "--json"]);
    check_denied(finish(command.spawn().expect("portwatch")), "not permitted");
    agent.portwatch(&["status"]).expect(0);
}

fn a_dry_run_shows_what_it_shows_alone() {
    let Some(scene) = Scene::new() else { return };
    let (server, sock) = scene.server(ANN);
    let worker = server.fork();
    let other = scene.stage.puppet();
    other.udp(&sock.address.to_string(), "");
    let port = sock.port().to_string();
    for arguments in [
        &["kill", &port, "--dry-run"][..],
        &["kill", &port, "--dry-run", "--json", "--tree"],
        &["kill", &port, "--dry-run", "--tcp", "--group", "-9"],
        &["kill", "--user", "64991", "-n"],
        &["kill", "--user", "64992", "-n"],
        &["kill", "1/udp", "-n"],
    ] {
        let both = [scene.agent.portwatch(arguments), {
            let mut alone = with_socket(&[arguments, &["--no-agent"]].concat(), &scene.agent.socket);
            finish(alone.spawn().expect("portwatch"))
        }];
        // The age of a process may turn in between.
        let [told, alone] = both.map(|run| {
            let steady =
                |text: String| text.split_whitespace().filter(|word| !is_age(word)).collect::<Vec<_>>().join(" ");
            (run.code, steady(run.text()), steady(run.errors()))
        });
        assert_eq!(told, alone, "{arguments:?}");
    }
    assert!(server.is_alive() && worker.is_alive() && other.is_alive());
}

/// `12s`, `450ms`.
fn is_age(word: &str) -> bool {
    word.strip_suffix('s').is_some_and(|rest| rest.trim_end_matches(['m', 'µ']).parse::<f64>().is_ok())
}

fn a_kill_is_remembered_with_who_asked() {
    let Some(scene) = Scene::new() else { return };
    let (_server, sock) = scene.server(0);
    scene.kill(ANN, &sock).expect(3);
    scene.kill(0, &sock).expect(0);
    loop {
        // What is written is written soon, off the path of events.
        let run = scene.agent.portwatch(&["history", &target(&sock), "--json"]);
        let lives = if run.code == Some(0) { run.json() } else { Value::Null };
        let life = lives.as_array().and_then(|lives| lives.iter().find(|life| life["inode"] == sock.inode));
        let kills = life.and_then(|life| life["kills"].as_array().cloned()).unwrap_or_default();
        let told: Vec<_> = kills.iter().map(|kill| (kill["uid"].clone(), kill["status"].clone())).collect();
        if told.len() == 2 {
            assert_eq!(told, [(json!(ANN), json!("denied")), (json!(0), json!("cleaned"))]);
            assert_eq!(kills[0]["targets"], target(&sock));
            return;
        }
    }
}

fn an_agent_that_is_of_no_use_is_left_aside_before_anything_is_done() {
    let Some(scene) = Scene::new() else { return };
    let (server, sock) = scene.server(0);
    scene.agent.signal(Signal::STOP);
    let mut command = with_socket(&["kill", &target(&sock)], &scene.agent.socket);
    let run = finish(command.spawn().expect("portwatch")).expect(0);
    assert!(run.errors().contains("no answer within 2 s; working alone"), "{}", run.errors());
    scene.agent.signal(Signal::CONT);
    server.wait();
    for option in ["--stop-unit", "--stop-container", "--close-socket", "--probe=poll"] {
        let run = scene.agent.portwatch(&["kill", "1", option]).expect(2);
        assert!(run.errors().contains("without the agent"), "{}", run.errors());
    }
}

fn an_agent_that_is_lost_during_a_kill_is_an_error_that_says_what_to_do() {
    let Some(mut scene) = Scene::new() else { return };
    let (server, sock) = scene.server(0);
    server.ignore_term();
    let mut command = scene.command(0, &["kill", &target(&sock), "--grace", "60s"]);
    let mut kill = command.spawn().expect("portwatch");
    let mut errors = BufReader::new(kill.stderr.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("SIGTERM sent") {
        line.clear();
        assert!(errors.read_line(&mut line).expect("its stderr") > 0, "no signal was sent");
    }
    scene.agent.end(Signal::KILL);
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut errors, &mut rest).expect("its stderr");
    finish(kill).expect(4);
    assert!(rest.contains(&format!("portwatch who {}", sock.port())), "{rest}");
    assert!(server.is_alive());
}

pub fn trials() -> Vec<Test> {
    vec![
        test("access::everybody_ends_what_kill_would_let_them", everybody_ends_what_kill_would_let_them),
        test("access::of_a_mixed_port_each_ends_its_own", of_a_mixed_port_each_ends_its_own),
        test("access::relatives_of_another_user_are_left_alone", relatives_of_another_user_are_left_alone),
        test("access::what_a_request_says_of_its_sender_is_an_error", what_a_request_says_of_its_sender_is_an_error),
        test(
            "access::root_of_another_user_namespace_is_who_it_is_outside",
            root_of_another_user_namespace_is_who_it_is_outside,
        ),
        test("access::nobody_reaches_out_of_its_pid_namespace", nobody_reaches_out_of_its_pid_namespace),
        test("access::a_pid_recycled_by_another_user_is_judged_anew", a_pid_recycled_by_another_user_is_judged_anew),
        test("agent_kill::who_hangs_up_before_it_agrees_has_asked_for_nothing", || {
            who_hangs_up_before_it_agrees_has_asked_for_nothing();
        }),
        test("agent_kill::one_that_was_agreed_to_goes_on_without_its_client", || {
            a_kill_that_was_agreed_to_goes_on_without_its_client();
        }),
        test("agent_kill::one_that_is_told_to_stop_signals_nobody_any_more", a_kill_stops_where_it_is_told_to),
        test("agent_kill::a_signal_to_its_client_stops_it", a_signal_stops_a_kill_through_the_agent),
        test("agent_kill::two_of_one_port_both_see_it_free", two_kills_of_one_port_both_see_it_free),
        test("agent_kill::the_shell_of_the_client_is_spared", the_shell_of_the_client_is_spared),
        test("agent_kill::the_agent_never_ends_itself", the_agent_never_ends_itself),
        test("agent_kill::a_dry_run_shows_what_it_shows_alone", a_dry_run_shows_what_it_shows_alone),
        test("agent_kill::it_is_remembered_with_who_asked", a_kill_is_remembered_with_who_asked),
        test("agent_kill::an_agent_that_is_of_no_use_is_left_aside_before_anything_is_done", || {
            an_agent_that_is_of_no_use_is_left_aside_before_anything_is_done();
        }),
        test("agent_kill::an_agent_that_is_lost_is_an_error_that_says_what_to_do", || {
            an_agent_that_is_lost_during_a_kill_is_an_error_that_says_what_to_do();
        }),
    ]
}
