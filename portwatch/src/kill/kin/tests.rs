use std::cell::Cell;

use super::*;
use crate::kill::testing::family;

const TICK: u64 = ProcessId::TICK_NS;

/// `(pid, parent, process group, start in ticks)`.
fn stats(members: &[(u32, u32, u32, u64)]) -> Vec<Stat> {
    let stat = |&(pid, ppid, process_group, ticks): &(u32, u32, u32, u64)| Stat {
        pid,
        name: format!("p{pid}"),
        state: 'S',
        ppid,
        process_group,
        session: 1,
        terminal: false,
        kernel_thread: false,
        exiting: false,
        start: ticks * TICK,
    };
    members.iter().map(stat).collect()
}

/// 1 ─ 10 (holder) ─ 11 ─ 12, 10 ─ 13 (group of its own); 1 ─ 20, of 10's group; 1 ─ 30, a stranger.
fn host() -> Vec<Stat> {
    stats(&[
        (1, 0, 1, 0),
        (10, 1, 10, 100),
        (11, 10, 10, 101),
        (12, 11, 10, 102),
        (13, 10, 13, 103),
        (20, 1, 10, 104),
        (30, 1, 30, 105),
    ])
}

fn id(pid: u32, ticks: u64) -> ProcessId {
    ProcessId { pid, start: ticks * TICK }
}

fn found(reach: Reach, all: &[Stat], now: &[Stat]) -> Vec<u32> {
    let holder = all.iter().find(|stat| stat.pid == 10).unwrap();
    let known: Vec<_> = reach.relation(holder).map(|relation| (holder.id(), relation)).into_iter().collect();
    relatives(&known, all, 200 * TICK, &family(now)).into_iter().map(|(stat, _, _)| stat.pid).collect()
}

#[test]
fn relatives_are_descendants_or_members_of_the_group() {
    let all = host();
    assert_eq!(found(Reach::Holders, &all, &all), [0; 0]);
    assert_eq!(found(Reach::Tree, &all, &all), [11, 12, 13]);
    assert_eq!(found(Reach::Group, &all, &all), [11, 12, 20]);
}

#[test]
fn what_was_read_first_is_only_where_to_look() {
    let all = host();
    // Before it was read again: 11 is gone and its number another's; 12 was given to init; 13 left the tree's numbers.
    let now = stats(&[(10, 1, 10, 100), (11, 10, 10, 150), (12, 1, 10, 102), (20, 1, 99, 104)]);
    assert_eq!(found(Reach::Tree, &all, &now), [0; 0]);
    assert_eq!(found(Reach::Group, &all, &now), [12]);
    // Once nobody known is in the group any more, its number may be another group's.
    let left = stats(&[(10, 1, 77, 100), (11, 10, 10, 101)]);
    assert_eq!(found(Reach::Group, &all, &left), [0; 0]);
}

#[test]
fn a_process_whose_leader_exited_is_a_relative_like_any_other() {
    let mut all = host();
    (all[2].exiting, all[2].state) = (true, 'Z');
    assert_eq!(found(Reach::Tree, &all, &all), [11, 12, 13]);
    assert_eq!(found(Reach::Group, &all, &all), [11, 12, 20]);
}

#[test]
fn groups_of_another_namespace_have_no_relatives() {
    let nowhere = stats(&[(10, 1, 0, 100), (11, 10, 0, 101)]);
    assert_eq!(found(Reach::Group, &nowhere, &nowhere), [0; 0]);
}

#[test]
fn a_parent_that_changes_between_the_readings_proves_nothing() {
    // 12's parent 11 ends after 12 was read; its number becomes a child of the holder's before it is read.
    let reads = Cell::new(0);
    let all = host();
    let stat = family(&all);
    let racing = |pid: u32| {
        if pid == 12 {
            reads.set(reads.get() + 1);
            if reads.get() > 1 {
                return stat(12).map(|child| Stat { ppid: 1, ..child });
            }
        }
        stat(pid)
    };
    assert!(descends(id(12, 102), id(10, 100), &stat));
    assert!(!descends(id(12, 102), id(10, 100), &racing));
    assert_eq!(reads.get(), 2);
}

#[test]
fn who_is_proved() {
    let all = host();
    let tree = |seen| Kin { relation: Relation::Tree(id(10, 100)), seen: seen * TICK };
    let group = |seen| Kin { relation: Relation::Group { group: 10, anchor: id(10, 100) }, seen: seen * TICK };
    let orphaned = stats(&[(12, 1, 10, 102)]);
    let left = stats(&[(12, 1, 99, 102)]);
    let recycled = stats(&[(12, 1, 10, 150)]);
    for (what, kin, now, certain, expected) in [
        ("as it was planned", tree(200), &all, false, true),
        ("given to init, and old enough that its start names it", tree(103), &orphaned, false, true),
        ("given to init, and so young that its number may be another's", tree(102), &orphaned, false, false),
        ("the same, proved before through its pidfd", tree(102), &orphaned, true, true),
        ("another process, whatever was proved", tree(200), &recycled, true, false),
        ("gone", tree(200), &Vec::new(), true, false),
        ("in the group", group(200), &all, false, true),
        ("in the group, young, with the holder in it still", group(102), &all, false, true),
        ("young, and nobody known in the group", group(102), &orphaned, false, false),
        ("old, and nobody known in the group: it is itself a known member", group(200), &orphaned, false, true),
        ("no longer in the group", group(200), &left, true, false),
        ("another process in a group of that number", group(200), &recycled, true, false),
    ] {
        assert_eq!(kin.is_proved(id(12, 102), certain, &family(now)), expected, "{what}");
    }
    // What started a holder: old enough, by its start; else as long as the holder is below it.
    let above = |seen| Kin { relation: Relation::Above(id(12, 102)), seen: seen * TICK };
    let alone = stats(&[(10, 1, 10, 100)]);
    for (kin, now, certain, expected) in [
        (above(100), &all, false, true),
        (above(100), &alone, false, false),
        (above(100), &alone, true, true),
        (above(101), &alone, false, true),
        (above(101), &stats(&[(10, 1, 10, 150)]), true, false),
    ] {
        assert_eq!(kin.is_proved(id(10, 100), certain, &family(now)), expected, "{kin:?} {now:?}");
    }
}
