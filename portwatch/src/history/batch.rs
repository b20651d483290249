//! Records as rows: a transaction being filled.
//!
//! Applying a record twice, or one whose predecessors are missing, does no harm: each tells all that is known of its
//! listener, so a close whose opening was lost is stored whole. What stays open for want of a close ends with the next
//! snapshot.

use std::collections::HashSet;

use rusqlite::{OptionalExtension, Transaction, params, params_from_iter};

use super::record::{self, Freed, Record, Requester, Row, Wall, What};
use super::rows::{self, PROCESS, SOCKET};
use super::{Ended, Utc};
use crate::model::{Attempt, BootNs, Process, ProcessId, Socket, SocketId};

pub(super) struct Batch<'a> {
    pub(super) tx: &'a Transaction<'a>,
    /// Lives that are inserted belong to it.
    pub(super) session: i64,
    /// What it means that an open life of an earlier session is not in the next snapshot.
    pub(super) absence: &'a mut (Ended, Option<Utc>),
    /// Lives inserted.
    pub(super) added: &'a mut u64,
}

/// An open life.
struct Open {
    id: i64,
    since: Option<BootNs>,
    binder: Option<ProcessId>,
    socket: SocketId,
}

/// How a life ended.
struct Ending<'a> {
    how: Ended,
    until: Utc,
    lived: Option<u64>,
    by: Option<&'a Process>,
}

impl Batch<'_> {
    pub(super) fn apply(&mut self, record: &Record) -> rusqlite::Result<()> {
        let Record { at, wall, what } = record;
        match what {
            What::Opened(row) => self.opened(row, *at, *wall).map(drop),
            What::Holders(row) => self.held(row, *at, *wall),
            What::Closed { row, by, how } => self.closed(row, by.as_deref(), *how, *at, *wall),
            What::Conflict { attempt, held_by } => self.refused(attempt, *held_by, wall.utc(*at), *wall),
            What::Killed { by, targets, ports } => {
                ports.iter().try_for_each(|freed| self.killed(freed, by, targets, wall.utc(*at)))
            }
            What::Snapshot(rows) => self.snapshot(rows, *at, *wall),
        }
    }

    fn opened(&mut self, row: &Row, at: BootNs, wall: Wall) -> rusqlite::Result<i64> {
        let since = row.since.unwrap_or(at);
        let row = Row { since: Some(since), ..row.clone() };
        match self.find_same(&row, wall)? {
            Some(open) => Ok(open.id),
            None => self.insert(&row, wall.utc(since), wall),
        }
    }

    /// An exec, or what a snapshot taught of the socket. Whoever bound it stays the binder when it is gone.
    fn held(&mut self, row: &Row, at: BootNs, wall: Wall) -> rusqlite::Result<()> {
        let Some(open) = self.find_same(row, wall)? else {
            return self.insert(row, wall.utc(row.since.unwrap_or(at)), wall).map(drop);
        };
        self.learn(&open, row, wall)
    }

    fn learn(&mut self, open: &Open, row: &Row, wall: Wall) -> rusqlite::Result<()> {
        let id = row.socket.id;
        if open.socket != id {
            let mut known = self.tx.prepare_cached("UPDATE life SET inode = ?, cookie = ? WHERE id = ?")?;
            let [inode, cookie] = [(id.inode, open.socket.inode), (id.cookie, open.socket.cookie)]
                .map(|(new, old)| if new == 0 { old } else { new }.cast_signed());
            known.execute(params![inode, cookie, open.id])?;
        }
        let Some(binder) = row.binder.as_deref() else { return Ok(()) };
        let is_known = binder.uid.is_some() || !binder.command.is_empty();
        if open.binder.is_none() || (is_known && open.binder.is_some_and(|known| known.is_same(binder.id))) {
            let sql = format!(
                "UPDATE life SET ({PROCESS}) = (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) WHERE id = ?11 AND \
                 (pid, euid, name, command, exe, cwd, cgroup) IS NOT (?1, ?3, ?5, ?6, ?7, ?8, ?9)"
            );
            let mut cells = rows::process_cells(Some(binder), wall);
            cells.push(Box::new(open.id));
            self.tx.prepare_cached(&sql)?.execute(params_from_iter(cells))?;
        }
        Ok(())
    }

    fn closed(&mut self, row: &Row, by: Option<&Process>, how: Ended, at: BootNs, wall: Wall) -> rusqlite::Result<()> {
        let until = wall.utc(at);
        let (id, since) = match self.find_same(row, wall)? {
            Some(open) => {
                self.learn(&open, row, wall)?;
                (open.id, row.since.or(open.since))
            }
            None => (self.insert(row, row.since.map_or(until, |since| wall.utc(since)), wall)?, row.since),
        };
        let lived = since.filter(|_| how.is_observed()).map(|since| at.saturating_sub(since));
        // Of a loss, nobody knows who closed it.
        let by = by.filter(|_| how.is_observed());
        self.end(id, &Ending { how, until, lived, by })?;
        if how.is_observed() {
            self.credit(id)?;
        }
        Ok(())
    }

    /// Says of a life that portwatch ended it, if those whom a kill of it ended held or closed it.
    fn credit(&mut self, id: i64) -> rusqlite::Result<()> {
        let mut update = self.tx.prepare_cached(
            "UPDATE life SET ended = ?1 WHERE id = ?2 AND ended IN (?3, ?4) AND EXISTS \
             (SELECT 1 FROM kill, json_each(kill.killed) AS victim WHERE kill.life = ?2 \
              AND victim.value IN (life.pid, life.closer))",
        )?;
        let (closed, exited) = (Ended::Closed.word(), Ended::Exited.word());
        update.execute(params![Ended::Killed.word(), id, closed, exited]).map(drop)
    }

    fn end(&mut self, id: i64, ending: &Ending<'_>) -> rusqlite::Result<()> {
        let mut update = self.tx.prepare_cached(
            "UPDATE life SET ended = ?, until = max(?, seen), lived = ?, closer = ?, closer_name = ? WHERE id = ?",
        )?;
        let name = ending.by.map(|by| record::name(&by.name));
        let lived = ending.lived.map(u64::cast_signed);
        let (how, until, by) = (ending.how.word(), ending.until.cast_signed(), ending.by.map(|by| by.id.pid));
        update.execute(params![how, until, lived, by, name, id]).map(drop)
    }

    fn refused(&mut self, attempt: &Attempt, by: Option<SocketId>, at: Utc, wall: Wall) -> rusqlite::Result<()> {
        let life = by.map(|by| self.find(by, false)).transpose()?.flatten().map(|open| open.id);
        let loser = &attempt.by;
        // One that tries again and again takes one row.
        let mut again = self.tx.prepare_cached(
            "UPDATE conflict SET last = ?1, times = times + 1 WHERE id = \
             (SELECT max(id) FROM conflict WHERE pid = ?2 AND port = ?3 AND proto = ?4 AND address = ?5 AND netns = ?6 \
              AND start IS ?7 AND life IS ?8 AND errno = ?9)",
        )?;
        let (address, proto) = (attempt.address.to_string(), rows::word(attempt.proto));
        let start = Some(loser.id.start.cast_signed()).filter(|start| *start != 0);
        let known = params![
            at.cast_signed(),
            loser.id.pid,
            attempt.port,
            proto,
            address,
            attempt.netns,
            start,
            life,
            attempt.errno
        ];
        if again.execute(known)? > 0 {
            return Ok(());
        }
        let sql = format!(
            "INSERT INTO conflict ({PROCESS}, life, proto, address, port, netns, errno, first, last, times) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?17, ?17, 1)"
        );
        let mut cells = rows::process_cells(Some(loser), wall);
        cells.extend::<[rows::Cell; 7]>([
            Box::new(life),
            Box::new(proto),
            Box::new(address),
            Box::new(attempt.port),
            Box::new(attempt.netns),
            Box::new(attempt.errno),
            Box::new(at.cast_signed()),
        ]);
        self.tx.prepare_cached(&sql)?.execute(params_from_iter(cells)).map(drop)
    }

    /// The end of what was killed may be recorded before the kill, or after.
    fn killed(&mut self, freed: &Freed, by: &Requester, targets: &str, at: Utc) -> rusqlite::Result<()> {
        let socket = &freed.socket;
        let life = match self.find(socket.id, socket.mptcp)? {
            Some(open) => Some(open.id),
            None => self.ended_since(socket, at)?,
        };
        let Some(life) = life else { return Ok(()) };
        let mut insert = self.tx.prepare_cached(
            "INSERT INTO kill (life, at, uid, pid, name, targets, status, killed) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )?;
        let status = serde_json::json!(freed.status);
        insert.execute(params![
            life,
            at.cast_signed(),
            by.uid,
            by.pid,
            record::name(&by.name),
            record::path(targets),
            status.as_str(),
            serde_json::json!(freed.killed).to_string()
        ])?;
        self.credit(life)
    }

    fn ended_since(&self, socket: &Socket, at: Utc) -> rusqlite::Result<Option<i64>> {
        let mut find = self.tx.prepare_cached(
            "SELECT id FROM life WHERE port = ? AND proto = ? AND until >= ? AND (cookie = ? AND cookie <> 0 OR \
             inode = ? AND inode <> 0) ORDER BY seen DESC LIMIT 1",
        )?;
        let (cookie, inode) = (socket.id.cookie.cast_signed(), socket.id.inode.cast_signed());
        let proto = rows::word(socket.proto);
        find.query_row(params![socket.port, proto, at.cast_signed(), cookie, inode], |row| row.get(0)).optional()
    }

    /// Makes the open lives equal to what is listening.
    fn snapshot(&mut self, listeners: &[Row], at: BootNs, wall: Wall) -> rusqlite::Result<()> {
        let now = wall.utc(at);
        let mut present = HashSet::with_capacity(listeners.len());
        for row in listeners {
            let id = match self.find_same(row, wall)? {
                Some(open) => {
                    self.learn(&open, row, wall)?;
                    open.id
                }
                None => self.insert(row, row.since.map_or(now, |since| wall.utc(since)), wall)?,
            };
            present.insert(id);
        }
        let mut open = self.tx.prepare_cached("SELECT id, session FROM life WHERE ended IS NULL")?;
        let open: Vec<(i64, i64)> =
            open.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<rusqlite::Result<_>>()?;
        for (id, session) in open.into_iter().filter(|(id, _)| !present.contains(id)) {
            let (how, until) = if session == self.session { (Ended::Lost, None) } else { *self.absence };
            self.end(id, &Ending { how, until: until.unwrap_or(now), lived: None, by: None })?;
        }
        self.tx.prepare_cached("UPDATE session SET synced = 1 WHERE id = ?")?.execute([self.session])?;
        *self.absence = (Ended::Lost, None);
        Ok(())
    }

    fn insert(&mut self, row: &Row, seen: Utc, wall: Wall) -> rusqlite::Result<i64> {
        let sql = format!(
            "INSERT INTO life ({SOCKET}, {PROCESS}, session, seen, opened, since) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        );
        let mut cells = rows::socket_cells(&row.socket);
        cells.extend(rows::process_cells(row.binder.as_deref(), wall));
        cells.extend::<[rows::Cell; 4]>([
            Box::new(self.session),
            Box::new(seen.cast_signed()),
            Box::new(row.since.map(|since| wall.utc(since).cast_signed())),
            Box::new(row.since.map(u64::cast_signed)),
        ]);
        self.tx.prepare_cached(&sql)?.execute(params_from_iter(cells))?;
        *self.added += 1;
        Ok(self.tx.last_insert_rowid())
    }

    /// The open life of this listener. One of the same socket that began before this did, or is at another port, ended
    /// unseen.
    fn find_same(&mut self, row: &Row, wall: Wall) -> rusqlite::Result<Option<Open>> {
        let Some(open) = self.find(row.socket.id, row.socket.mptcp)? else { return Ok(None) };
        let place: (u16, String) = self
            .tx
            .prepare_cached("SELECT port, address FROM life WHERE id = ?")?
            .query_row([open.id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let moved = place != (row.socket.port, row.socket.address.to_string());
        let later = matches!((row.since, open.since), (Some(since), Some(known)) if since > known);
        if !moved && !later {
            return Ok(Some(open));
        }
        let until = row.since.map_or(0, |since| wall.utc(since));
        self.end(open.id, &Ending { how: Ended::Lost, until, lived: None, by: None })?;
        Ok(None)
    }

    /// By cookie where both are known; the two halves of an MPTCP listener share an inode only.
    fn find(&self, id: SocketId, mptcp: bool) -> rusqlite::Result<Option<Open>> {
        const COLUMNS: &str = "SELECT id, since, pid, start, inode, cookie, mptcp FROM life WHERE ended IS NULL AND";
        let read = |row: &rusqlite::Row<'_>| {
            let number = |column| row.get::<_, Option<i64>>(column).map(|number| number.map(i64::cast_unsigned));
            let start = number(3)?.unwrap_or(0);
            let open = Open {
                id: row.get(0)?,
                since: number(1)?,
                binder: row.get::<_, Option<u32>>(2)?.map(|pid| ProcessId { pid, start }),
                socket: SocketId { inode: number(4)?.unwrap_or(0), cookie: number(5)?.unwrap_or(0) },
            };
            Ok((open, row.get::<_, bool>(6)?))
        };
        if id.cookie != 0 {
            let mut by_cookie = self.tx.prepare_cached(&format!("{COLUMNS} cookie = ?"))?;
            if let Some((open, _)) = by_cookie.query_row([id.cookie.cast_signed()], read).optional()? {
                return Ok(Some(open));
            }
        }
        if id.inode == 0 {
            return Ok(None);
        }
        let mut by_inode = self.tx.prepare_cached(&format!("{COLUMNS} inode = ?"))?;
        let found = by_inode.query_map([id.inode.cast_signed()], read)?;
        for row in found {
            let (open, known_mptcp) = row?;
            if open.socket.cookie == 0 || id.cookie == 0 || mptcp || known_mptcp {
                return Ok(Some(open));
            }
        }
        Ok(None)
    }
}
