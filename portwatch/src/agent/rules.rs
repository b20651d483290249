//! The agent's rules: waits for the next deadline, and lets rules fire on a thread of their own.
//!
//! ```text
//!  Core ─► Queue ─(one timer, for the next deadline)─► Core ─► job ─► thread "rules" ─► done ─► Core: log, history, metrics
//! ```
//! Without a rule that is due there is no timer, and nothing wakes; the thread sleeps until it is given a job.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use anyhow::Context as _;
use tokio::sync::mpsc as channel;

use super::alarm::Alarm;
use crate::kill::text;
use crate::model::{BootNs, Change, Listener, SocketId};
use crate::rules::queue::Due;
use crate::rules::{self, Enforced, Queue, Rule, State};
use crate::select::Selector;
use crate::source::{Probe, Scanner, process};

/// What a rule is to do, and what it did.
#[derive(Debug)]
struct Job {
    rule: Rule,
    listener: Listener,
    dry_run: bool,
    /// Of which rules it is one.
    generation: u64,
}

/// A rule that fired.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) at: BootNs,
    pub(super) rule: Rule,
    pub(super) listener: Listener,
    pub(super) dry_run: bool,
    pub(super) result: anyhow::Result<Enforced>,
}

/// What is to be done about rules.
#[derive(Debug)]
pub(super) enum Step {
    /// Some are due.
    Due,
    Done(Box<Done>),
}

/// The rules of the agent. Belongs to the task that owns the table.
#[derive(Debug)]
pub(super) struct Rules {
    queue: Queue,
    alarm: Alarm,
    dry_run: bool,
    probe: Probe,
    /// `None` before a rule fires for the first time.
    jobs: Option<(Sender<Job>, JoinHandle<()>)>,
    /// Grows whenever the rules are replaced. The thread sees it: what is not begun by then is not begun any more.
    generation: Arc<AtomicU64>,
    /// What was given to the thread and is not done: it is not given once more while it waits there.
    pending: HashSet<(String, SocketId)>,
    done: (channel::UnboundedSender<Done>, channel::UnboundedReceiver<Done>),
}

impl Rules {
    /// No rules yet. `dry_run`: they tell what they would do, and do nothing.
    pub(super) fn new(dry_run: bool, probe: Probe) -> Rules {
        Rules {
            queue: Queue::default(),
            alarm: Alarm::default(),
            dry_run,
            probe,
            jobs: None,
            generation: Arc::default(),
            pending: HashSet::new(),
            done: channel::unbounded_channel(),
        }
    }

    /// Other rules from now on; `listeners` are all of the table. What was begun under the old ones is finished, and
    /// nothing else of theirs is done.
    pub(super) fn replace<'a>(&mut self, rules: Vec<Rule>, listeners: impl IntoIterator<Item = &'a Listener>) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.pending.clear();
        self.queue.replace(rules, listeners);
    }

    pub(super) fn change(&mut self, change: &Change) {
        self.queue.change(change);
    }

    pub(super) fn states<'a>(&self, listeners: impl IntoIterator<Item = &'a Listener>) -> Vec<State> {
        self.queue.states(listeners, self.dry_run)
    }

    /// Waits until there is something to do. Cancel safe.
    pub(super) async fn next(&mut self) -> Step {
        tokio::select! {
            Some(done) = self.done.1.recv() => {
                self.pending.remove(&(done.rule.name.clone(), done.listener.socket.id));
                if done.result.as_ref().is_ok_and(|done| done.listeners.is_empty()) {
                    self.does_not_meet(&done.rule.name, done.listener.socket.id);
                }
                Step::Done(Box::new(done))
            }
            () = self.alarm.until(self.queue.next()) => Step::Due,
        }
    }

    /// What is due now.
    pub(super) fn take_due(&mut self) -> Vec<Due> {
        self.queue.take_due(process::boot_ns_now())
    }

    /// What was due is not met by the rule.
    pub(super) fn does_not_meet(&mut self, rule: &str, id: SocketId) {
        self.queue.does_not_meet(rule, id, process::boot_ns_now());
    }

    pub(super) fn selectors(&self) -> impl Iterator<Item = &Selector> {
        self.queue.rules().iter().map(|rule| &rule.selector)
    }

    /// Lets a rule fire for a listener, after those that fired before.
    ///
    /// # Errors
    /// Where the thread cannot be started.
    pub(super) fn fire(&mut self, rule: Rule, listener: Listener) -> anyhow::Result<()> {
        let id = (rule.name.clone(), listener.socket.id);
        if self.jobs.as_ref().is_some_and(|(_, thread)| thread.is_finished()) {
            // What it was given is lost, and due again.
            self.jobs = None;
            self.pending.clear();
        }
        // Those before it take their time, or it does itself.
        if self.pending.contains(&id) {
            return Ok(());
        }
        let (jobs, thread) = match self.jobs.take() {
            Some(jobs) => jobs,
            None => self.start().context("cannot start the thread of the rules; raise the limit of threads")?,
        };
        let generation = self.generation.load(Ordering::SeqCst);
        let sent = jobs.send(Job { rule, listener, dry_run: self.dry_run, generation });
        // The next one starts it anew.
        sent.map_err(|_| anyhow::anyhow!("the thread of the rules has ended"))?;
        self.pending.insert(id);
        self.jobs = Some((jobs, thread));
        Ok(())
    }

    fn start(&self) -> std::io::Result<(Sender<Job>, JoinHandle<()>)> {
        let (jobs, work) = mpsc::channel();
        let (done, probe, now) = (self.done.0.clone(), self.probe, Arc::clone(&self.generation));
        let thread = thread::Builder::new().name("rules".to_owned());
        Ok((jobs, thread.spawn(move || carry_out(&work, &done, &now, probe))?))
    }
}

fn carry_out(jobs: &Receiver<Job>, done: &channel::UnboundedSender<Done>, current: &AtomicU64, probe: Probe) {
    let mut scanner = Scanner::open(probe);
    while let Ok(Job { rule, listener, dry_run, generation }) = jobs.recv() {
        if generation != current.load(Ordering::SeqCst) {
            continue;
        }
        let at = process::boot_ns_now();
        let result = rules::enforce(&rule, &listener, &mut scanner, dry_run);
        // The agent ends: nobody is there to be told.
        if done.send(Done { at, rule, listener, dry_run, result }).is_err() {
            return;
        }
    }
}

impl Done {
    /// Tells the log. Text of processes goes into fields, or is escaped.
    pub(super) fn log(&self) {
        let (rule, address) = (self.rule.name.as_str(), self.listener.socket.endpoint());
        let binder = self.listener.binder();
        let pid = binder.map_or(0, |holder| holder.process.id.pid);
        let name = binder.map_or("", |holder| holder.process.name.as_str());
        match &self.result {
            Err(error) => tracing::error!(rule, %address, pid, name, "a rule failed: {error:#}"),
            Ok(Enforced { outcomes, .. }) if outcomes.is_empty() => {
                tracing::debug!(rule, %address, pid, name, "what a rule met is gone, or changed meanwhile");
            }
            Ok(Enforced { outcomes, .. }) => {
                for outcome in outcomes {
                    let (line, directories) = (text::outcome(outcome), text::directories(outcome));
                    let directories = directories.lines().map(str::trim).collect::<Vec<_>>().join(", ");
                    let parts = [line, directories].into_iter().filter(|part| !part.is_empty());
                    let line = parts.collect::<Vec<_>>().join("; ");
                    match self.dry_run || outcome.is_done() {
                        true => tracing::info!(rule, %address, pid, name, "{line}"),
                        false => tracing::warn!(rule, %address, pid, name, "{line}"),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::Socket;
    use crate::rules::Action;
    use crate::select::{Filters, Target};
    use crate::source::Tier;

    const POLL: Probe = Probe::Only(Tier::Poll);

    /// A rule for a listener that is not there.
    fn due(number: u64) -> (Rule, Listener) {
        let nobody = Target { address: None, ports: 1..=1, proto: None };
        let rule = Rule {
            name: "x".to_owned(),
            selector: Selector::new(vec![nobody], Filters::default()),
            older_than: Duration::ZERO,
            action: Action::Kill,
            grace: Duration::ZERO,
            remove_cwd: None,
        };
        let id = SocketId { inode: u64::MAX - number, cookie: u64::MAX - number };
        let socket = Socket { id, ..Socket::example("127.0.0.1", 1) };
        (rule, Listener { socket, since: None, holders: Vec::new() })
    }

    #[test]
    fn what_waits_when_the_rules_are_replaced_is_not_done() {
        let (jobs, work) = mpsc::channel();
        let (done, mut told) = channel::unbounded_channel();
        for (number, generation) in [(0, 6), (1, 7), (2, 6)] {
            let (rule, listener) = due(number);
            jobs.send(Job { rule, listener, dry_run: false, generation }).unwrap();
        }
        drop(jobs);
        carry_out(&work, &done, &AtomicU64::new(7), POLL);
        drop(done);
        let told: Vec<u64> =
            std::iter::from_fn(|| told.blocking_recv()).map(|done| u64::MAX - done.listener.socket.id.inode).collect();
        assert_eq!(told, [1]);
    }

    #[test]
    fn what_waits_is_not_given_to_the_thread_once_more() {
        let mut rules = Rules::new(true, POLL);
        let fire = |rules: &mut Rules, number| {
            let (rule, listener) = due(number);
            rules.fire(rule, listener).unwrap();
        };
        [1, 1, 2].into_iter().for_each(|number| fire(&mut rules, number));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let next = |rules: &mut Rules| match runtime.block_on(rules.next()) {
            Step::Done(done) => u64::MAX - done.listener.socket.id.inode,
            Step::Due => panic!("no rule is due"),
        };
        assert_eq!([next(&mut rules), next(&mut rules)], [1, 2]);
        // It is still there, and due again.
        fire(&mut rules, 1);
        assert_eq!(next(&mut rules), 1);
    }
}
