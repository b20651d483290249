//! The servers of a user in the background: one file each, by name, in a directory that is the user's alone.
//!
//! ```text
//!  crate::place
//!    └ portwatch/servers/NAME.json   who it is, by PID, start and boot; gone when it is over
//!      portwatch/servers/NAME.log    what it said, kept until the next one of that name
//!      portwatch/ports/PORT[.udp]    locked while a run has chosen the port and does not listen yet
//! ```
//! A record is written whole or not at all, and believed only while its processes live: after a crash, a boot, or where
//! both supervisors were killed, it is stale, and removed by whoever meets it.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::libc;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Signal, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::tree;
use crate::model::{BootNs, ProcessId, Protocol};
use crate::render::escape;
use crate::source::{process, stat};

/// The longest name of a server.
pub const NAME_MAX: usize = 64;

/// A record is a command line and a few numbers.
const MAX_BYTES: u64 = 4 * 1024 * 1024;

/// Logs of servers that are over, which are kept.
const OLD_LOGS: usize = 20;

/// A server in the background.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    pub port: Option<u16>,
    /// By which it listens there, where that was said.
    #[serde(default)]
    pub proto: Option<Protocol>,
    /// Where it was first seen to listen, as a client of this host reaches it.
    pub address: Option<SocketAddr>,
    /// The path of its health.
    pub health: Option<String>,
    pub command: Vec<String>,
    pub cwd: Option<String>,
    /// The command itself.
    pub process: ProcessId,
    /// Who ends it all on SIGTERM, and its parent.
    pub watcher: ProcessId,
    pub keeper: ProcessId,
    /// Nanoseconds since boot.
    pub began: BootNs,
    pub grace_ms: u64,
    /// Boot and PID namespace, without which a PID means nothing.
    pub host: Host,
}

/// Where PIDs mean what they meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    pub boot: String,
    pub pid_namespace: String,
}

impl Host {
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn current() -> anyhow::Result<Host> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("cannot read the boot id")?;
        let namespace = fs::read_link("/proc/self/ns/pid").context("cannot read /proc/self/ns/pid")?;
        Ok(Host { boot: boot.trim().to_owned(), pid_namespace: namespace.to_string_lossy().into_owned() })
    }
}

impl Record {
    /// Whether somebody still looks after it.
    pub fn is_alive(&self) -> bool {
        !stat::has_ended(self.watcher) || !stat::has_ended(self.keeper)
    }

    /// The two supervisors, as far as they live: pidfds that are readable once they are gone. `None` for one that is.
    pub fn supervisors(&self) -> [Option<OwnedFd>; 2] {
        [self.watcher, self.keeper].map(tree::open)
    }

    /// Ends the server and waits until nothing of it is left, at most `patience` longer than its own graces take. Whether
    /// that came.
    ///
    /// # Errors
    /// The kernel's, where the supervisor may not be signalled.
    pub fn stop(&self, patience: Duration) -> io::Result<bool> {
        let [watcher, keeper] = self.supervisors();
        if let Some(watcher) = &watcher {
            match pidfd_send_signal(watcher, Signal::TERM) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // The command's grace, and that of what it leaves behind.
        let until = Instant::now() + 2 * Duration::from_millis(self.grace_ms) + patience;
        // The keeper goes last.
        for supervisor in [watcher, keeper].into_iter().flatten() {
            while process::is_alive(&supervisor) {
                if Instant::now() >= until {
                    return Ok(false);
                }
                tree::wait_for(&mut [tree::input(&supervisor)], Some(until));
            }
        }
        Ok(true)
    }
}

#[derive(Debug)]
pub struct Register {
    directory: PathBuf,
    host: Host,
}

/// While it is held nobody else starts a server of this user.
#[derive(Debug)]
pub struct Locked(#[expect(dead_code, reason = "the lock is on the open file")] File);

impl Register {
    /// The register of this user, made where it is not there yet.
    ///
    /// # Errors
    /// Where there is no place for it, or somebody else could write to it.
    pub fn open() -> anyhow::Result<Register> {
        let directory = place("servers")?;
        Ok(Register { directory, host: Host::current()? })
    }

    /// # Errors
    /// When the file cannot be made or locked.
    pub fn lock(&self) -> anyhow::Result<Locked> {
        let path = self.directory.join(".lock");
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.with_context(|| format!("cannot make {}", shown(&path)))?;
        flock(&file, FlockOperation::LockExclusive).with_context(|| format!("cannot lock {}", shown(&path)))?;
        Ok(Locked(file))
    }

    /// Those that live, the oldest first. Stale records are removed.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn living(&self) -> anyhow::Result<Vec<Record>> {
        let entries = fs::read_dir(&self.directory);
        let entries = entries.with_context(|| format!("cannot read {}", shown(&self.directory)))?;
        let names = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_suffix(".json").map(str::to_owned)
        });
        let mut found: Vec<Record> = names.filter_map(|name| self.find(&name)).collect();
        found.sort_by(|one, other| (one.began, &one.name).cmp(&(other.began, &other.name)));
        Ok(found)
    }

    /// The one of this name, if it lives.
    pub fn find(&self, name: &str) -> Option<Record> {
        check_name(name).ok()?;
        let path = self.record_path(name);
        let record = match read(&path) {
            Ok(record) => record?,
            Err(_) => return None,
        };
        if record.host.boot == self.host.boot && record.host.pid_namespace != self.host.pid_namespace {
            // In another container, say, where its PIDs mean something: neither ours to show nor to remove.
            return None;
        }
        let is_alive = record.host == self.host && record.name == name && record.is_alive();
        if !is_alive {
            // It may have been replaced since by one that lives.
            if read(&path).ok().flatten().is_some_and(|now| now == record) {
                let _ = fs::remove_file(&path);
            }
            return None;
        }
        Some(record)
    }

    /// Writes a record whole.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, record: &Record) -> anyhow::Result<()> {
        let path = self.record_path(&record.name);
        let new = self.directory.join(format!(".{}.new", record.name));
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            fs::rename(&new, &path)
        };
        write().with_context(|| format!("cannot write {}", shown(&path)))?;
        self.forget_old_logs();
        Ok(())
    }

    pub fn record_path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }

    pub fn log_path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    pub fn host(&self) -> &Host {
        &self.host
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A name for a server of this program: as it is, or with a number where that one lives.
    pub fn free_name(&self, wanted: &str) -> String {
        let mut name = wanted.to_owned();
        let mut number = 2;
        while self.find(&name).is_some() {
            name = format!("{wanted}-{number}");
            number += 1;
        }
        name
    }

    fn forget_old_logs(&self) {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let mut old: Vec<_> = entries
            .filter_map(|entry| {
                let path = entry.path();
                let is_old =
                    path.extension().is_some_and(|kind| kind == "log") && !path.with_extension("json").exists();
                Some((entry.metadata().ok()?.modified().ok()?, path)).filter(|_| is_old)
            })
            .collect();
        old.sort();
        for (_, path) in old.iter().rev().skip(OLD_LOGS) {
            let _ = fs::remove_file(path);
            let _ = fs::remove_file(super::log::previous(path));
        }
    }
}

/// `[A-Za-z0-9._-]`, at most 64 of them, and no hidden file or option.
///
/// # Errors
/// A sentence.
pub fn check_name(name: &str) -> Result<String, String> {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    let begins_well = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    (is_plain && begins_well && name.len() <= NAME_MAX)
        .then(|| name.to_owned())
        .ok_or_else(|| format!("a name is made of A-Z, a-z, 0-9, '.', '_' and '-', at most {NAME_MAX}"))
}

/// `python3-8000`, of a program and its port.
pub fn default_name(program: &std::ffi::OsStr, port: Option<u16>) -> String {
    let file = Path::new(program).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let stem: String = file.chars().filter(|&c| plain(c)).take(NAME_MAX / 2).collect();
    let stem = stem.trim_start_matches(['.', '-']);
    let stem = if stem.is_empty() { "server" } else { stem };
    port.map_or_else(|| stem.to_owned(), |port| format!("{stem}-{port}"))
}

/// The directory of the lock files of ports; `None`: there is no place for it.
pub fn locks() -> Option<PathBuf> {
    place("ports").ok()
}

fn read(path: &Path) -> io::Result<Option<Record>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes).ok())
}

fn place(part: &str) -> anyhow::Result<PathBuf> {
    let uid = nix::unistd::Uid::effective().as_raw();
    place_in(&|name| std::env::var_os(name), uid, part)
}

fn place_in(variable: &dyn Fn(&str) -> Option<OsString>, uid: u32, part: &str) -> anyhow::Result<PathBuf> {
    let base = crate::place::of_user(variable, uid)?
        .context("there is no place to remember servers: set XDG_RUNTIME_DIR to a directory of yours, or HOME")?
        .join("portwatch");
    // The agent's directory is open to all, whoever makes it; what is in here is not.
    make(&base, uid, 0o755)?;
    let directory = base.join(part);
    make(&directory, uid, 0o700)?;
    Ok(directory)
}

/// Makes a directory of this user's, or checks that nobody may do more in one that is there.
fn make(path: &Path, uid: u32, wanted: u32) -> anyhow::Result<()> {
    let made = DirBuilder::new().mode(0o700).create(path);
    // Whatever the umask.
    match made.and_then(|()| fs::set_permissions(path, Permissions::from_mode(wanted))) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot make {}", shown(path)));
        }
        _ => {}
    }
    let found = fs::symlink_metadata(path).with_context(|| format!("cannot look at {}", shown(path)))?;
    let mode = found.mode();
    anyhow::ensure!(
        found.is_dir() && found.uid() == uid && mode & 0o077 & !wanted == 0,
        "{} is not a directory of yours alone (uid {}, mode {:o}); remove it, or set XDG_RUNTIME_DIR to another place",
        shown(path),
        found.uid(),
        mode & 0o7777
    );
    Ok(())
}

fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy()).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn register(directory: &Path) -> Register {
        Register { directory: directory.to_owned(), host: Host::current().unwrap() }
    }

    fn record(name: &str, id: ProcessId) -> Record {
        Record {
            name: name.to_owned(),
            port: Some(8000),
            proto: None,
            address: None,
            health: None,
            command: vec!["web".to_owned()],
            cwd: None,
            process: id,
            watcher: id,
            keeper: id,
            began: 7,
            grace_ms: 5000,
            host: Host::current().unwrap(),
        }
    }

    #[test]
    fn names_are_harmless() {
        for name in ["web", "a", "web-8000", "_x", "A.b_c-9", &"x".repeat(64)] {
            assert_eq!(check_name(name).as_deref(), Ok(name));
        }
        for name in ["", ".", "..", ".lock", "-f", "a/b", "a b", "ä", "a\n", "\u{1b}[2J", &"x".repeat(65)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        for (program, port, want) in [
            ("/usr/bin/python3", Some(8000), "python3-8000"),
            ("./web server!", None, "webserver"),
            ("..", None, "server"),
            ("-x", Some(1), "x-1"),
            ("", None, "server"),
        ] {
            assert_eq!(default_name(program.as_ref(), port), want);
            assert!(check_name(want).is_ok());
        }
    }

    #[test]
    fn only_records_of_living_processes_of_this_boot_are_believed() {
        let directory = tempfile::tempdir().unwrap();
        let register = register(directory.path());
        let own = stat::read(std::process::id()).unwrap().id();
        let gone = ProcessId { start: own.start + 10 * ProcessId::TICK_NS, ..own };
        let elsewhere =
            |boot: &str, namespace: &str| Host { boot: boot.to_owned(), pid_namespace: namespace.to_owned() };
        let Host { boot, pid_namespace } = Host::current().unwrap();
        for (name, id, host, is_alive, stays) in [
            ("lives", own, elsewhere(&boot, &pid_namespace), true, true),
            ("gone", gone, elsewhere(&boot, &pid_namespace), false, false),
            ("before", own, elsewhere("another boot", &pid_namespace), false, false),
            ("container", own, elsewhere(&boot, "pid:[1]"), false, true),
        ] {
            register.write(&Record { host, ..record(name, id) }).unwrap();
            assert_eq!(register.find(name).is_some(), is_alive, "{name}");
            assert_eq!(register.record_path(name).exists(), stays, "{name}");
        }
        fs::write(register.record_path("damaged"), "{").unwrap();
        symlink("/dev/zero", register.record_path("hostile")).unwrap();
        fs::copy(register.record_path("lives"), register.record_path("copied")).unwrap();
        let names: Vec<String> = register.living().unwrap().into_iter().map(|record| record.name).collect();
        assert_eq!(names, ["lives"]);
        assert_eq!(register.free_name("lives"), "lives-2");
        assert_eq!(register.free_name("damaged"), "damaged");
    }

    #[test]
    fn the_place_is_the_users_alone() {
        let directory = tempfile::tempdir().unwrap();
        let uid = nix::unistd::Uid::effective().as_raw();
        let own = directory.path().to_owned();
        let variable = |name: &str| (name == "XDG_RUNTIME_DIR").then(|| own.clone().into_os_string());
        let place = place_in(&variable, uid, "servers").unwrap();
        assert_eq!(place, own.join("portwatch/servers"));
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        // Another user's client finds its way to the agent's socket, also if this was here first.
        assert_eq!((mode(&own.join("portwatch")), mode(&place)), (0o755, 0o700));
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
        let error = place_in(&variable, uid, "servers").unwrap_err().to_string();
        assert!(error.contains("is not a directory of yours alone"), "{error}");
        // A link that somebody put there leads nowhere.
        fs::remove_dir(&place).unwrap();
        symlink("/tmp", &place).unwrap();
        assert!(place_in(&variable, uid, "servers").is_err());
        let stranger = place_in(&variable, 4_000_000, "servers");
        assert!(stranger.is_err_and(|error| error.to_string().contains("no place to remember servers")));
    }
}
