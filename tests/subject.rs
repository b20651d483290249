//! The binary under test: how it is run, what it prints as rows, and what this machine lets it do.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;

use rustix::process::{Pid, PidfdFlags};
use serde_json::Value;

use crate::oracle::{self, Row};
use crate::puppet::{Puppet, Stage, wait_readable};
use crate::{Test, test};

/// The binary under test.
pub fn binary() -> PathBuf {
    env::var_os("PORTWATCH_BIN").map_or_else(|| env!("CARGO_BIN_EXE_portwatch").into(), PathBuf::from)
}

/// A command that runs it as a script would: no terminal, no agent.
pub fn command(arguments: &[&str]) -> Command {
    plain_command(binary(), arguments)
}

/// As [`command`], of a copy of the binary.
pub fn plain_command(binary: impl AsRef<OsStr>, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary);
    command.args(arguments).env("PORTWATCH_SOCKET", "/nonexistent/portwatch.sock").env_remove("NO_COLOR");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What a finished run said.
#[derive(Debug)]
pub struct Run {
    /// `None` where a signal ended it.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Run {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("not JSON ({error}): {self:?}"))
    }

    /// Fails the test unless it ended with `code` and without a panic.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "\nstdout: {}\nstderr: {}", self.text(), self.errors());
        assert!(!self.errors().contains("panicked"), "{}", self.errors());
        self
    }
}

pub fn portwatch(arguments: &[&str]) -> Run {
    finish(command(arguments).spawn().expect("cannot run portwatch"))
}

/// Waits for the end of a run, which is killed where it hangs.
pub fn finish(mut child: Child) -> Run {
    let outputs = outputs(&mut child);
    let ended = wait_readable(pidfd(&child));
    if !ended {
        child.kill().expect("kill");
    }
    let status = child.wait().expect("wait");
    let (stdout, stderr) = outputs.join();
    let run = Run { code: status.code(), stdout, stderr };
    assert!(ended, "portwatch hangs: {} {}", run.text(), run.errors());
    run
}

/// The outputs of a run that goes on, read as they come.
pub struct Outputs(thread::JoinHandle<Vec<u8>>, thread::JoinHandle<Vec<u8>>);

pub fn outputs(child: &mut Child) -> Outputs {
    fn reader(source: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut source) = source {
                source.read_to_end(&mut bytes).expect("reading output");
            }
            bytes
        })
    }
    Outputs(reader(child.stdout.take()), reader(child.stderr.take()))
}

impl Outputs {
    /// Standard output and standard error, once both have ended.
    pub fn join(self) -> (Vec<u8>, Vec<u8>) {
        (self.0.join().expect("a reader"), self.1.join().expect("a reader"))
    }
}

pub fn pidfd(child: &Child) -> OwnedFd {
    rustix::process::pidfd_open(Pid::from_child(child), PidfdFlags::empty()).expect("pidfd_open")
}

/// A listener as JSON, reduced to what /proc can confirm.
pub fn row(listener: &Value) -> Row {
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("not a number in {listener}"));
    let holders = listener["holders"].as_array().unwrap_or_else(|| panic!("no holders in {listener}"));
    assert_eq!(listener["ghost"], holders.is_empty(), "{listener}");
    let address = listener["address"].as_str().expect("an address").parse().expect("an IP address");
    assert_eq!(listener["family"], if matches!(address, std::net::IpAddr::V4(_)) { "ipv4" } else { "ipv6" });
    Row {
        proto: if listener["proto"] == "udp" { "udp" } else { "tcp" },
        address,
        port: number(&listener["port"]) as u16,
        // Some events come before the inode is known; 0 is nobody's.
        inode: listener["inode"].as_u64().unwrap_or(0),
        netns: number(&listener["netns"]) as u32,
        uid: number(&listener["uid"]) as u32,
        holders: holders
            .iter()
            .map(|holder| {
                let fds = holder["fds"].as_array().expect("fds").iter().map(|fd| number(fd) as u32);
                (number(&holder["pid"]) as u32, fds.collect())
            })
            .collect(),
    }
}

/// The rows of a `list` or `who` that concern the puppets, as JSON and reduced.
pub fn rows(output: &Value, stage: &Stage, puppets: &[&Puppet]) -> BTreeSet<Row> {
    let listeners = output.as_array().unwrap_or_else(|| panic!("not an array: {output}"));
    let ours = |row: &Row| stage.knows(row.inode) || puppets.iter().any(|p| row.holders.contains_key(&p.pid));
    let found: Vec<Row> = listeners.iter().map(row).filter(ours).collect();
    let set: BTreeSet<Row> = found.iter().cloned().collect();
    assert_eq!(set.len(), found.len(), "a listener is listed twice: {found:#?}");
    set
}

/// Checks `list` (by default and by polling) against /proc, everywhere.
#[track_caller]
pub fn check_list(step: &str, stage: &Stage, puppets: &[&Puppet]) {
    let expected = oracle::truth(stage, puppets);
    for probe in ["auto", "poll"] {
        let run = portwatch(&["--probe", probe, "list", "--json", "--netns", "all"]).expect(0);
        let listed = rows(&run.json(), stage, puppets);
        assert_eq!(listed, expected, "after {step}, --probe {probe}");
        for listener in run.json().as_array().into_iter().flatten() {
            let holders = listener["holders"].as_array().expect("holders");
            let binders = holders.iter().filter(|holder| holder["binder"] == true).count();
            assert_eq!(binders, usize::from(!holders.is_empty()), "one holder is the binder: {listener}");
        }
    }
}

/// The event tiers of this machine, best first: each tried.
pub fn event_tiers() -> &'static [&'static str] {
    static TIERS: OnceLock<Vec<&'static str>> = OnceLock::new();
    TIERS.get_or_init(|| {
        let works = |tier: &&'static str| {
            let run = portwatch(&["--probe", tier, "status", "--json"]);
            let status: Value = serde_json::from_slice(&run.stdout).unwrap_or_default();
            let works = status["tier"] == **tier;
            if !works {
                let reason = if status["reasons"].is_null() { run.errors() } else { status["reasons"].to_string() };
                eprintln!("NOT TESTED: probe {tier} is not to be had on this machine: {}", reason.trim());
            }
            works
        };
        ["fexit", "kprobe", "tracepoint"].into_iter().filter(works).collect()
    })
}

/// A program of this machine. It may have its version behind its name: `php-fpm` may be `php-fpm8.2`.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // Those of an administrator are not on everybody's path.
    let others = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/lib/systemd"].map(PathBuf::from);
    let mut versions: Vec<PathBuf> = Vec::new();
    for place in env::split_paths(&path).chain(others) {
        let exact = place.join(name);
        if exact.is_file() {
            return Some(exact);
        }
        let entries = fs::read_dir(place).into_iter().flatten().flatten().map(|entry| entry.path());
        versions.extend(entries.filter(|path| {
            let rest = path.file_name().and_then(|file| file.to_str()?.strip_prefix(name));
            rest.is_some_and(|rest| rest.chars().all(|c| c.is_ascii_digit() || c == '.'))
        }));
    }
    versions.into_iter().next()
}

/// What a test may lack: programs, by their names; tiers; what only some kernels and machines have or allow.
const LACKS: &[&str] = &[
    "bash",
    "cgroup2",
    "clock",
    "conflicts",
    "destroy",
    "docker",
    "examples",
    "fexit",
    "fish",
    "fuse",
    "groff",
    "gunicorn",
    "io_uring",
    "kernel",
    "kprobe",
    "lossless",
    "man",
    "mandoc",
    "memory",
    "mptcp",
    "native",
    "nft",
    "nginx",
    "node",
    "perf",
    "php-fpm",
    "prometheus",
    "python3",
    "root",
    "runit",
    "systemd",
    "tracepoint",
    "userns",
    "vxlan",
    "zsh",
];

/// The words of `PORTWATCH_TEST_REQUIRE`: what this machine must have.
fn required() -> Vec<String> {
    let words = env::var("PORTWATCH_TEST_REQUIRE").unwrap_or_default();
    words.split(',').map(|word| word.trim().to_owned()).filter(|word| !word.is_empty()).collect()
}

/// Whether this machine must have `what`.
#[track_caller]
pub fn is_required(what: &str) -> bool {
    assert!(LACKS.contains(&what), "'{what}' is not among what a test may lack");
    required().iter().any(|word| word == what)
}

/// Says loudly that a test is skipped for lack of `what`, or fails where that is required.
#[track_caller]
pub fn skip(what: &str, reason: &str) {
    assert!(!is_required(what), "{what} is required here, but {reason}");
    eprintln!("SKIPPED for lack of {what}: {reason}");
}

pub fn trials() -> Vec<Test> {
    vec![
        test("status::nothing_is_required_that_no_test_knows", || {
            let unknown: Vec<String> = required().into_iter().filter(|word| !LACKS.contains(&&**word)).collect();
            assert_eq!(unknown, [""; 0], "PORTWATCH_TEST_REQUIRE");
        }),
        test("status::the_machine_has_the_probes_that_are_required_of_it", || {
            let tiers = event_tiers();
            assert!(!is_required("kernel") || !tiers.is_empty(), "no event tier works here");
            for tier in ["fexit", "kprobe", "tracepoint"] {
                assert!(!is_required(tier) || tiers.contains(&tier), "{tier} does not work here");
            }
            if tiers.is_empty() {
                skip("kernel", "no event tier works");
            }
        }),
        test("status::the_best_tier_that_works_is_chosen_and_the_reasons_of_the_others_are_told", || {
            let status = portwatch(&["status", "--json"]).json();
            let best = event_tiers().first().copied().unwrap_or("poll");
            assert_eq!(status["tier"], best, "{status}");
            let reasons = status["reasons"].as_array().expect("reasons");
            for better in ["fexit", "kprobe", "tracepoint"].iter().take_while(|&&tier| tier != best) {
                let told = reasons.iter().any(|reason| {
                    reason["tier"] == **better && reason["reason"].as_str().is_some_and(|text| !text.is_empty())
                });
                assert!(told, "no reason why not {better}: {status}");
            }
        }),
        test("status::an_unknown_probe_is_a_usage_error", || {
            portwatch(&["--probe", "telepathy", "list"]).expect(2);
        }),
    ]
}
