//! Carries out a plan: signals, waits, looks at the ports again, and proves that they are free.
//!
//! One pass of the [`Run`] owns all state; nothing else writes to it. A process is signalled only through
//! [`super::target`], so only when it was just proved to hold what it is to let go of.
//!
//! Between two full scans, which say who holds what, [`Sight`] says which sockets are there. A scan is made only where
//! it can tell something new: when a taken port has nobody left to wait for, or a socket came that nobody knows.

mod adopt;
mod after;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::Signal;

use super::close::Unclosed;
use super::guards::Guards;
use super::life::{Grip, Life, Stage, is_silent, spare_descriptors};
use super::outcome::Outcome;
use super::plan::{Plan, key, same_socket};
use super::progress::{Progress, Step};
use super::prove::Blocked;
use super::report;
use super::sight::{LOOK_EVERY, Sight};
use super::signal::SignalName;
use super::stop::{Stopper, Stopping};
use super::target::{SignalError, Verdict, prove_by_proc};
use super::why;
use crate::model::{Listener, NetnsId, Protocol, Socket, SocketId};

/// How long SIGKILL is waited for in any case. It acts at once, except on a process that is asleep in the kernel.
pub(super) const FORCE_WAIT: Duration = Duration::from_secs(2);

/// How long it is waited for where the process is on its way out: gigabytes of memory go before the sockets do.
const TEARDOWN_WAIT: Duration = Duration::from_secs(60);

/// How often holders are looked for where sockets cannot be watched, and relatives where these are meant.
pub(super) const SCAN_EVERY: Duration = Duration::from_millis(100);

/// How long a socket may outlive its last holder (what the kernel does for it is still under way), and a bind() fail
/// on what others of the victims' sockets leave behind.
const AFTERMATH: Duration = Duration::from_millis(250);

/// How long a server waits for what started it to end. A shell acts on a signal for which it has a trap once the command
/// that it waits for is over, and that may be the server.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long those are waited for that let go of the port and did not end yet, so as to report most of them as ended.
const LINGER: Duration = Duration::from_millis(5);

/// How to kill.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The first signal; SIGKILL leaves the grace out.
    pub signal: Signal,
    /// How long processes have to end after it. Zero: SIGKILL follows at once.
    pub grace: Duration,
    /// Whether SIGKILL follows.
    pub force: bool,
    /// How long to look out for a new owner where something could bring one.
    pub settle: Duration,
    /// How many pidfds may be kept open, if there is room for them.
    pub pidfds: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            signal: Signal::TERM,
            grace: Duration::from_secs(5),
            force: true,
            settle: Duration::from_millis(250),
            pidfds: usize::MAX,
        }
    }
}

/// What the run asks of the outside.
pub struct World<'a> {
    /// Every listener now on the ports of the plan, at whatever address and whoever holds it.
    pub rescan: &'a mut dyn FnMut() -> anyhow::Result<Vec<Listener>>,
    /// Whether process `pid` has a descriptor of the socket with this inode now, from `/proc`.
    pub holds: &'a dyn Fn(u32, u64) -> io::Result<bool>,
    pub guards: &'a Guards,
    /// Stops containers and units.
    pub stop: &'a mut Stopper<'a>,
    /// The addresses of this network namespace at which a port that nobody has is to be free.
    pub addresses: &'a dyn Fn(u16) -> Vec<IpAddr>,
    /// Told what happens to each process.
    pub progress: &'a mut dyn FnMut(&Progress<'_>),
    /// Set once nobody is to be signalled any more: it ends as it stands then.
    pub called_off: &'a AtomicBool,
}

impl World<'_> {
    fn is_called_off(&self) -> bool {
        self.called_off.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for World<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("guards", self.guards).finish_non_exhaustive()
    }
}

/// The outcomes of a dry run. Of a port that nobody has it is looked whether it could be bound, at `addresses` as in
/// [`World::addresses`].
pub fn planned(plan: Plan, addresses: &dyn Fn(u16) -> Vec<IpAddr>) -> Vec<Outcome> {
    let mut run = Run::new(plan, Options::default());
    run.foresee(addresses);
    report::planned(&run)
}

/// Frees the ports of the plan. Signals may have been sent, or sockets closed, when it fails: it fails
/// only if the host cannot be scanned.
pub fn execute(plan: Plan, options: Options, world: &mut World<'_>) -> anyhow::Result<Vec<Outcome>> {
    let mut run = Run::new(plan, options);
    run.sight = Sight::open(&run.plan);
    if run.plan.closes {
        run.close_sockets(world)?;
    } else if !run.lives.is_empty() || !run.plan.stops.is_empty() {
        run.open_all(world);
        run.stop_wholes(world)?;
        run.soft(world)?;
        if options.force && !run.is_done() && !world.is_called_off() {
            run.forced(world)?;
        }
        run.linger(world);
        if !world.is_called_off() {
            run.settle(world)?;
        }
    }
    run.is_called_off = world.is_called_off();
    run.prove(world)?;
    Ok(report::outcomes(&run))
}

#[derive(Debug)]
pub(super) struct Run {
    pub(super) plan: Plan,
    pub(super) options: Options,
    pub(super) lives: Vec<Life>,
    /// The listeners on the plan's ports when last looked at, with their holders when last scanned.
    pub(super) current: Vec<Listener>,
    pub(super) started: Instant,
    /// When each group was free, since `started`.
    pub(super) freed: Vec<Option<Duration>>,
    /// Why bind() fails on each group although nobody listens.
    pub(super) blocked: Vec<Option<Blocked>>,
    /// What became of each of [`Plan::stops`]; empty before that is tried.
    pub(super) stopped: Vec<Stopping>,
    /// The sockets that were closed in the kernel, and those that were not.
    pub(super) closed: Vec<SocketId>,
    pub(super) unclosed: Vec<Unclosed>,
    sight: Sight,
    /// Indices into the plan's groups.
    group_of: HashMap<(u16, Protocol, NetnsId), usize>,
    /// How many pidfds may still be kept.
    spare: usize,
    /// Whether anybody was signalled.
    pub(super) began: bool,
    /// Whether it was ended before its time.
    pub(super) is_called_off: bool,
    /// Whether something happened since the last scan that may have changed who holds what.
    stale: bool,
    /// Whether a socket was seen that the last scan did not know.
    stranger: bool,
    /// Inodes of all such sockets: each is worth one scan, which may leave it out.
    strangers: HashSet<u64>,
    pub(super) scanned: Instant,
    /// When the last victim ended.
    last_end: Instant,
    /// Seconds left as last told.
    told: Option<u128>,
}

impl Run {
    fn new(plan: Plan, options: Options) -> Run {
        let victims = plan.victims.iter().filter(|_| !plan.closes);
        let lives = victims.cloned().map(Life::new).collect();
        let group_of = plan.groups.iter().enumerate().map(|(i, g)| ((g.port, g.proto, g.netns), i)).collect();
        let now = Instant::now();
        Run {
            lives,
            current: plan.listeners.clone(),
            started: now,
            freed: vec![None; plan.groups.len()],
            blocked: vec![None; plan.groups.len()],
            stopped: Vec::new(),
            closed: Vec::new(),
            unclosed: Vec::new(),
            sight: Sight::default(),
            group_of,
            spare: 0,
            began: false,
            is_called_off: false,
            stale: false,
            stranger: false,
            strangers: HashSet::new(),
            scanned: now,
            last_end: now,
            told: None,
            plan,
            options,
        }
    }

    /// All pidfds first: the earlier they are open, the earlier nothing can be confused.
    fn open_all(&mut self, world: &mut World<'_>) {
        self.spare = spare_descriptors(self.lives.len()).min(self.options.pidfds);
        for index in 0..self.lives.len() {
            let firmly = self.claim();
            self.lives[index].open(firmly, false);
            self.tell_if_over(index, world);
        }
    }

    /// Whether one more pidfd may be kept.
    fn claim(&mut self) -> bool {
        let may = self.spare > 0;
        self.spare = self.spare.saturating_sub(1);
        may
    }

    fn soft(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        let forced = self.options.signal == Signal::KILL;
        let (stage, wait) = if forced { (Stage::Forced, FORCE_WAIT) } else { (Stage::Soft, self.options.grace) };
        self.round(self.options.signal, stage, world)?;
        self.wait(Instant::now() + wait, self.options.signal, stage, world)
    }

    fn forced(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        // Workers may have come and gone during the grace.
        self.look(world)?;
        let due = self.due(Stage::Forced);
        for &index in &due {
            let life = &mut self.lives[index];
            // Without a grace it had no chance to end, and there is nothing to explain.
            if life.stage != Stage::Soft || self.options.grace.is_zero() {
                continue;
            }
            life.outlived = why::why(life.pid(), self.options.signal);
            let step = Step::Outlived { grace: self.options.grace, why: life.outlived.clone() };
            tell(life, step, world);
        }
        self.signal(&due, Signal::KILL, Stage::Forced, world)?;
        self.wait(Instant::now() + FORCE_WAIT, Signal::KILL, Stage::Forced, world)
    }

    /// Until the ports are free, nobody is left to wait for, or the deadline. Holders whose leaders are gone, such as
    /// workers that their master left behind, are signalled as soon as that is seen.
    fn wait(&mut self, deadline: Instant, signal: Signal, stage: Stage, world: &mut World<'_>) -> anyhow::Result<()> {
        self.told = None;
        let mut limit = deadline;
        loop {
            self.pause(limit.saturating_duration_since(Instant::now()), world);
            if world.is_called_off() {
                return Ok(());
            }
            if !self.is_done() && self.wants_scan(stage) {
                self.look(world)?;
            }
            if self.is_done() {
                return Ok(());
            }
            let now = Instant::now();
            if now >= limit {
                let dying = |l: &Life| l.is_awaited(Stage::Forced) && l.is_dying();
                let extends = stage == Stage::Forced && now < deadline + TEARDOWN_WAIT && self.lives.iter().any(dying);
                if !extends {
                    return Ok(());
                }
                limit = now + LOOK_EVERY;
            }
            let is_awaited = |l: &Life| l.is_awaited(stage) && (self.is_meant(l) || self.leads(l));
            if !self.due(stage).is_empty() {
                self.round(signal, stage, world)?;
            } else if self.lives.iter().any(is_awaited) {
                self.tell_waiting(deadline.saturating_duration_since(now), stage, world);
            } else if self.last_end.elapsed() > AFTERMATH || !self.began || !self.has_aftermath() {
                return Ok(());
            }
        }
    }

    /// Whether what was done may yet change something, though nobody is waited for: a taken port of those who were
    /// signalled, or are stopped, may come free, and relatives may show. What nobody could be told to let go of stays.
    fn has_aftermath(&self) -> bool {
        let is_touched = |group: usize| {
            let is_victim = |life: &Life| life.victim.groups.contains(&group) && life.failure.is_none();
            self.lives.iter().any(is_victim) || self.plan.stops.iter().any(|stop| stop.groups.contains(&group))
        };
        self.lives.iter().any(Life::is_kin_left)
            || (0..self.plan.groups.len()).any(|group| self.is_taken(group) && is_touched(group))
    }

    /// Signals all who are due. Relatives are looked for first: those who are about to end show who else is one only as
    /// long as they live.
    fn round(&mut self, signal: Signal, stage: Stage, world: &mut World<'_>) -> anyhow::Result<()> {
        self.adopt_kin(world)?;
        let due = self.due(stage);
        self.signal(&due, signal, stage, world)
    }

    /// Whether a full scan could tell more than what is known.
    fn wants_scan(&mut self, stage: Stage) -> bool {
        let unawaited = || (0..self.plan.groups.len()).any(|g| self.is_taken(g) && !self.is_awaited(g, stage));
        // Relatives that were forked meanwhile show only as long as their own relatives live.
        let has_kin = self.lives.iter().any(Life::is_kin_left);
        self.stranger
            || self.stale && (has_kin || unawaited())
            || (has_kin || self.is_blind() || self.has_ghost()) && self.scanned.elapsed() >= SCAN_EVERY
    }

    /// Whether nobody was seen to hold what is to be freed: passed on by one who ended, it may be about to be received.
    fn has_ghost(&self) -> bool {
        self.current.iter().any(|listener| {
            let group = self.group_of.get(&key(&listener.socket));
            listener.holders.is_empty() && group.is_some_and(|&group| self.plan.groups[group].wants(listener.socket.id))
        })
    }

    /// Whether only full scans can tell of some port.
    pub(super) fn is_blind(&self) -> bool {
        self.plan.groups.iter().any(|g| !g.sockets.is_empty() && !self.sight.sees(g.netns))
    }

    pub(super) fn is_taken(&self, group: usize) -> bool {
        !self.plan.groups[group].sockets.is_empty() && self.freed[group].is_none()
    }

    /// Whether somebody who got the signal may still free this port.
    fn is_awaited(&self, group: usize, stage: Stage) -> bool {
        self.lives.iter().any(|l| l.is_awaited(stage) && l.victim.groups.contains(&group))
    }

    /// Those who are meant, were not brought to this stage yet and can be, masters before workers. One whose leader is
    /// on its way out, or about to be, waits for that; but nobody can bring anything back after SIGKILL.
    fn due(&self, stage: Stage) -> Vec<usize> {
        let is_able = |l: &Life| l.is_held() && l.failure.is_none();
        let is_leading =
            |l: &Life| is_able(l) && (l.stage == stage || self.is_meant(l)) && !l.is_slow_starter(PATIENCE);
        let waits = |life: &Life| self.leaders_of(life).any(is_leading);
        let is_due = |life: &Life| {
            life.stage < stage && is_able(life) && self.is_meant(life) && (stage == Stage::Forced || !waits(life))
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
        let waits = |l: &Life| l.victim.leaders.contains(&id) && l.is_held() && l.failure.is_none();
        self.lives.iter().any(|l| waits(l) && self.is_meant(l))
    }

    fn signal(&mut self, indices: &[usize], signal: Signal, stage: Stage, world: &mut World<'_>) -> anyhow::Result<()> {
        for &index in indices {
            if world.is_called_off() {
                return Ok(());
            }
            let began = self.began;
            let life = &mut self.lives[index];
            if !life.is_held() {
                continue;
            }
            let is_firm = matches!(life.grip, Grip::Firm(_));
            let Some(target) = life.take_grip(began) else {
                self.note_end(index);
                self.tell_if_over(index, world);
                continue;
            };
            let mut broken = None;
            let mut proof = |id, inodes: &[u64]| match prove_by_proc(id, inodes, world.holds) {
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
            };
            let verdict = target.verify(&mut proof, &|pid| world.guards.forbid(pid));
            let mut resumed = false;
            let sent = match verdict {
                Verdict::Verified(holder) => {
                    let stopped = signal != Signal::KILL && why::is_stopped(life.pid());
                    let sent = holder.signal(signal);
                    // What is sent to a stopped process stays pending: let it go on, so that it can end in peace.
                    resumed = stopped && sent.is_ok() && holder.signal(Signal::CONT).is_ok();
                    sent
                }
                Verdict::Gone => Err(SignalError::Gone),
                // Not ours to signal, nor to wait for: it is let go of.
                Verdict::NotHolder => {
                    self.stale = true;
                    continue;
                }
                Verdict::Forbidden(reason) => Err(SignalError::Forbidden(reason)),
                Verdict::Unknown(error) if is_silent(&error) => Err(SignalError::Denied),
                Verdict::Unknown(error) => Err(SignalError::Failed(error)),
            };
            if let Some(error) = broken {
                return Err(error).context("cannot verify the holders of a port by a fresh scan");
            }
            let is_sent = sent.is_ok();
            life.grip = if is_firm { Grip::Firm(target) } else { Grip::Loose };
            life.sent(sent, signal, stage, began);
            self.began |= is_sent;
            self.note_end(index);
            if is_sent {
                tell(&self.lives[index], Step::Sent { signal: SignalName(signal), resumed }, world);
            } else if let Some(failed) = &self.lives[index].failure {
                tell(&self.lives[index], Step::Failed { reason: failed.reason.clone() }, world);
            } else {
                self.tell_if_over(index, world);
            }
        }
        Ok(())
    }

    /// Waits for something to happen, at most `timeout` and [`LOOK_EVERY`]; notes who ended, and which sockets are left.
    pub(super) fn pause(&mut self, timeout: Duration, world: &mut World<'_>) {
        let held = |life: &Life| matches!(life.grip, Grip::Firm(_));
        let firm: Vec<usize> = (0..self.lives.len()).filter(|&i| held(&self.lives[i])).collect();
        let fds: Vec<_> = firm
            .iter()
            .filter_map(|&i| match &self.lives[i].grip {
                Grip::Firm(target) => Some(target.as_fd()),
                _ => None,
            })
            .collect();
        let ready = self.sight.wait(&fds, timeout);
        for (index, _) in firm.into_iter().zip(ready).filter(|(_, ready)| *ready) {
            self.over(index, world);
        }
        for index in 0..self.lives.len() {
            if matches!(self.lives[index].grip, Grip::Loose) && self.lives[index].is_exiting() {
                self.over(index, world);
            }
        }
        self.glance();
        self.note_let_go(LINGER, world);
    }

    fn over(&mut self, index: usize, world: &mut World<'_>) {
        self.lives[index].over(self.began);
        self.note_end(index);
        self.tell_if_over(index, world);
    }

    /// Who has ended may have left the port to somebody who is not known yet.
    fn note_end(&mut self, index: usize) {
        let life = &self.lives[index];
        if life.ended || life.gone {
            (self.stale, self.last_end) = (true, Instant::now());
        }
    }

    /// Looks at the sockets alone: which of those known are left, and whether others came.
    fn glance(&mut self) {
        let sockets = self.sight.look();
        let inodes: HashSet<u64> = sockets.iter().map(|s| s.id.inode).collect();
        let is_there = |known: &Socket| {
            let id = known.id;
            if id.inode != 0 { inodes.contains(&id.inode) } else { sockets.iter().any(|s| same_socket(s.id, id)) }
        };
        let sight = &self.sight;
        self.current.retain(|l| !sight.sees(l.socket.netns) || is_there(&l.socket));
        let known: HashSet<u64> = self.current.iter().map(|l| l.socket.id.inode).collect();
        for socket in sockets.iter().filter(|s| s.id.inode != 0 && !known.contains(&s.id.inode)) {
            let Some(&group) = self.group_of.get(&key(socket)) else { continue };
            self.stranger |= self.plan.groups[group].is_new(socket) && self.strangers.insert(socket.id.inode);
        }
        self.note_freed();
    }

    /// Looks at the ports again: who is there, and whether processes joined that hold what is to be freed.
    pub(super) fn look(&mut self, world: &mut World<'_>) -> anyhow::Result<()> {
        (self.stale, self.stranger, self.scanned) = (false, false, Instant::now());
        let mut listeners = (world.rescan)().context("cannot look at the ports again")?;
        listeners
            .retain(|l| self.group_of.get(&key(&l.socket)).is_some_and(|&g| self.plan.groups[g].covers(&l.socket)));
        self.current = listeners;
        self.note_freed();
        if self.plan.closes {
            return Ok(());
        }
        // Relatives first: who is one and holds the port as well is meant even once it lets go of that.
        self.adopt_kin(world)?;
        self.adopt(world);
        Ok(())
    }

    fn note_freed(&mut self) {
        let mut taken = vec![false; self.plan.groups.len()];
        for listener in &self.current {
            if let Some(&group) = self.group_of.get(&key(&listener.socket)) {
                taken[group] |= self.plan.groups[group].wants(listener.socket.id);
            }
        }
        for (freed, taken) in self.freed.iter_mut().zip(taken) {
            if freed.is_none() && !taken {
                *freed = Some(self.started.elapsed());
            }
        }
    }

    fn is_free(&self) -> bool {
        (0..self.plan.groups.len()).all(|group| !self.is_taken(group))
    }

    /// Whether all is as it should be: the ports free, and the relatives that are meant as well gone.
    fn is_done(&self) -> bool {
        self.is_free() && !self.lives.iter().any(|l| l.is_kin_left() && l.failure.is_none())
    }

    /// Whether the process holds what is to be freed, or is meant whatever it holds.
    fn is_meant(&self, life: &Life) -> bool {
        life.victim.kin.is_some() || self.holds_now(life)
    }

    fn holds_now(&self, life: &Life) -> bool {
        life.victim.groups.iter().any(|&group| self.holds_of(life, group))
    }

    fn holds_of(&self, life: &Life, group: usize) -> bool {
        let wanted = &self.plan.groups[group];
        life.victim.groups.contains(&group)
            && self.current.iter().any(|l| wanted.wants(l.socket.id) && l.holds(life.victim.process.id))
    }

    /// Tells who has let go of everything for at least so long, and goes on.
    fn note_let_go(&mut self, least: Duration, world: &mut World<'_>) {
        for index in 0..self.lives.len() {
            let life = &self.lives[index];
            let (Some(signalled), None, true) = (life.signalled, life.let_go, life.is_held()) else { continue };
            if self.holds_now(life) || life.victim.inodes.is_empty() {
                continue;
            }
            let life = &mut self.lives[index];
            let since = *life.empty_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= least {
                let after = since - signalled;
                life.let_go = Some(after);
                tell(life, Step::LetGo { after }, world);
            }
        }
    }

    fn tell_waiting(&mut self, left: Duration, stage: Stage, world: &mut World<'_>) {
        let seconds = left.as_millis().div_ceil(1000);
        if self.told.replace(seconds) == Some(seconds) {
            return;
        }
        for life in self.lives.iter().filter(|l| l.is_awaited(stage) && (self.is_meant(l) || self.leads(l))) {
            tell(life, Step::Waiting { left }, world);
        }
    }

    fn tell_if_over(&self, index: usize, world: &mut World<'_>) {
        let life = &self.lives[index];
        if life.gone {
            tell(life, Step::Gone, world);
        } else if life.ended {
            tell(life, Step::Ended { after: life.signalled.unwrap_or(self.started).elapsed() }, world);
        }
    }
}

fn tell(life: &Life, step: Step, world: &mut World<'_>) {
    (world.progress)(&Progress { process: &life.victim.process, step });
}

#[cfg(test)]
mod tests;
