//! Where facts come from: kernel programs ([`ebpf`]) where the kernel allows them, `sock_diag` and `/proc` elsewhere.
//!
//! Two ways to read: a [`Scanner`] reads one [`crate::model::Snapshot`] (`list`, `who`, `kill`), a `Live` source gives
//! events from now on (`watch`). Both try the best first by loading it, keep the reason why it was refused, and
//! go on with the next.

pub mod btf;
pub mod diag;
pub mod join;
pub mod netns;
pub mod procfs;
pub mod process;

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// How listeners are learnt, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Fexit,
    Kprobe,
    Tracepoint,
    Poll,
}

impl Tier {
    pub const ALL: [Tier; 4] = [Tier::Fexit, Tier::Kprobe, Tier::Tracepoint, Tier::Poll];

    /// Whether the kernel tells of changes by itself.
    pub fn is_event_driven(self) -> bool {
        self != Tier::Poll
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Tier::Fexit => "fexit",
            Tier::Kprobe => "kprobe",
            Tier::Tracepoint => "tracepoint",
            Tier::Poll => "poll",
        })
    }
}

/// Which tiers may be tried: `auto`, or one by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    Auto,
    Only(Tier),
}

impl FromStr for Probe {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        if s == "auto" {
            return Ok(Probe::Auto);
        }
        Tier::ALL
            .into_iter()
            .find(|tier| tier.to_string() == s)
            .map(Probe::Only)
            .ok_or_else(|| format!("no probe '{s}'; use auto, fexit, kprobe, tracepoint or poll"))
    }
}

/// Why a tier (or a part of one) is not in use, as a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    pub tier: Tier,
    pub reason: String,
}
