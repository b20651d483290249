//! `portwatch list`: a table of listeners.

use std::process::ExitCode;

use clap::Args;
use portwatch::render::json;
use portwatch::render::table::{Detail, table};

use super::{Found, Users, note, nothing_listens, print, read, selector, view};
use crate::cli::{Globals, Selectors, TARGETS};

#[derive(Debug, Args)]
#[command(after_help = format!("\
Examples:
  portwatch list 3000-3999
  portwatch list --user www-data --wide
  portwatch list --command '*python*' --older-than 24h
  portwatch list --netns all --json

{TARGETS}"))]
pub(crate) struct ListArgs {
    /// Ports to show; all without
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<String>,
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
    /// Whole commands, and a row for every holder
    #[arg(short, long)]
    pub(crate) wide: bool,
    #[command(flatten)]
    pub(crate) selectors: Selectors,
}

pub(crate) fn run(args: &ListArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let selector = selector(&args.targets, &args.selectors, globals)?;
    let Found { listeners, narrowed, hidden, .. } = read(&selector, globals, false)?;
    let users = Users::default();
    let name = |uid| users.name(uid);
    let mut view = view(&name);
    if args.json {
        let rows: Vec<_> = listeners.iter().map(|listener| json::listener(listener, &view)).collect();
        print(&json::array(&rows))?;
        return Ok(ExitCode::SUCCESS);
    }
    if listeners.is_empty() {
        note(&nothing_listens(&args.targets, &selector, narrowed, hidden));
        return Ok(ExitCode::SUCCESS);
    }
    let detail = if args.wide {
        view.width = None;
        Detail::Holders
    } else {
        Detail::Listeners
    };
    print(&table(&listeners, detail, &view))?;
    Ok(ExitCode::SUCCESS)
}
