//! Scripts of events, one a line, against the whole of what they change and leave, as text.
//!
//! ```text
//! open 10 c1 i5 tcp 127.0.0.1:80 by 7        time, cookie, inode, endpoint; then mptcp, v6only, dual, ns 2, backlog 9
//! close 20 c1 i5 by 7
//! fork 15 7 8 | exec 16 7 name | exit 17 7 | refuse 18 tcp 0.0.0.0:80 by 9 | unsure 19
//! snap 30 complete 1 lost 2                  rows follow, one a line
//!   c1 i5 tcp 127.0.0.1:80 by 7:3,4 8
//! ```
//!
//! Process N starts at tick N; `N~` names it as a source does that knows the start in ns.

mod history;
mod holders;
mod snapshots;
mod sockets;

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use super::Table;
use crate::model::{
    Attempt, Change, Event, Holder, Listener, Process, ProcessId, Protocol, Snapshot, Socket, SocketId,
};

/// Applies `script` and compares all that comes out (changes at once, then what the table has) with `expect`.
#[track_caller]
fn check(script: &str, expect: &str) {
    let mut table = Table::new();
    let mut got = String::new();
    for event in parse(script) {
        for change in table.apply(event) {
            writeln!(got, "{}", render(&change)).expect("a String takes all");
        }
        table.rows.assert_consistent();
    }
    got.push_str(&render_table(&table));
    let expect: String =
        expect.lines().map(str::trim).filter(|line| !line.is_empty()).map(|l| format!("{l}\n")).collect();
    assert!(got == expect, "script:{script}\ngot:\n{got}\nexpected:\n{expect}");
}

fn render_table(table: &Table) -> String {
    let mut out = String::from(if table.is_stale() { "= stale\n" } else { "=\n" });
    for listener in table.listeners() {
        writeln!(out, "{}", render_listener(listener)).expect("a String takes all");
    }
    out
}

fn render(change: &Change) -> String {
    let by = |by: &Option<Arc<Process>>| by.as_ref().map_or("?".to_owned(), |by| by.id.pid.to_string());
    match change {
        Change::Opened { at, listener } => format!("{at} opened {}", render_listener(listener)),
        Change::Closed { at, listener, by: closer } => {
            format!("{at} closed {} by {}", render_listener(listener), by(closer))
        }
        Change::Holders { at, listener } => format!("{at} holders {}", render_listener(listener)),
        Change::Conflict { at, attempt, held_by } => {
            let held_by = held_by.as_ref().map_or("?".to_owned(), render_listener);
            let Attempt { proto, address, port, by, .. } = attempt;
            format!("{at} conflict {proto} {} by {}: {held_by}", SocketAddr::new(*address, *port), by.id.pid)
        }
        Change::Resync { at, lost } => format!("{at} resync lost {lost}"),
    }
}

/// `i5 tcp 127.0.0.1:80 since 10 by 7*:3,4 8`: `*` is the binder, `ghost` nobody.
fn render_listener(listener: &Listener) -> String {
    let socket = &listener.socket;
    let mut out = format!("i{} {} {}", socket.id.inode, socket.proto, socket.endpoint());
    for (flag, on) in [("mptcp", socket.mptcp), ("v6only", socket.v6only == Some(true))] {
        if on {
            write!(out, " {flag}").expect("a String takes all");
        }
    }
    if let Some(backlog) = socket.backlog {
        write!(out, " backlog {backlog}").expect("a String takes all");
    }
    if socket.netns != 1 {
        write!(out, " ns {}", socket.netns).expect("a String takes all");
    }
    if let Some(since) = listener.since {
        write!(out, " since {since}").expect("a String takes all");
    }
    out.push_str(if listener.is_ghost() { " ghost" } else { " by" });
    for Holder { process, fds, binder } in &listener.holders {
        let name = if process.name.starts_with('p') { "" } else { &process.name };
        write!(out, " {}{name}{}", process.id.pid, if *binder { "*" } else { "" }).expect("a String takes all");
        if !fds.is_empty() {
            let fds: Vec<String> = fds.iter().map(u32::to_string).collect();
            write!(out, ":{}", fds.join(",")).expect("a String takes all");
        }
    }
    out
}

fn parse(script: &str) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = || number(words[1]);
        events.push(match words[0] {
            "open" => Event::Opened { at: at(), socket: socket(&words), by: process(after(&words, "by").expect("by")) },
            "close" => Event::Closed { at: at(), id: socket_id(&words), by: after(&words, "by").map(process) },
            "fork" => Event::Forked { at: at(), parent: process(words[2]).id, child: process(words[3]) },
            "exec" => {
                let id = process(words[2]).id;
                Event::Execed { at: at(), process: Arc::new(Process::bare(id, words[3])) }
            }
            "exit" => Event::Exited { at: at(), id: process(words[2]).id },
            "refuse" => {
                let Socket { proto, address, port, netns, .. } = socket(&words);
                let by = process(after(&words, "by").expect("by"));
                Event::Refused { at: at(), attempt: Attempt { proto, address, port, netns, errno: 98, by } }
            }
            "unsure" => Event::Unsure { at: at() },
            "snap" => {
                let complete = after(&words, "complete").unwrap_or("1").split(',').map(|n| number(n) as u32).collect();
                let lost = after(&words, "lost").map_or(0, number);
                Event::Snapshot(Snapshot { at: at(), listeners: Vec::new(), complete, lost })
            }
            _ => {
                let Some(Event::Snapshot(snapshot)) = events.last_mut() else { panic!("no event: {line}") };
                snapshot.listeners.push(listener(&words));
                continue;
            }
        });
    }
    events
}

fn listener(words: &[&str]) -> Listener {
    let by = words.iter().position(|&word| word == "by").map_or(words.len(), |by| by + 1);
    let holders = words[by..].iter().enumerate().map(|(index, word)| {
        let (pid, fds) = word.split_once(':').unwrap_or((word, ""));
        let fds = fds.split(',').filter(|fd| !fd.is_empty()).map(|fd| number(fd) as u32).collect();
        Holder { process: process(pid), fds, binder: index == 0 }
    });
    Listener { socket: socket(words), since: after(words, "since").map(number), holders: holders.collect() }
}

fn socket(words: &[&str]) -> Socket {
    let proto = words.iter().position(|&word| word == "tcp" || word == "udp").expect("tcp or udp");
    let endpoint: SocketAddr = words[proto + 1].parse().expect("an endpoint");
    let flag = |flag| words.contains(&flag);
    Socket {
        id: socket_id(words),
        proto: if words[proto] == "tcp" { Protocol::Tcp } else { Protocol::Udp },
        mptcp: flag("mptcp"),
        address: endpoint.ip(),
        port: endpoint.port(),
        v6only: flag("v6only").then_some(true).or(flag("dual").then_some(false)),
        netns: after(words, "ns").map_or(1, |n| number(n) as u32),
        uid: 0,
        backlog: after(words, "backlog").map(|n| number(n) as u32),
    }
}

fn socket_id(words: &[&str]) -> SocketId {
    let find = |letter| words.iter().find_map(|word| word.strip_prefix(letter)?.parse().ok()).unwrap_or(0);
    SocketId { inode: find('i'), cookie: find('c') }
}

/// `7`; `7~` for the same process with a start that is exact to the ns; `7~~` for another in the same tick.
fn process(word: &str) -> Arc<Process> {
    let pid = number(word.trim_end_matches('~'));
    let start = pid * ProcessId::TICK_NS + 1234 * word.matches('~').count() as u64;
    Arc::new(Process::bare(ProcessId { pid: pid as u32, start }, format!("p{pid}")))
}

fn after<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words.iter().position(|&word| word == name).and_then(|at| words.get(at + 1)).copied()
}

fn number(word: &str) -> u64 {
    word.parse().unwrap_or_else(|_| panic!("not a number: {word}"))
}
