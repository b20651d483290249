//! `portwatch who`: everything about a port.

use std::collections::HashMap;
use std::process::ExitCode;

use portwatch::model::Listener;
use portwatch::render::json::{self, Ancestor, Ancestors};
use portwatch::render::text;

use super::{Users, note, print, read, selection, selector, view};
use crate::cli::{Globals, WhoArgs};
use crate::exit_codes::{NO, Usage};

pub(crate) fn run(args: &WhoArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let selector = selector(&args.targets, &args.selectors)?;
    if selector.is_empty() {
        return Err(Usage("who is missing a port; try: portwatch who 8000".to_owned()).into());
    }
    let listeners = read(&selector, &args.selectors, globals)?;
    let users = Users::default();
    let name = |uid| users.name(uid);
    let view = view(&name)?;
    let ancestors = ancestors_of(&listeners);
    if args.json {
        let rows: Vec<_> =
            listeners.iter().map(|listener| json::listener_with_ancestors(listener, &view, &ancestors)).collect();
        print(&json::array(&rows))?;
    } else if listeners.is_empty() {
        note(&format!("nothing is listening{}", selection(&args.targets, &selector)));
    } else {
        let blocks: Vec<String> = listeners.iter().map(|listener| text::who(listener, &ancestors, &view)).collect();
        print(&blocks.join("\n"))?;
    }
    Ok(if listeners.is_empty() { ExitCode::from(NO) } else { ExitCode::SUCCESS })
}

/// The ancestors of every holder, nearest first, as far as /proc shows them.
fn ancestors_of(listeners: &[Listener]) -> Ancestors {
    let mut parents = HashMap::new();
    let holders = listeners.iter().flat_map(|listener| &listener.holders);
    holders.map(|holder| (holder.process.id.pid, ancestors(holder.process.ppid, &mut parents))).collect()
}

/// From `pid` up to the first process of the pid namespace. A parent that exits meanwhile ends the chain there.
fn ancestors(mut pid: u32, known: &mut HashMap<u32, Option<(Ancestor, u32)>>) -> Vec<Ancestor> {
    let mut chain: Vec<Ancestor> = Vec::new();
    // A pid that is used again while the chain is read could close a circle.
    while pid != 0 && chain.iter().all(|ancestor| ancestor.pid != pid) {
        let Some((ancestor, parent)) = known.entry(pid).or_insert_with(|| read_parent(pid)) else { break };
        chain.push(ancestor.clone());
        pid = *parent;
    }
    chain
}

fn read_parent(pid: u32) -> Option<(Ancestor, u32)> {
    let stat = procfs::process::Process::new(i32::try_from(pid).ok()?).and_then(|process| process.stat()).ok()?;
    Some((Ancestor { pid, name: stat.comm }, u32::try_from(stat.ppid).unwrap_or(0)))
}
