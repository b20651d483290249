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

    /// Watches over these files of one directory as the file system is now. Call it before looking whether they are there:
    /// whatever happens after that look is told then.
    pub(super) fn over(&self, files: &[&Path]) {
        let gone = WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        for (nth, path) in files.iter().enumerate() {
            // What watches the directory for the first file goes on watching it for that one.
            let also = if nth == 0 { WatchFlags::empty() } else { WatchFlags::MASK_ADD };
            let mut is_there = self.watch(path, gone | WatchFlags::ATTRIB | also);
            for directory in path.ancestors().skip(1) {
                // In the nearest one that is there, something may be made that leads to the file.
                let made = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ATTRIB;
                let flags = if is_there { gone } else { gone | made };
                is_there |= self.watch(directory, flags | WatchFlags::ONLYDIR | also);
            }
        }
    }

    /// Whether there is something to watch. The flags replace those of an earlier watch, unless they say to add to them.
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
        tells_of(&[path], act)
    }

    fn tells_of(files: &[&Path], act: impl FnOnce()) -> bool {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let vigil = Vigil::new().unwrap();
            vigil.over(files);
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

    #[test]
    fn of_two_files_the_one_that_is_there_does_not_hide_that_the_other_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let (socket, lock) = (at("agent.sock"), at("agent.sock.lock"));
        for (made, there) in [(&socket, &lock), (&lock, &socket)] {
            fs::write(there, "").unwrap();
            assert!(tells_of(&[&socket, &lock], || fs::write(made, "").unwrap()), "{made:?}");
            assert!(!tells_of(&[&socket, &lock], || fs::write(at("other"), "").unwrap()), "{made:?}");
            assert!(tells_of(&[&socket, &lock], || fs::remove_file(made).unwrap()), "{made:?}");
            fs::remove_file(there).unwrap();
            fs::remove_file(at("other")).unwrap();
        }
        // Nor does a watch from the time when it was gone tell of the others once it is there.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let stirred = async |vigil: &Vigil| tokio::time::timeout(Duration::from_millis(20), vigil.stirred()).await;
            let vigil = Vigil::new().unwrap();
            fs::write(&lock, "").unwrap();
            vigil.over(&[&socket, &lock]);
            fs::write(&socket, "").unwrap();
            assert!(stirred(&vigil).await.is_ok());
            vigil.over(&[&socket, &lock]);
            fs::write(at("other"), "").unwrap();
            assert!(stirred(&vigil).await.is_err());
        });
    }
}
