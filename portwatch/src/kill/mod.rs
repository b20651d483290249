//! Frees ports: from selected listeners to a [`Plan`], from the plan to one [`Outcome`] per port and protocol.
//!
//! ```text
//!  Plan ─► signal the masters ─► wait: pidfds, port ─► signal who is left ─► wait ─► settle ─► bind() ─► Outcome
//!              (each: open a pidfd, verify, signal)          (SIGKILL)
//! ```
//!
//! This module owns who is signalled ([`plan`]), how it is made sure that nobody else is ([`target`]), the waiting
//! ([`execute`]) and what is said of it ([`outcome`], [`text`]). It does not scan: its callers hand it what was scanned, and a
//! way to scan again.

pub mod execute;
mod life;
pub mod outcome;
pub mod plan;
pub mod progress;
mod prove;
mod report;
mod sight;
pub mod signal;
pub mod target;
pub mod text;
mod why;

pub use execute::{Options, World, execute, planned};
pub use outcome::{Outcome, Status, exit_code};
pub use plan::{Guards, Plan};
pub use progress::{Progress, Step};

#[cfg(test)]
mod testing;
