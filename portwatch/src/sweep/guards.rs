//! What is never removed, whatever the glob says.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use globset::GlobMatcher;
use nix::unistd::{Uid, User};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{Inode, Pin, is_deep};
use crate::source::stat;

/// Why the directory must not be removed, if so, as far as can be told now: what matters is looked at again by whoever
/// removes it. Processes of `ending` are passed over.
pub(super) fn check(pin: &Pin, glob: &GlobMatcher, ending: &[u32]) -> Result<(), String> {
    if pin.path.as_os_str().as_encoded_bytes().ends_with(b" (deleted)") {
        return Err("it was removed already".to_owned());
    }
    if !glob.is_match(&pin.path) {
        return Err(format!("it does not match {}", glob.glob().glob()));
    }
    if !is_deep(&pin.path) {
        return Err("it is / or a directory in /".to_owned());
    }
    // Before anything is looked up there.
    let mounts = fs::read("/proc/self/mountinfo").map_err(|error| format!("mounts cannot be read: {error}"))?;
    if let Some(why) = mounted(&mounts, &pin.path, pin.inode.device) {
        return Err(why);
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let found = match rustix::fs::openat2(CWD, &pin.path, flags, Mode::empty(), resolve) {
        Ok(found) if Inode::of(&found).ok() == Some(pin.inode) => found,
        Ok(_) | Err(Errno::LOOP | Errno::NOTDIR) => return Err("its name leads to something else now".to_owned()),
        Err(Errno::NOENT) => return Err("it is gone already, or was renamed".to_owned()),
        Err(error) => return Err(format!("it cannot be looked at: {error}")),
    };
    let owner = rustix::fs::fstat(&found).map_err(|error| format!("it cannot be looked at: {error}"))?.st_uid;
    if owner != pin.uid {
        return Err(format!("it belongs to uid {owner}, and the process ran as uid {}", pin.uid));
    }
    if let Some(why) = homes(pin.uid).iter().find_map(|home| is_around(pin.inode, home)) {
        return Err(why);
    }
    match resident(pin, ending) {
        Some(why) => Err(why),
        None => Ok(()),
    }
}

/// What is mounted there or further down, or serves it or what is above it: a file system that a user's program serves may keep us waiting for
/// ever. The fields of a line are in proc_pid_mountinfo(5).
fn mounted(mountinfo: &[u8], path: &Path, device: u64) -> Option<String> {
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
        let line = String::from_utf8_lossy(line);
        let fields: Vec<&str> = line.split(' ').collect();
        let point = PathBuf::from(unescape(fields.get(4)?));
        if point == path {
            return Some("something is mounted on it".to_owned());
        }
        if point.starts_with(path) {
            return Some(format!("something is mounted in it, at {}", point.display()));
        }
        let after = fields.iter().position(|field| *field == "-")?;
        let kind = fields.get(after + 1)?;
        let is_fuse = *kind == "fuse" || *kind == "fuseblk" || kind.starts_with("fuse.");
        (is_fuse && (fields[2] == device || path.starts_with(&point)))
            .then(|| format!("it is on a file system that a program serves ({kind})"))
    })
}

/// `\040` is a blank: see `mangle_path()` in fs/seq_file.c.
fn unescape(field: &str) -> String {
    let mut out = String::new();
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let code = after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &after[3..];
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out + rest
}

/// The homes of all users of this host, of `uid` in particular (who may be known to a directory service alone), and our own.
fn homes(uid: u32) -> Vec<PathBuf> {
    let passwd = fs::read("/etc/passwd").unwrap_or_default();
    let passwd = String::from_utf8_lossy(&passwd);
    let listed = passwd.lines().filter_map(|line| line.split(':').nth(5)).map(PathBuf::from);
    let looked_up = User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.dir);
    let own = std::env::var_os("HOME").map(PathBuf::from);
    let all: HashSet<PathBuf> = listed.chain(looked_up).chain(own).filter(|home| home.is_absolute()).collect();
    all.into_iter().collect()
}

/// Whether the directory is this home or above it, by whatever path.
pub(super) fn is_around(directory: Inode, home: &Path) -> Option<String> {
    let real = fs::canonicalize(home).ok()?;
    let is_it = |path: &Path| {
        let found = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        found.is_ok_and(|found| Inode::of(found).ok() == Some(directory))
    };
    let found = real.ancestors().find(|path| is_it(path))?;
    let home = home.display();
    Some(if found == real { format!("it is {home}, somebody's home") } else { format!("{home}, a home, is in it") })
}

/// A process that has its working or root directory there or further down, or whose program is there; ourselves, too.
fn resident(pin: &Pin, ending: &[u32]) -> Option<String> {
    // Directories that are known not to be below.
    let mut outside = HashSet::new();
    let Ok(numbers) = fs::read_dir("/proc") else { return Some("processes cannot be read in /proc".to_owned()) };
    let pids = numbers.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for pid in pids.filter(|pid: &u32| !ending.contains(pid)) {
        let is_in = |link: &str| fs::read_link(format!("/proc/{pid}/{link}")).is_ok_and(|it| it.starts_with(&pin.path));
        let deed = if ["cwd", "root"].iter().any(|link| is_below(pid, link, pin.inode, &mut outside) || is_in(link)) {
            "runs"
        } else if is_in("exe") {
            "has its program"
        } else {
            continue;
        };
        let name = stat::read(pid).map_or_else(|_| "?".to_owned(), |stat| stat.name);
        return Some(format!("{name} ({pid}) {deed} in it"));
    }
    None
}

/// Climbs from where the process is: a path of another mount namespace says nothing here.
fn is_below(pid: u32, link: &str, directory: Inode, outside: &mut HashSet<Inode>) -> bool {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Gone, or not ours to look at.
    let Ok(mut at) = rustix::fs::openat(CWD, format!("/proc/{pid}/{link}"), flags, Mode::empty()) else { return false };
    let mut passed = Vec::new();
    while let Ok(inode) = Inode::of(&at) {
        if inode == directory {
            return true;
        }
        // The parent of a root is that root.
        if outside.contains(&inode) || passed.last() == Some(&inode) {
            break;
        }
        passed.push(inode);
        match rustix::fs::openat(&at, c"..", flags, Mode::empty()) {
            Ok(above) => at = above,
            Err(_) => break,
        }
    }
    outside.extend(passed);
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_is_seen() {
        let table = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            30 22 0:40 / /tmp/a\\040b/in rw,nosuid shared:1 - tmpfs tmpfs rw\n\
            31 22 0:41 / /home/al/remote rw - fuse.sshfs host: rw\n";
        for (path, device, want) in [
            ("/tmp/a b", (8, 1), Some("something is mounted in it, at /tmp/a b/in")),
            ("/tmp/a b/in", (8, 1), Some("something is mounted on it")),
            ("/tmp/a", (8, 1), None),
            ("/tmp/a b/in2", (8, 1), None),
            ("/x", (0, 41), Some("it is on a file system that a program serves (fuse.sshfs)")),
            ("/home/al/remote/x", (8, 1), Some("it is on a file system that a program serves (fuse.sshfs)")),
            ("/x", (0, 40), None),
        ] {
            let device = rustix::fs::makedev(device.0, device.1);
            assert_eq!(mounted(table, Path::new(path), device).as_deref(), want, "{path}");
        }
    }

    #[test]
    fn escapes_of_mount_points_are_undone() {
        for (field, want) in [("/a\\040b", "/a b"), ("/\\134x", "/\\x"), ("/a\\", "/a\\"), ("/a\\9", "/a\\9")] {
            assert_eq!(unescape(field), want);
        }
    }
}
