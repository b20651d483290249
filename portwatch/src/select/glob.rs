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

/// Of working directories, as [`glob`], of a path that need not be as short as the kernel tells it: `.`, `..` and slashes
/// too many go. No link is followed. A relative path begins at `here`, which is asked for then; one that begins with a
/// glob may mean any directory.
///
/// # Errors
/// As [`glob`]; that of `here`; and where `..` follows a glob.
pub fn cwd_glob(text: &str, here: &dyn Fn() -> Result<String, String>) -> Result<GlobMatcher, String> {
    if text.is_empty() {
        return Err("an empty path names no directory; use . for this one".to_owned());
    }
    let anywhere = text.starts_with(SPECIAL);
    let base = if anywhere || text.starts_with('/') { String::new() } else { literal(&here()?) };
    let mut parts: Vec<&str> = Vec::new();
    for part in components(&base).into_iter().chain(components(text)) {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| has_glob(last)) => {
                return Err("'..' after a glob leads to no one directory; write the path without it".to_owned());
            }
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    let root = if anywhere { "" } else { "/" };
    compile(&format!("{root}{}", parts.join("/")), true)
}

/// What begins a glob.
const SPECIAL: [char; 4] = ['*', '?', '[', '{'];

/// A glob that matches just this.
fn literal(path: &str) -> String {
    let is_special = |c: char| SPECIAL.contains(&c) || matches!(c, '\\' | ']' | '}');
    path.chars().flat_map(|c| is_special(c).then_some('\\').into_iter().chain([c])).collect()
}

fn has_glob(part: &str) -> bool {
    let mut chars = part.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            c if SPECIAL.contains(&c) => return true,
            _ => {}
        }
    }
    false
}

/// The parts of a path between its slashes, but for those within `[…]` and `{…}`.
fn components(glob: &str) -> Vec<&str> {
    let (mut parts, mut begin, mut depth) = (Vec::new(), 0, 0_usize);
    let mut chars = glob.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            '[' => {
                chars.next_if(|(_, c)| matches!(c, '!' | '^'));
                // The first character of a class does not end it.
                chars.next();
                while chars.next_if(|(_, c)| *c != ']').is_some() {}
            }
            '/' if depth == 0 => {
                parts.push(&glob[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&glob[begin..]);
    parts
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

#[cfg(test)]
mod tests {
    use super::*;

    fn meant(text: &str) -> Result<String, String> {
        let glob = cwd_glob(text, &|| Ok("/home/al/a [b]*".to_owned()))?;
        Ok(glob.glob().glob().to_owned())
    }

    #[test]
    fn a_directory_is_meant_however_its_path_is_written() {
        for (text, want) in [
            ("/tmp/web_*", "/tmp/web_*"),
            ("/tmp/web_*/", "/tmp/web_*"),
            ("//tmp///x//", "/tmp/x"),
            ("/tmp/./x/.", "/tmp/x"),
            ("/tmp/../srv/x/..", "/srv"),
            ("/../..", "/"),
            ("/", "/"),
            (".", r"/home/al/a \[b\]\*"),
            ("./", r"/home/al/a \[b\]\*"),
            ("x", r"/home/al/a \[b\]\*/x"),
            ("./x*/", r"/home/al/a \[b\]\*/x*"),
            ("..", "/home/al"),
            ("../y", "/home/al/y"),
            ("../../../../y", "/y"),
            (".hidden/..x", r"/home/al/a \[b\]\*/.hidden/..x"),
            ("x/{a,b/../c}[!/].", r"/home/al/a \[b\]\*/x/{a,b/../c}[!/]."),
            ("./[]/]/y", r"/home/al/a \[b\]\*/[]/]/y"),
            (r"/x\*/../y", "/y"),
            // These have matched whole paths ever since.
            ("*", "*"),
            ("*/web/", "*/web"),
            ("**/web/./x", "**/web/x"),
            ("{/tmp,/srv}/x", "{/tmp,/srv}/x"),
            ("[/]tmp", "[/]tmp"),
            ("?tmp", "?tmp"),
        ] {
            assert_eq!(meant(text), Ok(want.to_owned()), "{text}");
        }
        let after = "'..' after a glob leads to no one directory; write the path without it";
        for (text, want) in [
            ("", "an empty path names no directory; use . for this one"),
            ("/tmp/*/..", after),
            ("*/../x", after),
            ("x{a,b}/..", after),
        ] {
            assert_eq!(meant(text), Err(want.to_owned()), "{text}");
        }
        assert!(meant("/a[").is_err() && meant("/a{b").is_err());
    }

    #[test]
    fn a_name_that_looks_like_a_glob_is_a_name_where_it_is_ones_own() {
        for here in [r"/tmp/a*b", r"/tmp/a?", r"/tmp/[ab]", r"/tmp/{a,b}", r"/tmp/a\*", "/tmp/a]}!^,-", "/"] {
            let glob = cwd_glob(".", &|| Ok(here.to_owned())).unwrap();
            assert!(glob.is_match(here), "{here}");
            assert!(!["/tmp/axb", "/tmp/ab", "/tmp/a"].iter().any(|other| glob.is_match(other)), "{here}");
        }
    }

    #[test]
    fn where_one_is_is_asked_only_of_a_relative_path() {
        let nowhere = || Err("nowhere".to_owned());
        assert!(cwd_glob("/x/..", &nowhere).is_ok() && cwd_glob("*/x", &nowhere).is_ok());
        assert_eq!(cwd_glob("x", &nowhere).unwrap_err(), "nowhere");
    }
}
