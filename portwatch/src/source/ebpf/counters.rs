//! The kernel's counters of records made and dropped.

use std::os::fd::AsFd as _;
use std::ptr::NonNull;

use anyhow::{Context as _, bail};
use aya::maps::Map;
use portwatch_ebpf::{COUNTER_SLOTS, Counters};

/// The kernel's counters, mapped into memory: looking at them costs no system call.
pub(super) struct CounterMap {
    slots: NonNull<Counters>,
}

// SAFETY: the mapping belongs to this value alone and is only read, by volatile loads.
unsafe impl Send for CounterMap {}

impl CounterMap {
    const BYTES: usize = COUNTER_SLOTS as usize * size_of::<Counters>();

    pub(super) fn new(map: &Map) -> anyhow::Result<CounterMap> {
        let Map::Array(map) = map else { bail!("the probes' counters are no array") };
        // SAFETY: a fresh mapping at an address that the kernel chooses.
        let address = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                Self::BYTES,
                rustix::mm::ProtFlags::READ,
                rustix::mm::MapFlags::SHARED,
                map.fd().as_fd(),
                0,
            )
        }
        .context("cannot map the kernel's counters")?;
        Ok(CounterMap { slots: NonNull::new(address.cast()).context("the kernel's counters were mapped at null")? })
    }

    pub(super) fn sum(&self) -> Counters {
        let mut sum = Counters::default();
        for slot in 0..COUNTER_SLOTS as usize {
            // SAFETY: within the mapping, aligned; the kernel may write at the same time, hence volatile.
            let counters = unsafe { self.slots.add(slot).read_volatile() };
            sum.produced += counters.produced;
            sum.dropped += counters.dropped;
        }
        sum
    }
}

impl Drop for CounterMap {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, not used after this.
        let _ = unsafe { rustix::mm::munmap(self.slots.as_ptr().cast(), Self::BYTES) };
    }
}
