//! The output of a server in the background, in two files at most: `NAME.log`, and `NAME.log.1` with what came before.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Bytes of one file. Two of them are kept, in memory where the directory is a tmpfs.
pub const MAX_BYTES: u64 = 4 * 1024 * 1024;

/// A log that is written.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: File,
    written: u64,
}

/// Where the older half is.
pub fn previous(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

impl Log {
    /// A new one; what was there before is gone.
    pub(super) fn create(path: &Path) -> io::Result<Log> {
        match fs::remove_file(previous(path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Log { path: path.to_owned(), file: open(path)?, written: 0 })
    }

    /// Appends; begins anew where the file is full.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.written > 0 && self.written + bytes.len() as u64 > MAX_BYTES {
            fs::rename(&self.path, previous(&self.path))?;
            self.file = open(&self.path)?;
            self.written = 0;
        }
        self.written += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

/// A new file rather than the old one emptied: who reads the old one reads it to its end.
fn open(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// The last lines, and the file behind them to read on from. The newest file is opened first, so that nothing is missed
/// where the log moves on meanwhile.
///
/// # Errors
/// When there is no log, or it cannot be read.
pub fn tail(path: &Path, lines: usize) -> io::Result<(Vec<u8>, File)> {
    let mut file = File::open(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    if count(&bytes) < lines
        && let Ok(mut older) = File::open(previous(path))
        // Where the log moved on since, that is the one just read.
        && older.metadata()?.ino() != file.metadata()?.ino()
    {
        let mut before = Vec::new();
        older.read_to_end(&mut before)?;
        bytes.splice(0..0, before);
    }
    let from = last_lines(&bytes, lines);
    bytes.drain(..from);
    Ok((bytes, file))
}

fn count(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte == b'\n').count()
}

/// Where the last lines begin; a last one without an end counts.
fn last_lines(bytes: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return bytes.len();
    }
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let ends = body.iter().enumerate().rev().filter(|&(_, &byte)| byte == b'\n');
    ends.map(|(at, _)| at + 1).nth(lines - 1).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_found() {
        for (text, lines, want) in [
            ("", 3, ""),
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 2, "b\nc"),
            ("a\nb\n", 9, "a\nb\n"),
            ("a\n\n\n", 1, "\n"),
            ("a\n", 0, ""),
        ] {
            assert_eq!(&text[last_lines(text.as_bytes(), lines)..], want, "{text:?} {lines}");
        }
    }

    #[test]
    fn a_log_is_bounded_and_its_tail_reaches_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.log");
        let mut log = Log::create(&path).unwrap();
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        for _ in 0..3 * MAX_BYTES / 1024 + 5 {
            log.write(&line).unwrap();
        }
        let sizes = [&path, &previous(&path)].map(|path| fs::metadata(path).unwrap().len());
        assert_eq!(sizes, [5 * 1024, MAX_BYTES]);
        let (bytes, mut file) = tail(&path, 10).unwrap();
        assert_eq!(bytes, line.repeat(10));
        log.write(b"more").unwrap();
        let mut more = String::new();
        file.read_to_string(&mut more).unwrap();
        assert_eq!(more, "more");
        drop(Log::create(&path).unwrap());
        assert_eq!((fs::metadata(&path).unwrap().len(), previous(&path).exists()), (0, false));
    }
}
