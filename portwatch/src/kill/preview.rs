//! What a kill says to people before it does anything: who would be hit, who would not, and what there is to think
//! about. Pure; text from processes is escaped.

use std::fmt::Write as _;
use std::net::SocketAddr;

use super::concern::Concern;
use super::kin::Relation;
use super::plan::{Plan, Spared, Victim};
use crate::model::{Listener, Protocol};
use crate::render::table::{lay_out, left, right};
use crate::render::{View, age, command_line, escape};

/// A row names so many addresses; of more it counts the rest.
const ADDRESSES: usize = 2;

/// The victims as a table, masters before workers. No victims: nothing.
pub fn victims(plan: &Plan, view: &View<'_>) -> String {
    if plan.victims.is_empty() {
        return String::new();
    }
    let columns = [right("PID"), left("NAME"), left("USER"), left("ADDRESS"), right("AGE"), left("COMMAND")];
    let rows: Vec<(bool, Vec<String>)> =
        plan.victims.iter().map(|victim| (false, row(plan, victim, view).to_vec())).collect();
    lay_out(&columns, &rows, view)
}

fn row(plan: &Plan, victim: &Victim, view: &View<'_>) -> [String; 6] {
    let process = &victim.process;
    let started = Some(process.id.start).filter(|start| *start != 0);
    [
        process.id.pid.to_string(),
        escape(&process.name).into_owned(),
        process.uid.map_or_else(|| "?".to_owned(), |uid| view.user(uid)),
        addresses(plan, victim),
        started.map_or_else(|| "?".to_owned(), |start| age(view.clock.age(start))),
        command_line(process),
    ]
}

/// `127.0.0.1:8000/tcp,[::1]:8000/tcp +2`; for who holds nothing, why it is there: `(child of 7)`.
fn addresses(plan: &Plan, victim: &Victim) -> String {
    let sockets = plan.listeners.iter().map(|listener| &listener.socket);
    let held = sockets.filter(|socket| victim.inodes.contains(&socket.id.inode));
    let mut addresses: Vec<(SocketAddr, Protocol)> = held.map(|socket| (socket.endpoint(), socket.proto)).collect();
    addresses.sort_unstable();
    addresses.dedup();
    let named: Vec<String> = addresses.iter().take(ADDRESSES).map(|(at, proto)| format!("{at}/{proto}")).collect();
    match (addresses.len(), victim.kin.map(|kin| kin.relation)) {
        (0, Some(Relation::Tree(root))) => format!("(below {})", root.pid),
        (0, Some(Relation::Group { group, .. })) => format!("(group {group})"),
        (0, Some(Relation::Above(holder))) => format!("(above {})", holder.pid),
        (0, None) => "-".to_owned(),
        (1..=ADDRESSES, _) => named.join(","),
        (all, _) => format!("{} +{}", named.join(","), all - ADDRESSES),
    }
}

/// The containers and units that the plan stops, a line each.
pub fn stops(plan: &Plan) -> String {
    let mut out = String::new();
    for stop in &plan.stops {
        let processes: Vec<String> =
            stop.processes.iter().map(|p| format!("{} ({})", escape(&p.name), p.id.pid)).collect();
        let _ = match processes.len() {
            0 => writeln!(out, "to stop: {}, of which no visible process holds the port", stop.what),
            _ => writeln!(out, "to stop: {}, in place of {}", stop.what, processes.join(", ")),
        };
    }
    out
}

/// The sockets that the plan closes, a line each.
pub fn closures(plan: &Plan) -> String {
    let mut out = String::new();
    for Listener { socket, holders, .. } in plan.listeners.iter().filter(|_| plan.closes) {
        let at = format!("{}/{}", socket.endpoint(), socket.proto);
        let names: Vec<String> =
            holders.iter().map(|h| format!("{} ({})", escape(&h.process.name), h.process.id.pid)).collect();
        let _ = match names.len() {
            0 => writeln!(out, "to close: the socket {at}, which no visible process holds"),
            1 => writeln!(out, "to close: the socket {at} of {}, which lives on", names.join(", ")),
            _ => writeln!(out, "to close: the socket {at} of {}, which live on", names.join(", ")),
        };
    }
    out
}

/// The victims that run in containers, which may start them again, a line each.
pub fn inside(plan: &Plan) -> String {
    let mut out = String::new();
    for victim in &plan.victims {
        let Some(supervisor) = &victim.supervisor else { continue };
        let Some(id) = &supervisor.container else { continue };
        let process = &victim.process;
        let name = supervisor.container_name.as_ref().map_or_else(|| id.clone(), |name| format!("{name} ({id})"));
        let _ = writeln!(
            out,
            "{} ({}) runs in container {name}; --stop-container stops that instead",
            escape(&process.name),
            process.id.pid
        );
    }
    out
}

/// Those who hold a port, or are related to one who does, and would not be signalled, a line each.
pub fn refusals(plan: &Plan) -> String {
    let refused = plan.refused.iter().map(|refused| (&refused.process, &refused.reason));
    let relatives = plan.spared.iter().filter_map(|spared| match spared {
        Spared::Relative { process, reason } | Spared::Starter { process, reason, .. } => Some((process, reason)),
        Spared::OwnGroup(_) => None,
    });
    let mut out = String::new();
    for (process, reason) in refused.chain(relatives) {
        let _ = writeln!(out, "not signalling {} ({}): {}", escape(&process.name), process.id.pid, escape(reason));
    }
    for spared in &plan.spared {
        if let Spared::OwnGroup(group) = spared {
            let _ = writeln!(out, "not signalling process group {group} but for the holders: portwatch is in it");
        }
    }
    out
}

/// The question that the concerns make necessary, without an answer to choose.
pub fn question(plan: &Plan, concerns: &[Concern], view: &View<'_>) -> String {
    let parts: Vec<String> = concerns
        .iter()
        .map(|concern| match concern {
            Concern::Unrelated(count) => format!("{count} unrelated processes"),
            Concern::OthersProcesses { uid, count: 1 } => format!("a process of {}", view.user(*uid)),
            Concern::OthersProcesses { uid, count } => format!("{count} processes of {}", view.user(*uid)),
            Concern::Starters(1) => "a process that started others".to_owned(),
            Concern::Starters(count) => format!("{count} processes that started others"),
            Concern::Service(name) => format!("{}, a system service", escape(name)),
            Concern::Container(name) => format!("container {}", escape(name)),
            Concern::Unit(name) => format!("unit {}, with everything in it", escape(name)),
        })
        .collect();
    let deed = if plan.closes { "close sockets of" } else { "end" };
    format!("this would {deed} {}; go on?", parts.join("; "))
}

#[cfg(test)]
mod tests;
