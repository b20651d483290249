//! The one task that owns the table.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::kill::Killed;
use super::lineages::Lineages;
use super::peer::Load;
use crate::history::{self, Recorder};
use crate::metrics::{Metrics, Totals};
use crate::model::{Ancestor, BootNs, Change, Listener};
use crate::select::Selector;
use crate::service::Watchdog;
use crate::source::process;
use crate::tracker::Tracker;
use crate::wire::Status;

/// Changes that wait for one subscriber. More, and it is cut off and has to begin anew.
const QUEUE: usize = 4096;

/// A question to the task that owns the table.
#[derive(Debug)]
pub(super) enum Ask {
    List {
        selector: Box<Selector>,
        reply: oneshot::Sender<Vec<Listener>>,
    },
    /// The same, each with out of whom it came when it opened.
    Who {
        selector: Box<Selector>,
        reply: oneshot::Sender<Vec<(Listener, Vec<Ancestor>)>>,
    },
    /// The listeners now, and every change from now on.
    Watch {
        reply: oneshot::Sender<Subscription>,
    },
    Status {
        reply: oneshot::Sender<Status>,
    },
    /// No question: something to be remembered.
    Killed(Box<Killed>),
}

/// Where a subscriber begins and how it goes on. The channel closes when the subscriber did not keep up.
#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) at: BootNs,
    pub(super) listeners: Vec<Listener>,
    pub(super) changes: mpsc::Receiver<Arc<Change>>,
    /// How many changes found no room since then; the channel is closed at the first.
    pub(super) lost: Arc<AtomicU64>,
}

/// The core's end of a subscription.
struct Subscriber {
    /// `None` since it did not keep up.
    queue: Option<mpsc::Sender<Arc<Change>>>,
    lost: Arc<AtomicU64>,
}

impl Subscriber {
    fn tell(&mut self, change: &Arc<Change>) {
        let told = self.queue.as_ref().is_some_and(|queue| queue.try_send(Arc::clone(change)).is_ok());
        if !told {
            self.queue = None;
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Its peer is gone, or began anew.
    fn is_gone(&self) -> bool {
        Arc::strong_count(&self.lost) == 1
    }
}

pub(super) struct Core {
    tracker: Tracker,
    subscribers: Vec<Subscriber>,
    lineages: Lineages,
    /// Questions that are not answered yet, and when they were asked.
    waiting: Vec<(BootNs, Ask)>,
    load: Load,
    metrics: Arc<Metrics>,
    history: Option<Recorder>,
    watchdog: Watchdog,
    started: Instant,
}

impl Core {
    pub(super) fn new(tracker: Tracker, load: Load, metrics: Arc<Metrics>, mut history: Option<Recorder>) -> Core {
        metrics.recount(tracker.table());
        if let Some(history) = &mut history {
            history.snapshot(tracker.table().listeners(), &super::clock());
        }
        Core {
            metrics,
            history,
            watchdog: Watchdog::from_env(),
            tracker,
            subscribers: Vec::new(),
            lineages: Lineages::default(),
            waiting: Vec::new(),
            load,
            started: Instant::now(),
        }
    }

    pub(super) fn listeners(&self) -> usize {
        self.tracker.table().len()
    }

    /// Writes down what is left to write, for at most so long.
    pub(super) fn stop(self, patience: Duration) {
        if let Some(history) = self.history
            && !history.stop(&super::clock(), patience)
        {
            tracing::warn!("the last of history could not be written in time");
        }
    }

    /// Ends only when events cannot be read any more.
    pub(super) async fn run(&mut self, mut questions: mpsc::Receiver<Ask>) -> anyhow::Result<()> {
        loop {
            // Fair between the two: a flood of either does not starve the other.
            tokio::select! {
                changes = self.tracker.next() => self.publish(changes?),
                () = self.watchdog.beat() => {}
                Some(ask) = questions.recv() => {
                    if matches!(ask, Ask::Status { .. }) {
                        self.answer(ask);
                        continue;
                    }
                    // Whoever asks has seen things happen: they are in the answer.
                    let changes = self.tracker.catch_up()?;
                    self.publish(changes);
                    self.waiting.push((process::boot_ns_now(), ask));
                }
            }
            self.answer_what_is_known();
        }
    }

    /// Answers every question, unless it is in doubt who holds what: then the snapshot is waited for that settles it,
    /// which is due after four times as long as one takes.
    fn answer_what_is_known(&mut self) {
        let (stale, read_at) = (self.tracker.table().is_stale(), self.tracker.read_at());
        let known = |asked: BootNs| !stale || asked <= read_at;
        for (_, ask) in self.waiting.extract_if(.., |(asked, _)| known(*asked)).collect::<Vec<_>>() {
            self.answer(ask);
        }
    }

    fn publish(&mut self, changes: Vec<Change>) {
        let clock = super::clock();
        self.metrics.batch(clock.now_boot_ns, changes.iter().map(Change::at));
        self.subscribers.retain(|subscriber| !subscriber.is_gone());
        for change in changes {
            self.lineages.apply(&change);
            self.metrics.change(&change);
            if let Some(history) = &mut self.history {
                history.change(&change, &clock);
            }
            let change = Arc::new(change);
            self.subscribers.iter_mut().for_each(|subscriber| subscriber.tell(&change));
            if let Change::Resync { lost, .. } = *change {
                tracing::warn!(lost, "events were lost, and the table was read anew");
                self.metrics.recount(self.tracker.table());
            }
        }
        self.metrics.subscribers(self.subscribers.len());
        if let Some(history) = &mut self.history
            && history.needs_snapshot()
        {
            history.snapshot(self.tracker.table().listeners(), &clock);
        }
    }

    /// A reply that nobody waits for any more is of no use to anybody.
    fn answer(&mut self, ask: Ask) {
        let now = process::boot_ns_now();
        match ask {
            Ask::List { selector, reply } => {
                let all = self.tracker.table().listeners();
                let _ = reply.send(all.filter(|listener| selector.matches(listener, now)).cloned().collect());
            }
            Ask::Who { selector, reply } => {
                let all = self.tracker.table().listeners().filter(|listener| selector.matches(listener, now));
                let _ = reply.send(all.map(|listener| (listener.clone(), self.lineages.of(listener))).collect());
            }
            Ask::Watch { reply } => {
                let (queue, changes) = mpsc::channel(QUEUE);
                let listeners = self.tracker.table().listeners().cloned().collect();
                let lost = Arc::new(AtomicU64::new(0));
                self.subscribers.push(Subscriber { queue: Some(queue), lost: Arc::clone(&lost) });
                self.metrics.subscribers(self.subscribers.len());
                let _ = reply.send(Subscription { at: now, listeners, changes, lost });
            }
            Ask::Status { reply } => {
                let _ = reply.send(self.status());
            }
            Ask::Killed(killed) => self.remember(*killed),
        }
    }

    fn remember(&mut self, Killed { at, by, targets, listeners, outcomes }: Killed) {
        outcomes.iter().for_each(|outcome| self.metrics.kill(outcome.status));
        if let Some(history) = &mut self.history {
            let killed = history::Killed { at, by, targets, listeners: &listeners, outcomes: &outcomes };
            history.killed(killed, &super::clock());
        }
    }

    fn status(&mut self) -> Status {
        self.subscribers.retain(|subscriber| !subscriber.is_gone());
        let live = self.tracker.live();
        let Totals { opens, closes, conflicts, resyncs } = self.metrics.totals();
        Status {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            tier: live.tier(),
            reasons: live.refusals().to_vec(),
            holders: live.method().to_owned(),
            uptime_ns: u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            listeners: self.tracker.table().len(),
            opens,
            closes,
            conflicts,
            resyncs,
            dropped: live.lost(),
            connections: self.load.connections(),
            subscribers: self.subscribers.len(),
            memory: resident_bytes(),
            history: self.history.as_ref().map(Recorder::health),
        }
    }
}

/// 0 where /proc does not tell.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|line| line.split(' ').nth(1)?.parse::<u64>().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
