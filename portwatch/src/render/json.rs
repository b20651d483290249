//! The JSON objects that scripts rely on: fields are only ever added.
//!
//! Unknown is `null`, or `[]` for a command line. Times are UTC with milliseconds.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter};

use super::{View, is_hazard};
use crate::cgroup::{self, Unit};
use crate::model::{
    Ancestor, Attempt, BootNs, Change, Holder, Listener as Row, NetnsId, Process as Proc, Protocol, Socket,
};
use crate::waiting::{Look, Spot};

/// A listener with its holders, as `list --json` shows it.
#[derive(Debug, Serialize)]
pub struct Listener<'a> {
    pub proto: Protocol,
    pub mptcp: bool,
    pub family: &'static str,
    pub address: IpAddr,
    pub port: u16,
    pub netns: NetnsId,
    /// `null` where only a failed bind told of the address, as are the other fields that a socket would tell.
    pub inode: Option<u64>,
    pub uid: Option<u32>,
    pub user: Option<String>,
    pub since: Option<String>,
    pub ghost: Option<bool>,
    pub v6only: Option<bool>,
    pub backlog: Option<u32>,
    pub holders: Vec<HolderOf<'a>>,
}

/// A process that holds the listener.
#[derive(Debug, Serialize)]
pub struct HolderOf<'a> {
    #[serde(flatten)]
    pub identity: Identity<'a>,
    pub fds: &'a [u32],
    pub binder: bool,
    #[serde(flatten)]
    pub place: Place<'a>,
    /// Nearest first; in `who --json` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ancestors: Option<&'a [Ancestor]>,
}

/// A process by itself, as `watch --json` shows it.
#[derive(Debug, Serialize)]
pub struct Process<'a> {
    #[serde(flatten)]
    pub identity: Identity<'a>,
    #[serde(flatten)]
    pub place: Place<'a>,
}

#[derive(Debug, Serialize)]
pub struct Identity<'a> {
    pub pid: u32,
    pub name: &'a str,
    pub command: &'a [String],
    pub exe: Option<&'a str>,
    pub cwd: Option<&'a str>,
    pub uid: Option<u32>,
    pub user: Option<String>,
    pub ppid: u32,
    pub started: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct Place<'a> {
    pub unit: Option<&'a str>,
    /// The uid of the user whose systemd runs the unit; `null`: the system's, or no unit.
    pub user_manager: Option<u32>,
    pub container: Option<&'a str>,
}

/// The ancestors of each holder by pid, nearest first.
pub type Ancestors = HashMap<u32, Vec<Ancestor>>;

/// One line of `watch --json`.
#[derive(Debug, Serialize)]
pub struct ChangeOf<'a> {
    pub time: String,
    /// `open`, `close`, `holder`, `conflict` or `resync`.
    pub event: &'static str,
    /// For a conflict: the address that was wanted, with the socket and holders in its way where they are known.
    pub listener: Option<Listener<'a>>,
    pub process: Option<Process<'a>>,
    pub errno: Option<i32>,
    /// Events lost; in `resync` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<u64>,
}

pub fn listener<'a>(row: &'a Row, view: &View<'_>) -> Listener<'a> {
    of_socket(&row.socket, row, view)
}

/// As [`listener`], with the ancestors of each holder.
pub fn listener_with_ancestors<'a>(row: &'a Row, view: &View<'_>, ancestors: &'a Ancestors) -> Listener<'a> {
    let mut listener = listener(row, view);
    for holder in &mut listener.holders {
        holder.ancestors = Some(ancestors.get(&holder.identity.pid).map_or(&[], Vec::as_slice));
    }
    listener
}

pub fn process<'a>(process: &'a Proc, view: &View<'_>) -> Process<'a> {
    Process { identity: identity(process, view), place: place(process) }
}

pub fn change<'a>(change: &'a Change, view: &View<'_>) -> ChangeOf<'a> {
    let line = |at: BootNs, event, row: Option<Listener<'a>>, by: Option<&'a Proc>| ChangeOf {
        time: view.clock.utc(at),
        event,
        listener: row,
        process: by.map(|by| process(by, view)),
        errno: None,
        lost: None,
    };
    let binder = |row: &'a Row| row.binder().map(|holder| &*holder.process);
    match change {
        Change::Opened { at, listener: row } => line(*at, "open", Some(listener(row, view)), binder(row)),
        Change::Closed { at, listener: row, by } => {
            line(*at, "close", Some(listener(row, view)), by.as_deref().or_else(|| binder(row)))
        }
        Change::Holders { at, listener: row } => line(*at, "holder", Some(listener(row, view)), binder(row)),
        Change::Conflict { at, attempt, held_by } => ChangeOf {
            errno: Some(attempt.errno),
            ..line(*at, "conflict", Some(attempted(attempt, held_by.as_ref(), view)), Some(&*attempt.by))
        },
        Change::Resync { at, lost } => ChangeOf { lost: Some(*lost), ..line(*at, "resync", None, None) },
    }
}

/// `wait --json`.
#[derive(Debug, Serialize)]
pub struct Waited<'a> {
    pub satisfied: bool,
    pub elapsed_ms: u64,
    pub targets: Vec<WaitedFor<'a>>,
}

/// One port that was waited for.
#[derive(Debug, Serialize)]
pub struct WaitedFor<'a> {
    pub port: u16,
    /// `null` where either was meant, and neither is there.
    pub proto: Option<Protocol>,
    /// The address that the target names, if any.
    pub address: Option<IpAddr>,
    pub bound: bool,
    /// Not bound, and yet not to be bound: connections, or a socket that does not listen.
    pub lingering: bool,
    /// Each process once, whichever of several sockets it holds.
    pub holders: Vec<HolderOf<'a>>,
}

pub fn waited<'a>(look: &Look<'a>, elapsed: Duration, view: &View<'_>) -> Waited<'a> {
    let target = |spot: Spot<'a>| {
        let mut holders: Vec<HolderOf<'a>> = Vec::new();
        for held in spot.listeners.iter().flat_map(|row| &row.holders) {
            if holders.iter().all(|known| known.identity.pid != held.process.id.pid) {
                holders.push(holder(held, view));
            }
        }
        WaitedFor {
            port: spot.port,
            proto: spot.proto,
            address: spot.address,
            bound: !spot.listeners.is_empty(),
            lingering: spot.is_lingering,
            holders,
        }
    };
    Waited {
        satisfied: look.is_true(),
        elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        targets: look.spots().into_iter().map(target).collect(),
    }
}

fn of_socket<'a>(socket: &Socket, row: &'a Row, view: &View<'_>) -> Listener<'a> {
    Listener {
        proto: socket.proto,
        mptcp: socket.mptcp,
        family: family(socket.address),
        address: socket.address,
        port: socket.port,
        netns: socket.netns,
        inode: Some(socket.id.inode).filter(|inode| *inode != 0),
        uid: Some(socket.uid),
        user: (view.users)(socket.uid),
        since: row.since.map(|since| view.clock.utc(since)),
        ghost: Some(row.is_ghost()),
        v6only: socket.v6only,
        backlog: socket.backlog,
        holders: row.holders.iter().map(|held| holder(held, view)).collect(),
    }
}

fn attempted<'a>(attempt: &Attempt, held_by: Option<&'a Row>, view: &View<'_>) -> Listener<'a> {
    let held = held_by.map(|row| of_socket(&row.socket, row, view));
    let empty = Listener {
        proto: attempt.proto,
        mptcp: false,
        family: family(attempt.address),
        address: attempt.address,
        port: attempt.port,
        netns: attempt.netns,
        inode: None,
        uid: None,
        user: None,
        since: None,
        ghost: None,
        v6only: None,
        backlog: None,
        holders: Vec::new(),
    };
    match held {
        Some(held) => {
            Listener { family: empty.family, address: empty.address, port: empty.port, netns: empty.netns, ..held }
        }
        None => empty,
    }
}

fn holder<'a>(holder: &'a Holder, view: &View<'_>) -> HolderOf<'a> {
    HolderOf {
        identity: identity(&holder.process, view),
        fds: &holder.fds,
        binder: holder.binder,
        place: place(&holder.process),
        ancestors: None,
    }
}

fn identity<'a>(process: &'a Proc, view: &View<'_>) -> Identity<'a> {
    Identity {
        pid: process.id.pid,
        name: &process.name,
        command: &process.command,
        exe: process.exe.as_deref(),
        cwd: process.cwd.as_deref(),
        uid: process.uid,
        user: process.uid.and_then(|uid| (view.users)(uid)),
        ppid: process.ppid,
        started: Some(process.id.start).filter(|start| *start != 0).map(|start| view.clock.utc(start)),
    }
}

fn place(process: &Proc) -> Place<'_> {
    let unit = process.cgroup.as_deref().and_then(Unit::of);
    Place {
        unit: unit.map(|unit| unit.name),
        user_manager: unit.and_then(|unit| unit.manager.uid()),
        container: process.cgroup.as_deref().and_then(cgroup::container),
    }
}

pub(super) fn family(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "ipv4",
        IpAddr::V6(_) => "ipv6",
    }
}

/// The value on one line, without a line end. JSON allows characters in strings that a terminal obeys (DEL, C1, the
/// bidirectional controls): they are written as `\uXXXX`.
pub fn line(value: &impl Serialize) -> String {
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, Visible);
    match value.serialize(&mut serializer) {
        // Serializing fails for maps with keys that are no strings and for failing writers: neither exists here.
        Ok(()) => String::from_utf8_lossy(&out).into_owned(),
        Err(error) => serde_json::json!({ "error": error.to_string() }).to_string(),
    }
}

/// An array with one value a line, with a line end.
pub fn array<T: Serialize>(values: &[T]) -> String {
    if values.is_empty() {
        return "[]\n".to_owned();
    }
    let lines: Vec<String> = values.iter().map(line).collect();
    format!("[\n{}\n]\n", lines.join(",\n"))
}

struct Visible;

impl Formatter for Visible {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !fragment.contains(is_hazard) {
            return CompactFormatter.write_string_fragment(writer, fragment);
        }
        for c in fragment.chars() {
            if is_hazard(c) {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            } else {
                writer.write_all(c.encode_utf8(&mut [0; 4]).as_bytes())?;
            }
        }
        Ok(())
    }
}
