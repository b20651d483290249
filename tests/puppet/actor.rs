//! The puppet's own side: reads one command a line from its control socket, does it, answers with one line
//! (`ok …` or `err ERRNO TEXT`). It ends when the control socket does, so no puppet outlives the test run.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio, exit};
use std::str::FromStr;
use std::thread;

use nix::libc;

use super::{CONTROL_VARIABLE, sys};

/// IPPROTO_MPTCP (`linux/in.h`).
const IPPROTO_MPTCP: libc::c_int = 262;

/// Runs a puppet until it is told to exit.
pub fn run(control: OsString) -> ! {
    // Children are reaped by the kernel: a puppet never waits for what it forked.
    sys::ignore_signal(libc::SIGCHLD);
    let mut actor = Actor::connect(PathBuf::from(control));
    actor.obey()
}

struct Actor {
    path: PathBuf,
    control: BufReader<UnixStream>,
    mailbox: Option<UnixDatagram>,
}

type Reply = io::Result<String>;

impl Actor {
    fn connect(path: PathBuf) -> Self {
        match UnixStream::connect(&path) {
            Ok(stream) => Actor { path, control: BufReader::new(stream), mailbox: None },
            // The test that wanted this puppet is gone.
            Err(_) => exit(1),
        }
    }

    fn obey(&mut self) -> ! {
        loop {
            let mut line = String::new();
            match self.control.read_line(&mut line) {
                Ok(0) | Err(_) => exit(0),
                Ok(_) => {}
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            let reply = match self.perform(&words) {
                Ok(text) => format!("ok {text}\n"),
                Err(error) => format!("err {} {}: {error}\n", error.raw_os_error().unwrap_or(0), line.trim_end()),
            };
            self.answer(&reply);
        }
    }

    fn answer(&mut self, reply: &str) {
        if self.control.get_mut().write_all(reply.as_bytes()).is_err() {
            exit(0);
        }
    }

    fn perform(&mut self, words: &[&str]) -> Reply {
        let done = |()| String::new();
        match *words {
            ["socket", kind, ref flags @ ..] => describe(open(kind == "tcp6", flags)?),
            ["tcp", address, ref flags @ ..] => tcp(parse(address)?, flags, true),
            ["bind", address, ref flags @ ..] => tcp(parse(address)?, flags, false),
            ["udp", address, ref flags @ ..] => udp(parse(address)?, flags),
            ["listen", fd] => sys::listen(parse(fd)?).and_then(|()| describe(parse(fd)?)),
            ["connect", address] => connect(parse(address)?),
            ["peer", fd, address] => sys::connect(parse(fd)?, parse(address)?).map(done),
            ["accept", fd] => sys::accept(parse(fd)?).map(|fd| fd.to_string()),
            ["close", fd] => sys::close(parse(fd)?).map(done),
            ["dup", fd] => sys::dup(parse(fd)?).map(|fd| fd.to_string()),
            ["shutdown", fd] => sys::shutdown(parse(fd)?).map(done),
            ["ring", fd] => sys::register_with_ring(parse(fd)?).map(|fd| fd.to_string()),
            ["cloexec", fd, on] => sys::set_cloexec(parse(fd)?, on == "on").map(done),
            ["mailbox", path] => UnixDatagram::bind(path).map(|socket| {
                self.mailbox = Some(socket);
                String::new()
            }),
            ["sendfd", fd, path] => {
                let through = UnixDatagram::unbound()?;
                sys::send_fd(through.as_raw_fd(), Path::new(path), parse(fd)?).map(done)
            }
            ["recvfd"] => {
                let mailbox = self.mailbox.as_ref().ok_or_else(|| io::Error::other("no mailbox"))?;
                sys::receive_fd(mailbox.as_raw_fd()).map(|fd| fd.to_string())
            }
            ["chdir", path] => std::env::set_current_dir(path).map(done),
            ["fork"] => self.fork(None),
            ["fork-as", pid] => self.fork(Some(parse(pid)?)),
            ["exec"] => Err(self.exec()),
            ["exit"] => exit(0),
            ["thread-serve"] => self.serve_from_thread(),
            ["unshare-net"] => sys::unshare_net().map(done),
            ["become", uid] => sys::become_user(parse(uid)?).map(done),
            ["join-group", group] => sys::join_group(parse(group)?).map(done),
            ["setname", hex] => sys::set_name(&from_hex(hex)?).map(done),
            ["ignore-term"] => {
                sys::ignore_signal(libc::SIGTERM);
                Ok(String::new())
            }
            ["release-on-term", fd] => sys::close_on_term(parse(fd)?).map(done),
            ["released-at"] => sys::closed_at().map(|time| time.to_string()),
            ["touch", mebibytes] => sys::touch(parse(mebibytes)?).map(done),
            ["limit-files", count] => sys::limit_files(parse(count)?).map(done),
            ["trace", pid] => sys::trace(parse(pid)?).map(done),
            ["look-up", path] => std::fs::metadata(path).map(|_| String::new()),
            // The child answers, for the puppet itself sleeps until the child is gone.
            ["vfork", fd] => sys::vfork(parse(fd)?, self.control.get_ref().as_raw_fd()).map(done),
            ["storm", count] => storm(parse(count)?),
            ["run", program, ref arguments @ ..] => run_child(program, arguments),
            _ => Err(io::Error::other("no such command")),
        }
    }

    /// The child becomes a puppet of its own, with its own control connection.
    fn fork(&mut self, wanted: Option<u32>) -> Reply {
        let child = sys::fork(wanted)?;
        if child != 0 {
            return Ok(child.to_string());
        }
        *self = Actor::connect(self.path.clone());
        self.obey()
    }

    /// Replaces the program by itself; only returns where that failed.
    fn exec(&self) -> io::Error {
        // A thread-group leader that exited, which `self` would mean, has no program any more.
        Command::new("/proc/thread-self/exe").env(CONTROL_VARIABLE, &self.path).exec()
    }

    /// A new thread goes on as the puppet, and the thread-group leader exits: a zombie whose process still serves.
    fn serve_from_thread(&mut self) -> Reply {
        let control = BufReader::new(self.control.get_ref().try_clone()?);
        let mut actor = Actor { path: self.path.clone(), control, mailbox: None };
        thread::Builder::new().name("serving".into()).spawn(move || {
            actor.answer("ok \n");
            actor.obey()
        })?;
        sys::exit_thread()
    }
}

fn parse<T: FromStr>(word: &str) -> io::Result<T> {
    word.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("cannot read '{word}'")))
}

fn from_hex(hex: &str) -> io::Result<Vec<u8>> {
    let digits = hex.as_bytes().chunks(2).map(|pair| {
        let text = str::from_utf8(pair).unwrap_or("");
        u8::from_str_radix(text, 16).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "not hexadecimal"))
    });
    digits.collect()
}

fn open(v6: bool, flags: &[&str]) -> io::Result<RawFd> {
    let protocol = if flags.contains(&"mptcp") { IPPROTO_MPTCP } else { 0 };
    let cloexec = if flags.contains(&"cloexec") { libc::SOCK_CLOEXEC } else { 0 };
    let fd = sys::socket(v6, libc::SOCK_STREAM | cloexec, protocol)?;
    prepare(fd, flags)?;
    Ok(fd)
}

fn prepare(fd: RawFd, flags: &[&str]) -> io::Result<()> {
    if flags.contains(&"v6only") {
        sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    if flags.contains(&"dual") {
        sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0)?;
    }
    if flags.contains(&"reuseport") {
        sys::set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    }
    if flags.contains(&"reuseaddr") {
        sys::set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    }
    Ok(())
}

/// `fd address inode cookie`; the address has port 0 where the socket is not bound.
fn describe(fd: RawFd) -> Reply {
    Ok(format!("{fd} {} {} {}", sys::local_address(fd)?, sys::inode(fd)?, sys::cookie(fd)?))
}

fn or_close<T>(fd: RawFd, result: io::Result<T>) -> io::Result<T> {
    if result.is_err() {
        sys::close(fd)?;
    }
    result
}

fn tcp(address: SocketAddr, flags: &[&str], listen: bool) -> Reply {
    let fd = open(address.is_ipv6(), flags)?;
    or_close(fd, sys::bind(fd, address).and_then(|()| if listen { sys::listen(fd) } else { Ok(()) }))?;
    describe(fd)
}

fn udp(address: SocketAddr, flags: &[&str]) -> Reply {
    let fd = sys::socket(address.is_ipv6(), libc::SOCK_DGRAM, 0)?;
    or_close(fd, prepare(fd, flags).and_then(|()| sys::bind(fd, address)))?;
    describe(fd)
}

fn connect(address: SocketAddr) -> Reply {
    let fd = sys::socket(address.is_ipv6(), libc::SOCK_STREAM, 0)?;
    or_close(fd, sys::connect(fd, address))?;
    describe(fd)
}

/// Opens and closes `count` listeners as fast as it can; answers with their ports in order.
fn storm(count: usize) -> Reply {
    let mut ports = Vec::with_capacity(count);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    while ports.len() < count {
        let fd = sys::socket(false, libc::SOCK_STREAM, 0)?;
        sys::bind(fd, any)?;
        // Another puppet may take the port between bind and listen only with SO_REUSEADDR, which is not set.
        sys::listen(fd)?;
        ports.push(sys::local_address(fd)?.port());
        sys::close(fd)?;
    }
    let mut text = String::with_capacity(count * 6);
    for port in ports {
        write!(text, "{port} ").map_err(io::Error::other)?;
    }
    Ok(text)
}

/// Runs a program as a child of this puppet; answers with its exit code and, in hexadecimal, its standard output.
fn run_child(program: &str, arguments: &[&str]) -> Reply {
    // The kernel must not reap this child: its status is wanted.
    // SAFETY: SIG_DFL runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    let output = Command::new(program)
        .args(arguments)
        .env_remove(CONTROL_VARIABLE)
        .env("PORTWATCH_SOCKET", "/nonexistent/portwatch.sock")
        .stdin(Stdio::null())
        .output();
    sys::ignore_signal(libc::SIGCHLD);
    let output = output?;
    let mut text = format!("{} ", output.status.code().unwrap_or(-1));
    for byte in output.stdout {
        write!(text, "{byte:02x}").map_err(io::Error::other)?;
    }
    Ok(text)
}
