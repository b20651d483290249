//! `cargo xtask ci`: everything that CI runs, in order; every failure is listed, not only the first.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use nix::unistd::Uid;

use crate::{cargo, must, shown};

/// What the scenario tests on the build machine must be able to run, instead of saying that they cannot: an event tier,
/// everything that `.ci/run` installs, and what Debian's kernel gives to root. Not `fexit`, `kprobe`, `perf` and
/// `conflicts`, which some kernels refuse: the emulated machines require the first two.
const REQUIRED: &[&str] = &[
    "kernel",
    "examples",
    "lossless",
    "native",
    "root",
    "memory",
    "cgroup2",
    "destroy",
    "fuse",
    "io_uring",
    "mptcp",
    "vxlan",
    "bash",
    "zsh",
    "fish",
    "man",
    "groff",
    "mandoc",
    "nginx",
    "gunicorn",
    "php-fpm",
    "node",
    "python3",
    "docker",
    "prometheus",
    "nft",
    "systemd",
    "runit",
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave out `cargo test`, which has been run
    #[arg(long)]
    tested: bool,
    /// Only print what `cargo test` requires in CI, for PORTWATCH_TEST_REQUIRE
    #[arg(long)]
    requirements: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.requirements {
        println!("{}", REQUIRED.join(","));
        return Ok(());
    }
    let mut failures = Vec::new();
    let steps: Vec<_> = STEPS.iter().filter(|&&step| !(args.tested && step == TESTS)).collect();
    for args in &steps {
        let step = args.join(" ");
        println!("\n=== {step}");
        let started = Instant::now();
        let done = run_step(args);
        let seconds = started.elapsed().as_secs_f64();
        match done {
            Ok(()) => println!("=== ok in {seconds:.1} s: {step}"),
            Err(error) => {
                println!("=== FAILED in {seconds:.1} s: {step}");
                failures.push(error);
            }
        }
    }
    if failures.is_empty() {
        println!("\nall {} steps passed", steps.len());
        return Ok(());
    }
    println!("\n{} of {} steps failed:", failures.len(), steps.len());
    failures.iter().for_each(|failure| println!("  {failure:#}"));
    bail!("ci failed")
}

/// Arguments of cargo, each a step.
const STEPS: &[&[&str]] = &[
    &["fmt", "--all", "--check"],
    &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"],
    &["test", "--quiet", "--package", "xtask", "--package", "portwatch-ebpf"],
    &["xtask", "ebpf", "--check"],
    // Building the fuzz targets takes minutes, and the tests hold the same properties; their lock must not go stale.
    &["fetch", "--quiet", "--locked", "--manifest-path", "portwatch/fuzz/Cargo.toml"],
    TESTS,
    &["xtask", "chaos", "--seconds", "60"],
    &["xtask", "race", "--rounds", "200", "--peer-rounds", "0"],
    &["xtask", "bench", "--quick"],
    &["xtask", "vm", "--kernel", "all"],
];

/// The README's command: unit tests, and the scenarios on this very machine, as root.
const TESTS: &[&str] = &["test"];

fn run_step(args: &[&str]) -> Result<()> {
    let mut command = cargo();
    command.args(args);
    if args == TESTS {
        command.env("PORTWATCH_TEST_REQUIRE", REQUIRED.join(","));
        as_root(&mut command);
    }
    let line = shown(&command);
    must(&mut command).map_err(|error| anyhow!("{}", error.to_string().replace(&line, &args.join(" "))))
}

/// Lets cargo run tests as root.
pub(crate) fn as_root(cargo: &mut Command) {
    if !Uid::effective().is_root() {
        cargo.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", "sudo --preserve-env");
    }
}
