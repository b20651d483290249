//! `cargo xtask bench`: portwatch and its peers side by side, in one run on one machine, as Markdown.
//!
//! Figures of one machine say little on another, so every row is a median with its extremes and a ratio within this
//! run, and what is compared is interleaved. Each command's answer is checked once: a fast wrong answer is no result.

mod agent;
mod commands;
mod free;
mod live;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) use free::fetch_peers;

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;
use serde_json::{Value, json};

use crate::world::{self, World};
use crate::{cargo, must, target};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Fewer rounds: under half a minute
    #[arg(long)]
    quick: bool,
    /// Write the figures to a file, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The portwatch to measure [default: a release build of this workspace]
    #[arg(long, value_name = "PATH")]
    portwatch: Option<PathBuf>,
}

/// How much is measured: counts, and the time after which a part stops with what it has.
struct Effort {
    rounds: usize,
    rounds_limit: Duration,
    listens: usize,
    listens_limit: Duration,
    blocks: usize,
    block: Duration,
    /// How often each command frees a port of each kind of server.
    frees: usize,
    /// Where the agent is asked.
    worlds: &'static [world::Args],
}

const fn of(processes: usize, listeners: usize) -> world::Args {
    world::Args { processes, fds: 100, listeners, each: 1 }
}

const FULL: Effort = Effort {
    rounds: 15,
    rounds_limit: Duration::from_secs(60),
    listens: 2000,
    listens_limit: Duration::from_secs(10),
    blocks: 10,
    block: Duration::from_millis(200),
    frees: 11,
    worlds: &[of(10, 10), of(1000, 10), of(1000, 1000), of(5000, 10)],
};

const QUICK: Effort = Effort {
    rounds: 5,
    rounds_limit: Duration::from_secs(10),
    listens: 500,
    listens_limit: Duration::from_secs(3),
    blocks: 4,
    block: Duration::from_millis(100),
    frees: 3,
    worlds: &[of(10, 10), of(1000, 10)],
};

const CROWD: world::Args = of(1000, 10);

pub(crate) fn run(args: &Args) -> Result<()> {
    let effort = if args.quick { QUICK } else { FULL };
    let portwatch = match &args.portwatch {
        Some(path) => path.clone(),
        None => {
            must(cargo().args(["build", "--quiet", "--release", "--package", "portwatch", "--bin", "portwatch"]))?;
            target().join("release/portwatch")
        }
    };
    if !Uid::effective().is_root() {
        println!("Not root: portwatch has no eBPF here, and nobody sees the processes of others.\n");
    }
    let mut wrong = Vec::new();
    let mut figures = serde_json::Map::new();

    if !args.quick {
        fetch_peers();
    }
    let crowd = World::start(CROWD)?;
    println!(
        "### Who listens? {} processes with {} open files each, {} listeners\n",
        CROWD.processes, CROWD.fds, CROWD.listeners
    );
    let rows = commands::measure(&portwatch, &crowd.ports, &effort)?;
    println!("{}", commands::markdown(&rows));
    wrong.extend(rows.iter().filter_map(commands::Row::complaint));
    figures.insert("commands".into(), commands::figures(&rows));

    println!("### From a command to a port that can be bound, in that crowd\n");
    let rows = free::measure(&portwatch, &effort)?;
    println!("{}", free::markdown(&rows));
    wrong.extend(rows.iter().filter_map(free::Row::complaint));
    figures.insert("free".into(), free::figures(&rows));

    drop(crowd);
    println!("### One port's owner, asked of the agent\n");
    let rows = agent::measure(&portwatch, effort.worlds, &effort)?;
    println!("{}", agent::markdown(&rows));
    figures.insert("agent".into(), agent::figures(&rows));

    let crowd = World::start(CROWD)?;
    println!("### From listen() to the line of `watch --json`\n");
    println!("| host | listens | p50 µs | p99 µs |\n|---|--:|--:|--:|");
    let mut latencies = Vec::new();
    latencies.push(live::latency(&portwatch, "in that crowd", &effort));
    drop(crowd);
    latencies.push(live::latency(&portwatch, "without it", &effort));
    let mut measured = Vec::new();
    for latency in latencies {
        match latency {
            Ok(latency) => {
                println!("| {} | {} | {:.0} | {:.0} |", latency.host, latency.listens, latency.p50_us, latency.p99_us);
                measured.push(json!({
                    "host": latency.host, "listens": latency.listens, "p50_us": latency.p50_us, "p99_us": latency.p99_us
                }));
            }
            Err(error) => wrong.push(format!("latency: {error:#}")),
        }
    }
    figures.insert("latency".into(), Value::from(measured));

    println!("\n### What a running `watch` adds\n");
    println!("| per operation | alone ns | watched ns | added ns | ratio |\n|---|--:|--:|--:|--:|");
    let mut measured = Vec::new();
    for work in [live::Work::Listen, live::Work::Connect] {
        match live::cost(&portwatch, work, &effort) {
            Ok(cost) => {
                let (alone, watched) = (cost.alone_ns, cost.watched_ns);
                let (added, ratio) = (watched - alone, watched / alone);
                println!("| {} | {alone:.0} | {watched:.0} | {added:+.0} | {ratio:.2} |", work.name());
                measured.push(json!({
                    "operation": work.name(), "alone_ns": alone, "watched_ns": watched, "added_ns": added, "ratio": ratio
                }));
            }
            Err(error) => wrong.push(format!("{}: {error:#}", work.name())),
        }
    }
    figures.insert("cost".into(), Value::from(measured));
    println!();

    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&Value::Object(figures))?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if !wrong.is_empty() {
        bail!("no figure where the answer is wrong: {}", wrong.join("; "));
    }
    Ok(())
}

/// The value below which `part` (0 to 1) of the values lie; they must not be empty.
fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index into a few thousand values"
    )]
    let index = ((values.len() - 1) as f64 * part).round() as usize;
    values[index]
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        assert_eq!(quantile(&mut [3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&mut [3.0, 1.0, 2.0], 0.99), 3.0);
        assert_eq!(quantile(&mut [7.0], 0.5), 7.0);
    }
}
