//! A running `portwatch watch`: how soon it speaks, and what it costs those it watches.

use std::fmt::Write as _;
use std::io::{self, Read};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::Linger;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, getsockname, listen, setsockopt, socket,
};
use serde_json::{Value, json};

use super::section::Section;
use super::{CROWD, Effort, quantile};
use crate::world::World;

/// Longest wait for one line of a `watch` that works.
const PATIENCE: Duration = Duration::from_secs(2);

struct Latency {
    host: &'static str,
    listens: usize,
    p50_us: f64,
    p99_us: f64,
}

/// In a crowd and without it.
pub(super) fn latencies(portwatch: &Path, effort: &Effort) -> Result<Section> {
    let crowd = World::start(CROWD)?;
    let within = latency(portwatch, "in a crowd", effort);
    drop(crowd);
    let (mut markdown, mut figures, mut wrong) = (String::new(), Vec::new(), Vec::new());
    markdown.push_str("| host | listens | p50 µs | p99 µs |\n|---|--:|--:|--:|\n");
    for latency in [within, latency(portwatch, "without it", effort)] {
        match latency {
            Ok(Latency { host, listens, p50_us, p99_us }) => {
                // Writing to a String cannot fail.
                let _infallible = writeln!(markdown, "| {host} | {listens} | {p50_us:.0} | {p99_us:.0} |");
                figures.push(json!({"host": host, "listens": listens, "p50_us": p50_us, "p99_us": p99_us}));
            }
            Err(error) => wrong.push(format!("latency: {error:#}")),
        }
    }
    let title = "From listen() to the line of `watch --json`".to_owned();
    Ok(Section { key: "latency", title, markdown, figures: figures.into(), wrong })
}

/// Of listening and of connecting.
pub(super) fn costs(portwatch: &Path, effort: &Effort) -> Result<Section> {
    let mut figures = Vec::new();
    let mut markdown =
        "| per operation | alone ns | watched ns | added ns | ratio |\n|---|--:|--:|--:|--:|\n".to_owned();
    for work in [Work::Listen, Work::Connect] {
        let Cost { alone_ns, watched_ns } = cost(portwatch, work, effort)?;
        let (added, ratio) = (watched_ns - alone_ns, watched_ns / alone_ns);
        let _infallible =
            writeln!(markdown, "| {} | {alone_ns:.0} | {watched_ns:.0} | {added:+.0} | {ratio:.2} |", work.name());
        figures.push(json!({
            "operation": work.name(), "alone_ns": alone_ns, "watched_ns": watched_ns, "added_ns": added, "ratio": ratio
        }));
    }
    let title = "What a running `watch` adds".to_owned();
    Ok(Section { key: "cost", title, markdown, figures: figures.into(), wrong: Vec::new() })
}

/// From just before listen() to the moment that this process has read the line which tells of it.
fn latency(portwatch: &Path, host: &'static str, effort: &Effort) -> Result<Latency> {
    let mut watch = Watch::start(portwatch)?;
    let started = Instant::now();
    let mut times_us = Vec::with_capacity(effort.listens);
    while times_us.len() < effort.listens && started.elapsed() < effort.listens_limit {
        let (socket, port) = bound()?;
        let before = Instant::now();
        listen(&socket, Backlog::MAXCONN).context("cannot listen")?;
        if !watch.tells("open", port)? {
            bail!("`watch --json` did not tell of a listener within {} s", PATIENCE.as_secs());
        }
        times_us.push(watch.heard.saturating_duration_since(before).as_secs_f64() * 1e6);
        drop(socket);
        if !watch.tells("close", port)? {
            bail!("`watch --json` did not tell of a listener's end within {} s", PATIENCE.as_secs());
        }
    }
    if times_us.is_empty() {
        bail!("not one listen in {} s", effort.listens_limit.as_secs());
    }
    let [p50_us, p99_us] = [0.5, 0.99].map(|part| quantile(&mut times_us, part));
    Ok(Latency { host, listens: times_us.len(), p50_us, p99_us })
}

/// What is done over and over, once alone and once watched.
#[derive(Clone, Copy)]
enum Work {
    Listen,
    Connect,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Work::Listen => "socket, bind, listen, close",
            Work::Connect => "connect, accept, close both",
        }
    }

    /// Mean time of one operation over `block`, in ns.
    fn measure(self, block: Duration) -> Result<f64> {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen")?;
        let address = server.local_addr().context("a listener has no address")?;
        let mut operations = 0_u32;
        let started = Instant::now();
        while started.elapsed() < block {
            match self {
                Work::Listen => {
                    let (socket, _port) = bound()?;
                    listen(&socket, Backlog::MAXCONN).context("cannot listen")?;
                }
                Work::Connect => {
                    let client = TcpStream::connect(address).context("cannot connect over loopback")?;
                    let (_served, _peer) = server.accept().context("cannot accept")?;
                    // A reset leaves no TIME_WAIT behind, which would use up the ports.
                    setsockopt(&client, Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })
                        .context("cannot set SO_LINGER")?;
                }
            }
            operations += 1;
        }
        Ok(started.elapsed().as_secs_f64() * 1e9 / f64::from(operations))
    }
}

struct Cost {
    alone_ns: f64,
    watched_ns: f64,
}

/// Medians over blocks that alternate: alone, watched, alone, watched …
fn cost(portwatch: &Path, work: Work, effort: &Effort) -> Result<Cost> {
    let (mut alone, mut watched) = (Vec::new(), Vec::new());
    work.measure(effort.block)?;
    for _ in 0..effort.blocks {
        alone.push(work.measure(effort.block)?);
        let reader = Watch::start(portwatch)?.drain();
        watched.push(work.measure(effort.block)?);
        drop(reader);
    }
    Ok(Cost { alone_ns: quantile(&mut alone, 0.5), watched_ns: quantile(&mut watched, 0.5) })
}

/// A TCP socket bound to a port of the kernel's choice on 127.0.0.1, not yet listening.
fn bound() -> Result<(OwnedFd, u16)> {
    let socket =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("cannot make a socket")?;
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).context("cannot bind")?;
    let address: SockaddrIn = getsockname(socket.as_raw_fd()).context("a bound socket has no address")?;
    Ok((socket, address.port()))
}

/// A `portwatch watch --json` that is known to see listeners.
struct Watch {
    child: Running,
    lines: ChildStdout,
    /// Read, but not yet a whole line.
    rest: Vec<u8>,
    /// When the last bytes came: taken before they are parsed, which is not the watch's time.
    heard: Instant,
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
    /// Returns when the watch has told of a listener, that is, when it watches.
    fn start(portwatch: &Path) -> Result<Watch> {
        let mut child = Command::new(portwatch)
            .args(["watch", "--json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run {}", portwatch.display()))?;
        let lines = child.stdout.take().context("the watch has no stdout")?;
        let mut watch = Watch { child: Running(child), lines, rest: Vec::new(), heard: Instant::now() };
        // Listeners from before it watched may be told of or not: open new ones until one is.
        for _ in 0..5 {
            let (socket, port) = bound()?;
            listen(&socket, Backlog::MAXCONN).context("cannot listen")?;
            let told = watch.tells("open", port)?;
            drop(socket);
            if told && watch.tells("close", port)? {
                return Ok(watch);
            }
        }
        bail!("`watch --json` tells of no listener")
    }

    /// Reads on until the line that tells of this event on this port; false when it does not come in time.
    fn tells(&mut self, event: &str, port: u16) -> Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        while let Some(line) = self.line(deadline)? {
            let told: Value =
                serde_json::from_slice(&line).context("`watch --json` printed a line that is not JSON")?;
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

    /// Reads and forgets all that it says from now on, as fast as it says it.
    fn drain(self) -> Drained {
        let Watch { child, mut lines, .. } = self;
        let reader = thread::spawn(move || {
            // Ends with the watch; whatever ends it sooner only makes the pipe fill.
            let _bytes = io::copy(&mut lines, &mut io::sink());
        });
        Drained { child: Some(child), reader: Some(reader) }
    }
}

/// A watch whose lines nobody needs. Dropping it ends it.
struct Drained {
    child: Option<Running>,
    reader: Option<JoinHandle<()>>,
}

impl Drop for Drained {
    fn drop(&mut self) {
        drop(self.child.take());
        if let Some(reader) = self.reader.take() {
            // The reader cannot panic; if it did there is nothing to add.
            let _joined = reader.join();
        }
    }
}
