//! `kill --since`: ends what was left behind, and tells what it was, to people and in a report.

mod report;
mod text;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use nix::unistd::Uid;
use portwatch::kill::{self, Cleaned, Cleanup, Leak, concern};
use portwatch::mark::Marked;
use portwatch::model::{Ancestor, Listener, Socket, SocketId};
use portwatch::render::{escape, json, span};
use portwatch::select::{Filters, Selector, Target};
use portwatch::source::{Scanner, process, stat};
use portwatch::wire::{Request, Response, Selection};

use super::destination::Destination;
use super::way::open_scanner;
use super::{KillArgs, agreed, is_conversation, nothing_signalled, preview, print_done, summary};
use crate::cli::{Globals, Since};
use crate::commands::progress::Display;
use crate::commands::{self, Users, block_on, mark, print, view};
use crate::exit_codes::{DENIED, NO};

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
        return nothing_signalled(args, || Ok(cleanup.prepare(cleanup.choose(&mut scanner)?)?.planned()));
    };
    take_in_hidden(&cleanup, &mut cleaned, &mut scanner, globals)?;
    display.close();
    if args.json {
        print_done(&json::array(&cleaned.outcomes))?;
    } else if !args.quiet {
        print_done(&text::told(&since(args), &cleaned))?;
    }
    if let Some(destination) = destination {
        destination.write(&report::report(&since(args), &cleaned))?;
    }
    Ok(code(args, &cleaned))
}

/// What an agent knows that saw them open: when that was, and out of whom they came then. Where none answers, or not as
/// expected, what /proc shows has to do.
fn ask_agent(selector: &Selector, globals: &Globals) -> Vec<(Listener, Vec<Ancestor>)> {
    let request = Request::Who { selection: Selection::of(selector) };
    let told = block_on(commands::ask_agent(&request, None, globals)).ok().flatten();
    let listener = |response| match response {
        Response::Listener { listener, lineage, .. } => Some((listener, lineage)),
        _ => None,
    };
    told.unwrap_or_default().responses.into_iter().filter_map(listener).collect()
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
