//! What a rule does when it fires: by the same way as every kill, for this one socket and nothing else.

use anyhow::Context as _;

use super::{Action, Rule};
use crate::kill::plan::same_socket;
use crate::kill::{Choice, Guards, Job, Options, Outcome, Terms};
use crate::model::Listener;
use crate::select::{Filters, Selector, Target};
use crate::source::{Scanner, origin, process};

/// What a rule did.
#[derive(Debug)]
pub struct Enforced {
    /// What was to be ended, as it was found; empty where it was gone already, or is not met by the rule any more.
    pub listeners: Vec<Listener>,
    pub outcomes: Vec<Outcome>,
}

/// Rules may know what root may: it is root's configuration that asks.
pub(super) fn with_facts(selector: Selector) -> Selector {
    selector.with_facts(origin::facts(0))
}

/// Lets the rule fire for a listener that is old enough. Reads who has the socket now: nothing happens where that is
/// another one on the same port, or it does not meet the rule any more. `dry_run`, and what is to be reported only, ends
/// nothing. Blocks, for the rule's grace and a little more.
///
/// # Errors
/// When the host cannot be scanned. Signals may have been sent by then.
pub fn enforce(rule: &Rule, listener: &Listener, scanner: &mut Scanner, dry_run: bool) -> anyhow::Result<Enforced> {
    let socket = &listener.socket;
    let target = Target { address: None, ports: socket.port..=socket.port, proto: Some(socket.proto) };
    let here = Filters { netns: Some(socket.netns), ..Filters::default() };
    let mut choice = Choice::read(scanner, &Selector::new(vec![target], here)).context("cannot look at the port")?;
    let now = process::boot_ns_now();
    let selector = with_facts(rule.selector.clone());
    let is_meant = |found: &Listener| same_socket(found.socket.id, socket.id) && selector.matches(found, now);
    let (meant, others): (Vec<_>, Vec<_>) = choice.selected.into_iter().partition(is_meant);
    choice.selected = meant;
    choice.left_out.extend(others);
    // Nobody asked for the port to be free.
    choice.named.clear();
    if choice.selected.is_empty() {
        return Ok(Enforced { listeners: Vec::new(), outcomes: Vec::new() });
    }
    let job = Job::prepare(choice, &Terms::default(), Guards::current(false))?.removing(rule.remove_cwd.clone());
    let listeners = job.plan().listeners.clone();
    let outcomes = if dry_run || rule.action == Action::Report {
        job.planned()
    } else {
        job.run(scanner, Options { grace: rule.grace, ..Options::default() }, &mut |_| {})?
    };
    Ok(Enforced { listeners, outcomes })
}
