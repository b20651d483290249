use std::sync::Arc;

use super::*;
use crate::model::{Holder, Socket};
use crate::select::{Filters, Selector, Target, builtin_sets, parse_targets, without};

const TICK: u64 = ProcessId::TICK_NS;

fn process(pid: u32, start: u64, cgroup: &str) -> Process {
    let mut process = Process::bare(ProcessId { pid, start }, "x");
    process.cgroup = Some(cgroup.to_owned());
    process
}

fn listener(since: Option<BootNs>, holders: &[(u32, u64)]) -> Listener {
    let holder = |&(pid, start): &(u32, u64)| Holder {
        process: Arc::new(process(pid, start, "/user.slice/session-1.scope")),
        fds: vec![3],
        binder: pid == 7,
    };
    Listener { socket: Socket::example("127.0.0.1", 8000), since, holders: holders.iter().map(holder).collect() }
}

#[test]
fn what_appeared_since_a_moment_is_told_by_when_it_began() {
    for (since, holders, want) in [
        (Some(11 * TICK), &[(7, 1)][..], true),
        (Some(9 * TICK), &[(7, 1)], false),
        (None, &[(7, 11 * TICK)], true),
        (None, &[(7, 9 * TICK)], false),
        // The binder counts, not who joined it.
        (None, &[(7, 9 * TICK), (8, 12 * TICK)], false),
        (None, &[(7, 0)], false),
        (None, &[], false),
        (Some(11 * TICK), &[], true),
    ] {
        assert_eq!(Since::After(10 * TICK).matches(&listener(since, holders)), want, "{since:?} {holders:?}");
    }
}

#[test]
fn what_ran_when_a_mark_was_made_is_never_meant() {
    for (since, holders, want) in [
        (Some(12 * TICK), &[(7, 11 * TICK)][..], true),
        (None, &[(7, 11 * TICK), (8, 12 * TICK)], true),
        // It listens anew; a worker of it joined.
        (Some(12 * TICK), &[(7, 9 * TICK)], false),
        (Some(12 * TICK), &[(7, 12 * TICK), (8, 9 * TICK)], false),
        // In the same tick of /proc, and of the kernel's exact time.
        (None, &[(7, 10 * TICK)], false),
        (None, &[(7, 10 * TICK + 9)], false),
        (None, &[(7, 0)], false),
        (Some(12 * TICK), &[], true),
        (Some(9 * TICK), &[], false),
        (None, &[], false),
    ] {
        assert_eq!(Since::Mark(10 * TICK + 5).matches(&listener(since, holders)), want, "{since:?} {holders:?}");
    }
}

#[test]
fn variables_are_read_as_typed() {
    let environment = b"A=1\0CI=true\0EMPTY=\0PATHS=a=b:c\0garbage\0";
    for (text, want) in [
        ("CI", Ok(true)),
        ("CI=true", Ok(true)),
        ("CI=tru", Ok(false)),
        ("C", Ok(false)),
        ("EMPTY", Ok(true)),
        ("EMPTY=", Ok(true)),
        ("CI=", Ok(false)),
        ("PATHS=a=b:c", Ok(true)),
        ("garbage", Ok(false)),
        ("", Err("use NAME or NAME=VALUE".to_owned())),
        ("=x", Err("use NAME or NAME=VALUE".to_owned())),
    ] {
        let variable = text.parse::<Variable>();
        assert_eq!(variable.clone().map(|variable| variable.is_in(environment)), want, "{text}");
        assert_eq!(variable.map_or_else(|_| text.to_owned(), |variable| variable.to_string()), text);
    }
}

#[test]
fn cgroups_are_paths_and_what_is_below() {
    for (text, own, want) in [
        ("/a.slice", "/a.slice", true),
        ("/a.slice/", "/a.slice/b.service", true),
        ("/sys/fs/cgroup/a.slice", "/a.slice/b.service", true),
        ("/a.slice", "/a.slice2", false),
        ("/a.slice/b", "/a.slice", false),
        ("/", "/a.slice", true),
        ("/sys/fs/cgroup", "/", true),
        ("/sys/fs/cgroups", "/a", false),
    ] {
        assert_eq!(is_below(own, &cgroup_path(text).unwrap()), want, "{text} {own}");
    }
    assert!(cgroup_path("a.slice").is_err() && cgroup_path("").is_err());
}

#[test]
fn orphans_are_those_of_whom_it_shows() {
    let relative = |(pid, name): (u32, &str)| Relative { id: ProcessId { pid, start: 1 }, name: name.to_owned() };
    let session = "/user.slice/user-1000.slice/session-3.scope";
    for (cgroup, leader, ancestors, want) in [
        (session, 50, &[(50, "bash"), (40, "sshd"), (1, "systemd")][..], false),
        // Its shell has ended: init has it now, or the subreaper 40.
        (session, 50, &[(1, "init")], true),
        (session, 50, &[(40, "tmux"), (1, "init")], true),
        // setsid, and the parent ended.
        (session, 7, &[(1, "init")], true),
        (session, 7, &[(40, "systemd"), (1, "systemd")], true),
        // setsid, and the parent goes on; or a subreaper took its place, which does not show.
        (session, 7, &[(40, "bash"), (1, "init")], false),
        // Its parent lives, but that one was given away.
        (session, 50, &[(60, "sh"), (1, "init")], true),
        // A session outside our pid namespace.
        (session, 0, &[(60, "sh"), (1, "init")], false),
        ("/system.slice/web.service", 50, &[(1, "systemd")], false),
        (&format!("/system.slice/docker-{}.scope", "a".repeat(64)), 50, &[(40, "containerd-shim")], false),
    ] {
        let ancestors = ancestors.iter().copied().map(relative).collect();
        let family = Family { session: leader, ancestors };
        assert_eq!(family.is_orphaned(&process(7, 5, cgroup)), want, "{cgroup} {family:?}");
    }
    assert!(!Family { session: 1, ancestors: Vec::new() }.is_orphaned(&process(1, 5, "/init.scope")));
}

#[test]
fn facts_are_asked_of_holders_that_pass_everything_else() {
    fn environment(id: ProcessId, reader: u32) -> Option<Vec<u8>> {
        assert_eq!(id.pid, 7, "asked of a process that is not meant");
        (reader == 0).then(|| b"CI=1\0".to_vec())
    }
    fn family(id: ProcessId) -> Option<Family> {
        let parent = Relative { id: ProcessId { pid: id.pid - 1, start: 3 * TICK }, name: "sh".to_owned() };
        Some(Family { session: id.pid, ancestors: vec![parent] })
    }
    let of = |reader| Facts { reader, environment, family };
    let held = listener(None, &[(7, 5 * TICK), (9, 5 * TICK)]);
    let env = || Filters { variables: vec!["CI".parse().unwrap()], pids: vec![7], ..Filters::default() };
    let below = |pid, start| Filters { descendants_of: vec![ProcessId { pid, start }], ..Filters::default() };
    for (name, filters, facts, want) in [
        ("--env CI", env(), of(0), true),
        ("--env CI of another user", env(), of(1000), false),
        ("--env CI, nothing known", env(), Facts::NONE, false),
        ("--descendant-of 6", below(6, 3 * TICK), of(0), true),
        ("--descendant-of 6, which was another then", below(6, 4 * TICK), of(0), false),
        ("--descendant-of itself", below(7, 5 * TICK), of(0), false),
        ("--descendant-of 6, nothing known", below(6, 3 * TICK), Facts::NONE, false),
        ("--orphans", Filters { orphans: true, ..Filters::default() }, of(0), false),
        ("--cgroup", Filters { cgroups: vec!["/user.slice".into()], ..Filters::default() }, Facts::NONE, true),
    ] {
        let selector = Selector::new(Vec::new(), filters).with_facts(facts);
        assert!(!selector.is_empty(), "{name}");
        assert_eq!(selector.matches(&held, 0), want, "{name}");
        assert!(!selector.matches(&listener(None, &[]), 0), "{name}: nobody holds it");
    }
}

#[test]
fn what_is_excepted_is_no_target() {
    let targets = |words: &str| {
        let words: Vec<&str> = words.split(' ').filter(|word| !word.is_empty()).collect();
        parse_targets(&words, &builtin_sets()).unwrap()
    };
    for (words, except, want) in [
        ("3000-3005", "3002", "3000-3001 3003-3005"),
        ("3000-3005", "3000 3005", "3001-3004"),
        ("3000-3005", "2000-3003", "3004-3005"),
        ("8000", "8000/tcp", "8000/udp"),
        ("8000/tcp", "8000/udp", "8000/tcp"),
        ("8000/tcp", "8000", ""),
        ("@dev", "@dev", ""),
        ("@dev 22", "@dev", "22"),
        ("1-65535", "1 65535", "2-65534"),
        // The port is meant on every other address.
        ("8000", "127.0.0.1:8000", "8000"),
        ("127.0.0.1:8000", "127.0.0.1:8000", ""),
        ("127.0.0.1:8000", "8000", ""),
    ] {
        let left = without(targets(words), &targets(except));
        assert_eq!(left.iter().map(Target::to_string).collect::<Vec<_>>().join(" "), want, "{words} but {except}");
    }
    let all_but = Selector::new(Vec::new(), Filters { except: targets("127.0.0.1:8000"), ..Filters::default() });
    assert!(all_but.is_empty() && all_but.has_filters());
    let matches = |address, port| all_but.matches_socket(&Socket::example(address, port));
    assert!(!matches("127.0.0.1", 8000) && matches("127.0.0.1", 8001) && matches("127.0.0.2", 8000));
}
