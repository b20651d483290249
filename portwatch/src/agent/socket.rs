//! The agent's socket in the file system: made, guarded against a second agent, made anew where it vanished, and removed
//! at the end.
//!
//! ```text
//!            gone, and the lock is ours or free          it is there again
//!   served ───────────────────────────────► made anew ──────────────────────► served
//!     │  ▲                                      │ cannot be made
//!     │  └──── something changed above it ───── lost ◄── gone, and a service manager made it
//!     └── gone, and another agent has the lock: this one ends
//! ```

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::process::umask;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep_until};

use super::AlreadyRunning;
use super::troubles::{About, Troubles};
use super::vigil::Vigil;

/// How long what was begun there may go on before the socket is made anew: who removes a directory must be done with it.
const SETTLE: Duration = Duration::from_millis(100);

/// How often it is tried again to make it, where nothing tells that it may be possible now.
const REST: Duration = Duration::from_secs(10);

/// A listening socket and, where it is our own, the lock beside it: who holds the lock is the agent, whatever files an
/// earlier one left.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    /// `None` where it has no name in the file system.
    place: Option<Place>,
    /// Whether we made it, and not a service manager.
    is_own: bool,
    lock: Option<File>,
    troubles: Troubles,
    /// When to look whether it is still there: soon after something happened, and now and then while it is lost.
    look_at: Option<Instant>,
    is_stirred: bool,
}

#[derive(Debug)]
struct Place {
    path: PathBuf,
    /// What has that name as long as clients find us by it.
    id: Option<FileId>,
    /// `None` where this host has no inotify to spare.
    vigil: Option<Vigil>,
}

/// Device and inode.
type FileId = (u64, u64);

fn id_of(path: &Path) -> Option<FileId> {
    fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

impl Place {
    fn new(path: PathBuf) -> Place {
        let vigil = Vigil::new().inspect_err(|error| {
            tracing::warn!("cannot watch over the socket: {error}; should it vanish, start the agent anew");
        });
        Place { id: id_of(&path), path, vigil: vigil.ok() }
    }

    fn is_ours(&self) -> bool {
        self.id.is_some() && id_of(&self.path) == self.id
    }
}

impl Socket {
    /// Goes on with a socket that a service manager made: it sees to it that there is one agent.
    pub(super) fn adopt(listener: StdListener, troubles: Troubles) -> anyhow::Result<Socket> {
        let address = listener.local_addr().context("cannot tell where the service manager listens")?;
        // In the file system that a service is shown, its socket may have no place: then nobody can look after it.
        let place = address.as_pathname().map(|path| Place::new(path.to_owned())).filter(Place::is_ours);
        let listener = UnixListener::from_std(listener).context("cannot poll the socket of the service manager")?;
        Socket { listener, place, is_own: false, lock: None, troubles, look_at: None, is_stirred: false }.watched()
    }

    /// Listens at `path`; everybody may connect, for who may do what is decided by who they are.
    pub(super) fn open(path: &Path, troubles: Troubles) -> anyhow::Result<Socket> {
        let path = std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()))?;
        let mut lock = None;
        let listener = listen(&path, &mut lock)?;
        Socket {
            listener,
            place: Some(Place::new(path)),
            is_own: true,
            lock,
            troubles,
            look_at: None,
            is_stirred: false,
        }
        .watched()
    }

    fn watched(mut self) -> anyhow::Result<Socket> {
        self.look_after()?;
        Ok(self)
    }

    /// The next connection. Cancel safe.
    ///
    /// # Errors
    /// When one cannot be taken now, as for want of descriptors; and [`AlreadyRunning`], where another agent has taken the
    /// place of this one.
    pub(super) async fn accept(&mut self) -> anyhow::Result<UnixStream> {
        loop {
            let vigil = self.place.as_ref().and_then(|place| place.vigil.as_ref());
            let stirred = async {
                match vigil {
                    Some(vigil) => vigil.stirred().await,
                    None => std::future::pending().await,
                }
            };
            let due = async {
                match self.look_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                accepted = self.listener.accept() => return Ok(accepted?.0),
                () = stirred, if !self.is_stirred => {
                    self.is_stirred = true;
                    self.look_at = Some(Instant::now() + SETTLE);
                }
                () = due => self.look_after()?,
            }
        }
    }

    /// Makes it anew where it is gone.
    fn look_after(&mut self) -> anyhow::Result<()> {
        let Some(place) = &mut self.place else { return Ok(()) };
        let shown = place.path.display().to_string();
        let trouble = loop {
            if let Some(vigil) = &place.vigil {
                match self.is_own {
                    true => vigil.over(&[&place.path, &lock_path(&place.path)]),
                    false => vigil.over(&[&place.path]),
                }
            }
            if place.is_ours() {
                // Without the lock a second agent would take our place.
                match if self.is_own { hold_lock(&place.path, &mut self.lock) } else { Ok(false) } {
                    Ok(true) => continue,
                    Ok(false) => break None,
                    Err(error) if error.is::<AlreadyRunning>() => return Err(error),
                    Err(error) => break Some(format!("the lock of the socket {shown} is gone: {error:#}")),
                }
            }
            if !self.is_own {
                let next = "`systemctl restart portwatch.socket` makes it anew";
                break Some(format!("the socket {shown} of the service manager is gone; {next}"));
            }
            match listen(&place.path, &mut self.lock) {
                Ok(listener) => {
                    tracing::warn!("the socket {shown} was gone, and is made anew");
                    (self.listener, place.id) = (listener, id_of(&place.path));
                }
                Err(error) if error.is::<AlreadyRunning>() => return Err(error),
                Err(error) => break Some(format!("the socket {shown} is gone and cannot be made anew: {error:#}")),
            }
        };
        self.is_stirred = false;
        self.look_at = trouble.is_some().then(|| Instant::now() + REST);
        self.troubles.set(About::Socket, trouble);
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(place) = &self.place
            && self.is_own
            && place.is_ours()
        {
            // Gone already, or its directory is: nobody finds us by it in either case.
            let _ = fs::remove_file(&place.path);
        }
    }
}

/// Listens at `path`, with the lock that goes with it: the one at hand as long as it is the one that others would meet.
fn listen(path: &Path, lock: &mut Option<File>) -> anyhow::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        // Whatever the umask: who may write there may put a socket of its own in the place of ours.
        let made = DirBuilder::new().recursive(true).mode(0o755).create(parent);
        made.with_context(|| format!("cannot make {}", parent.display()))?;
    }
    hold_lock(path, lock)?;
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
    UnixListener::from_std(listener).context("cannot poll the socket")
}

fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(".lock");
    PathBuf::from(name)
}

/// Whether a second agent would meet this lock: the file may have vanished with its directory.
fn is_locked_by(path: &Path, lock: &File) -> bool {
    let id = lock.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    id.is_some() && id_of(&lock_path(path)) == id
}

/// Sees to it that we have the lock that others would meet; says whether it had to be made anew.
fn hold_lock(path: &Path, lock: &mut Option<File>) -> anyhow::Result<bool> {
    let is_held = lock.as_ref().is_some_and(|lock| is_locked_by(path, lock));
    if !is_held {
        *lock = Some(self::lock(path)?);
    }
    Ok(!is_held)
}

/// Born with its mode: a chmod() afterwards would follow whatever has come to stand there.
fn bind(path: &Path) -> io::Result<StdListener> {
    let path = path.to_owned();
    // The umask belongs to all threads of a process, but for one that parted with the others.
    let bind = move || {
        unshare(CloneFlags::CLONE_FS)?;
        umask(Mode::from_raw_mode(0o111));
        StdListener::bind(path)
    };
    let bound = thread::Builder::new().spawn(bind)?.join();
    bound.unwrap_or_else(|_| Err(io::Error::other("its thread panicked")))
}

/// Nobody else may open it, for who can lock it can keep the agent from starting.
fn lock(path: &Path) -> anyhow::Result<File> {
    let name = lock_path(path);
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
