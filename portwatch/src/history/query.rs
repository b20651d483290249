//! Questions to the store, on a connection that cannot write.

use std::iter;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, params_from_iter};
use serde::{Deserialize, Serialize};

use super::record::Wall;
use super::schema::{self, Owner};
use super::store::Boot;
use super::{Closer, Conflict, End, Ended, Kill, Life, Requester, Utc, files, rows};
use crate::model::{Change, Listener, Process, ProcessId};
use crate::render::Clock;
use crate::select::Selector;

/// How long to wait for a writer that begins a log anew; it never takes that long.
const BUSY: Duration = Duration::from_secs(2);

/// More targets than this do not narrow what is read, only what is taken of it.
const MAX_RANGES: usize = 64;

/// Reads a store, whether or not somebody writes to it meanwhile.
#[derive(Debug)]
pub struct Reader {
    db: Connection,
    /// What became of lives that are open in the store, if nobody follows them any more.
    forsaken: Option<(Ended, Utc)>,
}

/// An answer, oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lives {
    pub lives: Vec<Life>,
    /// Whether there are older ones than the limit let through.
    pub more: bool,
}

impl Reader {
    /// Opens the store at `path`; `clock` is this moment. The error has an [`std::io::Error`] in its chain where the file
    /// is not there, or may not be read.
    pub fn open(path: &Path, clock: &Clock) -> anyhow::Result<Reader> {
        let what = || format!("cannot read the history {}", path.display());
        files::is_readable(path).with_context(what)?;
        let (db, owner) = connect(path).map_err(|error| failure(&error).context(what()))?;
        match owner {
            Owner::Ours => {}
            Owner::Nobody => anyhow::bail!("{}: the agent has not written to it yet", what()),
            Owner::Foreign => anyhow::bail!("{}: it is another program's database", what()),
            Owner::Newer => anyhow::bail!("{}: it was written by a newer portwatch; upgrade this one", what()),
        }
        let boot = Boot::current(Wall::of(clock));
        let latest: Option<(String, Option<i64>)> = db
            .query_row("SELECT boot, stopped FROM session ORDER BY id DESC LIMIT 1", [], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .optional()
            .map_err(|error| failure(&error).context(what()))?;
        let forsaken = match latest {
            Some((id, _)) if id != boot.id => Some((Ended::Reboot, boot.at)),
            Some((_, Some(stopped))) => Some((Ended::AgentStopped, stopped.cast_unsigned())),
            _ => None,
        };
        Ok(Reader { db, forsaken })
    }

    /// The lives that the selector picks and that did not end before `from`: the latest `limit` of them. `now` is this
    /// moment.
    pub fn lives(&self, selector: &Selector, from: Utc, now: Utc, limit: usize) -> anyhow::Result<Lives> {
        self.find(selector, from, now, limit).map_err(|error| failure(&error).context("cannot search the history"))
    }

    fn find(&self, selector: &Selector, from: Utc, now: Utc, limit: usize) -> rusqlite::Result<Lives> {
        let ports = Ports::of(selector);
        let mut sql = format!("SELECT {} FROM life WHERE (until IS NULL OR until >= ?)", rows::life_columns());
        sql.push_str(&ports.condition);
        let values = iter::once(from.cast_signed()).chain(ports.values);
        sql.push_str(" ORDER BY seen DESC, id DESC");
        let mut found = Vec::new();
        let mut more = false;
        let mut statement = self.db.prepare(&sql)?;
        let mut rows = statement.query(params_from_iter(values))?;
        while let Some(row) = rows.next()? {
            let (id, life) = self.read(row)?;
            let overlaps = life.end.as_ref().is_none_or(|end| end.at >= from);
            if !overlaps || !life.matches(selector, now) {
                continue;
            }
            if found.len() == limit {
                more = true;
                break;
            }
            found.push((id, life));
        }
        let mut lives = Vec::with_capacity(found.len());
        for (id, life) in found.into_iter().rev() {
            lives.push(Life { conflicts: self.conflicts(id)?, kills: self.kills(id)?, ..life });
        }
        Ok(Lives { lives, more })
    }

    /// What happened since `from` on the ports that the selector picks, oldest first: opens, closes and conflicts, the latest
    /// `limit` of them. Their times are in [`Utc`]; [`super::clock`] renders them. What nobody saw happen (a close while the
    /// agent was away) is not told. Who held a port is for the caller to look at.
    pub fn since(&self, from: Utc, limit: usize, selector: &Selector) -> anyhow::Result<Vec<Change>> {
        self.replay(from, limit, selector).map_err(|error| failure(&error).context("cannot replay the history"))
    }

    fn replay(&self, from: Utc, limit: usize, selector: &Selector) -> rusqlite::Result<Vec<Change>> {
        let mut changes: Vec<(Utc, Change)> = Vec::new();
        for life in self.lives_by("seen", from, limit, selector)? {
            if let Some(at) = life.opened {
                changes.push((at, Change::Opened { at, listener: life.listener() }));
            }
        }
        for life in self.lives_by("until", from, limit, selector)? {
            if let Some(end) = life.end.as_ref().filter(|end| end.how.is_observed() || end.how == Ended::Lost) {
                let by = end.by.as_ref().map(|by| closer(by, life.binder.as_ref()));
                let listener = life.listener();
                // What the boot clock measured, even if the wall clock was set meanwhile.
                let since = end.lived.map(|lived| end.at.saturating_sub(lived.as_nanos() as u64)).or(listener.since);
                let listener = Listener { since, ..listener };
                changes.push((end.at, Change::Closed { at: end.at, listener, by }));
            }
        }
        let Ports { condition, values } = Ports::of(selector);
        let columns = rows::conflict_columns();
        let sql = format!("SELECT {columns} FROM conflict WHERE last >= ?{condition} ORDER BY last DESC LIMIT ?");
        let limit_of_rows = i64::try_from(limit).unwrap_or(i64::MAX);
        let values = iter::once(from.cast_signed()).chain(values).chain([limit_of_rows]);
        for refused in self.db.prepare(&sql)?.query_map(params_from_iter(values), rows::attempt)? {
            let (at, attempt, life) = refused?;
            let held_by = self.life(life)?.map(|life| life.listener());
            changes.push((at, Change::Conflict { at, attempt, held_by }));
        }
        // Of the same moment, what ended comes first: the address is free before it is taken.
        changes.sort_by_key(|(at, change)| (*at, matches!(change, Change::Opened { .. })));
        let surplus = changes.len().saturating_sub(limit);
        Ok(changes.drain(surplus..).map(|(_, change)| change).collect())
    }

    /// The latest `limit` lives of which the moment in this column is not before `from`, and whose sockets are picked.
    fn lives_by(&self, column: &str, from: Utc, limit: usize, selector: &Selector) -> rusqlite::Result<Vec<Life>> {
        let Ports { condition, values } = Ports::of(selector);
        let columns = rows::life_columns();
        let sql = format!("SELECT {columns} FROM life WHERE {column} >= ?{condition} ORDER BY {column} DESC");
        let mut statement = self.db.prepare(&sql)?;
        let values = params_from_iter(iter::once(from.cast_signed()).chain(values));
        let lives = statement.query_map(values, |row| self.read(row).map(|(_, life)| life))?;
        let is_picked = |life: &rusqlite::Result<Life>| match life {
            Ok(life) => selector.matches_socket(&life.listener().socket),
            Err(_) => true,
        };
        lives.filter(is_picked).take(limit).collect()
    }

    fn read(&self, row: &rusqlite::Row<'_>) -> rusqlite::Result<(i64, Life)> {
        let (id, mut life) = rows::life(row)?;
        if let (None, Some((how, at))) = (&life.end, self.forsaken) {
            life.end = Some(End { how, at: at.max(life.seen), lived: None, by: None });
        }
        Ok((id, life))
    }

    fn life(&self, id: Option<i64>) -> rusqlite::Result<Option<Life>> {
        let sql = format!("SELECT {} FROM life WHERE id = ?", rows::life_columns());
        let life = self.db.prepare_cached(&sql)?.query_row([id], |row| self.read(row)).optional()?;
        Ok(life.map(|(_, life)| life))
    }

    fn conflicts(&self, life: i64) -> rusqlite::Result<Vec<Conflict>> {
        let (columns, most) = (rows::conflict_columns(), Life::MAX_NOTES);
        let sql = format!("SELECT {columns} FROM conflict WHERE life = ? ORDER BY last DESC LIMIT {most}");
        let mut conflicts: Vec<Conflict> =
            self.db.prepare_cached(&sql)?.query_map([life], rows::conflict)?.collect::<rusqlite::Result<_>>()?;
        conflicts.reverse();
        Ok(conflicts)
    }

    fn kills(&self, life: i64) -> rusqlite::Result<Vec<Kill>> {
        let sql = format!("SELECT * FROM kill WHERE life = ? ORDER BY at DESC LIMIT {}", Life::MAX_NOTES);
        let kill = |row: &rusqlite::Row<'_>| {
            Ok(Kill {
                at: row.get::<_, i64>("at")?.cast_unsigned(),
                by: Requester { uid: row.get("uid")?, pid: row.get("pid")?, name: row.get("name")? },
                targets: row.get("targets")?,
                status: row.get("status")?,
            })
        };
        let mut kills: Vec<Kill> =
            self.db.prepare_cached(&sql)?.query_map([life], kill)?.collect::<rusqlite::Result<_>>()?;
        kills.reverse();
        Ok(kills)
    }
}

/// The ports of a selector as a condition in SQL that begins with AND; empty where it names none, or too many.
struct Ports {
    condition: String,
    values: Vec<i64>,
}

impl Ports {
    fn of(selector: &Selector) -> Ports {
        let ranges = selector.targets().iter().map(|target| [*target.ports.start(), *target.ports.end()]);
        let values: Vec<i64> = ranges.flatten().map(i64::from).collect();
        let count = values.len() / 2;
        if count == 0 || count > MAX_RANGES {
            return Ports { condition: String::new(), values: Vec::new() };
        }
        Ports { condition: format!(" AND ({})", vec!["port BETWEEN ? AND ?"; count].join(" OR ")), values }
    }
}

/// Its source says the same again, with a number.
fn failure(error: &rusqlite::Error) -> anyhow::Error {
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            anyhow::anyhow!("{error}; the agent sets a damaged file aside when it starts")
        }
        _ => anyhow::anyhow!("{error}"),
    }
}

/// Who closed it, with all that is known where that was the binder.
fn closer(by: &Closer, binder: Option<&Process>) -> Arc<Process> {
    let binder = binder.filter(|binder| binder.id.pid == by.pid);
    Arc::new(binder.cloned().unwrap_or_else(|| Process::bare(ProcessId { pid: by.pid, start: 0 }, by.name.clone())))
}

/// Where nobody has it open and we may not make the files beside it, there is nothing to be shared, and nobody to share it
/// with: then it is read as it lies there.
fn connect(path: &Path) -> rusqlite::Result<(Connection, Owner)> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let configured = |db: Connection| {
        db.busy_timeout(BUSY)?;
        db.pragma_update(None, "trusted_schema", false)?;
        let owner = schema::owner(&db)?;
        Ok((db, owner))
    };
    Connection::open_with_flags(path, flags).and_then(configured).or_else(|error: rusqlite::Error| {
        let refused = matches!(error.sqlite_error_code(), Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly));
        if !refused || files::log_of(path).exists() {
            return Err(error);
        }
        let uri = format!("file:{}?immutable=1", encode(path));
        Connection::open_with_flags(uri, flags | OpenFlags::SQLITE_OPEN_URI).and_then(configured)
    })
}

/// The path as part of a URI.
fn encode(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-".contains(byte);
    let bytes = path.as_os_str().as_bytes().iter();
    bytes.map(|byte| if plain(byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
