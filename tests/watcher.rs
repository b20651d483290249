//! A running `watch`: its lines as they come, and the table that they add up to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::oracle::{self, Row};
use crate::puppet::{PATIENCE, Puppet, Stage, wait_readable};
use crate::subject::{command, pidfd, row};

pub struct Watch {
    child: Child,
    pidfd: OwnedFd,
    lines: Receiver<String>,
    errors: Receiver<String>,
    /// What it said on stderr so far.
    pub said: Vec<String>,
    /// Listeners by inode, as the lines tell.
    state: BTreeMap<u64, Row>,
    /// Records lost, as the lines tell.
    pub lost: u64,
    recent: VecDeque<String>,
}

fn lines_of(source: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut source = BufReader::new(source);
        let mut bytes = Vec::new();
        while source.read_until(b'\n', &mut bytes).is_ok_and(|len| len > 0) {
            let line = String::from_utf8_lossy(&bytes).into_owned();
            bytes.clear();
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

impl Watch {
    /// Starts watching everything by `probe`; returns once it says that it watches.
    pub fn start(probe: &str) -> Self {
        let mut watch = Self::spawn(command(&["--probe", probe, "watch", "--json", "--netns", "all"]));
        watch.wait_until_ready(probe);
        watch
    }

    /// As [`Watch::start`], without waiting.
    pub fn spawn(mut command: std::process::Command) -> Self {
        let mut child = command.spawn().expect("cannot run portwatch");
        let lines = lines_of(child.stdout.take().expect("piped"));
        let errors = lines_of(child.stderr.take().expect("piped"));
        Watch {
            pidfd: pidfd(&child),
            child,
            lines,
            errors,
            said: Vec::new(),
            state: BTreeMap::new(),
            lost: 0,
            recent: VecDeque::new(),
        }
    }

    /// Waits for `portwatch: watching (PROBE)…` on stderr.
    pub fn wait_until_ready(&mut self, probe: &str) {
        let ready = format!("watching ({probe})");
        while !self.said.last().is_some_and(|line| line.contains(&ready)) {
            match self.errors.recv_timeout(PATIENCE) {
                Ok(line) => self.said.push(line),
                Err(_) => panic!("watch does not get ready: {:?}", self.said),
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line as it is, if it comes in time.
    pub fn line_within(&mut self, limit: Duration) -> Option<String> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                self.said.extend(self.errors.iter());
                panic!("watch ended: {:?}", self.said)
            }
        }
    }

    pub fn line(&mut self, wanted: &str) -> String {
        self.line_within(PATIENCE).unwrap_or_else(|| {
            let recent: String = self.recent.iter().map(String::as_str).collect();
            panic!("nothing shows {wanted}; state: {:#?}; the last lines:\n{recent}", self.state)
        })
    }

    /// The next event, applied to the state.
    pub fn next(&mut self, wanted: &str) -> Value {
        let line = self.line(wanted);
        self.take(line)
    }

    fn take(&mut self, line: String) -> Value {
        let event: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        if self.recent.len() == 12 {
            self.recent.pop_front();
        }
        self.recent.push_back(line);
        self.apply(&event);
        event
    }

    /// Lets it finish what it does until all its threads sleep, so that only the next event can wake it: what it is
    /// still about to read anew would otherwise hide that it missed an event.
    pub fn settle(&mut self) {
        loop {
            let before = self.switches();
            while let Some(line) = self.line_within(Duration::from_millis(50)) {
                self.take(line);
            }
            if self.switches() == before {
                return;
            }
        }
    }

    fn apply(&mut self, event: &Value) {
        match event["event"].as_str() {
            Some("open" | "holder") => {
                let row = row(&event["listener"]);
                self.state.insert(row.inode, row);
            }
            Some("close") => {
                self.state.remove(&row(&event["listener"]).inode);
            }
            Some("resync") => {
                self.lost += event["lost"].as_u64().unwrap_or_else(|| panic!("how many were lost? {event}"));
            }
            Some("conflict") => {}
            _ => panic!("no such event: {event}"),
        }
    }

    /// Goes on to the first event that is wanted.
    pub fn until(&mut self, wanted: &str, accept: impl Fn(&Value) -> bool) -> Value {
        loop {
            let event = self.next(wanted);
            if accept(&event) {
                return event;
            }
        }
    }

    /// Goes on to the event of `kind` about the socket.
    pub fn until_event(&mut self, kind: &str, inode: u64) -> Value {
        self.until(&format!("{kind} of inode {inode}"), |event| {
            event["event"] == kind && event["listener"]["inode"] == inode
        })
    }

    /// What the lines add up to, as far as puppets are concerned. Descriptors are not told by events.
    pub fn rows(&self, stage: &Stage) -> BTreeSet<Row> {
        self.state.values().filter(|row| stage.knows(row.inode)).cloned().map(without_fds).collect()
    }

    /// Goes on until the lines add up to the truth.
    pub fn until_true(&mut self, step: &str, stage: &Stage, puppets: &[&Puppet]) {
        let truth: BTreeSet<Row> = oracle::truth(stage, puppets).into_iter().map(without_fds).collect();
        while self.rows(stage) != truth {
            self.next(&format!("the truth after {step}: {truth:#?}"));
        }
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::pidfd_send_signal(&self.pidfd, signal).expect("watch is gone");
    }

    /// Voluntary context switches so far, by thread.
    pub fn switches(&self) -> BTreeMap<u32, u64> {
        switches_of(self.pid())
    }

    /// Ends it as Ctrl-C does; the exit code.
    pub fn interrupt(mut self) -> Option<i32> {
        self.signal(Signal::INT);
        assert!(wait_readable(&self.pidfd), "watch does not end at SIGINT");
        self.child.wait().expect("wait").code()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Its own child, not yet reaped unless `interrupt` did, which std remembers.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Voluntary context switches of a process so far, by thread.
pub fn switches_of(pid: u32) -> BTreeMap<u32, u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    let count = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let tid = task.file_name().to_str().and_then(|tid| tid.parse().ok()).expect("a thread id");
        (tid, line.and_then(|count| count.trim().parse().ok()).expect("a count"))
    };
    tasks.map(|task| count(task.expect("a thread"))).collect()
}

fn without_fds(row: Row) -> Row {
    Row { holders: row.holders.into_keys().map(|pid| (pid, BTreeSet::new())).collect(), ..row }
}
