//! One process that is to be signalled, and the proof that it is the right one.
//!
//! ```text
//!  Target ──open──► OpenTarget ──verify──► Verified ──signal──► sent
//!      └► Gone           └► Gone, NotHolder, Unknown    └► Gone, Denied
//! ```
//!
//! A PID names a process only as long as that process is not reaped; a pidfd names one process for ever. So:
//! 1. `open` the pidfd: from now on it stands for one process, the planned one or one that recycled its PID before;
//! 2. read by PID whether the process started when the planned one did and holds the planned socket;
//! 3. where somebody else asks for the signal, read by PID whether that one may send it;
//! 4. ask the pidfd whether its process is still alive. If it is, it owned its PID all through 2 and 3, thus what was
//!    read there was read of it, and the pidfd is proved to be the planned holder. If not, nothing is signalled;
//! 5. signal through the pidfd, which reaches this process or nobody (ESRCH).
//!
//! Only step 4 makes a [`Verified`], and only a [`Verified`] can signal: no path leads around the proof.
//!
//! A process that is meant for its kinship (`--tree`, `--group`) is proved the same way, step 2 being [`Kin::is_proved`].
//! There a proof lasts: what a pidfd was once proved to stand for, it stands for. It is asked for as soon as the
//! pidfd is open, because kinship is plain to see only as long as the parents live.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::kin::Kin;
use crate::model::ProcessId;
use crate::source::{process, stat};

/// Tells whether this process holds one of the sockets (by inode) at this moment.
pub type Proof<'a> = dyn FnMut(ProcessId, &[u64]) -> io::Result<bool> + 'a;

/// The process meant, and why: it must still hold at least one of these sockets, by inode, or be of this kin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub id: ProcessId,
    pub inodes: Vec<u64>,
    pub kin: Option<Kin>,
}

/// A target with a pidfd. What the pidfd stands for is not proved yet.
#[derive(Debug)]
pub struct OpenTarget {
    target: Target,
    pidfd: OwnedFd,
    /// Whether the pidfd was proved to be the target's; for good.
    certain: Cell<bool>,
}

#[derive(Debug)]
pub enum OpenError {
    /// No process has this PID any more.
    Gone,
    Failed(io::Error),
}

/// What [`OpenTarget::verify`] found.
#[derive(Debug)]
pub enum Verdict<'a> {
    Verified(Verified<'a>),
    /// Alive, but it does not hold the socket, nor is it of the kin: it let go, or it is a stranger under a recycled PID.
    NotHolder,
    Gone,
    /// Alive, but nobody would tell what it holds.
    Unknown(io::Error),
    /// It is the one, and who asks may not signal it: why not.
    Forbidden(String),
}

/// A proved holder, or relative of one: what can be signalled.
#[derive(Debug)]
pub struct Verified<'a> {
    pidfd: BorrowedFd<'a>,
}

#[derive(Debug)]
pub enum SignalError {
    Gone,
    /// EPERM: another user's process.
    Denied,
    /// Whoever asked for it is not permitted: why not.
    Forbidden(String),
    Failed(io::Error),
}

impl Target {
    pub fn open(self) -> Result<OpenTarget, OpenError> {
        let pid = i32::try_from(self.id.pid).ok().and_then(Pid::from_raw).ok_or(OpenError::Gone)?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => {
                let open = OpenTarget { target: self, pidfd, certain: Cell::new(false) };
                if open.target.kin.is_some() {
                    open.verify(&mut |_, _| Ok(false), &|_| None);
                }
                Ok(open)
            }
            // EINVAL and, from 6.9 on, ENOENT: the number is a thread's now, not a process's.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => Err(OpenError::Gone),
            Err(errno) => Err(OpenError::Failed(errno.into())),
        }
    }
}

impl OpenTarget {
    pub fn id(&self) -> ProcessId {
        self.target.id
    }

    pub fn inodes(&self) -> &[u64] {
        &self.target.inodes
    }

    /// Whether the process has not ended (a zombie has). Does not wait.
    pub fn is_alive(&self) -> bool {
        process::is_alive(&self.pidfd)
    }

    /// The process of the pidfd in the numbers of this /proc, which may be another pid namespace's than ours: there
    /// pidfd_open and /proc disagree about who a number is.
    fn pid_in_proc(&self) -> Option<u32> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd())).ok()?;
        info.lines().find_map(|line| line.strip_prefix("Pid:")).and_then(|pid| pid.trim().parse().ok())
    }

    /// Asks `proof` by PID, and `forbidden` why whoever asks may not signal the process with this PID, then makes sure
    /// that the answers were about the process of this pidfd.
    pub fn verify(&self, proof: &mut Proof<'_>, forbidden: &dyn Fn(u32) -> Option<String>) -> Verdict<'_> {
        let Target { id, inodes, kin } = &self.target;
        let is_kin = kin.is_some_and(|kin| kin.is_proved(*id, self.certain.get(), &|pid| stat::read(pid).ok()));
        let answer = match is_kin {
            true => Ok(true),
            false if inodes.is_empty() => Ok(false),
            false => proof(*id, inodes),
        };
        let forbidden = if matches!(answer, Ok(true)) { forbidden(id.pid) } else { None };
        if !self.is_alive() {
            return Verdict::Gone;
        }
        match answer {
            // The proof and the pidfd must mean the same process by this number.
            Ok(true) if self.pid_in_proc() != Some(id.pid) => Verdict::NotHolder,
            Ok(true) => {
                self.certain.set(true);
                match forbidden {
                    Some(reason) => Verdict::Forbidden(reason),
                    None => Verdict::Verified(Verified { pidfd: self.pidfd.as_fd() }),
                }
            }
            Ok(false) => Verdict::NotHolder,
            Err(error) => Verdict::Unknown(error),
        }
    }
}

impl AsFd for OpenTarget {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Verified<'_> {
    pub fn signal(&self, signal: Signal) -> Result<(), SignalError> {
        match pidfd_send_signal(self.pidfd, signal) {
            Ok(()) => Ok(()),
            Err(Errno::SRCH) => Err(SignalError::Gone),
            Err(Errno::PERM) => Err(SignalError::Denied),
            Err(errno) => Err(SignalError::Failed(errno.into())),
        }
    }
}

/// The proof by `/proc`: the process has the same start time, and `holds(pid, inode)` finds a descriptor.
///
/// `PermissionDenied` where `/proc` would not say: somebody else has to prove it.
pub fn prove_by_proc(id: ProcessId, inodes: &[u64], holds: &dyn Fn(u32, u64) -> io::Result<bool>) -> io::Result<bool> {
    match stat::read(id.pid) {
        Ok(stat) if !stat.id().is_same(id) => return Ok(false),
        Ok(_) => {}
        // Gone (which the pidfd will say), or alive and hidden by `hidepid`.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(io::ErrorKind::PermissionDenied.into()),
        Err(error) => return Err(error),
    }
    for &inode in inodes {
        if holds(id.pid, inode)? {
            return Ok(true);
        }
    }
    Ok(false)
}
