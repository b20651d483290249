//! The agent's rules: text and JSON.

use std::time::Duration;

use serde::Serialize;

use super::table::{lay_out, left, right};
use super::{View, age, command_line, escape, json as listeners};
use crate::model::NetnsId;
use crate::rules::{Action, Match, State};
use crate::wire::{Scope, Selection};

/// A rule in JSON.
#[derive(Debug, Serialize)]
pub struct RuleOf<'a> {
    name: &'a str,
    action: Action,
    selection: &'a Selection,
    older_than_ms: u64,
    grace_ms: u64,
    remove_cwd: Option<&'a str>,
    dry_run: bool,
    matches: Vec<MatchOf<'a>>,
}

#[derive(Debug, Serialize)]
struct MatchOf<'a> {
    /// UTC; `null`: never.
    fires: Option<String>,
    fired: bool,
    listener: listeners::Listener<'a>,
}

pub fn json<'a>(state: &'a State, view: &View<'_>) -> RuleOf<'a> {
    let of = |it: &'a Match| MatchOf {
        fires: it.at.map(|at| view.clock.utc(at)),
        fired: it.fired,
        listener: listeners::listener(&it.listener, view),
    };
    RuleOf {
        name: &state.name,
        action: state.action,
        selection: &state.selection,
        older_than_ms: state.older_than_ms,
        grace_ms: state.grace_ms,
        remove_cwd: state.remove_cwd.as_deref(),
        dry_run: state.dry_run,
        matches: state.matches.iter().map(of).collect(),
    }
}

/// Each rule in a line, and below it the listeners that it meets as a table. `own`: our network namespace, which goes
/// without saying.
pub fn text(states: &[State], own: NetnsId, view: &View<'_>) -> String {
    let columns =
        [left("  FIRES"), left("ADDRESS"), right("PID"), left("USER"), left("NAME"), right("AGE"), left("COMMAND")];
    let mut out = String::new();
    for state in states {
        if !out.is_empty() {
            out.push('\n');
        }
        out += &title(state, own, view);
        let rows: Vec<(bool, Vec<String>)> =
            state.matches.iter().map(|it| (it.listener.is_ghost(), row(it, view))).collect();
        if rows.is_empty() {
            out += "  meets nothing now\n";
        } else {
            out += &lay_out(&columns, &rows, view);
        }
    }
    out
}

/// `web: ends what is older than 1d: 8080-9500, cwd /tmp/web_*; removes /tmp/web_*`.
fn title(state: &State, own: NetnsId, view: &View<'_>) -> String {
    let deed = match (state.action, state.dry_run) {
        (Action::Kill, false) => "ends",
        (Action::Kill, true) => "would end",
        (Action::Report, _) => "reports",
    };
    let Selection { targets, tcp, udp, addresses, except, commands, cwds, env, cgroups, units, .. } = &state.selection;
    let Selection { uids, orphans, netns, .. } = &state.selection;
    let mut parts = Vec::new();
    if !targets.is_empty() {
        parts.push(targets.join(" "));
    }
    parts.extend(except.iter().map(|target| format!("except {target}")));
    parts.extend(
        [(tcp, "tcp"), (udp, "udp"), (orphans, "orphans")]
            .map(|(on, word)| on.then(|| word.to_owned()))
            .into_iter()
            .flatten(),
    );
    parts.extend(addresses.iter().map(|address| format!("address {address}")));
    let users: Vec<String> = uids.iter().map(|&uid| view.user(uid)).collect();
    let words =
        [("command", commands), ("cwd", cwds), ("env", env), ("cgroup", cgroups), ("unit", units), ("user", &users)];
    for (name, values) in words {
        parts.extend(values.iter().map(|value| format!("{name} {}", escape(value))));
    }
    match netns {
        Scope::Own => {}
        Scope::Id(id) if *id == own => {}
        Scope::All => parts.push("in every network namespace".to_owned()),
        Scope::Id(id) => parts.push(format!("in network namespace {id}")),
    }
    let limit = age(Duration::from_millis(state.older_than_ms));
    let removes = state.remove_cwd.as_ref().map(|glob| format!("; removes {}", escape(glob))).unwrap_or_default();
    format!("{}: {deed} what is older than {limit}: {}{removes}\n", escape(&state.name), parts.join(", "))
}

fn row(it: &Match, view: &View<'_>) -> Vec<String> {
    let socket = &it.listener.socket;
    let fires = match (it.at, it.fired) {
        (Some(at), _) if at <= view.clock.now_boot_ns => "now".to_owned(),
        (Some(at), fired) => {
            let left = age(Duration::from_nanos(at - view.clock.now_boot_ns));
            if fired { format!("again in {left}") } else { format!("in {left}") }
        }
        (None, true) => "reported".to_owned(),
        (None, false) => "never: age unknown".to_owned(),
    };
    let binder = it.listener.binder().map(|holder| &holder.process);
    let began = it.listener.began().map_or_else(|| "?".to_owned(), |began| age(view.clock.age(began)));
    vec![
        format!("  {fires}"),
        format!("{}/{}", socket.endpoint(), socket.proto),
        binder.map_or_else(|| "-".to_owned(), |process| process.id.pid.to_string()),
        view.user(binder.and_then(|process| process.uid).unwrap_or(socket.uid)),
        binder.map_or_else(|| "-".to_owned(), |process| escape(&process.name).into_owned()),
        began,
        binder.map_or_else(|| "ghost: no visible holder".to_owned(), |process| command_line(process)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Listener, Socket};
    use crate::render::tests::view;

    #[test]
    fn rules_read_well() {
        let selection = Selection {
            targets: vec!["8080-9500".to_owned()],
            cwds: vec!["/tmp/w\u{1b}*".to_owned()],
            netns: Scope::Id(1),
            ..Selection::default()
        };
        let state = State {
            name: "web".to_owned(),
            action: Action::Kill,
            selection,
            older_than_ms: 86_400_000,
            grace_ms: 5000,
            remove_cwd: Some("/tmp/web_*".to_owned()),
            dry_run: false,
            matches: Vec::new(),
        };
        let listener = Listener { socket: Socket::example("127.0.0.1", 8080), since: None, holders: Vec::new() };
        let view = view();
        let now = view.clock.now_boot_ns;
        let met = |at, fired| Match { listener: listener.clone(), at, fired };
        let matches = vec![
            met(Some(now), false),
            met(Some(now + 120_000_000_000), false),
            met(Some(now + 120_000_000_000), true),
            met(None, true),
            met(None, false),
        ];
        let empty = State { action: Action::Report, remove_cwd: None, ..state.clone() };
        let expected = "\
web: ends what is older than 1d: 8080-9500, cwd /tmp/w\\x1b*; removes /tmp/web_*
  FIRES               ADDRESS             PID  USER  NAME  AGE  COMMAND
  now                 127.0.0.1:8080/tcp    -  al    -       ?  ghost: no visible holder
  in 2m               127.0.0.1:8080/tcp    -  al    -       ?  ghost: no visible holder
  again in 2m         127.0.0.1:8080/tcp    -  al    -       ?  ghost: no visible holder
  reported            127.0.0.1:8080/tcp    -  al    -       ?  ghost: no visible holder
  never: age unknown  127.0.0.1:8080/tcp    -  al    -       ?  ghost: no visible holder

web: reports what is older than 1d: 8080-9500, cwd /tmp/w\\x1b*, in network namespace 1
  meets nothing now
";
        let told = text(&[State { matches, ..state }], 1, &view) + "\n" + &text(&[empty], 2, &view);
        assert_eq!(told, expected);
    }
}
