//! `portwatch top`: a table of listeners that fills the screen, live, and a way to end those that are picked there.
//!
//! ```text
//!  Feed ──► Change ─┐                       ┌─► draw ──► screen
//!  keys ────────────┼─► State ──► Action ───┤
//!  Deed ──► Told ───┘                       └─► Deed: kill; explain: who
//! ```
//! One task owns the state and takes in one thing after the other; what takes time is done on threads ([`errand`]) that
//! tell it what they found. Nothing is looked at again by time but what time changes: the ages on the screen, and what is
//! shown for a moment.

mod draw;
mod errand;
mod row;
mod state;

use std::fmt::Display;
use std::io::{self, IsTerminal as _};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use portwatch::feed::Feed;
use portwatch::model::{Change, Listener};
use portwatch::render::{View, escape};
use portwatch::select::{Selector, Shown};
use portwatch::source::POLL_INTERVAL;
use portwatch::tracker::Tracker;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Signal, kill_current_process_group};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use self::errand::{About, Deed, Told};
use self::row::Sort;
use self::state::{Action, Planned, State};
use super::{Users, block_on, clock, selector, sleep, subscribe, view};
use crate::cli::{Globals, Selectors, TARGETS, duration};
use crate::commands::watch::limits;
use crate::exit_codes::Usage;

/// Between two frames, however much happens: no eye sees more.
const FRAME: Duration = Duration::from_millis(33);

/// Idle time after a frame, as a multiple of what it took: a storm of changes is to be taken in, above all.
const REST: u32 = 4;

#[derive(Debug, Args)]
#[command(after_help = format!("\
Examples:
  portwatch top
  portwatch top 3000-3999 @dev
  portwatch top --user www-data --sort age

Keys: ↑ ↓ j k select, / filter, s sort, r reverse, Enter details, x end who has the port (shows the plan and asks),
X by SIGKILL, ? help, q quit

{TARGETS}"))]
pub(crate) struct TopArgs {
    /// Ports to show; all without
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<String>,
    /// Sort by this to begin with: port, age (the youngest first), name, user or pid
    // The list that the manual would have of them is one that mandoc does not like.
    #[arg(long, value_enum, default_value_t = Sort::Port, value_name = "COLUMN", hide_possible_values = true)]
    pub(crate) sort: Sort,
    /// Stop after this long, such as 10s or 5m
    #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
    pub(crate) duration: Option<Duration>,
    #[command(flatten)]
    pub(crate) selectors: Selectors,
}

pub(crate) fn run(args: &TopArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    if is_dumb || !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        let instead = "elsewhere use `portwatch list` for a table, or `portwatch watch` for what changes";
        return Err(Usage(format!("top needs a terminal to fill, and to read keys from; {instead}")).into());
    }
    let mut selectors = args.selectors.clone();
    // It comes with time, and no change tells of it: the screen decides.
    let older_than = selectors.older_than.take();
    let selector = selector(&args.targets, &selectors, globals)?;
    let state = State::new(args.sort, older_than);
    block_on(top(state, &selector, globals, args.duration))
}

/// The terminal while it is ours. It is given back however this ends; at a panic by ratatui's hook, before the message.
struct Screen(DefaultTerminal);

impl Screen {
    fn enter() -> anyhow::Result<Screen> {
        ratatui::try_init().map(Screen).map_err(|error| {
            let _ = ratatui::try_restore();
            anyhow::Error::new(error).context("cannot take over the terminal")
        })
    }

    /// Gives it to the shell until that continues us.
    fn suspend(self) -> anyhow::Result<Screen> {
        drop(self);
        // sudo, too, and whoever else the shell takes for the same job.
        kill_current_process_group(Signal::TSTP).context("cannot stop")?;
        Screen::enter()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = ratatui::try_restore();
    }
}

/// What came next.
enum Happened {
    End,
    Key(Event),
    Resized,
    Told(Option<Told>),
    Explained(About),
    Changes(anyhow::Result<Vec<Change>>),
    Time,
}

struct Top<'a> {
    selector: &'a Selector,
    globals: &'a Globals,
    view: View<'a>,
    feed: Feed,
    /// How listeners are learnt, and what cannot be seen so.
    source: String,
    state: State,
    deed: Option<Deed>,
    about: Option<oneshot::Receiver<About>>,
}

async fn top(
    state: State,
    selector: &Selector,
    globals: &Globals,
    duration: Option<Duration>,
) -> anyhow::Result<ExitCode> {
    let users = Users::default();
    let name = |uid| users.name(uid);
    let view = view(&name);
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;
    let mut resized = signal(SignalKind::window_change()).context("cannot handle SIGWINCH")?;
    let (feed, source) = open(selector, globals).await?;
    let mut top = Top { selector, globals, view, feed, source, state, deed: None, about: None };
    top.refill();

    let mut screen = Screen::enter()?;
    if io::stderr().is_terminal() {
        // What is logged from now on would be written across the screen.
        log::set_max_level(log::LevelFilter::Off);
    }
    let (mut keys, mut gone) = (keys(), gone());
    let end = sleep(duration);
    tokio::pin!(end);
    let mut next_frame = Instant::now();
    loop {
        top.view.clock = clock();
        if top.state.is_dirty && Instant::now() >= next_frame {
            let begun = Instant::now();
            let drawn = screen.0.draw(|frame| draw::draw(frame, &mut top.state, &top.source, &top.view));
            drawn.context("cannot draw on the terminal")?;
            next_frame = Instant::now() + FRAME.max(begun.elapsed() * REST);
        }
        let wake = top.next_wake(next_frame);
        let happened = tokio::select! {
            // In this order: a flood of changes must not keep keys and frames from coming.
            biased;
            () = &mut end => Happened::End,
            _ = terminate.recv() => Happened::End,
            _ = interrupt.recv() => Happened::End,
            _ = hangup.recv() => Happened::End,
            _ = &mut gone => Happened::End,
            key = keys.recv() => key.map_or(Happened::End, Happened::Key),
            _ = resized.recv() => Happened::Resized,
            told = told(&mut top.deed) => Happened::Told(told),
            about = explained(&mut top.about) => Happened::Explained(about),
            () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => Happened::Time,
            changes = top.feed.next() => Happened::Changes(changes),
        };
        top.view.clock = clock();
        let now = top.view.clock.now_boot_ns;
        match happened {
            Happened::End => return Ok(ExitCode::SUCCESS),
            Happened::Time if top.state.is_dirty => {}
            Happened::Time => top.state.tick(now),
            Happened::Resized => top.state.is_dirty = true,
            Happened::Explained(about) => top.state.explained(about),
            Happened::Told(told) => top.hear(told.context("the thread of the kill has failed")?),
            Happened::Changes(changes) => top.take(changes)?,
            Happened::Key(Event::Key(key)) if key.kind != KeyEventKind::Release => match top.state.key(key, now) {
                Action::Quit => return Ok(ExitCode::SUCCESS),
                Action::Suspend => {
                    screen = screen.suspend()?;
                    top.state.is_dirty = true;
                }
                action => top.act(action),
            },
            Happened::Key(_) => top.state.is_dirty = true,
        }
    }
}

impl Top<'_> {
    fn next_wake(&self, next_frame: Instant) -> Option<Instant> {
        if self.state.is_dirty {
            return Some(next_frame);
        }
        let now = self.view.clock.now_boot_ns;
        let wake = self.state.next_wake(now)?;
        Some(Instant::now() + Duration::from_nanos(wake.saturating_sub(now)))
    }

    fn refill(&mut self) {
        let at = clock().now_boot_ns;
        let is_own = matches!(self.feed, Feed::Own(_));
        let listeners = self.feed.listeners();
        // The agent tells only what concerns us.
        let meant = listeners.into_iter().filter(|listener| !is_own || picks(self.selector, listener, at));
        self.state.refill(meant, &self.view);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Nothing | Action::Quit | Action::Suspend => {}
            Action::Explain(listener) => self.about = Some(errand::explain(*listener)),
            Action::Plan { socket, force } => {
                let by_agent = matches!(self.feed, Feed::Agent(_));
                self.deed = Some(Deed::plan(&socket, force, by_agent, self.globals));
            }
            Action::Agree => {
                if let Some(deed) = &self.deed {
                    deed.go();
                }
            }
            Action::Decline => self.deed = None,
        }
    }

    fn hear(&mut self, told: Told) {
        let now = self.view.clock.now_boot_ns;
        match told {
            Told::Plan { plan, concerns, note } => {
                let action = self.state.planned(Planned { plan, concerns, note, is_seen: false });
                self.act(action);
            }
            Told::Progress(line) => self.state.say(line, now),
            Told::Done(outcomes) => {
                self.deed = None;
                self.state.ended(&outcomes, now);
            }
        }
    }

    fn take(&mut self, changes: anyhow::Result<Vec<Change>>) -> anyhow::Result<()> {
        let changes = match (changes, &self.feed) {
            (Ok(changes), _) => changes,
            (Err(error), Feed::Agent(_)) if !self.globals.agent => return self.go_on_alone(&error),
            (Err(error), _) => return Err(error),
        };
        for change in changes {
            let is_meant = match (&self.feed, &change) {
                (Feed::Agent(_), _) | (_, Change::Closed { .. }) => true,
                (Feed::Own(_), Change::Opened { at, listener } | Change::Holders { at, listener }) => {
                    picks(self.selector, listener, *at)
                }
                (Feed::Own(_), change) => Shown::default().concerns(change, self.selector),
            };
            let action = self.state.apply(&change, is_meant, &self.view);
            self.act(action);
        }
        Ok(())
    }

    /// The agent is gone: what it told is learnt by probes of our own from now on.
    fn go_on_alone(&mut self, why: &dyn Display) -> anyhow::Result<()> {
        (self.feed, self.source) = open_own(self.selector, self.globals)?;
        self.refill();
        // A narrow screen shows its beginning.
        let line = format!("going on with probes of our own: {why:#}");
        self.state.say(escape(&line), self.view.clock.now_boot_ns);
        Ok(())
    }
}

fn picks(selector: &Selector, listener: &Listener, at: u64) -> bool {
    selector.matches_socket(&listener.socket) && selector.matches(listener, at)
}

async fn open(selector: &Selector, globals: &Globals) -> anyhow::Result<(Feed, String)> {
    match subscribe(selector, None, None, globals).await? {
        Some(subscription) => Ok((Feed::Agent(Box::new(subscription)), "agent".to_owned())),
        None => open_own(selector, globals),
    }
}

fn open_own(selector: &Selector, globals: &Globals) -> anyhow::Result<(Feed, String)> {
    let tracker = Tracker::open(globals.probe, None)?;
    tracker.check_sees(selector.filters().netns)?;
    let (tier, limits) = (tracker.live().tier(), limits(tracker.live()));
    let source = match tier.is_event_driven() {
        true => format!("{tier}{limits}"),
        false => format!("poll every {} ms{limits}", POLL_INTERVAL.as_millis()),
    };
    Ok((Feed::Own(Box::new(tracker)), source))
}

/// What is typed.
fn keys() -> mpsc::UnboundedReceiver<Event> {
    let (typed, keys) = mpsc::unbounded_channel();
    thread::spawn(move || {
        while let Ok(event) = event::read() {
            if typed.send(event).is_err() {
                return;
            }
        }
    });
    keys
}

/// Resolves once the terminal is gone, of which crossterm tells nothing.
fn gone() -> oneshot::Receiver<()> {
    let (tell, gone) = oneshot::channel();
    thread::spawn(move || {
        let stdin = io::stdin();
        // That it hung up is always told.
        while poll(&mut [PollFd::new(&stdin, PollFlags::empty())], None) == Err(Errno::INTR) {}
        let _ = tell.send(());
    });
    gone
}

async fn told(deed: &mut Option<Deed>) -> Option<Told> {
    match deed {
        Some(deed) => deed.next().await,
        None => std::future::pending().await,
    }
}

async fn explained(about: &mut Option<oneshot::Receiver<About>>) -> About {
    let found = match about {
        Some(receiver) => receiver.await,
        None => std::future::pending().await,
    };
    *about = None;
    // Its thread failed: the rest is shown all the same.
    found.unwrap_or_default()
}
