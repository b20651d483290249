//! Notices that a file may have gone, or that it may be possible now to make it: inotify, so nothing runs meanwhile.
//!
//! The file is watched itself and not its directory, where others may come and go all day: when its last name is
//! removed, its number of links changes, which is told. Each directory above tells when it is itself moved or removed.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Bytes of events that are read at once.
const BUFFER: usize = 4096;

#[derive(Debug)]
pub(super) struct Vigil(AsyncFd<OwnedFd>);

impl Vigil {
    pub(super) fn new() -> io::Result<Vigil> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        // SAFETY: an OwnedFd owns its descriptor and always names the same one, open for as long as it lives.
        Ok(Vigil(unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) }?))
    }

    /// Watches over `path` as the file system is now. Call it before looking whether the file is there: whatever happens
    /// after that look is told then.
    pub(super) fn over(&self, path: &Path) {
        let gone = WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        let mut is_there = self.watch(path, gone | WatchFlags::ATTRIB);
        for directory in path.ancestors().skip(1) {
            // In the nearest one that is there, something may be made that leads to the file.
            let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ATTRIB;
            is_there |= self.watch(directory, if is_there { gone } else { gone | flags } | WatchFlags::ONLYDIR);
        }
    }

    /// Whether there is something to watch; the flags replace those of an earlier watch.
    fn watch(&self, path: &Path, flags: WatchFlags) -> bool {
        inotify::add_watch(self.0.get_ref(), path, flags).is_ok()
    }

    /// Waits until something happened. Cancel safe.
    pub(super) async fn stirred(&self) {
        let mut buffer = [0; BUFFER];
        loop {
            // Fails only while the runtime ends.
            let Ok(mut guard) = self.0.readable().await else { return };
            let mut stirred = false;
            // What it was does not matter: whoever waits looks.
            while rustix::io::read(self.0.get_ref(), &mut buffer).is_ok_and(|count| count > 0) {
                stirred = true;
            }
            guard.clear_ready();
            if stirred {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;

    /// Whether something was told of what `act` does.
    fn tells(path: &Path, act: impl FnOnce()) -> bool {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let vigil = Vigil::new().unwrap();
            vigil.over(path);
            act();
            // inotify queues an event before the system call that causes it returns.
            tokio::time::timeout(Duration::from_millis(20), vigil.stirred()).await.is_ok()
        })
    }

    #[test]
    fn what_matters_to_the_file_is_told_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let file = at("a/b/file");
        let make = || {
            fs::create_dir_all(at("a/b")).unwrap();
            drop(std::os::unix::net::UnixListener::bind(&file));
        };
        make();
        assert!(!tells(&file, || {
            fs::write(at("a/b/other"), "").unwrap();
            fs::remove_file(at("a/b/other")).unwrap();
            fs::create_dir(at("other")).unwrap();
        }));
        // While somebody listens, the inode lives on without a name.
        fs::remove_file(&file).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(&file).unwrap();
        assert!(tells(&file, || fs::remove_file(&file).unwrap()));
        drop(listener);
        make();
        assert!(tells(&file, || fs::rename(&file, at("a/b/moved")).unwrap()));
        make();
        assert!(tells(&file, || fs::rename(at("a"), at("moved")).unwrap()));
        make();
        assert!(tells(&file, || fs::remove_dir_all(at("a")).unwrap()));
        assert!(tells(&file, || fs::create_dir(at("a")).unwrap()));
        assert!(tells(&file, || fs::set_permissions(at("a"), fs::Permissions::from_mode(0o700)).unwrap()));
        assert!(tells(&file, || fs::create_dir(at("a/b")).unwrap()));
        assert!(tells(&file, make));
        assert!(!tells(&file, || {}));
    }
}
