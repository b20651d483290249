//! `watch` tells what happens, and what it tells adds up to the truth.

use crate::puppet::Stage;
use crate::subject::{command, finish, portwatch, skip};
use crate::watcher::Watch;
use crate::{Test, test, test_each_probe, test_each_tier};

/// With `pause` called between the steps.
fn holders_follow(probe: &str, pause: fn(&mut Watch)) {
    let mut watch = Watch::start(probe);
    let stage = Stage::new();
    let parent = stage.puppet();
    let sock = parent.serve();
    watch.until_true("listen", &stage, &[&parent]);
    pause(&mut watch);
    let child = parent.fork();
    watch.until_true("fork", &stage, &[&parent, &child]);
    pause(&mut watch);
    child.exec();
    watch.until_true("exec", &stage, &[&parent, &child]);
    pause(&mut watch);
    let second = child.fork();
    watch.until_true("fork of the child", &stage, &[&parent, &child, &second]);
    child.set_cloexec(sock.fd, true);
    pause(&mut watch);
    child.exec();
    watch.until_true("exec with close-on-exec", &stage, &[&parent, &child, &second]);
    child.tcp("[::]:0", "dual cloexec");
    watch.until_true("another listener", &stage, &[&parent, &child, &second]);
    pause(&mut watch);
    child.exec();
    watch.until_true("exec that closes the last descriptor", &stage, &[&parent, &child, &second]);
    pause(&mut watch);
    parent.exit();
    watch.until_true("exit of the parent", &stage, &[&child, &second]);
    pause(&mut watch);
    second.exit();
    watch.until_true("exit of the last holder", &stage, &[&child]);
    assert!(watch.rows(&stage).is_empty());
    assert_eq!(watch.lost, 0);
}

fn every_kind_of_socket(probe: &'static str) {
    let mut watch = Watch::start(probe);
    let stage = Stage::new();
    let (one, two) = (stage.puppet(), stage.puppet());
    let far = stage.puppet();
    // Where it may not, it does as well as a neighbour.
    let _ = far.unshare_net();
    let all = &[&one, &two, &far];
    // Each change is an event of its own. Polling sees what is there at its next look: one look for all of a kind.
    let is_polling = probe == "poll";
    let mut look = |step: &str, is_last: bool| {
        if is_last || !is_polling {
            watch.until_true(step, &stage, all);
        }
    };
    let mut fds = Vec::new();
    let mut twin = None;
    for (address, flags) in [
        ("127.0.0.1:0", ""),
        ("0.0.0.0:0", ""),
        ("[::1]:0", ""),
        ("[::]:0", "v6only"),
        ("[::]:0", "dual"),
        ("[::ffff:127.0.0.1]:0", "dual"),
        ("127.0.0.1:0", "reuseport"),
    ] {
        let sock = one.tcp(address, flags);
        fds.push(sock.fd);
        look(&format!("listen {address} {flags}"), false);
        if flags == "reuseport" {
            twin = Some(two.tcp(&sock.address.to_string(), flags));
            look("the twin", false);
        }
    }
    for (address, flags) in [("127.0.0.1:0", ""), ("[::1]:0", "v6only"), ("[::]:0", "dual")] {
        fds.push(one.udp(address, flags).fd);
        look(&format!("udp {address} {flags}"), false);
    }
    let auto = one.socket("tcp4", "");
    one.listen(auto.fd);
    look("listen without bind", false);
    let mptcp = one.try_tcp("127.0.0.1:0", "mptcp");
    if let Err(refused) = &mptcp {
        skip("mptcp", &refused.text);
    }
    look("MPTCP", false);
    let distant = far.tcp("127.0.0.1:8000", "");
    look("listen in another network namespace", true);
    two.close(twin.expect("the one with SO_REUSEPORT").fd);
    look("the end of the twin", false);
    one.shutdown(auto.fd);
    look("shutdown", false);
    if let Ok(sock) = mptcp {
        one.close(sock.fd);
        look("the end of MPTCP", false);
    }
    far.close(distant.fd);
    look("close in another network namespace", true);
    one.listen(auto.fd);
    look("listen again", true);
    for fd in fds {
        one.close(fd);
    }
    look("closing everything", true);
}

fn a_passed_descriptor(probe: &'static str) {
    let mut watch = Watch::start(probe);
    let stage = Stage::new();
    let (giver, taker) = (stage.puppet(), stage.puppet());
    taker.open_mailbox();
    let sock = giver.serve();
    watch.until_true("listen", &stage, &[&giver, &taker]);
    giver.send_fd(sock.fd, &taker);
    taker.receive_fd();
    giver.exit();
    watch.until_true("the end of the giver", &stage, &[&taker]);
    taker.exit();
    let event = watch.until_event("close", sock.inode);
    assert_eq!(event["listener"]["port"], sock.port());
}

fn a_zombie_leader(probe: &'static str) {
    let mut watch = Watch::start(probe);
    let stage = Stage::new();
    let puppet = stage.puppet();
    puppet.serve();
    watch.until_true("listen", &stage, &[&puppet]);
    puppet.serve_from_thread();
    let late = puppet.serve();
    watch.until_true("listen by a thread whose leader exited", &stage, &[&puppet]);
    puppet.close(late.fd);
    watch.until_true("close by such a thread", &stage, &[&puppet]);
}

fn events_name_who_did_it(tier: &'static str) {
    let mut watch = Watch::start(tier);
    let stage = Stage::new();
    let parent = stage.puppet();
    parent.set_name(b"opener");
    let sock = parent.serve();
    let event = watch.until_event("open", sock.inode);
    assert_eq!(event["process"]["pid"], parent.pid, "{event}");
    assert_eq!(event["process"]["name"], "opener", "{event}");
    assert_eq!(event["listener"]["holders"][0]["binder"], true, "{event}");
    assert_eq!(event["listener"]["port"], sock.port());
    let (time, since) = (event["time"].as_str().expect("a time"), &event["listener"]["since"]);
    assert!(time.ends_with('Z') && since.as_str() == Some(time), "{event}");
    parent.close(sock.fd);
    watch.until_event("close", sock.inode);
    // The kernel releases a socket in whoever lets go of it last. That is the watcher itself where it looks at the descriptor
    // in that very moment, and then nobody can tell who closed it: once more.
    let closed_by_child = |_| {
        let sock = parent.serve();
        watch.until_event("open", sock.inode);
        let child = parent.fork();
        watch.until_true("fork", &stage, &[&parent, &child]);
        parent.close(sock.fd);
        child.set_name(b"closer");
        child.close(sock.fd);
        let event = watch.until_event("close", sock.inode);
        let by = &event["process"]["pid"];
        assert!(*by == child.pid || *by == parent.pid, "{event}");
        (*by == child.pid).then_some(child)
    };
    let child = (0..10).find_map(closed_by_child).expect("the closer was never named");
    // A child that inherits and closes is not the one who listens.
    let other = child.serve();
    let event = watch.until_event("open", other.inode);
    assert_eq!(event["process"]["pid"], child.pid, "{event}");
    child.exit();
    watch.until_event("close", other.inode);
}

fn a_failed_listen(tier: &'static str) {
    let mut watch = Watch::start(tier);
    let stage = Stage::new();
    let (owner, loser) = (stage.puppet(), stage.puppet());
    // Both may bind (SO_REUSEADDR, neither listens yet); the second to listen fails.
    let first = owner.bind("127.0.0.1:0", "reuseaddr");
    let second = loser.bind(&first.address.to_string(), "reuseaddr");
    owner.listen(first.fd);
    let refused = loser.attempt(&format!("listen {}", second.fd)).expect_err("the address is in use");
    assert_eq!(refused.errno, nix::libc::EADDRINUSE, "{}", refused.text);
    watch.until_true("a listen that failed", &stage, &[&owner, &loser]);
    let last = owner.serve();
    watch.until_event("open", last.inode);
    assert_eq!(watch.rows(&stage).len(), 2);
}

fn conflicts_are_told(tier: &'static str) {
    if tier == "tracepoint" {
        return skip("conflicts", "failed binds are only seen by trampolines and kprobes");
    }
    let mut watch = Watch::start(tier);
    let stage = Stage::new();
    let (owner, loser) = (stage.puppet(), stage.puppet());
    let sock = owner.serve();
    watch.until_event("open", sock.inode);
    let refused = loser.try_tcp(&sock.address.to_string(), "").expect_err("the address is in use");
    assert_eq!(refused.errno, nix::libc::EADDRINUSE);
    let event = watch.until("the conflict", |event| event["event"] == "conflict");
    assert_eq!(event["process"]["pid"], loser.pid, "{event}");
    assert_eq!(event["errno"], nix::libc::EADDRINUSE, "{event}");
    assert_eq!(event["listener"]["port"], sock.port(), "{event}");
    assert_eq!(event["listener"]["holders"][0]["pid"], owner.pid, "{event}");
}

fn v6only_is_true_or_unknown(probe: &'static str) {
    let mut watch = Watch::start(probe);
    let stage = Stage::new();
    let puppet = stage.puppet();
    // Of every address: the kernel itself sets the mark on a socket that is bound to one IPv6 address.
    for (flags, v6only) in [("v6only", true), ("dual", false)] {
        for sock in [puppet.tcp("[::]:0", flags), puppet.udp("[::]:0", flags)] {
            let event = watch.until_event("open", sock.inode);
            let told = event["listener"]["v6only"].as_bool();
            assert!(told.is_none_or(|told| told == v6only), "{flags}: {event}");
            let run = portwatch(&["--probe", probe, "list", "--json", &sock.port().to_string()]).expect(0);
            let told = run.json()[0]["v6only"].as_bool();
            assert!(told.is_none_or(|told| told == v6only), "{flags}: {}", run.text());
        }
    }
}

fn selectors_narrow(probe: &'static str) {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let wanted = puppet.bind("127.0.0.1:0", "");
    let target = format!("{}/tcp", wanted.port());
    let mut watch = Watch::spawn(command(&["--probe", probe, "watch", "--json", &target]));
    watch.wait_until_ready(probe);
    puppet.serve();
    puppet.listen(wanted.fd);
    let event = watch.next("the wanted one");
    assert_eq!((&event["event"], &event["listener"]["port"]), (&"open".into(), &wanted.port().into()));
}

pub fn trials() -> Vec<Test> {
    let mut tests = [
        test_each_probe("watch::holders_follow_fork_exec_and_exit_at_once", |probe| holders_follow(probe, |_| {})),
        test_each_tier("watch::holders_follow_each_of_fork_exec_and_exit_by_itself", |tier| {
            holders_follow(tier, Watch::settle);
        }),
        test_each_probe("watch::every_kind_of_socket_opens_and_closes", every_kind_of_socket),
        test_each_probe("watch::a_descriptor_passed_on_is_found_with_its_new_holder", a_passed_descriptor),
        test_each_probe("watch::a_thread_serves_after_its_leader_exited", a_zombie_leader),
        test_each_tier("watch::events_name_the_process_that_did_it", events_name_who_did_it),
        test_each_probe("watch::a_listen_that_fails_is_no_listener", a_failed_listen),
        test_each_tier("watch::conflicts_name_the_loser_and_the_holder", conflicts_are_told),
        test_each_probe("watch::whether_ipv4_is_refused_is_told_truly_or_not_at_all", v6only_is_true_or_unknown),
        test_each_probe("watch::selectors_narrow_what_is_told", selectors_narrow),
    ]
    .into_iter()
    .flatten()
    .collect::<Vec<_>>();
    tests.extend([
        test("watch::it_ends_with_zero_after_its_time_and_at_ctrl_c", || {
            portwatch(&["watch", "--for", "10ms"]).expect(0);
            let mut watch = Watch::start("poll");
            assert!(watch.line_within(std::time::Duration::ZERO).is_none_or(|line| line.ends_with('\n')));
            assert_eq!(watch.interrupt(), Some(0));
        }),
        test("watch::polling_is_said_plainly_in_one_line", || {
            let run = portwatch(&["--probe", "poll", "watch", "--for", "10ms"]).expect(0);
            assert_eq!(run.errors().lines().count(), 1, "{}", run.errors());
            assert!(run.errors().contains("poll"), "{}", run.errors());
        }),
        test("watch::a_reader_that_went_away_is_no_error", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            let mut child = command(&["watch", "--json"]).spawn().expect("portwatch");
            drop(child.stdout.take());
            let errors = child.stderr.take().expect("piped");
            let mut reader = std::io::BufReader::new(errors);
            let mut line = String::new();
            std::io::BufRead::read_line(&mut reader, &mut line).expect("stderr");
            puppet.serve();
            let run = finish(child);
            assert_eq!(run.code, Some(0), "{line} {}", run.errors());
        }),
    ]);
    tests
}
