//! Where a report goes: found, and known to take it, before anybody is signalled; written when all is over.
//!
//! ```text
//!  a file, or none yet       written beside it and renamed, so it is there whole or not at all; what a symlink leads to is
//!                            replaced, and the link stays
//!  a device, a FIFO          written to as it is. A FIFO has no reader before there is something to read, so it is opened
//!                            then
//!  /dev/stdout, /dev/fd/3…   what a process has open already: never replaced, whatever it is
//! ```

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::libc;
use portwatch::render::escape;
use rustix::fs::{Access, AtFlags, CWD, OFlags, PROC_SUPER_MAGIC, accessat, fcntl_getfl, fcntl_setfl, statfs};
use rustix::io::Errno;

use crate::commands::note;

/// As many links as the kernel follows in one path.
const LINKS: usize = 40;

#[derive(Debug)]
pub(super) struct Destination {
    /// As it was named.
    named: PathBuf,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// To be replaced; no part of the path is a link.
    File(PathBuf),
    /// To be opened and written to.
    Stream(PathBuf),
    /// Our own standard output or error. As a socket or somebody else's terminal it could not be opened anew.
    Open(File),
}

impl Destination {
    /// # Errors
    /// No report can be written there.
    pub(super) fn find(path: &Path) -> anyhow::Result<Destination> {
        let place = Place::find(path);
        let place = place.with_context(|| format!("cannot write a report to {}; nobody was signalled", shown(path)))?;
        Ok(Destination { named: path.to_owned(), place })
    }

    /// # Errors
    /// It cannot be written there after all.
    pub(super) fn write(self, text: &str) -> anyhow::Result<()> {
        let named = shown(&self.named);
        let written = match self.place {
            Place::File(path) => return replace(&path, text).with_context(|| format!("cannot write {named}")),
            Place::Stream(path) => open(&path, &named).and_then(|mut file| file.write_all(text.as_bytes())),
            Place::Open(mut file) => file.write_all(text.as_bytes()),
        };
        match written {
            // What was done does not depend on who reads of it.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.with_context(|| format!("cannot write {named}")),
        }
    }
}

impl Place {
    fn find(path: &Path) -> io::Result<Place> {
        let mut path = path.to_owned();
        for _ in 0..LINKS {
            let name = path.file_name().ok_or_else(|| io::Error::other("it is a directory"))?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let directory = fs::canonicalize(parent)?;
            let here = directory.join(name);
            if statfs(&directory)?.f_type == PROC_SUPER_MAGIC {
                return Place::of_descriptor(here);
            }
            let kind = match fs::symlink_metadata(&here) {
                Ok(meta) => meta.file_type(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Place::of_file(here),
                Err(error) => return Err(error),
            };
            if kind.is_file() {
                return Place::of_file(here);
            }
            if !kind.is_symlink() {
                return Place::of_stream(here);
            }
            path = directory.join(fs::read_link(&here)?);
        }
        Err(Errno::LOOP.into())
    }

    /// That a file can be made beside it is tried: permissions do not tell of quotas, or of what is mounted there.
    fn of_file(path: PathBuf) -> io::Result<Place> {
        let beside = beside(&path);
        create(&beside)?;
        fs::remove_file(beside)?;
        Ok(Place::File(path))
    }

    fn of_stream(path: PathBuf) -> io::Result<Place> {
        let kind = fs::metadata(&path)?.file_type();
        let refused = match () {
            () if kind.is_dir() => "it is a directory",
            () if kind.is_socket() => "it is a socket",
            () if kind.is_block_device() => "it is a block device",
            () => {
                accessat(CWD, &path, Access::WRITE_OK, AtFlags::EACCESS)?;
                return Ok(Place::Stream(path));
            }
        };
        Err(io::Error::other(refused))
    }

    /// Of a path in /proc: in practice a descriptor.
    fn of_descriptor(path: PathBuf) -> io::Result<Place> {
        let own = PathBuf::from(format!("/proc/{}/fd", std::process::id()));
        let fd = match path.strip_prefix(own).ok().and_then(Path::to_str) {
            Some("1") => io::stdout().as_fd().try_clone_to_owned()?,
            Some("2") => io::stderr().as_fd().try_clone_to_owned()?,
            _ => return Place::of_stream(path),
        };
        match fcntl_getfl(&fd)?.intersects(OFlags::WRONLY | OFlags::RDWR) {
            true => Ok(Place::Open(File::from(fd))),
            false => Err(Errno::BADF.into()),
        }
    }
}

fn beside(path: &Path) -> PathBuf {
    let mut name: OsString = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    path.with_file_name(name)
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let beside = beside(path);
    let written = create(&beside).and_then(|mut file| file.write_all(text.as_bytes()));
    if let Err(error) = written {
        let _ = fs::remove_file(&beside);
        return Err(error.into());
    }
    // It is not made again: better under another name than lost.
    fs::rename(&beside, path).with_context(|| format!("the report is in {}", shown(&beside)))
}

/// What is open there already, such as a file that a shell made for us, is written to behind what it has.
fn open(path: &Path, named: &str) -> io::Result<File> {
    let open = |flags| OpenOptions::new().append(true).custom_flags(libc::O_NOCTTY | flags).open(path);
    match open(libc::O_NONBLOCK) {
        Ok(file) => {
            let flags = fcntl_getfl(&file)?;
            fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
            Ok(file)
        }
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            note(&format!("the report waits for somebody to read {named}"));
            open(0)
        }
        Err(error) => Err(error),
    }
}

fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy()).into_owned()
}
