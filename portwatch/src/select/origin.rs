//! Where a listener comes from: since when it is there, and out of which environment, process and cgroup.
//!
//! Pure: what has to be looked up on the host is handed in as [`Facts`], and looked up only where everything else fits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::model::{BootNs, Listener, Process, ProcessId};

/// What appeared since a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Since {
    /// Listeners that began after it; where nobody saw that, whose binder started after it.
    After(BootNs),
    /// Listeners of which every holder started after a mark was made then: what ran at that time is never meant, also
    /// when it listens anew.
    Mark(BootNs),
}

impl Since {
    /// Of unknown age is not new: a clean-up must not end what it knows nothing of.
    pub(super) fn matches(self, listener: &Listener) -> bool {
        match self {
            Since::After(moment) => listener.began().is_some_and(|began| began > moment),
            Since::Mark(moment) if listener.is_ghost() => listener.since.is_some_and(|since| since > moment),
            Since::Mark(moment) => listener.holders.iter().all(|holder| started_after(holder.process.id, moment)),
        }
    }
}

/// Whether the process started after this moment, as far as the 10 ms in which /proc counts can tell: what started in
/// the same ones did not. A start of 0 is a process that was gone before it could be read.
pub fn started_after(process: ProcessId, moment: BootNs) -> bool {
    process.start / ProcessId::TICK_NS > moment / ProcessId::TICK_NS
}

/// A variable of the environment, perhaps with one value only. Written `NAME` or `NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    pub name: String,
    pub value: Option<String>,
}

impl Variable {
    /// Whether it is in an environment, each variable of which is ended by NUL.
    pub(super) fn is_in(&self, environment: &[u8]) -> bool {
        environment.split(|&byte| byte == 0).any(|entry| {
            let value = entry.strip_prefix(self.name.as_bytes()).and_then(|rest| rest.strip_prefix(b"="));
            value.is_some_and(|value| self.value.as_ref().is_none_or(|wanted| wanted.as_bytes() == value))
        })
    }
}

impl FromStr for Variable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, None),
        };
        if name.is_empty() || text.contains('\0') {
            return Err("use NAME or NAME=VALUE".to_owned());
        }
        Ok(Variable { name: name.to_owned(), value })
    }
}

impl fmt::Display for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.value.as_ref().map_or(Ok(()), |value| write!(f, "={value}"))
    }
}

/// A cgroup as `/proc/PID/cgroup` shows it; below `/sys/fs/cgroup`, as people see it, too.
///
/// # Errors
/// A sentence where it is no absolute path.
pub fn cgroup_path(text: &str) -> Result<String, String> {
    let path = match text.strip_prefix("/sys/fs/cgroup") {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => rest,
        _ if text.starts_with('/') => text,
        _ => return Err("use a path such as /system.slice/nginx.service; `cat /proc/PID/cgroup` shows it".to_owned()),
    };
    Ok(format!("/{}", path.trim_matches('/')))
}

/// Whether the cgroup is `wanted` or below it.
pub(super) fn is_below(cgroup: &str, wanted: &str) -> bool {
    let rest = cgroup.strip_prefix(wanted.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What a selector may have to know of a process that is dear to read, or not everybody's to know.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Who asks: the environment of another user's process is told to uid 0 alone.
    pub reader: u32,
    /// The environment that this very process was started with, each variable ended by NUL; `None` where `reader` may not
    /// know it.
    pub environment: fn(ProcessId, reader: u32) -> Option<Vec<u8>>,
    /// `None`: the process is gone.
    pub family: fn(ProcessId) -> Option<Family>,
}

impl Facts {
    /// Nothing is known, and what asks for it matches nothing.
    pub const NONE: Facts = Facts { reader: 0, environment: |_, _| None, family: |_| None };
}

/// Out of whom a process came, as far as it still shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// The pid of the process that began its session; 0 where that is outside our pid namespace.
    pub session: u32,
    /// Nearest first, up to init.
    pub ancestors: Vec<Relative>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relative {
    pub id: ProcessId,
    /// The kernel's `comm`.
    pub name: String,
}

impl Family {
    pub(super) fn descends_from(&self, wanted: ProcessId) -> bool {
        self.ancestors.iter().any(|ancestor| ancestor.id.is_same(wanted))
    }

    /// Whether the process lost its parent, or an ancestor of it did, and was given to init or another subreaper.
    ///
    /// The kernel does not keep who the parent was. But a session has only descendants of the process that began it: who
    /// is in a session and has that one not among its ancestors was given away. And what init, or a user's systemd, is
    /// the parent of was either started by it, and then it is in a unit or a container, or given to it.
    pub(super) fn is_orphaned(&self, process: &Process) -> bool {
        let belongs = |path| cgroup::unit(path).is_some() || cgroup::container(path).is_some();
        if process.cgroup.as_deref().is_some_and(belongs) {
            return false;
        }
        let own = process.id.pid;
        let is_adopted = self.ancestors.first().is_some_and(|parent| parent.id.pid == 1 || parent.name == "systemd");
        let began_session = |pid| pid == own || self.ancestors.iter().any(|ancestor| ancestor.id.pid == pid);
        own != 1 && (is_adopted || (self.session != 0 && !began_session(self.session)))
    }
}

#[cfg(test)]
mod tests;
