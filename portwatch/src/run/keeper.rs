//! The front's hold of a supervised command, and the keeper: who ends the tree where the watcher is killed.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::Context as _;
use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::unistd::{ForkResult, fork, setsid};
use rustix::process::{
    Pid, PidfdFlags, WaitId, WaitIdOptions, WaitOptions, pidfd_open, set_child_subreaper, waitid, waitpid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::control::{Cause, Control, FromWatcher, Over, Start, Status, ToWatcher};
use super::enclosure::Enclosure;
use super::tree::{self, Clearing, Next, input};
use super::{Order, signals, watcher};
use crate::model::{Ancestor, ProcessId};
use crate::source::stat;

/// A command that is about to run, or runs, under supervision. Dropped, or at the end of this process however it comes,
/// everything is ended; in the background, until [`Supervised::detach`].
///
/// This process has one child of it, the keeper, and stays otherwise as it was: no signal is blocked or handled, and
/// orphans do not come to it. [`Supervised::over`] reaps the keeper; after a drop or a detach it is this process's to reap.
#[derive(Debug)]
pub struct Supervised {
    control: Control,
    watcher: ProcessId,
    keeper: ProcessId,
    /// Pidfds of both, the keeper's last; `None`: it was gone by then.
    supervisors: [Option<OwnedFd>; 2],
    /// What was told already.
    over: OnceLock<Over>,
}

impl Supervised {
    /// Forks the keeper and the watcher, which waits for [`Supervised::start`]. Must be called before this process starts
    /// threads.
    ///
    /// # Errors
    /// With several threads, and when the kernel refuses a process or a descriptor.
    pub fn prepare(order: &Order) -> anyhow::Result<Supervised> {
        let threads = std::fs::read_dir("/proc/self/task").context("cannot read /proc/self/task")?.count();
        anyhow::ensure!(threads == 1, "a supervisor is forked before threads are started, and there are {threads}");
        let (control, theirs) = Control::pair()?;
        // SAFETY: there is one thread, so the child may do whatever this process may.
        let child = match unsafe { fork() }.context("cannot fork")? {
            ForkResult::Child => {
                drop(control);
                keep(order, theirs)
            }
            ForkResult::Parent { child } => Pid::from_raw(child.as_raw()).context("a child has a PID")?,
        };
        drop(theirs);
        match control.receive(true).context("the supervisor says nonsense")? {
            Some(FromWatcher::Hello { watcher, keeper }) => {
                let keeper_fd = pidfd_open(child, PidfdFlags::empty()).context("cannot watch the supervisor")?;
                let supervisors = [tree::open(watcher), Some(keeper_fd)];
                Ok(Supervised { control, watcher, keeper, supervisors, over: OnceLock::new() })
            }
            _ => {
                let _ = waitpid(Some(child), WaitOptions::empty());
                anyhow::bail!("the supervisor did not start")
            }
        }
    }

    /// The process that everything descends from; `portwatch stop` signals it.
    pub fn watcher(&self) -> ProcessId {
        self.watcher
    }

    /// The parent of the watcher.
    pub fn keeper(&self) -> ProcessId {
        self.keeper
    }

    /// Runs the command.
    ///
    /// # Errors
    /// The kernel's, where the program cannot be run; the inner one where the supervisor itself failed.
    pub fn start(&self, start: Start) -> anyhow::Result<Result<ProcessId, std::io::Error>> {
        self.control.send(&ToWatcher::Start(start))?;
        match self.control.receive(true).context("the supervisor says nonsense")? {
            Some(FromWatcher::Started(id)) => Ok(Ok(id)),
            Some(FromWatcher::Refused(errno)) => Ok(Err(std::io::Error::from_raw_os_error(errno))),
            _ => anyhow::bail!("the supervisor was killed"),
        }
    }

    /// Passes a signal on to the command.
    pub fn signal(&self, signal: i32) {
        // Where the watcher is gone, so is the command: `over` tells.
        let _ = self.control.send(&ToWatcher::Signal(signal));
    }

    /// Begins to end everything: SIGTERM, the grace, SIGKILL.
    pub fn end(&self) {
        let _ = self.control.send(&ToWatcher::End);
    }

    /// Lets it go on without this process. For one in the background. No: the command has ended, or is being ended;
    /// [`Supervised::over`] tells how.
    ///
    /// # Errors
    /// When nothing can be waited for.
    pub async fn detach(&self) -> anyhow::Result<bool> {
        // Where the watcher is gone, its last word is there to be read.
        let _ = self.control.send(&ToWatcher::Detach);
        let ready = polled(self.control.as_fd())?;
        loop {
            let mut guard = ready.readable().await.context("cannot wait for the supervisor")?;
            match self.control.receive(false) {
                Ok(Some(FromWatcher::Detached)) => return Ok(true),
                Ok(Some(FromWatcher::Over(over))) => {
                    let _ = self.over.set(over);
                    return Ok(false);
                }
                Ok(Some(_)) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => guard.clear_ready(),
                Ok(None) | Err(_) => return Ok(false),
            }
        }
    }

    /// Waits until nothing is left, the supervisors included. Cancel safe.
    ///
    /// # Errors
    /// When nothing can be waited for; and when both supervisors were killed, so that nobody knows what is left.
    pub async fn over(&self) -> anyhow::Result<Over> {
        for supervisor in self.supervisors.iter().flatten() {
            let ended = polled(supervisor.as_fd())?;
            let _ = ended.readable().await.context("cannot wait for the supervisor")?;
            // Where it is no child, or this process has the kernel reap them, there is nothing to reap.
            let _ = waitid(WaitId::PidFd(supervisor.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        }
        while let Ok(Some(told)) = self.control.receive(false) {
            if let FromWatcher::Over(over) = told {
                // The keeper speaks where the watcher was killed, which may have been after its last word.
                let _ = self.over.set(over);
            }
        }
        let over = self.over.get().cloned();
        over.context("both supervisors were killed, and the command with them; what it had started may still run")
    }
}

fn polled(fd: BorrowedFd<'_>) -> anyhow::Result<AsyncFd<BorrowedFd<'_>>> {
    // SAFETY: a borrowed descriptor stays open, and the same.
    let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    watched.map_err(std::io::Error::from).context("cannot wait for the supervisor")
}

/// Runs as the keeper: a session of its own, and nothing to do while the watcher lives.
fn keep(order: &Order, control: Control) -> ! {
    let run = || -> anyhow::Result<()> {
        let inherited = SigSet::thread_get_mask().context("cannot read the signal mask")?;
        // Nothing ends it but SIGKILL.
        SigSet::all().thread_block().context("cannot block signals")?;
        let signals = signals::block(&SigSet::from(Signal::SIGCHLD))?;
        signals::expect_children();
        set_child_subreaper(Pid::from_raw(1)).context("cannot become a subreaper")?;
        let own = stat::read(std::process::id()).context("cannot read /proc/self/stat")?.id();
        // SAFETY: there is one thread, so the child may do whatever this process may.
        let watcher = match unsafe { fork() }.context("cannot fork")? {
            ForkResult::Child => watcher::watch(order, control, own, inherited),
            ForkResult::Parent { child } => child.as_raw().cast_unsigned(),
        };
        // The watcher has the session and the streams of the front until the command has them.
        setsid().context("cannot lead a session")?;
        watcher::let_go_of_streams().context("cannot open /dev/null")?;
        // It is not reaped yet, whatever became of it.
        let id = stat::read(watcher).context("cannot read the watcher's stat")?.id();
        let mut is_over = None;
        while is_over.is_none() {
            let some_left = tree::reap(&mut |pid, how| {
                if pid == watcher {
                    is_over = Some(how.exit_status() == Some(0));
                }
            });
            if is_over.is_none() {
                anyhow::ensure!(some_left, "the watcher is nobody's child");
                tree::wait_for(&mut [input(&signals::readable(&signals))], None);
                signals::drain(&signals);
            }
        }
        if is_over == Some(false) {
            let (leftovers, unended) = clear(id, order.grace, &signals);
            // The kernel killed the command as its parent died.
            let status = Some(Status::Signalled(libc::SIGKILL));
            // Where the front is gone, nobody asks.
            let _ = control.send(&FromWatcher::Over(Over { status, cause: Cause::Abandoned, leftovers, unended }));
        }
        Ok(())
    };
    // A panic must not go on as the program that was forked.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    // SAFETY: takes an integer. Nothing that was forked along is to be flushed or dropped.
    unsafe { libc::_exit(0) }
}

/// Ends whatever the watcher left, all of which descends from this process now; `signals` tells of SIGCHLD. How many there
/// were, and those that do not end.
fn clear(watcher: ProcessId, grace: Duration, signals: &SignalFd) -> (usize, Vec<Ancestor>) {
    let enclosure = Enclosure::of(watcher);
    let mut clearing = Clearing::begin(grace);
    let mut some_ended = false;
    let unended = loop {
        if !tree::reap(&mut |_, _| some_ended = true) {
            break Vec::new();
        }
        match clearing.step(std::mem::take(&mut some_ended), enclosure.as_ref()) {
            Next::At(time) => tree::wait_for(&mut [input(&signals::readable(signals))], Some(time)),
            Next::GaveUp(unended) => break unended,
        }
        signals::drain(signals);
    };
    if let Some(enclosure) = enclosure {
        enclosure.remove();
    }
    (clearing.asked(), unended)
}
