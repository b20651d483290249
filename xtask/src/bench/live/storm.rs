//! Processes that open and close listeners at a given rate: the hidden verb `storm`, and who gives it orders.
//!
//! Processes and not threads: threads of one process wait for each other at its table of files. Each goes with its parent,
//! however that ends.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::socket::{Backlog, listen};
use nix::unistd::getppid;

use super::bound;

/// Between two bursts of one that is ahead of its rate.
const TICK: Duration = Duration::from_millis(1);

#[derive(clap::Args)]
pub(crate) struct Args {}

/// Does what stdin says until it closes: `RATE MS` lets it open and close so many listeners a second (0: as many as it
/// can) for so long, and print how many it was and in how many µs.
pub(crate) fn run(_: &Args) -> Result<()> {
    let parent = getppid();
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        bail!("orphaned before the death signal was set");
    }
    let mut stdout = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let line = line.context("cannot read an order")?;
        let (rate, millis) = line.split_once(' ').context("an order is a rate and a time")?;
        let (rate, length) = (rate.parse()?, Duration::from_millis(millis.parse()?));
        let (listens, took) = storm(rate, length)?;
        writeln!(stdout, "{listens} {}", took.as_micros())?;
    }
    Ok(())
}

fn storm(rate: u64, length: Duration) -> Result<(u64, Duration)> {
    let started = Instant::now();
    let mut listens = 0;
    loop {
        let elapsed = started.elapsed();
        if elapsed >= length {
            return Ok((listens, elapsed));
        }
        if listens < due(rate, elapsed) {
            let (socket, _port) = bound()?;
            listen(&socket, Backlog::MAXCONN).context("cannot listen")?;
            drop(socket);
            listens += 1;
        } else {
            thread::sleep(TICK);
        }
    }
}

/// How many there should be after so long; of an unbounded rate always one more.
fn due(rate: u64, elapsed: Duration) -> u64 {
    if rate == 0 {
        return u64::MAX;
    }
    u64::try_from(u128::from(rate) * elapsed.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}

/// One for each processor, at least two.
pub(super) struct Storm(Vec<Stormer>);

struct Stormer {
    child: Child,
    /// Closing it is the order to end.
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// What they did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Done {
    /// Listeners opened, and closed again.
    pub(super) listens: u64,
    /// Opens and closes.
    pub(super) per_s: f64,
}

impl Storm {
    pub(super) fn new() -> Result<Storm> {
        let count = thread::available_parallelism().map_or(2, |count| count.get().max(2));
        (0..count).map(|_| Stormer::start()).collect::<Result<_>>().map(Storm)
    }

    pub(super) fn processes(&self) -> usize {
        self.0.len()
    }

    /// Lets all of them open and close listeners for so long: `per_s` opens and closes together, `None` as many as they
    /// can.
    pub(super) fn rage(&mut self, per_s: Option<u64>, length: Duration) -> Result<Done> {
        let count = self.0.len() as u64;
        for (number, stormer) in (0..).zip(&mut self.0) {
            // What does not divide evenly falls to the first.
            let rate = per_s.map_or(0, |per_s| (per_s / 2 / count + u64::from(number < per_s / 2 % count)).max(1));
            let orders = stormer.orders.as_mut().context("it has ended")?;
            orders
                .write_all(format!("{rate} {}\n", length.as_millis()).as_bytes())
                .context("a storming process ended")?;
        }
        let mut done = Done::default();
        for stormer in &mut self.0 {
            let mut line = String::new();
            stormer.answers.read_line(&mut line).context("a storming process does not answer")?;
            let (listens, micros) = line.trim().split_once(' ').context("a storming process ended")?;
            let (listens, micros) = (listens.parse::<u64>()?, micros.parse::<f64>()?);
            done.listens += listens;
            #[expect(clippy::cast_precision_loss, reason = "far from 2⁵³")]
            let per_s = 2.0 * listens as f64 / micros * 1e6;
            done.per_s += per_s;
        }
        Ok(done)
    }
}

impl Stormer {
    fn start() -> Result<Stormer> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        command.arg("storm").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start a storming process")?;
        let (orders, answers) = (child.stdin.take(), child.stdout.take());
        let answers = BufReader::new(answers.context("it has no stdout")?);
        Ok(Stormer { child, orders, answers })
    }
}

impl Drop for Stormer {
    fn drop(&mut self) {
        drop(self.orders.take());
        // Nothing can be done about one that is gone already.
        let _reaped = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_follows_the_clock() {
        for (rate, millis, want) in
            [(1000, 0, 0), (1000, 1, 1), (1000, 1500, 1500), (25_000, 10, 250), (0, 0, u64::MAX)]
        {
            assert_eq!(due(rate, Duration::from_millis(millis)), want, "{rate}/s after {millis} ms");
        }
    }
}
