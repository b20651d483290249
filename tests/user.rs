//! As an ordinary user: own processes in full, others as far as anyone may see, and no stack trace.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::json;

use crate::puppet::{Puppet, Sock, Stage};
use crate::subject::{Run, binary, finish, plain_command, row, skip};
use crate::watcher::Watch;
use crate::{Test, test};

/// `nobody`: an ordinary user on every machine, by number.
const NOBODY: u32 = 65534;

/// A stage with a copy of the binary that everybody may run, a server of root and one of the user.
pub struct Scene {
    stage: Stage,
    pub root: (Puppet, Sock),
    pub own: (Puppet, Sock),
}

impl Scene {
    /// `None`, loudly, where the tests themselves run as an ordinary user.
    pub fn new() -> Option<Scene> {
        if !rustix::process::geteuid().is_root() {
            skip("root", "only root can become somebody else");
            return None;
        }
        let stage = Stage::new();
        let copy = stage.path("portwatch");
        fs::copy(binary(), &copy).expect("copying the binary");
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("chmod");
        let (root, own) = (stage.puppet(), stage.puppet());
        own.become_user(NOBODY);
        let (of_root, of_own) = (root.serve(), own.serve());
        Some(Scene { root: (root, of_root), own: (own, of_own), stage })
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = plain_command(self.stage.path("portwatch"), arguments);
        command.uid(NOBODY).gid(NOBODY).current_dir("/");
        command
    }

    fn portwatch(&self, arguments: &[&str]) -> Run {
        finish(self.command(arguments).spawn().expect("portwatch as an ordinary user"))
    }
}

pub fn trials() -> Vec<Test> {
    vec![
        test("user::own_processes_are_listed_in_full", || {
            let Some(scene) = Scene::new() else { return };
            let (puppet, sock) = &scene.own;
            let run = scene.portwatch(&["list", "--json", &sock.port().to_string()]).expect(0);
            let listener = run.json()[0].clone();
            let row = row(&listener);
            assert_eq!((row.uid, row.inode), (NOBODY, sock.inode));
            assert_eq!(row.holders.keys().collect::<Vec<_>>(), [&puppet.pid]);
            assert_eq!(listener["holders"][0]["command"][0], "puppet", "{listener}");
            assert!(listener["holders"][0]["cwd"].is_string(), "{listener}");
        }),
        test("user::listeners_of_others_are_told_with_their_uid", || {
            let Some(scene) = Scene::new() else { return };
            let port = scene.root.1.port().to_string();
            let run = scene.portwatch(&["list", "--json", &port]).expect(0);
            let listener = run.json()[0].clone();
            assert_eq!((&listener["uid"], &listener["holders"]), (&0.into(), &serde_json::json!([])), "{listener}");
            let text = scene.portwatch(&["list", &port]).expect(0).text();
            assert!(text.contains(&port) && text.contains("uid 0"), "{text}");
            let text = scene.portwatch(&["who", &port]).expect(0).text();
            assert!(text.contains("uid 0"), "{text}");
        }),
        test("user::every_verb_works_without_a_panic", || {
            let Some(scene) = Scene::new() else { return };
            for arguments in [
                &["list"][..],
                &["list", "--wide", "--netns", "all"],
                &["list", "--json"],
                &["status", "--json"],
                &["watch", "--for", "10ms"],
                &["--probe", "poll", "list"],
            ] {
                let run = scene.portwatch(arguments);
                assert!(!run.errors().contains("panicked"), "{arguments:?}: {}", run.errors());
                assert!(matches!(run.code, Some(0 | 1)), "{arguments:?}: {:?} {}", run.code, run.errors());
            }
            scene.portwatch(&["--probe", "tracepoint", "list"]).expect(0);
            let run = scene.portwatch(&["--probe", "tracepoint", "watch"]).expect(3);
            assert!(run.errors().contains("not root"), "{}", run.errors());
        }),
        test("user::watch_polls_and_says_so_in_one_line", || {
            let Some(scene) = Scene::new() else { return };
            let mut watch = Watch::spawn(scene.command(&["watch", "--json"]));
            watch.wait_until_ready("poll");
            assert_eq!(watch.said.len(), 1, "{:?}", watch.said);
            let (puppet, _) = &scene.own;
            let sock = puppet.serve();
            let event = watch.until_event("open", sock.inode);
            assert_eq!(event["process"]["pid"], puppet.pid, "{event}");
            puppet.close(sock.fd);
            watch.until_event("close", sock.inode);
        }),
        test("user::a_port_of_root_is_denied_and_stays", || {
            let Some(scene) = Scene::new() else { return };
            let (puppet, sock) = &scene.root;
            let run = scene.portwatch(&["kill", "--json", &format!("{}/tcp", sock.port())]).expect(3);
            let outcome = run.json()[0].clone();
            assert_eq!(
                (&outcome["status"], &outcome["still_listening"]),
                (&"denied".into(), &true.into()),
                "{outcome}"
            );
            assert!(puppet.is_alive());
        }),
        test("user::a_dry_run_tells_that_a_port_of_root_would_be_denied", || {
            let Some(scene) = Scene::new() else { return };
            let target = format!("{}/tcp", scene.root.1.port());
            let outcome = scene.portwatch(&["kill", "--json", "--dry-run", &target]).expect(0).json()[0].clone();
            assert_eq!((&outcome["status"], &outcome["ghost"]), (&"denied".into(), &json!([scene.root.1.inode])));
            let text = scene.portwatch(&["kill", "--dry-run", &target]).expect(0).text();
            let want = "would be refused: held by root (uid 0), whose processes are not visible; try sudo\n";
            assert!(text.ends_with(want), "{text}");
        }),
        test("user::whether_a_hidden_holder_matches_is_not_known_and_denied", || {
            let Some(scene) = Scene::new() else { return };
            let target = format!("{}/tcp", scene.root.1.port());
            let command = ["kill", "--json", &target, "--command", "nosuch*"];
            let outcome = scene.portwatch(&command).expect(3).json()[0].clone();
            assert_eq!((&outcome["status"], &outcome["ghost"]), (&"denied".into(), &json!([scene.root.1.inode])));
            // Whose socket it is, is known.
            let of_nobody = ["kill", "--json", &target, "--user", "65534"];
            let outcome = scene.portwatch(&of_nobody).expect(1).json()[0].clone();
            assert_eq!(outcome["status"], "partial", "{outcome}");
        }),
        test("user::nothing_is_said_with_what_may_match_and_is_hidden", || {
            let Some(scene) = Scene::new() else { return };
            let (puppet, sock) = &scene.root;
            let (port, pid) = (sock.port().to_string(), puppet.pid.to_string());
            let nothing = format!("portwatch: nothing that matches the selectors is listening on {port}");
            let may = "a listener of another user may match: try sudo";
            for (verb, code) in [("list", 0), ("who", 1)] {
                let run = scene.portwatch(&[verb, &port, "--pid", &pid]).expect(code);
                assert_eq!(run.errors(), format!("{nothing} that is visible to you; {may}\n"));
                // What is known of it is that it is not meant.
                let run = scene.portwatch(&[verb, &port, "--pid", &pid, "--user", "65534"]).expect(code);
                assert_eq!(run.errors(), format!("{nothing}\n"));
            }
            let run = scene.portwatch(&["kill", "--pid", &pid]).expect(0);
            assert!(run.errors().contains("of other users may match: try sudo") || run.errors().contains(may));
            assert!(run.errors().ends_with("; nothing to free\n"), "{}", run.errors());
        }),
        test("user::an_own_port_is_freed", || {
            let Some(scene) = Scene::new() else { return };
            let (puppet, sock) = &scene.own;
            let run = scene.portwatch(&["kill", "--json", &format!("{}/tcp", sock.port())]).expect(0);
            assert_eq!(run.json()[0]["status"], "cleaned", "{}", run.text());
            puppet.wait();
            assert!(scene.root.0.is_alive());
        }),
    ]
}
