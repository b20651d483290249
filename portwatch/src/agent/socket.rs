//! The agent's socket in the file system: made, guarded against a second agent, and removed at the end.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::process::umask;
use tokio::net::UnixListener;

use super::AlreadyRunning;

/// A listening socket and, where it is our own, the lock beside it: who holds the lock is the agent, whatever files an earlier one left.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    /// `None` where a service manager owns it.
    own: Option<(PathBuf, File)>,
}

impl Socket {
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some((path, _lock)) = &self.own {
            // Gone already, or its directory is: nobody finds us by it in either case.
            let _ = fs::remove_file(path);
        }
    }
}

/// Goes on with a socket that a service manager made: it sees to it that there is one agent.
pub(super) fn adopt(listener: StdListener) -> anyhow::Result<Socket> {
    let listener = UnixListener::from_std(listener).context("cannot poll the socket of the service manager")?;
    Ok(Socket { listener, own: None })
}

/// Listens at `path`; everybody may connect, for who may do what is decided by who they are.
pub(super) fn open(path: &Path) -> anyhow::Result<Socket> {
    if let Some(parent) = path.parent() {
        // Whatever the umask: who may write there may put a socket of its own in the place of ours.
        let made = DirBuilder::new().recursive(true).mode(0o755).create(parent);
        made.with_context(|| format!("cannot make {}", parent.display()))?;
    }
    let lock = lock(path)?;
    // We have the lock, so a socket that is there is what an agent that was killed left behind.
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("{} is there and is no socket; choose another with --socket", path.display());
        }
        Ok(_) => fs::remove_file(path).with_context(|| format!("cannot remove the old socket {}", path.display()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
    }
    let listener = bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    listener.set_nonblocking(true).context("cannot make the socket non-blocking")?;
    let listener = UnixListener::from_std(listener).context("cannot poll the socket")?;
    Ok(Socket { listener, own: Some((path.to_owned(), lock)) })
}

/// Born with its mode: a chmod() afterwards would follow whatever has come to stand there.
fn bind(path: &Path) -> io::Result<StdListener> {
    // This process has one thread still.
    let umask = umask(Mode::from_raw_mode(0o111));
    let bound = StdListener::bind(path);
    rustix::process::umask(umask);
    bound
}

/// Nobody else may open it, for who can lock it can keep the agent from starting.
fn lock(path: &Path) -> anyhow::Result<File> {
    let mut name = path.to_owned().into_os_string();
    name.push(".lock");
    let name = PathBuf::from(name);
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&name)
        .with_context(|| format!("cannot make {}", name.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let path = path.display();
            Err(AlreadyRunning(format!("an agent serves {path} already; `portwatch status` shows it")).into())
        }
        Err(errno) => Err(anyhow!("cannot lock {}: {errno}", name.display())),
    }
}
