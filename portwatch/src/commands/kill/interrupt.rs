//! Ctrl-C and SIGTERM during a kill that the agent carries out: the agent is told to stop, and once it has told what it did
//! by then, this program ends by the signal, as one does that works alone.

use std::process::ExitCode;

use anyhow::Context as _;
use nix::sys::signal::{SigHandler, Signal, raise, signal};
use portwatch::run::is_ignored;
use tokio::signal::unix::{self, SignalKind};

/// The signals that stop a kill. Those that this program was started to ignore stay ignored.
pub(super) struct Interrupts {
    interrupt: Option<unix::Signal>,
    terminate: Option<unix::Signal>,
}

impl Interrupts {
    /// From now on they are told of here. Needs a tokio runtime.
    pub(super) fn open() -> anyhow::Result<Interrupts> {
        let open = |signal, kind| {
            if is_ignored(signal) { Ok(None) } else { unix::signal(kind).map(Some) }
        };
        let opened = open(Signal::SIGINT, SignalKind::interrupt()).and_then(|interrupt| {
            Ok(Interrupts { interrupt, terminate: open(Signal::SIGTERM, SignalKind::terminate())? })
        });
        opened.context("cannot handle signals")
    }

    /// The next one.
    pub(super) async fn next(&mut self) -> Signal {
        tokio::select! {
            () = told(&mut self.interrupt) => Signal::SIGINT,
            () = told(&mut self.terminate) => Signal::SIGTERM,
        }
    }
}

async fn told(signal: &mut Option<unix::Signal>) {
    if let Some(signal) = signal
        && signal.recv().await.is_some()
    {
        return;
    }
    std::future::pending().await
}

/// Ends this program by the signal. The init of a container outlives that: the exit code that a shell would show then.
pub(super) fn end_by(by: Signal) -> ExitCode {
    // SAFETY: the default action runs no code.
    let reset = unsafe { signal(by, SigHandler::SigDfl) };
    if reset.is_ok() {
        let _ = raise(by);
    }
    u8::try_from(128 + by as i32).map_or(ExitCode::FAILURE, ExitCode::from)
}
