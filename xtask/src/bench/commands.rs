//! Whole commands, timed from spawn to exit, in rounds that run each of them once.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Effort, quantile};
use crate::find;

/// One command and its times.
pub(super) struct Row {
    name: String,
    argv: Vec<String>,
    /// The ports that a right answer shows.
    ports: Vec<u16>,
    ours: bool,
    /// Why there are no times.
    skipped: Option<String>,
    times_ms: Vec<f64>,
}

impl Row {
    /// What is wrong with portwatch's own answer, if anything is. Peers are only skipped.
    pub(super) fn complaint(&self) -> Option<String> {
        self.skipped.as_ref().filter(|_| self.ours).map(|reason| format!("`{}` {reason}", self.name))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.argv[0]);
        command.args(&self.argv[1..]).stdin(Stdio::null());
        command
    }

    /// Runs once and looks for the ports in what is printed.
    fn check(&mut self) {
        if !self.ours {
            let Some(program) = find(&self.argv[0]) else {
                self.skipped = Some("is not installed".into());
                return;
            };
            self.argv[0] = program.to_string_lossy().into_owned();
        }
        self.skipped = match self.command().output() {
            Err(error) => Some(format!("does not run: {error}")),
            Ok(output) => {
                let text =
                    [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
                let shown = |port: &u16| text.split(|c: char| !c.is_ascii_digit()).any(|word| word == port.to_string());
                let missing = self.ports.iter().filter(|port| !shown(port)).count();
                (missing > 0).then(|| format!("does not show {missing} of {} ports", self.ports.len()))
            }
        };
    }

    fn time(&mut self) -> Result<()> {
        let mut command = self.command();
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let started = Instant::now();
        command.status().with_context(|| format!("cannot run `{}`", self.name))?;
        self.times_ms.push(started.elapsed().as_secs_f64() * 1e3);
        Ok(())
    }
}

/// Times every command that is installed and answers right. `ports` are the crowd's.
pub(super) fn measure(portwatch: &Path, ports: &[u16], effort: &Effort) -> Result<Vec<Row>> {
    let port = ports.first().copied().context("the crowd has no listener")?;
    let own = portwatch.to_string_lossy().into_owned();
    let row = |line: &str, ports: &[u16]| {
        let line = line.replace("PORT", &port.to_string());
        let mut argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let ours = argv[0] == "portwatch";
        if ours {
            argv[0].clone_from(&own);
        }
        Row { name: line, argv, ports: ports.to_vec(), ours, skipped: None, times_ms: Vec::new() }
    };
    let mut rows = vec![
        row("ss -ltnp", ports),
        row("portwatch list", ports),
        row("portwatch --probe poll list", ports),
        row("lsof -nP -iTCP -sTCP:LISTEN", ports),
        row("portwatch who PORT", &[port]),
        row("fuser PORT/tcp", &[port]),
        row("killport --dry-run PORT", &[port]),
    ];
    rows.iter_mut().for_each(Row::check);
    let started = Instant::now();
    for _ in 0..effort.rounds {
        for row in rows.iter_mut().filter(|row| row.skipped.is_none()) {
            row.time()?;
        }
        if started.elapsed() > effort.rounds_limit {
            break;
        }
    }
    Ok(rows)
}

/// The median of `ss`, which every row is compared with.
fn yardstick(rows: &[Row]) -> Option<f64> {
    let ss = rows.iter().find(|row| row.name.starts_with("ss ") && !row.times_ms.is_empty())?;
    Some(quantile(&mut ss.times_ms.clone(), 0.5))
}

pub(super) fn markdown(rows: &[Row]) -> String {
    let mut text = "| command | median ms | min | max | runs | of ss |\n|---|--:|--:|--:|--:|--:|\n".to_owned();
    for row in rows {
        // Writing to a String cannot fail.
        let _infallible = match &row.skipped {
            Some(reason) => writeln!(text, "| `{}` | {reason} | | | | |", row.name),
            None => {
                let mut times = row.times_ms.clone();
                let [median, min, max] = [0.5, 0.0, 1.0].map(|part| quantile(&mut times, part));
                let ratio = yardstick(rows).map_or_else(|| "?".to_owned(), |ss| format!("{:.2}", median / ss));
                writeln!(text, "| `{}` | {median:.1} | {min:.1} | {max:.1} | {} | {ratio} |", row.name, times.len())
            }
        };
    }
    text
}

pub(super) fn figures(rows: &[Row]) -> Value {
    rows.iter()
        .map(|row| {
            let mut times = row.times_ms.clone();
            let mut at = |part| (!times.is_empty()).then(|| quantile(&mut times, part));
            let median = at(0.5);
            json!({
                "command": row.name, "skipped": row.skipped, "median_ms": median, "min_ms": at(0.0), "max_ms": at(1.0),
                "of_ss": median.zip(yardstick(rows)).map(|(median, ss)| median / ss), "runs_ms": row.times_ms
            })
        })
        .collect()
}
