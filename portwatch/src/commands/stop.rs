//! `portwatch stop`: ends servers in the background, with all that came of them.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use portwatch::render::{self, json};
use portwatch::run::register::{Record, Register, check_name};
use serde::Serialize;

use super::{note, print};
use crate::cli::Globals;
use crate::exit_codes::NO;

/// How long a supervisor may take beyond the graces: it gives up ten seconds after SIGKILL.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch stop python3-8000
  portwatch stop --all

Every process that came of the server gets SIGTERM, and SIGKILL after the grace that it was started with.
Exit codes: 0 nothing of them is left, 1 there is none by that name or something is left,
2 usage, 3 not permitted, 4 portwatch itself failed")]
pub(crate) struct StopArgs {
    /// Servers to end, as `portwatch ps` names them
    #[arg(value_name = "NAME", required_unless_present = "all", value_parser = check_name)]
    pub(crate) names: Vec<String>,
    /// Every server of this user
    #[arg(long, conflicts_with = "names")]
    pub(crate) all: bool,
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

/// What became of a server.
#[derive(Serialize)]
struct Stopped {
    name: String,
    pid: Option<u32>,
    port: Option<u16>,
    stopped: bool,
    elapsed_ms: u64,
}

pub(crate) fn run(args: &StopArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    super::works_alone(globals)?;
    let register = Register::open()?;
    let named: Vec<(String, Option<Record>)> = if args.all {
        register.living()?.into_iter().map(|record| (record.name.clone(), Some(record))).collect()
    } else {
        args.names.iter().map(|name| (name.clone(), register.find(name))).collect()
    };
    if named.is_empty() && !args.json {
        note("no servers in the background; nothing to stop");
    }
    // All at once: one that takes its time keeps no other waiting.
    let stopped: Vec<anyhow::Result<Stopped>> = std::thread::scope(|scope| {
        let threads: Vec<_> = named.into_iter().map(|(name, record)| scope.spawn(move || stop(name, record))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked"))).collect()
    });
    let mut is_done = true;
    let mut rows = Vec::new();
    for result in stopped {
        let stopped = result?;
        is_done &= stopped.stopped;
        if args.json {
            rows.push(stopped);
        } else if !stopped.stopped {
            match stopped.pid {
                Some(pid) => note(&format!("error: {} ({pid}) does not end; see `portwatch ps`", stopped.name)),
                None => note(&format!("error: no server is called {}; see `portwatch ps`", stopped.name)),
            }
        } else {
            let took = render::span(Duration::from_millis(stopped.elapsed_ms));
            let port = stopped.port.map(|port| format!(", port {port}")).unwrap_or_default();
            let pid = stopped.pid.unwrap_or(0);
            print(&format!("{} stopped (pid {pid}{port}) in {took}\n", stopped.name))?;
        }
    }
    if args.json {
        print(&json::array(&rows))?;
    }
    Ok(if is_done { ExitCode::SUCCESS } else { ExitCode::from(NO) })
}

fn stop(name: String, record: Option<Record>) -> anyhow::Result<Stopped> {
    let Some(record) = record else {
        return Ok(Stopped { name, pid: None, port: None, stopped: false, elapsed_ms: 0 });
    };
    let begun = Instant::now();
    let stopped = record.stop(PATIENCE).with_context(|| format!("cannot stop {name}"))?;
    let elapsed_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(Stopped { name, pid: Some(record.process.pid), port: record.port, stopped, elapsed_ms })
}
