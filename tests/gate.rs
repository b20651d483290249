//! Holds a program at a system call of its own, so that a test acts in exactly that window: ptrace, no delays.

use std::collections::HashMap;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;

use nix::libc;

use crate::subject::{Run, outputs};

/// A moment in the life of a program: where one of its threads is about to make a system call, or has made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    Before(libc::c_long),
    After(libc::c_long),
}

/// Runs `command`; when it comes to `moment` for the first time, the first argument of the system call being one that
/// `concerns` accepts, everything waits for `meanwhile`. Gives what the run said, and what `meanwhile` gave: `None`
/// where the program never came there.
pub fn run<T>(
    command: Command,
    moment: Moment,
    concerns: impl Fn(u64) -> bool,
    meanwhile: impl FnOnce() -> T,
) -> (Run, Option<T>) {
    let mut meanwhile = Some(meanwhile);
    let mut result = None;
    let run = trace(command, |_, here, arguments| {
        if here == moment && concerns(arguments[0]) {
            result = meanwhile.take().map(|act| act());
        }
        meanwhile.is_some()
    });
    (run, result)
}

/// Runs `command`, which stops before each signal that it sends through a pidfd, for as long as `before` takes. That is
/// told the process that the pidfd stands for, and the signal.
pub fn signals(command: Command, mut before: impl FnMut(u32, i32)) -> Run {
    trace(command, |thread, here, arguments| {
        if here == Moment::Before(libc::SYS_pidfd_send_signal) {
            let path = format!("/proc/{thread}/fdinfo/{}", arguments[0]);
            let info = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")).and_then(|pid| pid.trim().parse().ok());
            // -1 where it is gone already, so that this signal reaches nobody.
            if let Some(pid) = pid {
                before(pid, arguments[1] as i32);
            }
        }
        true
    })
}

/// Runs `command`, stopping each of its threads at each system call for as long as `at` takes, until that says no.
fn trace(mut command: Command, mut at: impl FnMut(libc::pid_t, Moment, [u64; 6]) -> bool) -> Run {
    command.process_group(0);
    // SAFETY: ptrace(PTRACE_TRACEME) is async-signal-safe and takes no memory.
    unsafe {
        command.pre_exec(|| {
            let result = libc::ptrace(libc::PTRACE_TRACEME, 0, ptr::null_mut::<u8>(), ptr::null_mut::<u8>());
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let mut child = command.spawn().expect("cannot run portwatch");
    let leader = child.id() as libc::pid_t;
    let outputs = outputs(&mut child);
    let mut goes_on = true;
    let mut calls: HashMap<libc::pid_t, (libc::c_long, [u64; 6])> = HashMap::new();
    let mut is_first = true;
    let code = loop {
        let (thread, status) = wait(leader);
        if !libc::WIFSTOPPED(status) {
            if thread == leader {
                break libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
            }
            continue;
        }
        if is_first {
            let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
            ptrace(libc::PTRACE_SETOPTIONS, thread, options as usize, 0).expect("PTRACE_SETOPTIONS");
            is_first = false;
        }
        let mut signal = libc::WSTOPSIG(status);
        if signal == libc::SIGTRAP | 0x80 {
            signal = 0;
            if let Some((here, arguments)) = system_call(thread, &mut calls).filter(|_| goes_on) {
                goes_on = at(thread, here, arguments);
            }
        } else if signal == libc::SIGTRAP || signal == libc::SIGSTOP {
            // A thread that begins, or the exec itself: stops of ptrace's own making.
            signal = 0;
        }
        let go_on = if goes_on { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT };
        // ESRCH where it was killed meanwhile: the next wait tells.
        let _ = ptrace(go_on, thread, 0, signal as usize);
    };
    let (stdout, stderr) = outputs.join();
    Run { code, stdout, stderr }
}

/// The next thing that happens to a thread of the process group. All tracees are in it, and nothing else is.
fn wait(group: libc::pid_t) -> (libc::pid_t, libc::c_int) {
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to one c_int.
        let thread = unsafe { libc::waitpid(-group, &raw mut status, libc::__WALL) };
        if thread > 0 {
            return (thread, status);
        }
        let error = io::Error::last_os_error();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted, "waitpid: {error}");
    }
}

fn ptrace(request: libc::c_uint, thread: libc::pid_t, data: usize, signal: usize) -> io::Result<()> {
    let data = if data != 0 { data } else { signal };
    // SAFETY: the requests used here take an integer as data, and no address.
    let result = unsafe { libc::ptrace(request, thread, ptr::null_mut::<u8>(), data as *mut u8) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Which system call the thread stopped at, on which side, and its arguments.
fn system_call(
    thread: libc::pid_t,
    calls: &mut HashMap<libc::pid_t, (libc::c_long, [u64; 6])>,
) -> Option<(Moment, [u64; 6])> {
    // SAFETY: all-zero bytes are a valid ptrace_syscall_info.
    let mut info: libc::ptrace_syscall_info = unsafe { zeroed() };
    // SAFETY: the address is the size of the buffer that data points to, as this request wants it.
    let filled = unsafe {
        libc::ptrace(
            libc::PTRACE_GET_SYSCALL_INFO,
            thread,
            size_of::<libc::ptrace_syscall_info>() as *mut u8,
            ptr::from_mut(&mut info).cast::<u8>(),
        )
    };
    if filled < 0 {
        return None;
    }
    if info.op == libc::PTRACE_SYSCALL_INFO_ENTRY {
        // SAFETY: `op` says that `entry` is the variant.
        let entry = unsafe { info.u.entry };
        let call = (entry.nr as libc::c_long, entry.args);
        calls.insert(thread, call);
        return Some((Moment::Before(call.0), call.1));
    }
    calls.remove(&thread).map(|(number, arguments)| (Moment::After(number), arguments))
}
