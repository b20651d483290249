//! The other programs that say who listens, or free a port.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::stopwatch;
use crate::{cargo, find, target};

/// Each with the flag that makes it say its version, and where it is from.
const PEERS: [(&str, &str); 7] = [
    ("ss", "-V"),
    ("lsof", "-v"),
    ("fuser", "-V"),
    ("netstat", "-V"),
    ("killport", "-V"),
    ("somo", "-V"),
    ("fkill", "--version"),
];

/// Those of them that crates.io has.
const CRATES: [&str; 2] = ["killport", "somo"];

/// Fetches the peers that come from registries, as far as those are within reach.
pub(crate) fn fetch_peers() {
    let tools = target().join("tools");
    for name in CRATES.into_iter().filter(|name| find(name).is_none()) {
        let mut install = cargo();
        install.args(["install", "--quiet", "--locked", name, "--root"]).arg(&tools);
        let _left_out = install.stderr(Stdio::null()).status();
    }
    if find("fkill").is_none() {
        let mut install = Command::new("npm");
        install.args(["install", "--silent", "fkill-cli", "--prefix"]).arg(tools.join("npm"));
        let _left_out = install.stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// All peers; without a version where they are not installed.
pub(super) fn versions() -> Vec<(&'static str, Option<String>)> {
    PEERS.iter().map(|&(name, flag)| (name, version(name, flag))).collect()
}

fn version(name: &str, flag: &str) -> Option<String> {
    let said = stopwatch::run(Command::new(find(name)?).arg(flag), Duration::from_secs(10));
    Some(
        said.ok()
            .and_then(|run| number(&run.output).map(str::to_owned))
            .unwrap_or_else(|| "of an unknown version".to_owned()),
    )
}

/// The first word with a digit before a dot. What stands before a dash is a name.
fn number(said: &str) -> Option<&str> {
    said.split(|c: char| c.is_whitespace() || c == ',' || c == '-')
        .find(|word| word.find('.').is_some_and(|dot| dot > 0 && word.as_bytes()[dot - 1].is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn versions_are_found_in_what_the_peers_say() {
        for (said, version) in [
            ("ss utility, iproute2-6.1.0\n", Some("6.1.0")),
            ("ss utility, iproute2-6.1.0, libbpf 1.1.2\n", Some("6.1.0")),
            (
                "lsof version information:\n    revision: 4.95.0\n    latest revision: https://github.com\n",
                Some("4.95.0"),
            ),
            ("fuser (PSmisc) 23.6\nCopyright (C) 1993-2022 Somebody\n", Some("23.6")),
            ("net-tools 2.10\n", Some("2.10")),
            ("killport 2.0.2\n", Some("2.0.2")),
            ("9.0.0\n", Some("9.0.0")),
            ("no idea\n", None),
        ] {
            assert_eq!(number(said), version, "{said}");
        }
    }
}
