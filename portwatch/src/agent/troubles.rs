//! What is not as it should be, for `status`, the log and the service manager.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::service;

/// What a trouble is about: there is one at a time of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum About {
    Configuration,
    Socket,
    Table,
}

/// Shared by all parts of the agent.
#[derive(Clone, Debug, Default)]
pub(super) struct Troubles(Rc<RefCell<BTreeMap<About, String>>>);

impl Troubles {
    /// Takes in how it is now; tells what is new of it.
    pub(super) fn set(&self, about: About, trouble: Option<String>) {
        let mut troubles = self.0.borrow_mut();
        let before = match &trouble {
            Some(trouble) => troubles.insert(about, trouble.clone()),
            None => troubles.remove(&about),
        };
        match (before, trouble) {
            (before, Some(now)) if before.as_ref() != Some(&now) => {
                tracing::warn!("{now}");
                service::status(&now);
            }
            (Some(before), None) => {
                tracing::info!("no longer: {before}");
                service::status(troubles.values().next().map_or(super::WELL, |other| other));
            }
            _ => {}
        }
    }

    /// Sentences for people.
    pub(super) fn told(&self) -> Vec<String> {
        self.0.borrow().values().cloned().collect()
    }
}
