//! Real processes that hold real sockets, for the tests of this module. What a test started it ends and reaps.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};

use crate::kill::{Stopping, Whole};
use crate::model::{Holder, Listener, Process, ProcessId, Protocol, Socket, SocketId};
use crate::source::stat;

/// The number under which helpers have the (first) socket.
const SOCKET_FD: RawFd = 3;

/// Holds its socket and ends on SIGTERM.
pub(super) const POLITE: &str = "echo ready; exec sleep 1000";
/// Holds its socket and ignores SIGTERM.
pub(super) const DEAF: &str = "trap '' TERM; echo ready; exec sleep 1000";
/// Closes its socket on SIGTERM and lives on.
pub(super) const RELEASING: &str = "trap 'exec 3>&-' TERM; echo ready; while :; do read -r line && exit; done";
/// A master and a worker that share the socket; the worker learns nothing of the master's end.
pub(super) const MASTER: &str = "sleep 1000 & echo $!; wait";

/// A master that closes its copy on SIGTERM and lives on; its worker learns nothing of that.
pub(super) const GRACEFUL_MASTER: &str =
    "sleep 1000 & trap 'exec 3>&-' TERM; echo $!; while :; do read -r line && exit; done";

/// A child of the test, ended and reaped when dropped.
pub(super) struct Helper {
    child: Child,
    /// Never written to: as long as it is open, the helper's `read` blocks.
    _stdin: ChildStdin,
    /// The line it said when it was ready.
    pub(super) said: String,
}

impl Helper {
    /// Runs a shell script that says a line when it is ready, with these listeners at descriptors 3, 4, …
    pub(super) fn start(script: &str, listeners: &[&TcpListener]) -> Helper {
        let fds: Vec<RawFd> = listeners.iter().map(|l| l.as_raw_fd()).collect();
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        // SAFETY: between fork and exec only async-signal-safe calls are made: fcntl and dup2, without allocation.
        unsafe {
            command.pre_exec(move || {
                // Out of the way first: a descriptor of ours may sit at a number that another one is to get.
                let mut moved = [-1; 4];
                for (slot, &fd) in moved.iter_mut().zip(&fds) {
                    let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
                    *slot = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(100))?;
                }
                for (number, &fd) in (SOCKET_FD..).zip(moved.iter().take(fds.len())) {
                    if nix::libc::dup2(fd, number) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap();
        let stdin = child.stdin.take().unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
        Helper { child, _stdin: stdin, said: said.trim().to_owned() }
    }

    /// The same under a chosen PID, which must be free. `None` where this host lets nobody choose.
    pub(super) fn start_as(pid: u32, script: &str, listeners: &[&TcpListener]) -> Option<Helper> {
        for _ in 0..2000 {
            if let Err(error) = fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()) {
                let required = std::env::var("PORTWATCH_TEST_REQUIRE").is_ok_and(|what| what.contains("kernel"));
                assert!(!required, "cannot choose a PID: {error}");
                eprintln!("NOT TESTED: cannot choose a PID (ns_last_pid: {error})");
                return None;
            }
            // Anybody on this host may fork first: try again.
            let helper = Helper::start(script, listeners);
            if helper.pid() == pid {
                return Some(helper);
            }
        }
        panic!("PID {pid} could not be had in 2000 tries");
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn id(&self) -> ProcessId {
        stat::read(self.pid()).unwrap().id()
    }

    pub(super) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Ends and reaps it: its PID is free.
    pub(super) fn end(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A listener of which the test's own copy is closed once its helpers have theirs.
pub(super) struct Port {
    pub(super) port: u16,
    pub(super) inode: u64,
}

pub(super) fn listen() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
}

/// Closes the test's copy and waits until exactly `holders` have the socket: another test's child, forked while the
/// copy was open, has one as well until it execs.
pub(super) fn leave_to(listener: TcpListener, holders: &[u32]) -> Port {
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let mut wanted = holders.to_vec();
    wanted.sort_unstable();
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let found = scan(port);
        let [one] = &found[..] else { panic!("port {port} has {} listeners", found.len()) };
        if one.holders.iter().map(|h| h.process.id.pid).eq(wanted.iter().copied()) {
            return Port { port, inode: one.socket.id.inode };
        }
        assert!(Instant::now() < until, "{one:?} is not held by {wanted:?}");
        std::thread::yield_now();
    }
}

/// A helper that alone holds a listener.
pub(super) fn serve(script: &str) -> (Helper, Port) {
    let listener = listen();
    let helper = Helper::start(script, &[&listener]);
    let port = leave_to(listener, &[helper.pid()]);
    (helper, port)
}

/// Whether the process has a descriptor of the socket, from `/proc`.
pub(super) fn holds(pid: u32, inode: u64) -> io::Result<bool> {
    let wanted = format!("socket:[{inode}]");
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(fds) = fs::read_dir(task?.path().join("fd")) else { continue };
        if fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|l| l.as_os_str() == wanted.as_str())) {
            return Ok(true);
        }
    }
    // Distinguishes "has it not" from "may not see".
    fs::read_dir(format!("/proc/{pid}/fd")).map(|_| false)
}

/// The TCP listeners on a port of 127.0.0.1, with their holders, from `/proc`.
pub(super) fn scan(port: u16) -> Vec<Listener> {
    let wanted = format!("0100007F:{port:04X}");
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let mut listeners = Vec::new();
    for fields in table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>()) {
        if fields.get(1) != Some(&wanted.as_str()) || fields[3] != "0A" {
            continue;
        }
        let socket = Socket {
            id: SocketId { inode: fields[9].parse().unwrap(), cookie: 0 },
            proto: Protocol::Tcp,
            mptcp: false,
            address: Ipv4Addr::LOCALHOST.into(),
            port,
            v6only: None,
            netns: crate::source::netns::own().unwrap(),
            uid: fields[7].parse().unwrap(),
            backlog: None,
        };
        // Read while others come and go, the table may show a socket twice.
        if listeners.iter().any(|l: &Listener| l.socket.id == socket.id) {
            continue;
        }
        listeners.push(Listener { holders: holders(socket.id.inode), socket, since: None });
    }
    listeners
}

fn holders(inode: u64) -> Vec<Holder> {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let mut holders: Vec<Holder> = pids
        .filter(|&pid| holds(pid, inode).unwrap_or(false))
        .filter_map(|pid| {
            let stat = stat::read(pid).ok()?;
            let mut process = Process::bare(stat.id(), stat.name);
            process.ppid = stat.ppid;
            process.uid = fs::metadata(format!("/proc/{pid}")).ok().map(|m| m.uid());
            Some(Holder { process: Arc::new(process), fds: Vec::new(), binder: false })
        })
        .collect();
    holders.sort_by_key(|h| h.process.id.pid);
    holders
}

/// Stops nothing: for plans without containers and units.
pub(super) fn nothing(_: &[&Whole], _: Duration) -> Vec<Stopping> {
    panic!("nothing is to be stopped");
}

/// Stats by PID, for plans of processes that do not exist.
pub(super) fn family(members: &[stat::Stat]) -> impl Fn(u32) -> Option<stat::Stat> + use<> {
    let members: HashMap<u32, stat::Stat> = members.iter().map(|m| (m.pid, m.clone())).collect();
    move |pid| members.get(&pid).cloned()
}
