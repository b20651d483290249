//! What is known about some ports, and reading it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::{Question, Stash, Sysctls, Trial, Tunnel, bind, firewall, kernel, stash};
use crate::model::{Listener, NetnsId, Process, ProcessId, Protocol, Socket, SocketId};
use crate::source::diag::{self, PortSocket, State};
use crate::source::{Scanner, netns, process, procfs, stat};

/// A socket with a port that is no listener, and the visible processes that hold it, sorted by pid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    pub socket: PortSocket,
    pub holders: Vec<Arc<Process>>,
}

/// A port that a container engine has published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    pub port: u16,
    pub proto: Protocol,
    /// The container's name, as its engine says it: hostile text.
    pub container: String,
    /// `docker`, `podman` …
    pub engine: String,
    /// Where the container serves it, such as `172.17.0.2:80`.
    pub to: String,
    /// The command that ends it.
    pub next: String,
}

/// Everything that the rules look at. What could not be read is empty, and named in `unseen`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The namespace that is asked about.
    pub netns: NetnsId,
    pub euid: u32,
    /// Whether processes outside of our pid namespace exist that could hold something.
    pub is_nested: bool,
    /// Listeners on the ports, of every namespace that can be seen.
    pub listeners: Vec<Listener>,
    /// The state of their holders, as in `/proc/PID/stat`.
    pub states: BTreeMap<u32, char>,
    /// Everything else with one of the ports, in the namespace asked about.
    pub attached: Vec<Attached>,
    /// Read only where a listener has no holder, as are the next two.
    pub stashes: Vec<Stash>,
    pub tunnels: Vec<Tunnel>,
    /// Names of the kernel threads.
    pub kernel_threads: Vec<String>,
    pub sysctls: Sysctls,
    pub rules: Vec<firewall::Rule>,
    /// Filled by whoever asks the container engines: [`read`] leaves it empty.
    pub published: Vec<Published>,
    /// What bind() said, for the questions that were asked.
    pub trials: BTreeMap<Question, Vec<Trial>>,
    /// What could not be looked at, as sentences for people.
    pub unseen: Vec<String>,
}

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Sockets, processes and settings.
    Sockets,
    /// The firewall (by its tools) and a bind() as well.
    Whole,
}

/// `PROC_PID_INIT_INO` (include/linux/proc_ns.h): the pid namespace that has no other around it.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Reads what there is to know about these ports in the calling thread's network namespace.
///
/// # Errors
/// When listeners cannot be read at all. Everything else that cannot be read is named in [`Facts::unseen`].
pub fn read(questions: &[Question], scanner: &mut Scanner, extent: Extent) -> anyhow::Result<Facts> {
    let asked: HashSet<(u16, Protocol)> = questions.iter().map(|question| (question.port, question.proto)).collect();
    let is_asked = |port, proto| asked.contains(&(port, proto));
    let mut facts = Facts {
        netns: netns::own()?,
        euid: nix::unistd::geteuid().as_raw(),
        is_nested: std::fs::read_link("/proc/self/ns/pid").is_ok_and(|link| link.as_os_str() != FIRST_PID_NAMESPACE),
        sysctls: Sysctls::read(),
        ..Facts::default()
    };
    facts.listeners = scanner.scan(true, &|socket| is_asked(socket.port, socket.proto))?.listeners;
    facts.listeners.sort_by_key(|l| (l.socket.port, l.socket.proto, l.socket.address, l.socket.netns, l.socket.id));
    let holders = facts.listeners.iter().flat_map(|listener| &listener.holders).map(|holder| holder.process.id.pid);
    facts.states = holders.filter_map(|pid| Some((pid, stat::read(pid).ok()?.state))).collect();
    if let Err(error) = facts.read_attached(&asked, scanner) {
        facts.unseen.push(format!("connections were not looked at: {error:#}"));
    }
    let own = facts.netns;
    if facts.listeners.iter().any(|listener| listener.is_ghost() && listener.socket.netns == own) {
        facts.stashes = stash::read();
        facts.kernel_threads = kernel::threads();
        match kernel::tunnels() {
            Ok(tunnels) => facts.tunnels = tunnels,
            Err(error) => facts.unseen.push(format!("network devices were not looked at: {error}")),
        }
    }
    if extent == Extent::Whole {
        let (rules, unseen) = firewall::read(facts.euid);
        (facts.rules, facts.unseen) = (rules, [std::mem::take(&mut facts.unseen), unseen].concat());
        facts.trials = questions.iter().map(|question| (*question, bind::trials(*question))).collect();
    }
    Ok(facts)
}

impl Facts {
    /// Takes in listeners on the same ports from the agent, who sees the holders of all of them, and into every network
    /// namespace. Which sockets are there in this one, the kernel has told us.
    pub fn learn(&mut self, told: Vec<Listener>) {
        for listener in told {
            let pids = listener.holders.iter().map(|holder| holder.process.id.pid);
            let states: Vec<(u32, char)> = pids.filter_map(|pid| Some((pid, stat::read(pid).ok()?.state))).collect();
            let inode = listener.socket.id.inode;
            match self.listeners.iter_mut().find(|known| inode != 0 && known.socket.id.inode == inode) {
                Some(known) if known.holders.len() < listener.holders.len() => known.holders = listener.holders,
                None if listener.socket.netns != self.netns => self.listeners.push(listener),
                _ => continue,
            }
            self.states.extend(states);
        }
    }

    /// Leaves out what has one of the ports in this namespace and is not meant.
    pub fn retain(&mut self, is_meant: &dyn Fn(&Socket) -> bool) {
        let netns = self.netns;
        self.listeners.retain(|listener| listener.socket.netns != netns || is_meant(&listener.socket));
        self.attached.retain(|Attached { socket, .. }| {
            let PortSocket { id, proto, local, uid, .. } = *socket;
            let (address, port) = (local.ip(), local.port());
            is_meant(&Socket { id, proto, mptcp: false, address, port, v6only: None, netns, uid, backlog: None })
        });
    }

    fn read_attached(&mut self, asked: &HashSet<(u16, Protocol)>, scanner: &mut Scanner) -> anyhow::Result<()> {
        let mut sockets: Vec<PortSocket> = Vec::new();
        for proto in [Protocol::Tcp, Protocol::Udp] {
            let ports = || asked.iter().filter(|(_, own)| *own == proto).map(|(port, _)| *port);
            let (Some(first), Some(last)) = (ports().min(), ports().max()) else { continue };
            sockets.extend(diag::dump_ports(proto, first..=last)?);
        }
        sockets.retain(|socket| {
            let listens = match socket.proto {
                Protocol::Tcp => socket.state == State::Listen,
                Protocol::Udp => socket.state == State::Close,
            };
            !listens && asked.contains(&(socket.local.port(), socket.proto))
        });
        // Kernels before 6.8 tell of a socket that is only bound by those who hold it alone.
        let netns = self.netns;
        let bound = scanner.bound(&|s| s.netns == netns && asked.contains(&(s.port, s.proto)))?;
        for Listener { socket, .. } in bound {
            if sockets.iter().any(|known| known.id.inode == socket.id.inode) {
                continue;
            }
            let unspecified = match socket.address {
                std::net::IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
                std::net::IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
            };
            sockets.push(PortSocket {
                id: SocketId { inode: socket.id.inode, cookie: socket.id.cookie },
                proto: socket.proto,
                state: State::BoundInactive,
                local: socket.endpoint(),
                peer: std::net::SocketAddr::new(unspecified, 0),
                uid: socket.uid,
            });
        }
        sockets.sort_by_key(|socket| (socket.local, socket.state, socket.peer, socket.id));
        self.attached = with_holders(sockets);
        Ok(())
    }
}

fn with_holders(sockets: Vec<PortSocket>) -> Vec<Attached> {
    let inodes: HashSet<u64> = sockets.iter().map(|socket| socket.id.inode).filter(|&inode| inode != 0).collect();
    let mut known: HashMap<ProcessId, Option<Arc<Process>>> = HashMap::new();
    let mut by_inode: HashMap<u64, Vec<Arc<Process>>> = HashMap::new();
    for held in procfs::held_fds(&inodes).fds {
        let read = || process::read_exact(held.process).map(Arc::new);
        if let Some(process) = known.entry(held.process).or_insert_with(read) {
            by_inode.entry(held.inode).or_default().push(Arc::clone(process));
        }
    }
    for holders in by_inode.values_mut() {
        holders.sort_by_key(|process| process.id);
        holders.dedup_by_key(|process| process.id);
    }
    let holders = |inode| by_inode.get(&inode).cloned().unwrap_or_default();
    sockets.into_iter().map(|socket| Attached { holders: holders(socket.id.inode), socket }).collect()
}
