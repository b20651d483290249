//! Lives, as `history` shows them: a table for people, objects for scripts.
//!
//! The clock of the view is [`crate::history::clock`]: the times of a life are UTC already.

use serde::Serialize;

use super::json::{self, Process};
use super::table::{lay_out, left, right};
use super::text::named;
use super::{View, YELLOW, command_line, cut, escape, span};
use crate::history::{Closer, Conflict, End, Ended, Kill, Life, Lived, Utc};
use crate::model::{NetnsId, Protocol};

/// Failed binds that the table names of one life.
const NAMED_CONFLICTS: usize = 3;

/// A life, as `history --json` shows it. Fields that `list --json` has too mean the same.
#[derive(Debug, Serialize)]
pub struct LifeOf<'a> {
    pub proto: Protocol,
    pub mptcp: bool,
    pub family: &'static str,
    pub address: std::net::IpAddr,
    pub port: u16,
    pub netns: NetnsId,
    pub inode: Option<u64>,
    pub uid: u32,
    pub user: Option<String>,
    /// When it opened; `null` where it was there before anybody looked.
    pub opened: Option<String>,
    /// When it opened or was first seen: never `null`.
    pub seen: String,
    /// When it closed; `null` where it is open, or nobody saw that.
    pub closed: Option<String>,
    /// `null`: open. Else `closed`, `exited`, `killed`, `lost`, `agent_stopped`, `reboot` or `unknown`.
    pub ended: Option<Ended>,
    /// When it ended or was found to be gone; for `agent_stopped` when it was last known to be open.
    pub until: Option<String>,
    /// From opening to close, or until now; `null` where one of them was not seen.
    pub lived_ms: Option<u64>,
    /// The binder.
    pub process: Option<Process<'a>>,
    pub closed_by: Option<&'a Closer>,
    pub conflicts: Vec<ConflictOf<'a>>,
    pub kills: Vec<KillOf<'a>>,
}

/// A process that wanted the port meanwhile.
#[derive(Debug, Serialize)]
pub struct ConflictOf<'a> {
    pub time: String,
    /// The latest of its tries.
    pub last: String,
    pub times: u64,
    pub errno: i32,
    pub process: Process<'a>,
}

/// A request to free the port, and who made it.
#[derive(Debug, Serialize)]
pub struct KillOf<'a> {
    pub time: String,
    pub uid: u32,
    pub user: Option<String>,
    pub pid: u32,
    pub name: &'a str,
    pub targets: &'a str,
    pub status: &'a str,
}

pub fn json<'a>(life: &'a Life, view: &View<'_>) -> LifeOf<'a> {
    let socket = &life.socket;
    let end = life.end.as_ref();
    let lived = match life.lived(view.clock.now_boot_ns) {
        Lived::Exactly(lived) => u64::try_from(lived.as_millis()).ok(),
        _ => None,
    };
    LifeOf {
        proto: socket.proto,
        mptcp: socket.mptcp,
        family: json::family(socket.address),
        address: socket.address,
        port: socket.port,
        netns: socket.netns,
        inode: Some(socket.id.inode).filter(|inode| *inode != 0),
        uid: socket.uid,
        user: (view.users)(socket.uid),
        opened: life.opened.map(|at| view.clock.utc(at)),
        seen: view.clock.utc(life.seen),
        closed: end.filter(|end| end.how.is_observed()).map(|end| view.clock.utc(end.at)),
        ended: end.map(|end| end.how),
        until: end.map(|end| view.clock.utc(end.at)),
        lived_ms: lived,
        process: life.binder.as_ref().map(|binder| json::process(binder, view)),
        closed_by: end.and_then(|end| end.by.as_ref()),
        conflicts: life.conflicts.iter().map(|conflict| conflict_json(conflict, view)).collect(),
        kills: life.kills.iter().map(|kill| kill_json(kill, view)).collect(),
    }
}

fn conflict_json<'a>(conflict: &'a Conflict, view: &View<'_>) -> ConflictOf<'a> {
    ConflictOf {
        time: view.clock.utc(conflict.first),
        last: view.clock.utc(conflict.last),
        times: conflict.times,
        errno: conflict.errno,
        process: json::process(&conflict.process, view),
    }
}

fn kill_json<'a>(kill: &'a Kill, view: &View<'_>) -> KillOf<'a> {
    KillOf {
        time: view.clock.utc(kill.at),
        uid: kill.by.uid,
        user: (view.users)(kill.by.uid),
        pid: kill.by.pid,
        name: &kill.by.name,
        targets: &kill.targets,
        status: &kill.status,
    }
}

/// The lives in the order given, below each who else wanted the port, and kills that did not clean it. No lives: nothing.
pub fn table(lives: &[Life], view: &View<'_>) -> String {
    let times = Times::of(lives, view);
    let columns = [
        left("OPENED"),
        right("LIVED"),
        left("ADDRESS"),
        right("PORT"),
        left("PID"),
        left("USER"),
        left("NAME"),
        left("ENDED"),
        left("COMMAND"),
    ];
    let rows: Vec<(bool, Vec<String>)> =
        lives.iter().map(|life| (life.binder.is_none(), row(life, &times, view))).collect();
    let table = if rows.is_empty() { String::new() } else { lay_out(&columns, &rows, view) };
    let mut lines = table.lines();
    let mut out = String::new();
    let mut push = |line: &str| {
        out.push_str(line);
        out.push('\n');
    };
    lines.next().into_iter().for_each(&mut push);
    for (life, line) in lives.iter().zip(lines) {
        push(line);
        for note in notes(life, &times, view) {
            let note = format!("  {note}");
            push(&view.paint(YELLOW, &cut(&note, view.width.unwrap_or(usize::MAX))));
        }
    }
    out
}

fn row(life: &Life, times: &Times, view: &View<'_>) -> Vec<String> {
    let socket = &life.socket;
    let opened = match life.opened {
        Some(opened) => times.text(opened, view),
        None => format!("before {}", times.text(life.seen, view)),
    };
    let lived = match life.lived(view.clock.now_boot_ns) {
        Lived::Exactly(lived) => span(lived),
        Lived::AtLeast(lived) => format!(">{}", span(lived)),
        Lived::AtMost(lived) => format!("<{}", span(lived)),
        Lived::Unknown => "?".to_owned(),
    };
    let mut row = vec![opened, lived, socket.address.to_string(), format!("{}/{}", socket.port, socket.proto)];
    match &life.binder {
        Some(binder) => row.extend([
            binder.id.pid.to_string(),
            binder.uid.map_or_else(|| "?".to_owned(), |uid| view.user(uid)),
            escape(&binder.name).into_owned(),
        ]),
        None => row.extend(["-".to_owned(), view.user(socket.uid), "-".to_owned()]),
    }
    row.push(ended(life, view));
    row.push(life.binder.as_ref().map_or_else(|| "ghost: no visible holder".to_owned(), command_line));
    row
}

fn ended(life: &Life, view: &View<'_>) -> String {
    match life.end.as_ref().map(|End { how, .. }| *how) {
        None => "open".to_owned(),
        Some(Ended::AgentStopped) => "agent stopped".to_owned(),
        Some(Ended::Killed) => match life.kills.last() {
            Some(Kill { by, .. }) if by.is_rule() => format!("killed by {}", escape(&by.name)),
            Some(kill) => format!("killed by {}", view.user(kill.by.uid)),
            None => "killed".to_owned(),
        },
        Some(how) => how.word().to_owned(),
    }
}

fn notes(life: &Life, times: &Times, view: &View<'_>) -> Vec<String> {
    let mut notes: Vec<(Utc, String)> = Vec::new();
    let hidden = life.conflicts.len().saturating_sub(NAMED_CONFLICTS);
    for Conflict { first, last, times: tries, process, .. } in &life.conflicts[hidden..] {
        let user = process.uid.map(|uid| format!(" {}", view.user(uid))).unwrap_or_default();
        let again = match tries {
            1 => String::new(),
            _ => format!(" {tries} times until {}", times.text(*last, view)),
        };
        let text = format!("{} {}{user} wanted it{again}", times.text(*first, view), named(process));
        notes.push((*first, text));
    }
    for Kill { at, by, targets, status } in life.kills.iter().filter(|kill| kill.status != "cleaned") {
        let who = match (escape(&by.name), by.is_rule()) {
            (name, true) => name.into_owned(),
            (name, false) => format!("{name} ({}) {}", by.pid, view.user(by.uid)),
        };
        let asked = format!("{} {who} asked to kill {}", times.text(*at, view), escape(targets));
        notes.push((*at, format!("{asked}: {}", escape(status))));
    }
    notes.sort_by_key(|(at, _)| *at);
    let more = (hidden > 0).then(|| format!("and {hidden} before, in --json"));
    more.into_iter().chain(notes.into_iter().map(|(_, text)| text)).collect()
}

/// Times of day, with the date where one of them is not of today.
struct Times(&'static str);

impl Times {
    fn of(lives: &[Life], view: &View<'_>) -> Times {
        let day = |at: Utc| view.clock.local(at, "%Y-%m-%d");
        let today = day(view.clock.now_boot_ns);
        Times(if lives.iter().all(|life| day(life.seen) == today) { "%H:%M:%S" } else { "%Y-%m-%d %H:%M:%S" })
    }

    fn text(&self, at: Utc, view: &View<'_>) -> String {
        view.clock.local(at, self.0)
    }
}

#[cfg(test)]
mod tests;
