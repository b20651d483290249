//! `/proc/PID/stat`: who a process is, whose child it is, what state it is in. Everything that reads this file reads it
//! here.

use std::collections::HashSet;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Mode, OFlags};

use super::process::read_retrying;
use crate::model::{Ancestor, BootNs, ProcessId};

/// From the kernel's `include/linux/sched.h`; field 9 of `/proc/PID/stat` shows them.
const PF_EXITING: u32 = 0x0000_0004;
const PF_KTHREAD: u32 = 0x0020_0000;

/// 52 numbers of at most 20 digits, and a name of at most 64 bytes.
const MAX_BYTES: usize = 2048;

/// What `/proc/PID/stat` says of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    pub pid: u32,
    /// The kernel's `comm`: hostile text.
    pub name: String,
    /// As in proc_pid_stat(5): `R`, `S`, `D` (uninterruptible), `T` (stopped), `t` (traced), `Z` (zombie) …
    pub state: char,
    /// 0 where the parent is the kernel, or outside our pid namespace.
    pub ppid: u32,
    pub process_group: u32,
    pub session: u32,
    /// Whether it has a controlling terminal.
    pub terminal: bool,
    pub kernel_thread: bool,
    /// Whether it is on its way out, or a zombie already.
    pub exiting: bool,
    /// When the thread-group leader started, rounded down to 10 ms.
    pub start: BootNs,
}

impl Stat {
    pub fn id(&self) -> ProcessId {
        ProcessId { pid: self.pid, start: self.start }
    }

    /// The name stands in parentheses and may itself hold any byte, `)` and line feeds too: it ends at the last `)`.
    pub(crate) fn parse(line: &[u8]) -> Option<Stat> {
        let open = line.iter().position(|&byte| byte == b'(')?;
        let close = line.iter().rposition(|&byte| byte == b')')?;
        let pid = std::str::from_utf8(&line[..open]).ok()?.trim_end().parse().ok()?;
        let name = String::from_utf8_lossy(line.get(open + 1..close)?).into_owned();
        let fields: Vec<&str> = std::str::from_utf8(&line[close + 1..]).ok()?.split_ascii_whitespace().collect();
        // Numbered as in proc_pid_stat(5): the first one here is field 3.
        let field = |number: usize| fields.get(number - 3).copied();
        let state = field(3)?.chars().next()?;
        let flags: u32 = field(9)?.parse().ok()?;
        Some(Stat {
            pid,
            name,
            state,
            ppid: field(4)?.parse().ok()?,
            // 0 where the group or session is outside our pid namespace; -1 in a process that is being reaped.
            process_group: field(5)?.parse().unwrap_or(0),
            session: field(6)?.parse().unwrap_or(0),
            terminal: field(7)?.parse::<i32>().ok()? != 0,
            kernel_thread: flags & PF_KTHREAD != 0,
            exiting: flags & PF_EXITING != 0 || matches!(state, 'Z' | 'X'),
            start: field(22)?.parse::<u64>().ok()?.checked_mul(ProcessId::TICK_NS)?,
        })
    }
}

/// Reads it now. `NotFound` where there is no such process, or `hidepid` hides it.
pub fn read(pid: u32) -> io::Result<Stat> {
    read_task(&pid.to_string())
}

/// The same of one task, by its path below `/proc`: `7/task/8`.
pub fn read_task(task: &str) -> io::Result<Stat> {
    let bytes = fs::read(format!("/proc/{task}/stat")).map_err(|error| match error.raw_os_error() {
        // A process that ends between open and read.
        Some(errno) if errno == nix::libc::ESRCH => io::ErrorKind::NotFound.into(),
        _ => error,
    })?;
    Stat::parse(&bytes)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{task}/stat is not as documented")))
}

/// Every process that is visible and has not ended, one after the other: no two are of the same moment. Of some the leader
/// has exited, and other threads go on.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn all() -> io::Result<Vec<Stat>> {
    let numbers = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(numbers.filter_map(|pid: u32| read(pid).ok()).filter(|process| !is_over(process)).collect())
}

/// Whether the process is gone, or all its threads are on their way out. (Its leader alone may have exited: the others
/// go on.) A process that may not be looked at has not ended.
pub fn has_ended(id: ProcessId) -> bool {
    let leader = match read(id.pid) {
        Ok(stat) => stat,
        Err(error) => return error.kind() == io::ErrorKind::NotFound,
    };
    if !leader.id().is_same(id) {
        return true;
    }
    is_over(&leader)
}

/// Whether all its threads are on their way out.
fn is_over(leader: &Stat) -> bool {
    leader.exiting && threads(leader.pid).all(|thread| thread.exiting)
}

/// Those that are still there when it comes to them.
fn threads(pid: u32) -> impl Iterator<Item = Stat> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    threads.filter_map(|thread| Stat::parse(&fs::read(thread.ok()?.path().join("stat")).ok()?))
}

/// Reads a `stat` file by its path relative to a directory under `/proc/PID`. `None`: the process is gone.
pub(super) fn read_at(dir: BorrowedFd<'_>, path: &CStr) -> Option<Stat> {
    let mut buffer = [0u8; MAX_BYTES];
    let file = rustix::fs::openat(dir, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let length = read_retrying(file.as_fd(), &mut buffer)?;
    Stat::parse(&buffer[..length])
}

/// Generations that are told of a process. Somebody may nest processes by the ten thousand, and have others pay for each.
pub const GENERATIONS: usize = 64;

/// The ancestors of a process, its parent first, as far as they are visible. It ends at a parent that started after
/// its child: the true one is gone and its PID in use again.
pub fn ancestors(pid: u32, stat: &dyn Fn(u32) -> Option<Stat>) -> Vec<u32> {
    line(pid, usize::MAX, stat).into_iter().map(|(pid, _)| pid).collect()
}

/// The ancestors of a process with their names, its parent first: the nearest [`GENERATIONS`].
pub fn lineage(pid: u32, stat: &dyn Fn(u32) -> Option<Stat>) -> Vec<Ancestor> {
    nearest(pid, stat).into_iter().map(|Stat { pid, name, .. }| Ancestor { pid, name }).collect()
}

/// The nearest [`GENERATIONS`] of the ancestors of a process that are visible, its parent first.
pub fn nearest(pid: u32, stat: &dyn Fn(u32) -> Option<Stat>) -> Vec<Stat> {
    line(pid, GENERATIONS, stat).into_iter().filter_map(|(_, stat)| stat).collect()
}

fn line(pid: u32, most: usize, stat: &dyn Fn(u32) -> Option<Stat>) -> Vec<(u32, Option<Stat>)> {
    let mut found = Vec::new();
    // Processes that end while we walk could make the chain bite its tail.
    let mut met = HashSet::from([pid]);
    let Some(own) = stat(pid) else { return found };
    let (mut parent, mut start) = (own.ppid, own.start);
    while parent != 0 && found.len() < most && met.insert(parent) {
        let Some(next) = stat(parent) else {
            found.push((parent, None));
            break;
        };
        if next.start > start {
            break;
        }
        let this = std::mem::replace(&mut parent, next.ppid);
        start = next.start;
        found.push((this, Some(next)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line_of(name: &str) -> String {
        format!("42 ({name}) S 7 8 9 34816 10 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 1 2\n")
    }

    #[test]
    fn a_hostile_name_does_not_shift_the_fields() {
        for name in ["bash", "", "a b", "a) S 9 (", ") R 1", "two\nlines", "((("] {
            let expected = Stat {
                pid: 42,
                name: name.into(),
                state: 'S',
                ppid: 7,
                process_group: 8,
                session: 9,
                terminal: true,
                kernel_thread: false,
                exiting: false,
                start: 123_450_000_000,
            };
            assert_eq!(Stat::parse(line_of(name).as_bytes()), Some(expected));
        }
        let mut bytes = line_of("x?y").into_bytes();
        bytes[5] = 0xff;
        assert_eq!(Stat::parse(&bytes).unwrap().name, "x\u{fffd}y");
        for broken in ["", "7", "7 (bash", "7 )bash( S 1", "7 (bash) S", "7 (bash) S 3 7 7", "7 (bash) S x 7 7"] {
            assert_eq!(Stat::parse(broken.as_bytes()), None, "{broken}");
        }
    }

    #[test]
    fn this_process_and_its_ancestors_are_found() {
        let own = read(std::process::id()).unwrap();
        assert!(!own.kernel_thread && !own.exiting);
        assert_eq!(own.ppid, nix::unistd::getppid().as_raw().cast_unsigned());
        assert_eq!(own.process_group, nix::unistd::getpgrp().as_raw().cast_unsigned());
        let chain = ancestors(own.pid, &|pid| read(pid).ok());
        assert_eq!(chain.first(), Some(&own.ppid));
    }

    #[test]
    fn a_process_ends_with_its_last_thread() {
        let own = read(std::process::id()).unwrap().id();
        assert!(!has_ended(own));
        assert!(has_ended(ProcessId { start: own.start + ProcessId::TICK_NS, ..own }), "its number is in use again");
        let mut child = std::process::Command::new("sh")
            .args(["-c", "echo ready; read line"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let id = read(child.id()).unwrap().id();
        assert!(!has_ended(id));
        assert!(all().unwrap().iter().any(|process| process.id() == id));
        drop(child.stdin.take());
        // Its output ends as it does: it is exiting, a zombie or both.
        std::io::copy(&mut child.stdout.take().unwrap(), &mut std::io::sink()).unwrap();
        assert!(has_ended(id));
        assert!(!all().unwrap().iter().any(|process| process.id() == id), "not reaped, and over all the same");
        child.wait().unwrap();
        assert!(has_ended(id));
    }

    #[test]
    fn of_a_long_line_the_nearest_are_told_and_all_are_spared() {
        let text = line_of("x");
        let stat =
            |pid: u32| Some(Stat { pid, ppid: pid - 1, start: pid.into(), ..Stat::parse(text.as_bytes()).unwrap() });
        assert_eq!(ancestors(20_001, &stat).len(), 20_000);
        let told: Vec<u32> = lineage(20_001, &stat).into_iter().map(|ancestor| ancestor.pid).collect();
        assert_eq!(told, (20_001 - GENERATIONS as u32..=20_000).rev().collect::<Vec<_>>());
        // Of a parent that is hidden, the number is known alone.
        let hidden = |pid: u32| stat(pid).filter(|stat| stat.pid != 8);
        assert_eq!((ancestors(10, &hidden), lineage(10, &hidden).len()), (vec![9, 8], 1));
    }

    #[test]
    fn a_parent_younger_than_its_child_is_a_stranger() {
        let stat = |pid: u32| {
            let (ppid, start) = match pid {
                9 => (8, 30),
                8 => (7, 20),
                7 => (1, 25),
                _ => return None,
            };
            let line = String::from_utf8(line_of("x").into_bytes()).unwrap();
            Some(Stat { pid, ppid, start, ..Stat::parse(line.as_bytes()).unwrap() })
        };
        assert_eq!(ancestors(9, &stat), [8]);
        assert_eq!(ancestors(7, &stat), [1]);
    }
}
