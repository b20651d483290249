//! `portwatch watch`: a live log of ports that open and close.

use std::collections::HashSet;
use std::io::{BufWriter, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use portwatch::model::{Attempt, BootNs, Change, Holder, Listener, Socket, SocketId};
use portwatch::render::{self, json, text};
use portwatch::select::Selector;
use portwatch::source::Live;
use portwatch::tracker::Tracker;
use tokio::signal::unix::{SignalKind, signal};

use super::{Users, clock, explain, note, refused, selector, view};
use crate::cli::{Globals, Selectors, TARGETS, duration};

#[derive(Debug, Args)]
#[command(after_help = format!("\
Examples:
  portwatch watch
  portwatch watch 8000-8999 --json
  portwatch watch --user al --for 10s

{TARGETS}"))]
pub(crate) struct WatchArgs {
    /// Ports to watch; all without
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<String>,
    /// One JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
    /// Stop after this long, such as 10s or 5m
    #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
    pub(crate) duration: Option<Duration>,
    #[command(flatten)]
    pub(crate) selectors: Selectors,
}

pub(crate) fn run(args: &WatchArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let selector = selector(&args.targets, &args.selectors)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?
        .block_on(watch(args, globals, &selector))
}

async fn watch(args: &WatchArgs, globals: &Globals, selector: &Selector) -> anyhow::Result<ExitCode> {
    let users = Users::default();
    let name = |uid| users.name(uid);
    let mut view = view(&name)?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut tracker = Tracker::open(globals.probe, None)?;
    announce(tracker.live(), globals);

    // Buffered, so that one batch of changes is one write.
    let mut out = BufWriter::with_capacity(64 << 10, std::io::stdout().lock());
    // Without --for, no timer: nothing wakes while nothing happens.
    let end = async {
        match args.duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(end);
    let mut shown = Shown::default();
    loop {
        let changes = tokio::select! {
            // In this order: a flood of changes must not keep the end from coming.
            biased;
            () = &mut end => return Ok(ExitCode::SUCCESS),
            _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
            _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
            changes = tracker.next() => changes?,
        };
        view.clock = clock()?;
        for change in &changes {
            if !shown.concerns(change, selector) {
                continue;
            }
            let line = if args.json { json::line(&json::change(change, &view)) } else { text::change(change, &view) };
            out.write_all(line.as_bytes()).context("cannot write to standard output")?;
            if !line.ends_with('\n') {
                out.write_all(b"\n").context("cannot write to standard output")?;
            }
        }
        out.flush().context("cannot write to standard output")?;
    }
}

/// Tells on stderr that watching has begun, and what cannot be seen. Whatever opens after this line is shown.
fn announce(live: &Live, globals: &Globals) {
    let tier = live.tier();
    if tier.is_event_driven() {
        let own = live.refusals().iter().filter(|refusal| refusal.tier == tier);
        let limits: String = own.map(|limit| format!("; {}", render::escape(&limit.reason))).collect();
        note(&format!("watching ({tier}){limits}"));
    } else {
        let interval = portwatch::source::POLL_INTERVAL.as_millis();
        let reason = live.refusals().first().map(|refusal| render::escape(&refusal.reason).into_owned());
        let why = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        note(&format!("watching (poll): not event-driven, looks every {interval} ms and misses what is shorter{why}"));
    }
    for refusal in live.refusals() {
        explain(globals, &refused(refusal.tier, &refusal.reason));
    }
}

/// The listeners shown as open: whatever becomes of them is shown too, also when those who were asked for have let go.
#[derive(Default)]
struct Shown(HashSet<SocketKey>);

/// The cookie, or the inode where there is none; a later change may know more, so both are kept.
type SocketKey = (bool, u64);

impl Shown {
    /// Whether the one who watches asked for this, or was shown how it began.
    fn concerns(&mut self, change: &Change, selector: &Selector) -> bool {
        match change {
            Change::Opened { at, listener } | Change::Holders { at, listener } => {
                let concerns = Self::selects(selector, listener, *at);
                let keys = Self::keys(listener.socket.id);
                if concerns {
                    self.0.extend(keys.clone());
                }
                concerns || keys.into_iter().any(|key| self.0.contains(&key))
            }
            Change::Closed { at, listener, by } => {
                let mut known = false;
                for key in Self::keys(listener.socket.id) {
                    known |= self.0.remove(&key);
                }
                let by = by.as_ref().is_some_and(|by| {
                    selector.matches_socket(&listener.socket) && selector.matches_process(by, &listener.socket)
                });
                known || by || Self::selects(selector, listener, *at)
            }
            Change::Conflict { at, attempt, .. } => Self::selects(selector, &wanted(attempt), *at),
            Change::Resync { .. } => true,
        }
    }

    fn selects(selector: &Selector, listener: &Listener, at: BootNs) -> bool {
        selector.matches_socket(&listener.socket) && selector.matches(listener, at)
    }

    fn keys(id: SocketId) -> Vec<SocketKey> {
        [(true, id.cookie), (false, id.inode)].into_iter().filter(|(_, number)| *number != 0).collect()
    }
}

/// The listener that the failed bind would have made.
fn wanted(attempt: &Attempt) -> Listener {
    Listener {
        socket: Socket {
            id: SocketId::default(),
            proto: attempt.proto,
            mptcp: false,
            address: attempt.address,
            port: attempt.port,
            v6only: None,
            netns: attempt.netns,
            uid: attempt.by.uid.unwrap_or_default(),
            backlog: None,
        },
        since: None,
        holders: vec![Holder { process: attempt.by.clone(), fds: Vec::new(), binder: true }],
    }
}
