//! Whom portwatch does not signal, whatever was selected, and what is done instead. Pure: it is handed what was read.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::plan::same_socket;
use super::stop::{StopError, Whole};
use crate::cgroup::{Manager, Unit};
use crate::engine::Roster;
use crate::engine::proxy::is_proxy;
use crate::engine::roster::Role;
use crate::model::{BootNs, Listener, Process, Socket, SocketId};
use crate::render::escape;
use crate::select::started_after;
use crate::source::stat::{self, Stat};
use crate::supervisor::{self, Managing, Supervisor, is_manager, systemd, systemd_of};

/// Whom portwatch does not signal.
#[derive(Clone, Debug, Default)]
pub struct Guards {
    own: Vec<u32>,
    /// portwatch's process group; 0 where not known.
    pub(super) group: u32,
    ancestors: Vec<u32>,
    force_self: bool,
    roster: Roster,
    stop_containers: bool,
    /// Whether what publishes ports may be hidden from us, so that the engine's word has to do.
    trusts_engine: bool,
    units: Units,
    /// Processes that the user named, each by its PID.
    named: Vec<u32>,
    /// Who started after this moment is part of a job, also where it runs others.
    since: Option<BootNs>,
    /// Nobody is signalled, so nobody has to be spared.
    is_open: bool,
    /// `None`: who asks is who signals, and the kernel decides.
    permission: Option<Permission>,
}

/// Whom somebody else may signal through us.
#[derive(Clone)]
struct Permission(Arc<dyn Fn(u32) -> Option<String> + Send + Sync>);

impl fmt::Debug for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permission")
    }
}

/// What is known of the units of systemd.
#[derive(Clone, Debug, Default)]
pub struct Units {
    /// Whether they are stopped, rather than their processes signalled.
    stop: bool,
    /// The one that portwatch runs in.
    own: Option<(String, Manager)>,
    /// The `.socket` units for which a systemd holds these sockets; `None`: it knows of none.
    sockets: Vec<(SocketId, Result<Option<String>, StopError>)>,
    /// To which unit the processes of a cgroup belong, as its manager says; by the cgroup's path.
    members: BTreeMap<String, Result<Option<String>, StopError>>,
}

impl Units {
    /// Asks each systemd that holds one of the listeners for which unit it does, and, where units are to `stop`, whether
    /// the holders are in those that their cgroups name. Blocks for milliseconds as a rule, and asks nobody where there
    /// is nothing to ask.
    pub fn ask(listeners: &[Listener], stop: bool) -> Units {
        let lines = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = lines.lines().find_map(Unit::of).map(|unit| (unit.name.to_owned(), unit.manager));
        let mut units = Units { stop, own, ..Units::default() };
        for Listener { socket, holders, .. } in listeners {
            if let Some(manager) = holders.iter().find_map(|holder| systemd_of(&holder.process)) {
                let unit = systemd::socket_unit(socket.endpoint(), socket.proto, manager);
                units.sockets.push((socket.id, unit.map_err(StopError::from)));
            }
            for process in holders.iter().map(|holder| &holder.process).filter(|_| stop) {
                let Some(path) = &process.cgroup else { continue };
                if let (Some(unit), false) = (Unit::of(path), units.members.contains_key(path)) {
                    let member = systemd::unit_of(process.id.pid, unit.manager).map_err(StopError::from);
                    units.members.insert(path.clone(), member);
                }
            }
        }
        units
    }

    fn socket_unit(&self, socket: &Socket) -> Option<&Result<Option<String>, StopError>> {
        self.sockets.iter().find(|(id, _)| same_socket(*id, socket.id)).map(|(_, unit)| unit)
    }
}

/// What is to be done about the holder of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Signal,
    /// Stop the container or unit that it runs in, or holds the port for.
    Stop(Whole),
    Refuse {
        reason: String,
        /// For want of permission.
        denied: bool,
    },
}

impl Guards {
    /// `own` is portwatch's pid; `force_self` gives up the protection of its ancestors.
    pub fn new(own: u32, force_self: bool, stat: &dyn Fn(u32) -> Option<Stat>) -> Guards {
        let group = stat(own).map_or(0, |own| own.process_group);
        Guards { own: vec![own], group, ancestors: stat::ancestors(own, stat), force_self, ..Guards::default() }
    }

    /// Guards for a kill that process `peer` asks us for: it is spared as if it were ours, with its ancestors, and so are we.
    /// `forbidden` says why it may not signal the process with some PID now, if so.
    pub fn for_peer(
        peer: u32,
        force_self: bool,
        stat: &dyn Fn(u32) -> Option<Stat>,
        forbidden: impl Fn(u32) -> Option<String> + Send + Sync + 'static,
    ) -> Guards {
        let mut guards = Guards::new(peer, force_self, stat);
        guards.own.push(std::process::id());
        Guards { permission: Some(Permission(Arc::new(forbidden))), ..guards }
    }

    /// Why the one who asks may not signal the process with this PID, if so. Whoever acts on it makes sure afterwards
    /// that it is the one meant.
    pub(super) fn forbid(&self, pid: u32) -> Option<String> {
        self.permission.as_ref().and_then(|Permission(forbidden)| forbidden(pid))
    }

    /// The guards of this process, from `/proc`.
    pub fn current(force_self: bool) -> Guards {
        Guards::new(std::process::id(), force_self, &|pid| stat::read(pid).ok())
    }

    /// Adds what is known of containers. With `stop`, those of the holders are stopped; else whatever holds a port for a
    /// container is left alone, for the container would go on with a dead port.
    pub fn with_containers(self, roster: Roster, stop: bool) -> Guards {
        Guards { roster, stop_containers: stop, ..self }
    }

    /// From now on a socket of which no holder is visible is taken for a container's where the engine says so.
    pub fn trusting_engine(self) -> Guards {
        Guards { trusts_engine: true, ..self }
    }

    /// Adds what is known of units.
    pub fn with_units(self, units: Units) -> Guards {
        Guards { units, ..self }
    }

    /// Guards that let everybody through, for a plan that is to close sockets and signals nobody.
    pub fn open() -> Guards {
        Guards { is_open: true, ..Guards::default() }
    }

    /// Gives up the protection of those who run things for others where the user named them by their PIDs.
    pub fn with_named(self, pids: &[u32]) -> Guards {
        Guards { named: pids.to_vec(), ..self }
    }

    /// Gives up the protection of those who run things for others and started after this moment, as far as they run but
    /// what they were started for.
    pub fn with_mark(self, since: BootNs) -> Guards {
        Guards { since: Some(since), ..self }
    }

    /// Why a process that runs others is spared, if so.
    fn managing(&self, process: &Process) -> Option<Managing> {
        let is_of_job =
            |it: &Managing| it.is_of_starter && self.since.is_some_and(|since| started_after(process.id, since));
        is_manager(process).filter(|it| !self.named.contains(&process.id.pid) && !is_of_job(it))
    }

    /// Why a relative of a holder must not be signalled, if so: what runs things for others is nobody's mere relative.
    pub(super) fn refuse_relative(&self, process: &Process, stat: &dyn Fn(u32) -> Option<Stat>) -> Option<String> {
        let works_for_others = || {
            let managing = self.managing(process).map(|managing| managing.reason.to_owned());
            managing.or_else(|| is_proxy(process).then(|| "it holds ports for containers".to_owned()))
        };
        let is_named = self.named.contains(&process.id.pid);
        let spared = self.refuse(process.id.pid, stat).or_else(|| works_for_others().filter(|_| !is_named));
        spared.or_else(|| self.forbid(process.id.pid))
    }

    pub(super) fn judge(&self, process: &Process, socket: &Socket, stat: &dyn Fn(u32) -> Option<Stat>) -> Verdict {
        match self.judge_role(process, socket, stat) {
            Verdict::Signal => match self.forbid(process.id.pid) {
                Some(reason) => Verdict::Refuse { reason, denied: true },
                None => Verdict::Signal,
            },
            other => other,
        }
    }

    /// By what the process is, whoever asks.
    fn judge_role(&self, process: &Process, socket: &Socket, stat: &dyn Fn(u32) -> Option<Stat>) -> Verdict {
        if self.is_open {
            return Verdict::Signal;
        }
        let managing = self.managing(process);
        if let (Some(managing), Some(manager)) = (managing, systemd_of(process)) {
            return self.judge_systemd(socket, manager, managing);
        }
        if let Some(reason) = self.refuse(process.id.pid, stat) {
            return Verdict::Refuse { reason, denied: false };
        }
        let Some(link) = self.roster.link(process, socket) else {
            return managing.map_or_else(|| self.judge_unit(process, stat), |it| refusal(process, it));
        };
        if self.stop_containers {
            return match (self.roster.obstacle(&link, socket), link.container) {
                (None, Some(container)) => Verdict::Stop(Whole::Container(container.clone())),
                (Some((reason, denied)), _) => Verdict::Refuse { reason, denied },
                (None, None) => Verdict::Refuse { reason: link.describe(socket), denied: false },
            };
        }
        match link.role {
            Role::Proxy(_) if self.named.contains(&process.id.pid) => Verdict::Signal,
            Role::Proxy(_) => Verdict::Refuse { reason: self.roster.refusal(&link, socket), denied: false },
            Role::Inside(_) => managing.map_or(Verdict::Signal, |it| refusal(process, it)),
        }
    }

    /// What is stopped for a socket of which no holder is visible: a docker-proxy is root's, and other users, who may well
    /// stop the container, are not shown what it holds.
    pub(super) fn judge_ghost(&self, socket: &Socket) -> Option<Whole> {
        let may_stop = self.stop_containers && self.trusts_engine;
        let container = self.roster.publisher(socket).filter(|it| may_stop && !self.roster.is_own(it))?;
        Some(Whole::Container(container.clone()))
    }

    /// Of a systemd that listens itself, for a `.socket` unit.
    fn judge_systemd(&self, socket: &Socket, manager: Manager, managing: Managing) -> Verdict {
        let Managing { reason, instead, .. } = managing;
        match (self.units.socket_unit(socket), self.units.stop) {
            (Some(Ok(Some(name))), true) => Verdict::Stop(Whole::Unit { name: name.clone(), manager }),
            (Some(Ok(Some(name))), false) => {
                let unit = Whole::Unit { name: name.clone(), manager };
                let stop = supervisor::stop_command(name, manager);
                let reason = format!("systemd holds it for {unit}; stop it with: {stop} (or --stop-unit)");
                Verdict::Refuse { reason, denied: false }
            }
            (Some(Err(error)), true) => {
                Verdict::Refuse { reason: format!("{reason}: {}", error.message), denied: error.denied }
            }
            _ => Verdict::Refuse { reason: format!("{reason}; see: {instead}"), denied: false },
        }
    }

    /// Of a process that nobody answers for but the unit that it may run in.
    fn judge_unit(&self, process: &Process, stat: &dyn Fn(u32) -> Option<Stat>) -> Verdict {
        // A supervisor with commands of its own is no unit, nor is a shell that somebody types into.
        let unit = || Supervisor::of(process, stat).and_then(|it| Some((it.unit?, it.user_manager)));
        let Some((name, uid)) = self.units.stop.then(unit).flatten() else { return Verdict::Signal };
        let manager = uid.map_or(Manager::System, Manager::User);
        let unit = Whole::Unit { name, manager };
        if let (Some((own, of)), Whole::Unit { name, .. }) = (&self.units.own, &unit)
            && (own, *of) == (name, manager)
        {
            let reason = format!("runs in {unit}, in which portwatch itself runs: it is never stopped");
            return Verdict::Refuse { reason, denied: false };
        }
        let member = process.cgroup.as_ref().and_then(|path| self.units.members.get(path));
        let (reason, denied) = match (member, &unit) {
            (Some(Ok(Some(member))), Whole::Unit { name, .. }) if member == name => return Verdict::Stop(unit),
            (Some(Err(error)), _) => (error.message.clone(), error.denied),
            (Some(Ok(member)), _) => {
                let whose = member.as_ref().map_or("none".into(), |member| escape(member));
                (format!("its cgroup names {unit}, and systemd says that it belongs to {whose}: not stopped"), false)
            }
            (None, _) => (format!("it came meanwhile, with {unit}; try again"), false),
        };
        Verdict::Refuse { reason, denied }
    }

    /// The name of the container that the process runs in, where an engine told it.
    pub(super) fn container_name(&self, process: &Process, socket: &Socket) -> Option<String> {
        Some(self.roster.link(process, socket)?.container?.name.clone())
    }

    /// Why this process must not be signalled, if so.
    pub fn refuse(&self, pid: u32, stat: &dyn Fn(u32) -> Option<Stat>) -> Option<String> {
        let reason = if pid <= 1 {
            "init is never signalled"
        } else if self.own.contains(&pid) {
            "portwatch itself holds the port"
        } else if self.ancestors.contains(&pid) && !self.force_self {
            "portwatch was started by it; --force-self signals it all the same"
        } else if stat(pid).is_some_and(|s| s.kernel_thread) {
            "kernel threads are never signalled"
        } else {
            return None;
        };
        Some(reason.to_owned())
    }
}

/// Of a process that runs others, of which to end one would be enough.
fn refusal(process: &Process, Managing { reason, instead, .. }: Managing) -> Verdict {
    let reason = format!("{reason}; see: {instead}; or, to end it all the same: --pid {}", process.id.pid);
    Verdict::Refuse { reason, denied: false }
}
