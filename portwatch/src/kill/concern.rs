//! What a person should think about before a kill: strangers to one another, somebody else's processes, services that
//! the host itself needs. Pure. What it calls a service only decides about a question, never about a signal, so names,
//! which a process gives itself, are good enough.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::kin::Relation;
use super::plan::{Plan, Victim};
use super::stop::Whole;
use crate::cgroup;
use crate::model::Process;
use crate::source::stat::{self, Stat};

/// Programs without which a host cannot be reached, lacks its network, or loses all its containers. The kernel's names
/// of them: 15 bytes at most. The daemons of systemd are known by their prefix.
const PROGRAMS: [&str; 23] = [
    "init",
    "systemd",
    "sshd",
    "sshd-session",
    "dropbear",
    "dbus-daemon",
    "dbus-broker",
    "dbus-broker-lau",
    "dockerd",
    "docker-proxy",
    "containerd",
    "containerd-shim",
    "podman",
    "conmon",
    "crio",
    "kubelet",
    "k3s-server",
    "libvirtd",
    "lxd",
    "NetworkManager",
    "wpa_supplicant",
    "dhclient",
    "dhcpcd",
];

/// The units of such programs, without `.service`.
const UNITS: [&str; 15] = [
    "ssh",
    "sshd",
    "dropbear",
    "dbus",
    "dbus-broker",
    "docker",
    "containerd",
    "podman",
    "crio",
    "kubelet",
    "k3s",
    "libvirtd",
    "NetworkManager",
    "wpa_supplicant",
    "networking",
];

/// The common start of systemd's daemons, and of their units.
const SYSTEMD: &str = "systemd-";

/// A reason to ask before anybody is signalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Concern {
    /// So many families: processes of which none descends from another one's.
    Unrelated(usize),
    /// So many processes of this user, who is another one.
    OthersProcesses { uid: u32, count: usize },
    /// A system service, by its program's name, which is hostile text.
    Service(String),
    /// So many processes that hold nothing, for they started those who do.
    Starters(usize),
    /// A container that would be stopped, with everything in it, by its name.
    Container(String),
    /// A unit of systemd that would be stopped, with everything in it, by its name, which is hostile text.
    Unit(String),
}

/// The reasons to ask about this plan, if `own_uid` is who would carry it out. Who is unrelated is no concern where each was chosen by
/// hand.
pub fn concerns(plan: &Plan, own_uid: u32, chosen: bool, stat: &dyn Fn(u32) -> Option<Stat>) -> Vec<Concern> {
    let mut concerns = Vec::new();
    let families = families(&plan.victims, stat);
    if families > 1 && !chosen {
        concerns.push(Concern::Unrelated(families));
    }
    let starters = plan.victims.iter().filter(|victim| victim.kin.is_some_and(|kin| kin.is_starter())).count();
    if starters > 0 {
        concerns.push(Concern::Starters(starters));
    }
    // Of an unknown user: gone already.
    let uids = || plan.victims.iter().filter_map(|victim| victim.process.uid).filter(|&uid| uid != own_uid);
    for uid in uids().collect::<BTreeSet<u32>>() {
        concerns.push(Concern::OthersProcesses { uid, count: uids().filter(|&other| other == uid).count() });
    }
    let services = plan.victims.iter().map(|victim| &*victim.process).filter(|process| is_service(process));
    let names: BTreeSet<&str> = services.map(|process| process.name.as_str()).collect();
    concerns.extend(names.into_iter().map(|name| Concern::Service(name.to_owned())));
    concerns.extend(plan.stops.iter().map(|stop| match &stop.what {
        Whole::Container(container) => Concern::Container(container.name.clone()),
        Whole::Unit { name, .. } => Concern::Unit(name.clone()),
    }));
    concerns
}

/// How many groups of processes that are related: by descent, or because one was taken in for the sake of another.
fn families(victims: &[Victim], stat: &dyn Fn(u32) -> Option<Stat>) -> usize {
    let place = |pid: u32| victims.iter().position(|victim| victim.process.id.pid == pid);
    // Each victim's family, by the number of one of its members.
    let mut family: Vec<usize> = (0..victims.len()).collect();
    for (index, victim) in victims.iter().enumerate() {
        let anchor = victim.kin.map(|kin| match kin.relation {
            Relation::Tree(root) => root.pid,
            Relation::Above(holder) => holder.pid,
            Relation::Group { anchor, .. } => anchor.pid,
        });
        let ancestors = stat::ancestors(victim.process.id.pid, stat);
        for relative in ancestors.into_iter().chain(anchor).filter_map(place) {
            let (one, other) = (family[index], family[relative]);
            family.iter_mut().filter(|member| **member == one).for_each(|member| *member = other);
        }
    }
    family.into_iter().collect::<BTreeSet<usize>>().len()
}

fn is_service(process: &Process) -> bool {
    let name = process.name.as_str();
    if PROGRAMS.contains(&name) || name.starts_with(SYSTEMD) {
        return true;
    }
    // What runs in a container is that one's business, whoever started it.
    let own = process.cgroup.as_deref().filter(|path| cgroup::container(path).is_none());
    let unit = own.and_then(cgroup::unit).and_then(|unit| unit.strip_suffix(".service"));
    unit.is_some_and(|unit| {
        // `ssh@10-1.2.3.4:22` is an instance of `ssh@`.
        let name = unit.split_once('@').map_or(unit, |(template, _)| template);
        UNITS.contains(&name) || name.starts_with(SYSTEMD)
    })
}

#[cfg(test)]
mod tests;
