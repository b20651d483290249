//! `cargo xtask vm`: the scenario tests, unchanged, on Debian's kernels under QEMU.
//!
//! The kernels are Debian's packages, taken from whatever mirror this machine's own apt uses. A root file system of
//! static binaries (busybox, the test binary, portwatch) is packed into an initramfs, whose init runs the tests and
//! says `VM-EXIT: code` on the serial console; nothing else counts as a pass.

mod image;
mod kernel;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use serde_json::Value;

use self::image::Binaries;
use self::kernel::Kernel;

/// What asks a kernel for nothing that one of them lacks, by the beginning of its name: run once, on the build machine.
/// Emulation takes its time.
const ALIKE: &[&str] = &[
    "access::",
    "config::",
    "confirm::",
    "embed::",
    "faults::who_asks_too_much",
    "history::",
    "hostile::",
    "list::a_directory",
    "mark::",
    "metrics::",
    "pick::",
    "pretender::",
    "replay::",
    "rules::",
    "shell::",
    "top::",
];

/// Processors of an emulated machine.
const PROCESSORS: usize = 2;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// 5.10, 6.1, 6.12 or all
    #[arg(long, default_value = "all", value_parser = ["5.10", "6.1", "6.12", "all"])]
    kernel: String,
    /// Longest time that one kernel may take, in seconds
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
    /// Added to the kernel's command line, such as preempt=full (which shows what a preempted program misses)
    #[arg(long, default_value = "", value_name = "PARAMETERS")]
    append: String,
    /// Given to the test binary, e.g. the name of one test; without, all but those that are alike on all kernels
    #[arg(last = true)]
    test_args: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (kernels, binaries) = prepare(&args.kernel)?;
    // Where emulated processors share one, they stand still for longer than some tests wait.
    let at_a_time = thread::available_parallelism().map_or(1, |processors| processors.get().div_ceil(PROCESSORS));
    let tested = side_by_side(&kernels, at_a_time, |kernel| test_on(kernel, &binaries, args))?;
    let mut failures = Vec::new();
    for (kernel, outcome) in kernels.iter().zip(tested) {
        if let Err(error) = outcome {
            println!("{}: {error:#}", kernel.series);
            failures.push(kernel.series);
        }
    }
    if !failures.is_empty() {
        bail!("failed on kernel {}", failures.join(", "));
    }
    Ok(())
}

/// The kernels of that name, or all, and what is to run on them.
fn prepare(name: &str) -> Result<(Vec<Kernel>, Binaries)> {
    if crate::find("qemu-system-x86_64").is_none() {
        bail!("qemu-system-x86_64 is missing: install Debian's packages qemu-system-x86, cpio and busybox-static");
    }
    let releases: Vec<&kernel::Release> =
        kernel::RELEASES.iter().filter(|release| name == "all" || release.series == name).collect();
    let kernels = releases.into_iter().map(Kernel::obtain).collect::<Result<Vec<_>>>()?;
    Ok((kernels, Binaries::build()?))
}

/// Does the same on every kernel, on so many at a time; what came of each, in their order.
fn side_by_side<T: Send>(kernels: &[Kernel], at_a_time: usize, act: impl Fn(&Kernel) -> T + Sync) -> Result<Vec<T>> {
    let mut outcomes = Vec::new();
    for some in kernels.chunks(at_a_time) {
        thread::scope(|scope| -> Result<()> {
            let acting: Vec<_> = some.iter().map(|kernel| scope.spawn(|| act(kernel))).collect();
            for one in acting {
                outcomes.push(one.join().map_err(|_| anyhow!("a thread that runs a kernel panicked"))?);
            }
            Ok(())
        })?;
    }
    Ok(outcomes)
}

/// Runs one scenario, with variables in its environment, on the kernels at once: each one's release, the figures that the
/// scenario reported, and whether it passed.
pub(crate) fn play(
    name: &str,
    scenario: &str,
    variables: &[(&str, String)],
    limit: u64,
) -> Result<Vec<(String, Option<Value>, bool)>> {
    let (kernels, binaries) = prepare(name)?;
    let play_on = |kernel: &Kernel| -> Result<(String, Option<Value>, bool)> {
        let initramfs = image::pack(kernel, &binaries, variables, &["--exact".to_owned(), scenario.to_owned()])?;
        let mut figures = None;
        let booted = boot(kernel, &initramfs, "", Duration::from_secs(limit), &mut |line| {
            match crate::scenario::figures(line) {
                Some(found) => figures = Some(found),
                // stdout is for the figures.
                None => eprintln!("{} | {}", kernel.series, harmless(line)),
            }
        });
        let passed = match booted {
            Ok((code, _)) => code == 0,
            Err(error) => {
                eprintln!("{}: {error:#}", kernel.series);
                false
            }
        };
        Ok((kernel.version.clone(), figures, passed))
    };
    side_by_side(&kernels, kernels.len(), play_on)?.into_iter().collect()
}

fn test_on(kernel: &Kernel, binaries: &Binaries, args: &Args) -> Result<()> {
    let all_but_alike = || ALIKE.iter().flat_map(|area| ["--skip".to_owned(), (*area).to_owned()]).collect();
    let test_args = if args.test_args.is_empty() { all_but_alike() } else { args.test_args.clone() };
    let initramfs = image::pack(kernel, binaries, &[], &test_args)?;
    let started = Instant::now();
    // What the tests say of their failures at the end, for who reads only the end of all that this prints.
    let mut failures = Vec::new();
    let show = &mut |line: &str| {
        let line = harmless(line);
        println!("{} | {line}", kernel.series);
        if line == "failures:" || !failures.is_empty() {
            failures.push(line);
        }
    };
    let (code, booted) = boot(kernel, &initramfs, &args.append, Duration::from_secs(args.timeout), show)?;
    println!(
        "{}: {} in {:.1} s from power-on to result, {:.1} s of them until init ran ({})",
        kernel.series,
        if code == 0 { "passed" } else { "FAILED" },
        started.elapsed().as_secs_f64(),
        booted.as_secs_f64(),
        kernel.version
    );
    if code != 0 {
        bail!("the tests exited {code}\n{}", failures.join("\n"));
    }
    Ok(())
}

/// Boots the machine, shows each line of its console and returns the tests' exit code and how long init took to come up.
fn boot(
    kernel: &Kernel,
    initramfs: &Path,
    append: &str,
    limit: Duration,
    show: &mut dyn FnMut(&str),
) -> Result<(i32, Duration)> {
    let command_line = format!("console=ttyS0 quiet panic=-1 {append}");
    let started = Instant::now();
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", &PROCESSORS.to_string(), "-m", "1G"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"])
        .args(["-serial", "stdio", "-append", &command_line])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    // However this program ends, the machine ends with it.
    // SAFETY: between fork and exec, prctl(2) is async-signal-safe.
    unsafe { command.pre_exec(|| prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)) };
    let mut qemu = Machine(command.spawn().context("cannot start qemu-system-x86_64")?);
    let console = qemu.0.stdout.take().context("qemu has no stdout")?;
    let (lines, console_lines) = mpsc::channel();
    thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        while console.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
            if lines.send(text).is_err() {
                break;
            }
            line.clear();
        }
    });
    let log = initramfs.with_extension("log");
    let mut log = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut booted = Duration::ZERO;
    loop {
        match console_lines.recv_timeout(limit.saturating_sub(started.elapsed())) {
            Ok(line) => {
                writeln!(log, "{:7.1} {line}", started.elapsed().as_secs_f64())
                    .context("cannot write the console's log")?;
                if let Some(code) = line.strip_prefix(image::EXIT_MARK) {
                    return Ok((code.trim().parse().context("init printed a malformed exit code")?, booted));
                }
                if line.starts_with(image::BOOT_MARK) {
                    booted = started.elapsed();
                } else {
                    show(&line);
                }
            }
            Err(RecvTimeoutError::Timeout) => bail!("no result after {} s: the machine was stopped", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("the machine stopped without a result (see the lines above)"),
        }
    }
}

/// The line without what would move a terminal's cursor or change its colours.
fn harmless(line: &str) -> String {
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    line.chars().map(escaped).collect()
}

/// A running QEMU, ended with its owner.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have powered itself off already: then there is nothing to end.
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}
