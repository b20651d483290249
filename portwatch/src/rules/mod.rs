//! Standing rules: servers that are ended, or told of, once they are old enough.
//!
//! ```text
//!  Change ─► Queue ─(deadline)─► enforce ─► kill::Job ─► Outcomes
//!            pure: which rule meets which listener, and when   re-read, proved, ended
//! ```
//! Owns what a rule is, when it fires ([`queue`], pure) and what it does then ([`enforce`]). The configuration makes rules
//! ([`crate::config::rules`]), the agent keeps the queue and waits for its next deadline. Nothing is polled: when a rule
//! fires follows from when the listener began, which a change of the table tells once.

mod enforce;
pub mod queue;

use std::time::Duration;

use globset::GlobMatcher;
use serde::{Deserialize, Serialize};

pub use self::enforce::{Enforced, enforce};
pub use self::queue::Queue;
use crate::model::{BootNs, Listener};
use crate::select::Selector;
use crate::wire::Selection;

/// What becomes of servers of a kind that are older than they should be.
#[derive(Clone, Debug)]
pub struct Rule {
    pub name: String,
    /// Which servers, whatever their age. Names something: [`Selector::is_empty`] is false.
    pub selector: Selector,
    /// How long they may listen; where it is not known when that began, how long their process may run.
    pub older_than: Duration,
    pub action: Action,
    /// How long they have to end before they get SIGKILL.
    pub grace: Duration,
    /// Which of their working directories are removed ([`crate::sweep`]).
    pub remove_cwd: Option<GlobMatcher>,
}

impl Rule {
    /// Whether it meets the listener as far as is known without looking things up of its holders.
    pub fn may_meet(&self, listener: &Listener) -> bool {
        // Age is not among what the selector asks.
        self.selector.clone().without_facts().matches(listener, 0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    Kill,
    /// Only the log is told.
    Report,
}

/// A rule, what it meets now and when it fires.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub name: String,
    pub action: Action,
    pub selection: Selection,
    pub older_than_ms: u64,
    pub grace_ms: u64,
    pub remove_cwd: Option<String>,
    /// Whether it only tells what it would do.
    pub dry_run: bool,
    /// Sorted by when it fires.
    pub matches: Vec<Match>,
}

impl State {
    /// Leaves out what waits for its age and is not met by its holders, at which the [`Queue`] does not look. May read a few
    /// files of /proc for each match.
    pub fn look(&mut self) {
        // The selection is one of a rule that was read: it means something, and names its namespace.
        let Ok(selector) = self.selection.selector(None) else { return };
        let selector = enforce::with_facts(selector);
        self.matches.retain(|it| selector.matches(&it.listener, 0));
    }
}

/// A listener that a rule meets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Match {
    pub listener: Listener,
    /// When it fires, or fires again; `None`: never, for its age is not known, or it was reported.
    pub at: Option<BootNs>,
    /// Whether it fired already: what was to be ended is still there.
    pub fired: bool,
}
