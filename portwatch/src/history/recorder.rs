//! The agent's side of the store: a bounded queue, and the thread that empties it.
//!
//! ```text
//!  change() ─try_send─► queue ─► pending ── written ──► (empty)
//!     │ full: counted               │ trouble: kept, tried again with a later batch; too many: counted, let go
//!     ▼                             ▼
//!  dropped ──── the next batch that is written finds the count raised ──► needs_snapshot
//! ```
//! The thread sleeps in the queue: it has no timer, and does nothing while nothing happens. It commits when the queue
//! runs empty, or a batch is full. While the store cannot be written, tries take at most a fifth of its time.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TryRecvError, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::sync::oneshot;

use super::files;
use super::health::{Kind, Trouble};
use super::record::{Killed, Record, Row, Wall, What};
use super::store::{Boot, Session, Store};
use super::{Ended, Health, Reader, Retention, State, Utc, utc};
use crate::model::{BootNs, Change, Listener};
use crate::render::Clock;
use crate::select::Selector;
use crate::source::{process, stat};

/// Records that wait: in the queue, and as many in the writer's hands.
const QUEUE: usize = 16 << 10;
/// Bytes of text in all that waits.
const QUEUE_TEXT: usize = 8 << 20;
/// A transaction has at most so many records, and so many bytes of text but for the last record.
const BATCH: usize = 1024;
const BATCH_TEXT: usize = 256 << 10;
/// So many records without a pause leave free memory behind that is worth giving back.
const FLOOD: usize = 10_000;
/// Idle time after a try that failed, as a multiple of what it took.
const REST: u32 = 4;

/// Takes what is to be remembered, without ever waiting. Dropped without [`Recorder::stop`], it leaves a store that looks
/// like that of an agent that died.
#[derive(Debug)]
pub struct Recorder {
    queue: SyncSender<Message>,
    shared: Arc<Shared>,
    /// When the latest resync was.
    resync: Option<BootNs>,
    /// Ends with the writer.
    ended: Receiver<()>,
}

#[derive(Debug)]
enum Message {
    Record(Box<Record>),
    /// Write what there is, then answer.
    Flush(SyncSender<()>),
    /// The same, and the answer is what happened since.
    Replay {
        from: Utc,
        limit: usize,
        selector: Box<Selector>,
        reply: oneshot::Sender<anyhow::Result<Vec<Change>>>,
    },
}

#[derive(Debug)]
struct Shared {
    health: Mutex<Health>,
    needs_snapshot: AtomicBool,
    dropped: AtomicU64,
    /// Bytes of text that wait.
    text: AtomicUsize,
    /// When the agent stopped, in good order.
    stopped: Mutex<Option<Utc>>,
    after_flood: OnceLock<fn()>,
}

impl Shared {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> MutexGuard<'_, Option<Utc>> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_records(&self, count: usize) {
        self.dropped.fetch_add(count as u64, Ordering::Relaxed);
    }
}

impl Recorder {
    /// Begins to record into the database at `path`, which is opened by the writer: a store that cannot be had is told in
    /// [`Recorder::health`] and nowhere else. `clock` is this moment.
    pub fn open(path: &Path, retention: Retention, clock: &Clock) -> Recorder {
        let boot = Boot::current(Wall::of(clock));
        Recorder::begin(path, retention, Session { boot, begun: utc(clock.now_wall) })
    }

    pub(super) fn begin(path: &Path, retention: Retention, session: Session) -> Recorder {
        let (queue, messages) = mpsc::sync_channel(QUEUE);
        let (end, ended) = mpsc::sync_channel(0);
        let shared = Arc::new(Shared {
            health: Mutex::new(Health::new(path)),
            needs_snapshot: AtomicBool::new(true),
            dropped: AtomicU64::new(0),
            text: AtomicUsize::new(0),
            stopped: Mutex::new(None),
            after_flood: OnceLock::new(),
        });
        let mut writer = Writer::new(path, retention, session, Arc::clone(&shared));
        let spawned = thread::Builder::new().name("history".to_owned()).spawn(move || {
            writer.run(&messages);
            // Closes the database.
            drop(writer);
            drop(end);
        });
        if let Err(error) = spawned {
            let mut health = shared.health();
            health.state = State::Unavailable;
            health.reason = Some(format!("cannot start the history thread: {error}; raise the limit of threads"));
        }
        Recorder { queue, shared, resync: None, ended }
    }

    /// What the writer is to do when it has written the last of very many records, and rests. To be said once.
    pub fn after_floods(&self, act: fn()) {
        let _ = self.shared.after_flood.set(act);
    }

    /// Takes in what happened. `clock` is this moment, or one near to it.
    pub fn change(&mut self, change: &Change, clock: &Clock) {
        if let Change::Resync { at, .. } = change {
            self.resync = Some(*at);
        }
        if let Some(record) = Record::of_change(change, self.resync, Wall::of(clock)) {
            self.send(record);
        }
    }

    /// Whether the history may differ from the table: [`Recorder::snapshot`] is due. At first, and after a loss that is
    /// over.
    pub fn needs_snapshot(&self) -> bool {
        self.shared.needs_snapshot.load(Ordering::Relaxed)
    }

    /// Makes the open lives those of `listeners`, which are all of the table as of the changes told so far.
    pub fn snapshot<'a>(&mut self, listeners: impl IntoIterator<Item = &'a Listener>, clock: &Clock) {
        let rows = listeners.into_iter().map(Row::of).collect();
        self.shared.needs_snapshot.store(false, Ordering::Relaxed);
        let what = What::Snapshot(rows);
        if !self.send(Record { at: clock.now_boot_ns, wall: Wall::of(clock), what }) {
            self.shared.needs_snapshot.store(true, Ordering::Relaxed);
        }
    }

    /// Takes in the end of a kill, before or after the closes that it caused.
    pub fn killed(&mut self, killed: Killed<'_>, clock: &Clock) {
        self.send(Record::of_kill(killed, Wall::of(clock)));
    }

    pub fn health(&self) -> Health {
        let dropped = self.shared.dropped.load(Ordering::Relaxed);
        Health { dropped, ..self.shared.health().clone() }
    }

    /// Returns once everything told so far has been written, or has failed to be. Blocks: not for the hot path.
    pub fn flush(&self) {
        let (done, answer) = mpsc::sync_channel(1);
        if self.queue.send(Message::Flush(done)).is_ok() {
            // An error: the writer is gone, and has written what it could.
            let _ = answer.recv();
        }
    }

    /// What happened from `from` until now, as [`super::Reader::since`] tells it: the changes told so far and none that
    /// follows, for the writer reads it, between what was told before and what is told after. Does not wait; the answer
    /// never comes where the writer is too far behind, or gone.
    pub fn replay(
        &self,
        from: Utc,
        limit: usize,
        selector: Box<Selector>,
    ) -> oneshot::Receiver<anyhow::Result<Vec<Change>>> {
        let (reply, answer) = oneshot::channel();
        // Dropped with its message, it tells the other end.
        let _ = self.queue.try_send(Message::Replay { from, limit, selector, reply });
        answer
    }

    /// Writes what is left and notes that the agent stopped in good order. Waits for that `patience` at most; false where
    /// it took longer. `clock` is this moment.
    pub fn stop(self, clock: &Clock, patience: Duration) -> bool {
        *self.shared.stopped() = Some(utc(clock.now_wall));
        self.end(patience)
    }

    /// Waits until the writer has written what is left.
    pub(super) fn end(self, patience: Duration) -> bool {
        drop(self.queue);
        self.ended.recv_timeout(patience) == Err(mpsc::RecvTimeoutError::Disconnected)
    }

    /// Whether there was room for it.
    fn send(&self, record: Record) -> bool {
        let text = record.text();
        let sent = self.shared.text.fetch_add(text, Ordering::Relaxed) + text <= QUEUE_TEXT
            && match self.queue.try_send(Message::Record(Box::new(record))) {
                Ok(()) => true,
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
            };
        if !sent {
            self.shared.text.fetch_sub(text, Ordering::Relaxed);
            self.shared.drop_records(1);
        }
        sent
    }
}

#[derive(Debug)]
struct Writer {
    path: PathBuf,
    retention: Retention,
    session: Session,
    shared: Arc<Shared>,
    /// `None`: not opened yet, or given up for the time being.
    store: Option<Store>,
    /// Whether it was ever opened.
    opened: bool,
    pending: Vec<Record>,
    /// The count of drops up to which a snapshot has been asked for.
    healed: u64,
    /// After a failure: not to be tried before.
    rest: Option<Instant>,
}

impl Writer {
    fn new(path: &Path, retention: Retention, session: Session, shared: Arc<Shared>) -> Writer {
        Writer {
            path: path.to_owned(),
            retention,
            session,
            shared,
            store: None,
            opened: false,
            pending: Vec::new(),
            healed: 0,
            rest: None,
        }
    }

    /// Until the recorder is gone.
    fn run(&mut self, messages: &Receiver<Message>) {
        // So that a store that cannot be had is known at once.
        self.write();
        let mut taken = 0;
        while let Ok(first) = messages.recv() {
            let mut text = 0;
            // At most one of them: each is answered before anything that follows is taken.
            let (mut flush, mut replay) = (None, None);
            let mut is_over = false;
            let mut next = Ok(first);
            loop {
                match next {
                    Ok(Message::Record(record)) => {
                        taken += 1;
                        text += self.take(*record);
                    }
                    Ok(Message::Flush(done)) => flush = Some(done),
                    Ok(Message::Replay { from, limit, selector, reply }) => {
                        replay = Some((from, limit, selector, reply));
                    }
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => {
                        is_over = true;
                        break;
                    }
                }
                let is_awaited = flush.is_some() || replay.is_some();
                if self.pending.len() >= BATCH || text >= BATCH_TEXT || is_awaited {
                    break;
                }
                next = messages.try_recv();
            }
            let is_awaited = flush.is_some() || replay.is_some();
            if self.rest.is_none_or(|rest| rest <= Instant::now()) || is_awaited {
                self.write();
            }
            self.bound_pending();
            if is_over && taken >= FLOOD {
                taken = 0;
                if let Some(act) = self.shared.after_flood.get() {
                    act();
                }
            }
            // Whoever asked may have given up.
            if let Some(done) = flush {
                let _ = done.send(());
            }
            if let Some((from, limit, selector, reply)) = replay {
                let _ = reply.send(self.replay(from, limit, &selector));
            }
        }
        self.write();
        if let (Some(store), Some(stopped)) = (&mut self.store, *self.shared.stopped())
            && let Err(trouble) = store.stop(stopped)
        {
            self.tell(&trouble);
        }
    }

    /// Looks now, while it can be told, whether a close was the end of its process. Says the bytes of its text.
    fn take(&mut self, mut record: Record) -> usize {
        if let What::Closed { how: how @ Ended::Closed, by: Some(by), .. } = &mut record.what
            && stat::has_ended(by.id)
        {
            *how = Ended::Exited;
        }
        let text = record.text();
        self.pending.push(record);
        text
    }

    fn write(&mut self) {
        let begun = Instant::now();
        let dropped = self.shared.dropped.load(Ordering::Relaxed);
        // A second time where a file has had to be replaced.
        match self.try_write().or_else(|trouble| if self.replace(&trouble) { self.try_write() } else { Err(trouble) }) {
            Ok(()) => {
                self.rest = None;
                self.let_go();
                if dropped != self.healed {
                    self.healed = dropped;
                    self.shared.needs_snapshot.store(true, Ordering::Relaxed);
                }
                self.measure();
            }
            Err(trouble) => {
                self.tell(&trouble);
                self.store = None;
                self.rest = Some(Instant::now() + begun.elapsed() * REST);
                if trouble.kind == Kind::Refused {
                    self.shared.drop_records(self.pending.len());
                    self.let_go();
                }
            }
        }
    }

    fn try_write(&mut self) -> Result<(), Trouble> {
        let store = match &mut self.store {
            Some(store) => store,
            None => {
                let store = Store::open(&self.path, self.retention, &self.session)?;
                if self.opened {
                    self.shared.needs_snapshot.store(true, Ordering::Relaxed);
                }
                self.opened = true;
                self.store.insert(store)
            }
        };
        if self.pending.is_empty() { Ok(()) } else { store.write(&self.pending, utc(Timestamp::now())) }
    }

    /// What is not written yet would be missing, so that it must be first.
    fn replay(&self, from: Utc, limit: usize, selector: &Selector) -> anyhow::Result<Vec<Change>> {
        if !self.pending.is_empty() || self.rest.is_some() {
            let reason = self.shared.health().reason.clone().unwrap_or_default();
            anyhow::bail!("the history is not up to date: {reason}");
        }
        Reader::open(&self.path, &process::clock(TimeZone::UTC))?.since(from, limit, selector)
    }

    /// Makes way for a new file; false where that is not the remedy, or fails.
    fn replace(&mut self, trouble: &Trouble) -> bool {
        if trouble.kind == Kind::Replaced {
            self.store = None;
            return true;
        }
        if trouble.kind != Kind::Damaged {
            return false;
        }
        self.store = None;
        match files::set_aside(&self.path, Timestamp::now()) {
            Ok(aside) => {
                let note = format!("{}: set aside as {}, a new one begun", trouble.reason, aside.display());
                self.shared.health().note = Some(note.replace("; setting it aside", ""));
                true
            }
            Err(_) => false,
        }
    }

    fn tell(&self, trouble: &Trouble) {
        let mut health = self.shared.health();
        health.state = trouble.kind.state();
        health.reason = Some(trouble.reason.clone());
    }

    fn measure(&self) {
        let Some(store) = &self.store else { return };
        let (lives, bytes) = (store.lives(), store.bytes());
        let mut health = self.shared.health();
        (health.state, health.reason, health.lives, health.bytes) = (State::Ok, None, lives, bytes);
    }

    fn bound_pending(&mut self) {
        if self.pending.len() > QUEUE || self.shared.text.load(Ordering::Relaxed) > QUEUE_TEXT / 2 {
            self.shared.drop_records(self.pending.len());
            self.let_go();
        }
    }

    fn let_go(&mut self) {
        let text = self.pending.iter().map(Record::text).sum();
        self.shared.text.fetch_sub(text, Ordering::Relaxed);
        self.pending = Vec::new();
    }
}
