//! What stands at the agent's socket and is none, or none any more: it hangs, ends in the midst of a word, or speaks as no
//! agent does. Every verb says so and does its work itself.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Child;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::agent::with_socket;
use crate::puppet::{PATIENCE, Stage};
use crate::subject::{Run, finish, pidfd};
use crate::{Test, test};

const GREETING: &str = r#"{"response":"hello","version":1,"program":"0","pid":1,"tier":"poll"}"#;

/// What it does about the first request after the greeting.
#[derive(Clone, Copy)]
enum Then {
    /// Nothing, for as long as the client stays.
    Hangs,
    /// Says this, and hangs up.
    Says(&'static str),
    /// Says that it is at work, for longer than a client waits for the first word, and that nothing listens.
    Works,
}

struct Pretender {
    socket: PathBuf,
    /// The names of the requests that it has heard.
    heard: Receiver<String>,
}

impl Pretender {
    fn start(stage: &Stage, greeting: &'static str, then: Then) -> Pretender {
        let socket = stage.path("pretender.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let (tell, heard) = mpsc::channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let tell = tell.clone();
                thread::spawn(move || pretend(stream.expect("a connection"), greeting, then, &tell));
            }
        });
        Pretender { socket, heard }
    }

    fn begin(&self, arguments: &[&str]) -> Child {
        with_socket(arguments, &self.socket).spawn().expect("cannot run portwatch")
    }

    fn portwatch(&self, arguments: &[&str]) -> Run {
        finish(self.begin(arguments))
    }

    /// The sentence that it is of no use.
    fn useless(&self, why: &str) -> String {
        format!("the agent at {} is of no use: {why}", self.socket.display())
    }
}

/// Errors are those of a client that has left.
fn pretend(stream: UnixStream, greeting: &str, then: Then, tell: &Sender<String>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let say = |text: &str| (&stream).write_all(text.as_bytes()).ok();
    loop {
        let request: Value = serde_json::from_str(&lines.next()?.ok()?).expect("a request");
        let name = request["request"].as_str().expect("its name").to_owned();
        let is_greeting = name == "hello";
        tell.send(name).ok()?;
        match then {
            _ if is_greeting => say(&format!("{greeting}\n"))?,
            Then::Hangs => {}
            Then::Says(text) => {
                say(text)?;
                return None;
            }
            Then::Works => {
                for _ in 0..6 {
                    say("{\"response\":\"working\"}\n")?;
                    thread::sleep(Duration::from_millis(500));
                }
                say("{\"response\":\"end\",\"count\":0}\n")?;
            }
        }
    }
}

fn one_that_greets_and_hangs() {
    let stage = Stage::new();
    let agent = Pretender::start(&stage, GREETING, Then::Hangs);
    let verbs: [(&[&str], i32); 7] = [
        (&["list", "1/udp"], 0),
        (&["who", "1/udp"], 1),
        (&["status"], 1),
        // There is none.
        (&["history"], 1),
        (&["rules"], 0),
        (&["kill", "1/udp"], 0),
        (&["diagnose", "1/udp"], 0),
    ];
    let why = agent.useless("no answer within 2 s");
    // All at once: each waits for two seconds.
    let alone: Vec<Child> = verbs.iter().map(|(verb, _)| agent.begin(verb)).collect();
    let forced = verbs.iter().filter(|(verb, _)| verb[0] != "diagnose");
    let forced: Vec<Child> = forced.map(|(verb, _)| agent.begin(&[*verb, &["--agent"]].concat())).collect();
    for ((verb, code), child) in verbs.iter().zip(alone) {
        let run = finish(child).expect(*code);
        assert!(run.errors().contains(&format!("{why}; working alone\n")), "{verb:?}: {}", run.errors());
    }
    for child in forced {
        let run = finish(child).expect(4);
        assert_eq!(run.errors(), format!("portwatch: error: {why}\n"));
    }
}

fn a_watch_ends_all_the_same() {
    let stage = Stage::new();
    let agent = Pretender::start(&stage, GREETING, Then::Hangs);
    for signal in [Signal::INT, Signal::TERM] {
        let child = agent.begin(&["watch"]);
        while agent.heard.recv_timeout(PATIENCE).expect("watch asks") != "watch" {}
        rustix::process::pidfd_send_signal(pidfd(&child), signal).expect("signal");
        let run = finish(child).expect(0);
        assert_eq!(run.errors(), "");
    }
    // With little time, it is left aside soon.
    for time in ["0s", "50ms"] {
        let run = agent.portwatch(&["watch", "--for", time]).expect(0);
        let want = format!("{}; working alone\n", agent.useless("no answer in time"));
        assert!(run.errors().contains(&want) && run.errors().contains("watching ("), "{}", run.errors());
    }
    let run = agent.portwatch(&["watch", "--for", "0s", "--agent"]).expect(4);
    assert_eq!(run.errors(), format!("portwatch: error: {}\n", agent.useless("no answer in time")));
    // With more, it is given that.
    let run = agent.portwatch(&["watch", "--for", "3s"]).expect(0);
    let want = format!("{}; working alone\n", agent.useless("no answer within 2 s"));
    assert!(run.errors().contains(&want) && run.errors().contains("watching ("), "{}", run.errors());
}

fn a_wait_ends_in_time() {
    let stage = Stage::new();
    let agent = Pretender::start(&stage, GREETING, Then::Hangs);
    let late = format!("portwatch: {}; working alone\n", agent.useless("no answer in time"));
    for timeout in ["700ms", "0"] {
        let run = agent.portwatch(&["wait", "1/udp", "--bound", "--timeout", timeout]).expect(1);
        let missing = run.errors().replace(&late, "");
        assert!(missing.starts_with("portwatch: nothing listens on 1/udp"), "{}", run.errors());
        assert_eq!(missing.lines().count(), 1, "one sentence about the agent: {}", run.errors());
    }
    let run = agent.portwatch(&["wait", "1/udp", "--bound", "--timeout", "0", "--agent"]).expect(4);
    assert!(run.errors().contains(&agent.useless("no answer in time")), "{}", run.errors());
    // Without a time-out, it is not waited for either.
    agent.portwatch(&["wait", "1/udp", "--free"]).expect(0);
}

fn an_answer_that_is_cut_off() {
    let listener = r#"{"response":"listener","socket":{"id":{"inode":1,"coo"#;
    for (says, why) in [
        (listener, "it ended during its answer"),
        ("{\"response\":\"working\"}\n", "it ended during its answer"),
        ("{\"response\":\"end\",\"count\":7}\n", "it answers something else than it was asked"),
        ("HTTP/1.1 400 Bad Request\r\n", "it speaks another language: "),
        ("\u{1b}[2J\n", "it speaks another language: "),
    ] {
        let stage = Stage::new();
        let agent = Pretender::start(&stage, GREETING, Then::Says(says));
        for verb in [&["list", "1/udp"][..], &["history", "--last", "1s"], &["watch", "--for", "3s"]] {
            let run = agent.portwatch(verb);
            assert_eq!(run.code, Some(i32::from(verb[0] == "history")), "{verb:?}: {}", run.errors());
            let first = run.errors().lines().next().unwrap_or_default().to_owned();
            assert!(first.contains(&agent.useless(why)) && first.ends_with("; working alone"), "{verb:?}: {first}");
        }
        let run = agent.portwatch(&["list", "--agent"]).expect(4);
        assert!(run.errors().contains(&agent.useless(why)), "{}", run.errors());
    }
}

fn one_of_another_version() {
    let stage = Stage::new();
    let greeting = r#"{"response":"hello","version":2,"program":"9","pid":1,"tier":"poll"}"#;
    let agent = Pretender::start(&stage, greeting, Then::Hangs);
    let run = agent.portwatch(&["list", "1/udp"]).expect(0);
    let why = "it speaks version 2 of the protocol, and this program version 1; upgrade the older";
    assert!(
        run.errors().starts_with(&format!("portwatch: {}; working alone\n", agent.useless(why))),
        "{}",
        run.errors()
    );
}

fn one_that_works_is_waited_for() {
    let stage = Stage::new();
    let agent = Pretender::start(&stage, GREETING, Then::Works);
    let run = agent.portwatch(&["list"]).expect(0);
    assert_eq!(run.errors(), "portwatch: nothing is listening\n");
}

pub fn trials() -> Vec<Test> {
    vec![
        test("pretender::one_that_greets_and_hangs_is_left_aside_with_a_sentence", one_that_greets_and_hangs),
        test("pretender::a_watch_of_one_that_hangs_ends_by_signals_and_in_time", a_watch_ends_all_the_same),
        test("pretender::a_wait_for_one_that_hangs_ends_in_time", a_wait_ends_in_time),
        test("pretender::an_answer_that_is_cut_off_is_none", an_answer_that_is_cut_off),
        test("pretender::one_of_another_version_is_left_aside_with_both_versions", one_of_another_version),
        test("pretender::one_that_says_it_is_at_work_is_waited_for", one_that_works_is_waited_for),
    ]
}
