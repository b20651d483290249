//! From facts to findings. Pure. Obstacles come first, what is only good to know last.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use nix::errno::Errno;

use super::{Attached, Diagnosis, Facts, Finding, Kind, Place, Published, Question, Stash, Trial, kernel};
use crate::cgroup;
use crate::engine::proxy::{Forward, Proxy};
use crate::model::{Listener, Process, Protocol};
use crate::source::diag::State;
use crate::supervisor::quote;

/// Peers and processes that a sentence names.
const NAMED: usize = 3;

/// Digits of a container's id that engines show.
const SHORT_ID: usize = 12;

/// How long a connection stays in TIME_WAIT: `TCP_TIMEWAIT_LEN` (include/net/tcp.h), in seconds.
const TIME_WAIT_SECONDS: u32 = 60;

impl Facts {
    /// What stands in the way of the port, and what else is good to know of it. `bindable` is known only of questions
    /// that were asked when the facts were read.
    pub fn diagnose(&self, question: Question) -> Diagnosis {
        let bind = self.trials.get(&question).cloned().unwrap_or_default();
        let bindable = (!bind.is_empty()).then(|| bind.iter().all(|trial| trial.plain.is_none()));
        let mut case = Case { facts: self, question, bind: &bind, bindable, findings: Vec::new() };
        case.listeners();
        // A bind() that has just succeeded proves that nobody else is in its way.
        if bindable != Some(true) {
            case.bound();
            case.connections();
        }
        case.elsewhere();
        case.refusals();
        case.settings();
        let mut findings = case.findings;
        findings.sort_by_key(|finding| !finding.kind.is_obstacle());
        Diagnosis { port: question.port, proto: question.proto, bindable, bind, findings }
    }
}

struct Case<'a> {
    facts: &'a Facts,
    question: Question,
    bind: &'a [Trial],
    bindable: Option<bool>,
    findings: Vec<Finding>,
}

impl<'a> Case<'a> {
    fn add(&mut self, kind: Kind, message: String, evidence: String, next: Option<String>) {
        self.findings.push(Finding { kind, message, evidence, next });
    }

    fn target(&self) -> String {
        format!("{}/{}", self.question.port, self.question.proto)
    }

    /// As root where the caller is not.
    fn sudo(&self, command: impl std::fmt::Display) -> String {
        if self.facts.euid == 0 { command.to_string() } else { format!("sudo {command}") }
    }

    /// As root where one of the processes is another user's.
    fn against<'p>(&self, processes: impl IntoIterator<Item = &'p Process>, command: impl std::fmt::Display) -> String {
        let all_own = processes.into_iter().all(|process| process.uid == Some(self.facts.euid));
        if all_own { command.to_string() } else { self.sudo(command) }
    }

    /// The command that ends them, which `portwatch kill` does not: they have no listener. None for init.
    fn end(&self, processes: &[&Process]) -> Option<String> {
        let pids: Vec<String> = processes.iter().map(|process| process.id.pid.to_string()).collect();
        let is_init = processes.iter().any(|process| process.id.pid == 1);
        let kill = self.against(processes.iter().copied(), format_args!("kill {}", pids.join(" ")));
        (!is_init).then_some(kill)
    }

    fn listeners(&mut self) {
        let facts = self.facts;
        let Question { port, proto, .. } = self.question;
        let on_port = || facts.listeners.iter().filter(|l| (l.socket.port, l.socket.proto) == (port, proto));
        let (here, there): (Vec<&Listener>, Vec<&Listener>) = on_port().partition(|l| l.socket.netns == facts.netns);
        let taken = if self.bindable == Some(true) { &[][..] } else { &here[..] };
        for listener in taken {
            match proxy(listener) {
                _ if listener.is_ghost() => self.ghost(listener),
                Some((process, proxy)) => self.proxied(listener, process, &proxy),
                None => self.held(listener),
            }
        }
        if here.is_empty() {
            there.into_iter().for_each(|listener| self.other_namespace(listener));
        }
    }

    fn held(&mut self, listener: &Listener) {
        let Some(binder) = listener.binder() else { return };
        let does = if listener.socket.proto == Protocol::Tcp { "listens on" } else { "is bound to" };
        let more = match listener.holders.len() - 1 {
            0 => String::new(),
            1 => "; another process shares the socket".to_owned(),
            more => format!("; {more} other processes share the socket"),
        };
        let state = match self.facts.states.get(&binder.process.id.pid) {
            Some('T') => "; it is stopped: until it goes on, only SIGKILL ends it",
            Some('D') => "; it is in uninterruptible sleep: no signal ends it before the kernel lets go",
            Some('Z') => "; its first thread has ended while others go on",
            _ => "",
        };
        let message = format!("{} {does} {}{more}{state}", named(&binder.process), listener.socket.endpoint());
        let fds: Vec<String> = binder.fds.iter().map(u32::to_string).collect();
        let evidence = format!(
            "its fd {} is socket:[{}]; {}{}",
            fds.join(", "),
            listener.socket.id.inode,
            place(&binder.process),
            command(&binder.process)
        );
        let processes = listener.holders.iter().map(|holder| &*holder.process);
        let next = self.against(processes, format_args!("portwatch kill {}", self.target()));
        self.add(Kind::Held, message, evidence, Some(next));
    }

    /// Of a listener that only passes on to a container: to end its holder would leave that with a dead port.
    fn proxied(&mut self, listener: &Listener, process: &Process, proxy: &Proxy) {
        let endpoint = listener.socket.endpoint();
        let published = self.published().next();
        let (message, next) = match published {
            Some(container) => (
                format!("{} container {} answers on {endpoint}", container.engine, container.container),
                self.sudo(format_args!("portwatch kill {} --stop-container", self.target())),
            ),
            None => {
                let what = match proxy {
                    Proxy::Port(Forward { container_ip, container_port, .. }) => {
                        format!("the container at {}", SocketAddr::new(*container_ip, *container_port))
                    }
                    Proxy::Container { id } => format!("container {}", id.get(..SHORT_ID).unwrap_or(id)),
                    Proxy::Network { .. } => "a container".to_owned(),
                };
                (
                    format!("{} holds {endpoint} for {what}", named(process)),
                    self.sudo(format_args!("{} ps", proxy.command())),
                )
            }
        };
        let to = published.map_or_else(String::new, |container| format!("; it is published to {}", container.to));
        let evidence = format!("{} holds socket:[{}]{to}", named(process), listener.socket.id.inode);
        self.add(Kind::Published, message, evidence, Some(next));
    }

    /// The containers that have published the port.
    fn published(&self) -> impl Iterator<Item = &'a Published> + use<'a> {
        let Question { port, proto, .. } = self.question;
        let facts = self.facts;
        facts.published.iter().filter(move |p| (p.port, p.proto) == (port, proto))
    }

    fn ghost(&mut self, listener: &Listener) {
        let facts = self.facts;
        let socket = &listener.socket;
        let (endpoint, inode, target) = (socket.endpoint(), socket.id.inode, self.target());
        let owner = format!("socket:[{inode}] belongs to uid {}", socket.uid);
        let is_port = |tunnel: &&super::Tunnel| socket.proto == Protocol::Udp && tunnel.port == Some(socket.port);
        if let Some(tunnel) = facts.tunnels.iter().find(is_port) {
            let message = format!("{endpoint} is the kernel's own: device {} receives on it", tunnel.device);
            let evidence = format!("{} is of kind {} with port {}", tunnel.device, tunnel.kind, socket.port);
            let next = self.sudo(format_args!("ip link delete {}", quote(&tunnel.device)));
            return self.add(Kind::Ghost, message, evidence, Some(next));
        }
        if let Some((service, thread)) = kernel::service(socket.port, socket.proto, &facts.kernel_threads) {
            let message = format!("{endpoint} is the kernel's own: {} serves it", service.what);
            let evidence = format!("no process holds it, and kernel thread [{thread}] runs");
            return self.add(Kind::Ghost, message, evidence, Some(self.sudo(service.next)));
        }
        if facts.euid != 0 && facts.euid != socket.uid {
            let message = format!("{endpoint} is held by a process of uid {} that you may not see", socket.uid);
            let evidence = format!("{owner}, and you are uid {}", facts.euid);
            return self.add(Kind::OtherUser, message, evidence, Some(format!("sudo portwatch who {target}")));
        }
        if let Some(stash) = facts.stashes.iter().find(|stash| inode != 0 && stash.inodes.contains(&inode)) {
            return self.stashed(endpoint, inode, stash);
        }
        self.unclaimed(listener, &owner);
    }

    /// Nothing proves where it is: what could have it is named, and called so.
    fn unclaimed(&mut self, listener: &Listener, owner: &str) {
        let facts = self.facts;
        let socket = &listener.socket;
        let mut suspects: Vec<String> = Vec::new();
        for stash in facts.stashes.iter().filter(|stash| stash.inodes.len() < stash.count as usize) {
            let what = match stash.place {
                Place::Queue => "descriptors wait in a unix socket of",
                Place::Ring => "files are registered with an io_uring of",
            };
            suspects.push(format!("{} {what} {}", stash.count, names(&stash.processes.iter().collect::<Vec<_>>())));
        }
        if socket.proto == Protocol::Udp {
            let silent = facts.tunnels.iter().filter(|tunnel| tunnel.port.is_none());
            suspects.extend(silent.map(|tunnel| format!("{} device {} has a port", tunnel.kind, tunnel.device)));
        }
        if facts.is_nested {
            suspects.push("processes outside of this pid namespace are not to be seen".to_owned());
        }
        if facts.euid != 0 {
            suspects.push("what the processes of others have is not to be seen".to_owned());
        }
        let message = match suspects.is_empty() {
            true => {
                format!("{} is held by no process: it is the kernel's own, or hidden from /proc", socket.endpoint())
            }
            false => format!("{} is held by no process that can be seen", socket.endpoint()),
        };
        suspects.insert(0, owner.to_owned());
        let next = match (facts.euid, socket.proto) {
            (0, _) if facts.is_nested => Some(format!("portwatch who {}  # on the host", self.target())),
            (0, Protocol::Tcp) => Some(format!("portwatch kill {} --close-socket", self.target())),
            (0, Protocol::Udp) => None,
            _ => Some(format!("sudo portwatch diagnose {}", self.target())),
        };
        self.add(Kind::Ghost, message, suspects.join("; "), next);
    }

    fn stashed(&mut self, endpoint: SocketAddr, inode: u64, stash: &Stash) {
        let processes: Vec<&Process> = stash.processes.iter().collect();
        let who = names(&processes);
        let (message, evidence) = match stash.place {
            Place::Queue => (
                format!("{endpoint} is in flight: its descriptor waits to be received by {who}"),
                format!("socket:[{inode}] is in the queue of the unix socket that is fd {} there", stash.fd),
            ),
            Place::Ring => (
                format!("{endpoint} is registered with an io_uring of {who}, which needs no descriptor for it"),
                format!("the fdinfo of fd {} there names socket:[{inode}]", stash.fd),
            ),
        };
        let next = self.end(&processes);
        self.add(Kind::Ghost, message, evidence, next);
    }

    fn other_namespace(&mut self, listener: &Listener) {
        let socket = &listener.socket;
        let who = listener.binder().map_or_else(
            || format!("a socket of uid {} without visible holder", socket.uid),
            |binder| named(&binder.process),
        );
        let message = format!("{who} listens on {} in network namespace {}: not here", socket.endpoint(), socket.netns);
        let evidence = match listener.binder() {
            Some(binder) => format!("{}{}", place(&binder.process), command(&binder.process)),
            None => format!("socket:[{}]", socket.id.inode),
        };
        let kill = format!("portwatch kill {} --netns {}", self.target(), socket.netns);
        let processes = listener.holders.iter().map(|holder| &*holder.process);
        let next = if listener.is_ghost() { self.sudo(kill) } else { self.against(processes, kill) };
        self.add(Kind::OtherNamespace, message, evidence, Some(next));
    }

    fn attached(&self) -> impl Iterator<Item = &Attached> {
        let Question { port, proto, .. } = self.question;
        self.facts.attached.iter().filter(move |a| (a.socket.local.port(), a.socket.proto) == (port, proto))
    }

    fn bound(&mut self) {
        let bound: Vec<Attached> =
            self.attached().filter(|a| a.socket.state == State::BoundInactive).cloned().collect();
        for Attached { socket, holders } in bound {
            let processes: Vec<&Process> = holders.iter().map(Arc::as_ref).collect();
            let is_foreign = processes.is_empty() && self.facts.euid != 0 && self.facts.euid != socket.uid;
            let who = match processes.is_empty() {
                false => names(&processes),
                true if is_foreign => format!("a process of uid {} that you may not see", socket.uid),
                true => "no process that can be seen".to_owned(),
            };
            let message = format!("{} is bound by {who}, and nobody listens on it", socket.local);
            let evidence =
                format!("socket:[{}] of uid {} is neither listening nor connected", socket.id.inode, socket.uid);
            let next = match processes.is_empty() {
                false => self.end(&processes),
                true => is_foreign.then(|| format!("sudo portwatch diagnose {}", self.target())),
            };
            self.add(Kind::Bound, message, evidence, next);
        }
    }

    fn connections(&mut self) {
        let all: Vec<Attached> = self.attached().filter(|a| a.socket.state != State::BoundInactive).cloned().collect();
        let (waiting, open): (Vec<_>, Vec<_>) = all.iter().partition(|a| a.socket.state == State::TimeWait);
        // Whether the port is taken by these alone, so that what bind() said was said of them.
        let is_alone = self.findings.iter().all(|finding| !finding.kind.is_obstacle());
        let is_reusable = is_alone.then(|| self.bind.iter().all(|trial| trial.reuse.is_none()));
        if !open.is_empty() {
            self.open_connections(&open, is_reusable);
        }
        if !waiting.is_empty() {
            let is_reusable = is_reusable.filter(|_| open.is_empty());
            self.time_wait(&waiting, is_reusable);
        }
    }

    fn open_connections(&mut self, open: &[&Attached], is_reusable: Option<bool>) {
        let mut holders: BTreeMap<u32, &Process> = BTreeMap::new();
        let mut counts: BTreeMap<State, usize> = BTreeMap::new();
        for attached in open {
            *counts.entry(attached.socket.state).or_default() += 1;
            holders.extend(attached.holders.iter().map(|process| (process.id.pid, &**process)));
        }
        let processes: Vec<&Process> = holders.into_values().collect();
        let counts: Vec<String> = counts.iter().map(|(state, count)| format!("{count} {state}")).collect();
        let of = if processes.is_empty() { String::new() } else { format!(" of {}", names(&processes)) };
        let what = format!("{}{of} ({})", count(open.len(), "connection"), counts.join(", "));
        let is_udp = self.question.proto == Protocol::Udp;
        let (has, end) = if open.len() == 1 { ("has", "it ends") } else { ("have", "they end") };
        let message = match is_reusable {
            _ if is_udp => format!("{what} {has} the port"),
            None => format!("{what} will keep the port from a bind() without SO_REUSEADDR once nobody listens"),
            Some(_) if self.bind.is_empty() => {
                format!("{what} {has} the port: bind() may need SO_REUSEADDR until {end}")
            }
            Some(true) => format!("{what} {has} the port: bind() needs SO_REUSEADDR until {end}"),
            Some(false) => format!("{what} {has} the port: no bind() succeeds until {end}, with SO_REUSEADDR neither"),
        };
        let unseen = open.iter().filter(|a| a.holders.is_empty());
        let lost = match (unseen.clone().filter(|a| a.socket.id.inode != 0).count(), unseen.count()) {
            (_, 0) => String::new(),
            (0, orphans) => format!("; {orphans} of no process"),
            (hidden, _) => format!("; {hidden} of processes that cannot be seen"),
        };
        let evidence = format!("{}{lost}", ends(open));
        let next = match (is_reusable.is_some() || is_udp, processes.is_empty()) {
            (false, _) => None,
            (true, false) => self.end(&processes),
            (true, true) => {
                let table = if is_udp { "u" } else { "t" };
                Some(self.sudo(format_args!("ss -K{table} 'sport = :{}'", self.question.port)))
            }
        };
        self.add(Kind::Connections, message, evidence, next);
    }

    fn time_wait(&mut self, waiting: &[&Attached], is_reusable: Option<bool>) {
        let lingers = if waiting.len() == 1 { "lingers" } else { "linger" };
        let what =
            format!("{} {lingers} in TIME_WAIT for at most {TIME_WAIT_SECONDS} s", count(waiting.len(), "connection"));
        let message = match is_reusable {
            Some(true) if !self.bind.is_empty() => format!("{what}: until then bind() needs SO_REUSEADDR"),
            Some(false) => format!("{what}: until then no bind() succeeds, with SO_REUSEADDR neither"),
            _ => format!("{what}: until then bind() may need SO_REUSEADDR"),
        };
        let next =
            is_reusable.map(|_| self.sudo(format_args!("ss -Kt state time-wait 'sport = :{}'", self.question.port)));
        self.add(Kind::TimeWait, message, ends(waiting), next);
    }

    /// Who answers in place of a listener.
    fn elsewhere(&mut self) {
        let facts = self.facts;
        let Question { port, proto, .. } = self.question;
        let target = self.target();
        let published: Vec<&Published> = self.published().collect();
        // Its proxy was told already.
        let is_told = self.findings.iter().any(|finding| finding.kind == Kind::Published);
        for container in published.iter().filter(|_| !is_told) {
            let message = format!("{} container {} answers on {target}", container.engine, container.container);
            let evidence = format!("{target} is published to {}", container.to);
            self.add(Kind::Published, message, evidence, Some(self.sudo(&container.next)));
        }
        // The engine's rules are its own to remove.
        let rules = facts.rules.iter().filter(|rule| rule.answers(port, proto));
        for rule in rules.filter(|rule| !published.iter().any(|p| p.to == rule.to)) {
            let message =
                format!("a rule sends what comes for {target} to {}: no listener here gets what it matches", rule.to);
            self.add(Kind::Dnat, message, rule.place.clone(), Some(self.sudo(&rule.next)));
        }
    }

    /// bind() refused for another reason than who has the port.
    fn refusals(&mut self) {
        let refused =
            |errnos: &[Errno]| self.bind.iter().find(|t| t.plain.is_some_and(|errno| errnos.contains(&errno)));
        let start = self.facts.sysctls.unprivileged_start;
        if let Some(trial) = refused(&[Errno::EACCES]).filter(|_| start.is_some_and(|start| self.question.port < start))
        {
            let start = start.unwrap_or_default();
            let message = format!(
                "ports below {start} take CAP_NET_BIND_SERVICE: run the server as root, give its program the capability by setcap, or lower the limit"
            );
            let evidence =
                format!("net.ipv4.ip_unprivileged_port_start = {start}; {}", said(trial, self.question.port));
            let next = format!("sudo sysctl -w net.ipv4.ip_unprivileged_port_start={}", self.question.port);
            return self.add(Kind::Privileged, message, evidence, Some(next));
        }
        let Some(trial) = self.bind.iter().find(|trial| trial.plain.is_some()) else { return };
        let is_absent = trial.plain == Some(Errno::EADDRNOTAVAIL);
        if !is_absent && self.findings.iter().any(|finding| finding.kind.is_obstacle()) {
            return;
        }
        let message = match trial.plain {
            Some(Errno::EADDRNOTAVAIL) => format!("{} is no address of this host", trial.address),
            Some(Errno::EACCES | Errno::EPERM) => "a security policy (BPF, SELinux) refuses bind()".to_owned(),
            _ => "bind() is refused, and nothing that can be seen explains it".to_owned(),
        };
        let next = match trial.plain {
            Some(Errno::EADDRNOTAVAIL) => Some("ip address".to_owned()),
            _ => (self.facts.euid != 0).then(|| format!("sudo portwatch diagnose {}", self.target())),
        };
        self.add(Kind::Refused, message, said(trial, self.question.port), next);
    }

    fn settings(&mut self) {
        let sysctls = &self.facts.sysctls;
        let port = self.question.port;
        let range = || sysctls.local_ports.as_ref().map_or_else(String::new, |r| format!("{}-{}", r.start(), r.end()));
        if sysctls.is_reserved(port) {
            let message = format!(
                "{port} is reserved: the kernel gives it to no client by itself, and bind() gets it as any other"
            );
            let evidence = format!("net.ipv4.ip_local_reserved_ports = {}", sysctls.reserved);
            self.add(Kind::Reserved, message, evidence, None);
        } else if sysctls.is_local(port) {
            let message =
                format!("{port} is a port for clients: the kernel may give it to any connection at any moment");
            let evidence = format!("net.ipv4.ip_local_port_range = {}", range());
            let list = if sysctls.reserved.is_empty() { String::new() } else { format!("{},", sysctls.reserved) };
            let next = self.sudo(format_args!("sysctl -w net.ipv4.ip_local_reserved_ports={list}{port}"));
            self.add(Kind::Ephemeral, message, evidence, Some(next));
        }
    }
}

/// The holder that passes on to a container, and what it stands for. Who runs in a container serves by itself.
fn proxy(listener: &Listener) -> Option<(&Process, Proxy)> {
    let of = |process: &Process| match process.cgroup.as_deref().and_then(cgroup::container) {
        Some(_) => None,
        None => Proxy::of(process, &listener.socket),
    };
    listener.holders.iter().find_map(|holder| Some((&*holder.process, of(&holder.process)?)))
}

/// `bind() to 0.0.0.0:80 fails with EACCES`.
fn said(trial: &Trial, port: u16) -> String {
    let endpoint = SocketAddr::new(trial.address, port);
    match trial.plain {
        Some(errno) => format!("bind() to {endpoint} fails with {errno:?}"),
        None => format!("bind() to {endpoint} succeeds"),
    }
}

fn named(process: &Process) -> String {
    format!("{} ({})", process.name, process.id.pid)
}

fn names(processes: &[&Process]) -> String {
    let mut names: Vec<String> = processes.iter().take(NAMED).map(|process| named(process)).collect();
    if processes.len() > NAMED {
        names.push(format!("{} more", processes.len() - NAMED));
    }
    names.join(", ")
}

/// `uid 33, unit nginx.service, container 0123456789ab`.
fn place(process: &Process) -> String {
    let mut place = process.uid.map_or_else(|| "uid unknown".to_owned(), |uid| format!("uid {uid}"));
    if let Some(unit) = process.cgroup.as_deref().and_then(cgroup::unit) {
        place += &format!(", unit {unit}");
    }
    if let Some(container) = process.cgroup.as_deref().and_then(cgroup::container) {
        place += &format!(", container {container}");
    }
    place
}

fn command(process: &Process) -> String {
    if process.command.is_empty() { String::new() } else { format!(", command {}", process.command.join(" ")) }
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// `127.0.0.1:8000 with 127.0.0.1:5000, 127.0.0.1:8000 with 127.0.0.1:5001 and 7 more`.
fn ends(sockets: &[&Attached]) -> String {
    let shown: Vec<String> =
        sockets.iter().take(NAMED).map(|a| format!("{} with {}", a.socket.local, a.socket.peer)).collect();
    let more = match sockets.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests;
