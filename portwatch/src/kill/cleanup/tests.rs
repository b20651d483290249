use super::*;
use crate::kill::outcome::{Failure, Status, Stopped};
use crate::model::{Holder, ProcessId};

fn leak(port: u16, pid: u32) -> Leak {
    let process = Arc::new(Process::bare(ProcessId { pid, start: 1 }, "x"));
    Leak {
        socket: Socket { netns: 0, ..Socket::example("127.0.0.1", port) },
        process: Some(process),
        ancestors: Vec::new(),
        lived: Some(Duration::from_secs(1)),
        ended: Ended::Alive,
        note: None,
    }
}

#[test]
fn what_became_of_a_leak_is_told_by_the_outcome_of_its_port() {
    let outcome = |status| Outcome { elapsed: Duration::from_secs(2), ..Outcome::example(80, status) };
    let cleaned = || outcome(Status::Cleaned);
    let failed = |reason: &str| vec![Failure { pid: 7, reason: reason.to_owned(), refused: true }];
    let stopped = Stopped::Container { container: "5eed".to_owned(), name: "web".to_owned() };
    for (outcome, ended, note, lived) in [
        (Outcome { killed: vec![7], ..cleaned() }, Ended::Terminated, None, 3),
        (Outcome { killed: vec![7], forced: vec![7], ..cleaned() }, Ended::Killed, None, 3),
        (Outcome { gone: vec![7], ..cleaned() }, Ended::Exited, None, 3),
        (Outcome { stopped: vec![stopped], ..cleaned() }, Ended::Stopped, Some("container web"), 3),
        (Outcome { failed: failed("not yours"), ..outcome(Status::Denied) }, Ended::Alive, Some("not yours"), 1),
        (cleaned(), Ended::Terminated, None, 3),
        // It let go of the port, and somebody else is the one who did not end.
        (
            Outcome { failed: vec![Failure { pid: 8, reason: "deaf".to_owned(), refused: false }], ..cleaned() },
            Ended::Terminated,
            None,
            3,
        ),
        (outcome(Status::Stuck), Ended::Alive, None, 1),
        (Outcome { port: 81, killed: vec![7], ..cleaned() }, Ended::Alive, None, 1),
    ] {
        let judged = leak(80, 7).judged(std::slice::from_ref(&outcome));
        assert_eq!((judged.ended, judged.note.as_deref()), (ended, note), "{outcome:?}");
        assert_eq!(judged.lived, Some(Duration::from_secs(lived)), "{outcome:?}");
    }
}

#[test]
fn what_became_of_a_starter_is_told_by_the_outcomes_of_all_ports() {
    let failed = vec![Failure { pid: 9, reason: "deaf".to_owned(), refused: false }];
    let outcomes = [
        Outcome { killed: vec![7, 8], forced: vec![8], ..Outcome::example(80, Status::Cleaned) },
        Outcome { gone: vec![6], failed, ..Outcome::example(81, Status::Cleaned) },
    ];
    for (pid, spared, ended, note) in [
        (6, None, Ended::Exited, None),
        (7, None, Ended::Terminated, None),
        (8, None, Ended::Killed, None),
        (9, None, Ended::Alive, Some("deaf")),
        (5, Some("a terminal"), Ended::Alive, Some("a terminal")),
    ] {
        let process = Arc::new(Process::bare(ProcessId { pid, start: 1 }, "sh"));
        let note_before = spared.map(str::to_owned);
        let restarter = Restarter { process, ports: Vec::new(), ended: Ended::Alive, note: note_before };
        let judged = restarter.judged(&outcomes);
        assert_eq!((judged.ended, judged.note.as_deref()), (ended, note), "{pid}");
        let cleaned = Cleaned { restarters: vec![judged], ..Cleaned::default() };
        assert_eq!(cleaned.is_clean(), ended != Ended::Alive, "{pid}");
    }
}

#[test]
fn what_is_still_there_did_not_end() {
    let mut cleaned = Cleaned { leaks: vec![leak(80, 7).judged(&[])], ..Cleaned::default() };
    cleaned.leaks[0].ended = Ended::Terminated;
    assert!(cleaned.is_clean() && cleaned.has_ended_any());
    let other = Socket { id: crate::model::SocketId { inode: 1, cookie: 2 }, ..Socket::example("::1", 80) };
    let listener = |socket| Listener { socket, since: None, holders: Vec::<Holder>::new() };
    cleaned.still_there(&[listener(other)]);
    assert!(cleaned.is_clean());
    cleaned.still_there(&[listener(leak(80, 7).socket)]);
    assert!(!cleaned.is_clean() && !cleaned.has_ended_any());
}
