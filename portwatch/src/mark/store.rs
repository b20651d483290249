//! Marks kept by name, each a file of a directory that nobody else may look into: the agent's, one for all users, or a
//! user's own ([`crate::place`]).
//!
//! Every step is taken from the directory's descriptor and follows no symbolic link, so whoever could swap one in gets
//! nothing written or read elsewhere. A mark is complete or not there: it is written beside and renamed.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, chmodat, mkdirat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

use super::file;

/// Marks of one owner; the oldest goes when one more is kept.
const OF_ONE: usize = 16;

/// Marks in all: no more owners than this find room.
const OF_ALL: usize = 1024;

const SUFFIX: &str = ".json";

/// rwxr-xr-x.
const PASSABLE: Mode = Mode::from_raw_mode(0o755);

/// A directory of marks.
#[derive(Debug)]
pub struct Store {
    directory: OwnedFd,
    path: PathBuf,
}

impl Store {
    /// The directory that `names` lead to from `base`, each made where it is not there: the last is its owner's alone, the
    /// others may be gone through, as the agent's clients must. `euid` is who runs this.
    ///
    /// # Errors
    /// It cannot be opened, or others may write in it.
    pub fn open(base: &Path, names: &[&str], euid: u32) -> io::Result<Store> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let mut directory = openat(CWD, base, flags, Mode::empty())?;
        for (n, name) in names.iter().enumerate() {
            match mkdirat(&directory, *name, Mode::RWXU) {
                // Whatever the umask.
                Ok(()) if n + 1 < names.len() => chmodat(&directory, *name, PASSABLE, AtFlags::empty())?,
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
            directory = openat(&directory, *name, flags | OFlags::NOFOLLOW, Mode::empty())?;
            let status = rustix::fs::fstat(&directory)?;
            if status.st_uid != euid || status.st_mode & 0o022 != 0 {
                let what = format!("{name} belongs to uid {} or may be written by others", status.st_uid);
                return Err(io::Error::other(what));
            }
        }
        Ok(Store { directory, path: names.iter().fold(base.to_owned(), |path, name| path.join(name)) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps `line` as `name` for an owner, in place of the one that was called so.
    ///
    /// # Errors
    /// It cannot be written; or too many owners keep marks.
    pub fn keep(&self, owner: u32, name: &str, line: &str) -> io::Result<()> {
        self.make_room(owner, &key(owner, name))?;
        // Nobody's but this call's; what a killed process of the same pid left behind is in the way.
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let temporary = format!(".{}.{}", std::process::id(), CALLS.fetch_add(1, Ordering::Relaxed));
        let unlinked = unlinkat(&self.directory, &temporary, AtFlags::empty());
        if let Err(errno) = unlinked
            && errno != Errno::NOENT
        {
            return Err(errno.into());
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.directory, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
        let written = File::from(file).write_all(line.as_bytes());
        let kept = written.and_then(|()| Ok(renameat(&self.directory, &temporary, &self.directory, key(owner, name))?));
        if kept.is_err() {
            let _ = unlinkat(&self.directory, &temporary, AtFlags::empty());
        }
        kept
    }

    /// What is kept as `name` for an owner. `None`: nothing.
    pub fn find(&self, owner: u32, name: &str) -> io::Result<Option<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match openat(&self.directory, key(owner, name), flags, Mode::empty()) {
            Ok(found) => file::bytes(File::from(found)).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes the oldest marks of the owner, so that one more is not too many.
    fn make_room(&self, owner: u32, key: &str) -> io::Result<()> {
        let prefix = format!("{owner}-");
        let mut own: Vec<(i64, i64, String)> = Vec::new();
        let mut all = 0;
        for entry in Dir::read_from(&self.directory)? {
            let Ok(name) = entry?.file_name().to_str().map(str::to_owned) else { continue };
            if !name.ends_with(SUFFIX) || name == key {
                continue;
            }
            all += 1;
            if name.starts_with(&prefix) {
                let status = statat(self.directory.as_fd(), &name, AtFlags::SYMLINK_NOFOLLOW);
                own.extend(status.map(|status| (status.st_mtime, status.st_mtime_nsec as i64, name)));
            }
        }
        own.sort_unstable();
        let too_many = (own.len() + 1).saturating_sub(OF_ONE);
        for (.., name) in own.drain(..too_many) {
            unlinkat(&self.directory, &name, AtFlags::empty())?;
            all -= 1;
        }
        if all >= OF_ALL {
            return Err(io::Error::other(format!("{all} marks are kept already")));
        }
        Ok(())
    }
}

/// An owner's name for it is a file's name of its own: [`super::is_name`] lets nothing else pass.
fn key(owner: u32, name: &str) -> String {
    format!("{owner}-{name}{SUFFIX}")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn euid() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[test]
    fn what_is_kept_is_found_by_its_owner_alone() {
        let base = tempfile::tempdir().unwrap();
        let open = || Store::open(base.path(), &["portwatch", "marks"], euid()).unwrap();
        open().keep(7, "job", "one\n").unwrap();
        open().keep(7, "job", "two\n").unwrap();
        assert_eq!(open().find(7, "job").unwrap().unwrap(), b"two\n");
        assert_eq!((open().find(8, "job").unwrap(), open().find(7, "jo").unwrap()), (None, None));
        let mode = |name: &str| fs::metadata(base.path().join(name)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode("portwatch"), mode("portwatch/marks")), (0o755, 0o700));
        assert_eq!(mode("portwatch/marks/7-job.json"), 0o600);
    }

    #[test]
    fn the_oldest_marks_of_one_owner_go() {
        let base = tempfile::tempdir().unwrap();
        let store = Store::open(base.path(), &["marks"], euid()).unwrap();
        store.keep(1, "other", "x").unwrap();
        for number in 0..20 {
            store.keep(10, &format!("job-{number}"), "x").unwrap();
            let file = File::open(base.path().join(format!("marks/10-job-{number}.json"))).unwrap();
            file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(number)).unwrap();
        }
        let kept: Vec<u64> =
            (0..20).filter(|number| store.find(10, &format!("job-{number}")).unwrap().is_some()).collect();
        assert_eq!(kept, (4..20).collect::<Vec<u64>>());
        assert!(store.find(1, "other").unwrap().is_some());
    }

    #[test]
    fn links_and_what_others_may_write_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        symlink(elsewhere.path(), base.path().join("marks")).unwrap();
        assert!(Store::open(base.path(), &["marks"], euid()).is_err());
        fs::create_dir(base.path().join("open")).unwrap();
        fs::set_permissions(base.path().join("open"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Store::open(base.path(), &["open"], euid()).is_err());
        let store = Store::open(base.path(), &["own"], euid()).unwrap();
        fs::write(elsewhere.path().join("secret"), "secret").unwrap();
        symlink(elsewhere.path().join("secret"), base.path().join("own/1-x.json")).unwrap();
        assert!(store.find(1, "x").is_err());
        store.keep(1, "x", "mine").unwrap();
        assert_eq!(fs::read_to_string(elsewhere.path().join("secret")).unwrap(), "secret");
        assert_eq!(store.find(1, "x").unwrap().unwrap(), b"mine");
        let foreign = Store::open(base.path(), &["own"], euid() + 1);
        assert!(foreign.unwrap_err().to_string().contains("belongs to uid"));
    }
}
