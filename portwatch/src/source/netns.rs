//! Network namespaces: which one this thread is in, which others can be seen, and reading listening sockets in them.
//!
//! Seen are the namespaces of every process (not those that single threads entered on their own) and those mounted
//! under `/run/netns` (ip-netns) and `/run/docker/netns`.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::sched::{CloneFlags, setns};
use rustix::fs::{CWD, Mode, OFlags};

use crate::model::NetnsId;
use crate::source::diag::Dump;
use crate::source::process;

/// Where namespaces are kept mounted, with or without a process in them.
const MOUNT_DIRS: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// `NSFS_MAGIC` (linux/magic.h).
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// The calling thread's network namespace.
///
/// # Errors
/// Where /proc does not tell.
pub fn own() -> io::Result<NetnsId> {
    let path = "/proc/thread-self/ns/net";
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("cannot read {path}: {error}; is /proc mounted?"));
    id_of(Path::new(path)).map_err(named)
}

/// The network namespace of a process.
///
/// # Errors
/// `NotFound`: no such process, or a zombie; `PermissionDenied`: it would need `CAP_SYS_PTRACE`.
pub fn of_pid(pid: u32) -> io::Result<NetnsId> {
    id_of(Path::new(&format!("/proc/{pid}/ns/net")))
}

/// Namespaces that one look keeps alive, with a descriptor each: more than most hosts have. Anybody can make thousands.
const HELD: usize = 32;

/// The namespaces that can be seen.
#[derive(Debug, Default)]
pub struct Namespaces {
    found: BTreeMap<NetnsId, Seen>,
    /// How many more may be kept alive.
    may_hold: usize,
    /// How many processes and mounts could not be looked at for want of permission.
    pub denied: usize,
}

#[derive(Debug)]
enum Seen {
    /// It is kept alive.
    Held(File),
    /// It may end at any time. Where it was seen, each process and each mount: one may be gone before another.
    At(Vec<PathBuf>),
}

/// Finds every network namespace that can be seen.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn visible() -> anyhow::Result<Namespaces> {
    Namespaces::look(HELD)
}

impl Namespaces {
    pub(super) fn look(may_hold: usize) -> anyhow::Result<Namespaces> {
        let mut namespaces = Namespaces { may_hold, ..Namespaces::default() };
        for way in ways()? {
            match way {
                Ok((id, path)) => namespaces.add(id, path),
                Err(_) => namespaces.denied += 1,
            }
        }
        Ok(namespaces)
    }

    fn add(&mut self, id: NetnsId, path: PathBuf) {
        match self.found.get_mut(&id) {
            Some(Seen::Held(_)) => {}
            Some(Seen::At(paths)) => paths.push(path),
            None if self.may_hold > 0 => match open_at(&path) {
                Ok((id, file)) => {
                    if let Entry::Vacant(place) = self.found.entry(id) {
                        place.insert(Seen::Held(file));
                        self.may_hold -= 1;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => self.denied += 1,
                Err(_) => {}
            },
            None => drop(self.found.insert(id, Seen::At(vec![path]))),
        }
    }

    pub fn ids(&self) -> impl Iterator<Item = NetnsId> {
        self.found.keys().copied()
    }

    /// A descriptor of one of them. `None`: all who were seen in it have left.
    ///
    /// # Errors
    /// For want of descriptors.
    pub fn open(&self, id: NetnsId) -> io::Result<Option<File>> {
        let paths = match self.found.get(&id) {
            Some(Seen::Held(file)) => return file.try_clone().map(Some),
            Some(Seen::At(paths)) => paths,
            None => return Ok(None),
        };
        let file = paths.iter().find_map(|path| open_at(path).ok().filter(|(found, _)| *found == id));
        if file.is_none() {
            process::check_descriptors()?;
        }
        Ok(file.map(|(_, file)| file))
    }
}

/// There is no such network namespace, as far as can be seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unknown(pub NetnsId);

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there is no network namespace {} that can be seen from here; see lsns -t net", self.0)
    }
}

impl std::error::Error for Unknown {}

/// A descriptor of a network namespace that can be seen. No other is opened.
///
/// # Errors
/// When nobody visible is in it, nor is it mounted: `PermissionDenied` in the chain where some processes could not be
/// looked at, else [`Unknown`]. Neither for want of descriptors.
pub fn open(id: NetnsId) -> anyhow::Result<File> {
    let mut denied = 0;
    for way in ways()? {
        let opened = match way {
            Ok((found, _)) if found != id => continue,
            Ok((_, path)) => open_at(&path),
            Err(error) => Err(error),
        };
        match opened {
            Ok((found, file)) if found == id => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => denied += 1,
            Ok(_) | Err(_) => {}
        }
    }
    process::check_descriptors().with_context(|| format!("no descriptors left to find network namespace {id} by"))?;
    if denied > 0 {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied)).with_context(|| {
            let next = try_sudo();
            format!("cannot find network namespace {id} among those you may see (others take CAP_SYS_PTRACE){next}")
        });
    }
    Err(Unknown(id).into())
}

/// Root of a user namespace is root, and has no powers over others.
fn try_sudo() -> &'static str {
    if nix::unistd::geteuid().is_root() { "" } else { "; try sudo" }
}

/// Makes sure that the sockets of a network namespace can be read.
///
/// # Errors
/// As of [`open`]; `PermissionDenied` in the chain, too, where it may not be entered.
pub fn check(id: NetnsId) -> anyhow::Result<()> {
    let what = || format!("cannot look into network namespace {id} (that takes CAP_SYS_ADMIN){}", try_sudo());
    enter(&open(id)?, || Ok(())).with_context(what)
}

/// Reads every listening socket in another network namespace, by [`diag::dump`] or the like.
///
/// # Errors
/// When the namespace may not be entered (that takes `CAP_SYS_ADMIN`), or its sockets cannot be read.
pub fn dump_in(namespace: &File, dump: fn() -> anyhow::Result<Dump>) -> anyhow::Result<Dump> {
    enter(namespace, dump)
}

/// Does something in another network namespace. A thread of its own enters it, never the caller's.
///
/// # Errors
/// When the namespace may not be entered (that takes `CAP_SYS_ADMIN`), and what `act` gives.
pub fn enter<T: Send>(namespace: &File, act: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let helper = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).context("cannot enter a network namespace")?;
                act()
            })
            .context("cannot start a thread to enter a network namespace")?;
        helper.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the thread in a network namespace panicked")))
    })
}

/// Every way to a namespace: by each process, then by each mount, one at a time. Nothing is opened that stays open. An
/// error is one that may not be looked at.
fn ways() -> anyhow::Result<impl Iterator<Item = io::Result<(NetnsId, PathBuf)>>> {
    let processes = fs::read_dir("/proc").context("cannot read /proc; is it mounted?")?.map_while(Result::ok);
    let by_process = processes.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse::<u32>().ok()?;
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        match id_of(&path) {
            Ok(id) => Some(Ok((id, path))),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Some(Err(error)),
            // Gone; or the leader has exited while other threads go on.
            Err(_) => by_thread(pid).map(Ok),
        }
    });
    let mounts = MOUNT_DIRS.into_iter().flat_map(|dir| fs::read_dir(dir).into_iter().flatten().map_while(Result::ok));
    let by_mount = mounts.filter_map(|entry| {
        let path = entry.path();
        match id_of_mount(&path) {
            Ok(id) => Some(Ok((id?, path))),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Some(Err(error)),
            Err(_) => None,
        }
    });
    Ok(by_process.chain(by_mount))
}

fn by_thread(pid: u32) -> Option<(NetnsId, PathBuf)> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.map_while(Result::ok);
    let mut paths = threads.map(|thread| thread.path().join("ns/net"));
    paths.find_map(|path| Some((id_of(&path).ok()?, path)))
}

/// The namespace that is to be found there now: between two looks a process may have gone to another.
fn open_at(path: &Path) -> io::Result<(NetnsId, File)> {
    let file = File::open(path)?;
    let id = inode_of(&file.metadata()?).ok_or_else(past_32_bits)?;
    Ok((id, file))
}

fn id_of(path: &Path) -> io::Result<NetnsId> {
    fs::metadata(path).and_then(|meta| inode_of(&meta).ok_or_else(past_32_bits))
}

fn past_32_bits() -> io::Error {
    io::Error::other("inode past 32 bits")
}

fn inode_of(meta: &fs::Metadata) -> Option<NetnsId> {
    std::os::unix::fs::MetadataExt::ino(meta).try_into().ok()
}

/// `None`: a leftover file with nothing mounted on it, or another kind of namespace.
fn id_of_mount(path: &Path) -> io::Result<Option<NetnsId>> {
    // O_PATH: opening what merely lies there must neither block nor have any effect.
    let file = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let kind = rustix::fs::fstatfs(&file)?.f_type;
    if u64::try_from(kind).ok() != Some(NSFS_MAGIC) {
        return Ok(None);
    }
    Ok(rustix::fs::fstat(&file)?.st_ino.try_into().ok())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc;

    use nix::sched::unshare;

    use super::*;
    use crate::source::diag;

    #[test]
    fn own_is_seen_in_every_way() {
        let own = own().unwrap();
        assert_eq!(of_pid(std::process::id()).unwrap(), own);
        assert!(visible().unwrap().ids().any(|id| id == own));
        open(own).unwrap();
        assert_eq!(of_pid(0).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn another_namespace_is_read_without_moving_the_caller() {
        let (ready, is_ready) = mpsc::channel();
        let (finish, finished) = mpsc::channel::<()>();
        let before = own().unwrap();
        let thread = std::thread::spawn(move || {
            if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
                ready.send(Err(errno)).unwrap();
                return;
            }
            // The loopback device is down in there: only the unspecified address can be bound.
            let listener = TcpListener::bind("0.0.0.0:0").unwrap();
            let namespace = File::open("/proc/thread-self/ns/net").unwrap();
            ready.send(Ok((listener.local_addr().unwrap(), namespace, own().unwrap()))).unwrap();
            let _ = finished.recv();
        });
        match is_ready.recv().unwrap() {
            Err(errno) => eprintln!("NOT TESTED: cannot make a network namespace: {errno}"),
            Ok((endpoint, namespace, id)) => {
                assert_ne!(id, before);
                let dump = dump_in(&namespace, diag::dump).unwrap();
                assert_eq!(dump.netns, id);
                let shown: Vec<_> = dump.sockets.iter().map(|s| (s.endpoint(), s.netns)).collect();
                assert_eq!(shown, [(endpoint, id)]);
                assert_eq!(own().unwrap(), before);
            }
        }
        drop(finish);
        thread.join().unwrap();
    }

    #[test]
    fn a_file_that_is_no_namespace_is_passed_over() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(id_of_mount(file.path()).unwrap(), None);
        assert!(dump_in(file.as_file(), diag::dump).is_err());
    }
}
