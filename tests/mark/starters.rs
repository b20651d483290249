//! What would start a leak again goes with it where it came with the job, and nobody else does.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::stat::Mode;
use portwatch::source::stat;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::{Leaks, SERVER, USER, Yard, chown, program};
use crate::subject::finish;
use crate::terminal::Terminal;
use crate::{Test, test};

/// Each starts a server again when that has ended: after long, at once, and with a trap that waits for the server. The last
/// one is called as what manages services.
const JOB: &str = r#"
setsid sh -c 'while true; do "$PYTHON" server.py slow; sleep 30; done' &
setsid sh -c 'while true; do "$PYTHON" server.py quick; sleep 0.05; done' &
setsid sh -c 'trap "exit 0" TERM; while true; do "$PYTHON" server.py trapped; done' &
setsid "$PYTHON" supervisord managed &
"#;

const LOOP: &str = r#"while true; do "$PYTHON" server.py again; sleep 0.05; done"#;

/// Runs a server again and again, as a program that is no shell.
const PROGRAM: &str = r#"
import subprocess, sys, time
while True:
    subprocess.call([sys.executable, "server.py", sys.argv[1]])
    time.sleep(30)
"#;

struct Scene {
    yard: Yard,
    told: File,
    python: PathBuf,
    leaks: Leaks,
}

impl Scene {
    #[track_caller]
    fn new(uid: u32, with_agent: bool) -> Option<Scene> {
        let python = program("python3")?;
        let yard = Yard::new(uid, with_agent)?;
        for name in ["server.py", "supervisord"] {
            fs::write(yard.home(name), SERVER).expect("a script");
        }
        fs::write(yard.home("program.py"), PROGRAM).expect("a script");
        nix::unistd::mkfifo(&yard.home("told"), Mode::from_bits_truncate(0o666)).expect("a fifo");
        chown(yard.home("told"), Some(uid), Some(uid)).expect("chown");
        let told = File::options().read(true).write(true).open(yard.home("told")).expect("a fifo");
        Some(Scene { yard, told, python, leaks: Leaks::default() })
    }

    /// A shell of the job.
    fn shell(&self, script: &str) -> Command {
        let mut shell = self.yard.command("/bin/sh");
        shell.args(["-c", script]).env("PYTHON", &self.python);
        // Else the leaks would keep pipes open.
        shell.stdout(Stdio::null()).stderr(Stdio::null());
        shell
    }

    /// The parent of the server of this kind, which is ended with the leaks.
    fn parent(&mut self, kind: &str) -> u32 {
        let server = self.leaks.0[kind].0;
        let parent = stat::read(server).expect("a server").ppid;
        self.leaks.0.insert(format!("what starts {kind}"), (parent, Some(hold(parent))));
        parent
    }
}

fn hold(pid: u32) -> OwnedFd {
    pidfd_open(Pid::from_raw(pid as i32).expect("a pid"), PidfdFlags::empty()).expect("pidfd_open")
}

/// A child of ours that is to outlive a clean-up, and no longer; with what is in its process group.
struct Bystander(Child);

impl Bystander {
    fn start(command: &mut Command) -> Bystander {
        Bystander(command.process_group(0).spawn().expect("a bystander"))
    }

    fn is_alive(&mut self) -> bool {
        self.0.try_wait().expect("wait").is_none()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let group = Pid::from_child(&self.0);
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
        let _ = self.0.wait();
    }
}

/// Loops and a supervisor of the job are gone with their servers; a loop from before is not, nor is its server.
fn of_the_job(uid: u32, with_agent: bool) {
    let Some(mut scene) = Scene::new(uid, with_agent) else { return };
    let mut before = Bystander::start(&mut scene.shell(LOOP));
    scene.leaks.hear(&scene.told, 1);
    scene.yard.portwatch(&["mark", "--name", "job"]).expect(0);
    assert_eq!(finish(scene.shell(JOB).spawn().expect("a shell")).code, Some(0));
    scene.leaks.hear(&scene.told, 5);
    let starters = BTreeSet::from(["slow", "quick", "trapped"].map(|kind| scene.parent(kind)));

    let run = scene.yard.portwatch(&["kill", "--since", "job", "--dry-run"]).expect(0);
    let above = format!("(above {})", scene.leaks.0["slow"].0);
    assert!(run.text().contains(&above), "{}", run.text());
    let run = scene.yard.portwatch(&["kill", "--since", "job", "--yes", "--report", "leaks.json"]).expect(0);
    let text = run.text();
    assert!(text.ends_with("4 listeners were left behind since job: none is there any more\n"), "{text}");
    for pid in &starters {
        assert!(text.contains(&format!("\nsh ({pid}) terminated, for ")), "{text}");
    }
    let report: Value =
        serde_json::from_slice(&fs::read(scene.yard.home("leaks.json")).expect("a report")).expect("JSON");
    let rows = report["starters"].as_array().expect("starters");
    let pids: BTreeSet<u32> = rows.iter().map(|row| row["pid"].as_u64().expect("a pid") as u32).collect();
    assert_eq!(pids, starters, "{report}");
    for row in rows {
        assert_eq!((&row["ended"], &row["name"]), (&"terminated".into(), &"sh".into()), "{row}");
        assert_eq!(row["ports"].as_array().map(Vec::len), Some(1), "{row}");
    }
    // A shell with a trap waits for its server, which is not made to wait for the shell until both are killed.
    let leaks = report["leaks"].as_array().expect("leaks");
    assert!(leaks.iter().all(|row| row["ended"] == "terminated"), "{report}");

    let (server, pidfd) = scene.leaks.0.remove("again").expect("the server from before");
    assert!(scene.leaks.are_gone());
    assert!(before.is_alive() && !stat::has_ended(stat::read(server).expect("it lives").id()));
    let run = scene.yard.portwatch(&["kill", "--since", "job", "--yes", "--fail-on-leak"]).expect(0);
    assert_eq!(run.text(), "nothing was left behind since job\n");
    scene.leaks.0.insert("again".to_owned(), (server, pidfd));
    drop(before);
}

/// A loop from before the mark is never hit, also where it starts servers anew: it is named. Neither is any by a moment.
fn from_before() {
    let Some(mut scene) = Scene::new(USER, false) else { return };
    let mut before = Bystander::start(&mut scene.shell(LOOP));
    scene.leaks.hear(&scene.told, 1);
    scene.yard.mark();
    let (first, first_pidfd) = scene.leaks.0.remove("again").expect("a server");
    pidfd_send_signal(first_pidfd.expect("a pidfd"), Signal::KILL).expect("kill");
    scene.leaks.hear(&scene.told, 1);
    assert_ne!(scene.leaks.0["again"].0, first);
    for since in ["before.json", "1h"] {
        let run = scene.yard.portwatch(&["kill", "--since", since, "--yes"]).expect(1);
        let (text, pid) = (run.text(), before.0.id());
        let named =
            format!("more and more appear: end what starts them, sh ({pid}), a shell that may start it again: ");
        assert!(text.contains(&named) && text.contains(&format!("; end it with: kill {pid}")), "{text}");
        assert!(before.is_alive());
    }
}

/// Where somebody may sit before it, it is named and left alone; and what a shell started that is typed into is a leak as
/// any other.
fn on_a_terminal() {
    let Some(mut scene) = Scene::new(USER, false) else { return };
    scene.yard.mark();
    let terminal = Terminal::new(80);
    let mut program = scene.yard.command(&scene.python);
    program.args(["program.py", "seen"]);
    let mut program = Bystander(terminal.lead(&mut program));
    scene.leaks.hear(&scene.told, 1);
    let run = scene.yard.portwatch(&["kill", "--since", "before.json", "--yes", "--report", "leaks.json"]).expect(1);
    let (text, pid) = (run.text(), program.0.id());
    let line =
        format!("python3 ({pid}) is still there (somebody may sit at its terminal; end it with: kill {pid}), and ");
    assert!(text.contains(&line), "{text}");
    let end = format!(", and ended; it may start again, for python3 ({pid}) is there still: kill {pid}\n");
    assert!(text.ends_with(&end) && scene.leaks.are_gone() && program.is_alive(), "{text}");
    let report: Value =
        serde_json::from_slice(&fs::read(scene.yard.home("leaks.json")).expect("a report")).expect("JSON");
    assert_eq!((&report["clean"], &report["starters"][0]["ended"]), (&false.into(), &"alive".into()), "{report}");
    drop(program);

    let mut terminal = Terminal::new(80);
    let mut shell = scene.yard.command("/bin/sh");
    let mut shell = Bystander(terminal.lead(shell.env("PYTHON", &scene.python)));
    terminal.type_keys("\"$PYTHON\" server.py typed\n");
    scene.leaks.0.clear();
    scene.leaks.hear(&scene.told, 1);
    let run = scene.yard.portwatch(&["kill", "--since", "before.json", "--yes"]).expect(0);
    assert!(run.text().ends_with(": none is there any more\n"), "{}", run.text());
    assert!(scene.leaks.are_gone() && shell.is_alive());
}

pub fn trials() -> Vec<Test> {
    vec![
        test("mark::what_a_job_left_to_restart_its_servers_goes_with_them", || of_the_job(USER, false)),
        test("mark::what_a_job_left_to_restart_its_servers_goes_with_them [root, agent]", || of_the_job(0, true)),
        test("mark::what_restarts_servers_since_before_the_mark_is_named_and_spared", from_before),
        test("mark::what_may_have_somebody_before_it_is_named_and_spared", on_a_terminal),
    ]
}
