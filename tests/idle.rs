//! While nothing happens, nothing runs.

use std::time::{Duration, Instant};

use crate::puppet::Stage;
use crate::watcher::Watch;
use crate::{Test, test_each_tier};

/// How long nothing must run.
const QUIET: Duration = Duration::from_secs(10);

/// The host is not ours: other programs may open a listener while we look. Such a time does not count, and ends at
/// once.
const ATTEMPTS: u32 = 6;

/// How long a quiet time is sought.
const SEARCH: Duration = Duration::from_secs(120);

fn nothing_runs(tier: &'static str) {
    let mut watch = Watch::start(tier);
    let begun = Instant::now();
    while begun.elapsed() < SEARCH {
        // What the start itself caused is over when it sleeps: a second without a line.
        if watch.line_within(Duration::from_secs(1)).is_some() {
            continue;
        }
        let before = watch.switches();
        // The only time that any test waits for to pass: that nothing happens in it is what is tested.
        if watch.line_within(QUIET).is_none() {
            let after = watch.switches();
            // One that came while these were read.
            if watch.line_within(Duration::ZERO).is_none() {
                assert_eq!(before, after, "voluntary context switches by thread, over {QUIET:?}");
                return;
            }
        }
        eprintln!("NOTE: listeners changed on this host meanwhile; once more");
    }
    panic!("the host was never quiet for {QUIET:?}");
}

fn former_holders_are_let_go(tier: &'static str) {
    let mut watch = Watch::start(tier);
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.serve();
    watch.until_event("open", sock.inode);
    puppet.close(sock.fd);
    watch.until_event("close", sock.inode);
    // The first fork is still told.
    puppet.fork().exit();
    for _ in 0..ATTEMPTS {
        watch.settle();
        let before = watch.switches();
        for _ in 0..5 {
            puppet.fork().exit();
        }
        let after = watch.switches();
        if watch.line_within(Duration::ZERO).is_none() {
            assert_eq!(before, after, "voluntary context switches by thread, over five forks");
            return;
        }
    }
    panic!("the host was never quiet for five forks");
}

pub fn trials() -> Vec<Test> {
    let idle = test_each_tier("watch::idle_means_no_context_switch_in_ten_seconds", nothing_runs);
    let former = test_each_tier("watch::forks_of_a_former_holder_wake_nobody", former_holders_are_let_go);
    idle.into_iter().chain(former).collect()
}
