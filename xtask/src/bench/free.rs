//! From a command that frees a port to the moment in which the port can be bound, and to the command's return.
//!
//! Another thread tries to bind the port again and again, as a server that waits for it would (SO_REUSEADDR, no
//! listen). A command that returns before the port can be bound has told its caller too early: the next line of a
//! script would fail. So both times are shown, how often that happened, and how many tries still failed after it.
//!
//! Figures: an array of `{command, who (portwatch|peer), server, skipped, bindable_ms, of_best_peer, returned_ms,
//! returned_too_early, failed_binds, failed_for_ms}`. `bindable_ms` and `returned_ms` have a number for each round,
//! the last two one for each round in which the command returned too early; `of_best_peer` is the ratio of the median
//! time to a port that can be bound to the least of the peers' medians with that kind of server.

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

use super::section::Section;
use super::{CROWD, Effort, quantile};
use crate::find;
use crate::server::Kind;
use crate::world::World;

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
struct Row {
    command: &'static str,
    server: Kind,
    /// Why there are no figures.
    skipped: Option<String>,
    rounds: Vec<Round>,
}

struct Round {
    returned_ms: f64,
    bindable_ms: f64,
    /// How many tries failed after it had returned, if it returned before the port could be bound.
    failed_after: Option<usize>,
}

impl Row {
    fn is_ours(&self) -> bool {
        self.command.starts_with("portwatch")
    }

    /// What is wrong with portwatch's own work, if anything is.
    fn complaint(&self) -> Option<String> {
        let early = self.early().count();
        let what = match &self.skipped {
            Some(reason) => reason.clone(),
            None if early > 0 => format!("returned {early} times before the port was free"),
            None => return None,
        };
        self.is_ours().then(|| format!("`{}` ({}): {what}", self.command, name(self.server)))
    }

    /// The rounds in which it returned before the port could be bound.
    fn early(&self) -> impl Iterator<Item = &Round> {
        self.rounds.iter().filter(|round| round.failed_after.is_some())
    }

    fn median(&self, of: fn(&Round) -> f64) -> Option<f64> {
        let mut values: Vec<f64> = self.rounds.iter().map(of).collect();
        (self.skipped.is_none() && !values.is_empty()).then(|| quantile(&mut values, 0.5))
    }

    fn round(&self, program: &Path) -> Result<Round> {
        let mut server = Server::start(self.server)?;
        let mut command = Command::new(program);
        let port = server.port.to_string();
        command.args(self.command.split(' ').skip(1).map(|word| word.replace("PORT", &port)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let port = server.port;
        let started = Instant::now();
        let bound = thread::spawn(move || {
            let mut failed = Vec::new();
            while !can_bind(port) {
                failed.push(started.elapsed());
                if started.elapsed() > PATIENCE {
                    return None;
                }
                thread::sleep(TRY_EVERY);
            }
            Some((failed, started.elapsed()))
        });
        command.status().with_context(|| format!("cannot run `{}`", self.command))?;
        let returned = started.elapsed();
        let is_free = can_bind(port);
        let bound = bound.join().ok().flatten();
        server.end();
        let Some((failed, bindable)) = bound else { bail!("does not free the port") };
        Ok(Round {
            returned_ms: returned.as_secs_f64() * 1e3,
            bindable_ms: bindable.as_secs_f64() * 1e3,
            failed_after: (!is_free).then(|| failed.iter().filter(|&&at| at > returned).count()),
        })
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

fn name(server: Kind) -> String {
    format!("{server:?}").to_lowercase()
}

/// Runs every command that is installed against every kind of server, in a crowd.
pub(super) fn run(portwatch: &Path, effort: &Effort) -> Result<Section> {
    let _crowd = World::start(CROWD)?;
    let mut rows: Vec<Row> = SERVERS
        .iter()
        .flat_map(|&server| {
            COMMANDS.iter().map(move |&command| Row { command, server, skipped: None, rounds: Vec::new() })
        })
        .collect();
    let program = |row: &Row| -> Option<PathBuf> {
        match row.command.split(' ').next()? {
            "portwatch" => Some(portwatch.to_owned()),
            peer => find(peer),
        }
    };
    let started = Instant::now();
    for round in 0..effort.frees {
        if round > 0 && started.elapsed() > effort.frees_limit {
            break;
        }
        for row in rows.iter_mut().filter(|row| row.skipped.is_none()) {
            match program(row).map(|program| row.round(&program)) {
                None => row.skipped = Some("is not installed".into()),
                Some(Ok(round)) => row.rounds.push(round),
                Some(Err(error)) => row.skipped = Some(format!("{error:#} (round {})", round + 1)),
            }
        }
    }
    Ok(Section {
        key: "free",
        title: format!("From a command to a port that can be bound, beside {} processes", CROWD.processes),
        markdown: markdown(&rows),
        figures: figures(&rows),
        wrong: rows.iter().filter_map(Row::complaint).collect(),
    })
}

/// The ratio of its time to a port that can be bound to that of the best peer with such a server.
fn of_best_peer(row: &Row, rows: &[Row]) -> Option<f64> {
    let bindable = |row: &Row| row.median(|round| round.bindable_ms);
    let peers = rows.iter().filter(|peer| !peer.is_ours() && peer.server == row.server);
    Some(bindable(row)? / peers.filter_map(bindable).min_by(f64::total_cmp)?)
}

fn markdown(rows: &[Row]) -> String {
    let mut text = format!(
        "Medians; rounds: {}. After a command that returned too early, further tries to bind failed, one every {} µs: so \
         many, for so long.\n\n\
         | server | command | bindable after ms | of the best peer's | returned after ms | max | too early | failed \
         binds after it | for ms |\n|---|---|--:|--:|--:|--:|--:|--:|--:|\n",
        rows.iter().map(|row| row.rounds.len()).max().unwrap_or(0),
        TRY_EVERY.as_micros()
    );
    for row in rows {
        let (server, command) = (name(row.server), row.command);
        let medians = row.median(|round| round.bindable_ms).zip(row.median(|round| round.returned_ms));
        let Some((bindable, returned)) = medians else {
            let reason = row.skipped.as_deref().unwrap_or("was not run");
            // Writing to a String cannot fail.
            let _infallible = writeln!(text, "| {server} | `{command}` | {reason} | | | | | | |");
            continue;
        };
        let max = row.rounds.iter().map(|round| round.returned_ms).fold(0.0, f64::max);
        let ratio = of_best_peer(row, rows).map_or_else(|| "?".to_owned(), |ratio| format!("{ratio:.2}"));
        let early = row.early().count();
        let (failed, long) = match early {
            0 => (String::new(), String::new()),
            _ => (
                median(row.early().filter_map(|round| round.failed_after.map(count)), 0),
                median(row.early().map(late), 1),
            ),
        };
        let of = row.rounds.len();
        let _infallible = writeln!(
            text,
            "| {server} | `{command}` | {bindable:.1} | {ratio} | {returned:.1} | {max:.1} | {early} of {of} | {failed} \
             | {long} |"
        );
    }
    text
}

/// How long before the port could be bound the command had returned, in ms.
fn late(round: &Round) -> f64 {
    (round.bindable_ms - round.returned_ms).max(0.0)
}

fn count(tries: usize) -> f64 {
    // At most 100,000: there is a limit of time.
    f64::from(u32::try_from(tries).unwrap_or(u32::MAX))
}

fn median(values: impl Iterator<Item = f64>, digits: usize) -> String {
    let mut values: Vec<f64> = values.collect();
    format!("{:.digits$}", quantile(&mut values, 0.5))
}

fn figures(rows: &[Row]) -> Value {
    let each = |row: &Row, of: fn(&Round) -> f64| row.rounds.iter().map(of).collect::<Vec<_>>();
    rows.iter()
        .map(|row| {
            json!({
                "command": row.command, "who": if row.is_ours() { "portwatch" } else { "peer" }, "server": name(row.server),
                "skipped": row.skipped, "bindable_ms": each(row, |round| round.bindable_ms),
                "of_best_peer": of_best_peer(row, rows), "returned_ms": each(row, |round| round.returned_ms),
                "returned_too_early": row.early().count(),
                "failed_binds": row.early().filter_map(|round| round.failed_after).collect::<Vec<_>>(),
                "failed_for_ms": row.early().map(late).collect::<Vec<_>>()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Kind, Round, Row, markdown, of_best_peer};

    fn row(command: &'static str, bindable_ms: f64, failed_after: Option<usize>) -> Row {
        let returned_ms = if failed_after.is_some() { bindable_ms - 2.0 } else { bindable_ms + 1.0 };
        let rounds = vec![Round { returned_ms, bindable_ms, failed_after }];
        Row { command, server: Kind::Big, skipped: None, rounds }
    }

    #[test]
    fn ratios_are_to_the_fastest_peer_and_early_returns_are_shown() {
        let rows =
            [row("portwatch kill PORT", 8.0, None), row("killport PORT", 4.0, Some(9)), row("fuser -k", 5.0, None)];
        assert_eq!(of_best_peer(&rows[0], &rows), Some(2.0));
        assert_eq!(rows[0].complaint(), None);
        let text = markdown(&rows);
        assert!(text.contains("| big | `portwatch kill PORT` | 8.0 | 2.00 | 9.0 | 9.0 | 0 of 1 |  |  |\n"), "{text}");
        assert!(text.contains("| big | `killport PORT` | 4.0 | 1.00 | 2.0 | 2.0 | 1 of 1 | 9 | 2.0 |\n"), "{text}");
    }

    #[test]
    fn portwatch_returning_too_early_is_wrong() {
        let early = row("portwatch kill PORT", 4.0, Some(3));
        assert_eq!(
            early.complaint().unwrap(),
            "`portwatch kill PORT` (big): returned 1 times before the port was free"
        );
        assert_eq!(row("killport PORT", 4.0, Some(3)).complaint(), None);
    }
}
