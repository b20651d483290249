//! Directories of servers that are ended: they go, and nothing else does, whatever their owner does meanwhile.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio, exit};
use std::time::{Duration, Instant};

use nix::libc;
use portwatch::source::stat;
use portwatch::sweep::{Amount, Pin, Swept, directory_glob, remove};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_json::{Value, json};

use crate::puppet::{Puppet, Sock, Stage};
use crate::subject::{portwatch, skip};
use crate::{Test, test};

/// Names the place of the adversary that this program is to be.
pub const ADVERSARY_VARIABLE: &str = "PORTWATCH_TEST_ADVERSARY";

/// Nobody else on the host has it.
const USER: u32 = 60_123;

/// How long the adversary is fought where nobody says how often.
const FIGHT: Duration = Duration::from_secs(10);

/// The adversary's side: builds a directory when told, swaps everything in it and around it until told otherwise, and
/// tidies up. Does to the file system what it likes but for moving canaries.
pub fn play(place: &Path) -> ! {
    let mut lines = std::io::stdin().lines();
    let say = |word: &str| println!("{word}");
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    while let Some(Ok(line)) = lines.next() {
        match &*line {
            "build" => build(place),
            "play" => {
                say("playing");
                let stdin = std::io::stdin();
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                while poll(&mut [PollFd::new(&stdin, PollFlags::IN)], Some(&now)) == Ok(0) {
                    swap(place, &mut chance);
                }
                continue;
            }
            "tidy" => tidy(place),
            _ => exit(2),
        }
        say("done");
    }
    exit(0)
}

struct Chance(u64);

impl Chance {
    /// Xorshift: below `bound`.
    fn next(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 as usize % bound
    }
}

fn build(place: &Path) {
    let web = place.join("web_1");
    for directory in ["a/deep/er", "b", "c", "d"] {
        let directory = web.join(directory);
        fs::create_dir_all(&directory).expect("a directory");
        for n in 0..4 {
            fs::write(directory.join(format!("file{n}")), "x").expect("a file");
        }
    }
    fs::create_dir_all(place.join("moved")).expect("a directory");
    for (name, canary) in [("link", "outside"), ("link_root", "../root"), ("link_open", "../open")] {
        symlink(place.join(canary), place.join(name)).expect("a link");
    }
}

/// One trick; each may fail, for the ground moves under both.
fn swap(place: &Path, chance: &mut Chance) {
    let web = place.join("web_1");
    let link = place.join(["link", "link_root", "link_open"][chance.next(3)]);
    let inside = web.join(["a", "a/deep", "a/deep/er", "b", "c", "d"][chance.next(6)]);
    let moved = place.join("moved").join(chance.next(4).to_string());
    let exchange = |one: &Path, other: &Path| {
        let _ = renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE);
    };
    match chance.next(8) {
        0 => {
            exchange(&web, &link);
            exchange(&web, &link);
        }
        1 => {
            let _ = fs::rename(&web, &moved);
            let _ = fs::rename(&link, &web);
            let _ = fs::rename(&web, &link);
            let _ = fs::rename(&moved, &web);
        }
        2 => {
            exchange(&inside, &link);
            exchange(&inside, &link);
        }
        3 => {
            let _ = fs::rename(&inside, &moved);
            let _ = symlink(place.join("outside"), &inside);
            let _ = fs::remove_file(&inside);
            let _ = fs::rename(&moved, &inside);
        }
        4 => {
            let _ = fs::rename(&inside, &moved);
        }
        5 => {
            let _ = fs::create_dir(&inside);
            let _ = symlink(place.join("outside"), inside.join("away"));
            let _ = fs::hard_link(place.join("outside/canary"), inside.join("linked"));
        }
        6 => {
            let file = inside.join("file0");
            let _ = fs::remove_file(&file);
            let _ = symlink(place.join("outside/canary"), &file);
        }
        _ => {
            let _ = fs::create_dir(&web);
            let _ = fs::write(web.join("new"), "x");
        }
    }
}

/// Everything but the canaries. `remove_dir_all` does not follow links.
fn tidy(place: &Path) {
    for entry in fs::read_dir(place).expect("the place").flatten() {
        if entry.file_name() == "outside" {
            continue;
        }
        let _ = match entry.file_type().expect("a type").is_dir() {
            true => fs::remove_dir_all(entry.path()),
            false => fs::remove_file(entry.path()),
        };
    }
}

struct Adversary {
    child: Child,
    answers: BufReader<ChildStdout>,
    place: PathBuf,
}

impl Adversary {
    fn start(place: &Path) -> Adversary {
        let mut command = Command::new("/proc/self/exe");
        command.env(ADVERSARY_VARIABLE, place).uid(USER).gid(USER).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // SAFETY: prctl takes integers.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                Ok(())
            });
        }
        let mut child = command.spawn().expect("an adversary");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Adversary { child, answers, place: place.to_owned() }
    }

    fn tell(&mut self, word: &str) {
        writeln!(self.child.stdin.as_mut().expect("piped"), "{word}").expect("the adversary is gone");
    }

    fn ask(&mut self, word: &str) {
        self.tell(word);
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the adversary's answer");
        assert!(!line.is_empty(), "the adversary is gone at {word}");
    }

    /// The directory, taken hold of through a process of the user's that has ended.
    fn pin(&self) -> Pin {
        let mut server = Command::new("sh");
        server.args(["-c", "read line"]).current_dir(self.place.join("web_1")).uid(USER).gid(USER);
        let mut server = server.stdin(Stdio::piped()).spawn().expect("a server");
        let pin = Pin::of(stat::read(server.id()).expect("its stat").id()).expect("a directory");
        server.kill().expect("kill");
        server.wait().expect("wait");
        pin
    }
}

impl Drop for Adversary {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is below a directory: type, inode and owner of each entry, and what a file says.
fn inventory(directory: &Path) -> BTreeMap<PathBuf, (u32, u64, u32, String)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).expect("a directory of canaries").flatten() {
        let meta = entry.metadata().expect("a canary");
        let text = if meta.is_file() { fs::read_to_string(entry.path()).expect("a canary") } else { String::new() };
        found.insert(entry.path(), (meta.mode(), meta.ino(), meta.uid(), text));
        if meta.is_dir() {
            found.extend(inventory(&entry.path()));
        }
    }
    found
}

/// Canaries of root, of root where everybody may write, and of the user.
fn canaries(base: &Path) -> PathBuf {
    let place = base.join("user");
    for (directory, mode) in [(base.join("root"), 0o755), (base.join("open"), 0o777), (place.join("outside"), 0o755)] {
        fs::create_dir_all(directory.join("a/deep/er")).expect("a directory");
        for below in ["canary", "file0", "a/file0", "a/deep/file0", "a/deep/er/file0"] {
            fs::write(directory.join(below), "alive").expect("a canary");
        }
        for below in ["", "a", "a/deep", "a/deep/er"] {
            fs::set_permissions(directory.join(below), fs::Permissions::from_mode(mode)).expect("chmod");
        }
    }
    let own = inventory(&place).into_keys().chain([place.clone()]);
    own.for_each(|path| chown(path, Some(USER), Some(USER)).expect("chown"));
    place
}

fn fight() {
    if !rustix::process::geteuid().is_root() {
        return skip("root", "only root removes directories of others");
    }
    let stage = Stage::new();
    let base = fs::canonicalize(stage.path(".")).expect("a stage");
    let place = canaries(&base);
    let kinds = ["root", "open", "user/outside"].map(|name| base.join(name));
    let state = || kinds.iter().map(|kind| inventory(kind)).collect::<Vec<_>>();
    let before = state();
    let glob = directory_glob(&format!("{}/web_*", place.display())).expect("a glob");
    let times: Option<usize> = env::var("PORTWATCH_TEST_SWEEPS").ok().map(|times| times.parse().expect("a number"));
    let mut adversary = Adversary::start(&place);
    let (mut tried, mut removed, mut partly, mut reasons) = (0, 0, 0, BTreeMap::<String, usize>::new());
    let begun = Instant::now();
    while times.map_or(begun.elapsed() < FIGHT, |times| tried < times) {
        adversary.ask("build");
        let pin = adversary.pin();
        adversary.ask("play");
        match remove(&pin, &glob) {
            Swept::Removed(_) => removed += 1,
            Swept::Kept(kept) => {
                partly += usize::from(kept.amount != Amount::default());
                *reasons.entry(kept.reason).or_default() += 1;
            }
        }
        adversary.ask("tidy");
        assert_eq!(state(), before, "a canary was touched in try {tried}");
        tried += 1;
    }
    eprintln!("{tried} tries: {removed} removed, {partly} in part; kept because {reasons:?}");
    assert!(removed + partly > tried / 20, "the adversary was hardly ever met: {removed} and {partly} of {tried}");
}

/// A server of the user in a directory of its own.
fn server(stage: &Stage, name: &str) -> (Puppet, Sock, PathBuf) {
    let directory = fs::canonicalize(stage.path(".")).expect("a stage").join(name);
    fs::create_dir_all(directory.join("data")).expect("a directory");
    fs::write(directory.join("data/log"), "x").expect("a file");
    let puppet = stage.puppet();
    if rustix::process::geteuid().is_root() {
        for path in [&directory, &directory.join("data"), &directory.join("data/log")] {
            chown(path, Some(USER), Some(USER)).expect("chown");
        }
        fs::set_permissions(directory.parent().expect("a parent"), fs::Permissions::from_mode(0o1777)).expect("chmod");
        puppet.become_user(USER);
    }
    puppet.change_directory(&directory);
    let sock = puppet.serve();
    (puppet, sock, directory)
}

/// The outcome of `kill` with `--remove-cwd` for what is called `web_*` on the stage.
fn kill(stage: &Stage, sock: &Sock, more: &[&str]) -> Value {
    let glob = format!("{}/web_*", fs::canonicalize(stage.path(".")).expect("a stage").display());
    let target = format!("{}/tcp", sock.port());
    let arguments = [&["kill", &target, "--yes", "--json", "--remove-cwd", &glob], more].concat();
    portwatch(&arguments).expect(0).json()[0].clone()
}

pub fn trials() -> Vec<Test> {
    vec![
        test("sweep::an_adversary_who_swaps_everything_redirects_nothing", fight),
        test("sweep::kill_removes_the_directory_of_the_one_it_ended_and_says_so", || {
            let stage = Stage::new();
            let (puppet, sock, directory) = server(&stage, "web_1");
            let (other, _, others) = server(&stage, "web_2");
            let planned = kill(&stage, &sock, &["--dry-run"]);
            assert_eq!(planned["would_remove_directories"], json!([directory]), "{planned}");
            assert!(directory.exists() && puppet.is_alive());
            let outcome = kill(&stage, &sock, &[]);
            let expected = json!([{"path": directory, "files": 1, "directories": 2, "bytes": 4096}]);
            let mut told = outcome["removed_directories"].clone();
            // How much a block is, the file system says.
            told[0]["bytes"] = json!(4096);
            assert_eq!((&told, &outcome["kept_directories"]), (&expected, &Value::Null), "{outcome}");
            puppet.wait();
            assert!(!directory.exists() && others.join("data/log").exists() && other.is_alive());
        }),
        test("sweep::kill_keeps_a_directory_in_which_somebody_else_runs_or_that_does_not_match", || {
            let stage = Stage::new();
            let (puppet, sock, directory) = server(&stage, "web_1");
            let roommate = stage.puppet();
            roommate.change_directory(&directory.join("data"));
            let outcome = kill(&stage, &sock, &[]);
            puppet.wait();
            let kept = &outcome["kept_directories"][0];
            let reason = format!("puppet ({}) runs in it", roommate.pid);
            let name = kept["reason"].as_str().map(|reason| reason.replace("exe (", "puppet ("));
            assert_eq!((name, &kept["path"]), (Some(reason), &json!(directory)), "{outcome}");
            let (_puppet, sock, elsewhere) = server(&stage, "other");
            let text = portwatch(&[
                "kill",
                &format!("{}/tcp", sock.port()),
                "--yes",
                "--remove-cwd",
                &format!("{}/*", directory.display()),
            ]);
            let line = format!("  kept {}: it does not match {}/*\n", elsewhere.display(), directory.display());
            assert!(text.expect(0).text().contains(&line), "{line}");
            assert!(directory.join("data/log").exists() && elsewhere.join("data/log").exists());
        }),
        test("sweep::a_directory_goes_only_once_its_server_has_ended", || {
            let stage = Stage::new();
            let (puppet, sock, directory) = server(&stage, "web_1");
            // Lets go of the port and lives on.
            puppet.release_on_term(sock.fd);
            let outcome = kill(&stage, &sock, &["--grace", "100ms"]);
            let reason = json!(format!("{} did not end", puppet.pid));
            assert_eq!(outcome["kept_directories"][0]["reason"], reason, "{outcome}");
            assert!(puppet.is_alive() && directory.join("data/log").exists());
        }),
        test("sweep::a_glob_of_no_directory_is_a_usage_error", || {
            let run = portwatch(&["kill", "8000", "--remove-cwd", "web_*"]).expect(2);
            assert!(run.errors().contains("begins with /"), "{}", run.errors());
        }),
    ]
}
