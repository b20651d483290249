//! Marks as files: read only where nobody but the reader and root could have written them.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context as _, bail};
use nix::libc;

use super::{MAX_BYTES, Mark};
use crate::render::escape;
use crate::source::process;

/// The id of this boot.
///
/// # Errors
/// When /proc does not tell.
pub fn boot_id() -> anyhow::Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}; is /proc mounted?"))?;
    Ok(id.trim().to_owned())
}

/// The mark in a file that somebody named. `euid` and `egid` are the reader's.
///
/// # Errors
/// There is none, it may not be trusted, or it is none to go by.
pub fn read(path: &Path, euid: u32, egid: u32) -> anyhow::Result<Mark> {
    let shown = || escape(&path.to_string_lossy()).into_owned();
    // A fifo must not block, nor a device be read.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = file.with_context(|| format!("cannot read the mark {}", shown()))?;
    let meta = file.metadata().with_context(|| format!("cannot read the mark {}", shown()))?;
    if let Some(why) = distrust(&meta, euid, egid) {
        bail!("the mark {} {why}; make a new one: portwatch mark", shown());
    }
    let bytes = bytes(file).with_context(|| format!("cannot read the mark {}", shown()))?;
    match Mark::read(&bytes, &boot_id()?, process::boot_ns_now()) {
        Ok(mark) => Ok(mark),
        Err(flaw) => bail!("the mark {} {flaw}", shown()),
    }
}

/// At most one byte more than a mark may have.
pub(super) fn bytes(file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Why what it says decides nothing: somebody else could have written it. The group of a user who is alone in it is not
/// somebody else.
fn distrust(meta: &Metadata, euid: u32, egid: u32) -> Option<String> {
    let writable = |bits| meta.mode() & bits != 0;
    if !meta.is_file() {
        return Some("is no regular file".to_owned());
    }
    if meta.uid() != euid && meta.uid() != 0 {
        return Some(format!("belongs to uid {}, and is not to be trusted", meta.uid()));
    }
    if writable(0o002) || (writable(0o020) && (euid == 0 || meta.gid() != egid)) {
        return Some("may be written by others, and is not to be trusted".to_owned());
    }
    if meta.len() > MAX_BYTES {
        return Some(format!("has {} bytes, more than any mark", meta.len()));
    }
    None
}
