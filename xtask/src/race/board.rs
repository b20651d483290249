//! What the actors of a round write down, in memory that all of them share: who each of them is, when it came to hold
//! the port and let go of it, and the first signal that it got.
//!
//! Each field is written by one process, the actor itself or the one who hands it the socket, and judged when the round
//! is over. Moments are ns of CLOCK_MONOTONIC; 0 stands for never.

use std::mem::size_of;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::time::{ClockId, clock_gettime};

/// More than any round has actors.
const SLOTS: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) pid: AtomicU32,
    /// When it came to hold the listener of the round, or was about to be handed it.
    pub(super) held: AtomicU64,
    /// When it was about to close it, or to exit.
    pub(super) let_go: AtomicU64,
    /// When it had bound the port anew, with a socket of its own.
    pub(super) took: AtomicU64,
    pub(super) signalled: AtomicU64,
    /// Number of the first signal.
    pub(super) signal: AtomicU32,
}

#[derive(Debug)]
pub(super) struct Shared {
    used: AtomicU32,
    /// The port of the round, and that of the neighbour.
    pub(super) ports: [AtomicU32; 2],
    /// Those of the sockets that are to be freed.
    pub(super) inodes: [AtomicU64; 2],
    /// When a holder was first seen to be signalled.
    pub(super) struck: AtomicU64,
    /// When the command had ended: nobody acts any more.
    pub(super) over: AtomicU64,
    slots: [Slot; SLOTS],
}

/// The memory; mapped for as long as the process lives, its children's too.
#[derive(Clone, Copy, Debug)]
pub(super) struct Board(NonNull<Shared>);

impl Board {
    pub(super) fn new() -> Result<Board> {
        let size = NonZeroUsize::new(size_of::<Shared>()).context("an empty board")?;
        let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a mapping at an address of the kernel's choice touches no other memory.
        let memory = unsafe { mmap_anonymous(None, size, protection, flags) }.context("cannot map the board")?;
        Ok(Board(memory.cast()))
    }

    /// Only while no actor lives.
    pub(super) fn clear(&self) {
        for slot in &self.slots {
            let Slot { pid, held, let_go, took, signalled, signal } = slot;
            [held, let_go, took, signalled].into_iter().for_each(|moment| moment.store(0, SeqCst));
            [pid, signal].into_iter().for_each(|number| number.store(0, SeqCst));
        }
        [&self.used, &self.ports[0], &self.ports[1]].into_iter().for_each(|number| number.store(0, SeqCst));
        [&self.struck, &self.over, &self.inodes[0], &self.inodes[1]]
            .into_iter()
            .for_each(|moment| moment.store(0, SeqCst));
    }

    /// A place for one more actor.
    pub(super) fn seat(&self) -> usize {
        let index = self.used.fetch_add(1, SeqCst) as usize;
        assert!(index < SLOTS, "more actors than seats");
        index
    }

    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots[..(self.used.load(SeqCst) as usize).min(SLOTS)]
    }
}

impl Deref for Board {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        // SAFETY: mapped for ever, of this size and aligned to a page; all-zero bytes are valid atomics, and whoever
        // writes does so through them.
        unsafe { self.0.as_ref() }
    }
}

/// Writes down this moment, unless one was before.
pub(super) fn mark(moment: &AtomicU64) {
    // A value that was there first stays.
    let _first = moment.compare_exchange(0, now(), SeqCst, SeqCst);
}

/// CLOCK_MONOTONIC in ns.
pub(super) fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(std::time::Duration::ZERO, std::time::Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
