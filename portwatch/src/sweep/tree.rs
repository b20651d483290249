//! Empties a directory that may change all the time.
//!
//! One descriptor for each level that it is in, and never a path: a name is looked up in the directory that is open, and
//! only there. It is unlinked first; what turns out to be a directory is opened, without following a link or crossing a
//! mount, and is the next level. A directory is read again until nothing in it could be removed any more.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, ResolveFlags, SeekFrom};
use rustix::io::Errno;

use super::Amount;

/// Levels, each with a descriptor.
const MAX_DEPTH: usize = 128;

/// So long it may take: somebody may fill the directory as fast as it is emptied.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of names that are read at once.
const BATCH: usize = 32 << 10;

/// A directory that is being emptied.
struct Level {
    directory: OwnedFd,
    /// Its name in the level above; empty for the first.
    name: CString,
    /// Read, and not tried yet.
    names: Vec<CString>,
    /// Whether something was removed since it was read from its beginning: names may have been passed over then.
    changed: bool,
}

/// Opens a directory by its name in another one. `ELOOP`: it is a symbolic link. `EXDEV`: it is a mount point.
pub(super) fn open_below(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve)
}

/// Removes all that is in the directory `top` and in directories of `uid` below it.
///
/// # Errors
/// The first reason why something is left, in a few words.
pub(super) fn empty(top: OwnedFd, uid: u32, amount: &mut Amount) -> Result<(), String> {
    let until = Instant::now() + PATIENCE;
    let mut left = Vec::new();
    let mut levels = vec![Level::new(top, CString::default())];
    loop {
        let depth = levels.len();
        let Some(level) = levels.last_mut() else { break };
        if Instant::now() > until {
            return Err(format!("it is not empty after {} s; try again", PATIENCE.as_secs()));
        }
        let Some(name) = level.next() else {
            let Some(Level { name, .. }) = levels.pop() else { break };
            let Some(above) = levels.last_mut() else { break };
            match rustix::fs::unlinkat(&above.directory, &name, AtFlags::REMOVEDIR) {
                Ok(()) => {
                    above.changed = true;
                    amount.directories += 1;
                }
                Err(Errno::NOENT) => {}
                // Something else by now, which is met when the directory above is read again.
                Err(Errno::NOTDIR) => above.changed = true,
                // Why something is left in it is known already, unless it came since.
                Err(Errno::NOTEMPTY) if !left.is_empty() => {}
                Err(error) => left.push(reason(&name, &format!("cannot be removed: {error}"))),
            }
            continue;
        };
        match unlink(level, &name, amount) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => match enter(level, &name, uid) {
                Ok(_) if depth >= MAX_DEPTH => {
                    left.push(reason(&name, &format!("is deeper than {MAX_DEPTH} directories")));
                }
                Ok(directory) => levels.push(Level::new(directory, name)),
                // Gone, or something else now: it is met again when the directory is read again.
                Err(Refusal::Changed) => level.changed = true,
                Err(Refusal::Left(why)) => left.push(reason(&name, &why)),
            },
            Err(error) => left.push(reason(&name, &format!("cannot be removed: {error}"))),
        }
        // One is told; the others would fill the memory.
        left.truncate(1);
    }
    left.pop().map_or(Ok(()), Err)
}

fn reason(name: &CStr, why: &str) -> String {
    format!("'{}' in it {why}", name.to_string_lossy())
}

/// A name itself, whatever it leads to.
fn unlink(level: &mut Level, name: &CStr, amount: &mut Amount) -> Result<(), Errno> {
    let before = rustix::fs::statat(&level.directory, name, AtFlags::SYMLINK_NOFOLLOW);
    rustix::fs::unlinkat(&level.directory, name, AtFlags::empty())?;
    level.changed = true;
    amount.files += 1;
    // 512-byte units, whatever the file system's block is: see stat(2).
    let freed = before.ok().filter(|file| file.st_nlink == 1).map_or(0, |file| file.st_blocks.cast_unsigned() * 512);
    amount.bytes += freed;
    Ok(())
}

enum Refusal {
    Changed,
    Left(String),
}

fn enter(level: &Level, name: &CStr, uid: u32) -> Result<OwnedFd, Refusal> {
    let directory = open_below(&level.directory, name).map_err(|error| match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::AGAIN => Refusal::Changed,
        Errno::XDEV => Refusal::Left("is a mount point".to_owned()),
        error => Refusal::Left(format!("cannot be opened: {error}")),
    })?;
    match rustix::fs::fstat(&directory) {
        Ok(status) if status.st_uid == uid => Ok(directory),
        Ok(status) => Err(Refusal::Left(format!("is a directory of uid {}", status.st_uid))),
        Err(error) => Err(Refusal::Left(format!("cannot be looked at: {error}"))),
    }
}

impl Level {
    fn new(directory: OwnedFd, name: CString) -> Level {
        Level { directory, name, names: Vec::new(), changed: false }
    }

    /// The next name to try; `None` once all that are left were tried in vain.
    fn next(&mut self) -> Option<CString> {
        loop {
            if let Some(name) = self.names.pop() {
                return Some(name);
            }
            self.read();
            if self.names.is_empty() {
                if !std::mem::take(&mut self.changed) {
                    return None;
                }
                rustix::fs::seek(&self.directory, SeekFrom::Start(0)).ok()?;
            }
        }
    }

    /// The next batch of names. What cannot be read is left.
    fn read(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); BATCH];
        let mut entries = RawDir::new(&self.directory, &mut buffer);
        while let Some(Ok(entry)) = entries.next() {
            let name = entry.file_name();
            if name != c"." && name != c".." {
                self.names.push(name.to_owned());
            }
            if entries.is_buffer_empty() && !self.names.is_empty() {
                break;
            }
        }
    }
}
