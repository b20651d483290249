//! What a clean-up tells programs: one JSON object.

use jiff::Timestamp;
use portwatch::kill::{Cleaned, Directories, Ended, Leak, Restarter};
use portwatch::model::{Ancestor, NetnsId, Protocol, Socket};
use portwatch::render::json;
use serde::Serialize;

use crate::commands::Users;

/// Additions do not break anybody.
#[derive(Debug, Serialize)]
struct Report<'a> {
    time: String,
    /// As it was given.
    since: &'a str,
    /// Whether nothing is left of what appeared since.
    clean: bool,
    leaks: Vec<Row<'a>>,
    /// What may start them again and is part of the same job, so that it was to be ended with them.
    starters: Vec<StarterRow<'a>>,
    /// Those of other users of which nobody told whether they appeared since.
    unknown: Vec<Unknown>,
    #[serde(flatten)]
    directories: Directories,
}

#[derive(Debug, Serialize)]
struct StarterRow<'a> {
    pid: u32,
    name: &'a str,
    command: &'a [String],
    cwd: Option<&'a str>,
    uid: Option<u32>,
    user: Option<String>,
    /// What came from it.
    ports: Vec<PortRow>,
    ended: Ended,
    /// Why it is still there, and how to end it.
    note: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct PortRow {
    port: u16,
    proto: Protocol,
}

#[derive(Debug, Serialize)]
struct Unknown {
    port: u16,
    proto: Protocol,
    address: String,
    netns: NetnsId,
    /// Of the socket.
    uid: u32,
    user: Option<String>,
}

#[derive(Debug, Serialize)]
struct Row<'a> {
    port: u16,
    proto: Protocol,
    address: String,
    netns: NetnsId,
    pid: Option<u32>,
    name: Option<&'a str>,
    command: &'a [String],
    cwd: Option<&'a str>,
    uid: Option<u32>,
    user: Option<String>,
    lived_ms: Option<u64>,
    ended: Ended,
    /// What was stopped, or why it is still there.
    note: Option<&'a str>,
    ancestors: &'a [Ancestor],
}

pub(super) fn report(since: &str, cleaned: &Cleaned) -> String {
    let users = Users::default();
    let row = |leak| row(leak, &users);
    let unknown = |socket: &Socket| Unknown {
        port: socket.port,
        proto: socket.proto,
        address: socket.address.to_string(),
        netns: socket.netns,
        uid: socket.uid,
        user: users.name(socket.uid),
    };
    let report = Report {
        time: Timestamp::now().to_string(),
        since,
        clean: cleaned.is_clean(),
        leaks: cleaned.leaks.iter().map(row).collect(),
        starters: cleaned.restarters.iter().map(|it| starter_row(it, &users)).collect(),
        unknown: cleaned.hidden.iter().map(unknown).collect(),
        directories: Directories::of(&cleaned.outcomes),
    };
    json::line(&report) + "\n"
}

fn row<'a>(leak: &'a Leak, users: &Users) -> Row<'a> {
    let process = leak.process.as_deref();
    let uid = process.and_then(|process| process.uid);
    Row {
        port: leak.socket.port,
        proto: leak.socket.proto,
        address: leak.socket.address.to_string(),
        netns: leak.socket.netns,
        pid: process.map(|process| process.id.pid),
        name: process.map(|process| process.name.as_str()),
        command: process.map(|process| &process.command[..]).unwrap_or_default(),
        cwd: process.and_then(|process| process.cwd.as_deref()),
        uid,
        user: uid.and_then(|uid| users.name(uid)),
        lived_ms: leak.lived.map(|lived| u64::try_from(lived.as_millis()).unwrap_or(u64::MAX)),
        ended: leak.ended,
        note: leak.note.as_deref(),
        ancestors: &leak.ancestors,
    }
}

fn starter_row<'a>(Restarter { process, ports, ended, note }: &'a Restarter, users: &Users) -> StarterRow<'a> {
    StarterRow {
        pid: process.id.pid,
        name: &process.name,
        command: &process.command,
        cwd: process.cwd.as_deref(),
        uid: process.uid,
        user: process.uid.and_then(|uid| users.name(uid)),
        ports: ports.iter().map(|&(port, proto)| PortRow { port, proto }).collect(),
        ended: *ended,
        note: note.as_deref(),
    }
}
