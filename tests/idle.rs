//! While nothing happens, nothing runs.

use std::thread;
use std::time::Duration;

use crate::watcher::Watch;
use crate::{Test, test_each_tier};

/// How long nothing must run.
const QUIET: Duration = Duration::from_secs(10);

/// The host is not ours: other programs may open a listener while we look. Such a time does not count.
const ATTEMPTS: u32 = 6;

fn nothing_runs(tier: &'static str) {
    let mut watch = Watch::start(tier);
    for _ in 0..ATTEMPTS {
        // What the start itself caused is over when it sleeps: a second without a line.
        while watch.line_within(Duration::from_secs(1)).is_some() {}
        let before = watch.switches();
        // The only time that any test waits for to pass: that nothing happens in it is what is tested.
        thread::sleep(QUIET);
        let after = watch.switches();
        if watch.line_within(Duration::ZERO).is_none() {
            assert_eq!(before, after, "voluntary context switches by thread, over {QUIET:?}");
            return;
        }
        eprintln!("NOTE: listeners changed on this host meanwhile; once more");
    }
    panic!("the host was never quiet for {QUIET:?}");
}

pub fn trials() -> Vec<Test> {
    test_each_tier("watch::idle_means_no_context_switch_in_ten_seconds", nothing_runs)
}
