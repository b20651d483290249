//! Kills that peers ask for, each on a thread of its own: what blocks must not hold up the table.
//!
//! ```text
//!  Peer ── begin ──► thread: scan ─► plan ──────────► wait ─► run ─► Ask::Killed ──► Core: history, metrics
//!   │ ◄── told: plan ───────────────┘                  ▲        │
//!   │ ─── go (confirmed, or nobody is to be asked) ────┘        │
//!   │ ─── stop (nobody is signalled any more) ──────────────────┤
//!   │ ◄── told: progress, outcomes, end ────────────────────────┘
//! ```
//! The plan is made here from a scan of this moment and stays here: a peer agrees to it, and can neither make nor change
//! one. A peer that is gone before it agreed has asked for nothing; afterwards the kill goes on without it, unless it said
//! that it is to stop.
//!
//! Who may be ended is decided twice, by [`Identity::guards`]: for the plan, and of the very process right before each
//! signal to it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use tokio::sync::mpsc;

use super::access::Identity;
use super::core::Ask;
use crate::history::Requester;
use crate::kill::{Choice, Guards, Job, Options, Outcome, Plan, Progress, concern};
use crate::model::{BootNs, Listener, Process};
use crate::select::Selector;
use crate::source::netns::Unknown;
use crate::source::{Probe, Scanner, process, stat};
use crate::wire::{ErrorKind, Kill, Response, Selection};

/// Kills at once: of all users, and of one that is not root. The last few are root's.
const KILLS: usize = 12;
const KILLS_OF_ONE: usize = 4;
const RESERVED: usize = 2;

/// Answers that wait for a peer to read them.
const QUEUE: usize = 1024;

/// Of the descriptors that connections need as well, so many may be pidfds of one kill.
const PIDFDS: usize = 256;

/// Scanners that are kept from one kill to the next. Each takes some memory in the kernel.
const SCANNERS: usize = 2;

/// The kills that are under way.
#[derive(Clone, Debug, Default)]
pub(super) struct Kills {
    /// How many, by the uid that asked for them.
    under_way: Arc<Mutex<HashMap<u32, usize>>>,
    /// Those that nobody needs now: to open one takes longer than all the rest of a kill.
    scanners: Arc<Mutex<Vec<Scanner>>>,
}

impl Kills {
    /// Does something with a scanner. One is opened at a time: that takes a processor, and what the loader needs to know of
    /// the kernel's types is most of the agent's memory.
    fn with_scanner<T>(&self, act: impl FnOnce(&mut Scanner) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let scanners = || self.scanners.lock().unwrap_or_else(PoisonError::into_inner);
        let mut spare = scanners();
        let mut scanner = spare.pop().unwrap_or_else(|| {
            let scanner = Scanner::open(Probe::Auto);
            super::give_back_memory();
            scanner
        });
        drop(spare);
        // After an error it is not used again.
        let done = act(&mut scanner)?;
        let mut spare = scanners();
        if spare.len() < SCANNERS {
            spare.push(scanner);
        }
        Ok(done)
    }

    /// Takes a place, if there is one.
    fn enter(&self, uid: u32) -> Option<Place> {
        let mut kills = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let (total, own) = (kills.values().sum::<usize>(), kills.get(&uid).copied().unwrap_or(0));
        let most = if uid == 0 { KILLS } else { KILLS - RESERVED };
        if total >= most || (uid != 0 && own >= KILLS_OF_ONE) {
            return None;
        }
        kills.insert(uid, own + 1);
        Some(Place { kills: self.clone(), uid })
    }
}

/// A place among the kills; given back when dropped.
#[derive(Debug)]
struct Place {
    kills: Kills,
    uid: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut kills = self.kills.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = kills.get_mut(&self.uid) {
            *own -= 1;
            if *own == 0 {
                kills.remove(&self.uid);
            }
        }
    }
}

/// A kill as its peer sees it. Dropped before [`Begun::go`], nobody is signalled.
#[derive(Debug)]
pub(super) struct Begun {
    /// What there is to tell, the last of it `end` or `error`. Ends without one where the thread failed.
    pub(super) told: mpsc::Receiver<Response>,
    go: std_mpsc::Sender<()>,
    called_off: Arc<AtomicBool>,
}

impl Begun {
    /// Lets the plan be carried out, once it is made.
    pub(super) fn go(&self) {
        // Nobody waits for it where there is nothing to do.
        let _ = self.go.send(());
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.called_off.load(Ordering::Relaxed)
    }

    /// Has nobody signalled any more. What became of the ports is told all the same.
    pub(super) fn stop(&self) {
        self.called_off.store(true, Ordering::Relaxed);
    }
}

/// A kill that is over, for those who keep count.
#[derive(Debug)]
pub(super) struct Killed {
    /// When it was asked for.
    pub(super) at: BootNs,
    pub(super) by: Requester,
    pub(super) targets: String,
    pub(super) listeners: Vec<Listener>,
    pub(super) outcomes: Vec<Outcome>,
}

/// Why a kill does not begin.
pub(super) type Refusal = (ErrorKind, String);

/// What a peer is told of an error that came of looking at the host.
pub(super) fn refusal(error: &anyhow::Error) -> Response {
    let netns = error.downcast_ref().map(|Unknown(id)| *id);
    let is_denied = |cause: &io::Error| cause.kind() == io::ErrorKind::PermissionDenied;
    let kind = match netns {
        Some(_) => ErrorKind::Usage,
        None if error.chain().filter_map(|cause| cause.downcast_ref()).any(is_denied) => ErrorKind::Denied,
        None => ErrorKind::Failed,
    };
    Response::Error { kind, message: format!("{error:#}"), netns }
}

/// Begins a kill, if this peer may have one at all: its plan comes first.
pub(super) fn begin(
    request: Kill,
    selector: Selector,
    identity: Identity,
    kills: &Kills,
    asks: &mpsc::Sender<Ask>,
) -> Result<Begun, Refusal> {
    let usage = |message| (ErrorKind::Usage, message);
    if selector.is_empty() {
        return Err(usage(
            "a kill names a target or another part of a selection: this one picks everything".to_owned(),
        ));
    }
    let options = Options { pidfds: PIDFDS, ..request.options().map_err(usage)? };
    let guards = identity.guards(request.force_self).map_err(|message| (ErrorKind::Denied, message))?;
    let busy = || (ErrorKind::Busy, "too many kills are under way; try again later".to_owned());
    let place = kills.enter(identity.uid).ok_or_else(busy)?;
    let (teller, told) = mpsc::channel(QUEUE);
    let (go, gate) = std_mpsc::channel();
    let called_off = Arc::new(AtomicBool::new(false));
    let name = stat::read(identity.pid()).map_or_else(|_| "?".to_owned(), |stat| stat.name);
    let work = Work {
        by: Requester { uid: identity.uid, pid: identity.pid(), name },
        at: process::boot_ns_now(),
        targets: targets(&request.selection),
        options,
        request,
        selector,
        guards,
        teller,
        gate,
        called_off: Arc::clone(&called_off),
        asks: asks.clone(),
        place,
        planned: HashSet::new(),
    };
    let spawned = thread::Builder::new().name("kill".to_owned()).spawn(move || work.done());
    spawned.map_err(|error| (ErrorKind::Failed, format!("cannot start a thread for the kill: {error}")))?;
    Ok(Begun { told, go, called_off })
}

/// As much of what a kill names as the log and history have of it: with 64 KiB for each port, anybody could fill them. In
/// characters, for any number of those without a width fits into a column.
const LOGGED: usize = 200;

/// What is to be freed, as much of it as is written down.
pub(super) fn targets(selection: &Selection) -> String {
    logged(selection.words())
}

fn logged(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(LOGGED) {
        text.truncate(end);
        text.push('…');
    }
    text
}

pub(super) fn log_refusal(identity: Identity, targets: &str, reason: &str) {
    let (uid, pid, reason) = (identity.uid, identity.pid(), logged(reason.to_owned()));
    tracing::warn!(uid, pid, %targets, %reason, "kill refused");
}

/// What the thread of a kill needs.
#[derive(Debug)]
struct Work {
    at: BootNs,
    by: Requester,
    targets: String,
    request: Kill,
    selector: Selector,
    options: Options,
    guards: Guards,
    teller: mpsc::Sender<Response>,
    gate: std_mpsc::Receiver<()>,
    called_off: Arc<AtomicBool>,
    asks: mpsc::Sender<Ask>,
    place: Place,
    /// Pids that the plan has told.
    planned: HashSet<u32>,
}

impl Work {
    fn done(mut self) {
        let last = match self.work() {
            Ok(Some(count)) => Response::End { count, more: false, narrowed: false },
            Ok(None) => return,
            Err(error) => {
                let refusal = refusal(&error);
                if matches!(refusal, Response::Error { kind: ErrorKind::Failed, .. }) {
                    let error = format!("{error:#}");
                    tracing::warn!(uid = self.by.uid, pid = self.by.pid, targets = %self.targets, %error, "kill failed");
                }
                refusal
            }
        };
        self.tell(last);
    }

    /// How many outcomes were told; `None` where the peer did not agree.
    fn work(&mut self) -> anyhow::Result<Option<usize>> {
        let kills = self.place.kills.clone();
        let choice = kills.with_scanner(|scanner| Choice::read(scanner, &self.selector))?;
        let job = Job::prepare(choice, &self.request.terms(), self.guards.clone())?;
        let job = job.until(Arc::clone(&self.called_off));
        let (victims, refused) = (&job.plan().victims, &job.plan().refused);
        let planned =
            victims.iter().map(|victim| &victim.process).chain(refused.iter().map(|refused| &refused.process));
        self.planned = planned.map(|process| process.id.pid).collect();
        let concerns = concern::concerns(job.plan(), self.by.uid, false, &|pid| stat::read(pid).ok());
        self.tell(Response::Plan { plan: Box::new(without_holders(job.plan())), concerns });
        if self.request.dry_run {
            return Ok(Some(self.report(job.planned())));
        }
        if job.plan().groups.is_empty() {
            return Ok(Some(0));
        }
        if self.gate.recv().is_err() {
            tracing::info!(uid = self.by.uid, pid = self.by.pid, targets = %self.targets, "kill not confirmed");
            return Ok(None);
        }
        let listeners = job.plan().listeners.clone();
        let teller = self.teller.clone();
        let mut tell = |progress: &Progress<'_>| {
            let Process { id, name, .. } = progress.process;
            // A peer that does not read misses some of it, and holds up nobody.
            let told = Response::Progress { pid: id.pid, name: name.clone(), step: progress.step.clone() };
            let _ = teller.try_send(told);
        };
        let outcomes = kills.with_scanner(|scanner| job.run(scanner, self.options, &mut tell))?;
        self.log(&outcomes);
        let killed = Killed {
            at: self.at,
            by: self.by.clone(),
            targets: self.targets.clone(),
            listeners,
            outcomes: outcomes.clone(),
        };
        // Fails only where the agent ends.
        let _ = self.asks.blocking_send(Ask::Killed(Box::new(killed)));
        Ok(Some(self.report(outcomes)))
    }

    fn log(&self, outcomes: &[Outcome]) {
        let Requester { uid, pid, .. } = self.by;
        for Outcome { port, proto, status, killed, failed, .. } in outcomes {
            let failed: Vec<u32> = failed.iter().map(|failure| failure.pid).collect();
            tracing::info!(uid, pid, targets = %self.targets, port, %proto, ?status, ?killed, ?failed, "kill");
        }
    }

    fn report(&self, mut outcomes: Vec<Outcome>) -> usize {
        let count = outcomes.len();
        if let Some(uid) = self.selector.shows_only() {
            outcomes.iter_mut().for_each(|outcome| self.conceal(outcome, uid));
        }
        outcomes.into_iter().for_each(|outcome| self.tell(Response::Outcome(Box::new(outcome.into()))));
        count
    }

    /// Leaves out of an outcome who else is on the port, of whom this user is not told: all that is not theirs, and was not
    /// in the plan.
    fn conceal(&self, outcome: &mut Outcome, uid: u32) {
        let is_told = |pid: u32| self.planned.contains(&pid) || process::owner(pid) == Some(uid);
        let told = |outcome: &Outcome| outcome.remaining_pids.len() + outcome.names.len();
        let count = told(outcome);
        outcome.remaining_pids.retain(|pid| is_told(*pid));
        outcome.names.retain(|(pid, _)| is_told(*pid));
        let mut is_hidden = told(outcome) < count;
        let is_done = outcome.is_done();
        let Some(diagnostics) = &mut outcome.diagnostics else { return };
        is_hidden |= diagnostics.new_owners.iter().any(|owner| !is_told(owner.pid));
        diagnostics.new_owners.retain(|owner| is_told(owner.pid));
        // Names processes in sentences.
        diagnostics.findings.clear();
        if is_hidden && is_done {
            outcome.diagnostics = None;
        } else if is_hidden {
            diagnostics.message = "held by somebody of whom the agent's configuration tells you nothing".to_owned();
        }
    }

    /// Waits for a peer that reads slowly, until it is given up.
    fn tell(&self, response: Response) {
        let _ = self.teller.blocking_send(response);
    }
}

fn without_holders(plan: &Plan) -> Plan {
    let mut plan = plan.clone();
    plan.listeners.iter_mut().for_each(|listener| listener.holders.clear());
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_can_keep_the_others_from_killing() {
        let kills = Kills::default();
        let of_one: Vec<Place> = (0..10).map_while(|_| kills.enter(1000)).collect();
        assert_eq!(of_one.len(), KILLS_OF_ONE);
        let of_others: Vec<Place> = (2000..2100).map_while(|uid| kills.enter(uid)).collect();
        assert_eq!(of_one.len() + of_others.len(), KILLS - RESERVED);
        let of_root: Vec<Place> = (0..10).map_while(|_| kills.enter(0)).collect();
        assert_eq!(of_root.len(), RESERVED);
        drop(of_one);
        assert!(kills.enter(1000).is_some());
        drop((of_others, of_root));
        assert!(kills.under_way.lock().unwrap().is_empty());
    }

    #[test]
    fn nobody_fills_the_log() {
        let of =
            |word: &str, count| targets(&Selection { targets: vec![word.to_owned(); count], ..Selection::default() });
        assert_eq!(of("8000", 3), "8000 8000 8000");
        let cut = of("8000", 10_000);
        assert!(cut.starts_with("8000 8000") && cut.ends_with('…'), "{cut}");
        // Characters without a width count as well.
        for text in [cut, of("\u{301}\u{200b}", 10_000), of("\u{1b}", 10_000)] {
            assert_eq!(text.chars().count(), LOGGED + 1);
        }
    }
}
