//! `who` tells everything about one port.

use serde_json::Value;

use crate::oracle::truth;
use crate::puppet::Stage;
use crate::subject::{portwatch, rows};
use crate::{Test, test};

pub fn trials() -> Vec<Test> {
    vec![
        test("who::a_port_is_told_with_every_holder_and_their_ancestors", || {
            let stage = Stage::new();
            let parent = stage.puppet();
            let sock = parent.serve();
            parent.serve();
            let child = parent.fork();
            for probe in ["auto", "poll"] {
                let port = sock.port().to_string();
                let output = portwatch(&["--probe", probe, "who", &port, "--json"]).expect(0).json();
                let mut expected = truth(&stage, &[&parent, &child]);
                expected.retain(|row| row.port == sock.port());
                assert_eq!(rows(&output, &stage, &[&parent, &child]), expected, "--probe {probe}");
                let holder = |pid: u32| -> Value {
                    let holders = output[0]["holders"].as_array().expect("holders");
                    holders.iter().find(|holder| holder["pid"] == pid).expect("the holder").clone()
                };
                let ancestors = |pid: u32| -> Vec<u64> {
                    let list = holder(pid)["ancestors"].as_array().expect("ancestors").clone();
                    list.iter().map(|ancestor| ancestor["pid"].as_u64().expect("a pid")).collect()
                };
                let test = u64::from(std::process::id());
                assert_eq!(ancestors(child.pid)[..2], [u64::from(parent.pid), test], "nearest first");
                assert_eq!(ancestors(parent.pid)[0], test);
                assert_eq!(
                    (&holder(parent.pid)["binder"], &holder(child.pid)["binder"]),
                    (&true.into(), &false.into())
                );
            }
        }),
        test("who::text_names_port_pid_directory_and_program", || {
            let stage = Stage::new();
            let puppet = stage.puppet_with_arguments(&["--serve-me"]);
            let sock = puppet.serve();
            let text = portwatch(&["who", &sock.port().to_string()]).expect(0).text();
            let cwd = std::fs::read_link(format!("/proc/{}/cwd", puppet.pid)).expect("its directory");
            for part in [&sock.port().to_string(), &puppet.pid.to_string(), "--serve-me", &cwd.display().to_string()] {
                assert!(text.contains(part), "no {part} in:\n{text}");
            }
        }),
        test("who::nothing_there_is_exit_one", || {
            let stage = Stage::new();
            let puppet = stage.puppet();
            // Bound and not listening: nobody else gets the port meanwhile.
            let sock = puppet.bind("127.0.0.1:0", "");
            let target = format!("127.0.0.1:{}/tcp", sock.port());
            let run = portwatch(&["who", &target]).expect(1);
            assert_eq!((run.text().as_str(), run.errors().lines().count()), ("", 1), "{}", run.errors());
            assert_eq!(portwatch(&["who", &target, "--json"]).expect(1).json(), serde_json::json!([]));
        }),
        test("who::a_ghost_is_told_as_one", || {
            let stage = Stage::new();
            let (giver, taker) = (stage.puppet(), stage.puppet());
            taker.open_mailbox();
            let sock = giver.serve();
            giver.send_fd(sock.fd, &taker);
            giver.close(sock.fd);
            let port = sock.port().to_string();
            let row = portwatch(&["who", &port, "--json"]).expect(0).json()[0].clone();
            assert_eq!((&row["ghost"], &row["holders"]), (&true.into(), &serde_json::json!([])), "{row}");
            assert!(portwatch(&["who", &port]).expect(0).text().contains(&port));
        }),
        test("who::a_bad_target_is_exit_two", || {
            portwatch(&["who", "http"]).expect(2);
            portwatch(&["who", "127.0.0.1:0"]).expect(2);
        }),
    ]
}
