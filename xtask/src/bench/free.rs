//! From a command that frees a port to the moment in which the port can be bound, and to the command's return.
//!
//! Another thread tries to bind the port again and again, as a server that waits for it would (SO_REUSEADDR, no
//! listen). A command that returns before the port can be bound has told its caller too early: the next line of a
//! script would fail. So both times are shown, and how often that happened.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt::ReuseAddr};
use serde_json::{Value, json};

use super::{Effort, quantile};
use crate::server::Kind;
use crate::{cargo, find, target};

/// How long a port may stay taken before a command is said not to free it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Between two tries to bind: often enough for a figure in ms, seldom enough not to take a processor.
const TRY_EVERY: Duration = Duration::from_micros(200);

const SERVERS: [Kind; 3] = [Kind::Cooperative, Kind::Stubborn, Kind::Big];

/// `PORT` stands for the port. The parent of the servers lives on, so portwatch looks out for a new owner for 250 ms
/// unless told not to; no peer looks. The first two begin with SIGTERM, the others use SIGKILL.
const COMMANDS: [&str; 6] = [
    "portwatch kill PORT -yq --grace 500ms",
    "portwatch kill PORT -yq --grace 500ms --settle 0",
    "portwatch kill PORT -yq --force --settle 0",
    "killport PORT",
    "fuser -k PORT/tcp",
    "fkill :PORT --force --silent",
];

/// One command against one kind of server.
pub(super) struct Row {
    command: &'static str,
    server: Kind,
    /// Why there are no figures.
    skipped: Option<String>,
    returned_ms: Vec<f64>,
    bindable_ms: Vec<f64>,
    /// How often it returned before the port could be bound.
    early: usize,
}

impl Row {
    /// What is wrong with portwatch's own work, if anything is.
    pub(super) fn complaint(&self) -> Option<String> {
        let ours = self.command.starts_with("portwatch");
        let what = match &self.skipped {
            Some(reason) => reason.clone(),
            None if self.early > 0 => format!("returned {} times before the port was free", self.early),
            None => return None,
        };
        ours.then(|| format!("`{}` ({:?}): {what}", self.command, self.server))
    }

    fn round(&mut self, program: &Path) -> Result<()> {
        let mut server = Server::start(self.server)?;
        let mut command = Command::new(program);
        let port = server.port.to_string();
        command.args(self.command.split(' ').skip(1).map(|word| word.replace("PORT", &port)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let port = server.port;
        let started = Instant::now();
        let bound = thread::spawn(move || {
            while !can_bind(port) {
                if started.elapsed() > PATIENCE {
                    return None;
                }
                thread::sleep(TRY_EVERY);
            }
            Some(started.elapsed())
        });
        command.status().with_context(|| format!("cannot run `{}`", self.command))?;
        let returned = started.elapsed();
        let is_free = can_bind(port);
        let bindable = bound.join().ok().flatten();
        server.end();
        let Some(bindable) = bindable else { bail!("does not free the port") };
        self.early += usize::from(!is_free);
        self.returned_ms.push(returned.as_secs_f64() * 1e3);
        self.bindable_ms.push(bindable.as_secs_f64() * 1e3);
        Ok(())
    }
}

/// A server of a kind; ended and reaped when dropped.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start(kind: Kind) -> Result<Server> {
        let name = clap::ValueEnum::to_possible_value(&kind).context("a kind without a name")?;
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        command.args(["server", name.get_name()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start a server")?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("the server has no stdout")?;
        BufReader::new(stdout).read_line(&mut line).context("cannot read the server's port")?;
        let mut server = Server { child, port: 0 };
        server.port = line.trim().parse().context("the server did not come up")?;
        Ok(server)
    }

    fn end(&mut self) {
        // Our own unreaped child, or gone already.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether a server that sets SO_REUSEADDR, as nearly all do, could have the port now.
fn can_bind(port: u16) -> bool {
    let Ok(fd) = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None) else { return false };
    let address = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
    setsockopt(&fd, ReuseAddr, &true).is_ok() && bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address).is_ok()
}

/// Fetches the peers that come from registries, as far as those are within reach.
pub(crate) fn fetch_peers() {
    let tools = target().join("tools");
    if find("killport").is_none() {
        let mut install = cargo();
        install.args(["install", "--quiet", "--locked", "killport", "--root"]).arg(&tools);
        let _left_out = install.stderr(Stdio::null()).status();
    }
    if find("fkill").is_none() {
        let mut install = Command::new("npm");
        install.args(["install", "--silent", "fkill-cli", "--prefix"]).arg(tools.join("npm"));
        let _left_out = install.stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// Runs every command that is installed against every kind of server.
pub(super) fn measure(portwatch: &Path, effort: &Effort) -> Result<Vec<Row>> {
    let row = |command, server| Row {
        command,
        server,
        skipped: None,
        returned_ms: Vec::new(),
        bindable_ms: Vec::new(),
        early: 0,
    };
    let mut rows: Vec<Row> =
        SERVERS.iter().flat_map(|&server| COMMANDS.iter().map(move |&command| row(command, server))).collect();
    let program = |row: &Row| -> Option<PathBuf> {
        match row.command.split(' ').next()? {
            "portwatch" => Some(portwatch.to_owned()),
            peer => find(peer),
        }
    };
    for round in 0..effort.frees {
        for row in rows.iter_mut().filter(|row| row.skipped.is_none()) {
            match program(row) {
                None => row.skipped = Some("is not installed".into()),
                Some(program) => {
                    if let Err(error) = row.round(&program) {
                        row.skipped = Some(format!("{error:#} (round {})", round + 1));
                    }
                }
            }
        }
    }
    Ok(rows)
}

pub(super) fn markdown(rows: &[Row]) -> String {
    let mut text =
        "| server | command | port bindable after ms | returned after ms | max | runs | returned too early |\n\
         |---|---|--:|--:|--:|--:|--:|\n"
            .to_owned();
    for row in rows {
        let server = format!("{:?}", row.server).to_lowercase();
        // Writing to a String cannot fail.
        let _infallible = match &row.skipped {
            Some(reason) => writeln!(text, "| {server} | `{}` | {reason} | | | | |", row.command),
            None => {
                let bindable = quantile(&mut row.bindable_ms.clone(), 0.5);
                let mut returned = row.returned_ms.clone();
                let [median, max] = [0.5, 1.0].map(|part| quantile(&mut returned, part));
                let (command, runs, early) = (row.command, returned.len(), row.early);
                writeln!(text, "| {server} | `{command}` | {bindable:.1} | {median:.1} | {max:.1} | {runs} | {early} |")
            }
        };
    }
    text
}

pub(super) fn figures(rows: &[Row]) -> Value {
    rows.iter()
        .map(|row| {
            json!({
                "command": row.command, "server": format!("{:?}", row.server).to_lowercase(), "skipped": row.skipped,
                "bindable_ms": row.bindable_ms, "returned_ms": row.returned_ms, "returned_too_early": row.early
            })
        })
        .collect()
}
