//! What became of each port: the objects of `kill --json`, and the exit code.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::directories::Directories;
use super::report::{hidden, user};
use super::stop::Whole;
use crate::diagnose::Finding;
use crate::model::{Listener, NetnsId, Protocol};
use crate::source::process::hidden_owner;
use crate::supervisor::Supervisor;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Nobody had it.
    Free,
    /// It was taken and is free now.
    Cleaned,
    /// Some holders are still there: they outlived the signal, or are spared.
    Partial,
    /// Still taken, and no holder was ever visible.
    Ghost,
    /// Still taken: the holders are gone, or survive SIGKILL; or nobody listens, and bind() fails all the same.
    Stuck,
    /// It was freed, and somebody took it again; or nobody had it, and somebody took it meanwhile.
    Respawned,
    /// Still taken, for want of permission alone: `sudo` would help. What portwatch spares by its own rules (an ancestor
    /// of its own, a docker-proxy) no permission frees, so that is [`Status::Partial`].
    Denied,
    /// A dry run.
    Planned,
}

/// One port of one protocol, afterwards. The order of the fields is the order in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub port: u16,
    pub proto: Protocol,
    /// 0 where the port was named and nobody had it.
    #[serde(skip)]
    pub netns: NetnsId,
    pub status: Status,
    /// Pids of holders that ended after the first signal, those in `forced` among them.
    pub killed: Vec<u32>,
    /// Pids of those that SIGKILL ended.
    pub forced: Vec<u32>,
    pub failed: Vec<Failure>,
    /// Containers and units that were stopped. Their processes were not signalled, and are not in `killed`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stopped: Vec<Stopped>,
    /// Inodes of the sockets that were closed in the kernel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub closed: Vec<u64>,
    #[serde(flatten)]
    pub directories: Directories,
    /// Where sockets are closed and nobody is signalled: the pids of their holders.
    #[serde(skip)]
    pub closes: Option<Vec<u32>>,
    /// Pids of holders that had ended before anything was sent to them.
    #[serde(skip)]
    pub gone: Vec<u32>,
    /// Inodes of sockets that are still there without a visible holder.
    pub ghost: Vec<u64>,
    pub still_listening: bool,
    /// Pids that hold the port now.
    pub remaining_pids: Vec<u32>,
    #[serde(rename = "elapsed_ms", serialize_with = "milliseconds", deserialize_with = "from_milliseconds")]
    pub elapsed: Duration,
    pub diagnostics: Option<Diagnostics>,
    /// Where the port was to be free, if that was spelt out; for people.
    #[serde(skip)]
    pub addresses: Vec<IpAddr>,
    /// Names of the processes mentioned, for people. Hostile text.
    #[serde(skip)]
    pub names: Vec<(u32, String)>,
    /// In a dry run, what would be stopped, and the holders that go with it.
    #[serde(skip)]
    pub stopping: Vec<(Stopped, Vec<u32>)>,
}

/// Something that was stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Stopped {
    Container {
        /// The first 12 digits of its id.
        container: String,
        name: String,
    },
    Unit {
        /// Its full name. Hostile text.
        unit: String,
        /// The uid of the user whose systemd runs it; `None`: the system's.
        user_manager: Option<u32>,
    },
}

impl Stopped {
    pub(super) fn of(what: &Whole) -> Stopped {
        match what {
            Whole::Container(container) => {
                Stopped::Container { container: container.short_id().to_owned(), name: container.name.clone() }
            }
            Whole::Unit { name, manager } => Stopped::Unit { unit: name.clone(), user_manager: manager.uid() },
        }
    }

    /// What it is and its name: `("container", "web")`. Hostile text.
    pub(super) fn describe(&self) -> (&'static str, &str) {
        match self {
            Stopped::Container { name, .. } => ("container", name),
            Stopped::Unit { unit, .. } => ("unit", unit),
        }
    }
}

/// A holder that was not ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub pid: u32,
    pub reason: String,
    /// Whether nothing was sent to it, rather than in vain.
    #[serde(skip)]
    pub refused: bool,
}

/// What a person should know of an outcome that is not plain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostics {
    /// Empty where [`Outcome::failed`] says it all.
    pub message: String,
    pub new_owners: Vec<Owner>,
    pub supervisor: Option<Supervisor>,
    /// What was found on the port afterwards, where it is not free.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub pid: u32,
    pub name: String,
}

impl Outcome {
    /// What came of a port, for tests to change as they need.
    #[cfg(test)]
    pub(crate) fn example(port: u16, status: Status) -> Outcome {
        Outcome {
            port,
            proto: Protocol::Tcp,
            netns: 0,
            status,
            killed: Vec::new(),
            forced: Vec::new(),
            failed: Vec::new(),
            stopped: Vec::new(),
            closed: Vec::new(),
            directories: Directories::default(),
            closes: None,
            gone: Vec::new(),
            ghost: Vec::new(),
            still_listening: false,
            remaining_pids: Vec::new(),
            elapsed: Duration::ZERO,
            diagnostics: None,
            addresses: Vec::new(),
            names: Vec::new(),
            stopping: Vec::new(),
        }
    }

    pub fn is_done(&self) -> bool {
        matches!(self.status, Status::Free | Status::Cleaned | Status::Planned)
    }
}

impl Outcome {
    /// A port that was named is not free if one of these listeners hinders a bind there: one that the selectors leave out
    /// ([`Status::Partial`], and [`Status::Denied`] where nobody can see whether they do), or that came meanwhile
    /// ([`Status::Respawned`]). Nothing where there are none.
    pub(super) fn correct(&mut self, hindering: &[&Listener], status: Status) {
        let Some(listener) = hindering.first() else { return };
        let message = match (status, hidden_owner(listener)) {
            (Status::Respawned, _) => format!("{} took it meanwhile", holder(listener)),
            (Status::Denied, Some(uid)) => hidden(uid),
            _ => format!("held by {}, which the selectors leave out", holder(listener)),
        };
        self.add_note(message, hindering);
        if self.status == Status::Planned {
            return;
        }
        self.status = status;
        self.still_listening = true;
        let holders = hindering.iter().flat_map(|listener| &listener.holders);
        self.remaining_pids.extend(holders.map(|holder| holder.process.id.pid));
        self.remaining_pids.sort_unstable();
        self.remaining_pids.dedup();
        self.ghost.extend(hindering.iter().filter(|listener| listener.is_ghost()).map(|ghost| ghost.socket.id.inode));
    }

    /// Says of what is on the port, and in nobody's way where it was to be free, that it is still there.
    pub(super) fn mention(&mut self, others: &[&Listener]) {
        if others.is_empty() {
            return;
        }
        let each: Vec<String> =
            others.iter().map(|other| format!("{} by {}", other.socket.endpoint(), holder(other))).collect();
        self.add_note(format!("not meant and still held: {}", each.join(", ")), others);
    }

    /// Adds to what a person should know, with the names of those who hold the listeners: who may not know of them is told
    /// neither.
    fn add_note(&mut self, note: String, of: &[&Listener]) {
        let message = &mut self.diagnostics.get_or_insert_with(Diagnostics::default).message;
        *message = if message.is_empty() { note } else { format!("{message}; {note}") };
        let processes = of.iter().flat_map(|listener| &listener.holders).map(|holder| &holder.process);
        self.names.extend(processes.map(|process| (process.id.pid, process.name.clone())));
        self.names.sort_unstable();
        self.names.dedup();
    }
}

/// `python3 (7)`.
fn holder(listener: &Listener) -> String {
    match (listener.binder(), hidden_owner(listener)) {
        (Some(holder), _) => format!("{} ({})", holder.process.name, holder.process.id.pid),
        (None, Some(uid)) => format!("a process of {} that is not visible", user(uid)),
        (None, None) => "nobody visible".to_owned(),
    }
}

/// Exit code of `kill`: 0 all free (or a dry run), 1 something is still taken, 3 only for want of permission.
pub fn exit_code(outcomes: &[Outcome]) -> u8 {
    let mut taken = outcomes.iter().filter(|o| !o.is_done()).peekable();
    if taken.peek().is_none() {
        0
    } else if taken.all(|o| o.status == Status::Denied) {
        3
    } else {
        1
    }
}

fn milliseconds<S: Serializer>(elapsed: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}

fn from_milliseconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    u64::deserialize(deserializer).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(status: Status) -> Outcome {
        Outcome {
            port: 8000,
            proto: Protocol::Tcp,
            netns: 0,
            status,
            killed: vec![7],
            forced: Vec::new(),
            failed: vec![Failure { pid: 9, reason: "no".into(), refused: true }],
            stopped: Vec::new(),
            closed: Vec::new(),
            directories: Directories::default(),
            closes: None,
            gone: Vec::new(),
            ghost: vec![5],
            still_listening: false,
            remaining_pids: Vec::new(),
            elapsed: Duration::from_micros(12_900),
            diagnostics: None,
            addresses: Vec::new(),
            names: vec![(7, "x".into())],
            stopping: Vec::new(),
        }
    }

    #[test]
    fn json_is_as_promised() {
        let expected = r#"{"port":8000,"proto":"tcp","status":"cleaned","killed":[7],"forced":[],"failed":[{"pid":9,"reason":"no"}],"ghost":[5],"still_listening":false,"remaining_pids":[],"elapsed_ms":12,"diagnostics":null}"#;
        assert_eq!(serde_json::to_string(&outcome(Status::Cleaned)).unwrap(), expected);
        let stopped = vec![
            Stopped::Container { container: "5eed81bcd920".into(), name: "web".into() },
            Stopped::Unit { unit: "web.service".into(), user_manager: None },
        ];
        let json = serde_json::to_string(&Outcome { stopped, ..outcome(Status::Cleaned) }).unwrap();
        let expected = r#""stopped":[{"container":"5eed81bcd920","name":"web"},{"unit":"web.service","user_manager":null}],"ghost""#;
        assert!(json.contains(expected), "{json}");
    }

    #[test]
    fn exit_codes_follow_the_worst_outcome() {
        use Status::*;
        for (statuses, code) in [
            (&[][..], 0),
            (&[Free, Cleaned, Planned], 0),
            (&[Cleaned, Denied], 3),
            (&[Denied, Partial], 1),
            (&[Ghost], 1),
            (&[Stuck], 1),
            (&[Respawned, Cleaned], 1),
        ] {
            let outcomes: Vec<Outcome> = statuses.iter().copied().map(outcome).collect();
            assert_eq!(exit_code(&outcomes), code, "{statuses:?}");
        }
    }
}
