//! Between the columns of the schema and the model. One list of columns each, so that what is written and what is read
//! cannot differ.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::types::{FromSql, Type};
use rusqlite::{Row, ToSql};

use super::record::{self, Wall};
use super::{Closer, Conflict, End, Ended, Life, Utc};
use crate::model::{Attempt, Process, ProcessId, Protocol, Socket, SocketId};

pub(super) const SOCKET: &str = "proto, mptcp, address, port, v6only, netns, inode, cookie, uid, backlog";
pub(super) const PROCESS: &str = "pid, ppid, euid, started, name, command, exe, cwd, cgroup, start";

/// A value for one column.
pub(super) type Cell = Box<dyn ToSql>;

fn cell(value: impl ToSql + 'static) -> Cell {
    Box::new(value)
}

/// For the columns [`SOCKET`].
pub(super) fn socket_cells(socket: &Socket) -> Vec<Cell> {
    vec![
        cell(word(socket.proto)),
        cell(socket.mptcp),
        cell(socket.address.to_string()),
        cell(socket.port),
        cell(socket.v6only),
        cell(socket.netns),
        cell(socket.id.inode.cast_signed()),
        cell(socket.id.cookie.cast_signed()),
        cell(socket.uid),
        cell(socket.backlog),
    ]
}

/// For the columns [`PROCESS`], its strings bounded.
pub(super) fn process_cells(process: Option<&Process>, wall: Wall) -> Vec<Cell> {
    let Some(process) = process else { return (0..10).map(|_| cell(None::<i64>)).collect() };
    let text = |text: &Option<String>| text.as_deref().map(|text| record::path(text).into_owned());
    // 0: gone before it could be read.
    let start = Some(process.id.start).filter(|start| *start != 0);
    vec![
        cell(process.id.pid),
        cell(process.ppid),
        cell(process.uid),
        cell(start.map(|start| wall.utc(start).cast_signed())),
        cell(record::name(&process.name).into_owned()),
        cell(record::command(&process.command)),
        cell(text(&process.exe)),
        cell(text(&process.cwd)),
        cell(text(&process.cgroup)),
        cell(start.map(u64::cast_signed)),
    ]
}

pub(super) fn word(proto: Protocol) -> &'static str {
    match proto {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

/// What [`life`] reads.
pub(super) fn life_columns() -> String {
    format!("id, {SOCKET}, {PROCESS}, seen, opened, ended, until, lived, closer, closer_name")
}

/// What [`conflict`] reads.
pub(super) fn conflict_columns() -> String {
    format!("{PROCESS}, errno, first, last, times, life, proto, address, port, netns")
}

/// The columns of a row, one after the other: to look each up by its name takes longer than to read it.
struct Columns<'a, 'row> {
    row: &'a Row<'row>,
    next: usize,
}

impl<'a, 'row> Columns<'a, 'row> {
    fn of(row: &'a Row<'row>) -> Self {
        Columns { row, next: 0 }
    }

    fn get<T: FromSql>(&mut self) -> rusqlite::Result<T> {
        self.next += 1;
        self.row.get(self.next - 1)
    }

    fn number(&mut self) -> rusqlite::Result<Option<u64>> {
        Ok(self.get::<Option<i64>>()?.map(i64::cast_unsigned))
    }

    fn time(&mut self) -> rusqlite::Result<Utc> {
        self.get::<i64>().map(i64::cast_unsigned)
    }

    /// A text that says something to us.
    fn read<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> rusqlite::Result<Option<T>> {
        let Some(text) = self.get::<Option<String>>()? else { return Ok(None) };
        let bad = || format!("'{}' means nothing", text.escape_debug());
        let bad = || rusqlite::Error::FromSqlConversionFailure(self.next - 1, Type::Text, bad().into());
        parse(&text).map(Some).ok_or_else(bad)
    }

    fn need<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> rusqlite::Result<T> {
        let column = self.next;
        self.read(parse)?.ok_or(rusqlite::Error::InvalidColumnType(column, String::new(), Type::Null))
    }

    fn proto(&mut self) -> rusqlite::Result<Protocol> {
        self.need(|text| [Protocol::Tcp, Protocol::Udp].into_iter().find(|&proto| word(proto) == text))
    }

    fn address(&mut self) -> rusqlite::Result<IpAddr> {
        self.need(|text| text.parse().ok())
    }

    /// [`SOCKET`]
    fn socket(&mut self) -> rusqlite::Result<Socket> {
        let (proto, mptcp, address, port) = (self.proto()?, self.get()?, self.address()?, self.get()?);
        let (v6only, netns) = (self.get()?, self.get()?);
        let (inode, cookie) = (self.number()?.unwrap_or_default(), self.number()?.unwrap_or_default());
        let (uid, backlog) = (self.get()?, self.get()?);
        Ok(Socket { id: SocketId { inode, cookie }, proto, mptcp, address, port, v6only, netns, uid, backlog })
    }

    /// [`PROCESS`], its start in [`Utc`].
    fn process(&mut self) -> rusqlite::Result<Option<Process>> {
        let pid: Option<u32> = self.get()?;
        let (ppid, uid) = (self.get::<Option<u32>>()?.unwrap_or_default(), self.get()?);
        let start = self.number()?.unwrap_or(0);
        let name = self.get::<Option<String>>()?.unwrap_or_default();
        let command = self.read(|json| serde_json::from_str(json).ok())?.unwrap_or_default();
        let (exe, cwd, cgroup) = (self.get()?, self.get()?, self.get()?);
        // Its start since boot, which says nothing after the next.
        self.next += 1;
        Ok(pid.map(|pid| Process { id: ProcessId { pid, start }, ppid, uid, name, command, exe, cwd, cgroup }))
    }
}

/// A row of [`life_columns`] and its id; without conflicts and kills.
pub(super) fn life(row: &Row<'_>) -> rusqlite::Result<(i64, Life)> {
    let mut columns = Columns::of(row);
    let (id, socket, binder) = (columns.get()?, columns.socket()?, columns.process()?);
    let (seen, opened) = (columns.time()?, columns.number()?);
    let (how, at) = (columns.read(Ended::of_word)?, columns.number()?.unwrap_or_default());
    let lived = columns.number()?.map(Duration::from_nanos);
    let (closer, name) = (columns.get::<Option<u32>>()?, columns.get::<Option<String>>()?.unwrap_or_default());
    let by = closer.map(|pid| Closer { pid, name });
    let end = how.map(|how| End { how, at, lived, by });
    Ok((id, Life { socket, binder, seen, opened, end, conflicts: Vec::new(), kills: Vec::new() }))
}

/// A row of [`conflict_columns`].
pub(super) fn conflict(row: &Row<'_>) -> rusqlite::Result<Conflict> {
    conflict_of(&mut Columns::of(row))
}

fn conflict_of(columns: &mut Columns<'_, '_>) -> rusqlite::Result<Conflict> {
    let process = columns.process()?.unwrap_or_else(|| Process::bare(ProcessId { pid: 0, start: 0 }, ""));
    let (errno, first, last) = (columns.get()?, columns.time()?, columns.time()?);
    let times = columns.number()?.unwrap_or(1);
    Ok(Conflict { first, last, times, errno, process })
}

/// A row of [`conflict_columns`]: what was wanted and when it was last, and the life that was in the way.
pub(super) fn attempt(row: &Row<'_>) -> rusqlite::Result<(Utc, Attempt, Option<i64>)> {
    let mut columns = Columns::of(row);
    let Conflict { last, errno, process, .. } = conflict_of(&mut columns)?;
    let life = columns.get()?;
    let (proto, address, port, netns) = (columns.proto()?, columns.address()?, columns.get()?, columns.get()?);
    Ok((last, Attempt { proto, address, port, netns, errno, by: Arc::new(process) }, life))
}
