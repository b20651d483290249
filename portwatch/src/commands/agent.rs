//! `portwatch agent`: the daemon.

use std::process::ExitCode;

use clap::Args;
use portwatch::agent::{self, AlreadyRunning, Config};

use super::note;
use super::watch::announce;
use crate::cli::Globals;
use crate::exit_codes::NO;

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  portwatch agent --socket /run/portwatch/agent.sock")]
pub(crate) struct AgentArgs {
    /// Room for events that wait to be read, in bytes: a power of two of at least a page
    // Mapped twice in a row, and counted twice: half of what `watch` takes, so as to stay small.
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20)]
    pub(crate) ring: u32,
}

pub(crate) fn run(args: &AgentArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let config = Config { socket: globals.socket.clone(), probe: globals.probe, ring_bytes: Some(args.ring) };
    match agent::run(&config, |tracker| announce(tracker.live(), globals)) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.is::<AlreadyRunning>() => {
            note(&format!("error: {error}"));
            Ok(ExitCode::from(NO))
        }
        Err(error) => Err(error),
    }
}
