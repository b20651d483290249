//! While nothing happens, nothing runs.

use std::time::{Duration, Instant};

use crate::agent::Agent;
use crate::puppet::{Puppet, Stage};
use crate::subject::event_tiers;
use crate::watcher::{Watch, switches_of};
use crate::{Test, test, test_each_tier};

/// How long nothing must run.
const QUIET: Duration = Duration::from_secs(10);

/// The host is not ours: other programs may open a listener while we look. Such a time does not count, and ends at
/// once.
const ATTEMPTS: u32 = 6;

/// How long a quiet time is sought.
const SEARCH: Duration = Duration::from_secs(120);

/// How long the agent must not run, and how long such a time is sought.
const LONG_QUIET: Duration = Duration::from_secs(30);
const LONG_SEARCH: Duration = Duration::from_secs(300);

/// What 10,000 listeners may take of the agent's memory: what an agent that has few leaves of 40 MiB. (`cargo xtask bench`
/// tells the whole, of a release build.)
const MOST_GROWTH: u64 = 24 << 20;

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

/// Puppets that keep so many listeners open in all.
fn serving(stage: &Stage, listeners: usize) -> Vec<Puppet> {
    // No more than any process may have.
    const EACH: usize = 500;
    let puppets: Vec<Puppet> = (0..listeners.div_ceil(EACH)).map(|_| stage.puppet()).collect();
    for n in 0..listeners {
        puppets[n / EACH].serve();
    }
    puppets
}

/// Nothing wakes the agent for [`LONG_QUIET`]. `watch` tells whether the host left it alone; what it does not tell (who
/// holds a listener forks, and that changes nothing) may wake it once, but not every time.
fn agent_sleeps(agent: &Agent, watch: &mut Watch) {
    let begun = Instant::now();
    while begun.elapsed() < LONG_SEARCH {
        // What the start itself caused is over: a second without a line.
        if watch.line_within(Duration::from_secs(1)).is_some() {
            continue;
        }
        let before = switches_of(agent.child.id());
        let told = watch.line_within(LONG_QUIET);
        let after = switches_of(agent.child.id());
        if before == after {
            return;
        }
        let cause = if told.is_some() { "listeners changed on this host" } else { "for nothing that is told" };
        eprintln!("NOTE: the agent ran, {cause}; once more: {before:?} {after:?}");
    }
    panic!("the agent never slept for {LONG_QUIET:?}, or the host was never quiet for so long");
}

fn agents_with_many_listeners_sleep(tier: &'static str) {
    let stage = Stage::new();
    let agent = Agent::start_with(&stage, &["--probe", tier]);
    let puppets = serving(&stage, 1000);
    agent.check("the start", &stage, &puppets.iter().collect::<Vec<_>>());
    // Whoever is connected is no reason to wake, either.
    agent_sleeps(&agent, &mut agent.watch());
}

fn ten_thousand_listeners() {
    let stage = Stage::new();
    let agent = Agent::start(&stage);
    let before = agent.memory();
    let _puppets = serving(&stage, 10_000);
    agent.until("in the table", |status| status["listeners"].as_u64() >= Some(10_000));
    let after = agent.memory();
    eprintln!("NOTE: {} KiB with 10,000 listeners, {} KiB before", after >> 10, before >> 10);
    assert!(after.saturating_sub(before) < MOST_GROWTH, "{before} bytes before, {after} with 10,000 listeners");
}

pub fn trials() -> Vec<Test> {
    let idle = test_each_tier("watch::idle_means_no_context_switch_in_ten_seconds", nothing_runs);
    let former = test_each_tier("watch::forks_of_a_former_holder_wake_nobody", former_holders_are_let_go);
    // Of the tiers, it wakes for what `watch` wakes for, above.
    let agents = event_tiers().first().map(|&tier| {
        test("agent::with_a_thousand_listeners_it_does_not_run_for_30_s", move || {
            agents_with_many_listeners_sleep(tier)
        })
    });
    let memory = test("agent::ten_thousand_listeners_fit_into_its_memory", ten_thousand_listeners);
    idle.into_iter().chain(former).chain(agents).chain([memory]).collect()
}
