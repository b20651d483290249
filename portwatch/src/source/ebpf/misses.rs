//! Runs of our programs that the kernel skipped, and when to ask for their number.
//!
//! While a CPU is in the middle of a tracing program, the kernel skips that program for whatever happens on the same CPU
//! meanwhile (a kprobe: any program, or a write to any BPF map), and counts this in `recursion_misses` of the program
//! (`bpf_prog_info`, 5.12; of kprobes since 6.7; 0 before). Our own counters see nothing of it: not a line of ours ran.
//! On a kernel that does not preempt itself, only an interrupt comes in between, and none opens, closes or forks. Where
//! it does preempt, another task may: its event is lost.
//!
//! Who notices? Nothing wakes us for a skipped run itself. So the number is asked for
//! - [`AFTER`] a record was taken, once for all that came meanwhile. Not at once: the run that was in the way submits its
//!   record, which wakes us, which may preempt it before it is over. (Seen on 6.12 with `preempt=full`, tier fexit: of
//!   20,000 listeners that eight processes open as fast as they can, a fourth was skipped.) So a record costs no system
//!   call, a second of events without pause a hundred looks, and the last record one look, and then none.
//! - whenever somebody asks what is open: an answer never lacks what was skipped before the question.
//!
//! What is left: a run that was in the way and had nothing to tell (the end of an unbound UDP socket), or was kept from
//! going on for longer than [`AFTER`], on a kernel that preempts. A watcher hears of what was skipped then with the next
//! event on the host, or the next question. To look by the clock would end that too; but then something would run while
//! nothing happens.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use aya::Ebpf;
use aya::programs::Program;
use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_prog_info};
use nix::libc;
use tokio::time::Instant;

/// How long after a record the number is asked for: a program runs for microseconds, and waits for a processor for a few
/// milliseconds where it is preempted.
const AFTER: Duration = Duration::from_millis(10);

#[derive(Debug, Default)]
pub(super) struct Misses {
    /// As last asked for.
    seen: u64,
    due: Option<Instant>,
}

impl Misses {
    /// A record was taken.
    pub(super) fn expect(&mut self) {
        self.due.get_or_insert_with(|| Instant::now() + AFTER);
    }

    /// When to look although nothing happens.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Runs skipped since the last look, if it is time for one.
    pub(super) fn look_if_due(&mut self, ebpf: &Ebpf) -> u64 {
        match self.due.take_if(|due| *due <= Instant::now()) {
            Some(_) => self.look(ebpf),
            None => 0,
        }
    }

    /// Runs skipped since the last look.
    pub(super) fn look(&mut self, ebpf: &Ebpf) -> u64 {
        let total = ebpf.programs().map(|(_, program)| recursion_misses(program)).sum();
        let before = std::mem::replace(&mut self.seen, total);
        total.saturating_sub(before)
    }

    /// Runs skipped since the programs were loaded, as last asked for.
    pub(super) fn seen(&self) -> u64 {
        self.seen
    }
}

/// 0 for a program that is not loaded, or that the kernel never skips, and where it does not count.
fn recursion_misses(program: &Program) -> u64 {
    let is_skipped =
        matches!(program, Program::BtfTracePoint(_) | Program::FEntry(_) | Program::FExit(_) | Program::KProbe(_));
    if !is_skipped {
        return 0;
    }
    let Ok(fd) = program.fd() else { return 0 };
    // SAFETY: both are plain integers, of which all may be 0; nothing else is asked for than what is in the struct.
    let (mut info, mut attr) = unsafe { (std::mem::zeroed::<bpf_prog_info>(), std::mem::zeroed::<bpf_attr>()) };
    attr.info.bpf_fd = fd.as_fd().as_raw_fd().cast_unsigned();
    attr.info.info_len = size_of_val(&info) as u32;
    attr.info.info = &raw mut info as u64;
    // SAFETY: the kernel writes at most `info_len` bytes to `info`, which outlives the call; a field that it does not
    // know stays 0.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, bpf_cmd::BPF_OBJ_GET_INFO_BY_FD as libc::c_int, &raw mut attr, size_of_val(&attr))
    };
    if result == 0 { info.recursion_misses } else { 0 }
}
