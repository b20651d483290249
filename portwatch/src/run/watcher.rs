//! The watcher: starts the command, is told to pass on signals, and ends everything. One thread, one loop: reap, decide,
//! wait. States are drawn at the module [`super`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context as _;
use nix::libc;
use nix::sys::signal::SigSet;
use nix::sys::signalfd::SignalFd;
use nix::unistd::setsid;
use rustix::event::PollFd;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitStatus, getppid, pidfd_open};

use super::control::{Cause, Control, FromWatcher, Over, Start, Status, ToWatcher};
use super::enclosure::Enclosure;
use super::log::Log;
use super::tree::{self, Clearing, Next, input};
use super::{Order, signals, with_port};
use crate::model::ProcessId;
use crate::source::stat;

/// Runs as the watcher until all is over; does not return. `keeper` is the parent; `inherited` the signals that the
/// command is to find blocked.
pub(super) fn watch(order: &Order, control: Control, keeper: ProcessId, inherited: SigSet) -> ! {
    // A panic must not go on as the program that was forked.
    let run = AssertUnwindSafe(|| Watcher::new(order, control, keeper, inherited).map(Watcher::run));
    let code = match catch_unwind(run) {
        Ok(Ok(())) => 0,
        // What it had started is the keeper's to end.
        _ => 1,
    };
    // SAFETY: takes an integer. Nothing that was forked along is to be flushed or dropped.
    unsafe { libc::_exit(code) }
}

enum Stage {
    Idle,
    Running,
    /// SIGTERM was sent to the command.
    Asked {
        kill_at: Instant,
    },
    Clearing(Clearing),
}

/// Reads of output in a row: whoever writes without end must not keep the end from coming. A pipe holds 64 KiB, or 1 MiB
/// where an ordinary user enlarged it (`fs.pipe-max-size`).
const PASSES: usize = 16;

/// The output of the command, on its way to the log.
struct Pump {
    output: OwnedFd,
    log: Log,
}

struct Watcher<'a> {
    order: &'a Order,
    /// `None`: it goes on without the front.
    control: Option<Control>,
    /// The front wants to leave.
    is_dismissed: bool,
    /// A pidfd.
    keeper: OwnedFd,
    signals: SignalFd,
    own: ProcessId,
    inherited: SigSet,
    stage: Stage,
    /// The command, while it is not reaped.
    command: Option<u32>,
    status: Option<Status>,
    /// Why it is to end.
    cause: Option<Cause>,
    lifetime_over: Option<Instant>,
    pump: Option<Pump>,
    enclosure: Option<Enclosure>,
    record: Option<PathBuf>,
}

impl<'a> Watcher<'a> {
    fn new(order: &'a Order, control: Control, keeper: ProcessId, inherited: SigSet) -> anyhow::Result<Watcher<'a>> {
        let all = SigSet::all();
        // Nothing stops it but SIGKILL: signals of the terminal and of the group stay pending for ever.
        all.thread_block().context("cannot block signals")?;
        let read = [nix::sys::signal::Signal::SIGCHLD, nix::sys::signal::Signal::SIGTERM].into_iter().collect();
        let signals = signals::block(&read)?;
        signals::expect_children();
        rustix::process::set_child_subreaper(Pid::from_raw(1)).context("cannot become a subreaper")?;
        let parent = i32::try_from(keeper.pid).ok().and_then(Pid::from_raw).context("a parent has a PID")?;
        let keeper_fd = pidfd_open(parent, PidfdFlags::empty()).context("cannot watch the parent")?;
        anyhow::ensure!(getppid() == Some(parent), "the parent is gone");
        let watcher = stat::read(std::process::id()).context("cannot read /proc/self/stat")?.id();
        control.send(&FromWatcher::Hello { watcher, keeper })?;
        Ok(Watcher {
            order,
            control: Some(control),
            is_dismissed: false,
            keeper: keeper_fd,
            signals,
            own: watcher,
            inherited,
            stage: Stage::Idle,
            command: None,
            status: None,
            cause: None,
            lifetime_over: None,
            pump: None,
            enclosure: None,
            record: None,
        })
    }

    fn run(mut self) {
        loop {
            let mut some_ended = false;
            let (command, status) = (&mut self.command, &mut self.status);
            let some_left = tree::reap(&mut |pid, how| {
                some_ended = true;
                if *command == Some(pid) {
                    *command = None;
                    *status = status_of(how);
                }
            });
            match self.advance(some_ended, some_left) {
                Turn::Wait(until) => self.wait(until),
                Turn::Over(over) => return self.end(&over),
            }
        }
    }

    fn advance(&mut self, some_ended: bool, some_left: bool) -> Turn {
        let now = Instant::now();
        if self.lifetime_over.is_some_and(|at| at <= now) {
            self.cause.get_or_insert(Cause::Lifetime);
        }
        let is_running = self.command.is_some();
        match (&mut self.stage, self.cause) {
            (Stage::Idle, None) => return Turn::Wait(None),
            (Stage::Idle, Some(cause)) => {
                return Turn::Over(Over { status: None, cause, leftovers: 0, unended: Vec::new() });
            }
            (Stage::Running, None) if is_running => {
                // Here, where it is known that the command has not ended: else the front is told how it did.
                if self.is_dismissed
                    && let Some(control) = self.control.take()
                {
                    let _ = control.send(&FromWatcher::Detached);
                }
                return Turn::Wait(self.lifetime_over);
            }
            (Stage::Running, Some(_)) if is_running => {
                self.signal_command(Signal::TERM);
                // One that is stopped cannot end.
                self.signal_command(Signal::CONT);
                let kill_at = now + self.order.grace;
                self.stage = Stage::Asked { kill_at };
                return Turn::Wait(Some(kill_at));
            }
            (Stage::Asked { kill_at }, _) if is_running && *kill_at > now => return Turn::Wait(Some(*kill_at)),
            (Stage::Running | Stage::Asked { .. }, _) => {
                self.cause.get_or_insert(Cause::Ended);
                self.signal_command(Signal::KILL);
                self.stage = Stage::Clearing(Clearing::begin(self.order.grace));
            }
            (Stage::Clearing(_), _) => {}
        }
        let Stage::Clearing(clearing) = &mut self.stage else { return Turn::Wait(None) };
        let unended = match some_left {
            false => Vec::new(),
            true => match clearing.step(some_ended, self.enclosure.as_ref()) {
                Next::At(time) => return Turn::Wait(Some(time)),
                Next::GaveUp(unended) => unended,
            },
        };
        let cause = self.cause.unwrap_or(Cause::Ended);
        Turn::Over(Over { status: self.status, cause, leftovers: clearing.asked(), unended })
    }

    /// While it is not reaped its PID is its own.
    fn signal_command(&self, signal: Signal) {
        if let Some(command) = self.command {
            let _ = tree::signal_child(command, signal);
        }
    }

    fn wait(&mut self, until: Option<Instant>) {
        let (mut has_message, mut has_output) = (false, false);
        {
            let keeper = self.keeper.as_fd();
            let signals = signals::readable(&self.signals);
            let mut fds: Vec<PollFd<'_>> = vec![input(&signals)];
            // Once it is known that the keeper is gone, it is readable for ever.
            let watches_keeper = self.cause != Some(Cause::Abandoned);
            fds.extend(watches_keeper.then(|| input(&keeper)));
            fds.extend(self.control.as_ref().map(|control| input(control)));
            fds.extend(self.pump.as_ref().map(|pump| input(&pump.output)));
            tree::wait_for(&mut fds, until);
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            let mut rest = ready[1..].iter().copied();
            if watches_keeper && rest.next() == Some(true) {
                // Also where the end is on its way for another reason.
                self.cause = Some(Cause::Abandoned);
            }
            if self.control.is_some() {
                has_message = rest.next() == Some(true);
            }
            if self.pump.is_some() {
                has_output = rest.next() == Some(true);
            }
        }
        for info in signals::drain(&self.signals) {
            if info.ssi_signo.cast_signed() == libc::SIGTERM {
                self.cause.get_or_insert(Cause::Asked);
            }
        }
        if has_output && self.pump.as_mut().is_some_and(|pump| !pump.pass()) {
            self.pump = None;
        }
        if has_message {
            self.obey();
        }
    }

    fn obey(&mut self) {
        let Some(control) = &self.control else { return };
        match control.receive::<ToWatcher>(false) {
            Ok(Some(ToWatcher::Start(start))) => self.start(start),
            Ok(Some(ToWatcher::Signal(signal))) => {
                if let (Some(pid), Some(signal)) = (self.command, Signal::from_named_raw(signal)) {
                    let _ = tree::signal_child(pid, signal);
                }
            }
            Ok(Some(ToWatcher::End)) => drop(self.cause.get_or_insert(Cause::Asked)),
            Ok(Some(ToWatcher::Detach)) => self.is_dismissed = true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(None) | Err(_) => {
                self.control = None;
                self.cause.get_or_insert(Cause::Abandoned);
            }
        }
    }

    fn start(&mut self, start: Start) {
        let told = match self.spawn(start) {
            Ok(id) => FromWatcher::Started(id),
            Err(error) => {
                self.cause = Some(Cause::Ended);
                FromWatcher::Refused(error.raw_os_error().unwrap_or(libc::EIO))
            }
        };
        if let Some(control) = &self.control {
            // Where the front is gone, the socket says so next.
            let _ = control.send(&told);
        }
    }

    fn spawn(&mut self, start: Start) -> io::Result<ProcessId> {
        let own = self.own.pid;
        let enclosure = Enclosure::of(self.own);
        let entry = enclosure.as_ref().and_then(Enclosure::make);
        // Kept before anything can fail, to be removed at the end.
        self.enclosure = enclosure.filter(|_| entry.is_some());
        let mut command = Command::new(with_port(&self.order.program, start.port));
        command.args(self.order.arguments.iter().map(|argument| with_port(argument, start.port)));
        if let Some(port) = start.port {
            command.env("PORT", port.to_string());
        }
        let mut output = None;
        if let Some(path) = &start.log {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&read, true)?;
            command.stdin(Stdio::null()).stdout(Stdio::from(write.try_clone()?)).stderr(Stdio::from(write));
            output = Some(Pump { output: read, log: Log::create(path)? });
        }
        let (background, inherited) = (self.order.background, self.inherited);
        // SAFETY: all calls are async-signal-safe and touch only the child; the descriptor of the cgroup is open there.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if getppid().map(|parent| parent.as_raw_nonzero().get().cast_unsigned()) != Some(own) {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                if let Some(entry) = &entry {
                    // Where it may not move there, it runs where it is.
                    let _ = libc::write(entry.as_raw_fd(), c"0".as_ptr().cast(), 1);
                }
                if background {
                    setsid()?;
                }
                inherited.thread_set_mask()?;
                Ok(())
            });
        }
        let child = command.spawn()?;
        self.command = Some(child.id());
        self.record = start.record;
        self.pump = output;
        self.lifetime_over = self.order.lifetime.map(|lifetime| Instant::now() + lifetime);
        self.stage = Stage::Running;
        // Out of the group of the front, which somebody may kill as a whole. It leads no group, so this succeeds.
        let _ = setsid();
        let _ = let_go_of_streams();
        Ok(stat::read(child.id())?.id())
    }

    fn end(mut self, over: &Over) {
        if let Some(pump) = &mut self.pump {
            pump.pass();
        }
        if let Some(enclosure) = &self.enclosure {
            enclosure.remove();
        }
        if let Some(record) = &self.record {
            let _ = std::fs::remove_file(record);
        }
        if let Some(control) = &self.control {
            let _ = control.send(&FromWatcher::Over(over.clone()));
        }
    }
}

enum Turn {
    Wait(Option<Instant>),
    Over(Over),
}

impl Pump {
    /// Passes on what there is, but not for ever; whether more may come.
    fn pass(&mut self) -> bool {
        let mut bytes = [0u8; 64 * 1024];
        for _ in 0..PASSES {
            match rustix::io::read(&self.output, &mut bytes[..]) {
                Ok(0) => return false,
                // A log that cannot be written, for want of room, is no reason to stop the command.
                Ok(length) => drop(self.log.write(&bytes[..length])),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
        true
    }
}

fn status_of(how: WaitStatus) -> Option<Status> {
    how.exit_status().map(Status::Exited).or_else(|| how.terminating_signal().map(Status::Signalled))
}

/// Whoever reads from a pipe that the front was given waits for the front and the command, and not for us.
pub(super) fn let_go_of_streams() -> io::Result<()> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}
