//! Puppets: real processes that open, share and close sockets when told, and the [`Stage`] that owns them.
//!
//! A puppet is this test binary, started again with a control socket in its environment ([`actor`] is its side). The
//! control socket is a path, so a puppet is reached in any network namespace, after fork and after exec. Each command
//! is answered once the system call has returned, so what follows sees its effect.
//!
//! Only processes that a stage started are ever signalled, and by pidfd. The test process is their subreaper.

mod actor;
pub mod sys;

use std::cell::{Ref, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use tempfile::TempDir;

use crate::oracle;

pub use actor::run;
pub use sys::monotonic_ns;

/// Names the control socket of a puppet.
pub const CONTROL_VARIABLE: &str = "PORTWATCH_PUPPET";

/// How long any single answer may take before a test fails. Only reached by a test that fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `fd` is readable; false where [`PATIENCE`] ran out.
pub fn wait_readable(fd: impl AsFd) -> bool {
    let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    loop {
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.expect("poll") > 0,
        }
    }
}

/// A place where puppets play: their control socket, and every socket that they opened.
pub struct Stage {
    inner: Rc<Inner>,
}

struct Inner {
    directory: TempDir,
    control: UnixListener,
    /// Inodes of all sockets that puppets of this stage ever told of.
    inodes: RefCell<BTreeSet<u64>>,
    /// Network namespaces that puppets of this stage moved from and to, by inode: sockets may be there still when nobody
    /// is any more.
    namespaces: RefCell<BTreeMap<u32, File>>,
}

/// A socket of a puppet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sock {
    pub fd: i32,
    /// Port 0 where it is not bound yet.
    pub address: SocketAddr,
    pub inode: u64,
    /// SO_COOKIE.
    pub cookie: u64,
}

impl Sock {
    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

/// A command that a puppet could not carry out.
#[derive(Debug)]
pub struct Refused {
    pub errno: i32,
    pub text: String,
}

pub struct Puppet {
    pub pid: u32,
    pidfd: OwnedFd,
    control: RefCell<BufReader<UnixStream>>,
    stage: Rc<Inner>,
}

impl Stage {
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("portwatch-").tempdir().expect("a temporary directory");
        let control = UnixListener::bind(directory.path().join("control")).expect("a control socket");
        // Puppets that became ordinary users fork, too.
        open_to_all(&directory.path().join("control"), 0o777);
        open_to_all(directory.path(), 0o755);
        Stage {
            inner: Rc::new(Inner { directory, control, inodes: RefCell::default(), namespaces: RefCell::default() }),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.inner.directory.path().join(name)
    }

    pub fn puppet(&self) -> Puppet {
        self.puppet_with_arguments(&[] as &[&OsStr])
    }

    /// A puppet whose command line ends in `arguments`.
    #[expect(clippy::zombie_processes, reason = "reaped through its pidfd, as are puppets that are no direct child")]
    pub fn puppet_with_arguments<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Puppet {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("puppet").args(arguments).env(CONTROL_VARIABLE, self.path("control")).stdin(Stdio::null());
        // SAFETY: prctl and setrlimit are async-signal-safe and touch only the child.
        unsafe {
            command.pre_exec(|| {
                sys::check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
                let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                sys::check(libc::setrlimit(libc::RLIMIT_CORE, &none)).map(drop)
            });
        }
        let child = command.spawn().expect("cannot start a puppet");
        let puppet = self.inner.admit();
        assert_eq!(puppet.pid, child.id());
        puppet
    }

    /// The next puppet that somebody else starts: [`Stage::recipe`] says how.
    pub fn admit(&self) -> Puppet {
        self.inner.admit()
    }

    /// The program and the variable in its environment that make a puppet of this stage.
    pub fn recipe(&self) -> (PathBuf, String) {
        let program = std::env::current_exe().expect("the path of this program");
        (program, format!("{CONTROL_VARIABLE}={}", self.path("control").display()))
    }

    /// Whether a puppet of this stage opened the socket.
    pub fn knows(&self, inode: u64) -> bool {
        self.inner.inodes.borrow().contains(&inode)
    }

    /// The network namespaces that puppets moved from and to, by inode.
    pub fn namespaces(&self) -> Ref<'_, BTreeMap<u32, File>> {
        self.inner.namespaces.borrow()
    }
}

fn open_to_all(path: &std::path::Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
}

impl Inner {
    /// The next puppet that connects.
    fn accept(&self) -> (BufReader<UnixStream>, Pid) {
        assert!(wait_readable(&self.control), "a puppet did not connect");
        let (stream, _) = self.control.accept().expect("accept");
        stream.set_read_timeout(Some(PATIENCE)).expect("SO_RCVTIMEO");
        let pid = peer(&stream);
        (BufReader::new(stream), pid)
    }

    fn admit(self: &Rc<Self>) -> Puppet {
        let (control, pid) = self.accept();
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).expect("pidfd_open");
        let pid = pid.as_raw_nonzero().get() as u32;
        Puppet { pid, pidfd, control: RefCell::new(control), stage: Rc::clone(self) }
    }

    fn remember(&self, reply: &str) -> Sock {
        let mut words = reply.split_whitespace();
        let mut next = || words.next().expect("a puppet describes a socket in four words");
        let sock = Sock { fd: read(next()), address: read(next()), inode: read(next()), cookie: read(next()) };
        self.inodes.borrow_mut().insert(sock.inode);
        sock
    }
}

fn read<T: FromStr<Err: std::fmt::Debug>>(word: &str) -> T {
    word.trim().parse().unwrap_or_else(|error| panic!("a puppet answered '{word}': {error:?}"))
}

/// The process at the other end, as the kernel tells it.
fn peer(stream: &UnixStream) -> Pid {
    use std::os::fd::AsRawFd;
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the pointers describe one ucred and its size.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            std::ptr::from_mut(&mut credentials).cast(),
            &raw mut len,
        )
    };
    sys::check(result).expect("SO_PEERCRED");
    Pid::from_raw(credentials.pid).expect("a puppet of this PID namespace")
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string");
        text
    })
}

impl Puppet {
    /// Sends a command without waiting for the answer, which [`Puppet::answer`] reads.
    pub fn begin(&self, command: &str) {
        let mut control = self.control.borrow_mut();
        control.get_mut().write_all(format!("{command}\n").as_bytes()).expect("a puppet is gone");
    }

    pub fn answer(&self) -> Result<String, Refused> {
        let mut line = String::new();
        self.control.borrow_mut().read_line(&mut line).expect("a puppet does not answer");
        match line.split_once(' ') {
            Some(("ok", rest)) => Ok(rest.trim().to_owned()),
            Some(("err", rest)) => {
                let (errno, text) = rest.split_once(' ').unwrap_or((rest, ""));
                Err(Refused { errno: read(errno), text: text.trim_end().to_owned() })
            }
            _ => panic!("puppet {} died, or said '{line}'", self.pid),
        }
    }

    pub fn attempt(&self, command: &str) -> Result<String, Refused> {
        self.begin(command);
        self.answer()
    }

    fn tell(&self, command: &str) -> String {
        self.attempt(command).unwrap_or_else(|refused| panic!("{}", refused.text))
    }

    fn describe(&self, command: &str) -> Sock {
        self.stage.remember(&self.tell(command))
    }

    /// socket, bind and listen. `flags`: `v6only dual reuseport reuseaddr mptcp cloexec`, separated by blanks.
    pub fn tcp(&self, address: &str, flags: &str) -> Sock {
        self.describe(&format!("tcp {address} {flags}"))
    }

    /// As [`Puppet::tcp`], where the kernel may refuse.
    pub fn try_tcp(&self, address: &str, flags: &str) -> Result<Sock, Refused> {
        self.attempt(&format!("tcp {address} {flags}")).map(|reply| self.stage.remember(&reply))
    }

    /// A TCP listener on a free port of 127.0.0.1.
    pub fn serve(&self) -> Sock {
        self.tcp("127.0.0.1:0", "")
    }

    /// socket and bind, without listen.
    pub fn bind(&self, address: &str, flags: &str) -> Sock {
        self.describe(&format!("bind {address} {flags}"))
    }

    /// A TCP socket that is not bound; `kind` is `tcp4` or `tcp6`.
    pub fn socket(&self, kind: &str, flags: &str) -> Sock {
        self.describe(&format!("socket {kind} {flags}"))
    }

    /// Calls listen; the answer has the port that it is at now.
    pub fn listen(&self, fd: i32) -> Sock {
        self.describe(&format!("listen {fd}"))
    }

    pub fn udp(&self, address: &str, flags: &str) -> Sock {
        self.describe(&format!("udp {address} {flags}"))
    }

    /// Gives a UDP socket a peer: it hears nobody else from then on.
    pub fn peer(&self, fd: i32, address: &str) {
        self.tell(&format!("peer {fd} {address}"));
    }

    /// A TCP connection; not remembered as a socket that could ever be listed.
    pub fn connect(&self, address: SocketAddr) -> Sock {
        self.describe(&format!("connect {address}"))
    }

    pub fn accept(&self, fd: i32) -> i32 {
        read(&self.tell(&format!("accept {fd}")))
    }

    pub fn close(&self, fd: i32) {
        self.tell(&format!("close {fd}"));
    }

    pub fn dup(&self, fd: i32) -> i32 {
        read(&self.tell(&format!("dup {fd}")))
    }

    pub fn shutdown(&self, fd: i32) {
        self.tell(&format!("shutdown {fd}"));
    }

    /// Registers `fd` with a new io_uring, which keeps it open; the descriptor of the ring.
    pub fn register_with_ring(&self, fd: i32) -> Result<i32, Refused> {
        self.attempt(&format!("ring {fd}")).map(|fd| read(&fd))
    }

    pub fn set_cloexec(&self, fd: i32, on: bool) {
        self.tell(&format!("cloexec {fd} {}", if on { "on" } else { "off" }));
    }

    /// Puts `fd` into the mailbox of `to` (SCM_RIGHTS), which must have been [opened](Puppet::open_mailbox).
    pub fn send_fd(&self, fd: i32, to: &Puppet) {
        self.tell(&format!("sendfd {fd} {}", to.mailbox().display()));
    }

    pub fn open_mailbox(&self) {
        // Of an earlier one of its own, or of somebody who had its PID.
        let _none = std::fs::remove_file(self.mailbox());
        self.tell(&format!("mailbox {}", self.mailbox().display()));
    }

    pub fn receive_fd(&self) -> i32 {
        read(&self.tell("recvfd"))
    }

    fn mailbox(&self) -> PathBuf {
        self.stage.directory.path().join(format!("mailbox-{}", self.pid))
    }

    pub fn fork(&self) -> Puppet {
        let pid: u32 = read(&self.tell("fork"));
        let child = self.stage.admit();
        assert_eq!(child.pid, pid);
        child
    }

    /// A child with a PID of the caller's choice, which must be free.
    pub fn fork_as(&self, pid: u32) -> Result<Puppet, Refused> {
        self.attempt(&format!("fork-as {pid}"))?;
        let child = self.stage.admit();
        assert_eq!(child.pid, pid);
        Ok(child)
    }

    /// Replaces the program; the process stays.
    pub fn exec(&self) {
        self.begin("exec");
        let (stream, pid) = self.stage.accept();
        assert_eq!(pid.as_raw_nonzero().get() as u32, self.pid);
        *self.control.borrow_mut() = stream;
    }

    /// Goes on in a thread while the thread-group leader exits.
    pub fn serve_from_thread(&self) {
        self.tell("thread-serve");
    }

    /// Moves into a network namespace of its own; false, loudly, where only root may.
    #[track_caller]
    pub fn unshare_net(&self) -> bool {
        self.remember_namespace();
        match self.attempt("unshare-net") {
            Ok(_) => {
                self.remember_namespace();
                true
            }
            Err(refused) if !rustix::process::geteuid().is_root() => {
                crate::subject::skip("root", &refused.text);
                false
            }
            Err(refused) => panic!("{}", refused.text),
        }
    }

    fn remember_namespace(&self) {
        let opened = oracle::tasks(self.pid).into_iter().find_map(|task| File::open(task.join("ns/net")).ok());
        if let Some(namespace) = opened {
            let inode = namespace.metadata().expect("a namespace").ino() as u32;
            self.stage.namespaces.borrow_mut().entry(inode).or_insert(namespace);
        }
    }

    /// Its working directory from now on; no part of the path may contain a blank.
    pub fn change_directory(&self, path: &std::path::Path) {
        self.tell(&format!("chdir {}", path.display()));
    }

    pub fn become_user(&self, uid: u32) {
        self.tell(&format!("become {uid}"));
    }

    /// Moves into a process group of its own.
    pub fn lead_group(&self) {
        self.tell("join-group 0");
    }

    pub fn set_name(&self, name: &[u8]) {
        self.tell(&format!("setname {}", hexadecimal(name)));
    }

    pub fn ignore_term(&self) {
        self.tell("ignore-term");
    }

    /// SIGTERM closes this descriptor from now on, and no more.
    pub fn release_on_term(&self, fd: i32) {
        self.tell(&format!("release-on-term {fd}"));
    }

    /// When SIGTERM closed it: CLOCK_MONOTONIC in nanoseconds.
    pub fn released_at(&self) -> u64 {
        read(&self.tell("released-at"))
    }

    /// Has so much memory of its own from now on.
    pub fn touch(&self, mebibytes: usize) {
        self.tell(&format!("touch {mebibytes}"));
    }

    /// Limits the descriptors of what it runs, too.
    pub fn limit_files(&self, count: u64) {
        self.tell(&format!("limit-files {count}"));
    }

    /// Stops another puppet as a debugger does.
    pub fn trace(&self, other: &Puppet) {
        self.tell(&format!("trace {}", other.pid));
    }

    /// Falls asleep in state D, for good, as the only holder of `fd`. SIGKILL ends it.
    pub fn vfork(&self, fd: i32) {
        self.tell(&format!("vfork {fd}"));
        self.await_state('D');
    }

    /// Sends a signal to it, and to nobody else.
    pub fn signal(&self, signal: Signal) {
        rustix::process::pidfd_send_signal(&self.pidfd, signal).expect("pidfd_send_signal");
    }

    /// Waits until its leader is in this state: nothing tells of that.
    pub fn await_state(&self, state: char) {
        let until = std::time::Instant::now() + PATIENCE;
        while self.state() != Some(state) {
            assert!(std::time::Instant::now() < until, "puppet {} is not in state {state}", self.pid);
            std::thread::yield_now();
        }
    }

    fn state(&self) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    /// Runs a program as its child; exit code and standard output. No argument may contain a blank.
    pub fn run(&self, program: &str, arguments: &[&str]) -> (i32, Vec<u8>) {
        let reply = self.tell(&format!("run {program} {}", arguments.join(" ")));
        let (code, hex) = reply.split_once(' ').unwrap_or((&reply, ""));
        let bytes = hex.as_bytes().chunks(2).map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap());
        (read(code), bytes.collect())
    }

    /// Ends by itself; returns once it is gone and reaped.
    pub fn exit(self) {
        self.begin("exit");
        self.wait();
    }

    pub fn is_alive(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&now)).expect("poll") == 0
    }

    /// Waits until it has ended, and reaps it; the signal that ended it, or `None` where it exited by itself or was
    /// another's child.
    pub fn wait(&self) -> Option<i32> {
        assert!(wait_readable(&self.pidfd), "puppet {} does not end", self.pid);
        self.reap().and_then(|status| status.terminating_signal())
    }

    fn reap(&self) -> Option<WaitIdStatus> {
        // A child of another puppet is that one's to reap (by SIG_IGN): ECHILD.
        rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
            .ok()
            .flatten()
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // ESRCH where it is gone already, which is as good.
        if rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL).is_ok() {
            wait_readable(&self.pidfd);
        }
        self.reap();
    }
}
