//! Files of `/proc` that portwatch reads by itself. Each input is taken for all of them.

use std::fmt::Write as _;

use procfs::FromRead as _;

use crate::cgroup::{Container, Unit};
use crate::diagnose::stash::{self, Place};
use crate::diagnose::{Sysctls, sysctl};
use crate::model::Protocol;
use crate::source::stat::Stat;
use crate::source::{diag, process, procfs as own};

pub fn proc(data: &[u8]) {
    stat(data);
    command(data);
    cgroup(data);
    assert!(process::parse_exe(data).len() <= 3 * data.len());
    if let Some(inode) = own::parse_socket(data) {
        assert_eq!(own::parse_socket(format!("socket:[{inode}]").as_bytes()), Some(inode));
    }
    let text = String::from_utf8_lossy(data);
    for place in [Place::Queue, Place::Ring] {
        if let Some((count, inodes)) = stash::parse(&text, place) {
            assert!(count > 0 && inodes.len() <= text.lines().count());
        }
    }
    let _ = sysctl::parse_range(&text);
    let sysctls = Sysctls { reserved: text.into_owned(), ..Sysctls::default() };
    let _ = sysctls.is_reserved(8000);
    for proto in [Protocol::Tcp, Protocol::Udp] {
        for (endpoint, ..) in diag::parse_proc_net(data, proto).unwrap_or_default() {
            assert_ne!(endpoint.port(), 0);
        }
    }
}

/// As the name of a process the bytes shift no field, whoever reads the line.
fn stat(data: &[u8]) {
    let _ = Stat::parse(data);
    let line = [b"42 (", data, b") S 7 8 9 34816 10 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 1 2"].concat();
    let mut line = line;
    let mut rest = String::new();
    for field in 25..=52 {
        let _ = write!(rest, " {field}"); // Writing to a String cannot fail.
    }
    line.extend(rest.bytes());
    let own = Stat::parse(&line).expect("a whole line");
    assert_eq!((own.pid, own.state, own.ppid, own.session, own.start), (42, 'S', 7, 9, 123_450_000_000));
    assert_eq!(own.name, String::from_utf8_lossy(data));
    let other = procfs::process::Stat::from_read(&line[..]).expect("a whole line");
    assert_eq!((own.name, own.state, own.terminal), (other.comm, other.state, other.tty_nr != 0));
    assert_eq!(Some(own.pid), other.pid.try_into().ok());
}

/// Arguments written as the kernel does are read as they were.
fn command(data: &[u8]) {
    let command = process::parse_command(data);
    let written = command.iter().flat_map(|argument| [argument.as_bytes(), b"\0"]).collect::<Vec<_>>().concat();
    assert_eq!(process::parse_command(&written), command);
    assert!(command.last().is_none_or(|last| !last.is_empty()));
}

fn cgroup(data: &[u8]) {
    let file = process::parse_cgroup(data);
    for path in file.iter().map(String::as_str).chain([&*String::from_utf8_lossy(data)]) {
        if let Some(unit) = Unit::of(path) {
            assert!(unit.name.ends_with(".service") && !unit.name.contains('/'), "{unit:?}");
        }
        if let Some(container) = Container::of(path) {
            assert_eq!((container.id.len(), container.short_id().len()), (64, 12));
            // What runs in there is none of this host's units.
            let before: Vec<&str> = path.split('/').take_while(|part| Container::of(part).is_none()).collect();
            assert_eq!(Unit::of(path), Unit::of(&before.join("/")));
        }
    }
}
