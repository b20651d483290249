//! The descendants of this process, a subreaper: which there are, how they are asked to end, and when none is left.
//!
//! Nobody else can be hit:
//! - A child of this process keeps its PID until it is reaped, which only this process does. So a signal to the PID of a
//!   child reaches the child, or its zombie.
//! - A descendant further down is opened (pidfd), then its parent is read. If both are alive after that, the number was
//!   this process and its parent was ours: the signal goes through the pidfd.
//!
//! SIGKILL goes to the children alone: theirs come to this process as they die, before it is told of the death
//! (exit_notify() in the kernel), and are next. So the loop ends when wait(2) says that there is no child, and needs no
//! list of processes to be complete.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, kill_process, pidfd_open, pidfd_send_signal};

use super::enclosure::Enclosure;
use crate::model::{Ancestor, ProcessId};
use crate::source::process::is_alive;
use crate::source::stat::{self, Stat};

/// How long to go on after SIGKILL although nobody ends: what does not end by then sleeps in the kernel, or is not ours to
/// signal.
const GIVE_UP: Duration = Duration::from_secs(10);

/// How often to look again although nothing ended: the kernel's list of children may miss one while others come and go
/// (proc(5), /proc/PID/task/TID/children).
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Of those that do not end, so many are named.
const NAMED: usize = 32;

/// Generations that are looked at. What is deeper comes up as those above end.
const MAX_DEPTH: usize = 256;

/// Reaps all children that have ended, and says whether there are others.
pub(super) fn reap(ended: &mut dyn FnMut(u32, WaitStatus)) -> bool {
    // Children made by clone(2) without SIGCHLD, too.
    let options = WaitOptions::NOHANG | WaitOptions::from_bits_retain(libc::__WALL.cast_unsigned());
    loop {
        match rustix::process::wait(options) {
            Ok(Some((pid, status))) => ended(number(pid), status),
            Ok(None) => return true,
            Err(Errno::INTR) => {}
            // ECHILD.
            Err(_) => return false,
        }
    }
}

/// Signals a child of this process that it has not reaped.
pub(super) fn signal_child(pid: u32, signal: Signal) -> Result<(), Errno> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    kill_process(pid, signal)
}

/// Waits until one of these is readable or time is up (`None`: never).
pub(super) fn wait_for(fds: &mut [PollFd<'_>], until: Option<Instant>) {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    let left = left.map(|left| Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    });
    // After an interruption the caller looks, and waits again.
    let _ = poll(fds, left.as_ref());
}

/// Ends everything that descends from this process: SIGTERM, and after a grace SIGKILL.
#[derive(Debug)]
pub(super) struct Clearing {
    kill_at: Instant,
    /// Who was asked already.
    asked: HashSet<ProcessId>,
    /// When somebody ended last, once SIGKILL is sent.
    progress: Option<Instant>,
}

/// What [`Clearing::step`] says.
#[derive(Debug)]
pub(super) enum Next {
    /// To be called again at this time, or when a child ended.
    At(Instant),
    /// These do not end.
    GaveUp(Vec<Ancestor>),
}

impl Clearing {
    pub(super) fn begin(grace: Duration) -> Clearing {
        Clearing { kill_at: Instant::now() + grace, asked: HashSet::new(), progress: None }
    }

    /// How many were asked to end.
    pub(super) fn asked(&self) -> usize {
        self.asked.len()
    }

    /// Signals who is due. To be called after [`reap`] left children; `some_ended` is whether it reaped any.
    pub(super) fn step(&mut self, some_ended: bool, enclosure: Option<&Enclosure>) -> Next {
        let now = Instant::now();
        if now < self.kill_at {
            self.ask();
            return Next::At(self.kill_at);
        }
        if some_ended {
            self.progress = Some(now);
        }
        let since = *self.progress.get_or_insert(now);
        if now.duration_since(since) > GIVE_UP {
            return Next::GaveUp(children().into_iter().filter_map(named).take(NAMED).collect());
        }
        if let Some(enclosure) = enclosure {
            enclosure.kill();
        }
        let mut is_refused = false;
        for pid in children() {
            is_refused |= signal_child(pid, Signal::KILL) == Err(Errno::PERM);
        }
        if is_refused {
            // Of one that we may not signal, the children may be ours to signal all the same.
            each_descendant(&mut |_, pidfd| {
                let _ = pidfd_send_signal(pidfd, Signal::KILL);
            });
        }
        Next::At(now + LOOK_AGAIN)
    }

    /// SIGTERM to each that did not get it yet, and SIGCONT, for who is stopped cannot end.
    fn ask(&mut self) {
        each_descendant(&mut |stat, pidfd| {
            if !stat.exiting && self.asked.insert(stat.id()) {
                let _ = pidfd_send_signal(pidfd, Signal::TERM);
                let _ = pidfd_send_signal(pidfd, Signal::CONT);
            }
        });
    }
}

fn number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().cast_unsigned()
}

fn named(pid: u32) -> Option<Ancestor> {
    stat::read(pid).ok().map(|Stat { pid, name, .. }| Ancestor { pid, name })
}

/// A pidfd of this very process, which is readable once it is gone; `None`: it is.
pub(super) fn open(id: ProcessId) -> Option<OwnedFd> {
    let pid = i32::try_from(id.pid).ok().and_then(Pid::from_raw)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // Read after it was opened, and believed if it is alive after that: the number was this process.
    let is_same = stat::read(id.pid).is_ok_and(|stat| stat.id().is_same(id));
    (is_same && is_alive(&pidfd)).then_some(pidfd)
}

/// The children of this process, zombies included.
fn children() -> Vec<u32> {
    children_of(std::process::id())
}

/// Every descendant that can be found and proved to be one at this moment.
fn each_descendant(found: &mut dyn FnMut(&Stat, BorrowedFd<'_>)) {
    visit(children(), std::process::id(), None, MAX_DEPTH, found);
}

fn children_of(pid: u32) -> Vec<u32> {
    let read = || -> io::Result<Vec<u32>> {
        let mut found = Vec::new();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let children = fs::read_to_string(task?.path().join("children"))?;
            found.extend(children.split_ascii_whitespace().filter_map(|word| word.parse::<u32>().ok()));
        }
        Ok(found)
    };
    // A kernel without CONFIG_PROC_CHILDREN, or a thread that ended: all processes are looked at.
    read().unwrap_or_else(|_| {
        let all = stat::all().unwrap_or_default();
        all.into_iter().filter(|stat| stat.ppid == pid).map(|stat| stat.pid).collect()
    })
}

fn visit(
    children: Vec<u32>,
    parent: u32,
    parent_fd: Option<BorrowedFd<'_>>,
    depth: usize,
    found: &mut dyn FnMut(&Stat, BorrowedFd<'_>),
) {
    for pid in children {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { continue };
        let Ok(pidfd) = pidfd_open(number, PidfdFlags::empty()) else { continue };
        let Ok(stat) = stat::read(pid) else { continue };
        // See the module's words on why this is the process.
        let is_ours = stat.ppid == parent && is_alive(&pidfd) && parent_fd.is_none_or(is_alive);
        if is_ours {
            found(&stat, pidfd.as_fd());
            if depth > 0 {
                visit(children_of(pid), pid, Some(pidfd.as_fd()), depth - 1, found);
            }
        }
    }
}

/// To be polled for input.
pub(super) fn input(fd: &impl AsFd) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::IN)
}
