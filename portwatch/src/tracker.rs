//! A table that follows the kernel: a live source, the table it feeds, and when to read a snapshot.
//!
//! ```text
//!             next()                 apply                    caller
//!   Live ───────────────► events ──────────────► Table ──────────────► changes
//!     ▲                                            │ stale, or records lost
//!     └────────────────── refresh() ◄──────────────┘
//! ```
//! One task owns both halves and applies one batch after the other, so nothing is locked. Events are applied and their
//! changes returned before the snapshot that they make necessary is read: a line appears at once, its exact set of
//! holders a moment later. Refreshes take at most a fifth of the time, however wild the events; a loss is an exception
//! and is made good at once. While nothing happens there is no timer, and nothing wakes.
//!
//! A snapshot that cannot be read (for want of descriptors, say) is owed: [`Tracker::trouble`] says why, and it is tried
//! again, soon at first and then once a second. Events are applied meanwhile, but the table is not known to be true.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::{BootNs, Change, Event, NetnsId, Process, ProcessId, Socket, SocketId};
use crate::source::{Live, Probe, netns, process};
use crate::table::Table;

/// Which sockets a question is about.
pub type Question<'a> = &'a dyn Fn(&Socket) -> bool;

#[derive(Debug)]
pub struct Tracker {
    live: Live,
    table: Table,
    /// The earliest moment at which a stale table may be refreshed.
    refresh_at: Instant,
    /// The earliest moment at which many processes may be read anew.
    renew_at: Instant,
    read_at: BootNs,
    /// What happened while the first snapshot was read, until it is asked for.
    begun: Vec<Change>,
    owed: Option<Owed>,
}

/// A snapshot that could not be read.
#[derive(Debug)]
struct Owed {
    trouble: String,
    /// Records that it is to make good.
    lost: u64,
    rest: Duration,
}

/// Idle time after a refresh, as a multiple of what it took.
const REST: u32 = 4;

/// So that a burst of events causes one refresh and not several.
const MIN_REST: Duration = Duration::from_millis(2);

/// Between two tries to read a snapshot that is owed, at most.
const MAX_REST: Duration = Duration::from_secs(1);

/// So many processes are read anew for every question, however often one asks: less than a ms.
const FEW_PROCESSES: usize = 16;

/// Descriptors that are looked at for one question: a few ms. A snapshot is not much dearer than more of them.
const MOST_LOOKED_AT: usize = 4000;

impl Tracker {
    /// Attaches probes, then reads what is there already. `ring_bytes` as in [`Live::open`].
    pub fn open(probe: Probe, ring_bytes: Option<u32>) -> anyhow::Result<Tracker> {
        Tracker::follow(Live::open(probe, ring_bytes)?)
    }

    /// As [`Tracker::open`], of a source that was just opened.
    pub fn follow(live: Live) -> anyhow::Result<Tracker> {
        let mut tracker = Tracker {
            live,
            table: Table::new(),
            refresh_at: Instant::now(),
            renew_at: Instant::now(),
            read_at: 0,
            begun: Vec::new(),
            owed: None,
        };
        tracker.begun = tracker.read(0)?;
        Ok(tracker)
    }

    pub fn table(&self) -> &Table {
        &self.table
    }

    pub fn live(&self) -> &Live {
        &self.live
    }

    /// Makes sure that what happens in this network namespace is told; `None`: in all that can be seen.
    ///
    /// # Errors
    /// As of [`crate::source::Scanner::scan_in`].
    pub fn check_sees(&self, wanted: Option<NetnsId>) -> anyhow::Result<()> {
        let Some(id) = wanted.filter(|wanted| netns::own().ok() != Some(*wanted)) else { return Ok(()) };
        if self.table.listeners().any(|listener| listener.socket.netns == id) {
            return Ok(());
        }
        // The kernel's events come from everywhere; who looks has to go there.
        if self.live.tier().is_event_driven() { netns::open(id).map(drop) } else { netns::check(id) }
    }

    /// When the latest snapshot was begun: every question that arose before is answered.
    pub fn read_at(&self) -> BootNs {
        self.read_at
    }

    /// Why the table cannot be read anew at the moment, as one line; `None` as long as it can.
    pub fn trouble(&self) -> Option<&str> {
        self.owed.as_ref().map(|owed| &*owed.trouble)
    }

    /// Takes in what the kernel has told until now, or looks where it tells nothing: what the caller knows to have
    /// happened is in the table then, if not yet who else holds it ([`Table::is_stale`]).
    pub fn catch_up(&mut self) -> Vec<Change> {
        // What was not asked for yet is older.
        let mut changes = std::mem::take(&mut self.begun);
        if !self.live.tier().is_event_driven() {
            changes.extend(self.refresh(0));
            return changes;
        }
        let events = self.live.pending(process::boot_ns_now());
        let was_stale = self.table.is_stale();
        changes.extend(self.take(events, was_stale));
        let lost = self.live.losses();
        if lost > 0 || self.live.is_broken() {
            changes.extend(self.refresh(lost));
        }
        changes
    }

    /// Reads the holders of the sockets that each question is about anew: of a change of user, by which servers give up what
    /// they needed to bind their port, and of another title, directory or parent the kernel tells nothing. For a question
    /// about many processes they are read for at most a fifth of the time.
    pub fn renew(&mut self, questions: &[Question<'_>]) -> Vec<Change> {
        let begun = Instant::now();
        let mut known: HashMap<ProcessId, &Arc<Process>> = HashMap::new();
        for about in questions {
            let listeners = self.table.listeners().filter(|listener| about(&listener.socket));
            let holders = listeners.flat_map(|listener| &listener.holders);
            let asked: HashMap<ProcessId, &Arc<Process>> =
                holders.map(|holder| (holder.process.id, &holder.process)).collect();
            if asked.len() <= FEW_PROCESSES || begun >= self.renew_at {
                known.extend(asked);
            }
        }
        if known.is_empty() {
            return Vec::new();
        }
        let at = process::boot_ns_now();
        let read = |(id, known): (ProcessId, &Arc<Process>)| process::read_exact(id).filter(|now| is_news(now, known));
        let renewed: Vec<Process> = known.into_iter().filter_map(read).collect();
        self.renew_at = Instant::now() + begun.elapsed() * REST;
        let mut changes = Vec::new();
        for process in renewed.into_iter().map(Arc::new) {
            self.live.learn(&process);
            changes.extend(self.table.apply(Event::Renewed { at, process }));
        }
        changes
    }

    /// Looks whether who holds the sockets that each question is about still has the descriptors for it: of one that is
    /// closed while others hold the socket, as after passing it on, the kernel tells nothing. Where one is gone, or they are
    /// too many to look at, the table asks for a snapshot.
    pub fn doubt_holders(&mut self, questions: &[Question<'_>]) {
        let mut held: HashSet<(SocketId, u32, u32)> = HashSet::new();
        let mut doubted: HashSet<SocketId> = HashSet::new();
        for about in questions {
            let is_asked = |socket: &Socket| about(socket) && socket.id.inode != 0;
            let listeners = self.table.listeners().filter(|listener| is_asked(&listener.socket));
            let asked = listeners.flat_map(|listener| {
                let holders = listener.holders.iter();
                holders.flat_map(|holder| holder.fds.iter().map(|fd| (listener.socket.id, holder.process.id.pid, *fd)))
            });
            let asked: Vec<(SocketId, u32, u32)> = asked.take(MOST_LOOKED_AT + 1).collect();
            match asked.first() {
                // One row in doubt has all of them read anew.
                Some((id, ..)) if asked.len() > MOST_LOOKED_AT => drop(doubted.insert(*id)),
                _ => held.extend(asked),
            }
        }
        let is_gone = |(id, pid, fd): &(SocketId, u32, u32)| process::has_socket(*pid, *fd, id.inode) == Some(false);
        doubted.extend(held.into_iter().filter(is_gone).map(|(id, ..)| id));
        let at = process::boot_ns_now();
        doubted.into_iter().for_each(|id| self.table.doubt(id, at));
    }

    /// Waits for the next changes; there are none where a snapshot confirmed what was known, or could not be read
    /// ([`Tracker::trouble`]). Cancel safe.
    pub async fn next(&mut self) -> anyhow::Result<Vec<Change>> {
        if !self.begun.is_empty() {
            return Ok(std::mem::take(&mut self.begun));
        }
        loop {
            // In a flood there is always something to read, and the timers and signals of the runtime would never get
            // their turn; neither would a refresh that is due.
            tokio::task::yield_now().await;
            let was_stale = self.table.is_stale();
            let is_due = was_stale || self.owed.is_some();
            if is_due && Instant::now() >= self.refresh_at {
                return Ok(self.refresh(0));
            }
            let batch = if is_due {
                match tokio::time::timeout_at(self.refresh_at, self.live.next()).await {
                    Ok(batch) => batch?,
                    Err(_) => continue,
                }
            } else {
                self.live.next().await?
            };
            let mut changes = self.take(batch.events, was_stale);
            if batch.must_refresh {
                changes.extend(self.refresh(batch.lost));
                return Ok(changes);
            }
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }

    fn take(&mut self, events: Vec<Event>, was_stale: bool) -> Vec<Change> {
        let mut changes = Vec::new();
        for event in events {
            self.let_go(&event);
            changes.extend(self.table.apply(event));
        }
        if self.table.is_stale() && !was_stale {
            // A moment for what belongs together: the exit that follows a close, the exec that follows a fork.
            self.refresh_at = self.refresh_at.max(Instant::now() + MIN_REST);
        }
        changes
    }

    /// Who holds nothing any more need not be followed: else everything that a shell starts would wake us for ever,
    /// because it once had a port open.
    fn let_go(&mut self, event: &Event) {
        let (actor, child) = match event {
            Event::Forked { parent, child, .. } => (*parent, Some(child.id)),
            Event::Execed { process, .. } => (process.id, None),
            _ => return,
        };
        if !self.table.is_stale() && !self.table.is_holder(actor) {
            for id in child.into_iter().chain([actor]) {
                self.live.unfollow(id);
            }
        }
    }

    /// Reads a snapshot and applies it; `lost` is how many records it makes good. Where it cannot be read, it is owed.
    fn refresh(&mut self, lost: u64) -> Vec<Change> {
        let owed = self.owed.take();
        let lost = lost + owed.as_ref().map_or(0, |owed| owed.lost);
        self.read(lost).unwrap_or_else(|error| {
            let rest = owed.map_or(MIN_REST, |owed| owed.rest * 2).min(MAX_REST);
            self.refresh_at = Instant::now() + rest;
            self.owed = Some(Owed { trouble: format!("the table cannot be read anew: {error:#}"), lost, rest });
            Vec::new()
        })
    }

    fn read(&mut self, lost: u64) -> anyhow::Result<Vec<Change>> {
        let begun = Instant::now();
        let at = process::boot_ns_now();
        let holders: HashSet<u32> =
            self.table.listeners().flat_map(|l| l.holders.iter().map(|h| h.process.id.pid)).collect();
        let events = self.live.refresh(&holders, lost)?;
        let changes = events.into_iter().flat_map(|event| self.table.apply(event)).collect();
        self.read_at = at;
        self.refresh_at = Instant::now() + (begun.elapsed() * REST).max(MIN_REST);
        Ok(changes)
    }
}

/// Whether a process is not what it was. One that ends, or is in the midst of exec, shows nothing of itself any more.
fn is_news(now: &Process, known: &Process) -> bool {
    now != known && (known.command.is_empty() || !now.command.is_empty())
}
