//! Real databases in temporary directories, written by the real thread.

mod failures;
mod limits;
mod lives;
mod questions;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use tempfile::TempDir;

use super::record::Wall;
use super::store::{Boot, Session};
use super::*;
use crate::model::{BootNs, Change, ProcessId, Protocol, SocketId};
use crate::select::{Filters, parse_targets};
use crate::source::stat;

const SECOND: u64 = 1_000_000_000;

/// A state directory, and the clocks of a host that booted at [`Lab::booted`].
struct Lab {
    directory: TempDir,
    booted: Timestamp,
    retention: Retention,
}

impl Lab {
    fn new() -> Lab {
        let booted = Timestamp::now() - SignedDuration::from_secs(3600);
        Lab { directory: tempfile::tempdir().unwrap(), booted, retention: Retention::default() }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("history.db")
    }

    /// When it has been up for so long.
    fn clock(&self, at: BootNs) -> Clock {
        let now_wall = self.booted + SignedDuration::from_nanos(at.cast_signed());
        Clock { now_boot_ns: at, now_wall, tz: TimeZone::UTC }
    }

    fn utc(&self, at: BootNs) -> Utc {
        Wall::of(&self.clock(at)).utc(at)
    }

    fn session(&self, boot: &str, begun: BootNs) -> Session {
        Session { boot: Boot { id: boot.to_owned(), at: self.utc(0) }, begun: self.utc(begun) }
    }

    /// The agent starts, of this boot of this very host.
    fn begin(&self, at: BootNs) -> Run<'_> {
        let boot = Boot::current(Wall::of(&self.clock(0)));
        Run { lab: self, recorder: Recorder::begin(&self.path(), self.retention, self.session(&boot.id, at)) }
    }

    /// The agent starts after another boot.
    fn begin_after_boot(&self, boot: &str, at: BootNs) -> Run<'_> {
        Run { lab: self, recorder: Recorder::begin(&self.path(), self.retention, self.session(boot, at)) }
    }

    fn reader(&self, at: BootNs) -> Reader {
        Reader::open(&self.path(), &self.clock(at)).unwrap()
    }

    /// All of it, as told at `at`.
    fn lives(&self, at: BootNs) -> Vec<Life> {
        let Lives { lives, more } = self.reader(at).lives(&everything(), 0, self.utc(at), usize::MAX).unwrap();
        assert!(!more);
        lives
    }

    /// All of it, a line each.
    fn story(&self, at: BootNs) -> String {
        self.lives(at).iter().map(|life| self.line(life, at) + "\n").collect()
    }

    fn line(&self, life: &Life, now: BootNs) -> String {
        let boot = |at: Utc| (at.cast_signed() - self.utc(0).cast_signed()) / SECOND.cast_signed();
        let binder = life.binder.as_ref().map_or_else(|| "ghost".to_owned(), |binder| binder.name.clone());
        let opened =
            life.opened.map_or_else(|| format!("seen {}", boot(life.seen)), |at| format!("opened {}", boot(at)));
        let lived = match life.lived(self.utc(now)) {
            Lived::Exactly(lived) => format!("{}s", lived.as_secs()),
            Lived::AtLeast(lived) => format!(">{}s", lived.as_secs()),
            Lived::AtMost(lived) => format!("<{}s", lived.as_secs()),
            Lived::Unknown => "?".to_owned(),
        };
        let end = match &life.end {
            None => "open".to_owned(),
            Some(end) => {
                let by = end.by.as_ref().map(|by| format!(" by {}", by.name)).unwrap_or_default();
                format!("{} {}{by}", end.how.word(), boot(end.at))
            }
        };
        let conflicts: Vec<String> = life
            .conflicts
            .iter()
            .map(|c| format!("; {} wanted it {}x from {} to {}", c.process.name, c.times, boot(c.first), boot(c.last)))
            .collect();
        let kills: Vec<String> =
            life.kills.iter().map(|k| format!("; {} asked at {}: {}", k.by.name, boot(k.at), k.status)).collect();
        format!("{} {binder} {opened}, {end}, {lived}{}{}", life.socket.port, conflicts.concat(), kills.concat())
    }
}

/// A run of the agent.
struct Run<'a> {
    lab: &'a Lab,
    recorder: Recorder,
}

impl Run<'_> {
    fn change(&mut self, change: &Change) -> &mut Self {
        let at = match change {
            Change::Opened { at, .. }
            | Change::Closed { at, .. }
            | Change::Holders { at, .. }
            | Change::Conflict { at, .. }
            | Change::Resync { at, .. } => *at,
        };
        self.recorder.change(change, &self.lab.clock(at));
        self
    }

    fn opened(&mut self, listener: &Listener) -> &mut Self {
        self.change(&Change::Opened { at: listener.since.unwrap(), listener: listener.clone() })
    }

    fn closed(&mut self, at: BootNs, listener: &Listener) -> &mut Self {
        let by = listener.binder().map(|holder| Arc::clone(&holder.process));
        self.change(&Change::Closed { at, listener: listener.clone(), by })
    }

    fn snapshot(&mut self, at: BootNs, listeners: &[Listener]) -> &mut Self {
        self.recorder.snapshot(listeners, &self.lab.clock(at));
        self
    }

    /// Writes what there is.
    fn flush(&mut self) -> Health {
        self.recorder.flush();
        self.recorder.health()
    }

    /// Writes what there is, and asserts that it could.
    #[track_caller]
    fn is_ok(&mut self) -> Health {
        let health = self.flush();
        assert!(health.is_ok(), "{health:?}");
        health
    }

    fn stop(self, at: BootNs) {
        assert!(self.recorder.stop(&self.lab.clock(at), Duration::from_secs(30)));
    }

    /// The agent is gone without a word.
    fn crash(mut self) {
        self.flush();
        assert!(self.recorder.end(Duration::from_secs(30)));
    }
}

fn everything() -> Selector {
    Selector::new(Vec::new(), Filters::default())
}

fn on(targets: &[&str]) -> Selector {
    Selector::new(parse_targets(targets, &crate::select::builtin_sets()).unwrap(), Filters::default())
}

/// A process that is there: this one.
fn alive(name: &str) -> Arc<Process> {
    let id = stat::read(std::process::id()).unwrap().id();
    Arc::new(Process { uid: Some(1000), command: [name.to_owned()].into(), ..Process::bare(id, name) })
}

/// A process that is gone.
fn gone(pid: u32, name: &str) -> Arc<Process> {
    assert!(pid < 300);
    let id = ProcessId { pid: (1 << 22) + pid, start: 7 };
    Arc::new(Process { uid: Some(1000), command: [name.to_owned()].into(), ..Process::bare(id, name) })
}

/// On 127.0.0.1, its socket numbered as its port.
fn listener(port: u16, since: Option<BootNs>, binder: Arc<Process>) -> Listener {
    let socket = Socket {
        id: SocketId { inode: u64::from(port), cookie: u64::from(port) << 20 },
        backlog: Some(5),
        ..Socket::example("127.0.0.1", port)
    };
    Listener { socket, since, holders: vec![Holder { process: binder, fds: Vec::new(), binder: true }] }
}

#[track_caller]
fn check(got: &str, want: &str) {
    assert_eq!(got, want, "\n--- got:\n{got}\n--- want:\n{want}");
}
