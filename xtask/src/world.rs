//! The crowd that `bench` measures in: many processes with many open files, a few of them with a listener; and beside
//! them, if wanted, a few servers with very many connections.
//!
//! A process of its own (the hidden verb `world`), because it forks, and so that its children's death can hang on
//! its life: they go with it by PR_SET_PDEATHSIG however it ends, and it goes when its stdin closes.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::mem;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::libc;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::sockopt::Linger;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getppid, pause, pipe};

/// How many servers share the connections: few, but each within the limit of open files that most systems allow.
const SERVERS: usize = 20;

/// What a world takes of the machine's memory, in KiB and rather too much: a process with its page tables and kernel
/// stack, an open file (every tenth is a socket), a connection with both of its sockets and files.
const KIB: [usize; 3] = [300, 1, 10];

#[derive(clap::Args, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Args {
    #[arg(long)]
    pub(crate) processes: usize,
    /// Open files of each process
    #[arg(long)]
    pub(crate) fds: usize,
    /// How many of the processes hold TCP listeners on 127.0.0.1
    #[arg(long)]
    pub(crate) listeners: usize,
    /// How many each of those holds
    #[arg(long, default_value_t = 1)]
    pub(crate) each: usize,
    /// Established TCP connections, held at both ends by servers that are not among the processes
    #[arg(long, default_value_t = 0)]
    pub(crate) connections: usize,
}

impl Args {
    /// What is short for this world on this machine now, if anything is.
    pub(crate) fn lacks(self) -> Option<String> {
        let available = memory_kib(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable")?;
        let counts = [self.processes, self.processes * self.fds, self.connections];
        let needed: usize = counts.into_iter().zip(KIB).map(|(count, kib)| count * kib).sum();
        (needed > available)
            .then(|| format!("takes up to {} MiB of memory, of which {} are available", needed >> 10, available >> 10))
    }
}

/// A line of /proc/meminfo.
pub(crate) fn memory_kib(meminfo: &str, key: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// A listener, and the process that alone holds it.
#[derive(Clone, Copy)]
pub(crate) struct Listener {
    pub(crate) port: u16,
    pub(crate) pid: u32,
}

/// A running crowd. Dropping it ends and reaps all of it.
pub(crate) struct World {
    child: Child,
    /// Closing it is the order to end.
    lifeline: Option<ChildStdin>,
    /// Those of one process after those of another; those of the servers with the connections come last.
    pub(crate) listeners: Vec<Listener>,
}

impl World {
    pub(crate) fn start(args: Args) -> Result<World> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut child = Command::new(program)
            .arg("world")
            .args(["--processes", &args.processes.to_string()])
            .args(["--fds", &args.fds.to_string()])
            .args(["--listeners", &args.listeners.to_string()])
            .args(["--each", &args.each.to_string()])
            .args(["--connections", &args.connections.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the crowd")?;
        let lifeline = child.stdin.take();
        let stdout = child.stdout.take();
        let mut world = World { child, lifeline, listeners: Vec::new() };
        let mut line = String::new();
        BufReader::new(stdout.context("the crowd has no stdout")?)
            .read_line(&mut line)
            .context("cannot read the ports")?;
        let listener = |word: &str| {
            let (port, pid) = word.split_once(':')?;
            Some(Listener { port: port.parse().ok()?, pid: pid.parse().ok()? })
        };
        world.listeners = line.split_whitespace().filter_map(listener).collect();
        if world.listeners.len() != args.listeners * args.each + servers(args.connections) {
            bail!("the crowd of {} processes did not come up", args.processes);
        }
        Ok(world)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        // Nothing can be done about a crowd that is gone already.
        let _reaped = self.child.wait();
    }
}

fn servers(connections: usize) -> usize {
    if connections == 0 { 0 } else { SERVERS }
}

/// Forks the crowd, prints its listeners, and ends it when stdin closes.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut children = Vec::with_capacity(args.processes);
    let born = raise_all(args, &mut children).and_then(|listeners| {
        println!("{}", listeners.join(" "));
        io::stdin().read_to_end(&mut Vec::new()).context("cannot read stdin")
    });
    for &child in &children {
        // Our own unreaped child: the number cannot have passed to another process.
        let _gone = kill(child, Signal::SIGKILL);
    }
    for &child in &children {
        let _reaped = waitpid(child, None);
    }
    born.map(drop)
}

fn raise_all(args: &Args, children: &mut Vec<Pid>) -> Result<Vec<String>> {
    let each = |number| if number < args.listeners { args.each } else { 0 };
    let mut listeners = raise(args.processes, children, |number| open_files(args.fds, each(number)))?;
    let servers = servers(args.connections);
    listeners.extend(raise(servers, children, |number| {
        let share = args.connections / servers + usize::from(number < args.connections % servers);
        Ok(vec![connect_to_self(number, share)?])
    })?);
    Ok(listeners)
}

/// Forks so many children and has each make what it holds. Returns their listeners, as `PORT:PID`, once each of them
/// has all that it should have.
fn raise(count: usize, children: &mut Vec<Pid>, make: impl Fn(usize) -> Result<Vec<u16>>) -> Result<Vec<String>> {
    let parent = Pid::this();
    let (reader, writer) = pipe().context("cannot make a pipe")?;
    for number in 0..count {
        // SAFETY: this process has one thread, so that the child may go on as any program would.
        match unsafe { fork() }.with_context(|| format!("cannot fork process {number} of the crowd"))? {
            ForkResult::Parent { child } => children.push(child),
            ForkResult::Child => {
                drop(reader);
                if let Err(error) = live(parent, number, &make, writer) {
                    eprintln!("xtask: process {number} of the crowd: {error:#}");
                }
                std::process::exit(1);
            }
        }
    }
    drop(writer);
    let mut listeners = Vec::new();
    let mut ready = 0;
    for line in BufReader::new(File::from(reader)).lines() {
        let line = line.context("cannot read from the crowd")?;
        ready += 1;
        listeners.extend(line.split_whitespace().map(str::to_owned));
    }
    if ready != count {
        bail!("only {ready} of {count} processes came up");
    }
    Ok(listeners)
}

/// A child's life: make what it holds, say so, wait for the end.
fn live(parent: Pid, number: usize, make: &impl Fn(usize) -> Result<Vec<u16>>, ready: OwnedFd) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        bail!("orphaned before the death signal was set");
    }
    let words: Vec<String> = make(number)?.iter().map(|port| format!("{port}:{}", Pid::this())).collect();
    let text = words.join(" ") + "\n";
    let mut ready = File::from(ready);
    // In one write, which up to PIPE_BUF (300 listeners) is not mixed with those of others.
    ready.write_all(text.as_bytes())?;
    drop(ready);
    loop {
        pause();
    }
}

/// Open files up to that count, every tenth a socket, and so many listeners.
fn open_files(fds: usize, listeners: usize) -> Result<Vec<u16>> {
    let mut ports = Vec::with_capacity(listeners);
    for _ in 0..listeners {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        ports.push(listener.local_addr()?.port());
        mem::forget(listener);
    }
    // Numbers are given lowest first, and the pipe to the parent will give its own back.
    let last = i32::try_from(fds)?;
    for number in 0.. {
        let file: OwnedFd = if number % 10 == 0 {
            socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None)?
        } else {
            File::open("/dev/null")?.into()
        };
        let reached = file.as_raw_fd() >= last;
        mem::forget(file);
        if reached {
            break;
        }
    }
    Ok(ports)
}

/// A listener with so many connections, of which this process is the client, too. To an address of 127.0.0.0/8 the
/// kernel connects from that same address, so that each server has all ephemeral ports for its clients.
fn connect_to_self(number: usize, connections: usize) -> Result<u16> {
    let wanted = u64::try_from(2 * connections + 100)?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(wanted), hard.max(wanted))
        .with_context(|| format!("cannot have {wanted} open files, of which {hard} are allowed"))?;
    let listener = TcpListener::bind((Ipv4Addr::new(127, 1, 0, 1 + u8::try_from(number)?), 0))?;
    let address = listener.local_addr()?;
    for _ in 0..connections {
        let client = TcpStream::connect(address)?;
        let (served, _peer) = listener.accept()?;
        for end in [client, served] {
            // A reset at the end leaves no TIME_WAIT behind, which would be in the way of what is measured next.
            setsockopt(&end, Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
            mem::forget(end);
        }
    }
    mem::forget(listener);
    Ok(address.port())
}

#[cfg(test)]
mod tests {
    use super::{Args, memory_kib};

    const MEMINFO: &str = "MemTotal:       24684196 kB\nMemFree:        15714672 kB\nMemAvailable:   23105004 kB\n";

    #[test]
    fn memory_is_read_by_its_whole_name() {
        assert_eq!(memory_kib(MEMINFO, "MemTotal"), Some(24_684_196));
        assert_eq!(memory_kib(MEMINFO, "MemAvailable"), Some(23_105_004));
        assert_eq!(memory_kib(MEMINFO, "Mem"), None);
        assert_eq!(memory_kib("", "MemTotal"), None);
    }

    #[test]
    fn a_world_beyond_all_memory_lacks_it() {
        let args = Args { processes: 1 << 40, fds: 1, listeners: 0, each: 1, connections: 0 };
        assert!(args.lacks().is_some_and(|why| why.contains("MiB")));
        assert_eq!(Args { processes: 1, ..args }.lacks(), None);
    }
}
