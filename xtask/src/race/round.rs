//! One round: actors take their places, a command is started, the director answers every death until the command has
//! ended, and what is then there is judged.

use std::fs::{self, File};
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use fastrand::Rng;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, socketpair, sockopt::ReuseAddr,
};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

use super::Contender;
use super::board::{Board, mark, now};
use super::cast::{Answer, Conduct, Deed, Part, Props, fork, play};
use super::judge::{Ending, Person, PortState, Verdict};

/// After this a command hangs, or the actors do.
const PATIENCE: Duration = Duration::from_secs(60);

/// It is in do_exit() (`linux/sched.h`).
const PF_EXITING: u32 = 4;

/// What the adversary concentrates on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Move {
    /// Bystanders only: a client, and the holder of another port.
    Calm,
    /// Holders end of themselves.
    Recycle,
    /// Somebody else takes the port.
    Relisten,
    /// The socket is handed to another process, and the holder exits.
    Swap,
    /// Holders fork.
    Fork,
    /// Everything at once.
    All,
}

pub(super) const MOVES: [Move; 6] = [Move::Calm, Move::Recycle, Move::Relisten, Move::Swap, Move::Fork, Move::All];

/// What a round is going to be; all of it follows from the seed.
#[derive(Debug)]
struct Plan {
    holders: Vec<Conduct>,
    heirs: Vec<Conduct>,
    successor: bool,
    /// Whether a successor has the PID of the first holder that dies after a signal.
    restarts: bool,
    neighbour: Option<Conduct>,
    force: bool,
    grace: Duration,
}

const PLAIN: Conduct = Conduct { answer: Answer::Do(Deed::Exit), of_itself: None, generations: 0 };

impl Plan {
    /// `span`: how long the command usually takes.
    fn new(of: Move, span: Duration, rng: &mut Rng) -> Plan {
        let moment = |rng: &mut Rng| span.mul_f64(rng.f64() * 1.2);
        let is = |wanted: Move| of == wanted || of == Move::All;
        let holder = |rng: &mut Rng| {
            let mut conduct = PLAIN;
            conduct.answer = match rng.u8(..10) {
                0 => Answer::Ignore,
                1 => Answer::Linger(Duration::from_micros(rng.u64(..20_000))),
                2 => Answer::Late(Duration::from_micros(rng.u64(..20_000))),
                _ => Answer::Do(Deed::Exit),
            };
            if is(Move::Recycle) && rng.bool() {
                conduct.of_itself = Some((moment(rng), Deed::Exit));
            }
            if is(Move::Swap) && rng.bool() {
                conduct.of_itself = Some((moment(rng), Deed::Pass));
            }
            if is(Move::Swap) && rng.bool() {
                conduct.answer = Answer::Do(Deed::Pass);
            }
            if is(Move::Fork) {
                conduct.generations = rng.u8(1..4);
                let deed = if rng.bool() { Deed::Fork } else { Deed::Bud };
                if rng.bool() {
                    conduct.of_itself = Some((moment(rng), deed));
                }
                if rng.bool() {
                    conduct.answer = Answer::Do(Deed::Fork);
                }
            }
            conduct
        };
        let holders = (0..rng.usize(1..=3)).map(|_| holder(rng)).collect();
        let heirs = if is(Move::Swap) { rng.usize(1..=3) } else { 0 };
        let heirs = (0..heirs).map(|_| holder(rng)).collect();
        let is_slow = is(Move::Relisten) && rng.u8(..4) == 0;
        let neighbour = Conduct { answer: Answer::Late(Duration::from_millis(rng.u64(150..300))), ..PLAIN };
        Plan {
            holders,
            heirs,
            successor: is(Move::Relisten),
            restarts: is(Move::Relisten) && rng.bool(),
            neighbour: is_slow.then_some(neighbour),
            force: rng.u8(..10) < 3,
            grace: if is_slow { Duration::from_secs(1) } else { Duration::from_millis(rng.u64(10..60)) },
        }
    }
}

/// What came of a round.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) verdict: Verdict,
    /// Processes that never had the port.
    pub(super) bystanders: usize,
    /// How many of them had the PID of a holder.
    pub(super) recycled: usize,
    pub(super) took: Duration,
    /// What the command said, where something is wrong with it.
    pub(super) said: String,
}

/// A process as the director knows it: its seat, its part, and how it ended.
struct Known {
    seat: usize,
    part: Part,
    died: u64,
    killed_by: u32,
}

struct Stage {
    board: Board,
    props: Props,
    known: Vec<Known>,
    restarts: bool,
}

/// Plays one round to its end. Nothing that it started lives on.
pub(super) fn play_round(
    board: Board,
    contender: &Contender,
    of: Move,
    span: Duration,
    rng: &mut Rng,
) -> Result<Round> {
    board.clear();
    let mut plan = Plan::new(of, span, rng);
    if !contender.is_ours() {
        plan.neighbour = None;
    }
    let round = Stage::set(board, &plan).and_then(|stage| stage.run(contender, &plan));
    end_everybody()?;
    round
}

/// Signals whoever lives in this pid namespace, but us, its first process; and reaps them.
fn end_everybody() -> Result<()> {
    match kill(Pid::from_raw(-1), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => bail!("cannot end the actors: {errno}"),
    }
    while !matches!(waitpid(None, None), Err(Errno::ECHILD)) {}
    Ok(())
}

impl Stage {
    /// Everybody in their places.
    fn set(board: Board, plan: &Plan) -> Result<Stage> {
        let pair = || socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC);
        let mailboxes = plan.heirs.iter().map(|_| pair()).collect::<Result<_, _>>().context("cannot make mailboxes")?;
        let props = Props {
            board,
            ready: EventFd::new().context("cannot make an eventfd")?,
            begun: EventFd::new().context("cannot make an eventfd")?,
            mailboxes,
            others: plan.holders[1..].to_vec(),
        };
        let mut stage = Stage { board, props, known: Vec::new(), restarts: plan.restarts };
        for &heir in &plan.heirs {
            stage.cast(Part::Heir, None, heir)?;
        }
        stage.cast(Part::Holder, None, plan.holders[0])?;
        stage.cast(Part::Bystander, None, PLAIN)?;
        if let Some(neighbour) = plan.neighbour {
            stage.cast(Part::Neighbour, None, neighbour)?;
        }
        let first = plan.heirs.len() + plan.holders.len() + 1 + usize::from(plan.neighbour.is_some());
        stage.wait_for(first)?;
        // Those that the first holder forked.
        let seats = stage.board.slots().len();
        let unknown: Vec<usize> = (0..seats).filter(|seat| !stage.known.iter().any(|k| k.seat == *seat)).collect();
        stage.known.extend(unknown.into_iter().map(|seat| Known { seat, part: Part::Holder, died: 0, killed_by: 0 }));
        stage.cast(Part::Client, None, PLAIN)?;
        if plan.successor && !plan.restarts {
            stage.cast(Part::Successor, None, PLAIN)?;
        }
        stage.wait_for(1 + usize::from(plan.successor && !plan.restarts))?;
        Ok(stage)
    }

    /// A new actor, with a PID of our choice if one is given. False: that PID is not to be had.
    fn cast(&mut self, part: Part, pid: Option<u32>, conduct: Conduct) -> Result<bool> {
        let seat = self.board.seat();
        match fork(false, pid) {
            Ok(0) => play(part, seat, &self.props, conduct),
            Ok(child) => self.board.slots()[seat].pid.store(child, SeqCst),
            Err(error) if pid.is_some() && error.raw_os_error() == Some(libc::EEXIST) => return Ok(false),
            Err(error) => return Err(error).with_context(|| format!("cannot fork {part:?} (PID {pid:?})")),
        }
        self.known.push(Known { seat, part, died: 0, killed_by: 0 });
        Ok(true)
    }

    fn wait_for(&self, count: usize) -> Result<()> {
        let mut ready = 0;
        while ready < count as u64 {
            let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&self.props.ready), PollFlags::POLLIN)];
            let limit = PollTimeout::try_from(PATIENCE).context("a timeout that is too long")?;
            if poll(&mut fds, limit).context("cannot wait for the actors")? == 0 {
                bail!("only {ready} of {count} actors came up");
            }
            ready += self.props.ready.read().context("cannot count the actors")?;
        }
        Ok(())
    }

    fn run(mut self, contender: &Contender, plan: &Plan) -> Result<Round> {
        let port = |index: usize| u16::try_from(self.board.ports[index].load(SeqCst)).unwrap_or(0);
        let mut ports = vec![port(0)];
        ports.extend(plan.neighbour.map(|_| port(1)));
        let (stdout, stderr) = (memory_file()?, memory_file()?);
        let mut command = contender.command(&ports, plan.grace, plan.force);
        command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
        let started = now();
        let child = spawn(&mut command)?;
        self.props.begun.write(1).context("cannot tell that it has begun")?;
        let (ended, code) = self.follow(child)?;
        mark(&self.board.over);
        let ports = ports.into_iter().zip(&self.board.inodes);
        let ports = ports.map(|(port, inode)| look_at(port, inode.load(SeqCst))).collect::<Result<Vec<_>>>()?;
        // Those who had ended by then.
        self.reap(None)?;
        let ending = Ending { people: self.people()?, ports, begun: started, ended, code };
        let verdict = if contender.is_ours() {
            let outcomes: Option<Value> = serde_json::from_str(&text_of(&stdout)?).ok();
            Verdict::of(&ending).by_outcomes(&ending, outcomes.as_ref())
        } else {
            Verdict::of(&ending).by_code(&ending)
        };
        let is_fine = verdict.hits.is_empty() && verdict.lies.is_empty();
        let said = if is_fine {
            String::new()
        } else {
            format!("{plan:?}\n{ending:#?}\n{}\n{}", text_of(&stdout)?, text_of(&stderr)?)
        };
        let is_bystander = |p: &&Person| p.held == 0;
        Ok(Round {
            verdict,
            bystanders: ending.people.iter().filter(is_bystander).count(),
            recycled: ending.people.iter().filter(|p| matches!(p.part, Part::Recycled | Part::Restarted)).count(),
            took: Duration::from_nanos(ended - started),
            said,
        })
    }

    /// Answers deaths until the command has ended. When that was, and its exit code.
    fn follow(&mut self, command: Pid) -> Result<(u64, Option<i32>)> {
        loop {
            if let Some(code) = self.reap(Some(command))? {
                return Ok((now(), code));
            }
        }
    }

    /// Reaps whoever has ended: with a command, waits, and says how that ended; without, does not wait.
    fn reap(&mut self, command: Option<Pid>) -> Result<Option<Option<i32>>> {
        loop {
            let flags =
                if command.is_some() { WaitPidFlag::WEXITED } else { WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG };
            let status = match waitid(Id::All, flags) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(None),
                Ok(status) => status,
                Err(errno) => bail!("cannot wait for the actors: {errno}"),
            };
            let (pid, code, signal) = match status {
                WaitStatus::Exited(pid, code) => (pid, Some(code), 0),
                WaitStatus::Signaled(pid, signal, _) => (pid, None, signal as u32),
                _ => continue,
            };
            if Some(pid) == command {
                return Ok(Some(code));
            }
            self.bury(pid, code, signal, command.is_some())?;
        }
    }

    /// Somebody has ended, and its PID is free: it goes to somebody else at once, who never had the port.
    fn bury(&mut self, pid: Pid, code: Option<i32>, signal: u32, goes_on: bool) -> Result<()> {
        let pid = pid.as_raw().cast_unsigned();
        self.learn_of_children();
        let slots = self.board.slots();
        let has = |k: &Known, number: u32| k.died == 0 && slots[k.seat].pid.load(SeqCst) == number;
        // Else a child that ended before it, or who forked it, had written down its number.
        let seat = self.known.iter().rposition(|k| has(k, pid)).or_else(|| {
            let is_child = |k: &Known| has(k, 0) && k.part == Part::Holder && slots[k.seat].held.load(SeqCst) != 0;
            self.known.iter().position(is_child)
        });
        // Else what the command started, and left behind.
        let Some(known) = seat.map(|index| &mut self.known[index]) else { return Ok(()) };
        slots[known.seat].pid.store(pid, SeqCst);
        (known.died, known.killed_by) = (now(), signal);
        let slot = &self.board.slots()[known.seat];
        let was_holder = slot.held.load(SeqCst) != 0;
        if code.is_some_and(|code| code != 0) {
            bail!("an actor failed: {:?} with PID {pid}, exit code {code:?}", known.part);
        }
        if signal != 0 && was_holder {
            mark(&self.board.struck);
        }
        if goes_on && was_holder {
            let is_struck = self.board.struck.load(SeqCst) != 0;
            let part = if self.restarts && is_struck { Part::Restarted } else { Part::Recycled };
            if self.cast(part, Some(pid), PLAIN)? && part == Part::Restarted {
                self.restarts = false;
            }
        }
        Ok(())
    }

    /// Holders take seats for their children by themselves.
    fn learn_of_children(&mut self) {
        let seats = self.board.slots().len();
        for seat in 0..seats {
            if !self.known.iter().any(|known| known.seat == seat) {
                self.known.push(Known { seat, part: Part::Holder, died: 0, killed_by: 0 });
            }
        }
    }

    fn people(&mut self) -> Result<Vec<Person>> {
        self.learn_of_children();
        let slots = self.board.slots();
        let each = self.known.iter().map(|&Known { seat, part, died, killed_by }| {
            let slot = &slots[seat];
            let pid = slot.pid.load(SeqCst);
            let mut person = Person {
                part,
                pid,
                held: slot.held.load(SeqCst),
                let_go: slot.let_go.load(SeqCst),
                took: slot.took.load(SeqCst),
                signalled: slot.signalled.load(SeqCst),
                signal: slot.signal.load(SeqCst),
                died,
                is_dying: false,
                killed_by,
            };
            // A seat without a number: its child was never seen.
            if died == 0 && pid != 0 {
                let state = state(pid)?;
                person.is_dying = state.is_dying;
                if person.signal == 0 {
                    person.signal = state.signal;
                }
            }
            Ok(person)
        });
        each.collect()
    }
}

struct State {
    /// The first signal that waits for it; SIGSTOP where it is stopped. 0: none.
    signal: u32,
    is_dying: bool,
}

/// What the kernel shows of a child of ours that was not reaped, so that the number is its own.
fn state(pid: u32) -> Result<State> {
    let read =
        |file| fs::read_to_string(format!("/proc/{pid}/{file}")).with_context(|| format!("cannot read of {pid}"));
    let (status, stat) = (read("status")?, read("stat")?);
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
    let mask = |name| u64::from_str_radix(field(name), 16).with_context(|| format!("no {name} of {pid}"));
    let signals = mask("SigPnd:")? | mask("ShdPnd:")?;
    // The ninth field; the second, in parentheses, is the name.
    let flags = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(6)?.parse::<u32>().ok());
    let is_exiting = flags.with_context(|| format!("no flags of {pid}"))? & PF_EXITING != 0;
    let signal = match signals {
        _ if field("State:").starts_with('T') => Signal::SIGSTOP as u32,
        0 => 0,
        _ => signals.trailing_zeros() + 1,
    };
    Ok(State { signal, is_dying: is_exiting || signals & (1 << (Signal::SIGKILL as u32 - 1)) != 0 })
}

/// The port as bind(2) and the kernel's list have it now.
fn look_at(port: u16, old: u64) -> Result<PortState> {
    let fd =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("cannot open a socket")?;
    setsockopt(&fd, ReuseAddr, &true).context("cannot set SO_REUSEADDR")?;
    let address = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
    let bindable = match bind(fd.as_raw_fd(), &address) {
        Ok(()) => true,
        Err(Errno::EADDRINUSE) => false,
        Err(errno) => bail!("cannot bind to {port}: {errno}"),
    };
    drop(fd);
    let list = fs::read_to_string("/proc/net/tcp").context("cannot read /proc/net/tcp")?;
    let inodes = listeners(&list, port);
    Ok(PortState { port, listens: !inodes.is_empty(), old_listens: inodes.contains(&old), bindable })
}

/// Inodes of the sockets that /proc/net/tcp has at the port in state 0A, TCP_LISTEN.
fn listeners(list: &str, port: u16) -> Vec<u64> {
    let local = format!(":{port:04X}");
    let lines = list.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let here = lines.filter(|words| words.len() > 9 && words[1].ends_with(&local) && words[3] == "0A");
    here.filter_map(|words| words[9].parse().ok()).collect()
}

/// Before everybody else, where that is allowed: on a busy machine, what it saw would be old when it ends.
fn spawn(command: &mut Command) -> Result<Pid> {
    // SAFETY: a system call that takes integers, between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::setpriority(libc::PRIO_PROCESS, 0, -20);
            Ok(())
        });
    }
    // Reaped with the actors, by wait(2).
    let child = command.spawn().with_context(|| format!("cannot run `{}`", crate::shown(command)))?;
    Ok(Pid::from_raw(child.id().cast_signed()))
}

/// A file without a name, for what a command prints.
fn memory_file() -> Result<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    Ok(memfd_create(c"output", MFdFlags::MFD_CLOEXEC).context("cannot make a file in memory")?.into())
}

fn text_of(file: &File) -> Result<String> {
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len())?];
    file.read_exact_at(&mut bytes, 0).context("cannot read what the command printed")?;
    let mut text = String::new();
    String::from_utf8_lossy(&bytes).as_bytes().read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::listeners;

    #[test]
    fn a_listener_is_told_from_a_connection() {
        let list = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
                       0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 7 1 ff\n\
                       1: 0100007F:1F91 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 8 1 ff\n";
        assert_eq!(listeners(list, 0x1f90), [7]);
        assert_eq!(listeners(list, 0x1f91), [0; 0]);
        assert_eq!(listeners(list, 0x1f), [0; 0]);
    }
}
