//! The project's own chores: `cargo xtask ci` runs all that CI runs, the other verbs are its parts.
//!
//! Each verb is one module; this one parses, dispatches, and holds the few lines that all of them share: where the
//! workspace is, and how a command is run. Everything that a verb makes or fetches lies under `target/`, but for the
//! kernel objects, which are committed.

mod bench;
mod chaos;
mod ci;
mod ebpf;
mod evidence;
mod fuzz;
mod race;
mod scenario;
mod server;
mod soak;
mod vm;
mod world;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "portwatch's own chores", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the kernel objects into portwatch/bpf/, reproducibly
    Ebpf(ebpf::Args),
    /// Run the scenario tests on other kernels, in QEMU
    Vm(vm::Args),
    /// Search the parsers for inputs that break them, by libFuzzer
    Fuzz(fuzz::Args),
    /// Measure portwatch and its peers side by side, as Markdown
    Bench(bench::Args),
    /// Work against a kill in progress, and count who is hit, as Markdown
    Race(race::Args),
    /// Let processes and an agent do random things, and compare what it says with what is, as Markdown
    Chaos(chaos::Args),
    /// Let one agent work under a steady load, and see whether it stays as it was, as Markdown
    Soak(soak::Args),
    /// Make portwatch/EVIDENCE.md of what bench, race, chaos, soak and fuzz found
    Evidence(evidence::Args),
    /// Run everything that CI runs, and list every failure
    Ci(ci::Args),
    #[command(hide = true)]
    World(world::Args),
    #[command(hide = true)]
    Server(server::Args),
    #[command(hide = true)]
    Storm(bench::storm::Args),
    #[command(hide = true)]
    Arena(race::arena::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Ebpf(args) => ebpf::run(&args),
        Verb::Vm(args) => vm::run(&args),
        Verb::Fuzz(args) => fuzz::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Race(args) => race::run(&args),
        Verb::Chaos(args) => chaos::run(&args),
        Verb::Soak(args) => soak::run(&args),
        Verb::Evidence(args) => evidence::run(&args),
        Verb::Ci(args) => ci::run(&args),
        Verb::World(args) => world::run(&args),
        Verb::Server(args) => server::run(&args),
        Verb::Storm(args) => bench::storm::run(&args),
        Verb::Arena(args) => race::arena::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's root directory.
fn root() -> PathBuf {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    manifest.parent().map_or_else(|| manifest.clone(), Path::to_path_buf)
}

/// Everything that is built or fetched lies below this directory.
fn target() -> PathBuf {
    root().join("target")
}

/// The cargo that runs this xtask.
fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// portwatch as it is released: built, and where it is.
fn released() -> Result<PathBuf> {
    must(cargo().args(["build", "--quiet", "--release", "--package", "portwatch", "--bin", "portwatch"]))?;
    Ok(target().join("release/portwatch"))
}

/// The command as one line, for people.
fn shown(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// Runs a command to its end and fails unless it exits 0.
fn must(command: &mut Command) -> Result<()> {
    let line = shown(command);
    let status = command.status().with_context(|| format!("cannot run `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}

/// What a command prints on stdout; fails unless it exits 0. Its stderr goes to ours.
fn output_of(command: &mut Command) -> Result<String> {
    let line = shown(command);
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("cannot run `{line}`"))?;
    if !output.status.success() {
        bail!("`{line}` failed: {}", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{line}` printed what is not UTF-8"))
}

/// A program by its name: on the PATH, or among the tools that were fetched.
fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let tools = target().join("tools");
    let fetched = [tools.join("bin"), tools.join("npm/node_modules/.bin")];
    env::split_paths(&path).chain(fetched).map(|folder| folder.join(program)).find(|file| file.is_file())
}
