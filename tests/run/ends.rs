//! However a run ends, nothing is left: random families of processes, random ends.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::actor::Dice;
use super::scene::{Running, Scene, kill};
use crate::subject::Run;
use crate::{Test, test};

/// How many ends there are to be; without, as many as fit in [`TIME`].
const COUNT_VARIABLE: &str = "PORTWATCH_TEST_ENDS";
const TIME: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug)]
enum End {
    /// The command exits.
    Exit,
    /// SIGTERM to portwatch.
    Term,
    /// SIGKILL to portwatch.
    Kill,
    /// SIGKILL to the supervisor.
    KillWatcher,
    /// SIGKILL to its parent.
    KillKeeper,
    /// SIGKILL to the process group of portwatch and the command.
    KillGroup,
    Lifetime,
}

const ENDS: [End; 7] =
    [End::Exit, End::Term, End::Kill, End::KillWatcher, End::KillKeeper, End::KillGroup, End::Lifetime];

fn randomized_ends() {
    let count: Option<usize> = std::env::var(COUNT_VARIABLE).ok().map(|count| count.parse().expect(COUNT_VARIABLE));
    let begun = Instant::now();
    let mut seed = u64::from(std::process::id());
    let mut done = 0;
    let mut processes = 0;
    // Scenes are dear: a copy of two programs.
    let scenes: Vec<Scene> = Scene::users().into_iter().map(Scene::of).collect();
    while count.map_or(begun.elapsed() < TIME, |count| done < count) {
        seed += 1;
        let end = ENDS[done % ENDS.len()];
        let scene = &scenes[done / ENDS.len() % scenes.len()];
        processes += one_end(scene, end, seed);
        done += 1;
    }
    eprintln!("{done} ends of {processes} processes in {:?}", begun.elapsed());
}

/// How many processes there were.
fn one_end(scene: &Scene, end: End, seed: u64) -> usize {
    let context = format!("{end:?} with seed {seed}");
    let mut dice = Dice(seed * 2 + 1);
    let notes = scene.stage.path(&format!("notes-{seed}"));
    fs::write(&notes, "").expect("notes");
    fs::set_permissions(&notes, std::os::unix::fs::PermissionsExt::from_mode(0o666)).expect("chmod");
    let port = scene.port();
    let port_word = port.to_string();
    let mut arguments = vec!["--port", &port_word, "--grace", ["0", "50ms", "200ms"][dice.below(3) as usize]];
    let lifetime = format!("{}ms", 100 + dice.below(600));
    if matches!(end, End::Lifetime) {
        arguments.extend(["--lifetime", &lifetime]);
    }
    let grow = format!("grow={}:{}", seed % 1_000_000, notes.display());
    // Sometimes somebody below holds the port.
    let mut words = match dice.below(3) {
        0 => vec!["exit-on-usr1=5", &grow, "child=daemon+serve+ignore-term+wait"],
        1 => vec!["ignore-term", "exit-on-usr1=5", "serve", &grow],
        _ => vec!["exit-on-usr1=5", &grow, "serve"],
    };
    words.push("wait");
    let begun;
    let run = if matches!(end, End::Lifetime) {
        begun = Instant::now();
        // In the midst of anything.
        scene.run(&arguments, &words).expect(124)
    } else {
        let running = scene.start(&arguments, &words);
        begun = Instant::now();
        let (code, run) = bring_about(end, running);
        if code.is_some() {
            assert_eq!(run.code, code, "{context}: {}", run.errors());
        }
        run
    };
    assert!(!run.errors().contains("panicked"), "{context}: {}", run.errors());
    scene.expect_nothing_left(port);
    assert!(begun.elapsed() < Duration::from_secs(8), "{context} took {:?}", begun.elapsed());
    let noted = fs::read_to_string(&notes).expect("notes");
    for line in noted.lines() {
        let (pid, start) = line.split_once(' ').expect("PID START");
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let now = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(19));
        assert_ne!(now, Some(start), "{context}: {pid} is still there");
    }
    noted.lines().count()
}

/// Its exit code, where that says something, and what came of it.
fn bring_about(end: End, running: Running) -> (Option<i32>, Run) {
    let code = match end {
        End::Exit => {
            running.signal(Signal::USR1);
            Some(5)
        }
        End::Term => {
            running.signal(Signal::TERM);
            None
        }
        End::Kill => {
            running.signal(Signal::KILL);
            None
        }
        End::KillWatcher => {
            kill(running.watcher());
            Some(137)
        }
        End::KillKeeper => {
            kill(running.keeper());
            None
        }
        End::KillGroup => {
            let group = Pid::from_raw(running.child.id() as i32).expect("a pid");
            kill_process_group(group, Signal::KILL).expect("kill");
            None
        }
        End::Lifetime => Some(124),
    };
    (code, running.finish())
}

pub fn trials() -> Vec<Test> {
    vec![test("run::nothing_is_left_however_it_ends", randomized_ends)]
}
