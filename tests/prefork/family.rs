//! `--tree` and `--group`: relatives of a holder that do not have the port, and nobody else.

use std::collections::BTreeSet;

use nix::libc;
use serde_json::{Value, json};

use crate::gate::{self, Moment};
use crate::puppet::{Puppet, Refused, Sock, Stage};
use crate::subject::{binary, command, portwatch, skip};
use crate::{Test, test};

fn target(sock: &Sock) -> String {
    format!("{}/tcp", sock.port())
}

#[track_caller]
fn assert_killed(outcomes: &Value, puppets: &[&Puppet]) {
    let outcome = &outcomes[0];
    let killed: Option<BTreeSet<u64>> =
        outcome["killed"].as_array().map(|pids| pids.iter().filter_map(Value::as_u64).collect());
    assert_eq!(killed, Some(puppets.iter().map(|puppet| u64::from(puppet.pid)).collect()), "{outcomes}");
    assert_eq!((&outcome["status"], &outcome["still_listening"]), (&json!("cleaned"), &json!(false)), "{outcomes}");
    assert_eq!(outcome["failed"], json!([]), "{outcomes}");
    for puppet in puppets {
        puppet.wait();
    }
}

/// A master with a socket, a child and a grandchild without, and a bystander.
struct Tree {
    master: Puppet,
    sock: Sock,
    child: Puppet,
    grandchild: Puppet,
    bystander: Puppet,
}

impl Tree {
    fn new(stage: &Stage) -> Tree {
        let (master, bystander) = (stage.puppet(), stage.puppet());
        let child = master.fork();
        let grandchild = child.fork();
        let sock = master.serve();
        bystander.serve();
        Tree { master, sock, child, grandchild, bystander }
    }
}

pub(super) fn trials() -> Vec<Test> {
    vec![
        test("tree::without_it_only_holders_end", || {
            let tree = Tree::new(&Stage::new());
            let run = portwatch(&["kill", &target(&tree.sock), "--json"]).expect(0);
            assert_killed(&run.json(), &[&tree.master]);
            assert!(tree.child.is_alive() && tree.grandchild.is_alive() && tree.bystander.is_alive());
        }),
        test("tree::descendants_end_after_the_holder_and_nobody_else", || {
            let tree = Tree::new(&Stage::new());
            let mut order = Vec::new();
            let run = gate::signals(command(&["kill", &target(&tree.sock), "--tree", "--json"]), |pid, _| {
                order.push((pid, tree.master.is_alive(), tree.child.is_alive()));
            });
            assert_killed(&run.expect(0).json(), &[&tree.master, &tree.child, &tree.grandchild]);
            let expected =
                [(tree.master.pid, true, true), (tree.child.pid, false, true), (tree.grandchild.pid, false, false)];
            assert_eq!(order, expected);
            assert!(tree.bystander.is_alive());
        }),
        test("tree::a_descendant_whose_leader_exited_ends_as_well", || {
            let tree = Tree::new(&Stage::new());
            // Its main thread is a zombie, and it serves on another port.
            tree.child.serve_from_thread();
            tree.child.await_state('Z');
            let run = portwatch(&["kill", &target(&tree.sock), "--tree", "--json"]).expect(0);
            assert_killed(&run.json(), &[&tree.master, &tree.child, &tree.grandchild]);
            assert!(tree.bystander.is_alive());
        }),
        test("tree::with_force_all_end_and_the_holder_first", || {
            let tree = Tree::new(&Stage::new());
            let mut order = Vec::new();
            let run =
                gate::signals(command(&["kill", &target(&tree.sock), "--tree", "-9", "--json"]), |pid, signal| {
                    order.push((pid, signal));
                });
            assert_killed(&run.expect(0).json(), &[&tree.master, &tree.child, &tree.grandchild]);
            let pids = [tree.master.pid, tree.child.pid, tree.grandchild.pid];
            assert_eq!(order, pids.map(|pid| (pid, libc::SIGKILL)));
            assert!(tree.bystander.is_alive());
        }),
        test("tree::one_forked_after_the_plan_ends_as_well", || {
            let tree = Tree::new(&Stage::new());
            let (run, late) = gate::run(
                command(&["kill", &target(&tree.sock), "--tree", "--json"]),
                Moment::Before(libc::SYS_pidfd_send_signal),
                |_| true,
                || tree.child.fork(),
            );
            let late = late.expect("a signal");
            assert_killed(&run.expect(0).json(), &[&tree.master, &tree.child, &tree.grandchild, &late]);
            assert!(tree.bystander.is_alive());
        }),
        test("tree::one_whose_parent_ended_meanwhile_ends_as_well", || {
            let stage = Stage::new();
            let Tree { master, sock, child, grandchild, bystander } = Tree::new(&stage);
            let (run, _) = gate::run(
                command(&["kill", &target(&sock), "--tree", "--json"]),
                Moment::Before(libc::SYS_pidfd_send_signal),
                |_| true,
                || child.exit(),
            );
            let outcomes = run.expect(0).json();
            let killed = outcomes[0]["killed"].as_array().expect("killed");
            assert!([&master, &grandchild].iter().all(|puppet| killed.contains(&json!(puppet.pid))), "{outcomes}");
            master.wait();
            grandchild.wait();
            assert!(bystander.is_alive());
        }),
        test("tree::a_bystander_with_the_recycled_pid_of_a_descendant_lives", || {
            for moment in [
                Moment::Before(libc::SYS_pidfd_open),
                Moment::After(libc::SYS_pidfd_open),
                Moment::Before(libc::SYS_pidfd_send_signal),
            ] {
                let stage = Stage::new();
                let Tree { master, sock, child, grandchild, bystander } = Tree::new(&stage);
                let recycled = grandchild.pid;
                let is_open = moment != Moment::Before(libc::SYS_pidfd_send_signal);
                let (run, stranger) = gate::run(
                    command(&["kill", &target(&sock), "--tree", "--json"]),
                    moment,
                    |pid| !is_open || pid == u64::from(recycled),
                    || {
                        grandchild.exit();
                        // Its parent ignores SIGCHLD: the kernel gives the number back an instant after the end.
                        let busy = |tried: &Result<Puppet, Refused>| {
                            tried.as_ref().is_err_and(|refused| refused.errno == libc::EEXIST)
                        };
                        let mut tries = (0..10_000).map(|_| bystander.fork_as(recycled));
                        tries.find(|tried| !busy(tried)).expect("the number of a process that ended")
                    },
                );
                let stranger = match stranger.expect("kill comes there") {
                    Ok(stranger) => stranger,
                    Err(refused) => return skip("kernel", &format!("no PID can be chosen here: {}", refused.text)),
                };
                assert_eq!(run.expect(0).json()[0]["status"], "cleaned");
                master.wait();
                child.wait();
                stranger.serve();
                assert!(stranger.is_alive() && bystander.is_alive());
            }
        }),
        test("tree::one_that_ignores_sigterm_is_forced_after_the_grace", || {
            let tree = Tree::new(&Stage::new());
            tree.grandchild.ignore_term();
            let run = portwatch(&["kill", &target(&tree.sock), "--tree", "--json", "--grace", "300ms"]).expect(0);
            assert_eq!(run.json()[0]["forced"], json!([tree.grandchild.pid]), "{}", run.text());
            assert_killed(&run.json(), &[&tree.master, &tree.child, &tree.grandchild]);
        }),
        test("tree::portwatch_below_the_holder_spares_itself_and_its_ancestors", || {
            let stage = Stage::new();
            let shell = stage.puppet();
            let sibling = shell.fork();
            let sock = shell.tcp("127.0.0.1:0", "cloexec");
            let program = binary().to_str().expect("a path without surprises").to_owned();
            let (code, output) = shell.run(&program, &["kill", &target(&sock), "--tree", "--json"]);
            let outcomes: Value = serde_json::from_slice(&output).expect("JSON");
            assert_eq!((code, &outcomes[0]["killed"]), (1, &json!([])), "{outcomes}");
            assert!(shell.is_alive() && sibling.is_alive(), "who is refused has no relatives");
        }),
        test("group::every_member_is_signalled_at_once_and_no_other_group", || {
            let stage = Stage::new();
            let (leader, bystander) = (stage.puppet(), stage.puppet());
            leader.lead_group();
            let (server, mate) = (leader.fork(), leader.fork());
            // Of the same family, and of another group.
            let daemon = leader.fork();
            daemon.lead_group();
            let sock = server.serve();
            let mut signalled = BTreeSet::new();
            let run = gate::signals(command(&["kill", &target(&sock), "--group", "--json"]), |pid, _| {
                signalled.insert(pid);
            });
            assert_killed(&run.expect(0).json(), &[&leader, &server, &mate]);
            assert_eq!(signalled, BTreeSet::from([leader.pid, server.pid, mate.pid]));
            assert!(daemon.is_alive() && bystander.is_alive());
        }),
        test("group::one_forked_after_the_plan_ends_as_well", || {
            let stage = Stage::new();
            let leader = stage.puppet();
            leader.lead_group();
            let mate = leader.fork();
            // So that somebody is there to be related to when the late one is looked for.
            mate.ignore_term();
            let sock = leader.serve();
            let (run, late) = gate::run(
                command(&["kill", &target(&sock), "--group", "--json", "--grace", "300ms"]),
                Moment::Before(libc::SYS_pidfd_send_signal),
                |_| true,
                || mate.fork(),
            );
            let late = late.expect("a signal");
            assert_killed(&run.expect(0).json(), &[&leader, &mate, &late]);
        }),
        test("group::one_that_left_it_meanwhile_lives", || {
            let stage = Stage::new();
            let leader = stage.puppet();
            leader.lead_group();
            let mate = leader.fork();
            let sock = leader.serve();
            let (run, _) = gate::run(
                command(&["kill", &target(&sock), "--group", "--json"]),
                Moment::After(libc::SYS_pidfd_open),
                |pid| pid == u64::from(mate.pid),
                || mate.lead_group(),
            );
            assert_killed(&run.expect(0).json(), &[&leader]);
            assert!(mate.is_alive());
        }),
        test("group::portwatchs_own_group_is_spared_but_for_the_holder", || {
            let stage = Stage::new();
            let shell = stage.puppet();
            shell.lead_group();
            let (server, sibling) = (shell.fork(), shell.fork());
            let sock = server.serve();
            let program = binary().to_str().expect("a path without surprises").to_owned();
            let (code, output) = shell.run(&program, &["kill", &target(&sock), "--group", "--json"]);
            assert_eq!(code, 0);
            assert_killed(&serde_json::from_slice(&output).expect("JSON"), &[&server]);
            assert!(shell.is_alive() && sibling.is_alive());
        }),
    ]
}
