//! Running one scenario of the test program for its figures, which it says in lines that begin with a [`MARK`].

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{cargo, shown};

/// What comes before figures, as the tests write it (`tests/company.rs`).
const MARK: &str = "REPORT: ";

/// What the scenario `name` reported on this machine, and whether it passed. What else it says goes to stderr.
pub(crate) fn play<K: AsRef<OsStr>, V: AsRef<OsStr>>(
    name: &str,
    variables: impl IntoIterator<Item = (K, V)>,
) -> Result<(Option<Value>, bool)> {
    let mut command = cargo();
    command.args(["test", "--quiet", "--package", "portwatch", "--test", "scenarios", "--", "--exact", name]);
    crate::ci::as_root(&mut command);
    command.envs(variables).stderr(Stdio::piped());
    let line = shown(&command);
    let mut child = command.stdout(Stdio::from(stderr()?)).spawn().with_context(|| format!("cannot run `{line}`"))?;
    let mut said = None;
    for text in BufReader::new(child.stderr.take().context("cargo has no stderr")?).lines() {
        let text = text.with_context(|| format!("cannot read what `{line}` says"))?;
        match figures(&text) {
            Some(figures) => said = Some(figures),
            None => eprintln!("{text}"),
        }
    }
    Ok((said, child.wait().with_context(|| format!("cannot wait for `{line}`"))?.success()))
}

/// A second descriptor of our stderr: stdout is for the Markdown.
fn stderr() -> Result<std::os::fd::OwnedFd> {
    use std::os::fd::AsFd;
    std::io::stderr().as_fd().try_clone_to_owned().context("cannot duplicate stderr")
}

/// The figures in a line, if it has some. On a console, something else may stand before them.
pub(crate) fn figures(line: &str) -> Option<Value> {
    serde_json::from_str(line.split_once(MARK)?.1).ok()
}

/// Writes figures to a file, if one is wanted.
pub(crate) fn keep(figures: &Value, file: Option<&Path>) -> Result<()> {
    let Some(path) = file else { return Ok(()) };
    fs::write(path, serde_json::to_string_pretty(figures)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The kernel of this machine.
pub(crate) fn release() -> Result<String> {
    crate::output_of(Command::new("uname").arg("-r")).map(|release| release.trim().to_owned())
}
