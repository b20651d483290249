//! Carries out a plan: signals, waits, looks at the ports again, and says what became of them.
//!
//! One pass of the [`Run`] owns all state; nothing else writes to it. A process is signalled only through
//! [`super::target`], so only when it was just proved to hold what it is to let go of.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::Signal;

use super::guards::{Guards, Verdict as Judgement};
use super::outcome::Outcome;
use super::plan::{self, Plan, Refused, Stop, Victim, push_new};
use super::report;
use super::signal::SignalName;
use super::stop::Stopper;
use super::target::{OpenError, OpenTarget, SignalError, Target, Verdict, prove_by_proc};
use crate::engine::EngineError;
use crate::model::{Listener, Process, ProcessId};
use crate::source::process;
use crate::source::stat::{self, Stat};

/// How long SIGKILL is waited for. Only a process inside the kernel that cannot be interrupted takes longer.
pub(super) const FORCE_WAIT: Duration = Duration::from_secs(2);

/// How often the port is looked at while waiting for processes: no event tells a one-shot kill that a process closed
/// its socket and lives on (the agent's table knows). The end of a process is an event, and cuts this short.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The same while looking out for a new owner, whose arrival is no event either.
const SETTLE_EVERY: Duration = Duration::from_millis(50);

/// How long to wait for processes that are seen to be exiting, so as to report them as ended.
const EXIT_WAIT: Duration = Duration::from_secs(1);

/// How to kill.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The first signal; SIGKILL leaves the grace out.
    pub signal: Signal,
    /// How long processes have to end after it.
    pub grace: Duration,
    /// Whether SIGKILL follows.
    pub force: bool,
    /// How long to look out for a new owner where something could bring one.
    pub settle: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options { signal: Signal::TERM, grace: Duration::from_secs(5), force: true, settle: Duration::from_millis(250) }
    }
}

/// What the run asks of the outside.
pub struct World<'a> {
    /// Every listener now that the selector's socket filters match, whoever holds it.
    pub rescan: &'a mut dyn FnMut() -> anyhow::Result<Vec<Listener>>,
    /// Whether process `pid` has a descriptor of the socket with this inode now, from `/proc`.
    pub holds: &'a dyn Fn(u32, u64) -> io::Result<bool>,
    pub guards: &'a Guards,
    /// Stops containers.
    pub stop: &'a mut Stopper<'a>,
    /// Told now and then who is waited for, and how long at most.
    pub waiting: &'a mut dyn FnMut(&[Arc<Process>], Duration),
}

impl std::fmt::Debug for World<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("guards", self.guards).finish_non_exhaustive()
    }
}

/// The outcomes of a dry run.
pub fn planned(plan: Plan) -> Vec<Outcome> {
    report::planned(&Run::new(plan, Options::default()))
}

/// Frees the ports of the plan. Signals may have been sent when it fails: it fails only if the host cannot be scanned.
pub fn execute(plan: Plan, options: Options, world: &mut World<'_>) -> anyhow::Result<Vec<Outcome>> {
    let mut run = Run::new(plan, options);
    if !run.lives.is_empty() || !run.plan.stops.is_empty() {
        run.open_all();
        run.stop_containers(world)?;
        run.soft(world)?;
        if options.force && !run.is_done() {
            run.forced(world)?;
        }
        run.reap_exiting();
        run.settle(world)?;
    }
    Ok(report::outcomes(&run))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Unsignalled,
    Soft,
    Forced,
}

/// A victim on its way.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) victim: Victim,
    /// Open as long as its process is of interest: not ended, and a holder as far as we know.
    target: Option<OpenTarget>,
    pub(super) stage: Stage,
    /// Whether it ended after the first signal was sent.
    pub(super) ended: bool,
    /// Why it could not be signalled.
    pub(super) failure: Option<Failed>,
}

#[derive(Clone, Debug)]
pub(super) struct Failed {
    pub(super) reason: String,
    /// For want of permission.
    pub(super) denied: bool,
}

#[derive(Debug)]
pub(super) struct Run {
    pub(super) plan: Plan,
    pub(super) options: Options,
    pub(super) lives: Vec<Life>,
    /// The listeners on the plan's ports when last looked at.
    pub(super) current: Vec<Listener>,
    pub(super) started: Instant,
    /// When each group was free, since `started`.
    pub(super) freed: Vec<Option<Duration>>,
    /// What became of each of [`Plan::stops`]; empty before that is tried.
    pub(super) stopped: Vec<Result<(), EngineError>>,
}

fn stat_of(pid: u32) -> Option<Stat> {
    stat::read(pid).ok()
}

impl Run {
    fn new(plan: Plan, options: Options) -> Run {
        let lives = plan.victims.iter().cloned().map(Life::new).collect();
        let current = plan.listeners.clone();
        let freed = vec![None; plan.groups.len()];
        Run { plan, options, lives, current, started: Instant::now(), freed, stopped: Vec::new() }
    }

    /// All pidfds first: the earlier they are open, the earlier nothing can be confused.
    fn open_all(&mut self) {
        for life in &mut self.lives {
            life.open();
        }
    }

    fn soft(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        let stage = if self.options.signal == Signal::KILL { Stage::Forced } else { Stage::Soft };
        let deadline = Instant::now() + if stage == Stage::Forced { FORCE_WAIT } else { self.options.grace };
        self.adopt_kin(world)?;
        let due = self.due(stage);
        self.signal(&due, self.options.signal, stage, world)?;
        self.wait(deadline, self.options.signal, stage, world)
    }

    fn forced(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        let due = self.due(Stage::Forced);
        self.signal(&due, Signal::KILL, Stage::Forced, world)?;
        self.wait(Instant::now() + FORCE_WAIT, Signal::KILL, Stage::Forced, world)
    }

    /// Until the ports are free, nobody is left to wait for, or the deadline. Holders whose leaders are gone, such as
    /// workers that their master left behind, are signalled as soon as that is seen.
    fn wait(&mut self, deadline: Instant, signal: Signal, stage: Stage, world: &mut World<'_>) -> anyhow::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.lives.iter().any(|l| l.is_awaited(stage)) {
                self.poll(left.min(LOOK_EVERY));
            }
            self.look(world)?;
            if self.is_done() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let due = self.due(stage);
            if !due.is_empty() {
                self.signal(&due, signal, stage, world)?;
                continue;
            }
            let awaited: Vec<Arc<Process>> = self
                .lives
                .iter()
                .filter(|l| l.is_awaited(stage) && (self.is_meant(l) || self.leads(l)))
                .map(|l| Arc::clone(&l.victim.process))
                .collect();
            if awaited.is_empty() {
                return Ok(());
            }
            (world.waiting)(&awaited, left);
        }
    }

    /// Those who are meant, were not brought to this stage yet and can be, masters before workers. One whose leader is
    /// on its way out, or about to be, waits for that; but nobody can bring anything back after SIGKILL.
    fn due(&self, stage: Stage) -> Vec<usize> {
        let is_leading = |l: &Life| l.target.is_some() && l.failure.is_none() && (l.stage == stage || self.is_meant(l));
        let waits = |life: &Life| self.leaders_of(life).any(is_leading);
        let is_due = |life: &Life| {
            life.stage < stage
                && life.target.is_some()
                && life.failure.is_none()
                && self.is_meant(life)
                && (stage == Stage::Forced || !waits(life))
        };
        let mut due: Vec<usize> = (0..self.lives.len()).filter(|&i| is_due(&self.lives[i])).collect();
        due.sort_by_key(|&i| self.lives[i].victim.leaders.len());
        due
    }

    fn leaders_of<'a>(&'a self, life: &'a Life) -> impl Iterator<Item = &'a Life> {
        self.lives.iter().filter(|l| life.victim.leaders.contains(&l.victim.process.id))
    }

    /// Whether somebody who is still meant waits for this one to end: a master may close its socket long before
    /// its workers are done.
    fn leads(&self, leader: &Life) -> bool {
        let id = leader.victim.process.id;
        self.lives
            .iter()
            .any(|l| l.victim.leaders.contains(&id) && l.target.is_some() && l.failure.is_none() && self.is_meant(l))
    }

    fn signal(&mut self, indices: &[usize], signal: Signal, stage: Stage, world: &mut World<'_>) -> anyhow::Result<()> {
        for &index in indices {
            let life = &mut self.lives[index];
            let Some(target) = &life.target else { continue };
            let mut broken = None;
            let verdict = target.verify(&mut |id, inodes| match prove_by_proc(id, inodes, world.holds) {
                // /proc will not say; a scan that reads the kernel's own tables may.
                Err(error) if is_silent(&error) && target.is_alive() => {
                    let listeners = (world.rescan)().map_err(|e| {
                        broken = Some(e);
                        io::Error::from(error.kind())
                    })?;
                    let seen = listeners.iter().any(|l| inodes.contains(&l.socket.id.inode) && l.holds(id));
                    if seen { Ok(true) } else { Err(io::ErrorKind::PermissionDenied.into()) }
                }
                answer => answer,
            });
            let sent = match verdict {
                Verdict::Verified(holder) => holder.signal(signal),
                Verdict::Gone => Err(SignalError::Gone),
                Verdict::NotHolder => {
                    // Not ours to signal, nor to wait for.
                    life.target = None;
                    continue;
                }
                Verdict::Unknown(error) if is_silent(&error) => Err(SignalError::Denied),
                Verdict::Unknown(error) => Err(SignalError::Failed(error)),
            };
            if let Some(error) = broken {
                return Err(error).context("cannot verify the holders of a port by a fresh scan");
            }
            life.sent(sent, signal, stage);
        }
        Ok(())
    }

    /// Waits for a process to end, at most `timeout`, and notes all that did.
    fn poll(&mut self, timeout: Duration) {
        let mut fds: Vec<PollFd<'_>> =
            self.lives.iter().filter_map(|l| l.target.as_ref()).map(|t| PollFd::new(t, PollFlags::IN)).collect();
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        match poll(&mut fds, Some(&timeout)) {
            // A signal to portwatch itself: the caller's loop comes back.
            Ok(0) | Err(Errno::INTR) => return,
            // Out of memory for the table: go by the scans alone, which are about to follow.
            Err(_) => return,
            Ok(_) => {}
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let open = self.lives.iter_mut().filter(|l| l.target.is_some());
        for (life, _) in open.zip(ready).filter(|(_, ready)| *ready) {
            life.ended = true;
            life.target = None;
        }
    }

    /// Looks at the ports again: who is there, and whether processes joined that hold what is to be freed.
    pub(super) fn look(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        let listeners = (world.rescan)().context("cannot look at the ports again")?;
        self.current = listeners.into_iter().filter(|l| self.plan.groups.iter().any(|g| g.covers(&l.socket))).collect();
        for (index, group) in self.plan.groups.iter().enumerate() {
            if self.freed[index].is_none() && !self.current.iter().any(|l| group.wants(l.socket.id)) {
                self.freed[index] = Some(self.started.elapsed());
            }
        }
        // Relatives first: who is one and holds the port as well is meant even once it lets go of that.
        self.adopt_kin(world)?;
        self.adopt(world);
        Ok(())
    }

    /// Takes in holders that the plan did not know, such as a worker forked since: as any other, they pass the guards.
    fn adopt(&mut self, world: &World<'_>) {
        for listener in &self.current {
            let Some(group) = self.plan.groups.iter().position(|g| g.wants(listener.socket.id)) else { continue };
            let inode = listener.socket.id.inode;
            for holder in &listener.holders {
                let id = holder.process.id;
                if let Some(refused) = self.plan.refused.iter_mut().find(|r| r.process.id.is_same(id)) {
                    push_new(&mut refused.groups, group);
                    continue;
                }
                let of_container = |stop: &&mut Stop| stop.processes.iter().any(|process| process.id.is_same(id));
                if let Some(stop) = self.plan.stops.iter_mut().find(of_container) {
                    push_new(&mut stop.groups, group);
                    continue;
                }
                if let Some(life) = self.lives.iter_mut().find(|l| l.victim.process.id.is_same(id)) {
                    push_new(&mut life.victim.groups, group);
                    life.reopen_for(inode);
                    continue;
                }
                let refused = match world.guards.judge(&holder.process, &listener.socket, &stat_of) {
                    Judgement::Signal => None,
                    Judgement::Stop(container) => {
                        // Its containers are stopped once, before everything else.
                        if let Some(stop) = self.plan.stops.iter_mut().find(|stop| stop.container.id == container.id) {
                            stop.add(&holder.process, group);
                            continue;
                        }
                        Some((format!("holds the port for container {container}, which came meanwhile"), false))
                    }
                    Judgement::Refuse { reason, denied } => Some((reason, denied)),
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
                let mut life = Life::new(victim);
                life.open();
                self.lives.push(life);
            }
        }
    }

    /// Takes in relatives that came since the plan was made. Only living members of a family show who else is one.
    fn adopt_kin(&mut self, world: &World<'_>) -> anyhow::Result<()> {
        let known = || self.lives.iter().filter(|l| l.target.is_some()).map(|l| &l.victim);
        if known().all(|victim| victim.kin.is_none()) {
            return Ok(());
        }
        let seen = process::boot_ns_now();
        let all = stat::all().context("cannot read the processes in /proc")?;
        for relative in plan::relatives(known(), &all, seen, &stat_of) {
            let id = relative.stat.id();
            let is_known = self.lives.iter().any(|l| l.victim.process.id.is_same(id))
                || self.plan.refused.iter().any(|r| r.process.id.is_same(id));
            if is_known || world.guards.refuse(id.pid, &stat_of).is_some() {
                continue;
            }
            let Some(process) = process::read_exact(id) else { continue };
            let mut victim = relative.victim(&Arc::new(process), &stat_of);
            victim.leaders = self.plan.leaders(&victim, self.lives.iter().map(|l| &l.victim), &stat_of);
            let mut life = Life::new(victim);
            life.open();
            self.lives.push(life);
        }
        Ok(())
    }

    fn is_free(&self) -> bool {
        self.plan.groups.iter().zip(&self.freed).all(|(g, freed)| g.sockets.is_empty() || freed.is_some())
    }

    /// Whether all is as it should be: the ports free, and the relatives that are meant as well gone.
    fn is_done(&self) -> bool {
        self.is_free() && !self.lives.iter().any(|l| l.is_kin_left() && l.failure.is_none())
    }

    /// Whether the process holds what is to be freed, or is meant whatever it holds.
    fn is_meant(&self, life: &Life) -> bool {
        life.victim.kin.is_some()
            || self.current.iter().any(|l| {
                l.holds(life.victim.process.id) && self.plan.groups.iter().any(|group| group.wants(l.socket.id))
            })
    }

    /// A port is free before its last holder is a zombie. Those that are seen to be exiting are waited for, so that
    /// they are reported as ended; those that live on without the port are not.
    fn reap_exiting(&mut self) {
        let until = Instant::now() + EXIT_WAIT;
        loop {
            self.poll(Duration::ZERO);
            let exiting = self.lives.iter().any(|l| {
                l.target.is_some() && l.stage != Stage::Unsignalled && {
                    let id = l.victim.process.id;
                    stat_of(id.pid).is_some_and(|s| s.id().is_same(id) && s.exiting)
                }
            });
            let left = until.saturating_duration_since(Instant::now());
            if !exiting || left.is_zero() {
                return;
            }
            self.poll(left);
        }
    }

    /// Looks out for a new owner where something could bring one.
    fn settle(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        let until = Instant::now() + self.options.settle;
        loop {
            let open = self.plan.groups.iter().enumerate().any(|(index, _)| {
                self.freed[index].is_some() && self.new_owners(index).next().is_none() && self.may_respawn(index)
            });
            let left = until.saturating_duration_since(Instant::now());
            if !open || left.is_zero() {
                return Ok(());
            }
            self.poll(left.min(SETTLE_EVERY));
            self.look(world)?;
        }
    }

    pub(super) fn new_owners(&self, group: usize) -> impl Iterator<Item = &Listener> {
        self.current.iter().filter(move |l| self.plan.groups[group].is_new(&l.socket))
    }

    fn may_respawn(&self, group: usize) -> bool {
        let is_alive = |id: ProcessId| stat_of(id.pid).is_some_and(|s| s.id().is_same(id) && !s.exiting);
        let in_group = self.lives.iter().filter(|l| l.victim.groups.contains(&group));
        in_group
            .filter_map(|l| l.victim.supervisor.as_ref())
            .any(|supervisor| supervisor.may_restart() && supervisor.parent.is_none_or(is_alive))
    }
}

impl Life {
    fn new(victim: Victim) -> Life {
        Life { victim, target: None, stage: Stage::Unsignalled, ended: false, failure: None }
    }

    fn open(&mut self) {
        let target = Target { id: self.victim.process.id, inodes: self.victim.inodes.clone(), kin: self.victim.kin };
        match target.open() {
            Ok(open) => self.target = Some(open),
            // It ended before anything was done.
            Err(OpenError::Gone) => {}
            Err(OpenError::Failed(error)) => {
                let pid = self.victim.process.id.pid;
                self.failure = Some(Failed { reason: format!("cannot open a pidfd of {pid}: {error}"), denied: false });
            }
        }
    }

    /// Seen with a socket that it was not known to hold. The pidfd is the same process's in any case: each signal
    /// verifies anew.
    fn reopen_for(&mut self, inode: u64) {
        if self.victim.inodes.contains(&inode) {
            return;
        }
        self.victim.inodes.push(inode);
        if !self.ended && self.failure.is_none() {
            self.open();
        }
    }

    /// Whether it was meant for its kinship and is still there.
    pub(super) fn is_kin_left(&self) -> bool {
        self.victim.kin.is_some() && !self.ended && (self.target.is_some() || self.failure.is_some())
    }

    fn is_awaited(&self, stage: Stage) -> bool {
        self.stage == stage && self.target.is_some() && self.failure.is_none()
    }

    fn sent(&mut self, sent: Result<(), SignalError>, signal: Signal, stage: Stage) {
        let pid = self.victim.process.id.pid;
        let failed = match sent {
            Ok(()) => {
                self.stage = stage;
                return;
            }
            Err(SignalError::Gone) => {
                // Ended before the first signal: not by us.
                self.ended = self.stage != Stage::Unsignalled;
                self.target = None;
                return;
            }
            Err(SignalError::Denied) => {
                let owner = self.victim.process.uid.map_or_else(|| "another user".to_owned(), report::user);
                Failed { reason: format!("not permitted: it runs as {owner}; try sudo"), denied: true }
            }
            Err(SignalError::Failed(error)) => {
                let reason = format!("cannot send {} to {pid}: {error}", SignalName(signal));
                Failed { reason, denied: false }
            }
        };
        self.failure = Some(failed);
    }
}

/// Whether `/proc` refused to answer, which says nothing of the process.
fn is_silent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests;
