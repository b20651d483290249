//! A cgroup that is frozen.

use std::fs;
use std::path::{Path, PathBuf};

use crate::puppet::Puppet;
use crate::subject::skip;

pub struct Ice {
    directory: PathBuf,
    pid: u32,
}

impl Ice {
    /// Version 2, where it is mounted.
    pub fn around(puppet: &Puppet) -> Option<Ice> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let Some(root) = roots.iter().find(|root| Path::new(root).join("cgroup.procs").exists()) else {
            skip("cgroup2", "no version 2 hierarchy is mounted");
            return None;
        };
        let directory = Path::new(root).join(format!("portwatch-test-{}", puppet.pid));
        if let Err(error) = fs::create_dir(&directory) {
            skip("cgroup2", &format!("{}: {error}", directory.display()));
            return None;
        }
        let ice = Ice { directory, pid: puppet.pid };
        ice.write("cgroup.procs", &puppet.pid.to_string());
        ice.write("cgroup.freeze", "1");
        let events = ice.directory.join("cgroup.events");
        let until = std::time::Instant::now() + crate::puppet::PATIENCE;
        while !fs::read_to_string(&events).expect("cgroup.events").contains("frozen 1") {
            assert!(std::time::Instant::now() < until, "it does not freeze");
            std::thread::yield_now();
        }
        Some(ice)
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.directory.join(file);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

impl Drop for Ice {
    fn drop(&mut self) {
        let _ = fs::write(self.directory.join("cgroup.freeze"), "0");
        // Out of it, so that it can go: where the process has ended already, it is empty anyway.
        if let Some(root) = self.directory.parent() {
            let _ = fs::write(root.join("cgroup.procs"), self.pid.to_string());
        }
        let _ = fs::remove_dir(&self.directory);
    }
}
