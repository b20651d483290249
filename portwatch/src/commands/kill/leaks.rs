//! `kill --since`: ends what was left behind, and tells what it was, to people and in a report.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use nix::unistd::Uid;
use portwatch::kill::{self, Cleaned, Cleanup, Directories, Ended, Leak, concern, text};
use portwatch::mark::Marked;
use portwatch::model::{Ancestor, Listener, NetnsId, Protocol, Socket, SocketId};
use portwatch::render::{cut, escape, json, span};
use portwatch::select::{Filters, Selector, Target};
use portwatch::source::{Scanner, process, stat};
use portwatch::wire::{Request, Response, Selection};
use serde::Serialize;

use super::destination::Destination;
use super::way::open_scanner;
use super::{KillArgs, agreed, is_conversation, nothing_signalled, preview, print_done, summary};
use crate::cli::{Globals, Since};
use crate::commands::progress::Display;
use crate::commands::{Users, block_on, mark, print, reach_agent, view};
use crate::exit_codes::{DENIED, NO};

/// Columns of a command that a line shows; the report has all of it.
const COMMAND: usize = 120;

// What goes with `--since` alone.
#[derive(Debug, Args)]
#[command(next_help_heading = "With --since")]
pub(crate) struct LeakArgs {
    /// End processes of every user: without this and --user only one's own are meant, also by root. Exit code 3 where it
    /// cannot be seen whether others' are new, or they may not be ended
    #[arg(long, requires = "since", conflicts_with = "users")]
    pub(crate) all_users: bool,
    /// Write what was left behind to this file, as JSON; a device, a FIFO and /dev/stdout are written to as they are
    #[arg(long, value_name = "FILE", requires = "since", value_hint = clap::ValueHint::FilePath)]
    pub(crate) report: Option<PathBuf>,
    /// Exit with 1 if anything had to be ended
    #[arg(long, requires = "since")]
    pub(crate) fail_on_leak: bool,
}

/// The report: one JSON object. Additions do not break anybody.
#[derive(Debug, Serialize)]
struct Report<'a> {
    time: String,
    /// As it was given.
    since: &'a str,
    /// Whether nothing is left of what appeared since.
    clean: bool,
    leaks: Vec<Row<'a>>,
    /// Those of other users of which nobody told whether they appeared since.
    unknown: Vec<Unknown>,
    #[serde(flatten)]
    directories: Directories,
}

#[derive(Debug, Serialize)]
struct Unknown {
    port: u16,
    proto: Protocol,
    address: String,
    netns: NetnsId,
    /// Of the socket.
    uid: u32,
    user: Option<String>,
}

#[derive(Debug, Serialize)]
struct Row<'a> {
    port: u16,
    proto: Protocol,
    address: String,
    netns: NetnsId,
    pid: Option<u32>,
    name: Option<&'a str>,
    command: &'a [String],
    cwd: Option<&'a str>,
    uid: Option<u32>,
    user: Option<String>,
    lived_ms: Option<u64>,
    ended: Ended,
    /// What was stopped, or why it is still there.
    note: Option<&'a str>,
    ancestors: &'a [Ancestor],
}

pub(super) fn run(args: &KillArgs, selector: Selector, globals: &Globals) -> anyhow::Result<ExitCode> {
    let mut scanner = open_scanner(globals)?;
    let uids = match (&selector.filters().uids[..], args.leaks.all_users) {
        (_, true) => Vec::new(),
        ([], false) => vec![Uid::effective().as_raw()],
        (named, false) => named.to_vec(),
    };
    // Who it belongs to is judged there, where containers are known.
    let selector = selector.filtered(|filters| filters.uids.clear());
    let mut cleanup =
        Cleanup::new(selector, uids, args.terms(), args.options(), args.force_self).removing(args.remove_cwd.clone());
    if let Some(Since::Mark(word)) = &args.selectors.since
        && cleanup.means_others_than(Uid::effective().as_raw())
    {
        let id = |marked: Marked| SocketId { inode: marked.inode, cookie: marked.cookie };
        cleanup = cleanup.knowing(mark::find(word, globals)?.listeners.into_iter().map(id).collect());
    }
    if args.dry_run {
        return dry_run(args, &cleanup, &mut scanner, globals);
    }
    // Before anybody is ended of whom there would be no report then.
    let destination = args.leaks.report.as_deref().map(Destination::find).transpose()?;
    let mut display = Display::new(args.json || args.quiet);
    let mut agree = |plan: &kill::Plan| match is_conversation() && !args.yes {
        true => {
            let concerns = concern::concerns(plan, Uid::effective().as_raw(), false, &|pid| stat::read(pid).ok());
            preview(plan)?;
            agreed(plan, &concerns)
        }
        false => Ok(true),
    };
    let mut ask = |leaks: &mut [Leak]| ask_about(leaks, globals);
    let Some(mut cleaned) = cleanup.run(&mut scanner, &mut agree, &mut ask, &mut |progress| display.show(progress))?
    else {
        return nothing_signalled();
    };
    take_in_hidden(&cleanup, &mut cleaned, &mut scanner, globals)?;
    display.close();
    if args.json {
        print_done(&json::array(&cleaned.outcomes))?;
    } else if !args.quiet {
        print_done(&told(args, &cleaned))?;
    }
    if let Some(destination) = destination {
        destination.write(&report(args, &cleaned))?;
    }
    Ok(code(args, &cleaned))
}

/// What an agent knows that saw them open: when that was, and out of whom they came then. Where none answers, or not as
/// expected, what /proc shows has to do.
fn ask_agent(selector: &Selector, globals: &Globals) -> Vec<(Listener, Vec<Ancestor>)> {
    let told = block_on(async {
        let Some(mut client) = reach_agent(globals).await? else { return Ok(Vec::new()) };
        Ok(client.ask(&Request::Who { selection: Selection::of(selector) }).await?.0)
    });
    let listener = |response| match response {
        Response::Listener { listener, lineage, .. } => Some((listener, lineage)),
        _ => None,
    };
    told.unwrap_or_default().into_iter().filter_map(listener).collect()
}

fn ask_about(leaks: &mut [Leak], globals: &Globals) {
    let pids = leaks.iter().filter_map(|leak| Some(leak.process.as_ref()?.id.pid)).collect();
    let told = ask_agent(&Selector::new(Vec::new(), Filters { pids, ..Filters::default() }), globals);
    complete(leaks, told);
}

/// Adds to the leaks what was told of them.
fn complete(leaks: &mut [Leak], told: Vec<(Listener, Vec<Ancestor>)>) {
    for (Listener { socket, since, .. }, lineage) in told {
        let is_it = |leak: &&mut Leak| leak.socket.id.inode == socket.id.inode && socket.id.inode != 0;
        let Some(leak) = leaks.iter_mut().find(is_it) else { continue };
        if lineage.len() > leak.ancestors.len() {
            leak.ancestors = lineage;
        }
        if let Some(since) = since {
            leak.lived = Some(Duration::from_nanos(process::boot_ns_now().saturating_sub(since)));
        }
    }
}

/// What others listen at who are meant as well, and may not be looked at: the agent may know more of it.
fn take_in_hidden(
    cleanup: &Cleanup,
    cleaned: &mut Cleaned,
    scanner: &mut Scanner,
    globals: &Globals,
) -> anyhow::Result<()> {
    let hidden = cleanup.hidden(scanner)?;
    if hidden.is_empty() {
        return Ok(());
    }
    let port = |listener: &Listener| {
        let Socket { port, proto, .. } = listener.socket;
        Target { ports: port..=port, proto: Some(proto), address: None }
    };
    let told = ask_agent(&Selector::new(hidden.iter().map(port).collect(), Filters::default()), globals);
    let listeners: Vec<Listener> = told.iter().map(|(listener, _)| listener.clone()).collect();
    cleanup.take_in_hidden(hidden, &listeners, scanner, cleaned)?;
    complete(&mut cleaned.leaks, told);
    Ok(())
}

/// What would be ended at once; what that would bring forth, nobody knows.
fn dry_run(args: &KillArgs, cleanup: &Cleanup, scanner: &mut Scanner, globals: &Globals) -> anyhow::Result<ExitCode> {
    let choice = cleanup.choose(scanner)?;
    let mut of_others = Cleaned::default();
    take_in_hidden(cleanup, &mut of_others, scanner, globals)?;
    if choice.selected.is_empty() && of_others.is_clean() {
        return match args.json {
            true => print("[]\n").map(|()| ExitCode::SUCCESS),
            false => print(&format!("nothing appeared since {}\n", since(args))).map(|()| ExitCode::SUCCESS),
        };
    }
    let job = cleanup.prepare(choice)?;
    if !args.json && !args.quiet {
        let users = Users::default();
        let name = |uid| users.name(uid);
        print(&summary(job.plan(), &view(&name)))?;
    }
    let mut outcomes = job.planned();
    outcomes.extend(of_others.outcomes);
    super::report(args, &outcomes)
}

fn code(args: &KillArgs, cleaned: &Cleaned) -> ExitCode {
    let failed = kill::exit_code(&cleaned.outcomes);
    match cleaned.is_clean() {
        true if args.leaks.fail_on_leak && cleaned.has_ended_any() => ExitCode::from(NO),
        true => ExitCode::SUCCESS,
        false if failed == DENIED => ExitCode::from(DENIED),
        false => ExitCode::from(NO),
    }
}

/// The mark or the duration, as people read it.
fn since(args: &KillArgs) -> String {
    match &args.selectors.since {
        Some(Since::Mark(word)) => escape(word).into_owned(),
        Some(Since::Ago(ago)) => format!("{} ago", span(*ago)),
        None => String::new(),
    }
}

fn told(args: &KillArgs, cleaned: &Cleaned) -> String {
    let since = since(args);
    let mut lines: String = cleaned.leaks.iter().map(line).collect();
    let users = Users::default();
    for Socket { port, proto, uid, .. } in &cleaned.hidden {
        let user =
            users.name(*uid).map_or_else(|| format!("uid {uid}"), |name| format!("{} (uid {uid})", escape(&name)));
        lines += &format!("{port}/{proto} may have been left behind: of {user}, and since when is not yours to see\n");
    }
    lines + &text::swept(&Directories::of(&cleaned.outcomes)) + &total(&since, cleaned)
}

/// All of it in one line.
fn total(since: &str, cleaned: &Cleaned) -> String {
    let unsure = match cleaned.hidden.len() {
        0 => String::new(),
        count => {
            let listeners = if count == 1 { "1 listener".to_owned() } else { format!("{count} listeners") };
            format!(
                "; {listeners} of others may have been: run this with sudo, or start the agent, which knows their age"
            )
        }
    };
    if cleaned.leaks.is_empty() {
        let nothing = if unsure.is_empty() { "nothing" } else { "nothing that you may look at" };
        return format!("{nothing} was left behind since {since}{unsure}\n");
    }
    let count = |alive: bool| cleaned.leaks.iter().filter(|leak| (leak.ended == Ended::Alive) == alive).count();
    let listeners = if cleaned.leaks.len() == 1 { "listener was" } else { "listeners were" };
    let mut total = format!("{} {listeners} left behind since {since}", cleaned.leaks.len());
    match (count(false), count(true)) {
        (_, 0) => total += ": none is there any more",
        (0, 1) => total += ": it is still there",
        (ended, alive) => total += &format!(": {ended} ended, {alive} still there"),
    }
    if cleaned.endless {
        total += "; more and more appear: end what starts them";
    }
    total + &unsure + "\n"
}

/// `8000/tcp terminated: python3 (4811) in /tmp/x, lived 3.2s: python3 -m http.server`, and out of whom it came.
fn line(leak: &Leak) -> String {
    let ended = match leak.ended {
        Ended::Terminated => "terminated",
        Ended::Killed => "killed",
        Ended::Stopped => "stopped",
        Ended::Exited => "ended by itself",
        Ended::Alive => "is still there",
    };
    let note = leak.note.as_ref().map(|note| format!(" ({})", escape(note))).unwrap_or_default();
    let mut line = format!("{}/{} {ended}{note}: ", leak.socket.port, leak.socket.proto);
    match &leak.process {
        Some(process) => {
            line += &format!("{} ({})", escape(&process.name), process.id.pid);
            if let Some(lived) = leak.lived {
                line += &format!(", lived {}", span(lived));
            }
            if let Some(cwd) = &process.cwd {
                line += &format!(", in {}", escape(cwd));
            }
            if !process.command.is_empty() {
                line += &format!(": {}", cut(&escape(&process.command.join(" ")), COMMAND));
            }
        }
        None => line += "nobody visible",
    }
    line.push('\n');
    // That everything comes from init is no news.
    if leak.ancestors.iter().any(|ancestor| ancestor.pid != 1) {
        let names: Vec<String> =
            leak.ancestors.iter().rev().map(|a| format!("{} ({})", escape(&a.name), a.pid)).collect();
        line += &format!("  from {}\n", names.join(" → "));
    }
    line
}

fn report(args: &KillArgs, cleaned: &Cleaned) -> String {
    let users = Users::default();
    let row = |leak| row(leak, &users);
    let unknown = |socket: &Socket| Unknown {
        port: socket.port,
        proto: socket.proto,
        address: socket.address.to_string(),
        netns: socket.netns,
        uid: socket.uid,
        user: users.name(socket.uid),
    };
    let since = since(args);
    let report = Report {
        time: Timestamp::now().to_string(),
        since: &since,
        clean: cleaned.is_clean(),
        leaks: cleaned.leaks.iter().map(row).collect(),
        unknown: cleaned.hidden.iter().map(unknown).collect(),
        directories: Directories::of(&cleaned.outcomes),
    };
    json::line(&report) + "\n"
}

fn row<'a>(leak: &'a Leak, users: &Users) -> Row<'a> {
    let process = leak.process.as_deref();
    let uid = process.and_then(|process| process.uid);
    Row {
        port: leak.socket.port,
        proto: leak.socket.proto,
        address: leak.socket.address.to_string(),
        netns: leak.socket.netns,
        pid: process.map(|process| process.id.pid),
        name: process.map(|process| process.name.as_str()),
        command: process.map(|process| &process.command[..]).unwrap_or_default(),
        cwd: process.and_then(|process| process.cwd.as_deref()),
        uid,
        user: uid.and_then(|uid| users.name(uid)),
        lived_ms: leak.lived.map(|lived| u64::try_from(lived.as_millis()).unwrap_or(u64::MAX)),
        ended: leak.ended,
        note: leak.note.as_deref(),
        ancestors: &leak.ancestors,
    }
}
