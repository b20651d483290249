//! Who holds a listener: forks, execs, exits.

use super::{Table, check, parse};

#[test]
fn a_child_holds_what_its_parent_held() {
    check(
        "
        snap 5
          c1 i5 tcp 127.0.0.1:80 by 7:3
        fork 10 7 8
        fork 10 7 8
        exit 20 7
        exit 20 7
        snap 30
          c1 i5 tcp 127.0.0.1:80 by 8:3
        close 40 c1
        ",
        "
        10 holders i5 tcp 127.0.0.1:80 by 7*:3 8:3
        20 holders i5 tcp 127.0.0.1:80 by 8:3
        40 closed i5 tcp 127.0.0.1:80 by 8*:3 by 8
        =
        ",
    );
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        fork 11 7 8
        snap 30
          c1 i5 tcp 127.0.0.1:80 by 8:3 7:3
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        11 holders i5 tcp 127.0.0.1:80 since 10 by 7* 8
        =
        i5 tcp 127.0.0.1:80 since 10 by 7*:3 8:3
        ",
    );
}

#[test]
fn a_late_fork_raises_no_dead_and_asks_for_a_snapshot() {
    check(
        "
        snap 5
          c1 i5 tcp 127.0.0.1:80 by 7:3
        exit 20 8
        fork 10 7 8
        ",
        "
        =
        i5 tcp 127.0.0.1:80 by 7*:3
        ",
    );
    check(
        "
        snap 5
          c1 i5 tcp 127.0.0.1:80 by 7:3 9:3
        exit 20 7
        fork 10 7 8
        ",
        "
        20 holders i5 tcp 127.0.0.1:80 by 9:3
        = stale
        i5 tcp 127.0.0.1:80 by 9:3
        ",
    );
    check(
        "
        fork 10 7 8
        snap 15
          c1 i5 tcp 127.0.0.1:80 by 7:3
        fork 12 7 8
        ",
        "
        =
        i5 tcp 127.0.0.1:80 by 7*:3
        ",
    );
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        fork 8 7 8
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        = stale
        i5 tcp 127.0.0.1:80 since 10 by 7*
        ",
    );
}

#[test]
fn a_snapshot_begun_before_a_fork_or_exec_is_not_the_last_word() {
    check(
        "
        fork 20 7 8
        snap 15
          c1 i5 tcp 127.0.0.1:80 by 7:3
        ",
        "
        = stale
        i5 tcp 127.0.0.1:80 by 7*:3
        ",
    );
    check(
        "
        fork 20 7 8
        snap 15
          c1 i5 tcp 127.0.0.1:80 by 7:3
        snap 25
          c1 i5 tcp 127.0.0.1:80 by 7:3 8:3
        ",
        "
        25 holders i5 tcp 127.0.0.1:80 by 7*:3 8:3
        =
        i5 tcp 127.0.0.1:80 by 7*:3 8:3
        ",
    );
    check(
        "
        snap 5
          c1 i5 tcp 127.0.0.1:80 by 7:3
        fork 20 7 8
        snap 15
          c1 i5 tcp 127.0.0.1:80 by 7:3
        ",
        "
        20 holders i5 tcp 127.0.0.1:80 by 7*:3 8:3
        = stale
        i5 tcp 127.0.0.1:80 by 7*:3 8:3
        ",
    );
    check(
        "
        snap 5
          c1 i5 tcp 127.0.0.1:80 by 7:3
        exec 20 7 web
        snap 15
          c1 i5 tcp 127.0.0.1:80 by 7:3
        ",
        "
        20 holders i5 tcp 127.0.0.1:80 by 7web*:3
        = stale
        i5 tcp 127.0.0.1:80 by 7web*:3
        ",
    );
}

#[test]
fn an_exec_renames_the_holder() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7~
        exec 20 7 web
        exec 20 7 web
        exec 15 7 sh
        exec 30 7 web
        exec 30 9 other
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        20 holders i5 tcp 127.0.0.1:80 since 10 by 7web*
        = stale
        i5 tcp 127.0.0.1:80 since 10 by 7web*
        ",
    );
}

#[test]
fn the_last_holder_exits_then_the_close_follows() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7~
        exit 20 7
        close 21 c1
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        21 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        =
        ",
    );
    check(
        "
        exit 20 7
        open 10 c1 i5 tcp 127.0.0.1:80 by 7~
        close 21 c1
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        21 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        =
        ",
    );
}

#[test]
fn the_last_holder_exits_and_the_listener_stays_a_ghost() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        exit 20 7
        snap 30
          c1 i5 tcp 127.0.0.1:80
        snap 40
          c1 i5 tcp 127.0.0.1:80
        close 50 c1
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        30 holders i5 tcp 127.0.0.1:80 since 10 ghost
        50 closed i5 tcp 127.0.0.1:80 since 10 ghost by 7
        =
        ",
    );
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        exit 20 7
        snap 15
          c1 i5 tcp 127.0.0.1:80 by 7:3
        snap 30
          c1 i5 tcp 127.0.0.1:80 by 9:3
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        30 holders i5 tcp 127.0.0.1:80 since 10 by 9*:3
        =
        i5 tcp 127.0.0.1:80 since 10 by 9*:3
        ",
    );
}

#[test]
fn the_binder_stays_the_binder() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 9
        snap 20
          c1 i5 tcp 127.0.0.1:80 by 7:3 9:3
        snap 30
          c1 i5 tcp 127.0.0.1:80 by 7:3
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 9*
        20 holders i5 tcp 127.0.0.1:80 since 10 by 7:3 9*:3
        30 holders i5 tcp 127.0.0.1:80 since 10 by 7*:3
        =
        i5 tcp 127.0.0.1:80 since 10 by 7*:3
        ",
    );
}

#[test]
fn a_pid_used_again_within_one_tick_is_not_the_dead_process() {
    check(
        "
        exit 5 7~
        open 10 c1 i5 tcp 127.0.0.1:80 by 7~~
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        = stale
        i5 tcp 127.0.0.1:80 since 10 by 7*
        ",
    );
}

#[test]
fn what_is_in_doubt_is_in_doubt_of_its_own_sockets() {
    let script = "
        snap 5
          c1 i5 tcp 127.0.0.1:80 by 7:3
        open 10 c2 i6 tcp 127.0.0.1:81 by 8
        ";
    let mut table = Table::new();
    parse(script).into_iter().for_each(|event| drop(table.apply(event)));
    let about = |table: &Table, port: u16| table.is_stale_about(&|socket| socket.port == port);
    assert_eq!([80, 81].map(|port| about(&table, port)), [false, true]);
    // Of what is not known whom it concerns, everything is in doubt.
    parse("unsure 20").into_iter().for_each(|event| drop(table.apply(event)));
    assert_eq!([80, 81, 82].map(|port| about(&table, port)), [true; 3]);
}
