//! What the recorder hands to the writer: the parts of a change that are stored, on the clock they were told in.

use std::borrow::Cow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Ended, Utc, utc};
use crate::kill::{Outcome, Status};
use crate::model::{Attempt, BootNs, Change, Listener, Process, Socket, SocketId};
use crate::render::Clock;

/// Whoever asked portwatch to free a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requester {
    pub uid: u32,
    /// 0: no process but a rule of the agent.
    pub pid: u32,
    /// Of the process: hostile text. `rule NAME` of a rule.
    pub name: String,
}

impl Requester {
    /// A rule of the agent, which acts for the agent's own user.
    pub fn rule(name: &str) -> Requester {
        Requester { uid: nix::unistd::geteuid().as_raw(), pid: 0, name: format!("rule {name}") }
    }

    pub fn is_rule(&self) -> bool {
        self.pid == 0
    }
}

/// A kill that is over.
#[derive(Clone, Debug)]
pub struct Killed<'a> {
    /// When it was asked for.
    pub at: BootNs,
    pub by: Requester,
    /// The targets as typed.
    pub targets: String,
    /// What the plan was made from ([`crate::kill::Plan::listeners`]).
    pub listeners: &'a [Listener],
    pub outcomes: &'a [Outcome],
}

/// Something to be stored.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) at: BootNs,
    pub(super) wall: Wall,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    Opened(Row),
    Holders(Row),
    Closed { row: Row, by: Option<Arc<Process>>, how: Ended },
    Conflict { attempt: Attempt, held_by: Option<SocketId> },
    Killed { by: Requester, targets: String, ports: Vec<Freed> },
    Snapshot(Vec<Row>),
}

/// A listener without all but its binder.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) socket: Socket,
    pub(super) since: Option<BootNs>,
    pub(super) binder: Option<Arc<Process>>,
}

/// What became of one socket that was to be freed.
#[derive(Clone, Debug)]
pub(super) struct Freed {
    pub(super) socket: Socket,
    pub(super) status: Status,
    /// The processes that ended.
    pub(super) killed: Vec<u32>,
}

impl Row {
    pub(super) fn of(listener: &Listener) -> Row {
        Row {
            socket: listener.socket.clone(),
            since: listener.since,
            binder: listener.binder().map(|holder| Arc::clone(&holder.process)),
        }
    }
}

/// The difference between the clocks at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wall {
    /// When the host booted, by today's wall clock.
    epoch: i128,
}

impl Wall {
    pub(super) fn of(clock: &Clock) -> Wall {
        Wall { epoch: i128::from(utc(clock.now_wall)) - i128::from(clock.now_boot_ns) }
    }

    pub(super) fn utc(self, at: BootNs) -> Utc {
        Utc::try_from(self.epoch + i128::from(at)).unwrap_or(0)
    }
}

impl Record {
    /// `None`: nothing is stored of it.
    pub(super) fn of_change(change: &Change, resync: Option<BootNs>, wall: Wall) -> Option<Record> {
        let (at, what) = match change {
            Change::Opened { at, listener } => (at, What::Opened(Row::of(listener))),
            Change::Holders { at, listener } => (at, What::Holders(Row::of(listener))),
            Change::Closed { at, listener, by } => {
                // What a resync finds gone is told as of that very moment.
                let how = if resync == Some(*at) { Ended::Lost } else { Ended::Closed };
                (at, What::Closed { row: Row::of(listener), by: by.clone(), how })
            }
            Change::Conflict { at, attempt, held_by } => {
                let held_by = held_by.as_ref().map(|listener| listener.socket.id);
                (at, What::Conflict { attempt: attempt.clone(), held_by })
            }
            Change::Resync { .. } => return None,
        };
        Some(Record { at: *at, wall, what })
    }

    /// Ports that were free, and dry runs, are not stored.
    pub(super) fn of_kill(kill: Killed<'_>, wall: Wall) -> Record {
        let mut ports = Vec::new();
        for outcome in kill.outcomes.iter().filter(|o| !matches!(o.status, Status::Free | Status::Planned)) {
            let here =
                |listener: &&Listener| (listener.socket.port, listener.socket.proto) == (outcome.port, outcome.proto);
            ports.extend(kill.listeners.iter().filter(here).map(|listener| Freed {
                socket: listener.socket.clone(),
                status: outcome.status,
                killed: outcome.killed.clone(),
            }));
        }
        Record { at: kill.at, wall, what: What::Killed { by: kill.by, targets: kill.targets, ports } }
    }

    /// Bytes of text that the record keeps in memory; 0 for those whose text the table keeps as well.
    pub(super) fn text(&self) -> usize {
        let of = |process: &Option<Arc<Process>>| process.as_deref().map_or(0, text);
        match &self.what {
            What::Opened(row) | What::Holders(row) => of(&row.binder),
            What::Closed { row, by, .. } => of(&row.binder) + of(by),
            What::Conflict { attempt, .. } => text(&attempt.by),
            What::Killed { targets, .. } => targets.len(),
            What::Snapshot(_) => 0,
        }
    }
}

fn text(process: &Process) -> usize {
    let optional = [&process.exe, &process.cwd, &process.cgroup].map(|text| text.as_ref().map_or(0, String::len));
    let command: usize = process.command.iter().map(|argument| argument.len() + size_of::<String>()).sum();
    process.name.len() + command + optional.iter().sum::<usize>()
}

/// Bytes that are stored of a name, a path, a cgroup and a command line: each is one string of a hostile process.
const MAX_NAME: usize = 64;
const MAX_PATH: usize = 1024;
const MAX_COMMAND: usize = 4096;

pub(super) fn name(text: &str) -> Cow<'_, str> {
    bounded(text, MAX_NAME)
}

pub(super) fn path(text: &str) -> Cow<'_, str> {
    bounded(text, MAX_PATH)
}

/// The arguments as a JSON array; the first that do not fit are cut.
pub(super) fn command(arguments: &[String]) -> String {
    let mut room = MAX_COMMAND;
    let mut kept = Vec::new();
    for argument in arguments {
        if room == 0 {
            kept.push(Cow::Borrowed("…"));
            break;
        }
        let argument = bounded(argument, room);
        // Quotes and a comma, so that empty arguments are not free.
        room = room.saturating_sub(argument.len() + 3);
        kept.push(argument);
    }
    serde_json::json!(kept).to_string()
}

/// At most `bytes` of the text, with `…` where some were cut off.
fn bounded(text: &str, bytes: usize) -> Cow<'_, str> {
    if text.len() <= bytes {
        return Cow::Borrowed(text);
    }
    Cow::Owned(format!("{}…", &text[..text.floor_char_boundary(bytes)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_bounded_at_characters() {
        for (text, bytes, want) in
            [("abc", 3, "abc"), ("abcd", 3, "abc…"), ("aé", 2, "a…"), ("", 0, ""), ("x", 0, "…"), ("a\0b", 3, "a\0b")]
        {
            assert_eq!(bounded(text, bytes), want);
        }
    }

    #[test]
    fn commands_are_bounded_however_many_arguments_there_are() {
        let read = |json: &str| serde_json::from_str::<Vec<String>>(json).unwrap();
        let arguments = |arguments: &[&str]| arguments.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let plain = arguments(&["sh", "-c", "", "a \"b\" \u{1b}[2J \0 é"]);
        assert_eq!(read(&command(&plain)), plain);
        for hostile in [vec!["x".repeat(1 << 20)], vec!["x".repeat(1 << 20); 3], vec![String::new(); 1 << 17]] {
            let json = command(&hostile);
            assert!(json.len() <= MAX_COMMAND + 32, "{}", json.len());
            assert!(read(&json).last().unwrap().ends_with('…'));
        }
        // Escaped, a control character takes six bytes.
        assert!(command(&[String::from("\u{1}").repeat(1 << 20)]).len() < 7 * MAX_COMMAND);
    }
}
