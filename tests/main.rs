//! Scenario tests: the real binary, real processes, the real kernel. One program, which needs nothing else on the
//! machine: it runs here and, linked statically, as the only program of a small virtual machine.
//!
//! - `PORTWATCH_BIN` names the binary under test (default: the one that cargo built).
//! - `PORTWATCH_TEST_REQUIRE=kernel,fexit,tracepoint,mptcp,…` makes a test fail that is otherwise skipped because the
//!   machine lacks that.
//! - `PORTWATCH_TEST_CHAOS` is for how many seconds there is chaos (default: a few rounds).
//! - `PORTWATCH_TEST_ENDS` is how many random ends of `run` are tried (default: as many as fit in 20 s).
//! - `PORTWATCH_TEST_SEED` repeats a round of chaos.
//! - `PORTWATCH_TEST_SOAK` lets an agent work under a steady load, for so many minutes (without: not at all).
//! - `PORTWATCH_TEST_STORM` is the number of listeners that a storm opens (default 20000).
//! - `PORTWATCH_TEST_SWEEPS` is how often an adversary is fought (default: as often as fits into ten seconds).
//!
//! Tests run one after the other: several of them watch the whole host.

#![expect(unreachable_pub, reason = "a program exports nothing: pub says that other modules use it")]
#![expect(missing_debug_implementations, reason = "nobody prints a test or a running watch")]

mod access;
mod agent;
mod agent_kill;
mod chaos;
mod company;
mod container;
mod diagnose;
mod dockerd;
mod embed;
mod faults;
mod gate;
mod history;
mod hostile;
mod idle;
mod kill;
mod list;
mod mark;
mod metrics;
mod namespaces;
mod oracle;
mod prefork;
mod pretender;
mod puppet;
mod race;
mod replay;
mod rules;
mod run;
mod security;
mod service;
mod shell;
mod soak;
mod storm;
mod stubborn;
mod subject;
mod supervised;
mod sweep;
mod terminal;
mod top;
mod user;
mod wait;
mod watch;
mod watcher;
mod who;

use std::env;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use nix::libc;
use nix::sys::signal::{SigHandler, Signal, signal};

/// A test, by name.
pub struct Test {
    name: String,
    run: Box<dyn FnOnce() + Send>,
}

pub fn test(name: impl Into<String>, run: impl FnOnce() + Send + 'static) -> Test {
    Test { name: name.into(), run: Box::new(run) }
}

/// One test for each way of watching that this machine allows: event tiers, and polling.
pub fn test_each_probe(name: &str, run: fn(&'static str)) -> Vec<Test> {
    let probes = subject::event_tiers().iter().copied().chain(["poll"]);
    probes.map(|probe| test(format!("{name} [{probe}]"), move || run(probe))).collect()
}

/// One test for each event tier that this machine allows.
pub fn test_each_tier(name: &str, run: fn(&'static str)) -> Vec<Test> {
    subject::event_tiers().iter().map(|&tier| test(format!("{name} [{tier}]"), move || run(tier))).collect()
}

fn main() -> ExitCode {
    if let Some(control) = env::var_os(puppet::CONTROL_VARIABLE) {
        puppet::run(control);
    }
    if let Some(path) = env::var_os(history::WRITER_VARIABLE) {
        history::write_until_killed(path.as_ref());
    }
    if let Some(place) = env::var_os(sweep::ADVERSARY_VARIABLE) {
        sweep::play(place.as_ref());
    }
    if env::var_os(run::actor::VARIABLE).is_some() {
        run::actor::run();
    }
    // Orphans of puppets come to this process, to be reaped.
    // SAFETY: takes integers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    // A shell script starts its background jobs with some of these ignored, nohup the other, and all that they start
    // would inherit it.
    for ignored in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP] {
        // SAFETY: the default action is no handler.
        unsafe { signal(ignored, SigHandler::SigDfl) }.expect("a signal that may be handled");
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let tests = [
        oracle::trials(),
        subject::trials(),
        list::trials(),
        who::trials(),
        watch::trials(),
        top::trials(),
        storm::trials(),
        idle::trials(),
        kill::trials(),
        namespaces::trials(),
        mark::trials(),
        race::trials(),
        prefork::trials(),
        stubborn::trials(),
        supervised::trials(),
        container::trials(),
        diagnose::trials(),
        wait::trials(),
        run::trials(),
        shell::trials(),
        agent::trials(),
        agent_kill::trials(),
        pretender::trials(),
        access::trials(),
        faults::trials(),
        chaos::trials(),
        soak::trials(),
        metrics::trials(),
        service::trials(),
        hostile::trials(),
        user::trials(),
        security::trials(),
        history::trials(),
        replay::trials(),
        sweep::trials(),
        rules::trials(),
        embed::trials(),
    ];
    let trials = tests.into_iter().flatten().map(|test| {
        Trial::test(test.name, move || {
            (test.run)();
            Ok::<(), Failed>(())
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    // Where a filter left out the test that ends it.
    dockerd::end();
    conclusion.exit_code()
}
