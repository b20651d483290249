//! `portwatch rules`: what the agent's rules meet now, and when they fire. Never lets one fire.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use portwatch::render::json;
use portwatch::render::rules as render;
use portwatch::rules::{Queue, State};
use portwatch::source::Scanner;
use portwatch::wire::{Request, Response};

use super::{Users, agent, ask_agent, block_on, explain, note, own_netns, print, view};
use crate::cli::Globals;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch rules
  portwatch rules --config new.toml   what these rules would meet, before the agent reads them

A rule in /etc/portwatch/config.toml ends what is older than it should be:
  [[rule]]
  name = \"web\"
  ports = \"8080-9500\"
  cwd = \"/tmp/web_*\"
  older_than = \"24h\"
  remove_cwd = \"/tmp/web_*\"

There are except, proto, addr, command, env, cgroup, unit, user, orphans = true and netns = \"all\" as well, action =
\"report\" (tell the log, end nothing) and grace = \"5s\".
The agent reads them at its start and at SIGHUP. Nothing is ended here; portwatch agent --dry-run-rules ends nothing, too.
Exit codes: 0 done, with or without rules, 2 usage or the configuration, 3 not permitted, 4 portwatch itself failed")]
pub(crate) struct RulesArgs {
    /// Rules of this file rather than those of the agent
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &RulesArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let told = match &args.config {
        Some(_) => None,
        None => block_on(ask_agent(&Request::Rules {}, None, globals))?,
    };
    let told = told.map(|answer| {
        let rules = answer.responses.into_iter().filter_map(|response| match response {
            Response::Rule(rule) => Some(*rule),
            _ => None,
        });
        rules.collect()
    });
    let by_agent = told.is_some();
    let rules: Vec<State> = match told {
        Some(rules) => rules,
        None => alone(args.config.as_deref(), globals)?,
    };
    let users = Users::default();
    let name = |uid| users.name(uid);
    let view = view(&name);
    if args.json {
        let rows: Vec<_> = rules.iter().map(|rule| render::json(rule, &view)).collect();
        print(&json::array(&rows))?;
        return Ok(ExitCode::SUCCESS);
    }
    if rules.is_empty() {
        note("there are no rules; portwatch rules --help has an example");
    } else if !by_agent && args.config.is_none() {
        note("no agent answers, and without one no rule fires; start it: portwatch agent");
    }
    print(&render::text(&rules, own_netns()?, &view))?;
    Ok(ExitCode::SUCCESS)
}

/// What the rules of a configuration would meet now.
fn alone(file: Option<&Path>, globals: &Globals) -> anyhow::Result<Vec<State>> {
    let rules = agent::rules(file)?;
    if rules.is_empty() {
        return Ok(Vec::new());
    }
    let mut scanner = Scanner::open(globals.probe);
    if let Some(reason) = scanner.refusal() {
        explain(globals, &format!("holders are read from {}: {reason}", scanner.method()));
    }
    let is_met = |socket: &_| rules.iter().any(|rule| rule.selector.matches_socket(socket));
    let listeners = scanner.scan(true, &is_met)?.listeners;
    let mut queue = Queue::default();
    queue.replace(rules.clone(), &listeners);
    let mut states = queue.states(&listeners, false);
    states.iter_mut().for_each(State::look);
    Ok(states)
}
