//! After the last signal: who has ended, whether somebody takes a port again, and the proof that it is free.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::{AFTERMATH, LINGER, Run, SCAN_EVERY, World};
use crate::kill::life::Life;
use crate::kill::life::Stage;
use crate::kill::plan::push_new;
use crate::kill::prove::{self, Place, Proof};
use crate::kill::sight::Sight;
use crate::model::{Listener, NetnsId, ProcessId};
use crate::source::netns;
use crate::source::stat::has_ended;

impl Run {
    /// A port is free before its last holder is a zombie: who is exiting after a signal has ended. The others get a
    /// moment, for most servers close their port first and end then.
    pub(super) fn linger(&mut self, world: &mut World<'_>) {
        let until = Instant::now() + LINGER;
        loop {
            for index in 0..self.lives.len() {
                let life = &self.lives[index];
                let is_done = life.stage != Stage::Unsignalled && !self.holds_now(life);
                if life.is_held() && is_done && life.is_exiting() {
                    self.over(index, world);
                }
            }
            let lives_on = |l: &&Life| l.is_held() && l.stage != Stage::Unsignalled && !self.holds_now(l);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.lives.iter().filter(lives_on).count() == 0 {
                break;
            }
            self.pause(left, world);
        }
        self.note_let_go(Duration::ZERO, world);
    }

    /// Looks out for a new owner where something could bring one.
    pub(super) fn settle(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        let until = Instant::now() + self.options.settle;
        loop {
            let open = (0..self.plan.groups.len()).any(|group| {
                self.freed[group].is_some() && self.new_owners(group).next().is_none() && self.may_respawn(group)
            });
            let left = until.saturating_duration_since(Instant::now());
            if !open || left.is_zero() {
                return Ok(());
            }
            self.pause(left, world);
            if self.stranger || self.is_blind() && self.scanned.elapsed() >= SCAN_EVERY {
                self.look(world)?;
            }
        }
    }

    pub(in crate::kill) fn new_owners(&self, group: usize) -> impl Iterator<Item = &Listener> {
        self.current.iter().filter(move |l| self.plan.groups[group].is_new(&l.socket))
    }

    fn may_respawn(&self, group: usize) -> bool {
        let is_alive = |id: ProcessId| !has_ended(id);
        let in_group = self.lives.iter().filter(|l| l.victim.groups.contains(&group));
        let mut parents: BTreeSet<ProcessId> = BTreeSet::new();
        let supervisors = in_group.filter_map(|l| l.victim.supervisor.as_ref());
        for supervisor in supervisors.filter(|supervisor| supervisor.may_restart()) {
            match supervisor.parent {
                Some(parent) => parents.insert(parent),
                None => return true,
            };
        }
        parents.into_iter().any(is_alive)
    }

    /// Binds to each port that is free now, as a server would: exit code 0 promises that it works. What is in the way
    /// may go in a moment, as the victims' other sockets do.
    pub(super) fn prove(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        let until = Instant::now() + AFTERMATH;
        let mut open: Vec<usize> = (0..self.plan.groups.len()).filter(|&g| self.is_provable(g)).collect();
        loop {
            let mut left = Vec::new();
            let mut taken = false;
            for group in open {
                let places = self.places(group, world.addresses);
                let netns = self.netns_of(group);
                let was_blocked = self.blocked[group].is_some();
                let proto = self.plan.groups[group].proto;
                match prove::prove(&mut self.sight, netns, proto, &places) {
                    Proof::Blocked(by) => {
                        self.blocked[group] = Some(by);
                        left.push(group);
                        continue;
                    }
                    Proof::Taken => taken = true,
                    Proof::Free if was_blocked => self.freed[group] = Some(self.started.elapsed()),
                    Proof::Free => {}
                }
                self.blocked[group] = None;
            }
            if taken {
                // Since the last look, by somebody who is to be named.
                self.look(world)?;
            }
            // Nothing of ours is about to go where nobody had the port.
            left.retain(|&g| !self.plan.groups[g].sockets.is_empty());
            let remaining = until.saturating_duration_since(Instant::now());
            if left.is_empty() || remaining.is_zero() {
                return Ok(());
            }
            self.pause(remaining, world);
            if self.stranger {
                self.look(world)?;
            }
            // Bound first, listening now: somebody else's.
            open = left.into_iter().filter(|&g| self.is_provable(g)).collect();
        }
    }

    /// Where others share the port, bind() fails or succeeds for reasons of their own.
    fn is_provable(&mut self, group: usize) -> bool {
        let target = &self.plan.groups[group];
        let is_ours = target.sockets.is_empty() || self.freed[group].is_some();
        let is_alone = !self.current.iter().any(|l| target.is_met_by(&l.socket));
        let provable = is_ours && is_alone;
        if !provable {
            self.blocked[group] = None;
        }
        provable
    }

    /// Binds to each port that nobody has, though nothing is to be done.
    pub(super) fn foresee(&mut self, addresses: &dyn Fn(u16) -> Vec<IpAddr>) {
        let open: Vec<usize> =
            (0..self.plan.groups.len()).filter(|&group| self.plan.groups[group].sockets.is_empty()).collect();
        if open.is_empty() {
            return;
        }
        self.sight = Sight::open(&self.plan);
        for group in open {
            let (places, netns) = (self.places(group, addresses), self.netns_of(group));
            let proto = self.plan.groups[group].proto;
            if let Proof::Blocked(by) = prove::prove(&mut self.sight, netns, proto, &places) {
                self.blocked[group] = Some(by);
            }
        }
    }

    fn netns_of(&self, group: usize) -> NetnsId {
        let group = &self.plan.groups[group];
        if group.sockets.is_empty() { netns::own().unwrap_or(0) } else { group.netns }
    }

    fn places(&self, group: usize, addresses: &dyn Fn(u16) -> Vec<IpAddr>) -> Vec<Place> {
        let group = &self.plan.groups[group];
        let mut places: Vec<Place> = Vec::new();
        for Listener { socket, .. } in self.plan.listeners.iter().filter(|l| group.wants(l.socket.id)) {
            push_new(&mut places, (socket.endpoint(), socket.v6only));
        }
        if group.sockets.is_empty() {
            places.extend(
                addresses(group.port).into_iter().map(|address| (SocketAddr::new(address, group.port), Some(true))),
            );
        }
        places
    }
}
