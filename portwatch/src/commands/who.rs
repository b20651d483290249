//! `portwatch who`: everything about a port.

use std::process::ExitCode;

use clap::Args;
use portwatch::engine::{self, Roster};
use portwatch::render::json;
use portwatch::render::text;

use super::{Found, Users, note, nothing_listens, print, read, selector, view};
use crate::cli::{Globals, Selectors, TARGETS};
use crate::exit_codes::{NO, Usage};

#[derive(Debug, Args)]
#[command(after_help = format!("\
Examples:
  portwatch who 8000
  portwatch who 127.0.0.1:5432 --json
  portwatch who --pid 4242

{TARGETS}"))]
pub(crate) struct WhoArgs {
    /// Ports to explain
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<String>,
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) selectors: Selectors,
}

pub(crate) fn run(args: &WhoArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let selector = selector(&args.targets, &args.selectors, globals)?;
    if selector.is_empty() {
        return Err(Usage("who is missing a port; try: portwatch who 8000".to_owned()).into());
    }
    let Found { listeners, ancestors, narrowed, hidden } = read(&selector, globals, true)?;
    let users = Users::default();
    let name = |uid| users.name(uid);
    let view = view(&name);
    if args.json {
        let rows: Vec<_> =
            listeners.iter().map(|listener| json::listener_with_ancestors(listener, &view, &ancestors)).collect();
        print(&json::array(&rows))?;
    } else if listeners.is_empty() {
        note(&nothing_listens(&args.targets, &selector, narrowed, hidden));
    } else {
        // The names are worth a question only where there is somebody to name.
        let containers = if engine::is_involved_in(&listeners) { engine::ask().1 } else { Roster::default() };
        let blocks: Vec<String> =
            listeners.iter().map(|listener| text::who(listener, &ancestors, &containers, &view)).collect();
        print(&blocks.join("\n"))?;
    }
    Ok(if listeners.is_empty() { ExitCode::from(NO) } else { ExitCode::SUCCESS })
}
