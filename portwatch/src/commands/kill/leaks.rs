//! `kill --since`: ends what was left behind, and tells what it was, to people and in a report.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use jiff::Timestamp;
use nix::unistd::Uid;
use portwatch::kill::{self, Cleaned, Cleanup, Ended, Leak, concern};
use portwatch::model::{Ancestor, Listener, NetnsId, Protocol};
use portwatch::render::{cut, escape, json, span};
use portwatch::select::{Filters, Selector};
use portwatch::source::{Scanner, process, stat};
use portwatch::wire::{Request, Response, Selection};
use serde::Serialize;

use super::way::open_scanner;
use super::{KillArgs, agreed, is_conversation, nothing_signalled, preview, print_done, summary};
use crate::cli::{Globals, Since};
use crate::commands::progress::Display;
use crate::commands::{self, Users, block_on, print, view};
use crate::exit_codes::{DENIED, NO};

/// Columns of a command that a line shows; the report has all of it.
const COMMAND: usize = 120;

// What goes with `--since` alone.
#[derive(Debug, Args)]
#[command(next_help_heading = "With --since")]
pub(crate) struct LeakArgs {
    /// End processes of every user: without this and --user only one's own are meant, also by root
    #[arg(long, requires = "since", conflicts_with = "users")]
    pub(crate) all_users: bool,
    /// Write what was left behind to this file, as JSON
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
    let cleanup =
        Cleanup::new(selector, uids, args.terms(), args.options(), args.force_self).removing(args.remove_cwd.clone());
    if args.dry_run {
        return dry_run(args, &cleanup, &mut scanner);
    }
    let mut display = Display::new(args.json || args.quiet);
    let mut agree = |plan: &kill::Plan| match is_conversation() && !args.yes {
        true => {
            let concerns = concern::concerns(plan, Uid::effective().as_raw(), false, &|pid| stat::read(pid).ok());
            preview(plan)?;
            agreed(plan, &concerns)
        }
        false => Ok(true),
    };
    let mut ask = |leaks: &mut [Leak]| ask_agent(leaks, globals);
    let Some(cleaned) = cleanup.run(&mut scanner, &mut agree, &mut ask, &mut |progress| display.show(progress))? else {
        return nothing_signalled();
    };
    display.close();
    if args.json {
        print_done(&json::array(&cleaned.outcomes))?;
    } else if !args.quiet {
        print_done(&text(args, &cleaned))?;
    }
    if let Some(path) = &args.leaks.report {
        write(path, &report(args, &cleaned)).with_context(|| format!("cannot write {}", shown(path)))?;
    }
    Ok(code(args, &cleaned))
}

/// What an agent knows that saw them open: when that was, and out of whom they came then. Where none answers, or not as
/// expected, what /proc shows has to do.
fn ask_agent(leaks: &mut [Leak], globals: &Globals) {
    let pids = leaks.iter().filter_map(|leak| Some(leak.process.as_ref()?.id.pid)).collect();
    let selector = Selector::new(Vec::new(), Filters { pids, ..Filters::default() });
    let told = block_on(commands::ask_agent(&Request::Who { selection: Selection::of(&selector) }, None, globals));
    for response in told.ok().flatten().unwrap_or_default().responses {
        let Response::Listener { listener: Listener { socket, since, .. }, lineage, .. } = response else { continue };
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

/// What would be ended at once; what that would bring forth, nobody knows.
fn dry_run(args: &KillArgs, cleanup: &Cleanup, scanner: &mut Scanner) -> anyhow::Result<ExitCode> {
    let choice = cleanup.choose(scanner)?;
    if choice.selected.is_empty() {
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
    super::report(args, &job.planned())
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

fn text(args: &KillArgs, cleaned: &Cleaned) -> String {
    let since = since(args);
    if cleaned.leaks.is_empty() {
        return format!("nothing was left behind since {since}\n");
    }
    let lines: String = cleaned.leaks.iter().map(line).collect();
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
    format!("{lines}{total}\n")
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
    let leaks = cleaned.leaks.iter().map(row).collect();
    let since = since(args);
    let report = Report { time: Timestamp::now().to_string(), since: &since, clean: cleaned.is_clean(), leaks };
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

fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy()).into_owned()
}

/// Whole or not at all: written beside, and renamed.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let beside = path.with_file_name(name);
    let written = OpenOptions::new().write(true).create_new(true).open(&beside).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        fs::rename(&beside, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}
