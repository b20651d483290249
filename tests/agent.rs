//! The agent: the same answers as without it, for everybody, whatever its clients do.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::oracle;
use crate::puppet::{PATIENCE, Puppet, Stage, wait_readable};
use crate::subject::{Run, command, finish, pidfd, rows, skip};
use crate::watcher::Watch;
use crate::{Test, test};

/// `nobody`: an ordinary user on every machine, by number.
const NOBODY: u32 = 65534;

/// A running agent with its socket on a stage.
pub struct Agent {
    pub child: Child,
    pub pidfd: OwnedFd,
    pub socket: PathBuf,
    /// What it logs, line by line.
    pub log: Receiver<String>,
}

impl Agent {
    pub fn start(stage: &Stage) -> Agent {
        Agent::start_with(stage, &[])
    }

    pub fn start_with(stage: &Stage, arguments: &[&str]) -> Agent {
        let socket = stage.path("agent.sock");
        Agent::of(with_socket(&[&["agent"], arguments].concat(), &socket), socket)
    }

    pub fn of(mut command: Command, socket: PathBuf) -> Agent {
        let mut child = command.spawn().expect("cannot run portwatch agent");
        let mut line = String::new();
        let mut errors = BufReader::new(child.stderr.take().expect("piped"));
        errors.read_line(&mut line).expect("the agent's stderr");
        assert!(line.contains("watching ("), "the agent does not start: {line}");
        let (tell, log) = mpsc::channel();
        // To its end, whether anybody listens or not: it must not find its log full.
        thread::spawn(move || errors.lines().map_while(Result::ok).for_each(|line| drop(tell.send(line))));
        Agent { pidfd: pidfd(&child), child, socket, log }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A verb that must ask this agent.
    pub fn command(&self, arguments: &[&str]) -> Command {
        with_socket(&[arguments, &["--agent"]].concat(), &self.socket)
    }

    pub fn portwatch(&self, arguments: &[&str]) -> Run {
        finish(self.command(arguments).spawn().expect("cannot run portwatch"))
    }

    pub fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.socket).expect("the agent's socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        stream.set_write_timeout(Some(PATIENCE)).expect("a time-out");
        Client(BufReader::new(stream))
    }

    pub fn watch(&self) -> Watch {
        let mut watch = Watch::spawn(self.command(&["watch", "--json", "--netns", "all"]));
        watch.wait_until_ready("agent");
        watch
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::pidfd_send_signal(&self.pidfd, signal).expect("the agent is gone");
    }

    pub fn end(&mut self, signal: Signal) -> Option<i32> {
        self.signal(signal);
        assert!(wait_readable(&self.pidfd), "the agent does not end");
        self.child.wait().expect("wait").code()
    }

    /// What it lists of the puppets is the truth.
    #[track_caller]
    pub fn check(&self, step: &str, stage: &Stage, puppets: &[&Puppet]) {
        let truth = oracle::truth(stage, puppets);
        let run = self.portwatch(&["list", "--json", "--netns", "all"]).expect(0);
        let listed = rows(&run.json(), stage, puppets);
        let plain = |rows: &std::collections::BTreeSet<oracle::Row>| {
            let pids = |row: &oracle::Row| row.holders.keys().copied().collect::<Vec<_>>();
            rows.iter().map(|row| (row.inode, row.port, pids(row))).collect::<Vec<_>>()
        };
        assert_eq!(plain(&listed), plain(&truth), "after {step}");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Its own child, unless `end` reaped it, which std remembers.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs it with an agent's socket there, and the agent's state beside it.
pub fn with_socket(arguments: &[&str], socket: &std::path::Path) -> Command {
    let mut command = command(arguments);
    command.env("PORTWATCH_SOCKET", socket).env("PORTWATCH_STATE", socket.parent().expect("a directory"));
    command
}

/// A client that says what it likes.
pub struct Client(pub BufReader<UnixStream>);

impl Client {
    pub fn say(&mut self, line: &str) -> &mut Self {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).expect("writing to the agent");
        self
    }

    pub fn hello(mut self) -> Self {
        self.say(r#"{"request":"hello","version":1}"#);
        assert_eq!(self.hear()["response"], "hello");
        self
    }

    /// The next line but that the agent is at work; `null` where it hung up.
    pub fn hear(&mut self) -> Value {
        loop {
            let line = self.hear_all();
            if line["response"] != "working" {
                return line;
            }
        }
    }

    /// The next line.
    pub fn hear_all(&mut self) -> Value {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Value::Null,
            Ok(_) => serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")),
            // It hung up before it had read all that was said.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Value::Null,
            Err(error) => panic!("the agent does not answer: {error}"),
        }
    }

    #[track_caller]
    pub fn hear_error(&mut self, kind: &str) -> String {
        let answer = self.hear();
        assert_eq!((&answer["response"], &answer["kind"]), (&"error".into(), &kind.into()), "{answer}");
        answer["message"].as_str().expect("a message").to_owned()
    }
}

/// Whether an answer has the fields that are written, with the same values but where they depend on the host: a
/// message may go on where `…` is written.
fn is_like(answer: &Value, written: &Value) -> bool {
    let fields = written.as_object().expect("an object");
    let same = |name: &str, value: &Value| match (name, value.as_str().and_then(|text| text.strip_suffix('…'))) {
        ("pid" | "tier" | "program" | "at", _) => answer[name].is_string() == value.is_string(),
        (_, Some(begins)) => answer[name].as_str().is_some_and(|text| text.starts_with(begins)),
        _ => answer[name] == *value,
    };
    fields.iter().all(|(name, value)| same(name, value))
}

/// Without what depends on the moment.
fn timeless(mut listeners: Value) -> Value {
    for listener in listeners.as_array_mut().expect("an array") {
        listener["since"].take();
        for holder in listener["holders"].as_array_mut().expect("holders") {
            // The same moment, told by a clock that was read at another: a millisecond may lie between.
            holder["started"].take();
        }
        // Who opens it is told by the event, its descriptors by the snapshot that follows.
        for holder in listener["holders"].as_array_mut().expect("holders") {
            holder["fds"].take();
        }
    }
    listeners
}

fn status_without_an_agent() {
    let stage = Stage::new();
    let socket = stage.path("s.sock");
    let shown = socket.display().to_string();
    let check = |command: &dyn Fn(&[&str]) -> Command, arguments: &[&str], why: &str, want: &str| {
        let told = |format: &[&str]| {
            let words = [&["status"], arguments, format].concat();
            finish(command(&words).spawn().expect("portwatch")).expect(1)
        };
        let text = told(&[]).text();
        let line = text.lines().find_map(|line| line.strip_prefix("agent:     "));
        assert_eq!(line, Some(want), "{text}");
        let status = told(&["--json"]).json();
        let expected = (&Value::Null, &json!({"why": why, "message": want}));
        assert_eq!((&status["agent"], &status["no_agent"]), expected, "{status}");
    };
    let own = |words: &[&str]| with_socket(words, &socket);
    check(&own, &[], "not_running", &format!("not running: there is no {shown}"));
    let listener = UnixListener::bind(&socket).expect("a socket");
    check(&own, &["--no-agent"], "not_asked", "not asked, because of --no-agent");
    check(&own, &["--probe", "poll"], "not_asked", "not asked, because of --probe");
    if rustix::process::geteuid().is_root() {
        let copy = stage.path("portwatch");
        std::fs::copy(crate::subject::binary(), &copy).expect("copying the binary");
        let chmod = |path: &Path, mode| {
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
        };
        chmod(&copy, 0o755);
        chmod(&socket, 0o600);
        let other = |words: &[&str]| {
            let mut command = crate::subject::plain_command(&copy, words);
            command.env("PORTWATCH_SOCKET", &socket).uid(NOBODY).gid(NOBODY).current_dir("/");
            command
        };
        let denied = format!("not known: {shown} may not be reached: cannot connect: Permission denied (os error 13)");
        check(&other, &[], "not_permitted", &denied);
    } else {
        skip("root", "only root can become somebody else");
    }
    let hangs_up = thread::spawn(move || listener.incoming().take(2).for_each(drop));
    check(&own, &[], "of_no_use", &format!("of no use at {shown}: it ended during its answer"));
    hangs_up.join().expect("the one that hangs up");
    let left = format!("not running: nobody listens at {shown}, which one left behind");
    check(&own, &[], "not_running", &left);
}

pub fn trials() -> Vec<Test> {
    vec![
        test("agent::list_and_who_answer_as_without_it", || {
            let stage = Stage::new();
            let before = stage.puppet();
            let old = before.serve();
            let agent = Agent::start(&stage);
            let after = stage.puppet();
            let new = after.serve();
            after.udp("127.0.0.1:0", "");
            let child = after.fork();
            for port in [old.port(), new.port()] {
                for verb in ["list", "who"] {
                    let target = format!("{port}/tcp");
                    let mut own = command(&["--no-agent", verb, &target, "--json"]);
                    let own = finish(own.spawn().expect("portwatch")).expect(0).json();
                    let told = agent.portwatch(&[verb, &target, "--json"]).expect(0).json();
                    assert_eq!(timeless(told), timeless(own), "{verb} {port}");
                }
            }
            agent.check("the start", &stage, &[&before, &after, &child]);
            let nothing = agent.portwatch(&["who", "1/udp"]).expect(1);
            assert!(nothing.errors().contains("nothing is listening"), "{}", nothing.errors());
        }),
        test("agent::it_names_nobody_who_has_closed_what_others_hold", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let (giver, taker) = (stage.puppet(), stage.puppet());
            let inherited = giver.serve();
            let child = giver.fork();
            agent.check("a fork", &stage, &[&giver, &taker, &child]);
            // No event tells of a descriptor that is closed while another remains, nor of one that is passed on.
            giver.close(inherited.fd);
            agent.check("a close by the parent", &stage, &[&giver, &taker, &child]);
            let passed = giver.serve();
            agent.check("another listener", &stage, &[&giver, &taker, &child]);
            taker.open_mailbox();
            giver.send_fd(passed.fd, &taker);
            giver.close(passed.fd);
            agent.check("a close of what is in flight", &stage, &[&giver, &taker, &child]);
            taker.receive_fd();
            giver.serve();
            agent.check("its receipt and another listener", &stage, &[&giver, &taker, &child]);
            taker.serve_from_thread();
            agent.check("the end of its leader", &stage, &[&giver, &taker, &child]);
        }),
        test("agent::what_is_asked_at_once_is_each_answered_with_the_truth", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let giver = stage.puppet();
            let socks: Vec<_> = (0..12).map(|_| giver.serve()).collect();
            let child = giver.fork();
            agent.check("a fork", &stage, &[&giver, &child]);
            let mut clients: Vec<_> = socks.iter().map(|_| agent.connect().hello()).collect();
            // They all ask before it takes in the first of them, about what no event has told.
            agent.signal(Signal::STOP);
            let is_closed = |n: usize| n.is_multiple_of(3);
            socks.iter().enumerate().filter(|(n, _)| is_closed(*n)).for_each(|(_, sock)| giver.close(sock.fd));
            for (client, sock) in clients.iter_mut().zip(&socks) {
                client.say(&format!(r#"{{"request":"list","selection":{{"targets":["{}/tcp"]}}}}"#, sock.port()));
            }
            agent.signal(Signal::CONT);
            for (n, client) in clients.iter_mut().enumerate() {
                let answer = client.hear();
                let holders = answer["holders"].as_array().expect("holders");
                let pids: BTreeSet<u64> =
                    holders.iter().filter_map(|holder| holder["process"]["id"]["pid"].as_u64()).collect();
                let giver = (!is_closed(n)).then_some(giver.pid.into());
                assert_eq!(pids, giver.into_iter().chain([child.pid.into()]).collect(), "{answer}");
                assert_eq!(client.hear()["response"], "end");
            }
        }),
        test("agent::an_ordinary_user_sees_everything_in_full", || {
            if !rustix::process::geteuid().is_root() {
                return skip("root", "only root can become somebody else");
            }
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.serve();
            let agent = Agent::start(&stage);
            let copy = stage.path("portwatch");
            std::fs::copy(crate::subject::binary(), &copy).expect("copying the binary");
            let mut command = crate::subject::plain_command(&copy, &["list", "--json", "--agent"]);
            command.env("PORTWATCH_SOCKET", &agent.socket).uid(NOBODY).gid(NOBODY).current_dir("/");
            let listed = finish(command.spawn().expect("portwatch as nobody")).expect(0).json();
            let all = listed.as_array().expect("an array");
            let ours = all.iter().find(|listener| listener["inode"] == sock.inode).expect("root's listener");
            assert_eq!(ours["holders"][0]["pid"], server.pid, "{ours}");
            assert_eq!(ours["holders"][0]["command"][0], "puppet", "{ours}");
        }),
        test("agent::a_server_that_gave_up_its_rights_is_told_as_it_is", || {
            if !rustix::process::geteuid().is_root() {
                return skip("root", "only root can become somebody else");
            }
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let server = stage.puppet();
            let port = server.serve().port().to_string();
            let user = |agent: &Agent| {
                let listed = agent.portwatch(&["list", "--json", &port]).expect(0).json();
                listed[0]["holders"][0]["uid"].as_u64()
            };
            assert_eq!(user(&agent), Some(0));
            // No event of the kernel's tells of this.
            server.become_user(NOBODY);
            assert_eq!(user(&agent), Some(u64::from(NOBODY)));
            let mine = agent.portwatch(&["list", "--json", &port, "--user", &NOBODY.to_string()]).expect(0).json();
            assert_eq!(mine.as_array().map(Vec::len), Some(1), "{mine}");
        }),
        test("agent::a_server_that_moved_is_told_where_it_is", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let server = stage.puppet();
            let port = server.serve().port().to_string();
            let here = std::fs::canonicalize(stage.path(".")).expect("the stage");
            let here = here.to_str().expect("a path");
            let found = |agent: &Agent| {
                let listed = agent.portwatch(&["list", "--json", &port, "--cwd", here]).expect(0).json();
                listed.as_array().map_or(0, Vec::len)
            };
            assert_eq!(found(&agent), 0);
            // No event of the kernel's tells of this.
            server.change_directory(Path::new(here));
            assert_eq!(found(&agent), 1);
            let alone = finish(command(&["list", "--json", &port, "--no-agent"]).spawn().expect("portwatch"));
            let mut told = [agent.portwatch(&["list", "--json", &port]), alone].map(|run| run.expect(0).json());
            // Only who saw it begin knows when.
            told.iter_mut().for_each(|rows| rows[0]["since"] = Value::Null);
            assert_eq!(told[0], told[1]);
        }),
        test("agent::watch_tells_changes_and_nothing_that_was_there", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let puppet = stage.puppet();
            let old = puppet.serve();
            let mut watch = agent.watch();
            let new = puppet.serve();
            // Of the host, others may open theirs meanwhile; of ours, what was there is not told.
            let event = loop {
                let event = watch.next("a new listener");
                if stage.knows(event["listener"]["inode"].as_u64().unwrap_or(0)) {
                    break event;
                }
            };
            assert_eq!((&event["event"], &event["listener"]["inode"]), (&json!("open"), &json!(new.inode)), "{event}");
            puppet.close(old.fd);
            let event = watch.until_event("close", old.inode);
            assert_eq!(event["process"]["pid"], puppet.pid, "{event}");
            assert_eq!(watch.interrupt(), Some(0));
        }),
        test("agent::a_watch_that_does_not_read_is_resynced_and_true_again", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let puppet = stage.puppet();
            let (before, stays) = (puppet.serve(), puppet.serve());
            let mut watch = agent.watch();
            let known = puppet.serve();
            watch.until_event("open", known.inode);
            watch.signal(Signal::STOP);
            puppet.close(known.fd);
            puppet.close(before.fd);
            // More than its queue and the socket's buffer hold.
            puppet.begin("storm 20000");
            puppet.answer().expect("a storm");
            let during = puppet.serve();
            agent.check("the storm", &stage, &[&puppet]);
            watch.signal(Signal::CONT);
            while watch.lost == 0 {
                watch.next("that changes were lost");
            }
            let last = puppet.serve();
            watch.until_event("open", last.inode);
            let shown: Vec<u64> = watch.rows(&stage).into_iter().map(|row| row.inode).collect();
            let expected = |inode: u64| shown.contains(&inode);
            assert!(expected(during.inode) && expected(last.inode) && !expected(known.inode), "{shown:?}");
            // It was there before, so no watch tells of it unless it changes.
            assert!(!expected(stays.inode), "{shown:?}");
        }),
        test("agent::a_second_one_says_so_and_leaves_the_first_alone", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let second = finish(with_socket(&["agent"], &agent.socket).spawn().expect("portwatch agent")).expect(1);
            assert!(second.errors().contains("serves"), "{}", second.errors());
            agent.portwatch(&["status"]).expect(0);
        }),
        test("agent::one_that_was_killed_is_replaced_and_its_socket_too", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            let mut agent = Agent::start(&stage);
            agent.end(Signal::KILL);
            assert!(agent.socket.exists(), "SIGKILL leaves no time to clean up");
            // Nobody answers there: the work is done without, and that is said; not so where there was never any.
            let alone = |socket: &Path| finish(with_socket(&["list"], socket).spawn().expect("portwatch")).expect(0);
            let want = format!(
                "portwatch: no agent answers at {}, though its socket is there; working alone\n",
                agent.socket.display()
            );
            assert!(alone(&agent.socket).errors().starts_with(&want), "{}", alone(&agent.socket).errors());
            let never = alone(&stage.path("never.sock"));
            assert!(!never.errors().contains("agent"), "{}", never.errors());
            puppet.serve();
            let mut next = Agent::start(&stage);
            next.check("a restart", &stage, &[&puppet]);
            assert_eq!(next.end(Signal::TERM), Some(0));
            assert!(!next.socket.exists(), "SIGTERM does");
        }),
        test("agent::status_is_healthy_only_while_it_answers", || {
            let stage = Stage::new();
            let mut agent = Agent::start(&stage);
            let status = agent.portwatch(&["status", "--json"]).expect(0).json();
            assert_eq!(status["agent"]["pid"], agent.child.id(), "{status}");
            assert_eq!(status["tier"], status["agent"]["tier"], "{status}");
            agent.end(Signal::INT);
            let status = finish(with_socket(&["status", "--json"], &agent.socket).spawn().expect("portwatch"));
            assert_eq!(status.expect(1).json()["agent"], Value::Null);
            let run = finish(with_socket(&["list", "--agent"], &agent.socket).spawn().expect("portwatch")).expect(4);
            assert!(run.errors().contains("no agent answers"), "{}", run.errors());
        }),
        test("agent::status_says_what_is_there_instead_of_an_agent", status_without_an_agent),
        test("agent::history_tells_of_what_came_and_went_and_how", || {
            let stage = Stage::new();
            let stays = stage.puppet();
            let old = stays.serve();
            let agent = Agent::start(&stage);
            let (closes, exits) = (stage.puppet(), stage.puppet());
            let (first, second) = (closes.serve(), exits.serve());
            closes.close(first.fd);
            exits.exit();
            let mut lives = BTreeMap::new();
            // What is written is written soon, off the path of events.
            while lives.values().filter(|ended| **ended == json!("closed") || **ended == json!("exited")).count() < 2 {
                let ports = [&old, &first, &second].map(|sock| sock.port().to_string());
                let told = agent.portwatch(&["history", "--json", &ports.join(",")]).expect(0).json();
                for life in told.as_array().expect("an array") {
                    lives.insert(life["port"].as_u64().expect("a port") as u16, life["ended"].clone());
                }
            }
            assert_eq!(lives[&old.port()], Value::Null, "it is open still: {lives:?}");
            assert_eq!(lives[&first.port()], json!("closed"), "{lives:?}");
            assert_eq!(lives[&second.port()], json!("exited"), "{lives:?}");
            let text = agent.portwatch(&["history", &first.port().to_string()]).expect(0).text();
            assert!(text.contains("closed") && text.contains(&closes.pid.to_string()), "{text}");
            let nothing = agent.portwatch(&["history", "1/udp"]).expect(0);
            assert!(nothing.errors().contains("knows of nothing"), "{}", nothing.errors());
        }),
        test("agent::a_state_directory_that_cannot_be_written_stops_nothing", || {
            let stage = Stage::new();
            let socket = stage.path("agent.sock");
            // A file where the directory should be.
            let state = stage.path("state");
            std::fs::write(&state, "").expect("a file");
            let mut command = with_socket(&["agent"], &socket);
            command.env("PORTWATCH_STATE", &state);
            let agent = Agent::of(command, socket);
            let puppet = stage.puppet();
            puppet.serve();
            agent.check("a broken state directory", &stage, &[&puppet]);
            let status = agent.portwatch(&["status"]).expect(1);
            assert!(status.text().contains("history:"), "{}", status.text());
        }),
        test("agent::wait_returns_by_its_events", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let puppet = stage.puppet();
            let sock = puppet.bind("127.0.0.1:0", "");
            let target = format!("{}/tcp", sock.port());
            let mut wait = agent.command(&["wait", &target, "--bound", "--verbose"]).spawn().expect("wait");
            let mut errors = BufReader::new(wait.stderr.take().expect("piped"));
            let mut line = String::new();
            while !line.contains("waiting (agent)") {
                line.clear();
                assert!(errors.read_line(&mut line).expect("its stderr") > 0, "wait does not ask the agent");
            }
            puppet.listen(sock.fd);
            let run = finish(wait).expect(0);
            assert!(run.text().contains("is bound by"), "{}", run.text());
        }),
        test("agent::a_wait_outlives_its_agent", || {
            let stage = Stage::new();
            for (goal, is_forced) in [("--bound", false), ("--free", false), ("--bound", true)] {
                let mut agent = Agent::start(&stage);
                let puppet = stage.puppet();
                let sock = if goal == "--bound" { puppet.bind("127.0.0.1:0", "") } else { puppet.serve() };
                let target = format!("{}/tcp", sock.port());
                let mut arguments = vec!["wait", &target, goal, "--verbose"];
                arguments.extend(is_forced.then_some("--agent"));
                let mut wait = with_socket(&arguments, &agent.socket).spawn().expect("wait");
                let mut errors = BufReader::new(wait.stderr.take().expect("piped"));
                let mut said = String::new();
                while !said.contains("waiting (agent)") {
                    assert!(
                        errors.read_line(&mut said).expect("its stderr") > 0,
                        "wait does not ask the agent: {said}"
                    );
                }
                agent.end(Signal::TERM);
                let why = format!("the agent at {} is of no use: it ended during its answer", agent.socket.display());
                if is_forced {
                    finish(wait).expect(4);
                    errors.read_to_string(&mut said).expect("its stderr");
                    assert!(said.ends_with(&format!("portwatch: error: {why}\n")), "{said}");
                    continue;
                }
                while !said.contains("working alone") {
                    assert!(errors.read_line(&mut said).expect("its stderr") > 0, "wait ends with its agent: {said}");
                }
                assert!(said.ends_with(&format!("portwatch: {why}; working alone\n")), "{said}");
                match goal {
                    "--bound" => drop(puppet.listen(sock.fd)),
                    _ => puppet.close(sock.fd),
                }
                finish(wait).expect(0);
            }
        }),
        test("agent::a_watch_is_as_short_as_it_is_asked_to_be", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            for time in ["0s", "1ms"] {
                agent.portwatch(&["watch", "--for", time]).expect(0);
            }
        }),
        test("agent::what_is_more_than_it_takes_is_done_without_it", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let puppet = stage.puppet();
            let sock = puppet.serve();
            let mine = format!("127.0.0.1:{}/tcp", sock.port());
            let odd: Vec<String> = (0..5000).map(|index| (2 * index + 1).to_string()).collect();
            let long: Vec<String> = (15_000..18_700).map(|half| format!("{}-{}/tcp", 2 * half, 2 * half + 1)).collect();
            let placed = vec!["[2001:db8:0:ffff:ffff:ffff:ffff:1]:1/tcp".to_owned(); 513];
            for (many, why) in [
                (odd, "5001 targets; a selection may have 4096"),
                (long, "bytes; it takes 65536"),
                (placed, "514 targets with an address; a selection may have 512"),
            ] {
                let words: Vec<&str> = many.iter().map(String::as_str).chain([mine.as_str()]).collect();
                for verb in [&["list", "--json"][..], &["wait", "--bound", "--any", "--json", "--timeout", "0"]] {
                    let arguments = [verb, &words].concat();
                    let run = finish(with_socket(&arguments, &agent.socket).spawn().expect("portwatch")).expect(0);
                    let port = format!("\"port\":{}", sock.port());
                    assert!(run.text().replace(": ", ":").contains(&port), "{verb:?}: {}", run.text());
                    let said = run.errors();
                    assert!(said.contains(why) && said.ends_with("; working alone\n"), "{verb:?}: {said}");
                    assert_eq!(said.lines().count(), 1, "{verb:?}: {said}");
                }
            }
        }),
        test("agent::metrics_are_served_where_asked_for", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            // Reserved for the agent, which cannot say which port the kernel gave it.
            let reserved = puppet.bind("127.0.0.1:0", "reuseaddr");
            let address = reserved.address.to_string();
            puppet.close(reserved.fd);
            let agent = Agent::start_with(&stage, &["--metrics", &address]);
            let sock = puppet.serve();
            agent.check("a listener", &stage, &[&puppet]);
            let mut stream = std::net::TcpStream::connect(&address).expect("the metrics' port");
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("a request");
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("an answer");
            assert!(text.starts_with("HTTP/1.1 200"), "{text}");
            let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            assert!(value("portwatch_opens_total{proto=\"tcp\"}").is_some_and(|count| count != "0"), "{text}");
            assert!(sock.port() > 0);
        }),
        test("agent::one_that_hangs_is_left_aside_with_a_sentence", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            agent.signal(Signal::STOP);
            let run = finish(with_socket(&["list"], &agent.socket).spawn().expect("portwatch")).expect(0);
            assert!(run.errors().contains("no answer within 2 s; working alone"), "{}", run.errors());
            agent.portwatch(&["list"]).expect(4);
            agent.signal(Signal::CONT);
            agent.portwatch(&["list"]).expect(0);
        }),
        test("agent::an_answer_that_waits_for_its_turn_says_that_it_is_worked_on", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let puppet = stage.puppet();
            for _ in 0..200 {
                puppet.serve();
            }
            let request = r#"{"request":"list"}"#;
            // As many as may be under way, none of which is read to its end.
            let mut slow: Vec<Client> = (0..8).map(|_| agent.connect().hello()).collect();
            for client in &mut slow {
                assert_eq!(client.say(request).hear()["response"], "listener");
            }
            let mut patient = agent.connect().hello();
            patient.say(request);
            for _ in 0..3 {
                assert_eq!(patient.hear_all(), json!({"response": "working"}));
            }
            // Nobody who asks for little waits.
            let target = format!("{}/tcp", puppet.serve().port());
            agent.portwatch(&["who", &target]).expect(0);
            let list = agent.command(&["list", "--json"]).spawn().expect("portwatch");
            drop(slow);
            assert_eq!(patient.hear()["response"], "listener");
            assert!(finish(list).expect(0).json().as_array().is_some_and(|all| all.len() > 200));
        }),
        test("agent::nonsense_is_answered_with_an_error_and_the_next_request_as_ever", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let mut client = agent.connect().hello();
            for (line, part) in [
                ("", "not a request"),
                ("nonsense", "not a request"),
                (r#"{"request":"explode"}"#, "unknown variant"),
                (r#"["list"]"#, "expected an object"),
                (r#"{"request":"list","selection":[]}"#, "expected an object"),
                (r#"{"request":"list","uid":0}"#, "unknown field"),
                (r#"{"request":"list","selection":{"targets":["0"]}}"#, "'0' is out of range"),
                (r#"{"request":"list","selection":{"commands":["["]}}"#, "bad glob"),
            ] {
                let message = client.say(line).hear_error("usage");
                assert!(message.contains(part), "{line}: {message}");
            }
            assert_eq!(client.say(r#"{"request":"status"}"#).hear()["response"], "status");
        }),
        test("agent::the_examples_of_its_protocol_are_answered_as_written", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            // Reserved and not listened on: nobody else's listener shows where the page says that nothing is.
            let port = stage.puppet().bind("127.0.0.1:0", "").port().to_string();
            let page = include_str!("../portwatch/PROTOCOL.md").replace("8000/tcp", &format!("{port}/tcp"));
            let example = page.split("```").nth(1).expect("an example");
            let mut client = agent.connect();
            let mut answers = 0;
            for line in example.lines() {
                match (line.strip_prefix("> "), line.strip_prefix("< ")) {
                    (Some(request), _) => drop(client.say(request)),
                    (_, Some(written)) => {
                        let written: Value = serde_json::from_str(written).expect("JSON on the page");
                        assert!(is_like(&client.hear(), &written), "the page says {written}");
                        answers += 1;
                    }
                    _ => {}
                }
            }
            assert_eq!(answers, 9);
        }),
        test("agent::a_connection_begins_with_hello_in_the_right_version", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let mut client = agent.connect();
            client.say(r#"{"request":"list"}"#).hear_error("usage");
            assert_eq!(client.hear(), Value::Null);
            let mut client = agent.connect();
            client.say(r#"{"request":"hello","version":999}"#).hear_error("version");
            assert_eq!(client.hear(), Value::Null);
        }),
        test("agent::a_line_that_is_no_text_is_told_so_before_it_hangs_up", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let mut client = agent.connect().hello();
            client.0.get_mut().write_all(b"{\"request\":\"\xff\"}\n").expect("writing");
            assert_eq!(client.hear_error("usage"), "a request is text in UTF-8");
            assert_eq!(client.hear(), Value::Null);
        }),
        test("agent::a_subscriber_that_says_more_is_told_so_before_it_hangs_up", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            for line in [r#"{"request":"status"}"#, "nonsense"] {
                let mut client = agent.connect().hello();
                client.say(r#"{"request":"watch","selection":{"targets":["1/udp"]}}"#);
                assert_eq!(client.hear()["response"], "watching");
                assert!(client.say(line).hear_error("usage").contains("nothing more to say"));
                assert_eq!(client.hear(), Value::Null);
            }
        }),
        test("agent::a_time_that_no_history_can_name_is_the_end_of_time", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let puppet = stage.puppet();
            let sock = puppet.serve();
            puppet.close(sock.fd);
            let target = format!("{}/tcp", sock.port());
            agent.until("stored", |_| {
                let told = agent.portwatch(&["history", "--json", &target]).expect(0).json();
                told.as_array().is_some_and(|lives| lives.iter().any(|life| life["ended"] == "closed"))
            });
            let mut client = agent.connect().hello();
            for from in [1 << 63, u64::MAX] {
                let history =
                    json!({"request": "history", "selection": {"targets": [target]}, "from": from, "limit": 9});
                assert_eq!(client.say(&history.to_string()).hear(), json!({"response": "end", "count": 0}), "{from}");
            }
            let watch = json!({"request": "watch", "selection": {"targets": [target]}, "since": u64::MAX});
            assert_eq!(client.say(&watch.to_string()).hear()["response"], "watching");
        }),
        test("agent::a_bad_command_line_is_a_usage_error", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let run = agent.portwatch(&["list", "--probe", "poll"]).expect(2);
            let want = "portwatch: error: --agent asks the agent, which has probes of its own, and --probe poll looks without \
                        the agent; leave out one\n";
            assert_eq!(run.errors(), want);
            for (arguments, want) in [
                (["--history-size", "0"], "use --no-history"),
                (["--history-size", "99999999999999999"], "use a number of MiB"),
                (["--history-age", "0"], "use --no-history"),
                (["--ring", "1000"], "use a power of two of at least 4096"),
                (["--ring", "2048"], "use a power of two of at least 4096"),
            ] {
                let command = with_socket(&[&["agent"], &arguments[..]].concat(), &stage.path("other.sock")).spawn();
                let run = finish(command.expect("portwatch agent")).expect(2);
                assert!(run.errors().contains(want), "{arguments:?}: {}", run.errors());
            }
        }),
        test("agent::oversized_and_truncated_requests_end_their_connection_only", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let mut other = agent.connect().hello();
            let mut client = agent.connect().hello();
            client.say(&"x".repeat(70_000)).hear_error("usage");
            assert_eq!(client.hear(), Value::Null);
            // Cut off in the midst of a line.
            let mut client = agent.connect().hello();
            client.0.get_mut().write_all(b"{\"request\":\"li").expect("writing");
            drop(client);
            // Without any line end, for as long as it takes.
            let mut client = agent.connect();
            let endless = vec![b'x'; 1 << 20];
            let _refused = client.0.get_mut().write_all(&endless);
            assert_eq!(other.say(r#"{"request":"status"}"#).hear()["response"], "status");
        }),
        test("agent::a_thousand_clients_are_served_or_told_that_it_is_busy", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            // One descriptor each, on our side.
            let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
            let limit = rustix::process::Rlimit { current: most, maximum: most };
            let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
            let mut clients: Vec<Client> = (0..1100).map(|_| agent.connect()).collect();
            let mut answers = BTreeMap::new();
            for client in &mut clients {
                let _busy = client.0.get_mut().write_all(b"{\"request\":\"hello\",\"version\":1}\n");
                *answers.entry(client.hear()["response"].as_str().unwrap_or("hung up").to_owned()).or_insert(0) += 1;
            }
            assert!(answers["hello"] >= 1000 && answers["error"] >= 50, "{answers:?}");
            drop(clients);
            agent.portwatch(&["list"]).expect(0);
        }),
        test("agent::ring_overflow_is_made_good", || {
            let stage = Stage::new();
            let agent = Agent::start_with(&stage, &["--ring", "4096"]);
            let puppets: Vec<Puppet> = (0..4).map(|_| stage.puppet()).collect();
            let all: Vec<&Puppet> = puppets.iter().collect();
            let mut watch = agent.watch();
            for round in 0..3 {
                for puppet in &puppets {
                    puppet.begin("storm 2000");
                }
                for puppet in &puppets {
                    puppet.answer().expect("a storm");
                    puppet.serve();
                }
                let last = puppets[0].serve();
                watch.until_event("open", last.inode);
                agent.check(&format!("round {round}"), &stage, &all);
            }
            let status = agent.portwatch(&["status", "--json"]).expect(0).json();
            let (dropped, resyncs) = (&status["agent"]["dropped"], &status["agent"]["resyncs"]);
            assert_eq!(dropped.as_u64() > Some(0), resyncs.as_u64() > Some(0), "{status}");
            assert!(
                !crate::subject::is_required("kernel") || dropped.as_u64() > Some(0),
                "the ring is not small: {status}"
            );
        }),
    ]
}
