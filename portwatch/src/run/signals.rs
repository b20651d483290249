//! Signals to the front: which are passed on to the command, and which end it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use anyhow::Context as _;
use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use tokio::io::unix::AsyncFd;

/// `SI_KERNEL` (asm-generic/siginfo.h): from the kernel, which for these signals is from the terminal.
const SI_KERNEL: i32 = 0x80;

/// What is passed on.
const FORWARDED: [Signal; 7] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// What a signal to the front asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// To pass it on to the command.
    Forward(i32),
    /// To end everything: SIGTERM, or the terminal is gone.
    End,
    /// Nothing more, where the command is in the foreground of the same terminal, which gave it this signal as well.
    Shared(i32),
}

/// The signals to this process from now on, read instead of obeyed. Those that it was started to ignore (nohup, a job in
/// the background of a script) stay ignored.
#[derive(Debug)]
pub struct Signals(AsyncFd<Readable>);

#[derive(Debug)]
struct Readable(SignalFd);

impl AsRawFd for Readable {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Signals {
    /// Must be called in a tokio runtime, before any other thread is started.
    ///
    /// # Errors
    /// When the kernel has no descriptor for it.
    pub fn open() -> anyhow::Result<Signals> {
        let set: SigSet = FORWARDED.into_iter().filter(|signal| !is_ignored(*signal)).collect();
        let fd = block(&set)?;
        // SAFETY: `Readable` keeps its descriptor as long as it is there, and always tells the same one.
        let fd = unsafe { AsyncFd::register(Readable(fd)) };
        fd.map(Signals).map_err(io::Error::from).context("cannot wait for signals")
    }

    /// The next one. Cancel safe.
    ///
    /// # Errors
    /// When it cannot be read, which does not happen.
    pub async fn next(&self) -> io::Result<Told> {
        loop {
            let mut ready = self.0.readable().await?;
            match self.0.get_ref().0.read_signal()? {
                Some(info) => return Ok(told(&info)),
                None => ready.clear_ready(),
            }
        }
    }
}

fn told(info: &siginfo) -> Told {
    let number = info.ssi_signo.cast_signed();
    match (number, info.ssi_code == SI_KERNEL) {
        (libc::SIGTERM, _) | (libc::SIGHUP, true) => Told::End,
        (_, true) => Told::Shared(number),
        _ => Told::Forward(number),
    }
}

/// Blocks these signals; the descriptor that they are read from.
pub(super) fn block(set: &SigSet) -> anyhow::Result<SignalFd> {
    set.thread_block().context("cannot block signals")?;
    let fd = SignalFd::with_flags(set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
    fd.context("cannot make a signal descriptor")
}

/// Reads all that came.
pub(super) fn drain(fd: &SignalFd) -> Vec<siginfo> {
    std::iter::from_fn(|| fd.read_signal().ok().flatten()).collect()
}

/// So that children leave a status: a parent may have left SIGCHLD ignored, and then the kernel reaps them.
pub(super) fn expect_children() {
    // SAFETY: the default action runs no code.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) };
}

/// Whether this process was started to ignore the signal, or does so now.
pub fn is_ignored(signal: Signal) -> bool {
    // SAFETY: all-zero bytes are a valid sigaction, and a null pointer changes nothing.
    let (result, action) = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        (libc::sigaction(signal as libc::c_int, std::ptr::null(), &raw mut action), action)
    };
    result == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Of which the reading side is polled elsewhere.
pub(super) fn readable(fd: &SignalFd) -> BorrowedFd<'_> {
    fd.as_fd()
}
