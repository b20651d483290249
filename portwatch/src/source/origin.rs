//! What `/proc` tells of where a process comes from, for the selectors that ask for it.

use crate::model::ProcessId;
use crate::select::{Facts, Family, Relative};

use super::{process, stat};

/// What `reader` may know: the environment of its own processes; root's is everybody's.
pub fn facts(reader: u32) -> Facts {
    Facts { reader, environment: process::environment_for, family }
}

fn family(id: ProcessId) -> Option<Family> {
    let own = stat::read(id.pid).ok().filter(|own| own.id().is_same(id))?;
    let relative = |pid| stat::read(pid).ok().map(|stat| Relative { id: stat.id(), name: stat.name });
    let ancestors = stat::ancestors(id.pid, &|pid| stat::read(pid).ok());
    Some(Family { session: own.session, ancestors: ancestors.into_iter().filter_map(relative).collect() })
}
