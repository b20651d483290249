//! `cargo xtask race`: an adversary that works against a kill in progress, and counts who is hit.
//!
//! Each round has a listener with one to three holders, a client of the port, somebody who holds another port, and maybe
//! heirs and successors; then a command is to free the port while the adversary moves ([`round::Move`]). The PID of
//! every holder that dies goes at once, by clone3(2) `set_tid`, to a process that never had the port. Who never had it
//! is a bystander, whatever number it goes by, and any signal to it is a failure; what the command says of the port
//! is compared with bind(2) and the kernel's own list when it ends ([`judge`]). All of it happens in namespaces that
//! are made for it ([`arena`] says why nothing outside can be hit).
//!
//! The same adversary works against the peers. Some of what it does is unfair to them: none claims to stand it.

pub(crate) mod arena;
mod board;
mod cast;
mod judge;
mod round;

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{find, output_of};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Against portwatch
    #[arg(long, default_value_t = 10_000)]
    rounds: usize,
    /// Against each peer that is installed; 0: none
    #[arg(long, default_value_t = 1000)]
    peer_rounds: usize,
    /// Seconds that the rounds of one command may take
    #[arg(long, default_value_t = 3600)]
    limit: u64,
    /// What the adversary does follows from it; when exactly, does not
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the figures to a file, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The portwatch to work against [default: a release build of this workspace]
    #[arg(long, value_name = "PATH")]
    portwatch: Option<PathBuf>,
}

/// Which command is to free the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Portwatch,
    Fuser,
    Lsof,
    Killport,
}

const PEERS: [Kind; 3] = [Kind::Fuser, Kind::Lsof, Kind::Killport];

/// A command that is to free the port, and its program.
#[derive(Clone, Debug, clap::Args)]
struct Contender {
    #[arg(long)]
    kind: Kind,
    #[arg(long)]
    program: PathBuf,
}

impl Kind {
    fn shown(self) -> &'static str {
        match self {
            Kind::Portwatch => "portwatch kill PORT -y --json --settle 0",
            Kind::Fuser => "fuser -k PORT/tcp",
            Kind::Lsof => "lsof -ti :PORT \\| xargs kill -9",
            Kind::Killport => "killport PORT",
        }
    }

    fn program(self) -> &'static str {
        match self {
            Kind::Portwatch => "portwatch",
            Kind::Fuser => "fuser",
            Kind::Lsof => "lsof",
            Kind::Killport => "killport",
        }
    }
}

impl Contender {
    fn is_ours(&self) -> bool {
        self.kind == Kind::Portwatch
    }

    /// The grace and whether to begin with SIGKILL concern portwatch, which has a choice.
    fn command(&self, ports: &[u16], grace: Duration, force: bool) -> Command {
        let mut command = Command::new(&self.program);
        match self.kind {
            Kind::Portwatch => {
                command.args(["kill", "--json", "--yes", "--no-agent", "--settle", "0"]);
                command.args(["--grace", &format!("{}ms", grace.as_millis())]);
                command.args(force.then_some("--force"));
                command.args(ports.iter().map(|port| format!("{port}/tcp")));
            }
            Kind::Fuser => {
                command.arg("-k").args(ports.iter().map(|port| format!("{port}/tcp")));
            }
            Kind::Lsof => {
                command = Command::new("sh");
                let ports = ports.iter().map(|port| format!("-i :{port}")).collect::<Vec<_>>().join(" ");
                command.args(["-c", &format!("\"$0\" -t {ports} | xargs kill -9")]).arg(&self.program);
            }
            Kind::Killport => {
                command.args(ports.iter().map(u16::to_string));
            }
        }
        // No way to anything outside may be named there.
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command
    }
}

/// What one command was found to do.
struct Row {
    kind: Kind,
    /// `Err`: why there are no figures.
    figures: std::result::Result<Value, String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let portwatch = args.portwatch.clone().map_or_else(crate::released, Ok)?;
    if args.peer_rounds > 0 {
        crate::bench::fetch_peers();
    }
    let mut rows = Vec::new();
    let ours = play(args, &Contender { kind: Kind::Portwatch, program: portwatch }, args.rounds)?;
    let bad = ["hit", "untruthful"].map(|what| ours[what].as_u64().unwrap_or(u64::MAX));
    rows.push(Row { kind: Kind::Portwatch, figures: Ok(ours) });
    for kind in PEERS.into_iter().filter(|_| args.peer_rounds > 0) {
        let figures = match find(kind.program()) {
            None => Err("is not installed".to_owned()),
            Some(program) => {
                play(args, &Contender { kind, program }, args.peer_rounds).map_err(|error| format!("{error:#}"))
            }
        };
        rows.push(Row { kind, figures });
    }
    println!("{}", markdown(&rows));
    if let Some(path) = &args.json {
        let figures: Vec<Value> = rows.iter().map(Row::json).collect();
        let text = serde_json::to_string_pretty(&json!({"seed": args.seed, "commands": figures}))?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    match bad {
        [0, 0] => Ok(()),
        [hit, lies] => bail!("portwatch hit {hit} bystanders, and was untruthful in {lies} rounds"),
    }
}

/// In a process of its own, for it leaves the namespaces that it begins in.
fn play(args: &Args, contender: &Contender, rounds: usize) -> Result<Value> {
    let kind = clap::ValueEnum::to_possible_value(&contender.kind).context("a command without a name")?;
    let mut command = Command::new(std::env::current_exe().context("cannot find this program's own file")?);
    command.args(["arena", "--kind", kind.get_name(), "--program"]).arg(&contender.program);
    command.args(["--rounds", &rounds.to_string(), "--seed", &args.seed.to_string()]);
    command.args(["--limit", &args.limit.to_string()]);
    serde_json::from_str(&output_of(&mut command)?).context("the arena does not speak JSON")
}

impl Row {
    fn json(&self) -> Value {
        match &self.figures {
            Ok(figures) => json!({"command": self.kind.shown().replace("\\|", "|"), "figures": figures}),
            Err(reason) => json!({"command": self.kind.shown().replace("\\|", "|"), "skipped": reason}),
        }
    }
}

const PARTS: [&str; 4] = ["recycled PID", "client", "other port", "new owner"];

fn markdown(rows: &[Row]) -> String {
    let mut text =
        "| command | rounds | bystanders | hit | recycled PIDs hit | clients hit | others hit | new owners hit \
                    | untruthful | overtaken | median ms |\n\
                    |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
            .to_owned();
    for Row { kind, figures } in rows {
        let command = kind.shown();
        // Writing to a String cannot fail.
        let _infallible = match figures {
            Err(reason) => writeln!(text, "| `{command}` | {reason} | | | | | | | | | |"),
            Ok(figures) => {
                let by_part = PARTS.map(|part| figures["hit_by_part"][part].as_u64().unwrap_or(0));
                let by_part = by_part.map(|count| count.to_string()).join(" | ");
                let Value::Object(all) = figures else { continue };
                let figure = |name: &str| all.get(name).map_or_else(String::new, Value::to_string);
                let [rounds, bystanders, hit] = ["rounds", "bystanders", "hit"].map(figure);
                let [lies, overtaken, median] = ["untruthful", "overtaken", "median_ms"].map(figure);
                writeln!(
                    text,
                    "| `{command}` | {rounds} | {bystanders} | {hit} | {by_part} | {lies} | {overtaken} | {median} |"
                )
            }
        };
    }
    text
}
