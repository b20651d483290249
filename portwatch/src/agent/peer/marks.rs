//! Marks by name, which the agent keeps for whoever asks.

use std::path::Path;

use anyhow::Context as _;

use super::{End, FEW, Identity, Peer};
use crate::agent::core::Ask;
use crate::agent::load::{Answer, Place, Turn};
use crate::mark::store::Store;
use crate::mark::{Mark, file, is_name};
use crate::select::{Filters, Selector};
use crate::source::process;
use crate::wire::{ErrorKind, Response};

const BAD_NAME: &str = "a mark's name has up to 64 letters, digits and ._-";

impl Peer {
    pub(super) async fn mark(&mut self, name: String, identity: Identity, place: &Place) -> Result<(), End> {
        if !is_name(&name) {
            return self.refuse(ErrorKind::Usage, BAD_NAME).await;
        }
        // Not of its network namespace alone: whoever reads it may mean another.
        let mut selector = Selector::new(Vec::new(), Filters::default());
        selector.show_only(self.shared.policy.only(identity));
        let turn = self.at_work(place.turn(Answer::History)).await?;
        let shared = self.shared.clone();
        let ask = shared.ask(|reply| Ask::List { selector: Box::new(selector), most: usize::MAX, reply });
        let listeners = match self.at_work(ask).await?? {
            Ok(listeners) => listeners,
            Err(untold) => return self.refuse(ErrorKind::Failed, &untold.to_string()).await,
        };
        let marks = self.shared.marks.to_path_buf();
        let keep = move || {
            // After the list: whoever is in it ran before.
            let mark = Mark::new(&listeners, identity.uid, file::boot_id()?, &crate::agent::clock());
            open_marks(&marks)?.keep(identity.uid, &name, &mark.line()?)?;
            Ok(Some(mark))
        };
        self.answer_with_mark(keep, "cannot keep the mark", turn).await
    }

    pub(super) async fn marked(&mut self, name: String, identity: Identity, place: &Place) -> Result<(), End> {
        if !is_name(&name) {
            return self.refuse(ErrorKind::Usage, BAD_NAME).await;
        }
        let marks = self.shared.marks.to_path_buf();
        let find = move || {
            let Some(bytes) = open_marks(&marks)?.find(identity.uid, &name)? else { return Ok(None) };
            Ok(Some(Mark::read(&bytes, &file::boot_id()?, process::boot_ns_now())?))
        };
        let turn = self.at_work(place.turn(Answer::History)).await?;
        self.answer_with_mark(find, "the mark", turn).await
    }

    /// Files block: not this thread, which has a table to keep.
    async fn answer_with_mark(
        &mut self,
        work: impl FnOnce() -> anyhow::Result<Option<Mark>> + Send + 'static,
        what: &str,
        mut turn: Turn<'_>,
    ) -> Result<(), End> {
        match self.at_work(tokio::task::spawn_blocking(work)).await?.map_err(|_| End::Stopped)? {
            Ok(mark) => {
                if mark.as_ref().is_none_or(|mark| mark.listeners.len() <= FEW) {
                    turn.was_small();
                }
                self.send(&Response::Mark { mark: mark.map(Box::new) }).await?;
                self.send(&Response::End { count: 1, more: false, narrowed: false }).await?;
                self.flush().await
            }
            Err(error) => self.refuse(ErrorKind::Failed, &format!("{what}: {error:#}")).await,
        }
    }
}

fn open_marks(path: &Path) -> anyhow::Result<Store> {
    let (Some(base), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        anyhow::bail!("{} is no directory for marks", path.display());
    };
    let euid = rustix::process::geteuid().as_raw();
    Store::open(base, &[name], euid).with_context(|| format!("cannot open {}", path.display()))
}
