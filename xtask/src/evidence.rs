//! `cargo xtask evidence`: `portwatch/EVIDENCE.md`, made of what the other verbs found.
//!
//! Each of [`SOURCES`] has left `NAME.json` and `NAME.md` in one directory; the page has the Markdown as it was printed,
//! and above it each claim with its goal and what the JSON has of it ([`claims`]). No figure is written by hand; where one
//! misses its goal the page says so, and why.

mod claims;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use self::claims::Claim;
use crate::{root, target};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the files are [default: target/evidence]
    #[arg(long, value_name = "DIRECTORY")]
    from: Option<PathBuf>,
}

/// A verb, what it is about, and the command that makes its files.
struct Source {
    name: &'static str,
    title: &'static str,
    command: &'static str,
}

const SOURCES: &[Source] = &[
    Source {
        name: "bench",
        title: "Speed, beside its peers",
        command: "cargo xtask bench --json target/evidence/bench.json --markdown target/evidence/bench.md",
    },
    Source {
        name: "race",
        title: "Bystanders, under an adversary",
        command: "cargo xtask race --json target/evidence/race.json >target/evidence/race.md",
    },
    Source {
        name: "chaos",
        title: "The table and the truth, in chaos",
        command: "cargo xtask chaos --kernel all --json target/evidence/chaos.json >target/evidence/chaos.md",
    },
    Source {
        name: "soak",
        title: "An hour of mixed load",
        command: "cargo xtask soak --json target/evidence/soak.json >target/evidence/soak.md",
    },
    Source {
        name: "fuzz",
        title: "Parsers of what others wrote",
        command: "cargo xtask fuzz --json target/evidence/fuzz.json >target/evidence/fuzz.md",
    },
];

const PREAMBLE: &str = "\
# Evidence

What portwatch claims, and what was measured. This page is made by `cargo xtask evidence` out of the output of real runs, each
of which has its command below: run it, and compare. Figures are of one machine and say little on another; ratios within
one run say more. ms, µs and ns are of wall time unless it says otherwise; MiB are 2²⁰ bytes.

";

pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = args.from.clone().unwrap_or_else(|| target().join("evidence"));
    let mut found = Map::new();
    let mut sections = String::new();
    for source in SOURCES {
        let figures = read(&folder, source, "json")?.map(|text| serde_json::from_str(&text)).transpose();
        let figures: Option<Value> = figures.with_context(|| format!("{}.json is not JSON", source.name))?;
        let text = match (&figures, read(&folder, source, "md")?) {
            (Some(_), Some(text)) => text,
            _ => "Not measured for this page.\n".to_owned(),
        };
        found.insert(source.name.to_owned(), figures.unwrap_or(Value::Null));
        // Writing to a String cannot fail.
        let _infallible = writeln!(sections, "\n## {}\n\n`{}`\n\n{}", source.title, source.command, text.trim());
    }
    let found = Value::Object(found);
    let page = PREAMBLE.to_owned() + &machine(&found) + &table(&claims::all(&found)) + &sections;
    let path = root().join("portwatch/EVIDENCE.md");
    fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))
}

fn read(folder: &Path, source: &Source, extension: &str) -> Result<Option<String>> {
    let path = folder.join(source.name).with_extension(extension);
    if !path.exists() {
        return Ok(None);
    }
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display())).map(Some)
}

/// The machine of the bench.
fn machine(found: &Value) -> String {
    let machine = &found["bench"]["machine"];
    let text = |name: &str| machine[name].as_str().unwrap_or("?").to_owned();
    let number = |name: &str| machine[name].as_u64().map_or_else(|| "?".to_owned(), |number| number.to_string());
    format!(
        "Measured {} at commit {} on Linux {}, {} CPUs ({}), {} MiB.\n\n",
        text("date"),
        text("commit").chars().take(12).collect::<String>(),
        text("kernel"),
        number("cpus"),
        text("model"),
        number("memory_mib"),
    )
}

fn table(claims: &[Claim]) -> String {
    let mut text = "| claim | goal | measured | |\n|---|---|---|---|\n".to_owned();
    let mut notes = String::new();
    for Claim { claim, goal, measured, why_missed } in claims {
        // Writing to a String cannot fail.
        let _infallible = match measured {
            None => writeln!(text, "| {claim} | {goal} | – | not measured |"),
            Some((shown, met)) => {
                if !met {
                    let _infallible = writeln!(notes, "- *{claim}* is missed: {why_missed}");
                }
                writeln!(text, "| {claim} | {goal} | {shown} | {} |", if *met { "met" } else { "**missed**" })
            }
        };
    }
    if !notes.is_empty() {
        text = text + "\n" + &notes;
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_measured_or_missed_is_told() {
        let claim = |claim, measured| Claim { claim, goal: "≤ 1", measured, why_missed: "of that" };
        let claims = [claim("a", None), claim("b", Some(("2".into(), false))), claim("c", Some(("1".into(), true)))];
        assert_eq!(
            table(&claims),
            "| claim | goal | measured | |\n|---|---|---|---|\n\
             | a | ≤ 1 | – | not measured |\n| b | ≤ 1 | 2 | **missed** |\n| c | ≤ 1 | 1 | met |\n\
             \n- *b* is missed: of that\n"
        );
        assert!(claims::all(&json!({})).iter().all(|claim| claim.measured.is_none()));
    }
}
