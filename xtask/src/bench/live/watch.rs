//! A running `portwatch watch --json`, with its lines read one by one, or counted as fast as they come.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Backlog, listen};
use serde_json::Value;

use super::{PATIENCE, bound};

/// Patience for one of the listeners that only find out whether the watch watches yet.
const TRIAL: Duration = Duration::from_secs(2);

/// A `portwatch watch --json` that is known to see listeners.
pub(super) struct Watch {
    child: Running,
    lines: ChildStdout,
    /// Read, but not yet a whole line.
    rest: Vec<u8>,
    /// When the last bytes came: taken before they are parsed, which is not the watch's time.
    pub(super) heard: Instant,
    /// Records that it said it lost.
    pub(super) lost: u64,
}

/// Ended and reaped with its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Gone already is as good.
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Watch {
    /// Runs this `watch --json`; returns when it has told of a listener, that is, when it watches.
    pub(super) fn start(mut command: Command) -> Result<Watch> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context("cannot run `portwatch watch`")?;
        let lines = child.stdout.take().context("the watch has no stdout")?;
        let mut watch = Watch { child: Running(child), lines, rest: Vec::new(), heard: Instant::now(), lost: 0 };
        // Listeners from before it watched may be told of or not: open new ones until one is.
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            let (socket, port) = bound()?;
            listen(&socket, Backlog::MAXCONN).context("cannot listen")?;
            let told = watch.tells("open", port, TRIAL)?;
            drop(socket);
            if told && watch.tells("close", port, PATIENCE)? {
                return Ok(watch);
            }
        }
        bail!("`watch --json` tells of no listener")
    }

    /// Reads on until the line that tells of this event on this port; false when it does not come in time. A listener
    /// that stays open is told of even where records are lost.
    pub(super) fn tells(&mut self, event: &str, port: u16, patience: Duration) -> Result<bool> {
        let deadline = Instant::now() + patience;
        while let Some(line) = self.line(deadline)? {
            let told: Value =
                serde_json::from_slice(&line).context("`watch --json` printed a line that is not JSON")?;
            if told["event"] == "resync" {
                self.lost += told["lost"].as_u64().unwrap_or(0);
            }
            if told["event"] == event && told["listener"]["port"] == port {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn line(&mut self, deadline: Instant) -> Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
                return Ok(Some(self.rest.drain(..=end).collect()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.lines.as_fd(), PollFlags::POLLIN)];
            if left.is_zero() || poll(&mut fds, timeout).context("cannot poll the watch")? == 0 {
                return Ok(None);
            }
            let mut chunk = [0; 16 * 1024];
            match self.lines.read(&mut chunk).context("cannot read from the watch")? {
                0 => bail!("`watch --json` ended"),
                n => {
                    self.heard = Instant::now();
                    self.rest.extend_from_slice(&chunk[..n]);
                }
            }
        }
    }

    /// Counts all that it says from now on, as fast as it says it.
    pub(super) fn count(self) -> Counted {
        let Watch { child, lines, .. } = self;
        let counter = Arc::new((Mutex::new(Tally::default()), Condvar::new()));
        let (shared, mut lines) = (Arc::clone(&counter), BufReader::with_capacity(256 << 10, lines));
        // Ends with the watch.
        thread::spawn(move || {
            let (tally, changed) = &*shared;
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                tally.lock().unwrap_or_else(PoisonError::into_inner).take(&line);
                line.clear();
                // Nobody waits for what is followed at once.
                if lines.buffer().is_empty() {
                    changed.notify_all();
                }
            }
        });
        Counted { child, counter }
    }
}

/// What a watch told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) opens: u64,
    pub(super) closes: u64,
    pub(super) lost: u64,
}

impl Tally {
    /// By the first words of the line, which nothing that a process names can forge: it is parsed only where it is rare.
    fn take(&mut self, line: &[u8]) {
        let head = line.split(|&byte| byte == b',').nth(1);
        match head {
            Some(br#""event":"open""#) => self.opens += 1,
            Some(br#""event":"close""#) => self.closes += 1,
            Some(br#""event":"resync""#) => {
                let told: Value = serde_json::from_slice(line).unwrap_or_default();
                self.lost += told["lost"].as_u64().unwrap_or(0);
            }
            _ => {}
        }
    }
}

/// A watch whose lines are only counted.
pub(super) struct Counted {
    child: Running,
    counter: Arc<(Mutex<Tally>, Condvar)>,
}

impl Counted {
    pub(super) fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// What was told so far, as soon as it is `enough`, or when patience is at its end.
    pub(super) fn until(&self, enough: impl Fn(Tally) -> bool) -> Tally {
        let (tally, changed) = &*self.counter;
        let tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = changed.wait_timeout_while(tally, PATIENCE, |tally| !enough(*tally));
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn lines_are_counted_by_their_event() {
        let mut tally = Tally::default();
        for line in [
            r#"{"time":"…","event":"open","listener":{"port":1},"process":{"name":"\"event\":\"close\","}}"#,
            r#"{"time":"…","event":"close","listener":{"port":1}}"#,
            r#"{"time":"…","event":"holder","listener":{"port":1}}"#,
            r#"{"time":"…","event":"open","listener":{"port":2}}"#,
            r#"{"time":"…","event":"resync","listener":null,"process":null,"errno":null,"lost":7}"#,
        ] {
            tally.take(line.as_bytes());
        }
        assert_eq!(tally, Tally { opens: 2, closes: 1, lost: 7 });
    }
}
