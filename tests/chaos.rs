//! Everything at once, by chance: a company of puppets does what servers do and what they should not, in bursts and at
//! leisure, while the agent has a tiny ring, is paused, killed, started anew, reloaded and left without descriptors, and has
//! clients that hang. At every lull its table is the truth, time after time.
//!
//! `PORTWATCH_TEST_SEED` repeats the first round of a run that failed: what is done is the same then, in the same order.
//! `PORTWATCH_TEST_CHAOS` is for how many seconds rounds are begun (without: a few rounds).

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::json;

use crate::agent::{Agent, Client};
use crate::company::{Company, deeds, report};
use crate::faults::until_freed;
use crate::puppet::monotonic_ns;
use crate::subject::{event_tiers, skip};
use crate::{Test, test};

/// Rounds, as far as they fit into the time; one at least.
const ROUNDS: usize = 3;
const TIME: Duration = Duration::from_secs(30);

/// Lulls in a round, and the most that is done before one.
const LULLS: usize = 3;
const STEPS: usize = 100;

const MOST_PUPPETS: usize = 12;

/// The longest wait between two things, at leisure.
const LEISURE_US: usize = 5000;

struct Chaos {
    company: Company,
    agent: Option<Agent>,
    is_paused: bool,
    /// Its limit of descriptors before it was lowered.
    starved: Option<Rlimit>,
    hanging: Vec<Client>,
    kernel_objects: BTreeSet<(String, u32)>,
    /// Of this round, as far as agents lived to tell, and of that the present agent's.
    losses: Losses,
    told: Losses,
    lulls: u64,
    compared: usize,
}

#[derive(Clone, Copy, Default)]
struct Losses {
    dropped: u64,
    resyncs: u64,
}

type Harm = fn(&mut Chaos);

/// What is done to the agent.
const HARMS: &[(usize, Harm)] = &[
    (2, Chaos::kill),
    (1, Chaos::restart),
    (3, Chaos::pause),
    (4, Chaos::run_on),
    (3, Chaos::starve),
    (3, Chaos::feed),
    (2, Chaos::reload),
    (3, Chaos::hang),
    (3, Chaos::talk_nonsense),
];

impl Chaos {
    fn new(seed: u64) -> Chaos {
        let mut chaos = Chaos {
            company: Company::new(seed, 4, MOST_PUPPETS),
            agent: None,
            is_paused: false,
            starved: None,
            hanging: Vec::new(),
            kernel_objects: BTreeSet::new(),
            losses: Losses::default(),
            told: Losses::default(),
            lulls: 0,
            compared: 0,
        };
        chaos.start();
        chaos
    }

    fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("an agent")
    }

    fn start(&mut self) {
        // One that was killed leaves its socket and its lock, which are no hindrance.
        let agent = Agent::start_with(&self.company.stage, &["--ring", "4096", "--log", "off"]);
        self.kernel_objects.extend(agent.kernel_objects());
        (self.agent, self.is_paused, self.starved, self.told) = (Some(agent), false, None, Losses::default());
    }

    fn end(&mut self, signal: Signal) -> Option<i32> {
        self.hanging.clear();
        self.agent.take().expect("an agent").end(signal)
    }

    fn kill(&mut self) {
        self.company.note("agent: kill", "");
        self.end(Signal::KILL);
        self.start();
    }

    fn restart(&mut self) {
        self.run_on();
        self.company.note("agent: restart", "");
        assert_eq!(self.end(Signal::TERM), Some(0));
        self.start();
    }

    fn pause(&mut self) {
        if !std::mem::replace(&mut self.is_paused, true) {
            self.company.note("agent: pause", "");
            self.agent().signal(Signal::STOP);
        }
    }

    fn run_on(&mut self) {
        if std::mem::take(&mut self.is_paused) {
            self.company.note("agent: run on", "");
            self.agent().signal(Signal::CONT);
        }
    }

    fn limit(&self, limit: Rlimit) -> Rlimit {
        let pid = Pid::from_child(&self.agent().child);
        prlimit(Some(pid), Resource::Nofile, limit).expect("prlimit")
    }

    /// It keeps what it has open, and may open little or nothing more.
    fn starve(&mut self) {
        let more = self.company.chance.below(4) as u64;
        if self.starved.is_none() {
            let most = self.agent().descriptors().into_iter().max().map_or(0, u64::from);
            self.company.note("agent: starve", &format!("of more than {more} descriptors"));
            let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
            self.starved = Some(self.limit(Rlimit { current: Some(most + 1 + more), maximum }));
        }
    }

    fn feed(&mut self) {
        if let Some(limit) = self.starved.take() {
            self.company.note("agent: feed", "");
            self.limit(limit);
        }
    }

    fn reload(&mut self) {
        self.company.note("agent: reload", "");
        self.agent().signal(Signal::HUP);
    }

    /// A subscriber that never reads.
    fn hang(&mut self) {
        // Nobody is greeted by one that is paused, or has no descriptor for it.
        self.run_on();
        self.feed();
        self.company.note("client: hang", "");
        let mut client = self.agent().connect().hello();
        client.say(r#"{"request":"watch","selection":{"netns":"all"}}"#);
        self.hanging.push(client);
    }

    fn talk_nonsense(&mut self) {
        let size = self.company.chance.below(1500);
        self.company.note("client: nonsense", &size.to_string());
        let mut client = self.agent().connect();
        client.say("nonsense").say(&"x".repeat(size));
    }

    fn step(&mut self) {
        if self.company.chance.below(5) == 0 {
            let harm = self.company.chance.pick(HARMS);
            harm(self);
        } else {
            self.company.act(deeds::WILD);
        }
    }

    /// A burst, or the same at leisure; then a lull, at which all that says who listens must agree.
    fn stretch(&mut self, n: usize) -> Result<(), String> {
        let steps = 1 + self.company.chance.below(STEPS);
        let leisure = self.company.chance.below(2) * LEISURE_US;
        self.company.story.push(format!("-- {steps} steps, up to {leisure} µs apart"));
        for _ in 0..steps {
            self.step();
            let pause = self.company.chance.below(leisure + 1);
            // No event to wait for: how fast things happen is part of the chaos.
            thread::sleep(Duration::from_micros(pause as u64));
        }
        self.run_on();
        self.feed();
        self.company.calm();
        let agent = self.agent.as_ref().expect("an agent");
        // One that could not read its table says so, until it could.
        let status = agent.until("well", |status| status["troubles"] == json!([]));
        self.compared += self.company.compare(agent, &format!("stretch {n}"))?;
        self.lulls += 1;
        let count = |name: &str| status[name].as_u64().unwrap_or(0);
        let now = Losses { dropped: count("dropped"), resyncs: count("resyncs") };
        self.losses.dropped += now.dropped - self.told.dropped;
        self.losses.resyncs += now.resyncs - self.told.resyncs;
        self.told = now;
        Ok(())
    }

    fn round(&mut self) -> Result<(), String> {
        (0..LULLS).try_for_each(|n| self.stretch(n))?;
        let socket = self.agent().socket.clone();
        assert_eq!(self.end(Signal::TERM), Some(0));
        assert!(!socket.exists());
        until_freed(&self.kernel_objects);
        Ok(())
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

fn chaos() {
    let number =
        |name: &str| env::var(name).ok().map(|value| value.parse::<u64>().unwrap_or_else(|_| panic!("{name}")));
    let (given, seconds) = (number("PORTWATCH_TEST_SEED"), number("PORTWATCH_TEST_CHAOS"));
    let (most, time) = seconds.map_or((ROUNDS, TIME), |seconds| (usize::MAX, Duration::from_secs(seconds)));
    // Even, and the next round's is two more: the lowest bit counts for nothing.
    let first = given.unwrap_or_else(|| monotonic_ns() & !1);
    let begun = Instant::now();
    let mut tally: BTreeMap<&'static str, u64> = BTreeMap::new();
    let (mut rounds, mut lulls, mut compared, mut losses) = (0, 0, 0, Losses::default());
    let mut failures = Vec::new();
    while rounds == 0 || (rounds < most && begun.elapsed() < time) {
        let seed = first + 2 * rounds as u64;
        let mut chaos = Chaos::new(seed);
        let outcome = catch_unwind(AssertUnwindSafe(|| chaos.round())).unwrap_or_else(|panic| Err(text_of(&*panic)));
        for (kind, count) in &chaos.company.tally {
            *tally.entry(kind).or_default() += count;
        }
        lulls += chaos.lulls;
        compared += chaos.compared;
        losses.dropped += chaos.losses.dropped;
        losses.resyncs += chaos.losses.resyncs;
        rounds += 1;
        if let Err(failure) = outcome {
            let story = chaos.company.story.join("\n");
            eprintln!("what was done with PORTWATCH_TEST_SEED={seed}:\n{story}\nand then: {failure}");
            failures.push(json!({"seed": seed, "what": failure}));
        }
    }
    report(&json!({
        "tier": event_tiers().first().copied().unwrap_or("poll"),
        "seconds": begun.elapsed().as_secs(),
        "first_seed": first,
        "rounds": rounds,
        "quiet_points": lulls,
        "listeners_compared": compared,
        "dropped": losses.dropped,
        "resyncs": losses.resyncs,
        "steps": tally,
        "differences": failures,
    }));
    assert!(failures.is_empty(), "{failures:#?}");
}

pub fn trials() -> Vec<Test> {
    vec![test("faults::after_any_chaos_the_table_is_the_truth", || {
        if !rustix::process::geteuid().is_root() {
            return skip("root", "what is left in the kernel is shown to root only");
        }
        chaos();
    })]
}
