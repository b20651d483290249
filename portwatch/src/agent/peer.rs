//! One connection: who it is, what it asks, and that it stays within bounds.

mod marks;
mod watch;

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt as _};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::codec::{Framed, LinesCodec, LinesCodecError};

use super::AlreadyRunning;
use super::access::Identity;
use super::core::{Ask, Reply, Untold};
use super::kill::{self, Begun, Kills, Refusal};
use super::load::{Answer, Load, Place, Turn};
use super::policy::Policy;
use super::socket::Socket;
use crate::history::{self, Lives, Reader, State, Utc};
use crate::model::{Ancestor, Listener};
use crate::rules;
use crate::select::{Filters, Selector};
use crate::source::{netns, origin, process, stat};
use crate::wire::{ErrorKind, Kill, MAX_REQUEST, Request, Response, Selection, VERSION};

/// How long a peer may stay silent between two requests (a subscriber may for ever).
const SILENCE: Duration = Duration::from_secs(60);

/// How long somebody may think about a plan.
const QUESTION: Duration = Duration::from_secs(600);

/// How long a peer may take to read an answer's next piece.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a peer may take to read the whole of an answer that others wait for.
const READING: Duration = Duration::from_secs(30);

/// How often a peer is told that its answer is worked on. One that hears nothing for two seconds takes the agent for hung.
const BEAT: Duration = Duration::from_millis(500);

/// After a failed accept, such as for want of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Lives that one answer about history tells at most.
const MAX_LIVES: usize = 10_000;

/// The last moment that the history can name: it counts in signed numbers.
const LAST: Utc = i64::MAX.unsigned_abs();

/// Listeners that any connection may have in memory. An answer of more waits for its turn.
const FEW: usize = 64;

/// Bytes of answers that are gathered before they are written, and that the kernel keeps until they are read (it takes
/// twice as many for what they come in).
const BUFFER: usize = 16 << 10;
const KERNEL_BUFFER: usize = 32 << 10;

const NO_HISTORY: &str = "this agent keeps no history";

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

impl Shared {
    /// What the selection means of what the peer may see.
    ///
    /// # Errors
    /// A sentence for the peer.
    fn selector(&self, selection: &Selection, identity: Identity) -> Result<Selector, String> {
        let mut selector = selection.selector(identity.netns)?;
        selector.show_only(self.policy.only(identity));
        Ok(selector.with_facts(origin::facts(identity.uid)))
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, End> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(ask(reply)).await.map_err(|_| End::Stopped)?;
        Ok(answer.await?)
    }

    /// Asks for what may be much: for few of it, and where it is more, anew once it is the peer's turn, unless it is
    /// already. So what waits for its turn takes no memory. `ask` is handed the selector without what has to be looked up of
    /// processes, which is done afterwards, and how many listeners are few.
    async fn gather<'p, T>(
        &self,
        place: &'p Place,
        mut turn: Option<Turn<'p>>,
        selector: &Selector,
        ask: impl Fn(Box<Selector>, usize, Reply<T>) -> Ask,
    ) -> Result<Result<(T, Option<Turn<'p>>), Untold>, End> {
        loop {
            let most = if turn.is_some() { usize::MAX } else { few_for(selector) };
            match self.ask(|reply| ask(Box::new(selector.clone().without_facts()), most, reply)).await? {
                Err(Untold::More) if turn.is_none() => turn = Some(place.turn(Answer::List).await),
                told => return Ok(told.map(|told| (told, turn))),
            }
        }
    }

    /// The same for listeners, of which those are left that the selector picks.
    async fn gather_listeners<'p, T: Send + 'static>(
        &self,
        place: &'p Place,
        selector: &Selector,
        of: fn(&T) -> &Listener,
        ask: impl Fn(Box<Selector>, usize, Reply<Vec<T>>) -> Ask,
    ) -> Result<Result<(Vec<T>, Option<Turn<'p>>), Untold>, End> {
        let (all, mut turn) = match self.gather(place, None, selector, ask).await? {
            Ok(gathered) => gathered,
            Err(untold) => return Ok(Err(untold)),
        };
        if let Some(turn) = &mut turn
            && all.len() <= FEW
        {
            turn.was_small();
        }
        Ok(Ok((sifted(all, selector, of).await?, turn)))
    }
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
    /// What was read during a kill and is no word about it: the next request, or the end.
    early: Option<Line>,
    shared: Shared,
}

/// What reading a line gives.
type Line = Option<Result<String, LinesCodecError>>;

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
        Peer { lines, early: None, shared }
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
                Request::Stop {} => self.refuse(ErrorKind::Usage, "there is no kill to stop").await?,
                Request::Rules {} => self.rules(identity, place).await?,
                Request::Watch { selection, since } => return self.watch(selection, identity, place, since).await,
                Request::Status {} => {
                    let status = self.status().await?;
                    self.send(&Response::Status(status)).await?;
                    self.send(&Response::End { count: 1, more: false, narrowed: false }).await?;
                    self.flush().await?;
                }
            }
        }
    }

    /// The next request; `None` for one that means nothing, of which the peer was told.
    async fn read(&mut self, patience: Duration, place: &Place) -> Result<Option<Request>, End> {
        let next = async {
            match self.early.take() {
                Some(line) => line,
                None => self.lines.next().await,
            }
        };
        let line = match timeout(patience, next).await {
            Ok(Some(Ok(line))) => line,
            Ok(Some(Err(LinesCodecError::MaxLineLengthExceeded))) => {
                let message = format!("a request may have {MAX_REQUEST} bytes");
                self.refuse(ErrorKind::Usage, &message).await?;
                return Err(End::Gone);
            }
            Ok(Some(Err(LinesCodecError::Io(error)))) if error.kind() == io::ErrorKind::InvalidData => {
                self.refuse(ErrorKind::Usage, "a request is text in UTF-8").await?;
                return Err(End::Gone);
            }
            _ => return Err(End::Gone),
        };
        if !place.may_ask() {
            self.refuse(ErrorKind::Busy, "too many requests a second; try again later").await?;
            return Err(End::Gone);
        }
        match Request::read(&line) {
            Ok(request) => Ok(Some(request)),
            Err(error) => {
                self.refuse(ErrorKind::Usage, &format!("not a request: {error}")).await?;
                Ok(None)
            }
        }
    }

    async fn refuse(&mut self, kind: ErrorKind, message: &str) -> Result<(), End> {
        self.send(&Response::Error { kind, message: message.to_owned(), netns: None }).await?;
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

    /// Does what may take its time, and tells the peer meanwhile that it is being done.
    async fn at_work<T>(&mut self, work: impl Future<Output = T>) -> Result<T, End> {
        let mut work = pin!(work);
        loop {
            match timeout(BEAT, &mut work).await {
                Ok(done) => return Ok(done),
                Err(_) => {
                    self.send(&Response::Working {}).await?;
                    self.flush().await?;
                }
            }
        }
    }

    async fn status(&self) -> Result<crate::wire::Status, End> {
        self.shared.ask(|reply| Ask::Status { reply }).await
    }

    /// What the selection means of what the peer may see; `None` where it means nothing, of which the peer was told.
    async fn selector(&mut self, selection: &Selection, identity: Identity) -> Result<Option<Selector>, End> {
        match self.shared.selector(selection, identity) {
            Ok(selector) => Ok(Some(selector)),
            Err(message) => {
                self.refuse(ErrorKind::Usage, &message).await?;
                Ok(None)
            }
        }
    }

    /// The same where the selection is of what is there now: a network namespace that there is nothing of has no free ports.
    async fn selector_of_now(
        &mut self,
        selection: &Selection,
        identity: Identity,
        place: &Place,
    ) -> Result<Option<Selector>, End> {
        let Some(selector) = self.selector(selection, identity).await? else { return Ok(None) };
        let Some(id) = selector.filters().netns.filter(|id| Some(*id) != identity.netns) else {
            return Ok(Some(selector));
        };
        let mut turn = self.at_work(place.turn(Answer::List)).await?;
        turn.was_small();
        // Looks at every process: not on this thread, which has a table to keep.
        let look = tokio::task::spawn_blocking(move || netns::open(id).map(drop));
        let found = self.at_work(look).await?.map_err(|_| End::Stopped)?;
        let Err(error) = found else { return Ok(Some(selector)) };
        // One that nobody is in any more may live on by a socket that somebody holds.
        let within = Selector::new(Vec::new(), Filters { netns: Some(id), ..Filters::default() });
        let shared = self.shared.clone();
        let ask = |reply| Ask::List { selector: Box::new(within), most: 0, reply };
        let held = self.at_work(shared.ask(ask)).await??;
        drop(turn);
        match held {
            Ok(_) => {
                self.send(&kill::refusal(&error)).await?;
                self.flush().await?;
                Ok(None)
            }
            Err(Untold::More) => Ok(Some(selector)),
            Err(Untold::Trouble(trouble)) => {
                self.refuse(ErrorKind::Failed, &trouble).await?;
                Ok(None)
            }
        }
    }

    async fn list(&mut self, selection: &Selection, identity: Identity, place: &Place) -> Result<(), End> {
        let Some(selector) = self.selector_of_now(selection, identity, place).await? else { return Ok(()) };
        let ask = |selector, most, reply| Ask::List { selector, most, reply };
        let shared = self.shared.clone();
        let gather = shared.gather_listeners(place, &selector, |listener| listener, ask);
        let (listeners, _turn) = match self.at_work(gather).await?? {
            Ok(gathered) => gathered,
            Err(untold) => return self.refuse(ErrorKind::Failed, &untold.to_string()).await,
        };
        let told = listeners.into_iter().map(|listener| (listener, Vec::new(), Vec::new()));
        self.tell(told, selector.shows_only().is_some()).await
    }

    async fn who(&mut self, selection: &Selection, identity: Identity, place: &Place) -> Result<(), End> {
        let Some(selector) = self.selector_of_now(selection, identity, place).await? else { return Ok(()) };
        let ask = |selector, most, reply| Ask::Who { selector, most, reply };
        let shared = self.shared.clone();
        let gather = shared.gather_listeners(place, &selector, |(listener, _)| listener, ask);
        let (listeners, turn) = match self.at_work(gather).await?? {
            Ok(gathered) => gathered,
            Err(untold) => return self.refuse(ErrorKind::Failed, &untold.to_string()).await,
        };
        let look = move || -> Vec<_> {
            let looked = |(listener, lineage)| {
                let ancestors = ancestors_of(&listener);
                (listener, ancestors, lineage)
            };
            listeners.into_iter().map(looked).collect()
        };
        // A few files of /proc each.
        let told = match turn {
            None => look(),
            Some(_) => self.at_work(tokio::task::spawn_blocking(look)).await?.map_err(|_| End::Stopped)?,
        };
        self.tell(told.into_iter(), selector.shows_only().is_some()).await
    }

    /// Listeners, each with the ancestors of its holders and its lineage.
    async fn tell(
        &mut self,
        listeners: impl ExactSizeIterator<Item = (Listener, Vec<Vec<Ancestor>>, Vec<Ancestor>)>,
        narrowed: bool,
    ) -> Result<(), End> {
        let tell = async {
            let count = listeners.len();
            for (listener, ancestors, lineage) in listeners {
                self.send(&Response::Listener { listener, ancestors, lineage }).await?;
            }
            self.send(&Response::End { count, more: false, narrowed }).await?;
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
        let (from, narrowed) = (from.min(LAST), selector.shows_only().is_some());
        let Some(health) = self.status().await?.history else {
            return self.refuse(ErrorKind::Failed, NO_HISTORY).await;
        };
        let mut turn = self.at_work(place.turn(Answer::History)).await?;
        let query = move || {
            let clock = super::clock();
            let now = history::clock(clock.now_wall, clock.tz.clone()).now_boot_ns;
            let selector = selector.ahead_by(now.saturating_sub(clock.now_boot_ns));
            match Reader::open(&health.path, &clock) {
                // Nothing is written yet.
                Err(_) if health.state == State::Starting => Ok(Lives { lives: Vec::new(), more: false }),
                opened => opened?.lives(&selector, from, now, limit.min(MAX_LIVES)),
            }
        };
        // SQLite blocks: not this thread, which has a table to keep.
        let answer = self.at_work(tokio::task::spawn_blocking(query)).await?.map_err(|_| End::Stopped)?;
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
            self.send(&Response::End { count, more, narrowed }).await?;
            self.flush().await
        };
        timeout(READING, tell).await.map_err(|_| End::Gone)?
    }

    fn begin(&self, request: Kill, identity: Identity) -> Result<Begun, Refusal> {
        let Shared { policy, kills, asks, .. } = &self.shared;
        policy.may_kill(identity, self.lines.get_ref()).map_err(|message| (ErrorKind::Denied, message))?;
        let selector = self.shared.selector(&request.selection, identity);
        let selector = selector.map_err(|message| (ErrorKind::Usage, message))?;
        kill::begin(request, selector, identity, kills, asks)
    }

    async fn kill(&mut self, request: Kill, identity: Identity, place: &Place) -> Result<(), End> {
        let (is_asked, targets) = (request.confirm && !request.dry_run, kill::targets(&request.selection));
        let mut begun = match self.begin(request, identity) {
            Ok(begun) => begun,
            Err((kind, message)) => {
                kill::log_refusal(identity, &targets, &message);
                return self.refuse(kind, &message).await;
            }
        };
        if !is_asked {
            begun.go();
        }
        // The plan takes its time; afterwards, the kill tells of itself.
        let mut told = self.at_work(begun.told.recv()).await?;
        while let Some(response) = told {
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
            told = self.hear_of(&mut begun).await;
        }
        self.refuse(ErrorKind::Failed, "the kill ended before its time; see: portwatch who").await
    }

    /// What a kill tells next. The peer may say meanwhile that it is to stop; of all else that it says, one line is kept
    /// for later. One that is gone, or has nothing more to say, has not said that.
    async fn hear_of(&mut self, begun: &mut Begun) -> Option<Response> {
        loop {
            if self.early.is_some() {
                return begun.told.recv().await;
            }
            tokio::select! {
                biased;
                told = begun.told.recv() => return told,
                line = self.lines.next() => match line {
                    Some(Ok(line)) if !begun.is_stopped() && matches!(Request::read(&line), Ok(Request::Stop {})) => {
                        begun.stop();
                    }
                    line => self.early = Some(line),
                },
            }
        }
    }

    async fn rules(&mut self, identity: Identity, place: &Place) -> Result<(), End> {
        let mut visible = Selector::new(Vec::new(), Filters::default());
        visible.show_only(self.shared.policy.only(identity));
        let mut turn = self.at_work(place.turn(Answer::List)).await?;
        let shared = self.shared.clone();
        let rules = match self.at_work(shared.ask(|reply| Ask::Rules { reply })).await?? {
            Ok(rules) => rules,
            Err(untold) => return self.refuse(ErrorKind::Failed, &untold.to_string()).await,
        };
        let look = move || {
            let mut rules = rules;
            rules.iter_mut().for_each(rules::State::look);
            rules
        };
        let rules = self.at_work(tokio::task::spawn_blocking(look)).await?.map_err(|_| End::Stopped)?;
        if rules.iter().map(|rule| 1 + rule.matches.len()).sum::<usize>() <= FEW {
            turn.was_small();
        }
        let tell = async {
            let count = rules.len();
            for mut rule in rules {
                rule.matches.retain(|it| visible.matches(&it.listener, 0));
                self.send(&Response::Rule(Box::new(rule))).await?;
            }
            self.send(&Response::End { count, more: false, narrowed: visible.shows_only().is_some() }).await?;
            self.flush().await
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

/// Of each holder, nearest first.
fn ancestors_of(listener: &Listener) -> Vec<Vec<Ancestor>> {
    let stat = |pid| stat::read(pid).ok();
    listener.holders.iter().map(|holder| stat::lineage(holder.process.id.pid, &stat)).collect()
}

#[cfg(test)]
mod tests {
    use tokio::task::{LocalSet, yield_now};

    use super::*;
    use crate::config::Access;

    /// The next question: how many listeners it takes at most, and where the answer goes.
    async fn asked(questions: &mut mpsc::Receiver<Ask>) -> (usize, Reply<Vec<Listener>>) {
        match questions.recv().await {
            Some(Ask::List { most, reply, .. }) => (most, reply),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_waits_for_its_turn_takes_no_memory() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async {
            let (asks, mut questions) = mpsc::channel(64);
            let (load, kills, policy) = (Load::new(8192), Kills::default(), Policy::new(Access::default()));
            let shared = Shared { asks, load: load.clone(), kills, policy, marks: Path::new("").into() };
            let list = move |shared: Shared| async move {
                let place = shared.load.enter(1000).unwrap();
                let selector = Selector::new(Vec::new(), Filters::default());
                let ask = |selector, most, reply| Ask::List { selector, most, reply };
                let gathered = shared.gather_listeners(&place, &selector, |listener| listener, ask).await;
                gathered.map(|gathered| gathered.map(|(all, turn)| (all.len(), turn.is_some())))
            };
            // All turns of the user are taken.
            let place = load.enter(1000).unwrap();
            let mut turns = Vec::new();
            for _ in 0..8 {
                turns.push(place.turn(Answer::List).await);
            }
            let listing = tokio::task::spawn_local(list(shared.clone()));
            let (most, reply) = asked(&mut questions).await;
            assert_eq!(most, FEW);
            reply.send(Err(Untold::More)).unwrap();
            for _ in 0..10 {
                yield_now().await;
            }
            assert!(questions.try_recv().is_err(), "asked anew before its turn");
            drop(turns);
            let (most, reply) = asked(&mut questions).await;
            assert_eq!(most, usize::MAX);
            reply.send(Ok(Vec::new())).unwrap();
            assert_eq!(listing.await.unwrap().unwrap(), Ok((0, true)));

            let listing = tokio::task::spawn_local(list(shared));
            let (_, reply) = asked(&mut questions).await;
            reply.send(Ok(Vec::new())).unwrap();
            assert_eq!(listing.await.unwrap().unwrap(), Ok((0, false)), "few need no turn");
        });
    }
}
