//! Processes that hold nothing and are meant all the same: the descendants of a holder (`--tree`), the members of its
//! process group (`--group`), what started it with a job (`--since`). This module says who they are and what must be proved of each before it is signalled. It
//! reads nothing itself: it asks for a process's `stat` again and again, because each reading is of one moment.
//!
//! Why no bystander can be hit:
//! - **What is read of a family tree is checked link by link.** A child is read, its parent, and the child again: if it
//!   is the same child with the same parent, that parent was not reaped in between (the kernel gives a process another
//!   parent before it lets the old one's number go), so the number was its parent's when it was read.
//! - **Kinship cannot lapse.** Who descended from a holder once does so for ever, also when its parent is gone and it
//!   was given to another. So one proof for a pidfd is enough; later only "does it live?" is asked of it.
//! - **A recycled number shows.** Whoever gets the number of a process that was seen at a time starts after that time.
//!   If the one that was seen started in an earlier tick of `/proc` (10 ms) than that, no successor can have the same
//!   start, and pid and start name it alone. One that was younger when it was seen must be proved once
//!   more, by its kinship, through a pidfd that is open already.
//! - **A process group is never signalled as such**: kill(2) of a negative number hits whoever uses the number then.
//!   Each member is signalled by its own pidfd, and only if it is in the group right then. The number of a group cannot
//!   be recycled while it has a member, so the group of a new face is the one meant as long as a known member is
//!   still in it afterwards.
//!
//! What can be missed, never hit by mistake: a child that is forked after the last reading, and whose parent is gone
//! at the next. It is nobody's then.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::model::{BootNs, ProcessId};
use crate::source::stat::{self, Stat};

/// Who is meant besides the holders.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    #[default]
    Holders,
    /// Their descendants.
    Tree,
    /// Their process groups.
    Group,
}

/// In what a process is related to a holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Relation {
    /// It descends from this process, or is it.
    Tree(ProcessId),
    /// It is in this process group, in which the anchor was seen before.
    Group { group: u32, anchor: ProcessId },
    /// This process, a holder, descends from it.
    Above(ProcessId),
}

/// Why a process that holds nothing is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kin {
    pub relation: Relation,
    /// A moment before it was seen to be related.
    pub seen: BootNs,
}

impl Reach {
    /// What makes a holder the first of its family; `None` where only holders are meant, or its group is none that
    /// this pid namespace knows.
    pub fn relation(self, holder: &Stat) -> Option<Relation> {
        match self {
            Reach::Holders => None,
            Reach::Tree => Some(Relation::Tree(holder.id())),
            Reach::Group if holder.process_group == 0 => None,
            Reach::Group => Some(Relation::Group { group: holder.process_group, anchor: holder.id() }),
        }
    }
}

impl Kin {
    /// Whether `id` is the process that was seen, and is related still. `stat` reads now. `certain`: that it is the
    /// one that was seen has been proved by other means. True means so only if the process is alive afterwards.
    pub fn is_proved(&self, id: ProcessId, certain: bool, stat: &dyn Fn(u32) -> Option<Stat>) -> bool {
        let Some(now) = stat(id.pid).filter(|now| now.id().is_same(id)) else { return false };
        let certain = certain || self.identifies(id);
        match self.relation {
            Relation::Tree(root) => certain || descends(id, root, stat),
            Relation::Above(holder) => certain || descends(holder, id, stat),
            Relation::Group { group, anchor } => {
                now.process_group == group && (certain || is_in_group(anchor, group, stat))
            }
        }
    }

    /// Whether it is meant for what it started.
    pub fn is_starter(&self) -> bool {
        matches!(self.relation, Relation::Above(_))
    }

    /// Whether pid and start as `/proc` shows it can be of no process but the one that was seen.
    fn identifies(&self, id: ProcessId) -> bool {
        id.start / ProcessId::TICK_NS < self.seen / ProcessId::TICK_NS
    }
}

/// Of the processes in `all`, who is related to one of the `known` besides these themselves, with the one that it is
/// related to. `all` is where to look, no more: each find is proved by reading it again. `seen` is a moment before. A
/// leader that is exiting says nothing of its process: other threads may hold sockets for ever ([`stat::all`]).
pub fn relatives(
    known: &[(ProcessId, Relation)],
    all: &[Stat],
    seen: BootNs,
    stat: &dyn Fn(u32) -> Option<Stat>,
) -> Vec<(Stat, ProcessId, Kin)> {
    let by_pid: HashMap<u32, &Stat> = all.iter().map(|process| (process.pid, process)).collect();
    let taken: HashSet<u32> = known.iter().map(|(id, _)| id.pid).collect();
    let strangers = all.iter().filter(|process| !taken.contains(&process.pid));
    let found = strangers.filter_map(|process| {
        let id = process.id();
        // The nearest in the tree; the known are few.
        let line = stat::ancestors(process.pid, &|pid| by_pid.get(&pid).copied().cloned());
        let by_tree = line.iter().find_map(|pid| {
            let root =
                known.iter().find(|(known, relation)| known.pid == *pid && matches!(relation, Relation::Tree(_)));
            root.map(|&(root, _)| (root, Relation::Tree(root)))
        });
        let (anchor, relation) = by_tree.or_else(|| {
            known.iter().find_map(|&(anchor, relation)| match relation {
                Relation::Group { group, .. } if group == process.process_group => {
                    Some((anchor, Relation::Group { group, anchor }))
                }
                _ => None,
            })
        })?;
        let kin = Kin { relation, seen };
        let is_kin = match relation {
            Relation::Tree(root) => descends(id, root, stat),
            Relation::Above(holder) => descends(holder, id, stat),
            Relation::Group { group, anchor } => is_in_group(id, group, stat) && is_in_group(anchor, group, stat),
        };
        is_kin.then(|| (process.clone(), anchor, kin))
    });
    found.collect()
}

/// Whether a chain of parents leads from `id` to `root` now, each link proved.
fn descends(id: ProcessId, root: ProcessId, stat: &dyn Fn(u32) -> Option<Stat>) -> bool {
    let mut line = Vec::new();
    let Some(mut child) = stat(id.pid).filter(|child| child.id().is_same(id)) else { return false };
    while child.ppid > 1 && !line.contains(&child.ppid) {
        let Some(parent) = stat(child.ppid) else { return false };
        let again = stat(child.pid);
        if !again.is_some_and(|again| again.id() == child.id() && again.ppid == parent.pid) {
            return false;
        }
        if parent.id().is_same(root) {
            return true;
        }
        line.push(parent.pid);
        child = parent;
    }
    false
}

fn is_in_group(id: ProcessId, group: u32, stat: &dyn Fn(u32) -> Option<Stat>) -> bool {
    stat(id.pid).is_some_and(|now| now.id().is_same(id) && now.process_group == group)
}

#[cfg(test)]
mod tests;
