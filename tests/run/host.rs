//! A program that embeds the library and supervises commands: what it is told, and what is left of that in it. The test
//! plays it as [`super::actor`], which has one thread.

use std::fs;
use std::io::{self, BufRead as _, BufReader};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::libc;
use portwatch::run::{Order, Start, Supervised, supervise};
use portwatch::source::stat;

use super::scene::{Scene, children, kill};
use crate::puppet::sys;
use crate::{Test, test};

pub fn play(scene: &str) {
    // It has a child, which is nobody else's affair.
    let first = child();
    let before = traces();
    match scene {
        "whole" => {
            let over = supervise(&order("setsid sleep 60 & exit 7")).expect("supervised");
            println!("{:?}, {} left behind", over.status, over.leftovers);
        }
        "refused" => {
            let order = Order { program: "/nonexistent/x".into(), ..order("") };
            println!("{:#}", supervise(&order).expect_err("nothing to run"));
        }
        "killed" => killed(),
        "late" => late(),
        _ => panic!("no such scene: {scene}"),
    }
    println!("{}", if traces() == before { "as before".to_owned() } else { format!("{before} now {}", traces()) });
    end(first);
}

/// Somebody kills the watcher, when the host has another child.
fn killed() {
    let (read, write) = io::pipe().expect("a pipe");
    let flags = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty());
    nix::fcntl::fcntl(&write, flags).expect("fcntl");
    let script = format!("setsid sleep 60 & echo $! >&{}; wait", write.as_raw_fd());
    let supervised = Supervised::prepare(&order(&script)).expect("a supervisor");
    supervised.start(Start::default()).expect("supervised").expect("a command");
    let second = child();
    let mut left = String::new();
    BufReader::new(read).read_line(&mut left).expect("a PID");
    kill(supervised.watcher().pid);
    let over = run(supervised.over()).expect("over");
    // The command itself may be counted, while the kernel kills it.
    println!("{:?}, code {}, some left behind: {}", over.cause, over.code(), over.leftovers > 0);
    println!("it is {}", if stat::read(left.trim().parse().expect("a PID")).is_ok() { "there" } else { "gone" });
    end(second);
}

/// It is let go when the command has ended.
fn late() {
    let order = Order { background: true, ..order("exit 3") };
    let supervised = Supervised::prepare(&order).expect("a supervisor");
    let process = supervised.start(Start::default()).expect("supervised").expect("a command");
    while !stat::has_ended(process) {
        std::thread::yield_now();
    }
    println!("goes on: {}", run(supervised.detach()).expect("an answer"));
    println!("{:?}", run(supervised.over()).expect("over").status);
}

fn order(script: &str) -> Order {
    Order {
        program: "sh".into(),
        arguments: vec!["-c".into(), script.into()],
        grace: Duration::from_secs(5),
        lifetime: None,
        background: false,
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

/// What a host could find changed: its children, the signals that it blocks, ignores and handles, whether orphans come to it.
fn traces() -> String {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let masks = ["SigBlk", "SigIgn", "SigCgt"];
    let signals: Vec<&str> = status.lines().filter(|line| masks.iter().any(|mask| line.starts_with(mask))).collect();
    let subreaper = rustix::process::child_subreaper().expect("prctl").is_some();
    format!("children {:?}, signals {signals:?}, subreaper {subreaper}", children())
}

fn child() -> libc::pid_t {
    // SAFETY: one thread, so the child may do anything.
    match sys::check(unsafe { libc::fork() }).expect("fork") {
        0 => loop {
            // SAFETY: takes nothing.
            unsafe { libc::pause() };
        },
        pid => pid,
    }
}

/// Ends a child that is alive, and reaps it.
fn end(pid: libc::pid_t) {
    let mut status = 0;
    // SAFETY: the status is a place for an integer.
    let ended = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
    assert_eq!(ended, 0, "a child of the host was hit: {status}");
    kill(pid as u32);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
}

fn a_host_is_left_as_it_was() {
    let scene = Scene::new();
    for (name, want) in [
        ("whole", "Some(Exited(7)), 1 left behind\n"),
        ("refused", "cannot run /nonexistent/x: No such file or directory (os error 2)\n"),
        ("killed", "Abandoned, code 137, some left behind: true\nit is gone\n"),
        ("late", "goes on: false\nSome(Exited(3))\n"),
    ] {
        let run = scene.act(&[&format!("host={name}")]).expect(0);
        assert_eq!((run.text(), run.errors()), (format!("{want}as before\n"), String::new()), "{name}");
    }
}

pub fn trials() -> Vec<Test> {
    vec![test("run::a_program_that_embeds_it_is_left_as_it_was", a_host_is_left_as_it_was)]
}
