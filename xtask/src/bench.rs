//! `cargo xtask bench`: portwatch and its peers side by side, in one run on one machine, as Markdown and JSON.
//!
//! Figures of one machine say little on another, so that every row is a median with its extremes and a ratio within this
//! run, and what is compared is interleaved. Answers are checked: a fast wrong answer is no result. A part that fails
//! does not stop the others.
//!
//! The JSON is `{machine, effort (full|quick), portwatch, parts, wrong}`:
//! - `machine`: `{kernel, cpus, model, memory_mib, date, commit, dirty, peers: {name: version or null}}`.
//! - `portwatch`: what the measured binary says of its version.
//! - `parts`: for each part's key its figures, which the part's module describes.
//! - `wrong`: sentences, none if all is well. With one of them the exit code is not 0.

mod agent;
mod free;
mod live;
mod machine;
mod peers;
mod section;
mod stopwatch;
mod worlds;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub(crate) use live::storm;
pub(crate) use peers::fetch_peers;

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;
use serde_json::{Value, json};

use self::machine::Machine;
use self::section::Section;
use crate::{output_of, world};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Fewer rounds and smaller worlds: about a minute
    #[arg(long)]
    quick: bool,
    /// Run this part alone; given again: that one, too
    #[arg(long, value_name = "KEY", value_parser = PARTS.iter().map(|part| part.key).collect::<Vec<_>>())]
    only: Vec<String>,
    /// Write the figures to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write what is printed to a file, too
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// The portwatch to measure [default: a release build of this workspace]
    #[arg(long, value_name = "PATH")]
    portwatch: Option<PathBuf>,
}

struct Part {
    key: &'static str,
    run: fn(&Path, &Effort) -> Result<Section>,
}

const PARTS: &[Part] = &[
    Part { key: "worlds", run: worlds::run },
    Part { key: "free", run: free::run },
    Part { key: "latency", run: live::latency },
    Part { key: "throughput", run: live::throughput },
    Part { key: "cost", run: live::cost },
    Part { key: "agent", run: live::agent },
];

/// Those of the parts that need peers.
const PEERED: [&str; 2] = ["worlds", "free"];

/// How much is measured: counts, and the time after which a part stops with what it has.
struct Effort {
    name: &'static str,
    worlds: &'static [world::Args],
    /// How often each command is run in each world, and for how long at most.
    rounds: usize,
    rounds_limit: Duration,
    /// How often each command frees a port of each kind of server, and for how long at most.
    frees: usize,
    frees_limit: Duration,
    live: live::Effort,
}

const fn of(processes: usize, fds: usize) -> world::Args {
    world::Args { processes, fds, listeners: 10, each: 1, connections: 0 }
}

/// The world that all parts have in common.
const CROWD: world::Args = of(1000, 100);

const FULL: Effort = Effort {
    name: "full",
    worlds: &[
        of(10, 10),
        of(10, 100),
        of(100, 10),
        of(100, 100),
        of(1000, 10),
        CROWD,
        of(5000, 10),
        of(5000, 100),
        world::Args { listeners: 1000, ..CROWD },
        world::Args { connections: 100_000, ..CROWD },
    ],
    rounds: 15,
    rounds_limit: Duration::from_secs(45),
    frees: 11,
    frees_limit: Duration::from_secs(180),
    live: live::FULL,
};

const QUICK: Effort = Effort {
    name: "quick",
    worlds: &[of(10, 100), CROWD, world::Args { connections: 10_000, ..CROWD }],
    rounds: 3,
    rounds_limit: Duration::from_secs(6),
    frees: 3,
    frees_limit: Duration::from_secs(15),
    live: live::QUICK,
};

pub(crate) fn run(args: &Args) -> Result<()> {
    for path in [&args.json, &args.markdown].into_iter().flatten() {
        // Better known now than after all the work.
        write(path, "")?;
    }
    let effort = if args.quick { QUICK } else { FULL };
    let portwatch = args.portwatch.clone().map_or_else(crate::released, Ok)?;
    let version = output_of(Command::new(&portwatch).arg("--version"))?.trim().to_owned();
    let is_wanted = |key: &str| args.only.is_empty() || args.only.iter().any(|only| only == key);
    if !args.quick && PEERED.iter().any(|key| is_wanted(key)) {
        fetch_peers();
    }
    let machine = Machine::look();
    let mut report = Report { text: String::new() };
    report.say(&format!("{version}, {} run, {}", effort.name, machine.markdown()));
    if !Uid::effective().is_root() {
        report.say("Not root: portwatch has no eBPF here, and nobody sees the processes of others.\n");
    }
    let mut wrong = Vec::new();
    let mut parts = serde_json::Map::new();
    for part in PARTS.iter().filter(|part| is_wanted(part.key)) {
        match (part.run)(&portwatch, &effort) {
            Ok(section) => {
                report.say(&format!("### {}\n\n{}", section.title, section.markdown));
                wrong.extend(section.wrong);
                parts.insert(section.key.to_owned(), section.figures);
            }
            Err(error) => wrong.push(format!("{}: {error:#}", part.key)),
        }
    }
    if !wrong.is_empty() {
        report.say(&format!("### What is wrong\n\n- {}", wrong.join("\n- ")));
    }
    if let Some(path) = &args.markdown {
        write(path, &report.text)?;
    }
    if let Some(path) = &args.json {
        let figures = json!({
            "machine": machine.figures(), "effort": effort.name, "portwatch": version, "parts": Value::from(parts),
            "wrong": wrong
        });
        write(path, &(serde_json::to_string_pretty(&figures)? + "\n"))?;
    }
    if !wrong.is_empty() {
        bail!("no figure where the answer is wrong: {}", wrong.join("; "));
    }
    Ok(())
}

/// What is printed, as it comes and as a whole.
struct Report {
    text: String,
}

impl Report {
    fn say(&mut self, paragraph: &str) {
        println!("{paragraph}");
        self.text.push_str(paragraph);
        self.text.push('\n');
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
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
