//! The proof that a port is free: bind() succeeds. Where it does not although nobody listens, what is in the way.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;

use super::outcome::Owner;
use super::plan::push_new;
use super::sight::Sight;
use crate::model::{NetnsId, Protocol, SocketId};
use crate::source::diag::{PortSocket, State};
use crate::source::process::sees_all;
use crate::source::{procfs, stat};

/// What keeps bind() from succeeding on a port where nobody listens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Blocked {
    /// Processes with a socket that is bound and does not listen.
    pub(super) bound: Vec<Owner>,
    /// Processes with connections at this port.
    pub(super) connected: Vec<Owner>,
    /// Connections that no process has any more, by state.
    pub(super) left: BTreeMap<State, usize>,
    /// Connections in `connected`, by state.
    pub(super) held: BTreeMap<State, usize>,
    /// Sockets that are bound and whose holder is not visible.
    pub(super) hidden: usize,
    /// Whether it is about UDP, whose sockets are bound and have a peer.
    pub(super) is_udp: bool,
}

/// Where a server would bind.
pub(super) type Place = (SocketAddr, Option<bool>);

/// What bind() says of a port.
pub(super) enum Proof {
    /// It succeeds, or its failure says nothing about who has the port.
    Free,
    /// It fails, and somebody listens there.
    Taken,
    Blocked(Blocked),
}

/// Binds at each place.
pub(super) fn prove(sight: &mut Sight, netns: NetnsId, proto: Protocol, places: &[Place]) -> Proof {
    for &place in places {
        if sight.is_in_use(netns, proto, place) {
            return match sight.remnants(netns, proto, place.0) {
                Some(Some(remnants)) => Proof::Blocked(Blocked::by(remnants, proto == Protocol::Udp)),
                Some(None) => Proof::Taken,
                None => Proof::Free,
            };
        }
    }
    Proof::Free
}

impl Blocked {
    fn by(remnants: Vec<PortSocket>, is_udp: bool) -> Blocked {
        let inodes: HashSet<u64> = remnants.iter().map(|socket| socket.id.inode).filter(|&inode| inode != 0).collect();
        let holders = procfs::held_fds(&inodes).fds;
        let mut blocked = Blocked { is_udp, ..Blocked::default() };
        for PortSocket { id: SocketId { inode, .. }, state, .. } in remnants {
            let is_bound = is_udp || state == State::BoundInactive;
            let mut holders = holders.iter().filter(|fd| inode != 0 && fd.inode == inode).peekable();
            let is_held = holders.peek().is_some();
            for fd in holders {
                let pid = fd.process.pid;
                let name = stat::read(pid).map_or_else(|_| "?".to_owned(), |stat| stat.name);
                let list = if is_bound { &mut blocked.bound } else { &mut blocked.connected };
                push_new(list, Owner { pid, name });
            }
            match (is_bound, is_held) {
                (true, true) => {}
                (true, false) => blocked.hidden += 1,
                (false, held) => {
                    let held = held || inode != 0;
                    *if held { &mut blocked.held } else { &mut blocked.left }.entry(state).or_default() += 1;
                }
            }
        }
        blocked
    }

    /// Pids that have the port in some way.
    pub(super) fn pids(&self) -> impl Iterator<Item = u32> {
        self.owners().map(|owner| owner.pid)
    }

    pub(super) fn owners(&self) -> impl Iterator<Item = &Owner> {
        self.bound.iter().chain(&self.connected)
    }

    /// A sentence. `ours`: whether the port was just freed, so that what is left is of the old server.
    pub(super) fn message(&self, ours: bool) -> String {
        let mut parts = Vec::new();
        let has_it =
            if self.is_udp { "has it bound and hears one peer alone" } else { "has it bound and does not listen" };
        if !self.bound.is_empty() {
            parts.push(format!("{} {has_it}", names(&self.bound)));
        }
        if self.hidden > 0 {
            let next = if sees_all() { "" } else { "; try sudo" };
            parts.push(format!("a process that is not visible {has_it}{next}"));
        }
        if !self.held.is_empty() {
            let whose = match &self.connected[..] {
                [] => "a process that is not visible".to_owned(),
                owners => names(owners),
            };
            parts.push(format!("{} of {whose} made without SO_REUSEADDR", connections(&self.held)));
        }
        if !self.left.is_empty() {
            let whose = if ours { "of the old server, " } else { "" };
            let pronoun = if self.left.values().sum::<usize>() == 1 { "it" } else { "them" };
            // TCP_TIMEWAIT_LEN; before it, an orphan waits for its peer as long again (tcp_fin_timeout).
            let term = if self.left.keys().all(|&state| state == State::TimeWait) { "60 s" } else { "two minutes" };
            let states = connections(&self.left);
            parts.push(format!("{states} {whose}made without SO_REUSEADDR: the kernel ends {pronoun} within {term}"));
        }
        if parts.is_empty() {
            // Kernels before 6.8 do not show sockets that are bound and nothing else.
            parts.push(format!("some socket {has_it}"));
        }
        format!("nobody listens, but bind() fails with EADDRINUSE: {}", parts.join("; "))
    }
}

fn names(owners: &[Owner]) -> String {
    owners.iter().map(|owner| format!("{} ({})", owner.name, owner.pid)).collect::<Vec<_>>().join(", ")
}

/// `1 connection in TIME_WAIT`, `3 connections (1 FIN_WAIT2, 2 TIME_WAIT)`.
fn connections(states: &BTreeMap<State, usize>) -> String {
    let count: usize = states.values().sum();
    match states.iter().next() {
        Some((state, 1)) if count == 1 => format!("1 connection in {state}"),
        Some((state, _)) if states.len() == 1 => format!("{count} connections in {state}"),
        _ => {
            let each: Vec<String> = states.iter().map(|(state, n)| format!("{n} {state}")).collect();
            format!("{count} connections ({})", each.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut Blocked), ours: bool, expected: &str) {
        let mut blocked = Blocked::default();
        change(&mut blocked);
        let message = blocked.message(ours);
        assert_eq!(message.strip_prefix("nobody listens, but bind() fails with EADDRINUSE: "), Some(expected));
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let owner = || Owner { pid: 7, name: "nc".into() };
        let (time_wait, fin_wait) = (State::TimeWait, State::FinWait2);
        check(|_| {}, true, "some socket has it bound and does not listen");
        check(|b| b.bound.push(owner()), true, "nc (7) has it bound and does not listen");
        let of_udp = |b: &mut Blocked| *b = Blocked { is_udp: true, bound: vec![owner()], ..Blocked::default() };
        check(of_udp, true, "nc (7) has it bound and hears one peer alone");
        let hidden = "a process that is not visible has it bound and does not listen";
        let next = if sees_all() { "" } else { "; try sudo" };
        check(|b| b.hidden = 1, true, &format!("{hidden}{next}"));
        check(
            |b| b.left.extend([(time_wait, 1)]),
            true,
            "1 connection in TIME_WAIT of the old server, made without SO_REUSEADDR: the kernel ends it within 60 s",
        );
        check(
            |b| b.left.extend([(time_wait, 2), (fin_wait, 1)]),
            false,
            "3 connections (1 FIN_WAIT2, 2 TIME_WAIT) made without SO_REUSEADDR: the kernel ends them within two minutes",
        );
        check(
            |b| {
                b.held.insert(fin_wait, 2);
                b.connected.push(owner());
            },
            false,
            "2 connections in FIN_WAIT2 of nc (7) made without SO_REUSEADDR",
        );
    }
}
