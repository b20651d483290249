//! A subscription: what is there, then each change, and where it asked for it, first what was.

use std::sync::Arc;

use futures_util::StreamExt as _;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;

use super::{End, Identity, LAST, NO_HISTORY, Peer, READING, sifted};
use crate::agent::core::{Ask, MAX_PAST, Past, Subscription};
use crate::agent::load::{Answer, Place};
use crate::history::Utc;
use crate::model::Change;
use crate::select::{Selector, Shown};
use crate::wire::{ErrorKind, Response, Selection};

impl Peer {
    pub(super) async fn watch(
        &mut self,
        selection: Selection,
        identity: Identity,
        place: &Place,
        mut since: Option<Utc>,
    ) -> Result<(), End> {
        let Some(mut selector) = self.selector_of_now(&selection, identity, place).await? else { return Ok(()) };
        // A subscriber may stay for long.
        drop(selection);
        loop {
            // After an interruption, the past is what was told already.
            let since = since.take().map(|since| since.min(LAST));
            let turn = match since {
                Some(_) => Some(self.at_work(place.turn(Answer::History)).await?),
                None => None,
            };
            // The configuration may have been read anew.
            selector.show_only(self.shared.policy.only(identity));
            let shared = self.shared.clone();
            let ask = |selector, most, reply| Ask::Watch { selector, most, since, reply };
            let gather = shared.gather(place, turn, &selector, ask);
            let (subscription, turn) = match self.at_work(gather).await?? {
                Ok(gathered) => gathered,
                Err(untold) => return self.refuse(ErrorKind::Failed, &untold.to_string()).await,
            };
            let Subscription { at, listeners, mut changes, past } = subscription;
            let more = match (since, past) {
                (Some(_), Some(past)) => match self.tell_past(past, &selector).await? {
                    Some(more) => more,
                    None => return Ok(()),
                },
                (Some(_), None) => return self.refuse(ErrorKind::Failed, NO_HISTORY).await,
                (None, _) => false,
            };
            let listeners = self.at_work(sifted(listeners, &selector, |listener| listener)).await??;
            let mut shown = Shown::default();
            let begin = async {
                for listener in listeners {
                    shown.add(&listener);
                    self.send(&Response::Listener { listener, ancestors: Vec::new(), lineage: Vec::new() }).await?;
                }
                let narrowed = selector.shows_only().is_some();
                self.send(&Response::Watching { at, more, narrowed }).await?;
                self.flush().await
            };
            timeout(READING, begin).await.map_err(|_| End::Gone)??;
            drop(turn);
            let lost = loop {
                let change = tokio::select! {
                    change = changes.recv() => change,
                    // As a rule it hangs up.
                    said = self.lines.next() => return match said {
                        Some(_) => self.refuse(ErrorKind::Usage, "a subscriber has nothing more to say; connect anew").await,
                        None => Ok(()),
                    },
                };
                let change = match change {
                    Ok(change) => change,
                    // Those that are still there are told by the listeners that follow.
                    Err(RecvError::Lagged(lost)) => break lost + changes.len() as u64,
                    Err(RecvError::Closed) => return Err(End::Stopped),
                };
                selector.show_only(self.shared.policy.only(identity));
                let concerns = match selector.needs_facts() {
                    false => shown.concerns(&change, &selector),
                    true => {
                        let mut turn = place.turn(Answer::List).await;
                        turn.was_small();
                        let (change, selector) = (Arc::clone(&change), selector.clone());
                        let look = move || (shown.concerns(&change, &selector), shown);
                        let looked = tokio::task::spawn_blocking(look).await.map_err(|_| End::Stopped)?;
                        shown = looked.1;
                        looked.0
                    }
                };
                if concerns {
                    let change = seen_by(&selector, Change::clone(&change));
                    self.send(&Response::Change { change }).await?;
                }
                if changes.is_empty() {
                    self.flush().await?;
                }
            };
            self.send(&Response::Lagged { lost }).await?;
        }
    }

    /// Tells of the past, and says whether some was left out; `None` where it cannot be told, of which the peer was told.
    async fn tell_past(&mut self, past: Past, selector: &Selector) -> Result<Option<bool>, End> {
        let mut changes = match self.at_work(past).await? {
            Ok(Ok(changes)) => changes,
            Ok(Err(error)) => {
                self.refuse(ErrorKind::Failed, &format!("{error:#}")).await?;
                return Ok(None);
            }
            Err(_) => {
                self.refuse(ErrorKind::Busy, "the history is too far behind to be replayed; try again later").await?;
                return Ok(None);
            }
        };
        let more = changes.len() > MAX_PAST;
        let wanted = selector.clone();
        // To look through all of them takes time.
        let sift = move || {
            let (mut shown, mut told) = (Shown::default(), changes.split_off(usize::from(more)));
            told.retain(|change| shown.concerns(change, &wanted));
            told
        };
        let told = self.at_work(tokio::task::spawn_blocking(sift)).await?.map_err(|_| End::Stopped)?;
        let tell = async {
            for change in told {
                self.send(&Response::Past { change: seen_by(selector, change) }).await?;
            }
            Ok(Some(more))
        };
        timeout(READING, tell).await.map_err(|_| End::Gone)?
    }
}

/// Without the listener in the way of a bind, and without who held what has closed, where that is nothing that the peer
/// may see.
fn seen_by(selector: &Selector, mut change: Change) -> Change {
    match &mut change {
        Change::Conflict { held_by, .. } => drop(held_by.take_if(|listener| !selector.may_see(listener))),
        Change::Closed { listener, by, .. } if !selector.may_see(listener) => {
            listener.holders.clear();
            *by = None;
        }
        _ => {}
    }
    change
}
