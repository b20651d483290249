//! The database as the writer sees it: opened, fed in batches, kept small. It owns the only connection that writes.
//!
//! A batch is one transaction: a writer that is killed in the midst of it leaves none of it. The log is written ahead
//! (WAL) and synced when it is copied back: a crash of the host may cost the latest batches, never the file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, TransactionBehavior, params};

use super::batch::Batch;
use super::files::{self, FileId};
use super::health::{Kind, Trouble};
use super::record::{Record, Wall};
use super::schema::{self, Owner};
use super::{Ended, Retention, Utc};

/// How long somebody else (an administrator's shell) may hold the write lock.
const BUSY: Duration = Duration::from_millis(500);
/// KiB of pages that are kept in memory.
const CACHE_KIB: i64 = 512;
const PAGE: u64 = 4096;
/// Rows that one statement of the clean-up deletes at most, and how many statements one batch pays for.
const CHUNK: u64 = 512;
const CHUNKS: usize = 16;

/// One run of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Session {
    pub(super) boot: Boot,
    pub(super) begun: Utc,
}

/// Which boot of the host, and when that was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Boot {
    pub(super) id: String,
    pub(super) at: Utc,
}

impl Boot {
    /// An id that cannot be read is that of every boot: nothing is then said to have ended by a reboot.
    pub(super) fn current(wall: Wall) -> Boot {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Boot { id: id.trim().to_owned(), at: wall.utc(0) }
    }
}

#[derive(Debug)]
pub(super) struct Store {
    db: Connection,
    path: PathBuf,
    file: FileId,
    /// Bytes of it, after the latest write.
    length: u64,
    retention: Retention,
    session: i64,
    /// What it means that an open life of an earlier session is not in the next snapshot, and since when it may be so.
    absence: (Ended, Option<Utc>),
    lives: u64,
}

impl Store {
    /// Opens it, or makes it, and begins the session unless it goes on.
    pub(super) fn open(path: &Path, retention: Retention, session: &Session) -> Result<Store, Trouble> {
        let file = files::create(path).map_err(|error| Trouble::of_io(&error, path, "open history"))?;
        let sqlite = |error: rusqlite::Error| Trouble::of_sqlite(&error, path, "open history");
        let mut db = connect(path, retention.bytes.max(Retention::MIN_BYTES)).map_err(sqlite)?;
        match schema::owner(&db).map_err(sqlite)? {
            Owner::Ours | Owner::Nobody => {}
            Owner::Foreign => return Err(not_ours(path, "another program's database")),
            Owner::Newer => return Err(not_ours(path, "written by a newer portwatch")),
        }
        schema::migrate(&mut db).map_err(sqlite)?;
        let (session, absence) = begin(&mut db, session).map_err(sqlite)?;
        let lives = db.query_row("SELECT count(*) FROM life", [], |row| row.get::<_, i64>(0)).map_err(sqlite)?;
        let (path, lives) = (path.to_owned(), lives.cast_unsigned());
        Ok(Store { db, length: files::bytes(&path), path, file, retention, session, absence, lives })
    }

    /// Lives that are stored.
    pub(super) fn lives(&self) -> u64 {
        self.lives
    }

    /// Of the database and its log.
    pub(super) fn bytes(&self) -> u64 {
        files::bytes(&self.path) + self.log_bytes()
    }

    fn log_bytes(&self) -> u64 {
        files::bytes(&files::log_of(&self.path))
    }

    fn limit(&self) -> u64 {
        self.retention.bytes.max(Retention::MIN_BYTES)
    }

    /// Stores all of them, or none; then makes room, as far as this batch should pay for it. `now` is this moment.
    pub(super) fn write(&mut self, records: &[Record], now: Utc) -> Result<(), Trouble> {
        self.is_in_place()?;
        self.bound_log()?;
        let (session, mut absence, mut added) = (self.session, self.absence, 0);
        let mut write = || {
            let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let mut batch = Batch { tx: &tx, session, absence: &mut absence, added: &mut added };
            for record in records {
                batch.apply(record)?;
            }
            tx.commit()
        };
        write().map_err(|error| Trouble::of_sqlite(&error, &self.path, "write history to"))?;
        self.absence = absence;
        self.lives += added;
        self.make_room(now).map_err(|error| Trouble::of_sqlite(&error, &self.path, "delete old rows of"))?;
        self.length = files::bytes(&self.path);
        Ok(())
    }

    /// The session ends: what is open now is no longer followed.
    pub(super) fn stop(&mut self, now: Utc) -> Result<(), Trouble> {
        self.is_in_place()?;
        let stopped =
            self.db.execute("UPDATE session SET stopped = ? WHERE id = ?", params![now.cast_signed(), self.session]);
        stopped.map(drop).map_err(|error| Trouble::of_sqlite(&error, &self.path, "write history to"))
    }

    /// SQLite would go on writing to a file that was removed or cut short, as long as what it needs is in its memory.
    fn is_in_place(&self) -> Result<(), Trouble> {
        let trouble = |kind, why: &str| Err(Trouble::new(kind, &self.path, "write history to", why));
        if files::id(&self.path) != Some(self.file) {
            return trouble(Kind::Replaced, "the file was removed or replaced");
        }
        let length = files::bytes(&self.path);
        if length == 0 || (length < self.length && !is_sound(&self.path)) {
            return trouble(Kind::Damaged, "the file was cut short");
        }
        Ok(())
    }

    /// A reader that never ends keeps the log from being begun anew: it must not fill the disk.
    fn bound_log(&self) -> Result<(), Trouble> {
        if self.log_bytes() <= self.limit() / 2 {
            return Ok(());
        }
        // Fails where a reader is in the way, which is what is looked for.
        let _ = self.db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        if self.log_bytes() <= self.limit() / 2 {
            return Ok(());
        }
        let why = "a process that reads it keeps its log from being shortened";
        Err(Trouble::new(Kind::Unavailable, &self.path, "write history to", why))
    }

    /// By age, then by size; oldest first. More than a few batches' worth at once waits for the next batch.
    fn make_room(&mut self, now: Utc) -> rusqlite::Result<()> {
        let age = u64::try_from(self.retention.age.as_nanos()).unwrap_or(u64::MAX);
        let oldest = now.saturating_sub(age).cast_signed();
        let sql = "DELETE FROM life WHERE id IN (SELECT id FROM life WHERE until < ?1 ORDER BY until LIMIT ?2)";
        self.delete(sql, oldest, CHUNK)?;
        let sql = "DELETE FROM conflict WHERE id IN (SELECT id FROM conflict WHERE last < ? ORDER BY last LIMIT ?)";
        self.db.prepare_cached(sql)?.execute(params![oldest, CHUNK.cast_signed()])?;
        let sql = "DELETE FROM session WHERE begun < ? AND id < ?";
        self.db.prepare_cached(sql)?.execute(params![oldest, self.session])?;
        for _ in 0..CHUNKS {
            let pages: i64 = self.db.pragma_query_value(None, "page_count", |row| row.get(0))?;
            let free: i64 = self.db.pragma_query_value(None, "freelist_count", |row| row.get(0))?;
            let log = self.log_bytes().min(self.limit() / 2);
            let used = (pages - free).cast_unsigned() * PAGE + log;
            if used <= self.limit() {
                if free > 0 && pages.cast_unsigned() * PAGE + log > self.limit() {
                    // Each step is a page.
                    let mut vacuum = self.db.prepare_cached("PRAGMA incremental_vacuum(1024)")?;
                    let mut rows = vacuum.query([])?;
                    while rows.next()?.is_some() {}
                }
                return Ok(());
            }
            let sql = "DELETE FROM life WHERE id IN \
                       (SELECT id FROM life WHERE until IS NOT NULL AND until < ?1 ORDER BY until LIMIT ?2)";
            // However large they are: not all at once.
            let chunk = (self.lives / 32).clamp(1, CHUNK);
            let lives = self.delete(sql, i64::MAX, chunk)?;
            let sql =
                "DELETE FROM conflict WHERE id IN (SELECT id FROM conflict WHERE life IS NULL ORDER BY last LIMIT ?)";
            if lives + self.db.prepare_cached(sql)?.execute([chunk.cast_signed()])? == 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    fn delete(&mut self, sql: &str, before: i64, chunk: u64) -> rusqlite::Result<usize> {
        let deleted = self.db.prepare_cached(sql)?.execute(params![before, chunk.cast_signed()])?;
        self.lives = self.lives.saturating_sub(deleted as u64);
        Ok(deleted)
    }
}

fn connect(path: &Path, limit: u64) -> rusqlite::Result<Connection> {
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    db.busy_timeout(BUSY)?;
    db.set_prepared_statement_cache_capacity(64);
    let log = (limit / 16).clamp(16 * PAGE, 4 << 20);
    // Before the first table, or it has no effect.
    db.pragma_update(None, "page_size", PAGE.cast_signed())?;
    db.pragma_update(None, "auto_vacuum", "incremental")?;
    for (pragma, value) in [
        ("cache_size", -CACHE_KIB),
        ("wal_autocheckpoint", (log / PAGE).cast_signed()),
        ("journal_size_limit", log.cast_signed()),
        // NORMAL: in WAL mode a crash of the host costs the latest batches at most.
        ("synchronous", 1),
        ("foreign_keys", 1),
        ("temp_store", 2),
        ("trusted_schema", 0),
        ("cell_size_check", 1),
    ] {
        // Some of them answer with a row.
        db.pragma_update_and_check(None, pragma, value, |_| Ok(())).optional()?;
    }
    db.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
    Ok(db)
}

/// With a memory of its own. An administrator's VACUUM, too, makes a file shorter.
fn is_sound(path: &Path) -> bool {
    let check = |db: Connection| db.query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0));
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX);
    db.and_then(check).is_ok_and(|answer| answer == "ok")
}

fn not_ours(path: &Path, whose: &str) -> Trouble {
    let reason = format!("cannot use {} as history: it is {whose}; move it away, or upgrade", path.display());
    Trouble { kind: Kind::Unavailable, reason }
}

/// The session, and what it means that an open life is not in its next snapshot.
fn begin(db: &mut Connection, session: &Session) -> rusqlite::Result<(i64, (Ended, Option<Utc>))> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let begun = session.begun.cast_signed();
    let known: Option<(i64, bool)> = tx
        .query_row(
            "SELECT id, synced FROM session WHERE boot = ? AND begun = ?",
            params![session.boot.id, begun],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()?;
    let id = match known {
        Some((id, true)) => return Ok((id, (Ended::Lost, None))),
        Some((id, false)) => id,
        None => {
            tx.execute("INSERT INTO session (boot, begun) VALUES (?, ?)", params![session.boot.id, begun])?;
            tx.last_insert_rowid()
        }
    };
    let before: Option<(String, Option<i64>)> = tx
        .query_row("SELECT boot, stopped FROM session WHERE id < ? ORDER BY id DESC LIMIT 1", [id], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()?;
    let absence = match before {
        Some((boot, _)) if boot != session.boot.id => {
            tx.execute(
                "UPDATE life SET ended = ?, until = ? WHERE ended IS NULL AND session <> ?",
                params![Ended::Reboot.word(), session.boot.at.cast_signed(), id],
            )?;
            (Ended::Lost, None)
        }
        Some((_, Some(stopped))) => (Ended::AgentStopped, Some(stopped.cast_unsigned())),
        _ => (Ended::Unknown, None),
    };
    tx.commit()?;
    Ok((id, absence))
}
