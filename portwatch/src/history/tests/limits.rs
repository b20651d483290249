//! How much is kept, and how fast it is found.

use std::time::Instant;

use rusqlite::Connection;

use super::*;

/// Lives of one hour each, one after the other, the last of which ended just now.
fn fill(lab: &Lab, count: u64) -> Run<'_> {
    let mut run = lab.begin(0);
    for n in 0..count {
        let ago = (count - n) * 3600 * SECOND;
        // Long before this boot.
        let booted = lab.booted - SignedDuration::from_nanos(ago.cast_signed());
        let clock = |at| Clock { now_wall: booted + SignedDuration::from_nanos(at), ..lab.clock(at.cast_unsigned()) };
        let mut web = listener(8000, Some(SECOND), gone(1, "web"));
        web.socket.id = SocketId { inode: n + 1, cookie: n + 1 };
        run.recorder.change(&Change::Opened { at: SECOND, listener: web.clone() }, &clock(SECOND.cast_signed()));
        let at = 3600 * SECOND;
        run.recorder.change(&Change::Closed { at, listener: web, by: None }, &clock(at.cast_signed()));
    }
    run
}

#[test]
fn what_ended_long_ago_is_forgotten() {
    let mut lab = Lab::new();
    lab.retention.age = Duration::from_hours(24);
    let mut run = fill(&lab, 48);
    let old = Listener { since: Some(1), ..listener(9000, None, alive("old")) };
    run.opened(&old).is_ok();
    let lives = lab.lives(0);
    // Between the last record and the clean-up, an hour may end.
    assert!((24..=26).contains(&lives.len()), "{}", lives.len());
    let oldest = utc(Timestamp::now()) - 24 * 3600 * SECOND;
    assert!(lives.iter().all(|life| life.end.as_ref().is_none_or(|end| end.at >= oldest)));
    assert_eq!(lives.iter().filter(|life| life.end.is_none()).count(), 1, "what is open is kept");
    assert_eq!(run.recorder.health().lives, lives.len() as u64);
}

#[test]
fn the_oldest_goes_when_there_is_no_room() {
    let mut lab = Lab::new();
    lab.retention.bytes = Retention::MIN_BYTES;
    let mut run = lab.begin(0);
    let long = "x".repeat(3000);
    let mut most = 0;
    let open = listener(9000, Some(1), alive("open"));
    run.opened(&open);
    for n in 1..=3000 {
        let process = Process { command: [long.clone()].into(), ..Process::clone(&gone(1, "web")) };
        let mut web = listener(8000, Some(n * SECOND), Arc::new(process));
        web.socket.id = SocketId { inode: n, cookie: n };
        run.opened(&web).closed((n + 1) * SECOND, &web);
        if n % 100 == 0 {
            let health = run.is_ok();
            most = most.max(health.bytes);
            assert_eq!(health.dropped, 0);
        }
    }
    assert!(most <= Retention::MIN_BYTES + (256 << 10), "{most}");
    let lives = lab.lives(4000 * SECOND);
    assert!(lives.len() > 50, "{}", lives.len());
    assert_eq!(lives[0].socket.port, 9000, "what is open is kept");
    let kept: Vec<u64> = lives[1..].iter().map(|life| life.socket.id.cookie).collect();
    let latest: Vec<u64> = (3001 - kept.len() as u64..=3000).collect();
    assert_eq!(kept, latest);
    let db = Connection::open(lab.path()).unwrap();
    assert_eq!(db.pragma_query_value(None, "auto_vacuum", |row| row.get::<_, i64>(0)).unwrap(), 2);
    assert_eq!(db.query_row("PRAGMA integrity_check", [], |row| row.get::<_, String>(0)).unwrap(), "ok");
}

/// The times are told, not judged: this is an unoptimized build on a machine with other work.
#[test]
fn a_hundred_thousand_lives_are_asked_in_a_moment() {
    let lab = Lab::new();
    lab.begin(0).stop(SECOND);
    let db = Connection::open(lab.path()).unwrap();
    db.execute_batch(&format!(
        "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 100000)
         INSERT INTO life (session, proto, mptcp, address, port, netns, inode, cookie, uid, pid, ppid, euid, started, name,
           command, exe, cwd, cgroup, start, seen, opened, since, ended, until, lived)
         SELECT 1, 'tcp', 0, '127.0.0.1', 1024 + n % 60000, 1, n, n, 1000, n % 30000, 1, 1000, 0, 'python3',
           '[\"python3\",\"-m\",\"http.server\",\"8000\"]', '/usr/bin/python3', '/srv/www', '/system.slice/web.service', 1,
           {0} + n * 1000000, {0} + n * 1000000, n * 1000000, 'closed', {0} + n * 1000000 + 500000, 500000 FROM n",
        lab.utc(0)
    ))
    .unwrap();
    drop(db);
    let (clock, now) = (lab.clock(3600 * SECOND), lab.utc(3600 * SECOND));
    for (what, selector, from, limit, want) in [
        ("a port", on(&["8000"]), 0, 100, 2),
        ("a range", on(&["8000-8999"]), 0, 100, 100),
        ("a port in the last half", on(&["2024"]), now - 3550 * SECOND, 100, 1),
        ("the latest", everything(), 0, 100, 100),
        ("all", everything(), 0, usize::MAX, 100_000),
    ] {
        let begun = Instant::now();
        let Lives { lives, .. } =
            Reader::open(&lab.path(), &clock).unwrap().lives(&selector, from, now, limit).unwrap();
        println!("{what}: {} lives in {:?}", lives.len(), begun.elapsed());
        assert_eq!(lives.len(), want, "{what}");
    }
    let begun = Instant::now();
    let mut run = lab.begin(2 * SECOND);
    run.opened(&listener(8000, Some(3 * SECOND), alive("web"))).is_ok();
    println!("opened and one life added in {:?}", begun.elapsed());
    let (begun, batch) = (Instant::now(), 5000);
    for n in 0..batch {
        let mut web = listener(8000, Some(n), gone(1, "web"));
        web.socket.id.cookie = (1 << 40) + n;
        run.opened(&web).closed(n + 1, &web);
    }
    let told = begun.elapsed();
    let health = run.is_ok();
    println!("{batch} lives told in {told:?}, written in {:?}, {} dropped", begun.elapsed(), health.dropped);
}
