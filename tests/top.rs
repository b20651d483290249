//! `top` on a terminal of its own: what is on the screen, what keys do, and how the terminal is left.

use std::num::NonZeroU16;
use std::process::{Child, Command};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use crate::agent::Agent;
use crate::hostile::hostile_server;
use crate::puppet::{PATIENCE, Stage, wait_readable};
use crate::subject::{command, finish, pidfd, portwatch};
use crate::terminal::Terminal;
use crate::user::Scene;
use crate::{Test, test, test_each_probe};

const ROWS: u16 = 24;
const COLUMNS: u16 = 100;

const YES: &str = "[y/N]";

/// `top` on a terminal, and the screen that a person would see.
struct Top {
    terminal: Terminal,
    /// `None` once it has ended.
    child: Option<Child>,
    screen: vt100::Parser,
    /// How much of what was said is on the screen.
    shown: usize,
}

impl Top {
    /// On what puppets listen on, those of other tests on this host among them.
    fn start(arguments: &[&str]) -> Top {
        Top::of(command(&[&["top", "--command", "puppet*"], arguments].concat()))
    }

    fn of(mut command: Command) -> Top {
        let terminal = Terminal::sized(ROWS, COLUMNS);
        let child = terminal.spawn_apart(&mut command);
        let (rows, columns) = size(ROWS, COLUMNS);
        let screen = vt100::Parser::new(rows, columns, 0);
        let mut top = Top { terminal, child: Some(child), screen, shown: 0 };
        top.until("the table", |screen| screen.contains("COMMAND"));
        top
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.child.as_ref().expect("it runs")), signal).expect("kill");
    }

    fn look(&mut self) -> String {
        self.screen.process(&self.terminal.said.as_bytes()[self.shown..]);
        self.shown = self.terminal.said.len();
        self.screen.screen().contents()
    }

    /// Waits until the screen is as it should be.
    #[track_caller]
    fn until(&mut self, what: &str, is_so: impl Fn(&str) -> bool) -> String {
        let begun = Instant::now();
        loop {
            let screen = self.look();
            if is_so(&screen) {
                return screen;
            }
            let left = PATIENCE.checked_sub(begun.elapsed()).unwrap_or_else(|| panic!("no {what} on it:\n{screen}"));
            self.terminal.more(left);
        }
    }

    #[track_caller]
    fn until_it_says(&mut self, text: &str) -> String {
        self.until(text, |screen| screen.contains(text))
    }

    /// Selects the row of a port, by the filter.
    #[track_caller]
    fn select(&mut self, port: u16) {
        // Whatever the filter was.
        self.terminal.type_keys(&format!("/\x15{port}\r"));
        let filter = format!("/{port}  (Esc clears)");
        self.until("the one row", |screen| screen.contains(&filter) && row(screen, port).is_some());
    }

    /// Waits for the end; the terminal is as it was before.
    #[track_caller]
    fn expect_end(&mut self) {
        let code = self.terminal.end(self.child.take().expect("it runs"));
        let text = self.look();
        assert_eq!(code, Some(0), "{text}");
        let screen = self.screen.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor(), "the screen is not given back");
        assert!(self.terminal.is_cooked(), "the keys are not given back");
        assert!(!text.contains("panicked"), "{text}");
    }

    #[track_caller]
    fn quit(&mut self) {
        self.terminal.type_keys("q");
        self.expect_end();
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn size(rows: u16, columns: u16) -> (NonZeroU16, NonZeroU16) {
    (NonZeroU16::new(rows).expect("rows"), NonZeroU16::new(columns).expect("columns"))
}

/// The row of a port: its words.
fn row(screen: &str, port: u16) -> Option<Vec<String>> {
    let words = screen.lines().map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    words.into_iter().find(|words| words.get(2) == Some(&port.to_string()))
}

fn a_server_comes_and_goes(probe: &'static str) {
    let mut top = Top::start(&["--probe", probe]);
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.serve();
    let screen = top.until("the row", |screen| row(screen, sock.port()).is_some());
    let row_of = row(&screen, sock.port()).expect("a row");
    assert_eq!(row_of[..4], ["tcp", "127.0.0.1", &sock.port().to_string(), &puppet.pid.to_string()], "{screen}");
    assert_eq!(screen.contains("poll every 500 ms"), probe == "poll", "{screen}");
    puppet.close(sock.fd);
    top.until("end of the row", |screen| row(screen, sock.port()).is_none());
    top.quit();
}

/// Ends a server by key, through the agent or without one; whoever listens beside it lives on.
fn a_key_ends_exactly_one(stage: &Stage, top: &mut Top) {
    let (server, bystander) = (stage.puppet(), stage.puppet());
    let (sock, other) = (server.serve(), bystander.serve());
    top.select(sock.port());
    top.terminal.type_keys("x");
    let screen = top.until_it_says(YES);
    assert!(screen.contains(&format!("({})? {YES}", server.pid)), "{screen}");
    top.terminal.type_keys("n");
    top.until_it_says("nobody was signalled");
    top.terminal.type_keys("x");
    top.until_it_says(YES);
    top.terminal.type_keys("y");
    top.until_it_says(&format!("{}/tcp freed: terminated", sock.port()));
    assert_eq!(server.wait(), Some(nix::libc::SIGTERM));
    // One to clear the message, one the filter.
    top.terminal.type_keys("\x1b");
    top.until_it_says("(Esc clears)");
    top.terminal.type_keys("\x1b");
    top.until("the other row", |screen| row(screen, other.port()).is_some());
    assert!(bystander.is_alive());
    top.quit();
}

/// A server that ignores SIGTERM, ended by `X`.
fn shift_is_sigkill() {
    let stage = Stage::new();
    let server = stage.puppet();
    server.ignore_term();
    let sock = server.serve();
    let mut top = Top::start(&[]);
    top.select(sock.port());
    top.terminal.type_keys("X");
    top.until_it_says("by SIGKILL? [y/N]");
    top.terminal.type_keys("y");
    top.until_it_says("freed: killed by force");
    assert_eq!(server.wait(), Some(nix::libc::SIGKILL));
    top.quit();
}

/// The screen stays live while a kill waits, and is not left by mistake.
fn it_lives_while_a_kill_waits() {
    let stage = Stage::new();
    let (server, other) = (stage.puppet(), stage.puppet());
    server.ignore_term();
    let sock = server.serve();
    let mut top = Top::start(&[]);
    top.select(sock.port());
    top.terminal.type_keys("x");
    top.until_it_says(YES);
    top.terminal.type_keys("y");
    top.until_it_says("still alive, ");
    top.terminal.type_keys("q");
    top.until_it_says("still being freed");
    top.terminal.type_keys("/\x15\r");
    let late = other.serve();
    top.until("the new row", |screen| row(screen, late.port()).is_some());
    top.until_it_says("freed: killed by force");
    server.wait();
    top.quit();
}

fn details() {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.serve();
    let worker = puppet.fork();
    let mut top = Top::start(&[]);
    top.select(sock.port());
    top.terminal.type_keys("\r");
    let screen = top.until_it_says("cwd ");
    let expected = [format!("── tcp 127.0.0.1:{}", sock.port()), format!("({}) binder", puppet.pid)];
    assert!(expected.iter().all(|text| screen.contains(text)), "{screen}");
    // What changes meanwhile is shown.
    let pid = worker.pid;
    top.terminal.type_keys("G");
    top.until_it_says(&format!("({pid}) holder"));
    worker.exit();
    top.until("end of the holder", |screen| !screen.contains(&format!("({pid}) holder")));
    top.terminal.type_keys("\x1b");
    top.until_it_says("(Esc clears)");
    top.quit();
}

fn it_gives_the_terminal_back() {
    for keys in ["q", "\x03", "\x1b", "/x\x03", "?\x03"] {
        let mut top = Top::start(&[]);
        top.terminal.type_keys(keys);
        top.expect_end();
    }
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let mut top = Top::start(&[]);
        top.signal(signal);
        top.expect_end();
    }
    Top::start(&["--for", "10ms"]).expect_end();
}

fn it_ends_with_its_terminal() {
    let mut top = Top::start(&[]);
    let mut child = top.child.take().expect("it runs");
    drop(top);
    assert!(wait_readable(pidfd(&child)), "it outlives its terminal");
    child.wait().expect("wait");
}

fn without_a_terminal() {
    let run = portwatch(&["top"]).expect(2);
    assert!(run.errors().contains("portwatch list") && run.errors().contains("portwatch watch"), "{}", run.errors());
    assert_eq!(run.text(), "");
    let terminal = Terminal::new(COLUMNS);
    // Keys from a pipe, or a screen that is a file.
    for is_input in [true, false] {
        let mut command = command(&["top"]);
        if is_input {
            command.stdin(terminal.stdio())
        } else {
            command.stdout(terminal.stdio())
        };
        finish(command.spawn().expect("portwatch")).expect(2);
    }
}

fn a_hostile_name() {
    let stage = Stage::new();
    let (_puppet, sock) = hostile_server(&stage);
    let mut top = Top::of(command(&["top", &sock.port().to_string()]));
    let screen = top.until("the row", |screen| row(screen, sock.port()).is_some());
    assert!(screen.contains(r"\x1b[2J\nfake"), "{screen}");
    top.terminal.type_keys("\r");
    top.until_it_says("binder");
    top.terminal.type_keys("G");
    top.until_it_says("ancestors");
    top.terminal.type_keys("x");
    top.until_it_says(YES);
    top.terminal.type_keys("n");
    top.until_it_says("nobody was signalled");
    top.quit();
    let said = &top.terminal.said;
    let hazards = ["\x1b[2J\n", "\x1b]", "\x07", "\x08", "\x7f", "\u{9b}", "\u{85}", "\u{202e}", "\u{2028}"];
    for hazard in hazards {
        assert!(!said.contains(hazard), "{hazard:?} in {said:?}");
    }
}

fn another_size() {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let sock = puppet.serve();
    let mut top = Top::start(&[]);
    for (rows, columns) in [(8, 40), (3, 20), (40, 200)] {
        top.look();
        // What was there before is not to be taken for the answer.
        top.screen.process(b"\x1b[2J");
        let size = size(rows, columns);
        top.screen.screen_mut().set_size(size.0, size.1);
        top.terminal.resize(rows, columns);
        top.signal(Signal::WINCH);
        top.until("the table", |screen| screen.contains("PROTO"));
    }
    top.until("the row", |screen| row(screen, sock.port()).is_some());
    // A key that comes with the new size is heard.
    top.terminal.type_keys("?");
    top.until_it_says("── keys");
    top.terminal.type_keys("q");
    top.until_it_says("q quit");
    top.quit();
}

fn of_an_ordinary_user() {
    let Some(scene) = Scene::new() else { return };
    let ((own, of_own), (root, of_root)) = (&scene.own, &scene.root);
    let ports = format!("{},{}", of_own.port(), of_root.port());
    let mut top = Top::of(scene.command(&["top", &ports]));
    let screen = top.until("both rows", |screen| row(screen, of_own.port()).is_some());
    assert!(screen.contains("poll every 500 ms") && screen.contains("held by uid 0"), "{screen}");
    top.select(of_root.port());
    top.terminal.type_keys("x");
    let screen = top.until_it_says("── not free");
    assert!(screen.contains(&format!("{}/tcp refused", of_root.port())), "{screen}");
    assert!(root.is_alive());
    top.terminal.type_keys("q");
    top.until_it_says("(Esc clears)");
    top.select(of_own.port());
    top.terminal.type_keys("x");
    top.until_it_says(YES);
    top.terminal.type_keys("y");
    top.until_it_says("freed: terminated");
    own.wait();
    top.quit();
}

fn when_the_agent_ends() {
    let stage = Stage::new();
    let agent = Agent::start(&stage);
    let socket = agent.socket().to_string_lossy().into_owned();
    let mut top = Top::start(&["--socket", &socket]);
    top.until_it_says("by port  agent");
    agent.signal(Signal::TERM);
    top.until_it_says("going on with probes of our own");
    let puppet = stage.puppet();
    let sock = puppet.serve();
    top.until("the row", |screen| row(screen, sock.port()).is_some());
    top.quit();
}

pub fn trials() -> Vec<Test> {
    let mut tests =
        test_each_probe("top::a_server_is_there_when_it_listens_and_gone_when_it_closes", a_server_comes_and_goes);
    tests.extend([
        test("top::a_key_ends_exactly_the_selected_one", || {
            a_key_ends_exactly_one(&Stage::new(), &mut Top::start(&[]));
        }),
        test("top::a_key_ends_exactly_the_selected_one_through_the_agent", || {
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let socket = agent.socket().to_string_lossy().into_owned();
            a_key_ends_exactly_one(&stage, &mut Top::start(&["--socket", &socket, "--agent"]));
        }),
        test("top::shift_is_sigkill_at_once", shift_is_sigkill),
        test("top::the_screen_lives_while_a_kill_waits", it_lives_while_a_kill_waits),
        test("top::details_are_what_who_says_and_follow", details),
        test("top::the_terminal_is_given_back_however_it_ends", it_gives_the_terminal_back),
        test("top::it_ends_when_its_terminal_is_gone", it_ends_with_its_terminal),
        test("top::without_a_terminal_it_says_what_to_use", without_a_terminal),
        test("top::a_hostile_name_does_not_draw", a_hostile_name),
        test("top::a_screen_may_have_another_size_at_any_time", another_size),
        test("top::an_ordinary_user_ends_their_own_and_is_told_about_others", of_an_ordinary_user),
        test("top::it_goes_on_when_the_agent_ends", when_the_agent_ends),
    ]);
    tests
}
