//! The way to userspace: one ring of records, and counters of what was made and what found no room.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_MMAPABLE,
    helpers::generated::bpf_get_smp_processor_id,
    macros::map,
    maps::{Array, RingBuf},
};
use aya_log_ebpf::debug;
use portwatch_ebpf::{COUNTER_SLOTS, Counters, Record};

/// Records for userspace. The loader may change the size.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);

/// One slot a CPU; userspace maps it into memory, so that looking costs no system call.
#[map]
static COUNTERS: Array<Counters> = Array::with_max_entries(COUNTER_SLOTS, BPF_F_MMAPABLE);

#[inline(always)]
fn slot() -> u32 {
    // SAFETY: no arguments.
    unsafe { bpf_get_smp_processor_id() & (COUNTER_SLOTS - 1) }
}

/// Adds one to a counter of this CPU. Plain stores may be interleaved by preemption, so the addition is atomic; its
/// result is not asked for, which every kernel with eBPF can do.
#[inline(always)]
fn count(field: impl Fn(&mut Counters) -> *mut u64) {
    if let Some(counters) = COUNTERS.get_ptr_mut(slot()) {
        // SAFETY: the pointer is a slot of the map, valid while the program runs.
        unsafe {
            let counter = field(&mut *counters);
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1);
        }
    }
}

/// Counts something of which userspace will not hear, so that it reads a snapshot instead.
#[inline(always)]
pub(crate) fn count_lost() {
    count(|c| &raw mut c.produced);
    count(|c| &raw mut c.dropped);
}

/// Hands a record to userspace, or counts it as dropped. It is counted as produced before the ring is asked, so that
/// userspace, which compares the counts, can never miss a drop.
#[inline(always)]
pub(crate) fn emit<C: EbpfContext>(ctx: &C, mut record: Record) {
    count(|c| &raw mut c.produced);
    // SAFETY: as in `count`.
    record.seq = COUNTERS.get_ptr(slot()).map_or(0, |c| unsafe { (*c).produced });
    if EVENTS.output::<Record>(&record, 0).is_err() {
        count(|c| &raw mut c.dropped);
        debug!(ctx, "the ring is full: an event is lost");
    }
}
