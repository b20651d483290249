//! One agent under a mixed load at a steady pace, for as long as `PORTWATCH_TEST_SOAK` says (minutes; without it, there is
//! no such test): puppets open, close, fork, exec and exit, clients ask, subscribe, hang, wait, mark and kill, history is
//! kept and metrics are scraped. It is in a network namespace of its own.
//!
//! Every ten seconds a [`Sample`] is taken; every minute all rest, and what the agent tells is compared with what is.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::agent::{Agent, Client};
use crate::company::{Chance, Company, deeds, report};
use crate::puppet::{PATIENCE, monotonic_ns, sys};
use crate::subject::{Run, finish, skip};
use crate::{Test, test};

/// Between two things that puppets do; every other time a client does something, too.
const PACE: Duration = Duration::from_millis(100);

const SAMPLE_EVERY: Duration = Duration::from_secs(10);

const REST_EVERY: Duration = Duration::from_secs(60);

/// Subscribers at a time.
const MOST_SUBSCRIBERS: usize = 10;

/// How much more memory the fourth quarter may take than the third, in percent or KiB: whichever is more. An allocator's
/// heap breathes by about as much.
const MOST_GROWTH: (f64, f64) = (3.0, 512.0);

struct Soak {
    company: Company,
    agent: Agent,
    /// Where it answers who scrapes it.
    metrics: String,
    /// Clients draw from their own, so that what puppets do depends on the seed alone.
    chance: Chance,
    subscribers: Vec<Client>,
    calls: BTreeMap<&'static str, u64>,
    samples: Vec<Value>,
    /// At rest: descriptors and listeners.
    rests: Vec<(usize, usize)>,
    differences: Vec<String>,
}

type Call = fn(&mut Soak);

const CALLS: &[(usize, Call)] = &[
    (3, Soak::list),
    (3, Soak::ask),
    (2, Soak::who),
    (2, Soak::scrape),
    (2, Soak::subscribe),
    (2, Soak::unsubscribe),
    (1, Soak::watch),
    (1, Soak::wait),
    (1, Soak::mark),
    (1, Soak::history),
    (1, Soak::kill),
];

impl Soak {
    fn new(seed: u64) -> Soak {
        let mut company = Company::new(seed, 8, 16);
        // Reserved for the agent, which cannot say which port the kernel gave it.
        let puppet = company.newcomer();
        let reserved = puppet.bind("127.0.0.1:0", "reuseaddr");
        let metrics = reserved.address.to_string();
        puppet.close(reserved.fd);
        let agent = Agent::start_with(&company.stage, &["--log", "off", "--metrics", &metrics]);
        Soak {
            company,
            agent,
            metrics,
            chance: Chance::new(seed + 2),
            subscribers: Vec::new(),
            calls: BTreeMap::new(),
            samples: Vec::new(),
            rests: Vec::new(),
            differences: Vec::new(),
        }
    }

    fn count(&mut self, call: &'static str) {
        *self.calls.entry(call).or_default() += 1;
    }

    /// Runs a verb. On a machine that is busy with something else the agent may answer late: that is counted, and shown.
    fn run(&mut self, call: &'static str, arguments: &[&str]) -> Option<Run> {
        self.count(call);
        let run = self.agent.portwatch(arguments);
        let is_late = |said: &str| said.contains("no answer within") || said.contains("did not begin in that time");
        if run.code == Some(4) && is_late(&run.errors()) {
            self.count("answered too late");
            return None;
        }
        Some(run)
    }

    fn list(&mut self) {
        self.run("list", &["list", "--json"]).map(|run| run.expect(0));
    }

    /// As a program that speaks the protocol.
    fn ask(&mut self) {
        self.count("list by protocol");
        let mut client = self.agent.connect().hello();
        client.say(r#"{"request":"list","selection":{"netns":"all"}}"#);
        while client.hear()["response"] != "end" {}
    }

    fn who(&mut self) {
        let n = self.chance.below(self.company.players.len());
        let port = self.company.players[n].socks.first().map_or(1, crate::puppet::Sock::port).to_string();
        let run = self.run("who", &["who", "--json", &port]);
        assert!(run.as_ref().is_none_or(|run| matches!(run.code, Some(0 | 1))), "{run:?}");
    }

    fn scrape(&mut self) {
        self.count("scrape");
        let mut stream = TcpStream::connect(&self.metrics).expect("the metrics' port");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("a request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("portwatch_opens_total"), "{text}");
    }

    /// One that never reads: it hangs until it goes.
    fn subscribe(&mut self) {
        if self.subscribers.len() >= MOST_SUBSCRIBERS {
            return self.unsubscribe();
        }
        self.count("subscribe and hang");
        let mut client = self.agent.connect().hello();
        client.say(r#"{"request":"watch","selection":{"netns":"all"}}"#);
        self.subscribers.push(client);
    }

    fn unsubscribe(&mut self) {
        if !self.subscribers.is_empty() {
            let which = self.chance.below(self.subscribers.len());
            self.subscribers.swap_remove(which);
        }
    }

    fn watch(&mut self) {
        self.run("watch", &["watch", "--json", "--netns", "all", "--for", "200ms"]).map(|run| run.expect(0));
    }

    fn wait(&mut self) {
        self.count("wait");
        let puppet = self.company.stage.puppet();
        let sock = puppet.bind("127.0.0.1:0", "");
        let target = format!("{}/tcp", sock.address);
        let wait = self.agent.command(&["wait", &target, "--bound", "--quiet"]).spawn().expect("portwatch wait");
        puppet.listen(sock.fd);
        finish(wait).expect(0);
        puppet.exit();
    }

    fn mark(&mut self) {
        self.run("mark", &["mark", "--name", "soak"]).map(|run| run.expect(0));
    }

    fn history(&mut self) {
        self.run("history", &["history", "--json", "--netns", "all"]).map(|run| run.expect(0));
    }

    /// One of its own puppets, by the agent.
    fn kill(&mut self) {
        let puppet = self.company.stage.puppet();
        let target = format!("{}/tcp", puppet.serve().address);
        let Some(run) = self.run("kill", &["kill", "--json", "--yes", "--settle", "0", &target]) else { return };
        let outcomes = run.expect(0).json();
        assert_eq!(outcomes[0]["killed"], json!([puppet.pid]), "{outcomes}");
        puppet.wait();
    }

    fn sample(&mut self, at: Duration) {
        let pid = self.agent.child.id();
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).expect("the agent's /proc entry");
        let field = |text: &str, name: &str| -> u64 {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("a field");
            value.split_whitespace().next().expect("a number").parse().expect("a number")
        };
        let (memory, status) = (read("smaps_rollup"), self.agent.status());
        // utime and stime, in ticks of 10 ms (`proc(5)`).
        let stat = read("stat");
        let times = stat.rsplit_once(") ").expect("a name in brackets").1.split(' ').skip(11).take(2);
        let ticks: u64 = times.map(|ticks| ticks.parse::<u64>().expect("ticks")).sum();
        let history = &status["history"];
        self.samples.push(json!({
            "at_s": at.as_secs(),
            "rss_kib": field(&memory, "Rss"),
            "anonymous_kib": field(&memory, "Anonymous"),
            "fds": self.agent.descriptors().len(),
            "threads": field(&read("status"), "Threads"),
            "cpu_ms": ticks * 10,
            "listeners": status["listeners"],
            "opens": status["opens"],
            "dropped": status["dropped"],
            "resyncs": status["resyncs"],
            "history_bytes": history["bytes"],
            "history_lives": history["lives"],
            "history_dropped": history["dropped"],
        }));
    }

    /// All clients go, and all puppets rest.
    fn rest(&mut self, at: Duration) {
        self.subscribers.clear();
        match self.company.compare(&self.agent, &format!("{} s", at.as_secs())) {
            Ok(listeners) => {
                // Connected all the time, so that it is known to be the only one.
                let mut client = self.agent.connect().hello();
                let begun = Instant::now();
                while {
                    let status = client.say(r#"{"request":"status"}"#).hear();
                    client.hear();
                    status["connections"] != 1
                } {
                    assert!(begun.elapsed() < PATIENCE, "clients that are gone are still counted");
                }
                self.rests.push((self.agent.descriptors().len(), listeners));
            }
            Err(difference) => {
                let story = self.company.story.join("\n");
                eprintln!("DIFFERENT: {difference}what was done until then:\n{story}");
                self.differences.push(difference);
            }
        }
        self.company.story.clear();
    }

    fn work(&mut self, time: Duration) {
        let begun = Instant::now();
        // So often that each quarter has some.
        let (sample_every, rest_every) = (SAMPLE_EVERY.min(time / 24), REST_EVERY.min(time / 8));
        let (mut next, mut next_sample, mut next_rest) = (PACE, sample_every, rest_every);
        while begun.elapsed() < time {
            // A pace is time that passes. Whoever is late does not hurry.
            next = next.max(begun.elapsed()) + PACE;
            thread::sleep(next.saturating_sub(begun.elapsed()));
            self.company.act(deeds::STEADY);
            if self.chance.below(2) == 0 {
                let call = self.chance.pick(CALLS);
                call(self);
            }
            if begun.elapsed() >= next_sample {
                self.sample(begun.elapsed());
                next_sample += sample_every;
            }
            if begun.elapsed() >= next_rest {
                self.rest(begun.elapsed());
                next_rest += rest_every;
            }
        }
    }

    /// What was measured, by quarter, and what is judged by it.
    fn figures(&self, seed: u64, time: Duration) -> Value {
        let quarter = |all: &[Value], n: usize| all[all.len() * n / 4..all.len() * (n + 1) / 4].to_vec();
        let numbers = |samples: &[Value], name: &str| -> Vec<f64> {
            samples.iter().map(|sample| sample[name].as_f64().unwrap_or(0.0)).collect()
        };
        let quarters: Vec<Value> = (0..4)
            .map(|n| {
                let samples = quarter(&self.samples, n);
                let fds: Vec<f64> = (self.rests.len() * n / 4..self.rests.len() * (n + 1) / 4)
                    .map(|n| self.rests[n].0 as f64)
                    .collect();
                let most = |name| numbers(&samples, name).into_iter().fold(0.0, f64::max);
                let passed = |name| most(name) - numbers(&samples, name).first().copied().unwrap_or(0.0);
                json!({
                    "rss_kib": median(numbers(&samples, "rss_kib")),
                    "rss_kib_most": most("rss_kib"),
                    "anonymous_kib": median(numbers(&samples, "anonymous_kib")),
                    "fds_at_rest": median(fds),
                    "fds": median(numbers(&samples, "fds")),
                    "threads_most": most("threads"),
                    "listeners": median(numbers(&samples, "listeners")),
                    "opens": most("opens"),
                    "dropped": most("dropped"),
                    "resyncs": most("resyncs"),
                    "history_mib": most("history_bytes") / f64::from(1 << 20),
                    "history_lives": most("history_lives"),
                    "history_dropped": most("history_dropped"),
                    "cpu_ms_per_s": passed("cpu_ms") / passed("at_s").max(1.0),
                })
            })
            .collect();
        let of = |n: usize, name: &str| quarters[n][name].as_f64().unwrap_or(0.0);
        let grown = of(3, "rss_kib") - of(2, "rss_kib");
        let percent = 100.0 * grown / of(2, "rss_kib").max(1.0);
        let (dropped, resyncs) = (of(3, "dropped"), of(3, "resyncs"));
        let compared: usize = self.rests.iter().map(|(_, listeners)| listeners).sum();
        let verdicts = [
            (
                "resident memory does not grow in the second half",
                percent <= MOST_GROWTH.0 || grown <= MOST_GROWTH.1,
                format!("{grown:+.0} KiB ({percent:+.1} %) from the third quarter's median to the fourth's"),
            ),
            (
                "no descriptor stays behind",
                of(3, "fds_at_rest") <= of(0, "fds_at_rest"),
                format!("{} at rest at first, {} at last", of(0, "fds_at_rest"), of(3, "fds_at_rest")),
            ),
            (
                "what was lost was counted and made good",
                (dropped > 0.0) <= (resyncs > 0.0),
                format!("{dropped} events dropped, {resyncs} resyncs, {} lives not stored", of(3, "history_dropped")),
            ),
            (
                "the table is the truth",
                self.differences.is_empty(),
                format!(
                    "{} differences at {} quiet points, where {compared} listeners were compared",
                    self.differences.len(),
                    self.rests.len() + self.differences.len()
                ),
            ),
        ];
        let verdicts = verdicts.map(|(what, holds, found)| json!({"what": what, "holds": holds, "found": found}));
        json!({
            "seed": seed,
            "minutes": time.as_secs_f64() / 60.0,
            "quarters": quarters,
            "verdicts": verdicts,
            "deeds": self.company.tally,
            "calls": self.calls,
            "samples": self.samples,
        })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn soak(time: Duration) {
    if let Err(error) = sys::unshare_net() {
        return skip("root", &error.to_string());
    }
    let given = env::var("PORTWATCH_TEST_SEED").ok().map(|seed| seed.parse().expect("PORTWATCH_TEST_SEED"));
    let seed = given.unwrap_or_else(monotonic_ns);
    eprintln!("NOTE: PORTWATCH_TEST_SEED={seed}");
    let mut soak = Soak::new(seed);
    soak.work(time);
    let figures = soak.figures(seed, time);
    report(&figures);
    let failed: Vec<_> =
        figures["verdicts"].as_array().into_iter().flatten().filter(|it| it["holds"] != true).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

pub fn trials() -> Vec<Test> {
    let Ok(minutes) = env::var("PORTWATCH_TEST_SOAK") else { return Vec::new() };
    let time = Duration::from_secs_f64(60.0 * minutes.parse::<f64>().expect("PORTWATCH_TEST_SOAK"));
    vec![test("soak::a_steady_load_leaves_the_agent_as_it_was", move || {
        // In a thread of its own, which moves to another network namespace.
        thread::spawn(move || soak(time)).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    })]
}
