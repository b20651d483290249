//! Which changes concern a selection: those that it picks, and whatever becomes of what it picked once.

use std::collections::HashSet;

use super::Selector;
use crate::model::{Attempt, BootNs, Change, Holder, Listener, Socket, SocketId};

/// The listeners shown as open: whatever becomes of them is shown too, also when those who were asked for have let go.
#[derive(Debug, Default)]
pub struct Shown(HashSet<SocketKey>);

/// The cookie, or the inode where there is none; a later change may know more, so both are kept.
type SocketKey = (bool, u64);

impl Shown {
    /// It was open before.
    pub fn add(&mut self, listener: &Listener) {
        self.0.extend(Self::keys(listener.socket.id));
    }

    /// Whether the one who watches asked for this, or was shown how it began.
    pub fn concerns(&mut self, change: &Change, selector: &Selector) -> bool {
        match change {
            Change::Opened { at, listener } | Change::Holders { at, listener } => {
                let concerns = Self::selects(selector, listener, *at);
                let keys = Self::keys(listener.socket.id);
                if concerns {
                    self.0.extend(keys.clone());
                }
                // What was given to another user is not told of any more, but that it closes.
                concerns || (selector.may_see(listener) && keys.into_iter().any(|key| self.0.contains(&key)))
            }
            Change::Closed { at, listener, by } => {
                let mut known = false;
                for key in Self::keys(listener.socket.id) {
                    known |= self.0.remove(&key);
                }
                let by = by.as_ref().is_some_and(|by| {
                    selector.matches_socket(&listener.socket) && selector.matches_process(by, &listener.socket)
                });
                known || (by && selector.may_see(listener)) || Self::selects(selector, listener, *at)
            }
            Change::Conflict { at, attempt, .. } => Self::selects(selector, &wanted(attempt), *at),
            Change::Resync { .. } => true,
        }
    }

    fn selects(selector: &Selector, listener: &Listener, at: BootNs) -> bool {
        selector.matches_socket(&listener.socket) && selector.matches(listener, at)
    }

    fn keys(id: SocketId) -> Vec<SocketKey> {
        [(true, id.cookie), (false, id.inode)].into_iter().filter(|(_, number)| *number != 0).collect()
    }
}

/// The listener that the failed bind would have made.
fn wanted(attempt: &Attempt) -> Listener {
    Listener {
        socket: Socket {
            id: SocketId::default(),
            proto: attempt.proto,
            mptcp: false,
            address: attempt.address,
            port: attempt.port,
            v6only: None,
            netns: attempt.netns,
            uid: attempt.by.uid.unwrap_or_default(),
            backlog: None,
        },
        since: None,
        holders: vec![Holder { process: attempt.by.clone(), fds: Vec::new(), binder: true }],
    }
}
