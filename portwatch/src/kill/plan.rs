//! What a kill would do: which processes to signal, in which order, and which never. Pure: it is handed what was read.
//!
//! **Order: masters before workers.** A master that is told to end ends its workers, each as its kind does it: gunicorn
//! closes the socket and lets them finish their requests, nginx and php-fpm pass the signal on, the workers of a node
//! cluster leave when they lose it. A worker that is signalled by itself is replaced by a master that lives, and cut
//! off in the midst of a request by one that is shutting down. So whoever has a victim of one of its ports among its
//! ancestors (its *leaders*) is not signalled as long as that one is on its way out, even if that one holds the
//! port no longer; only once it is gone, or the grace is over.
//!
//! A parent that holds nothing, though it may bring its children back, is a *supervisor*: named, and not
//! signalled, unless a job is cleaned up that started it ([`super::starters`]). To portwatch it looks like an editor or a terminal multiplexer that started two servers. What it brings
//! back is reported as such. Of real servers none needs more: the master of gunicorn, nginx, php-fpm, uvicorn and a
//! node cluster holds the port as well, with SO_REUSEPORT too, and of postgres and a cluster that schedules
//! round robin it is the only one.
//!
//! `--group` knows no order: as with Ctrl-C, every member is told at once.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::guards::{Guards, Verdict};
use super::kin::{self, Kin, Reach, Relation};
use super::starters::Starter;
use super::stop::Whole;
use crate::model::{BootNs, Listener, NetnsId, Process, ProcessId, Protocol, Socket, SocketId};
use crate::source::stat::{self, Stat};
use crate::supervisor::Supervisor;

/// What is to be freed and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// By port, protocol and namespace.
    pub groups: Vec<Group>,
    pub victims: Vec<Victim>,
    /// Containers and units to be stopped, whose processes are not signalled. Only on the command line.
    #[serde(skip)]
    pub stops: Vec<Stop>,
    pub refused: Vec<Refused>,
    /// Relatives of holders that are not signalled; they are not in the way of any port.
    pub spared: Vec<Spared>,
    /// The listeners that the plan was made from.
    pub listeners: Vec<Listener>,
    /// Who is meant besides the holders.
    pub reach: Reach,
    /// Whether the sockets are closed in the kernel, and the victims, who hold them, live on. Only on the command line.
    #[serde(skip)]
    pub closes: bool,
}

/// One port of one protocol in one network namespace: what an outcome reports on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub port: u16,
    pub proto: Protocol,
    /// 0 where the port was named and nobody had it.
    pub netns: NetnsId,
    /// The sockets to be freed; empty where the port was named and nobody had it.
    pub sockets: Vec<SocketId>,
    /// Where those sockets are bound.
    pub addresses: Vec<IpAddr>,
    /// Sockets on the port that were not selected: left alone, and no new owners.
    pub others: Vec<SocketId>,
}

/// A process to be signalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Victim {
    pub process: Arc<Process>,
    /// Of the sockets that it must still hold (one of them) when it is signalled.
    pub inodes: Vec<u64>,
    /// Indices into [`Plan::groups`].
    pub groups: Vec<usize>,
    /// Its ancestors that are signalled as well, for one of the same ports: it waits for them to end.
    pub leaders: Vec<ProcessId>,
    /// Why it is signalled even if it holds nothing.
    pub kin: Option<Kin>,
    pub supervisor: Option<Supervisor>,
}

/// A container or unit to be stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stop {
    pub what: Whole,
    /// Indices into [`Plan::groups`].
    pub groups: Vec<usize>,
    /// The holders that let go with it: what publishes its ports, who runs in it, the systemd that listens for it. None
    /// where what publishes its ports is not visible.
    pub processes: Vec<Arc<Process>>,
}

/// A holder that is not signalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub process: Arc<Process>,
    pub groups: Vec<usize>,
    pub reason: String,
    /// For want of permission: more of it would help, as it would not against a guard.
    pub denied: bool,
}

/// Somebody related to a holder who is not signalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spared {
    Relative {
        process: Arc<Process>,
        reason: String,
    },
    /// What may start again those that are ended.
    Starter {
        process: Arc<Process>,
        groups: Vec<usize>,
        reason: String,
    },
    /// The members of this process group that hold nothing: portwatch is one of them.
    OwnGroup(u32),
}

impl Group {
    /// Whether the socket is on this port, selected or not.
    pub fn covers(&self, socket: &Socket) -> bool {
        !self.sockets.is_empty() && (self.port, self.proto, self.netns) == key(socket)
    }

    /// Whether the socket is in the way of binding where the selected ones were.
    pub fn is_met_by(&self, socket: &Socket) -> bool {
        self.covers(socket) && self.addresses.iter().any(|&address| socket.overlaps(address))
    }

    pub fn wants(&self, id: SocketId) -> bool {
        self.sockets.iter().any(|&s| same_socket(s, id))
    }

    /// Whether the socket was not there when the plan was made.
    pub fn is_new(&self, socket: &Socket) -> bool {
        self.is_met_by(socket) && !self.wants(socket.id) && !self.others.iter().any(|&s| same_socket(s, socket.id))
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
            if listener.is_ghost()
                && let Some(what) = guards.judge_ghost(&listener.socket)
            {
                push_new(&mut Stop::find(&mut stops, what).groups, index);
            }
            for holder in &listener.holders {
                let process = &holder.process;
                match guards.judge(process, &listener.socket, stat) {
                    Verdict::Signal => {}
                    Verdict::Stop(what) => {
                        Stop::find(&mut stops, what).add(process, index);
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
        let mut plan = Plan {
            groups,
            victims: victims.into_values().collect(),
            stops,
            refused: refused.into_values().collect(),
            listeners: selected,
            ..Plan::default()
        };
        plan.order(stat);
        plan
    }

    /// The same sockets to be closed, without a signal to anybody. To be made with [`Guards::open`].
    pub fn closing(self) -> Plan {
        Plan { closes: true, ..self }
    }

    /// Takes in the relatives of those who are to be signalled. `all` is every process as read after the moment `seen`;
    /// `read` tells of one what a person should know. Who is refused has no relatives.
    pub fn reach_out(
        &mut self,
        reach: Reach,
        all: &[Stat],
        seen: BootNs,
        read: &dyn Fn(ProcessId) -> Option<Process>,
        guards: &Guards,
        stat: &dyn Fn(u32) -> Option<Stat>,
    ) {
        self.reach = reach;
        for victim in &mut self.victims {
            let id = victim.process.id;
            let now = stat(id.pid).filter(|now| now.id().is_same(id));
            match now.and_then(|now| reach.relation(&now)) {
                Some(Relation::Group { group, .. }) if group == guards.group => {
                    push_new(&mut self.spared, Spared::OwnGroup(group));
                }
                relation => victim.kin = relation.map(|relation| Kin { relation, seen }),
            }
        }
        for relative in relatives(&self.victims, all, seen, stat) {
            let id = relative.stat.id();
            if self.refused.iter().any(|refused| refused.process.id.is_same(id)) {
                continue;
            }
            let process = Arc::new(read(id).unwrap_or_else(|| Process::bare(id, relative.stat.name.clone())));
            if self.stops.iter().any(|stop| stop.processes.iter().any(|process| process.id.is_same(id))) {
                continue;
            }
            match guards.refuse_relative(&process, stat) {
                Some(reason) => self.spared.push(Spared::Relative { process, reason }),
                None => self.victims.push(relative.victim(&process, stat)),
            }
        }
        self.order(stat);
    }

    /// Takes in what started those who are to be signalled, to be ended before them. `seen` is a moment before they were
    /// found.
    pub(super) fn take_in(
        &mut self,
        starters: Vec<Starter>,
        seen: BootNs,
        guards: &Guards,
        stat: &dyn Fn(u32) -> Option<Stat>,
    ) {
        for Starter { process, above, groups, spared } in starters {
            let is_it = |id: ProcessId| id.is_same(process.id);
            if self.victims.iter().any(|victim| is_it(victim.process.id))
                || self.refused.iter().any(|refused| is_it(refused.process.id))
                || self.stops.iter().flat_map(|stop| &stop.processes).any(|process| is_it(process.id))
            {
                continue;
            }
            match spared.or_else(|| guards.refuse_relative(&process, stat)) {
                Some(reason) => self.spared.push(Spared::Starter { process, groups, reason }),
                None => {
                    let kin = Some(Kin { relation: Relation::Above(above), seen });
                    self.victims.push(Victim { groups, kin, ..Victim::new(&process, stat) });
                }
            }
        }
        self.order(stat);
    }

    /// Masters first.
    fn order(&mut self, stat: &dyn Fn(u32) -> Option<Stat>) {
        let leaders: Vec<Vec<ProcessId>> =
            self.victims.iter().map(|victim| self.leaders(victim, self.victims.iter(), stat)).collect();
        for (victim, leaders) in self.victims.iter_mut().zip(leaders) {
            victim.leaders = leaders;
        }
        self.victims.sort_by_key(|victim| (victim.leaders.len(), victim.process.id.pid));
    }

    /// For whom of the `others` the victim has to wait.
    pub(super) fn leaders<'a>(
        &self,
        victim: &Victim,
        others: impl Iterator<Item = &'a Victim>,
        stat: &dyn Fn(u32) -> Option<Stat>,
    ) -> Vec<ProcessId> {
        if self.reach == Reach::Group {
            return Vec::new();
        }
        let ancestors = stat::ancestors(victim.process.id.pid, stat);
        let leads = |other: &&Victim| {
            ancestors.contains(&other.process.id.pid) && other.groups.iter().any(|group| victim.groups.contains(group))
        };
        others.filter(leads).map(|leader| leader.process.id).collect()
    }
}

impl Stop {
    /// The one that stops this, which is added where there is none.
    fn find(stops: &mut Vec<Stop>, what: Whole) -> &mut Stop {
        let known = stops.iter().position(|stop| stop.what.is_same(&what));
        let index = known.unwrap_or_else(|| {
            stops.push(Stop { what, groups: Vec::new(), processes: Vec::new() });
            stops.len() - 1
        });
        &mut stops[index]
    }

    /// Adds a holder that goes with it.
    pub(super) fn add(&mut self, process: &Arc<Process>, group: usize) {
        push_new(&mut self.groups, group);
        if !self.processes.iter().any(|known| known.id.is_same(process.id)) {
            self.processes.push(Arc::clone(process));
        }
    }
}

/// A process that was found to be related to a victim.
#[derive(Debug)]
pub(super) struct Relative {
    pub(super) stat: Stat,
    kin: Kin,
    groups: Vec<usize>,
}

/// The relatives of those victims that are meant with theirs, found in `all`, read after `seen`.
pub(super) fn relatives<'a>(
    victims: impl IntoIterator<Item = &'a Victim>,
    all: &[Stat],
    seen: BootNs,
    stat: &dyn Fn(u32) -> Option<Stat>,
) -> Vec<Relative> {
    let known: Vec<(&Victim, Relation)> =
        victims.into_iter().filter_map(|victim| Some((victim, victim.kin?.relation))).collect();
    let anchors: Vec<(ProcessId, Relation)> =
        known.iter().map(|(victim, relation)| (victim.process.id, *relation)).collect();
    let found = kin::relatives(&anchors, all, seen, stat).into_iter();
    found
        .map(|(stat, anchor, kin)| {
            let groups = known.iter().find(|(victim, _)| victim.process.id == anchor);
            Relative { stat, kin, groups: groups.map(|(victim, _)| victim.groups.clone()).unwrap_or_default() }
        })
        .collect()
}

impl Relative {
    pub(super) fn victim(&self, process: &Arc<Process>, stat: &dyn Fn(u32) -> Option<Stat>) -> Victim {
        Victim { groups: self.groups.clone(), kin: Some(self.kin), ..Victim::new(process, stat) }
    }
}

impl Victim {
    /// A victim that holds nothing yet.
    pub(super) fn new(process: &Arc<Process>, stat: &dyn Fn(u32) -> Option<Stat>) -> Victim {
        Victim {
            process: Arc::clone(process),
            inodes: Vec::new(),
            groups: Vec::new(),
            leaders: Vec::new(),
            kin: None,
            supervisor: Supervisor::of(process, stat),
        }
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

/// Whether both name the same socket, as far as either number is known of both.
pub fn same_socket(a: SocketId, b: SocketId) -> bool {
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
            addresses: Vec::new(),
            others: Vec::new(),
        });
        group.sockets.push(socket.id);
        push_new(&mut group.addresses, socket.address);
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
            let group = Group { port, proto, netns: 0, sockets: Vec::new(), addresses: Vec::new(), others: Vec::new() };
            groups.insert((port, proto, 0), group);
        }
    }
    groups.into_values().collect()
}

#[cfg(test)]
mod tests;
