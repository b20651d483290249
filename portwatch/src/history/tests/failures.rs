//! Whatever becomes of the file, the recorder takes what it is told, says what is wrong, and goes on by itself.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};

use rusqlite::Connection;

use super::*;

fn server(n: u64) -> Listener {
    let mut listener = listener(8000, Some(n * SECOND), alive("server"));
    listener.socket.id = SocketId { inode: n, cookie: n };
    listener
}

/// Files of the state directory that were set aside.
fn aside(lab: &Lab) -> Vec<String> {
    let names =
        fs::read_dir(lab.directory.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.contains("corrupt")).collect();
    names.sort();
    names
}

/// Bytes that are the same in every run, and mean nothing.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(next).collect()
}

#[test]
fn a_file_that_is_no_database_is_set_aside_and_two_of_them_are_kept() {
    let lab = Lab::new();
    for round in 1..=4 {
        fs::write(lab.path(), noise(10_000)).unwrap();
        let mut run = lab.begin(round * SECOND);
        run.opened(&server(round));
        let health = run.is_ok();
        let note = health.note.clone().unwrap_or_else(|| panic!("{round}: {health:?}"));
        assert!(note.contains("file is not a database: set aside as ") && note.ends_with("a new one begun"), "{note}");
        check(&lab.story((round + 1) * SECOND), &format!("8000 server opened {round}, open, 1s\n"));
        run.crash();
        assert_eq!(aside(&lab).len() as u64, round.min(2));
    }
    let mode = fs::metadata(lab.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

/// Each damage to a store of three hundred lives, done while nobody has it open, and while the writer has.
#[test]
fn a_damaged_file_never_stops_the_recorder() {
    type Damage = fn(&fs::File, u64);
    let damages: [(&str, Damage); 6] = [
        ("empty", |file, _| file.set_len(0).unwrap()),
        ("half", |file, length| file.set_len(length / 2).unwrap()),
        ("a torn page", |file, length| file.set_len(length / 2 + 1000).unwrap()),
        ("noise for a header", |file, _| file.write_all_at(&noise(100), 0).unwrap()),
        ("noise behind the first page", |file, length| file.write_all_at(&noise(length as usize), 4096).unwrap()),
        ("noise everywhere", |file, length| file.write_all_at(&noise(length as usize), 0).unwrap()),
    ];
    for (name, damage) in damages {
        for while_open in [false, true] {
            let lab = Lab::new();
            let mut run = lab.begin(0);
            for n in 1..=300 {
                run.opened(&server(n));
            }
            run.is_ok();
            let mut run = if while_open {
                run
            } else {
                run.crash();
                lab.begin(301 * SECOND)
            };
            run.flush();
            let file = fs::File::options().write(true).open(lab.path()).unwrap();
            damage(&file, file.metadata().unwrap().len());
            if !while_open {
                run.crash();
                run = lab.begin(302 * SECOND);
            }
            for n in 401..=420 {
                run.opened(&server(n)).flush();
                run.closed((n + 1) * SECOND, &server(n)).flush();
            }
            let health = run.is_ok();
            // What was in the writer's memory may have healed the file; else it is aside.
            assert!(health.note.is_some() || lab.lives(500 * SECOND).len() >= 20, "{name}: {health:?}");
            run.opened(&server(900));
            run.is_ok();
            let Lives { lives, .. } =
                lab.reader(901 * SECOND).lives(&everything(), lab.utc(900 * SECOND), lab.utc(901 * SECOND), 1).unwrap();
            assert_eq!(lives.len(), 1, "{name}");
            run.stop(902 * SECOND);
        }
    }
}

#[test]
fn a_schema_that_was_tampered_with_is_damage() {
    let lab = Lab::new();
    lab.begin(0).stop(SECOND);
    Connection::open(lab.path())
        .unwrap()
        .execute_batch("DROP TABLE kill; DROP TABLE conflict; DROP TABLE life")
        .unwrap();
    let mut run = lab.begin(2 * SECOND);
    run.opened(&server(3));
    assert!(run.is_ok().note.unwrap().contains("no such table: life"));
    check(&lab.story(4 * SECOND), "8000 server opened 3, open, 1s\n");
}

#[test]
fn what_is_not_ours_is_left_alone() {
    let lab = Lab::new();
    for (sql, want) in [
        ("CREATE TABLE music (title TEXT)", "it is another program's database; move it away"),
        (
            "PRAGMA user_version = 99; PRAGMA application_id = 0x70776869",
            "it is written by a newer portwatch; move it away",
        ),
    ] {
        let _ = fs::remove_file(lab.path());
        Connection::open(lab.path()).unwrap().execute_batch(sql).unwrap();
        let before = fs::read(lab.path()).unwrap();
        let mut run = lab.begin(0);
        run.opened(&server(1));
        let health = run.flush();
        assert_eq!(health.state, State::Unavailable);
        assert!(health.reason.as_ref().unwrap().contains(want), "{health:?}");
        run.crash();
        // SQLite notes in the header that it is in WAL mode now, at most.
        let after = fs::read(lab.path()).unwrap();
        assert_eq!(after[100..], before[100..], "{want}");
        assert!(aside(&lab).is_empty());
    }
}

#[test]
fn recording_begins_once_there_is_a_directory() {
    let lab = Lab::new();
    let directory = lab.directory.path().join("a/b");
    let mut recorder = Recorder::begin(&directory.join("history.db"), lab.retention, lab.session("", 0));
    let mut tell = |n| {
        recorder.change(&Change::Opened { at: n * SECOND, listener: server(n) }, &lab.clock(n * SECOND));
        recorder.flush();
        recorder.health()
    };
    let health = tell(1);
    assert_eq!(health.state, State::Unavailable);
    let reason = health.reason.unwrap();
    assert!(reason.starts_with("cannot open history ") && reason.contains("No such file"), "{reason}");
    // The last part of the path it makes itself.
    fs::create_dir(lab.directory.path().join("a")).unwrap();
    let health = tell(2);
    assert_eq!((health.state, health.reason, health.dropped, health.lives), (State::Ok, None, 0, 2));
}

#[test]
fn a_file_that_was_removed_is_begun_anew() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    run.snapshot(SECOND, &[server(1)]).is_ok();
    fs::remove_file(lab.path()).unwrap();
    run.opened(&server(2)).is_ok();
    assert!(run.recorder.needs_snapshot());
    run.snapshot(3 * SECOND, &[server(1), server(2)]).is_ok();
    assert!(!run.recorder.needs_snapshot());
    let story = lab.story(4 * SECOND);
    check(&story, "8000 server opened 1, open, 3s\n8000 server opened 2, open, 2s\n");
}

/// Somebody else holds the write lock, and lets go.
#[test]
fn nothing_waits_while_the_store_cannot_be_written_and_what_is_lost_is_counted() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    run.snapshot(SECOND, &[server(1)]).is_ok();
    let mut other = Connection::open(lab.path()).unwrap();
    let lock = other.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).unwrap();
    let health = run.opened(&server(2)).flush();
    assert_eq!(health.state, State::Unavailable);
    assert!(health.reason.unwrap().contains("database is locked"));
    // Twice what queue and writer hold. Were it to wait for room, it would wait for ever.
    for n in 3..40_000 {
        run.opened(&server(n));
    }
    let dropped = run.recorder.health().dropped;
    assert!(dropped > 10_000, "{dropped}");
    assert!(!run.recorder.needs_snapshot());
    lock.rollback().unwrap();
    run.is_ok();
    assert!(run.recorder.needs_snapshot());
    let truth = [server(2), server(39_999)];
    run.snapshot(40_000 * SECOND, &truth).is_ok();
    let selector = everything();
    let now = lab.utc(40_000 * SECOND);
    let Lives { lives, .. } = lab.reader(40_000 * SECOND).lives(&selector, now + 1, now, 9).unwrap();
    let open: Vec<u64> = lives.iter().map(|life| life.socket.id.cookie).collect();
    assert_eq!(open, [2, 39_999]);
    assert!(!run.recorder.needs_snapshot());
}

/// As a reader does that was stopped in the midst of it.
#[test]
fn a_reader_that_never_ends_cannot_fill_the_disk() {
    let mut lab = Lab::new();
    lab.retention.bytes = Retention::MIN_BYTES;
    let mut run = lab.begin(0);
    run.opened(&server(1)).is_ok();
    let mut reader = Connection::open(lab.path()).unwrap();
    let reading = reader.transaction().unwrap();
    let count = |db: &Connection| db.query_row("SELECT count(*) FROM life", [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(count(&reading), 1);
    let mut n = 2;
    let blocked = loop {
        run.opened(&server(n)).closed((n + 1) * SECOND, &server(n));
        n += 1;
        let health = if n % 200 == 0 { run.flush() } else { run.recorder.health() };
        if health.state != State::Starting && !health.is_ok() {
            break health;
        }
        assert!(n < 100_000, "{health:?}");
    };
    assert!(blocked.reason.unwrap().contains("keeps its log from being shortened"));
    assert!(files::bytes(&lab.path()) + files::bytes(&files::log_of(&lab.path())) < 4 * Retention::MIN_BYTES);
    assert_eq!(count(&reading), 1);
    drop(reading);
    run.is_ok();
}
