//! Where `portwatch run` is tried: a place for its state, who runs it, and what is left afterwards.
//!
//! The test process is a subreaper, so whatever portwatch would leave behind becomes its child: that there is none is
//! known from the kernel, and not from a search.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};

use super::actor;
use crate::puppet::{Puppet, Stage, wait_readable};
use crate::subject::{Run, binary, command, finish, outputs, pidfd, plain_command};

/// An ordinary user on every machine, by number.
pub const NOBODY: u32 = 65534;

pub struct Scene {
    pub stage: Stage,
    /// Who runs it; `None`: who runs the tests.
    user: Option<u32>,
    /// The copy that this user can run.
    binary: PathBuf,
    /// This program.
    actor: PathBuf,
    /// Children that are not portwatch's: those that were there before, and bystanders.
    others: RefCell<BTreeSet<u32>>,
}

impl Scene {
    pub fn new() -> Scene {
        Scene::of(None)
    }

    pub fn of(user: Option<u32>) -> Scene {
        let stage = Stage::new();
        let own = std::env::current_exe().expect("the path of this program");
        let (mut binary, mut actor) = (binary(), own.clone());
        fs::create_dir(stage.path("runtime")).expect("mkdir");
        if user.is_some() {
            // Where they are, only root may be allowed to look.
            for (from, to, name) in [(binary.clone(), &mut binary, "portwatch"), (own, &mut actor, "actor")] {
                *to = stage.path(name);
                if fs::hard_link(&from, &*to).is_err() {
                    fs::copy(&from, &*to).expect("copying a program");
                }
            }
            std::os::unix::fs::chown(stage.path("runtime"), user, user).expect("chown");
        }
        Scene { stage, user, binary, actor, others: RefCell::new(children()) }
    }

    /// As root and, where the tests are root's, as an ordinary user.
    pub fn users() -> Vec<Option<u32>> {
        if rustix::process::geteuid().is_root() { vec![None, Some(NOBODY)] } else { vec![None] }
    }

    /// A server of somebody else, who is to survive.
    pub fn bystander(&self) -> Puppet {
        let puppet = self.stage.puppet();
        self.others.borrow_mut().insert(puppet.pid);
        puppet
    }

    /// A child that portwatch left, or that is on its way.
    pub fn child(&self) -> Option<Pid> {
        let found = children().difference(&self.others.borrow()).next().copied()?;
        Pid::from_raw(found as i32)
    }

    /// portwatch with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = match self.user {
            None => command(arguments),
            Some(user) => {
                let mut command = plain_command(&self.binary, arguments);
                command.uid(user).gid(user).current_dir("/");
                command
            }
        };
        command.env("XDG_RUNTIME_DIR", self.stage.path("runtime")).env(actor::VARIABLE, "1");
        command
    }

    pub fn portwatch(&self, arguments: &[&str]) -> Run {
        finish(self.command(arguments).spawn().expect("portwatch"))
    }

    /// `run ARGUMENTS -- ACTOR WORDS`.
    pub fn run_command(&self, arguments: &[&str], words: &[&str]) -> Command {
        let actor = self.actor.to_str().expect("a path of UTF-8");
        self.command(&[&["run"], arguments, &["--", actor], words].concat())
    }

    pub fn run(&self, arguments: &[&str], words: &[&str]) -> Run {
        finish(self.run_command(arguments, words).spawn().expect("portwatch"))
    }

    /// The actor alone.
    pub fn act(&self, words: &[&str]) -> Run {
        finish(plain_command(&self.actor, words).env(actor::VARIABLE, "1").spawn().expect("an actor"))
    }

    /// Starts it in a process group of its own; returns once it says that it is ready.
    pub fn start(&self, arguments: &[&str], words: &[&str]) -> Running {
        Scene::start_command(&mut self.run_command(arguments, words))
    }

    /// The same of a command that becomes portwatch.
    pub fn start_command(command: &mut Command) -> Running {
        let mut child = command.process_group(0).spawn().expect("portwatch");
        let mut errors = BufReader::new(child.stderr.take().expect("piped"));
        let mut said = String::new();
        while !said.contains("ready: ") {
            let length = errors.read_line(&mut said).expect("reading stderr");
            assert!(length > 0, "it ended before it was ready: {said}");
        }
        Running { child, errors, said }
    }

    /// A port that nobody has at this moment.
    pub fn port(&self) -> u16 {
        TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
    }

    /// Waits until nothing is left of what was started, and the port can be bound.
    #[track_caller]
    pub fn expect_nothing_left(&self, port: u16) {
        loop {
            reap(&self.others.borrow());
            let Some(pid) = self.child() else { break };
            let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
            let who = fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
            assert!(wait_readable(&pidfd), "left behind: {who:?}");
        }
        // A bind could fail for a client of somebody else's: the kernel gives these ports to all.
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            let listens = fs::read_to_string(table).is_ok_and(|table| {
                table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
                    fields.get(1).is_some_and(|address| address.ends_with(&format!(":{port:04X}"))) && fields[3] == "0A"
                })
            });
            assert!(!listens, "somebody listens on {port}");
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // Of a test that failed. Children that were not there before come of what it started.
        while let Some(pid) = self.child() {
            if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) {
                let _ = pidfd_send_signal(&pidfd, Signal::KILL);
                wait_readable(&pidfd);
            }
            reap(&self.others.borrow());
        }
    }
}

/// The children of this process, zombies included.
pub fn children() -> BTreeSet<u32> {
    let tasks = fs::read_dir("/proc/self/task").expect("tasks").flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()).collect()
}

fn reap(others: &BTreeSet<u32>) {
    for pid in children().difference(others).filter_map(|&pid| Pid::from_raw(pid as i32)) {
        let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }
}

/// A run in the foreground.
pub struct Running {
    pub child: Child,
    errors: BufReader<ChildStderr>,
    pub said: String,
}

impl Running {
    pub fn signal(&self, signal: Signal) {
        pidfd_send_signal(pidfd(&self.child), signal).expect("pidfd_send_signal");
    }

    /// The process that ends it all where the watcher is killed: the child of the front.
    pub fn keeper(&self) -> u32 {
        only_child(self.child.id())
    }

    /// The process that supervises.
    pub fn watcher(&self) -> u32 {
        only_child(self.keeper())
    }

    /// The command itself.
    pub fn command(&self) -> u32 {
        let watcher = self.watcher();
        let children = fs::read_to_string(format!("/proc/{watcher}/task/{watcher}/children")).expect("children");
        children.split_whitespace().next().expect("a command").parse().expect("a pid")
    }

    pub fn finish(mut self) -> Run {
        let outputs = outputs(&mut self.child);
        let ended = wait_readable(pidfd(&self.child));
        if !ended {
            self.child.kill().expect("kill");
        }
        let status = self.child.wait().expect("wait");
        self.errors.read_to_string(&mut self.said).expect("reading stderr");
        let (stdout, _) = outputs.join();
        assert!(ended, "portwatch hangs: {}", self.said);
        Run { code: status.code(), stdout, stderr: self.said.into_bytes() }
    }
}

pub fn only_child(pid: u32) -> u32 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("tasks").flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let found: Vec<u32> =
        lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    assert_eq!(found.len(), 1, "children of {pid}");
    found[0]
}

pub fn kill(pid: u32) {
    let pid = Pid::from_raw(pid as i32).expect("a pid");
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd_open");
    pidfd_send_signal(pidfd, Signal::KILL).expect("kill");
}

/// What a command in a terminal or a script would have.
pub fn with_input(mut command: Command, input: &str) -> Run {
    use std::io::Write;
    let mut child = command.stdin(Stdio::piped()).spawn().expect("portwatch");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("typing");
    finish(child)
}
