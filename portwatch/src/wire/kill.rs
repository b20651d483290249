//! A kill on the wire: what is asked for, and what is told of it besides what `kill --json` shows. Pure.

use std::fmt::Write as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Selection, object};
use crate::engine::Wanted;
use crate::kill::signal::SignalName;
use crate::kill::{Options, Outcome, Reach, Terms};
use crate::model::NetnsId;
use crate::select::Since;

/// The longest grace or settling time, in ms: an hour. Each kill that goes on takes a place from the others.
pub const MAX_WAIT_MS: u64 = 3_600_000;

/// A request to free ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kill {
    #[serde(deserialize_with = "object")]
    pub selection: Selection,
    /// The first signal.
    pub signal: SignalName,
    /// How long processes have to end after it.
    pub grace_ms: u64,
    /// Whether SIGKILL follows.
    pub force: bool,
    /// How long to look out for a new owner where something could bring one.
    pub settle_ms: u64,
    pub reach: Reach,
    /// Plan, and end nobody.
    pub dry_run: bool,
    /// Wait for `confirm` once the plan has been told.
    pub confirm: bool,
    /// Do not spare the ancestors of the one who asks.
    pub force_self: bool,
}

impl Default for Kill {
    fn default() -> Self {
        Kill::new(Selection::default(), Options::default(), Reach::Holders)
    }
}

impl Kill {
    pub fn new(selection: Selection, options: Options, reach: Reach) -> Kill {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Kill {
            selection,
            signal: SignalName(options.signal),
            grace_ms: ms(options.grace),
            force: options.force,
            settle_ms: ms(options.settle),
            reach,
            dry_run: false,
            confirm: false,
            force_self: false,
        }
    }

    /// How to kill.
    ///
    /// # Errors
    /// A sentence that names the part which is out of bounds.
    pub fn options(&self) -> Result<Options, String> {
        for (name, value) in [("grace_ms", self.grace_ms), ("settle_ms", self.settle_ms)] {
            if value > MAX_WAIT_MS {
                return Err(format!("{name} is {value}; the agent waits {MAX_WAIT_MS} ms at most"));
            }
        }
        let SignalName(signal) = self.signal;
        Ok(Options {
            signal,
            grace: Duration::from_millis(self.grace_ms),
            force: self.force,
            settle: Duration::from_millis(self.settle_ms),
            ..Options::default()
        })
    }

    /// How far it goes. What stops containers and units takes the rights of the one who asks, so no agent does it.
    pub fn terms(&self) -> Terms {
        Terms { reach: self.reach, ..Terms::default() }
    }
}

impl Selection {
    /// Much as somebody would type it: for logs and history. Hostile text.
    pub fn words(&self) -> String {
        let mut words = self.targets.join(" ");
        let flags = [
            ("-4", self.ipv4),
            ("-6", self.ipv6),
            ("--tcp", self.tcp),
            ("--udp", self.udp),
            ("--orphans", self.orphans),
        ];
        for (flag, _) in flags.into_iter().filter(|(_, given)| *given) {
            let _ = write!(words, " {flag}");
        }
        let mut add = |option: &str, values: &mut dyn Iterator<Item = String>| {
            for value in values {
                let _ = write!(words, " {option} {value}");
            }
        };
        add("--addr", &mut self.addresses.iter().map(ToString::to_string));
        add("--user", &mut self.uids.iter().map(ToString::to_string));
        add("--pid", &mut self.pids.iter().map(ToString::to_string));
        add("--command", &mut self.commands.iter().cloned());
        add("--cwd", &mut self.cwds.iter().cloned());
        add("--unit", &mut self.units.iter().cloned());
        add("--container", &mut self.containers.iter().map(name_of));
        add("--older-than", &mut self.older_than_ms.iter().map(|ms| format!("{ms}ms")));
        add("--since", &mut self.since.iter().map(moment));
        // A value may be a secret, and a log is read by many.
        add("--env", &mut self.env.iter().map(|variable| variable.split('=').next().unwrap_or_default().to_owned()));
        add("--descendant-of", &mut self.descendants_of.iter().map(|process| process.pid.to_string()));
        add("--cgroup", &mut self.cgroups.iter().cloned());
        add("--except", &mut self.except.iter().cloned());
        words.trim_start().to_owned()
    }
}

/// `mark` where that is what it was, and when.
fn moment(since: &Since) -> String {
    let (what, Since::After(moment) | Since::Mark(moment)) = (matches!(since, Since::Mark(_)), *since);
    format!("{}{} ms after boot", if what { "mark, " } else { "" }, moment / 1_000_000)
}

fn name_of(wanted: &Wanted) -> String {
    match wanted {
        Wanted::Container(container) => container.name.clone(),
        Wanted::IdPrefix(id) => id.clone(),
    }
}

/// What became of a port, in full: `kill --json` leaves out what only its text needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    #[serde(flatten)]
    outcome: Outcome,
    /// 0 where nobody had the port.
    netns: NetnsId,
    /// `elapsed_ms`, exactly.
    elapsed_ns: u64,
    /// Pids of holders that had ended before anything was sent to them.
    gone: Vec<u32>,
    /// Pids among `failed` to which nothing was sent.
    refused: Vec<u32>,
    /// Names of the processes mentioned. Hostile text.
    names: Vec<(u32, String)>,
}

impl From<Outcome> for Told {
    fn from(outcome: Outcome) -> Told {
        let refused = outcome.failed.iter().filter(|failure| failure.refused);
        Told {
            netns: outcome.netns,
            elapsed_ns: u64::try_from(outcome.elapsed.as_nanos()).unwrap_or(u64::MAX),
            gone: outcome.gone.clone(),
            refused: refused.map(|failure| failure.pid).collect(),
            names: outcome.names.clone(),
            outcome,
        }
    }
}

impl From<Told> for Outcome {
    fn from(told: Told) -> Outcome {
        let Told { mut outcome, netns, elapsed_ns, gone, refused, names } = told;
        outcome.failed.iter_mut().for_each(|failure| failure.refused = refused.contains(&failure.pid));
        Outcome { netns, elapsed: Duration::from_nanos(elapsed_ns), gone, names, ..outcome }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kill::Status;
    use crate::kill::outcome::{Diagnostics, Failure, Owner};
    use crate::model::ProcessId;

    #[test]
    fn an_outcome_survives_the_wire() {
        let outcome = Outcome {
            netns: 7,
            killed: vec![3],
            failed: vec![
                Failure { pid: 9, reason: "no".into(), refused: true },
                Failure { pid: 8, reason: "deaf".into(), refused: false },
            ],
            gone: vec![4],
            elapsed: Duration::from_nanos(12_345_678),
            diagnostics: Some(Diagnostics {
                message: "m".into(),
                new_owners: vec![Owner { pid: 1, name: "x\u{1b}".into() }],
                ..Diagnostics::default()
            }),
            names: vec![(9, "x".into())],
            ..Outcome::example(8000, Status::Partial)
        };
        let line = serde_json::to_string(&Told::from(outcome.clone())).unwrap();
        let told: Told = serde_json::from_str(&line).unwrap();
        assert_eq!(Outcome::from(told), outcome, "{line}");
    }

    #[test]
    fn a_request_says_only_what_differs_from_the_command_line() {
        let read = |line: &str| serde_json::from_str::<Kill>(line).map_err(|error| error.to_string());
        assert_eq!(read("{}"), Ok(Kill::default()));
        let kill = read(r#"{"selection":{"targets":["8000"]},"signal":"int","grace_ms":1,"reach":"tree"}"#).unwrap();
        let Options { signal, grace, force, .. } = kill.options().unwrap();
        assert_eq!((signal, grace, force), (rustix::process::Signal::INT, Duration::from_millis(1), true));
        for wrong in [r#"{"uid":0}"#, r#"{"signal":"STOP"}"#, r#"{"signal":0}"#, r#"{"pid":1}"#, r#"{"grace_ms":-1}"#] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        let endless = Kill { settle_ms: u64::MAX, ..Kill::default() };
        assert!(endless.options().unwrap_err().starts_with("settle_ms is"));
    }

    #[test]
    fn a_selection_reads_as_it_is_typed() {
        let selection = Selection {
            targets: vec!["8000/tcp".into(), "3000-3005".into()],
            ipv6: true,
            cwds: vec!["/tmp/*".into()],
            ..Selection::default()
        };
        assert_eq!(selection.words(), "8000/tcp 3000-3005 -6 --cwd /tmp/*");
        assert_eq!(Selection { pids: vec![7], ..Selection::default() }.words(), "--pid 7");
        let provenance = Selection {
            orphans: true,
            since: Some(Since::Mark(5_000_000)),
            env: vec!["CI".into(), "TOKEN=secret".into()],
            descendants_of: vec![ProcessId { pid: 9, start: 1 }],
            cgroups: vec!["/a".into()],
            except: vec!["80".into()],
            ..Selection::default()
        };
        let want =
            "--orphans --since mark, 5 ms after boot --env CI --env TOKEN --descendant-of 9 --cgroup /a --except 80";
        assert_eq!(provenance.words(), want);
    }
}
