//! Frees ports: from selected listeners to a [`Plan`], from the plan to one [`Outcome`] per port and protocol.
//!
//! ```text
//!  Plan ─► signal the masters ─► wait: pidfds, port ─► signal who is left ─► wait ─► settle ─► bind() ─► Outcome
//!              (each: open a pidfd, verify, signal)          (SIGKILL)
//! ```
//!
//! This module owns who is signalled ([`plan`], [`kin`], [`starters`]) and who never ([`guards`]), what a person should know before
//! ([`preview`], [`concern`]), how it is made sure that nobody else is hit ([`target`]), the containers and units that are
//! stopped instead ([`stop`]), the sockets that are closed without their holders ([`close`]), the directories that are removed
//! after them ([`directories`]), the waiting ([`execute`]) and what is said of it ([`outcome`], [`text`]). None of these scans:
//! [`job`], the whole way from a selector to the outcomes, hands them what was scanned, and a way to scan again; [`cleanup`]
//! goes that way until nothing more appears.

mod aftermath;
#[doc(hidden)]
pub mod cleanup;
mod close;
#[doc(hidden)]
pub mod concern;
mod directories;
#[doc(hidden)]
pub mod execute;
mod guards;
#[doc(hidden)]
pub mod job;
#[doc(hidden)]
pub mod kin;
mod life;
#[doc(hidden)]
pub mod outcome;
#[doc(hidden)]
pub mod plan;
#[doc(hidden)]
pub mod preview;
#[doc(hidden)]
pub mod progress;
mod prove;
mod report;
mod sight;
#[doc(hidden)]
pub mod signal;
mod starters;
mod stop;
#[doc(hidden)]
pub mod target;
#[doc(hidden)]
pub mod text;
mod why;

pub use cleanup::{Cleaned, Cleanup, Ended, Leak, Restarter};
pub use concern::Concern;
pub use directories::Directories;
pub use execute::{Options, World, execute};
pub use guards::{Guards, Units};
pub use job::{Choice, Job, Terms};
pub use kin::Reach;
pub use outcome::{Outcome, Status, exit_code};
pub use plan::{Group, Plan, Refused, Spared, Stop, Victim};
pub use progress::{Progress, Step};
pub(crate) use report::not_permitted;
pub use stop::{StopError, Stopper, Stopping, Whole};

#[cfg(test)]
mod testing;
