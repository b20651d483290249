//! While a kill is under way: who else has come to hold a port, or belongs to those who do.

use std::sync::Arc;

use anyhow::Context as _;

use super::{Run, World};
use crate::kill::guards::Verdict;
use crate::kill::life::{Life, stat_of};
use crate::kill::plan::{self, Refused, Stop, Victim, key, push_new};
use crate::source::{process, stat};

impl Run {
    /// Takes in holders that the plan did not know, such as a worker forked since: as any other, they pass the guards.
    pub(super) fn adopt(&mut self, world: &World<'_>) {
        let began = self.began;
        for listener in &self.current {
            let Some(&group) = self.group_of.get(&key(&listener.socket)) else { continue };
            if !self.plan.groups[group].wants(listener.socket.id) {
                continue;
            }
            let inode = listener.socket.id.inode;
            for holder in &listener.holders {
                let id = holder.process.id;
                if let Some(refused) = self.plan.refused.iter_mut().find(|r| r.process.id.is_same(id)) {
                    push_new(&mut refused.groups, group);
                    continue;
                }
                let goes_along = |stop: &&mut Stop| stop.processes.iter().any(|process| process.id.is_same(id));
                if let Some(stop) = self.plan.stops.iter_mut().find(goes_along) {
                    push_new(&mut stop.groups, group);
                    continue;
                }
                let firmly = self.spare > 0;
                if let Some(life) = self.lives.iter_mut().find(|l| l.victim.process.id.is_same(id)) {
                    push_new(&mut life.victim.groups, group);
                    life.reopen_for(inode, firmly, began);
                    continue;
                }
                let refused = match world.guards.judge(&holder.process, &listener.socket, &stat_of) {
                    Verdict::Signal => None,
                    Verdict::Stop(what) => {
                        // All that is stopped is stopped once, before everything else.
                        if let Some(stop) = self.plan.stops.iter_mut().find(|stop| stop.what.is_same(&what)) {
                            stop.add(&holder.process, group);
                            continue;
                        }
                        Some((format!("it came meanwhile, with {what}; try again"), false))
                    }
                    Verdict::Refuse { reason, denied } => Some((reason, denied)),
                };
                if let Some((reason, denied)) = refused {
                    let process = Arc::clone(&holder.process);
                    self.plan.refused.push(Refused { process, groups: vec![group], reason, denied });
                    continue;
                }
                let mut victim = Victim::new(&holder.process, &stat_of);
                victim.inodes.push(inode);
                victim.groups.push(group);
                victim.leaders = self.plan.leaders(&victim, self.lives.iter().map(|l| &l.victim), &stat_of);
                self.spare = self.spare.saturating_sub(1);
                self.lives.push(Life::opened(victim, firmly, began));
            }
        }
    }

    /// Takes in relatives that came since the plan was made. Only living members of a family show who else is one.
    pub(super) fn adopt_kin(&mut self, world: &World<'_>) -> anyhow::Result<()> {
        let known = || self.lives.iter().filter(|l| l.is_held()).map(|l| &l.victim);
        if known().all(|victim| victim.kin.is_none()) {
            return Ok(());
        }
        let seen = process::boot_ns_now();
        let all = stat::all().context("cannot read the processes in /proc")?;
        for relative in plan::relatives(known(), &all, seen, &stat_of) {
            let id = relative.stat.id();
            let is_known = self.lives.iter().any(|l| l.victim.process.id.is_same(id))
                || self.plan.refused.iter().any(|r| r.process.id.is_same(id));
            let is_stopped = self.plan.stops.iter().any(|stop| stop.processes.iter().any(|p| p.id.is_same(id)));
            if is_known || is_stopped {
                continue;
            }
            let Some(process) = process::read_exact(id) else { continue };
            if world.guards.refuse_relative(&process, &stat_of).is_some() {
                continue;
            }
            let mut victim = relative.victim(&Arc::new(process), &stat_of);
            victim.leaders = self.plan.leaders(&victim, self.lives.iter().map(|l| &l.victim), &stat_of);
            let firmly = self.claim();
            self.lives.push(Life::opened(victim, firmly, self.began));
        }
        Ok(())
    }
}
