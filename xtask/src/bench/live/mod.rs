//! The event path and the agent: how soon portwatch tells, how much it bears, what it costs others, what it takes.
//!
//! Each part is a module and documents its figures; they share a `watch` whose lines are read ([`watch`]), the bench's
//! agent ([`super::agent`]) and processes that open and close listeners at a given rate ([`storm`]). Nothing here is
//! wrong because the machine is busy: late is a figure, only never told, told wrongly or lost uncounted is wrong.

mod agent;
mod cost;
mod interval;
mod latency;
pub(crate) mod storm;
mod throughput;
mod watch;

pub(super) use agent::agent;
pub(super) use cost::cost;
pub(super) use latency::latency;
pub(super) use throughput::throughput;

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, socket};
use serde_json::Value;

use super::agent::PATIENCE;

/// How much is measured here.
pub(super) struct Effort {
    /// Listens of each way to be told, on each host, and the time after which it is enough.
    listens: usize,
    listens_limit: Duration,
    /// Opens and closes a second that are asked for, and for how long each.
    rates: &'static [u64],
    step: Duration,
    /// How often the probes are switched off and on, and the time that each kind of work gets in between.
    alternations: usize,
    block: Duration,
    /// Listeners of an agent.
    sizes: &'static [usize],
    /// Starts of an agent, and snapshots that are read of it.
    starts: usize,
    snapshots: usize,
    /// Of which of these sizes an agent is left alone, for how long, and how often at most until nothing ran.
    idle_listeners: usize,
    idle: Duration,
    idle_attempts: usize,
}

pub(super) const FULL: Effort = Effort {
    listens: 10_000,
    listens_limit: Duration::from_secs(20),
    rates: &[10_000, 25_000, 50_000, 75_000, 100_000, 150_000, 200_000, 300_000, 400_000],
    step: Duration::from_secs(3),
    alternations: 80,
    block: Duration::from_millis(100),
    sizes: &[0, 1000, 10_000],
    starts: 11,
    snapshots: 15,
    idle_listeners: 1000,
    idle: Duration::from_secs(30),
    idle_attempts: 4,
};

pub(super) const QUICK: Effort = Effort {
    listens: 300,
    listens_limit: Duration::from_millis(500),
    rates: &[10_000, 50_000],
    step: Duration::from_millis(300),
    alternations: 4,
    block: Duration::from_millis(30),
    sizes: &[0, 100],
    starts: 2,
    snapshots: 3,
    idle_listeners: 100,
    idle: Duration::from_secs(2),
    idle_attempts: 1,
};

/// A TCP socket bound to a port of the kernel's choice on 127.0.0.1, not yet listening.
fn bound() -> Result<(OwnedFd, u16)> {
    let socket =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("cannot make a socket")?;
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).context("cannot bind")?;
    let address: SockaddrIn = getsockname(socket.as_raw_fd()).context("a bound socket has no address")?;
    Ok((socket, address.port()))
}

/// Why a part that is about the kernel's events cannot be measured with this agent, if it cannot.
fn without_events(status: &Value) -> Option<String> {
    let reason = status["reasons"][0]["reason"].as_str().unwrap_or("no reason is told");
    (status["tier"] == "poll").then(|| format!("The kernel tells portwatch nothing here ({reason}): not measured.\n"))
}
