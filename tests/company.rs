//! A company of puppets that do by chance what servers do, all of it on purpose and in an order that a seed repeats; and
//! the comparison of what an agent says of them with what the kernel says, read in two other ways.

pub mod deeds;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use serde_json::Value;

use crate::agent::Agent;
use crate::oracle::{self, Row};
use crate::puppet::{PATIENCE, Puppet, Sock, Stage};
use crate::subject::{portwatch, rows};

use self::deeds::Deed;

/// xorshift64: the same numbers for the same seed.
pub struct Chance(u64);

impl Chance {
    /// Never 0, of which nothing else follows.
    pub fn new(seed: u64) -> Chance {
        Chance(seed | 1)
    }

    /// Less than `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    /// One of them, each as often as its weight says.
    pub fn pick<T: Copy>(&mut self, all: &[(usize, T)]) -> T {
        let mut n = self.below(all.iter().map(|(weight, _)| weight).sum());
        for &(weight, one) in all {
            if n < weight {
                return one;
            }
            n -= weight;
        }
        unreachable!("less than the sum of all weights")
    }
}

/// A puppet, the descriptors of sockets that it knows to have, and what it is in the midst of.
pub struct Player {
    pub puppet: Puppet,
    pub socks: Vec<Sock>,
    /// Those that were shut down, and do not listen.
    pub silent: Vec<Sock>,
    storms: bool,
    /// What lies in its mailbox, if it has one.
    mailbox: Option<Vec<Sock>>,
    rings: Vec<i32>,
}

impl Player {
    fn new(puppet: Puppet) -> Player {
        Player { puppet, socks: Vec::new(), silent: Vec::new(), storms: false, mailbox: None, rings: Vec::new() }
    }

    /// Only when a storm is over, it does something else.
    pub fn calm(&mut self) -> &mut Player {
        if std::mem::take(&mut self.storms) {
            self.puppet.answer().expect("a storm");
        }
        self
    }

    /// What it was sent and has not received; it has a mailbox from now on.
    fn mail(&mut self) -> &mut Vec<Sock> {
        self.mailbox.get_or_insert_with(|| {
            self.puppet.open_mailbox();
            Vec::new()
        })
    }
}

pub struct Company {
    pub stage: Stage,
    pub players: Vec<Player>,
    pub chance: Chance,
    /// What was done, for whoever reads why it failed.
    pub story: Vec<String>,
    /// How often each thing was done.
    pub tally: BTreeMap<&'static str, u64>,
    /// So many puppets at most.
    pub most: usize,
}

impl Company {
    pub fn new(seed: u64, players: usize, most: usize) -> Company {
        let stage = Stage::new();
        let players = (0..players).map(|_| Player::new(stage.puppet())).collect();
        Company { stage, players, chance: Chance::new(seed), story: Vec::new(), tally: BTreeMap::new(), most }
    }

    /// Takes a deed down, before it is done: the last of a story that broke off is the one that did not go well.
    pub fn note(&mut self, kind: &'static str, what: &str) {
        *self.tally.entry(kind).or_default() += 1;
        self.story.push(format!("{kind} {what}"));
    }

    /// One of them does one of these deeds.
    pub fn act(&mut self, deeds: &[(usize, Deed)]) {
        let deed = self.chance.pick(deeds);
        let n = self.chance.below(self.players.len());
        self.players[n].calm();
        deed(self, n);
    }

    pub fn newcomer(&mut self) -> &Puppet {
        let puppet = self.stage.puppet();
        self.players.push(Player::new(puppet));
        &self.players.last().expect("just come").puppet
    }

    pub fn calm(&mut self) {
        for player in &mut self.players {
            player.calm();
        }
    }

    /// Compares what the agent tells with /proc and with the iterator, while nothing happens; how many listeners there are,
    /// or what differs.
    ///
    /// The kernel lets go of some sockets a moment after the call that does it (those in the mail of somebody who is
    /// gone, or registered with an io_uring): what is read before and after has to be the same.
    pub fn compare(&mut self, agent: &Agent, step: &str) -> Result<usize, String> {
        self.calm();
        // No event tells of a descriptor that was passed over a unix socket: the agent learns of it with the snapshot after
        // the next change. This is it, and the answer has to wait for that snapshot, for it is among what is asked for.
        let puppet = &self.players[0].puppet;
        let change = puppet.serve();
        let puppets: Vec<&Puppet> = self.players.iter().map(|player| &player.puppet).collect();
        let begun = Instant::now();
        loop {
            let truth = oracle::truth(&self.stage, &puppets);
            let told = agent.portwatch(&["list", "--json", "--netns", "all"]).expect(0).json();
            let alone = portwatch(&["list", "--json", "--netns", "all", "--no-agent"]).expect(0).json();
            if truth != oracle::truth(&self.stage, &puppets) {
                assert!(begun.elapsed() < PATIENCE, "the kernel never rests after {step}");
                continue;
            }
            // What nobody holds in a namespace that nobody is in, nobody can find.
            let abandoned = oracle::abandoned(&self.stage, &puppets);
            let findable = |mut rows: BTreeSet<Row>| {
                rows.retain(|row| !row.holders.is_empty() || !abandoned.contains(&row.netns));
                rows
            };
            let truth = findable(truth);
            let parts = [("the iterator", alone), ("the agent", told)].map(|(who, output)| {
                let only = difference(&findable(rows(&output, &self.stage, &puppets)), &truth);
                if only.is_empty() { only } else { format!("{who} (left) and /proc (right), after {step}:\n{only}\n") }
            });
            let different = parts.concat();
            puppet.close(change.fd);
            return if different.is_empty() { Ok(truth.len()) } else { Err(different) };
        }
    }
}

/// Rows that only one of them has, a line each. Of holders the descriptors are left out: a dup(2) is no event.
fn difference(left: &BTreeSet<Row>, right: &BTreeSet<Row>) -> String {
    let plain = |rows: &BTreeSet<Row>| -> BTreeSet<String> {
        let line = |row: &Row| {
            let pids: Vec<_> = row.holders.keys().collect();
            format!("{}/{} {} inode {} in {} held by {pids:?}", row.port, row.proto, row.address, row.inode, row.netns)
        };
        rows.iter().map(line).collect()
    };
    let (left, right) = (plain(left), plain(right));
    let only_left = left.difference(&right).map(|line| format!("left: {line}"));
    only_left.chain(right.difference(&left).map(|line| format!("right: {line}"))).collect::<Vec<_>>().join("\n")
}

/// Says figures to whoever runs this, in one line: `xtask` reads it, from a virtual machine's console, too.
pub fn report(figures: &Value) {
    eprintln!("\nREPORT: {figures}");
}
