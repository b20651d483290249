//! Many listeners at once: every one of them is shown, or counted as lost and the table made true again.

use std::collections::HashMap;
use std::env;

use rustix::process::Signal;
use serde_json::Value;

use crate::puppet::{Puppet, Stage};
use crate::subject::{is_required, portwatch, skip};
use crate::watcher::Watch;
use crate::{Test, test_each_tier};

const PUPPETS: usize = 8;

/// How many listeners a storm opens and closes in all.
fn size() -> usize {
    let size = env::var("PORTWATCH_TEST_STORM").ok().map(|size| size.parse().expect("PORTWATCH_TEST_STORM"));
    size.unwrap_or(20_000)
}

/// How often each (pid, port) came.
type Tally = HashMap<(u32, u16), usize>;

/// All puppets storm at once; what they opened.
fn storm(puppets: &[Puppet]) -> Tally {
    for puppet in puppets {
        puppet.begin(&format!("storm {}", size() / PUPPETS));
    }
    let mut opened = Tally::new();
    for puppet in puppets {
        let ports = puppet.answer().unwrap_or_else(|refused| panic!("{}", refused.text));
        for port in ports.split_whitespace() {
            *opened.entry((puppet.pid, port.parse().expect("a port"))).or_default() += 1;
        }
    }
    opened
}

/// What a watch showed of a storm.
#[derive(Default)]
struct Shown {
    opens: Tally,
    closes: Tally,
}

impl Shown {
    fn count(&mut self, event: &Value) {
        let tally = match event["event"].as_str() {
            Some("open") => &mut self.opens,
            Some("close") => &mut self.closes,
            _ => return,
        };
        let pid = event["process"]["pid"].as_u64().unwrap_or(0) as u32;
        let port = event["listener"]["port"].as_u64().expect("a port") as u16;
        // Somebody's agent may have a port for its metrics.
        let is_agent = || event["process"]["command"].to_string().contains("--metrics");
        let is_ours = event["process"]["name"] == "portwatch" && !is_agent();
        assert!(!is_ours, "it holds files only while it looks at them: {event}");
        *tally.entry((pid, port)).or_default() += 1;
    }
}

/// Everything in `shown` is in `opened`; how many of `opened` are not in `shown`.
#[track_caller]
fn missing(what: &str, opened: &Tally, shown: &Tally, puppets: &[Puppet]) -> usize {
    for (key, count) in shown {
        let is_ours = puppets.iter().any(|puppet| puppet.pid == key.0);
        // Listeners of other programs on this machine may show as well; nobody's would be a lie about ours.
        assert!(is_ours || key.0 != 0, "{what}: port {} was shown without its process", key.1);
        assert!(
            !is_ours || opened.get(key).is_some_and(|opened| opened >= count),
            "{what}: invented {key:?} × {count}"
        );
    }
    opened.iter().map(|(key, count)| count - shown.get(key).copied().unwrap_or(0)).sum()
}

fn every_listener(tier: &'static str) {
    let stage = Stage::new();
    let puppets: Vec<Puppet> = (0..PUPPETS).map(|_| stage.puppet()).collect();
    let mut watch = Watch::start(tier);
    let opened = storm(&puppets);
    // Events come in order: when this one is shown, all before were.
    let last = puppets[0].serve();
    let mut shown = Shown::default();
    loop {
        let event = watch.next("the listener opened after the storm");
        if event["event"] == "open" && event["listener"]["inode"] == last.inode {
            break;
        }
        shown.count(&event);
    }
    // A close that began before a snapshot which still saw the socket is in doubt, and told with the next snapshot:
    // soon, but after this. One that is never told makes `next` give up.
    while watch.lost == 0 && missing("close", &opened, &shown.closes, &puppets) > 0 {
        let event = watch.next("a close that was in doubt");
        shown.count(&event);
    }
    let not_shown = missing("open", &opened, &shown.opens, &puppets);
    let not_closed = missing("close", &opened, &shown.closes, &puppets);
    if watch.lost == 0 {
        assert_eq!((not_shown, not_closed), (0, 0), "lost silently");
    } else {
        eprintln!("NOTE: {} records were lost in the storm, {not_shown} opens not shown", watch.lost);
        assert!(!is_required("lossless"), "{} records were lost", watch.lost);
        assert!(not_shown as u64 <= watch.lost, "{not_shown} opens missing, {} counted as lost", watch.lost);
    }
    let all: Vec<&Puppet> = puppets.iter().collect();
    watch.until_true("the storm", &stage, &all);
}

fn a_stopped_watch(tier: &'static str) {
    let stage = Stage::new();
    let puppets: Vec<Puppet> = (0..PUPPETS).map(|_| stage.puppet()).collect();
    let mut watch = Watch::start(tier);
    let before = puppets[0].serve();
    let stays = puppets[1].serve();
    watch.until_event("open", stays.inode);
    watch.signal(Signal::STOP);
    puppets[0].close(before.fd);
    let during = puppets[2].serve();
    let mut opened = Tally::new();
    // Two records of a hundred bytes each: more than the ring (8 MiB) holds.
    let mut rounds = 0;
    while rounds * size() < 40_000 {
        for (key, count) in storm(&puppets) {
            *opened.entry(key).or_default() += count;
        }
        rounds += 1;
    }
    let heir = puppets[3].fork();
    watch.signal(Signal::CONT);
    let mut shown = Shown::default();
    while watch.lost == 0 {
        let event = watch.next("that records were lost");
        if event["listener"]["inode"] != during.inode {
            shown.count(&event);
        }
    }
    let all: Vec<&Puppet> = puppets.iter().chain([&heir]).collect();
    watch.until_true("the loss", &stage, &all);
    let last = puppets[4].serve();
    watch.until_event("open", last.inode);
    watch.until_true("a listener after the loss", &stage, &all);
    assert!(missing("open", &opened, &shown.opens, &puppets) as u64 <= watch.lost);
}

/// A flood that would go on for minutes; the watch ends at its time all the same. One process suffices to keep the
/// ring from ever being empty, and leaves the machine a processor.
fn time_passes_in_a_flood(tier: &'static str) {
    if env::var_os("PORTWATCH_TEST_EMULATED").is_some() {
        // Probes come and go by patching kernel code; while a flood runs that very code, an emulated processor hangs
        // in it for good (seen with 5.10 under QEMU's TCG: soft lockup of the flooding process, not of portwatch).
        return skip("native", "an emulated processor may hang where code that runs is patched");
    }
    let stage = Stage::new();
    let puppet = stage.puppet();
    puppet.begin("storm 10000000");
    portwatch(&["--probe", tier, "watch", "--for", "300ms"]).expect(0);
    assert!(puppet.is_alive());
}

pub fn trials() -> Vec<Test> {
    let every = test_each_tier("watch::every_listener_of_a_storm_is_shown_or_counted", every_listener);
    let stopped = test_each_tier("watch::a_stopped_watch_says_what_it_lost_and_is_true_again", a_stopped_watch);
    let flood = test_each_tier("watch::time_passes_in_a_flood", time_passes_in_a_flood);
    every.into_iter().chain(stopped).chain(flood).collect()
}
