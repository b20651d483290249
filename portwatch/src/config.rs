//! The configuration: `/etc/portwatch/config.toml`, then the user's own, whose sets replace those of the same name.
//! `$PORTWATCH_CONFIG` names one file instead of both.
//!
//! ```toml
//! [sets]
//! web = [8000, "3000-3005", "8080/tcp", "127.0.0.1:9000"]
//! db = "5432,6379"
//! [access]
//! list = "own"
//! kill = "wheel"
//! ```
//! Owns which files are read, whether they may be trusted, and what they mean. Sets are asked for only where a target
//! names one, so that a broken file never keeps a port from being freed by number; other tables are passed over then.
//! `[access]` is for the [agent](crate::agent) alone, which reads one file: the host's, or the one that it is told, and
//! nobody's own; so are the `[[rule]]`s. It refuses a file with a table that it does not know: of a misspelt `[access]`,
//! all would be told to all. [`sets_in`], [`access_in`] and [`rules_in`] are pure.

mod access;
mod rules;

use std::ffi::OsString;
use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::{Span, SpanRelativeTo};
use nix::libc;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

pub use self::access::{Access, Killers, Told, access_in};
pub use self::rules::{LookUp, rules_in};
use crate::render::escape;
use crate::rules::Rule;
use crate::select::{Sets, Target, builtin_sets, parse_targets};

/// The file of the host.
const SYSTEM: &str = "/etc/portwatch/config.toml";

/// Names one file that is read instead of the others.
const VARIABLE: &str = "PORTWATCH_CONFIG";

/// More than anybody writes: past this, the path names something else.
const MAX_BYTES: u64 = 1 << 20;

/// Why there is no configuration, as one line.
#[derive(Debug)]
pub enum ConfigError {
    /// The file means nothing, or may not be trusted: its author has to do something.
    Broken(String),
    /// The file that somebody named is not there.
    Missing(PathBuf),
    Unreadable(PathBuf, io::Error),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigError::Broken(what) => f.write_str(what),
            ConfigError::Missing(path) => {
                write!(f, "cannot read the configuration {}: there is no such file", shown(path))
            }
            // The error itself is the source, which whoever prints this prints too.
            ConfigError::Unreadable(path, _) => {
                write!(f, "cannot read the configuration {}; set {VARIABLE} to another file", shown(path))
            }
        }
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ConfigError::Broken(_) | ConfigError::Missing(_) => None,
            ConfigError::Unreadable(_, error) => Some(error),
        }
    }
}

/// The sets built in and those of the files. `variable` reads the environment; `euid` is who runs this.
///
/// # Errors
/// Where a file exists that cannot be read, understood or, as root, trusted.
pub fn sets(variable: &dyn Fn(&str) -> Option<OsString>, euid: u32) -> Result<Sets, ConfigError> {
    let (paths, is_required) = places(variable);
    // What @name means decides what root kills.
    let reader = (euid == 0).then_some(Reader { name: "root", trusts: 0 });
    let mut sets = builtin_sets();
    for path in paths {
        let text = match read(&path, reader) {
            Err(ConfigError::Missing(_)) if !is_required => continue,
            other => other?,
        };
        sets.extend(sets_in(&text).map_err(|bad| bad.at(&path))?);
    }
    Ok(sets)
}

/// What the agent is to tell and to do for whom: `file` says so, which must exist, else that of the host, if there is
/// one. `euid` is who runs the agent; `gid_of` looks up a group.
///
/// # Errors
/// Where a file exists that cannot be read, understood or trusted.
pub fn access(file: Option<&Path>, euid: u32, gid_of: &dyn Fn(&str) -> Option<u32>) -> Result<Access, ConfigError> {
    let path = file.unwrap_or(Path::new(SYSTEM));
    match read(path, Some(Reader { name: "the agent", trusts: euid })) {
        Err(ConfigError::Missing(_)) if file.is_none() => Ok(Access::default()),
        text => access_in(&text?, gid_of).map_err(|bad| bad.at(path)),
    }
}

/// The rules of the agent, from the same file as [`access`].
///
/// # Errors
/// As [`access`].
pub fn rules(file: Option<&Path>, euid: u32, look_up: &LookUp<'_>) -> Result<Vec<Rule>, ConfigError> {
    let path = file.unwrap_or(Path::new(SYSTEM));
    match read(path, Some(Reader { name: "the agent", trusts: euid })) {
        Err(ConfigError::Missing(_)) if file.is_none() => Ok(Vec::new()),
        text => rules_in(&text?, look_up).map_err(|bad| bad.at(path)),
    }
}

/// Anything that people write for a length of time: `90s`, `24h`, `1h 30m`, `2 days` (of 24 hours).
///
/// # Errors
/// What to write, in a few words.
pub fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    text.parse::<Span>()
        .and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()))
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .ok_or_else(|| "use a duration such as 250ms, 90s or 24h".to_owned())
}

/// Whether there is no such file: not there, below what is no directory, or by a name that none can have.
pub fn is_absent(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::InvalidFilename)
}

fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy()).into_owned()
}

/// The files to read, the later ones having the last word, and whether it is an error that one does not exist.
fn places(variable: &dyn Fn(&str) -> Option<OsString>) -> (Vec<PathBuf>, bool) {
    // An empty variable is one that is not set.
    let path = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(only) = path(VARIABLE) {
        return (vec![only], true);
    }
    // A relative path in XDG_CONFIG_HOME is to be ignored (XDG base directory specification).
    let home = path("XDG_CONFIG_HOME").filter(|path| path.is_absolute());
    let home = home.or_else(|| path("HOME").map(|home| home.join(".config")));
    let own = home.map(|home| home.join("portwatch/config.toml"));
    (std::iter::once(PathBuf::from(SYSTEM)).chain(own).collect(), false)
}

/// Somebody who believes root, and no others but perhaps one.
#[derive(Clone, Copy)]
struct Reader {
    name: &'static str,
    /// A uid beside root's.
    trusts: u32,
}

/// `reader` is `None` where it does not matter who wrote the file.
fn read(path: &Path, reader: Option<Reader>) -> Result<String, ConfigError> {
    let unreadable = |error: io::Error| match is_absent(error.kind()) {
        true => ConfigError::Missing(path.to_owned()),
        false => ConfigError::Unreadable(path.to_owned(), error),
    };
    let broken = |what: &str| ConfigError::Broken(format!("{}: {what}", shown(path)));
    // A fifo or a device must neither block nor be read: opened, looked at, refused.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file: File = file.map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err(broken("not a regular file; put the configuration into one"));
    }
    if let Some(why) = reader.and_then(|reader| distrust(&meta, reader)) {
        return Err(broken(&why));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(broken("larger than 1 MiB; a configuration has a few lines"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let line = 1 + error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        ConfigError::Broken(format!("{}:{line}: not UTF-8; write it as UTF-8 text", shown(path)))
    })
}

/// Why it is not read: nobody else may write what decides what is done with privileges.
fn distrust(meta: &Metadata, Reader { name, trusts }: Reader) -> Option<String> {
    if ![0, trusts].contains(&meta.uid()) {
        return Some(format!("belongs to uid {}, so {name} does not read it; chown it to root", meta.uid()));
    }
    let writers = match (meta.mode() & 0o020 != 0, meta.mode() & 0o002 != 0) {
        (_, true) => "everybody",
        (true, false) => "its group",
        (false, false) => return None,
    };
    Some(format!("{writers} may write it, so {name} does not read it; run `chmod go-w` on it"))
}

/// What is wrong with a text, and in which line (from 1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    pub line: usize,
    pub what: String,
}

impl Bad {
    fn new(text: &str, span: &Range<usize>, what: String) -> Bad {
        Bad { line: 1 + text.bytes().take(span.start).filter(|byte| *byte == b'\n').count(), what }
    }

    fn at(self, path: &Path) -> ConfigError {
        ConfigError::Broken(format!("{}:{}: {}", shown(path), self.line, self.what))
    }
}

fn parse(text: &str) -> Result<Spanned<DeTable<'_>>, Bad> {
    DeTable::parse(text).map_err(|error| {
        // The message may have several lines, and be about the end of the text.
        let what = error.message().lines().next().unwrap_or("not understood").to_owned();
        Bad::new(text, &error.span().unwrap_or(0..0), format!("{}; see https://toml.io", escape(&what)))
    })
}

/// Refuses what is in no table of the configuration, where that would pass for what was not written.
fn known(text: &str, document: &Spanned<DeTable<'_>>) -> Result<(), Bad> {
    let entries = document.get_ref().iter();
    let unknown = entries.filter(|(name, _)| !["sets", "access", "rule"].contains(&&**name.get_ref()));
    let Some((name, value)) = unknown.min_by_key(|(name, _)| name.span().start) else { return Ok(()) };
    let shown = name.get_ref().escape_debug();
    let what = match value.get_ref() {
        DeValue::Table(_) => format!("there is no table [{shown}]"),
        DeValue::Array(items) if items.iter().any(|item| matches!(item.get_ref(), DeValue::Table(_))) => {
            format!("there is no table [[{shown}]]")
        }
        _ => format!("'{shown}' is in no table"),
    };
    Err(Bad::new(text, &name.span(), format!("{what}; a configuration has [sets], [access] and [[rule]]")))
}

/// The entries of a table, if there is one of that name.
fn table<'a, 't>(text: &str, document: &'a Spanned<DeTable<'t>>, name: &str) -> Result<Option<&'a DeTable<'t>>, Bad> {
    match document.get_ref().get(name) {
        None => Ok(None),
        Some(table) => match table.get_ref() {
            DeValue::Table(entries) => Ok(Some(entries)),
            _ => {
                let what = format!("'{name}' is not a table; write [{name}] on a line of its own");
                Err(Bad::new(text, &table.span(), what))
            }
        },
    }
}

/// The sets that the text of a configuration defines. Sets may not name other sets.
///
/// # Errors
/// Where the text is not TOML, or `[sets]` says what no set can be. Other tables are not looked at.
pub fn sets_in(text: &str) -> Result<Sets, Bad> {
    let bad = |span: Range<usize>, what: String| Bad::new(text, &span, what);
    let document = parse(text)?;
    let mut sets = Sets::new();
    let Some(entries) = table(text, &document, "sets")? else { return Ok(sets) };
    for (name, value) in entries {
        if name.get_ref().is_empty() || !name.get_ref().bytes().all(is_name_byte) {
            let what =
                format!("'{}' cannot name a set; use letters, digits, '-' and '_'", name.get_ref().escape_debug());
            return Err(bad(name.span(), what));
        }
        let in_set = |what: &str| format!("set '{}': {what}", name.get_ref());
        let items = match value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            DeValue::String(_) | DeValue::Integer(_) => vec![value],
            other => {
                let what = in_set(&format!(
                    "a value of type {} is no list of ports; use [8000, \"3000-3005\"]",
                    other.type_str()
                ));
                return Err(bad(value.span(), what));
            }
        };
        let mut targets = Vec::new();
        for item in items {
            targets.extend(targets_of(item.get_ref()).map_err(|what| bad(item.span(), in_set(&what)))?);
        }
        if targets.is_empty() {
            return Err(bad(value.span(), in_set("has no port; give it one, or delete the line")));
        }
        sets.insert(name.get_ref().to_string(), targets);
    }
    Ok(sets)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// One element: a port, or targets as they are typed.
fn targets_of(value: &DeValue<'_>) -> Result<Vec<Target>, String> {
    let text = match value {
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => number.to_string(),
            Err(_) => number.as_str().to_owned(),
        },
        DeValue::String(text) => text.to_string(),
        other => {
            return Err(format!("a value of type {} is no port; use a number or a target in quotes", other.type_str()));
        }
    };
    if text.split(',').any(|part| part.trim().starts_with('@')) {
        return Err(format!("'{}' names a set, and sets cannot contain sets; list its ports", text.escape_debug()));
    }
    // In a file, unlike on a command line, blanks are nobody's separators.
    let words: Vec<&str> = text.split(',').map(str::trim).collect();
    parse_targets(&words, &Sets::new()).map_err(|bad| bad.to_string())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn shown(sets: &Sets) -> String {
        let line = |(name, targets): (&String, &Vec<Target>)| {
            let targets: Vec<String> = targets.iter().map(Target::to_string).collect();
            format!("{name}={}", targets.join(" "))
        };
        sets.iter().map(line).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn sets_are_read_as_they_were_meant() {
        for (text, want) in [
            ("", ""),
            ("# nothing\n", ""),
            ("[access]\nmode = 7\n[[rule]]\nx = [1, 2]\n", ""),
            ("[sets]\n", ""),
            (
                "[sets]\nweb = [8000, \"3000-3005\", \"8080/tcp\", \"127.0.0.1:9000\"]",
                "web=8000 3000-3005 8080/tcp 127.0.0.1:9000",
            ),
            ("[sets]\ndb = \"5432,6379\"", "db=5432 6379"),
            ("[sets]\ndb = \" 5432 , [::1]:6379/tcp \"", "db=5432 [::1]:6379/tcp"),
            ("[sets]\none = 80", "one=80"),
            ("[sets]\nhex = [0x1f90]", "hex=8080"),
            ("[sets]\nbig = [10_000]", "big=10000"),
            ("[sets]\nA-b_9 = 1\n\"dev\" = 2", "A-b_9=1; dev=2"),
            ("sets.dotted = [1]", "dotted=1"),
            ("sets = { inline = [1] }", "inline=1"),
            ("x = 1\r\n[sets]\r\na = 1\r\n", "a=1"),
        ] {
            assert_eq!(sets_in(text).map(|sets| shown(&sets)), Ok(want.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, line, want) in [
            ("[sets]\nweb = 0", 2, "set 'web': '0' is out of range; ports go from 1 to 65535"),
            ("[sets]\nweb = [1,\n2,\n70000]", 4, "set 'web': '70000' is out of range; ports go from 1 to 65535"),
            ("[sets]\nweb = [-5]", 2, "set 'web': '-5' is half a range; use FIRST-LAST such as 3000-3005"),
            ("[sets]\nweb = [\"abc\"]", 2, "set 'web': 'abc' is not a port; use a number from 1 to 65535"),
            ("[sets]\nweb = \"9-3\"", 2, "set 'web': '9-3' runs backwards; the lower port comes first"),
            ("[sets]\nweb = \"\"", 2, "set 'web': empty target; give a port such as 8000"),
            ("[sets]\nweb = []", 2, "set 'web': has no port; give it one, or delete the line"),
            (
                "[sets]\nweb = true",
                2,
                "set 'web': a value of type boolean is no list of ports; use [8000, \"3000-3005\"]",
            ),
            (
                "[sets]\nweb = [1.5]",
                2,
                "set 'web': a value of type float is no port; use a number or a target in quotes",
            ),
            (
                "[sets]\nweb = [[1]]",
                2,
                "set 'web': a value of type array is no port; use a number or a target in quotes",
            ),
            (
                "[sets]\n\nweb = [1, \"@dev\"]",
                3,
                "set 'web': '@dev' names a set, and sets cannot contain sets; list its ports",
            ),
            ("[sets]\n\"a b\" = 1", 2, "'a b' cannot name a set; use letters, digits, '-' and '_'"),
            ("[sets]\n\"\" = 1", 2, "'' cannot name a set; use letters, digits, '-' and '_'"),
            ("[sets]\n\"\\u001b[31m\" = 1", 2, "'\\u{1b}[31m' cannot name a set; use letters, digits, '-' and '_'"),
            ("\nsets = 5", 2, "'sets' is not a table; write [sets] on a line of its own"),
        ] {
            assert_eq!(sets_in(text), Err(Bad { line, what: want.to_owned() }), "{text}");
        }
        for (text, line) in [("[sets\nweb = 1", 1), ("[sets]\nweb = \n", 2), ("a = 1\na = 2", 2), ("[sets]\nx = \"", 2)]
        {
            let bad = sets_in(text).unwrap_err();
            assert_eq!(bad.line, line, "{text}: {bad:?}");
            assert!(!bad.what.contains('\n') && bad.what.ends_with("; see https://toml.io"), "{bad:?}");
        }
    }

    #[test]
    fn no_text_does_harm() {
        let deep = "[sets]\na = ".to_owned() + &"[".repeat(100_000);
        sets_in(&deep).unwrap_err();
        let wide = "[sets]\na = [".to_owned() + &"1,".repeat(100_000) + "]";
        assert_eq!(sets_in(&wide).unwrap()["a"].len(), 100_000);
    }

    #[test]
    fn the_environment_says_which_files_are_read() {
        for (variables, want, required) in [
            (&[][..], &[SYSTEM][..], false),
            (&[("HOME", "/home/al")], &[SYSTEM, "/home/al/.config/portwatch/config.toml"], false),
            (&[("HOME", "/home/al"), ("XDG_CONFIG_HOME", "/cfg")], &[SYSTEM, "/cfg/portwatch/config.toml"], false),
            (
                &[("HOME", "/home/al"), ("XDG_CONFIG_HOME", "cfg")],
                &[SYSTEM, "/home/al/.config/portwatch/config.toml"],
                false,
            ),
            (&[("HOME", "/home/al"), ("PORTWATCH_CONFIG", "x.toml")], &["x.toml"], true),
            (&[("PORTWATCH_CONFIG", "")], &[SYSTEM], false),
        ] {
            let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
            let want: Vec<PathBuf> = want.iter().map(PathBuf::from).collect();
            assert_eq!(places(&find), (want, required), "{variables:?}");
        }
    }

    #[test]
    fn a_file_is_read_within_bounds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.toml");
        let only = |name: &str| (name == VARIABLE).then(|| path.clone().into_os_string());
        let read = || sets(&only, 1000).map_err(|error| error.to_string().replace(path.to_str().unwrap(), "FILE"));

        assert_eq!(read(), Err("cannot read the configuration FILE: there is no such file".to_owned()));
        fs::write(&path, "[sets]\nmine = 1\n").unwrap();
        assert_eq!(read().map(|sets| super::tests::shown(&sets)), Ok("dev=3000 8000 8080; mine=1".to_owned()));
        fs::write(&path, "[sets]\ndev = 1\n").unwrap();
        assert_eq!(read().map(|sets| super::tests::shown(&sets)), Ok("dev=1".to_owned()));
        fs::write(&path, b"[sets]\n# \xff\n").unwrap();
        assert_eq!(read(), Err("FILE:2: not UTF-8; write it as UTF-8 text".to_owned()));
        fs::write(&path, vec![b'#'; (1 << 20) + 1]).unwrap();
        assert_eq!(read(), Err("FILE: larger than 1 MiB; a configuration has a few lines".to_owned()));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(read(), Err("FILE: not a regular file; put the configuration into one".to_owned()));
    }

    #[test]
    fn those_with_privileges_trust_what_only_root_or_they_can_write() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let own = file.as_file().metadata().unwrap().uid();
        for (mode, want) in [
            (0o644, None),
            (0o664, Some("its group may write it, so root does not read it; run `chmod go-w` on it")),
            (0o646, Some("everybody may write it, so root does not read it; run `chmod go-w` on it")),
        ] {
            file.as_file().set_permissions(fs::Permissions::from_mode(mode)).unwrap();
            let meta = file.as_file().metadata().unwrap();
            assert_eq!(distrust(&meta, Reader { name: "root", trusts: own }).as_deref(), want);
            if own != 0 {
                let got = distrust(&meta, Reader { name: "the agent", trusts: 0 }).unwrap();
                assert!(got.starts_with(&format!("belongs to uid {own}, so the agent")), "{got}");
            }
        }
    }

    #[test]
    fn the_agent_reads_one_file_which_must_be_there_if_it_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.toml");
        let euid = directory.path().metadata().unwrap().uid();
        let read = || access(Some(&path), euid, &|_| None).map_err(|error| error.to_string());
        for path in [&path, &path.join("x"), &directory.path().join("x".repeat(300))] {
            let missing = access(Some(path), euid, &|_| None).unwrap_err();
            assert!(matches!(missing, ConfigError::Missing(_)), "{missing}");
        }
        // What is no business of the agent's is not looked at.
        fs::write(&path, "[sets]\nweb = \"nonsense\"\n[access]\nlist = \"own\"\n").unwrap();
        assert_eq!(read(), Ok(Access { told: Told::Own, killers: Killers::All }));
        fs::write(&path, "[access]\nlist = \"own\"\nlisten = 1\n").unwrap();
        let want = format!("{}:3: [access] has no 'listen'; it has list and kill", path.display());
        assert_eq!(read(), Err(want));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(read().unwrap_err().contains("everybody may write it, so the agent does not read it"));
    }
}
