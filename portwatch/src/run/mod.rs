//! Supervises a command so that nothing of it is left behind: whatever it started is gone when it is over.
//!
//! ```text
//!  front ───────── control ──────────┐  (in the background, the front leaves once it is ready)
//!    └► keeper                       │
//!         └► watcher ◄───────────────┘
//!              └► the command
//!                   └► its descendants
//! ```
//! The *watcher* is a process of its own, in a session of its own: neither a terminal nor a signal to the process group
//! of the front reaches it. It starts the command and is the subreaper of all that comes of it: a descendant that loses
//! its parent, however it daemonized, becomes the watcher's child. So the watcher has no descendants exactly when it
//! has no children, which wait(2) tells ([`tree`]). Its parent, the *keeper*, is such a process and a subreaper too, with
//! no other children. Each of the two ends the whole tree when the other one is killed. When both are killed at once, the
//! kernel kills the command itself (`PR_SET_PDEATHSIG`, which a set-user-ID program loses), and nobody the rest,
//! in a cgroup of its own or not.
//!
//! The front is no keeper, though that would save a process: it may be a program with children of its own, and nothing
//! tells those from what a killed watcher leaves to it.
//!
//! ```text
//!  Idle ─► Running ──────────────────────────────► Clearing ─────────────► over
//!             │       the command ended               │  the others: SIGTERM, after the grace SIGKILL, until
//!             └─► Asked ──► (SIGKILL after the grace) ┘  wait(2) says that there is no child
//!                 SIGTERM: asked to end, lifetime over, front or keeper gone
//! ```
//! Where a cgroup of its own can be made ([`enclosure`]) the last step kills by that, too, in one go of the kernel.
//!
//! A process that somebody else starts on behalf of the command (systemd, a container engine, cron) is no descendant.

mod control;
mod enclosure;
pub mod health;
mod keeper;
pub mod log;
pub mod port;
pub mod register;
mod signals;
mod tree;
mod watcher;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::time::Duration;

use anyhow::Context as _;

pub use control::{Cause, Over, Start, Status};
pub use keeper::Supervised;
pub use signals::{Signals, Told, is_ignored};

/// Exit code where the lifetime was over, as timeout(1) has it.
pub const LIFETIME_OVER: u8 = 124;

/// Runs it, and returns when it is over and nothing of it is left. To be called by a process that has one thread: it
/// forks. Signals are the caller's own affair ([`Supervised`] and [`Signals`] pass them on); when the caller is killed, all
/// that it ran is ended. The caller is left as it was: with the children that it had, or has started since.
///
/// # Errors
/// When it cannot be started, or both supervisors were killed.
pub fn supervise(order: &Order) -> anyhow::Result<Over> {
    let supervised = Supervised::prepare(order)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot start the event loop")?;
    let started = supervised.start(Start::default())?;
    let over = runtime.block_on(supervised.over());
    started.with_context(|| format!("cannot run {}", order.program.display()))?;
    over
}

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Order {
    /// `{port}` in it and in its arguments becomes the port, where there is one.
    pub program: OsString,
    pub arguments: Vec<OsString>,
    /// How long the command, and after it everything that it left behind, may take to end after SIGTERM.
    pub grace: Duration,
    /// How long it may run.
    pub lifetime: Option<Duration>,
    /// Whether it goes on without the front, with its output in a log.
    pub background: bool,
}

/// A word of a command, with the port in place of `{port}`, where there is one.
pub fn with_port(text: &OsStr, port: Option<u16>) -> OsString {
    const MARK: &[u8] = b"{port}";
    let Some(port) = port.map(|port| port.to_string()) else { return text.to_owned() };
    let mut left = text.as_bytes();
    let mut made = Vec::with_capacity(left.len());
    while let Some(at) = left.windows(MARK.len()).position(|window| window == MARK) {
        made.extend_from_slice(&left[..at]);
        made.extend_from_slice(port.as_bytes());
        left = &left[at + MARK.len()..];
    }
    made.extend_from_slice(left);
    OsString::from_vec(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_put_into_arguments() {
        for (text, port, want) in [
            ("--port={port}", Some(8000), "--port=8000"),
            ("{port}:{port}", Some(1), "1:1"),
            ("{port}", None, "{port}"),
            ("{ports}{por", Some(1), "{ports}{por"),
            ("", Some(1), ""),
        ] {
            assert_eq!(with_port(OsStr::new(text), port), want, "{text}");
        }
    }
}
