//! `portwatch status`: the agent's health, or how listeners would be learnt without it.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use portwatch::history::State;
use portwatch::render::{self, json};
use portwatch::source::{self, Refusal, Tier};
use portwatch::wire::{self, Response};
use serde::Serialize;

use super::{Alone, agent_status, block_on, print, refused};
use crate::cli::Globals;
use crate::exit_codes::NO;

#[derive(Serialize)]
struct Status<'a> {
    tier: Tier,
    reasons: &'a [Refusal],
    holders: &'a str,
    agent: Option<&'a wire::Status>,
    no_agent: Option<NoAgent>,
}

/// Why there is no `agent`.
#[derive(Serialize)]
struct NoAgent {
    why: Why,
    message: String,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
enum Why {
    NotAsked,
    NotRunning,
    NotPermitted,
    /// It hangs, ended during its answer, or is no agent.
    OfNoUse,
}

impl NoAgent {
    fn new(alone: &Alone, globals: &Globals) -> NoAgent {
        let socket = globals.socket.display();
        let (why, message) = match alone {
            Alone::Unasked => {
                let option = if globals.no_agent { "--no-agent" } else { "--probe" };
                (Why::NotAsked, format!("not asked, because of {option}"))
            }
            Alone::Nobody if globals.socket.exists() => {
                (Why::NotRunning, format!("not running: nobody listens at {socket}, which one left behind"))
            }
            Alone::Nobody => (Why::NotRunning, format!("not running: there is no {socket}")),
            Alone::OfNoUse(error) => {
                let reasons: Vec<String> = error.chain().skip(1).map(ToString::to_string).collect();
                let reason = reasons.join(": ");
                let kinds = || error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
                match kinds().any(|kind| kind == io::ErrorKind::PermissionDenied) {
                    true => (Why::NotPermitted, format!("not known: {socket} may not be reached: {reason}")),
                    false => (Why::OfNoUse, format!("of no use at {socket}: {reason}")),
                }
            }
        };
        NoAgent { why, message }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch status
  portwatch status --json --agent     what monitoring may ask
  portwatch status --no-agent         what this kernel allows, and why not more

Exit codes: 0 an agent is there and well, 1 none is, or it has troubles, 2 usage, 3 not permitted, 4 portwatch itself failed")]
pub(crate) struct StatusArgs {
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Says no where no agent answers, or it cannot keep its history: this is what monitoring asks.
pub(crate) fn run(args: &StatusArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let (agent, no_agent) = match block_on(agent_status(globals))? {
        Ok(mut answer) => match answer.responses.pop() {
            Some(Response::Status(status)) => (Some(status), None),
            _ => bail!("the agent does not tell its status"),
        },
        Err(alone) => (None, Some(NoAgent::new(&alone, globals))),
    };
    let found;
    let status = match &agent {
        Some(agent) => {
            let wire::Status { tier, reasons, holders, .. } = agent;
            Status { tier: *tier, reasons, holders, agent: Some(agent), no_agent }
        }
        None => {
            found = source::availability(globals.probe)?;
            let source::Availability { tier, refusals, holders } = &found;
            Status { tier: *tier, reasons: refusals, holders, agent: None, no_agent }
        }
    };
    let text = if args.json { format!("{}\n", json::line(&status)) } else { text(&status) };
    print(&text)?;
    let is_healthy = agent.as_ref().is_some_and(|agent| {
        let history = agent.history.as_ref();
        agent.troubles.is_empty() && history.is_none_or(|history| history.is_ok() || history.state == State::Starting)
    });
    Ok(if is_healthy { ExitCode::SUCCESS } else { ExitCode::from(NO) })
}

fn text(status: &Status<'_>) -> String {
    let how = if status.tier.is_event_driven() { "kernel events" } else { "polling: no kernel events to be had" };
    let mut out = format!("tier:      {} ({how})\n", status.tier);
    for refusal in status.reasons {
        // A refusal of the tier in use is of a part of it.
        let what = if refusal.tier == status.tier { "limit of" } else { "not" };
        out.push_str(&format!("           {what} {}\n", refused(refusal.tier, &refusal.reason)));
    }
    out.push_str(&format!("holders:   {}\n", render::escape(status.holders)));
    let Some(agent) = status.agent else {
        let why = status.no_agent.as_ref().map_or("not known", |no_agent| &no_agent.message);
        out.push_str(&format!("agent:     {}\n", render::escape(why)));
        return out;
    };
    let uptime = render::span(Duration::from_nanos(agent.uptime_ns));
    out.push_str(&format!("agent:     pid {}, {}, up {uptime}\n", agent.pid, render::escape(&agent.program)));
    let (opens, closes, conflicts) = (agent.opens, agent.closes, agent.conflicts);
    out.push_str(&format!(
        "listeners: {} now; {opens} opened, {closes} closed, {conflicts} failed binds\n",
        agent.listeners
    ));
    out.push_str(&format!("events:    {} dropped, {} resyncs\n", agent.dropped, agent.resyncs));
    out.push_str(&format!("clients:   {} connected, {} watching\n", agent.connections, agent.subscribers));
    if let Some(history) = &agent.history {
        let note = history.reason.iter().chain(&history.note).map(|text| format!("; {}", render::escape(text)));
        let (path, lives) = (render::escape(&history.path.to_string_lossy()).into_owned(), history.lives);
        let size = history.bytes as f64 / f64::from(1 << 20);
        let dropped = if history.dropped > 0 { format!(", {} dropped", history.dropped) } else { String::new() };
        let note: String = note.collect();
        out.push_str(&format!("history:   {lives} lives, {size:.1} MiB{dropped} in {path}{note}\n"));
    }
    for trouble in &agent.troubles {
        out.push_str(&format!("trouble:   {}\n", render::escape(trouble)));
    }
    out.push_str(&format!("memory:    {:.1} MiB\n", agent.memory as f64 / f64::from(1 << 20)));
    out
}
