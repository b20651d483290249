//! What `who` and `watch` say to people.

use super::json::Ancestors;
use super::{BOLD, DIM, GREEN, RED, View, YELLOW, age, command_line, cut, escape, span};
use crate::cgroup::Unit;
use crate::engine::Roster;
use crate::engine::roster::{Link, Role};
use crate::model::{Ancestor, BootNs, Change, Holder, Listener, Process, Socket};

/// Holders that one line of `watch` names.
const NAMED_HOLDERS: usize = 4;

/// One line of `watch`, without a line end.
pub fn change(change: &Change, view: &View<'_>) -> String {
    let (at, style, event, what) = match change {
        Change::Opened { at, listener } => (*at, GREEN, "OPEN ", opened(listener, view)),
        Change::Closed { at, listener, by } => (*at, DIM, "CLOSE", closed(*at, listener, by.as_deref(), view)),
        Change::Holders { at, listener } => (*at, YELLOW, "HOLDERS", holders(listener, view)),
        Change::Conflict { at, attempt, held_by } => {
            let held_by = match held_by {
                None => "held by nobody visible".to_owned(),
                Some(listener) => match listener.binder() {
                    Some(binder) => format!("held by {}{}", named(&binder.process), more(listener)),
                    None => view.ghost(&listener.socket),
                },
            };
            let wanted = std::net::SocketAddr::new(attempt.address, attempt.port);
            (*at, RED, "CONFLICT", format!("{} wanted {wanted}, {held_by}", named(&attempt.by)))
        }
        Change::Resync { at, lost } => {
            let events = if *lost == 1 { "event" } else { "events" };
            (*at, RED, "RESYNC", format!("{lost} {events} lost; table read anew"))
        }
    };
    let time = view.clock.local(at, "%H:%M:%S%.3f");
    let rest = format!("{event} {what}");
    let rest = cut(&rest, view.width.map_or(usize::MAX, |columns| columns.saturating_sub(time.len() + 1)));
    match rest.strip_prefix(event) {
        Some(what) => format!("{} {}{what}", view.paint(DIM, &time), view.paint(style, event)),
        None => format!("{time} {rest}"),
    }
}

fn opened(listener: &Listener, view: &View<'_>) -> String {
    let Some(binder) = listener.binder() else {
        return format!("{} {}", endpoint(&listener.socket), view.ghost(&listener.socket));
    };
    let process = &binder.process;
    let user = process.uid.map_or_else(|| "?".to_owned(), |uid| view.user(uid));
    format!("{} {}{} {user} {}", endpoint(&listener.socket), named(process), more(listener), command_line(process))
}

fn closed(at: BootNs, listener: &Listener, by: Option<&Process>, view: &View<'_>) -> String {
    let mut text = endpoint(&listener.socket);
    match by.or_else(|| listener.binder().map(|binder| &*binder.process)) {
        Some(process) => {
            let user = process.uid.map(|uid| format!(" {}", view.user(uid))).unwrap_or_default();
            text.push_str(&format!(" {}{user}", named(process)));
        }
        None => text.push_str(&format!(" uid {}", listener.socket.uid)),
    }
    if let Some(since) = listener.since {
        let lived = std::time::Duration::from_nanos(at.saturating_sub(since));
        text.push_str(&format!(" lived {}", span(lived)));
    }
    text
}

fn holders(listener: &Listener, view: &View<'_>) -> String {
    let endpoint = endpoint(&listener.socket);
    if listener.is_ghost() {
        return format!("{endpoint} {}", view.ghost(&listener.socket));
    }
    let names: Vec<String> = binder_first(listener).take(NAMED_HOLDERS).map(|holder| named(&holder.process)).collect();
    let rest = match listener.holders.len().saturating_sub(NAMED_HOLDERS) {
        0 => String::new(),
        rest => format!(" and {rest} more"),
    };
    format!("{endpoint} {}{rest}", names.join(", "))
}

/// Everything about one listener, as a block of lines.
pub fn who(listener: &Listener, ancestors: &Ancestors, containers: &Roster, view: &View<'_>) -> String {
    let socket = &listener.socket;
    let mut out = format!("{}\n", view.paint(BOLD, &endpoint(socket)));
    let mut field = |name: &str, value: &str| out.push_str(&format!("  {name:<10}{value}\n"));
    match listener.binder() {
        Some(binder) => field("binder", &named(&binder.process)),
        None => field("holders", &view.paint(YELLOW, &view.ghost(socket))),
    }
    field("since", &listener.since.map_or_else(|| "not observed".to_owned(), |since| moment(since, view)));
    field("user", &user(socket.uid, view));
    field("netns", &socket.netns.to_string());
    field("inode", &socket.id.inode.to_string());
    if let Some(backlog) = socket.backlog {
        field("backlog", &backlog.to_string());
    }
    if socket.v6only == Some(true) {
        field("v6only", "yes");
    }
    let binder = listener.binder();
    for holder in binder_first(listener) {
        let like = binder.filter(|binder| binder.process.id != holder.process.id && alike(binder, holder));
        out.push_str(&holder_block(
            holder,
            like,
            containers.link(&holder.process, socket).map(|link| container(&link, socket)),
            ancestors.get(&holder.process.id.pid).map_or(&[], Vec::as_slice),
            view,
        ));
    }
    out
}

/// The container that a holder runs in, by name where it is known, or what it publishes.
fn container(link: &Link<'_>, socket: &Socket) -> String {
    match (&link.role, link.container) {
        (Role::Inside(_), Some(container)) => container.to_string(),
        (Role::Inside(id), None) => id.clone(),
        (Role::Proxy(_), _) => link.describe(socket),
    }
}

fn holder_block(
    holder: &Holder,
    like: Option<&Holder>,
    container: Option<String>,
    ancestors: &[Ancestor],
    view: &View<'_>,
) -> String {
    let process = &holder.process;
    let role = if holder.binder { "binder" } else { "holder" };
    let mut out = format!("  {} {}\n", view.paint(BOLD, &named(process)), role);
    let mut field = |name: &str, value: &str| out.push_str(&format!("    {name:<11}{value}\n"));
    let unknown = || "?".to_owned();
    match like {
        // A worker is what its master is: only what differs is said again.
        Some(binder) => field("like", &named(&binder.process)),
        None => {
            let text = |value: &Option<String>| value.as_deref().map_or_else(unknown, |text| escape(text).into_owned());
            field("user", &process.uid.map_or_else(unknown, |uid| user(uid, view)));
            field("command", &command_line(process));
            field("exe", &text(&process.exe));
            field("cwd", &text(&process.cwd));
            let none = || process.cgroup.as_deref().map_or("?", |_| "-").to_owned();
            let found = process.cgroup.as_deref().and_then(Unit::of);
            field("unit", &found.map_or_else(none, |found| unit(&found, view)));
            field("container", &container.unwrap_or_else(none));
        }
    }
    let started = Some(process.id.start).filter(|start| *start != 0);
    field("started", &started.map_or_else(unknown, |start| moment(start, view)));
    let fds: Vec<String> = holder.fds.iter().map(u32::to_string).collect();
    field("fds", &if fds.is_empty() { unknown() } else { fds.join(", ") });
    if !ancestors.is_empty() {
        let mut chain: Vec<String> =
            ancestors.iter().rev().map(|parent| format!("{} ({})", escape(&parent.name), parent.pid)).collect();
        chain.push(named(process));
        field("ancestors", &chain.join(" → "));
    }
    out
}

/// Whether the processes differ in nothing but what their ids tell.
fn alike(a: &Holder, b: &Holder) -> bool {
    let (a, b) = (&a.process, &b.process);
    (a.uid, &a.name, &a.command, &a.exe, &a.cwd, &a.cgroup) == (b.uid, &b.name, &b.command, &b.exe, &b.cwd, &b.cgroup)
}

fn binder_first(listener: &Listener) -> impl Iterator<Item = &Holder> {
    let binder = listener.binder();
    let others = listener.holders.iter().filter(move |holder| binder.is_none_or(|b| !std::ptr::eq(b, *holder)));
    binder.into_iter().chain(others)
}

/// `tcp 127.0.0.1:8000`, `tcp/mptcp [::]:80`.
pub fn endpoint(socket: &Socket) -> String {
    let mptcp = if socket.mptcp { "/mptcp" } else { "" };
    format!("{}{mptcp} {}", socket.proto, socket.endpoint())
}

/// `python3 (999)`, escaped.
pub fn named(process: &Process) -> String {
    format!("{} ({})", escape(&process.name), process.id.pid)
}

fn more(listener: &Listener) -> String {
    match listener.holders.len() {
        0 | 1 => String::new(),
        holders => format!(" +{}", holders - 1),
    }
}

fn user(uid: u32, view: &View<'_>) -> String {
    (view.users)(uid).map_or_else(|| uid.to_string(), |name| format!("{} ({uid})", escape(&name)))
}

/// `nginx.service`, `web.service of user al (1000)`: whose systemd it is decides how to stop it.
fn unit(unit: &Unit<'_>, view: &View<'_>) -> String {
    let name = escape(unit.name);
    unit.manager.uid().map_or_else(|| name.to_string(), |uid| format!("{name} of user {}", user(uid, view)))
}

fn moment(at: BootNs, view: &View<'_>) -> String {
    format!("{} ({} ago)", view.clock.local(at, "%Y-%m-%d %H:%M:%S"), age(view.clock.age(at)))
}
