//! What a program does that embeds portwatch, in as few words as possible: the verbs `list` and `watch` as functions. The
//! verb `kill` is [`crate::kill`], `run` is [`crate::run::supervise`].

use std::collections::VecDeque;
use std::path::Path;

use futures_util::stream::{BoxStream, StreamExt as _, try_unfold};

use crate::client::{Client, Subscription};
use crate::feed::Feed;
use crate::model::{Change, Listener, Socket};
use crate::select::{BadTarget, Filters, Selector, Shown, builtin_sets, parse_targets};
use crate::source::{Probe, Scanner, netns};
use crate::tracker::Tracker;
use crate::wire::Selection;

/// Picks these targets, as on the command line (`8000`, `3000-3005/tcp`, `[::1]:8000`, `@dev`), or all ports without one:
/// in the network namespace of this process, whoever holds them. [`Selector::new`] takes filters as well.
///
/// # Errors
/// When a target means nothing.
pub fn selector<T: AsRef<str>>(targets: &[T]) -> Result<Selector, BadTarget> {
    let filters = Filters { netns: netns::own().ok(), ..Filters::default() };
    Ok(Selector::new(parse_targets(targets, &builtin_sets())?, filters))
}

/// What the selector picks of what is listening now, by port, protocol and address, each with its holders as far as this
/// process may see them. Takes milliseconds; blocks.
///
/// # Errors
/// When neither the kernel's iterators nor `sock_diag` with `/proc` can be read, or the selector's network namespace cannot be
/// seen: that is not one in which nobody listens.
pub fn snapshot(selector: &Selector) -> anyhow::Result<Vec<Listener>> {
    let picks = |socket: &Socket| selector.matches_socket(socket);
    let snapshot = Scanner::open(Probe::Auto).scan_in(selector.filters().netns, &picks)?;
    let mut listeners = snapshot.listeners;
    listeners.retain(|listener| selector.matches(listener, snapshot.at));
    listeners.sort_by_key(|Listener { socket, .. }| (socket.port, socket.proto, socket.address, socket.netns));
    Ok(listeners)
}

/// Changes to what the selector picks, from now on: told by the agent at `agent` ([`crate::client::SOCKET`], as a rule) where
/// one answers, else by probes of our own, which need root to be more than polling. Every listener that opens after this
/// function has returned is told. Where something was lost, a [`Change::Resync`] says so, and what became of each listener
/// meanwhile follows. To be polled in a tokio runtime with IO and time.
///
/// # Errors
/// When an agent answers that is of no use, no source of our own can be opened, or the selector's network namespace cannot be
/// seen. In the stream: when it ends early.
pub async fn changes(
    selector: Selector,
    agent: Option<&Path>,
) -> anyhow::Result<BoxStream<'static, anyhow::Result<Change>>> {
    let client = match agent {
        Some(socket) => Client::connect(socket).await?,
        None => None,
    };
    let feed = match client {
        Some(client) => Feed::Agent(Box::new(Subscription::begin(client, Selection::of(&selector), None).await?)),
        None => {
            let tracker = Tracker::open(Probe::Auto, None)?;
            tracker.check_sees(selector.filters().netns)?;
            Feed::Own(Box::new(tracker))
        }
    };
    let mut shown = Shown::default();
    feed.listeners().into_iter().for_each(|listener| shown.add(listener));
    let state = (feed, selector, shown, VecDeque::new());
    let next = |(mut feed, selector, mut shown, mut told): (Feed, Selector, Shown, VecDeque<Change>)| async move {
        loop {
            if let Some(change) = told.pop_front() {
                return Ok(Some((change, (feed, selector, shown, told))));
            }
            told.extend(feed.next().await?.into_iter().filter(|change| shown.concerns(change, &selector)));
        }
    };
    Ok(try_unfold(state, next).boxed())
}
