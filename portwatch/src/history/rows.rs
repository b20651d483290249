//! Between the columns of the schema and the model. One list of columns each, so that what is written and what is read
//! cannot differ.

use std::net::IpAddr;

use rusqlite::types::Type;
use rusqlite::{Row, ToSql};

use super::record::{self, Wall};
use super::{Closer, Conflict, End, Ended, Life, Utc};
use crate::model::{Process, ProcessId, Protocol, Socket, SocketId};

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

fn number(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<u64>> {
    Ok(row.get::<_, Option<i64>>(column)?.map(i64::cast_unsigned))
}

fn time(row: &Row<'_>, column: &str) -> rusqlite::Result<Utc> {
    row.get::<_, i64>(column).map(i64::cast_unsigned)
}

/// A text that says something to us.
fn read<T>(row: &Row<'_>, column: &str, parse: impl Fn(&str) -> Option<T>) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    let bad = || format!("'{}' is no {column}", text.escape_debug());
    parse(&text).ok_or_else(|| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, bad().into()))
}

pub(super) fn proto(row: &Row<'_>) -> rusqlite::Result<Protocol> {
    read(row, "proto", |text| [Protocol::Tcp, Protocol::Udp].into_iter().find(|&proto| word(proto) == text))
}

pub(super) fn address(row: &Row<'_>) -> rusqlite::Result<IpAddr> {
    read(row, "address", |text| text.parse().ok())
}

fn socket(row: &Row<'_>) -> rusqlite::Result<Socket> {
    Ok(Socket {
        id: SocketId {
            inode: number(row, "inode")?.unwrap_or_default(),
            cookie: number(row, "cookie")?.unwrap_or_default(),
        },
        proto: proto(row)?,
        mptcp: row.get("mptcp")?,
        address: address(row)?,
        port: row.get("port")?,
        v6only: row.get("v6only")?,
        netns: row.get("netns")?,
        uid: row.get("uid")?,
        backlog: row.get("backlog")?,
    })
}

/// Its start in [`Utc`].
fn process(row: &Row<'_>) -> rusqlite::Result<Option<Process>> {
    let Some(pid) = row.get("pid")? else { return Ok(None) };
    let id = ProcessId { pid, start: number(row, "started")?.unwrap_or(0) };
    Ok(Some(Process {
        id,
        ppid: row.get("ppid")?,
        uid: row.get("euid")?,
        name: row.get("name")?,
        command: read(row, "command", |json| serde_json::from_str(json).ok())?,
        exe: row.get("exe")?,
        cwd: row.get("cwd")?,
        cgroup: row.get("cgroup")?,
    }))
}

/// A row of `life`, with all its columns; without conflicts and kills.
pub(super) fn life(row: &Row<'_>) -> rusqlite::Result<Life> {
    let end = match row.get::<_, Option<String>>("ended")? {
        None => None,
        Some(_) => Some(End {
            how: read(row, "ended", Ended::of_word)?,
            at: time(row, "until")?,
            lived: number(row, "lived")?.map(std::time::Duration::from_nanos),
            by: row
                .get::<_, Option<u32>>("closer")?
                .map(|pid| Ok::<_, rusqlite::Error>(Closer { pid, name: row.get("closer_name")? }))
                .transpose()?,
        }),
    };
    Ok(Life {
        socket: socket(row)?,
        binder: process(row)?,
        seen: time(row, "seen")?,
        opened: number(row, "opened")?,
        end,
        conflicts: Vec::new(),
        kills: Vec::new(),
    })
}

/// A row of `conflict`, with all its columns.
pub(super) fn conflict(row: &Row<'_>) -> rusqlite::Result<Conflict> {
    Ok(Conflict {
        first: time(row, "first")?,
        last: time(row, "last")?,
        times: number(row, "times")?.unwrap_or(1),
        errno: row.get("errno")?,
        process: process(row)?.unwrap_or_else(|| Process::bare(ProcessId { pid: 0, start: 0 }, "")),
    })
}
