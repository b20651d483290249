use std::sync::Arc;

use super::*;
use crate::kill::kin::{Kin, Relation};
use crate::kill::testing::family;
use crate::model::ProcessId;

const OWN: u32 = 1000;

/// `(pid, parent, name, uid)`.
type Member<'a> = (u32, u32, &'a str, u32);

fn victim(&(pid, ppid, name, uid): &Member<'_>) -> Victim {
    let mut process = Process::bare(ProcessId { pid, start: 0 }, name);
    (process.ppid, process.uid) = (ppid, Some(uid));
    Victim::new(&Arc::new(process), &|_| None)
}

fn stat(&(pid, ppid, name, _): &Member<'_>) -> Stat {
    Stat {
        pid,
        name: name.into(),
        state: 'S',
        ppid,
        process_group: pid,
        session: 1,
        terminal: false,
        kernel_thread: false,
        exiting: false,
        start: 0,
    }
}

#[track_caller]
fn check(victims: &[Member<'_>], others: &[Member<'_>], expected: &[Concern]) {
    let host: Vec<Stat> = victims.iter().chain(others).map(stat).collect();
    let plan = Plan { victims: victims.iter().map(victim).collect(), ..Plan::default() };
    assert_eq!(concerns(&plan, OWN, false, &family(&host)), expected);
}

#[test]
fn processes_are_unrelated_unless_one_descends_from_the_other() {
    check(&[], &[], &[]);
    check(&[(10, 1, "a", OWN)], &[], &[]);
    check(&[(10, 1, "master", OWN), (11, 10, "w", OWN), (12, 10, "w", OWN)], &[], &[]);
    check(&[(10, 1, "master", OWN), (12, 11, "w", OWN)], &[(11, 10, "sh", OWN)], &[]);
    check(&[(10, 1, "a", OWN), (11, 1, "b", OWN)], &[], &[Concern::Unrelated(2)]);
    // A parent that is not hit relates nobody: it may be an editor.
    check(&[(10, 5, "a", OWN), (11, 5, "b", OWN)], &[(5, 1, "code", OWN)], &[Concern::Unrelated(2)]);
    let two = [(10, 1, "a", OWN), (11, 10, "aw", OWN), (20, 1, "b", OWN), (21, 20, "bw", OWN)];
    check(&two, &[], &[Concern::Unrelated(2)]);
}

#[test]
fn what_started_a_holder_is_related_to_it_and_a_concern() {
    let mut starter = victim(&(9, 1, "sh", OWN));
    starter.kin = Some(Kin { relation: Relation::Above(ProcessId { pid: 10, start: 0 }), seen: 0 });
    let plan = Plan { victims: vec![victim(&(10, 9, "server", OWN)), starter], ..Plan::default() };
    assert_eq!(concerns(&plan, OWN, false, &family(&[])), [Concern::Starters(1)]);
}

#[test]
fn who_is_taken_in_for_the_sake_of_another_is_related() {
    let mut mate = victim(&(11, 1, "tee", OWN));
    let relation = Relation::Group { group: 10, anchor: ProcessId { pid: 10, start: 0 } };
    mate.kin = Some(Kin { relation, seen: 0 });
    let plan = Plan { victims: vec![victim(&(10, 1, "make", OWN)), mate], ..Plan::default() };
    assert_eq!(concerns(&plan, OWN, false, &family(&[])), []);
}

#[test]
fn other_users_are_named_each_once_and_strangers_chosen_by_hand_are_fine() {
    let members = [(10, 1, "a", 0), (11, 1, "b", 33), (12, 1, "c", 33), (13, 1, "d", OWN)];
    let others = [Concern::OthersProcesses { uid: 0, count: 1 }, Concern::OthersProcesses { uid: 33, count: 2 }];
    check(&members, &[], &[&[Concern::Unrelated(4)], &others[..]].concat());
    let plan = Plan { victims: members.iter().map(victim).collect(), ..Plan::default() };
    assert_eq!(concerns(&plan, OWN, true, &family(&[])), others);
}

#[test]
fn system_services_are_known_by_program_or_unit() {
    let id = "0123456789abcdef".repeat(4);
    let container = format!("/system.slice/docker.service/docker-{id}.scope");
    for (name, cgroup, expected) in [
        ("sshd", None, true),
        ("systemd-resolve", None, true),
        ("dockerd", Some("/user.slice"), true),
        ("NetworkManager", None, true),
        ("python3", None, false),
        ("mysshd", None, false),
        ("x", Some("/system.slice/ssh.service"), true),
        ("x", Some("/system.slice/ssh@3-10.0.0.1:22-10.0.0.2:4711.service"), true),
        ("x", Some("/system.slice/systemd-journald.service"), true),
        ("x", Some("/user.slice/user-1000.slice/user@1000.service/session.slice/dbus.service"), true),
        ("nginx", Some("/system.slice/nginx.service"), false),
        ("bash", Some("/user.slice/user-1000.slice/session-3.scope"), false),
        ("node", Some(container.as_str()), false),
    ] {
        let mut process = Process::bare(ProcessId { pid: 9, start: 0 }, name);
        process.cgroup = cgroup.map(str::to_owned);
        assert_eq!(is_service(&process), expected, "{name} in {cgroup:?}");
    }
    check(&[(9, 1, "sshd", OWN)], &[], &[Concern::Service("sshd".into())]);
}
