//! `portwatch wait`: returns the moment that ports are bound, or free.
//!
//! ```text
//!  one snapshot ─► look at the sockets ─► probes attached: snapshot, ─┐
//!       │          every 20 ms            then a look after each event ┤ true, or time is up
//!       └────────────────┴─────────────────────────────────────────────┴──────────────────────► report
//! ```
//! Where the kernel allows no probes, the second state is the last. Where it does, the time-out is the only timer, but
//! for what no event tells: a port that nobody listens on and that still cannot be bound, and a listener that becomes
//! old enough. Signals end it as they end any program: there is nothing to clean up.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{ArgGroup, Args};
use nix::unistd::Uid;
use portwatch::model::{Listener, Protocol, Socket};
use portwatch::render::{self, json};
use portwatch::select::{Filters, Selector};
use portwatch::source::process;
use portwatch::source::{Live, POLL_INTERVAL, Probe, Scanner, Tier, diag, trial::Bind};
use portwatch::tracker::Tracker;
use portwatch::waiting::{Condition, Goal, Look, Scope};
use tokio::task::JoinHandle;

use super::{
    FIRST_LOOK, Found, OWN_ONLY, Users, explain, go_on_alone, note, print, read_within, refused, scan, selector, sleep,
    subscribe, view,
};
use crate::cli::{Globals, Netns, Selectors, TARGETS, duration};
use crate::exit_codes::{self, NO, Usage};
use portwatch::feed::Feed;

#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("goal").required(true).args(["bound", "free"]),
    after_help = format!("\
Examples:
  portwatch wait 5432 --bound --timeout 30s && make test
  portwatch wait 8000 --free
  portwatch wait 3000-3005 --bound --any --json
  portwatch wait --command '*gunicorn*' --bound

A port is free when nothing that matches listens on it and a bind would succeed: one of UDP for PORT/udp and --udp, else of
TCP. With --pid, --command and the like, whoever else has it does not matter. Exit code 1: time ran out.
{TARGETS}"))]
pub(crate) struct WaitArgs {
    /// Ports to wait for
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<String>,
    /// Until something listens
    #[arg(long)]
    pub(crate) bound: bool,
    /// Until nothing listens and the port can be bound
    #[arg(long)]
    pub(crate) free: bool,
    /// Every port, each one of a range too (the default)
    #[arg(long, conflicts_with = "any")]
    pub(crate) all: bool,
    /// At least one of the ports
    #[arg(long)]
    pub(crate) any: bool,
    /// How long at most, such as 30s; 0 looks once; without, for ever
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Say nothing but why not
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) selectors: Selectors,
}

/// How often sockets are looked at without events. A look takes half a millisecond, nearly all of it in the kernel.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The idle time between two looks, as a multiple of what a look took: where that is dear, it is done less often.
const REST: u32 = 19;

/// The first and the last interval at which a lingering port is tried, each twice the one before. A close is told
/// before the kernel lets go of the port, which takes microseconds; a connection may stay for a minute.
const TRY_FIRST: Duration = Duration::from_millis(1);
const TRY_LAST: Duration = Duration::from_millis(100);

pub(crate) fn run(args: &WaitArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let begun = Instant::now();
    let selector = selector(&args.targets, &args.selectors, globals)?;
    if selector.is_empty() {
        return Err(Usage("wait is missing a port; try: portwatch wait 8000 --bound".to_owned()).into());
    }
    let goal = if args.bound { Goal::Bound } else { Goal::Free };
    let scope = if args.any { Scope::Any } else { Scope::All };
    let condition = Condition::new(selector, goal, scope, args.selectors.netns == Netns::Own);
    let mut wait = Wait { args, globals, condition, begun, next_try: TRY_FIRST, is_alone: false };

    // What is true already needs no probes.
    let limit = wait.left().map(|left| left.max(FIRST_LOOK));
    let Found { mut listeners, narrowed, .. } = read_within(limit, wait.condition.selector(), globals, false)?;
    match (narrowed, globals.agent) {
        (false, _) => {}
        // A port is taken whoever holds it, and that anybody may see.
        (true, false) => {
            wait.is_alone = true;
            (listeners, _) = scan(wait.condition.selector(), globals)?;
        }
        (true, true) if args.free => {
            return Err(Usage(format!("wait --free needs to know of all listeners, and {OWN_ONLY}")).into());
        }
        (true, true) => wait.condition.narrow(),
    }
    let look = wait.look(&listeners)?;
    let at_once = look.is_true() || args.timeout == Some(Duration::ZERO);
    if at_once || wait.is_over() {
        return wait.report(&look, at_once);
    }
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    // The thread that attaches probes goes when it is done, and not with a timer of its own.
    let runtime = runtime.enable_all().thread_keep_alive(Duration::ZERO).build();
    let runtime = runtime.context("cannot start the event loop")?;
    let code = runtime.block_on(wait.go_on(&listeners));
    // Where it came true while probes were being attached, nobody waits for them.
    runtime.shutdown_background();
    code
}

struct Wait<'a> {
    args: &'a WaitArgs,
    globals: &'a Globals,
    condition: Condition,
    begun: Instant,
    /// When to try a lingering port again.
    next_try: Duration,
    /// Whether the agent is not asked, because it tells of the caller's own listeners only.
    is_alone: bool,
}

impl Wait<'_> {
    /// `seen` is what the first look saw.
    async fn go_on(mut self, seen: &[Listener]) -> anyhow::Result<ExitCode> {
        let meant = self.sockets_meant();
        let subscribed = match self.is_alone {
            true => None,
            false => tokio::select! {
                subscribed = subscribe(&meant, None, None, self.globals) => subscribed?,
                // Alone, there is time for one more look.
                () = sleep(self.left()) => match self.globals.agent {
                    true => return self.report(&self.look(seen)?, false),
                    false => None,
                },
            },
        };
        if let Some(subscription) = subscribed {
            explain(self.globals, "waiting (agent)");
            match self.by_events(Feed::Agent(Box::new(subscription))).await {
                // An agent that ends, or is started anew, changes nothing of what is waited for.
                Err(error) => drop(go_on_alone(error, self.globals)?),
                done => return done,
            }
        }
        let probe = self.globals.probe;
        // Probes take a tenth of a second to attach: what happens meanwhile is looked for.
        let opening = tokio::task::spawn_blocking(move || Live::open(probe, None));
        match self.by_polling(opening).await? {
            Polled::Over(code) => Ok(code),
            Polled::Attached(live) => self.by_events(Feed::Own(Box::new(Tracker::follow(*live)?))).await,
        }
    }

    /// The sockets that may come to be meant, whoever holds them and for however long.
    fn sockets_meant(&self) -> Selector {
        let selector = self.condition.selector();
        let Filters { ipv4, ipv6, tcp, udp, netns, ref addresses, .. } = *selector.filters();
        let addresses = addresses.clone();
        let filters = Filters { ipv4, ipv6, tcp, udp, netns, addresses, ..Filters::default() };
        Selector::new(selector.targets().to_vec(), filters)
    }

    async fn by_events(&mut self, mut feed: Feed) -> anyhow::Result<ExitCode> {
        loop {
            let look = self.look(feed.listeners())?;
            if look.is_true() || self.is_over() {
                return self.report(&look, false);
            }
            let again = self.again(look.is_lingering(), feed.listeners())?;
            tokio::select! {
                // In this order: a flood of changes must not keep the end from coming.
                biased;
                () = sleep(self.left()) => {}
                () = sleep(again) => {}
                changes = feed.next() => { changes?; }
            }
        }
    }

    /// Until probes are attached, or for good where there are none. Asks for the sockets, which is cheap, and for who
    /// holds them only where they have changed, or now and then where holders matter.
    async fn by_polling(&mut self, opening: JoinHandle<anyhow::Result<Live>>) -> anyhow::Result<Polled> {
        let selector = self.condition.selector().clone();
        let in_own_netns = self.args.selectors.netns == Netns::Own;
        let interval = if in_own_netns { LOOK_EVERY } else { POLL_INTERVAL };
        let mut scanner = Scanner::open(Probe::Only(Tier::Poll));
        let mut opening = Some(opening);
        let mut known = None;
        let mut listeners: Vec<Listener> = Vec::new();
        let mut scanned = Instant::now();
        loop {
            let began = Instant::now();
            let sockets = if in_own_netns { Some(sockets(&selector)?) } else { None };
            let rest = interval.max(began.elapsed() * REST);
            let is_old = scanned.elapsed() >= POLL_INTERVAL && selector.has_process_filters();
            if sockets.is_none() || sockets != known || is_old {
                listeners = scanner.scan(!in_own_netns, &|socket| selector.matches_socket(socket))?.listeners;
                scanned = Instant::now();
            }
            known = sockets;
            let look = self.look(&listeners)?;
            if look.is_true() || self.is_over() {
                return self.report(&look, false).map(Polled::Over);
            }
            let attached = async {
                match &mut opening {
                    Some(opening) => opening.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                live = attached => {
                    opening = None;
                    let live = live.context("attaching probes panicked")??;
                    for refusal in live.refusals() {
                        explain(self.globals, &refused(refusal.tier, &refusal.reason));
                    }
                    explain(self.globals, &format!("waiting ({})", live.tier()));
                    if live.tier().is_event_driven() {
                        return Ok(Polled::Attached(Box::new(live)));
                    }
                }
                () = tokio::time::sleep(self.left().map_or(rest, |left| left.min(rest))) => {}
            }
        }
    }

    fn look<'l>(&'l self, listeners: impl IntoIterator<Item = &'l Listener>) -> anyhow::Result<Look<'l>> {
        let mut in_use = |proto, address, port| {
            // IPv6 alone, else `::` would ask about IPv4 as well.
            let server = Bind::server(SocketAddr::new(address, port), Some(true));
            Bind { proto, reuseaddr: proto == Protocol::Tcp, ..server }.is_in_use(None)
        };
        Ok(self.condition.look(listeners, process::boot_ns_now(), &mut in_use))
    }

    /// When to look again although nothing happens.
    fn again<'l>(
        &mut self,
        is_lingering: bool,
        listeners: impl IntoIterator<Item = &'l Listener>,
    ) -> anyhow::Result<Option<Duration>> {
        let due = self.condition.due(listeners, process::boot_ns_now());
        if !is_lingering {
            self.next_try = TRY_FIRST;
            return Ok(due);
        }
        let next = self.next_try;
        self.next_try = (next * 2).min(TRY_LAST);
        Ok(Some(next.min(due.unwrap_or(next))))
    }

    /// What is left of the time-out.
    fn left(&self) -> Option<Duration> {
        self.args.timeout.map(|timeout| timeout.saturating_sub(self.begun.elapsed()))
    }

    fn is_over(&self) -> bool {
        self.left() == Some(Duration::ZERO)
    }

    /// `at_once`: nothing was waited for.
    fn report(&self, look: &Look<'_>, at_once: bool) -> anyhow::Result<ExitCode> {
        let elapsed = self.begun.elapsed();
        let euid = Uid::effective().as_raw();
        let code = if look.is_true() { ExitCode::SUCCESS } else { ExitCode::from(NO) };
        let mut text = String::new();
        if self.args.json {
            let users = Users::default();
            let name = |uid| users.name(uid);
            text = format!("{}\n", json::line(&json::waited(look, elapsed, &view(&name))));
        } else if !look.is_true() {
            let timeout = self.args.timeout.filter(|_| !at_once);
            let after = timeout.map_or(String::new(), |timeout| format!(" after {timeout:?}"));
            let own_only = if self.condition.is_narrowed() { format!("; {OWN_ONLY}") } else { String::new() };
            note(&format!("{}{own_only}", look.sentence(&after, euid)));
        } else if !self.args.quiet {
            let after = if at_once { String::new() } else { format!(" after {}", render::span(elapsed)) };
            text = look.sentence(&after, euid) + "\n";
        }
        match print(&text) {
            // Whether it is true does not depend on who reads of it.
            Err(error) if !exit_codes::is_broken_pipe(&error) => Err(error),
            _ => Ok(code),
        }
    }
}

/// How polling ended.
enum Polled {
    Over(ExitCode),
    /// From here on the kernel tells.
    Attached(Box<Live>),
}

/// The sockets that may be meant, without their holders, in an order that only changes with them.
fn sockets(selector: &Selector) -> anyhow::Result<Vec<Socket>> {
    let mut sockets = diag::dump()?.sockets;
    sockets.retain(|socket| selector.matches_socket(socket));
    sockets.sort_by_key(|socket| socket.id);
    Ok(sockets)
}
