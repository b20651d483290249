//! The verbs, a file each, and what they share: from arguments to a selector, from a selector to listeners, and the
//! way to the terminal.

pub(crate) mod history;
pub(crate) mod kill;
pub(crate) mod list;
pub(crate) mod status;
pub(crate) mod watch;
pub(crate) mod who;

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use anstream::{AutoStream, ColorChoice};
use anyhow::Context;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use nix::unistd::{Uid, User};
use portwatch::model::{BootNs, Listener, NetnsId};
use portwatch::render::{self, Clock, View};
use portwatch::select::{Filters, Selector, builtin_sets, parse_targets};
use portwatch::source::{Scanner, Tier};

use crate::cli::{Globals, Netns, Selectors};
use crate::exit_codes::Usage;

/// What the arguments mean.
pub(crate) fn selector(targets: &[String], selectors: &Selectors) -> anyhow::Result<Selector> {
    let targets = parse_targets(targets, &builtin_sets()).map_err(|bad| Usage(bad.to_string()))?;
    Ok(Selector::new(
        targets,
        Filters {
            ipv4: selectors.ipv4,
            ipv6: selectors.ipv6,
            tcp: selectors.tcp,
            udp: selectors.udp,
            addresses: selectors.addresses.clone(),
            uids: selectors.users.iter().map(|user| uid(user)).collect::<anyhow::Result<_>>()?,
            pids: selectors.pids.clone(),
            commands: selectors.commands.clone(),
            cwds: selectors.cwds.clone(),
            older_than: selectors.older_than,
            netns: match selectors.netns {
                Netns::Own => Some(own_netns()?),
                Netns::All => None,
                Netns::Id(id) => Some(id),
            },
        },
    ))
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

fn own_netns() -> anyhow::Result<NetnsId> {
    let path = "/proc/self/ns/net";
    let inode = fs::metadata(path).with_context(|| format!("cannot read {path}; is /proc mounted?"))?.ino();
    NetnsId::try_from(inode).with_context(|| format!("{path} has inode {inode}, more than a namespace can have"))
}

/// Reads what the selector picks, sorted by port, protocol and address.
pub(crate) fn read(selector: &Selector, selectors: &Selectors, globals: &Globals) -> anyhow::Result<Vec<Listener>> {
    let mut scanner = Scanner::open(globals.probe);
    if let Some(reason) = scanner.refusal() {
        explain(globals, &format!("holders are read from {}: {reason}", scanner.method()));
    }
    // Another namespace by number is found like any other: by reading all of them.
    let all_netns = selectors.netns != Netns::Own;
    let snapshot = scanner.scan(all_netns, &|socket| selector.matches_socket(socket))?;
    for text in scanner.notes() {
        explain(globals, text);
    }
    let mut listeners = snapshot.listeners;
    listeners.retain(|listener| selector.matches(listener, snapshot.at));
    listeners.sort_by_key(|Listener { socket, .. }| {
        (socket.port, socket.proto, socket.address, socket.netns, socket.id.inode)
    });
    Ok(listeners)
}

/// Says under `--verbose` what was tried and refused.
pub(crate) fn explain(globals: &Globals, text: &str) {
    if globals.verbose {
        note(&render::escape(text));
    }
}

/// What the selection was, for the sentence that nothing was found.
pub(crate) fn selection(targets: &[String], selector: &Selector) -> String {
    let all = selector.is_empty();
    match (targets.is_empty(), all) {
        (true, true) => String::new(),
        (true, false) => " that matches the selectors".to_owned(),
        (false, _) => format!(" on {}", render::escape(&targets.join(" "))),
    }
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
pub(crate) fn view(users: &dyn Fn(u32) -> Option<String>) -> anyhow::Result<View<'_>> {
    let stdout = io::stdout();
    Ok(View {
        clock: clock()?,
        users,
        euid: Uid::effective().as_raw(),
        width: stdout.is_terminal().then(|| columns(&stdout)),
        // Never: no terminal, or NO_COLOR. Everything shown is escaped, so nothing needs to be stripped later.
        colours: AutoStream::choice(&stdout) != ColorChoice::Never,
    })
}

/// This moment, on both clocks.
pub(crate) fn clock() -> anyhow::Result<Clock> {
    Ok(Clock { now_boot_ns: boot_ns()?, now_wall: Timestamp::now(), tz: TimeZone::system() })
}

fn boot_ns() -> anyhow::Result<BootNs> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).context("cannot read CLOCK_BOOTTIME")?;
    Ok(BootNs::try_from(std::time::Duration::from(now).as_nanos())?)
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
