//! An agent of our own: started, asked over its socket, and looked at from outside.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::target;

/// How long an answer may take on the busiest machine before it is said to be missing.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// An agent with its files below target/, with an empty configuration; ended and reaped when dropped.
pub(super) struct Agent {
    child: Child,
    portwatch: PathBuf,
    home: PathBuf,
    /// From its start to its word to the service manager that it serves.
    pub(super) ready_after: Duration,
}

impl Agent {
    /// Returns when it serves. `arguments` are added to those of `portwatch agent`.
    pub(super) fn start(portwatch: &Path, arguments: &[&str]) -> Result<Agent> {
        let home = target().join(format!("tmp/bench-{}", std::process::id()));
        let _old = fs::remove_dir_all(&home);
        fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
        let (config, notify, log) = (home.join("config.toml"), home.join("notify"), home.join("log"));
        fs::write(&config, "").context("cannot write the agent's configuration")?;
        let manager = UnixDatagram::bind(&notify).context("cannot make the socket for the agent's readiness")?;
        let mut command = Command::new(portwatch);
        command.arg("agent").arg("--socket").arg(home.join("socket")).arg("--config").arg(config).args(arguments);
        command.env("PORTWATCH_STATE", &home).env("NOTIFY_SOCKET", &notify);
        // Its end is seen by that of its stdout.
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(File::create(&log).context("cannot make the agent's log")?);
        let started = Instant::now();
        let mut child = command.spawn().context("cannot start the agent")?;
        let stdout = child.stdout.take();
        let mut agent = Agent { child, portwatch: portwatch.to_owned(), home, ready_after: Duration::ZERO };
        let stdout = stdout.context("the agent has no stdout")?;
        let mut word = [0; 256];
        loop {
            let mut fds =
                [PollFd::new(manager.as_fd(), PollFlags::POLLIN), PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
            if poll(&mut fds, timeout).context("cannot wait for the agent")? == 0 || fds[0].any() != Some(true) {
                bail!("the agent does not start: {}", fs::read_to_string(&log).unwrap_or_default().trim());
            }
            let length = manager.recv(&mut word).context("cannot read the agent's readiness")?;
            if word[..length].starts_with(b"READY=1") {
                break;
            }
        }
        agent.ready_after = started.elapsed();
        Ok(agent)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.home.join("socket")
    }

    /// A client of this agent, which fails rather than do without it.
    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.portwatch);
        command.args(arguments).arg("--agent").arg("--socket").arg(self.socket());
        command
    }

    pub(super) fn connect(&self) -> Result<Connection> {
        let stream = UnixStream::connect(self.socket()).context("cannot connect to the agent")?;
        stream.set_read_timeout(Some(PATIENCE)).context("cannot bound the wait for the agent")?;
        let mut connection = Connection { lines: BufReader::new(stream), line: String::new() };
        connection.send(&json!({"request": "hello", "version": 1}))?;
        let hello = connection.read()?;
        if hello["response"] != "hello" {
            bail!("the agent does not greet: {hello}");
        }
        Ok(connection)
    }

    pub(super) fn status(&self) -> Result<Value> {
        self.connect()?.status()
    }

    pub(super) fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.child.id())
    }

    /// Of `/proc/PID/smaps_rollup`, in MiB.
    pub(super) fn memory(&self) -> Result<Memory> {
        let path = format!("/proc/{}/smaps_rollup", self.child.id());
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Memory::parse(&text).with_context(|| format!("{path} does not tell the memory"))
    }

    /// Context switches so far of all its threads, voluntary or not.
    pub(super) fn switches(&self) -> Result<u64> {
        let mut sum = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id())).context("the agent is gone")? {
            // A thread that ended meanwhile switches no more.
            let Ok(text) = fs::read_to_string(task?.path().join("status")) else { continue };
            let counts = text
                .lines()
                .filter_map(|line| line.split_once("voluntary_ctxt_switches:")?.1.trim().parse::<u64>().ok());
            sum += counts.sum::<u64>();
        }
        Ok(sum)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Our own unreaped child, or gone already.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
        let _cleaned = fs::remove_dir_all(&self.home);
    }
}

/// Processor time of a process so far, of all its threads.
pub(super) fn cpu_time(pid: u32) -> Result<Duration> {
    let pid = Pid::from_raw(i32::try_from(pid).context("not a pid")?);
    let clock = clock_getcpuclockid(pid).context("the process has no clock")?;
    let time: TimeSpec = clock_gettime(clock).context("cannot read the clock of a process")?;
    Ok(time.into())
}

/// In MiB.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Memory {
    pub(super) rss: f64,
    pub(super) pss: f64,
    pub(super) anonymous: f64,
}

impl Memory {
    fn parse(rollup: &str) -> Option<Memory> {
        let of = |name: &str| -> Option<f64> {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            Some(line.trim().strip_suffix(" kB")?.parse::<f64>().ok()? / 1024.0)
        };
        Some(Memory { rss: of("Rss")?, pss: of("Pss")?, anonymous: of("Anonymous")? })
    }
}

/// A greeted connection.
pub(super) struct Connection {
    lines: BufReader<UnixStream>,
    line: String,
}

impl Connection {
    fn send(&mut self, request: &Value) -> Result<()> {
        self.lines.get_mut().write_all(format!("{request}\n").as_bytes()).context("cannot ask the agent")
    }

    fn read(&mut self) -> Result<Value> {
        self.line.clear();
        if self.lines.read_line(&mut self.line).context("the agent does not answer")? == 0 {
            bail!("the agent hung up");
        }
        serde_json::from_str(&self.line).context("the agent's answer is not JSON")
    }

    /// How many listeners the agent says there are at `target`, and when its answer was here.
    pub(super) fn count(&mut self, target: &str) -> Result<(u64, Instant)> {
        self.send(&json!({"request": "list", "selection": {"targets": [target]}}))?;
        loop {
            self.line.clear();
            if self.lines.read_line(&mut self.line).context("the agent does not answer")? == 0 {
                bail!("the agent hung up");
            }
            // Before it is parsed, which is not the agent's time.
            let heard = Instant::now();
            let response: Value = serde_json::from_str(&self.line).context("the agent's answer is not JSON")?;
            match response["response"].as_str() {
                Some("listener" | "working") => {}
                Some("end") => return Ok((response["count"].as_u64().context("an end without count")?, heard)),
                _ => bail!("the agent does not tell what listens: {response}"),
            }
        }
    }

    pub(super) fn status(&mut self) -> Result<Value> {
        self.send(&json!({"request": "status"}))?;
        let status = self.read()?;
        self.read()?;
        Ok(status)
    }
}

/// The agent's own account of how long it took from an event in the kernel to its row in the table: pairs of an upper
/// bound in µs and how many took no longer.
pub(super) struct Histogram(Vec<(f64, f64)>);

impl Histogram {
    /// Of an agent that runs with `--metrics 127.0.0.1:0`.
    pub(super) fn read(agent: &Agent) -> Result<Histogram> {
        let mut connection = agent.connect()?;
        connection.send(&json!({"request": "list", "selection": {"pids": [agent.child.id()], "tcp": true}}))?;
        let port = connection.read()?["socket"]["port"].as_u64().context("the agent serves no metrics")?;
        let port = u16::try_from(port).context("not a port")?;
        let mut stream =
            std::net::TcpStream::connect(("127.0.0.1", port)).context("cannot reach the agent's metrics")?;
        stream.set_read_timeout(Some(PATIENCE)).context("cannot bound the wait for metrics")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text).context("cannot read the agent's metrics")?;
        Ok(Histogram::parse(&text))
    }

    fn parse(text: &str) -> Histogram {
        let bucket = |line: &str| -> Option<(f64, f64)> {
            let line = line.strip_prefix("portwatch_event_latency_seconds_bucket{le=\"")?;
            let (bound, count) = line.split_once("\"} ")?;
            Some((bound.parse::<f64>().ok()? * 1e6, count.trim().parse().ok()?))
        };
        Histogram(text.lines().filter_map(bucket).collect())
    }

    pub(super) fn count(&self) -> f64 {
        self.0.last().map_or(0.0, |(_, count)| *count)
    }

    /// What was added since `before`.
    pub(super) fn since(&self, before: &Histogram) -> Histogram {
        Histogram(self.0.iter().zip(&before.0).map(|(now, before)| (now.0, now.1 - before.1)).collect())
    }

    /// The least bound in µs that `part` (0 to 1) of all keep; `None` where nothing was counted, infinite above the last.
    pub(super) fn bound_us(&self, part: f64) -> Option<f64> {
        let all = self.count();
        self.0.iter().find(|(_, count)| all > 0.0 && *count >= part * all).map(|(bound, _)| *bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_of_the_rollup() {
        let rollup = "5617-7fff ---p 00000000 00:00 0   [rollup]\nRss:    15360 kB\nPss:   9216 kB\nPss_Anon: 9 kB\nAnonymous:   2048 kB\n";
        assert_eq!(Memory::parse(rollup), Some(Memory { rss: 15.0, pss: 9.0, anonymous: 2.0 }));
        assert_eq!(Memory::parse("Rss: 1 kB\n"), None);
    }

    #[test]
    fn bounds_are_those_of_buckets() {
        let text = |counts: [u32; 3]| {
            let bounds = ["0.00001", "0.001", "+Inf"];
            let lines = bounds.iter().zip(counts);
            lines
                .map(|(le, n)| format!("portwatch_event_latency_seconds_bucket{{le=\"{le}\"}} {n}\n"))
                .collect::<String>()
        };
        let (before, after) = (Histogram::parse(&text([5, 5, 5])), Histogram::parse(&text([10, 104, 105])));
        let histogram = after.since(&before);
        assert_eq!(
            [0.05, 0.5, 0.99, 1.0].map(|part| histogram.bound_us(part)),
            [Some(10.0), Some(1000.0), Some(1000.0), Some(f64::INFINITY)]
        );
        assert_eq!(after.since(&after).bound_us(0.5), None);
    }
}
