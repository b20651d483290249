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
//! ([`peer`]) that knows nothing but its socket and how to ask. A kill runs on a thread ([`kill`]), by the rights of who
//! asks for it ([`access`]). Everything is bounded: requests in bytes and a second, connections in all and of one user
//! ([`load`]), answers and kills under way, changes that wait for subscribers. Nothing here runs by the clock while nobody
//! is connected and nothing is amiss. What is amiss is in [`troubles`], and the agent goes on.

mod access;
mod alarm;
mod core;
mod kill;
mod lineages;
mod load;
mod peer;
mod policy;
mod rules;
mod socket;
mod troubles;
mod vigil;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use jiff::tz::TimeZone;
use rustix::mm::{Advice, madvise};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use self::kill::Kills;
use self::load::Load;
use self::peer::Shared;
use self::policy::Policy;
use self::socket::Socket;
use self::troubles::{About, Troubles};
use crate::config::Access;
use crate::history::{Recorder, Retention};
use crate::metrics::{Metrics, http};
use crate::render::Clock;
use crate::rules::Rule;
use crate::service;
use crate::source::{Probe, process};
use crate::tracker::Tracker;

/// Questions that may wait for the task that owns the table.
const ASKS: usize = 64;

/// What the service manager shows of an agent without troubles.
const WELL: &str = "tracking listeners";

/// How soon the configuration is tried again that could not be read for want of something.
const RELOAD_AGAIN: Duration = Duration::from_secs(1);

/// How long the end may wait for history to be written.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How to run.
pub struct Config {
    /// Reads what is allowed to whom: now, and again at every SIGHUP.
    pub access: Box<dyn Fn() -> anyhow::Result<Access>>,
    /// Reads what is ended by itself: at the same times.
    pub rules: Box<dyn Fn() -> anyhow::Result<Vec<Rule>>>,
    /// Whether rules only tell what they would do.
    pub dry_run_rules: bool,
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

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").field("socket", &self.socket).finish_non_exhaustive()
    }
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
    let descriptors = raise_file_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    // A task for each connection: should one panic, the others go on.
    LocalSet::new().block_on(&runtime.context("cannot start the event loop")?, serve(config, descriptors, ready))
}

async fn serve(config: Config, descriptors: usize, ready: impl FnOnce(&Tracker)) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let hangup = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;
    let policy = Policy::new((config.access)()?);
    let rules = (config.rules)()?;
    let troubles = Troubles::default();
    // The socket first: a second agent must not attach probes only to find out that it is the second.
    let socket = match config.activated {
        Some(listener) => Socket::adopt(listener, troubles.clone())?,
        None => Socket::open(&config.socket, troubles.clone())?,
    };
    let scrapes = config.metrics.map(http::bind).transpose()?;
    let tracker = Tracker::open(config.probe, config.ring_bytes)?;
    let history = config.history.map(|(path, retention)| Recorder::open(&path, retention, &clock()));
    history.iter().for_each(|history| history.after_floods(give_back_memory));
    give_back_memory();
    ready(&tracker);
    let (asks, questions) = mpsc::channel(ASKS);
    let load = Load::new(descriptors);
    let metrics = Arc::new(Metrics::new(tracker.live().tier()));
    let keeper = rules::Rules::new(config.dry_run_rules, config.probe);
    let mut core = core::Core::new(tracker, load.clone(), troubles.clone(), Arc::clone(&metrics), history, keeper);
    core.replace_rules(rules);
    let marks = config.marks.into();
    let tell = asks.clone();
    let shared = Shared { asks, load, kills: Kills::default(), policy: policy.clone(), marks };
    let scraped = async {
        match scrapes {
            Some(listener) => http::serve(listener, move || metrics.text()).await,
            None => std::future::pending().await,
        }
    };
    service::ready(WELL);
    let ended = tokio::select! {
        ended = core.run(questions) => ended,
        ended = peer::accept(socket, shared) => ended.map(|never| match never {}),
        never = reload(hangup, &*config.access, &*config.rules, &policy, &tell, &troubles) => match never {},
        () = scraped => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    service::stopping("writing the last of history");
    core.stop(LAST_WORDS);
    ended
}

/// Reads the configuration anew whenever it is asked to, and again where that failed for want of descriptors or memory:
/// who asked is gone by then. A broken one changes nothing.
async fn reload(
    mut hangup: Signal,
    access: &dyn Fn() -> anyhow::Result<Access>,
    rules: &dyn Fn() -> anyhow::Result<Vec<Rule>>,
    policy: &Policy,
    core: &mpsc::Sender<core::Ask>,
    troubles: &Troubles,
) -> Infallible {
    let mut is_exhausted = false;
    loop {
        tokio::select! {
            asked = hangup.recv() => if asked.is_none() {
                return std::future::pending().await;
            },
            () = tokio::time::sleep(RELOAD_AGAIN), if is_exhausted => {}
        }
        service::reloading();
        let outcome = access().and_then(|access| Ok((access, rules()?)));
        is_exhausted = outcome.as_ref().is_err_and(is_passing);
        let trouble = match outcome {
            Ok((access, rules)) => {
                tracing::info!(?access, rules = rules.len(), "the configuration is read anew");
                policy.set(access);
                // An error: the agent ends.
                let _ = core.send(core::Ask::ReplaceRules { rules }).await;
                None
            }
            Err(error) => Some(format!("the configuration stays as it was: {error:#}")),
        };
        troubles.set(About::Configuration, trouble);
        service::ready(&troubles.told().first().map_or(WELL.to_owned(), String::clone));
    }
}

/// Whether an error is over once somebody gives something back.
fn is_passing(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref()).any(http::is_exhausted)
}

/// This moment, on both clocks.
fn clock() -> Clock {
    process::clock(TimeZone::UTC)
}

/// Of what it took to start, the agent needs little from then on: the loader knew the kernel's types, and most of the
/// program and its libraries never runs again.
fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer, and only returns free memory to the kernel.
    unsafe {
        nix::libc::malloc_trim(0);
    }
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    for (start, bytes) in maps.lines().filter_map(code) {
        // SAFETY: the pages are a file's and cannot be written, so they are what the file has: whoever touches one gets
        // it anew from there.
        let _ = unsafe { madvise(std::ptr::with_exposed_provenance_mut(start), bytes, Advice::LinuxDontNeed) };
    }
}

/// Address and size of a mapping, if that is code of a file (`r-xp`, an inode), from a line of `/proc/PID/maps`.
fn code(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, access) = (fields.next()?, fields.next()?);
    let inode = fields.nth(2)?;
    if access != "r-xp" || inode == "0" {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let number = |hex| usize::from_str_radix(hex, 16).ok();
    let (start, end) = (number(start)?, number(end)?);
    Some((start, end.checked_sub(start)?))
}

/// Every connection takes a descriptor. Says how many there may be.
fn raise_file_limit() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where this is refused there are fewer connections.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let limit = getrlimit(Resource::Nofile).current;
    limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_given_back() {
        for (line, want) in [
            (
                "55fa1f986000-55fa203b1000 r-xp 002f9000 fe:00 32 /usr/bin/portwatch",
                Some((0x55fa_1f98_6000, 0xa2_b000)),
            ),
            ("1000-3000 r-xp 00000000 fe:00 7 /usr/lib/a b (deleted)", Some((0x1000, 0x2000))),
            ("55fa203b1000-55fa203f2000 r--p 00d24000 fe:00 32 /usr/bin/portwatch", None),
            ("55fa203f2000-55fa203f8000 rwxp 00d24000 fe:00 32 /usr/bin/portwatch", None),
            ("7ffc0b1f6000-7ffc0b1f8000 r-xp 00000000 00:00 0 [vdso]", None),
            ("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]", None),
            ("", None),
            ("x-y r-xp 0 0 1", None),
        ] {
            assert_eq!(code(line), want, "{line}");
        }
    }

    #[test]
    fn what_was_given_back_runs_as_ever() {
        give_back_memory();
        assert!(std::fs::read_to_string("/proc/self/maps").unwrap().lines().any(|line| code(line).is_some()));
    }
}
