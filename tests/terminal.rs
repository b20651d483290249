//! A terminal of the test's own: what a program says on it, and what a person would type.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::puppet::{PATIENCE, wait_readable};
use crate::subject::pidfd;

/// A byte that no program under test says.
const MARK: u8 = 4;

pub struct Terminal {
    controller: File,
    /// The side that programs see, kept open so that the terminal outlives them.
    side: File,
    /// Everything said so far, without carriage returns: the terminal adds them to every line end.
    pub said: String,
    /// How much of it was waited for already.
    heard: usize,
    /// A character that is not complete yet.
    rest: Vec<u8>,
}

impl Terminal {
    pub fn new(columns: u16) -> Self {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo terminal");
        grantpt(&controller).expect("grantpt");
        unlockpt(&controller).expect("unlockpt");
        let path = ptsname(&controller, Vec::new()).expect("ptsname");
        let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&controller, size).expect("TIOCSWINSZ");
        let side = File::options().read(true).write(true).open(OsStr::from_bytes(path.as_bytes())).expect("terminal");
        Terminal { controller: File::from(controller), side, said: String::new(), heard: 0, rest: Vec::new() }
    }

    /// A copy of the side that programs see.
    pub fn stdio(&self) -> Stdio {
        Stdio::from(OwnedFd::from(self.side.try_clone().expect("dup")))
    }

    /// Runs a command with all three streams on this terminal.
    pub fn spawn(&self, command: &mut Command) -> Child {
        command.env("TERM", "xterm").stdin(self.stdio()).stdout(self.stdio()).stderr(self.stdio());
        command.spawn().expect("portwatch on a terminal")
    }

    /// Types, once the program said `prompt` after what was waited for before.
    #[track_caller]
    pub fn answer(&mut self, prompt: &str, keys: &str) {
        self.until(prompt);
        self.controller.write_all(keys.as_bytes()).expect("typing");
    }

    /// Waits until the program said this after what was waited for before.
    #[track_caller]
    pub fn until(&mut self, text: &str) {
        loop {
            if let Some(at) = self.said[self.heard..].find(text) {
                self.heard += at + text.len();
                return;
            }
            assert!(wait_readable(&self.controller), "no '{text}' on the terminal: {}", self.said);
            self.read();
        }
    }

    fn read(&mut self) {
        let mut chunk = [0; 4096];
        let length = match self.controller.read(&mut chunk) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("terminal: {error}"),
        };
        self.rest.extend(chunk[..length].iter().filter(|&&byte| byte != b'\r'));
        let whole = match str::from_utf8(&self.rest) {
            Ok(text) => text.len(),
            Err(error) => error.valid_up_to(),
        };
        let text: Vec<u8> = self.rest.drain(..whole).collect();
        self.said.push_str(&String::from_utf8(text).expect("valid up to there"));
    }

    /// Waits for the end of the program, reading what it says; its exit code.
    #[track_caller]
    pub fn end(&mut self, mut child: Child) -> Option<i32> {
        let ended = pidfd(&child);
        loop {
            let mut fds = [PollFd::new(&ended, PollFlags::IN), PollFd::new(&self.controller, PollFlags::IN)];
            let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
            assert!(poll(&mut fds, Some(&limit)).expect("poll") > 0, "portwatch hangs on the terminal: {}", self.said);
            let (is_over, is_talking) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
            if is_talking {
                self.read();
            } else if is_over {
                break;
            }
        }
        // The kernel brings what was said to this side a moment later: a mark that is said last comes last.
        self.side.write_all(&[MARK]).expect("terminal");
        while self.said.as_bytes().last() != Some(&MARK) {
            assert!(wait_readable(&self.controller), "the terminal is silent");
            self.read();
        }
        self.said.pop();
        child.wait().expect("wait").code()
    }

    /// Whether lines are edited and keys echoed, as a shell leaves it to the programs that it starts.
    pub fn is_cooked(&self) -> bool {
        let modes = tcgetattr(&self.side).expect("tcgetattr").local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }
}
