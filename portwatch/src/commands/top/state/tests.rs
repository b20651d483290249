use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use portwatch::kill::{Group, Victim};
use portwatch::model::{Holder, Process, ProcessId};
use portwatch::render::Clock;

use super::*;

const HOUR: u64 = 3_600 * SECOND;
pub(in super::super) const NOW: u64 = 100 * HOUR;

fn users(uid: u32) -> Option<String> {
    ["root", "al"].get(uid as usize).map(|&name| name.to_owned())
}

/// So many seconds after the beginning.
pub(in super::super) fn view(seconds: u64) -> View<'static> {
    let clock = Clock { now_boot_ns: NOW + seconds * SECOND, now_wall: Timestamp::UNIX_EPOCH, tz: TimeZone::UTC };
    View { clock, users: &users, euid: 0, width: None, colours: false }
}

/// A server that began so many seconds ago. Its socket is known by its port.
pub(in super::super) fn server(port: u16, age: u64, uid: u32, command: &str) -> Listener {
    let command: Vec<String> = command.split(' ').map(str::to_owned).collect();
    let id = ProcessId { pid: u32::from(port) * 2, start: NOW - age * SECOND };
    let process = Process { uid: Some(uid), command: command.clone().into(), ..Process::bare(id, &command[0]) };
    let socket = Socket {
        id: SocketId { inode: port.into(), cookie: 0 },
        proto: Protocol::Tcp,
        mptcp: false,
        address: [127, 0, 0, 1].into(),
        port,
        v6only: None,
        netns: 1,
        uid,
        backlog: None,
    };
    Listener { socket, since: None, holders: vec![Holder { process: Arc::new(process), fds: vec![3], binder: true }] }
}

/// Three servers: 80, 3000 and 8000.
pub(in super::super) fn three() -> State {
    let mut state = State::new(Sort::Port, None);
    let listeners = [
        server(3000, 30, 1, "node app.js"),
        server(80, 2 * 86_400, 0, "nginx"),
        server(8000, 300, 1, "Python3 -m http"),
    ];
    state.refill(listeners.iter(), &view(0));
    state.arrange(10, NOW);
    state
}

/// Presses keys, each a character: ⏎ Enter, ⎋ Escape, ⌫ Backspace, ↓ ↑ arrows, ⇟ PgDn, ⇱ ⇲ Home and End, ␡ Delete,
/// ⌃ Ctrl with the next one. What the last one meant.
pub(in super::super) fn press(state: &mut State, keys: &str) -> Action {
    let mut last = Action::Nothing;
    let mut modifiers = KeyModifiers::NONE;
    for c in keys.chars() {
        let code = match c {
            '⌃' => {
                modifiers = KeyModifiers::CONTROL;
                continue;
            }
            '⏎' => KeyCode::Enter,
            '⎋' => KeyCode::Esc,
            '⌫' => KeyCode::Backspace,
            '↓' => KeyCode::Down,
            '↑' => KeyCode::Up,
            '⇟' => KeyCode::PageDown,
            '⇱' => KeyCode::Home,
            '⇲' => KeyCode::End,
            '␡' => KeyCode::Delete,
            c => KeyCode::Char(c),
        };
        last = state.key(KeyEvent::new(code, std::mem::replace(&mut modifiers, KeyModifiers::NONE)), NOW);
        state.arrange(state.page, NOW);
    }
    last
}

fn opened(port: u16) -> Change {
    Change::Opened { at: NOW, listener: server(port, 0, 1, "sh") }
}

fn closed(port: u16) -> Change {
    Change::Closed { at: NOW, listener: server(port, 0, 1, "sh"), by: None }
}

/// Ports in the order of their rows: the selected one in brackets, those that have just opened or closed with + or -.
#[track_caller]
fn check(state: &mut State, expected: &str) {
    state.arrange(state.page, NOW);
    let selected = state.place().0;
    let rows = state.shown().enumerate().map(|(index, row)| {
        let mark = match (row.opened, row.closed) {
            (_, Some(_)) => "-",
            (Some(_), None) => "+",
            (None, None) => "",
        };
        let port = format!("{}{mark}", row.listener.socket.port);
        if index == selected { format!("[{port}]") } else { port }
    });
    assert_eq!(rows.collect::<Vec<_>>().join(" "), expected);
}

fn apply(state: &mut State, change: Change, seconds: u64) {
    state.apply(&change, true, &view(seconds));
}

fn planned() -> Planned {
    let listener = server(80, 0, 0, "nginx");
    let victim = Victim {
        process: Arc::clone(&listener.holders[0].process),
        inodes: vec![80],
        groups: vec![0],
        leaders: Vec::new(),
        kin: None,
        supervisor: None,
    };
    let (sockets, addresses) = (vec![listener.socket.id], vec![listener.socket.address]);
    let group = Group { port: 80, proto: Protocol::Tcp, netns: 1, sockets, addresses, others: Vec::new() };
    let plan = Plan { groups: vec![group], victims: vec![victim], listeners: vec![listener], ..Plan::default() };
    Planned { plan, concerns: Vec::new(), note: None, is_seen: false }
}

/// A plan that has come, and is on the screen where `is_seen`.
pub(in super::super) fn asked(is_seen: bool) -> State {
    let mut state = three();
    press(&mut state, "x");
    assert_eq!(state.planned(planned()), Action::Nothing);
    if is_seen {
        state.was_drawn(1, 1);
    }
    state
}

#[test]
fn keys_move_sort_and_filter() {
    for (keys, expected) in [
        ("", "[80] 3000 8000"),
        ("j", "80 [3000] 8000"),
        ("↓↓↓", "80 3000 [8000]"),
        ("⇲k", "80 [3000] 8000"),
        ("⇟", "80 3000 [8000]"),
        ("⇲⇱", "[80] 3000 8000"),
        // The selection stays with the listener.
        ("r", "8000 3000 [80]"),
        ("s", "3000 8000 [80]"),
        ("ss", "[80] 3000 8000"),
        ("ssr", "8000 3000 [80]"),
        ("sss", "3000 8000 [80]"),
        ("sssss", "[80] 3000 8000"),
        ("/node", "[3000]"),
        ("/PYTHON", "[8000]"),
        ("/root", "[80]"),
        ("/00", "[3000] 8000"),
        ("/nobody", ""),
        // While it is typed, letters are letters, and arrows move.
        ("/al↓", "3000 [8000]"),
        ("/nodex⌫⏎", "[3000]"),
        ("/node⎋", "80 [3000] 8000"),
        ("/node⏎⎋", "80 [3000] 8000"),
        ("/node⌃u", "80 [3000] 8000"),
        ("/⌫j", "80 [3000] 8000"),
    ] {
        let mut state = three();
        press(&mut state, keys);
        eprintln!("{keys}");
        check(&mut state, expected);
    }
}

#[test]
fn the_selection_follows_its_listener_and_then_its_place() {
    let mut state = three();
    press(&mut state, "j");
    apply(&mut state, opened(22), 0);
    check(&mut state, "22+ 80 [3000] 8000");
    apply(&mut state, closed(3000), 0);
    check(&mut state, "22+ 80 [3000-] 8000");
    state.tick(NOW + LINGERING);
    check(&mut state, "22 80 [8000]");
    apply(&mut state, closed(8000), 3);
    state.tick(NOW + 5 * SECOND);
    check(&mut state, "22 [80]");
}

#[test]
fn changes_may_come_twice_or_for_others() {
    let mut state = three();
    apply(&mut state, opened(3000), 0);
    check(&mut state, "[80] 3000+ 8000");
    apply(&mut state, closed(9), 0);
    state.apply(&opened(10), false, &view(0));
    check(&mut state, "[80] 3000+ 8000");
    // What has another holder now may be one that was not asked for.
    state.apply(&Change::Holders { at: NOW, listener: server(3000, 0, 1, "sh") }, false, &view(0));
    check(&mut state, "[80] 8000");
    // It lived for less than a frame, and is seen all the same.
    apply(&mut state, opened(9000), 0);
    apply(&mut state, closed(9000), 0);
    check(&mut state, "[80] 8000 9000-");
    assert_eq!(state.counts(), (2, 0));
    apply(&mut state, Change::Resync { at: NOW, lost: 7 }, 0);
    assert!(state.message().is_some_and(|line| line.contains("RESYNC 7 events lost")), "{:?}", state.message());
}

#[test]
fn a_long_table_scrolls_as_far_as_the_selection_needs() {
    let mut state = State::new(Sort::Port, None);
    let listeners: Vec<Listener> = (1..=20).map(|port| server(port, 0, 0, "sh")).collect();
    state.refill(listeners.iter(), &view(0));
    state.arrange(5, NOW);
    for (keys, expected) in [
        ("jjjj", (4, 0)),
        ("j", (5, 1)),
        ("⇟", (10, 6)),
        ("kkkk", (6, 6)),
        ("k", (5, 5)),
        ("⇲", (19, 15)),
        ("⇱", (0, 0)),
    ] {
        press(&mut state, keys);
        assert_eq!(state.place(), expected, "{keys}");
    }
    press(&mut state, "⇲");
    state.arrange(8, NOW);
    assert_eq!(state.place(), (19, 12), "a larger screen is filled");
}

#[test]
fn a_kill_is_agreed_to_once_it_has_been_seen_and_by_y_alone() {
    let plan = |force| Action::Plan { socket: server(80, 0, 0, "").socket, force };
    for (keys, force) in [("x", false), ("␡", false), ("X", true), ("⏎x", false), ("iX", true)] {
        assert_eq!(press(&mut three(), keys), plan(force), "{keys}");
    }
    for (is_seen, keys, expected) in [
        (true, "y", Action::Agree),
        (true, "jky", Action::Agree),
        (true, "n", Action::Decline),
        (true, "⎋", Action::Decline),
        (true, "⏎", Action::Decline),
        (true, "x", Action::Decline),
        (true, "q", Action::Decline),
        (false, "y", Action::Nothing),
        (false, "n", Action::Decline),
    ] {
        assert_eq!(press(&mut asked(is_seen), keys), expected, "{is_seen} {keys}");
    }
    let mut before_the_plan = three();
    assert_eq!(press(&mut before_the_plan, "xy"), Action::Nothing);
    assert_eq!(press(&mut before_the_plan, "⎋"), Action::Decline);
    assert_eq!(before_the_plan.planned(planned()), Action::Decline, "it comes too late");
}

#[test]
fn while_a_kill_goes_on_there_is_no_second_one_and_leaving_takes_two_keys() {
    let mut state = asked(true);
    press(&mut state, "y");
    assert_eq!(press(&mut state, "x"), Action::Nothing);
    assert_eq!(press(&mut state, "q"), Action::Nothing);
    assert_eq!(press(&mut state, "q"), Action::Quit);
    assert_eq!(press(&mut asked(true), "⌃c"), Action::Quit);
    state.ended(&Err(anyhow::anyhow!("no\u{1b}")), NOW);
    assert!(matches!(&state.mode, Mode::Report(line) if line == "no\\x1b"), "{:?}", state.mode);
    assert_eq!(press(&mut state, "q"), Action::Nothing, "closes the report");
    assert_eq!(press(&mut state, "q"), Action::Quit);
}

#[test]
fn a_plan_that_signals_nobody_asks_nobody() {
    let mut state = three();
    press(&mut state, "x");
    let nobody = Planned { plan: Plan::default(), ..planned() };
    assert_eq!(state.planned(nobody), Action::Agree);
}

#[test]
fn what_has_closed_is_not_killed() {
    let mut state = three();
    apply(&mut state, closed(80), 0);
    assert_eq!(press(&mut state, "x"), Action::Nothing);
    assert_eq!(state.message(), Some("127.0.0.1:80/tcp has closed already"));
}

#[test]
fn details_follow_their_listener() {
    let mut state = three();
    assert_eq!(press(&mut state, "i"), Action::Explain(Box::new(server(80, 2 * 86_400, 0, "nginx"))));
    let changed = server(80, 0, 0, "other");
    let action = state.apply(&Change::Holders { at: NOW, listener: changed.clone() }, true, &view(0));
    assert_eq!(action, Action::Explain(Box::new(changed.clone())));
    assert!(matches!(&state.mode, Mode::Details { listener, .. } if *listener == changed));
    apply(&mut state, closed(80), 0);
    assert!(!state.is_open(&changed));
}

#[test]
fn it_wakes_only_for_what_time_changes() {
    let second = |seconds: u64| Some(NOW + seconds * SECOND);
    let alone = |age| {
        let mut state = State::new(Sort::Port, None);
        state.refill([server(1, age, 0, "sh")].iter(), &view(0));
        state.arrange(10, NOW);
        state
    };
    for (age, wake) in [(0, 1), (59, 1), (60, 60), (90, 30), (3_599, 1), (3_600, 3_600), (90_000, 82_800)] {
        assert_eq!(alone(age).next_wake(NOW), second(wake), "{age} s old");
    }
    assert_eq!(State::new(Sort::Port, None).next_wake(NOW), None);
    let mut state = alone(90_000);
    apply(&mut state, closed(1), 0);
    assert_eq!(state.next_wake(NOW), Some(NOW + LINGERING));
    state.tick(NOW + LINGERING);
    state.arrange(10, NOW);
    assert_eq!(state.next_wake(NOW), None, "nothing is left");
    state.say("x", NOW);
    assert_eq!(state.next_wake(NOW), Some(NOW + MESSAGE));
    state.tick(NOW + MESSAGE);
    assert_eq!((state.message(), state.next_wake(NOW)), (None, None));
}

#[test]
fn rows_appear_when_they_are_old_enough() {
    let mut state = State::new(Sort::Port, Some(Duration::from_secs(60)));
    state.refill([server(1, 50, 0, "sh"), server(2, 70, 0, "sh")].iter(), &view(0));
    check(&mut state, "[2]");
    state.arrange(10, NOW + 11 * SECOND);
    assert_eq!(state.shown().len(), 2);
}
