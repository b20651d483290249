//! Why a port is not free after a kill: what is found on it then.

use super::outcome::{Diagnostics, Outcome, Status};
use crate::diagnose;
use crate::source::{Scanner, netns};

/// Ports that are looked into: each costs tens of milliseconds, and many have one cause.
const MAX_PORTS: usize = 8;

/// Adds to the outcomes of ports that are stuck, taken again, or nobody's what is found there now. What cannot be looked
/// at adds nothing: the outcome stands without it.
pub(super) fn explain(outcomes: &mut [Outcome], scanner: &mut Scanner) {
    let is_strange =
        |outcome: &&mut Outcome| matches!(outcome.status, Status::Ghost | Status::Stuck | Status::Respawned);
    for outcome in outcomes.iter_mut().filter(is_strange).take(MAX_PORTS) {
        let namespace = match outcome.netns {
            0 => netns::own(),
            known => Ok(known),
        };
        let Ok(namespace) = namespace else { continue };
        let Ok(findings) = diagnose::findings(outcome.port, outcome.proto, namespace, scanner) else { continue };
        outcome.diagnostics.get_or_insert_with(Diagnostics::default).findings = findings;
    }
}
