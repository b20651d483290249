//! A mark: what was listening at one moment of one boot, so that what appeared since can be told from it.
//!
//! A JSON document, on one line, that whoever made it may keep where they like; [`store`] keeps it by name. What counts is
//! the moment: every process that ran then is left alone by `--since`, also when it listens anew. The listeners are there
//! to be read, by people and programs.
//!
//! ```json
//! {"portwatch_mark":1,"boot_id":"…","boot_ns":81230000000,"time":"2026-01-01T00:00:00Z","uid":1000,"listeners":[
//!  {"proto":"tcp","address":"127.0.0.1","port":8000,"netns":4026531833,"inode":99,"cookie":7,
//!   "holders":[{"pid":7,"start":81000000000}]}]}
//! ```

pub mod file;
pub mod store;

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::model::{BootNs, Listener, NetnsId, ProcessId, Protocol};
use crate::render::{Clock, escape};

/// The version of the document. One that this portwatch does not know is refused, never guessed at.
pub const VERSION: u32 = 1;

/// A larger document is none of ours: 100,000 listeners have room.
pub const MAX_BYTES: u64 = 16 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// [`VERSION`].
    pub portwatch_mark: u32,
    /// As `/proc/sys/kernel/random/boot_id` has it.
    pub boot_id: String,
    /// What started in the same 10 ms ran already.
    pub boot_ns: BootNs,
    /// The same moment for people, in UTC.
    pub time: String,
    /// Who made it.
    pub uid: u32,
    /// Sorted by port, protocol and address.
    pub listeners: Vec<Marked>,
}

/// A listener and its holders, by identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marked {
    pub proto: Protocol,
    pub address: IpAddr,
    pub port: u16,
    pub netns: NetnsId,
    /// Each 0 where not known.
    pub inode: u64,
    pub cookie: u64,
    pub holders: Vec<ProcessId>,
}

/// Why a document is no mark to go by, as the end of a sentence about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw(String);

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Flaw {}

impl Mark {
    /// Of what is listening at the moment of `clock`.
    pub fn new<'a>(
        listeners: impl IntoIterator<Item = &'a Listener>,
        uid: u32,
        boot_id: String,
        clock: &Clock,
    ) -> Mark {
        let marked = |Listener { socket, holders, .. }: &Listener| Marked {
            proto: socket.proto,
            address: socket.address,
            port: socket.port,
            netns: socket.netns,
            inode: socket.id.inode,
            cookie: socket.id.cookie,
            holders: holders.iter().map(|holder| holder.process.id).collect(),
        };
        let mut listeners: Vec<Marked> = listeners.into_iter().map(marked).collect();
        listeners.sort_by_key(|marked| (marked.port, marked.proto, marked.address, marked.netns, marked.inode));
        let time = clock.now_wall.to_string();
        Mark { portwatch_mark: VERSION, boot_id, boot_ns: clock.now_boot_ns, time, uid, listeners }
    }

    /// One line of JSON.
    ///
    /// # Errors
    /// Where it would be too large to be read again.
    pub fn line(&self) -> Result<String, Flaw> {
        let line = serde_json::to_string(self).map_err(|error| Flaw(format!("cannot be written: {error}")))?;
        match line.len() as u64 > MAX_BYTES {
            true => Err(Flaw(format!("has {} listeners, too many to be kept", self.listeners.len()))),
            false => Ok(line + "\n"),
        }
    }

    /// Reads a document of which nothing is known. `boot_id` is that of this boot, `now` this moment of it.
    ///
    /// # Errors
    /// It is no mark, of another version, of another boot, or of the future.
    pub fn read(bytes: &[u8], boot_id: &str, now: BootNs) -> Result<Mark, Flaw> {
        #[derive(Deserialize)]
        struct Head {
            portwatch_mark: u32,
        }
        let again = "make a new one: portwatch mark";
        let damaged = |error: serde_json::Error| {
            Flaw(format!("is damaged, or no mark at all ({}); {again}", escape(&error.to_string())))
        };
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Err(Flaw(format!("is empty; {again}")));
        }
        let Head { portwatch_mark: version } = serde_json::from_slice(bytes).map_err(damaged)?;
        if version != VERSION {
            return Err(Flaw(format!("has version {version}, and this portwatch reads {VERSION}; {again}")));
        }
        let mark: Mark = serde_json::from_slice(bytes).map_err(damaged)?;
        if mark.boot_id != boot_id {
            return Err(Flaw(format!("was made before this host was booted; {again}")));
        }
        if mark.boot_ns > now {
            return Err(Flaw(format!("is of a moment that has not come yet; {again}")));
        }
        Ok(mark)
    }
}

/// Whether it can name a mark: 1 to 64 letters, digits and `._-`, the first no dot and no dash.
pub fn is_name(word: &str) -> bool {
    (1..=64).contains(&word.len())
        && !word.starts_with(['.', '-'])
        && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;
    use jiff::tz::TimeZone;

    use super::*;
    use crate::model::{Holder, Process, Socket};

    fn example() -> Mark {
        let process = Arc::new(Process::bare(ProcessId { pid: 7, start: 81 }, "x"));
        let held = Listener {
            socket: Socket::example("127.0.0.1", 8000),
            since: None,
            holders: vec![Holder { process, fds: vec![3], binder: true }],
        };
        let ghost = Listener { socket: Socket::example("::1", 53), since: None, holders: Vec::new() };
        let clock = Clock { now_boot_ns: 1000, now_wall: Timestamp::UNIX_EPOCH, tz: TimeZone::UTC };
        Mark::new([&held, &ghost], 1000, "b-1".to_owned(), &clock)
    }

    #[test]
    fn a_mark_is_one_line_that_reads_back() {
        let line = example().line().unwrap();
        assert_eq!(
            line,
            "{\"portwatch_mark\":1,\"boot_id\":\"b-1\",\"boot_ns\":1000,\"time\":\"1970-01-01T00:00:00Z\",\"uid\":1000,\"listeners\":[\
             {\"proto\":\"tcp\",\"address\":\"::1\",\"port\":53,\"netns\":1,\"inode\":99,\"cookie\":7,\"holders\":[]},\
             {\"proto\":\"tcp\",\"address\":\"127.0.0.1\",\"port\":8000,\"netns\":1,\"inode\":99,\"cookie\":7,\
             \"holders\":[{\"pid\":7,\"start\":81}]}]}\n"
        );
        assert_eq!(Mark::read(line.as_bytes(), "b-1", 1000), Ok(example()));
    }

    #[test]
    fn what_is_no_mark_to_go_by_is_refused() {
        let line = example().line().unwrap();
        let error = |text: &str, boot, now| Mark::read(text.as_bytes(), boot, now).unwrap_err().to_string();
        for (text, boot, now, want) in [
            ("", "b-1", 1000, "is empty"),
            (" \n", "b-1", 1000, "is empty"),
            (&line[..line.len() / 2], "b-1", 1000, "is damaged"),
            ("[]", "b-1", 1000, "is damaged"),
            ("{\"a\u{1b}\":1}", "b-1", 1000, "is damaged"),
            ("{\"portwatch_mark\":1}", "b-1", 1000, "is damaged"),
            (&format!("{line}{line}"), "b-1", 1000, "is damaged"),
            ("{\"portwatch_mark\":2,\"new\":true}", "b-1", 1000, "has version 2"),
            (&line, "b-2", 1000, "was made before this host was booted"),
            (&line, "b-1", 999, "is of a moment that has not come yet"),
        ] {
            let error = error(text, boot, now);
            assert!(error.starts_with(want) && !error.contains(['\n', '\u{1b}']), "{text}: {error}");
        }
    }

    #[test]
    fn names_are_no_paths() {
        for (word, want) in [
            ("job-123", true),
            ("a", true),
            ("A_b.c", true),
            ("", false),
            (".", false),
            ("..", false),
            (".x", false),
            ("-x", false),
            ("a/b", false),
            ("a b", false),
            ("é", false),
        ] {
            assert_eq!(is_name(word), want, "{word}");
        }
        assert!(is_name(&"x".repeat(64)) && !is_name(&"x".repeat(65)));
    }
}
