//! `portwatch mark`: records what is listening, for `--since`; and the way back from what `--since` names.
//!
//! ```text
//!  mark          ─► a line of JSON on standard output
//!  mark --name N ─► the agent, where one answers; else a file of the user's own
//!  --since WORD  ─► with a slash: a file. Else the agent, one's own directory, a file of this directory: the first
//!                   that has it
//! ```

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use jiff::tz::TimeZone;
use nix::unistd::{Gid, Uid};
use portwatch::config::is_absent;
use portwatch::mark::store::Store;
use portwatch::mark::{Mark, file, is_name};
use portwatch::model::{BootNs, ProcessId};
use portwatch::place;
use portwatch::render::escape;
use portwatch::source::{Scanner, process};
use portwatch::wire::{Request, Response};

use super::{ask_agent, block_on, explain, note, print, reach_agent};
use crate::cli::{Globals, duration};
use crate::exit_codes::Usage;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch mark > before.json        then: portwatch kill --since before.json --yes
  portwatch mark --name job-123       then: portwatch list --since job-123

--since MARK means listeners that are held by nobody who ran when the mark was made: a server from
before is not meant, also when it listens anew. A mark is good until the host is booted again.
A name is kept by the agent, also when that is restarted; without an agent below $XDG_RUNTIME_DIR,
for root below /run, or in ~/.local/state.
Each user has 16: the oldest goes when one more is kept.
Exit codes: 0 done, 2 usage, 3 not permitted, 4 portwatch itself failed")]
pub(crate) struct MarkArgs {
    /// Keep the mark under this name instead of printing it
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub(crate) name: Option<String>,
}

fn name(text: &str) -> Result<String, String> {
    if !is_name(text) {
        return Err("use up to 64 letters, digits and ._- such as job-123".to_owned());
    }
    if duration(text).is_ok() {
        return Err("that is a duration to --since; use another name, such as job-123".to_owned());
    }
    Ok(text.to_owned())
}

pub(crate) fn run(args: &MarkArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let Some(name) = &args.name else {
        if globals.agent {
            return Err(Usage("the agent marks by name alone; add --name, or leave out --agent".to_owned()).into());
        }
        let mark = make(globals)?;
        print(&mark.line().map_err(|flaw| anyhow::anyhow!("the mark {flaw}"))?)?;
        if io::stdout().is_terminal() {
            note("that is a mark; keep it in a file (portwatch mark > FILE) or by name (portwatch mark --name NAME)");
        }
        wait_out(mark.boot_ns);
        return Ok(ExitCode::SUCCESS);
    };
    let (mark, keeper) = keep(name, globals)?;
    let count = mark.listeners.len();
    let listeners = if count == 1 { "listener" } else { "listeners" };
    print(&format!("marked {count} {listeners} as {name}, kept {keeper}\n"))?;
    wait_out(mark.boot_ns);
    Ok(ExitCode::SUCCESS)
}

/// What is listening now.
fn make(globals: &Globals) -> anyhow::Result<Mark> {
    let mut scanner = Scanner::open(globals.probe);
    if let Some(reason) = scanner.refusal() {
        explain(globals, &format!("holders are read from {}: {reason}", scanner.method()));
    }
    let snapshot = scanner.scan(false, &|_| true)?;
    // After the scan: whoever is in it ran before.
    let clock = process::clock(TimeZone::UTC);
    Ok(Mark::new(&snapshot.listeners, Uid::effective().as_raw(), file::boot_id()?, &clock))
}

/// Keeps a mark by name; and who does.
fn keep(name: &str, globals: &Globals) -> anyhow::Result<(Mark, String)> {
    // Whether it keeps the mark is not known where its answer is lost: then there is none, and nobody goes on without.
    let told = block_on(async {
        let Some(mut client) = reach_agent(globals).await? else { return Ok(None) };
        let answer = client.ask(&Request::Mark { name: name.to_owned() }).await;
        mark_of(answer.context("the mark may not be kept; try again")?.responses)
    })?;
    if let Some(mark) = told {
        return Ok((mark, "by the agent".to_owned()));
    }
    let mark = make(globals)?;
    let line = mark.line().map_err(|flaw| anyhow::anyhow!("the mark {flaw}"))?;
    let euid = Uid::effective().as_raw();
    let Some(store) = own_store()? else {
        bail!(
            "no agent answers, and neither XDG_RUNTIME_DIR nor HOME is a directory of yours; keep the mark in a file: \
             portwatch mark > FILE"
        );
    };
    let shown = escape(&store.path().to_string_lossy()).into_owned();
    store.keep(euid, name, &line).with_context(|| format!("cannot keep the mark in {shown}"))?;
    Ok((mark, format!("in {shown}")))
}

/// The mark that `--since` names.
///
/// # Errors
/// There is none, which is the mistake of who named it; or none to go by, for it is damaged, or of another boot.
pub(crate) fn find(word: &str, globals: &Globals) -> anyhow::Result<Mark> {
    let (euid, egid) = (Uid::effective().as_raw(), Gid::effective().as_raw());
    if !is_name(word) {
        let read = file::read(Path::new(word), euid, egid);
        return read.map_err(|error| match error.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(kind) if is_absent(kind) => Usage(format!("{error:#}")).into(),
            _ => error,
        });
    }
    let told = block_on(ask_agent(&Request::Marked { name: word.to_owned() }, None, globals))?;
    if let Some(mark) = told.map(|answer| mark_of(answer.responses)).transpose()?.flatten() {
        return checked(word, &serde_json::to_vec(&mark)?);
    }
    let kept = own_store()?.map(|store| store.find(euid, word)).transpose();
    if let Some(bytes) = kept.with_context(|| format!("cannot read the mark {word}"))?.flatten() {
        return checked(word, &bytes);
    }
    match Path::new(word).exists() {
        true => file::read(Path::new(word), euid, egid),
        false => {
            Err(Usage(format!("no mark is called {word}, and no file; make one: portwatch mark --name {word}")).into())
        }
    }
}

fn checked(name: &str, bytes: &[u8]) -> anyhow::Result<Mark> {
    match Mark::read(bytes, &file::boot_id()?, process::boot_ns_now()) {
        Ok(mark) => Ok(mark),
        Err(flaw) => bail!("the mark {name} {flaw}"),
    }
}

fn mark_of(responses: Vec<Response>) -> anyhow::Result<Option<Mark>> {
    match responses.into_iter().next() {
        Some(Response::Mark { mark }) => Ok(mark.map(|mark| *mark)),
        _ => bail!("the agent tells of no mark"),
    }
}

/// `None`: there is no place for it.
fn own_store() -> anyhow::Result<Option<Store>> {
    let euid = Uid::effective().as_raw();
    let Some(base) = place::of_user(&|name| std::env::var_os(name), euid)? else { return Ok(None) };
    let store = Store::open(&base, &["portwatch", "marks"], euid);
    let shown = || format!("cannot keep marks in {}", escape(&base.join("portwatch/marks").to_string_lossy()));
    store.map(Some).with_context(shown)
}

/// Returns when a process that starts from now on cannot be taken for one that ran before the mark: /proc counts the
/// starts of processes in steps of 10 ms, and nothing tells when one is over but the clock.
fn wait_out(marked: BootNs) {
    let over = (marked / ProcessId::TICK_NS + 1) * ProcessId::TICK_NS;
    while let Some(left) = over.checked_sub(process::boot_ns_now()).filter(|left| *left > 0) {
        thread::sleep(Duration::from_nanos(left));
    }
}
