//! Where the report of a clean-up goes, whatever is there already; and what it tells of directories.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::Value;

use super::{USER, Yard, chown};
use crate::puppet::wait_readable;
use crate::subject::{Run, finish, outputs, pidfd};
use crate::{Test, test};

const FREED: &str = "1 listener was left behind since before.json: none is there any more\n";

/// A clean-up of one server, with the report there.
fn clean_up(yard: &Yard, report: &str) -> Run {
    let server = yard.server(yard.uid);
    server.serve();
    let run = yard.portwatch(&["kill", "--since", "before.json", "--yes", "--report", report]).expect(0);
    server.wait();
    run
}

#[track_caller]
fn check(report: &[u8]) {
    let report: Value = serde_json::from_slice(report).unwrap_or_else(|error| panic!("no JSON: {error}"));
    assert_eq!((&report["clean"], report["leaks"].as_array().map(Vec::len)), (&true.into(), Some(1)), "{report}");
}

/// What cannot take the report is found out while everybody lives.
fn refused() {
    let Some(yard) = Yard::new(USER, false) else { return };
    yard.mark();
    let server = yard.server(USER);
    server.serve();
    fs::create_dir(yard.home("closed")).expect("a directory");
    fs::set_permissions(yard.home("closed"), fs::Permissions::from_mode(0o755)).expect("chmod");
    symlink("nowhere/x", yard.home("dangling")).expect("a link");
    symlink("loop", yard.home("loop")).expect("a link");
    nix::unistd::mkfifo(&yard.home("not-ours"), Mode::from_bits_truncate(0o600)).expect("a fifo");
    for (path, code, want) in [
        ("nowhere/x.json", 4, "No such file or directory"),
        ("dangling", 4, "No such file or directory"),
        ("loop", 4, "Too many levels of symbolic links"),
        (".", 4, "it is a directory"),
        ("closed/", 4, "it is a directory"),
        ("before.json/x", 4, "Not a directory"),
        ("/dev/fd/99", 4, "No such file or directory"),
        ("closed/x.json", 3, "Permission denied"),
        ("not-ours", 3, "Permission denied"),
    ] {
        let run = yard.portwatch(&["kill", "--since", "before.json", "--yes", "--report", path]).expect(code);
        let errors = run.errors();
        let start = format!("portwatch: error: cannot write a report to {path}; nobody was signalled: ");
        assert!(errors.starts_with(&start) && errors.contains(want) && errors.lines().count() == 1, "{path}: {errors}");
        assert!(server.is_alive() && run.stdout.is_empty(), "{path}");
    }
}

/// A file is replaced whole, and a link stays one.
fn files() {
    let Some(yard) = Yard::new(USER, false) else { return };
    yard.mark();
    clean_up(&yard, "new.json");
    check(&fs::read(yard.home("new.json")).expect("a report"));
    fs::write(yard.home("old.json"), "x".repeat(10_000)).expect("a file");
    symlink("old.json", yard.home("link.json")).expect("a link");
    clean_up(&yard, "./link.json");
    check(&fs::read(yard.home("old.json")).expect("a report"));
    assert!(yard.home("link.json").is_symlink());
    symlink("made.json", yard.home("early.json")).expect("a link");
    clean_up(&yard, "early.json");
    check(&fs::read(yard.home("made.json")).expect("a report"));
    let name = |entry: io::Result<fs::DirEntry>| entry.expect("an entry").file_name().into_string().expect("a name");
    let names: BTreeSet<String> = fs::read_dir(yard.home("")).expect("a directory").map(name).collect();
    // The last is where marks are kept by name.
    let want = ["before.json", "early.json", "link.json", "made.json", "new.json", "old.json", "portwatch"];
    assert_eq!(names, BTreeSet::from(want.map(str::to_owned)));
}

/// Devices, FIFOs and what is open already stay what they are.
fn streams() {
    let Some(yard) = Yard::new(0, false) else { return };
    yard.mark();
    let null = yard.home("null");
    mknod(&null, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3)).expect("a device");
    symlink("null", yard.home("to-null")).expect("a link");
    clean_up(&yard, "to-null");
    assert!(fs::metadata(&null).expect("the device").file_type().is_char_device());

    for path in ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"] {
        let run = clean_up(&yard, path);
        let text = run.text();
        let (told, report) = text.split_once("{\"time\"").unwrap_or_else(|| panic!("no report: {text}"));
        assert!(told.ends_with(FREED), "{path}: {told}");
        check(format!("{{\"time\"{report}").as_bytes());
    }
    // As a shell has it: a file that is open is written to, behind what is there, and stays the file that it is.
    for (path, redirection) in [("/dev/stdout", ">> out"), ("/dev/fd/3", "3>> out")] {
        fs::write(yard.home("out"), "before\n").expect("a file");
        let inode = fs::metadata(yard.home("out")).expect("the file").ino();
        let server = yard.server(0);
        server.serve();
        let mut shell = yard.command("/bin/sh");
        let line = format!("portwatch kill --since before.json --yes --report {path} {redirection}");
        assert_eq!(finish(shell.args(["-c", &line]).spawn().expect("a shell")).code, Some(0));
        server.wait();
        let text = fs::read_to_string(yard.home("out")).expect("the file");
        let (told, report) = text.split_once("{\"time\"").unwrap_or_else(|| panic!("no report: {text}"));
        assert!(told.starts_with("before\n"), "{told}");
        check(format!("{{\"time\"{report}").as_bytes());
        assert_eq!(fs::metadata(yard.home("out")).expect("the file").ino(), inode);
    }
    fifo(&yard, &yard.home("fifo"));
}

/// Nobody reads a FIFO before there is something to read: all are ended by then, and it is said who is waited for.
fn fifo(yard: &Yard, path: &Path) {
    nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o600)).expect("a fifo");
    let server = yard.server(0);
    server.serve();
    let mut command = yard.command(yard.stage.path("portwatch"));
    let mut child =
        command.args(["kill", "--since", "before.json", "--yes", "--report", "fifo"]).spawn().expect("portwatch");
    let mut told = child.stderr.take().expect("stderr");
    let mut line = Vec::new();
    let waits = "portwatch: the report waits for somebody to read fifo\n";
    while !String::from_utf8_lossy(&line).ends_with(waits) {
        assert!(wait_readable(&told), "{line:?}");
        let mut bytes = [0; 4096];
        let length = told.read(&mut bytes).expect("stderr");
        assert!(length > 0, "{}", String::from_utf8_lossy(&line));
        line.extend_from_slice(&bytes[..length]);
    }
    server.wait();
    let mut report = Vec::new();
    File::open(path).and_then(|mut fifo| fifo.read_to_end(&mut report)).expect("the fifo");
    check(&report);
    assert_eq!(finish(child).code, Some(0));
    assert!(fs::metadata(path).expect("the fifo").file_type().is_fifo());
}

/// The directories that went, and those that did not, are told in both.
fn directories() {
    let Some(yard) = Yard::new(USER, false) else { return };
    yard.mark();
    let servers = ["web_1", "web_2", "other"].map(|name| {
        fs::create_dir(yard.home(name)).expect("a directory");
        chown(yard.home(name), Some(USER), Some(USER)).expect("chown");
        let server = yard.server(USER);
        server.change_directory(&yard.home(name));
        server.serve();
        server.serve();
        server
    });
    // Somebody is in the second one still.
    let mut stays = yard.command("/bin/cat");
    let mut stays = stays.stdin(Stdio::piped()).current_dir(yard.home("web_2")).spawn().expect("cat");
    let glob = yard.home("web_*");
    let glob = glob.to_str().expect("a path");
    let run =
        yard.portwatch(&["kill", "--since", "before.json", "--yes", "--remove-cwd", glob, "--report", "leaks.json"]);
    let run = run.expect(0);
    for server in servers {
        server.wait();
    }
    let output = outputs(&mut stays);
    stays.stdin.take().expect("stdin").flush().expect("stdin");
    assert!(wait_readable(pidfd(&stays)));
    stays.wait().expect("wait");
    output.join();
    let (text, gone, kept) = (run.text(), yard.home("web_1"), yard.home("web_2"));
    let removed = format!("  removed {} (0 files, 1 directory, ", gone.display());
    assert_eq!(text.matches(&removed).count(), 1, "{text}");
    assert_eq!(text.matches(&format!("  kept {}: ", kept.display())).count(), 1, "{text}");
    assert!(text.ends_with(": none is there any more\n"), "{text}");
    let report: Value = serde_json::from_slice(&fs::read(yard.home("leaks.json")).expect("a report")).expect("JSON");
    assert_eq!(report["removed_directories"][0]["path"], gone.display().to_string(), "{report}");
    let reasons: Vec<&Value> =
        report["kept_directories"].as_array().expect("kept").iter().map(|it| &it["path"]).collect();
    assert!(reasons.contains(&&Value::from(kept.display().to_string())), "{report}");
    assert!(!gone.exists() && kept.exists() && yard.home("other").exists());
}

pub fn trials() -> Vec<Test> {
    vec![
        test("mark::what_cannot_take_a_report_is_refused_before_anybody_is_ended", refused),
        test("mark::a_report_replaces_a_file_whole_and_no_link", files),
        test("mark::a_report_leaves_devices_fifos_and_open_files_what_they_are", streams),
        test("mark::directories_that_go_with_leaks_are_reported", directories),
    ]
}
