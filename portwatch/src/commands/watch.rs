//! `portwatch watch`: a live log of ports that open and close.

use std::io::{BufWriter, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use portwatch::client::Past;
use portwatch::history::{self, Utc};
use portwatch::model::Change;
use portwatch::render::{self, View, json, text};
use portwatch::select::{Selector, Shown};
use portwatch::source::{Live, POLL_INTERVAL};
use portwatch::tracker::Tracker;
use tokio::signal::unix::{SignalKind, signal};

use super::{FIRST_LOOK, OWN_ONLY, Users, block_on, clock, explain, note, refused, selector, sleep, subscribe, view};
use crate::cli::{Globals, Selectors, Since, TARGETS, duration};
use crate::exit_codes::Usage;
use portwatch::feed::Feed;

#[derive(Debug, Args)]
#[command(after_help = format!("\
Examples:
  portwatch watch
  portwatch watch 8000-8999 --json
  portwatch watch --user al --for 10s
  portwatch watch 8000 --since 10m    first what happened in that time, as the agent remembers it

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
    let mut selectors = args.selectors.clone();
    // What is younger is not all there was: what happened in that time is told, of ports that are closed by now, too.
    let ago = match selectors.since.take() {
        Some(Since::Ago(ago)) => Some(ago),
        mark => {
            selectors.since = mark;
            None
        }
    };
    let selector = selector(&args.targets, &selectors, globals)?;
    block_on(watch(args, globals, &selector, ago))
}

/// The agent may take so long at most to begin.
async fn open(
    globals: &Globals,
    selector: &Selector,
    since: Option<Utc>,
    limit: Option<Duration>,
) -> anyhow::Result<Feed> {
    if let Some(subscription) = subscribe(selector, since, limit, globals).await? {
        let whose = if subscription.is_narrowed() { format!("; {OWN_ONLY}") } else { String::new() };
        note(&format!("watching (agent){whose}"));
        return Ok(Feed::Agent(Box::new(subscription)));
    }
    if since.is_some() {
        let why = "watch --since asks the agent, which remembers what happened, and none answers";
        return Err(Usage(format!("{why}; start it: portwatch agent")).into());
    }
    let tracker = Tracker::open(globals.probe, None)?;
    tracker.check_sees(selector.filters().netns)?;
    announce(tracker.live(), globals);
    Ok(Feed::Own(Box::new(tracker)))
}

async fn watch(
    args: &WatchArgs,
    globals: &Globals,
    selector: &Selector,
    ago: Option<Duration>,
) -> anyhow::Result<ExitCode> {
    let users = Users::default();
    let name = |uid| users.name(uid);
    let mut view = view(&name);
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let past = history::clock(view.clock.now_wall, view.clock.tz.clone());
    let since = ago.map(|ago| past.now_boot_ns.saturating_sub(u64::try_from(ago.as_nanos()).unwrap_or(u64::MAX)));
    // An agent that is busy may take its time; where there is less than that, watching begins without it.
    let limit = args.duration.map(|duration| duration.max(FIRST_LOOK));
    let mut feed = tokio::select! {
        feed = open(globals, selector, since, limit) => feed?,
        _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
        _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
    };

    // Buffered, so that one batch of changes is one write.
    let mut out = BufWriter::with_capacity(64 << 10, std::io::stdout().lock());
    if let Feed::Agent(subscription) = &mut feed {
        let Past { changes, more } = subscription.take_past();
        if more {
            note("only the latest of that time is shown; portwatch history shows the rest");
        }
        view.clock = past;
        show(&mut out, &changes, args.json, &view)?;
    }
    let end = sleep(args.duration);
    tokio::pin!(end);
    let mut shown = Shown::default();
    loop {
        let changes = tokio::select! {
            // In this order: a flood of changes must not keep the end from coming.
            biased;
            () = &mut end => return Ok(ExitCode::SUCCESS),
            _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
            _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
            changes = feed.next() => changes?,
        };
        view.clock = clock();
        // The agent sends only what concerns us.
        let changes = match feed {
            Feed::Agent(_) => changes,
            Feed::Own(_) => changes.into_iter().filter(|change| shown.concerns(change, selector)).collect(),
        };
        show(&mut out, &changes, args.json, &view)?;
    }
}

/// One line each, all of them at once.
fn show(out: &mut impl Write, changes: &[Change], as_json: bool, view: &View<'_>) -> anyhow::Result<()> {
    let mut write = || {
        for change in changes {
            let line = if as_json { json::line(&json::change(change, view)) } else { text::change(change, view) };
            writeln!(out, "{}", line.trim_end_matches('\n'))?;
        }
        out.flush()
    };
    write().context("cannot write to standard output")
}

/// Tells on stderr that watching has begun, and what cannot be seen. Whatever opens after this line is shown.
pub(crate) fn announce(live: &Live, globals: &Globals) {
    let (tier, limits) = (live.tier(), limits(live));
    if tier.is_event_driven() {
        note(&format!("watching ({tier}){limits}"));
    } else {
        let interval = POLL_INTERVAL.as_millis();
        note(&format!(
            "watching (poll): not event-driven, looks every {interval} ms and misses what is shorter{limits}"
        ));
    }
    for refusal in live.refusals() {
        explain(globals, &refused(refusal.tier, &refusal.reason));
    }
}

/// What cannot be seen, or why nothing is told by events: goes on behind how it is done. Escaped.
pub(crate) fn limits(live: &Live) -> String {
    let tier = live.tier();
    if tier.is_event_driven() {
        let own = live.refusals().iter().filter(|refusal| refusal.tier == tier);
        return own.map(|limit| format!("; {}", render::escape(&limit.reason))).collect();
    }
    live.refusals().first().map(|refusal| format!(": {}", render::escape(&refusal.reason))).unwrap_or_default()
}
