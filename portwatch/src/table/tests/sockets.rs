//! Which socket is which, when it listens, and what is in the way of another.

use super::check;

#[test]
fn a_listener_opens_and_closes() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 backlog 9 by 7
        close 20 c1 i5 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 backlog 9 since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 backlog 9 since 10 by 7* by 7
        =
        ",
    );
}

#[test]
fn duplicates_change_nothing() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        close 20 c1 i5 by 7
        close 20 c1 i5 by 7
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        =
        ",
    );
}

#[test]
fn listening_again_on_the_same_address_only_sets_the_backlog() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 backlog 9 by 7
        open 12 c1 i5 tcp 127.0.0.1:80 backlog 20 by 7
        open 11 c1 i5 tcp 127.0.0.1:80 backlog 15 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 backlog 9 since 10 by 7*
        = stale
        i5 tcp 127.0.0.1:80 backlog 20 since 10 by 7*
        ",
    );
}

#[test]
fn a_close_that_comes_before_its_open_is_told_after_it() {
    check(
        "
        close 20 c1 i5
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        =
        ",
    );
}

#[test]
fn a_listen_that_fails_is_no_row() {
    check(
        "
        close 20 c1 by 7
        ",
        "
        =
        ",
    );
}

#[test]
fn closing_and_listening_again_out_of_order() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        open 30 c1 i5 tcp 127.0.0.1:80 by 7
        close 20 c1 i5 by 7
        close 20 c1 i5 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        30 opened i5 tcp 127.0.0.1:80 since 30 by 7*
        = stale
        i5 tcp 127.0.0.1:80 since 30 by 7*
        ",
    );
    check(
        "
        open 30 c1 i5 tcp 127.0.0.1:80 by 7
        close 20 c1 i5 by 7
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        ",
        "
        30 opened i5 tcp 127.0.0.1:80 since 30 by 7*
        = stale
        i5 tcp 127.0.0.1:80 since 30 by 7*
        ",
    );
}

#[test]
fn shutdown_then_listening_elsewhere() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        close 20 c1 i5 by 7
        open 30 c1 i5 tcp 127.0.0.1:81 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        30 opened i5 tcp 127.0.0.1:81 since 30 by 7*
        = stale
        i5 tcp 127.0.0.1:81 since 30 by 7*
        ",
    );
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        open 30 c1 i5 tcp 127.0.0.1:81 by 7
        close 20 c1 i5 by 7
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        30 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        30 opened i5 tcp 127.0.0.1:81 since 30 by 7*
        = stale
        i5 tcp 127.0.0.1:81 since 30 by 7*
        ",
    );
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        snap 30
          c1 i5 tcp 127.0.0.1:81 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        30 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        30 opened i5 tcp 127.0.0.1:81 by 7*
        =
        i5 tcp 127.0.0.1:81 by 7*
        ",
    );
}

#[test]
fn an_address_is_used_again_by_another_socket() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        close 20 c1 i5 by 7
        open 30 c2 i6 tcp 127.0.0.1:80 by 8
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        30 opened i6 tcp 127.0.0.1:80 since 30 by 8*
        = stale
        i6 tcp 127.0.0.1:80 since 30 by 8*
        ",
    );
    check(
        "
        snap 5
          c1 i5 tcp 127.0.0.1:80 by 7
        snap 50
          c2 i6 tcp 127.0.0.1:80 by 8
        ",
        "
        50 closed i5 tcp 127.0.0.1:80 by 7* by 7
        50 opened i6 tcp 127.0.0.1:80 by 8*
        =
        i6 tcp 127.0.0.1:80 by 8*
        ",
    );
}

#[test]
fn an_inode_is_used_again_by_another_socket() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        open 30 c2 i5 tcp 127.0.0.1:81 by 8
        close 20 c1 i5 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        30 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        30 opened i5 tcp 127.0.0.1:81 since 30 by 8*
        = stale
        i5 tcp 127.0.0.1:81 since 30 by 8*
        ",
    );
    check(
        "
        snap 25
          c1 i5 tcp 127.0.0.1:80 by 7
        snap 40 complete 9
          c2 i5 tcp 127.0.0.1:81 by 8
        ",
        "
        40 closed i5 tcp 127.0.0.1:80 by 7* by 7
        40 opened i5 tcp 127.0.0.1:81 by 8*
        =
        i5 tcp 127.0.0.1:81 by 8*
        ",
    );
    check(
        "
        open 30 c2 i5 tcp 127.0.0.1:81 by 8
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        close 20 c1 i5 by 7
        ",
        "
        30 opened i5 tcp 127.0.0.1:81 since 30 by 8*
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        = stale
        i5 tcp 127.0.0.1:81 since 30 by 8*
        ",
    );
}

#[test]
fn an_unknown_inode_is_learnt() {
    check(
        "
        open 10 c1 tcp 127.0.0.1:80 by 7
        snap 20
          c1 i5 tcp 127.0.0.1:80 by 7:3
        close 30 i5
        ",
        "
        10 opened i0 tcp 127.0.0.1:80 since 10 by 7*
        30 closed i5 tcp 127.0.0.1:80 since 10 by 7*:3 by 7
        =
        ",
    );
}

#[test]
fn the_halves_of_an_mptcp_listener_are_one_row() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 mptcp by 7
        open 11 c2 i5 tcp 127.0.0.1:80 by 7
        close 20 c2 i5 by 7
        close 21 c1 i5 by 7
        open 11 c2 i5 tcp 127.0.0.1:80 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 mptcp since 10 by 7*
        20 closed i5 tcp 127.0.0.1:80 mptcp since 10 by 7* by 7
        =
        ",
    );
    check(
        "
        open 11 c2 i5 tcp 127.0.0.1:80 by 7
        open 10 c1 i5 tcp 127.0.0.1:80 mptcp by 7
        close 21 c1 by 7
        close 20 c2 by 7
        ",
        "
        11 opened i5 tcp 127.0.0.1:80 since 11 by 7*
        21 closed i5 tcp 127.0.0.1:80 mptcp since 10 by 7* by 7
        =
        ",
    );
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 mptcp by 7
        snap 20
          c2 i5 tcp 127.0.0.1:80 mptcp by 7:3
          c1 i5 tcp 127.0.0.1:80 mptcp by 7:3
        close 30 c2
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 mptcp since 10 by 7*
        30 closed i5 tcp 127.0.0.1:80 mptcp since 10 by 7*:3 by 7
        =
        ",
    );
    check(
        "
        snap 20
          c1 i5 tcp 127.0.0.1:80 mptcp by 7:3
          c2 i5 tcp 127.0.0.1:80 by 7:3
        snap 30
          c2 i5 tcp 127.0.0.1:80 by 7:3
        ",
        "
        =
        i5 tcp 127.0.0.1:80 mptcp by 7*:3
        ",
    );
}

#[test]
fn reuseport_twins_are_two_rows() {
    check(
        "
        open 10 c1 i5 tcp 127.0.0.1:80 by 7
        open 11 c2 i6 tcp 127.0.0.1:80 by 8
        close 20 c1 i5 by 7
        ",
        "
        10 opened i5 tcp 127.0.0.1:80 since 10 by 7*
        11 opened i6 tcp 127.0.0.1:80 since 11 by 8*
        20 closed i5 tcp 127.0.0.1:80 since 10 by 7* by 7
        = stale
        i6 tcp 127.0.0.1:80 since 11 by 8*
        ",
    );
}

#[test]
fn a_conflict_names_the_closest_listener_in_the_way() {
    check(
        "
        open 10 c1 i1 tcp [::]:80 dual by 7
        refuse 20 tcp 0.0.0.0:80 by 9
        refuse 20 tcp 0.0.0.0:80 by 9
        refuse 21 tcp 127.0.0.1:80 by 9
        refuse 22 tcp [::1]:80 by 9
        refuse 23 udp 0.0.0.0:80 by 9
        refuse 24 tcp 0.0.0.0:81 by 9
        refuse 25 tcp 0.0.0.0:80 ns 2 by 9
        close 30 c1
        ",
        "
        10 opened i1 tcp [::]:80 since 10 by 7*
        20 conflict tcp 0.0.0.0:80 by 9: i1 tcp [::]:80 since 10 by 7*
        21 conflict tcp 127.0.0.1:80 by 9: i1 tcp [::]:80 since 10 by 7*
        22 conflict tcp [::1]:80 by 9: i1 tcp [::]:80 since 10 by 7*
        23 conflict udp 0.0.0.0:80 by 9: ?
        24 conflict tcp 0.0.0.0:81 by 9: ?
        25 conflict tcp 0.0.0.0:80 by 9: ?
        30 closed i1 tcp [::]:80 since 10 by 7* by 7
        =
        ",
    );
    check(
        "
        open 10 c1 i1 tcp [::]:80 v6only by 7
        open 11 c2 i2 tcp 0.0.0.0:80 by 8
        refuse 20 tcp 127.0.0.1:80 by 9
        refuse 21 tcp [::]:80 by 9
        refuse 22 tcp [::1]:80 by 9
        close 30 c2
        refuse 31 tcp 127.0.0.1:80 by 9
        refuse 32 tcp [::ffff:127.0.0.1]:80 by 9
        close 33 c1
        ",
        "
        10 opened i1 tcp [::]:80 v6only since 10 by 7*
        11 opened i2 tcp 0.0.0.0:80 since 11 by 8*
        20 conflict tcp 127.0.0.1:80 by 9: i2 tcp 0.0.0.0:80 since 11 by 8*
        21 conflict tcp [::]:80 by 9: i1 tcp [::]:80 v6only since 10 by 7*
        22 conflict tcp [::1]:80 by 9: i1 tcp [::]:80 v6only since 10 by 7*
        30 closed i2 tcp 0.0.0.0:80 since 11 by 8* by 8
        31 conflict tcp 127.0.0.1:80 by 9: ?
        32 conflict tcp [::ffff:127.0.0.1]:80 by 9: ?
        33 closed i1 tcp [::]:80 v6only since 10 by 7* by 7
        =
        ",
    );
    check(
        "
        open 10 c1 i1 tcp 127.0.0.1:80 by 7
        open 11 c2 i2 tcp 127.0.0.2:80 by 8
        refuse 20 tcp 127.0.0.2:80 by 9
        refuse 21 tcp 127.0.0.3:80 by 9
        refuse 22 tcp 0.0.0.0:80 by 9
        refuse 23 tcp [::]:80 by 9
        close 30 c1
        close 30 c2
        ",
        "
        10 opened i1 tcp 127.0.0.1:80 since 10 by 7*
        11 opened i2 tcp 127.0.0.2:80 since 11 by 8*
        20 conflict tcp 127.0.0.2:80 by 9: i2 tcp 127.0.0.2:80 since 11 by 8*
        21 conflict tcp 127.0.0.3:80 by 9: ?
        22 conflict tcp 0.0.0.0:80 by 9: i1 tcp 127.0.0.1:80 since 10 by 7*
        23 conflict tcp [::]:80 by 9: i1 tcp 127.0.0.1:80 since 10 by 7*
        30 closed i1 tcp 127.0.0.1:80 since 10 by 7* by 7
        30 closed i2 tcp 127.0.0.2:80 since 11 by 8* by 8
        =
        ",
    );
}

#[test]
fn an_auto_bound_listener_has_its_final_port() {
    check(
        "
        open 10 c1 i5 udp 0.0.0.0:40000 by 7
        snap 20
          c1 i5 udp 0.0.0.0:40000 by 7:3
        ",
        "
        10 opened i5 udp 0.0.0.0:40000 since 10 by 7*
        =
        i5 udp 0.0.0.0:40000 since 10 by 7*:3
        ",
    );
}
