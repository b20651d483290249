//! What the agent's probes add to what others do.
//!
//! Agents come and go, and each kind of work is measured while there is one and while there is none, in turns. Compared is
//! each turn with the two around it, so that a drift of the machine is none of the probes'. Counted is the processor time of
//! the process that works and of its children, not the clock on the wall: what runs in the kernel on their behalf is in
//! it, probes and loopback included, and what the scheduler gives to others meanwhile is not. It works on one processor, as
//! wandering from one to another costs more than what is looked for.
//!
//! Figures: `alternations`; `works`, each with a `work`, `alone_ns` (median of an operation without agent), `added_ns`
//! `{median, low, high}`, `added_percent` and `noise_percent` likewise: the same comparison among turns without agent. `low`
//! and `high` are the ends of a 95 % interval.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt::Linger};
use nix::sys::time::TimeVal;
use nix::sys::wait::waitpid;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{ForkResult, Pid, fork};
use serde_json::{Value, json};

use super::interval::{Estimate, changes, noise};
use super::{bound, without_events};
use crate::bench::agent::Agent;
use crate::bench::section::Section;
use crate::bench::{Effort, quantile};
use crate::find;

/// What is done over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// The call alone, by the clock.
    Call,
    Listen,
    Connect,
    Fork,
    ForkOfHolder,
    Spawn,
}

const WORKS: [Work; 6] = [Work::Call, Work::Listen, Work::Connect, Work::Fork, Work::ForkOfHolder, Work::Spawn];

/// Pieces that a turn of one work is cut into: their median does not see what disturbs a few.
const PIECES: u32 = 8;

const REQUEST: [u8; 128] = [b'q'; 128];
const ANSWER: [u8; 1024] = [b'a'; 1024];

impl Work {
    fn key(self) -> &'static str {
        match self {
            Work::Call => "listen_call",
            Work::Listen => "listen",
            Work::Connect => "connect",
            Work::Fork => "fork",
            Work::ForkOfHolder => "fork_of_holder",
            Work::Spawn => "spawn",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Work::Call => "listen() alone",
            Work::Listen => "socket, bind, listen, close",
            Work::Connect => "connect, accept, 128 bytes there, 1 KiB back, close both",
            Work::Fork => "fork, exit, wait",
            Work::ForkOfHolder => "the same of a process with a listener",
            Work::Spawn => "spawn (vfork, exec) of `true`, exit, wait",
        }
    }

    fn stage(self) -> Result<Stage> {
        let listener = matches!(self, Work::Connect | Work::ForkOfHolder)
            .then(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen"))
            .transpose()?;
        let program = find("true").context("there is no program `true`")?;
        Ok(Stage { work: self, listener, program: program.to_string_lossy().into_owned() })
    }
}

/// A work with what it needs; others must not find its listener while they work.
struct Stage {
    work: Work,
    listener: Option<TcpListener>,
    program: String,
}

impl Stage {
    /// Does it once; the time of the part that is meant, where that is not all of it.
    fn once(&self) -> Result<Option<Duration>> {
        match self.work {
            Work::Call | Work::Listen => {
                let (socket, _port) = bound()?;
                let before = Instant::now();
                listen(&socket, Backlog::MAXCONN).context("cannot listen")?;
                return Ok((self.work == Work::Call).then(|| before.elapsed()));
            }
            Work::Connect => self.exchange()?,
            // SAFETY: the child does nothing but end.
            Work::Fork | Work::ForkOfHolder => match unsafe { fork() }.context("cannot fork")? {
                // SAFETY: it ends this child and touches nothing that other threads of the parent might have held.
                ForkResult::Child => unsafe { nix::libc::_exit(0) },
                ForkResult::Parent { child } => waitpid(child, None).map(drop).context("cannot wait for a child")?,
            },
            Work::Spawn => {
                let status = Command::new(&self.program).status().context("cannot run `true`")?;
                if !status.success() {
                    bail!("`true` says no");
                }
            }
        }
        Ok(None)
    }

    /// A short connection, from both ends.
    fn exchange(&self) -> Result<()> {
        let listener = self.listener.as_ref().context("this work has no listener")?;
        let address = listener.local_addr().context("a listener has no address")?;
        let mut client = TcpStream::connect(address).context("cannot connect over loopback")?;
        let (mut served, _peer) = listener.accept().context("cannot accept")?;
        let mut bytes = [0; ANSWER.len()];
        client.write_all(&REQUEST)?;
        served.read_exact(&mut bytes[..REQUEST.len()])?;
        served.write_all(&ANSWER)?;
        client.read_exact(&mut bytes)?;
        client.shutdown(Shutdown::Write)?;
        if served.read(&mut bytes)? != 0 {
            bail!("a client that has said all goes on");
        }
        // Closed in order but for the last step: a reset there leaves no TIME_WAIT behind, which would use up the ports.
        setsockopt(&client, Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 }).context("cannot set SO_LINGER")
    }

    /// Time of one operation in ns, as the median of pieces that take `length` in all: processor time, but by the clock
    /// where only a part of it is meant, and then as the median of all.
    fn measure(&self, length: Duration) -> Result<f64> {
        let (mut pieces, mut parts) = (Vec::new(), Vec::new());
        for _ in 0..PIECES {
            let (begun, before) = (Instant::now(), spent()?);
            let mut operations = 0;
            while begun.elapsed() < length / PIECES {
                parts.extend(self.once()?.map(|part| part.as_secs_f64() * 1e9));
                operations += 1;
            }
            pieces.push((spent()? - before).as_secs_f64() * 1e9 / f64::from(operations));
        }
        Ok(quantile(if parts.is_empty() { &mut pieces } else { &mut parts }, 0.5))
    }
}

/// Processor time of this thread so far, and of this process' children that were waited for.
fn spent() -> Result<Duration> {
    let own: Duration = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("a thread has no clock")?.into();
    let children = getrusage(UsageWho::RUSAGE_CHILDREN).context("cannot tell what children took")?;
    let micros = |time: TimeVal| Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000);
    Ok(own + micros(children.user_time()) + micros(children.system_time()))
}

/// One work's turns, in ns: one more without agent than with.
struct Turns {
    work: Work,
    off: Vec<f64>,
    on: Vec<f64>,
}

impl Turns {
    /// Median of an operation without agent in ns; what is added in ns and in percent; and the noise in percent.
    fn estimates(&self) -> (f64, Estimate, Estimate, Estimate) {
        let alone = quantile(&mut self.off.clone(), 0.5);
        let added_percent = Estimate::of(&changes(&self.off, &self.on));
        let ns = |percent: f64| percent / 100.0 * alone;
        let Estimate { median, low, high } = added_percent;
        let added_ns = Estimate { median: ns(median), low: ns(low), high: ns(high) };
        (alone, added_ns, added_percent, Estimate::of(&noise(&self.off)))
    }

    fn figures(&self) -> Value {
        let (alone_ns, added_ns, added_percent, noise_percent) = self.estimates();
        let told = |it: Estimate| json!({ "median": it.median, "low": it.low, "high": it.high });
        json!({
            "work": self.work.key(), "alone_ns": alone_ns, "added_ns": told(added_ns),
            "added_percent": told(added_percent), "noise_percent": told(noise_percent)
        })
    }
}

pub(in crate::bench) fn cost(portwatch: &Path, effort: &Effort) -> Result<Section> {
    let mut section = Section {
        key: "cost",
        title: "What the agent's probes add to what others do".into(),
        markdown: String::new(),
        figures: Value::Null,
        wrong: Vec::new(),
    };
    if let Some(reason) = without_events(&Agent::start(portwatch, &[])?.status()?) {
        section.markdown = reason;
        return Ok(section);
    }
    let mut works: Vec<Turns> = WORKS.iter().map(|&work| Turns { work, off: Vec::new(), on: Vec::new() }).collect();
    // The first of everything is slow.
    turn(&mut works, effort.live.block, |_| None)?;
    without(portwatch, &mut works, effort)?;
    for _ in 0..effort.live.alternations {
        let agent = Agent::start(portwatch, &[])?;
        turn(&mut works, effort.live.block, |work| Some(&mut work.on))?;
        drop(agent);
        without(portwatch, &mut works, effort)?;
    }
    section.markdown = markdown(&works, effort.live.alternations);
    section.figures = json!({
        "alternations": effort.live.alternations,
        "works": works.iter().map(Turns::figures).collect::<Vec<_>>()
    });
    Ok(section)
}

/// A turn without agent, after one has started and ended: as before a turn with an agent, this process has waited for one,
/// which on a busy machine makes what it does next a few percent faster.
fn without(portwatch: &Path, works: &mut [Turns], effort: &Effort) -> Result<()> {
    drop(Agent::start(portwatch, &[])?);
    turn(works, effort.live.block, |work| Some(&mut work.off))
}

/// Each work once, on a thread of its own: the agents that this one starts shall run wherever they like.
fn turn(works: &mut [Turns], block: Duration, kept: impl Fn(&mut Turns) -> Option<&mut Vec<f64>>) -> Result<()> {
    let times: Vec<f64> = thread::scope(|scope| {
        let working = scope.spawn(|| {
            stay_on_one_processor()?;
            works.iter().map(|work| work.work.stage()?.measure(block)).collect()
        });
        working.join().unwrap_or_else(|_| bail!("a measuring thread panicked"))
    })?;
    for (work, time) in works.iter_mut().zip(times) {
        if let Some(kept) = kept(work) {
            kept.push(time);
        }
    }
    Ok(())
}

/// This thread and its children, on the last processor that it may use: the first has more interrupts to serve.
fn stay_on_one_processor() -> Result<()> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).context("cannot tell the processors of this thread")?;
    let last = (0..CpuSet::count()).rev().find(|&cpu| allowed.is_set(cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.context("a thread has no processor")?)?;
    sched_setaffinity(this, &one).context("cannot stay on one processor")
}

fn markdown(works: &[Turns], alternations: usize) -> String {
    let mut text =
        "| per operation | without ns | added ns (95 %) | added % (95 %) | noise % (95 %) |\n|---|--:|--:|--:|--:|\n"
            .to_owned();
    for work in works {
        let (alone, Estimate { median, low, high }, percent, noise) = work.estimates();
        // Writing to a String cannot fail.
        let _infallible = writeln!(
            text,
            "| {} | {alone:.0} | {median:+.0} ({low:+.0} … {high:+.0}) | {} | {} |",
            work.work.name(),
            percent.percent(),
            noise.percent()
        );
    }
    let _infallible = writeln!(
        text,
        "\nProcessor time of who works and of its children, probes included; of listen() alone, the median call by the clock. \
         The agent was switched on and off {alternations} times. Noise: the same comparison among turns without agent."
    );
    text
}
