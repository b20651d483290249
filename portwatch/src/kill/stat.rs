//! `/proc/PID/stat`, as far as a kill needs it: who a process is, whose child it is, and whether it is leaving.

use std::fs;
use std::io;

use crate::model::{BootNs, ProcessId};

/// From the kernel's `include/linux/sched.h`; field 9 of `/proc/PID/stat` shows them.
const PF_EXITING: u32 = 0x0000_0004;
const PF_KTHREAD: u32 = 0x0020_0000;

/// What `/proc/PID/stat` says of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    pub pid: u32,
    /// The kernel's `comm`: hostile text.
    pub name: String,
    /// 0 where the parent is the kernel, or outside our pid namespace.
    pub ppid: u32,
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

    fn parse(line: &str) -> Option<Stat> {
        // The name is in parentheses and may contain some itself: the last one closes it.
        let (head, rest) = line.rsplit_once(") ")?;
        let (pid, name) = head.split_once(" (")?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // The first of them is field 3 of proc_pid_stat(5).
        let field = |number: usize| fields.get(number - 3).copied();
        let flags: u32 = field(9)?.parse().ok()?;
        Some(Stat {
            pid: pid.parse().ok()?,
            name: name.to_owned(),
            ppid: field(4)?.parse().ok()?,
            terminal: field(7)?.parse::<i32>().ok()? != 0,
            kernel_thread: flags & PF_KTHREAD != 0,
            exiting: flags & PF_EXITING != 0 || matches!(field(3)?, "Z" | "X"),
            start: field(22)?.parse::<u64>().ok()?.saturating_mul(ProcessId::TICK_NS),
        })
    }
}

/// Reads it now. `NotFound` where there is no such process, or `hidepid` hides it.
pub fn read(pid: u32) -> io::Result<Stat> {
    let bytes = fs::read(format!("/proc/{pid}/stat")).map_err(|error| match error.raw_os_error() {
        // A process that ends between open and read.
        Some(errno) if errno == nix::libc::ESRCH => io::ErrorKind::NotFound.into(),
        _ => error,
    })?;
    Stat::parse(&String::from_utf8_lossy(&bytes))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat is not as documented")))
}

/// The ancestors of a process, its parent first, as far as they are visible.
pub fn ancestors(pid: u32, stat: &dyn Fn(u32) -> Option<Stat>) -> Vec<u32> {
    let mut found = Vec::new();
    let mut current = pid;
    while let Some(parent) = stat(current).map(|s| s.ppid) {
        // Processes that end while we walk could make the chain bite its tail.
        if parent == 0 || parent == pid || found.contains(&parent) {
            break;
        }
        found.push(parent);
        current = parent;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_does_not_shift_the_fields() {
        let rest = "S 7 8 9 34816 10 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 1 2";
        let stat = Stat::parse(&format!("42 (a) R 1 (b) {rest}")).unwrap();
        assert_eq!(
            stat,
            Stat {
                pid: 42,
                name: "a) R 1 (b".into(),
                ppid: 7,
                terminal: true,
                kernel_thread: false,
                exiting: false,
                start: 123_450_000_000
            }
        );
        assert_eq!(Stat::parse("42 (cut) S 7"), None);
    }

    #[test]
    fn this_process_and_its_ancestors_are_found() {
        let own = read(std::process::id()).unwrap();
        assert!(!own.kernel_thread && !own.exiting);
        assert_eq!(own.ppid, nix::unistd::getppid().as_raw().cast_unsigned());
        let chain = ancestors(own.pid, &|pid| read(pid).ok());
        assert_eq!(chain.first(), Some(&own.ppid));
    }
}
