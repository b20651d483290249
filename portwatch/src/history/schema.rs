//! The tables, and how older files come to have them.
//!
//! `user_version` counts the steps of [`STEPS`] that a file has taken; a step, once released, never changes. The kernel's
//! 64-bit numbers are stored as SQLite's signed ones, bit by bit.

use rusqlite::{Connection, TransactionBehavior};

/// "pwhi": tells our files from other databases.
const APPLICATION_ID: i32 = 0x7077_6869;

const STEPS: [&str; 1] = ["
CREATE TABLE session (      -- a run of the agent
    id      INTEGER PRIMARY KEY,
    boot    TEXT NOT NULL,  -- /proc/sys/kernel/random/boot_id
    begun   INTEGER NOT NULL,
    synced  INTEGER NOT NULL DEFAULT 0, -- whether its first snapshot has been compared
    stopped INTEGER         -- NULL: it runs, or died
) STRICT;

CREATE TABLE life (
    id      INTEGER PRIMARY KEY,
    session INTEGER NOT NULL,
    proto   TEXT NOT NULL, mptcp INTEGER NOT NULL, address TEXT NOT NULL, port INTEGER NOT NULL, v6only INTEGER,
    netns   INTEGER NOT NULL, inode INTEGER NOT NULL, cookie INTEGER NOT NULL, uid INTEGER NOT NULL, backlog INTEGER,
    pid     INTEGER, ppid INTEGER, euid INTEGER, started INTEGER, name TEXT, command TEXT, exe TEXT, cwd TEXT,
    cgroup  TEXT,
    start   INTEGER,        -- of the binder, since boot: tells processes apart
    seen    INTEGER NOT NULL,
    opened  INTEGER,        -- NULL: not observed
    since   INTEGER,        -- the same, since boot
    ended   TEXT,           -- NULL: open
    until   INTEGER,
    lived   INTEGER,        -- nanoseconds on the boot clock
    closer  INTEGER, closer_name TEXT
) STRICT;
CREATE INDEX life_port ON life (port, seen);
CREATE INDEX life_seen ON life (seen);
CREATE INDEX life_until ON life (until) WHERE until IS NOT NULL;
CREATE INDEX open_cookie ON life (cookie) WHERE ended IS NULL;
CREATE INDEX open_inode ON life (inode) WHERE ended IS NULL;

CREATE TABLE conflict (
    id      INTEGER PRIMARY KEY,
    life    INTEGER REFERENCES life ON DELETE CASCADE, -- NULL: nobody visible was in the way
    proto   TEXT NOT NULL, address TEXT NOT NULL, port INTEGER NOT NULL, netns INTEGER NOT NULL, errno INTEGER NOT NULL,
    pid     INTEGER, ppid INTEGER, euid INTEGER, started INTEGER, name TEXT, command TEXT, exe TEXT, cwd TEXT,
    cgroup  TEXT,
    start   INTEGER,
    first   INTEGER NOT NULL, last INTEGER NOT NULL, times INTEGER NOT NULL
) STRICT;
CREATE INDEX conflict_life ON conflict (life);
CREATE INDEX conflict_loser ON conflict (pid, port);
CREATE INDEX conflict_last ON conflict (last);

CREATE TABLE kill (
    id      INTEGER PRIMARY KEY,
    life    INTEGER NOT NULL REFERENCES life ON DELETE CASCADE,
    at      INTEGER NOT NULL,
    uid     INTEGER NOT NULL, pid INTEGER NOT NULL, name TEXT NOT NULL,
    targets TEXT NOT NULL,
    status  TEXT NOT NULL,
    killed  TEXT NOT NULL   -- JSON array of pids
) STRICT;
CREATE INDEX kill_life ON kill (life);
"];

/// Whose file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Ours,
    /// Nothing is in it yet.
    Nobody,
    /// Another program's database.
    Foreign,
    /// Ours, from a version of portwatch that knows more steps.
    Newer,
}

pub(super) fn owner(db: &Connection) -> rusqlite::Result<Owner> {
    let number = |pragma: &str| db.pragma_query_value(None, pragma, |row| row.get::<_, i32>(0));
    let (id, version) = (number("application_id")?, number("user_version")?);
    let objects: i64 = db.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    Ok(match id {
        APPLICATION_ID if steps(version) > STEPS.len() => Owner::Newer,
        APPLICATION_ID => Owner::Ours,
        0 if version == 0 && objects == 0 => Owner::Nobody,
        _ => Owner::Foreign,
    })
}

/// Brings a file of ours, or an empty one, up to date: all or nothing.
pub(super) fn migrate(db: &mut Connection) -> rusqlite::Result<()> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i32 = tx.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if steps(version) < STEPS.len() {
        for step in &STEPS[steps(version)..] {
            tx.execute_batch(step)?;
        }
        tx.pragma_update(None, "user_version", STEPS.len() as i32)?;
        tx.pragma_update(None, "application_id", APPLICATION_ID)?;
    }
    tx.commit()
}

/// A version below 0 is more than we know.
fn steps(version: i32) -> usize {
    usize::try_from(version).unwrap_or(usize::MAX)
}
