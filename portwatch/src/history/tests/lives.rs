//! What becomes of listeners, as it is told afterwards.

use super::*;
use crate::kill::{Outcome, Status};
use crate::model::Attempt;

fn conflict(at: BootNs, by: Arc<Process>, held_by: &Listener) -> Change {
    let Socket { proto, address, port, netns, .. } = held_by.socket;
    let attempt = Attempt { proto, address, port, netns, errno: 98, by };
    Change::Conflict { at, attempt, held_by: Some(held_by.clone()) }
}

fn outcome(port: u16, status: Status, killed: &[u32]) -> Outcome {
    Outcome { killed: killed.to_vec(), ..Outcome::example(port, status) }
}

fn kill(run: &mut Run<'_>, at: BootNs, listeners: &[Listener], outcomes: &[Outcome]) {
    let by = Requester { uid: 1000, pid: 77, name: "bash".to_owned() };
    let killed = Killed { at, by, targets: "8000 9000".to_owned(), listeners, outcomes };
    run.recorder.killed(killed, &run.lab.clock(at));
}

#[test]
fn a_life_ends_by_a_close_or_by_an_exit() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    let (web, api) = (listener(8000, Some(SECOND), alive("web")), listener(9000, Some(2 * SECOND), gone(1, "api")));
    run.opened(&web).opened(&api).closed(4 * SECOND, &web).closed(7 * SECOND, &api);
    run.opened(&listener(8000, Some(8 * SECOND), alive("next")));
    let health = run.is_ok();
    assert_eq!((health.lives, health.dropped), (3, 0));
    let story = "\
8000 web opened 1, closed 4 by web, 3s
9000 api opened 2, exited 7 by api, 5s
8000 next opened 8, open, 2s
";
    check(&lab.story(10 * SECOND), story);
    run.stop(10 * SECOND);
    check(&lab.story(12 * SECOND), &story.replace("open, 2s", "agent_stopped 10, >2s"));
}

#[test]
fn everything_of_a_listener_is_kept() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    let process = Process {
        ppid: 7,
        command: ["/usr/bin/web".to_owned(), "--port=80".to_owned(), String::new()].into(),
        exe: Some("/usr/bin/web".to_owned()),
        cwd: Some("/srv".to_owned()),
        cgroup: Some("/system.slice/web.service".to_owned()),
        ..Process::clone(&gone(1, "web"))
    };
    let mut web = listener(80, Some(5 * SECOND), Arc::new(process.clone()));
    web.socket = Socket {
        id: SocketId { inode: u64::MAX, cookie: u64::MAX - 1 },
        proto: Protocol::Udp,
        mptcp: true,
        address: "::1".parse().unwrap(),
        v6only: Some(true),
        netns: u32::MAX,
        uid: u32::MAX - 1,
        backlog: Some(u32::MAX),
        ..web.socket
    };
    run.opened(&web).is_ok();
    let life = lab.lives(6 * SECOND).remove(0);
    assert_eq!(life.socket, web.socket);
    let start = ProcessId { start: lab.utc(7), ..process.id };
    assert_eq!(life.binder, Some(Process { id: start, ..process }));
    let json = serde_json::to_string(&life).unwrap();
    assert_eq!(serde_json::from_str::<Life>(&json).unwrap(), life);
}

#[test]
fn a_kill_is_credited_whether_its_close_comes_before_it_or_after() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    let (early, late) = (listener(8000, Some(SECOND), gone(1, "early")), listener(9000, Some(SECOND), gone(2, "late")));
    let (spared, own) = (listener(8001, Some(SECOND), gone(3, "spared")), listener(8002, Some(SECOND), alive("own")));
    run.opened(&early).opened(&late).opened(&spared).opened(&own);
    run.closed(3 * SECOND, &early);
    let pid = |listener: &Listener| listener.binder().unwrap().process.id.pid;
    let all = [early.clone(), late.clone(), spared.clone(), own.clone()];
    let outcomes = [
        outcome(8000, Status::Cleaned, &[pid(&early)]),
        outcome(9000, Status::Cleaned, &[pid(&late)]),
        outcome(8001, Status::Denied, &[]),
        outcome(8002, Status::Planned, &[]),
        outcome(8003, Status::Free, &[]),
    ];
    kill(&mut run, 2 * SECOND, &all, &outcomes);
    run.closed(4 * SECOND, &late).closed(5 * SECOND, &spared).is_ok();
    check(
        &lab.story(6 * SECOND),
        "\
8000 early opened 1, killed 3 by early, 2s; bash asked at 2: cleaned
9000 late opened 1, killed 4 by late, 3s; bash asked at 2: cleaned
8001 spared opened 1, exited 5 by spared, 4s; bash asked at 2: denied
8002 own opened 1, open, 5s
",
    );
    let kill = &lab.lives(6 * SECOND)[0].kills[0];
    assert_eq!((kill.by.uid, kill.by.pid, kill.targets.as_str()), (1000, 77, "8000 9000"));
}

#[test]
fn who_tries_again_and_again_takes_one_row() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    let web = listener(8000, Some(SECOND), alive("web"));
    run.opened(&web);
    for at in 2..7 {
        run.change(&conflict(at * SECOND, gone(1, "node"), &web));
    }
    run.change(&conflict(7 * SECOND, gone(2, "ruby"), &web)).is_ok();
    check(
        &lab.story(8 * SECOND),
        "8000 web opened 1, open, 7s; node wanted it 5x from 2 to 6; ruby wanted it 1x from 7 to 7\n",
    );
}

#[test]
fn what_a_resync_finds_gone_is_lost() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    let (web, api) = (listener(8000, Some(SECOND), alive("web")), listener(9000, Some(SECOND), alive("api")));
    run.opened(&web).opened(&api).change(&Change::Resync { at: 5 * SECOND, lost: 12 });
    run.closed(5 * SECOND, &web).closed(6 * SECOND, &api).is_ok();
    check(&lab.story(7 * SECOND), "8000 web opened 1, lost 5, <4s\n9000 api opened 1, closed 6 by api, 5s\n");
}

/// What is there at the start, and after a crash, a stop and a reboot.
#[test]
fn a_life_goes_on_over_restarts_of_the_agent() {
    let lab = Lab::new();
    let [web, api, old] = [8000, 9000, 7000].map(|port| listener(port, None, alive("server")));
    let mut run = lab.begin(0);
    assert!(run.recorder.needs_snapshot());
    run.snapshot(SECOND, &[web.clone(), old]);
    assert!(!run.recorder.needs_snapshot());
    run.opened(&Listener { since: Some(2 * SECOND), ..api.clone() });
    run.crash();
    // Nobody can know yet that it is gone.
    let before = "\
7000 server seen 1, open, >2s
8000 server seen 1, open, >2s
9000 server opened 2, open, 1s
";
    let sorted = |story: String| {
        let mut lines: Vec<&str> = story.lines().collect();
        lines.sort_unstable();
        lines.iter().map(|line| format!("{line}\n")).collect::<String>()
    };
    check(&sorted(lab.story(3 * SECOND)), before);

    let mut run = lab.begin(4 * SECOND);
    run.snapshot(4 * SECOND, &[web.clone(), api.clone()]).is_ok();
    run.stop(5 * SECOND);
    check(
        &sorted(lab.story(9 * SECOND)),
        "\
7000 server seen 1, unknown 4, ?
8000 server seen 1, agent_stopped 5, >4s
9000 server opened 2, agent_stopped 5, >3s
",
    );

    let mut run = lab.begin(6 * SECOND);
    run.snapshot(6 * SECOND, std::slice::from_ref(&web)).is_ok();
    check(
        &sorted(lab.story(9 * SECOND)),
        "\
7000 server seen 1, unknown 4, ?
8000 server seen 1, open, >8s
9000 server opened 2, agent_stopped 5, >3s
",
    );
    run.crash();

    // Another host's time since boot, the same inode and cookie: another socket.
    let next =
        Lab { booted: lab.booted + SignedDuration::from_secs(60), directory: lab.directory, retention: lab.retention };
    let mut run = next.begin_after_boot("another", SECOND);
    run.snapshot(SECOND, &[Listener { since: Some(SECOND), ..web }]).is_ok();
    let lives = next.lives(2 * SECOND);
    let ends: Vec<_> = lives.iter().map(|life| life.end.as_ref().map(|end| end.how)).collect();
    // As read in the boot that this test runs in, the other one is over.
    assert_eq!(ends[..3].iter().filter(|&&end| end == Some(Ended::Reboot)).count(), 1, "{lives:?}");
    assert_eq!(lives.len(), 4);
    let rebooted = lives.iter().find(|life| life.socket.port == 8000).unwrap();
    assert_eq!(rebooted.end, Some(End { how: Ended::Reboot, at: next.utc(0), lived: None, by: None }));
}

#[test]
fn a_socket_is_known_by_cookie_then_by_inode() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    let with = |inode, cookie, mptcp| {
        let mut listener = listener(8000, None, alive("web"));
        (listener.socket.id, listener.socket.mptcp) = (SocketId { inode, cookie }, mptcp);
        listener
    };
    let count = |run: &mut Run<'_>| {
        run.is_ok();
        lab.lives(9 * SECOND).iter().filter(|life| life.end.is_none()).count()
    };
    for (inode, cookie, mptcp, want, why) in [
        (0, 10, false, 1, "the first"),
        (5, 10, false, 1, "its inode is learnt"),
        (5, 0, false, 1, "by inode alone"),
        (5, 11, false, 2, "the same inode, reused"),
        (6, 20, true, 3, "half of an MPTCP listener"),
        (6, 21, true, 3, "the other half"),
    ] {
        run.change(&Change::Holders { at: SECOND, listener: with(inode, cookie, mptcp) });
        assert_eq!(count(&mut run), want, "{why}");
    }
    // In a snapshot they are all that there is.
    run.snapshot(2 * SECOND, &[with(5, 10, false), with(6, 20, true)]);
    assert_eq!(count(&mut run), 2);
}

#[test]
fn the_same_socket_listens_again_elsewhere_or_later() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    let web = listener(8000, Some(SECOND), alive("web"));
    let again = Listener { since: Some(3 * SECOND), ..web.clone() };
    let mut moved = Listener { since: Some(5 * SECOND), ..web.clone() };
    moved.socket.port = 8001;
    // Told twice, and with a beginning that turned out to be earlier.
    let earlier = Listener { since: Some(SECOND / 2), ..web.clone() };
    run.opened(&web).opened(&web).change(&Change::Holders { at: 2 * SECOND, listener: earlier });
    run.opened(&again).opened(&moved).is_ok();
    check(
        &lab.story(6 * SECOND),
        "\
8000 web opened 1, lost 3, <2s
8000 web opened 3, lost 5, <2s
8001 web opened 5, open, 1s
",
    );
}

#[test]
fn an_exec_changes_the_command_and_the_binder_stays_when_it_is_gone() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    let mut web = listener(8000, Some(SECOND), alive("sh"));
    run.opened(&web);
    web.holders[0].process = alive("server");
    run.change(&Change::Holders { at: 2 * SECOND, listener: web.clone() });
    // It forked, and only the child is left.
    web.holders[0].process = gone(5, "worker");
    run.change(&Change::Holders { at: 3 * SECOND, listener: web.clone() });
    // What is learnt of a process that has gone is less than what is known.
    web.holders[0].process = Arc::new(Process::bare(alive("server").id, "exiting"));
    run.change(&Change::Holders { at: 4 * SECOND, listener: web.clone() });
    let mut ghost = listener(8001, Some(SECOND), alive("x"));
    ghost.holders.clear();
    run.opened(&ghost);
    ghost.holders = web.holders;
    run.change(&Change::Holders { at: 4 * SECOND, listener: ghost }).is_ok();
    check(&lab.story(5 * SECOND), "8000 server opened 1, open, 4s\n8001 exiting opened 1, open, 4s\n");
}

#[test]
fn a_close_alone_tells_the_whole_life() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    run.closed(4 * SECOND, &listener(8000, Some(SECOND), alive("web")));
    run.closed(5 * SECOND, &listener(8001, None, alive("old"))).is_ok();
    check(&lab.story(6 * SECOND), "8000 web opened 1, closed 4 by web, 3s\n8001 old seen 5, closed 5 by old, >0s\n");
}

#[test]
fn hostile_strings_are_bounded_and_kept_as_they_are() {
    let lab = Lab::new();
    let mut run = lab.begin(0);
    let names = ["'); DROP TABLE life; --", "a\0b", "\u{1b}[2J\u{202e}", "\u{fffd}", "é".repeat(1 << 16).leak()];
    for (port, name) in (8000..).zip(names) {
        let process = Process {
            command: [name.to_owned(), "x".repeat(1 << 20)].into(),
            exe: Some(name.to_owned()),
            cwd: Some(name.to_owned()),
            cgroup: Some(name.to_owned()),
            ..Process::clone(&gone(1, name))
        };
        let web = listener(port, Some(u64::from(port)), Arc::new(process.clone()));
        run.opened(&web).change(&conflict(SECOND, Arc::new(process), &web)).closed(2 * SECOND, &web);
        run.is_ok();
    }
    let lives = lab.lives(3 * SECOND);
    assert_eq!(lives.len(), names.len());
    for (life, name) in lives.iter().zip(names) {
        for process in [life.binder.as_ref().unwrap(), &life.conflicts[0].process] {
            let texts = [Some(&process.name), process.exe.as_ref(), process.cwd.as_ref(), process.command.first()];
            for text in texts.map(Option::unwrap) {
                let whole = text == name || (text.ends_with('…') && name.starts_with(text.trim_end_matches('…')));
                assert!(whole && text.len() <= 4100, "{} bytes", text.len());
            }
            let command: usize = process.command.iter().map(String::len).sum();
            assert!(command <= 4200, "{command}");
        }
    }
}
