//! Listeners picked by where they come from, the same with and without an agent.

use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;

use super::{USER, Yard};
use crate::puppet::{Puppet, wait_readable};
use crate::subject::binary;
use crate::{Test, test};

/// The ports that `list` shows.
#[track_caller]
fn ports(yard: &Yard, arguments: &[&str]) -> BTreeSet<u16> {
    let run = yard.portwatch(&[&["list", "--json"], arguments].concat()).expect(0);
    run.json().as_array().expect("rows").iter().map(|row| row["port"].as_u64().expect("a port") as u16).collect()
}

/// A puppet with one more variable in its environment, whose parent has ended.
fn orphan(yard: &Yard, variable: (&str, &str)) -> Puppet {
    let (program, control) = yard.stage.recipe();
    let (name, value) = control.split_once('=').expect("a variable");
    let mut shell = yard.command("/bin/sh");
    // In a session that the shell began.
    shell.args(["-c", "setsid sh -c '\"$PROGRAM\" &'"]).env("PROGRAM", program).env(name, value);
    shell.env(variable.0, variable.1).stdout(Stdio::null()).stderr(Stdio::null());
    let mut shell = shell.spawn().expect("a shell");
    let puppet = yard.stage.admit();
    assert!(wait_readable(crate::subject::pidfd(&shell)) && shell.wait().expect("wait").success());
    puppet
}

fn is_session_leader_above() -> bool {
    let field = |pid: u32, number: usize| -> u32 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("an ancestor");
        let (_, rest) = stat.rsplit_once(") ").expect("a name");
        rest.split(' ').nth(number).and_then(|word| word.parse().ok()).expect("a number")
    };
    let own = std::process::id();
    let leader = field(own, 3);
    let parents = std::iter::successors(Some(own), |&pid| Some(field(pid, 1)).filter(|&parent| parent != 0));
    parents.into_iter().any(|pid| pid == leader)
}

fn all(with_agent: bool) {
    let Some(mut yard) = Yard::new(0, with_agent) else { return };
    let (parent, child) = (yard.server(0), yard.server(0));
    let one = parent.serve().port();
    let two = child.serve().port();
    let mark = yard.mark();
    let mark = mark.to_str().expect("a path").to_owned();
    let grandchild = child.fork();
    let three = grandchild.serve().port();
    let orphan = orphan(&yard, ("PORTWATCH_JOB", "a=b c"));
    let four = orphan.serve().port();
    // One that was there listens anew.
    let five = parent.serve().port();

    let host = yard.host.pid.to_string();
    let child_pid = child.pid.to_string();
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", child.pid)).expect("a cgroup");
    let cgroup = cgroup.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned);
    let but = format!("1-65535 --except {one} --except {two}-{two}/tcp,{four}/udp");
    for (arguments, want) in [
        (vec!["--since", &mark], vec![three, four]),
        (vec!["--since", "1h"], vec![one, two, three, four, five]),
        (vec!["--since", "1ms", "--older-than", "1h"], vec![]),
        (vec!["--env", "PORTWATCH_JOB"], vec![four]),
        (vec!["--env", "PORTWATCH_JOB=a=b c"], vec![four]),
        (vec!["--env", "PORTWATCH_JOB=a"], vec![]),
        (vec!["--env", "PORTWATCH_JO"], vec![]),
        (vec!["--descendant-of", &host], vec![one, two, three, five]),
        // It holds its parent's, too.
        (vec!["--descendant-of", &child_pid], vec![two, three]),
        (vec!["--descendant-of", &child_pid, "--since", &mark], vec![three]),
        (vec!["--orphans", "--env", "PORTWATCH_JOB"], vec![four]),
        (vec!["--orphans", "--pid", &child_pid], vec![]),
        (but.split(' ').collect(), vec![three, four, five]),
    ] {
        // Where whoever began the session of these tests is gone, all of them are orphans.
        if arguments.contains(&"--orphans") && !is_session_leader_above() {
            continue;
        }
        assert_eq!(ports(&yard, &arguments), BTreeSet::from_iter(want), "{arguments:?}");
    }
    if let Some(cgroup) = cgroup.filter(|path| path != "/") {
        let below = format!("{}/nothing-here", cgroup.trim_end_matches('/'));
        assert_eq!(ports(&yard, &["--cgroup", &cgroup, &two.to_string()]), BTreeSet::from([two]));
        assert_eq!(ports(&yard, &["--cgroup", &below]), BTreeSet::new());
    }
    yard.portwatch(&["kill", &one.to_string(), "--except", &one.to_string()]).expect(2);
    yard.portwatch(&["list", "--descendant-of", "4194305"]).expect(2);
    yard.portwatch(&["history", "--orphans"]).expect(2);
    assert!(parent.is_alive());

    // Another user is not told what root's processes have in their environment, whoever reads it.
    fs::remove_file(yard.stage.path("portwatch")).expect("the link");
    fs::copy(binary(), yard.stage.path("portwatch")).expect("copying the binary");
    yard.uid = USER;
    assert_eq!(ports(&yard, &["--env", "PORTWATCH_JOB"]), BTreeSet::new());
}

pub fn trials() -> Vec<Test> {
    vec![
        test("mark::listeners_are_picked_by_where_they_come_from", || all(false)),
        test("mark::listeners_are_picked_by_where_they_come_from [agent]", || all(true)),
    ]
}
