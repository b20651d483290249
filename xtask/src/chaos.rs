//! `cargo xtask chaos`: processes and an agent to which random things happen, and whether what it says stays the truth.
//!
//! What happens is a scenario of the tests (`tests/chaos.rs`), which runs for a time here instead of a few rounds; on
//! other kernels under QEMU.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::scenario::{self, keep};
use crate::vm;

const SCENARIO: &str = "faults::after_any_chaos_the_table_is_the_truth";

/// What a virtual machine may take beyond the chaos itself, in seconds: to boot, and to end a round under emulation.
const PATIENCE: u64 = 600;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// For how long rounds are begun, on each kernel
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Of the first round, and each round's is two more: what is done follows from it; when exactly, does not
    /// [default: another each time]
    #[arg(long)]
    seed: Option<u64>,
    /// This machine's, or one of those that `cargo xtask vm` has
    #[arg(long, default_value = "this", value_parser = ["this", "5.10", "6.1", "6.12", "all"])]
    kernel: String,
    /// Write the figures to a file, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut variables = vec![("PORTWATCH_TEST_CHAOS", args.seconds.to_string())];
    variables.extend(args.seed.map(|seed| ("PORTWATCH_TEST_SEED", seed.to_string())));
    let mut rows = Vec::new();
    if args.kernel != "this" {
        let limit = args.seconds + PATIENCE;
        for (release, figures, passed) in vm::play(&args.kernel, SCENARIO, &variables, limit)? {
            rows.push(row(&release, figures, passed));
        }
    }
    // By itself: the machine is slower beside those that it emulates.
    if matches!(args.kernel.as_str(), "this" | "all") {
        let (figures, passed) = scenario::play(SCENARIO, variables.iter().map(|(name, value)| (*name, value)))?;
        rows.push(row(&scenario::release()?, figures, passed));
    }
    print!("{}", markdown(&rows));
    keep(&json!(rows), args.json.as_deref())?;
    if !rows.iter().all(|row| row["passed"] == true) {
        bail!("what the agent said was not the truth, or could not be compared: see above");
    }
    Ok(())
}

/// One that broke off has no figures.
fn row(kernel: &str, figures: Option<Value>, passed: bool) -> Value {
    json!({"kernel": kernel, "passed": passed && figures.is_some(), "figures": figures})
}

fn markdown(rows: &[Value]) -> String {
    let mut text = "| kernel | tier | first seed | rounds | seconds | steps | quiet points | listeners compared \
                    | events dropped | resyncs | differences |\n\
                    |---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
        .to_owned();
    let mut steps = String::new();
    // Writing to a String cannot fail.
    for row in rows {
        let kernel = row["kernel"].as_str().unwrap_or("?");
        let Value::Object(figures) = &row["figures"] else {
            let _infallible = writeln!(text, "| {kernel} | broke off | | | | | | | | | |");
            continue;
        };
        let figure = |name: &str| figures.get(name).map_or_else(String::new, Value::to_string);
        let kinds = || figures.get("steps").and_then(Value::as_object).into_iter().flatten();
        let cells = [
            figure("tier").trim_matches('"').to_owned(),
            figure("first_seed"),
            figure("rounds"),
            figure("seconds"),
            kinds().filter_map(|(_, count)| count.as_u64()).sum::<u64>().to_string(),
            figure("quiet_points"),
            figure("listeners_compared"),
            figure("dropped"),
            figure("resyncs"),
            figures.get("differences").and_then(Value::as_array).map_or(0, Vec::len).to_string(),
        ];
        let _infallible = writeln!(text, "| {kernel} | {} |", cells.join(" | "));
        let kinds: Vec<_> = kinds().map(|(kind, count)| format!("{count} × {kind}")).collect();
        let _infallible = writeln!(steps, "\nSteps on {kernel}: {}.", kinds.join(", "));
    }
    text + &steps
}
