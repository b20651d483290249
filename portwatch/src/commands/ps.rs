//! `portwatch ps`: the servers that `run --background` started, and how they are.

use std::process::ExitCode;

use clap::Args;
use portwatch::model::Protocol;
use portwatch::render::json;
use portwatch::render::servers::{self, Health};
use portwatch::run::health;
use portwatch::run::register::{Record, Register};

use super::run::ready::listening;
use super::{Users, block_on, note, print, view};
use crate::cli::Globals;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch ps
  portwatch ps --json

HEALTH is asked now: `ok` is a server that listens on its port and, where it was started with
--health, answers 2xx.

Exit codes: 0 done, also where there are none, 3 not permitted, 4 portwatch itself failed")]
pub(crate) struct PsArgs {
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &PsArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    super::works_alone(globals)?;
    let register = Register::open()?;
    let records = register.living()?;
    let healths = block_on(async {
        // All are asked at once: one that hangs takes no longer than its limit.
        let asked: Vec<_> = records.iter().cloned().map(|record| tokio::spawn(health_of(record))).collect();
        let mut healths = Vec::new();
        for health in asked {
            healths.push(health.await??);
        }
        Ok(healths)
    })?;
    let users = Users::default();
    let name = |uid| users.name(uid);
    let view = view(&name);
    if args.json {
        let log = |record: &Record| register.log_path(&record.name).to_string_lossy().into_owned();
        let both = records.iter().zip(&healths);
        let rows: Vec<_> =
            both.map(|(record, health)| servers::json(record, log(record), Some(health), &view)).collect();
        print(&json::array(&rows))?;
    } else if records.is_empty() {
        note("no servers in the background; start one: portwatch run --background -- CMD");
    } else {
        let rows: Vec<(Record, Health)> = records.into_iter().zip(healths).collect();
        print(&servers::table(&rows, &view))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn health_of(record: Record) -> anyhow::Result<Health> {
    let Some(port) = record.port else { return Ok(Health::None) };
    let mut listeners = listening(record.watcher.pid, Some(port))?;
    listeners.retain(|listener| record.proto.is_none_or(|proto| proto == listener.socket.proto));
    let Some(listener) = listeners.first() else { return Ok(Health::NotListening) };
    let Some(path) = record.health else { return Ok(Health::Ok) };
    let of_tcp = listeners.iter().find(|listener| listener.socket.proto == Protocol::Tcp).unwrap_or(listener);
    Ok(match health::ask(health::reachable(&of_tcp.socket), &path).await {
        Ok(status) if health::is_well(status) => Health::Ok,
        Ok(status) => Health::Status { status },
        Err(reason) => Health::Silent { reason },
    })
}
