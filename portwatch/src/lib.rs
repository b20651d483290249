//! portwatch: which processes own which listening ports on this host — exactly, and without polling.
//!
//! Data flows one way: a source turns what the kernel says into events, a table applies them and says what changed, a
//! [`select::Selector`] picks listeners, [`kill`] acts on them.
//!
//! # Embedding
//!
//! | to | use | example |
//! |---|---|---|
//! | see who has which port | [`snapshot`] | `examples/list.rs` |
//! | pick ports | [`selector`], [`select::Filters`] | all of them |
//! | plan a kill, look at it, carry it out | [`kill::Choice`], [`kill::Job`] | `examples/free.rs` |
//! | be told of every change | [`changes`], a stream | `examples/watch.rs` |
//! | ask the agent | [`client::Client`], [`wire`] | `examples/agent.rs` |
//! | run a command of which nothing is left behind | [`run::supervise`] | `examples/supervise.rs` |
//!
//! ```no_run
//! for listener in portwatch::snapshot(&portwatch::selector(&["3000-3999", "8000/tcp"])?)? {
//!     let holder = listener.binder().map(|holder| holder.process.name.as_str());
//!     println!("{} {}", listener.socket.port, holder.unwrap_or("nobody visible"));
//! }
//! # Ok::<(), anyhow::Error>(())
//! ```
//! Modules that are not shown here are the program's own and promise nothing. Strings of processes are as the processes
//! chose them: escape them before a terminal sees them.

#[doc(hidden)]
pub mod agent;
#[doc(hidden)]
pub mod cgroup;
pub mod client;
#[doc(hidden)]
pub mod config;
#[doc(hidden)]
pub mod diagnose;
mod embed;
#[doc(hidden)]
pub mod engine;
#[doc(hidden)]
pub mod feed;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing;
#[doc(hidden)]
pub mod history;
pub mod kill;
#[doc(hidden)]
pub mod mark;
#[doc(hidden)]
pub mod metrics;
pub mod model;
#[doc(hidden)]
pub mod place;
#[doc(hidden)]
pub mod render;
#[doc(hidden)]
pub mod rules;
pub mod run;
pub mod select;
#[doc(hidden)]
pub mod service;
#[doc(hidden)]
pub mod source;
#[doc(hidden)]
pub mod supervisor;
#[doc(hidden)]
pub mod sweep;
#[doc(hidden)]
pub mod table;
#[doc(hidden)]
pub mod tracker;
#[doc(hidden)]
pub mod waiting;
pub mod wire;

pub use embed::{changes, selector, snapshot};
pub use source::{Probe, Scanner, Tier};
