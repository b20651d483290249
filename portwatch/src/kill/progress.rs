//! What happens during a kill, as facts, and how each reads. Pure.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::signal::SignalName;
use crate::model::Process;
use crate::render::{escape, span};

/// Something that happened to a process that is to let go of a port.
#[derive(Clone, Debug)]
pub struct Progress<'a> {
    pub process: &'a Process,
    pub step: Step,
}

/// What happened to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// The signal was sent; where `resumed`, SIGCONT after it, for the process was stopped.
    Sent { signal: SignalName, resumed: bool },
    /// It is waited for. Told when the waiting begins, and each second; no fact for a log.
    Waiting {
        #[serde(rename = "left_ns", with = "nanoseconds")]
        left: Duration,
    },
    /// The grace is over, and it is still there: why, where that can be seen.
    Outlived {
        #[serde(rename = "grace_ns", with = "nanoseconds")]
        grace: Duration,
        why: Option<String>,
    },
    /// It ended, so long after its first signal.
    Ended {
        #[serde(rename = "after_ns", with = "nanoseconds")]
        after: Duration,
    },
    /// It ended before anything was sent to it.
    Gone,
    /// It closed its ports and goes on, maybe to end later.
    LetGo {
        #[serde(rename = "after_ns", with = "nanoseconds")]
        after: Duration,
    },
    /// What it runs in, or holds the port for, is being stopped instead.
    Stopping { what: String },
    /// A socket of its was closed; nothing was sent to it.
    Closed,
    /// It could not be signalled.
    Failed { reason: String },
}

/// A duration as a number that every language reads.
mod nanoseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_nanos)
    }
}

impl Step {
    /// Whether nothing more will be said of the process.
    pub fn is_last(&self) -> bool {
        matches!(self, Step::Ended { .. } | Step::Gone | Step::Closed | Step::Failed { .. })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Sent { signal, resumed: false } => write!(f, "{signal} sent"),
            Step::Sent { signal, resumed: true } => {
                write!(f, "{signal} sent, and SIGCONT, for it was stopped")
            }
            Step::Waiting { left: Duration::ZERO } => f.write_str("still ending"),
            Step::Waiting { left } => write!(f, "still alive, {} s left", left.as_millis().div_ceil(1000)),
            Step::Outlived { grace, why: Some(why) } => {
                write!(f, "still alive after {}: {}", span(*grace), escape(why))
            }
            Step::Outlived { grace, why: None } => write!(f, "still alive after {}", span(*grace)),
            Step::Ended { after } => write!(f, "ended in {}", span(*after)),
            Step::Gone => f.write_str("ended by itself before"),
            Step::LetGo { after } => write!(f, "let go of the port in {}", span(*after)),
            Step::Stopping { what } => write!(f, "stopping {what}"),
            Step::Closed => f.write_str("its socket was closed, it lives on"),
            Step::Failed { reason } => write!(f, "not signalled: {}", escape(reason)),
        }
    }
}

/// `python3 (123)`, fit for a terminal.
pub fn who(process: &Process) -> String {
    format!("{} ({})", escape(&process.name), process.id.pid)
}

#[cfg(test)]
mod tests {
    use rustix::process::Signal;

    use super::*;

    #[test]
    fn each_step_reads_well_and_survives_the_wire() {
        let term = SignalName(Signal::TERM);
        let second = Duration::from_millis(1200);
        for (step, expected) in [
            (Step::Sent { signal: term, resumed: false }, "SIGTERM sent"),
            (Step::Sent { signal: term, resumed: true }, "SIGTERM sent, and SIGCONT, for it was stopped"),
            (Step::Waiting { left: second }, "still alive, 2 s left"),
            (Step::Waiting { left: Duration::ZERO }, "still ending"),
            (Step::Outlived { grace: second, why: None }, "still alive after 1.2s"),
            (Step::Outlived { grace: second, why: Some("it\u{1b}".into()) }, "still alive after 1.2s: it\\x1b"),
            (Step::Ended { after: second }, "ended in 1.2s"),
            (Step::Gone, "ended by itself before"),
            (Step::LetGo { after: second }, "let go of the port in 1.2s"),
            (Step::Stopping { what: "unit web.service".into() }, "stopping unit web.service"),
            (Step::Closed, "its socket was closed, it lives on"),
            (Step::Failed { reason: "no".into() }, "not signalled: no"),
        ] {
            assert_eq!(step.to_string(), expected);
            let line = serde_json::to_string(&step).unwrap();
            assert_eq!(serde_json::from_str::<Step>(&line).unwrap(), step, "{line}");
        }
    }
}
