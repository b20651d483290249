//! One connection: who it is, what it asks, and that it stays within bounds.

use std::cell::RefCell;
use std::collections::HashMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::{SinkExt, StreamExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::codec::{Framed, LinesCodec, LinesCodecError};

use super::access::Identity;
use super::core::{Ask, Subscription};
use super::kill::{self, Kills};
use crate::history::{self, Lives, Reader};
use crate::mark::store::Store;
use crate::mark::{Mark, file, is_name};
use crate::model::{Ancestor, Listener};
use crate::select::{Filters, Selector, Shown};
use crate::source::{origin, process, stat};
use crate::wire::{ErrorKind, Kill, MAX_REQUEST, Request, Response, Selection, VERSION};

/// Connections at once: of all users, and of one that is not root, so that nobody can shut the others out.
const CONNECTIONS: usize = 1024;
const CONNECTIONS_OF_ONE: usize = 256;

/// Of all, those that only root may take: it can always look.
const RESERVED: usize = 64;

/// How long a peer may stay silent between two requests (a subscriber may for ever).
const SILENCE: Duration = Duration::from_secs(60);

/// How long somebody may think about a plan.
const QUESTION: Duration = Duration::from_secs(600);

/// How long a peer may take to read an answer's next piece.
const PATIENCE: Duration = Duration::from_secs(10);

/// After a failed accept, such as for want of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Lives that one answer about history tells at most.
const MAX_LIVES: usize = 10_000;

/// Answers about history and marks that are under way at once: each is whole in memory.
const HISTORIES: usize = 4;

/// Bytes of answers that are gathered before they are written.
const BUFFER: usize = 64 << 10;

/// Who is connected, by uid.
#[derive(Clone, Debug, Default)]
pub(super) struct Load(Rc<RefCell<HashMap<u32, usize>>>);

impl Load {
    pub(super) fn connections(&self) -> usize {
        self.0.borrow().values().sum()
    }

    /// Takes a place, if there is one.
    fn enter(&self, uid: u32) -> Option<Place> {
        let total = self.connections();
        let mut load = self.0.borrow_mut();
        let own = load.entry(uid).or_default();
        let most = if uid == 0 { CONNECTIONS } else { CONNECTIONS - RESERVED };
        if total >= most || (uid != 0 && *own >= CONNECTIONS_OF_ONE) {
            return None;
        }
        *own += 1;
        Some(Place { load: self.clone(), uid })
    }
}

/// A place among the connections; given back when dropped.
struct Place {
    load: Load,
    uid: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut load = self.load.0.borrow_mut();
        if let Some(own) = load.get_mut(&self.uid) {
            *own -= 1;
            if *own == 0 {
                load.remove(&self.uid);
            }
        }
    }
}

/// Takes connections for ever, each served by a task of its own. Needs a [`tokio::task::LocalSet`].
pub(super) async fn accept(listener: &UnixListener, asks: mpsc::Sender<Ask>, load: Load, marks: PathBuf) -> Infallible {
    let marks: Rc<Path> = marks.into();
    let histories = Rc::new(Semaphore::new(HISTORIES));
    let kills = Kills::default();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, as a rule: those who are served go on, and give some back.
            tokio::time::sleep(ACCEPT_AGAIN).await;
            continue;
        };
        let (asks, load, kills) = (asks.clone(), load.clone(), kills.clone());
        let (histories, marks) = (Rc::clone(&histories), Rc::clone(&marks));
        tokio::task::spawn_local(async move {
            let Ok(identity) = Identity::of(&stream) else { return };
            let mut peer = Peer::new(stream, asks, histories, marks, kills);
            // Whatever ends a connection, there is nobody to tell but the one who is gone.
            let _ = match load.enter(identity.uid) {
                Some(_place) => peer.serve(identity).await,
                None => peer.refuse(ErrorKind::Busy, "too many connections; try again later").await,
            };
        });
    }
}

struct Peer {
    lines: Framed<UnixStream, LinesCodec>,
    asks: mpsc::Sender<Ask>,
    histories: Rc<Semaphore>,
    /// The directory of marks.
    marks: Rc<Path>,
    kills: Kills,
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
    fn new(
        stream: UnixStream,
        asks: mpsc::Sender<Ask>,
        histories: Rc<Semaphore>,
        marks: Rc<Path>,
        kills: Kills,
    ) -> Peer {
        let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(MAX_REQUEST));
        lines.set_backpressure_boundary(BUFFER);
        Peer { lines, asks, histories, marks, kills }
    }

    async fn serve(&mut self, identity: Identity) -> Result<(), End> {
        let mut greeted = false;
        loop {
            let Some(request) = self.read(SILENCE).await? else { continue };
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
                Request::List { selection } => self.list(&selection, identity).await?,
                Request::Who { selection } => self.who(&selection, identity).await?,
                Request::History { selection, from, limit } => self.history(&selection, identity, from, limit).await?,
                Request::Mark { name } => self.mark(name, identity).await?,
                Request::Marked { name } => self.marked(name, identity).await?,
                Request::Kill(kill) => self.kill(*kill, identity).await?,
                Request::Confirm {} => self.refuse(ErrorKind::Usage, "there is no plan to confirm").await?,
                Request::Watch { selection } => return self.watch(&selection, identity).await,
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
    async fn read(&mut self, patience: Duration) -> Result<Option<Request>, End> {
        let line = match timeout(patience, self.lines.next()).await {
            Ok(Some(Ok(line))) => line,
            Ok(Some(Err(LinesCodecError::MaxLineLengthExceeded))) => {
                let message = format!("a request may have {MAX_REQUEST} bytes");
                self.refuse(ErrorKind::Usage, &message).await?;
                return Err(End::Gone);
            }
            _ => return Err(End::Gone),
        };
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
        self.asks.send(ask(reply)).await.map_err(|_| End::Stopped)?;
        Ok(answer.await?)
    }

    async fn status(&self) -> Result<crate::wire::Status, End> {
        self.ask(|reply| Ask::Status { reply }).await
    }

    /// What the selection means; `None` where it means nothing, of which the peer was told.
    async fn selector(&mut self, selection: &Selection, identity: Identity) -> Result<Option<Selector>, End> {
        match selection.selector(identity.netns) {
            Ok(selector) => Ok(Some(selector.with_facts(origin::facts(identity.uid)))),
            Err(message) => {
                self.refuse(ErrorKind::Usage, &message).await?;
                Ok(None)
            }
        }
    }

    async fn list(&mut self, selection: &Selection, identity: Identity) -> Result<(), End> {
        let Some(selector) = self.selector(selection, identity).await? else { return Ok(()) };
        let listeners = self.ask(|reply| Ask::List { selector: Box::new(selector), reply }).await?;
        let count = listeners.len();
        for listener in listeners {
            self.send(&Response::Listener { listener, ancestors: Vec::new(), lineage: Vec::new() }).await?;
        }
        self.send(&Response::End { count, more: false }).await?;
        self.flush().await
    }

    async fn who(&mut self, selection: &Selection, identity: Identity) -> Result<(), End> {
        let Some(selector) = self.selector(selection, identity).await? else { return Ok(()) };
        let listeners = self.ask(|reply| Ask::Who { selector: Box::new(selector), reply }).await?;
        let count = listeners.len();
        for (listener, lineage) in listeners {
            let ancestors = ancestors_of(&listener);
            self.send(&Response::Listener { listener, ancestors, lineage }).await?;
        }
        self.send(&Response::End { count, more: false }).await?;
        self.flush().await
    }

    async fn history(&mut self, selection: &Selection, identity: Identity, from: u64, limit: usize) -> Result<(), End> {
        let Some(selector) = self.selector(selection, identity).await? else { return Ok(()) };
        let Some(path) = self.status().await?.history.map(|history| history.path) else {
            return self.refuse(ErrorKind::Failed, "this agent keeps no history").await;
        };
        let histories = Rc::clone(&self.histories);
        let _turn = histories.acquire().await.map_err(|_| End::Stopped)?;
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
        let count = lives.len();
        for life in lives {
            self.send(&Response::Life(Box::new(life))).await?;
        }
        self.send(&Response::End { count, more }).await?;
        self.flush().await
    }

    async fn mark(&mut self, name: String, identity: Identity) -> Result<(), End> {
        if !is_name(&name) {
            return self.refuse(ErrorKind::Usage, "a mark's name has up to 64 letters, digits and ._-").await;
        }
        // Not of its network namespace alone: whoever reads it may mean another.
        let selector = Box::new(Selector::new(Vec::new(), Filters::default()));
        let listeners = self.ask(|reply| Ask::List { selector, reply }).await?;
        let marks = self.marks.to_path_buf();
        let keep = move || {
            // After the list: whoever is in it ran before.
            let mark = Mark::new(&listeners, identity.uid, file::boot_id()?, &super::clock());
            open_marks(&marks)?.keep(identity.uid, &name, &mark.line()?)?;
            Ok(Some(mark))
        };
        self.answer_with_mark(keep, "cannot keep the mark").await
    }

    async fn marked(&mut self, name: String, identity: Identity) -> Result<(), End> {
        if !is_name(&name) {
            return self.refuse(ErrorKind::Usage, "a mark's name has up to 64 letters, digits and ._-").await;
        }
        let marks = self.marks.to_path_buf();
        let find = move || {
            let Some(bytes) = open_marks(&marks)?.find(identity.uid, &name)? else { return Ok(None) };
            Ok(Some(Mark::read(&bytes, &file::boot_id()?, process::boot_ns_now())?))
        };
        self.answer_with_mark(find, "the mark").await
    }

    /// Files block: not this thread, which has a table to keep.
    async fn answer_with_mark(
        &mut self,
        work: impl FnOnce() -> anyhow::Result<Option<Mark>> + Send + 'static,
        what: &str,
    ) -> Result<(), End> {
        let turns = Rc::clone(&self.histories);
        let _turn = turns.acquire().await.map_err(|_| End::Stopped)?;
        match tokio::task::spawn_blocking(work).await.map_err(|_| End::Stopped)? {
            Ok(mark) => {
                self.send(&Response::Mark { mark: mark.map(Box::new) }).await?;
                self.send(&Response::End { count: 1, more: false }).await?;
                self.flush().await
            }
            Err(error) => self.refuse(ErrorKind::Failed, &format!("{what}: {error:#}")).await,
        }
    }

    async fn kill(&mut self, request: Kill, identity: Identity) -> Result<(), End> {
        let Some(selector) = self.selector(&request.selection, identity).await? else { return Ok(()) };
        let is_asked = request.confirm && !request.dry_run;
        let mut begun = match kill::begin(request, selector, identity, &self.kills, &self.asks) {
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
                match self.read(QUESTION).await? {
                    Some(Request::Confirm {}) => begun.go(),
                    Some(_) => return self.refuse(ErrorKind::Usage, "not confirmed: nothing was signalled").await,
                    None => return Ok(()),
                }
            }
        }
        self.refuse(ErrorKind::Failed, "the kill ended before its time; see: portwatch who").await
    }

    async fn watch(&mut self, selection: &Selection, identity: Identity) -> Result<(), End> {
        let Some(selector) = self.selector(selection, identity).await? else { return Ok(()) };
        loop {
            let Subscription { at, listeners, mut changes, lost } = self.ask(|reply| Ask::Watch { reply }).await?;
            let mut shown = Shown::default();
            for listener in listeners.into_iter().filter(|listener| selector.matches(listener, at)) {
                shown.add(&listener);
                self.send(&Response::Listener { listener, ancestors: Vec::new(), lineage: Vec::new() }).await?;
            }
            self.send(&Response::Watching { at }).await?;
            self.flush().await?;
            loop {
                let change = tokio::select! {
                    change = changes.recv() => change,
                    // Whatever a subscriber says, it has nothing more to ask; as a rule it hangs up.
                    _ = self.lines.next() => return Ok(()),
                };
                let Some(change) = change else { break };
                if shown.concerns(&change, &selector) {
                    self.send(&Response::Change { change: crate::model::Change::clone(&change) }).await?;
                }
                if changes.is_empty() {
                    self.flush().await?;
                }
            }
            self.send(&Response::Lagged { lost: lost.load(Ordering::Relaxed) }).await?;
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

/// Of each holder, nearest first.
fn ancestors_of(listener: &Listener) -> Vec<Vec<Ancestor>> {
    let stat = |pid| stat::read(pid).ok();
    listener.holders.iter().map(|holder| stat::lineage(holder.process.id.pid, &stat)).collect()
}
