//! What a kill would do: which processes to signal, in which order, and which never. Pure: it is handed what was read.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use crate::engine::roster::Role;
use crate::engine::{Container, Roster};
use crate::model::{Listener, NetnsId, Process, ProcessId, Protocol, Socket, SocketId};
use crate::source::stat::{self, Stat};
use crate::supervisor::Supervisor;

/// What is to be freed and how.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// By port, protocol and namespace.
    pub groups: Vec<Group>,
    pub victims: Vec<Victim>,
    /// Containers to be stopped, whose processes are not signalled.
    pub stops: Vec<Stop>,
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

/// A container to be stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop {
    pub container: Container,
    /// Indices into [`Plan::groups`].
    pub groups: Vec<usize>,
    /// The holders that go with it: what publishes its ports, and who runs in it.
    pub processes: Vec<Arc<Process>>,
}

/// A holder that is not signalled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub process: Arc<Process>,
    pub groups: Vec<usize>,
    pub reason: String,
    /// For want of permission: more of it would help, as it would not against a guard.
    pub denied: bool,
}

/// Whom portwatch does not signal.
#[derive(Clone, Debug, Default)]
pub struct Guards {
    own: u32,
    ancestors: Vec<u32>,
    force_self: bool,
    roster: Roster,
    stop_containers: bool,
}

/// What is to be done about the holder of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Signal,
    /// Stop the container that it runs in, or holds the port for.
    Stop(Container),
    Refuse {
        reason: String,
        /// For want of permission.
        denied: bool,
    },
}

impl Guards {
    /// `own` is portwatch's pid; `force_self` gives up the protection of its ancestors.
    pub fn new(own: u32, force_self: bool, stat: &dyn Fn(u32) -> Option<Stat>) -> Guards {
        Guards { own, ancestors: stat::ancestors(own, stat), force_self, ..Guards::default() }
    }

    /// The guards of this process, from `/proc`.
    pub fn current(force_self: bool) -> Guards {
        Guards::new(std::process::id(), force_self, &|pid| stat::read(pid).ok())
    }

    /// Adds what is known of containers. With `stop`, those of the holders are stopped; else whatever holds a port for a
    /// container is left alone, for the container would go on with a dead port.
    pub fn with_containers(self, roster: Roster, stop: bool) -> Guards {
        Guards { roster, stop_containers: stop, ..self }
    }

    pub(super) fn judge(&self, process: &Process, socket: &Socket, stat: &dyn Fn(u32) -> Option<Stat>) -> Verdict {
        if let Some(reason) = self.refuse(process.id.pid, stat) {
            return Verdict::Refuse { reason, denied: false };
        }
        let Some(link) = self.roster.link(process, socket) else { return Verdict::Signal };
        if self.stop_containers {
            return match (self.roster.obstacle(&link, socket), link.container) {
                (None, Some(container)) => Verdict::Stop(container.clone()),
                (Some((reason, denied)), _) => Verdict::Refuse { reason, denied },
                (None, None) => Verdict::Refuse { reason: link.describe(socket), denied: false },
            };
        }
        match link.role {
            Role::Proxy(_) => Verdict::Refuse { reason: self.roster.refusal(&link, socket), denied: false },
            Role::Inside(_) => Verdict::Signal,
        }
    }

    /// The name of the container that the process runs in, where an engine told it.
    fn container_name(&self, process: &Process, socket: &Socket) -> Option<String> {
        Some(self.roster.link(process, socket)?.container?.name.clone())
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
        let mut stops: Vec<Stop> = Vec::new();
        for listener in &selected {
            let Some(index) = groups.iter().position(|g| g.wants(listener.socket.id)) else { continue };
            for holder in &listener.holders {
                let process = &holder.process;
                match guards.judge(process, &listener.socket, stat) {
                    Verdict::Signal => {}
                    Verdict::Stop(container) => {
                        let known = stops.iter().position(|stop| stop.container.id == container.id);
                        let known = known.unwrap_or_else(|| {
                            stops.push(Stop { container, groups: Vec::new(), processes: Vec::new() });
                            stops.len() - 1
                        });
                        stops[known].add(process, index);
                        continue;
                    }
                    Verdict::Refuse { reason, denied } => {
                        let entry = refused.entry(process.id).or_insert_with(|| Refused {
                            process: Arc::clone(process),
                            groups: Vec::new(),
                            reason,
                            denied,
                        });
                        push_new(&mut entry.groups, index);
                        continue;
                    }
                }
                let victim = match victims.entry(process.id) {
                    Entry::Occupied(entry) => entry.into_mut(),
                    Entry::Vacant(entry) => {
                        let mut victim = Victim::new(process, stat);
                        if let Some(supervisor) = &mut victim.supervisor {
                            supervisor.container_name = guards.container_name(process, &listener.socket);
                        }
                        entry.insert(victim)
                    }
                };
                push_new(&mut victim.groups, index);
                push_new(&mut victim.inodes, listener.socket.id.inode);
            }
        }
        let mut victims: Vec<Victim> = victims.into_values().collect();
        order(&mut victims, stat);
        Plan { groups, victims, stops, refused: refused.into_values().collect(), listeners: selected }
    }

    /// Whether a person should be asked: a container would be stopped, or more than one process, or somebody else's, be
    /// signalled.
    pub fn wants_confirmation(&self, own_uid: u32) -> bool {
        !self.stops.is_empty() || self.victims.len() > 1 || self.victims.iter().any(|v| v.process.uid != Some(own_uid))
    }
}

impl Stop {
    /// Adds a holder that goes with the container.
    pub(super) fn add(&mut self, process: &Arc<Process>, group: usize) {
        push_new(&mut self.groups, group);
        if !self.processes.iter().any(|known| known.id.is_same(process.id)) {
            self.processes.push(Arc::clone(process));
        }
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

pub(super) fn push_new<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}

fn key(socket: &Socket) -> (u16, Protocol, NetnsId) {
    (socket.port, socket.proto, socket.netns)
}

fn same_socket(a: SocketId, b: SocketId) -> bool {
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

#[cfg(test)]
mod tests;
