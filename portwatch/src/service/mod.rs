//! portwatch as a service of systemd: the socket that it is handed, what it tells the manager, and its log ([`log`]).
//! Each of these does nothing, or the ordinary thing, where no manager runs it.

pub mod log;

use std::future::pending;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use anyhow::{Context, bail};
use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use crate::render::escape;

/// The name of the agent's socket among those that the manager passes (`FileDescriptorName=` in portwatch.socket).
const SOCKET_NAME: &str = "agent";

/// The unix stream socket that the manager listens on for the agent, if it does; non-blocking. Takes it once, and changes
/// the environment: call it before there are threads.
///
/// # Errors
/// Where what is passed is not one such socket.
pub fn activated() -> anyhow::Result<Option<UnixListener>> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut passed = ListenFd::from_env();
    if passed.len() == 0 {
        return Ok(None);
    }
    let index = choose(passed.len(), &names)?;
    let listener =
        passed.take_unix_listener(index).context("cannot take the socket that the service manager passes")?;
    let listener = listener.context("the service manager passes no socket")?;
    if !rustix::net::sockopt::socket_acceptconn(&listener)? {
        bail!("the service manager passes a connection, not a socket that listens; set Accept=no in portwatch.socket");
    }
    listener.set_nonblocking(true).context("cannot use the socket that the service manager passes")?;
    Ok(Some(listener))
}

/// Which of the sockets is the agent's. `names` is `LISTEN_FDNAMES`: a name each, with colons between.
fn choose(count: usize, names: &str) -> anyhow::Result<usize> {
    let mut named = names.split(':').take(count).enumerate().filter(|(_, name)| *name == SOCKET_NAME);
    match (count, named.next(), named.next()) {
        (1, ..) => Ok(0),
        (_, Some((index, _)), None) => Ok(index),
        _ => bail!(
            "the service manager passes {count} sockets ({}); name one of them {SOCKET_NAME} (FileDescriptorName=)",
            escape(names)
        ),
    }
}

/// Tells the manager that the agent serves. `status` is the line that `systemctl status` shows.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(&escape(status))]);
}

/// Tells the manager how the agent fares, in one line.
pub fn status(status: &str) {
    tell(&[NotifyState::Status(&escape(status))]);
}

/// Tells the manager that the configuration is read anew; [`ready`] ends it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => {
            tracing::warn!("cannot read CLOCK_MONOTONIC: {error}; the service manager is not told of the reload")
        }
    }
}

/// Tells the manager that the agent ends.
pub fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(&escape(status))]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("cannot tell the service manager ($NOTIFY_SOCKET): {error}");
    }
}

/// The sign of life that the manager wants (`WatchdogSec=`). It is given by the loop that waits for it beside everything
/// else, so it says that this loop turns.
#[derive(Debug)]
pub struct Watchdog {
    /// Twice as often as the manager looks; `None` where it does not.
    due: Option<Interval>,
}

impl Watchdog {
    /// As the environment says. Must be called in a tokio runtime.
    pub fn from_env() -> Watchdog {
        let half = sd_notify::watchdog_enabled().map(|limit| limit / 2).filter(|half| *half > Duration::ZERO);
        let due = half.map(|half| {
            let mut due = interval_at(Instant::now() + half, half);
            due.set_missed_tick_behavior(MissedTickBehavior::Delay);
            due
        });
        Watchdog { due }
    }

    /// Waits until a sign of life is due and gives it; for ever, and without a timer, where nobody wants one. Cancel safe.
    pub async fn beat(&mut self) {
        match &mut self.due {
            Some(due) => {
                due.tick().await;
                tell(&[NotifyState::Watchdog]);
            }
            None => pending().await,
        }
    }
}

#[cfg(test)]
mod tests;
