//! Where and of what the figures are.

use std::fs;
use std::process::Command;

use nix::sys::utsname::uname;
use serde_json::{Value, json};

use super::peers;
use crate::world::memory_kib;
use crate::{output_of, root};

pub(super) struct Machine {
    kernel: String,
    cpus: usize,
    model: String,
    memory_mib: usize,
    date: jiff::Timestamp,
    /// Of the sources: the commit, and whether there are changes beside it. Not known outside a checkout.
    commit: Option<(String, bool)>,
    peers: Vec<(&'static str, Option<String>)>,
}

impl Machine {
    pub(super) fn look() -> Machine {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let git = |args: &[&str]| output_of(Command::new("git").args(args).current_dir(root())).ok();
        Machine {
            kernel: uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(0, Into::into),
            model: model(&read("/proc/cpuinfo")).unwrap_or("?").to_owned(),
            memory_mib: memory_kib(&read("/proc/meminfo"), "MemTotal").unwrap_or(0) >> 10,
            date: jiff::Timestamp::now().round(jiff::Unit::Second).unwrap_or_default(),
            commit: git(&["rev-parse", "--short=12", "HEAD"])
                .zip(git(&["status", "--porcelain"]))
                .map(|(commit, changes)| (commit.trim().to_owned(), !changes.is_empty())),
            peers: peers::versions(),
        }
    }

    pub(super) fn markdown(&self) -> String {
        let Machine { kernel, cpus, model, memory_mib, date, .. } = self;
        let commit = match &self.commit {
            Some((commit, false)) => format!("commit {commit}"),
            Some((commit, true)) => format!("commit {commit} with changes"),
            None => "an unknown commit".to_owned(),
        };
        let here: Vec<_> =
            self.peers.iter().filter_map(|(name, version)| Some(format!("{name} {}", version.as_ref()?))).collect();
        let absent: Vec<_> =
            self.peers.iter().filter(|(_, version)| version.is_none()).map(|(name, _)| *name).collect();
        let absent = if absent.is_empty() { String::new() } else { format!(" Not installed: {}.", absent.join(", ")) };
        format!(
            "{commit}, {date}. Linux {kernel}, {cpus} CPUs ({model}), {memory_mib} MiB of memory.\n\nPeers: {}.{absent}\n",
            here.join(", ")
        )
    }

    pub(super) fn figures(&self) -> Value {
        json!({
            "kernel": self.kernel, "cpus": self.cpus, "model": self.model, "memory_mib": self.memory_mib,
            "date": self.date.to_string(),
            "commit": self.commit.as_ref().map(|(commit, _)| commit),
            "dirty": self.commit.as_ref().map(|(_, dirty)| dirty),
            "peers": self.peers.iter().map(|(name, version)| ((*name).to_owned(), json!(version))).collect::<serde_json::Map<_, _>>(),
        })
    }
}

/// The processor's name, as x86 and some others give it.
fn model(cpuinfo: &str) -> Option<&str> {
    cpuinfo.lines().filter_map(|line| line.split_once(':')).find_map(|(key, value)| {
        let name = ["model name", "Model", "cpu model"].contains(&key.trim());
        name.then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::model;

    #[test]
    fn the_model_is_the_first_processors() {
        let cpuinfo =
            "processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some CPU @ 2.00GHz\n\nprocessor\t: 1\nmodel name\t: Other\n";
        assert_eq!(model(cpuinfo), Some("Some CPU @ 2.00GHz"));
        assert_eq!(model("processor\t: 0\nBogoMIPS\t: 50\n"), None);
    }
}
