//! The one task that owns the table.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot};

use super::kill::Killed;
use super::lineages::Lineages;
use super::load::Load;
use super::rules::{Done, Rules, Step};
use super::troubles::{About, Troubles};
use crate::history::{self, Recorder, Requester, Utc};
use crate::kill::plan::same_socket;
use crate::metrics::{Metrics, Totals};
use crate::model::{Ancestor, BootNs, Change, Listener, Socket};
use crate::rules::queue::Due;
use crate::rules::{Action, Enforced, Rule, State};
use crate::select::Selector;
use crate::service::Watchdog;
use crate::source::process;
use crate::table::Table;
use crate::tracker::{Question, Tracker};
use crate::wire::Status;

/// The latest changes, kept once for all subscribers until each has read them. One that is further behind has to begin
/// anew: so many that do not read cost as much memory as one.
const KEPT: usize = 4096;

/// An answer, or why there is none.
pub(super) type Reply<T> = oneshot::Sender<Result<T, Untold>>;

/// Why a question is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Untold {
    /// There are more listeners than were asked for at most.
    More,
    /// A sentence.
    Trouble(String),
}

impl fmt::Display for Untold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Untold::More => f.write_str("there are more listeners than were asked for"),
            Untold::Trouble(trouble) => f.write_str(trouble),
        }
    }
}

/// A question to the task that owns the table. Of more listeners than `most` none is copied: the answer is
/// [`Untold::More`].
#[derive(Debug)]
pub(super) enum Ask {
    List {
        selector: Box<Selector>,
        most: usize,
        reply: Reply<Vec<Listener>>,
    },
    /// The same, each with out of whom it came when it opened.
    Who {
        selector: Box<Selector>,
        most: usize,
        reply: Reply<Vec<(Listener, Vec<Ancestor>)>>,
    },
    /// What the selection picks, and every change from now on, whatever it is about; with `since`, what happened before.
    Watch {
        selector: Box<Selector>,
        most: usize,
        since: Option<Utc>,
        reply: Reply<Subscription>,
    },
    Status {
        reply: oneshot::Sender<Status>,
    },
    /// No question: something to be remembered.
    Killed(Box<Killed>),
    Rules {
        reply: Reply<Vec<State>>,
    },
    /// The configuration was read anew.
    ReplaceRules {
        rules: Vec<Rule>,
    },
}

impl Ask {
    /// Whether a snapshot could change the answer.
    fn is_in_doubt(&self, table: &Table) -> bool {
        match self.selector() {
            Some(selector) => table.is_stale_about(&|socket| selector.matches_socket(socket)),
            None => table.is_stale(),
        }
    }

    /// Whether who asked has gone meanwhile.
    fn is_moot(&self) -> bool {
        match self {
            Ask::List { reply, .. } => reply.is_closed(),
            Ask::Who { reply, .. } => reply.is_closed(),
            Ask::Watch { reply, .. } => reply.is_closed(),
            Ask::Status { reply } => reply.is_closed(),
            Ask::Rules { reply } => reply.is_closed(),
            Ask::Killed(_) | Ask::ReplaceRules { .. } => false,
        }
    }

    fn selector(&self) -> Option<&Selector> {
        match self {
            Ask::List { selector, .. } | Ask::Who { selector, .. } | Ask::Watch { selector, .. } => Some(selector),
            Ask::Status { .. } | Ask::Killed(_) | Ask::Rules { .. } | Ask::ReplaceRules { .. } => None,
        }
    }
}

/// Where a subscriber begins and how it goes on.
#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) at: BootNs,
    pub(super) listeners: Vec<Listener>,
    pub(super) changes: broadcast::Receiver<Arc<Change>>,
    /// What happened from the time that was asked for until this subscription begins, and nothing that its changes tell.
    pub(super) past: Option<Past>,
}

/// The answer of the history, which comes later.
pub(super) type Past = oneshot::Receiver<anyhow::Result<Vec<Change>>>;

/// Changes of the past that one subscription is told at most: all are in memory at once. One more is read, so that it is
/// known whether there are more.
pub(super) const MAX_PAST: usize = 10_000;

pub(super) struct Core {
    tracker: Tracker,
    subscribers: broadcast::Sender<Arc<Change>>,
    lineages: Lineages,
    /// Questions that are not answered yet, and when they were asked.
    waiting: Vec<(BootNs, Ask)>,
    load: Load,
    troubles: Troubles,
    metrics: Arc<Metrics>,
    history: Option<Recorder>,
    rules: Rules,
    watchdog: Watchdog,
    started: BootNs,
}

impl Core {
    pub(super) fn new(
        tracker: Tracker,
        load: Load,
        troubles: Troubles,
        metrics: Arc<Metrics>,
        mut history: Option<Recorder>,
        rules: Rules,
    ) -> Core {
        metrics.recount(tracker.table());
        if let Some(history) = &mut history {
            history.snapshot(tracker.table().listeners(), &super::clock());
        }
        Core {
            metrics,
            history,
            rules,
            watchdog: Watchdog::from_env(),
            tracker,
            subscribers: broadcast::Sender::new(KEPT),
            lineages: Lineages::default(),
            waiting: Vec::new(),
            load,
            troubles,
            started: process::boot_ns_now(),
        }
    }

    /// Other rules from now on.
    pub(super) fn replace_rules(&mut self, rules: Vec<Rule>) {
        rules.iter().for_each(|rule| self.metrics.rule(&rule.name));
        self.rules.replace(rules, self.tracker.table().listeners());
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
            let mut asks = Vec::new();
            // Fair between the two: a flood of either does not starve the other.
            tokio::select! {
                changes = self.tracker.next() => self.publish(changes?),
                () = self.watchdog.beat() => {}
                step = self.rules.next() => match step {
                    Step::Due => self.fire(),
                    Step::Done(done) => self.record(*done),
                },
                1.. = questions.recv_many(&mut asks, super::ASKS) => self.take_in(asks),
            }
            self.troubles.set(About::Table, self.tracker.trouble().map(str::to_owned));
            self.answer_what_is_known();
        }
    }

    /// Takes in all that was asked by now. To look costs the same for many questions as for one, so that who asks again and
    /// again does not keep others waiting.
    fn take_in(&mut self, mut asks: Vec<Ask>) {
        asks.retain(|ask| !ask.is_moot());
        let (now, later): (Vec<Ask>, Vec<Ask>) = asks.into_iter().partition(|ask| matches!(ask, Ask::Status { .. }));
        now.into_iter().for_each(|ask| self.answer(ask));
        if later.is_empty() {
            return;
        }
        // Whoever asks has seen things happen: they are in the answer.
        let changes = self.tracker.catch_up();
        self.publish(changes);
        each_about(&later, |questions| self.tracker.doubt_holders(questions));
        let asked = process::boot_ns_now();
        self.waiting.extend(later.into_iter().map(|ask| (asked, ask)));
    }

    /// Answers every question, unless it is in doubt who holds what it is about: then the snapshot is waited for that
    /// settles it, which is due after four times as long as one takes. Where that cannot be read, this is the answer.
    fn answer_what_is_known(&mut self) {
        self.waiting.retain(|(_, ask)| !ask.is_moot());
        if let Some(trouble) = self.tracker.trouble().map(|trouble| Untold::Trouble(trouble.to_owned())) {
            for (_, ask) in std::mem::take(&mut self.waiting) {
                match ask {
                    Ask::List { reply, .. } => drop(reply.send(Err(trouble.clone()))),
                    Ask::Watch { reply, .. } => drop(reply.send(Err(trouble.clone()))),
                    Ask::Who { reply, .. } => drop(reply.send(Err(trouble.clone()))),
                    Ask::Rules { reply } => drop(reply.send(Err(trouble.clone()))),
                    Ask::Status { .. } | Ask::Killed(_) | Ask::ReplaceRules { .. } => self.answer(ask),
                }
            }
            return;
        }
        let (table, read_at) = (self.tracker.table(), self.tracker.read_at());
        let is_known = |(asked, ask): &mut (BootNs, Ask)| *asked <= read_at || !ask.is_in_doubt(table);
        let known: Vec<Ask> = self.waiting.extract_if(.., is_known).map(|(_, ask)| ask).collect();
        each_about(&known, |questions| self.renew(questions));
        known.into_iter().for_each(|ask| self.answer(ask));
    }

    /// Lets the rules that are due fire, each for its listener as it is now.
    fn fire(&mut self) {
        for Due { rule, id } in self.rules.take_due() {
            self.renew(&[&|socket| same_socket(socket.id, id)]);
            let Some(listener) = self.tracker.table().listeners().find(|it| same_socket(it.socket.id, id)) else {
                continue;
            };
            if !rule.may_meet(listener) {
                self.rules.does_not_meet(&rule.name, id);
                continue;
            }
            if let Err(error) = self.rules.fire(rule, listener.clone()) {
                tracing::error!("{error:#}");
            }
        }
    }

    /// Takes in what a rule did.
    fn record(&mut self, done: Done) {
        if let Done { at, rule, dry_run: false, result: Ok(Enforced { listeners, outcomes }), .. } = &done
            && rule.action == Action::Kill
        {
            for outcome in outcomes {
                self.metrics.kill(outcome.status);
                self.metrics.rule_kill(&rule.name, outcome.status);
            }
            if let Some(history) = &mut self.history {
                let targets = outcomes.iter().map(|outcome| format!("{}/{}", outcome.port, outcome.proto));
                let targets = targets.collect::<Vec<_>>().join(" ");
                let (at, by) = (*at, Requester::rule(&rule.name));
                history.killed(history::Killed { at, by, targets, listeners, outcomes }, &super::clock());
            }
        }
        done.log();
    }

    fn publish(&mut self, changes: Vec<Change>) {
        let clock = super::clock();
        self.metrics.batch(clock.now_boot_ns, changes.iter().map(Change::at));
        self.lineages.apply(&changes);
        for change in changes {
            self.metrics.change(&change);
            self.rules.change(&change);
            if let Some(history) = &mut self.history {
                history.change(&change, &clock);
            }
            if let Change::Resync { lost, .. } = change {
                tracing::warn!(lost, "events were lost, and the table was read anew");
                self.metrics.recount(self.tracker.table());
            }
            // An error is that nobody subscribes.
            let _ = self.subscribers.send(Arc::new(change));
        }
        self.metrics.subscribers(self.subscribers.receiver_count());
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
            Ask::List { selector, most, reply } => {
                let found = self.listeners(&selector, most, now);
                let _ = reply.send(found.map(|found| found.into_iter().cloned().collect()));
            }
            Ask::Who { selector, most, reply } => {
                let with_lineage = |listener: &Listener| (listener.clone(), self.lineages.of(listener));
                let found = self.listeners(&selector, most, now);
                let _ = reply.send(found.map(|found| found.into_iter().map(with_lineage).collect()));
            }
            Ask::Watch { selector, most, since, reply } => {
                let _ = reply.send(self.subscription(selector, most, since, now));
            }
            Ask::Status { reply } => {
                let _ = reply.send(self.status());
            }
            Ask::Killed(killed) => self.remember(*killed),
            Ask::Rules { reply } => {
                let rules: Vec<Selector> = self.rules.selectors().cloned().collect();
                self.renew(&[&|socket| rules.iter().any(|rule| rule.matches_socket(socket))]);
                let _ = reply.send(Ok(self.rules.states(self.tracker.table().listeners())));
            }
            Ask::ReplaceRules { rules } => self.replace_rules(rules),
        }
    }

    fn renew(&mut self, questions: &[Question<'_>]) {
        let changes = self.tracker.renew(questions);
        if !changes.is_empty() {
            self.publish(changes);
        }
    }

    fn remember(&mut self, Killed { at, by, targets, listeners, outcomes }: Killed) {
        outcomes.iter().for_each(|outcome| self.metrics.kill(outcome.status));
        if let Some(history) = &mut self.history {
            let killed = history::Killed { at, by, targets, listeners: &listeners, outcomes: &outcomes };
            history.killed(killed, &super::clock());
        }
    }

    fn subscription(
        &self,
        selector: Box<Selector>,
        most: usize,
        since: Option<Utc>,
        now: BootNs,
    ) -> Result<Subscription, Untold> {
        let listeners = self.listeners(&selector, most, now)?.into_iter().cloned().collect();
        let changes = self.subscribers.subscribe();
        self.metrics.subscribers(self.subscribers.receiver_count());
        // In this very turn: what was published before is what the history has been told.
        let past = since.zip(self.history.as_ref()).map(|(from, history)| history.replay(from, MAX_PAST + 1, selector));
        Ok(Subscription { at: now, listeners, changes, past })
    }

    fn listeners(&self, selector: &Selector, most: usize, now: BootNs) -> Result<Vec<&Listener>, Untold> {
        at_most(most, self.tracker.table().listeners().filter(|listener| selector.matches(listener, now)))
    }

    fn status(&self) -> Status {
        let live = self.tracker.live();
        let Totals { opens, closes, conflicts, resyncs } = self.metrics.totals();
        Status {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            tier: live.tier(),
            reasons: live.refusals().to_vec(),
            holders: live.method().to_owned(),
            uptime_ns: process::boot_ns_now().saturating_sub(self.started),
            listeners: self.tracker.table().len(),
            opens,
            closes,
            conflicts,
            resyncs,
            dropped: live.lost(),
            connections: self.load.connections(),
            subscribers: self.subscribers.receiver_count(),
            memory: resident_bytes(),
            troubles: self.troubles.told(),
            history: self.history.as_ref().map(Recorder::health),
        }
    }
}

/// All of them, unless they are more than `most`: no more are looked at than tell that.
fn at_most<T>(most: usize, mut all: impl Iterator<Item = T>) -> Result<Vec<T>, Untold> {
    let few = all.by_ref().take(most).collect();
    if all.next().is_some() { Err(Untold::More) } else { Ok(few) }
}

/// Which sockets each of these is about, for one look at all of them.
fn each_about(asks: &[Ask], look: impl FnOnce(&[Question<'_>])) {
    let each: Vec<_> =
        asks.iter().filter_map(Ask::selector).map(|it| |socket: &Socket| it.matches_socket(socket)).collect();
    look(&each.iter().map(|about| about as Question<'_>).collect::<Vec<_>>());
}

/// 0 where /proc does not tell.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|line| line.split(' ').nth(1)?.parse::<u64>().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::Filters;

    #[test]
    fn of_too_many_no_more_are_looked_at_than_tell_that() {
        let mut looked = 0;
        let mut of = |most| {
            looked = 0;
            let told = at_most(most, (0..100).inspect(|_| looked += 1));
            (told, looked)
        };
        assert_eq!(of(0), (Err(Untold::More), 1));
        assert_eq!(of(64), (Err(Untold::More), 65));
        assert_eq!(of(100), (Ok((0..100).collect()), 100));
        assert_eq!(of(usize::MAX), (Ok((0..100).collect()), 100));
        assert_eq!(at_most(0, std::iter::empty::<()>()), Ok(Vec::new()));
    }

    #[test]
    fn a_question_is_moot_once_who_asked_is_gone() {
        let all = || Box::new(Selector::new(Vec::new(), Filters::default()));
        let (reply, answer) = oneshot::channel();
        let list = Ask::List { selector: all(), most: 0, reply };
        let (reply, _answer) = oneshot::channel();
        let who = Ask::Who { selector: all(), most: 0, reply };
        assert!(!list.is_moot() && !who.is_moot());
        drop(answer);
        assert!(list.is_moot() && !who.is_moot());
        assert!(!Ask::ReplaceRules { rules: Vec::new() }.is_moot());
    }
}
