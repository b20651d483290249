//! `watch --since`: what happened before, as the agent remembers it, then what happens, without gap or repetition.

use std::collections::BTreeMap;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::puppet::{Sock, Stage};
use crate::subject::portwatch;
use crate::watcher::Watch;
use crate::{Test, test};

/// Watches these ports, and what became of them in the last hour.
fn replay(agent: &Agent, socks: &[&Sock], arguments: &[&str]) -> Watch {
    let targets: Vec<String> = socks.iter().map(|sock| format!("{}/tcp", sock.port())).collect();
    let mut words = vec!["watch", "--since", "1h"];
    words.extend(targets.iter().map(String::as_str));
    words.extend(arguments);
    Watch::spawn(agent.command(&words))
}

/// Event, port and process.
fn gist(event: &Value) -> (String, u64, u64) {
    let text = event["event"].as_str().expect("an event").to_owned();
    (text, event["listener"]["port"].as_u64().expect("a port"), event["process"]["pid"].as_u64().expect("a pid"))
}

/// Listeners that each process opens and closes in a storm: both, of all of them, fit into the queue of one watch.
const STORM: usize = 600;
const STORMING: usize = 3;

pub fn trials() -> Vec<Test> {
    vec![
        test("replay::what_happened_is_told_in_order_and_then_what_happens", || {
            let stage = Stage::new();
            let (puppet, other) = (stage.puppet(), stage.puppet());
            let before = other.serve();
            let agent = Agent::start(&stage);
            let gone = puppet.serve();
            // Whoever reads descriptors holds each for a moment, and who closes it then has not closed it until then.
            agent.check("an open", &stage, &[&puppet, &other]);
            other.close(before.fd);
            puppet.close(gone.fd);
            let stays = puppet.serve();
            // Nobody asked for this one.
            other.serve();
            let mut watch = replay(&agent, &[&before, &gone, &stays], &["--json"]);
            watch.wait_until_ready("agent");
            let event = |event: &str, sock: &Sock, pid: u32| (event.to_owned(), u64::from(sock.port()), u64::from(pid));
            let told = [
                event("open", &gone, puppet.pid),
                event("close", &before, other.pid),
                event("close", &gone, puppet.pid),
                event("open", &stays, puppet.pid),
            ];
            let mut times = Vec::new();
            for expected in told {
                let line = watch.next("what happened");
                assert_eq!(gist(&line), expected, "{line}");
                times.push(line["time"].as_str().expect("a time").to_owned());
            }
            assert!(times.is_sorted(), "{times:?}");
            puppet.close(stays.fd);
            // The first that happens is not what happened last. Who else holds it may be told in between.
            let line = watch.until("what happens", |event| event["event"] != "holder");
            assert_eq!(gist(&line), event("close", &stays, puppet.pid), "{line}");
            assert_eq!(watch.interrupt(), Some(0));
        }),
        test("replay::its_lines_are_those_of_watch", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let puppet = stage.puppet();
            let sock = puppet.serve();
            let target = format!("{}/tcp", sock.port());
            let mut live = Watch::spawn(agent.command(&["watch", &target]));
            live.wait_until_ready("agent");
            puppet.close(sock.fd);
            let close = live.line("the close");
            let mut watch = replay(&agent, &[&sock], &[]);
            let open = watch.line("the open");
            let expected = format!(" OPEN  tcp 127.0.0.1:{} ", sock.port());
            assert!(open.contains(&expected), "{open}");
            // `12:00:00.000 CLOSE … lived 12ms`, where the clocks may be a millisecond apart.
            let text = |line: &str| {
                let (line, _lived) = line.split_once(" lived ").expect("how long it lived");
                line.split_once(' ').expect("a time").1.to_owned()
            };
            assert_eq!(text(&watch.line("the close")), text(&close));
        }),
        test("replay::in_a_storm_nothing_is_left_out_and_nothing_told_twice", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let puppets: Vec<_> = (0..STORMING).map(|_| stage.puppet()).collect();
            let begin = || puppets.iter().for_each(|puppet| puppet.begin(&format!("storm {STORM}")));
            begin();
            let mut watches = Vec::new();
            for _ in 0..STORMING {
                let mut watch = Watch::spawn(agent.command(&["watch", "--since", "1h", "--json"]));
                watch.wait_until_ready("agent");
                watches.push(watch);
            }
            for puppet in &puppets {
                puppet.answer().unwrap_or_else(|refused| panic!("{}", refused.text));
            }
            let last = stage.puppet().serve();
            for watch in &mut watches {
                let mut told: BTreeMap<(String, u64), usize> = BTreeMap::new();
                let expected: BTreeMap<(String, u64), usize> = puppets
                    .iter()
                    .flat_map(|puppet| ["open", "close"].map(|event| ((event.to_owned(), puppet.pid.into()), STORM)))
                    .collect();
                let mut is_over = false;
                // A close that is in doubt for a moment may be told after what opened later.
                while !is_over || told != expected {
                    let event = watch.next("every listener of the storm, once");
                    assert_ne!(event["event"], "resync", "nothing is lost: {event}");
                    let pid = event["process"]["pid"].as_u64().unwrap_or(0);
                    if puppets.iter().any(|puppet| u64::from(puppet.pid) == pid) && event["event"] != "holder" {
                        *told.entry((event["event"].as_str().expect("an event").to_owned(), pid)).or_default() += 1;
                    }
                    is_over |= event["listener"]["inode"] == json!(last.inode);
                }
            }
            for watch in watches {
                watch.signal(Signal::INT);
            }
        }),
        test("replay::without_a_history_there_is_a_sentence", || {
            let run = portwatch(&["watch", "--since", "10m", "--no-agent"]).expect(2);
            let expected = "portwatch: error: watch --since asks the agent, which remembers what happened, and none \
                            answers; start it: portwatch agent\n";
            assert_eq!((run.text(), run.errors()), (String::new(), expected.to_owned()));
            let stage = Stage::new();
            let agent = Agent::start_with(&stage, &["--no-history"]);
            let run = agent.portwatch(&["watch", "--since", "10m"]).expect(4);
            assert_eq!(run.errors(), "portwatch: error: this agent keeps no history\n");
        }),
    ]
}
