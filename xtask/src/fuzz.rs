//! `cargo xtask fuzz`: libFuzzer on every parser that reads what others wrote.
//!
//! What must hold of any input is in `portwatch/src/fuzzing`, which the ordinary tests hold the seeds and random
//! changes of them against; here the same properties are searched by coverage. The crate in `portwatch/fuzz` has one
//! program for each, built by cargo-fuzz with AddressSanitizer. The stable compiler has all that this takes, behind
//! RUSTC_BOOTSTRAP: no nightly is needed. What a run finds worth keeping is under `target/fuzz/corpus`, for the next.

use std::collections::HashMap;
use std::fs::{self, File};
use std::iter;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::{cargo, find, must, output_of, root, target};

/// As `cargo install cargo-fuzz --version …` wants it.
const CARGO_FUZZ: &str = "0.13.2";

/// What an input may take. Seeds are smaller than 4 KiB, and the fuzzer makes nothing much larger of them.
const LIMITS: [&str; 3] = ["-malloc_limit_mb=64", "-rss_limit_mb=1024", "-timeout=10"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long each target runs
    #[arg(long, default_value_t = 600)]
    seconds: u32,
    /// Only this target
    #[arg(long)]
    target: Option<String>,
    /// How many of them run at once
    #[arg(long, default_value_t = NonZero::<usize>::MIN)]
    jobs: NonZero<usize>,
    /// Write the figures to a file, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if find("c++").is_none() {
        bail!("there is no C++ compiler for libFuzzer: install Debian's package g++");
    }
    let program = cargo_fuzz()?;
    let folder = root().join("portwatch/fuzz");
    let cargo_fuzz = |verb: &str| {
        let mut command = Command::new(&program);
        command.arg(verb).arg("--fuzz-dir").arg(&folder).env("RUSTC_BOOTSTRAP", "1");
        command
    };
    let list = output_of(&mut cargo_fuzz("list"))?;
    let all: Vec<&str> = list.split_whitespace().collect();
    let chosen: Vec<&str> = match &args.target {
        Some(name) => all.iter().copied().filter(|known| known == name).collect(),
        None => all.clone(),
    };
    if chosen.is_empty() {
        bail!("there is no such target; there are {}", all.join(", "));
    }
    let output = target().join("fuzz");
    must(cargo_fuzz("build").arg("--target-dir").arg(&output).args(args.target.as_deref()))
        .context("cannot build the targets: it takes a compiler of rustup's, which has the sanitizers' libraries")?;
    let (mut failures, mut figures) = (Vec::new(), Vec::new());
    println!("| target | inputs | seconds | edges covered | finding |\n|---|--:|--:|--:|---|");
    let seconds = args.seconds;
    for (name, searched) in search_all(&chosen, args.jobs, |name| search(name, seconds, &folder, &output)) {
        match searched {
            Ok(Searched { inputs, edges }) => {
                println!("| {name} | {inputs} | {seconds} | {edges} | none |");
                figures.push(
                    json!({"target": name, "inputs": inputs, "seconds": seconds, "edges": edges, "finding": null}),
                );
            }
            Err(error) => {
                println!("| {name} | | {seconds} | | {error:#} |");
                figures.push(json!({"target": name, "seconds": seconds, "finding": format!("{error:#}")}));
                failures.push(name);
            }
        }
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&figures)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if !failures.is_empty() {
        bail!("found something in {}", failures.join(", "));
    }
    Ok(())
}

/// The pinned cargo-fuzz, installed where it is missing.
fn cargo_fuzz() -> Result<PathBuf> {
    let tools = target().join("tools");
    let program = tools.join("bin/cargo-fuzz");
    let version = Command::new(&program).arg("--version").output();
    if !version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(CARGO_FUZZ)) {
        let mut install = cargo();
        install.args(["install", "--quiet", "--locked", "cargo-fuzz", "--version", CARGO_FUZZ, "--root"]).arg(tools);
        must(&mut install)?;
    }
    Ok(program)
}

/// What became of each target, in their order, some of them at once.
fn search_all<'n, S: Send>(
    names: &[&'n str],
    jobs: NonZero<usize>,
    search: impl Fn(&str) -> S + Sync,
) -> impl Iterator<Item = (&'n str, S)> {
    let next = AtomicUsize::new(0);
    let work = || {
        let take = || names.get(next.fetch_add(1, Ordering::Relaxed)).copied();
        iter::from_fn(take).map(|name| (name, search(name))).collect::<Vec<_>>()
    };
    let mut searched: HashMap<&str, S> = thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.get()).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a search does not panic")).collect()
    });
    names.iter().filter_map(move |&name| Some((name, searched.remove(name)?)))
}

/// What a run without a finding did.
struct Searched {
    inputs: u64,
    edges: u64,
}

/// Runs one target.
fn search(name: &str, seconds: u32, folder: &Path, output: &Path) -> Result<Searched> {
    let [corpus, artifacts] = ["corpus", "artifacts"].map(|kind| output.join(kind).join(name));
    for folder in [&corpus, &artifacts] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let path = output.join(format!("{name}.log"));
    let log = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    let program = output.join(host()?).join("release").join(name);
    let mut fuzzer = Command::new(&program);
    fuzzer
        .args(LIMITS)
        .args([format!("-max_total_time={seconds}"), format!("-artifact_prefix={}/", artifacts.display())])
        .args([&corpus, &folder.join("corpus").join(name)])
        .stderr(log);
    let status = fuzzer.status().with_context(|| format!("cannot run {}", program.display()))?;
    let said = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let said = String::from_utf8_lossy(&said);
    if !status.success() {
        let finding = |line: &&str| line.contains("panicked at") || line.starts_with("SUMMARY");
        let what = said.lines().find(finding).unwrap_or("it ended early");
        let input = said.lines().find_map(|line| line.split_once("Test unit written to ")).map(|(_, input)| input);
        bail!(
            "{what}; see {}, and run again with `{} {}`",
            path.display(),
            program.display(),
            input.unwrap_or("INPUT")
        );
    }
    // `#4194304 DONE   cov: 512 ft: 1499 corp: 301/19Kb lim: 4096 exec/s: 23301 rss: 450Mb`
    let done = said.lines().rfind(|line| line.contains("DONE")).context("it did not say that it was done")?;
    let mut words = done.trim_start_matches('#').split_whitespace();
    let inputs = words.next().and_then(|word| word.parse().ok()).context("it did not count its inputs")?;
    let edges = words.skip_while(|word| *word != "cov:").nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
    Ok(Searched { inputs, edges })
}

fn host() -> Result<String> {
    let version = output_of(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_searched_once_and_told_in_its_order() {
        for jobs in [1, 2, 9] {
            let searched = search_all(&["a", "b", "c"], NonZero::new(jobs).unwrap(), str::to_owned);
            let searched: Vec<_> = searched.collect();
            assert_eq!(searched, [("a", "a".to_owned()), ("b", "b".to_owned()), ("c", "c".to_owned())]);
        }
    }
}
