//! Reads processes from `/proc`: who they are, what they run, who started them.
//!
//! Everything of one process is read through one descriptor of its `/proc/PID` directory. Such a descriptor belongs to
//! the process, not to the number: once the process is gone every read through it fails, even if the number is in use
//! again. So nothing read here mixes two processes, without any second look.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Uid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities};

use super::stat::{self, Stat};
use crate::model::{BootNs, Listener, Process, ProcessId};
use crate::render::Clock;

/// More of a command line than this many bytes is cut off: far more than people give to a server, and so little that the
/// processes of one user do not fill the memory that an agent may have.
pub const MAX_COMMAND_BYTES: usize = 32 * 1024;

/// More arguments than this are cut off: an empty one takes a byte of its process, and more here.
const MAX_ARGUMENTS: usize = 1024;

/// The kernel's limit on arguments and environment together is a quarter of the stack, 2 MiB as a rule.
const MAX_ENVIRONMENT_BYTES: usize = 2 * 1024 * 1024;

/// A cgroup file has one line per hierarchy, each a path of at most 4 KiB.
const MAX_CGROUP_BYTES: usize = 64 * 1024;

/// About 1.5 KiB, and the supplementary groups, of which a process may have 65,536; what is read stands before them.
const MAX_STATUS_BYTES: usize = 16 * 1024;

/// Nanoseconds since boot, suspended time included (`CLOCK_BOOTTIME`).
pub fn boot_ns_now() -> BootNs {
    // Fails on kernels before 2.6.39 only.
    let Ok(now) = clock_gettime(ClockId::CLOCK_BOOTTIME) else { return 0 };
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
}

/// Whether no process is hidden from this one for want of permission.
pub fn sees_all() -> bool {
    Uid::effective().is_root() || capabilities(None).is_ok_and(|own| own.effective.contains(CapabilitySet::SYS_PTRACE))
}

/// The other user whose processes must hold what has no visible holder: an ordinary user does not see them. The agent
/// does, root or not.
pub fn hidden_owner(listener: &Listener) -> Option<u32> {
    let uid = listener.socket.uid;
    (listener.is_ghost() && uid != Uid::effective().as_raw() && !sees_all()).then_some(uid)
}

/// Looks at both clocks, of which the one that took least counts: a process may wait between two of its steps.
const LOOKS: usize = 3;

/// This moment, on both clocks; local times are those of `tz`.
pub fn clock(tz: TimeZone) -> Clock {
    let look = || {
        let (before, now_wall, after) = (boot_ns_now(), Timestamp::now(), boot_ns_now());
        let took = after.saturating_sub(before);
        (took, before + took / 2, now_wall)
    };
    let quickest = (0..LOOKS).map(|_| look()).min_by_key(|&(took, ..)| took);
    let (_, now_boot_ns, now_wall) = quickest.unwrap_or_else(look);
    Clock { now_boot_ns, now_wall, tz }
}

/// Descriptors without which a look at the host may be blind in part: a file that cannot be opened is else one that is
/// gone.
const DESCRIPTORS: usize = 16;

/// Fails where this process, or the host, has hardly any descriptors left.
pub fn check_descriptors() -> io::Result<()> {
    let open = |_| rustix::fs::open("/proc/self", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    (0..DESCRIPTORS).map(open).collect::<Result<Vec<OwnedFd>, Errno>>()?;
    Ok(())
}

/// Whether the process of a pidfd has not ended (a zombie has). Does not wait.
pub fn is_alive(pidfd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    loop {
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(ready) => return ready == 0,
            Err(Errno::INTR) => {}
            // Not known to be alive: nothing may be built on it.
            Err(_) => return false,
        }
    }
}

/// Reads a process as it is now. `None`: there is none. What may not be read is left out: exe and cwd of another
/// user's process are `None`, and for an instant a process in the midst of exec has no command.
pub fn read(pid: u32) -> Option<Process> {
    let dir = open(pid)?;
    let stat = stat::read_at(dir.as_fd(), c"stat")?;
    Some(details(pid, dir.as_fd(), stat))
}

/// Reads this very process, keeping the identity as given (its start may be finer than the 10 ms ticks of `/proc`).
/// `None`: it is gone, whoever has its number now.
pub fn read_exact(id: ProcessId) -> Option<Process> {
    let dir = open(id.pid)?;
    let stat = stat::read_at(dir.as_fd(), c"stat")?;
    if !id.is_same(ProcessId { pid: id.pid, start: stat.start }) {
        return None;
    }
    Some(Process { id, ..details(id.pid, dir.as_fd(), stat) })
}

/// The effective uid of whoever has this number now.
pub fn owner(pid: u32) -> Option<u32> {
    // See details().
    rustix::fs::stat(format!("/proc/{pid}")).ok().map(|status| status.st_uid)
}

/// argv of this very process. `None`: it is gone, whoever has its number now.
pub fn command(id: ProcessId) -> Option<Vec<String>> {
    let dir = open_exact(id)?;
    Some(parse_command(&read_up_to(open_at(dir.as_fd(), c"cmdline")?.as_fd(), MAX_COMMAND_BYTES)))
}

/// A variable of the environment that this very process was started with. `None` also where it may not be read: of
/// another user's process only root may.
pub fn variable(id: ProcessId, name: &str) -> Option<String> {
    // What we may not read, the kernel does not let us open.
    let bytes = environment_for(id, 0)?;
    let mut variables = bytes.split(|&byte| byte == 0);
    variables.find_map(|variable| {
        let value = variable.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        Some(String::from_utf8_lossy(value).into_owned())
    })
}

/// The environment that this very process was started with, each variable ended by NUL, as far as `reader` may know it:
/// who is not root, that of its own processes. The file belongs to the user of the process, or to root where that user is
/// not to look into it, as with a program that has more rights than its user: see task_dump_owner() in fs/proc/base.c.
pub fn environment_for(id: ProcessId, reader: u32) -> Option<Vec<u8>> {
    let file = open_at(open_exact(id)?.as_fd(), c"environ")?;
    let is_told = reader == 0 || rustix::fs::fstat(&file).ok()?.st_uid == reader;
    is_told.then(|| read_up_to(file.as_fd(), MAX_ENVIRONMENT_BYTES))
}

/// Effective uid and gid of the process of a `/proc/PID` directory. `None`: it is gone.
pub(crate) fn effective_ids(dir: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let status = read_up_to(open_at(dir, c"status")?.as_fd(), MAX_STATUS_BYTES);
    let effective = |name: &str| {
        let line = status.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(name.as_bytes()))?;
        // Real, effective, saved, of the file system.
        std::str::from_utf8(line).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
    };
    Some((effective("Uid:")?, effective("Gid:")?))
}

/// The `/proc/PID` directory of this very process: all that is read through it is of that one. `None`: it is gone.
pub(crate) fn open_exact(id: ProcessId) -> Option<OwnedFd> {
    let dir = open(id.pid)?;
    let start = stat::read_at(dir.as_fd(), c"stat")?.start;
    id.is_same(ProcessId { pid: id.pid, start }).then_some(dir)
}

fn open(pid: u32) -> Option<OwnedFd> {
    let path = format!("/proc/{pid}");
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Whether the descriptor of the process leads to the socket of this inode; `None` where that may not be known. Threads
/// may live on without their leader, whose own table of descriptors is gone then.
pub fn has_socket(pid: u32, fd: u32, inode: u64) -> Option<bool> {
    let mut target = [0; 64];
    match rustix::fs::readlinkat_raw(rustix::fs::CWD, format!("/proc/{pid}/fd/{fd}"), &mut target[..]) {
        Ok(length) => Some(target.get(..length) == Some(format!("socket:[{inode}]").as_bytes())),
        Err(rustix::io::Errno::NOENT) if stat::read(pid).is_ok_and(|stat| !stat.exiting) => Some(false),
        Err(_) => None,
    }
}

fn details(pid: u32, dir: BorrowedFd<'_>, stat: Stat) -> Process {
    // The directory's owner is the effective uid, whatever the process did to its dumpable flag: see
    // task_dump_owner() in fs/proc/base.c.
    let uid = rustix::fs::fstat(dir).ok().map(|status| status.st_uid);
    let command = open_at(dir, c"cmdline").map(|file| read_up_to(file.as_fd(), MAX_COMMAND_BYTES));
    let cgroup = open_at(dir, c"cgroup").map(|file| read_up_to(file.as_fd(), MAX_CGROUP_BYTES));
    Process {
        id: ProcessId { pid, start: stat.start },
        ppid: stat.ppid,
        // Of a directory whose process has just gone, root seems to be the owner.
        uid: if command.is_some() { uid } else { None },
        name: stat.name,
        command: parse_command(&command.unwrap_or_default()).into(),
        exe: read_link(dir, c"exe").map(|path| parse_exe(&path)),
        cwd: read_link(dir, c"cwd").map(|path| String::from_utf8_lossy(&path).into_owned()),
        cgroup: cgroup.and_then(|lines| parse_cgroup(&lines)),
    }
}

/// Arguments end in NUL. A process that overwrote its arguments to show a title pads with NULs, so empty arguments at
/// the end are dropped.
pub(crate) fn parse_command(bytes: &[u8]) -> Vec<String> {
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    if end == 0 {
        return Vec::new();
    }
    let arguments = bytes[..end].split(|&byte| byte == 0).take(MAX_ARGUMENTS);
    arguments.map(|argument| String::from_utf8_lossy(argument).into_owned()).collect()
}

/// The kernel marks the path of a program that was replaced or removed.
pub(crate) fn parse_exe(path: &[u8]) -> String {
    String::from_utf8_lossy(path.strip_suffix(b" (deleted)").unwrap_or(path)).into_owned()
}

/// The cgroup v2 path; where that hierarchy is not in use (its path is `/`), the systemd hierarchy's.
pub(crate) fn parse_cgroup(lines: &[u8]) -> Option<String> {
    let path_in = |controllers: &[u8]| {
        lines.split(|&byte| byte == b'\n').find_map(|line| {
            let mut parts = line.splitn(3, |&byte| byte == b':').skip(1);
            (parts.next()? == controllers).then(|| parts.next())?
        })
    };
    let unified = path_in(b"");
    let path = match unified {
        Some(path) if path != b"/" => Some(path),
        _ => path_in(b"name=systemd").or(unified),
    };
    path.map(|path| String::from_utf8_lossy(path).into_owned())
}

fn open_at(dir: BorrowedFd<'_>, path: &std::ffi::CStr) -> Option<OwnedFd> {
    rustix::fs::openat(dir, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

pub(super) fn read_retrying(file: BorrowedFd<'_>, buffer: &mut [u8]) -> Option<usize> {
    loop {
        match rustix::io::read(file, &mut *buffer) {
            Ok(length) => return Some(length),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// Reads until the end, an error or `limit` bytes. A read that leaves room in the buffer is the last: `/proc` fills it
/// as far as it can.
fn read_up_to(file: BorrowedFd<'_>, limit: usize) -> Vec<u8> {
    let mut bytes = vec![0; 4096.min(limit)];
    let mut length = 0;
    while let Some(count) = read_retrying(file, &mut bytes[length..]) {
        length += count;
        if length < bytes.len() || length == limit {
            break;
        }
        bytes.resize((bytes.len() * 4).min(limit), 0);
    }
    bytes.truncate(length);
    bytes
}

fn read_link(dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> Option<Vec<u8>> {
    // The kernel gives at most a page.
    let mut buffer = [0u8; 4096];
    let length = rustix::fs::readlinkat_raw(dir, name, &mut buffer[..]).ok()?;
    Some(buffer[..length].to_vec())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};

    use super::*;

    #[test]
    fn command_lines() {
        for (bytes, expected) in [
            (&b""[..], vec![]),
            (b"\0\0\0", vec![]),
            (b"nginx: master\0\0\0\0", vec!["nginx: master"]),
            (b"sh\0-c\0\0x y\0", vec!["sh", "-c", "", "x y"]),
            (b"no end", vec!["no end"]),
            (b"bad \xff\x1b\0", vec!["bad \u{fffd}\x1b"]),
        ] {
            assert_eq!(parse_command(bytes), expected);
        }
        assert_eq!(parse_command(&b"a\0".repeat(10_000)).len(), MAX_ARGUMENTS);
    }

    #[test]
    fn cgroup_files() {
        for (lines, expected) in [
            ("0::/system.slice/nginx.service\n", Some("/system.slice/nginx.service")),
            ("12:pids:/a\n1:name=systemd:/user.slice\n0::/b:c\n", Some("/b:c")),
            ("12:pids:/docker/1\n1:name=systemd:/docker/1\n0::/\n", Some("/docker/1")),
            ("1:name=systemd:/only\n", Some("/only")),
            ("0::/\n", Some("/")),
            ("4:cpu:/x\n", None),
            ("", None),
        ] {
            assert_eq!(parse_cgroup(lines.as_bytes()).as_deref(), expected, "{lines}");
        }
    }

    #[test]
    fn exe_paths() {
        assert_eq!(parse_exe(b"/usr/bin/x (deleted)"), "/usr/bin/x");
        assert_eq!(parse_exe(b"/usr/bin/x"), "/usr/bin/x");
        assert_eq!(parse_exe(b"/\xff"), "/\u{fffd}");
    }

    /// A shell that waits for its input to end, once it runs: before that line its arguments may not be in place.
    fn shell(configure: impl FnOnce(&mut Command)) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", "echo ready; read line"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        configure(&mut command);
        let mut child = command.spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        child
    }

    #[test]
    fn a_child_is_read_whole_until_it_is_reaped() {
        let directory = tempfile::tempdir().unwrap();
        let cwd = directory.path().canonicalize().unwrap();
        let mut child = shell(|sh| {
            sh.arg0("weird \x1b[31m").arg("").current_dir(&cwd).env("WEIRD", "a=b\nc").env("WEIRDER", "x");
        });
        let pid = child.id();
        let process = read(pid).unwrap();
        assert_eq!(process.ppid, std::process::id());
        assert_eq!(process.uid, Some(nix::unistd::geteuid().as_raw()));
        let own = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        assert_eq!(effective_ids(open_exact(process.id).unwrap().as_fd()), Some(own));
        assert_eq!(process.name, "sh");
        assert_eq!(process.command[..], ["weird \x1b[31m", "-c", "echo ready; read line"]);
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert_eq!(process.exe.as_deref(), exe.to_str());
        assert_eq!(process.cwd.as_deref(), cwd.to_str());
        assert!(process.cgroup.as_deref().is_some_and(|path| path.starts_with('/')), "{process:?}");
        let now = boot_ns_now();
        assert!(process.id.start <= now && now - process.id.start < 60_000_000_000, "{process:?} at {now}");

        let fine = ProcessId { pid, start: process.id.start + 1234 };
        assert_eq!(read_exact(fine), Some(Process { id: fine, ..process.clone() }));
        assert_eq!(command(fine), Some(process.command.to_vec()));
        assert_eq!(variable(fine, "WEIRD").as_deref(), Some("a=b\nc"));
        assert_eq!((variable(fine, "WEIR"), variable(fine, "")), (None, None));
        let own = nix::unistd::geteuid().as_raw();
        assert!(environment_for(fine, own).is_some_and(|bytes| !bytes.is_empty()));
        assert_eq!(environment_for(fine, own + 1), None);
        let other = ProcessId { pid, start: process.id.start + ProcessId::TICK_NS };
        assert_eq!((read_exact(other), command(other), variable(other, "WEIRD")), (None, None, None));

        let pinned = open(pid).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(stat::read_at(pinned.as_fd(), c"stat"), None);
        assert_eq!(read(pid), None);
        assert_eq!(read_exact(process.id), None);
    }

    #[test]
    fn names_with_any_byte_are_read() {
        let thread = std::thread::spawn(|| {
            // SAFETY: PR_SET_NAME reads a NUL-terminated string of at most 16 bytes; this one is static.
            unsafe { nix::libc::prctl(nix::libc::PR_SET_NAME, c"a) R 1 (\n\xff".as_ptr()) };
            let me = rustix::thread::gettid().as_raw_nonzero().get();
            read(u32::try_from(me).unwrap()).unwrap().name
        });
        assert_eq!(thread.join().unwrap(), "a) R 1 (\n\u{fffd}");
    }

    #[test]
    fn long_command_lines_are_cut() {
        // One argument may have at most 128 KiB in the kernel: two of 100,000 bytes.
        let long = "x".repeat(100_000);
        let mut child = shell(|sh| {
            sh.args([&long, &long]);
        });
        let process = read(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(process.command.len(), 4);
        assert_eq!(process.command.iter().map(|argument| argument.len() + 1).sum::<usize>(), MAX_COMMAND_BYTES + 1);
    }
}
