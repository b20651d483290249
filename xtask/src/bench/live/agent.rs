//! What the agent takes: memory, processor time, wake-ups, and time to start.
//!
//! Figures: `sizes`, each with `listeners` of this bench's (those of the host come on top: `table`) and `first`
//! (`"listeners"` or `"agent"`, whichever was there first), `rss_mib`, `pss_mib`, `anonymous_mib` (smaps_rollup, when it has
//! come to rest), `cpu_ms` since its start, `start_ms` `{median, min, max}` of `starts` (from exec to READY=1; `null` where the
//! agent was first); `idle` with `listeners`, `seconds`, `wake_ups` (context switches, voluntary or not, of all threads) and
//! `cpu_ms` in that time, `host_changes`, the opens and closes on this host since shortly before, and which of the `attempts`
//! this was; `snapshot` with `rows`, `bytes`, `runs`,
//! `median_ms`, `min_ms`, `max_ms` of `list --json` through the agent, from spawn to exit.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::PATIENCE;
use crate::bench::agent::{Agent, Memory};
use crate::bench::section::Section;
use crate::bench::{Effort, quantile};
use crate::world::{self, World};

/// Of an idle agent: long enough that what its start or a question caused is over.
const REST: Duration = Duration::from_secs(1);

struct Row {
    listeners: usize,
    first: &'static str,
    table: u64,
    memory: Memory,
    cpu: Duration,
    starts_ms: Vec<f64>,
}

struct Idle {
    listeners: usize,
    length: Duration,
    wake_ups: u64,
    /// Opens and closes on this host since shortly before.
    changes: u64,
    cpu: Duration,
    attempts: usize,
}

struct Snapshot {
    rows: usize,
    bytes: usize,
    times_ms: Vec<f64>,
}

/// A thousand processes at most.
fn crowd(listeners: usize) -> world::Args {
    let processes = listeners.min(1000);
    world::Args {
        processes,
        fds: 16,
        listeners: processes,
        each: listeners.checked_div(processes).unwrap_or(0),
        connections: 0,
    }
}

pub(in crate::bench) fn agent(portwatch: &Path, effort: &Effort) -> Result<Section> {
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    let (mut idle, mut snapshot) = (None, None);
    for &listeners in effort.live.sizes {
        if listeners > 0 {
            let agent = Agent::start(portwatch, &[])?;
            let world = World::start(crowd(listeners))?;
            rows.push(Row::of(&agent, listeners, "agent", Vec::new(), effort.live.idle, &mut wrong)?);
            drop((agent, world));
        }
        let world = World::start(crowd(listeners))?;
        let mut starts_ms = Vec::new();
        for _ in 1..effort.live.starts {
            starts_ms.push(Agent::start(portwatch, &[])?.ready_after.as_secs_f64() * 1e3);
        }
        let agent = Agent::start(portwatch, &[])?;
        starts_ms.push(agent.ready_after.as_secs_f64() * 1e3);
        rows.push(Row::of(&agent, listeners, "listeners", starts_ms, effort.live.idle, &mut wrong)?);
        if listeners == effort.live.idle_listeners {
            idle = Some(Idle::measure(&agent, &effort.live)?);
        }
        if listeners == effort.live.sizes.iter().copied().max().unwrap_or(0) {
            snapshot = Some(Snapshot::measure(&agent, &world, effort.live.snapshots, &mut wrong)?);
        }
    }
    let figures = json!({
        "sizes": rows.iter().map(Row::figures).collect::<Vec<_>>(),
        "idle": idle.as_ref().map(Idle::figures),
        "snapshot": snapshot.as_mut().map(Snapshot::figures),
    });
    let markdown = markdown(&mut rows, idle.as_ref(), snapshot.as_mut());
    Ok(Section { key: "agent", title: "What the agent takes".into(), markdown, figures, wrong })
}

impl Row {
    /// When the agent has come to rest, or after so long.
    fn of(
        agent: &Agent,
        listeners: usize,
        first: &'static str,
        starts_ms: Vec<f64>,
        rest_within: Duration,
        wrong: &mut Vec<String>,
    ) -> Result<Row> {
        let mut connection = agent.connect()?;
        let begun = Instant::now();
        let table = loop {
            let table = connection.status()?["listeners"].as_u64().context("the status does not count listeners")?;
            if table >= listeners as u64 {
                break table;
            }
            if begun.elapsed() > PATIENCE {
                wrong.push(format!("the agent has {table} of {listeners} listeners"));
                break table;
            }
            // Whoever asks this has what happened in the answer.
            connection.count("1/tcp")?;
        };
        drop(connection);
        rest(agent, rest_within)?;
        Ok(Row { listeners, first, table, memory: agent.memory()?, cpu: agent.cpu_time()?, starts_ms })
    }

    fn figures(&self) -> Value {
        let start = (!self.starts_ms.is_empty()).then(|| {
            let [min, median, max] = [0.0, 0.5, 1.0].map(|part| quantile(&mut self.starts_ms.clone(), part));
            json!({ "median": median, "min": min, "max": max })
        });
        let Memory { rss, pss, anonymous } = self.memory;
        json!({
            "listeners": self.listeners, "table": self.table, "first": self.first, "rss_mib": rss, "pss_mib": pss,
            "anonymous_mib": anonymous, "cpu_ms": self.cpu.as_secs_f64() * 1e3, "starts": self.starts_ms.len(),
            "start_ms": start
        })
    }
}

/// Waits until it has not run for a while, for so long at most: on some hosts there is always something to be told.
/// Nothing tells of rest, so it is looked at.
fn rest(agent: &Agent, within: Duration) -> Result<()> {
    let begun = Instant::now();
    let mut before = agent.switches()?;
    while begun.elapsed() < within {
        thread::sleep(REST);
        let after = agent.switches()?;
        if after == before {
            return Ok(());
        }
        before = after;
    }
    Ok(())
}

/// Opens and closes that it was told of. To be asked wakes it.
fn happened(agent: &Agent) -> Result<u64> {
    let status = agent.status()?;
    let count = |name: &str| status[name].as_u64().with_context(|| format!("no {name} in the status"));
    Ok(count("opens")? + count("closes")?)
}

impl Idle {
    /// The quietest of a few times, the first in which nothing ran: other programs' listeners are told to the agent, and are
    /// none of its doing.
    fn measure(agent: &Agent, effort: &super::Effort) -> Result<Idle> {
        let (length, listeners) = (effort.idle, effort.idle_listeners);
        let mut best: Option<Idle> = None;
        for attempts in 1..=effort.idle_attempts {
            let before = happened(agent)?;
            rest(agent, length)?;
            let (cpu, switches) = (agent.cpu_time()?, agent.switches()?);
            // What is tested is that nothing happens in this time.
            thread::sleep(length);
            let wake_ups = agent.switches()? - switches;
            let cpu = agent.cpu_time()? - cpu;
            let changes = happened(agent)? - before;
            if best.as_ref().is_none_or(|best| wake_ups < best.wake_ups) {
                best = Some(Idle { listeners, length, wake_ups, changes, cpu, attempts });
            }
            if wake_ups == 0 {
                break;
            }
        }
        best.context("nothing was measured")
    }

    fn figures(&self) -> Value {
        json!({
            "listeners": self.listeners, "seconds": self.length.as_secs_f64(), "wake_ups": self.wake_ups, "host_changes": self.changes,
            "cpu_ms": self.cpu.as_secs_f64() * 1e3, "attempts": self.attempts
        })
    }
}

impl Snapshot {
    fn measure(agent: &Agent, world: &World, runs: usize, wrong: &mut Vec<String>) -> Result<Snapshot> {
        let mut snapshot = Snapshot { rows: 0, bytes: 0, times_ms: Vec::new() };
        for _ in 0..runs {
            let mut command = agent.command(&["list", "--json"]);
            let begun = Instant::now();
            let output = command.stdin(Stdio::null()).output().context("cannot run `portwatch list`")?;
            snapshot.times_ms.push(begun.elapsed().as_secs_f64() * 1e3);
            if !output.status.success() {
                bail!("`portwatch list` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
            }
            let rows: Vec<Value> = serde_json::from_slice(&output.stdout).context("`list --json` is not JSON")?;
            let ports: HashSet<u64> = rows.iter().filter_map(|row| row["port"].as_u64()).collect();
            let left_out = world.listeners.iter().filter(|it| !ports.contains(&u64::from(it.port))).count();
            if left_out > 0 {
                wrong.push(format!("`list --json` leaves out {left_out} of {} listeners", world.listeners.len()));
            }
            (snapshot.rows, snapshot.bytes) = (rows.len(), output.stdout.len());
        }
        Ok(snapshot)
    }

    fn figures(&mut self) -> Value {
        let [min, median, max] = [0.0, 0.5, 1.0].map(|part| quantile(&mut self.times_ms, part));
        json!({
            "rows": self.rows, "bytes": self.bytes, "runs": self.times_ms.len(), "median_ms": median, "min_ms": min,
            "max_ms": max
        })
    }
}

fn markdown(rows: &mut [Row], idle: Option<&Idle>, snapshot: Option<&mut Snapshot>) -> String {
    let mut text =
        "| listeners | came first | RSS MiB | PSS MiB | anonymous MiB | CPU ms so far | ready after ms | min | max |\n\
         |--:|---|--:|--:|--:|--:|--:|--:|--:|\n"
            .to_owned();
    for row in rows {
        let starts = if row.starts_ms.is_empty() {
            "– | – | –".to_owned()
        } else {
            [0.5, 0.0, 1.0].map(|part| format!("{:.1}", quantile(&mut row.starts_ms, part))).join(" | ")
        };
        let Memory { rss, pss, anonymous } = row.memory;
        // Writing to a String cannot fail.
        let _infallible = writeln!(
            text,
            "| {} | {} | {rss:.1} | {pss:.1} | {anonymous:.1} | {:.0} | {starts} |",
            row.listeners,
            row.first,
            row.cpu.as_secs_f64() * 1e3
        );
    }
    if let Some(Idle { listeners, length, wake_ups, changes, cpu, attempts }) = idle {
        let (seconds, ms) = (length.as_secs_f64(), cpu.as_secs_f64() * 1e3);
        let _infallible = writeln!(
            text,
            "\nIdle with {listeners} listeners, for {seconds:.0} s: {wake_ups} context switches of all its threads, {ms:.2} ms of \
             processor time, while {changes} listeners opened or closed on this host (attempt {attempts})."
        );
    }
    if let Some(snapshot) = snapshot {
        let [min, median, max] = [0.0, 0.5, 1.0].map(|part| quantile(&mut snapshot.times_ms, part));
        let (rows, kib) = (snapshot.rows, snapshot.bytes >> 10);
        let _infallible = writeln!(
            text,
            "\n`list --json` through the agent: {rows} rows, {kib} KiB, {median:.1} ms ({min:.1} … {max:.1}) from spawn to exit."
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crowds_hold_as_many_listeners_as_are_asked_for() {
        for listeners in [0, 1, 1000, 10_000] {
            let args = crowd(listeners);
            assert_eq!(args.listeners * args.each, listeners);
            assert!(args.processes <= 1000);
        }
    }
}
