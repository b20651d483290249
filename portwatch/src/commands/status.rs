//! `portwatch status`: how listeners are learnt on this host, and why not in a better way.

use std::process::ExitCode;

use clap::Args;
use portwatch::render::json;
use portwatch::source::{self, Refusal, Tier};
use serde::Serialize;

use super::{print, refused};
use crate::cli::Globals;
use crate::exit_codes::NO;

#[derive(Serialize)]
struct Status<'a> {
    tier: Tier,
    reasons: &'a [Refusal],
    holders: &'a str,
    agent: Option<()>,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// The agent does not exist yet, so it is never there and healthy: the answer is no.
pub(crate) fn run(args: &StatusArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let found = source::availability(globals.probe)?;
    if args.json {
        let status = Status { tier: found.tier, reasons: &found.refusals, holders: &found.holders, agent: None };
        print(&format!("{}\n", json::line(&status)))?;
        return Ok(ExitCode::from(NO));
    }
    let how = if found.tier.is_event_driven() { "kernel events" } else { "polling: no kernel events to be had" };
    let mut out = format!("tier:    {} ({how})\n", found.tier);
    for refusal in &found.refusals {
        // A refusal of the tier in use is of a part of it.
        let what = if refusal.tier == found.tier { "limit of" } else { "not" };
        out.push_str(&format!("         {what} {}\n", refused(refusal.tier, &refusal.reason)));
    }
    out.push_str(&format!("holders: {}\nagent:   not running\n", found.holders));
    print(&out)?;
    Ok(ExitCode::from(NO))
}
