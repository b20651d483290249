use std::sync::Arc;

use super::json::Ancestors;
use super::table::Detail;
use super::*;
use crate::engine::Roster;
use crate::model::{Ancestor, Attempt, Change, Holder, Listener, ProcessId, Protocol};

const SECOND: u64 = 1_000_000_000;
const HOUR: u64 = 3_600 * SECOND;
const NOW: u64 = 100 * HOUR;
/// Escape, a line end, a carriage return and a right-to-left override.
const HOSTILE: &str = "a\u{1b}[2Jb\nc\rd\u{202e}e";

fn users(uid: u32) -> Option<String> {
    match uid {
        0 => Some("root".to_owned()),
        1000 => Some("al".to_owned()),
        _ => None,
    }
}

pub(crate) fn view() -> View<'static> {
    let now_wall = "2026-01-01T12:00:00.5Z".parse().unwrap();
    let tz = TimeZone::fixed(jiff::tz::offset(1));
    let clock = Clock { now_boot_ns: NOW, now_wall, tz };
    View { clock, users: &users, euid: 0, width: None, colours: false }
}

fn holder(pid: u32, started: u64, uid: u32, command: &[&str]) -> Holder {
    let id = ProcessId { pid, start: NOW - started };
    let name = command[0].rsplit('/').next().unwrap();
    let process = Process {
        ppid: 1,
        uid: Some(uid),
        command: command.iter().map(|&arg| arg.to_owned()).collect(),
        exe: Some(format!("/usr/bin/{name}")),
        cwd: Some("/srv".to_owned()),
        cgroup: Some("/system.slice/web.service".to_owned()),
        ..Process::bare(id, name)
    };
    Holder { process: Arc::new(process), fds: vec![3, 5], binder: true }
}

fn web() -> Listener {
    let python = holder(999, 3 * HOUR, 1000, &["python3", "-m", "http.server"]);
    Listener { socket: Socket::example("127.0.0.1", 8000), since: Some(NOW - 90 * SECOND), holders: vec![python] }
}

/// A master with eight workers; the workers have no row of their own but in the wide table.
fn gunicorn() -> Listener {
    let command = ["/opt/app/bin/gunicorn", "--workers", "8", "--bind", "[::]:80", "app:application"];
    let mut holders = vec![holder(50, 48 * HOUR, 0, &command)];
    holders.extend((51..59).map(|pid| Holder { binder: false, ..holder(pid, 47 * HOUR, 33, &command) }));
    Listener { socket: Socket { mptcp: true, ..Socket::example("::", 80) }, since: None, holders }
}

fn ghost() -> Listener {
    let socket = Socket { proto: Protocol::Udp, uid: 33, ..Socket::example("0.0.0.0", 5353) };
    Listener { socket, since: None, holders: Vec::new() }
}

fn hostile() -> Listener {
    let mut holder = holder(666, 5 * SECOND, 1000, &["x", HOSTILE, "\u{9b}31m\u{200b}\u{7f}é"]);
    Arc::get_mut(&mut holder.process).unwrap().name = HOSTILE.to_owned();
    Arc::get_mut(&mut holder.process).unwrap().cwd = Some(format!("/tmp/{HOSTILE}"));
    Listener { socket: Socket::example("127.0.0.1", 9000), since: None, holders: vec![holder] }
}

#[track_caller]
fn check(got: &str, want: &str) {
    assert_eq!(got, want, "\n--- got:\n{got}\n--- want:\n{want}");
}

#[test]
fn a_pipe_gets_whole_commands() {
    check(
        &table::table(&[gunicorn(), ghost(), web()], Detail::Listeners, &view()),
        "\
PROTO      ADDRESS    PORT  PID    USER  NAME      AGE  COMMAND
tcp/mptcp  ::           80  50 +8  root  gunicorn   2d  /opt/app/bin/gunicorn --workers 8 --bind [::]:80 app:application
udp        0.0.0.0    5353  -      33    -           ?  ghost: no visible holder
tcp        127.0.0.1  8000  999    al    python3    1m  python3 -m http.server
",
    );
}

#[test]
fn a_terminal_gets_rows_that_fit() {
    let at = |width| View { width: Some(width), ..view() };
    check(
        &table::table(&[gunicorn(), web()], Detail::Listeners, &at(80)),
        "\
PROTO      ADDRESS    PORT  PID    USER  NAME      AGE  COMMAND
tcp/mptcp  ::           80  50 +8  root  gunicorn   2d  /opt/app/bin/gunicorn -…
tcp        127.0.0.1  8000  999    al    python3    1m  python3 -m http.server
",
    );
    check(
        &table::table(&[web()], Detail::Listeners, &at(40)),
        "\
PROTO  ADDRESS    PORT  PID  USER  NAME
tcp    127.0.0.1  8000  999  al    pyth…
",
    );
    for width in 0..200 {
        let table = table::table(&[gunicorn(), ghost(), hostile(), web()], Detail::Listeners, &at(width));
        for line in table.lines() {
            assert!(super::width(line) <= width, "{width}: {line}");
        }
    }
}

#[test]
fn wide_shows_every_holder_and_several_namespaces_their_number() {
    let mut few = gunicorn();
    few.holders.truncate(3);
    // The binder comes first although another has a lower pid.
    few.holders[0].binder = false;
    few.holders[1].binder = true;
    few.socket.netns = 4_026_531_833;
    check(
        &table::table(&[few, web()], Detail::Holders, &view()),
        "\
PROTO      ADDRESS    PORT  NETNS       PID  USER  NAME      AGE  COMMAND
tcp/mptcp  ::           80  4026531833  51   33    gunicorn   1d  /opt/app/bin/gunicorn --workers 8 --bind [::]:80 app:application
tcp/mptcp  ::           80  4026531833  50   root  gunicorn   1d  /opt/app/bin/gunicorn --workers 8 --bind [::]:80 app:application
tcp/mptcp  ::           80  4026531833  52   33    gunicorn   1d  /opt/app/bin/gunicorn --workers 8 --bind [::]:80 app:application
tcp        127.0.0.1  8000  1           999  al    python3    1m  python3 -m http.server
",
    );
}

#[test]
fn a_ghost_is_explained_to_the_one_who_looks() {
    for (euid, uid, want) in [
        (0, 1000, "ghost: no visible holder"),
        (1000, 1000, "ghost: no visible holder"),
        (1000, 0, "held by uid 0 (root), not visible to you; try sudo"),
        (1000, 33, "held by uid 33, not visible to you; try sudo"),
    ] {
        assert_eq!(View { euid, ..view() }.ghost(&Socket { uid, ..Socket::example("::", 1) }), want);
    }
}

#[test]
fn colours_surround_cells_and_never_change_the_layout() {
    let plain = table::table(&[ghost(), web()], Detail::Listeners, &view());
    let colours = table::table(&[ghost(), web()], Detail::Listeners, &View { colours: true, ..view() });
    assert!(colours.contains("\u{1b}[33mghost: no visible holder\u{1b}[0m\n"), "{colours}");
    assert_eq!(anstream::adapter::strip_str(&colours).to_string(), plain);
}

#[test]
fn a_process_cannot_draw_on_the_terminal() {
    check(
        &table::table(&[hostile()], Detail::Listeners, &view()),
        "\
PROTO  ADDRESS    PORT  PID  USER  NAME                      AGE  COMMAND
tcp    127.0.0.1  9000  666  al    a\\x1b[2Jb\\nc\\rd\\u{202e}e   5s  x a\\x1b[2Jb\\nc\\rd\\u{202e}e \\x9b31m\\u{200b}\\x7fé
",
    );
    let who = text::who(&hostile(), &Ancestors::from([(666, vec![ancestor(1, HOSTILE)])]), &Roster::default(), &view());
    let change = text::change(&Change::Opened { at: NOW, listener: hostile() }, &view());
    let lines = [json::line(&json::listener(&hostile(), &view())), who, change].join("\n");
    assert_eq!(lines.chars().find(|&c| c != '\n' && is_hazard(c)), None, "{lines}");
}

#[test]
fn json_escapes_what_a_terminal_obeys_and_reads_back_the_same() {
    let text = format!("{HOSTILE} \u{9b}\u{7f}\u{e0041} é \"\\");
    let line = json::line(&text);
    assert_eq!(line, r#""a\u001b[2Jb\nc\rd\u202ee \u009b\u007f\udb40\udc41 é \"\\""#);
    assert_eq!(serde_json::from_str::<String>(&line).unwrap(), text);
}

fn ancestor(pid: u32, name: &str) -> Ancestor {
    Ancestor { pid, name: name.to_owned() }
}

const WEB_JSON: &str = r#"{"proto":"tcp","mptcp":false,"family":"ipv4","address":"127.0.0.1","port":8000,"netns":1,"inode":99,"uid":1000,"user":"al","since":"2026-01-01T11:58:30.500Z","ghost":false,"v6only":null,"backlog":null,"holders":[{"pid":999,"name":"python3","command":["python3","-m","http.server"],"exe":"/usr/bin/python3","cwd":"/srv","uid":1000,"user":"al","ppid":1,"started":"2026-01-01T09:00:00.500Z","fds":[3,5],"binder":true,"unit":"web.service","user_manager":null,"container":null}]}"#;

#[test]
fn list_json_is_the_contract() {
    let mut bare = ghost();
    bare.socket.id.inode = 0;
    let gone = Process::bare(ProcessId { pid: 5, start: 0 }, "gone");
    bare.holders.push(Holder { process: Arc::new(gone), fds: Vec::new(), binder: false });
    let rows = [web(), ghost(), bare];
    let view = view();
    let rows: Vec<_> = rows.iter().map(|row| json::listener(row, &view)).collect();
    let ghost = r#"{"proto":"udp","mptcp":false,"family":"ipv4","address":"0.0.0.0","port":5353,"netns":1,"inode":99,"uid":33,"user":null,"since":null,"ghost":true,"v6only":null,"backlog":null,"holders":[]}"#;
    let bare = r#"{"proto":"udp","mptcp":false,"family":"ipv4","address":"0.0.0.0","port":5353,"netns":1,"inode":null,"uid":33,"user":null,"since":null,"ghost":false,"v6only":null,"backlog":null,"holders":[{"pid":5,"name":"gone","command":[],"exe":null,"cwd":null,"uid":null,"user":null,"ppid":0,"started":null,"fds":[],"binder":false,"unit":null,"user_manager":null,"container":null}]}"#;
    check(&json::array(&rows), &format!("[\n{WEB_JSON},\n{ghost},\n{bare}\n]\n"));
    check(&json::array::<json::Listener<'_>>(&[]), "[]\n");
}

#[test]
fn who_json_adds_ancestors() {
    let row = web();
    let ancestors = Ancestors::from([(999, vec![ancestor(12, "bash"), ancestor(1, "systemd")])]);
    let got = json::line(&json::listener_with_ancestors(&row, &view(), &ancestors));
    let tail = r#""container":null,"ancestors":[{"pid":12,"name":"bash"},{"pid":1,"name":"systemd"}]}]}"#;
    check(&got, &WEB_JSON.replace(r#""container":null}]}"#, tail));
}

#[test]
fn who_shows_everything_once() {
    let mut row = gunicorn();
    row.holders.truncate(2);
    let worker = Arc::get_mut(&mut row.holders[1].process).unwrap();
    worker.uid = Some(0);
    row.socket.backlog = Some(128);
    row.socket.v6only = Some(true);
    let ancestors = Ancestors::from([
        (50, vec![ancestor(1, "systemd")]),
        (51, vec![ancestor(50, "gunicorn"), ancestor(1, "systemd")]),
    ]);
    check(
        &text::who(&row, &ancestors, &Roster::default(), &view()),
        "\
tcp/mptcp [::]:80
  binder    gunicorn (50)
  since     not observed
  user      al (1000)
  netns     1
  inode     99
  backlog   128
  v6only    yes
  gunicorn (50) binder
    user       root (0)
    command    /opt/app/bin/gunicorn --workers 8 --bind [::]:80 app:application
    exe        /usr/bin/gunicorn
    cwd        /srv
    unit       web.service
    container  -
    started    2025-12-30 13:00:00 (2d ago)
    fds        3, 5
    ancestors  systemd (1) → gunicorn (50)
  gunicorn (51) holder
    like       gunicorn (50)
    started    2025-12-30 14:00:00 (1d ago)
    fds        3, 5
    ancestors  systemd (1) → gunicorn (50) → gunicorn (51)
",
    );
    check(
        &text::who(&ghost(), &Ancestors::new(), &Roster::default(), &View { euid: 1000, ..view() }),
        "\
udp 0.0.0.0:5353
  holders   held by uid 33, not visible to you; try sudo
  since     not observed
  user      33
  netns     1
  inode     99
",
    );
}

fn changes() -> Vec<Change> {
    let node = holder(1234, SECOND, 1000, &["node", "server.js"]).process;
    let attempt = Attempt {
        proto: Protocol::Tcp,
        address: "127.0.0.1".parse().unwrap(),
        port: 8000,
        netns: 1,
        errno: 98,
        by: Arc::clone(&node),
    };
    let at = NOW - 500_000_000 + 123_000_000;
    vec![
        Change::Opened { at, listener: web() },
        Change::Closed { at, listener: Listener { since: Some(at - 3_210_000_000), ..web() }, by: None },
        Change::Closed { at, listener: Listener { since: None, ..web() }, by: Some(node) },
        Change::Closed { at, listener: ghost(), by: None },
        Change::Holders { at, listener: gunicorn() },
        Change::Holders { at, listener: ghost() },
        Change::Conflict { at, attempt: attempt.clone(), held_by: Some(web()) },
        Change::Conflict { at, attempt, held_by: None },
        Change::Resync { at, lost: 12 },
    ]
}

#[test]
fn watch_says_each_change_in_one_line() {
    let view = view();
    let lines: Vec<String> = changes().iter().map(|change| text::change(change, &view)).collect();
    check(
        &lines.join("\n"),
        "\
13:00:00.123 OPEN  tcp 127.0.0.1:8000 python3 (999) al python3 -m http.server
13:00:00.123 CLOSE tcp 127.0.0.1:8000 python3 (999) al lived 3.2s
13:00:00.123 CLOSE tcp 127.0.0.1:8000 node (1234) al
13:00:00.123 CLOSE udp 0.0.0.0:5353 uid 33
13:00:00.123 HOLDERS tcp/mptcp [::]:80 gunicorn (50), gunicorn (51), gunicorn (52), gunicorn (53) and 5 more
13:00:00.123 HOLDERS udp 0.0.0.0:5353 ghost: no visible holder
13:00:00.123 CONFLICT node (1234) wanted 127.0.0.1:8000, held by python3 (999)
13:00:00.123 CONFLICT node (1234) wanted 127.0.0.1:8000, held by nobody visible
13:00:00.123 RESYNC 12 events lost; table read anew",
    );
    let narrow = View { width: Some(40), ..view.clone() };
    assert_eq!(text::change(&changes()[0], &narrow), "13:00:00.123 OPEN  tcp 127.0.0.1:8000 p…");
    let colours = View { colours: true, ..view };
    for (change, plain) in changes().iter().zip(lines) {
        assert_eq!(anstream::adapter::strip_str(&text::change(change, &colours)).to_string(), plain);
    }
}

#[test]
fn watch_json_is_the_contract() {
    let view = view();
    let all = changes();
    let lines: Vec<String> = all.iter().map(|change| json::line(&json::change(change, &view))).collect();
    let time = r#"{"time":"2026-01-01T12:00:00.123Z""#;
    let python = r#"{"pid":999,"name":"python3","command":["python3","-m","http.server"],"exe":"/usr/bin/python3","cwd":"/srv","uid":1000,"user":"al","ppid":1,"started":"2026-01-01T09:00:00.500Z","unit":"web.service","user_manager":null,"container":null}"#;
    let node = r#"{"pid":1234,"name":"node","command":["node","server.js"],"exe":"/usr/bin/node","cwd":"/srv","uid":1000,"user":"al","ppid":1,"started":"2026-01-01T11:59:59.500Z","unit":"web.service","user_manager":null,"container":null}"#;
    let nobody = r#"{"proto":"tcp","mptcp":false,"family":"ipv4","address":"127.0.0.1","port":8000,"netns":1,"inode":null,"uid":null,"user":null,"since":null,"ghost":null,"v6only":null,"backlog":null,"holders":[]}"#;
    check(&lines[0], &format!(r#"{time},"event":"open","listener":{WEB_JSON},"process":{python},"errno":null}}"#));
    let unseen = WEB_JSON.replace(r#""2026-01-01T11:58:30.500Z""#, "null");
    check(&lines[2], &format!(r#"{time},"event":"close","listener":{unseen},"process":{node},"errno":null}}"#));
    check(&lines[6], &format!(r#"{time},"event":"conflict","listener":{WEB_JSON},"process":{node},"errno":98}}"#));
    check(&lines[7], &format!(r#"{time},"event":"conflict","listener":{nobody},"process":{node},"errno":98}}"#));
    check(&lines[8], &format!(r#"{time},"event":"resync","listener":null,"process":null,"errno":null,"lost":12}}"#));
    let events: Vec<&str> = all.iter().map(|change| json::change(change, &view).event).collect();
    let (close, holder, conflict) = ("close", "holder", "conflict");
    assert_eq!(events, ["open", close, close, close, holder, holder, conflict, conflict, "resync"]);
}

#[test]
fn times_are_short() {
    for (nanos, want_age, want_span) in [
        (0, "0s", "0µs"),
        (450_000, "0s", "450µs"),
        (12_999_999, "0s", "12ms"),
        (3_290_000_000, "3s", "3.2s"),
        (59 * SECOND, "59s", "59.0s"),
        (60 * SECOND, "1m", "1m"),
        (HOUR - 1, "59m", "59m"),
        (3 * HOUR, "3h", "3h"),
        (24 * HOUR, "1d", "1d"),
        (24 * 400 * HOUR, "400d", "400d"),
    ] {
        let time = Duration::from_nanos(nanos);
        assert_eq!((age(time).as_str(), span(time).as_str()), (want_age, want_span));
    }
    let clock = view().clock;
    assert_eq!(clock.age(NOW + SECOND), Duration::ZERO);
    assert_eq!(clock.utc(NOW + SECOND), "2026-01-01T12:00:01.500Z");
}

#[test]
fn a_cut_counts_columns() {
    for (text, columns, want) in [
        ("abc", 3, "abc"),
        ("abcd", 3, "ab…"),
        ("日本", 4, "日本"),
        ("日本語", 4, "日…"),
        ("éé", 2, "éé"),
        ("abc", 1, "…"),
        ("abc", 0, ""),
    ] {
        assert_eq!(cut(text, columns), want, "{text} {columns}");
    }
}
