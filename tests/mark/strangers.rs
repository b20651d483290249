//! A clean-up that means other users' processes too, by somebody who may not look at them: nothing found is no answer.

use std::fs;

use serde_json::Value;

use super::{OTHER, USER, Yard};
use crate::{Test, test};

const UNSURE: &str =
    "1 listener of others may have been: run this with sudo, or start the agent, which knows their age\n";

/// Nobody tells since when they are there.
fn unknown() {
    let Some(yard) = Yard::new(USER, false) else { return };
    let old = yard.server(0);
    let before = old.serve().port();
    yard.mark();
    let (own, stranger) = (yard.server(USER), yard.server(0));
    own.serve();
    let port = stranger.serve().port();
    let kill = |since: &str, more: &[&str]| yard.portwatch(&[&["kill", "--since", since, "--yes"], more].concat());

    let run = kill("before.json", &["--all-users", "--fail-on-leak", "--report", "leaks.json"]).expect(3);
    own.wait();
    let text = run.text();
    // What the mark has was there before.
    assert!(text.contains(&format!("{port}/tcp may have been left behind: of root (uid 0), ")), "{text}");
    assert!(!text.contains(&before.to_string()) && text.ends_with(UNSURE), "{text}");
    let report: Value = serde_json::from_slice(&fs::read(yard.home("leaks.json")).expect("a report")).expect("JSON");
    assert_eq!((&report["clean"], &report["unknown"][0]["port"]), (&false.into(), &port.into()), "{report}");

    // Since a moment nobody knows more of the other one either.
    for (more, code) in [(&["--all-users"][..], 3), (&["--user", "root"], 3), (&["--all-users", "--dry-run"], 0)] {
        let run = kill("10m", more).expect(code);
        let told = [before, port].map(|port| run.text().contains(&port.to_string()));
        assert_eq!(told, [true, true], "{more:?}: {}", run.text());
    }
    let json = kill("before.json", &["--all-users", "--json"]).expect(3).json();
    assert_eq!((&json[0]["port"], &json[0]["status"]), (&port.into(), &"denied".into()), "{json}");
    // Of others than are meant nothing is said.
    for more in [&[][..], &["--user", &OTHER.to_string()]] {
        let run = kill("10m", more).expect(0);
        assert_eq!(run.text(), "nothing was left behind since 10m ago\n");
    }
    assert!(old.is_alive() && stranger.is_alive());
}

/// The agent tells which of them are new.
fn told() {
    let Some(yard) = Yard::new(USER, true) else { return };
    let old = yard.server(0);
    let before = old.serve().port();
    yard.portwatch(&["mark", "--name", "job"]).expect(0);
    let kill = |more: &[&str]| yard.portwatch(&[&["kill", "--since", "job", "--yes", "--fail-on-leak"], more].concat());
    let run = kill(&["--all-users"]).expect(0);
    assert_eq!(run.text(), "nothing was left behind since job\n");
    let (stranger, other) = (yard.server(0), yard.server(OTHER));
    let (port, _) = (stranger.serve().port(), other.serve());
    let run = kill(&["--user", "root", "--report", "leaks.json"]).expect(3);
    let text = run.text();
    let line = format!("{port}/tcp is still there (not permitted: it runs as root (uid 0); try sudo): ");
    assert!(text.contains(&line) && text.contains(&format!("({})", stranger.pid)), "{text}");
    assert!(text.ends_with("1 listener was left behind since job: it is still there\n"), "{text}");
    let report: Value = serde_json::from_slice(&fs::read(yard.home("leaks.json")).expect("a report")).expect("JSON");
    assert_eq!((&report["clean"], &report["leaks"][0]["pid"]), (&false.into(), &stranger.pid.into()), "{report}");
    let run = kill(&["--all-users"]).expect(3);
    assert!(run.text().contains("2 listeners were left behind") && !run.text().contains(&before.to_string()));
    // One from before that listens anew is not new.
    let again = old.serve().port();
    let run = kill(&["--all-users"]).expect(3);
    assert!(!run.text().contains(&again.to_string()), "{}", run.text());
    assert!(kill(&[]).expect(0).text().starts_with("nothing was left behind"));
    assert!(old.is_alive() && stranger.is_alive() && other.is_alive());
}

pub fn trials() -> Vec<Test> {
    vec![
        test("mark::what_others_may_have_left_behind_is_not_called_clean", unknown),
        test("mark::what_others_left_behind_is_known_by_the_agent_and_not_called_clean", told),
    ]
}
