//! The database as files: made with the right mode, measured, moved aside when damaged.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::Access;

/// Whoever runs the agent writes, its group reads. SQLite gives the log beside it the same.
const MODE: u32 = 0o640;

/// Damaged databases that are kept.
const KEPT: usize = 2;

const ASIDE: &str = ".corrupt-";

/// Which file it is, whatever its name.
pub(super) type FileId = (u64, u64);

/// The file, made empty where there is none; its directory too, if that is all that is missing. An error where it cannot
/// be written.
///
/// A file that is there is not opened: closing it would take away the locks that SQLite holds on it for this process.
pub(super) fn create(path: &Path) -> io::Result<FileId> {
    let create = || OpenOptions::new().write(true).create_new(true).mode(MODE).open(path);
    let created = create().or_else(|error| match path.parent() {
        Some(directory) if error.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().mode(0o750).create(directory).and_then(|()| create())
        }
        _ => Err(error),
    });
    match created {
        // Whatever the umask.
        Ok(file) => file.set_permissions(fs::Permissions::from_mode(MODE))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => access(path, Access::WRITE_OK)?,
        Err(error) => return Err(error),
    }
    id(path).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Whether the file can be read; not opened, for the same reason.
pub(super) fn is_readable(path: &Path) -> io::Result<()> {
    access(path, Access::READ_OK)
}

fn access(path: &Path, how: Access) -> io::Result<()> {
    Ok(rustix::fs::access(path, how)?)
}

/// `None`: nothing has that name now, or it may not be looked at.
pub(super) fn id(path: &Path) -> Option<FileId> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Bytes of the file; 0 where there is none.
pub(super) fn bytes(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

pub(super) fn log_of(path: &Path) -> PathBuf {
    with_suffix(path, "-wal")
}

/// Moves the database and its log away, for whoever wants to look at them, and removes the oldest that were. The new
/// name.
pub(super) fn set_aside(path: &Path, now: Timestamp) -> io::Result<PathBuf> {
    let stamp = now.strftime("%Y%m%dT%H%M%S");
    let names = (0..100).map(|n| {
        with_suffix(path, &if n == 0 { format!("{ASIDE}{stamp}Z") } else { format!("{ASIDE}{stamp}Z.{n:02}") })
    });
    let aside = names.into_iter().find(|name| !name.exists()).unwrap_or_else(|| with_suffix(path, ASIDE));
    // The database first: SQLite drops a log that it finds beside an empty database, and reads any other.
    fs::rename(path, &aside)?;
    for (suffix, keep) in [("-wal", true), ("-shm", false)] {
        let beside = with_suffix(path, suffix);
        let done = if keep { fs::rename(&beside, with_suffix(&aside, suffix)) } else { fs::remove_file(&beside) };
        done.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })?;
    }
    forget_old(path);
    Ok(aside)
}

/// A file that cannot be removed is the next one's problem: nothing depends on it.
fn forget_old(path: &Path) {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return;
    };
    let prefix = format!("{name}{ASIDE}");
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut aside: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(&prefix) && !name.ends_with("-wal"))
        .collect();
    aside.sort();
    for old in aside.iter().rev().skip(KEPT) {
        let _ = fs::remove_file(directory.join(old));
        let _ = fs::remove_file(directory.join(format!("{old}-wal")));
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}
