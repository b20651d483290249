//! Real directories of real processes. What an adversary does meanwhile is in the scenario tests.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::source::stat;

const NOBODY: u32 = 65534;

/// A process in a directory, ended when dropped.
struct Resident(Child);

impl Resident {
    fn at(directory: &Path, uid: u32) -> Resident {
        let mut command = Command::new("sh");
        command.args(["-c", "read line"]).current_dir(directory).stdin(Stdio::piped());
        if uid != nix::unistd::geteuid().as_raw() {
            command.uid(uid).gid(uid);
        }
        Resident(command.spawn().unwrap())
    }

    fn id(&self) -> ProcessId {
        stat::read(self.0.id()).unwrap().id()
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn own_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// A place for directories such as `web_1`.
fn scene() -> (tempfile::TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().canonicalize().unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    (place, path)
}

fn glob_in(place: &Path) -> GlobMatcher {
    directory_glob(&format!("{}/web_*", place.display())).unwrap()
}

/// The directory as pinned through a process that has ended since.
fn pinned(directory: &Path, uid: u32) -> Pin {
    Pin::of(Resident::at(directory, uid).id()).unwrap()
}

/// Removes `web_1`, to which `change` happened after it was pinned.
fn sweep(place: &Path, change: impl FnOnce(&Path)) -> Swept {
    let web = place.join("web_1");
    let pin = pinned(&web, own_uid());
    change(&web);
    remove(&pin, &glob_in(place))
}

fn reason(swept: Swept) -> String {
    match swept {
        Swept::Kept(kept) => kept.reason,
        Swept::Removed(removed) => panic!("{removed:?}"),
    }
}

#[test]
fn a_directory_goes_with_all_that_is_in_it_and_nothing_that_links_lead_to() {
    let (_place, path) = scene();
    let web = path.join("web_1");
    fs::create_dir_all(web.join("a/b/c")).unwrap();
    fs::create_dir(web.join("empty")).unwrap();
    fs::create_dir(path.join("outside")).unwrap();
    fs::write(path.join("outside/canary"), "alive").unwrap();
    fs::write(web.join("a/b/c/log"), vec![b'x'; 10_000]).unwrap();
    fs::hard_link(path.join("outside/canary"), web.join("linked")).unwrap();
    symlink(path.join("outside"), web.join("a/away")).unwrap();
    symlink("..", web.join("up")).unwrap();
    let Swept::Removed(removed) = sweep(&path, |_| {}) else { panic!("kept") };
    assert_eq!(
        (removed.path.as_str(), removed.amount.files, removed.amount.directories),
        (web.to_str().unwrap(), 4, 5)
    );
    assert!(removed.amount.bytes >= 10_000, "{removed:?}");
    assert!(!web.exists());
    assert_eq!(fs::read_to_string(path.join("outside/canary")).unwrap(), "alive");
    assert_eq!(
        serde_json::to_value(&Removed { amount: Amount { bytes: 1, ..removed.amount }, ..removed }).unwrap(),
        serde_json::json!({"path": web.to_str().unwrap(), "files": 4, "directories": 5, "bytes": 1})
    );
}

#[test]
fn many_files_go_as_well() {
    let (_place, path) = scene();
    let web = path.join("web_1");
    fs::create_dir(&web).unwrap();
    for n in 0..3000 {
        fs::write(web.join(format!("a-file-with-a-name-of-some-length-{n}")), "").unwrap();
    }
    let Swept::Removed(removed) = sweep(&path, |_| {}) else { panic!("kept") };
    assert_eq!((removed.amount.files, removed.amount.directories), (3000, 1));
}

#[test]
fn what_may_not_be_removed_says_why() {
    let (_place, path) = scene();
    let web = path.join("web_1");
    let fresh = || fs::create_dir(&web).unwrap();
    let glob = glob_in(&path);

    fresh();
    let pin = pinned(&web, own_uid());
    let other = directory_glob("/tmp/other_*").unwrap();
    assert_eq!(reason(remove(&pin, &other)), "it does not match /tmp/other_*");
    let child = Resident::at(&web, own_uid());
    let pid = child.0.id();
    assert_eq!(may_remove(&pin, &glob, &[]), Err(format!("sh ({pid}) runs in it")));
    assert_eq!(may_remove(&pin, &glob, &[pid]), Ok(()));
    drop(child);
    fs::create_dir_all(web.join("below/further")).unwrap();
    let child = Resident::at(&web.join("below/further"), own_uid());
    assert_eq!(reason(remove(&pin, &glob)), format!("sh ({}) runs in it", child.0.id()));
    drop(child);
    assert_eq!(may_remove(&pin, &glob, &[]), Ok(()));

    let moved = |web: &Path| fs::rename(web, path.join("moved")).unwrap();
    assert_eq!(reason(sweep(&path, moved)), "it is gone already, or was renamed");
    fs::create_dir(&web).unwrap();
    assert_eq!(reason(remove(&pin, &glob)), "its name leads to something else now");
    fs::remove_dir(&web).unwrap();
    symlink(path.join("moved"), &web).unwrap();
    assert_eq!(reason(remove(&pin, &glob)), "its name leads to something else now");
    fs::remove_file(&web).unwrap();
    assert!(path.join("moved/below/further").exists());

    fresh();
    let running = Resident::at(&web, own_uid());
    let pin = Pin::of(running.id()).unwrap();
    assert_eq!(reason(remove(&pin, &glob)), format!("{} did not end", running.0.id()));
    fs::remove_dir(&web).unwrap();
    drop(running);
    assert_eq!(reason(remove(&pin, &glob)), "it is gone already, or was renamed");
    fresh();
    let running = Resident::at(&web, own_uid());
    fs::remove_dir(&web).unwrap();
    assert_eq!(may_remove(&Pin::of(running.id()).unwrap(), &glob, &[]), Err("it was removed already".to_owned()));
}

#[test]
fn what_is_too_deep_is_left() {
    let (_place, path) = scene();
    let mut deep = path.join("web_1");
    for _ in 0..150 {
        deep = deep.join("d");
    }
    fs::create_dir_all(&deep).unwrap();
    assert_eq!(reason(sweep(&path, |_| {})), "'d' in it is deeper than 128 directories");
    assert!(deep.exists());
}

#[test]
fn root_removes_only_what_the_user_could_remove_himself() {
    if own_uid() != 0 {
        eprintln!("NOT TESTED: only root can become somebody else");
        return;
    }
    let (_place, path) = scene();
    let web = path.join("web_1");
    let build = || {
        fs::create_dir_all(web.join("own")).unwrap();
        fs::create_dir(web.join("roots")).unwrap();
        fs::write(web.join("roots/file"), "x").unwrap();
        fs::write(web.join("log"), "of root, in a directory of nobody").unwrap();
        for own in [&web, &web.join("own")] {
            chown(own, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    };
    build();
    let glob = glob_in(&path);
    let pin = pinned(&web, NOBODY);
    let Swept::Kept(kept) = remove(&pin, &glob) else { panic!("removed") };
    assert_eq!((kept.reason.as_str(), kept.amount.files), ("'roots' in it is a directory of uid 0", 1));
    assert!(web.join("roots/file").exists() && !web.join("own").exists());
    // Nobody else's directory, though the process ran there.
    fs::remove_dir_all(web.join("roots")).unwrap();
    chown(&web, Some(0), Some(0)).unwrap();
    assert_eq!(reason(remove(&pin, &glob)), format!("it belongs to uid 0, and the process ran as uid {NOBODY}"));
    chown(&web, Some(NOBODY), Some(NOBODY)).unwrap();
    // Empty as it is: its user may not remove it from a directory of root.
    let refused = reason(remove(&pin, &glob));
    assert!(refused.starts_with("cannot remove it: "), "{refused}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o1777)).unwrap();
    assert!(matches!(remove(&pin, &glob), Swept::Removed(_)));
    // This thread has what it had.
    assert_eq!(fs::metadata("/proc/thread-self").unwrap().uid(), 0);
}

/// In a mount namespace of this thread, which `/proc/self/mountinfo`, the leader's, does not tell of: so nothing but the
/// kernel's refusal to cross a mount stands between.
#[test]
fn what_is_mounted_in_it_meanwhile_stays() {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    if own_uid() != 0 {
        eprintln!("NOT TESTED: only root can mount");
        return;
    }
    let (_place, path) = scene();
    let (web, outside) = (path.join("web_1"), path.join("outside"));
    fs::create_dir_all(web.join("in/side")).unwrap();
    fs::write(web.join("file"), "x").unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("canary"), "alive").unwrap();
    fs::write(web.join("mounted"), "").unwrap();
    let within = |on: &Path, what: &Path| {
        std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
                let none = None::<&str>;
                mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
                let pin = pinned(&web, 0);
                mount(Some(what), on, none, MsFlags::MS_BIND, none).unwrap();
                reason(remove(&pin, &glob_in(&path)))
            });
            work.join().unwrap()
        })
    };
    assert_eq!(within(&web, &outside), "its name leads to something else now");
    assert_eq!(within(&web, &web), "something is mounted on it");
    let file = within(&web.join("mounted"), &outside.join("canary"));
    assert!(file.starts_with("'mounted' in it cannot be removed: "), "{file}");
    fs::create_dir_all(web.join("in/side")).unwrap();
    assert_eq!(within(&web.join("in/side"), &outside), "'side' in it is a mount point");
    assert_eq!(fs::read_to_string(outside.join("canary")).unwrap(), "alive");
}

#[test]
fn work_has_no_capability_and_leaves_this_thread_its_own() {
    let status = || fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = |status: &str, name: &str| status.lines().find(|line| line.starts_with(name)).map(str::to_owned);
    let before = status();
    let within = user::run_as(own_uid(), nix::unistd::getegid().as_raw(), status).unwrap();
    assert_eq!(line(&within, "CapEff:").unwrap(), "CapEff:\t0000000000000000");
    assert_eq!(line(&within, "CapPrm:").unwrap(), "CapPrm:\t0000000000000000");
    assert_eq!(line(&status(), "Cap"), line(&before, "Cap"));
    if own_uid() == 0 {
        let within = user::run_as(NOBODY, NOBODY, status).unwrap();
        assert_eq!(line(&within, "Uid:").unwrap(), format!("Uid:\t0\t0\t0\t{NOBODY}"));
        assert_eq!(line(&within, "Groups:").unwrap().trim_end(), "Groups:");
    } else {
        assert!(user::run_as(0, 0, || ()).is_err());
    }
}

#[test]
fn globs_of_directories_are_those_of_a_shell() {
    for (glob, path, want) in [
        ("/tmp/web_*", "/tmp/web_1", true),
        ("/tmp/web_*/", "/tmp/web_1", true),
        ("/tmp/web_*", "/tmp/web_1/data", false),
        ("/tmp/*", "/tmp/a/b", false),
        ("/tmp/**", "/tmp/a/b", true),
        ("/tmp/{a,b}", "/tmp/b", true),
    ] {
        assert_eq!(directory_glob(glob).unwrap().is_match(path), want, "{glob} {path}");
    }
    assert!(directory_glob("web_*").unwrap_err().contains("begins with /"));
    assert!(directory_glob("/tmp/[").is_err());
}

#[test]
fn homes_and_what_is_around_them_stay() {
    let (_place, path) = scene();
    let web = path.join("web_1");
    fs::create_dir_all(web.join("home")).unwrap();
    symlink(&web, path.join("alias")).unwrap();
    let inode = |path: &Path| Inode::of(fs::File::open(path).unwrap()).unwrap();
    let around = |directory: &Path, home: &Path| guards::is_around(inode(directory), home);
    let home = path.join("alias/home");
    assert!(around(&web, &home).unwrap().ends_with("a home, is in it"));
    assert!(around(&web.join("home"), &home).unwrap().ends_with("somebody's home"));
    fs::create_dir(path.join("web_2")).unwrap();
    assert_eq!(around(&path.join("web_2"), &home), None);
    assert_eq!(around(&web, Path::new("/nonexistent")), None);
}
