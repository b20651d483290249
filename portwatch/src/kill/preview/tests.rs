use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::*;
use crate::kill::kin::Kin;
use crate::kill::plan::Refused;
use crate::model::{Holder, Listener, Process, ProcessId, Socket, SocketId};
use crate::render::{Clock, width};

const NOW: u64 = 100_000_000_000_000;

fn view(width: Option<usize>) -> View<'static> {
    let clock = Clock { now_boot_ns: NOW, now_wall: Timestamp::UNIX_EPOCH, tz: TimeZone::UTC };
    let users = &|uid| (uid == 1000).then(|| "al".to_owned());
    View { clock, users, euid: 0, width, colours: false }
}

fn process(pid: u32, name: &str, uid: u32, command: &[&str]) -> Arc<Process> {
    let id = ProcessId { pid, start: NOW - Duration::from_secs(u64::from(pid)).as_nanos() as u64 };
    let command = command.iter().map(|&argument| argument.to_owned()).collect();
    Arc::new(Process { uid: Some(uid), command, ..Process::bare(id, name) })
}

fn victim(process: Arc<Process>, inodes: &[u64]) -> Victim {
    Victim { inodes: inodes.to_vec(), ..Victim::new(&process, &|_| None) }
}

fn listener(address: &str, port: u16, inode: u64) -> Listener {
    let socket = Socket { id: SocketId { inode, cookie: 0 }, ..Socket::example(address, port) };
    Listener { socket, since: None, holders: Vec::new() }
}

/// A server with one address, one with four; a child, a mate and a starter without any.
fn plan() -> Plan {
    let relation = |relation| Some(Kin { relation, seen: 0 });
    let root = ProcessId { pid: 7, start: 0 };
    let child = Victim { kin: relation(Relation::Tree(root)), ..victim(process(8, "esbuild", 4321, &[]), &[]) };
    let group = Relation::Group { group: 7, anchor: root };
    let starter = Victim { kin: relation(Relation::Above(root)), ..victim(process(6, "sh", 1000, &[]), &[]) };
    let mate = Victim { kin: relation(group), ..victim(process(9, "tee", 1000, &["tee", "log"]), &[]) };
    Plan {
        listeners: vec![
            listener("127.0.0.1", 8000, 1),
            listener("::1", 8000, 2),
            listener("0.0.0.0", 80, 3),
            listener("10.0.0.1", 81, 4),
        ],
        victims: vec![
            victim(process(7, "python3", 1000, &["python3", "-m", "http.server"]), &[1]),
            victim(process(4000, "e\u{1b}[31mvil", 0, &["x\u{1b}]0;\u{7}\n"]), &[1, 2, 3, 4]),
            child,
            mate,
            starter,
        ],
        ..Plan::default()
    }
}

#[test]
fn the_plan_is_a_table_of_processes() {
    let expected = "\
 PID  NAME          USER  ADDRESS                          AGE  COMMAND
   7  python3       al    127.0.0.1:8000/tcp                7s  python3 -m http.server
4000  e\\x1b[31mvil  0     0.0.0.0:80/tcp,10.0.0.1:81/tcp +2   1h  x\\x1b]0;\\x07\\n
   8  esbuild       4321  (below 7)                         8s  [esbuild]
   9  tee           al    (group 7)                         9s  tee log
   6  sh            al    (above 7)                         6s  [sh]
";
    // Columns are as wide as their widest cell.
    let text = victims(&plan(), &view(None));
    let squeeze = |text: &str| -> Vec<Vec<String>> {
        text.lines().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
    };
    assert_eq!(squeeze(&text), squeeze(expected));
    let starts: Vec<usize> = ["COMMAND", "python3 -m", "x\\x1b", "[esbuild]", "tee log"]
        .iter()
        .zip(text.lines())
        .map(|(command, line)| line.rfind(command).unwrap())
        .collect();
    assert!(starts.iter().all(|start| *start == starts[0]), "{text}");
    assert_eq!(victims(&Plan::default(), &view(None)), "");
}

#[test]
fn rows_are_as_wide_as_the_terminal_at_most() {
    let mut plan = plan();
    plan.victims.push(victim(process(10, "node", 1000, &["node", &"世界".repeat(200)]), &[1]));
    for columns in [20, 60, 80, 200] {
        let text = victims(&plan, &view(Some(columns)));
        assert!(text.lines().all(|line| width(line) <= columns), "{columns}\n{text}");
    }
    assert!(victims(&plan, &view(None)).contains(&"世界".repeat(200)));
}

#[test]
fn who_is_spared_is_told_with_the_reason() {
    let refused = |pid, name| Refused {
        process: process(pid, name, 0, &[]),
        groups: vec![0],
        reason: "no".into(),
        denied: false,
    };
    let plan = Plan {
        refused: vec![refused(1, "init")],
        spared: vec![
            Spared::OwnGroup(77),
            Spared::Relative { process: process(5, "ba\u{7}sh", 0, &[]), reason: "its reason".into() },
            Spared::Starter { process: process(6, "ide", 0, &[]), groups: vec![0], reason: "a terminal".into() },
        ],
        ..Plan::default()
    };
    let expected = "\
not signalling init (1): no
not signalling ba\\x07sh (5): its reason
not signalling ide (6): a terminal
not signalling process group 77 but for the holders: portwatch is in it
";
    assert_eq!(refusals(&plan), expected);
}

#[test]
fn sockets_to_be_closed_are_told_with_those_who_live_on() {
    let held = |inode, pids: &[u32]| {
        let holder = |&pid: &u32| Holder { process: process(pid, "e\u{7}vil", 0, &[]), fds: Vec::new(), binder: false };
        Listener { holders: pids.iter().map(holder).collect(), ..listener("::1", 80, inode) }
    };
    let plan = Plan { listeners: vec![held(1, &[]), held(2, &[5]), held(3, &[5, 6])], ..Plan::default() };
    assert_eq!(closures(&plan), "");
    let expected = "\
to close: the socket [::1]:80/tcp, which no visible process holds
to close: the socket [::1]:80/tcp of e\\x07vil (5), which lives on
to close: the socket [::1]:80/tcp of e\\x07vil (5), e\\x07vil (6), which live on
";
    assert_eq!(closures(&plan.closing()), expected);
}

#[test]
fn the_question_names_every_reason() {
    for (concerns, expected) in [
        (vec![Concern::Unrelated(2)], "this would end 2 unrelated processes; go on?"),
        (vec![Concern::Starters(1)], "this would end a process that started others; go on?"),
        (vec![Concern::Starters(2)], "this would end 2 processes that started others; go on?"),
        (vec![Concern::OthersProcesses { uid: 1000, count: 1 }], "this would end a process of al; go on?"),
        (
            vec![
                Concern::Unrelated(3),
                Concern::OthersProcesses { uid: 33, count: 2 },
                Concern::Service("ss\u{1b}hd".into()),
            ],
            "this would end 3 unrelated processes; 2 processes of 33; ss\\x1bhd, a system service; go on?",
        ),
    ] {
        assert_eq!(question(&Plan::default(), &concerns, &view(None)), expected);
    }
    let closing = Plan::default().closing();
    let expected = "this would close sockets of 2 unrelated processes; go on?";
    assert_eq!(question(&closing, &[Concern::Unrelated(2)], &view(None)), expected);
}
