//! How the store is, for `status`; and what a failure of SQLite means.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;
use serde::{Deserialize, Serialize};

/// What can be said of the store at any moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    pub state: State,
    pub path: PathBuf,
    /// Why it is not [`State::Ok`], with the next step; one line.
    pub reason: Option<String>,
    /// What happened to it since the agent started, though it is well now: a damaged file was set aside.
    pub note: Option<String>,
    /// Lives that are stored.
    pub lives: u64,
    /// Of the database and its log.
    pub bytes: u64,
    /// Records that were not stored, for want of room in the queue or of a store.
    pub dropped: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Not opened yet.
    Starting,
    Ok,
    /// The file, or its file system, cannot be written.
    ReadOnly,
    DiskFull,
    /// Damaged, and it could not be moved aside.
    Corrupt,
    /// It cannot be opened, or belongs to something else.
    Unavailable,
}

impl Health {
    pub(super) fn new(path: &Path) -> Health {
        Health {
            state: State::Starting,
            path: path.to_owned(),
            reason: None,
            note: None,
            lives: 0,
            bytes: 0,
            dropped: 0,
        }
    }

    pub fn is_ok(&self) -> bool {
        self.state == State::Ok
    }
}

/// A store that does not do what it should.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) kind: Kind,
    /// One line: operation, object, next step.
    pub(super) reason: String,
}

/// What a failure asks of the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The file is no longer the one of that name: open anew.
    Replaced,
    /// Move the file aside and begin another.
    Damaged,
    /// These very records cannot be stored, and never will.
    Refused,
    /// Try the same again, later.
    ReadOnly,
    DiskFull,
    Unavailable,
}

impl Kind {
    pub(super) fn state(self) -> State {
        match self {
            Kind::ReadOnly => State::ReadOnly,
            Kind::DiskFull => State::DiskFull,
            Kind::Damaged => State::Corrupt,
            Kind::Replaced | Kind::Refused | Kind::Unavailable => State::Unavailable,
        }
    }
}

impl Trouble {
    pub(super) fn new(kind: Kind, path: &Path, verb: &str, why: impl fmt::Display) -> Trouble {
        let next = match kind {
            Kind::Replaced => "opening it anew",
            Kind::Damaged => "setting it aside",
            Kind::Refused => "please report this",
            Kind::ReadOnly => "make it writable",
            Kind::DiskFull => "free some disk space",
            Kind::Unavailable => "recording goes on once it can be opened",
        };
        Trouble { kind, reason: format!("cannot {verb} {}: {why}; {next}", path.display()) }
    }

    pub(super) fn of_io(error: &io::Error, path: &Path, verb: &str) -> Trouble {
        let kind = match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Kind::ReadOnly,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::DiskFull,
            _ => Kind::Unavailable,
        };
        Trouble::new(kind, path, verb, error)
    }

    pub(super) fn of_sqlite(error: &rusqlite::Error, path: &Path, verb: &str) -> Trouble {
        let kind = match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Kind::Damaged,
            Some(ErrorCode::DiskFull) => Kind::DiskFull,
            // What SQLite says where it cannot enlarge the index of its log.
            Some(ErrorCode::SystemIoFailure) if is_full(path) => Kind::DiskFull,
            Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => Kind::ReadOnly,
            Some(
                ErrorCode::ConstraintViolation
                | ErrorCode::TypeMismatch
                | ErrorCode::TooBig
                | ErrorCode::ParameterOutOfRange,
            ) => Kind::Refused,
            // A table that is not there: the schema says that it is, so it was removed.
            Some(ErrorCode::Unknown) => Kind::Damaged,
            Some(_) => Kind::Unavailable,
            // Values that are not of the type that the schema demands.
            None => Kind::Damaged,
        };
        Trouble::new(kind, path, verb, error)
    }
}

fn is_full(path: &Path) -> bool {
    let directory = path.parent().unwrap_or(path);
    rustix::fs::statvfs(directory).is_ok_and(|space| space.f_bavail * space.f_frsize < 64 << 10)
}
