//! The agent's rules: waits for the next deadline, and lets rules fire on a thread of their own.
//!
//! ```text
//!  Core ─► Queue ─(one timer, for the next deadline)─► Core ─► job ─► thread "rules" ─► done ─► Core: log, history, metrics
//! ```
//! Without a rule that is due there is no timer, and nothing wakes; the thread sleeps until it is given a job.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc as channel;

use crate::kill::text;
use crate::model::{BootNs, Change, Listener};
use crate::rules::queue::Due;
use crate::rules::{self, Enforced, Queue, Rule, State};
use crate::source::{Probe, Scanner, process};

/// What a rule is to do, and what it did.
#[derive(Debug)]
struct Job {
    rule: Rule,
    listener: Listener,
    dry_run: bool,
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
    dry_run: bool,
    probe: Probe,
    /// `None` before a rule fires for the first time.
    jobs: Option<Sender<Job>>,
    done: (channel::UnboundedSender<Done>, channel::UnboundedReceiver<Done>),
}

impl Rules {
    /// No rules yet. `dry_run`: they tell what they would do, and do nothing.
    pub(super) fn new(dry_run: bool, probe: Probe) -> Rules {
        Rules { queue: Queue::default(), dry_run, probe, jobs: None, done: channel::unbounded_channel() }
    }

    /// Other rules from now on; `listeners` are all of the table. What was begun under the old ones is finished.
    pub(super) fn replace<'a>(&mut self, rules: Vec<Rule>, listeners: impl IntoIterator<Item = &'a Listener>) {
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
            Some(done) = self.done.1.recv() => Step::Done(Box::new(done)),
            () = until(self.queue.next()) => Step::Due,
        }
    }

    /// What is due now.
    pub(super) fn take_due(&mut self) -> Vec<Due> {
        self.queue.take_due(process::boot_ns_now())
    }

    /// Lets a rule fire for a listener, after those that fired before.
    ///
    /// # Errors
    /// Where the thread cannot be started.
    pub(super) fn fire(&mut self, rule: Rule, listener: Listener) -> anyhow::Result<()> {
        let jobs = match self.jobs.take() {
            Some(jobs) => jobs,
            None => self.start().context("cannot start the thread of the rules; raise the limit of threads")?,
        };
        let sent = jobs.send(Job { rule, listener, dry_run: self.dry_run });
        // The next one starts it anew.
        sent.map_err(|_| anyhow::anyhow!("the thread of the rules has ended"))?;
        self.jobs = Some(jobs);
        Ok(())
    }

    fn start(&self) -> std::io::Result<Sender<Job>> {
        let (jobs, work) = mpsc::channel();
        let (done, probe) = (self.done.0.clone(), self.probe);
        thread::Builder::new().name("rules".to_owned()).spawn(move || carry_out(&work, &done, probe))?;
        Ok(jobs)
    }
}

fn carry_out(jobs: &Receiver<Job>, done: &channel::UnboundedSender<Done>, probe: Probe) {
    let mut scanner = Scanner::open(probe);
    while let Ok(Job { rule, listener, dry_run }) = jobs.recv() {
        let at = process::boot_ns_now();
        let result = rules::enforce(&rule, &listener, &mut scanner, dry_run);
        // The agent ends: nobody is there to be told.
        if done.send(Done { at, rule, listener, dry_run, result }).is_err() {
            return;
        }
    }
}

/// By the clock of deadlines, which goes on while the host sleeps, as the timer's does not: after that the rule is late
/// until something happens, by at most as long as the host slept.
async fn until(deadline: Option<BootNs>) {
    match deadline {
        Some(at) => tokio::time::sleep(Duration::from_nanos(at.saturating_sub(process::boot_ns_now()))).await,
        None => std::future::pending().await,
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
