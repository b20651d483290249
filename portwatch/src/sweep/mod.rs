//! Removes the working directory of a server that was ended, and nothing else, whoever tries to redirect that.
//!
//! ```text
//!  Pin::of ───── the server is ended ─────► guards ──► walk from / ──► the same inode? ──► empty it ──► rmdir
//!  (its cwd as a descriptor,                (homes,     (no symlink,    (as pinned)         (no symlink, no mount,
//!   while it lives)                          mounts,     nobody's                            by descriptors)
//!                                            others)     powers but its user's)
//! ```
//!
//! Owns what may be removed ([`guards`]), with whose powers ([`user`]) and how ([`tree`]). Whoever owns the directory may
//! rename, replace and link anything in it at any moment, so:
//! - Which directory is meant is an inode, pinned by a descriptor while the process is there: it was that one's working
//!   directory, and the inode's number is not used again as long as the descriptor is open. What its name leads to later
//!   counts only if it is that inode.
//! - Everything is opened relative to a descriptor, by one name without a symbolic link or a mount on it, and unlinked
//!   relative to the descriptor of the directory that it is in. No path is resolved twice.
//! - It is done by a thread that has the file-system uid and gid of the process, no other groups and no capabilities: the
//!   kernel refuses whatever the user could not remove. Root lends its patience, not its powers.
//! - Only directories of that user are entered, so that nobody else can slip him something of his that lies in theirs.
//!
//! What is left: a directory that its owner moves out while it is being emptied is emptied further at its new place. It
//! was in the tree when it was entered, it is his, and only he could move it.

mod guards;
mod tree;
mod user;

#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use globset::{GlobBuilder, GlobMatcher};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::model::ProcessId;
use crate::source::process;

/// Which directories may be removed: as a shell reads it, so that `*` stands for one name and never for `/`, unlike
/// where processes are selected by it.
///
/// # Errors
/// What is wrong with it, in a few words.
pub fn directory_glob(text: &str) -> Result<GlobMatcher, String> {
    // Bounded there.
    crate::select::glob(text)?;
    if !text.starts_with('/') {
        return Err("a directory to remove begins with /, such as /tmp/web_*".to_owned());
    }
    let glob = GlobBuilder::new(text.trim_end_matches('/')).literal_separator(true).build();
    glob.map(|glob| glob.compile_matcher()).map_err(|error| error.kind().to_string())
}

/// Which directory it is, for as long as somebody has it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Inode {
    device: u64,
    number: u64,
}

/// The working directory of a process, taken hold of while it was there.
#[derive(Debug)]
pub struct Pin {
    process: ProcessId,
    pidfd: OwnedFd,
    /// Keeps the inode's number from being used again.
    _directory: OwnedFd,
    inode: Inode,
    /// Where it was.
    path: PathBuf,
    /// Effective ids of the process.
    uid: u32,
    gid: u32,
}

/// What became of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swept {
    Removed(Removed),
    Kept(Kept),
}

/// A directory that is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// Hostile text.
    pub path: String,
    #[serde(flatten)]
    pub amount: Amount,
}

/// A directory that is still there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Hostile text; `?` where it could not be read.
    pub path: String,
    /// A few words, of which some may be hostile.
    pub reason: String,
    /// What was removed from it before the reason was met.
    #[serde(flatten)]
    pub amount: Amount,
}

/// How much was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// Everything but directories.
    pub files: u64,
    pub directories: u64,
    /// What the file system has back; of a file with other names nothing.
    pub bytes: u64,
}

impl Pin {
    /// Takes hold of the working directory of this very process.
    ///
    /// # Errors
    /// `NotFound`: the process is gone, whoever has its number now. Else the directory may not be looked at.
    pub fn of(process: ProcessId) -> io::Result<Pin> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let number = i32::try_from(process.pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
        let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|_| gone())?;
        // Everything is read through this descriptor, which is of the process and not of its number.
        let dir = process::open_exact(process).ok_or_else(gone)?;
        let (uid, gid) = process::effective_ids(dir.as_fd()).ok_or_else(gone)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(&dir, c"cwd", flags, Mode::empty())?;
        let path = rustix::fs::readlinkat(&dir, c"cwd", Vec::new())?;
        let inode = Inode::of(&directory)?;
        // Alive now, so it had its number all the time: what was read is of the process of the pidfd.
        if !process::is_alive(&pidfd) {
            return Err(gone());
        }
        Ok(Pin {
            process,
            pidfd,
            _directory: directory,
            inode,
            path: OsStr::from_bytes(path.to_bytes()).into(),
            uid,
            gid,
        })
    }

    /// Waits until the process has ended; false where it lives after `patience`.
    pub fn has_ended(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], left.as_ref()) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                // Not known to have ended: nothing is built on it.
                Err(_) => return false,
            }
        }
    }

    /// Whether both are the same directory, however it is called.
    pub fn is_same(&self, other: &Pin) -> bool {
        self.inode == other.inode
    }

    /// Where the directory was; hostile text.
    pub fn path(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }

    fn kept(&self, reason: String, amount: Amount) -> Swept {
        Swept::Kept(Kept { path: self.path(), reason, amount })
    }
}

impl Inode {
    fn of(file: impl AsFd) -> io::Result<Inode> {
        // Without asking a file system that a user's program or another host may serve: neither number ever changes.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(file, c"", flags, rustix::fs::StatxFlags::INO)?;
        let device = rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor);
        Ok(Inode { device, number: found.stx_ino })
    }
}

/// Whether the directory would be removed once the processes `ending` are gone.
///
/// # Errors
/// Why it would not, in a few words.
pub fn may_remove(pin: &Pin, glob: &GlobMatcher, ending: &[u32]) -> Result<(), String> {
    guards::check(pin, glob, ending)
}

/// Removes the directory once its process has ended. Takes a minute at most.
pub fn remove(pin: &Pin, glob: &GlobMatcher) -> Swept {
    if !pin.has_ended(Duration::ZERO) {
        return pin.kept(format!("{} did not end", pin.process.pid), Amount::default());
    }
    if let Err(reason) = guards::check(pin, glob, &[]) {
        return pin.kept(reason, Amount::default());
    }
    let mut amount = Amount::default();
    match user::run_as(pin.uid, pin.gid, || remove_tree(pin, &mut amount)) {
        Ok(Ok(())) => Swept::Removed(Removed { path: pin.path(), amount }),
        Ok(Err(reason)) => pin.kept(reason, amount),
        Err(error) => {
            pin.kept(format!("cannot act as uid {}, whose it is: {error}; try sudo", pin.uid), Amount::default())
        }
    }
}

/// With the powers of the directory's owner.
fn remove_tree(pin: &Pin, amount: &mut Amount) -> Result<(), String> {
    let (Some(parent), Some(name)) = (pin.path.parent(), pin.path.file_name()) else {
        return Err("it has no parent".to_owned());
    };
    let cannot = |deed: &str, error: rustix::io::Errno| format!("cannot {deed}: {error}");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let parent = rustix::fs::openat2(CWD, parent, flags, Mode::empty(), resolve)
        .map_err(|error| cannot("open the directory that it is in", error))?;
    let name = std::ffi::CString::new(name.as_bytes()).map_err(|error| error.to_string())?;
    let top = tree::open_below(&parent, &name).map_err(|error| match error {
        rustix::io::Errno::XDEV => "something is mounted on it".to_owned(),
        error => cannot("open it", error),
    })?;
    if Inode::of(&top).ok() != Some(pin.inode) {
        return Err("its name leads to something else now".to_owned());
    }
    tree::empty(top, pin.uid, amount)?;
    // By name, for there is no other way: at worst an empty directory that its owner put there meanwhile.
    rustix::fs::unlinkat(&parent, &name, AtFlags::REMOVEDIR).map_err(|error| cannot("remove it", error))?;
    amount.directories += 1;
    Ok(())
}

/// Whether the path has a parent that is not `/`.
fn is_deep(path: &Path) -> bool {
    path.is_absolute() && path.components().count() > 2
}
