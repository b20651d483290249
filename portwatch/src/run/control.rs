//! What the front and the watcher tell each other: one JSON object a packet, over a pair of sockets.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::LIFETIME_OVER;
use crate::model::{Ancestor, ProcessId};

/// What is only known when the command starts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Start {
    /// Given to the command as `$PORT` and `{port}`.
    pub port: Option<u16>,
    /// Where its output goes, in the background.
    pub log: Option<PathBuf>,
    /// A file to remove when it is over.
    pub record: Option<PathBuf>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToWatcher {
    Start(Start),
    /// Pass this signal on to the command.
    Signal(i32),
    /// End the command and all that came of it.
    End,
    /// Go on without the front, if the command runs.
    Detach,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromWatcher {
    Hello {
        watcher: ProcessId,
        keeper: ProcessId,
    },
    Started(ProcessId),
    /// The command cannot be run: errno.
    Refused(i32),
    /// It goes on without the front, which hears no more of it.
    Detached,
    Over(Over),
}

/// How the command itself ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    Exited(i32),
    Signalled(i32),
}

/// Why it was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// The command ended.
    Ended,
    /// Somebody asked for it: a signal to the front or to the watcher.
    Asked,
    Lifetime,
    /// The front, or the keeper, was gone.
    Abandoned,
}

/// The end of it all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Over {
    /// `None`: it never ran, or could not be killed.
    pub status: Option<Status>,
    pub cause: Cause,
    /// How many processes the command left behind, as it ended.
    pub leftovers: usize,
    /// Those that could not even be killed.
    pub unended: Vec<Ancestor>,
}

impl Over {
    /// As shells have it: the command's own, 128+N where signal N ended it, 124 where the lifetime was over.
    pub fn code(&self) -> u8 {
        match (self.cause, self.status) {
            (Cause::Lifetime, _) => LIFETIME_OVER,
            (_, Some(Status::Exited(code))) => code.to_le_bytes()[0],
            (_, Some(Status::Signalled(signal))) => 128u8.wrapping_add(signal.to_le_bytes()[0]),
            (_, None) => 128 + 9,
        }
    }
}

/// One end of the pair.
#[derive(Debug)]
pub(super) struct Control(OwnedFd);

/// A packet is an order or an answer: paths are the longest of it.
const MAX_BYTES: usize = 64 * 1024;

impl Control {
    pub(super) fn pair() -> anyhow::Result<(Control, Control)> {
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        pair.map(|(one, other)| (Control(one), Control(other))).context("cannot make a pair of sockets")
    }

    /// # Errors
    /// Where the other side is gone.
    pub(super) fn send(&self, message: &impl Serialize) -> anyhow::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        let sent = send(&self.0, &bytes, SendFlags::NOSIGNAL);
        // Its text alone: to those above, a broken pipe is that of standard output.
        sent.map(drop).map_err(|error| anyhow!("the other side of portwatch run is gone: {error}"))
    }

    /// The next message; `None`: the other side is gone. Without `wait`, `WouldBlock` where there is none.
    pub(super) fn receive<T: DeserializeOwned>(&self, wait: bool) -> std::io::Result<Option<T>> {
        let mut bytes = vec![0u8; MAX_BYTES];
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        loop {
            match recv(&self.0, &mut bytes[..], flags) {
                Ok((0, _)) => return Ok(None),
                Ok((length, _)) => return Ok(Some(serde_json::from_slice(&bytes[..length])?)),
                // It did not read all that it was told. What it said before is still there, after this one error.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_shells() {
        for (cause, status, want) in [
            (Cause::Ended, Some(Status::Exited(0)), 0),
            (Cause::Ended, Some(Status::Exited(255)), 255),
            (Cause::Asked, Some(Status::Signalled(15)), 143),
            (Cause::Asked, Some(Status::Exited(3)), 3),
            (Cause::Lifetime, Some(Status::Exited(0)), 124),
            (Cause::Ended, Some(Status::Signalled(64)), 192),
            (Cause::Abandoned, None, 137),
        ] {
            let over = Over { status, cause, leftovers: 0, unended: Vec::new() };
            assert_eq!(over.code(), want, "{over:?}");
        }
    }

    #[test]
    fn messages_arrive_whole_and_an_end_is_told() {
        let (one, other) = Control::pair().unwrap();
        assert_eq!(other.receive::<ToWatcher>(false).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        one.send(&ToWatcher::Start(Start { port: Some(7), ..Start::default() })).unwrap();
        one.send(&ToWatcher::End).unwrap();
        assert!(matches!(other.receive(true).unwrap(), Some(ToWatcher::Start(Start { port: Some(7), .. }))));
        drop(one);
        assert!(matches!(other.receive(true).unwrap(), Some(ToWatcher::End)));
        assert!(other.receive::<ToWatcher>(true).unwrap().is_none());
        let error = other.send(&ToWatcher::End).unwrap_err();
        // The verb would end as if nobody read its output: well.
        assert!(!error.chain().any(|cause| cause.is::<Errno>() || cause.is::<std::io::Error>()), "{error:#}");
    }

    #[test]
    fn the_last_word_is_heard_of_one_that_did_not_listen() {
        let (one, other) = Control::pair().unwrap();
        other.send(&ToWatcher::Detach).unwrap();
        one.send(&ToWatcher::End).unwrap();
        drop(one);
        assert!(matches!(other.receive(false).unwrap(), Some(ToWatcher::End)));
        assert!(other.receive::<ToWatcher>(false).unwrap().is_none());
    }
}
