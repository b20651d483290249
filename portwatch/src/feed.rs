//! Changes as they happen: from the agent where one answers, else from probes of our own.

use crate::client::Subscription;
use crate::model::{Change, Listener};
use crate::tracker::Tracker;

/// Where changes come from.
#[derive(Debug)]
pub enum Feed {
    Agent(Box<Subscription>),
    Own(Box<Tracker>),
}

impl Feed {
    /// Cancel safe. There are none where the table was only confirmed.
    pub async fn next(&mut self) -> anyhow::Result<Vec<Change>> {
        match self {
            Feed::Agent(subscription) => subscription.next().await,
            Feed::Own(tracker) => {
                let changes = tracker.next().await?;
                // The agent goes on and says so in its status; here there is nobody to ask.
                tracker.trouble().map_or(Ok(changes), |trouble| Err(anyhow::anyhow!("{trouble}")))
            }
        }
    }

    /// What is open now.
    pub fn listeners(&self) -> Vec<&Listener> {
        match self {
            Feed::Agent(subscription) => subscription.listeners().collect(),
            Feed::Own(tracker) => tracker.table().listeners().collect(),
        }
    }
}
