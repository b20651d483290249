//! The actors: processes with one thread each, forked by the director, or by one another.
//!
//! Every one of them is born with all signals blocked. So a signal to it stays pending, where the kernel shows it, or is
//! read from a signalfd by those who act on it: nothing that was sent is ever missed. SIGKILL and SIGSTOP cannot be
//! blocked; the director, whose children all of them are, is told of these by wait(2).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::board::{Board, Slot, mark, now};

/// Between two tries of a successor to have the port.
const TRY_EVERY: Duration = Duration::from_micros(50);

/// What a holder does, of itself or when it is told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    Exit,
    /// Hands the socket to the next heir, and exits.
    Pass,
    /// Forks a child that goes on with the socket, and exits.
    Fork,
    /// Forks a child that has the socket, too.
    Bud,
}

/// What a holder makes of SIGTERM, or of any other signal that can be caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Do(Deed),
    /// Closes the socket, and exits some time later.
    Linger(Duration),
    /// Takes its time before anything happens.
    Late(Duration),
    Ignore,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Conduct {
    pub(super) answer: Answer,
    /// What it does of itself, and how long after the command was started.
    pub(super) of_itself: Option<(Duration, Deed)>,
    /// How often its children fork again.
    pub(super) generations: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Holds a port of its own choice, and nothing of the round's.
    Bystander,
    /// The same, under the PID of a holder that has ended.
    Recycled,
    /// Connected to the port.
    Client,
    /// Takes the port as soon as it can be had, once a holder was signalled.
    Successor,
    /// The same, under the PID of a holder that has ended.
    Restarted,
    /// Is handed the socket, or not.
    Heir,
    Holder,
    /// Holds the second port, which the command is to free as well.
    Neighbour,
}

/// What the actors of one round share besides the board.
#[derive(Debug)]
pub(super) struct Props {
    pub(super) board: Board,
    /// Counts those who are in their places.
    pub(super) ready: EventFd,
    /// Readable from the moment on in which the command was started.
    pub(super) begun: EventFd,
    /// The way to each heir, and its own end. Heirs have the first seats of the board.
    pub(super) mailboxes: Vec<(OwnedFd, OwnedFd)>,
    /// The holders whom the first one forks once it listens.
    pub(super) others: Vec<Conduct>,
}

/// Forks: the child is of the caller's parent (`sibling`) or the caller, and has the PID that is asked for.
///
/// # Errors
/// EEXIST where the PID is taken; what else clone3(2) says.
pub(super) fn fork(sibling: bool, pid: Option<u32>) -> io::Result<u32> {
    let tids = [pid.unwrap_or(0).cast_signed()];
    // SAFETY: all-zero bytes are a valid clone_args.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    if sibling {
        arguments.flags = libc::CLONE_PARENT as u64;
    } else {
        arguments.exit_signal = libc::SIGCHLD as u64;
    }
    if pid.is_some() {
        arguments.set_tid = tids.as_ptr() as u64;
        arguments.set_tid_size = 1;
    }
    // SAFETY: without CLONE_VM this is fork: the child has a copy of everything, and whoever forks has one thread.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Plays a part to its end, in a process that was just forked for it.
pub(super) fn play(part: Part, seat: usize, props: &Props, conduct: Conduct) -> ! {
    let played = catch_unwind(AssertUnwindSafe(|| {
        let mut actor = Actor { seat, props, socket: None, conduct, generation: 0, again: None };
        actor.slot().pid.store(std::process::id(), SeqCst);
        match part {
            Part::Bystander | Part::Recycled => actor.stand_by(),
            Part::Client => actor.connect(),
            Part::Successor | Part::Restarted => actor.succeed(),
            Part::Heir => actor.inherit(),
            Part::Holder => actor.hold(),
            Part::Neighbour => actor.open(1).and_then(|()| actor.hold()),
        }
    }));
    leave(i32::from(!matches!(played, Ok(Ok(())))))
}

/// Ends this process without what a program does at its end: that is the director's.
fn leave(code: i32) -> ! {
    // SAFETY: takes an integer, and does not return.
    unsafe { libc::_exit(code) }
}

struct Actor<'a> {
    seat: usize,
    props: &'a Props,
    socket: Option<TcpListener>,
    conduct: Conduct,
    generation: u8,
    /// What it did of itself, which its children do as well.
    again: Option<(Duration, Deed)>,
}

impl Actor<'_> {
    fn slot(&self) -> &Slot {
        &self.props.board.slots()[self.seat]
    }

    fn port(&self, index: usize) -> u16 {
        u16::try_from(self.props.board.ports[index].load(SeqCst)).unwrap_or(0)
    }

    fn is_in_place(&self) -> io::Result<()> {
        self.props.ready.write(1)?;
        Ok(())
    }

    fn stand_by(&self) -> io::Result<()> {
        let _own = TcpListener::bind(("127.0.0.1", 0))?;
        self.is_in_place()?;
        wait_for_ever()
    }

    fn connect(&self) -> io::Result<()> {
        let _stream = TcpStream::connect(("127.0.0.1", self.port(0)))?;
        self.is_in_place()?;
        wait_for_ever()
    }

    /// Asks for the port again and again, as a supervisor that starts a server anew does.
    fn succeed(&self) -> io::Result<()> {
        self.is_in_place()?;
        let board = &self.props.board;
        loop {
            if board.over.load(SeqCst) != 0 {
                return wait_for_ever();
            }
            if board.struck.load(SeqCst) != 0
                && let Ok(_own) = TcpListener::bind(("127.0.0.1", self.port(0)))
            {
                mark(&self.slot().took);
                return wait_for_ever();
            }
            thread::sleep(TRY_EVERY);
        }
    }

    /// Listens, and says where.
    fn open(&mut self, index: usize) -> io::Result<()> {
        let socket = TcpListener::bind(("127.0.0.1", 0))?;
        let inode = nix::sys::stat::fstat(&socket)?.st_ino;
        self.props.board.inodes[index].store(inode, SeqCst);
        self.props.board.ports[index].store(socket.local_addr()?.port().into(), SeqCst);
        self.socket = Some(socket);
        Ok(())
    }

    fn hold(&mut self) -> io::Result<()> {
        if self.socket.is_none() {
            self.open(0)?;
            for &conduct in &self.props.others {
                let seat = self.props.board.seat();
                if fork(true, None)? == 0 {
                    (self.seat, self.conduct) = (seat, conduct);
                    self.slot().pid.store(std::process::id(), SeqCst);
                    break;
                }
            }
        }
        mark(&self.slot().held);
        self.is_in_place()?;
        self.serve()
    }

    /// A bystander until it is handed the socket.
    fn inherit(&mut self) -> io::Result<()> {
        self.is_in_place()?;
        let signals = signals()?;
        let mailbox = &self.props.mailboxes[self.seat].1;
        loop {
            let mut fds = [readable(&signals), readable(mailbox)];
            poll(&mut fds, PollTimeout::NONE)?;
            let (signal, mail) = (is_ready(&fds[0]), is_ready(&fds[1]));
            if signal {
                self.note(&signals)?;
            }
            if mail {
                self.socket = Some(TcpListener::from(receive(mailbox.as_raw_fd())?));
                return self.serve();
            }
            if signal {
                // Nothing to let go of, so no reason to stay, as an ordinary process would not.
                leave(0);
            }
        }
    }

    /// Holds the socket until it is told to end, or its time has come.
    fn serve(&mut self) -> io::Result<()> {
        let signals = signals()?;
        let mut due = None;
        loop {
            let of_itself = self.conduct.of_itself.filter(|_| self.props.board.over.load(SeqCst) == 0);
            let mut fds = vec![readable(&signals)];
            let timeout = match (of_itself, due) {
                (Some(_), None) => {
                    fds.push(readable(&self.props.begun));
                    PollTimeout::NONE
                }
                (Some(_), Some(due)) => milliseconds_until(due),
                (None, _) => PollTimeout::NONE,
            };
            poll(&mut fds, timeout)?;
            let (signal, begun) = (is_ready(&fds[0]), fds.get(1).is_some_and(is_ready));
            if signal {
                self.note(&signals)?;
                mark(&self.props.board.struck);
                self.answer()?;
            }
            let Some((delay, deed)) = of_itself else { continue };
            if begun {
                due = Some(now() + nanoseconds(delay));
            }
            if due.is_some_and(|due| now() + nanoseconds(Duration::from_millis(1)) >= due) {
                while due.is_some_and(|due| now() < due) {
                    std::hint::spin_loop();
                }
                self.again = self.conduct.of_itself.take();
                due = None;
                self.act(deed)?;
            }
        }
    }

    fn note(&self, signals: &SignalFd) -> io::Result<()> {
        if let Some(signal) = signals.read_signal()? {
            mark(&self.slot().signalled);
            let _first = self.slot().signal.compare_exchange(0, signal.ssi_signo, SeqCst, SeqCst);
        }
        Ok(())
    }

    fn answer(&mut self) -> io::Result<()> {
        match self.conduct.answer {
            Answer::Do(deed) => self.act(deed),
            Answer::Ignore => Ok(()),
            Answer::Linger(time) => {
                mark(&self.slot().let_go);
                self.socket = None;
                thread::sleep(time);
                leave(0)
            }
            Answer::Late(time) => {
                thread::sleep(time);
                self.act(Deed::Exit)
            }
        }
    }

    fn act(&mut self, deed: Deed) -> io::Result<()> {
        match deed {
            Deed::Exit => self.exit(),
            Deed::Fork => {
                self.beget()?;
                self.exit()
            }
            Deed::Bud => self.beget(),
            Deed::Pass => {
                self.pass()?;
                self.exit()
            }
        }
    }

    fn exit(&self) -> ! {
        mark(&self.slot().let_go);
        leave(0)
    }

    /// A child that holds the socket from its birth. Those of the last generation just end when they are told to.
    fn beget(&mut self) -> io::Result<()> {
        if self.generation >= self.conduct.generations {
            return Ok(());
        }
        let seat = self.props.board.seat();
        mark(&self.props.board.slots()[seat].held);
        match fork(true, None)? {
            0 => {
                self.seat = seat;
                self.slot().pid.store(std::process::id(), SeqCst);
                self.generation += 1;
                self.conduct.of_itself = self.again;
                if self.generation == self.conduct.generations {
                    self.conduct = Conduct { answer: Answer::Do(Deed::Exit), of_itself: None, ..self.conduct };
                }
                let served = self.serve();
                leave(i32::from(served.is_err()))
            }
            // Where both are ended before the child has said who it is.
            child => self.props.board.slots()[seat].pid.store(child, SeqCst),
        }
        Ok(())
    }

    /// Hands the socket to the first heir that has not been handed it.
    fn pass(&mut self) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let board = &self.props.board;
        for (heir, (mailbox, _)) in self.props.mailboxes.iter().enumerate() {
            let slot = &board.slots()[heir];
            if slot.held.compare_exchange(0, now(), SeqCst, SeqCst).is_err() {
                continue;
            }
            let (fds, byte) = ([socket.as_raw_fd()], [IoSlice::new(b"!")]);
            sendmsg::<()>(mailbox.as_raw_fd(), &byte, &[ControlMessage::ScmRights(&fds)], MsgFlags::empty(), None)?;
            break;
        }
        Ok(())
    }
}

fn signals() -> io::Result<SignalFd> {
    Ok(SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

fn readable(fd: &impl AsFd) -> PollFd<'_> {
    PollFd::new(fd.as_fd(), PollFlags::POLLIN)
}

fn is_ready(fd: &PollFd<'_>) -> bool {
    fd.revents().is_some_and(|events| !events.is_empty())
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Rounded down: the rest is spent on the processor, for a moment of µs is meant.
fn milliseconds_until(due: u64) -> PollTimeout {
    PollTimeout::from(u16::try_from(due.saturating_sub(now()) / 1_000_000).unwrap_or(u16::MAX))
}

fn wait_for_ever() -> io::Result<()> {
    loop {
        // All signals are blocked: only SIGKILL ends this.
        nix::unistd::pause();
    }
}

fn receive(mailbox: RawFd) -> io::Result<OwnedFd> {
    let (mut byte, mut space) = ([0], nix::cmsg_space!([RawFd; 1]));
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(mailbox, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let fd = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    let fd = fd.ok_or_else(|| io::Error::other("mail without a socket"))?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
