//! portwatch: which processes own which listening ports on this host — exactly, and without polling.
//!
//! Data flows one way: a [`source`] turns what the kernel says into [`model::Event`]s, the [`table`] applies them and
//! says what changed, a [`select::Selector`] picks listeners, [`kill`] acts on them and [`render`] shows them.

pub mod agent;
pub mod cgroup;
pub mod client;
pub mod config;
pub mod diagnose;
pub mod engine;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
pub mod history;
pub mod kill;
pub mod mark;
pub mod metrics;
pub mod model;
pub mod render;
pub mod rules;
pub mod run;
pub mod select;
pub mod service;
pub mod source;
pub mod supervisor;
pub mod sweep;
pub mod table;
pub mod tracker;
pub mod waiting;
pub mod wire;
