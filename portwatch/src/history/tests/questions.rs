//! Which lives a question picks, and how they are replayed.

use super::*;
use crate::model::Attempt;
use crate::render::{View, text};
use crate::select::Filters;
use globset::Glob;

/// Six lives, one a port, that end one second after the next begins; the last is open.
fn six(lab: &Lab) -> Run<'_> {
    let mut run = lab.begin(0);
    for (n, port) in (1..=6).zip([8000, 8001, 8002, 9000, 9001, 8000]) {
        let mut server = listener(port, Some(n * 10 * SECOND), gone(n as u32, &format!("server{n}")));
        server.socket.id.cookie = n;
        server.socket.proto = if n % 2 == 0 { Protocol::Udp } else { Protocol::Tcp };
        if n == 3 {
            server.socket.address = "::".parse().unwrap();
            let process = Process::clone(&server.holders[0].process);
            let cwd = Some("/srv/web".to_owned());
            server.holders[0].process = Arc::new(Process { uid: Some(33), cwd, ..process });
        }
        run.opened(&server);
        if n < 6 {
            run.closed((n * 10 + 11) * SECOND, &server);
        }
    }
    run.is_ok();
    run
}

fn picks(lab: &Lab, selector: &Selector, from: BootNs, limit: usize) -> (String, bool) {
    let now = 100 * SECOND;
    let Lives { lives, more } = lab.reader(now).lives(selector, lab.utc(from), lab.utc(now), limit).unwrap();
    let names: Vec<String> = lives.into_iter().map(|life| life.binder.unwrap().name.replace("server", "")).collect();
    (names.join(" "), more)
}

#[test]
fn a_question_picks_by_port_time_and_selector() {
    let lab = Lab::new();
    let _run = six(&lab);
    let glob = |glob: &str| vec![Glob::new(glob).unwrap().compile_matcher()];
    let filter = |filters: Filters| Selector::new(Vec::new(), filters);
    for (selector, from, limit, want) in [
        (everything(), 0, 100, "1 2 3 4 5 6"),
        (on(&["8000"]), 0, 100, "1 6"),
        (on(&["8000-8002"]), 0, 100, "1 2 3 6"),
        (on(&["8001/udp", "9000/tcp", "9001"]), 0, 100, "2 5"),
        (on(&["[::1]:8002"]), 0, 100, "3"),
        (on(&["127.0.0.1:8002"]), 0, 100, "3"),
        (on(&["8003"]), 0, 100, ""),
        (on(&["1-65535"]), 0, 100, "1 2 3 4 5 6"),
        // Whatever was open at that time or later.
        (everything(), 31, 100, "2 3 4 5 6"),
        (everything(), 42, 100, "4 5 6"),
        (everything(), 62, 100, "6"),
        (everything(), 99, 100, "6"),
        (everything(), 0, 2, "5 6 …"),
        (everything(), 0, 6, "1 2 3 4 5 6"),
        (on(&["8000"]), 0, 1, "6 …"),
        (everything(), 0, 0, " …"),
        (filter(Filters { udp: true, ..Filters::default() }), 0, 100, "2 4 6"),
        (filter(Filters { ipv6: true, ..Filters::default() }), 0, 100, "3"),
        (filter(Filters { uids: vec![33], ..Filters::default() }), 0, 100, "3"),
        (filter(Filters { cwds: glob("/srv/*"), ..Filters::default() }), 0, 100, "3"),
        (filter(Filters { commands: glob("server[45]"), ..Filters::default() }), 0, 100, "4 5"),
        (filter(Filters { addresses: vec!["::".parse().unwrap()], ..Filters::default() }), 0, 100, "3"),
        (filter(Filters { netns: Some(2), ..Filters::default() }), 0, 100, ""),
        // It lived for 40 s by now, the others for 11 s.
        (filter(Filters { older_than: Some(Duration::from_secs(12)), ..Filters::default() }), 0, 100, "6"),
    ] {
        let (names, more) = picks(&lab, &selector, from * SECOND, limit);
        assert_eq!(names + if more { " …" } else { "" }, want, "{:?} since {from}", selector.targets());
    }
    let many: Vec<String> = (9000..9100).map(|port| port.to_string()).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(picks(&lab, &on(&many), 0, 100).0, "4 5");
}

#[test]
fn what_happened_is_replayed_as_watch_would_have_shown_it() {
    let lab = Lab::new();
    let mut run = six(&lab);
    let there = listener(7000, None, alive("old"));
    run.snapshot(70 * SECOND, std::slice::from_ref(&there));
    let Socket { proto, address, port, netns, .. } = there.socket;
    let attempt = Attempt { proto, address, port, netns, errno: 98, by: gone(9, "node") };
    run.change(&Change::Conflict { at: 71 * SECOND, attempt: attempt.clone(), held_by: Some(there.clone()) });
    run.change(&Change::Conflict { at: 72 * SECOND, attempt: Attempt { port: 1, ..attempt }, held_by: None });
    run.closed(73 * SECOND, &there).is_ok();
    let all = everything();
    let changes = lab.reader(80 * SECOND).since(lab.utc(50 * SECOND), 100, &all).unwrap();
    let (now_wall, users) = (lab.clock(80 * SECOND).now_wall, |_| None);
    let view = View { clock: clock(now_wall, TimeZone::UTC), users: &users, euid: 0, width: None, colours: false };
    let time = |at: u64| view.clock.wall(lab.utc(at * SECOND)).strftime("%H:%M:%S%.3f").to_string();
    let own = std::process::id();
    let (five, six, nine) = ((1 << 22) + 5, (1 << 22) + 6, (1 << 22) + 9);
    let lines: Vec<String> = changes.iter().map(|change| text::change(change, &view)).collect();
    let want = [
        format!("{} OPEN  tcp 127.0.0.1:9001 server5 ({five}) 1000 server5", time(50)),
        format!("{} CLOSE udp 127.0.0.1:9000 server4 ({}) 1000 lived 11.0s", time(51), (1 << 22) + 4),
        format!("{} OPEN  udp 127.0.0.1:8000 server6 ({six}) 1000 server6", time(60)),
        format!("{} CLOSE tcp 127.0.0.1:9001 server5 ({five}) 1000 lived 11.0s", time(61)),
        // Not in the snapshot.
        format!("{} CLOSE udp 127.0.0.1:8000 server6 ({six}) 1000 lived 10.0s", time(70)),
        format!("{} CONFLICT node ({nine}) wanted 127.0.0.1:7000, held by old ({own})", time(71)),
        format!("{} CONFLICT node ({nine}) wanted 127.0.0.1:1, held by nobody visible", time(72)),
        format!("{} CLOSE tcp 127.0.0.1:7000 old ({own}) 1000", time(73)),
    ];
    check(&lines.join("\n"), &want.join("\n"));
    let latest = lab.reader(80 * SECOND).since(lab.utc(50 * SECOND), 3, &all).unwrap();
    assert_eq!(latest, changes[5..]);
    assert_eq!(lab.reader(80 * SECOND).since(lab.utc(74 * SECOND), 100, &all).unwrap(), []);
    // However much happened on others.
    let of_one = |targets: &[&str]| lab.reader(80 * SECOND).since(lab.utc(50 * SECOND), 2, &on(targets)).unwrap();
    assert_eq!(of_one(&["9001/tcp"]), [changes[0].clone(), changes[3].clone()]);
    assert_eq!(of_one(&["7000"]), [changes[5].clone(), changes[7].clone()]);
    assert_eq!(of_one(&["9001/udp"]), []);
}

#[test]
fn a_store_that_cannot_be_read_is_told_by_its_cause() {
    let lab = Lab::new();
    let open = || Reader::open(&lab.path(), &lab.clock(SECOND)).unwrap_err();
    let kind = |error: &anyhow::Error| error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    assert_eq!(kind(&open()), Some(std::io::ErrorKind::NotFound));
    std::fs::write(lab.path(), "").unwrap();
    assert!(open().to_string().ends_with("the agent has not written to it yet"), "{:#}", open());
    std::fs::write(lab.path(), "not a database, but long enough to be none; not a database, but long enough").unwrap();
    let want = "history.db: file is not a database; the agent sets a damaged file aside when it starts";
    assert!(format!("{:#}", open()).ends_with(want), "{:#}", open());
}
