//! Names of signals.

use std::fmt;
use std::str::FromStr;

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

/// Those that a kill may begin with, by name. Numbers differ between architectures, so they come from the kernel's.
const NAMES: [(&str, Signal); 22] = [
    ("HUP", Signal::HUP),
    ("INT", Signal::INT),
    ("QUIT", Signal::QUIT),
    ("ILL", Signal::ILL),
    ("TRAP", Signal::TRAP),
    ("ABRT", Signal::ABORT),
    ("BUS", Signal::BUS),
    ("FPE", Signal::FPE),
    ("KILL", Signal::KILL),
    ("USR1", Signal::USR1),
    ("SEGV", Signal::SEGV),
    ("USR2", Signal::USR2),
    ("PIPE", Signal::PIPE),
    ("ALRM", Signal::ALARM),
    ("TERM", Signal::TERM),
    ("XCPU", Signal::XCPU),
    ("XFSZ", Signal::XFSZ),
    ("VTALRM", Signal::VTALARM),
    ("PROF", Signal::PROF),
    ("IO", Signal::IO),
    ("PWR", Signal::POWER),
    ("SYS", Signal::SYS),
];

/// A signal as the user may write it: `TERM`, `SIGTERM`, `term` or `15`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SignalName(pub Signal);

impl FromStr for SignalName {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let upper = s.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let number: Option<i32> = s.parse().ok();
        NAMES
            .iter()
            .find(|(known, signal)| *known == name || number == Some(signal.as_raw()))
            .map(|&(_, signal)| SignalName(signal))
            .ok_or_else(|| format!("no signal '{s}' that could end a process; use a name such as TERM, INT or HUP"))
    }
}

impl TryFrom<String> for SignalName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl From<SignalName> for String {
    fn from(name: SignalName) -> String {
        name.to_string()
    }
}

impl fmt::Display for SignalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_, signal)| *signal == self.0) {
            Some((name, _)) => write!(f, "SIG{name}"),
            None => write!(f, "signal {}", self.0.as_raw()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_write_a_signal() {
        for text in ["TERM", "SIGTERM", "term", "sigterm", "15"] {
            assert_eq!(text.parse::<SignalName>().unwrap().0, Signal::TERM, "{text}");
        }
        assert_eq!("9".parse::<SignalName>().unwrap().to_string(), "SIGKILL");
        for text in ["", "SIG", "TREM", "0", "-9", "STOP", "99"] {
            let error = text.parse::<SignalName>().unwrap_err();
            assert!(error.contains(&format!("'{text}'")), "{error}");
        }
    }
}
