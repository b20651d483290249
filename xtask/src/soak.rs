//! `cargo xtask soak`: one agent under a mixed load at a steady pace, and whether it stays as it was.
//!
//! The load, the samples and the verdicts are a scenario of the tests (`tests/soak.rs`); here the agent is built as it is
//! released, and the figures are printed.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::scenario::{self, keep};

const SCENARIO: &str = "soak::a_steady_load_leaves_the_agent_as_it_was";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long it works
    #[arg(long, default_value_t = 60.0)]
    minutes: f64,
    /// What puppets do follows from it; when exactly, does not [default: another each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Write the figures to a file, too, with every sample
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut variables = vec![
        ("PORTWATCH_TEST_SOAK", args.minutes.to_string()),
        ("PORTWATCH_BIN", crate::released()?.to_string_lossy().into_owned()),
    ];
    variables.extend(args.seed.map(|seed| ("PORTWATCH_TEST_SEED", seed.to_string())));
    let (figures, passed) = scenario::play(SCENARIO, variables)?;
    let figures = figures.context("the soak broke off: see what it said")?;
    print!("{}", markdown(&figures));
    keep(&figures, args.json.as_deref())?;
    if !passed {
        bail!("the agent did not stay as it was");
    }
    Ok(())
}

/// What is shown of a quarter: its name in the figures, and decimals.
const ROWS: &[(&str, &str, usize)] = &[
    ("resident memory, median (KiB)", "rss_kib", 0),
    ("resident memory, most (KiB)", "rss_kib_most", 0),
    ("of it anonymous, median (KiB)", "anonymous_kib", 0),
    ("descriptors at rest, median", "fds_at_rest", 0),
    ("descriptors under load, median", "fds", 0),
    ("threads, most", "threads_most", 0),
    ("processor time (ms per s)", "cpu_ms_per_s", 1),
    ("listeners in the table, median", "listeners", 0),
    ("opens seen until its end", "opens", 0),
    ("events dropped until its end", "dropped", 0),
    ("resyncs until its end", "resyncs", 0),
    ("lives stored until its end", "history_lives", 0),
    ("history on disk (MiB)", "history_mib", 1),
];

fn markdown(figures: &Value) -> String {
    let mut text = "| quarter | 1 | 2 | 3 | 4 |\n|---|--:|--:|--:|--:|\n".to_owned();
    // Writing to a String cannot fail.
    for (shown, name, decimals) in ROWS {
        let cells = (0..4).map(|n| format!("{:.decimals$}", figures["quarters"][n][name].as_f64().unwrap_or(f64::NAN)));
        let _infallible = writeln!(text, "| {shown} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    let tally = |name: &str| {
        let counts = figures[name].as_object().into_iter().flatten();
        counts.map(|(what, count)| format!("{count} × {what}")).collect::<Vec<_>>().join(", ")
    };
    let minutes = figures["minutes"].as_f64().unwrap_or(0.0);
    let _infallible = writeln!(text, "\n{minutes} minutes, seed {}.", figures["seed"]);
    let _infallible = writeln!(text, "Puppets: {}. Clients: {}.\n", tally("deeds"), tally("calls"));
    for verdict in figures["verdicts"].as_array().into_iter().flatten() {
        let [what, found] = ["what", "found"].map(|name| verdict[name].as_str().unwrap_or("?"));
        let holds = if verdict["holds"] == true { "yes" } else { "**NO**" };
        let _infallible = writeln!(text, "- {what}: {holds} ({found})");
    }
    text
}
