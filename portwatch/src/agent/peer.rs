//! One connection: who it is, what it asks, and that it stays within bounds.

use std::convert::Infallible;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::{SinkExt, StreamExt as _};
use tokio::net::UnixStream;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::codec::{Framed, LinesCodec, LinesCodecError};

use super::AlreadyRunning;
use super::access::Identity;
use super::core::{Ask, MAX_PAST, Past, Subscription};
use super::kill::{self, Kills};
use super::load::{Answer, Load, Place, Turn};
use super::policy::Policy;
use super::socket::Socket;
use crate::history::{self, Lives, Reader, Utc};
use crate::mark::store::Store;
use crate::mark::{Mark, file, is_name};
use crate::model::{Ancestor, Change, Listener};
use crate::select::{Filters, Selector, Shown};
use crate::source::{origin, process, stat};
use crate::wire::{ErrorKind, Kill, MAX_REQUEST, Request, Response, Selection, VERSION};

/// How long a peer may stay silent between two requests (a subscriber may for ever).
const SILENCE: Duration = Duration::from_secs(60);

/// How long somebody may think about a plan.
const QUESTION: Duration = Duration::from_secs(600);

/// How long a peer may take to read an answer's next piece.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a peer may take to read the whole of an answer that others wait for.
const READING: Duration = Duration::from_secs(30);

/// After a failed accept, such as for want of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Lives that one answer about history tells at most.
const MAX_LIVES: usize = 10_000;

/// Listeners that any connection may have in memory. An answer of more waits for its turn.
const FEW: usize = 64;

/// Bytes of answers that are gathered before they are written, and that the kernel keeps until they are read (it takes
/// twice as many for what they come in).
const BUFFER: usize = 16 << 10;
const KERNEL_BUFFER: usize = 32 << 10;

const NO_HISTORY: &str = "this agent keeps no history";

const BAD_NAME: &str = "a mark's name has up to 64 letters, digits and ._-";

/// What all connections share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) asks: mpsc::Sender<Ask>,
    pub(super) load: Load,
    pub(super) kills: Kills,
    pub(super) policy: Policy,
    /// The directory of marks.
    pub(super) marks: Rc<Path>,
}

/// Takes connections for ever, each served by a task of its own. Needs a [`tokio::task::LocalSet`].
///
/// # Errors
/// [`AlreadyRunning`], where another agent has taken the place of this one.
pub(super) async fn accept(mut socket: Socket, shared: Shared) -> anyhow::Result<Infallible> {
    loop {
        let stream = match socket.accept().await {
            Ok(stream) => stream,
            Err(error) if error.is::<AlreadyRunning>() => return Err(error),
            // Out of descriptors, as a rule: those who are served go on, and give some back.
            Err(_) => {
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let shared = shared.clone();
        tokio::task::spawn_local(async move {
            let Ok(identity) = Identity::of(&stream) else { return };
            // What peers do not read counts as ours. Where it cannot be less, it is what the kernel allows everybody.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(&stream, KERNEL_BUFFER);
            let place = shared.load.enter(identity.uid);
            let mut peer = Peer::new(stream, shared);
            // Whatever ends a connection, there is nobody to tell but the one who is gone.
            let _ = match place {
                Some(place) => peer.serve(identity, &place).await,
                None => peer.refuse(ErrorKind::Busy, "too many connections; try again later").await,
            };
        });
    }
}

struct Peer {
    lines: Framed<UnixStream, LinesCodec>,
    shared: Shared,
}

/// Why a connection ends.
#[derive(Debug)]
enum End {
    /// The peer is gone, was silent for too long, or does not read.
    Gone,
    /// The agent ends.
    Stopped,
}

impl From<LinesCodecError> for End {
    fn from(_: LinesCodecError) -> Self {
        End::Gone
    }
}

impl From<oneshot::error::RecvError> for End {
    fn from(_: oneshot::error::RecvError) -> Self {
        End::Stopped
    }
}

impl Peer {
    fn new(stream: UnixStream, shared: Shared) -> Peer {
        let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(MAX_REQUEST));
        lines.set_backpressure_boundary(BUFFER);
        Peer { lines, shared }
    }

    async fn serve(&mut self, identity: Identity, place: &Place) -> Result<(), End> {
        let mut greeted = false;
        loop {
            let Some(request) = self.read(SILENCE, place).await? else { continue };
            match request {
                Request::Hello { version: VERSION } => {
                    greeted = true;
                    let status = self.status().await?;
                    let hello = Response::Hello {
                        version: VERSION,
                        program: status.program,
                        pid: status.pid,
                        tier: status.tier,
                    };
                    self.send(&hello).await?;
                    self.flush().await?;
                }
                Request::Hello { version } => {
                    let message = format!("this agent speaks version {VERSION} of the protocol, not {version}");
                    return self.refuse(ErrorKind::Version, &message).await;
                }
                _ if !greeted => {
                    let first = r#"the first line must be {"request":"hello","version":1}"#;
                    return self.refuse(ErrorKind::Usage, first).await;
                }
                Request::List { selection } => self.list(&selection, identity, place).await?,
                Request::Who { selection } => self.who(&selection, identity, place).await?,
                Request::History { selection, from, limit } => {
                    self.history(&selection, identity, place, from, limit).await?;
                }
                Request::Mark { name } => self.mark(name, identity, place).await?,
                Request::Marked { name } => self.marked(name, identity, place).await?,
                Request::Kill(kill) => self.kill(*kill, identity, place).await?,
                Request::Confirm {} => self.refuse(ErrorKind::Usage, "there is no plan to confirm").await?,
                Request::Rules {} => self.rules(identity, place).await?,
                Request::Watch { selection, since } => return self.watch(&selection, identity, place, since).await,
                Request::Status {} => {
                    let status = self.status().await?;
                    self.send(&Response::Status(status)).await?;
                    self.send(&Response::End { count: 1, more: false }).await?;
                    self.flush().await?;
                }
            }
        }
    }

    /// The next request; `None` for one that means nothing, of which the peer was told.
    async fn read(&mut self, patience: Duration, place: &Place) -> Result<Option<Request>, End> {
        let line = match timeout(patience, self.lines.next()).await {
            Ok(Some(Ok(line))) => line,
            Ok(Some(Err(LinesCodecError::MaxLineLengthExceeded))) => {
                let message = format!("a request may have {MAX_REQUEST} bytes");
                self.refuse(ErrorKind::Usage, &message).await?;
                return Err(End::Gone);
            }
            _ => return Err(End::Gone),
        };
        if !place.may_ask() {
            self.refuse(ErrorKind::Busy, "too many requests a second; try again later").await?;
            return Err(End::Gone);
        }
        match serde_json::from_str(&line) {
            Ok(request) => Ok(Some(request)),
            Err(error) => {
                self.refuse(ErrorKind::Usage, &format!("not a request: {error}")).await?;
                Ok(None)
            }
        }
    }

    async fn refuse(&mut self, kind: ErrorKind, message: &str) -> Result<(), End> {
        self.send(&Response::Error { kind, message: message.to_owned() }).await?;
        self.flush().await
    }

    async fn send(&mut self, response: &Response) -> Result<(), End> {
        let line = serde_json::to_string(response).map_err(|_| End::Gone)?;
        timeout(PATIENCE, self.lines.feed(line)).await.map_err(|_| End::Gone)??;
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), End> {
        timeout(PATIENCE, SinkExt::<String>::flush(&mut self.lines)).await.map_err(|_| End::Gone)??;
        Ok(())
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, End> {
        let (reply, answer) = oneshot::channel();
        self.shared.asks.send(ask(reply)).await.map_err(|_| End::Stopped)?;
        Ok(answer.await?)
    }

    async fn status(&self) -> Result<crate::wire::Status, End> {
        self.ask(|reply| Ask::Status { reply }).await
    }

    /// What the selection means of what the peer may see; `None` where it means nothing, of which the peer was told.
    async fn selector(&mut self, selection: &Selection, identity: Identity) -> Result<Option<Selector>, End> {
        match selection.selector(identity.netns) {
            Ok(mut selector) => {
                selector.show_only(self.shared.policy.only(identity));
                Ok(Some(selector.with_facts(origin::facts(identity.uid))))
            }
            Err(message) => {
                self.refuse(ErrorKind::Usage, &message).await?;
                Ok(None)
            }
        }
    }

    /// Asks for what may be much. Answers that wait for their turn take no memory: then it is asked anew. `ask` is handed
    /// the selector without what has to be looked up of processes, which is done afterwards.
    async fn gather<'p, T: Send + 'static>(
        &self,
        place: &'p Place,
        selector: &Selector,
        of: fn(&T) -> &Listener,
        ask: impl Fn(Box<Selector>, oneshot::Sender<Result<Vec<T>, String>>) -> Ask,
    ) -> Result<Result<(Vec<T>, Option<Turn<'p>>), String>, End> {
        let ask = |reply| ask(Box::new(selector.clone().without_facts()), reply);
        match self.ask(&ask).await? {
            Ok(few) if few.len() <= few_for(selector) => return Ok(Ok((few, None))),
            Ok(many) => drop(many),
            Err(trouble) => return Ok(Err(trouble)),
        }
        let mut turn = place.turn(Answer::List).await;
        match self.ask(&ask).await? {
            Ok(all) => {
                if all.len() <= FEW {
                    turn.was_small();
                }
                Ok(Ok((sifted(all, selector, of).await?, Some(turn))))
            }
            Err(trouble) => Ok(Err(trouble)),
        }
    }

    async fn list(&mut self, selection: &Selection, identity: Identity, place: &Place) -> Result<(), End> {
        let Some(selector) = self.selector(selection, identity).await? else { return Ok(()) };
        let ask = |selector, reply| Ask::List { selector, reply };
        let (listeners, _turn) = match self.gather(place, &selector, |listener| listener, ask).await? {
            Ok(gathered) => gathered,
            Err(trouble) => return self.refuse(ErrorKind::Failed, &trouble).await,
        };
        let told = listeners.into_iter().map(|listener| (listener, Vec::new(), Vec::new()));
        self.tell(told).await
    }

    async fn who(&mut self, selection: &Selection, identity: Identity, place: &Place) -> Result<(), End> {
        let Some(selector) = self.selector(selection, identity).await? else { return Ok(()) };
        let ask = |selector, reply| Ask::Who { selector, reply };
        let (listeners, _turn) = match self.gather(place, &selector, |(listener, _)| listener, ask).await? {
            Ok(gathered) => gathered,
            Err(trouble) => return self.refuse(ErrorKind::Failed, &trouble).await,
        };
        let told = listeners.into_iter().map(|(listener, lineage)| {
            let ancestors = ancestors_of(&listener);
            (listener, ancestors, lineage)
        });
        self.tell(told).await
    }

    /// Listeners, each with the ancestors of its holders and its lineage.
    async fn tell(
        &mut self,
        listeners: impl ExactSizeIterator<Item = (Listener, Vec<Vec<Ancestor>>, Vec<Ancestor>)>,
    ) -> Result<(), End> {
        let tell = async {
            let count = listeners.len();
            for (listener, ancestors, lineage) in listeners {
                self.send(&Response::Listener { listener, ancestors, lineage }).await?;
            }
            self.send(&Response::End { count, more: false }).await?;
            self.flush().await
        };
        timeout(READING, tell).await.map_err(|_| End::Gone)?
    }

    async fn history(
        &mut self,
        selection: &Selection,
        identity: Identity,
        place: &Place,
        from: u64,
        limit: usize,
    ) -> Result<(), End> {
        let Some(selector) = self.selector(selection, identity).await? else { return Ok(()) };
        let Some(path) = self.status().await?.history.map(|history| history.path) else {
            return self.refuse(ErrorKind::Failed, NO_HISTORY).await;
        };
        let mut turn = place.turn(Answer::History).await;
        let query = move || {
            let clock = super::clock();
            let now = history::clock(clock.now_wall, clock.tz.clone()).now_boot_ns;
            let selector = selector.ahead_by(now.saturating_sub(clock.now_boot_ns));
            Reader::open(&path, &clock)?.lives(&selector, from, now, limit.min(MAX_LIVES))
        };
        // SQLite blocks: not this thread, which has a table to keep.
        let answer = tokio::task::spawn_blocking(query).await.map_err(|_| End::Stopped)?;
        let Lives { lives, more } = match answer {
            Ok(answer) => answer,
            Err(error) => return self.refuse(ErrorKind::Failed, &format!("{error:#}")).await,
        };
        if lives.len() <= FEW {
            turn.was_small();
        }
        let tell = async {
            let count = lives.len();
            for life in lives {
                self.send(&Response::Life(Box::new(life))).await?;
            }
            self.send(&Response::End { count, more }).await?;
            self.flush().await
        };
        timeout(READING, tell).await.map_err(|_| End::Gone)?
    }

    async fn mark(&mut self, name: String, identity: Identity, place: &Place) -> Result<(), End> {
        if !is_name(&name) {
            return self.refuse(ErrorKind::Usage, BAD_NAME).await;
        }
        // Not of its network namespace alone: whoever reads it may mean another.
        let mut selector = Selector::new(Vec::new(), Filters::default());
        selector.show_only(self.shared.policy.only(identity));
        let turn = place.turn(Answer::History).await;
        let listeners = match self.ask(|reply| Ask::List { selector: Box::new(selector), reply }).await? {
            Ok(listeners) => listeners,
            Err(trouble) => return self.refuse(ErrorKind::Failed, &trouble).await,
        };
        let marks = self.shared.marks.to_path_buf();
        let keep = move || {
            // After the list: whoever is in it ran before.
            let mark = Mark::new(&listeners, identity.uid, file::boot_id()?, &super::clock());
            open_marks(&marks)?.keep(identity.uid, &name, &mark.line()?)?;
            Ok(Some(mark))
        };
        self.answer_with_mark(keep, "cannot keep the mark", turn).await
    }

    async fn marked(&mut self, name: String, identity: Identity, place: &Place) -> Result<(), End> {
        if !is_name(&name) {
            return self.refuse(ErrorKind::Usage, BAD_NAME).await;
        }
        let marks = self.shared.marks.to_path_buf();
        let find = move || {
            let Some(bytes) = open_marks(&marks)?.find(identity.uid, &name)? else { return Ok(None) };
            Ok(Some(Mark::read(&bytes, &file::boot_id()?, process::boot_ns_now())?))
        };
        let turn = place.turn(Answer::History).await;
        self.answer_with_mark(find, "the mark", turn).await
    }

    /// Files block: not this thread, which has a table to keep.
    async fn answer_with_mark(
        &mut self,
        work: impl FnOnce() -> anyhow::Result<Option<Mark>> + Send + 'static,
        what: &str,
        mut turn: Turn<'_>,
    ) -> Result<(), End> {
        match tokio::task::spawn_blocking(work).await.map_err(|_| End::Stopped)? {
            Ok(mark) => {
                if mark.as_ref().is_none_or(|mark| mark.listeners.len() <= FEW) {
                    turn.was_small();
                }
                self.send(&Response::Mark { mark: mark.map(Box::new) }).await?;
                self.send(&Response::End { count: 1, more: false }).await?;
                self.flush().await
            }
            Err(error) => self.refuse(ErrorKind::Failed, &format!("{what}: {error:#}")).await,
        }
    }

    async fn kill(&mut self, request: Kill, identity: Identity, place: &Place) -> Result<(), End> {
        if let Err(message) = self.shared.policy.may_kill(identity, self.lines.get_ref()) {
            return self.refuse(ErrorKind::Denied, &message).await;
        }
        let Some(selector) = self.selector(&request.selection, identity).await? else { return Ok(()) };
        let is_asked = request.confirm && !request.dry_run;
        let mut begun = match kill::begin(request, selector, identity, &self.shared.kills, &self.shared.asks) {
            Ok(begun) => begun,
            Err((kind, message)) => return self.refuse(kind, &message).await,
        };
        if !is_asked {
            begun.go();
        }
        while let Some(response) = begun.told.recv().await {
            let is_plan = matches!(response, Response::Plan { .. });
            let is_last = matches!(response, Response::End { .. } | Response::Error { .. });
            self.send(&response).await?;
            self.flush().await?;
            if is_last {
                return Ok(());
            }
            if is_plan && is_asked {
                match self.read(QUESTION, place).await? {
                    Some(Request::Confirm {}) => begun.go(),
                    Some(_) => return self.refuse(ErrorKind::Usage, "not confirmed: nothing was signalled").await,
                    None => return Ok(()),
                }
            }
        }
        self.refuse(ErrorKind::Failed, "the kill ended before its time; see: portwatch who").await
    }

    async fn rules(&mut self, identity: Identity, place: &Place) -> Result<(), End> {
        let mut visible = Selector::new(Vec::new(), Filters::default());
        visible.show_only(self.shared.policy.only(identity));
        let mut turn = place.turn(Answer::List).await;
        let rules = match self.ask(|reply| Ask::Rules { reply }).await? {
            Ok(rules) => rules,
            Err(trouble) => return self.refuse(ErrorKind::Failed, &trouble).await,
        };
        if rules.iter().map(|rule| 1 + rule.matches.len()).sum::<usize>() <= FEW {
            turn.was_small();
        }
        let tell = async {
            let count = rules.len();
            for mut rule in rules {
                rule.matches.retain(|it| visible.matches(&it.listener, 0));
                self.send(&Response::Rule(Box::new(rule))).await?;
            }
            self.send(&Response::End { count, more: false }).await?;
            self.flush().await
        };
        timeout(READING, tell).await.map_err(|_| End::Gone)?
    }

    async fn watch(
        &mut self,
        selection: &Selection,
        identity: Identity,
        place: &Place,
        mut since: Option<Utc>,
    ) -> Result<(), End> {
        let Some(mut selector) = self.selector(selection, identity).await? else { return Ok(()) };
        loop {
            // After an interruption, the past is what was told already.
            let since = since.take();
            let mut turn = if since.is_some() { Some(place.turn(Answer::History).await) } else { None };
            // The configuration may have been read anew.
            selector.show_only(self.shared.policy.only(identity));
            let Subscription { at, listeners, mut changes, past } = loop {
                let plain = Box::new(selector.clone().without_facts());
                match self.ask(|reply| Ask::Watch { selector: plain, since, reply }).await? {
                    Ok(subscription) if subscription.listeners.len() > few_for(&selector) && turn.is_none() => {
                        drop(subscription);
                    }
                    Ok(subscription) => break subscription,
                    Err(trouble) => return self.refuse(ErrorKind::Failed, &trouble).await,
                }
                turn = Some(place.turn(Answer::List).await);
            };
            let more = match (since, past) {
                (Some(_), Some(past)) => match self.tell_past(past, &selector).await? {
                    Some(more) => more,
                    None => return Ok(()),
                },
                (Some(_), None) => return self.refuse(ErrorKind::Failed, NO_HISTORY).await,
                (None, _) => false,
            };
            let listeners = sifted(listeners, &selector, |listener| listener).await?;
            let mut shown = Shown::default();
            let begin = async {
                for listener in listeners {
                    shown.add(&listener);
                    self.send(&Response::Listener { listener, ancestors: Vec::new(), lineage: Vec::new() }).await?;
                }
                self.send(&Response::Watching { at, more }).await?;
                self.flush().await
            };
            timeout(READING, begin).await.map_err(|_| End::Gone)??;
            drop(turn);
            let lost = loop {
                let change = tokio::select! {
                    change = changes.recv() => change,
                    // Whatever a subscriber says, it has nothing more to ask; as a rule it hangs up.
                    _ = self.lines.next() => return Ok(()),
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
        let mut changes = match past.await {
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
        let told = tokio::task::spawn_blocking(sift).await.map_err(|_| End::Stopped)?;
        let tell = async {
            for change in told {
                self.send(&Response::Past { change: seen_by(selector, change) }).await?;
            }
            Ok(Some(more))
        };
        timeout(READING, tell).await.map_err(|_| End::Gone)?
    }
}

/// Listeners that may be in memory without waiting for a turn, where nothing has to be looked up of them.
fn few_for(selector: &Selector) -> usize {
    if selector.needs_facts() { 0 } else { FEW }
}

/// Those that the selector picks, of those that it picks without what has to be looked up of processes: that reads files
/// of /proc by the thousand, and not on this thread, which has a table to keep.
async fn sifted<T: Send + 'static>(
    mut all: Vec<T>,
    selector: &Selector,
    of: fn(&T) -> &Listener,
) -> Result<Vec<T>, End> {
    if !selector.needs_facts() || all.is_empty() {
        return Ok(all);
    }
    let selector = selector.clone();
    let sift = move || {
        let now = process::boot_ns_now();
        all.retain(|one| selector.matches(of(one), now));
        all
    };
    tokio::task::spawn_blocking(sift).await.map_err(|_| End::Stopped)
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

fn open_marks(path: &Path) -> anyhow::Result<Store> {
    let (Some(base), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        anyhow::bail!("{} is no directory for marks", path.display());
    };
    let euid = rustix::process::geteuid().as_raw();
    Store::open(base, &[name], euid).with_context(|| format!("cannot open {}", path.display()))
}

/// Of each holder, nearest first.
fn ancestors_of(listener: &Listener) -> Vec<Vec<Ancestor>> {
    let stat = |pid| stat::read(pid).ok();
    listener.holders.iter().map(|holder| stat::lineage(holder.process.id.pid, &stat)).collect()
}
