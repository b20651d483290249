//! One run of one command: how long, how much processor time and memory, and what it said.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{mem, ptr};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl;
use nix::sys::signal::Signal;

pub(super) struct Run {
    /// From before the spawn to the end of the process.
    pub(super) ms: f64,
    /// User and system time of the process and of those it has waited for.
    pub(super) cpu_ms: f64,
    /// The largest resident set of any of them.
    pub(super) rss_kib: i64,
    /// stdout and stderr.
    pub(super) output: String,
}

/// Runs a command to its end, whatever its exit code. Fails when it takes longer than `limit`, and ends it then.
pub(super) fn run(command: &mut Command, limit: Duration) -> Result<Run> {
    // In memory, so that no reader takes a processor meanwhile.
    let mut output = File::from(memfd_create("output", MFdFlags::MFD_CLOEXEC).context("cannot make a memory file")?);
    let stdout = output.try_clone().context("cannot duplicate a file")?;
    let stderr = output.try_clone().context("cannot duplicate a file")?;
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    // SAFETY: one system call, which neither allocates nor locks.
    //
    // A hook also makes std fork instead of vfork. The kernel counts the largest resident set of a process from before
    // its exec on: after vfork that is all of this program, after fork only the little that has been copied.
    unsafe { command.pre_exec(|| prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)) };
    let started = Instant::now();
    let mut child = command.spawn().context("cannot run it")?;
    let in_time = ends(&child, limit);
    if !matches!(in_time, Ok(true)) {
        // Our own unreaped child, or gone by now.
        let _gone = child.kill();
    }
    let usage = reap(&child);
    let ms = started.elapsed().as_secs_f64() * 1e3;
    if !in_time? {
        bail!("takes more than {} s", limit.as_secs());
    }
    let usage = usage?;
    let mut bytes = Vec::new();
    output.rewind().and_then(|()| output.read_to_end(&mut bytes)).context("cannot read what it said")?;
    Ok(Run {
        ms,
        cpu_ms: ms_of(usage.ru_utime) + ms_of(usage.ru_stime),
        rss_kib: usage.ru_maxrss,
        output: String::from_utf8_lossy(&bytes).into_owned(),
    })
}

/// Whether the child ends within that time. It stays a zombie.
fn ends(child: &Child, limit: Duration) -> Result<bool> {
    // SAFETY: the call takes two numbers; the child has not been reaped, so that its number is its own.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) }).context("pidfd_open")?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    let pidfd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
    let timeout = PollTimeout::try_from(limit).context("too long a limit")?;
    Ok(poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout).context("cannot poll a pidfd")? > 0)
}

/// Reaps the child, which `std` must not wait for after that.
fn reap(child: &Child) -> Result<libc::rusage> {
    // SAFETY: all zero is a valid rusage, of numbers only.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: `usage` is valid for writes, and no status is wanted.
    Errno::result(unsafe { libc::wait4(child.id().cast_signed(), ptr::null_mut(), 0, &raw mut usage) })
        .context("wait4")?;
    Ok(usage)
}

#[expect(clippy::cast_precision_loss, reason = "processor time of one command, in µs, is far below 2^52")]
fn ms_of(time: libc::timeval) -> f64 {
    time.tv_sec as f64 * 1e3 + time.tv_usec as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::run;

    fn shell(script: &str, limit: Duration) -> anyhow::Result<super::Run> {
        run(Command::new("sh").args(["-c", script]), limit)
    }

    #[test]
    fn a_run_has_what_was_said_and_what_it_took() {
        let run = shell("echo out; echo err >&2; exit 3", Duration::from_secs(60)).unwrap();
        assert_eq!(run.output, "out\nerr\n");
        assert!(run.ms > 0.0 && run.rss_kib > 0, "{} ms, {} KiB", run.ms, run.rss_kib);
    }

    #[test]
    fn what_takes_too_long_is_ended() {
        let error = shell("exec sleep 600", Duration::from_millis(50)).err().unwrap();
        assert_eq!(error.to_string(), "takes more than 0 s");
    }
}
