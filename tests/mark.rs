//! Marks, and what is ended since: a job's leaks, exactly, and nobody else's servers.
//!
//! Everything plays in a network namespace of its own, for a clean-up of root's would mean whatever root started on this
//! host meanwhile.

mod recipes;
mod reports;
mod selectors;
mod starters;
mod strangers;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde_json::Value;

use crate::agent::Agent;
use crate::dockerd::{self, Container};
use crate::puppet::{Puppet, Stage, sys, wait_readable};
use crate::subject::{Run, binary, finish, plain_command, skip};
use crate::{Test, test};

/// Ordinary users of nobody else's.
const USER: u32 = 64_801;
const OTHER: u32 = 64_802;

/// A network namespace in which one user works, with or without an agent.
struct Yard {
    /// Whoever lives here is its child.
    host: Puppet,
    netns: File,
    uid: u32,
    agent: Option<Agent>,
    stage: Stage,
}

impl Yard {
    /// `None`, loudly, where only root may.
    #[track_caller]
    fn new(uid: u32, with_agent: bool) -> Option<Yard> {
        let stage = Stage::new();
        let host = stage.puppet();
        if !host.unshare_net() {
            return None;
        }
        let netns = File::open(format!("/proc/{}/ns/net", host.pid)).expect("a network namespace");
        if uid == 0 {
            symlink(fs::canonicalize(binary()).expect("the binary"), stage.path("portwatch")).expect("a link");
        } else {
            fs::copy(binary(), stage.path("portwatch")).expect("copying the binary");
        }
        fs::create_dir(stage.path("home")).expect("a directory");
        chown(stage.path("home"), Some(uid), Some(uid)).expect("chown");
        let agent = with_agent.then(|| Agent::start(&stage));
        Some(Yard { host, netns, uid, agent, stage })
    }

    fn home(&self, name: &str) -> PathBuf {
        self.stage.path("home").join(name)
    }

    /// Any program, as this user here.
    fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.stage.path("").display())).current_dir(self.home(""));
        command.env("PORTWATCH_SOCKET", self.agent.as_ref().map_or(Path::new("/nonexistent"), |agent| agent.socket()));
        command.env("XDG_RUNTIME_DIR", self.home(""));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (netns, uid) = (self.netns.try_clone().expect("dup"), self.uid);
        // SAFETY: system calls alone.
        unsafe {
            command.pre_exec(move || {
                setns(&netns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
                if uid == 0 { Ok(()) } else { sys::become_user(uid) }
            });
        }
        command
    }

    fn portwatch(&self, arguments: &[&str]) -> Run {
        let mut command = self.command(self.stage.path("portwatch"));
        finish(command.args(arguments).spawn().expect("cannot run portwatch"))
    }

    /// A server of this user, or of another one.
    fn server(&self, uid: u32) -> Puppet {
        let server = self.host.fork();
        if uid != 0 {
            server.become_user(uid);
        }
        server
    }

    /// Marks what is there, in a file.
    fn mark(&self) -> PathBuf {
        let path = self.home("before.json");
        fs::write(&path, self.portwatch(&["mark"]).expect(0).stdout).expect("a mark");
        chown(&path, Some(self.uid), Some(self.uid)).expect("chown");
        path
    }
}

const SERVER: &str = r#"
import os, signal, socket, subprocess, sys
kind = sys.argv[1]
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
s.bind(("127.0.0.1", 0))
if kind != "udp":
    s.listen()
def bear(*_):
    subprocess.Popen([sys.executable, sys.argv[0], "late"], start_new_session=True)
    os._exit(0)
if kind == "bearer":
    signal.signal(signal.SIGTERM, bear)
with open("told", "w") as told:
    told.write(f"{kind} {os.getpid()}\n")
while True:
    signal.pause()
"#;

const NODE: &str = r#"
require("net").createServer().listen(0, "127.0.0.1", () =>
    require("fs").writeFileSync("told", `node ${process.pid}\n`));
"#;

/// Leaks a server of a session of its own, one that two forks took away from here, one of UDP, and one that starts
/// another when it is told to end.
const JOB: &str = r#"
setsid "$PYTHON" server.py web &
(setsid sh -c '"$NODE" server.js & ' &)
"$PYTHON" server.py udp &
"$PYTHON" server.py bearer &
"#;

/// What a job leaked: gone at the end in any case.
#[derive(Default)]
struct Leaks(BTreeMap<String, (u32, Option<OwnedFd>)>);

impl Leaks {
    fn hear(&mut self, told: &File, wanted: usize) {
        while self.0.len() < wanted {
            assert!(wait_readable(told), "a leaked server does not listen");
            let mut bytes = [0; 4096];
            let length = (&mut &*told).read(&mut bytes).expect("what servers tell");
            for line in String::from_utf8_lossy(&bytes[..length]).lines() {
                let (kind, pid) = line.split_once(' ').expect("a kind and a pid");
                let pid: u32 = pid.parse().expect("a pid");
                let open = |pid: u32| rustix::process::pidfd_open(Pid::from_raw(pid as i32)?, PidfdFlags::empty()).ok();
                self.0.insert(kind.to_owned(), (pid, open(pid)));
            }
        }
    }

    fn pids(&self) -> BTreeMap<u32, String> {
        self.0.iter().map(|(kind, (pid, _))| (*pid, kind.clone())).collect()
    }

    fn are_gone(&self) -> bool {
        self.0.values().all(|(_, pidfd)| pidfd.as_ref().is_none_or(wait_readable))
    }
}

impl Drop for Leaks {
    fn drop(&mut self) {
        for (_, pidfd) in self.0.values() {
            let Some(pidfd) = pidfd else { continue };
            let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
            wait_readable(pidfd);
            let _ = rustix::process::waitid(
                WaitId::PidFd(std::os::fd::AsFd::as_fd(pidfd)),
                WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
            );
        }
    }
}

/// A program that every user may run. `None`, loudly.
#[track_caller]
fn program(name: &str) -> Option<PathBuf> {
    let path = Path::new("/usr/bin").join(name);
    if !path.exists() {
        skip(name, &format!("there is no {}", path.display()));
        return None;
    }
    Some(path)
}

/// The whole of a job: mark, leaks, clean-up.
fn job(uid: u32, with_agent: bool) {
    let (Some(python), Some(node)) = (program("python3"), program("node")) else { return };
    let Some(yard) = Yard::new(uid, with_agent) else { return };
    fs::write(yard.home("server.py"), SERVER).expect("a script");
    fs::write(yard.home("server.js"), NODE).expect("a script");
    nix::unistd::mkfifo(&yard.home("told"), Mode::from_bits_truncate(0o666)).expect("a fifo");
    chown(yard.home("told"), Some(uid), Some(uid)).expect("chown");
    let told = File::options().read(true).write(true).open(yard.home("told")).expect("a fifo");

    let (stays, restarts) = (yard.server(uid), yard.server(uid));
    let (_sock, before) = (stays.serve(), restarts.serve());
    let run = yard.portwatch(&["mark", "--name", "job-1"]).expect(0);
    // On a host that is too busy for an agent to greet in time, the client does without, and says so.
    let by_agent = with_agent && !run.errors().contains("working alone");
    let marks = yard.home("portwatch/marks");
    let keeper = if by_agent { "by the agent".to_owned() } else { format!("in {}", marks.display()) };
    let (text, errors) = (run.text(), run.errors());
    assert!(text.ends_with(&format!(" as job-1, kept {keeper}\n")), "{text}{errors}");
    restarts.close(before.fd);
    restarts.serve();
    let stranger = yard.server(if uid == OTHER { USER } else { OTHER });
    stranger.serve();

    let mut leaks = Leaks::default();
    let mut script = yard.command("/bin/sh");
    script.args(["-ec", JOB]).env("PYTHON", python).env("NODE", node);
    // The leaks would keep pipes open.
    script.stdout(Stdio::null()).stderr(Stdio::null());
    assert_eq!(finish(script.spawn().expect("a shell")).code, Some(0));
    leaks.hear(&told, 4);

    let run = yard.portwatch(&["kill", "--since", "job-1", "--yes", "--report", "leaks.json", "--fail-on-leak"]);
    let run = run.expect(1);
    assert!(
        run.text().ends_with("5 listeners were left behind since job-1: none is there any more\n"),
        "{}",
        run.text()
    );
    leaks.hear(&told, 5);
    let report: Value = serde_json::from_slice(&fs::read(yard.home("leaks.json")).expect("a report")).expect("JSON");
    assert_eq!((&report["clean"], &report["since"]), (&true.into(), &"job-1".into()), "{report}");
    let rows = report["leaks"].as_array().expect("leaks");
    let told: BTreeMap<u32, &Value> =
        rows.iter().map(|row| (row["pid"].as_u64().expect("a pid") as u32, row)).collect();
    let pids = leaks.pids();
    assert_eq!(told.keys().collect::<Vec<_>>(), pids.keys().collect::<Vec<_>>(), "{report}");
    for (pid, row) in told {
        assert_eq!(row["proto"], if pids[&pid] == "udp" { "udp" } else { "tcp" }, "{row}");
        assert_eq!(
            (&row["uid"], &row["cwd"]),
            (&uid.into(), &yard.home("").display().to_string().trim_end_matches('/').into()),
            "{row}"
        );
        assert!(["terminated", "exited"].iter().any(|ended| row["ended"] == *ended), "{row}");
        assert!(row["lived_ms"].as_u64().is_some_and(|ms| ms < 600_000), "{row}");
    }
    assert!(leaks.are_gone());
    assert!(stays.is_alive() && restarts.is_alive() && stranger.is_alive());

    // Nothing is left to be ended, and that is no failure.
    let run = yard.portwatch(&["kill", "--since", "job-1", "--yes", "--fail-on-leak"]).expect(0);
    assert_eq!(run.text(), "nothing was left behind since job-1\n");
    if uid == 0 {
        let run = yard.portwatch(&["kill", "--since", "job-1", "--yes", "--user", &OTHER.to_string()]).expect(0);
        assert!(run.text().contains("1 listener was left behind"), "{}", run.text());
        stranger.wait();
    }
    assert!(stays.is_alive() && restarts.is_alive());
}

/// Whoever is not to be trusted decides nothing: exit 4, one line, and nobody is ended.
fn bad_marks() {
    let Some(yard) = Yard::new(USER, false) else { return };
    let good = fs::read_to_string(yard.mark()).expect("a mark");
    let server = yard.server(USER);
    server.serve();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot id");
    let path = yard.home("x");
    for (name, text, owner, mode, want) in [
        ("empty", "", USER, 0o600, "is empty"),
        ("half", &good[..good.len() / 2], USER, 0o600, "is damaged"),
        ("hostile", "{\"\u{1b}[31m\": 1}", USER, 0o600, "is damaged"),
        ("another boot", &good.replace(boot.trim(), "0"), USER, 0o600, "was made before this host was booted"),
        ("another version", &good.replace("mark\":1", "mark\":9"), USER, 0o600, "has version 9"),
        ("the future", &good.replace("boot_ns\":", "boot_ns\":9"), USER, 0o600, "is of a moment that has not come yet"),
        ("another's", &good, OTHER, 0o644, "belongs to uid 64802"),
        ("everybody's", &good, USER, 0o666, "may be written by others"),
    ] {
        fs::write(&path, text).expect("a mark");
        chown(&path, Some(owner), Some(owner)).expect("chown");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
        let run = yard.portwatch(&["kill", "--since", "./x", "--yes"]).expect(4);
        let errors = run.errors();
        assert!(errors.starts_with("portwatch: error: the mark ./x ") && errors.contains(want), "{name}: {errors}");
        assert!(errors.lines().count() == 1 && !errors.contains('\u{1b}') && run.stdout.is_empty(), "{name}: {errors}");
        assert!(server.is_alive(), "{name}");
        fs::remove_file(&path).expect("the mark");
    }
    for (name, code, want) in [
        ("nobody", 2, "no mark is called nobody"),
        ("./nobody", 2, "cannot read the mark"),
        ("/dev/null/x", 2, "cannot read the mark"),
        (&"x".repeat(300), 2, "cannot read the mark"),
        ("/dev/null", 4, "is no regular file"),
    ] {
        let run = yard.portwatch(&["kill", "--since", name, "--yes"]).expect(code);
        assert!(run.errors().contains(want), "{}", run.errors());
    }
    let chosen = yard.portwatch(&["mark", "--name", "10m"]).expect(2);
    assert!(chosen.errors().contains("that is a duration to --since"), "{}", chosen.errors());
    assert!(server.is_alive());
    // The one that is good.
    yard.portwatch(&["kill", "--since", "before.json", "--yes"]).expect(0);
    server.wait();
}

/// The agent keeps marks for each user, across its own end.
fn names() {
    let Some(mut yard) = Yard::new(0, true) else { return };
    yard.portwatch(&["mark", "--name", "of-root"]).expect(0);
    let server = yard.server(USER);
    let port = server.serve().port().to_string();
    let since = |yard: &Yard, code| yard.portwatch(&["list", &port, "--since", "of-root"]).expect(code);
    assert!(since(&yard, 0).text().contains(&port));
    yard.agent = None;
    yard.agent = Some(Agent::start(&yard.stage));
    assert!(since(&yard, 0).text().contains(&port));
    fs::remove_file(yard.stage.path("portwatch")).expect("the link");
    fs::copy(binary(), yard.stage.path("portwatch")).expect("copying the binary");
    yard.uid = USER;
    chown(yard.home(""), Some(USER), Some(USER)).expect("chown");
    assert!(since(&yard, 2).errors().contains("no mark is called of-root"));
    // What root's agent keeps is nobody else's to read.
    assert_eq!(fs::metadata(yard.stage.path("marks")).expect("marks").permissions().mode() & 0o7777, 0o700);
}

/// Where the agent saw a server open, the report has those who started it, also those who have ended since.
fn lineage() {
    let Some(yard) = Yard::new(0, true) else { return };
    yard.portwatch(&["mark", "--name", "job"]).expect(0);
    let (program, control) = yard.stage.recipe();
    let (name, value) = control.split_once('=').expect("a variable");
    let mut script = yard.command("/bin/sh");
    script.args(["-c", "sh -c '\"$PROGRAM\" & wait' & read line"]).env("PROGRAM", program).env(name, value);
    script.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut script = script.spawn().expect("a shell");
    let server = yard.stage.admit();
    let port = server.serve().port().to_string();
    // The agent answers when it has seen what the asking one has.
    let run = yard.portwatch(&["list", &port, "--agent"]).expect(0);
    assert!(run.text().contains(&port), "{}", run.text());
    drop(script.stdin.take());
    script.wait().expect("wait");
    let run = yard.portwatch(&["kill", "--since", "job", "--yes", "--report", "leaks.json"]).expect(0);
    assert!(run.text().contains(&format!("sh ({})", script.id())), "{}", run.text());
    let report: Value = serde_json::from_slice(&fs::read(yard.home("leaks.json")).expect("a report")).expect("JSON");
    let ancestors = report["leaks"][0]["ancestors"].as_array().expect("ancestors");
    assert_eq!(ancestors[1], serde_json::json!({"pid": script.id(), "name": "sh"}), "{report}");
    server.wait();
}

/// A container that was made since goes with --stop-container; one from before stays, also when it was started anew. What
/// publishes their ports is root's, and hidden from other users, who may stop containers all the same.
fn containers(uid: u32, with_agent: bool) {
    let Some(daemon) = dockerd::shared() else { return };
    daemon.open_to_all();
    let stage = Stage::new();
    fs::copy(binary(), stage.path("portwatch")).expect("copying the binary");
    let agent = with_agent.then(|| Agent::start(&stage));
    let portwatch = |arguments: &[&str]| {
        let mut command = daemon.enter(plain_command(stage.path("portwatch"), arguments));
        command.env("PORTWATCH_SOCKET", agent.as_ref().map_or(Path::new("/nonexistent"), |agent| agent.socket()));
        // SAFETY: system calls alone.
        unsafe { command.pre_exec(move || if uid == 0 { Ok(()) } else { sys::become_user(uid) }) };
        finish(command.spawn().expect("cannot run portwatch"))
    };
    let old = Container::serving(&daemon, &["-p", "127.0.0.1:8131:80"], 80);
    let mark = stage.path("mark");
    fs::write(&mark, portwatch(&["mark"]).expect(0).stdout).expect("a mark");
    chown(&mark, Some(uid), Some(uid)).expect("chown");
    let mark = mark.to_str().expect("a path");
    daemon.docker(&["restart", "-t", "0", old.short_id()]);
    let new = Container::serving(&daemon, &["-p", "127.0.0.1:8132:80"], 80);
    let run = portwatch(&["kill", "--since", mark, "--yes"]).expect(if uid == 0 { 1 } else { 0 });
    let is_told = run.text().contains("8132/tcp is still there (publishes port 80 of container");
    assert_eq!(is_told, uid == 0, "{}", run.text());
    assert!(new.is_running() && old.is_running());
    let run = portwatch(&["kill", "--since", mark, "--yes", "--stop-container"]).expect(0);
    let (first, name) = (run.text().lines().next().unwrap_or_default().to_owned(), &new.name);
    assert!(first.starts_with(&format!("8132/tcp stopped (container {name}): ")), "{}", run.text());
    assert!(!run.text().contains("8131"), "{}", run.text());
    assert!(!new.is_running() && old.is_running());
    daemon.bind("127.0.0.1:8132").expect("the port is free");
    let run = portwatch(&["kill", "--since", mark, "--yes", "--stop-container", "--fail-on-leak"]).expect(0);
    assert!(run.text().starts_with("nothing was left behind"), "{}", run.text());
    assert!(old.is_running());
}

pub fn trials() -> Vec<Test> {
    let mut tests = vec![
        test("mark::root_ends_the_leaks_of_a_job_exactly", || job(0, false)),
        test("mark::root_ends_the_leaks_of_a_job_exactly [agent]", || job(0, true)),
        test("mark::a_user_ends_the_leaks_of_a_job_exactly", || job(USER, false)),
        test("mark::a_user_ends_the_leaks_of_a_job_exactly [agent]", || job(USER, true)),
        test("mark::a_mark_that_is_not_to_be_trusted_ends_nobody", bad_marks),
        test("mark::the_agent_keeps_marks_for_each_user", names),
        test("mark::the_agent_remembers_out_of_whom_a_leak_came", lineage),
        test("mark::containers_made_since_are_stopped_and_older_ones_stay", || containers(0, false)),
        test("mark::containers_made_since_are_stopped_and_older_ones_stay [agent]", || containers(0, true)),
        test("mark::containers_made_since_are_stopped_and_older_ones_stay [user]", || containers(USER, false)),
        test("mark::containers_made_since_are_stopped_and_older_ones_stay [user, agent]", || containers(USER, true)),
    ];
    tests.extend(selectors::trials());
    tests.extend(recipes::trials());
    tests.extend(reports::trials());
    tests.extend(starters::trials());
    tests.extend(strangers::trials());
    tests
}
