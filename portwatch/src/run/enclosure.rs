//! A cgroup of its own for the command, where one can be made: as root, or below a cgroup that is delegated to the user.
//! `cgroup.kill` (Linux 5.14) then kills all that is in it at once, whoever forks meanwhile.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::model::ProcessId;
use crate::source::stat;

/// Where the unified hierarchy is mounted: alone, or beside the older ones.
const ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

const PREFIX: &str = "portwatch-run-";

#[derive(Debug)]
pub(super) struct Enclosure {
    directory: PathBuf,
}

impl Enclosure {
    /// The one of this watcher, made or not: the watcher and its keeper know it by the same name.
    pub(super) fn of(watcher: ProcessId) -> Option<Enclosure> {
        let lines = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = lines.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let root = ROOTS.iter().map(Path::new).find(|root| root.join("cgroup.procs").exists())?;
        Some(Enclosure { directory: root.join(own).join(name(watcher)) })
    }

    /// Makes it; the file that a process writes `0` to, to move into it. `None`, where it may not be made or could not kill.
    pub(super) fn make(&self) -> Option<File> {
        self.remove_abandoned();
        fs::create_dir(&self.directory).ok()?;
        let kills = self.directory.join("cgroup.kill").exists();
        let entry = OpenOptions::new().write(true).open(self.directory.join("cgroup.procs"));
        let entry = entry.ok().filter(|_| kills);
        if entry.is_none() {
            self.remove();
        }
        entry
    }

    /// Where both supervisors were killed, nobody removed theirs. One with somebody in it stays.
    fn remove_abandoned(&self) {
        for entry in
            self.directory.parent().and_then(|parent| fs::read_dir(parent).ok()).into_iter().flatten().flatten()
        {
            if entry.file_name().to_str().and_then(watcher_of).is_some_and(stat::has_ended) {
                let _ = fs::remove_dir(entry.path());
            }
        }
    }

    /// Kills whoever is in it.
    pub(super) fn kill(&self) {
        if let Ok(mut file) = OpenOptions::new().write(true).open(self.directory.join("cgroup.kill")) {
            let _ = file.write_all(b"1");
        }
    }

    /// Removes it with those that the command made below it. They are empty when nobody is left.
    pub(super) fn remove(&self) {
        remove(&self.directory);
    }
}

/// By identity: its PID may be another watcher's later.
fn name(watcher: ProcessId) -> String {
    format!("{PREFIX}{}-{}", watcher.pid, watcher.start / ProcessId::TICK_NS)
}

fn watcher_of(name: &str) -> Option<ProcessId> {
    let (pid, ticks) = name.strip_prefix(PREFIX)?.split_once('-')?;
    let start = ticks.parse::<u64>().ok()?.checked_mul(ProcessId::TICK_NS)?;
    Some(ProcessId { pid: pid.parse().ok()?, start })
}

fn remove(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(directory);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_whose_they_are() {
        let watcher = ProcessId { pid: 7, start: 123 * ProcessId::TICK_NS };
        assert_eq!(name(watcher), "portwatch-run-7-123");
        assert_eq!(watcher_of("portwatch-run-7-123"), Some(watcher));
        for other in ["portwatch-run-7", "portwatch-run--", "portwatch-run-7-x", "system.slice", ""] {
            assert_eq!(watcher_of(other), None, "{other}");
        }
    }
}
