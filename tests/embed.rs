//! The examples of the library, run as they are.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::Command;

use crate::agent::Agent;
use crate::puppet::Stage;
use crate::subject::{Run, binary, finish, plain_command, skip};
use crate::{Test, test};

/// cargo builds examples beside the binary; a machine that has only the tests has none.
fn example(name: &str) -> Option<PathBuf> {
    let path = binary().with_file_name("examples").join(name);
    if !path.is_file() {
        skip("examples", &format!("{} was not built", path.display()));
        return None;
    }
    Some(path)
}

fn run(mut command: Command) -> Run {
    finish(command.spawn().expect("an example"))
}

pub fn trials() -> Vec<Test> {
    vec![
        test("embed::list_shows_who_has_a_port", || {
            let Some(list) = example("list") else { return };
            let stage = Stage::new();
            let puppet = stage.puppet();
            let port = puppet.serve().port();
            let told = run(plain_command(list, &[&port.to_string()])).expect(0).text();
            assert_eq!(told, format!("tcp 127.0.0.1 port {port}: [{}]\n", puppet.pid));
        }),
        test("embed::free_shows_its_plan_and_carries_it_out", || {
            let Some(free) = example("free") else { return };
            let stage = Stage::new();
            let puppet = stage.puppet();
            puppet.set_name(b"server");
            let port = puppet.serve().port().to_string();
            let plan = format!("would end {} (\"server\")\n", puppet.pid);
            assert_eq!(run(plain_command(&free, &[&port])).expect(0).text(), plan);
            assert!(puppet.is_alive());
            let told = run(plain_command(&free, &[&port, "--yes"])).expect(0).text();
            assert_eq!(told, format!("{plan}{port}/tcp: Cleaned\n"));
            puppet.wait();
        }),
        test("embed::watch_is_told_by_the_agent", || {
            let Some(watch) = example("watch") else { return };
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let mut command = plain_command(watch, &[]);
            command.env("PORTWATCH_SOCKET", &agent.socket);
            let mut watch = command.spawn().expect("an example");
            let mut line = String::new();
            let mut errors = BufReader::new(watch.stderr.take().expect("its errors"));
            errors.read_line(&mut line).expect("its errors");
            assert_eq!(line, "watching\n");
            let puppet = stage.puppet();
            let ports = [0; 3].map(|_| puppet.serve().port());
            let told = finish(watch).expect(0).text();
            assert_eq!(told.lines().count(), 3, "{told}");
            // Others on the host may open theirs meanwhile.
            assert!(ports.iter().any(|port| told.contains(&format!("opened {port}\n"))), "{told}");
        }),
        test("embed::agent_tells_who_has_a_port", || {
            let Some(ask) = example("agent") else { return };
            let stage = Stage::new();
            let agent = Agent::start(&stage);
            let puppet = stage.puppet();
            puppet.set_name(b"server");
            let port = puppet.serve().port();
            let mut command = plain_command(&ask, &[&port.to_string()]);
            command.env("PORTWATCH_SOCKET", &agent.socket);
            assert_eq!(run(command).expect(0).text(), format!("{port}: Some(({}, \"server\"))\n", puppet.pid));
            let errors = run(plain_command(ask, &["1"])).expect(1).errors();
            assert!(errors.contains("no agent answers"), "{errors}");
        }),
        test("embed::supervise_leaves_nothing_behind", || {
            let Some(supervise) = example("supervise") else { return };
            let script = "setsid sleep 60 & echo $!; exit 7";
            let told = run(plain_command(supervise, &["sh", "-c", script])).expect(7);
            assert_eq!(told.errors(), "1 processes were left behind, and are gone\n");
            let pid = told.text().trim().to_owned();
            assert!(!PathBuf::from(format!("/proc/{pid}")).exists(), "{pid} is still there");
        }),
    ]
}
