//! The front's hold of a supervised command, and the keeper: who ends the tree where the watcher is killed.

use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::Context as _;
use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::unistd::{ForkResult, fork, setsid};
use rustix::process::{Pid, set_child_subreaper};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::control::{Cause, Control, FromWatcher, Over, Start, Status, ToWatcher};
use super::enclosure::Enclosure;
use super::tree::{self, Clearing, Next, input};
use super::{Order, signals, watcher};
use crate::model::ProcessId;
use crate::source::stat;

/// A command that is about to run, or runs, under supervision. Dropped, or at the end of this process however it comes,
/// everything is ended; in the background, until [`Supervised::detach`].
#[derive(Debug)]
pub struct Supervised {
    control: Control,
    watcher: ProcessId,
    keeper: ProcessId,
    /// Where the front is the keeper.
    own: Option<Keeper>,
}

/// Who ends what the watcher left, because somebody killed it.
#[derive(Debug)]
struct Keeper {
    watcher: ProcessId,
    /// SIGCHLD.
    signals: SignalFd,
    grace: Duration,
    /// Children from before: a script that ends in `exec portwatch run` may have started some, which are none of ours.
    others: Vec<ProcessId>,
}

impl Supervised {
    /// Forks the watcher, which waits for [`Supervised::start`]. Must be called before this process starts threads.
    ///
    /// # Errors
    /// With several threads, and when the kernel refuses a process or a descriptor.
    pub fn prepare(order: &Order) -> anyhow::Result<Supervised> {
        let threads = std::fs::read_dir("/proc/self/task").context("cannot read /proc/self/task")?.count();
        anyhow::ensure!(threads == 1, "a supervisor is forked before threads are started, and there are {threads}");
        let (control, theirs) = Control::pair()?;
        signals::expect_children();
        let (signals, inherited) = signals::block(&SigSet::from(Signal::SIGCHLD))?;
        let others = tree::children();
        let front = stat::read(std::process::id()).context("cannot read /proc/self/stat")?.id();
        let own = if order.background {
            // SAFETY: there is one thread, so the child may do whatever this process may.
            match unsafe { fork() }.context("cannot fork")? {
                ForkResult::Child => {
                    drop((control, signals));
                    keep(order, theirs, inherited)
                }
                ForkResult::Parent { .. } => None,
            }
        } else {
            set_child_subreaper(Pid::from_raw(1)).context("cannot become a subreaper")?;
            // SAFETY: as above.
            match unsafe { fork() }.context("cannot fork")? {
                ForkResult::Child => {
                    drop((control, signals));
                    watcher::watch(order, theirs, front, inherited)
                }
                ForkResult::Parent { .. } => Some(signals),
            }
        };
        drop(theirs);
        match control.receive(true).context("the supervisor says nonsense")? {
            Some(FromWatcher::Hello { watcher, keeper }) => {
                let own = own.map(|signals| Keeper { watcher, signals, grace: order.grace, others });
                Ok(Supervised { control, watcher, keeper, own })
            }
            _ => anyhow::bail!("the supervisor did not start"),
        }
    }

    /// The process that everything descends from; `portwatch stop` signals it.
    pub fn watcher(&self) -> ProcessId {
        self.watcher
    }

    /// The parent of the watcher: this process, but in the background.
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

    /// Lets it go on without this process. For one in the background.
    ///
    /// # Errors
    /// Where it is gone already.
    pub fn detach(self) -> anyhow::Result<()> {
        self.control.send(&ToWatcher::Detach)
    }

    /// Waits until nothing is left. Where the watcher was killed, ends what it left. Cancel safe.
    ///
    /// # Errors
    /// When nothing can be waited for.
    pub async fn over(&self) -> anyhow::Result<Over> {
        // SAFETY: the descriptor is borrowed from what outlives this.
        let ready = unsafe { AsyncFd::register_with_interest(self.control.as_fd(), Interest::READABLE) };
        let ready = ready.map_err(std::io::Error::from).context("cannot wait for the supervisor")?;
        loop {
            let mut guard = ready.readable().await.context("cannot wait for the supervisor")?;
            match self.control.receive(false) {
                Ok(Some(FromWatcher::Over(over))) => return Ok(over),
                Ok(Some(_)) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => guard.clear_ready(),
                Ok(None) | Err(_) => break,
            }
        }
        let (leftovers, unended) = self.own.as_ref().map(Keeper::clear).unwrap_or_default();
        // The kernel killed the command as its parent died.
        let status = Some(Status::Signalled(libc::SIGKILL));
        Ok(Over { status, cause: Cause::Abandoned, leftovers, unended })
    }
}

impl Keeper {
    /// Ends whatever descends from this process, but for children from before.
    fn clear(&self) -> (usize, Vec<crate::model::Ancestor>) {
        let enclosure = Enclosure::of(self.watcher);
        let mut clearing = Clearing::begin(self.grace, self.others.clone());
        let mut some_ended = false;
        let unended = loop {
            if !tree::reap(&mut |_, _| some_ended = true) || clearing.is_over() {
                break Vec::new();
            }
            match clearing.step(std::mem::take(&mut some_ended), enclosure.as_ref()) {
                Next::At(time) => tree::wait_for(&mut [input(&signals::readable(&self.signals))], Some(time)),
                Next::GaveUp(unended) => break unended,
            }
            signals::drain(&self.signals);
        };
        if let Some(enclosure) = enclosure {
            enclosure.remove();
        }
        (clearing.asked(), unended)
    }
}

/// Runs as the keeper in the background: a session of its own, and nothing to do while the watcher lives.
fn keep(order: &Order, control: Control, inherited: SigSet) -> ! {
    let run = || -> anyhow::Result<()> {
        setsid().context("cannot lead a session")?;
        set_child_subreaper(Pid::from_raw(1)).context("cannot become a subreaper")?;
        watcher::let_go_of_streams().context("cannot open /dev/null")?;
        // Nothing ends it but SIGKILL.
        SigSet::all().thread_block().context("cannot block signals")?;
        let (signals, _) = signals::block(&SigSet::from(Signal::SIGCHLD))?;
        let own = stat::read(std::process::id()).context("cannot read /proc/self/stat")?.id();
        // SAFETY: there is one thread, so the child may do whatever this process may.
        let watcher = match unsafe { fork() }.context("cannot fork")? {
            ForkResult::Child => watcher::watch(order, control, own, inherited),
            ForkResult::Parent { child } => child.as_raw().cast_unsigned(),
        };
        drop(control);
        // It is not reaped yet, whatever became of it.
        let id = stat::read(watcher).context("cannot read the watcher's stat")?.id();
        let keeper = Keeper { watcher: id, signals, grace: order.grace, others: Vec::new() };
        let mut is_over = None;
        while is_over.is_none() {
            let some_left = tree::reap(&mut |pid, how| {
                if pid == watcher {
                    is_over = Some(how.exit_status() == Some(0));
                }
            });
            if is_over.is_none() {
                anyhow::ensure!(some_left, "the watcher is nobody's child");
                tree::wait_for(&mut [input(&signals::readable(&keeper.signals))], None);
                signals::drain(&keeper.signals);
            }
        }
        if is_over == Some(false) {
            keeper.clear();
        }
        Ok(())
    };
    // A panic must not go on as the program that was forked.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    // SAFETY: takes an integer. Nothing that was forked along is to be flushed or dropped.
    unsafe { libc::_exit(0) }
}
