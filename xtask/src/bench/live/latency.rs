//! From listen() to the line of `watch --json`, and to the agent's answer.
//!
//! Figures: `rows`, each of a `host` (`"idle"`, `"crowd"`) and a `way` (`"watch"`, `"watch_agent"`, `"asked"`: the agent is
//! asked right after listen() returned) with `listens`, `lost` (records that the watch said it lost), `p50_us`, `p99_us`,
//! `p999_us`, `max_us`. The way `"table"` is the agent's own histogram of the time from the kernel's event to the row in its
//! table, of the listens of the two ways through the agent: there, the quantiles are upper bounds of buckets (`null`: above
//! the last of 1 s), and `max_us` is `null`. So is every quantile that too few listens tell.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{Backlog, listen};
use nix::unistd::Uid;
use serde_json::{Value, json};

use super::watch::Watch;
use super::{PATIENCE, bound, without_events};
use crate::bench::agent::{Agent, Histogram};
use crate::bench::section::Section;
use crate::bench::{CROWD, Effort, quantile};
use crate::world::World;

/// What the agent answers a user that is not root without a rest.
const MOST_ASKED: usize = 500;

/// The agent looks who holds a new listener before it answers, and looks no more than a fifth of the time. So each question
/// gets its own look, and none waits for the end of a rest.
const REST: u32 = 5;

const PARTS: [f64; 4] = [0.5, 0.99, 0.999, 1.0];

struct Row {
    host: &'static str,
    way: Way,
    listens: usize,
    lost: u64,
    /// As [`PARTS`].
    quantiles_us: [Option<f64>; 4],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Watch,
    WatchAgent,
    Asked,
    Table,
}

impl Way {
    fn key(self) -> &'static str {
        match self {
            Way::Watch => "watch",
            Way::WatchAgent => "watch_agent",
            Way::Asked => "asked",
            Way::Table => "table",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Way::Watch => "to the line of `watch --json`",
            Way::WatchAgent => "to its line, through the agent",
            Way::Asked => "to the agent's answer, asked right after listen()",
            Way::Table => "from the event to the agent's table, at most",
        }
    }
}

pub(in crate::bench) fn latency(portwatch: &Path, effort: &Effort) -> Result<Section> {
    let mut wrong = Vec::new();
    let mut rows = on(portwatch, "idle", effort, &mut wrong)?;
    let crowd = World::start(CROWD)?;
    rows.extend(on(portwatch, "crowd", effort, &mut wrong)?);
    drop(crowd);
    let figures = json!({ "rows": rows.iter().map(Row::figures).collect::<Vec<_>>() });
    Ok(Section {
        key: "latency",
        title: "How soon a listener is known".into(),
        markdown: markdown(&rows),
        figures,
        wrong,
    })
}

/// Every way on this host.
fn on(portwatch: &Path, host: &'static str, effort: &Effort, wrong: &mut Vec<String>) -> Result<Vec<Row>> {
    let mut command = Command::new(portwatch);
    command.args(["watch", "--json", "--no-agent"]);
    let mut rows = Vec::new();
    rows.extend(watched(Watch::start(command)?, host, Way::Watch, effort, wrong)?);
    let agent = Agent::start(portwatch, &["--metrics", "127.0.0.1:0"])?;
    if without_events(&agent.status()?).is_some() {
        return Ok(rows);
    }
    let before = Histogram::read(&agent)?;
    rows.extend(watched(Watch::start(agent.command(&["watch", "--json"]))?, host, Way::WatchAgent, effort, wrong)?);
    rows.extend(asked(&agent, host, effort, wrong)?);
    let table = Histogram::read(&agent)?.since(&before);
    // Opens and closes.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
    let listens = table.count() as usize / 2;
    let [p50, p99, p999, _] = PARTS.map(|part| table.bound_us(part).filter(|bound| bound.is_finite()));
    rows.push(Row { host, way: Way::Table, listens, lost: 0, quantiles_us: [p50, p99, p999, None] });
    Ok(rows)
}

/// From just before listen() to the moment that this process has read the line which tells of it. What happens after the
/// line is awaited, too, so that each listener is one of its own and none is left out.
fn watched(
    mut watch: Watch,
    host: &'static str,
    way: Way,
    effort: &Effort,
    wrong: &mut Vec<String>,
) -> Result<Option<Row>> {
    let mut times = Times::new(effort.live.listens, effort.live.listens_limit);
    while times.go_on() {
        let (socket, port) = bound()?;
        let before = Instant::now();
        listen(&socket, Backlog::MAXCONN).context("cannot listen")?;
        if !watch.tells("open", port, PATIENCE)? {
            wrong.push(format!("latency, {} on {host}: a listener is never told", way.key()));
            return Ok(None);
        }
        times.push(watch.heard.saturating_duration_since(before));
        drop(socket);
        if !watch.tells("close", port, PATIENCE)? {
            wrong.push(format!("latency, {} on {host}: a listener's end is never told", way.key()));
            return Ok(None);
        }
    }
    Ok(times.row(host, way, watch.lost))
}

/// From just before listen() to the agent's answer, which must have the listener; and must not have it after close().
fn asked(agent: &Agent, host: &'static str, effort: &Effort, wrong: &mut Vec<String>) -> Result<Option<Row>> {
    let mut connection = agent.connect()?;
    let most = if Uid::effective().is_root() { usize::MAX } else { MOST_ASKED };
    let mut times = Times::new(effort.live.listens.min(most), effort.live.listens_limit);
    let (mut unknown, mut left) = (0, 0);
    while times.go_on() {
        thread::sleep(times.latest() * REST);
        let (socket, port) = bound()?;
        let target = format!("127.0.0.1:{port}/tcp");
        let before = Instant::now();
        listen(&socket, Backlog::MAXCONN).context("cannot listen")?;
        let (count, heard) = connection.count(&target)?;
        times.push(heard - before);
        unknown += usize::from(count == 0);
        drop(socket);
        left += usize::from(connection.count(&target)?.0 > 0);
    }
    if unknown + left > 0 {
        let listens = times.us.len();
        wrong.push(format!(
            "of {listens} listeners the agent did not know {unknown} after listen() and still had {left} after close() ({host})"
        ));
        return Ok(None);
    }
    Ok(times.row(host, Way::Asked, 0))
}

/// Times in µs, until there are enough of them or it took long enough.
struct Times {
    us: Vec<f64>,
    wanted: usize,
    begun: Instant,
    limit: Duration,
}

impl Times {
    fn new(wanted: usize, limit: Duration) -> Times {
        Times { us: Vec::with_capacity(wanted), wanted, begun: Instant::now(), limit }
    }

    /// At least one is taken however long it takes.
    fn go_on(&self) -> bool {
        self.us.len() < self.wanted && (self.us.is_empty() || self.begun.elapsed() < self.limit)
    }

    fn push(&mut self, time: Duration) {
        self.us.push(time.as_secs_f64() * 1e6);
    }

    fn latest(&self) -> Duration {
        self.us.last().map_or(Duration::ZERO, |us| Duration::from_secs_f64(us / 1e6))
    }

    fn row(mut self, host: &'static str, way: Way, lost: u64) -> Option<Row> {
        let listens = self.us.len();
        let quantiles_us = PARTS.map(|part| is_known(part, listens).then(|| quantile(&mut self.us, part)));
        Some(Row { host, way, listens, lost, quantiles_us })
    }
}

/// Whether there is one beyond it to tell it from the greatest.
fn is_known(part: f64, count: usize) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "a few thousand values")]
    let beyond = count as f64 * (1.0 - part);
    part == 1.0 || beyond >= 1.0
}

impl Row {
    fn figures(&self) -> Value {
        let [p50, p99, p999, max] = self.quantiles_us;
        json!({
            "host": self.host, "way": self.way.key(), "listens": self.listens, "lost": self.lost,
            "p50_us": p50, "p99_us": p99, "p999_us": p999, "max_us": max
        })
    }
}

fn markdown(rows: &[Row]) -> String {
    let mut text =
        "| from listen() | host | listens | p50 µs | p99 µs | p99.9 µs | max µs |\n|---|---|--:|--:|--:|--:|--:|\n"
            .to_owned();
    for row in rows {
        let host = if row.host == "idle" { "idle" } else { "1,000 × 100" };
        let least = if row.way == Way::Table { "≤ " } else { "" };
        let cells = row.quantiles_us.map(|us| us.map_or_else(|| "–".to_owned(), |us| format!("{least}{us:.0}")));
        // Writing to a String cannot fail.
        let _infallible = writeln!(text, "| {} | {host} | {} | {} |", row.way.name(), row.listens, cells.join(" | "));
        if row.lost > 0 {
            let _infallible =
                writeln!(text, "| (lost meanwhile, and told after a new snapshot: {}) | | | | | | |", row.lost);
        }
    }
    text.push_str(
        "\nOne listener after the other; the next begins when the end of the one before is told. 1,000 × 100: beside 1,000 \
         processes with 100 open files each.\n",
    );
    if rows.iter().any(|row| row.way == Way::Asked) {
        text.push_str(
            "The agent's answer names every holder, so the agent looks at all open files for it: the way of the question, that \
             look and the way back are in it, and the agent is asked again when it has rested from that. Each answer was \
             checked: the listener is in the first after listen(), and in none after close(). The last rows are the agent's \
             own histogram, from the kernel's event to the row in its table, for all opens and closes of this host, by the upper bounds of its \
             buckets.\n",
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::is_known;

    #[test]
    fn rare_things_need_many_listens() {
        for (part, count, want) in [
            (0.5, 2, true),
            (0.99, 99, false),
            (0.99, 100, true),
            (0.999, 999, false),
            (0.999, 1000, true),
            (1.0, 1, true),
        ] {
            assert_eq!(is_known(part, count), want, "{part} of {count}");
        }
    }
}
