//! A cgroup of its own for the command, where one can be made: as root, or below a cgroup that is delegated to the user.
//! `cgroup.kill` (Linux 5.14) then kills all that is in it at once, whoever forks meanwhile.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Where the unified hierarchy is mounted: alone, or beside the older ones.
const ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

#[derive(Debug)]
pub(super) struct Enclosure {
    directory: PathBuf,
}

impl Enclosure {
    /// The one of this watcher, made or not: the watcher and its keeper know it by the same name.
    pub(super) fn of(watcher: u32) -> Option<Enclosure> {
        let lines = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = lines.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let root = ROOTS.iter().map(Path::new).find(|root| root.join("cgroup.procs").exists())?;
        Some(Enclosure { directory: root.join(own).join(format!("portwatch-run-{watcher}")) })
    }

    /// Makes it; the file that a process writes `0` to, to move into it. `None`, where it may not be made or could not kill.
    pub(super) fn make(&self) -> Option<File> {
        fs::create_dir(&self.directory).ok()?;
        let kills = self.directory.join("cgroup.kill").exists();
        let entry = OpenOptions::new().write(true).open(self.directory.join("cgroup.procs"));
        let entry = entry.ok().filter(|_| kills);
        if entry.is_none() {
            self.remove();
        }
        entry
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

fn remove(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(directory);
}
