//! Globs as people and clients write them, each small enough to be compiled whoever wrote it.

use globset::{GlobBuilder, GlobMatcher};

use crate::render::escape;

/// Longest glob in bytes, and how deep its alternatives may nest: what compiles to a small matcher without much stack.
const MAX_GLOB: usize = 1024;
const MAX_DEPTH: usize = 8;

/// Whether a glob is small enough to be compiled, whoever wrote it.
///
/// # Errors
/// A sentence that says what is too much.
fn is_bounded(glob: &str) -> Result<(), String> {
    if glob.len() > MAX_GLOB {
        return Err(format!("a glob of {} bytes is too long; {MAX_GLOB} are allowed", glob.len()));
    }
    let mut depth = 0_usize;
    for c in glob.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Err(format!("a glob with {{ in {{ is too deep; {MAX_DEPTH} levels are allowed"));
        }
    }
    Ok(())
}

/// Of names, command lines and directories; `*` matches `/` too.
///
/// # Errors
/// What is wrong with it, in a few words.
pub fn glob(text: &str) -> Result<GlobMatcher, String> {
    compile(text, true)
}

/// Of units, as systemctl takes it: a backslash is part of a unit's name (`my\x2dapp.service`).
///
/// # Errors
/// As [`glob`].
pub fn unit_glob(text: &str) -> Result<GlobMatcher, String> {
    compile(text, false)
}

fn compile(text: &str, backslash_escapes: bool) -> Result<GlobMatcher, String> {
    is_bounded(text)?;
    let glob = GlobBuilder::new(text).backslash_escape(backslash_escapes).build();
    glob.map(|glob| glob.compile_matcher()).map_err(|error| escape(&error.kind().to_string()).into_owned())
}
