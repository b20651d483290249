use std::time::Duration;

use jiff::tz::TimeZone;

use super::*;
use crate::history::{Requester, clock};
use crate::model::{Process as Proc, ProcessId, Socket};

const SECOND: u64 = 1_000_000_000;
const MINUTE: u64 = 60 * SECOND;

fn users(uid: u32) -> Option<String> {
    (uid == 1000).then(|| "al".to_owned())
}

/// At noon of the first day of 2026, one hour further east.
fn view() -> View<'static> {
    let clock = clock("2026-01-01T12:00:00Z".parse().unwrap(), TimeZone::fixed(jiff::tz::offset(1)));
    View { clock, users: &users, euid: 0, width: None, colours: false }
}

fn ago(time: u64) -> Utc {
    view().clock.now_boot_ns - time
}

fn process(pid: u32, command: &[&str]) -> Proc {
    Proc {
        ppid: 1,
        uid: Some(1000),
        command: command.iter().map(|&argument| argument.to_owned()).collect(),
        exe: Some("/usr/bin/x".to_owned()),
        cgroup: Some("/system.slice/web.service".to_owned()),
        ..Proc::bare(ProcessId { pid, start: ago(3600 * SECOND) }, command[0])
    }
}

fn life(opened: Option<u64>, end: Option<(Ended, u64)>) -> Life {
    let socket = Socket { uid: 33, ..Socket::example("127.0.0.1", 8000) };
    let by = Some(Closer { pid: 999, name: "python3".to_owned() });
    let end = end.map(|(how, time)| End { how, at: ago(time), lived: None, by });
    Life {
        socket,
        binder: Some(process(999, &["python3", "-m", "http.server"])),
        seen: ago(opened.unwrap_or(30 * MINUTE)),
        opened: opened.map(ago),
        end,
        conflicts: Vec::new(),
        kills: Vec::new(),
    }
}

fn lives() -> Vec<Life> {
    let conflict = |pid, first, times| Conflict {
        first: ago(first),
        last: ago(first - SECOND),
        times,
        errno: 98,
        process: process(pid, &["node"]),
    };
    let kill = |status: &str, at| Kill {
        at: ago(at),
        by: Requester { uid: 1000, pid: 77, name: "bash".to_owned() },
        targets: "8000".to_owned(),
        status: status.to_owned(),
    };
    let mut fought = life(Some(20 * MINUTE), Some((Ended::Killed, 10 * MINUTE)));
    fought.conflicts = (1..=5).map(|n| conflict(n, 20 * MINUTE - u64::from(n) * MINUTE, u64::from(n))).collect();
    fought.kills = vec![kill("denied", 12 * MINUTE), kill("cleaned", 10 * MINUTE)];
    let exact = End { lived: Some(Duration::from_micros(450)), ..life(None, Some((Ended::Exited, 0))).end.unwrap() };
    let ghost = Life { binder: None, ..life(Some(MINUTE), None) };
    vec![
        life(None, Some((Ended::Lost, 25 * MINUTE))),
        life(None, Some((Ended::AgentStopped, 24 * MINUTE))),
        life(Some(23 * MINUTE), Some((Ended::Reboot, 21 * MINUTE))),
        fought,
        Life { end: Some(exact), ..life(Some(2 * SECOND), None) },
        ghost,
    ]
}

#[track_caller]
fn check(got: &str, want: &str) {
    assert_eq!(got, want, "\n--- got:\n{got}\n--- want:\n{want}");
}

#[test]
fn a_row_says_what_is_known_and_how_well() {
    check(
        &table(&lives(), &view()),
        "\
OPENED           LIVED  ADDRESS        PORT  PID  USER  NAME     ENDED          COMMAND
before 12:30:00      ?  127.0.0.1  8000/tcp  999  al    python3  lost           python3 -m http.server
before 12:30:00    >6m  127.0.0.1  8000/tcp  999  al    python3  agent stopped  python3 -m http.server
12:37:00           <2m  127.0.0.1  8000/tcp  999  al    python3  reboot         python3 -m http.server
12:40:00           10m  127.0.0.1  8000/tcp  999  al    python3  killed by al   python3 -m http.server
  and 2 before, in --json
  12:43:00 node (3) al wanted it 3 times until 12:43:01
  12:44:00 node (4) al wanted it 4 times until 12:44:01
  12:45:00 node (5) al wanted it 5 times until 12:45:01
  12:48:00 bash (77) al asked to kill 8000: denied
12:59:58         450µs  127.0.0.1  8000/tcp  999  al    python3  exited         python3 -m http.server
12:59:00            1m  127.0.0.1  8000/tcp  -    33    -        open           ghost: no visible holder
",
    );
    let mut old = life(Some(48 * 60 * MINUTE), None);
    old.conflicts = vec![lives()[3].conflicts[0].clone()];
    check(
        &table(&[old], &view()),
        "\
OPENED               LIVED  ADDRESS        PORT  PID  USER  NAME     ENDED  COMMAND
2025-12-30 13:00:00     2d  127.0.0.1  8000/tcp  999  al    python3  open   python3 -m http.server
  2026-01-01 12:41:00 node (1) al wanted it
",
    );
    assert_eq!(table(&[], &view()), "");
}

#[test]
fn no_line_is_wider_than_the_terminal() {
    for width in 0..140 {
        let narrow = table(&lives(), &View { width: Some(width), ..view() });
        assert!(narrow.lines().all(|line| crate::render::width(line) <= width), "{width}\n{narrow}");
        let colours = table(&lives(), &View { width: Some(width), colours: true, ..view() });
        assert_eq!(anstream::adapter::strip_str(&colours).to_string(), narrow, "{width}");
    }
}

#[test]
fn json_says_null_for_what_nobody_saw() {
    let lives = lives();
    let line = |index: usize| json::line(&json(&lives[index], &view()));
    let process = r#"{"pid":999,"name":"python3","command":["python3","-m","http.server"],"exe":"/usr/bin/x","cwd":null,"uid":1000,"user":"al","ppid":1,"started":"2026-01-01T11:00:00.000Z","unit":"web.service","user_manager":null,"container":null}"#;
    let socket = r#""proto":"tcp","mptcp":false,"family":"ipv4","address":"127.0.0.1","port":8000,"netns":1,"inode":99,"uid":33,"user":null"#;
    let by = r#""closed_by":{"pid":999,"name":"python3"}"#;
    check(
        &line(0),
        &format!(
            r#"{{{socket},"opened":null,"seen":"2026-01-01T11:30:00.000Z","closed":null,"ended":"lost","until":"2026-01-01T11:35:00.000Z","lived_ms":null,"process":{process},{by},"conflicts":[],"kills":[]}}"#
        ),
    );
    let times = r#""opened":"2026-01-01T11:40:00.000Z","seen":"2026-01-01T11:40:00.000Z","closed":"2026-01-01T11:50:00.000Z","ended":"killed","until":"2026-01-01T11:50:00.000Z","lived_ms":600000"#;
    let fought = line(3);
    assert!(fought.starts_with(&format!(r#"{{{socket},{times},"process":{process},{by},"conflicts":[{{"time":"2026-01-01T11:41:00.000Z","last":"2026-01-01T11:41:01.000Z","times":1,"errno":98,"process":{{"pid":1,"#)), "{fought}");
    let kills = r#""kills":[{"time":"2026-01-01T11:48:00.000Z","uid":1000,"user":"al","pid":77,"name":"bash","targets":"8000","status":"denied"},{"#;
    assert!(fought.contains(kills), "{fought}");
    let open = line(5);
    assert!(
        open.contains(r#""closed":null,"ended":null,"until":null,"lived_ms":60000,"process":null,"closed_by":null,"#),
        "{open}"
    );
}
