//! What a snapshot knows, and what it does not.

use super::check;

#[test]
fn a_snapshot_in_the_middle_of_a_burst() {
    check(
        "
        snap 5
        open 10 c1 i1 tcp 127.0.0.1:81 by 7
        open 52 c5 i5 tcp 127.0.0.1:85 by 7
        close 55 c6 i6
        snap 50
          c2 i2 tcp 127.0.0.1:82 by 7:3
          c4 i4 tcp 127.0.0.1:84 by 7:4
          c6 i6 tcp 127.0.0.1:86 by 7:6
        close 20 c1 i1 by 7
        open 30 c2 i2 tcp 127.0.0.1:82 by 7
        open 35 c3 i3 tcp 127.0.0.1:83 by 7
        close 40 c3 i3 by 7
        open 51 c4 i4 tcp 127.0.0.1:84 by 7
        open 45 c6 i6 tcp 127.0.0.1:86 by 7
        ",
        "
        10 opened i1 tcp 127.0.0.1:81 since 10 by 7*
        52 opened i5 tcp 127.0.0.1:85 since 52 by 7*
        50 closed i1 tcp 127.0.0.1:81 since 10 by 7* by 7
        50 opened i2 tcp 127.0.0.1:82 by 7*:3
        50 opened i4 tcp 127.0.0.1:84 by 7*:4
        35 opened i3 tcp 127.0.0.1:83 since 35 by 7*
        40 closed i3 tcp 127.0.0.1:83 since 35 by 7* by 7
        45 opened i6 tcp 127.0.0.1:86 since 45 by 7*
        55 closed i6 tcp 127.0.0.1:86 since 45 by 7* by 7
        = stale
        i5 tcp 127.0.0.1:85 since 52 by 7*
        i2 tcp 127.0.0.1:82 since 30 by 7*:3
        i4 tcp 127.0.0.1:84 since 51 by 7*:4
        ",
    );
}

#[test]
fn loss_then_resync() {
    check(
        "
        snap 5
          c1 i5 tcp 127.0.0.1:80 by 7
          c2 i6 tcp 127.0.0.1:81 ns 2 by 7
        snap 30 lost 3
          c3 i7 tcp 127.0.0.1:82 by 8
        snap 30 lost 3
          c3 i7 tcp 127.0.0.1:82 by 8
        snap 20 lost 1
        ",
        "
        30 resync lost 3
        30 closed i5 tcp 127.0.0.1:80 by 7* by 7
        30 closed i6 tcp 127.0.0.1:81 ns 2 by 7* by 7
        30 opened i7 tcp 127.0.0.1:82 by 8*
        20 resync lost 1
        =
        i7 tcp 127.0.0.1:82 by 8*
        ",
    );
}

#[test]
fn the_first_snapshot_is_not_news() {
    check(
        "
        snap 5
          c1 i5 tcp 127.0.0.1:80 by 7
          c2 i6 udp 0.0.0.0:53 since 3 by 7
        open 4 c1 i5 tcp 127.0.0.1:80 by 7
        snap 6
          c1 i5 tcp 127.0.0.1:80 by 7
          c2 i6 udp 0.0.0.0:53 by 7
          c3 i7 tcp 127.0.0.1:81 by 7
        ",
        "
        6 opened i7 tcp 127.0.0.1:81 by 7*
        =
        i5 tcp 127.0.0.1:80 since 4 by 7*
        i6 udp 0.0.0.0:53 since 3 by 7*
        i7 tcp 127.0.0.1:81 by 7*
        ",
    );
    check(
        "
        snap 5
          c1 i5 tcp 127.0.0.1:80 by 7 8
        open 9 c1 i5 tcp 127.0.0.1:80 backlog 9 by 8
        ",
        "
        =
        i5 tcp 127.0.0.1:80 backlog 9 by 7* 8
        ",
    );
}

#[test]
fn a_listener_of_another_namespace_is_a_ghost_when_no_holder_is_seen() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 ns 2 by 7
        snap 20
        snap 30
        close 40 c1
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 ns 2 since 10 by 7*
        20 holders i5 tcp 127.0.0.1:80 ns 2 since 10 ghost
        40 closed i5 tcp 127.0.0.1:80 ns 2 since 10 ghost by 7
        =
        ",
    );
    check(
        "
        snap 20
        open 10 c1 i5 tcp 127.0.0.1:80 ns 2 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 ns 2 since 10 by 7*
        = stale
        i5 tcp 127.0.0.1:80 ns 2 since 10 by 7*
        ",
    );
}

#[test]
fn a_late_open_and_close_are_told_but_make_no_row() {
    check(
        "
        snap 50
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        close 20 c1 i5 by 7
        open 30 c1 i5 tcp 127.0.0.1:81 by 7
        close 40 c1 i5
        close 40 c1 i5
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        30 opened i5 tcp 127.0.0.1:81 since 30 by 7*
        40 closed i5 tcp 127.0.0.1:81 since 30 by 7* by 7
        =
        ",
    );
    check(
        "
        snap 50
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        snap 60
        close 20 c1 i5 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        50 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        =
        ",
    );
    check(
        "
        snap 50
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        open 60 c1 i5 tcp 127.0.0.1:80 by 7
        close 20 c1 i5 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        50 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        60 opened i5 tcp 127.0.0.1:80 since 60 by 7*
        = stale
        i5 tcp 127.0.0.1:80 since 60 by 7*
        ",
    );
}

#[test]
fn a_close_older_than_a_snapshot_that_shows_the_socket_is_in_doubt() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        snap 30
          c1 i5 tcp 127.0.0.1:80 by 7:3
        close 20 c1 by 7
        snap 40
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 since 10 by 7*:3 by 7
        =
        ",
    );
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        snap 30
          c1 i5 tcp 127.0.0.1:80 by 7:3
        close 20 c1 by 7
        snap 40
          c1 i5 tcp 127.0.0.1:80 by 7:3
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        =
        i5 tcp 127.0.0.1:80 by 7*:3
        ",
    );
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        snap 30
          c1 i5 tcp 127.0.0.1:80 by 7:3
        close 20 c1 by 7
        open 25 c1 i5 tcp 127.0.0.1:80 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 since 10 by 7*:3 by 7
        25 opened i5 tcp 127.0.0.1:80 since 25 by 7*:3
        = stale
        i5 tcp 127.0.0.1:80 since 25 by 7*:3
        ",
    );
}

#[test]
fn unsure_asks_for_a_snapshot_begun_later() {
    check(
        "
        unsure 10
        snap 10
        ",
        "
        = stale
        ",
    );
    check(
        "
        unsure 10
        snap 11
        ",
        "
        =
        ",
    );
    check(
        "
        snap 11
        unsure 10
        ",
        "
        =
        ",
    );
}

#[test]
fn a_row_opened_while_the_snapshot_was_read_keeps_the_inode() {
    check(
        "
        open 30 c2 i5 tcp 127.0.0.1:81 by 8
        snap 20
          c1 i5 tcp 127.0.0.1:80 by 7:3
        ",
        "
        30 opened i5 tcp 127.0.0.1:81 since 30 by 8*
        = stale
        i5 tcp 127.0.0.1:81 since 30 by 8*
        ",
    );
}
