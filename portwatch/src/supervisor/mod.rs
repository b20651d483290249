//! Who would start a process again, and the command that ends it for good.
//!
//! Three kinds of evidence, the strongest first: the cgroup path (a container, a systemd service), an ancestor that is
//! known to supervise ([`parent`] has the table), and an ancestor that merely could (a script, any other parent).
//! Everything but [`systemd`] is pure: what is asked of the host is handed in as a [`Sight`].

pub mod manager;
mod parent;
pub mod systemd;

use std::borrow::Cow;

use nix::unistd::{Uid, User};
use serde::{Deserialize, Serialize};

pub use self::manager::{Managing, is_manager, systemd_of};
use crate::cgroup::{Container, Engine, Manager, Unit};
use crate::model::{Process, ProcessId};
use crate::source::process;
use crate::source::stat::Stat;

/// What sort of supervisor it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A service of systemd.
    Systemd,
    Docker,
    Podman,
    Containerd,
    /// A container of an engine that its cgroup does not tell.
    Container,
    Pm2,
    Supervisord,
    Runit,
    S6,
    Daemontools,
    Openrc,
    /// Runs a command again: on a change of files (nodemon), when it ends (forever), now and then (watch).
    Repeater,
    /// Starts it at its next time.
    Cron,
    /// A script, or a loop that somebody typed.
    Shell,
    /// Runs a command once and ends with it (npm, foreman, make): does not bring it back.
    Runner,
    /// A parent of which nothing more is known.
    Parent,
}

/// Who may bring a process back. The order of the fields is the order in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supervisor {
    /// The process that would do it; `None` for units and containers.
    pub pid: Option<u32>,
    pub name: Option<String>,
    /// A systemd service.
    pub unit: Option<String>,
    /// The first 12 digits of a container's id.
    pub container: Option<String>,
    /// Its name, where an engine told it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container_name: Option<String>,
    pub kind: Kind,
    /// The uid of the user whose systemd runs the unit; `None`: the system's.
    pub user_manager: Option<u32>,
    /// The command line of the process, cut where it is long. Hostile text.
    pub command: Option<String>,
    /// Whether it starts again what ends; `None` where that is not known.
    pub restarts: Option<bool>,
    /// The command that ends it for good, quoted for a shell.
    pub stop: Option<String>,
    #[serde(skip)]
    pub parent: Option<ProcessId>,
}

/// What is asked of the host.
pub struct Sight<'a> {
    pub stat: &'a dyn Fn(u32) -> Option<Stat>,
    /// argv of exactly this process; empty where it may not be read.
    pub command: &'a dyn Fn(ProcessId) -> Vec<String>,
    pub cwd: &'a dyn Fn(ProcessId) -> Option<String>,
    /// A variable of the environment that exactly this process was started with.
    pub variable: &'a dyn Fn(ProcessId, &str) -> Option<String>,
    /// Name of a uid.
    pub user: &'a dyn Fn(u32) -> Option<String>,
    /// Effective uid of portwatch.
    pub euid: u32,
}

impl std::fmt::Debug for Sight<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sight").field("euid", &self.euid).finish_non_exhaustive()
    }
}

impl Supervisor {
    /// Longest [`Supervisor::command`], in characters.
    const COMMAND_MAX: usize = 120;

    /// Who may start this process again. What `stat` does not tell is read from `/proc`, of the very process that
    /// `stat` described.
    pub fn of(process: &Process, stat: &dyn Fn(u32) -> Option<Stat>) -> Option<Supervisor> {
        on_this_host(stat, |sight| Supervisor::find(process, sight))
    }

    /// As [`Supervisor::of`], of a host that is handed in. Pure.
    ///
    /// A container is stopped from outside, whatever supervises in there. A supervisor with a command of its own (pm2,
    /// runit) knows the process better than the unit that it runs in; a script or another parent does not.
    pub fn find(process: &Process, sight: &Sight<'_>) -> Option<Supervisor> {
        let cgroup = process.cgroup.as_deref().unwrap_or_default();
        if let Some(container) = Container::of(cgroup) {
            return Some(Supervisor::container(&container, sight.euid));
        }
        let line = parent::Line::of(process, sight);
        if let Some(controlled) = line.controlled(sight) {
            return Some(controlled);
        }
        // A shell that somebody types into: the service (of a terminal, of sshd) is merely where that person works.
        if !line.is_typed
            && let Some(unit) = Unit::of(cgroup)
        {
            return Some(Supervisor::unit(&unit, sight));
        }
        line.uncontrolled()
    }

    fn container(container: &Container<'_>, euid: u32) -> Supervisor {
        let (kind, stop) = match container.engine {
            // A pod's container comes back, whoever stops it.
            _ if container.pod => (Kind::Container, None),
            Engine::Docker => (Kind::Docker, Some("docker stop")),
            Engine::Podman => (Kind::Podman, Some("podman stop")),
            Engine::Containerd => (Kind::Containerd, Some("nerdctl stop")),
            Engine::Unknown => (Kind::Container, None),
        };
        let id = container.short_id();
        let prefix = match container.rootless.filter(|uid| *uid != euid) {
            Some(uid) => format!("sudo -u '#{uid}' "),
            None => String::new(),
        };
        Supervisor {
            container: Some(id.to_owned()),
            stop: stop.map(|stop| format!("{prefix}{stop} {id}")),
            ..Supervisor::bare(kind)
        }
    }

    fn unit(unit: &Unit<'_>, sight: &Sight<'_>) -> Supervisor {
        let name = operand(unit.name);
        let stop = format!("{} stop {name}", systemctl(unit.manager, sight.euid, sight.user));
        Supervisor {
            unit: Some(unit.name.to_owned()),
            user_manager: unit.manager.uid(),
            stop: Some(stop),
            ..Supervisor::bare(Kind::Systemd)
        }
    }

    fn bare(kind: Kind) -> Supervisor {
        Supervisor {
            pid: None,
            name: None,
            unit: None,
            container: None,
            container_name: None,
            kind,
            user_manager: None,
            command: None,
            restarts: None,
            stop: None,
            parent: None,
        }
    }

    /// Asks the manager of a unit whether it starts it again, where that is not known. Blocks until it answers, a few
    /// milliseconds as a rule; what cannot be learnt stays unknown.
    pub fn ask(&mut self) {
        let manager = self.user_manager.map_or(Manager::System, Manager::User);
        if let (Some(unit), None) = (&self.unit, self.restarts) {
            self.restarts = systemd::restarts(unit, manager).ok();
        }
    }

    /// What it is, in a few words: `unit nginx.service`, `user unit web.service`, `container 5eed81bcd920`,
    /// `pm2 (812)`, `sh (77)`. Hostile text: not escaped.
    pub fn label(&self) -> String {
        let name = self.name.as_deref().unwrap_or("?");
        match (&self.unit, &self.container, self.pid) {
            (Some(unit), _, _) if self.user_manager.is_some() => format!("user unit {unit}"),
            (Some(unit), _, _) => format!("unit {unit}"),
            (_, Some(container), _) => match &self.container_name {
                Some(name) => format!("container {name} ({container})"),
                None => format!("container {container}"),
            },
            (_, _, Some(pid)) => format!("{name} ({pid})"),
            (_, _, None) => name.to_owned(),
        }
    }

    /// [`Supervisor::label`], with what a script or a repeater runs. Hostile text: not escaped.
    pub fn describe(&self) -> String {
        let label = self.label();
        match (&self.command, self.kind) {
            (Some(command), Kind::Shell) => format!("{label}, a shell that may start it again: {command}"),
            (Some(command), Kind::Repeater | Kind::Runner) => format!("{label}: {command}"),
            _ => label,
        }
    }

    /// The command that ends it for good, fit for a shell.
    pub fn stop_command(&self) -> Option<&str> {
        self.stop.as_deref()
    }

    /// Whether it could start again what ends.
    pub fn may_restart(&self) -> bool {
        self.restarts != Some(false)
    }
}

/// An ancestor of a process, from below where people work and services live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Starter {
    pub stat: Stat,
    /// Whether it is a shell that was given what to run.
    pub is_script: bool,
}

/// Who may have started this process, the nearest first: its ancestors below a shell that somebody types into, or a
/// program in which sessions, services or containers live.
pub fn starters(process: &Process, stat: &dyn Fn(u32) -> Option<Stat>) -> Vec<Starter> {
    on_this_host(stat, |sight| parent::Line::of(process, sight).starters())
}

/// What `stat` does not tell is read from `/proc`.
fn on_this_host<T>(stat: &dyn Fn(u32) -> Option<Stat>, ask: impl FnOnce(&Sight<'_>) -> T) -> T {
    ask(&Sight {
        stat,
        command: &|id| process::command(id).unwrap_or_default(),
        cwd: &|id| process::read_exact(id).and_then(|process| process.cwd),
        variable: &process::variable,
        user: &user_name,
        euid: Uid::effective().as_raw(),
    })
}

/// The beginning of a command for that manager.
fn systemctl(manager: Manager, euid: u32, user: &dyn Fn(u32) -> Option<String>) -> String {
    match manager {
        Manager::System => "systemctl".to_owned(),
        Manager::User(uid) if uid == euid => "systemctl --user".to_owned(),
        Manager::User(uid) => {
            let user = user(uid).unwrap_or_else(|| uid.to_string());
            format!("systemctl --user -M {}", quote(&format!("{user}@")))
        }
    }
}

/// The command that stops a unit, quoted for a shell.
pub fn stop_command(unit: &str, manager: Manager) -> String {
    format!("{} stop {}", systemctl(manager, Uid::effective().as_raw(), &user_name), operand(unit))
}

fn user_name(uid: u32) -> Option<String> {
    User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name)
}

/// The text as an operand, which no program takes for an option.
fn operand(word: &str) -> String {
    format!("{}{}", if word.starts_with('-') { "-- " } else { "" }, quote(word))
}

/// The text as one word of a shell command: as it is where that is safe, else in single quotes. Control and invisible
/// characters become `$'\xNN'`, which bash, zsh and ksh read back: nothing in the word moves a terminal's cursor.
pub(crate) fn quote(word: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "@%+=:,./_-#".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) && !word.starts_with('#') {
        return Cow::Borrowed(word);
    }
    if !word.contains(crate::render::is_hazard) {
        return Cow::Owned(format!("'{}'", word.replace('\'', r"'\''")));
    }
    let mut out = "$'".to_owned();
    for c in word.chars() {
        match c {
            '\\' | '\'' => out.extend(['\\', c]),
            c if crate::render::is_hazard(c) => {
                c.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| out.push_str(&format!("\\x{byte:02x}")));
            }
            c => out.push(c),
        }
    }
    Cow::Owned(out + "'")
}

/// The command line as people write it, cut where it is long.
fn command_line(command: &[String]) -> Option<String> {
    (!command.is_empty()).then(|| crate::render::cut(&command.join(" "), Supervisor::COMMAND_MAX).into_owned())
}

#[cfg(test)]
mod tests;
