//! The history of listeners: who had a port, when, how it ended, who wanted it meanwhile and who ended it.
//!
//! ```text
//!  Change ─► Recorder ──(bounded queue)──► writer thread ─► Store (SQLite) ◄─ Reader ─► Life ─► render::history
//!            never waits                   batches            WAL            read-only
//! ```
//! This module owns the file, its schema and its threads; it imports the model, the selectors and the clock of the
//! renderers. The [`Recorder`] belongs to whoever owns the table. It never blocks, fails or panics: what it cannot hand
//! over is counted, and what the writer cannot store is told in [`Health`]. After a loss the recorder
//! [asks for a snapshot](Recorder::needs_snapshot), which makes the open lives equal to the table again: start, loss
//! and recovery are the same path.
//!
//! ```text
//!             opened, or in a snapshot                      closed by its holder   Closed
//!   (none) ───────────────────────────► open ──────────────  its holder exited     Exited
//!                                         │                  portwatch's signal    Killed
//!                                         ├── not in a snapshot after a loss       Lost
//!                                         └── gone when the agent is back, after
//!                                              a stop: AgentStopped · a crash: Unknown · a reboot: Reboot
//! ```
//! A listener that is still there when the agent is back (the same boot, cookie or inode) goes on as the same life.
//! While the agent is stopped, its open lives read as `AgentStopped` at that time.
//!
//! **Times** are stored as UTC, because times since boot mean nothing after a reboot; how long something lived is
//! computed on the boot clock, which nobody sets. In what is read back, every time since boot of the model stands for
//! nanoseconds since 1970 instead, which [`clock`] renders.

mod batch;
mod files;
mod health;
mod query;
mod record;
mod recorder;
mod rows;
mod schema;
mod store;
#[cfg(test)]
mod tests;

use std::env;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

pub use self::health::{Health, State};
pub use self::query::{Lives, Reader};
pub use self::record::{Killed, Requester};
pub use self::recorder::Recorder;
use crate::model::{Holder, Listener, Process, Socket};
use crate::render::Clock;
use crate::select::Selector;

/// Nanoseconds since 1970, UTC.
pub type Utc = u64;

/// Where systemd keeps the state of the service.
const STATE_DIRECTORY: &str = "/var/lib/portwatch";

/// The database: in `$PORTWATCH_STATE`, else in `$STATE_DIRECTORY` (its first entry, as systemd sets it), else in
/// `/var/lib/portwatch`.
pub fn path() -> PathBuf {
    let directory = env::var_os("PORTWATCH_STATE").filter(|directory| !directory.is_empty()).map(PathBuf::from);
    let of_systemd = || env::split_paths(&env::var_os("STATE_DIRECTORY")?).find(|path| !path.as_os_str().is_empty());
    directory.or_else(of_systemd).unwrap_or_else(|| STATE_DIRECTORY.into()).join("history.db")
}

/// A clock on which times since boot are nanoseconds since 1970: it renders what was read from the history.
pub fn clock(now: Timestamp, tz: TimeZone) -> Clock {
    Clock { now_boot_ns: utc(now), now_wall: now, tz }
}

/// Times before 1970 are 1970.
fn utc(time: Timestamp) -> Utc {
    u64::try_from(time.as_nanosecond()).unwrap_or(0)
}

/// How much is kept. Lives that are still open are never dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Since it ended.
    pub age: Duration,
    /// Of the database and its log together; less than [`Retention::MIN_BYTES`] counts as that.
    pub bytes: u64,
}

impl Retention {
    /// One batch of the largest records must fit.
    pub const MIN_BYTES: u64 = 1 << 20;
}

impl Default for Retention {
    /// 7 days, 256 MiB.
    fn default() -> Self {
        Retention { age: Duration::from_hours(7 * 24), bytes: 256 << 20 }
    }
}

/// One listener from its opening to its end, as the history knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    pub socket: Socket,
    /// Who called listen or bind; `None` for a ghost. Its start is in [`Utc`], 0 where not known. Long strings are cut.
    pub binder: Option<Process>,
    /// When it opened, or was first seen.
    pub seen: Utc,
    /// When it opened; `None` where it was there already.
    pub opened: Option<Utc>,
    /// `None`: it is open, as far as anybody knows.
    pub end: Option<End>,
    /// Failed binds that it was in the way of, oldest first; the latest [`Life::MAX_NOTES`].
    pub conflicts: Vec<Conflict>,
    /// What portwatch was asked to do about it, oldest first; the latest [`Life::MAX_NOTES`].
    pub kills: Vec<Kill>,
}

/// How and when a life ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    pub how: Ended,
    /// When it closed. Where nobody saw that: for [`Ended::AgentStopped`] when it was last known to be open, else when
    /// it was found to be gone.
    pub at: Utc,
    /// On the boot clock; `None` where opening or end was not seen.
    pub lived: Option<Duration>,
    /// Who closed it, or held it last; `None` where nobody saw the end.
    pub by: Option<Closer>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closer {
    pub pid: u32,
    /// Hostile text.
    pub name: String,
}

/// The ways in which a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// A process closed it, and lived on.
    Closed,
    /// The process that held it ended; or closed it and ended before anybody could look.
    Exited,
    /// portwatch ended the process that held it.
    Killed,
    /// Events were lost, and it was gone when the table was read anew.
    Lost,
    /// Open when the agent was stopped, and gone when it came back, if it did.
    AgentStopped,
    /// Open when the host went down.
    Reboot,
    /// Open when the agent died, and gone when it came back.
    Unknown,
}

impl Ended {
    const ALL: [Ended; 7] =
        [Ended::Closed, Ended::Exited, Ended::Killed, Ended::Lost, Ended::AgentStopped, Ended::Reboot, Ended::Unknown];

    /// As in the database and in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Ended::Closed => "closed",
            Ended::Exited => "exited",
            Ended::Killed => "killed",
            Ended::Lost => "lost",
            Ended::AgentStopped => "agent_stopped",
            Ended::Reboot => "reboot",
            Ended::Unknown => "unknown",
        }
    }

    fn of_word(word: &str) -> Option<Ended> {
        Ended::ALL.into_iter().find(|ended| ended.word() == word)
    }

    /// Whether somebody saw it happen, so that its time is exact.
    pub fn is_observed(self) -> bool {
        matches!(self, Ended::Closed | Ended::Exited | Ended::Killed)
    }
}

/// A process that could not bind, as often as it tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    pub first: Utc,
    pub last: Utc,
    pub times: u64,
    /// Positive errno.
    pub errno: i32,
    /// As [`Life::binder`].
    pub process: Process,
}

/// A request to free the port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kill {
    pub at: Utc,
    pub by: Requester,
    /// The targets as typed: hostile text.
    pub targets: String,
    /// As in `kill --json`: `cleaned`, `denied` …
    pub status: String,
}

/// How long something lived, as exactly as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lived {
    Exactly(Duration),
    AtLeast(Duration),
    AtMost(Duration),
    Unknown,
}

impl Life {
    /// Conflicts, and kills, that are read of one life.
    pub const MAX_NOTES: usize = 100;

    /// The listener with its binder as the only holder, every time in [`Utc`].
    pub fn listener(&self) -> Listener {
        let binder =
            self.binder.clone().map(|process| Holder { process: Arc::new(process), fds: Vec::new(), binder: true });
        Listener { socket: self.socket.clone(), since: self.opened, holders: binder.into_iter().collect() }
    }

    /// Whether the listener that it was is meant. `--older-than` asks how long it lived, at least.
    pub fn matches(&self, selector: &Selector, now: Utc) -> bool {
        let listener = Listener { since: Some(self.seen), ..self.listener() };
        selector.matches(&listener, self.end.as_ref().map_or(now, |end| end.at))
    }

    pub fn lived(&self, now: Utc) -> Lived {
        let since = |at: Utc| Duration::from_nanos(at.saturating_sub(self.seen));
        match (&self.end, self.opened) {
            (None, Some(_)) => Lived::Exactly(since(now)),
            (None, None) => Lived::AtLeast(since(now)),
            (Some(End { lived: Some(lived), .. }), _) => Lived::Exactly(*lived),
            (Some(end), Some(_)) if end.how.is_observed() => Lived::Exactly(since(end.at)),
            (Some(end), _) if end.how == Ended::AgentStopped || end.how.is_observed() => Lived::AtLeast(since(end.at)),
            (Some(end), Some(_)) => Lived::AtMost(since(end.at)),
            (Some(_), None) => Lived::Unknown,
        }
    }
}
