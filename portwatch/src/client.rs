//! A connection to the agent.

use std::collections::HashMap;
use std::io;
use std::iter;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_util::codec::{Framed, LinesCodec};

use crate::history::Utc;
use crate::kill::{Concern, Outcome, Plan, Progress};
use crate::model::{BootNs, Change, Listener, Process, ProcessId, SocketId};
use crate::source::netns::Unknown;
use crate::wire::{ErrorKind, Kill, Request, Response, Selection, VERSION};

/// Where the agent listens unless told otherwise.
pub const SOCKET: &str = "/run/portwatch/agent.sock";

/// How long the agent may take to greet. One that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long the agent may take for the plan of a kill: a scan, and what container engines and systemd are asked.
const PLANNING: Duration = Duration::from_secs(20);

/// How long the agent may say nothing during a kill. It speaks each second while it waits for a process, but not while one
/// that got SIGKILL is torn down (a minute at most).
const KILLING: Duration = Duration::from_secs(120);

/// The longest line from the agent in bytes: a listener with thousands of holders.
const MAX_RESPONSE: usize = 256 << 20;

/// A greeted connection.
#[derive(Debug)]
pub struct Client {
    lines: Framed<UnixStream, LinesCodec>,
}

impl Client {
    /// Connects to the agent at `socket`. `None`: nobody is there.
    ///
    /// # Errors
    /// Somebody is there, and it is of no use: another version, too busy, hanging, or no agent at all.
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
            let mut client = Client { lines: Framed::new(stream, LinesCodec::new_with_max_length(MAX_RESPONSE)) };
            // Who is turned away may find the door shut already, and is told why all the same.
            let _ = client.send_all(iter::once(&Request::Hello { version: VERSION }).chain(request)).await;
            match client.read().await? {
                Response::Hello { version: VERSION, .. } => Ok(Some(client)),
                other => Err(anyhow!("no greeting, but {other:?}")),
            }
        };
        let connected = timeout(PATIENCE, greet).await.unwrap_or_else(|_| Err(anyhow!("no answer within 2 s")));
        connected.with_context(|| format!("the agent at {} is of no use", socket.display()))
    }

    pub async fn send(&mut self, request: &Request) -> anyhow::Result<()> {
        self.send_all(iter::once(request)).await
    }

    async fn send_all<'a>(&mut self, requests: impl Iterator<Item = &'a Request>) -> anyhow::Result<()> {
        let lines = requests.map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
        // Its text alone: to those above, a broken pipe is that of standard output.
        let sent = self.lines.send(lines.join("\n")).await;
        sent.map_err(|error| anyhow!("cannot write to the agent: {error}"))
    }

    /// The next line. Cancel safe.
    ///
    /// # Errors
    /// The agent's own, too.
    pub async fn read(&mut self) -> anyhow::Result<Response> {
        let line = self.lines.next().await.context("the agent hung up")?.context("cannot read from the agent")?;
        match serde_json::from_str(&line).context("the agent speaks another language")? {
            Response::Error { kind, message, netns } => Err(match (kind, netns) {
                (ErrorKind::Usage, Some(id)) => Unknown(id).into(),
                (ErrorKind::Denied, _) => io::Error::new(io::ErrorKind::PermissionDenied, message).into(),
                _ => anyhow!(message),
            }),
            response => Ok(response),
        }
    }

    /// Asks, and gathers the answer without its end; and whether a limit left something out.
    pub async fn ask(&mut self, request: &Request) -> anyhow::Result<(Vec<Response>, bool)> {
        self.send(request).await?;
        self.gather().await
    }

    /// The answer to what was asked, without its end; and whether a limit left something out.
    pub async fn gather(&mut self) -> anyhow::Result<(Vec<Response>, bool)> {
        let mut answer = Vec::new();
        loop {
            match self.read().await? {
                Response::End { count, more } if count == answer.len() => return Ok((answer, more)),
                Response::End { count, .. } => bail!("the agent told {} of {count}", answer.len()),
                response => answer.push(response),
            }
        }
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
            self.read().await
        };
        match timeout(PLANNING, ask).await.map_err(|_| anyhow!("the agent makes no plan"))?? {
            Response::Plan { plan, concerns } => Ok(PlannedKill { client: self, is_dry_run, plan: *plan, concerns }),
            other => bail!("the agent makes no plan, but says {other:?}"),
        }
    }
}

impl PlannedKill {
    /// Has it done, and waits for what became of each port; of a dry run, what would. `progress` is told of each process.
    ///
    /// # Errors
    /// The agent failed or is lost: who was signalled by then is not known.
    pub async fn carry_out(mut self, progress: &mut dyn FnMut(&Progress<'_>)) -> anyhow::Result<Vec<Outcome>> {
        if !self.is_dry_run {
            self.client.send(&Request::Confirm {}).await.context("nothing was signalled; try again")?;
        }
        let port = self.plan.groups.first().map_or(0, |group| group.port);
        let told = self.outcomes(progress).await;
        told.with_context(|| format!("it is not known what became of the kill; see: portwatch who {port}"))
    }

    async fn outcomes(&mut self, progress: &mut dyn FnMut(&Progress<'_>)) -> anyhow::Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        loop {
            let response = timeout(KILLING, self.client.read()).await;
            match response.map_err(|_| anyhow!("the agent says nothing any more"))?? {
                Response::Progress { pid, name, step } => {
                    let process = Process::bare(ProcessId { pid, start: 0 }, name);
                    progress(&Progress { process: &process, step });
                }
                Response::Outcome(told) => outcomes.push(Outcome::from(*told)),
                Response::End { count, .. } if count == outcomes.len() => return Ok(outcomes),
                other => bail!("the agent does not tell what became of {} ports: {other:?}", self.plan.groups.len()),
            }
        }
    }
}

/// Changes as the agent tells them.
#[derive(Debug)]
pub struct Subscription {
    client: Client,
    /// What is open as far as was told, so that an interruption can be made good.
    open: HashMap<SocketId, Listener>,
    /// After an interruption: what was lost, and what is open now as far as it was told anew.
    anew: Option<(u64, HashMap<SocketId, Listener>)>,
    past: Past,
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
    pub async fn begin(mut client: Client, selection: Selection, since: Option<Utc>) -> anyhow::Result<Subscription> {
        client.send(&Request::Watch { selection, since }).await?;
        let mut open = HashMap::new();
        let mut past = Past::default();
        loop {
            match client.read().await? {
                Response::Past { change } => past.changes.push(change),
                Response::Listener { listener, .. } => drop(open.insert(listener.socket.id, listener)),
                Response::Watching { more, .. } => {
                    past.more = more;
                    return Ok(Subscription { client, open, anew: None, past });
                }
                other => bail!("the agent does not watch, but says {other:?}"),
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
                Response::Lagged { lost } => self.anew = Some((lost, HashMap::new())),
                Response::Listener { listener, .. } => {
                    if let Some((_, open)) = &mut self.anew {
                        open.insert(listener.socket.id, listener);
                    }
                }
                Response::Watching { at, .. } => {
                    if let Some((lost, open)) = self.anew.take() {
                        return Ok(self.catch_up(at, lost, open));
                    }
                }
                other => bail!("the agent stopped watching: {other:?}"),
            }
        }
    }

    /// What is open now of what was asked for.
    pub fn listeners(&self) -> impl Iterator<Item = &Listener> {
        self.open.values()
    }

    fn remember(&mut self, change: &Change) {
        match change {
            Change::Opened { listener, .. } | Change::Holders { listener, .. } => {
                self.open.insert(listener.socket.id, listener.clone());
            }
            Change::Closed { listener, .. } => {
                self.open.remove(&listener.socket.id);
            }
            Change::Conflict { .. } | Change::Resync { .. } => {}
        }
    }

    fn catch_up(&mut self, at: BootNs, lost: u64, now: HashMap<SocketId, Listener>) -> Vec<Change> {
        let before = std::mem::replace(&mut self.open, now);
        let mut changes = vec![Change::Resync { at, lost }];
        for (id, listener) in &before {
            if !self.open.contains_key(id) {
                let by = listener.binder().map(|holder| Arc::clone(&holder.process));
                changes.push(Change::Closed { at, listener: listener.clone(), by });
            }
        }
        for (id, listener) in &self.open {
            let listener = listener.clone();
            match before.get(id) {
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
