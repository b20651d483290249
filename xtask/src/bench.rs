//! `cargo xtask bench`: portwatch and its peers side by side, in one run on one machine, as Markdown.
//!
//! Figures of one machine say little on another, so every row is a median with its extremes and a ratio within this
//! run, and what is compared is interleaved. Each command's answer is checked once: a fast wrong answer is no result.

mod agent;
mod commands;
mod free;
mod live;
mod section;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use free::fetch_peers;
pub(crate) use live::storm;

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;
use serde_json::Value;

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
    /// Only this part, of those about the event path and the agent: latency, throughput, cost, agent
    #[arg(long, value_name = "PART")]
    only: Option<String>,
}

type Part = fn(&Path, &Effort) -> Result<section::Section>;

const PARTS: [(&str, Part); 4] =
    [("latency", live::latency), ("throughput", live::throughput), ("cost", live::cost), ("agent", live::agent)];

/// How much is measured: counts, and the time after which a part stops with what it has.
struct Effort {
    rounds: usize,
    rounds_limit: Duration,
    live: live::Effort,
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
    live: live::FULL,
    frees: 11,
    worlds: &[of(10, 10), of(1000, 10), of(1000, 1000), of(5000, 10)],
};

const QUICK: Effort = Effort {
    rounds: 5,
    rounds_limit: Duration::from_secs(10),
    live: live::QUICK,
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

    if args.only.is_none() {
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
        figures.insert("worlds".into(), agent::figures(&rows));
    }

    for (key, part) in PARTS {
        if args.only.as_ref().is_some_and(|only| only != key) {
            continue;
        }
        match part(&portwatch, &effort) {
            Ok(section) => {
                println!("### {}\n\n{}", section.title, section.markdown);
                figures.insert(section.key.into(), section.figures);
                wrong.extend(section.wrong);
            }
            Err(error) => wrong.push(format!("{key}: {error:#}")),
        }
    }

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
