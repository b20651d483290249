//! Everything at once, by chance: storms, forks and closes, an agent with a tiny ring that is paused, killed and started
//! anew, clients that hang. When it is over, the table is the truth; time after time.
//!
//! `PORTWATCH_TEST_SEED` repeats the first round of a run that failed: what is done is the same then, in the same order.

use std::collections::BTreeSet;
use std::env;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::agent::{Agent, Client};
use crate::faults::until_freed;
use crate::puppet::{Puppet, Sock, Stage};
use crate::subject::skip;
use crate::{Test, test};

/// Rounds, as far as they fit into the time; one at least.
const ROUNDS: usize = 10;
const TIME: Duration = Duration::from_secs(60);

/// Things done in a round.
const STEPS: usize = 60;

const MOST_PUPPETS: usize = 12;

/// xorshift64: the same numbers for the same seed.
struct Chance(u64);

impl Chance {
    /// Less than `limit`.
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// A puppet, the sockets that it has itself opened and not closed, and whether it storms.
struct Player {
    puppet: Puppet,
    socks: Vec<Sock>,
    storms: bool,
}

impl Player {
    fn new(puppet: Puppet) -> Player {
        Player { puppet, socks: Vec::new(), storms: false }
    }

    /// Only when a storm is over, it does something else.
    fn calm(&mut self) -> &mut Player {
        if std::mem::take(&mut self.storms) {
            self.puppet.answer().expect("a storm");
        }
        self
    }
}

struct Chaos {
    chance: Chance,
    players: Vec<Player>,
    agent: Option<Agent>,
    is_paused: bool,
    hanging: Vec<Client>,
    kernel_objects: BTreeSet<(String, u32)>,
    /// What was done, for whoever reads why it failed.
    story: Vec<String>,
    stage: Stage,
}

impl Chaos {
    fn new(seed: u64) -> Chaos {
        let stage = Stage::new();
        let players = (0..4).map(|_| Player::new(stage.puppet())).collect();
        let mut chaos = Chaos {
            chance: Chance(seed),
            players,
            agent: None,
            is_paused: false,
            hanging: Vec::new(),
            kernel_objects: BTreeSet::new(),
            story: Vec::new(),
            stage,
        };
        chaos.start();
        chaos
    }

    fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("an agent")
    }

    fn start(&mut self) {
        // One that was killed leaves its socket and its lock, which are no hindrance.
        let agent = Agent::start_with(&self.stage, &["--ring", "4096", "--log", "off"]);
        self.kernel_objects.extend(agent.kernel_objects());
        (self.agent, self.is_paused) = (Some(agent), false);
    }

    fn run_on(&mut self) {
        if std::mem::take(&mut self.is_paused) {
            self.agent().signal(Signal::CONT);
        }
    }

    fn step(&mut self) {
        let n = self.chance.below(self.players.len());
        let kind = self.chance.below(20);
        let (size, which) = (self.chance.below(1500), self.chance.below(8));
        self.story.push(format!("{kind}: player {n}, {size}, {which}"));
        let full = self.players.len() >= MOST_PUPPETS;
        match kind {
            0..=3 => {
                let player = self.players[n].calm();
                player.puppet.begin(&format!("storm {size}"));
                player.storms = true;
            }
            4..=7 => {
                let player = self.players[n].calm();
                let (puppet, any) = (&player.puppet, "127.0.0.1:0");
                let sock = match which {
                    0 => puppet.udp(any, ""),
                    1 => puppet.tcp("[::]:0", "dual"),
                    2 => puppet.tcp("[::1]:0", "v6only"),
                    3 => puppet.tcp(any, "reuseport"),
                    4 => {
                        let bound = puppet.bind(any, "");
                        puppet.listen(bound.fd)
                    }
                    5 => puppet.tcp(any, "cloexec"),
                    _ => puppet.serve(),
                };
                player.socks.push(sock);
            }
            8 | 9 => {
                let player = self.players[n].calm();
                if let Some(sock) = player.socks.pop() {
                    player.puppet.close(sock.fd);
                }
            }
            10 => {
                let player = self.players[n].calm();
                if let Some(sock) = player.socks.last() {
                    player.puppet.dup(sock.fd);
                }
            }
            11 | 12 if !full => {
                let child = self.players[n].calm().puppet.fork();
                self.players.push(Player::new(child));
            }
            13 => {
                let player = self.players[n].calm();
                player.puppet.exec();
                // Those that the exec did not close stay open for good.
                player.socks.clear();
            }
            14 if self.players.len() > 2 => {
                let mut player = self.players.swap_remove(n);
                player.calm();
                player.puppet.exit();
            }
            15 => {
                let mut agent = self.agent.take().expect("an agent");
                agent.end(Signal::KILL);
                drop(agent);
                self.hanging.clear();
                self.start();
            }
            16 if !self.is_paused => {
                self.agent().signal(Signal::STOP);
                self.is_paused = true;
            }
            17 => self.run_on(),
            // While it is paused nobody is greeted.
            18 if !self.is_paused => {
                let mut client = self.agent().connect().hello();
                client.say(r#"{"request":"watch","selection":{"netns":"all"}}"#);
                self.hanging.push(client);
            }
            _ => {
                let mut client = self.agent().connect();
                client.say("nonsense").say(&"x".repeat(size));
            }
        }
    }

    fn round(&mut self, step: &str) {
        for _ in 0..STEPS {
            self.step();
        }
        self.run_on();
        for player in &mut self.players {
            player.calm();
        }
        let puppets: Vec<&Puppet> = self.players.iter().map(|player| &player.puppet).collect();
        self.agent().check(step, &self.stage, &puppets);
    }
}

fn chaos() {
    let given = env::var("PORTWATCH_TEST_SEED").ok().map(|seed| seed.parse().expect("PORTWATCH_TEST_SEED"));
    let begun = Instant::now();
    let mut rounds = 0;
    while rounds == 0 || (rounds < ROUNDS && begun.elapsed() < TIME) {
        // Never 0, of which nothing else follows.
        let seed = given.unwrap_or_else(|| crate::puppet::monotonic_ns() | 1) + 2 * rounds as u64;
        eprintln!("NOTE: round {rounds}, PORTWATCH_TEST_SEED={seed}");
        let mut chaos = Chaos::new(seed);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| chaos.round(&format!("seed {seed}"))));
        if let Err(panic) = outcome {
            eprintln!("what was done with PORTWATCH_TEST_SEED={seed}:\n{}", chaos.story.join("\n"));
            std::panic::resume_unwind(panic);
        }
        let mut agent = chaos.agent.take().expect("an agent");
        assert_eq!(agent.end(Signal::TERM), Some(0));
        assert!(!agent.socket.exists());
        until_freed(&chaos.kernel_objects);
        rounds += 1;
    }
    eprintln!("NOTE: {rounds} rounds of chaos in {:?}", begun.elapsed());
}

pub fn trials() -> Vec<Test> {
    vec![test("faults::after_any_chaos_the_table_is_the_truth", || {
        if !rustix::process::geteuid().is_root() {
            return skip("root", "what is left in the kernel is shown to root only");
        }
        chaos();
    })]
}
