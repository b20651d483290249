//! What must hold for every parser whatever it reads, one function for each: no part of the API. The fuzzer calls them
//! (`cargo xtask fuzz`, the crate in `portwatch/fuzz`), and so do ordinary tests, with the same seeds.
//!
//! A function takes any bytes and panics where something is wrong. More is asked than that nothing panics: what has a
//! writer is read back, what is read in two ways is read the same, and nothing hostile reaches a terminal or a shell.
//! How much memory and time an input may take is what the fuzzer is told.
//!
//! A new one has its function here and in [`TARGETS`], a file in `portwatch/fuzz/fuzz_targets` with its `[[bin]]`, and a
//! few small seeds in `portwatch/fuzz/corpus`; a test says what is missing.

mod firewall;
mod kernel;
mod people;
mod proc;
mod supervisor;
#[cfg(test)]
mod tests;
mod wire;

pub use self::firewall::{engine, firewall};
pub use self::kernel::{btf, netlink, record};
pub use self::people::{config, glob, targets, text};
pub use self::proc::proc;
pub use self::supervisor::supervisor;
pub use self::wire::{request, response};

use crate::render::is_hazard;

/// What must hold of any bytes.
pub type Property = fn(&[u8]);

/// Every property, by the name of its fuzz target.
pub const TARGETS: &[(&str, Property)] = &[
    ("btf", btf),
    ("config", config),
    ("engine", engine),
    ("firewall", firewall),
    ("glob", glob),
    ("netlink", netlink),
    ("proc", proc),
    ("record", record),
    ("request", request),
    ("response", response),
    ("supervisor", supervisor),
    ("targets", targets),
    ("text", text),
];

/// A sentence for a terminal: one line, without anything that the terminal would obey.
fn assert_one_line(sentence: &str) {
    assert!(!sentence.contains(is_hazard), "{sentence:?}");
}

/// Text of several lines without anything else that the terminal would obey.
fn assert_lines(text: &str) {
    text.split('\n').for_each(assert_one_line);
}

/// A command that people paste into a shell: plain words, and quoted ones that end where they seem to.
fn assert_shell(command: &str) {
    let mut rest = command.chars();
    while let Some(c) = rest.next() {
        let quoted = match c {
            '\'' => rest.by_ref().any(|c| c == '\''),
            // `$'…'`, in which a backslash hides what follows.
            '$' if rest.as_str().starts_with('\'') => {
                rest.next();
                std::iter::from_fn(|| rest.next())
                    .scan(false, |hidden, c| {
                        let ends = c == '\'' && !*hidden;
                        *hidden = c == '\\' && !*hidden;
                        Some(ends)
                    })
                    .any(|ends| ends)
            }
            '\\' => rest.next() == Some('\''),
            c => c.is_ascii_alphanumeric() || "@%+=:,./_-# !".contains(c),
        };
        assert!(quoted, "{c:?} in {command:?}");
    }
    assert_one_line(command);
}
