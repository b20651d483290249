//! `wait` returns the moment it is true, and says what was missing where time ran out.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::UdpSocket;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::puppet::{PATIENCE, Puppet, Stage, wait_readable};
use crate::subject::{Run, binary, command, finish, pidfd, plain_command, portwatch, skip};
use crate::watcher::{Watch, switches_of};
use crate::{Test, test, test_each_probe, test_each_tier};

/// A `wait` that goes on.
struct Waiting {
    child: Child,
    errors: BufReader<ChildStderr>,
}

impl Waiting {
    /// Starts `wait`; returns once it learns of listeners by `probe`.
    fn start(probe: &str, arguments: &[&str]) -> Self {
        Self::spawn(command(&[&["--verbose", "--probe", probe, "wait"], arguments].concat()), probe)
    }

    fn spawn(mut command: Command, probe: &str) -> Self {
        let mut child = command.spawn().expect("cannot run portwatch");
        let mut errors = BufReader::new(child.stderr.take().expect("piped"));
        let mut said = String::new();
        while !said.contains(&format!("waiting ({probe})")) {
            let len = errors.read_line(&mut said).expect("reading stderr");
            assert!(len > 0, "wait ended before it waited: {said}");
        }
        Waiting { child, errors }
    }

    /// Waits for its end.
    fn finish(mut self) -> Run {
        if !wait_readable(pidfd(&self.child)) {
            let pid = self.child.id();
            let read = |what: &str| std::fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap_or_default();
            panic!("wait does not end: {} in {}, {}", read("syscall"), read("wchan"), read("stack"));
        }
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        self.errors.read_to_end(&mut stderr).expect("reading stderr");
        if let Some(mut source) = self.child.stdout.take() {
            source.read_to_end(&mut stdout).expect("reading stdout");
        }
        Run { code: self.child.wait().expect("wait").code(), stdout, stderr }
    }

    #[track_caller]
    fn is_still_waiting(&mut self) {
        assert!(self.child.try_wait().expect("wait").is_none(), "wait ended too early");
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `after 12ms` as `after TIME`.
fn timeless(text: &str) -> String {
    match text.rsplit_once(" after ") {
        Some((head, time)) => {
            let end = time.find(['\n', ':']).unwrap_or(time.len());
            format!("{head} after TIME{}", &time[end..])
        }
        None => text.to_owned(),
    }
}

/// As `wait` names a puppet.
fn named(puppet: &Puppet) -> String {
    let name = fs::read_to_string(format!("/proc/{}/comm", puppet.pid)).expect("its name");
    format!("{} ({})", name.trim_end(), puppet.pid)
}

fn bound_later(probe: &'static str) {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.bind("127.0.0.1:0", "");
    let target = format!("{}/tcp", sock.port());
    let mut waiting = Waiting::start(probe, &[&target, "--bound", "--timeout", "1m"]);
    // A neighbour is not what is waited for.
    stage.puppet().serve();
    waiting.is_still_waiting();
    puppet.listen(sock.fd);
    let run = waiting.finish().expect(0);
    assert_eq!(timeless(&run.text()), format!("{target} is bound by {} after TIME\n", named(&puppet)));
    assert_eq!(run.errors(), "");
}

fn free_when_closed(probe: &'static str) {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.serve();
    // A second descriptor of the same socket: the first close ends nothing.
    let twin = puppet.dup(sock.fd);
    let port = sock.port().to_string();
    let mut waiting = Waiting::start(probe, &[&port, "--free"]);
    puppet.close(twin);
    waiting.is_still_waiting();
    puppet.close(sock.fd);
    let run = waiting.finish().expect(0);
    assert_eq!(timeless(&run.text()), format!("{port} is free after TIME\n"));
    puppet.tcp(&sock.address.to_string(), "");
}

fn free_when_killed(probe: &'static str) {
    let stage = Stage::new();
    let (puppet, next) = (stage.puppet(), stage.puppet());
    let sock = puppet.serve();
    let waiting = Waiting::start(probe, &[&sock.port().to_string(), "--free", "--json"]);
    drop(puppet);
    let answer = waiting.finish().expect(0).json();
    assert_eq!(answer["satisfied"], true, "{answer}");
    // Exit code 0 means that bind succeeds, without SO_REUSEADDR here.
    next.tcp(&sock.address.to_string(), "");
}

fn several_targets(probe: &'static str) {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let socks = [puppet.bind("127.0.0.1:0", ""), puppet.bind("127.0.0.1:0", "")];
    let ports = socks.map(|sock| format!("{}/tcp", sock.port()));
    let arguments = |goal, scope| [ports[0].as_str(), ports[1].as_str(), goal, scope];
    let mut all = Waiting::start(probe, &arguments("--bound", "--all"));
    let any = Waiting::start(probe, &arguments("--bound", "--any"));
    puppet.listen(socks[1].fd);
    let run = any.finish().expect(0);
    assert_eq!(timeless(&run.text()), format!("{} is bound by {} after TIME\n", ports[1], named(&puppet)));
    all.is_still_waiting();
    puppet.listen(socks[0].fd);
    all.finish().expect(0);

    let mut all = Waiting::start(probe, &arguments("--free", "--all"));
    let any = Waiting::start(probe, &arguments("--free", "--any"));
    puppet.close(socks[0].fd);
    let run = any.finish().expect(0);
    assert_eq!(timeless(&run.text()), format!("{} is free after TIME\n", ports[0]));
    all.is_still_waiting();
    puppet.close(socks[1].fd);
    let run = all.finish().expect(0);
    assert_eq!(timeless(&run.text()), format!("{}, {} are free after TIME\n", ports[0], ports[1]));
}

/// A server that did not set `SO_REUSEADDR` closed, and one of its connections goes on: nobody can bind the port.
fn lingering(probe: &'static str) {
    let stage = Stage::new();
    let (server, client) = (stage.puppet(), stage.puppet());
    let sock = server.serve();
    let connection = client.connect(sock.address);
    let accepted = server.accept(sock.fd);
    let port = sock.port().to_string();
    let mut waiting = Waiting::start(probe, &[&port, "--free"]);
    server.close(sock.fd);
    let run = portwatch(&["--probe", probe, "wait", &port, "--free", "--timeout", "300ms"]).expect(1);
    let want = format!(
        "portwatch: nothing listens on {port} any more, but it cannot be bound yet after TIME: connections or a bound \
         socket remain; see `portwatch diagnose {port}`\n"
    );
    assert_eq!(timeless(&run.errors()), want);
    waiting.is_still_waiting();
    // Who closes first is in TIME_WAIT, and that is to be the client.
    client.close(connection.fd);
    server.close(accepted);
    waiting.finish().expect(0);
    server.tcp(&sock.address.to_string(), "");
}

/// A client of UDP has the port, which is no listener.
fn lingering_udp(probe: &'static str) {
    let stage = Stage::new();
    let server = stage.puppet();
    let peer = server.udp("127.0.0.1:0", "");
    // It never binds: the kernel gives it a port when it connects.
    let client = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).expect("a socket");
    rustix::net::connect(&client, &peer.address).expect("a peer");
    let client = UdpSocket::from(client);
    let target = format!("{}/udp", client.local_addr().expect("its address").port());
    let run = portwatch(&["--probe", probe, "wait", &target, "--free", "--timeout", "300ms"]).expect(1);
    let want = format!(
        "portwatch: nothing listens on {target} any more, but it cannot be bound yet after TIME: connections or a bound \
         socket remain; see `portwatch diagnose {target}`\n"
    );
    assert_eq!(timeless(&run.errors()), want);
    let waiting = Waiting::start(probe, &[&target, "--free"]);
    drop(client);
    let run = waiting.finish().expect(0);
    assert_eq!(timeless(&run.text()), format!("{target} is free after TIME\n"));
}

fn anothers_port() {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let port = puppet.serve().port().to_string();
    let me = std::process::id().to_string();
    let run = portwatch(&["wait", &port, "--free", "--pid", &me]).expect(0);
    assert_eq!(run.text(), format!("nothing that matches the selectors listens on {port}\n"));
    portwatch(&["wait", &port, "--free", "--pid", &puppet.pid.to_string(), "--timeout", "0"]).expect(1);
}

fn selectors(probe: &'static str) {
    let stage = Stage::new();
    let (marked, other) = (stage.puppet_with_arguments(&["wait-for-me"]), stage.puppet());
    let mut waiting = Waiting::start(probe, &["--command", "*wait-for-me*", "--bound", "--json"]);
    other.serve();
    waiting.is_still_waiting();
    let sock = marked.serve();
    let answer = waiting.finish().expect(0).json();
    assert_eq!(answer["targets"][0]["port"], sock.port(), "{answer}");
    assert_eq!(answer["targets"][0]["holders"][0]["pid"], marked.pid, "{answer}");
}

fn another_namespace(probe: &'static str) {
    let stage = Stage::new();
    let puppet = stage.puppet();
    if !puppet.unshare_net() {
        return;
    }
    let sock = puppet.bind("0.0.0.0:0", "");
    let port = sock.port().to_string();
    let waiting = Waiting::start(probe, &[&port, "--bound", "--netns", "all"]);
    puppet.listen(sock.fd);
    waiting.finish().expect(0);
    portwatch(&["--probe", probe, "wait", &port, "--bound", "--timeout", "0"]).expect(1);
}

/// How long nothing must run: several periods of any timer there could be. Short, so that a busy host has such times.
const QUIET: Duration = Duration::from_secs(2);

fn nothing_runs(tier: &'static str) {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.bind("127.0.0.1:0", "");
    // Tells when somebody else on this host opened a listener: such a time does not count.
    let mut host = Watch::start(tier);
    let waiting = Waiting::start(tier, &[&sock.port().to_string(), "--bound"]);
    for _ in 0..20 {
        while host.line_within(Duration::from_secs(1)).is_some() {}
        let before = switches_of(waiting.child.id());
        // That nothing happens in this time is what is tested.
        let was_quiet = host.line_within(QUIET).is_none();
        let after = switches_of(waiting.child.id());
        if was_quiet && host.line_within(Duration::ZERO).is_none() {
            assert_eq!(before, after, "voluntary context switches by thread, over {QUIET:?}");
            puppet.listen(sock.fd);
            waiting.finish().expect(0);
            return;
        }
        eprintln!("NOTE: listeners changed on this host meanwhile; once more");
    }
    panic!("the host was never quiet for {QUIET:?}");
}

fn true_already() {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let (sock, unused) = (puppet.serve(), puppet.serve());
    puppet.close(unused.fd);
    let (taken, free) = (format!("{}/tcp", sock.port()), unused.port().to_string());
    for probe in ["auto", "poll"] {
        let run = portwatch(&["--probe", probe, "wait", &taken, "--bound"]).expect(0);
        assert_eq!((run.text(), run.errors()), (format!("{taken} is bound by {}\n", named(&puppet)), String::new()));
        let run = portwatch(&["--probe", probe, "wait", &free, "--free"]).expect(0);
        assert_eq!((run.text(), run.errors()), (format!("{free} is free\n"), String::new()));
        let run = portwatch(&["--probe", probe, "wait", &taken, "--bound", "--quiet"]).expect(0);
        assert_eq!((run.text(), run.errors()), (String::new(), String::new()));
    }
}

fn time_out() {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.serve();
    let bound = puppet.bind("127.0.0.1:0", "");
    let (taken, silent) = (format!("{}/tcp", sock.port()), format!("{}/tcp", bound.port()));
    let held = format!("portwatch: {taken} is still held by {}", named(&puppet));
    for (arguments, want) in [
        (&[&taken, "--free", "--timeout", "250ms"][..], format!("{held} after 250ms\n")),
        (&[&taken, "--free", "--timeout", "250ms", "-q"], format!("{held} after 250ms\n")),
        (&[&taken, "--free", "--timeout", "0"], format!("{held}\n")),
        (&[&silent, "--bound", "--timeout", "1.2s"], format!("portwatch: nothing listens on {silent} after 1.2s\n")),
        (
            &[&taken, &silent, "--bound", "--timeout", "10ms"],
            format!("portwatch: nothing listens on {silent} after 10ms\n"),
        ),
    ] {
        let arguments: Vec<&str> = arguments.iter().map(|argument| argument.as_ref()).collect();
        let begun = Instant::now();
        let run = portwatch(&[&["wait"], &arguments[..]].concat()).expect(1);
        assert_eq!((run.text(), run.errors()), (String::new(), want));
        assert!(begun.elapsed() < PATIENCE / 2, "{arguments:?} took {:?}", begun.elapsed());
    }
}

/// What varies of a holder is looked at elsewhere.
fn gist(mut answer: Value) -> Value {
    assert!(answer["elapsed_ms"].is_u64(), "{answer}");
    answer["elapsed_ms"] = json!("TIME");
    for target in answer["targets"].as_array_mut().expect("targets") {
        for holder in target["holders"].as_array_mut().expect("holders") {
            *holder = json!([holder["pid"], holder["fds"], holder["binder"], holder["command"][0]]);
        }
    }
    answer
}

fn whole_json() {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.serve();
    let bound = puppet.bind("127.0.0.1:0", "");
    let held = json!({
        "port": sock.port(), "proto": "tcp", "address": null, "bound": true, "lingering": false,
        "holders": [[puppet.pid, [sock.fd], true, "puppet"]],
    });
    let target = format!("{}/tcp", sock.port());
    let run = portwatch(&["wait", &target, "--bound", "--json"]).expect(0);
    assert_eq!(gist(run.json()), json!({ "satisfied": true, "elapsed_ms": "TIME", "targets": [held] }));
    let run = portwatch(&["wait", &target, "--free", "--json", "--timeout", "50ms"]).expect(1);
    assert_eq!(gist(run.json()), json!({ "satisfied": false, "elapsed_ms": "TIME", "targets": [held] }));
    assert_eq!(run.errors(), "", "the answer is in the object");
    let run = portwatch(&["wait", &format!("127.0.0.1:{}", bound.port()), "--free", "--json", "--timeout", "0"]);
    let lingers = json!({
        "port": bound.port(), "proto": null, "address": "127.0.0.1", "bound": false, "lingering": true, "holders": [],
    });
    assert_eq!(gist(run.expect(1).json()), json!({ "satisfied": false, "elapsed_ms": "TIME", "targets": [lingers] }));
}

fn ordinary_user() {
    if !rustix::process::geteuid().is_root() {
        skip("root", "only root can become somebody else");
        return;
    }
    let stage = Stage::new();
    let copy = stage.path("portwatch");
    fs::copy(binary(), &copy).expect("copying the binary");
    let as_user = |arguments: &[&str]| {
        let mut command = plain_command(&copy, arguments);
        command.uid(65534).gid(65534).current_dir("/");
        command
    };
    let puppet = stage.puppet();
    let sock = puppet.bind("127.0.0.1:0", "");
    let target = format!("{}/tcp", sock.port());
    let waiting = Waiting::spawn(as_user(&["-v", "wait", &target, "--bound"]), "poll");
    puppet.listen(sock.fd);
    let run = waiting.finish().expect(0);
    let hidden = "uid 0 (not visible to you; try sudo)";
    assert_eq!(timeless(&run.text()), format!("{target} is bound by {hidden} after TIME\n"));
    let wait = |arguments: &[&str]| finish(as_user(arguments).spawn().expect("portwatch"));
    let run = wait(&["wait", &target, "--free", "--timeout", "100ms"]).expect(1);
    assert_eq!(run.errors(), format!("portwatch: {target} is still held by {hidden} after 100ms\n"));
    // Without --verbose, nothing is said of how it waits. Nobody may bind a privileged port, which is not its use.
    let run = wait(&["wait", "1/tcp", "--free"]).expect(0);
    assert_eq!((run.text(), run.errors()), ("1/tcp is free\n".to_owned(), String::new()));
}

fn any_port_of_a_wide_range() {
    let arguments = ["wait", "127.0.0.1:1-65535/tcp", "--any", "--free", "--json", "--timeout", "0"];
    let answer = portwatch(&arguments).expect(0).json();
    let targets = answer["targets"].as_array().expect("targets");
    let free: Vec<&Value> = targets.iter().filter(|target| target["bound"] == false).collect();
    assert_eq!((answer["satisfied"].as_bool(), free.len()), (Some(true), 1), "{answer}");
    assert_eq!(free[0]["address"], "127.0.0.1", "{answer}");
}

fn an_agent_of_no_use() {
    let stage = Stage::new();
    let path = stage.path("socket");
    let socket = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    // It hangs up on everybody.
    std::thread::spawn(move || socket.incoming().for_each(drop));
    let bound = stage.puppet().bind("127.0.0.1:0", "");
    let mut command = command(&["wait", &bound.port().to_string(), "--bound", "--timeout", "10ms"]);
    let run = finish(command.env("PORTWATCH_SOCKET", &path).spawn().expect("portwatch")).expect(1);
    assert_eq!(run.errors().matches("is of no use").count(), 1, "{}", run.errors());
}

fn an_age() {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.serve();
    let arguments = ["wait", &sock.port().to_string(), "--bound", "--older-than", "2s", "--timeout", "1m"];
    portwatch(&arguments).expect(0);
}

fn signals_and_closed_outputs() {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.serve();
    let port = sock.port().to_string();
    for signal in [Signal::INT, Signal::TERM] {
        let waiting = Waiting::start("poll", &[&port, "--free"]);
        rustix::process::pidfd_send_signal(pidfd(&waiting.child), signal).expect("signal");
        let run = waiting.finish();
        assert_eq!((run.code, run.text(), run.errors()), (None, String::new(), String::new()), "{signal:?}");
    }
    // Nobody reads: what the exit code says does not change.
    for (arguments, code) in [(["--bound", "--json"], 0), (["--free", "--json"], 1)] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = command(&["wait", &port, "--timeout", "0"]);
        let child = command.args(arguments).stdout(writer).spawn().expect("portwatch");
        let run = finish(child).expect(code);
        assert_eq!(run.errors(), "");
    }
}

fn usage() {
    for (arguments, want) in [
        (&["8000"][..], "<--bound|--free>"),
        (&["8000", "--bound", "--free"], "cannot be used with"),
        (&["8000", "--bound", "--all", "--any"], "cannot be used with"),
        (&["--bound"], "portwatch: error: wait is missing a port; try: portwatch wait 8000 --bound\n"),
        (&["80-", "--bound"], "portwatch: error: '80-' is half a range; use FIRST-LAST such as 3000-3005\n"),
        (&["8000", "--bound", "--timeout", "soon"], "use a duration such as 250ms, 90s or 24h"),
    ] {
        let run = portwatch(&[&["wait"], arguments].concat()).expect(2);
        assert!(run.errors().contains(want), "{arguments:?}: {}", run.errors());
    }
}

pub fn trials() -> Vec<Test> {
    let mut tests = vec![
        test("wait::what_is_true_already_returns_at_once", true_already),
        test("wait::a_time_out_tells_what_was_missing", time_out),
        test("wait::json_is_one_whole_object", whole_json),
        test("wait::an_ordinary_user_waits_by_polling", ordinary_user),
        test("wait::a_port_that_others_have_is_not_called_free", anothers_port),
        test("wait::any_free_port_of_a_wide_range_is_told", any_port_of_a_wide_range),
        test("wait::an_agent_of_no_use_is_told_of_once", an_agent_of_no_use),
        test("wait::a_listener_becomes_old_enough_without_an_event", an_age),
        test("wait::signals_end_it_and_closed_outputs_change_nothing", signals_and_closed_outputs),
        test("wait::a_bad_command_line_is_a_usage_error", usage),
    ];
    tests.extend(test_each_probe("wait::bound_the_moment_a_server_listens", bound_later));
    tests.extend(test_each_probe("wait::free_when_the_last_descriptor_is_closed", free_when_closed));
    tests.extend(test_each_probe("wait::free_when_the_holder_is_killed", free_when_killed));
    tests.extend(test_each_probe("wait::all_or_any_of_several_targets", several_targets));
    tests.extend(test_each_probe("wait::a_port_that_cannot_be_bound_is_not_free", lingering));
    tests.extend(test_each_probe("wait::a_udp_port_that_cannot_be_bound_is_not_free", lingering_udp));
    tests.extend(test_each_probe("wait::selectors_pick_what_is_waited_for", selectors));
    tests.extend(test_each_probe("wait::another_network_namespace_is_waited_for", another_namespace));
    tests.extend(test_each_tier("wait::nothing_runs_while_nothing_happens", nothing_runs));
    tests
}
