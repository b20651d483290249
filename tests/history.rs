//! The history, from the kernel's events to what the verb prints; and a store on a disk that is full, cannot be written,
//! or whose writer is killed.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use nix::mount::{MsFlags, mount};
use portwatch::history::{Health, Reader, Recorder, Retention, State};
use portwatch::model::{Attempt, Change, Holder, Listener, Process, ProcessId, Protocol, Socket, SocketId};
use portwatch::render::Clock;
use portwatch::select::{Filters, Selector};
use portwatch::source::Probe;
use portwatch::tracker::Tracker;
use serde_json::{Value, json};

use crate::puppet::{PATIENCE, Stage};
use crate::subject::{Run, binary, command, finish, plain_command, portwatch, skip};
use crate::{Test, test};

/// Names the database that this program is to write to until it is killed.
pub const WRITER_VARIABLE: &str = "PORTWATCH_TEST_WRITER";

const NOBODY: u32 = 65534;

fn clock() -> Clock {
    let boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME");
    let now_boot_ns = u64::try_from(Duration::from(boot).as_nanos()).expect("584 years");
    Clock { now_boot_ns, now_wall: Timestamp::now(), tz: TimeZone::UTC }
}

/// What an agent does of it: events go into a table, and from there into a store.
struct Agent {
    runtime: tokio::runtime::Runtime,
    tracker: Tracker,
    recorder: Recorder,
}

impl Agent {
    fn start(stage: &Stage) -> Agent {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let recorder = Recorder::open(&stage.path("history.db"), Retention::default(), &clock());
        let tracker = runtime.block_on(async { Tracker::open(Probe::Auto, None) }).expect("a tracker");
        let mut agent = Agent { runtime, tracker, recorder };
        assert!(agent.recorder.needs_snapshot());
        agent.recorder.snapshot(agent.tracker.table().listeners(), &clock());
        agent
    }

    /// Follows what happens until `is` happens.
    fn until(&mut self, is: impl Fn(&Change) -> bool) {
        let follow = async {
            loop {
                let changes = self.tracker.next().await.expect("changes");
                for change in &changes {
                    self.recorder.change(change, &clock());
                }
                if changes.iter().any(&is) {
                    return;
                }
            }
        };
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, follow).await.expect("it does not happen") });
    }

    fn until_open(&mut self, address: SocketAddr) {
        self.until(|change| matches!(change, Change::Opened { listener, .. } if listener.socket.endpoint() == address));
    }

    fn until_closed(&mut self, address: SocketAddr) {
        self.until(|change| matches!(change, Change::Closed { listener, .. } if listener.socket.endpoint() == address));
    }
}

fn history(state: &Path, arguments: &[&str]) -> Run {
    let mut command = command(&[&["history"], arguments].concat());
    finish(command.env("PORTWATCH_STATE", state).env("TZ", "UTC").spawn().expect("portwatch"))
}

/// As [`history`], as an ordinary user; `None`, loudly, where we are one ourselves.
fn history_as_nobody(stage: &Stage, state: &Path) -> Option<Run> {
    if !rustix::process::geteuid().is_root() {
        skip("root", "only root can become somebody else");
        return None;
    }
    let copy = stage.path("portwatch");
    if !copy.exists() {
        fs::copy(binary(), &copy).expect("copying the binary");
    }
    chmod(&copy, 0o755);
    let mut command = plain_command(copy, &["history", "--json", "--netns", "all"]);
    command.uid(NOBODY).gid(NOBODY).current_dir("/").env("PORTWATCH_STATE", state);
    Some(finish(command.spawn().expect("portwatch as an ordinary user")))
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// A listener that nobody ever opened, for tests of the store alone.
fn invented(n: u64, name: &str) -> Listener {
    let process = Process {
        uid: Some(0),
        command: [name.to_owned(), "x".repeat(200)].into(),
        ..Process::bare(ProcessId { pid: 1 << 22, start: 1 }, name)
    };
    let socket = Socket {
        id: SocketId { inode: n, cookie: n },
        proto: Protocol::Tcp,
        mptcp: false,
        address: "127.0.0.1".parse().expect("an address"),
        port: 8000,
        v6only: None,
        netns: 1,
        uid: 0,
        backlog: None,
    };
    let holder = Holder { process: Arc::new(process), fds: Vec::new(), binder: true };
    Listener { socket, since: Some(clock().now_boot_ns), holders: vec![holder] }
}

fn tell_opened(recorder: &mut Recorder, n: u64) {
    let listener = invented(n, "server");
    let clock = clock();
    recorder.change(&Change::Opened { at: clock.now_boot_ns, listener }, &clock);
}

fn tell(recorder: &mut Recorder, n: u64) -> Health {
    tell_opened(recorder, n);
    recorder.flush();
    recorder.health()
}

fn lives(path: &Path) -> usize {
    let all = Selector::new(Vec::new(), Filters::default());
    let reader = Reader::open(path, &clock()).expect("a reader");
    reader.lives(&all, 0, 0, usize::MAX).expect("lives").lives.len()
}

/// Writes without end, and says after each flush how many lives are stored.
pub fn write_until_killed(path: &Path) -> ! {
    let mut recorder = Recorder::open(path, Retention::default(), &clock());
    let mut n = u64::from(std::process::id()) << 32;
    loop {
        for _ in 0..2000 {
            n += 1;
            tell_opened(&mut recorder, n);
        }
        recorder.flush();
        let health = recorder.health();
        assert!(health.is_ok(), "{health:?}");
        println!("{}", health.lives);
    }
}

/// Voluntary context switches of the thread that writes: once it sleeps, and there is but one.
fn switches_of_writer() -> u64 {
    let is_writer = |thread: &PathBuf| fs::read_to_string(thread.join("comm")).is_ok_and(|name| name == "history\n");
    loop {
        let threads = fs::read_dir("/proc/self/task").expect("threads").map(|thread| thread.expect("a thread").path());
        // Those of other tests may not have ended yet.
        if let [writer] = &threads.filter(is_writer).collect::<Vec<_>>()[..] {
            let status = fs::read_to_string(writer.join("status")).expect("status");
            if status.lines().any(|line| line.starts_with("State:\tS")) {
                let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:\t"));
                return count.expect("a count").parse().expect("a number");
            }
        }
        thread::yield_now();
    }
}

/// Runs where a small file system of its own is mounted at `directory`; nobody else sees it. Skips where that cannot be.
pub fn on_a_small_disk(directory: &Path, run: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        return skip("root", "only root can mount");
    }
    let directory = directory.to_owned();
    // A namespace belongs to a thread, and to those that it starts.
    let thread = thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
        mount(none, &directory, Some("tmpfs"), MsFlags::empty(), Some("size=2m")).expect("a tmpfs");
        run();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub fn remount(directory: &Path, flags: MsFlags) {
    mount(None::<&str>, directory, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>).expect("remount");
}

fn without_times(text: &str) -> String {
    let is_time = |word: &str| word.len() == 8 && word.chars().filter(|&c| c == ':').count() == 2;
    let words = text.split_whitespace().map(|word| if is_time(word) { "TIME" } else { word });
    words.collect::<Vec<_>>().join(" ")
}

pub fn trials() -> Vec<Test> {
    vec![
        test("history::who_had_a_port_and_how_it_ended_is_told_afterwards", || {
            let stage = Stage::new();
            let mut agent = Agent::start(&stage);
            let (first, second) = (stage.puppet(), stage.puppet());
            let sock = first.serve();
            agent.until_open(sock.address);
            first.close(sock.fd);
            agent.until_closed(sock.address);
            let again = second.tcp(&sock.address.to_string(), "reuseaddr");
            agent.until_open(again.address);
            let listed = finish(command(&["list", "--json", &sock.port().to_string()]).spawn().expect("portwatch"));
            let listed = listed.expect(0).json()[0]["holders"][0].clone();
            let pids = [first.pid, second.pid];
            second.exit();
            agent.until_closed(again.address);
            let there = first.tcp(&sock.address.to_string(), "reuseaddr");
            agent.until_open(there.address);
            agent.recorder.flush();
            assert!(agent.recorder.health().is_ok(), "{:?}", agent.recorder.health());

            let (state, port) = (stage.path(""), sock.port().to_string());
            let told = history(&state, &[&port, "--json", "--last", "1h"]).expect(0).json();
            let field =
                |name: &str| -> Vec<&Value> { told.as_array().expect("lives").iter().map(|l| &l[name]).collect() };
            assert_eq!(field("ended"), [&json!("closed"), &json!("exited"), &Value::Null], "{told}");
            assert_eq!(field("port"), [sock.port(); 3].map(|port| json!(port)).iter().collect::<Vec<_>>());
            let binders: Vec<_> = field("process").iter().map(|process| process["pid"].clone()).collect();
            assert_eq!(binders, [pids[0], pids[1], pids[0]].map(|pid| json!(pid)));
            assert_eq!(told[0]["closed_by"]["pid"], pids[0], "{told}");
            // The process is told as `list` told it while it was there.
            for (name, value) in told[1]["process"].as_object().expect("a process") {
                if name == "started" {
                    // A time since boot, told by wall clocks that were read at different moments: cut to milliseconds, the
                    // two may be neighbours.
                    let time =
                        |value: &Value| value.as_str().expect("a time").parse::<jiff::Timestamp>().expect("a time");
                    let apart = (time(value).as_millisecond() - time(&listed[name]).as_millisecond()).abs();
                    assert!(apart <= 1, "{name}: {told}");
                    continue;
                }
                assert_eq!(value, &listed[name], "{name}: {told}");
            }

            let run = history(&state, &[&port]).expect(0);
            let name = listed["name"].as_str().expect("a name");
            let user = listed["user"].as_str().expect("a user");
            let lines: Vec<String> = run.text().lines().map(without_times).collect();
            assert_eq!(lines.len(), 4, "{}", run.text());
            assert_eq!(lines[0], "OPENED LIVED ADDRESS PORT PID USER NAME ENDED COMMAND");
            for (line, (pid, ended)) in
                lines[1..].iter().zip([(pids[0], "closed"), (pids[1], "exited"), (pids[0], "open")])
            {
                let mut words = line.split(' ').collect::<Vec<_>>();
                words.remove(1);
                let pid = pid.to_string();
                let port = format!("{port}/tcp");
                assert_eq!(words, ["TIME", "127.0.0.1", &port, &pid, user, name, ended, "puppet"], "{}", run.text());
            }
            assert!(agent.recorder.stop(&clock(), PATIENCE));
            let told = history(&state, &[&port, "--json"]).expect(0).json();
            assert_eq!(told[2]["ended"], "agent_stopped", "{told}");
        }),
        test("history::without_a_store_the_next_step_is_told", || {
            let stage = Stage::new();
            let state = stage.path("nothing");
            let run = history(&state, &["8000"]).expect(1);
            let path = state.join("history.db");
            let want =
                format!("portwatch: there is no history at {}; start the agent: portwatch agent\n", path.display());
            assert_eq!((run.text(), run.errors()), (String::new(), want));
            for arguments in [&["99999"][..], &["--last", "yesterday"], &["--limit", "-1"], &["--frobnicate"]] {
                history(&state, arguments).expect(2);
            }
            fs::create_dir(&state).expect("mkdir");
            fs::write(&path, [0xff; 5000]).expect("a file");
            let run = history(&state, &["8000"]).expect(4);
            let want = "history.db: file is not a database; the agent sets a damaged file aside when it starts\n";
            assert!(run.errors().ends_with(want), "{}", run.errors());
        }),
        test("history::without_any_history_the_answer_is_no_and_an_empty_array", || {
            let stage = Stage::new();
            let run = history(&stage.path("none"), &["--json"]).expect(1);
            assert_eq!(run.json(), json!([]));
            assert!(run.errors().contains("there is no history at"), "{}", run.errors());
            let agent = crate::agent::Agent::start_with(&stage, &["--no-history"]);
            let run = agent.portwatch(&["history", "--json"]).expect(1);
            assert_eq!(run.json(), json!([]));
            assert_eq!(run.errors(), "portwatch: the agent keeps no history; start it without --no-history\n");
        }),
        test("history::an_empty_answer_is_success_and_a_cut_one_says_so", || {
            let stage = Stage::new();
            let mut recorder = Recorder::open(&stage.path("history.db"), Retention::default(), &clock());
            for n in 1..=5 {
                tell(&mut recorder, n);
            }
            let state = stage.path("");
            let run = history(&state, &["9", "--netns", "all", "--last", "1h"]).expect(0);
            assert_eq!(run.errors(), "portwatch: the history knows of nothing on 9 in the last 1h\n");
            assert_eq!(history(&state, &["9", "--json"]).expect(0).text(), "[]\n");
            let run = history(&state, &["--netns", "all", "--limit", "2"]).expect(0);
            assert_eq!(run.errors(), "portwatch: these are the latest 2; --limit 0 shows all\n");
            assert_eq!(run.text().lines().count(), 3, "{}", run.text());
            let run = history(&state, &["--netns", "all", "--limit", "0", "--command", "server"]).expect(0);
            assert_eq!((run.errors().as_str(), run.text().lines().count()), ("", 6));
        }),
        test("history::what_it_refuses_is_not_offered", || {
            let refused = ["--env", "--descendant-of", "--orphans"];
            let page = |words: &[&str]| portwatch(words).expect(0).text();
            for option in refused {
                assert!(page(&["list", "--help"]).contains(option), "{option}");
                for words in [&["history", "--help"][..], &["history", "-h"], &["help", "history"]] {
                    assert!(!page(words).contains(option), "{option} in {words:?}");
                }
            }
            assert!(page(&["history", "--help"]).contains("--older-than"));
            // Who tries it is told why it cannot be.
            for arguments in [&["--orphans"][..], &["--env", "JOB"], &["--descendant-of", "1"]] {
                let run = portwatch(&[&["history"], arguments].concat()).expect(2);
                assert!(run.errors().contains("ask processes that run; history knows --command,"), "{}", run.errors());
            }
        }),
        test("history::hostile_names_cannot_write_to_the_terminal", || {
            let stage = Stage::new();
            let mut recorder = Recorder::open(&stage.path("history.db"), Retention::default(), &clock());
            let clock = clock();
            let listener = invented(1, "a\u{1b}[2J\nb\u{202e}\0");
            let by = Arc::clone(&listener.holders[0].process);
            let at = clock.now_boot_ns;
            recorder.change(&Change::Opened { at, listener: listener.clone() }, &clock);
            let Socket { proto, address, port, netns, .. } = listener.socket;
            let attempt = Attempt { proto, address, port, netns, errno: 98, by: Arc::clone(&by) };
            recorder.change(&Change::Conflict { at, attempt, held_by: Some(listener.clone()) }, &clock);
            recorder.change(&Change::Closed { at, listener, by: Some(by) }, &clock);
            recorder.flush();
            for arguments in [&["--netns", "all"][..], &["--netns", "all", "--wide"], &["--netns", "all", "--json"]] {
                let text = history(&stage.path(""), arguments).expect(0).text();
                assert!(!text.contains(['\u{1b}', '\u{202e}', '\0']), "{text:?}");
                assert_eq!(text.lines().count(), 3, "{text}");
            }
        }),
        test("history::whoever_may_read_the_file_reads_it_with_and_without_a_writer", || {
            let stage = Stage::new();
            let state = stage.path("state");
            let path = state.join("history.db");
            let mut recorder = Recorder::open(&path, Retention::default(), &clock());
            assert!(tell(&mut recorder, 1).is_ok());
            let Some(run) = history_as_nobody(&stage, &state) else { return };
            let run = run.expect(3);
            assert!(run.errors().contains("is not yours to read; try sudo"), "{}", run.errors());
            chmod(&state, 0o755);
            for name in ["history.db", "history.db-wal", "history.db-shm"] {
                chmod(&state.join(name), 0o644);
            }
            let ended = || history_as_nobody(&stage, &state).expect("root").expect(0).json()[0]["ended"].clone();
            assert_eq!(ended(), Value::Null);
            assert!(recorder.stop(&clock(), PATIENCE));
            assert!(!state.join("history.db-wal").exists(), "the last to close it takes the log along");
            assert_eq!(ended(), "agent_stopped");
            // By default one's own namespace is meant, and the one invented is nobody's.
            assert_eq!(history(&state, &["--json"]).expect(0).json(), json!([]));
        }),
        test("history::an_idle_writer_never_wakes", || {
            let stage = Stage::new();
            let mut recorder = Recorder::open(&stage.path("history.db"), Retention::default(), &clock());
            assert!(tell(&mut recorder, 1).is_ok());
            let before = switches_of_writer();
            // Time must pass: that nothing happens in it is what is tested.
            thread::sleep(Duration::from_secs(3));
            assert_eq!(switches_of_writer(), before);
            assert!(tell(&mut recorder, 2).is_ok());
            assert_ne!(switches_of_writer(), before);
        }),
        test("history::a_writer_that_is_killed_in_the_midst_of_a_batch_leaves_a_whole_store", || {
            let stage = Stage::new();
            let path = stage.path("history.db");
            let mut stored = 0;
            for round in 1..=5 {
                let mut writer = Command::new("/proc/self/exe")
                    .env(WRITER_VARIABLE, &path)
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .spawn()
                    .expect("a writer");
                let mut lines = BufReader::new(writer.stdout.take().expect("its output")).lines();
                // At a different moment each time, and always in the midst of two thousand records.
                for _ in 0..round {
                    let line = lines.next().expect("a line").expect("a line");
                    stored = line.parse().expect("a number");
                }
                writer.kill().expect("SIGKILL");
                writer.wait().expect("wait");
                let found = lives(&path);
                assert!(found >= stored, "{found} of {stored} lives");
                let mut recorder = Recorder::open(&path, Retention::default(), &clock());
                recorder.snapshot([], &clock());
                let health = tell(&mut recorder, 1);
                assert!(health.is_ok() && health.note.is_none(), "{health:?}");
                assert!(recorder.stop(&clock(), PATIENCE));
                assert_eq!(lives(&path), found + 1);
            }
        }),
        test("history::a_full_disk_is_told_and_nothing_is_lost_once_there_is_room", || {
            let stage = Stage::new();
            let disk = stage.path("");
            let directory = disk.clone();
            on_a_small_disk(&directory, move || {
                let path = disk.join("history.db");
                let mut recorder = Recorder::open(&path, Retention::default(), &clock());
                assert!(tell(&mut recorder, 1).is_ok());
                let filler = disk.join("filler");
                let mut file = fs::File::create(&filler).expect("a file");
                for size in [64 << 10, 4096, 1] {
                    while file.write(&vec![0; size]).is_ok() {}
                }
                // As many as find room in the files as they are; then it is full.
                let mut n = 2;
                let health = loop {
                    let health = tell(&mut recorder, n);
                    if !health.is_ok() {
                        break health;
                    }
                    n += 1;
                };
                assert_eq!(health.state, State::DiskFull, "{health:?}");
                let reason = health.reason.expect("a reason");
                assert!(reason.ends_with("free some disk space"), "{reason}");
                for _ in 0..100 {
                    n += 1;
                    assert_eq!(tell(&mut recorder, n).state, State::DiskFull);
                }
                drop(file);
                fs::remove_file(&filler).expect("rm");
                n += 1;
                let health = tell(&mut recorder, n);
                assert!(health.is_ok() && health.dropped == 0 && health.reason.is_none(), "{health:?}");
                assert_eq!(lives(&path) as u64, n);
                assert!(recorder.stop(&clock(), PATIENCE));
            });
        }),
        test("history::a_file_system_that_cannot_be_written_is_told_and_still_read", || {
            let stage = Stage::new();
            let disk = stage.path("");
            let directory = disk.clone();
            on_a_small_disk(&directory, move || {
                let path = disk.join("history.db");
                let mut recorder = Recorder::open(&path, Retention::default(), &clock());
                assert!(tell(&mut recorder, 1).is_ok());
                assert!(recorder.stop(&clock(), PATIENCE));
                remount(&disk, MsFlags::MS_RDONLY);
                let mut recorder = Recorder::open(&path, Retention::default(), &clock());
                let health = tell(&mut recorder, 2);
                assert_eq!(health.state, State::ReadOnly, "{health:?}");
                let reason = health.reason.expect("a reason");
                assert!(reason.contains("Read-only file system") && reason.ends_with("make it writable"), "{reason}");
                assert_eq!(lives(&path), 1);
                remount(&disk, MsFlags::empty());
                let health = tell(&mut recorder, 3);
                assert!(health.is_ok() && health.dropped == 0, "{health:?}");
                assert_eq!(lives(&path), 3);
                assert!(recorder.stop(&clock(), PATIENCE));
            });
        }),
    ]
}
