//! The truth, read independently of portwatch: `/proc/PID/net/{tcp,tcp6,udp,udp6}` for sockets, `/proc/PID/task/*/fd`
//! for who holds them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use crate::puppet::{Puppet, Stage};

/// One listener and who holds it: the part of a row that /proc can confirm.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    pub proto: &'static str,
    pub address: IpAddr,
    pub port: u16,
    pub inode: u64,
    pub netns: u32,
    pub uid: u32,
    /// Descriptors by pid.
    pub holders: BTreeMap<u32, BTreeSet<u32>>,
}

/// Every listener that a puppet of the stage opened and that exists now, in the network namespaces that `puppets` are or
/// were in, held by them or by nobody.
pub fn truth(stage: &Stage, puppets: &[&Puppet]) -> BTreeSet<Row> {
    let mut held: BTreeMap<u64, BTreeMap<u32, BTreeSet<u32>>> = BTreeMap::new();
    let mut namespaces: BTreeMap<u32, PathBuf> = BTreeMap::new();
    for puppet in puppets {
        for task in tasks(puppet.pid) {
            // A thread-group leader that exited has neither namespace nor descriptors: its threads do.
            if let Some(netns) = namespace(&task) {
                namespaces.insert(netns, task.clone());
            }
            for (fd, inode) in sockets(&task) {
                held.entry(inode).or_default().entry(puppet.pid).or_default().insert(fd);
            }
        }
    }
    let mut rows = BTreeSet::new();
    let mut take = |netns: u32, tables: Tables| {
        for (proto, state, text) in tables {
            let found = text.lines().skip(1).filter_map(|line| parse(line, proto, state, netns));
            rows.extend(
                found
                    .filter(|row| stage.knows(row.inode))
                    .map(|row| Row { holders: held.get(&row.inode).cloned().unwrap_or_default(), ..row }),
            );
        }
    };
    for (netns, task) in &namespaces {
        take(*netns, tables(task));
    }
    for (netns, file) in stage.namespaces().iter().filter(|(netns, _)| !namespaces.contains_key(netns)) {
        take(*netns, tables_within(file));
    }
    rows
}

/// Sockets as the kernel lists them: protocol, the state that is asked for, and the text.
type Tables = Vec<(&'static str, &'static str, String)>;

/// Those of the network namespace of a task.
fn tables(task: &Path) -> Tables {
    let files =
        [("tcp", "0A", "net/tcp"), ("tcp", "0A", "net/tcp6"), ("udp", "07", "net/udp"), ("udp", "07", "net/udp6")];
    let read = |file| fs::read_to_string(task.join(file)).unwrap_or_default();
    files.map(|(proto, state, file)| (proto, state, read(file))).into()
}

/// Those of a network namespace, by a thread that enters it.
fn tables_within(namespace: &fs::File) -> Tables {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("setns");
            tables(Path::new("/proc/thread-self"))
        });
        thread.join().expect("a thread in another network namespace")
    })
}

/// The network namespaces that puppets were in and nobody is in now: who looks for namespaces does not find them, only sockets
/// that somebody holds are seen there.
pub fn abandoned(stage: &Stage, puppets: &[&Puppet]) -> BTreeSet<u32> {
    let tasks = puppets.iter().flat_map(|puppet| tasks(puppet.pid)).chain([PathBuf::from("/proc/self")]);
    let lived_in: BTreeSet<u32> = tasks.filter_map(|task| namespace(&task)).collect();
    stage.namespaces().keys().copied().filter(|netns| !lived_in.contains(netns)).collect()
}

/// `/proc/PID/task/TID` of every thread.
pub fn tasks(pid: u32) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    entries.flatten().map(|entry| entry.path()).collect()
}

/// Inode of the network namespace of a task.
pub fn namespace(task: &Path) -> Option<u32> {
    let link = fs::read_link(task.join("ns/net")).ok()?;
    link.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

fn sockets(task: &Path) -> Vec<(u32, u64)> {
    let entries = fs::read_dir(task.join("fd")).into_iter().flatten().flatten();
    let socket = |entry: fs::DirEntry| {
        let link = fs::read_link(entry.path()).ok()?;
        let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()?;
        Some((entry.file_name().to_str()?.parse().ok()?, inode))
    };
    entries.filter_map(socket).collect()
}

/// `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode …` (`proc(5)`).
fn parse(line: &str, proto: &'static str, state: &str, netns: u32) -> Option<Row> {
    let words: Vec<&str> = line.split_whitespace().collect();
    if *words.get(3)? != state {
        return None;
    }
    let (address, port) = words.get(1)?.split_once(':')?;
    Some(Row {
        proto,
        address: parse_address(address)?,
        port: u16::from_str_radix(port, 16).ok()?,
        inode: words.get(9)?.parse().ok()?,
        netns,
        uid: words.get(7)?.parse().ok()?,
        holders: BTreeMap::new(),
    })
}

/// Addresses are printed as 32-bit words in the byte order of the machine.
fn parse_address(hex: &str) -> Option<IpAddr> {
    let words: Option<Vec<[u8; 4]>> = (0..hex.len() / 8)
        .map(|i| u32::from_str_radix(hex.get(i * 8..i * 8 + 8)?, 16).ok().map(u32::to_ne_bytes))
        .collect();
    let bytes = words?.concat();
    if let Ok(v4) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Some(Ipv4Addr::from(v4).into());
    }
    <[u8; 16]>::try_from(bytes.as_slice()).ok().map(|v6| Ipv6Addr::from(v6).into())
}

/// The oracle against puppets alone, without portwatch: what the other tests stand on.
pub fn trials() -> Vec<crate::Test> {
    vec![
        crate::test("oracle::a_listener_is_true_with_its_holder_until_it_is_closed", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            let sock = puppet.serve();
            let rows = truth(&stage, &[&puppet]);
            let row = rows.first().expect("one row");
            assert_eq!((row.proto, row.port, row.inode, rows.len()), ("tcp", sock.port(), sock.inode, 1));
            assert_eq!(row.holders, BTreeMap::from([(puppet.pid, BTreeSet::from([sock.fd as u32]))]));
            puppet.close(sock.fd);
            assert!(truth(&stage, &[&puppet]).is_empty());
        }),
        crate::test("oracle::fork_exec_and_exit_change_holders", || {
            let stage = Stage::new();
            let parent = stage.puppet();
            let sock = parent.serve();
            let child = parent.fork();
            let holders = |puppets: &[&Puppet]| -> Vec<u32> {
                let rows = truth(&stage, puppets);
                rows.iter().flat_map(|row| row.holders.keys().copied()).collect()
            };
            assert_eq!(holders(&[&parent, &child]).len(), 2);
            child.set_cloexec(sock.fd, true);
            child.exec();
            assert_eq!(holders(&[&parent, &child]), [parent.pid]);
            let other = parent.fork();
            parent.exit();
            assert_eq!(holders(&[&child, &other]), [other.pid]);
        }),
        crate::test("oracle::a_descriptor_in_flight_has_no_holder", || {
            let stage = Stage::new();
            let (giver, taker) = (stage.puppet(), stage.puppet());
            taker.open_mailbox();
            let sock = giver.serve();
            giver.send_fd(sock.fd, &taker);
            giver.close(sock.fd);
            let rows = truth(&stage, &[&giver, &taker]);
            assert!(rows.first().expect("a ghost").holders.is_empty());
            let fd = taker.receive_fd();
            let rows = truth(&stage, &[&giver, &taker]);
            let expected = BTreeMap::from([(taker.pid, BTreeSet::from([fd as u32]))]);
            assert_eq!(rows.first().expect("one row").holders, expected);
        }),
        crate::test("oracle::a_zombie_leader_still_serves", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            puppet.serve();
            puppet.serve_from_thread();
            let rows = truth(&stage, &[&puppet]);
            assert_eq!(rows.first().expect("one row").holders.keys().collect::<Vec<_>>(), [&puppet.pid]);
            assert!(puppet.is_alive());
        }),
        crate::test("oracle::other_network_namespaces_are_read", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            if !puppet.unshare_net() {
                return;
            }
            let sock = puppet.tcp("[::1]:8000", "v6only");
            let udp = puppet.udp("127.0.0.1:5353", "");
            let rows = truth(&stage, &[&puppet]);
            let seen: Vec<_> = rows.iter().map(|row| (row.proto, row.inode, row.address.to_string())).collect();
            assert_eq!(seen, [("tcp", sock.inode, "::1".into()), ("udp", udp.inode, "127.0.0.1".into())]);
            assert_ne!(rows.first().map(|row| row.netns), namespace(Path::new("/proc/self")));
        }),
    ]
}
