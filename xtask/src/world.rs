//! The crowd that `bench` measures in: many processes with many open files, a few of them with a listener.
//!
//! A process of its own (the hidden verb `world`), because it forks, and so that its children's death can hang on
//! its life: they go with it by PR_SET_PDEATHSIG however it ends, and it goes when its stdin closes.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::mem;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getppid, pause, pipe};

#[derive(clap::Args, Clone, Copy)]
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
}

/// A running crowd. Dropping it ends and reaps all of it.
pub(crate) struct World {
    child: Child,
    /// Closing it is the order to end.
    lifeline: Option<ChildStdin>,
    /// Ports of the listeners, those of one process after those of another.
    pub(crate) ports: Vec<u16>,
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
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the crowd")?;
        let lifeline = child.stdin.take();
        let stdout = child.stdout.take();
        let mut world = World { child, lifeline, ports: Vec::new() };
        let mut line = String::new();
        BufReader::new(stdout.context("the crowd has no stdout")?)
            .read_line(&mut line)
            .context("cannot read the ports")?;
        world.ports = line.split_whitespace().filter_map(|port| port.parse().ok()).collect();
        if world.ports.len() != args.listeners * args.each {
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

/// Forks the crowd, prints its ports, and ends it when stdin closes.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut children = Vec::with_capacity(args.processes);
    let born = raise(args, &mut children).and_then(|ports| {
        println!("{ports}");
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

/// Forks the children and returns their ports, once each of them has all that it should have.
fn raise(args: &Args, children: &mut Vec<Pid>) -> Result<String> {
    let parent = Pid::this();
    let (reader, writer) = pipe().context("cannot make a pipe")?;
    for number in 0..args.processes {
        // SAFETY: this process has one thread, so that the child may go on as any program would.
        match unsafe { fork() }.with_context(|| format!("cannot fork process {number} of the crowd"))? {
            ForkResult::Parent { child } => children.push(child),
            ForkResult::Child => {
                drop(reader);
                let listeners = if number < args.listeners { args.each } else { 0 };
                let lived = live(parent, args.fds, listeners, writer);
                std::process::exit(i32::from(lived.is_err()));
            }
        }
    }
    drop(writer);
    let mut ports = Vec::new();
    let mut ready = 0;
    for line in BufReader::new(File::from(reader)).lines() {
        ready += 1;
        let line = line.context("cannot read from the crowd")?;
        ports.extend(line.split_whitespace().map(str::to_owned));
    }
    if ready != args.processes {
        bail!("only {ready} of {} processes came up", args.processes);
    }
    Ok(ports.join(" "))
}

/// A child's life: open files (every tenth a socket), say so, wait for the end.
fn live(parent: Pid, fds: usize, listeners: usize, ready: OwnedFd) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        bail!("orphaned before the death signal was set");
    }
    let listeners = (0..listeners).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect::<io::Result<Vec<_>>>()?;
    let mut text = String::new();
    for listener in &listeners {
        text += &format!("{} ", listener.local_addr()?.port());
    }
    text.push('\n');
    // Numbers are given lowest first, and `ready` gives its own back.
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
    let mut ready = File::from(ready);
    // In one write, which up to PIPE_BUF (680 ports) is not mixed with those of others.
    ready.write_all(text.as_bytes())?;
    drop(ready);
    loop {
        pause();
    }
}
