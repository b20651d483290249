//! What `/proc` tells of where a process comes from, for the selectors that ask for it.

use crate::model::ProcessId;
use crate::select::{Facts, Family, Relative};

use super::process;
use super::stat::{self, Stat};

/// What `reader` may know: the environment of its own processes; root's is everybody's.
pub fn facts(reader: u32) -> Facts {
    Facts { reader, environment: process::environment_for, family }
}

/// Of whom it cannot be told out of whom it came, for they are too many, nothing is.
fn family(id: ProcessId) -> Option<Family> {
    let own = stat::read(id.pid).ok().filter(|own| own.id().is_same(id))?;
    let ancestors = stat::nearest(id.pid, &|pid| stat::read(pid).ok());
    let relative = |stat: Stat| Relative { id: stat.id(), name: stat.name };
    (ancestors.len() < stat::GENERATIONS)
        .then(|| Family { session: own.session, ancestors: ancestors.into_iter().map(relative).collect() })
}
