//! A terminal of the test's own: what a program says on it, and what a person would type.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::libc;
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
    /// How much of it was there when keys were typed last.
    typed: usize,
    /// A character that is not complete yet.
    rest: Vec<u8>,
}

impl Terminal {
    pub fn new(columns: u16) -> Self {
        Terminal::sized(24, columns)
    }

    pub fn sized(rows: u16, columns: u16) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = openpt(flags).expect("a pseudo terminal");
        grantpt(&controller).expect("grantpt");
        unlockpt(&controller).expect("unlockpt");
        let path = ptsname(&controller, Vec::new()).expect("ptsname");
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&controller, size).expect("TIOCSWINSZ");
        // Else it could become the terminal of the tests themselves.
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let side = options.open(OsStr::from_bytes(path.as_bytes())).expect("terminal");
        let controller = File::from(controller);
        Terminal { controller, side, said: String::new(), heard: 0, typed: 0, rest: Vec::new() }
    }

    /// A copy of the side that programs see.
    pub fn stdio(&self) -> Stdio {
        Stdio::from(OwnedFd::from(self.side.try_clone().expect("dup")))
    }

    /// Runs a command with all three streams on this terminal.
    pub fn spawn(&self, command: &mut Command) -> Child {
        self.connect(command.env("TERM", "xterm")).spawn().expect("a program on a terminal")
    }

    /// As [`Terminal::spawn`], in a session of its own, so that `/dev/tty` is not the terminal that the tests run on.
    pub fn spawn_apart(&self, command: &mut Command) -> Child {
        // SAFETY: setsid is async-signal-safe and touches only the child.
        unsafe {
            command.pre_exec(|| match libc::setsid() {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        self.spawn(command)
    }

    fn connect<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.stdin(self.stdio()).stdout(self.stdio()).stderr(self.stdio())
    }

    /// As [`Terminal::spawn`], with this as its controlling terminal, as a shell has it, and with its own `TERM`. With
    /// its end the terminal hangs up: nothing more is to be read.
    pub fn lead(&self, command: &mut Command) -> Child {
        // SAFETY: setsid and ioctl are async-signal-safe and touch only the child.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        self.connect(command).spawn().expect("a program with a terminal of its own")
    }

    /// Types; whatever was said before is done with.
    pub fn type_keys(&mut self, keys: &str) {
        (self.heard, self.typed) = (self.said.len(), self.said.len());
        self.controller.write_all(keys.as_bytes()).expect("typing");
    }

    /// What was said since [`Terminal::type_keys`], echoes included.
    pub fn since_typed(&self) -> &str {
        &self.said[self.typed..]
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

    /// Waits until the program says more, for as long as it may take.
    #[track_caller]
    pub fn more(&mut self, limit: Duration) {
        let limit = Timespec::try_from(limit).expect("a time");
        let talks = poll(&mut [PollFd::new(&self.controller, PollFlags::IN)], Some(&limit)).expect("poll") > 0;
        assert!(talks, "nothing more on the terminal: {:?}", self.said);
        self.read();
    }

    /// Makes it larger or smaller. Only those that it controls are told.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.controller, size).expect("TIOCSWINSZ");
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
            Err(error) if error.error_len().is_some() => panic!("not UTF-8: {:?}", self.rest),
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
