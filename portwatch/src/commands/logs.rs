//! `portwatch logs NAME`: what a server in the background has said, and says.

use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use portwatch::render::escape;
use portwatch::run::log;
use portwatch::run::register::{Register, check_name};
use portwatch::source::process::is_alive;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};

use super::note;
use crate::cli::Globals;
use crate::exit_codes::NO;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch logs python3-8000
  portwatch logs python3-8000 -f -n 0

Both outputs of the server, the last 4 to 8 MiB of them, also after its end. On a terminal, control
characters are shown and not obeyed.

Exit codes: 0 done, 1 there is no log by that name, 2 usage, 4 portwatch itself failed")]
pub(crate) struct LogsArgs {
    /// The server, as `portwatch ps` names it
    #[arg(value_name = "NAME", value_parser = check_name)]
    pub(crate) name: String,
    /// Go on until the server ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// How many lines to begin with
    #[arg(short = 'n', long, default_value_t = 100, value_name = "N")]
    pub(crate) lines: usize,
}

pub(crate) fn run(args: &LogsArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    super::works_alone(globals)?;
    let register = Register::open()?;
    let path = register.log_path(&args.name);
    // Before anything is read, so that no change falls in between.
    let watcher =
        if args.follow { register.find(&args.name).and_then(|record| record.supervisors()[0].take()) } else { None };
    let changes = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).context("cannot watch files")?;
    let flags = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_FROM;
    add_watch(&changes, register.directory(), flags).context("cannot watch the directory of logs")?;
    let (bytes, file) = match log::tail(&path, args.lines) {
        Ok(read) => read,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            note(&format!("error: no server called {} has a log; see `portwatch ps`", args.name));
            return Ok(ExitCode::from(NO));
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", escape(&path.to_string_lossy()))),
    };
    let mut output = Output::new();
    output.show(&bytes)?;
    if let Some(watcher) = watcher {
        follow(file, &path, &changes, &watcher, &mut output)?;
    }
    output.end()?;
    Ok(ExitCode::SUCCESS)
}

/// Shows what is appended until the server has ended.
fn follow(
    mut file: File,
    path: &Path,
    changes: &OwnedFd,
    watcher: &OwnedFd,
    output: &mut Output,
) -> anyhow::Result<()> {
    loop {
        // Asked before it is read: what was said until the end is read after it.
        let is_over = !is_alive(watcher);
        loop {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).context("cannot read the log")?;
            output.show(&bytes)?;
            // The log goes on in another file where that one was full.
            let next = File::open(path).ok().filter(|next| inode(next) != inode(&file));
            let Some(next) = next else { break };
            // What came between the last reading and the change of files.
            let mut rest = Vec::new();
            file.read_to_end(&mut rest).context("cannot read the log")?;
            output.show(&rest)?;
            file = next;
        }
        if is_over {
            return Ok(());
        }
        let mut fds = [PollFd::from_borrowed_fd(changes.as_fd(), PollFlags::IN), PollFd::new(watcher, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the log"),
        }
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = Reader::new(changes, &mut buffer);
        // That something changed is all that matters.
        while events.next().is_ok() {}
    }
}

fn inode(file: &File) -> Option<u64> {
    let status: fs::Metadata = file.metadata().ok()?;
    Some(status.ino())
}

/// Standard output: bytes as they are, but on a terminal.
struct Output {
    terminal: bool,
    /// The beginning of a line that is not complete.
    rest: Vec<u8>,
}

impl Output {
    fn new() -> Output {
        Output { terminal: io::stdout().is_terminal(), rest: Vec::new() }
    }

    fn show(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        if !self.terminal {
            return write(bytes);
        }
        self.rest.extend_from_slice(bytes);
        let whole = self.rest.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
        let lines: Vec<u8> = self.rest.drain(..whole).collect();
        write(harmless(&lines).as_bytes())
    }

    fn end(&mut self) -> anyhow::Result<()> {
        write(harmless(&std::mem::take(&mut self.rest)).as_bytes())
    }
}

fn write(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).context("cannot write to standard output")
}

/// Line by line, with tabs.
fn harmless(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let line = |line: &str| {
        let words: Vec<_> = line.strip_suffix('\r').unwrap_or(line).split('\t').map(escape).collect();
        words.join("\t")
    };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_obeyed() {
        for (bytes, want) in [
            (&b"GET /\t200\r\n"[..], "GET /\t200\n"),
            (b"\x1b[2Jx\n\n", "\\x1b[2Jx\n\n"),
            (b"\xff", "\u{fffd}"),
            (b"", ""),
        ] {
            assert_eq!(harmless(bytes), want);
        }
    }
}
