//! The verbs, a file each, and what they share: from arguments to a selector, from a selector to listeners, and the
//! way to the terminal.

pub(crate) mod agent;
pub(crate) mod completions;
pub(crate) mod diagnose;
pub(crate) mod history;
pub(crate) mod kill;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod man;
pub(crate) mod mark;
mod progress;
pub(crate) mod ps;
pub(crate) mod rules;
pub(crate) mod run;
pub(crate) mod status;
pub(crate) mod stop;
pub(crate) mod top;
pub(crate) mod wait;
pub(crate) mod watch;
pub(crate) mod who;

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anstream::stream::RawStream;
use anstream::{AutoStream, ColorChoice};
use anyhow::{Context, anyhow};
use jiff::tz::TimeZone;
use nix::unistd::{Uid, User};
use portwatch::client::{Answer, Client, OfNoUse, Subscription};
use portwatch::config::{self, ConfigError};
use portwatch::engine::roster::Lost;
use portwatch::engine::{self, Wanted};
use portwatch::history::Utc;
use portwatch::model::{Listener, NetnsId, ProcessId};
use portwatch::render::json::Ancestors;
use portwatch::render::{self, Clock, View};
use portwatch::select::{Filters, Selector, Sets, Since, Target, parse_targets, without};
use portwatch::source::stat::{self, Stat};
use portwatch::source::{Probe, Scanner, Tier, origin, process};
use portwatch::wire::{Request, Response, Selection};
use tokio::time::timeout;

use crate::cli::{self, Globals, Netns, Selectors};
use crate::exit_codes::Usage;

/// What the arguments mean.
pub(crate) fn selector(targets: &[String], selectors: &Selectors, globals: &Globals) -> anyhow::Result<Selector> {
    let is_narrow = !targets.is_empty();
    let except = read_targets(&selectors.except)?;
    let targets = without(read_targets(targets)?, &except);
    if is_narrow && targets.is_empty() {
        return Err(Usage("--except leaves none of the ports; name others".to_owned()).into());
    }
    let filters = Filters {
        ipv4: selectors.ipv4,
        ipv6: selectors.ipv6,
        tcp: selectors.tcp,
        udp: selectors.udp,
        addresses: selectors.addresses.clone(),
        uids: selectors.users.iter().map(|user| uid(user)).collect::<anyhow::Result<_>>()?,
        pids: selectors.pids.clone(),
        commands: selectors.commands.clone(),
        cwds: selectors.cwds.clone(),
        containers: containers(&selectors.containers)?,
        units: selectors.units.clone(),
        older_than: selectors.older_than,
        since: selectors.since.as_ref().map(|since| moment(since, globals)).transpose()?,
        variables: selectors.variables.clone(),
        descendants_of: selectors.descendants_of.iter().map(|pid| running(*pid)).collect::<anyhow::Result<_>>()?,
        cgroups: selectors.cgroups.clone(),
        orphans: selectors.orphans,
        except,
        netns: match selectors.netns {
            Netns::Own => Some(own_netns()?),
            Netns::All => None,
            Netns::Id(id) => Some(id),
        },
    };
    Ok(Selector::new(targets, filters).with_facts(origin::facts(Uid::effective().as_raw())))
}

/// The moment that `--since` means.
fn moment(since: &cli::Since, globals: &Globals) -> anyhow::Result<Since> {
    match since {
        cli::Since::Ago(ago) => {
            let ago = u64::try_from(ago.as_nanos()).unwrap_or(u64::MAX);
            Ok(Since::After(process::boot_ns_now().saturating_sub(ago)))
        }
        cli::Since::Mark(word) => Ok(Since::Mark(mark::find(word, globals)?.boot_ns)),
    }
}

/// Which process `--descendant-of` names, whoever has its number later.
fn running(pid: u32) -> anyhow::Result<ProcessId> {
    let stat = stat::read(pid);
    stat.map(|stat| stat.id()).map_err(|_| Usage(format!("no process {pid} is running to have descendants")).into())
}

fn read_targets(words: &[String]) -> anyhow::Result<Vec<Target>> {
    parse_targets(words, &sets_for(words)?).map_err(|bad| Usage(bad.to_string()).into())
}

/// The sets of the configuration, which is read only where a target names one.
fn sets_for(targets: &[String]) -> anyhow::Result<Sets> {
    if !targets.iter().any(|target| target.contains('@')) {
        return Ok(Sets::new());
    }
    match config::sets(&|name| std::env::var_os(name), Uid::effective().as_raw()) {
        Err(ConfigError::Broken(what)) => Err(Usage(what).into()),
        Err(missing @ ConfigError::Missing(_)) => {
            Err(Usage(format!("{missing}; set PORTWATCH_CONFIG to another, or unset it")).into())
        }
        sets => Ok(sets?),
    }
}

/// A name is looked up first: a user may be called `1000`.
fn uid(user: &str) -> anyhow::Result<u32> {
    if let Some(found) = User::from_name(user).with_context(|| format!("cannot look up user '{user}'"))? {
        return Ok(found.uid.as_raw());
    }
    user.parse().map_err(|_| {
        Usage(format!("no user is called '{}'; use a name of this host or a uid", user.escape_debug())).into()
    })
}

/// What `--container` names, asked of the engine once.
fn containers(words: &[String]) -> anyhow::Result<Vec<Wanted>> {
    if words.is_empty() {
        return Ok(Vec::new());
    }
    let (_, roster) = engine::ask();
    let wanted = words.iter().map(|word| {
        roster.find(word).map_err(|lost| match lost {
            Lost::Unknown(message) => Usage(message).into(),
            Lost::Unreachable(error) => {
                anyhow::Error::new(error).context(format!("cannot look up '{}' by name", render::escape(word)))
            }
        })
    });
    let wanted = wanted.collect::<anyhow::Result<_>>()?;
    if let Some(error) = roster.error() {
        note(&format!("--container is compared with ids alone, and ports published for it are not found: {error}"));
    }
    Ok(wanted)
}

fn own_netns() -> anyhow::Result<NetnsId> {
    let path = "/proc/self/ns/net";
    let inode = fs::metadata(path).with_context(|| format!("cannot read {path}; is /proc mounted?"))?.ino();
    NetnsId::try_from(inode).with_context(|| format!("{path} has inode {inode}, more than a namespace can have"))
}

/// Set where the agent was found to be of no use, or not there: a verb that asks several times waits for that, and says so,
/// once.
static IS_ALONE: AtomicBool = AtomicBool::new(false);

/// Why the work is done without the agent.
#[derive(Debug)]
pub(crate) enum Alone {
    /// It was not to be asked, or was of no use before.
    Unasked,
    /// There is no socket, or nobody listens at it.
    Nobody,
    /// Beneath [`OfNoUse`] in the chain is why.
    OfNoUse(anyhow::Error),
}

/// What the agent says to `ask`, where it is to be asked and answers. `None`: the work is done without. An agent that is of
/// no use may show that at any word of its answer, so `ask` goes on to the last one that is needed.
async fn through_agent<T>(
    globals: &Globals,
    ask: impl Future<Output = anyhow::Result<Option<T>>>,
) -> anyhow::Result<Option<T>> {
    Ok(agent_or_why(globals, ask).await?.ok())
}

/// The same, and why the work is done without.
async fn agent_or_why<T>(
    globals: &Globals,
    ask: impl Future<Output = anyhow::Result<Option<T>>>,
) -> anyhow::Result<Result<T, Alone>> {
    // Who chooses a probe wants to see what that one sees.
    if globals.no_agent || globals.probe != Probe::Auto || IS_ALONE.load(Ordering::Relaxed) {
        return Ok(Err(Alone::Unasked));
    }
    match ask.await {
        Ok(Some(answer)) => Ok(Ok(answer)),
        Ok(None) => nobody_answers(globals).map(Err),
        Err(error) => go_on_alone(error, globals).map(Err),
    }
}

/// There is nobody to ask: says so where one might think that there is.
fn nobody_answers(globals: &Globals) -> anyhow::Result<Alone> {
    let socket = globals.socket.display();
    if globals.agent {
        anyhow::bail!("no agent answers at {socket}; start one: portwatch agent");
    }
    IS_ALONE.store(true, Ordering::Relaxed);
    if globals.socket.exists() {
        note(&render::escape(&format!("no agent answers at {socket}, though its socket is there; working alone")));
    } else {
        explain(globals, &format!("no agent at {socket}: working alone"));
    }
    Ok(Alone::Nobody)
}

/// What was asked of the agent failed: says that it is done alone from here on, where that can be.
///
/// # Errors
/// The error itself, where it is not the agent's being [of no use](OfNoUse), or the agent had to be asked.
pub(crate) fn go_on_alone(error: anyhow::Error, globals: &Globals) -> anyhow::Result<Alone> {
    if globals.agent || !error.is::<OfNoUse>() {
        return Err(error);
    }
    IS_ALONE.store(true, Ordering::Relaxed);
    note(&render::escape(&format!("{error:#}; working alone")));
    Ok(Alone::OfNoUse(error))
}

/// What the agent is asked; it may take so long at most.
async fn in_time<T>(
    limit: Option<Duration>,
    globals: &Globals,
    ask: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let late = || Err(anyhow!("no answer in time").context(OfNoUse(globals.socket.clone())));
    match limit {
        Some(limit) => timeout(limit, ask).await.unwrap_or_else(|_| late()),
        None => ask.await,
    }
}

/// The agent, for what is more than a question. Once it is reached, it is the caller's to see whether it is of use.
pub(crate) async fn reach_agent(globals: &Globals) -> anyhow::Result<Option<Client>> {
    through_agent(globals, Client::connect(&globals.socket)).await
}

/// The agent's answer; it may take so long at most. `None` as in [`through_agent`].
pub(crate) async fn ask_agent(
    request: &Request,
    limit: Option<Duration>,
    globals: &Globals,
) -> anyhow::Result<Option<Answer>> {
    through_agent(globals, in_time(limit, globals, asked(request, globals))).await
}

/// The agent's health, or why it does not tell.
pub(crate) async fn agent_status(globals: &Globals) -> anyhow::Result<Result<Answer, Alone>> {
    agent_or_why(globals, asked(&Request::Status {}, globals)).await
}

async fn asked(request: &Request, globals: &Globals) -> anyhow::Result<Option<Answer>> {
    match Client::connect_asking(&globals.socket, request).await? {
        Some(mut client) => client.gather().await.map(Some),
        None => Ok(None),
    }
}

/// Changes as the agent tells them, once it has told what is there; that may take so long at most. `None` as in
/// [`through_agent`].
pub(crate) async fn subscribe(
    selector: &Selector,
    since: Option<Utc>,
    limit: Option<Duration>,
    globals: &Globals,
) -> anyhow::Result<Option<Subscription>> {
    let begin = async {
        match Client::connect(&globals.socket).await? {
            Some(client) => Subscription::begin(client, Selection::of(selector), since).await.map(Some),
            None => Ok(None),
        }
    };
    through_agent(globals, in_time(limit, globals, begin)).await
}

/// Whether what is said of the agent can be meant.
pub(crate) fn check(globals: &Globals) -> anyhow::Result<()> {
    match globals.probe {
        Probe::Only(tier) if globals.agent => Err(Usage(format!(
            "--agent asks the agent, which has probes of its own, and --probe {tier} looks without the agent; leave out one"
        ))
        .into()),
        _ => Ok(()),
    }
}

/// For a verb that does its work itself, whether an agent is there or not.
pub(crate) fn works_alone(globals: &Globals) -> anyhow::Result<()> {
    if globals.agent {
        return Err(Usage("this verb does not ask the agent; leave out --agent".to_owned()).into());
    }
    Ok(())
}

/// Runs what talks to the agent.
pub(crate) fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    runtime()?.block_on(future)
}

pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the event loop")
}

/// What was found.
struct Found {
    /// Sorted by port, protocol and address.
    listeners: Vec<Listener>,
    /// Of each holder, if wanted.
    ancestors: Ancestors,
    /// As in [`Answer::narrowed`].
    narrowed: bool,
    /// As [`hidden`] counts them.
    hidden: usize,
}

/// What the selector picks, with the ancestors of each holder if wanted.
fn read(selector: &Selector, globals: &Globals, with_ancestors: bool) -> anyhow::Result<Found> {
    read_within(None, selector, globals, with_ancestors)
}

/// The same; the agent may take so long at most.
fn read_within(
    limit: Option<Duration>,
    selector: &Selector,
    globals: &Globals,
    with_ancestors: bool,
) -> anyhow::Result<Found> {
    let selection = Selection::of(selector);
    let request = if with_ancestors { Request::Who { selection } } else { Request::List { selection } };
    let mut found = match block_on(ask_agent(&request, limit, globals))? {
        Some(answer) => sorted_out(answer),
        None => {
            let (listeners, hidden) = scan(selector, globals)?;
            let ancestors = if with_ancestors { ancestors_of(&listeners) } else { Ancestors::default() };
            Found { listeners, ancestors, narrowed: false, hidden }
        }
    };
    found.listeners.sort_by_key(|Listener { socket, .. }| {
        (socket.port, socket.proto, socket.address, socket.netns, socket.id.inode)
    });
    Ok(found)
}

/// The agent's answer as [`read`] gives it.
fn sorted_out(answer: Answer) -> Found {
    let (mut listeners, mut all) = (Vec::new(), Ancestors::default());
    for response in answer.responses {
        if let Response::Listener { listener, ancestors, .. } = response {
            let holders = listener.holders.iter().map(|holder| holder.process.id.pid);
            all.extend(holders.zip(ancestors));
            listeners.push(listener);
        }
    }
    Found { listeners, ancestors: all, narrowed: answer.narrowed, hidden: 0 }
}

/// What the selector picks, without an agent, and how many may be meant that are [`hidden`].
fn scan(selector: &Selector, globals: &Globals) -> anyhow::Result<(Vec<Listener>, usize)> {
    let mut scanner = Scanner::open(globals.probe);
    if let Some(reason) = scanner.refusal() {
        explain(globals, &format!("holders are read from {}: {reason}", scanner.method()));
    }
    let snapshot = scanner.scan_in(selector.filters().netns, &|socket| selector.matches_socket(socket))?;
    for text in scanner.notes() {
        explain(globals, text);
    }
    let (listeners, left_out): (Vec<_>, Vec<_>) =
        snapshot.listeners.into_iter().partition(|listener| selector.matches(listener, snapshot.at));
    Ok((listeners, hidden(selector, &left_out)))
}

/// How many of those that were left out may be meant all the same: others hold them, whose processes are not visible.
fn hidden(selector: &Selector, left_out: &[Listener]) -> usize {
    left_out.iter().filter(|listener| selector.may_mean(listener)).count()
}

/// The ancestors of every holder, nearest first, as far as /proc shows them.
fn ancestors_of(listeners: &[Listener]) -> Ancestors {
    let known: RefCell<HashMap<u32, Option<Stat>>> = RefCell::default();
    let stat = |pid| known.borrow_mut().entry(pid).or_insert_with(|| stat::read(pid).ok()).clone();
    let holders = listeners.iter().flat_map(|listener| &listener.holders).map(|holder| holder.process.id.pid);
    holders.map(|pid| (pid, stat::lineage(pid, &stat))).collect()
}

/// Says under `--verbose` what was tried and refused.
pub(crate) fn explain(globals: &Globals, text: &str) {
    if globals.verbose {
        note(&render::escape(text));
    }
}

/// How long the agent may take for its first answer where there is less time than that: one look is due in any case.
pub(crate) const FIRST_LOOK: Duration = Duration::from_millis(500);

/// What an agent keeps from people that tells them of [their own](Answer::narrowed), for the end of a sentence.
pub(crate) const OWN_ONLY: &str = "this agent tells users of their own only (try --no-agent, or root)";

/// Without a duration, for ever and without a timer: nothing wakes while nothing happens.
pub(crate) async fn sleep(duration: Option<Duration>) {
    match duration {
        Some(duration) => tokio::time::sleep(duration).await,
        None => std::future::pending().await,
    }
}

/// The sentence that there is nothing.
fn nothing_listens(targets: &[String], selector: &Selector, narrowed: bool, hidden: usize) -> String {
    let nothing = nothing(targets, selector, if narrowed { " of yours" } else { "" }, hidden);
    if narrowed { format!("{nothing}; {OWN_ONLY}") } else { nothing }
}

/// The same of what is `of_yours`.
pub(crate) fn nothing(targets: &[String], selector: &Selector, of_yours: &str, hidden: usize) -> String {
    let (filters, targets) = selection(targets, selector);
    let nothing = format!("nothing{of_yours}{filters} is listening{targets}");
    match hidden {
        0 => nothing,
        1 => format!("{nothing} that is visible to you; a listener of another user may match: try sudo"),
        _ => format!("{nothing} that is visible to you; {hidden} listeners of other users may match: try sudo"),
    }
}

/// What the selection was, for such sentences: something may well listen on a port of which a filter wants nothing.
pub(crate) fn selection(targets: &[String], selector: &Selector) -> (&'static str, String) {
    let filters = if selector.has_filters() { " that matches the selectors" } else { "" };
    let targets = render::escape(&targets.join(" ")).into_owned();
    (filters, if targets.is_empty() { targets } else { format!(" on {targets}") })
}

/// The users of this host, each looked up once.
#[derive(Default)]
pub(crate) struct Users(RefCell<HashMap<u32, Option<String>>>);

impl Users {
    pub(crate) fn name(&self, uid: u32) -> Option<String> {
        let look_up = || User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name);
        self.0.borrow_mut().entry(uid).or_insert_with(look_up).clone()
    }
}

/// The clock, terminal and colours of standard output, as they are now.
pub(crate) fn view(users: &dyn Fn(u32) -> Option<String>) -> View<'_> {
    view_on(&io::stdout(), users)
}

/// The same of another stream.
pub(crate) fn view_on<'a>(stream: &(impl RawStream + AsFd), users: &'a dyn Fn(u32) -> Option<String>) -> View<'a> {
    View {
        clock: clock(),
        users,
        euid: Uid::effective().as_raw(),
        width: stream.is_terminal().then(|| columns(stream)),
        // Never: no terminal, or NO_COLOR. Everything shown is escaped, so nothing needs to be stripped later.
        colours: AutoStream::choice(stream) != ColorChoice::Never,
    }
}

/// This moment, on both clocks.
pub(crate) fn clock() -> Clock {
    static ZONE: LazyLock<TimeZone> = LazyLock::new(zone);
    process::clock(ZONE.clone())
}

/// The host's, unless `TZ` names one. Read from its file, because [`TimeZone::system`] lists every zone that is known so
/// as to find its name, which nobody is shown: that takes longer than an answer of the agent.
fn zone() -> TimeZone {
    let local = || TimeZone::tzif("local", &fs::read("/etc/localtime").ok()?).ok();
    let named = std::env::var_os("TZ").is_some();
    if named { None } else { local() }.unwrap_or_else(TimeZone::system)
}

/// Columns of a terminal; 80 where it does not know.
pub(crate) fn columns(terminal: impl AsFd) -> usize {
    let window = rustix::termios::tcgetwinsize(terminal).ok().map(|size| usize::from(size.ws_col));
    let variable = || std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    window.filter(|columns| *columns > 0).or_else(variable).filter(|columns| *columns > 0).unwrap_or(80)
}

/// Writes to standard output. The error of a reader that went away ends the program without a word.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("cannot write to standard output")
}

/// One line on stderr. A closed stderr is nobody's error.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "portwatch: {text}");
}

/// Why a tier is not in use, fit for a terminal.
pub(crate) fn refused(tier: Tier, reason: &str) -> String {
    format!("{tier}: {}", render::escape(reason))
}
