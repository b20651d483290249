//! Names and command lines that try to draw on the terminal or to break a line.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use serde_json::Value;

use crate::puppet::{Puppet, Sock, Stage};
use crate::subject::{command, portwatch};
use crate::terminal::Terminal;
use crate::watcher::Watch;
use crate::{Test, test};

const NAME: &[u8] = b"\x1b[2J\nfake\r\x08\x7f";
const ARGUMENTS: [&[u8]; 6] = [
    b"\x1b]0;title\x07",
    b"line\nbreak\r",
    "\u{9b}31m\u{85}".as_bytes(),
    "\u{202e}reversed\u{2028}".as_bytes(),
    b"\xff\xfe not UTF-8",
    b"quote\"back\\slash",
];

/// A listener of a process with such a name and such arguments.
pub fn hostile_server(stage: &Stage) -> (Puppet, Sock) {
    let puppet = stage.puppet_with_arguments(&ARGUMENTS.map(OsStr::from_bytes));
    puppet.set_name(NAME);
    let sock = puppet.serve();
    (puppet, sock)
}

/// Nothing that a terminal obeys, but line ends.
#[track_caller]
pub fn assert_harmless(what: &str, bytes: &[u8]) {
    let text = str::from_utf8(bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
    let is_hazard = |c: char| (c.is_control() && c != '\n') || ('\u{202a}'..='\u{202e}').contains(&c);
    if let Some(found) = text.chars().find(|&c| is_hazard(c)) {
        panic!("{what} has {found:?}: {text:?}");
    }
}

/// Runs with standard output on a terminal of 100 columns.
fn on_terminal(arguments: &[&str]) -> Vec<u8> {
    let mut terminal = Terminal::new(100);
    let mut command = command(arguments);
    let child = command.env("NO_COLOR", "1").env("TERM", "xterm").stdout(terminal.stdio()).spawn().expect("portwatch");
    assert_eq!(terminal.end(child), Some(0), "{}", terminal.said);
    terminal.said.into_bytes()
}

/// The name and command line in JSON are what the process set, bytes that are not UTF-8 as U+FFFD.
#[track_caller]
fn assert_faithful(process: &Value) {
    assert_eq!(process["name"], String::from_utf8_lossy(NAME).as_ref(), "{process}");
    let command = process["command"].as_array().expect("a command");
    let expected = ARGUMENTS.map(|argument| String::from_utf8_lossy(argument).into_owned());
    assert_eq!(command[1..], expected.map(Value::from), "{process}");
}

pub fn trials() -> Vec<Test> {
    vec![
        test("hostile::text_in_a_pipe_has_no_control_characters", || {
            let stage = Stage::new();
            let (puppet, sock) = hostile_server(&stage);
            let port = sock.port().to_string();
            for arguments in
                [&["list", &port][..], &["list", "--wide", &port], &["who", &port], &["kill", "--dry-run", &port]]
            {
                let run = portwatch(arguments).expect(0);
                assert_harmless(&format!("{arguments:?}"), &run.stdout);
                assert_harmless(&format!("{arguments:?} on stderr"), &run.stderr);
                assert!(run.text().contains(&puppet.pid.to_string()), "{}", run.text());
                assert!(!run.text().lines().any(|line| line.starts_with("fake") || line.starts_with("break")));
            }
        }),
        test("hostile::a_terminal_gets_no_control_characters_and_no_wrapped_line", || {
            let stage = Stage::new();
            let (_puppet, sock) = hostile_server(&stage);
            let port = sock.port().to_string();
            let bytes = on_terminal(&["list", &port]);
            assert_harmless("list on a terminal", &bytes);
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert!(text.contains(&port), "{text}");
            assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
            assert_harmless("who on a terminal", &on_terminal(&["who", &port]));
        }),
        test("hostile::the_outcome_of_a_kill_has_no_control_characters", || {
            let stage = Stage::new();
            let (_puppet, sock) = hostile_server(&stage);
            let run = portwatch(&["kill", &sock.port().to_string(), "--yes"]).expect(0);
            assert_harmless("kill", &run.stdout);
            assert_harmless("kill on stderr", &run.stderr);
        }),
        test("hostile::watch_in_text_has_one_harmless_line_an_event", || {
            let stage = Stage::new();
            let mut watch = Watch::spawn(command(&["--probe", "poll", "watch"]));
            watch.wait_until_ready("poll");
            let (puppet, sock) = hostile_server(&stage);
            let endpoint = sock.address.to_string();
            loop {
                let line = watch.line("the hostile one");
                assert_harmless("watch", line.as_bytes());
                assert!(!line.trim().is_empty());
                if line.contains(&endpoint) {
                    assert!(line.contains(&puppet.pid.to_string()), "{line}");
                    break;
                }
            }
        }),
        test("hostile::json_is_faithful_and_one_object_a_line", || {
            let stage = Stage::new();
            let mut watch = Watch::start("poll");
            let (_puppet, sock) = hostile_server(&stage);
            let event = watch.until_event("open", sock.inode);
            assert_faithful(&event["process"]);
            let port = sock.port().to_string();
            for verb in ["list", "who"] {
                let run = portwatch(&[verb, "--json", &port]).expect(0);
                assert_harmless(verb, &run.stdout);
                assert_faithful(&run.json()[0]["holders"][0]);
            }
        }),
        test("hostile::a_selector_that_is_hostile_is_harmless", || {
            for arguments in [&["list", "\u{1b}[31m80"][..], &["who", "80\n90"], &["list", "--netns", "\u{1b}c"]] {
                assert_harmless("an error", &portwatch(arguments).expect(2).stderr);
            }
        }),
    ]
}
