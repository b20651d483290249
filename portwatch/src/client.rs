//! A connection to the agent.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::iter;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::codec::{Framed, LinesCodec, LinesCodecError};

use crate::history::Utc;
use crate::kill::{Concern, Outcome, Plan, Progress};
use crate::model::{BootNs, Change, Listener, Process, ProcessId, Socket};
use crate::source::netns::Unknown;
use crate::table::is_moved;
use crate::table::rows::{Found, Identity, Index};
use crate::wire::{ErrorKind, Kill, Request, Response, Selection, VERSION};

/// Where the agent listens unless told otherwise.
pub const SOCKET: &str = "/run/portwatch/agent.sock";

/// How long the agent may take to greet, and to say the first word of an answer: where that takes its time, the agent says
/// so at once. One that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long it may say nothing once it has begun to answer, or has said that it is at work, which it says again and again:
/// it may have a table of thousands of listeners to read anew in between.
const PAUSE: Duration = Duration::from_secs(10);

/// How long the agent may take for the plan of a kill: a scan, and what container engines and systemd are asked.
const PLANNING: Duration = Duration::from_secs(20);

/// How long the agent may say nothing during a kill. It speaks each second while it waits for a process, but not while one
/// that got SIGKILL is torn down (a minute at most).
const KILLING: Duration = Duration::from_secs(120);

/// How long the agent may take to end a kill that is to stop: it looks every few milliseconds, and tells then what became
/// of the ports.
const STOPPING: Duration = Duration::from_secs(2);

/// The longest line from the agent in bytes: a listener with thousands of holders.
const MAX_RESPONSE: usize = 256 << 20;

/// In a chain of errors, above the reason: the agent at this socket is of no use, or is not any more. It hangs, has ended,
/// or is not understood, and what it had told by then is no answer. Whoever only asked can do the work without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfNoUse(pub PathBuf);

impl fmt::Display for OfNoUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the agent at {} is of no use", self.0.display())
    }
}

/// A greeted connection.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    lines: Framed<UnixStream, LinesCodec>,
    /// How long the agent may take for what it says next.
    patience: Duration,
}

/// What was answered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Without the end.
    pub responses: Vec<Response>,
    /// Whether a limit left something out.
    pub more: bool,
    /// Whether the agent's configuration keeps from this user what is not theirs.
    pub narrowed: bool,
}

impl Client {
    /// Connects to the agent at `socket`. `None`: nobody is there.
    ///
    /// # Errors
    /// [`OfNoUse`], where somebody is there: another version, too busy, hanging, or no agent at all.
    pub async fn connect(socket: &Path) -> anyhow::Result<Option<Client>> {
        Client::connect_with(socket, None).await
    }

    /// The same, with a question in the same breath as the greeting: one turn less to wait for. [`Self::gather`] has the
    /// answer.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_asking(socket: &Path, request: &Request) -> anyhow::Result<Option<Client>> {
        Client::connect_with(socket, Some(request)).await
    }

    async fn connect_with(socket: &Path, request: Option<&Request>) -> anyhow::Result<Option<Client>> {
        let greet = async {
            let stream = match UnixStream::connect(socket).await {
                Ok(stream) => stream,
                Err(error) if is_nobody(&error) => return Ok(None),
                Err(error) => return Err(error).context("cannot connect"),
            };
            let lines = Framed::new(stream, LinesCodec::new_with_max_length(MAX_RESPONSE));
            let mut client = Client { socket: socket.to_owned(), lines, patience: PATIENCE };
            // Who is turned away may find the door shut already, and is told why all the same.
            let lines = lines_of(iter::once(&Request::Hello { version: VERSION }).chain(request))?;
            let _ = client.say(lines).await;
            match client.hear().await? {
                Response::Hello { version: VERSION, .. } => Ok(Some(client)),
                Response::Hello { version, .. } => {
                    bail!(
                        "it speaks version {version} of the protocol, and this program version {VERSION}; upgrade the older"
                    )
                }
                Response::Error { message, .. } => bail!(message),
                _ => bail!("it does not greet"),
            }
        };
        let connected = timeout(PATIENCE, greet).await.unwrap_or_else(|_| Err(silent_for(PATIENCE)));
        connected.with_context(|| OfNoUse(socket.to_owned()))
    }

    /// # Errors
    /// [`OfNoUse`], also where it is more than an agent takes.
    pub async fn send(&mut self, request: &Request) -> anyhow::Result<()> {
        let lines = lines_of(iter::once(request)).map_err(|error| self.of_no_use(error))?;
        self.say(lines).await
    }

    async fn say(&mut self, lines: String) -> anyhow::Result<()> {
        self.patience = PATIENCE;
        // Its text alone: to those above, a broken pipe is that of standard output.
        let sent = self.lines.send(lines).await;
        sent.map_err(|error| self.of_no_use(anyhow!("cannot write to it: {error}")))
    }

    /// The next line, however long it takes. Cancel safe.
    ///
    /// # Errors
    /// The agent's own; or [`OfNoUse`].
    pub async fn read(&mut self) -> anyhow::Result<Response> {
        loop {
            match self.hear().await.map_err(|error| self.of_no_use(error))? {
                Response::Working {} => {}
                response => return refused(response),
            }
        }
    }

    /// The next line of an answer.
    ///
    /// # Errors
    /// The agent's own; or [`OfNoUse`], also where it takes longer than an agent does that is alive.
    pub async fn read_answer(&mut self) -> anyhow::Result<Response> {
        loop {
            let had = self.lines.read_buffer().len();
            let heard = timeout(self.patience, self.hear()).await;
            let is_silent = self.lines.read_buffer().len() == had;
            let patience = std::mem::replace(&mut self.patience, PAUSE);
            match heard {
                Ok(Ok(Response::Working {})) => {}
                Ok(heard) => return refused(heard.map_err(|error| self.of_no_use(error))?),
                Err(_) if is_silent => return Err(self.of_no_use(silent_for(patience))),
                // A long line is on its way.
                Err(_) => {}
            }
        }
    }

    /// The next line as it is. Cancel safe.
    async fn hear(&mut self) -> anyhow::Result<Response> {
        let ended = || anyhow!("it ended during its answer");
        match self.lines.next().await {
            Some(Ok(line)) => serde_json::from_str(&line).map_err(|error| match error.is_eof() {
                true => ended(),
                false => anyhow!("it speaks another language: {error}"),
            }),
            Some(Err(LinesCodecError::Io(error))) if error.kind() == io::ErrorKind::ConnectionReset => Err(ended()),
            Some(Err(error)) => Err(anyhow!("cannot read from it: {error}")),
            None => Err(ended()),
        }
    }

    fn of_no_use(&self, why: anyhow::Error) -> anyhow::Error {
        why.context(OfNoUse(self.socket.clone()))
    }

    fn unexpected(&self) -> anyhow::Error {
        self.of_no_use(anyhow!("it answers something else than it was asked"))
    }

    /// Asks, and gathers the answer.
    ///
    /// # Errors
    /// As [`Self::read_answer`].
    pub async fn ask(&mut self, request: &Request) -> anyhow::Result<Answer> {
        self.send(request).await?;
        self.gather().await
    }

    /// The answer to what was asked.
    ///
    /// # Errors
    /// As [`Self::read_answer`].
    pub async fn gather(&mut self) -> anyhow::Result<Answer> {
        let mut responses = Vec::new();
        loop {
            match self.read_answer().await? {
                Response::End { count, more, narrowed } if count == responses.len() => {
                    return Ok(Answer { responses, more, narrowed });
                }
                Response::End { .. } => return Err(self.unexpected()),
                response => responses.push(response),
            }
        }
    }
}

/// Requests as they are written, without the last line's end.
fn lines_of<'a>(requests: impl Iterator<Item = &'a Request>) -> anyhow::Result<String> {
    let lines = requests.map(Request::line).collect::<Result<Vec<_>, _>>().map_err(anyhow::Error::msg)?;
    Ok(lines.join("\n"))
}

fn silent_for(patience: Duration) -> anyhow::Error {
    anyhow!("no answer within {} s", patience.as_secs())
}

/// What the agent says itself of why it does not do it, as an error.
fn refused(response: Response) -> anyhow::Result<Response> {
    match response {
        Response::Error { kind: ErrorKind::Usage, netns: Some(id), .. } => Err(Unknown(id).into()),
        Response::Error { kind: ErrorKind::Denied, message, .. } => {
            Err(io::Error::new(io::ErrorKind::PermissionDenied, message).into())
        }
        Response::Error { message, .. } => Err(anyhow!(message)),
        response => Ok(response),
    }
}

/// A kill that the agent has planned, and does not begin before it is told to. Dropped, nobody is signalled.
#[derive(Debug)]
pub struct PlannedKill {
    client: Client,
    is_dry_run: bool,
    /// Its listeners are told without their holders.
    pub plan: Plan,
    pub concerns: Vec<Concern>,
}

impl Client {
    /// Asks for a kill, and for its plan first.
    ///
    /// # Errors
    /// The agent does not do it, or is lost. Nobody was signalled.
    pub async fn plan_kill(mut self, kill: Kill) -> anyhow::Result<PlannedKill> {
        let is_dry_run = kill.dry_run;
        let ask = async {
            self.send(&Request::Kill(Box::new(Kill { confirm: true, ..kill }))).await?;
            self.read_answer().await
        };
        match timeout(PLANNING, ask).await.map_err(|_| anyhow!("the agent makes no plan"))?? {
            Response::Plan { plan, concerns } => Ok(PlannedKill { client: self, is_dry_run, plan: *plan, concerns }),
            _ => Err(self.unexpected()),
        }
    }
}

impl PlannedKill {
    /// Has it done, and waits for what became of each port; of a dry run, what would. `progress` is told of each process.
    /// Once `stop` is over, nobody more is to be signalled: what became of the ports by then is told.
    ///
    /// # Errors
    /// The agent failed or is lost: who was signalled by then is not known. Or it does not stop.
    pub async fn carry_out(
        mut self,
        progress: &mut dyn FnMut(&Progress<'_>),
        stop: impl Future<Output = ()>,
    ) -> anyhow::Result<Vec<Outcome>> {
        if !self.is_dry_run {
            self.client.send(&Request::Confirm {}).await.context("nothing was signalled; try again")?;
        }
        let port = self.plan.groups.first().map_or(0, |group| group.port);
        let told = self.outcomes(progress, stop).await;
        told.with_context(|| format!("it is not known what became of the kill; see: portwatch who {port}"))
    }

    async fn outcomes(
        &mut self,
        progress: &mut dyn FnMut(&Progress<'_>),
        stop: impl Future<Output = ()>,
    ) -> anyhow::Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        let mut stop = pin!(stop);
        let mut stopping = None;
        loop {
            let response = tokio::select! {
                biased;
                () = &mut stop, if stopping.is_none() => {
                    self.client.send(&Request::Stop {}).await?;
                    stopping = Some(Instant::now() + STOPPING);
                    continue;
                }
                response = timeout(KILLING, self.client.read()) => response,
                () = sleep_until(stopping.unwrap_or_else(Instant::now)), if stopping.is_some() => {
                    bail!("the agent does not stop the kill: it may go on, to SIGKILL where that follows");
                }
            };
            match response.map_err(|_| anyhow!("the agent says nothing any more"))?? {
                Response::Progress { pid, name, step } => {
                    let process = Process::bare(ProcessId { pid, start: 0 }, name);
                    progress(&Progress { process: &process, step });
                }
                Response::Outcome(told) => outcomes.push(Outcome::from(*told)),
                Response::End { count, .. } if count == outcomes.len() => return Ok(outcomes),
                _ => bail!("the agent does not tell what became of {} ports", self.plan.groups.len()),
            }
        }
    }
}

/// Changes as the agent tells them.
#[derive(Debug)]
pub struct Subscription {
    client: Client,
    /// What is open as far as was told, so that an interruption can be made good.
    open: Open,
    /// After an interruption: what was lost, and what is open now as far as it was told anew.
    anew: Option<(u64, Open)>,
    past: Past,
    narrowed: bool,
}

/// Listeners that are open, in the order in which they became known. Of each, the agent may learn a cookie or an inode
/// after it has told of it, so what identifies one is matched as the table does it.
#[derive(Debug, Default)]
struct Open {
    next: u64,
    listeners: BTreeMap<u64, (Identity, Listener)>,
    index: Index,
}

impl Open {
    fn find(&self, socket: &Socket) -> Option<u64> {
        let found = self.index.find(socket.id, socket.mptcp, |entry| self.listeners.get(&entry).map(|(it, _)| it));
        match found {
            Found::Same(entry) => Some(entry),
            Found::Reused(_) | Found::Unknown => None,
        }
    }

    /// In place of what was known of it.
    fn put(&mut self, listener: Listener) {
        let (id, mptcp) = (listener.socket.id, listener.socket.mptcp);
        let entry = self.find(&listener.socket).unwrap_or(self.next);
        self.next = self.next.max(entry + 1);
        let known = self.listeners.remove(&entry).map(|(identity, _)| identity);
        let mut identity = known.unwrap_or_else(|| Identity::new(id, mptcp));
        identity.learn(id, mptcp);
        self.index.add(&identity, entry);
        self.listeners.insert(entry, (identity, listener));
    }

    fn remove(&mut self, socket: &Socket) {
        if let Some(entry) = self.find(socket)
            && let Some((identity, _)) = self.listeners.remove(&entry)
        {
            self.index.remove(&identity, entry);
        }
    }
}

/// What happened before a subscription began, oldest first, its times in [`Utc`].
#[derive(Debug, Default)]
pub struct Past {
    pub changes: Vec<Change>,
    /// Whether there was more, which a limit left out.
    pub more: bool,
}

impl Subscription {
    /// Begins to watch. What is open already is no change. With `since`, what happened from then on is asked for as well:
    /// see [`Self::take_past`].
    ///
    /// # Errors
    /// As [`Client::read_answer`].
    pub async fn begin(mut client: Client, selection: Selection, since: Option<Utc>) -> anyhow::Result<Subscription> {
        client.send(&Request::Watch { selection, since }).await?;
        let mut open = Open::default();
        let mut past = Past::default();
        loop {
            match client.read_answer().await? {
                Response::Past { change } => past.changes.push(change),
                Response::Listener { listener, .. } => open.put(listener),
                Response::Watching { more, narrowed, .. } => {
                    past.more = more;
                    return Ok(Subscription { client, open, anew: None, past, narrowed });
                }
                _ => return Err(client.unexpected()),
            }
        }
    }

    /// What happened from the time that was asked for until the first change that [`Self::next`] tells, without gap or
    /// repetition; nothing the second time.
    pub fn take_past(&mut self) -> Past {
        std::mem::take(&mut self.past)
    }

    /// The next changes. Where some were left out, a [`Change::Resync`] says so, and what became of each listener
    /// meanwhile follows. Cancel safe.
    pub async fn next(&mut self) -> anyhow::Result<Vec<Change>> {
        loop {
            match self.client.read().await? {
                Response::Change { change } => {
                    self.remember(&change);
                    return Ok(vec![change]);
                }
                Response::Lagged { lost } => self.anew = Some((lost, Open::default())),
                Response::Listener { listener, .. } => {
                    if let Some((_, open)) = &mut self.anew {
                        open.put(listener);
                    }
                }
                Response::Watching { at, .. } => {
                    if let Some((lost, open)) = self.anew.take() {
                        return Ok(self.catch_up(at, lost, open));
                    }
                }
                _ => return Err(self.client.unexpected()),
            }
        }
    }

    /// Whether the agent's configuration kept from this user what was not theirs when it began.
    pub fn is_narrowed(&self) -> bool {
        self.narrowed
    }

    /// What is open now of what was asked for.
    pub fn listeners(&self) -> impl Iterator<Item = &Listener> {
        self.open.listeners.values().map(|(_, listener)| listener)
    }

    fn remember(&mut self, change: &Change) {
        match change {
            Change::Opened { listener, .. } | Change::Holders { listener, .. } => {
                self.open.put(listener.clone());
            }
            Change::Closed { listener, .. } => self.open.remove(&listener.socket),
            Change::Conflict { .. } | Change::Resync { .. } => {}
        }
    }

    fn catch_up(&mut self, at: BootNs, lost: u64, now: Open) -> Vec<Change> {
        let before = std::mem::replace(&mut self.open, now);
        let mut changes = vec![Change::Resync { at, lost }];
        // By the entry that each has now; two that turned out to be one socket are one listener less.
        let mut known: HashMap<u64, Listener> = HashMap::new();
        for (_, listener) in before.listeners.into_values() {
            let is_there = |entry: &u64| {
                let now = self.open.listeners.get(entry).map(|(_, now)| now);
                !known.contains_key(entry) && now.is_some_and(|now| !is_moved(&listener.socket, &now.socket))
            };
            if let Some(entry) = self.open.find(&listener.socket).filter(is_there) {
                known.insert(entry, listener);
            } else {
                let by = listener.binder().map(|holder| Arc::clone(&holder.process));
                changes.push(Change::Closed { at, listener, by });
            }
        }
        for (entry, (_, listener)) in &self.open.listeners {
            let listener = listener.clone();
            match known.get(entry) {
                None => changes.push(Change::Opened { at, listener }),
                Some(old) if old.holders != listener.holders => changes.push(Change::Holders { at, listener }),
                Some(_) => {}
            }
        }
        changes
    }
}

/// No socket, or one that an agent left behind.
fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests;
