//! `--netns ID`: what is there is found, and what cannot be seen never passes for nothing, alone and through the agent.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;

use serde_json::json;

use crate::Test;
use crate::agent::Agent;
use crate::faults::root_test;
use crate::oracle;
use crate::puppet::{Puppet, Stage};
use crate::subject::{Run, binary, finish, plain_command, portwatch, program, skip};

/// `nobody`: an ordinary user on every machine, by number.
const NOBODY: u32 = 65534;

/// Every way to ask what there is now.
const QUESTIONS: [&[&str]; 6] = [
    &["list"],
    &["who", "8000"],
    &["watch", "--for", "30s"],
    &["wait", "8000", "--free"],
    &["wait", "8000", "--bound", "--timeout", "0"],
    &["kill", "8000", "--json"],
];

fn namespace_of(puppet: &Puppet) -> String {
    let task = format!("/proc/{}", puppet.pid);
    oracle::namespace(task.as_ref()).expect("its namespace").to_string()
}

/// Told in one line, and nothing else.
#[track_caller]
fn check_refused(run: Run, code: i32, why: &str) {
    let run = run.expect(code);
    assert_eq!(run.text(), "");
    let lines = run.errors();
    let errors: Vec<&str> = lines.lines().filter(|line| line.contains("error: ")).collect();
    assert!(errors.len() == 1 && lines.lines().count() == 1 && errors[0].contains(why), "{lines}");
}

fn one_that_is_not_there(_: &Stage) {
    for question in QUESTIONS {
        for probe in ["auto", "poll"] {
            let run = portwatch(&[question, &["--netns", "1", "--probe", probe]].concat());
            // Where some processes are not even root's to see, it is not to be known.
            let code = if run.code == Some(3) { 3 } else { 2 };
            check_refused(run, code, "network namespace 1 ");
        }
    }
    let run = portwatch(&["diagnose", "8000", "--netns", "1"]);
    assert!(matches!(run.code, Some(2 | 3)), "{run:?}");
    // Among processes of its own alone, it is to be known.
    let Some(unshare) = program("unshare") else { return eprintln!("NOT TESTED: unshare is not to be had") };
    for question in QUESTIONS {
        let mut command = plain_command(&unshare, &["--fork", "--pid", "--mount-proc"]);
        command.arg(binary()).args(question).args(["--netns", "1"]);
        let why = "there is no network namespace 1 that can be seen from here; see lsns -t net";
        check_refused(finish(command.spawn().expect("unshare")), 2, why);
    }
}

fn one_that_may_not_be_seen(stage: &Stage) {
    let far = stage.puppet();
    assert!(far.unshare_net());
    let target = format!("{}/tcp", far.tcp("127.0.0.1:0", "").port());
    let netns = namespace_of(&far);
    let copy = stage.path("portwatch");
    fs::copy(binary(), &copy).expect("copying the binary");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("chmod");
    let as_nobody = |arguments: &[&str]| {
        let mut command = plain_command(&copy, &[arguments, &["--netns", &netns]].concat());
        command.uid(NOBODY).gid(NOBODY).current_dir("/");
        finish(command.spawn().expect("portwatch as nobody"))
    };
    for question in [&["list"][..], &["wait", &target, "--free"], &["kill", &target, "--json"], &["watch"]] {
        let run = as_nobody(question).expect(3);
        assert_eq!(run.text(), "");
        let why = format!("cannot find network namespace {netns} among those you may see");
        assert!(run.errors().contains(&why) && run.errors().contains("try sudo"), "{}", run.errors());
    }
    // Its own process is seen, and the namespace may not be entered all the same.
    far.become_user(NOBODY);
    let run = as_nobody(&["kill", &target, "--json"]);
    assert!(run.code == Some(3) && run.text().is_empty(), "{run:?}");
    assert!(far.is_alive());
}

fn the_agent_judges(stage: &Stage) {
    let agent = Agent::start(stage);
    let far = stage.puppet();
    assert!(far.unshare_net());
    let target = format!("{}/tcp", far.tcp("127.0.0.1:0", "").port());
    let netns = namespace_of(&far);
    for question in QUESTIONS {
        let run = agent.portwatch(&[question, &["--netns", "1"]].concat());
        let code = if run.code == Some(3) { 3 } else { 2 };
        check_refused(run, code, "network namespace 1 ");
    }
    // Nor does a client that need not ask it work on alone.
    let mut command = crate::agent::with_socket(&["kill", "8000", "--netns", "1"], &agent.socket);
    let run = finish(command.spawn().expect("portwatch"));
    let code = if run.code == Some(3) { 3 } else { 2 };
    if code == 2 {
        check_refused(run, code, "network namespace 1 ");
    }
    let mut client = agent.connect().hello();
    client.say(r#"{"request":"list","selection":{"netns":1}}"#);
    let answer = client.hear();
    if code == 2 {
        assert_eq!((&answer["kind"], &answer["netns"]), (&json!("usage"), &json!(1)), "{answer}");
    }
    // The connection goes on, and what was there once has a history.
    client.say(r#"{"request":"status"}"#);
    assert_eq!(client.hear()["response"], "status");
    agent.portwatch(&["history", "--netns", "1"]).expect(0);

    // An ordinary user is told of one that it could not see by itself.
    let copy = stage.path("portwatch");
    fs::copy(binary(), &copy).expect("copying the binary");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut command = plain_command(&copy, &["list", &target, "--netns", &netns, "--json", "--agent"]);
    command.env("PORTWATCH_SOCKET", &agent.socket).uid(NOBODY).gid(NOBODY).current_dir("/");
    let told = finish(command.spawn().expect("portwatch as nobody")).expect(0).json();
    assert_eq!(told[0]["holders"][0]["pid"], far.pid, "{told}");
    let free = agent.portwatch(&["kill", "1/tcp", "--netns", &netns, "--json"]).expect(0).json();
    assert_eq!(free[0]["status"], "free", "{free}");
    let killed = agent.portwatch(&["kill", &target, "--netns", &netns, "--json"]).expect(0).json();
    assert_eq!(killed[0]["status"], "cleaned", "{killed}");
    far.wait();
}

fn one_that_lives_on_by_a_socket(stage: &Stage) {
    let holders = portwatch(&["status", "--json"]).json()["holders"].clone();
    if holders != "task_file iterator" {
        return skip("kernel", "only the iterator sees into a namespace that nobody is in");
    }
    let agent = Agent::start(stage);
    let (heir, far) = (stage.puppet(), stage.puppet());
    assert!(far.unshare_net());
    let sock = far.tcp("127.0.0.1:0", "");
    let (target, netns) = (format!("{}/tcp", sock.port()), namespace_of(&far));
    heir.open_mailbox();
    far.send_fd(sock.fd, &heir);
    heir.receive_fd();
    far.exit();
    let asked = ["list", &target, "--netns", &netns, "--json"];
    for told in [portwatch(&asked).expect(0).json(), agent.portwatch(&asked).expect(0).json()] {
        assert_eq!(told[0]["holders"][0]["pid"], heir.pid, "{told}");
    }
    let free = portwatch(&["kill", "1/tcp", "--netns", &netns, "--json"]).expect(0).json();
    assert_eq!(free[0]["status"], "free", "{free}");
    let killed = portwatch(&["kill", &target, "--netns", &netns, "--json"]).expect(0).json();
    assert_eq!((&killed[0]["status"], &killed[0]["killed"]), (&json!("cleaned"), &json!([heir.pid])), "{killed}");
    heir.wait();
    // Now nothing shows that it was ever there.
    let run = portwatch(&asked);
    assert!(matches!(run.code, Some(2 | 3)), "{run:?}");
}

pub fn trials() -> Vec<Test> {
    vec![
        root_test("netns::one_that_is_not_there_is_no_free_port", one_that_is_not_there),
        root_test("netns::one_that_may_not_be_seen_is_no_free_port", one_that_may_not_be_seen),
        root_test("netns::the_agent_judges_what_it_sees_for_all", the_agent_judges),
        root_test("netns::one_that_lives_on_by_a_socket_alone_is_found", one_that_lives_on_by_a_socket),
    ]
}
