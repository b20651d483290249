//! Ends what appeared since a moment, and goes on until nothing more appears.
//!
//! ```text
//!           ┌──────────────── somebody new ────────────────┐
//!  scan ─► whom ─► plan ─► (agree) ─► kill ─► scan ─► quiet? ─► Cleaned
//!                                               └── look again: after every 20 ms, until the settling time is over,
//!                                                   and for 2 s while processes that started meanwhile still run
//! ```
//! A server that is forked by one that is being ended does not listen yet when that one is gone, so the end of a kill is
//! not the end: whoever started meanwhile is given the time to begin to listen, or to end. Looking costs a scan; probes
//! would tell at once, but take longer to attach than this lasts, and only root may.
//!
//! What started a server goes with it, and before it, where a mark tells that it came with the job ([`super::starters`]).
//! A moment tells nothing of the kind: what an editor started ten minutes ago is no job.
//!
//! A port that is published for a container says when its proxy started, not when the container was made: one that was
//! made before counts as a bystander, also when it was started anew.
//!
//! Where other users' processes are meant and may not be looked at, what they listen at is *hidden*: whether it is new, only
//! the mark can tell, which has what was there, or somebody who sees more. What neither tells of is no leak, nor is the
//! host clean.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use globset::GlobMatcher;
use jiff::Timestamp;
use nix::unistd::Uid;
use serde::Serialize;

use super::execute::Options;
use super::guards::Guards;
use super::job::{Choice, Job, Terms};
use super::outcome::Outcome;
use super::plan::{Plan, Spared, push_new, same_socket};
use super::progress::Progress;
use super::report::not_permitted;
use super::starters::{Own, Rule};
use crate::engine::{self, Engine, Roster};
use crate::model::{Ancestor, BootNs, Listener, Process, Protocol, Socket, SocketId};
use crate::select::{Selector, Since};
use crate::source::{Scanner, process, stat};
use crate::supervisor::Supervisor;

/// How long at most those are looked out for that started during the clean-up and do not listen yet.
const NEWCOMERS: Duration = Duration::from_secs(2);

/// How often, and the idle time between two looks as a multiple of what a look took.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const REST: u32 = 4;

/// Something that starts a server again each time will not end by itself: it is said, and left to people.
const MAX_PASSES: usize = 20;

/// What is to be ended, and how.
#[derive(Debug)]
pub struct Cleanup {
    selector: Selector,
    uids: Vec<u32>,
    terms: Terms,
    options: Options,
    force_self: bool,
    remove_cwd: Option<GlobMatcher>,
    before: Vec<SocketId>,
}

/// What was left behind, and what became of it.
#[derive(Clone, Debug, Default)]
pub struct Cleaned {
    pub leaks: Vec<Leak>,
    /// What started them, as far as it is part of the same job.
    pub restarters: Vec<Restarter>,
    /// Of every pass.
    pub outcomes: Vec<Outcome>,
    /// Those of other users that may have been left behind: nobody told since when they are there.
    pub hidden: Vec<Socket>,
    /// Whether it was given up because more and more appeared.
    pub endless: bool,
    /// What starts the last of these, where that can be told.
    pub supervisor: Option<Supervisor>,
}

/// A process that may start leaks again, and is part of the same job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restarter {
    pub process: Arc<Process>,
    /// Of the leaks below it.
    pub ports: Vec<(u16, Protocol)>,
    pub ended: Ended,
    /// Why it is still there, and what to do about it. Hostile text.
    pub note: Option<String>,
}

/// A listener that was left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leak {
    pub socket: Socket,
    /// Its binder; `None`: nobody visible.
    pub process: Option<Arc<Process>>,
    /// Out of whom the binder came, nearest first, as far as it still showed.
    pub ancestors: Vec<Ancestor>,
    /// How long it was there; at most, where nobody saw it begin. `None` where not even that is known.
    pub lived: Option<Duration>,
    pub ended: Ended,
    /// What was stopped, or why it is still there. Hostile text.
    pub note: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// By the first signal.
    Terminated,
    /// By SIGKILL.
    Killed,
    /// With its container or unit.
    Stopped,
    /// By itself, before anything was sent to it.
    Exited,
    /// It did not.
    Alive,
}

impl Cleanup {
    /// `uids` are the users whose processes are meant, all where it is empty. What is published for containers, or runs in
    /// one, is meant whoever's it is where containers are stopped.
    pub fn new(selector: Selector, uids: Vec<u32>, terms: Terms, options: Options, force_self: bool) -> Cleanup {
        Cleanup { selector, uids, terms, options, force_self, remove_cwd: None, before: Vec::new() }
    }

    /// The same, and afterwards removes the working directories of those who ended, where `glob` matches them.
    #[must_use]
    pub fn removing(self, glob: Option<GlobMatcher>) -> Cleanup {
        Cleanup { remove_cwd: glob, ..self }
    }

    /// The same, knowing that these sockets were there before, whoever holds them.
    #[must_use]
    pub fn knowing(self, before: Vec<SocketId>) -> Cleanup {
        Cleanup { before, ..self }
    }

    /// Whether the processes of anybody else than `uid` are meant.
    pub fn means_others_than(&self, uid: u32) -> bool {
        self.uids != [uid]
    }

    /// What is to be ended now.
    ///
    /// # Errors
    /// When the host's sockets cannot be read.
    pub fn choose(&self, scanner: &mut Scanner) -> anyhow::Result<Choice> {
        let mut choice = Choice::read(scanner, &self.selector)?;
        // Nobody asked for a port.
        choice.named.clear();
        let trusts_engine = self.terms.stop_containers && !process::sees_all();
        if trusts_engine {
            // What is published for containers may be held by somebody who is not visible: the engine tells its age.
            let may_publish = |it: &Listener| it.is_ghost() && self.selector.matches_socket(&it.socket);
            let (ghosts, others) = choice.left_out.into_iter().partition(may_publish);
            choice.left_out = others;
            choice.selected.extend::<Vec<Listener>>(ghosts);
        }
        let containers = Containers::of(&choice.selected, self.selector.filters().since, trusts_engine);
        let (meant, others) = choice.selected.into_iter().partition(|listener| self.means(listener, &containers));
        choice.selected = meant;
        choice.left_out.extend::<Vec<Listener>>(others);
        Ok(choice)
    }

    fn means(&self, listener: &Listener, containers: &Containers) -> bool {
        match containers.is_new(listener) {
            Some(false) => false,
            Some(true) if self.terms.stop_containers => true,
            // A ghost was taken in for the engine alone.
            _ if listener.is_ghost() && !self.selector.matches(listener, process::boot_ns_now()) => false,
            _ => self.is_theirs(listener),
        }
    }

    fn is_theirs(&self, listener: &Listener) -> bool {
        self.uids.is_empty() || listener.holders.iter().any(|holder| self.is_of_them(holder.process.uid))
    }

    fn is_of_them(&self, uid: Option<u32>) -> bool {
        self.uids.is_empty() || uid.is_some_and(|uid| self.uids.contains(&uid))
    }

    /// The kill of what was chosen, decided and not begun.
    ///
    /// # Errors
    /// When the processes of the host cannot be read.
    pub fn prepare(&self, choice: Choice) -> anyhow::Result<Job> {
        let guards = Guards::current(self.force_self);
        let prepare = |guards| Job::prepare(choice, &self.terms, guards);
        let job = match self.selector.filters().since {
            Some(Since::Mark(since)) => {
                let means = |uid| self.is_of_them(uid);
                prepare(guards.with_mark(since))?.with_starters(&Rule { since, means: &means, own: Own::read() })
            }
            _ => prepare(guards)?,
        };
        Ok(job.removing(self.remove_cwd.clone()))
    }

    /// Ends it all. `agree` is asked about the first plan, and nothing is done without; `None` then. `tell_more` may know
    /// more of what was found, before it is ended.
    ///
    /// # Errors
    /// When the host cannot be scanned. Signals may have been sent by then.
    pub fn run(
        &self,
        scanner: &mut Scanner,
        agree: &mut dyn FnMut(&Plan) -> anyhow::Result<bool>,
        tell_more: &mut dyn FnMut(&mut [Leak]),
        progress: &mut dyn FnMut(&Progress<'_>),
    ) -> anyhow::Result<Option<Cleaned>> {
        let begun = process::boot_ns_now();
        let mut cleaned = Cleaned::default();
        let mut passes = 0;
        // When the last pass was over.
        let mut acted: Option<Instant> = None;
        loop {
            let looked = Instant::now();
            let mut choice = self.choose(scanner)?;
            cleaned.still_there(&choice.selected);
            choice.selected.retain(|listener| !cleaned.knows(&listener.socket));
            if choice.selected.is_empty() {
                let Some(acted) = acted else { return Ok(Some(cleaned)) };
                let quiet = acted.elapsed();
                if quiet >= NEWCOMERS || (quiet >= self.options.settle && !self.has_newcomers(begun)) {
                    cleaned.note_ends();
                    return Ok(Some(cleaned));
                }
                thread::sleep((looked.elapsed() * REST).max(LOOK_EVERY));
                continue;
            }
            if passes == MAX_PASSES {
                cleaned.endless = true;
                let last = choice.selected.iter().find_map(Listener::binder);
                cleaned.supervisor = last.and_then(|last| Supervisor::of(&last.process, &|pid| stat::read(pid).ok()));
                cleaned.leaks.extend(choice.selected.iter().map(Leak::found));
                cleaned.note_ends();
                return Ok(Some(cleaned));
            }
            let mut found: Vec<Leak> = choice.selected.iter().map(Leak::found).collect();
            tell_more(&mut found);
            let job = self.prepare(choice)?;
            if passes == 0 && !agree(job.plan())? {
                return Ok(None);
            }
            let restarters = Restarter::all(job.plan());
            let outcomes = job.run(scanner, self.options, progress)?;
            restarters.into_iter().for_each(|it| cleaned.add(it.judged(&outcomes)));
            cleaned.leaks.extend(found.into_iter().map(|leak| leak.judged(&outcomes)));
            cleaned.outcomes.extend(outcomes);
            acted = Some(Instant::now());
            passes += 1;
        }
    }

    /// What other users who are meant listen at, and who may not be looked at.
    ///
    /// # Errors
    /// When the host's sockets cannot be read.
    pub fn hidden(&self, scanner: &mut Scanner) -> anyhow::Result<Vec<Listener>> {
        let own = Uid::effective().as_raw();
        if !self.means_others_than(own) || process::sees_all() {
            return Ok(Vec::new());
        }
        let mut hidden = Choice::read(scanner, &self.selector)?.left_out;
        hidden.retain(|Listener { socket, since, holders }| {
            let is_unknown = holders.is_empty() && since.is_none() && socket.uid != own;
            let was_there = self.before.iter().any(|before| same_socket(*before, socket.id));
            is_unknown && !was_there && self.is_of_them(Some(socket.uid)) && self.selector.matches_socket(socket)
        });
        Ok(hidden)
    }

    /// Takes hidden listeners into account. `told` is what somebody knows of them who sees more: those that are new are
    /// leaks that only their user may end.
    ///
    /// # Errors
    /// When the host cannot be scanned.
    pub fn take_in_hidden(
        &self,
        hidden: Vec<Listener>,
        told: &[Listener],
        scanner: &mut Scanner,
        cleaned: &mut Cleaned,
    ) -> anyhow::Result<()> {
        let now = process::boot_ns_now();
        let mut left = Vec::new();
        for listener in hidden {
            let is_it = |told: &&Listener| same_socket(told.socket.id, listener.socket.id) && !told.is_ghost();
            match told.iter().find(is_it) {
                Some(told) if !(self.is_theirs(told) && self.selector.matches(told, now)) => continue,
                Some(told) => {
                    let leak = Leak::found(told);
                    let note = Some(not_permitted(leak.process.as_ref().and_then(|process| process.uid)));
                    cleaned.leaks.push(Leak { note, ..leak });
                }
                None => cleaned.hidden.push(listener.socket.clone()),
            }
            left.push(listener);
        }
        if !left.is_empty() {
            let job = self.prepare(Choice::of(left, &self.selector))?;
            // Nobody who could be signalled is in it.
            cleaned.outcomes.extend(job.run(scanner, self.options, &mut |_| {})?);
        }
        Ok(())
    }

    /// Whether a process that started since runs and could yet begin to listen.
    fn has_newcomers(&self, begun: BootNs) -> bool {
        let own = std::process::id();
        let is_newcomer = |stat: &stat::Stat| {
            let is_new = stat.start / TICK >= begun / TICK && !stat.exiting && !stat.kernel_thread;
            is_new && stat.pid != own && stat.ppid != own && self.is_of_them(process::owner(stat.pid))
        };
        stat::all().is_ok_and(|all| all.iter().any(is_newcomer))
    }
}

const TICK: BootNs = crate::model::ProcessId::TICK_NS;

impl Cleaned {
    /// Whether something had to be ended.
    pub fn has_ended_any(&self) -> bool {
        self.leaks.iter().any(|leak| matches!(leak.ended, Ended::Terminated | Ended::Killed | Ended::Stopped))
    }

    /// Whether nothing is left.
    pub fn is_clean(&self) -> bool {
        let ends = self.leaks.iter().map(|leak| leak.ended).chain(self.restarters.iter().map(|it| it.ended));
        self.hidden.is_empty() && ends.into_iter().all(|ended| ended != Ended::Alive)
    }

    fn add(&mut self, restarter: Restarter) {
        match self.restarters.iter_mut().find(|known| known.process.id.is_same(restarter.process.id)) {
            Some(known) => {
                restarter.ports.iter().for_each(|&port| push_new(&mut known.ports, port));
                (known.ended, known.note) = (restarter.ended, restarter.note);
            }
            None => self.restarters.push(restarter),
        }
    }

    /// Who was left alone and has ended with what it started restarts nothing, and is no news.
    fn note_ends(&mut self) {
        self.restarters.retain(|it| it.ended != Ended::Alive || !stat::has_ended(it.process.id));
    }

    fn knows(&self, socket: &Socket) -> bool {
        self.leaks.iter().any(|leak| same_socket(leak.socket.id, socket.id))
    }

    /// What was ended and is there all the same, in the hands of somebody else, was not ended.
    fn still_there(&mut self, listeners: &[Listener]) {
        for leak in &mut self.leaks {
            if listeners.iter().any(|listener| same_socket(listener.socket.id, leak.socket.id)) {
                leak.ended = Ended::Alive;
            }
        }
    }
}

impl Leak {
    fn found(listener: &Listener) -> Leak {
        let binder = listener.binder().map(|binder| Arc::clone(&binder.process));
        let stat = |pid| stat::read(pid).ok();
        let lived = listener.began().map(|began| Duration::from_nanos(process::boot_ns_now().saturating_sub(began)));
        Leak {
            socket: listener.socket.clone(),
            ancestors: binder.as_ref().map(|binder| stat::lineage(binder.id.pid, &stat)).unwrap_or_default(),
            process: binder,
            lived,
            ended: Ended::Alive,
            note: None,
        }
    }

    /// The same, with what became of it.
    fn judged(self, outcomes: &[Outcome]) -> Leak {
        let of_it = |outcome: &&Outcome| {
            (outcome.port, outcome.proto, outcome.netns) == (self.socket.port, self.socket.proto, self.socket.netns)
        };
        let Some(outcome) = outcomes.iter().find(of_it) else { return self };
        let pid = self.process.as_ref().map_or(0, |process| process.id.pid);
        let other = outcome.failed.first().filter(|_| !outcome.is_done());
        let failure = outcome.failed.iter().find(|failure| failure.pid == pid).or(other);
        let (ended, note) = if outcome.forced.contains(&pid) {
            (Ended::Killed, None)
        } else if outcome.killed.contains(&pid) {
            (Ended::Terminated, None)
        } else if outcome.gone.contains(&pid) {
            (Ended::Exited, None)
        } else if let Some(stopped) = outcome.stopped.first() {
            let (kind, name) = stopped.describe();
            (Ended::Stopped, Some(format!("{kind} {name}")))
        } else if let Some(failure) = failure {
            (Ended::Alive, Some(failure.reason.clone()))
        } else if outcome.is_done() {
            // It let go of the port, and was not waited for.
            (Ended::Terminated, None)
        } else {
            (Ended::Alive, outcome.diagnostics.as_ref().map(|found| found.message.clone()))
        };
        // Until now, rather than until it was found.
        let lived = match ended {
            Ended::Alive => self.lived,
            _ => self.lived.map(|lived| lived + outcome.elapsed),
        };
        Leak { ended, note, lived, ..self }
    }
}

impl Restarter {
    fn all(plan: &Plan) -> Vec<Restarter> {
        let new = |process: &Arc<Process>, groups: &[usize], note| {
            let mut ports = Vec::new();
            groups.iter().for_each(|&group| push_new(&mut ports, (plan.groups[group].port, plan.groups[group].proto)));
            Restarter { process: Arc::clone(process), ports, ended: Ended::Alive, note }
        };
        let spared = plan.spared.iter().filter_map(|spared| match spared {
            Spared::Starter { process, groups, reason } => Some(new(process, groups, Some(reason.clone()))),
            _ => None,
        });
        let starters = plan.victims.iter().filter(|victim| victim.kin.is_some_and(|kin| kin.is_starter()));
        starters.map(|victim| new(&victim.process, &victim.groups, None)).chain(spared).collect()
    }

    /// The same, with what became of it.
    fn judged(self, outcomes: &[Outcome]) -> Restarter {
        let pid = self.process.id.pid;
        let is_among = |pids: &dyn Fn(&Outcome) -> bool| outcomes.iter().any(pids);
        let ended = match () {
            () if is_among(&|outcome| outcome.forced.contains(&pid)) => Ended::Killed,
            () if is_among(&|outcome| outcome.killed.contains(&pid)) => Ended::Terminated,
            () if is_among(&|outcome| outcome.gone.contains(&pid)) => Ended::Exited,
            () => Ended::Alive,
        };
        let mut failed = outcomes.iter().flat_map(|outcome| &outcome.failed).filter(|failure| failure.pid == pid);
        let note = self.note.or_else(|| failed.next().map(|failure| failure.reason.clone()));
        Restarter { ended, note, ..self }
    }
}

/// The containers that listeners have to do with, and which of them are new.
#[derive(Debug, Default)]
struct Containers {
    roster: Roster,
    /// By id.
    new: HashMap<String, bool>,
    trusts_engine: bool,
}

impl Containers {
    /// A plain port costs no question. With `trusts_engine`, one of which no holder is visible is none.
    fn of(listeners: &[Listener], since: Option<Since>, trusts_engine: bool) -> Containers {
        let Some(Since::After(moment) | Since::Mark(moment)) = since else { return Containers::default() };
        if !(engine::is_involved_in(listeners) || trusts_engine && listeners.iter().any(Listener::is_ghost)) {
            return Containers::default();
        }
        let (engine, roster) = engine::ask();
        let ago = Duration::from_nanos(process::boot_ns_now().saturating_sub(moment));
        let since = Timestamp::now().checked_sub(ago).unwrap_or(Timestamp::MIN);
        let mut containers = Containers { roster, new: HashMap::new(), trusts_engine };
        for listener in listeners {
            for id in containers.ids(listener) {
                // Of which the engine does not tell, the listener's own age stands; a ghost has none.
                let created = engine.as_ref().and_then(|engine: &Engine| engine.created(&id).ok().flatten());
                containers.new.entry(id).or_insert_with(|| created.map_or(!listener.is_ghost(), |it| it >= since));
            }
        }
        containers
    }

    fn ids(&self, Listener { socket, holders, .. }: &Listener) -> Vec<String> {
        if holders.is_empty() && self.trusts_engine {
            return self.roster.publisher(socket).map(|container| container.id.clone()).into_iter().collect();
        }
        let link = |process: &Arc<Process>| self.roster.link(process, socket)?.container.map(|known| known.id.clone());
        holders.iter().filter_map(|holder| link(&holder.process)).collect()
    }

    /// `None`: no container has to do with it, as far as anybody knows.
    fn is_new(&self, listener: &Listener) -> Option<bool> {
        self.ids(listener).iter().filter_map(|id| self.new.get(id)).copied().reduce(|one, other| one && other)
    }
}

#[cfg(test)]
mod tests;
