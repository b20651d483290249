//! A victim on its way: what was sent to it, and what became of it.
//!
//! ```text
//!  Unsignalled ──► Soft ──► Forced        ended, gone, failed, or let go at any point
//! ```

use std::io;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use super::plan::Victim;
use super::report;
use super::signal::SignalName;
use super::target::{OpenError, OpenTarget, SignalError, Target};
use super::why;
use crate::source::stat::{self, Stat};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Unsignalled,
    Soft,
    Forced,
}

/// How a victim is kept hold of.
#[derive(Debug)]
pub(super) enum Grip {
    /// By a pidfd: its end is an event.
    Firm(OpenTarget),
    /// By its identity, for want of descriptors: a pidfd is opened anew for each signal, and its end is looked for.
    Loose,
    /// Not at all: it is of no interest (any more).
    None,
}

#[derive(Debug)]
pub(super) struct Life {
    pub(super) victim: Victim,
    pub(super) grip: Grip,
    pub(super) stage: Stage,
    /// When the first signal was sent to it.
    pub(super) signalled: Option<Instant>,
    /// Since when it is known to hold none of the ports any more, alive as it is.
    pub(super) empty_since: Option<Instant>,
    /// How long after the signal it let go of them, once that was told.
    pub(super) let_go: Option<Duration>,
    /// Whether it ended after the first signal was sent, to it or to another victim.
    pub(super) ended: bool,
    /// Whether it had ended before anything was done.
    pub(super) gone: bool,
    /// Why it outlived the first signal.
    pub(super) outlived: Option<String>,
    /// Why it could not be signalled.
    pub(super) failure: Option<Failed>,
}

#[derive(Clone, Debug)]
pub(super) struct Failed {
    pub(super) reason: String,
    /// For want of permission.
    pub(super) denied: bool,
}

pub(super) fn stat_of(pid: u32) -> Option<Stat> {
    stat::read(pid).ok()
}

/// Descriptors that a kill needs besides pidfds: for the scans, which read directories by several threads.
const RESERVED_FDS: u64 = 32;

/// How many pidfds may be kept open. Raises the soft limit of this process to the hard one where `wanted` need it.
pub(super) fn spare_descriptors(wanted: usize) -> usize {
    let wanted = u64::try_from(wanted).unwrap_or(u64::MAX);
    // The directory that is read counts as well: it is one of the reserved ones.
    let used = std::fs::read_dir("/proc/self/fd").map_or(0, |fds| u64::try_from(fds.count()).unwrap_or(0));
    let spare = |limit: Option<u64>| limit.unwrap_or(u64::MAX).saturating_sub(used + RESERVED_FDS);
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let mut limit = current;
    if spare(limit) < wanted && setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok() {
        limit = maximum;
    }
    usize::try_from(spare(limit)).unwrap_or(usize::MAX)
}

impl Life {
    pub(super) fn new(victim: Victim) -> Life {
        Life {
            victim,
            grip: Grip::None,
            stage: Stage::Unsignalled,
            signalled: None,
            empty_since: None,
            let_go: None,
            ended: false,
            gone: false,
            outlived: None,
            failure: None,
        }
    }

    /// A new one that is taken hold of.
    pub(super) fn opened(victim: Victim, firmly: bool, began: bool) -> Life {
        let mut life = Life::new(victim);
        life.open(firmly, began);
        life
    }

    pub(super) fn pid(&self) -> u32 {
        self.victim.process.id.pid
    }

    fn target(&self) -> Target {
        Target { id: self.victim.process.id, inodes: self.victim.inodes.clone(), kin: self.victim.kin }
    }

    /// Takes hold of it: by a pidfd if `firmly`.
    pub(super) fn open(&mut self, firmly: bool, began: bool) {
        if !firmly {
            self.grip = Grip::Loose;
            return;
        }
        match self.target().open() {
            Ok(open) => self.grip = Grip::Firm(open),
            Err(error) => self.refused(error, began),
        }
    }

    /// A pidfd to signal it by: its own, or one for this signal.
    pub(super) fn take_grip(&mut self, began: bool) -> Option<OpenTarget> {
        match std::mem::replace(&mut self.grip, Grip::None) {
            Grip::Firm(open) => Some(open),
            Grip::Loose => match self.target().open() {
                Ok(open) => Some(open),
                Err(error) => {
                    self.refused(error, began);
                    None
                }
            },
            Grip::None => None,
        }
    }

    fn refused(&mut self, error: OpenError, began: bool) {
        self.grip = Grip::None;
        match error {
            OpenError::Gone => self.over(began),
            OpenError::Failed(error) => {
                let reason = format!("cannot open a pidfd of {}: {error}; try again", self.pid());
                self.failure = Some(Failed { reason, denied: false });
            }
        }
    }

    /// Notes that it has ended. `began`: whether any victim was signalled before, which may be why.
    pub(super) fn over(&mut self, began: bool) {
        self.grip = Grip::None;
        if began { self.ended = true } else { self.gone = true }
    }

    /// Seen with a socket that it was not known to hold. A firm grip stays: the pidfd is the same process's in any case,
    /// and each signal verifies anew.
    pub(super) fn reopen_for(&mut self, inode: u64, firmly: bool, began: bool) {
        if self.victim.inodes.contains(&inode) {
            return;
        }
        self.victim.inodes.push(inode);
        match &mut self.grip {
            Grip::Firm(open) => open.add_inode(inode),
            _ if !self.ended && !self.gone && self.failure.is_none() => self.open(firmly, began),
            _ => {}
        }
    }

    pub(super) fn is_held(&self) -> bool {
        !matches!(self.grip, Grip::None)
    }

    /// Whether it was meant for its kinship and is still there.
    pub(super) fn is_kin_left(&self) -> bool {
        self.victim.kin.is_some() && !self.ended && !self.gone && (self.is_held() || self.failure.is_some())
    }

    /// Whether it started others, and is not gone so long after its first signal.
    pub(super) fn is_slow_starter(&self, patience: Duration) -> bool {
        self.victim.kin.is_some_and(|kin| kin.is_starter()) && self.signalled.is_some_and(|at| at.elapsed() >= patience)
    }

    /// Whether it got the signal of this stage and may still act on it.
    pub(super) fn is_awaited(&self, stage: Stage) -> bool {
        self.stage == stage && self.is_held() && self.failure.is_none()
    }

    /// Whether it is on its way out with all its threads, or was reaped, as `/proc` tells by its identity.
    pub(super) fn is_exiting(&self) -> bool {
        stat::has_ended(self.victim.process.id)
    }

    /// Whether SIGKILL ends it in its own time: it is exiting, or still on its way to that. Not if it is asleep in the
    /// kernel where no signal reaches it.
    pub(super) fn is_dying(&self) -> bool {
        !why::is_unreachable(self.pid())
    }

    pub(super) fn sent(&mut self, sent: Result<(), SignalError>, signal: Signal, stage: Stage, began: bool) {
        let failed = match sent {
            Ok(()) => {
                self.stage = stage;
                self.signalled.get_or_insert_with(Instant::now);
                return;
            }
            Err(SignalError::Gone) => {
                self.over(began);
                return;
            }
            Err(SignalError::Denied) => Failed { reason: report::not_permitted(self.victim.process.uid), denied: true },
            Err(SignalError::Forbidden(reason)) => Failed { reason, denied: true },
            Err(SignalError::Failed(error)) => {
                let reason = format!("cannot send {} to {}: {error}", SignalName(signal), self.pid());
                Failed { reason, denied: false }
            }
        };
        self.failure = Some(failed);
    }
}

/// Whether `/proc` refused to answer, which says nothing of the process.
pub(super) fn is_silent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Arc;

    use super::*;
    use crate::kill::testing::{Helper, POLITE};
    use crate::source::process;

    #[test]
    fn a_firm_grip_stays_where_another_socket_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let helper = Helper::start(POLITE, &[&listener]);
        let process = Arc::new(process::read_exact(helper.id()).unwrap());
        let mut life = Life::opened(Victim::new(&process, &stat_of), true, false);
        // No descriptor is left for a new one.
        life.reopen_for(7, false, false);
        let Grip::Firm(open) = &life.grip else { panic!("{:?}", life.grip) };
        assert_eq!((open.inodes(), &*life.victim.inodes), (&[7][..], &[7][..]));
    }
}
