//! The working directories of those who are ended, to be removed after them ([`crate::sweep`]).

use std::io;
use std::time::Duration;

use globset::GlobMatcher;
use serde::{Deserialize, Serialize};

use super::outcome::Outcome;
use super::plan::{Plan, push_new};
use crate::sweep::{self, Amount, Kept, Pin, Removed, Swept};

/// What became of the directories of those who held a port; nothing where none was to be removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Directories {
    #[serde(rename = "removed_directories", skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<Removed>,
    #[serde(rename = "kept_directories", skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<Kept>,
    /// In a dry run: those that would be removed.
    #[serde(rename = "would_remove_directories", skip_serializing_if = "Vec::is_empty")]
    pub planned: Vec<String>,
}

impl Directories {
    /// What became of all of them, each told once: several ports may have been held from one.
    pub fn of(outcomes: &[Outcome]) -> Directories {
        let mut all = Directories::default();
        for Directories { removed, kept, planned } in outcomes.iter().map(|outcome| &outcome.directories) {
            removed.iter().for_each(|removed| push_new(&mut all.removed, removed.clone()));
            kept.iter().for_each(|kept| push_new(&mut all.kept, kept.clone()));
            planned.iter().for_each(|planned| push_new(&mut all.planned, planned.clone()));
        }
        all
    }
}

/// The directories of the victims of a plan, each once.
#[derive(Debug, Default)]
pub(super) struct Held {
    pinned: Vec<(Pin, Vec<usize>)>,
    /// Those that could not be taken hold of.
    refused: Vec<(Kept, Vec<usize>)>,
}

impl Held {
    /// Takes hold of them, while the victims are there.
    pub(super) fn of(plan: &Plan) -> Held {
        let mut held = Held::default();
        for victim in &plan.victims {
            let pin = match Pin::of(victim.process.id) {
                Ok(pin) => pin,
                // Ended by itself: nobody knows any more which directory it was in.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    let path = victim.process.cwd.clone().unwrap_or_else(|| "?".to_owned());
                    let reason = format!("cannot look at the directory of {}: {error}", victim.process.id.pid);
                    held.refused.push((Kept { path, reason, amount: Amount::default() }, victim.groups.clone()));
                    continue;
                }
            };
            match held.pinned.iter_mut().find(|(known, _)| known.is_same(&pin)) {
                // The first is a master, as a rule. Should others outlive it, they are found in the directory.
                Some((_, groups)) => victim.groups.iter().for_each(|&group| push_new(groups, group)),
                None => held.pinned.push((pin, victim.groups.clone())),
            }
        }
        held
    }

    /// Removes those of processes that have ended, or do so within `grace` after they let go of their ports.
    pub(super) fn sweep(self, glob: &GlobMatcher, grace: Duration, outcomes: &mut [Outcome]) {
        for (pin, groups) in self.pinned {
            let is_free = groups.iter().any(|&group| outcomes.get(group).is_some_and(Outcome::is_done));
            pin.has_ended(if is_free { grace } else { Duration::ZERO });
            let swept = sweep::remove(&pin, glob);
            tell(&groups, outcomes, |directories| match &swept {
                Swept::Removed(removed) => directories.removed.push(removed.clone()),
                Swept::Kept(kept) => directories.kept.push(kept.clone()),
            });
        }
        refuse(self.refused, outcomes);
    }

    /// Says which would be removed once all of `plan` have ended.
    pub(super) fn preview(self, glob: &GlobMatcher, ending: &[u32], outcomes: &mut [Outcome]) {
        for (pin, groups) in self.pinned {
            let verdict = sweep::may_remove(&pin, glob, ending);
            tell(&groups, outcomes, |directories| match &verdict {
                Ok(()) => directories.planned.push(pin.path()),
                Err(reason) => {
                    let (path, reason) = (pin.path(), reason.clone());
                    directories.kept.push(Kept { path, reason, amount: Amount::default() });
                }
            });
        }
        refuse(self.refused, outcomes);
    }
}

/// Outcomes stand in the order of the plan's groups.
fn tell(groups: &[usize], outcomes: &mut [Outcome], what: impl Fn(&mut Directories)) {
    for &group in groups {
        if let Some(outcome) = outcomes.get_mut(group) {
            what(&mut outcome.directories);
        }
    }
}

fn refuse(refused: Vec<(Kept, Vec<usize>)>, outcomes: &mut [Outcome]) {
    for (kept, groups) in refused {
        tell(&groups, outcomes, |directories| directories.kept.push(kept.clone()));
    }
}
