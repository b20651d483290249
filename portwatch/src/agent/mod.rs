//! The agent: one privileged process that knows every listener, for everybody who asks.
//!
//! ```text
//!  kernel ──► Tracker ──► Core ──► change ──► each subscriber's queue ──► Peer ──► socket
//!                          ▲ │
//!                     Ask  │ └──── reply ──────────────────────────────►  Peer
//!                          └──────────────────────────────────────────────  │
//! ```
//! One task, [`core`], owns the table: it applies every event and answers every question between two of them, so nothing
//! is locked and a subscription begins exactly where its first answer ends. Each connection is a task of its own
//! ([`peer`]) that knows nothing but its socket and how to ask. Everything is bounded: requests in bytes, connections
//! in all and of one user, changes that wait for a subscriber. Nothing here runs by the clock while nobody is connected.

mod access;
mod core;
mod kill;
mod lineages;
mod peer;
mod socket;

use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use jiff::tz::TimeZone;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use crate::history::{Recorder, Retention};
use crate::metrics::{Metrics, http};
use crate::render::Clock;
use crate::service;
use crate::source::{Probe, process};
use crate::tracker::Tracker;

/// Where the agent listens unless told otherwise.
pub const SOCKET: &str = "/run/portwatch/agent.sock";

/// Questions that may wait for the task that owns the table.
const ASKS: usize = 64;

/// How long the end may wait for history to be written.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How to run.
#[derive(Debug)]
pub struct Config {
    /// Where to listen, unless a service manager has done that.
    pub socket: PathBuf,
    pub activated: Option<UnixListener>,
    /// Where Prometheus may ask.
    pub metrics: Option<SocketAddr>,
    /// The file that history is kept in, and for how long.
    pub history: Option<(PathBuf, Retention)>,
    /// The directory that marks are kept in, by name; its parent must be there.
    pub marks: PathBuf,
    pub probe: Probe,
    /// As in [`crate::source::Live::open`].
    pub ring_bytes: Option<u32>,
}

/// Another agent has the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlreadyRunning(String);

impl std::fmt::Display for AlreadyRunning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for AlreadyRunning {}

/// Runs until SIGTERM or SIGINT. `ready` is called once listeners are tracked and clients are served.
///
/// # Errors
/// [`AlreadyRunning`]; when the socket cannot be made, or events cannot be read any more.
pub fn run(config: Config, ready: impl FnOnce(&Tracker)) -> anyhow::Result<()> {
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    // A task for each connection: should one panic, the others go on.
    LocalSet::new().block_on(&runtime.context("cannot start the event loop")?, serve(config, ready))
}

async fn serve(config: Config, ready: impl FnOnce(&Tracker)) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    // The socket first: a second agent must not attach probes only to find out that it is the second.
    let socket = match config.activated {
        Some(listener) => socket::adopt(listener)?,
        None => socket::open(&config.socket)?,
    };
    let scrapes = config.metrics.map(http::bind).transpose()?;
    let tracker = Tracker::open(config.probe, config.ring_bytes)?;
    let history = config.history.map(|(path, retention)| Recorder::open(&path, retention, &clock()));
    give_back_memory();
    ready(&tracker);
    let (asks, questions) = mpsc::channel(ASKS);
    let load = peer::Load::default();
    let metrics = Arc::new(Metrics::new(tracker.live().tier()));
    let mut core = core::Core::new(tracker, load.clone(), Arc::clone(&metrics), history);
    let scraped = async {
        match scrapes {
            Some(listener) => http::serve(listener, move || metrics.text()).await,
            None => std::future::pending().await,
        }
    };
    service::ready(&format!("{} listeners", core.listeners()));
    let ended = tokio::select! {
        ended = core.run(questions) => ended,
        never = peer::accept(socket.listener(), asks, load, config.marks) => match never {},
        () = scraped => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    service::stopping("writing the last of history");
    core.stop(LAST_WORDS);
    ended
}

/// This moment, on both clocks.
fn clock() -> Clock {
    process::clock(TimeZone::UTC)
}

/// What the loader needed to know of the kernel's types is twice what the agent needs from then on.
fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer, and only returns free memory to the kernel.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

/// Every connection takes a descriptor.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where this is refused there are fewer connections.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
