//! What a kill would do: which processes to signal, in which order, and which never. Pure: it is handed what was read.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use serde::Serialize;

use crate::cgroup;
use crate::model::{Listener, NetnsId, Process, ProcessId, Protocol, Socket, SocketId};
use crate::source::stat::{self, Stat};

/// Programs that a person types into. With a terminal, they do not bring back what was killed.
const SHELLS: [&str; 13] =
    ["sh", "bash", "dash", "ash", "zsh", "fish", "ksh", "mksh", "tcsh", "csh", "nu", "xonsh", "elvish"];

/// What is to be freed and how.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// By port, protocol and namespace.
    pub groups: Vec<Group>,
    pub victims: Vec<Victim>,
    pub refused: Vec<Refused>,
    /// The listeners that the plan was made from.
    pub listeners: Vec<Listener>,
}

/// One port of one protocol in one network namespace: what an outcome reports on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub port: u16,
    pub proto: Protocol,
    /// 0 where the port was named and nobody had it.
    pub netns: NetnsId,
    /// The sockets to be freed; empty where the port was named and nobody had it.
    pub sockets: Vec<SocketId>,
    /// Sockets on the port that were not selected: left alone, and no new owners.
    pub others: Vec<SocketId>,
}

/// A process to be signalled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Victim {
    pub process: Arc<Process>,
    /// Of the sockets that it must still hold (one of them) when it is signalled.
    pub inodes: Vec<u64>,
    /// Indices into [`Plan::groups`].
    pub groups: Vec<usize>,
    /// Whether it is signalled at once: none of its ancestors is about to be, for the same port.
    pub first: bool,
    pub supervisor: Option<Supervisor>,
}

/// A holder that is not signalled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub process: Arc<Process>,
    pub groups: Vec<usize>,
    pub reason: String,
}

/// Who may bring a process back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Supervisor {
    /// The parent, unless it is init or an interactive shell.
    pub pid: Option<u32>,
    pub name: Option<String>,
    /// A systemd service.
    pub unit: Option<String>,
    /// A container's id, as its cgroup shows it.
    pub container: Option<String>,
    #[serde(skip)]
    pub parent: Option<ProcessId>,
}

/// Whom portwatch does not signal.
#[derive(Clone, Debug, Default)]
pub struct Guards {
    own: u32,
    ancestors: Vec<u32>,
    force_self: bool,
}

impl Guards {
    /// `own` is portwatch's pid; `force_self` gives up the protection of its ancestors.
    pub fn new(own: u32, force_self: bool, stat: &dyn Fn(u32) -> Option<Stat>) -> Guards {
        Guards { own, ancestors: stat::ancestors(own, stat), force_self }
    }

    /// The guards of this process, from `/proc`.
    pub fn current(force_self: bool) -> Guards {
        Guards::new(std::process::id(), force_self, &|pid| stat::read(pid).ok())
    }

    /// Why this process must not be signalled, if so.
    pub fn refuse(&self, pid: u32, stat: &dyn Fn(u32) -> Option<Stat>) -> Option<String> {
        let reason = if pid <= 1 {
            "init is never signalled"
        } else if pid == self.own {
            "portwatch itself holds the port"
        } else if self.ancestors.contains(&pid) && !self.force_self {
            "portwatch was started by it; --force-self signals it all the same"
        } else if stat(pid).is_some_and(|s| s.kernel_thread) {
            "kernel threads are never signalled"
        } else {
            return None;
        };
        Some(reason.to_owned())
    }
}

impl Group {
    /// Whether the socket is on this port, selected or not.
    pub fn covers(&self, socket: &Socket) -> bool {
        !self.sockets.is_empty() && (self.port, self.proto, self.netns) == key(socket)
    }

    pub fn wants(&self, id: SocketId) -> bool {
        self.sockets.iter().any(|&s| same_socket(s, id))
    }

    /// Whether the socket was not there when the plan was made.
    pub fn is_new(&self, socket: &Socket) -> bool {
        self.covers(socket) && !self.wants(socket.id) && !self.others.iter().any(|&s| same_socket(s, socket.id))
    }
}

impl Plan {
    /// Plans to free `selected`. `others` are listeners that were not selected, on whatever ports. `named` are the
    /// ports that the user spelt out: each is reported on, even where nobody has it; without a protocol both count,
    /// and TCP stands for a port that neither has.
    pub fn new(
        selected: Vec<Listener>,
        others: &[Socket],
        named: &[(u16, Option<Protocol>)],
        guards: &Guards,
        stat: &dyn Fn(u32) -> Option<Stat>,
    ) -> Plan {
        let groups = group(&selected, others, named);
        let mut victims: BTreeMap<ProcessId, Victim> = BTreeMap::new();
        let mut refused: BTreeMap<ProcessId, Refused> = BTreeMap::new();
        for listener in &selected {
            let Some(index) = groups.iter().position(|g| g.wants(listener.socket.id)) else { continue };
            for holder in &listener.holders {
                let process = &holder.process;
                if let Some(reason) = guards.refuse(process.id.pid, stat) {
                    let entry = refused.entry(process.id).or_insert_with(|| Refused {
                        process: Arc::clone(process),
                        groups: Vec::new(),
                        reason,
                    });
                    push_new(&mut entry.groups, index);
                    continue;
                }
                let victim = match victims.entry(process.id) {
                    Entry::Occupied(entry) => entry.into_mut(),
                    Entry::Vacant(entry) => entry.insert(Victim::new(process, stat)),
                };
                push_new(&mut victim.groups, index);
                push_new(&mut victim.inodes, listener.socket.id.inode);
            }
        }
        let mut victims: Vec<Victim> = victims.into_values().collect();
        order(&mut victims, stat);
        Plan { groups, victims, refused: refused.into_values().collect(), listeners: selected }
    }

    /// Whether a person should be asked: more than one process, or somebody else's, would be signalled.
    pub fn wants_confirmation(&self, own_uid: u32) -> bool {
        self.victims.len() > 1 || self.victims.iter().any(|v| v.process.uid != Some(own_uid))
    }
}

impl Victim {
    /// A victim that holds nothing yet.
    pub(super) fn new(process: &Arc<Process>, stat: &dyn Fn(u32) -> Option<Stat>) -> Victim {
        Victim {
            process: Arc::clone(process),
            inodes: Vec::new(),
            groups: Vec::new(),
            first: true,
            supervisor: Supervisor::of(process, stat),
        }
    }
}

impl Supervisor {
    /// Who may start this process again, as far as its parent and its cgroup tell.
    pub fn of(process: &Process, stat: &dyn Fn(u32) -> Option<Stat>) -> Option<Supervisor> {
        let parent = stat(process.ppid).filter(|p| p.pid > 1 && !p.exiting && !is_interactive_shell(p));
        let unit = process.cgroup.as_deref().and_then(cgroup::unit).map(str::to_owned);
        let container = process.cgroup.as_deref().and_then(cgroup::container).map(str::to_owned);
        if parent.is_none() && unit.is_none() && container.is_none() {
            return None;
        }
        Some(Supervisor {
            pid: parent.as_ref().map(|p| p.pid),
            name: parent.as_ref().map(|p| p.name.clone()),
            unit,
            container,
            parent: parent.map(|p| p.id()),
        })
    }
}

pub(super) fn push_new<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}

pub(super) fn key(socket: &Socket) -> (u16, Protocol, NetnsId) {
    (socket.port, socket.proto, socket.netns)
}

pub(super) fn same_socket(a: SocketId, b: SocketId) -> bool {
    if a.inode != 0 && b.inode != 0 { a.inode == b.inode } else { a.cookie != 0 && a.cookie == b.cookie }
}

fn group(selected: &[Listener], others: &[Socket], named: &[(u16, Option<Protocol>)]) -> Vec<Group> {
    let mut groups: BTreeMap<(u16, Protocol, NetnsId), Group> = BTreeMap::new();
    for Listener { socket, .. } in selected {
        let (port, proto, netns) = key(socket);
        let group = groups.entry((port, proto, netns)).or_insert_with(|| Group {
            port,
            proto,
            netns,
            sockets: Vec::new(),
            others: Vec::new(),
        });
        group.sockets.push(socket.id);
    }
    for socket in others {
        if let Some(group) = groups.get_mut(&key(socket)) {
            group.others.push(socket.id);
        }
    }
    for &(port, proto) in named {
        let known = groups.keys().any(|&(p, q, _)| p == port && proto.is_none_or(|proto| proto == q));
        if !known {
            let proto = proto.unwrap_or(Protocol::Tcp);
            let group = Group { port, proto, netns: 0, sockets: Vec::new(), others: Vec::new() };
            groups.insert((port, proto, 0), group);
        }
    }
    groups.into_values().collect()
}

/// Masters first: who has a victim of each of its ports among its ancestors waits for that one to end.
fn order(victims: &mut [Victim], stat: &dyn Fn(u32) -> Option<Stat>) {
    let groups_of: BTreeMap<u32, Vec<usize>> = victims.iter().map(|v| (v.process.id.pid, v.groups.clone())).collect();
    for victim in victims.iter_mut() {
        let ancestors = stat::ancestors(victim.process.id.pid, stat);
        let led = |group: &usize| ancestors.iter().any(|a| groups_of.get(a).is_some_and(|g| g.contains(group)));
        victim.first = !victim.groups.iter().all(led);
    }
    victims.sort_by_key(|v| (!v.first, v.process.id.pid));
}

fn is_interactive_shell(parent: &Stat) -> bool {
    // A login shell's name starts with a dash.
    parent.terminal && SHELLS.contains(&parent.name.trim_start_matches('-'))
}

#[cfg(test)]
mod tests;
