//! Servers in the background: `run --background`, `ps`, `stop`, `logs`; as root and as an ordinary user.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::scene::{Scene, kill};
use crate::subject::finish;
use crate::terminal::Terminal;
use crate::{Test, test};

/// A server, as `run --background --json` tells of it.
fn background(scene: &Scene, name: &str, port: u16, more: &[&str], words: &[&str]) -> Value {
    let port = port.to_string();
    let arguments = [&["--background", "--json", "--name", name, "--port", &port, "--grace", "200ms"], more].concat();
    let run = scene.run(&arguments, words).expect(0);
    assert_eq!(run.errors(), "");
    run.json()
}

fn pid(server: &Value, which: &str) -> u32 {
    server[which].as_u64().unwrap_or_else(|| panic!("no {which}: {server}")) as u32
}

fn record(scene: &Scene, name: &str) -> Value {
    let path = scene.stage.path(&format!("runtime/portwatch/servers/{name}.json"));
    serde_json::from_slice(&fs::read(path).expect("a record")).expect("JSON")
}

fn whole_life() {
    for user in Scene::users() {
        let scene = Scene::of(user);
        let port = scene.port();
        let word = port.to_string();
        let arguments = ["--background", "--port", &word, "--health", "/up", "--grace", "200ms"];
        let words = ["say=hello", "complain=oh", "child=daemon+ignore-term+wait", "http=503,200"];
        let run = scene.run(&arguments, &words).expect(0);
        let line = run.text();
        let (name, rest) = line.trim_end().split_once(" pid ").expect("NAME pid PID port PORT");
        let (pid, of_port) = rest.split_once(" port ").expect("a port");
        assert!(name.ends_with(&format!("-{port}")) && of_port == word, "{line}");
        assert_eq!(run.errors(), "");

        let directory = scene.stage.path("runtime/portwatch/servers");
        assert_eq!(fs::metadata(&directory).expect("a directory").permissions().mode() & 0o7777, 0o700);
        let servers = scene.portwatch(&["ps", "--json"]).expect(0).json();
        let server = &servers[0];
        assert_eq!(servers.as_array().map(Vec::len), Some(1), "{servers}");
        assert_eq!(
            (&server["name"], &server["port"], &server["health"]),
            (&json!(name), &json!(port), &json!({"state": "ok"})),
            "{server}"
        );
        assert_eq!(server["pid"].to_string(), pid);
        assert_eq!(server["address"], format!("127.0.0.1:{port}"));
        let table = scene.portwatch(&["ps"]).expect(0).text();
        let rows: Vec<&str> = table.lines().collect();
        assert!(rows[0].starts_with("NAME ") && rows.len() == 2, "{table}");
        assert!(rows[1].starts_with(name) && rows[1].contains("  ok  ") && rows[1].contains(" say=hello "), "{table}");

        let logs = scene.portwatch(&["logs", name]).expect(0);
        assert_eq!((logs.text(), logs.errors()), ("hello\noh\n".to_owned(), String::new()));
        assert_eq!(scene.portwatch(&["logs", name, "-n", "1"]).expect(0).text(), "oh\n");

        let stopped = scene.portwatch(&["stop", name]).expect(0);
        let want = format!("{name} stopped (pid {pid}, port {port}) in ");
        assert!(stopped.text().starts_with(&want), "{}", stopped.text());
        scene.expect_nothing_left(port);
        assert_eq!(scene.portwatch(&["ps", "--json"]).expect(0).json(), json!([]));
        let again = scene.portwatch(&["stop", name]).expect(1);
        assert_eq!(again.errors(), format!("portwatch: error: no server is called {name}; see `portwatch ps`\n"));
        assert_eq!(scene.portwatch(&["logs", name]).expect(0).text(), "hello\noh\n", "after its end");
    }
}

fn either_supervisor_killed() {
    for user in Scene::users() {
        let scene = Scene::of(user);
        for which in ["watcher", "keeper"] {
            let port = scene.port();
            let family = ["child=daemon+ignore-term+serve+wait", "child=setsid+fork-on-term+wait", "wait"];
            background(&scene, "web", port, &[], &family);
            kill(pid(&record(&scene, "web")[which], "pid"));
            scene.expect_nothing_left(port);
            assert_eq!(scene.portwatch(&["ps", "--json"]).expect(0).json(), json!([]), "{which}");
        }
        // A record that nobody removed is stale: not shown, not stopped, and its name is free.
        let port = scene.port();
        background(&scene, "web", port, &[], &["serve", "wait"]);
        let stale = record(&scene, "web");
        scene.portwatch(&["stop", "web"]).expect(0);
        scene.expect_nothing_left(port);
        let path = scene.stage.path("runtime/portwatch/servers/web.json");
        fs::write(&path, stale.to_string()).expect("a stale record");
        scene.portwatch(&["stop", "web"]).expect(1);
        assert!(!path.exists());
    }
}

/// The record says PIDs of others: nobody is signalled for that.
fn forged_record() {
    let scene = Scene::new();
    let port = scene.port();
    background(&scene, "web", port, &[], &["serve", "wait"]);
    let mut forged = record(&scene, "web");
    let bystander = scene.bystander();
    for which in ["watcher", "keeper", "process"] {
        // The PID of another, and the start of the one that is meant.
        forged[which]["pid"] = json!(bystander.pid);
    }
    forged["name"] = json!("forged");
    fs::write(scene.stage.path("runtime/portwatch/servers/forged.json"), forged.to_string()).expect("a record");
    let start = fs::read_to_string(format!("/proc/{}/stat", bystander.pid)).expect("stat");
    let start: u64 =
        start.rsplit_once(") ").expect("fields").1.split(' ').nth(19).expect("a start").parse().expect("ticks");
    assert_ne!(forged["watcher"]["start"], json!(start * 10_000_000), "both started within one tick");
    scene.portwatch(&["stop", "forged"]).expect(1);
    assert!(bystander.is_alive());
    scene.portwatch(&["stop", "--all"]).expect(0);
    scene.expect_nothing_left(port);
}

fn names_and_limits() {
    let scene = Scene::new();
    let (one, two, three) = (scene.port(), scene.port(), scene.port());
    background(&scene, "web", one, &[], &["serve", "wait"]);
    let word = two.to_string();
    let again = scene.run(&["--background", "--name", "web", "--port", &word], &["serve", "wait"]).expect(1);
    assert_eq!(again.errors(), "portwatch: error: a server called web runs already; end it: portwatch stop web\n");
    background(&scene, "api", two, &["--max-servers", "2"], &["serve", "wait"]);
    let word = three.to_string();
    let more = scene
        .run(&["--background", "--max-servers", "2", "--port", &word], &["say=started", "serve", "wait"])
        .expect(1);
    assert_eq!(
        more.errors(),
        "portwatch: error: 2 servers run in the background already, and --max-servers is 2; end the oldest: \
         portwatch stop web\n"
    );
    let none = scene.run(&["--background", "--max-servers", "0", "--port", &word], &["say=started"]).expect(1);
    assert_eq!(none.errors(), "portwatch: error: --max-servers is 0; nothing was started\n");
    // One that is over counts no more.
    scene.portwatch(&["stop", "web"]).expect(0);
    background(&scene, "more", three, &["--max-servers", "2"], &["serve", "wait"]);
    // By default, after the program; twice, with a number. Without a port there is nothing to wait for.
    let names: Vec<String> = (0..2)
        .map(|_| {
            let run = scene.run(&["--background"], &["wait"]).expect(0);
            run.text().split(' ').next().expect("a name").to_owned()
        })
        .collect();
    assert_eq!(names[1], format!("{}-2", names[0]));
    let stopped = scene.portwatch(&["stop", "--all", "--json"]).expect(0).json();
    let mut stopped: Vec<&str> =
        stopped.as_array().expect("rows").iter().flat_map(|row| row["name"].as_str()).collect();
    stopped.sort_unstable();
    let mut want = vec!["api", "more", &names[0], &names[1]];
    want.sort_unstable();
    assert_eq!(stopped, want);
    for port in [one, two, three] {
        scene.expect_nothing_left(port);
    }
    let none = scene.portwatch(&["stop", "--all"]).expect(0);
    assert_eq!(none.errors(), "portwatch: no servers in the background; nothing to stop\n");
}

fn hostile_names() {
    let scene = Scene::new();
    for name in ["../x", ".lock", "a b", "\u{1b}[2J", "-f", &"x".repeat(65)] {
        let name = format!("--name={name}");
        let run = scene.portwatch(&["run", "--background", &name, "--", "true"]).expect(2);
        assert!(!run.errors().contains('\u{1b}'), "{}", run.errors());
        assert!(run.errors().contains("a name is made of A-Z, a-z, 0-9"), "{}", run.errors());
    }
    assert!(!scene.stage.path("runtime/x.json").exists());
}

fn not_ready_in_the_background() {
    let scene = Scene::new();
    let port = scene.port();
    let word = port.to_string();
    let arguments = ["--background", "--port", &word, "--wait-bound", "200ms"];
    let run = scene.run(&arguments, &["say=trying\u{1b}[2J", "wait"]).expect(1);
    assert_eq!(run.text(), "");
    let errors = run.errors();
    assert!(errors.contains(&format!("does not listen on {port} after 200ms: it listens nowhere\n")), "{errors}");
    assert!(errors.ends_with("portwatch: | trying\\x1b[2J\n"), "{errors}");
    scene.expect_nothing_left(port);
    // Interrupted while it waits: nobody wants it any more.
    let child =
        scene.run_command(&["--background", "--name", "late", "--port", &word], &["wait"]).spawn().expect("portwatch");
    let path = scene.stage.path("runtime/portwatch/servers/late.json");
    let until = std::time::Instant::now() + crate::puppet::PATIENCE;
    while !path.exists() {
        assert!(std::time::Instant::now() < until, "no record");
        std::thread::yield_now();
    }
    rustix::process::pidfd_send_signal(crate::subject::pidfd(&child), rustix::process::Signal::INT).expect("signal");
    finish(child).expect(143);
    scene.expect_nothing_left(port);
    assert!(!path.exists());
}

/// There is no moment at which its end is nobody's: either it is told, or the server was there.
fn over_at_once() {
    let scene = Scene::new();
    let mut ended = 0;
    for (script, code, told) in [
        ("echo oh; exit 3", 3, "ended with exit code 3 before it was in the background\nportwatch: | oh\n"),
        // There is no server, so that is no success either.
        ("exit 0", 1, "ended with exit code 0 before it was in the background\n"),
        (
            "sleep 60 & exit 0",
            1,
            "went to the background by itself; start it in the foreground\n\
             portwatch: ended 1 process that sh left behind\n",
        ),
    ] {
        for _ in 0..10 {
            let run = scene.portwatch(&["run", "--background", "--name", "bx", "--json", "--", "sh", "-c", script]);
            if run.code == Some(code) {
                assert_eq!((run.text(), run.errors()), (String::new(), format!("portwatch: error: sh {told}")));
                assert!(!scene.stage.path("runtime/portwatch/servers/bx.json").exists());
                ended += 1;
            } else {
                // On a machine this busy it did not end at once.
                assert_eq!(run.expect(0).json()["name"], "bx");
                scene.portwatch(&["stop", "--all"]).expect(0);
            }
        }
    }
    assert!(ended > 0, "none was seen to end");
    assert_eq!(scene.portwatch(&["ps", "--json"]).expect(0).json(), json!([]));
}

fn its_lifetime() {
    let scene = Scene::new();
    let port = scene.port();
    let word = port.to_string();
    let arguments = ["--background", "--name", "short", "--port", &word, "--lifetime", "500ms", "--grace", "200ms"];
    let run = scene.run(&arguments, &["child=daemon+wait", "serve", "wait"]);
    // On a slow machine it is over before the server is ready, which is told at once.
    assert!(run.code == Some(0) || run.code == Some(124) && run.errors().contains("lifetime"), "{run:?}");
    scene.expect_nothing_left(port);
    assert_eq!(scene.portwatch(&["ps", "--json"]).expect(0).json(), json!([]));
}

fn followed() {
    let scene = Scene::new();
    let port = scene.port();
    // Its output is read at its own pace: more than both files of the log hold.
    background(&scene, "web", port, &[], &["say=first", "serve", "tell-signals", "wait"]);
    let mut follow = scene.command(&["logs", "web", "-f"]).spawn().expect("portwatch");
    let mut output = BufReader::new(follow.stdout.take().expect("piped"));
    let mut line = String::new();
    output.read_line(&mut line).expect("a line");
    assert_eq!(line, "first\n");
    let process = rustix::process::Pid::from_raw(pid(&record(&scene, "web")["process"], "pid") as i32).expect("a pid");
    rustix::process::kill_process(process, rustix::process::Signal::USR1).expect("signal");
    line.clear();
    output.read_line(&mut line).expect("a line");
    assert_eq!(line, "USR1\n");
    scene.portwatch(&["stop", "web"]).expect(0);
    line.clear();
    // It ends with the server, having shown all.
    while output.read_line(&mut line).expect("lines") > 0 {}
    assert_eq!(line, "TERM\n");
    assert_eq!(follow.wait().expect("wait").code(), Some(0));
    scene.expect_nothing_left(port);
}

fn bounded_log() {
    let scene = Scene::new();
    let port = scene.port();
    background(&scene, "web", port, &[], &["flood=10000", "say=done", "serve", "wait"]);
    scene.portwatch(&["stop", "web"]).expect(0);
    let size =
        |name: &str| fs::metadata(scene.stage.path(&format!("runtime/portwatch/servers/{name}"))).expect(name).len();
    assert!(size("web.log") <= 4 << 20 && size("web.log.1") <= 4 << 20, "{} {}", size("web.log"), size("web.log.1"));
    let lines = scene.portwatch(&["logs", "web", "-n", "5000"]).expect(0).text();
    assert_eq!((lines.lines().count(), lines.lines().last()), (5000, Some("done")));
    // On a terminal, what it says is shown and not obeyed.
    fs::write(scene.stage.path("runtime/portwatch/servers/web.log"), "a\u{1b}[2J\tb\r\n").expect("a log");
    let mut terminal = Terminal::new(80);
    let child = terminal.spawn(&mut scene.command(&["logs", "web", "-n", "1"]));
    assert_eq!(terminal.end(child), Some(0));
    assert!(terminal.said.contains("a\\x1b[2J"), "{:?}", terminal.said);
    let none = scene.portwatch(&["logs", "nobody"]).expect(1);
    assert_eq!(none.errors(), "portwatch: error: no server called nobody has a log; see `portwatch ps`\n");
    scene.expect_nothing_left(port);
}

/// Whoever reads the output of `run --background` waits for its end, and not for the server's.
fn lets_go_of_its_caller() {
    let scene = Scene::new();
    let port = scene.port();
    background(&scene, "web", port, &[], &["serve", "wait"]);
    let record = record(&scene, "web");
    for which in ["watcher", "keeper", "process"] {
        let pid = pid(&record[which], "pid");
        let input = fs::read_link(format!("/proc/{pid}/fd/0")).expect("stdin");
        assert_eq!(input.to_str(), Some("/dev/null"), "{which}");
    }
    let session = |which: &str| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid(&record[which], "pid"))).expect("stat");
        stat.rsplit_once(") ").expect("fields").1.split(' ').nth(3).expect("a session").to_owned()
    };
    let mut sessions = ["watcher", "keeper", "process"].map(session);
    sessions.sort_unstable();
    assert!(sessions.windows(2).all(|pair| pair[0] != pair[1]), "a session each: {sessions:?}");
    scene.portwatch(&["stop", "web"]).expect(0);
    scene.expect_nothing_left(port);
}

fn of_udp() {
    let scene = Scene::new();
    let port = scene.port();
    let word = format!("{port}/udp");
    scene.run(&["--background", "--name", "dns", "--port", &word], &["serve-udp", "wait"]).expect(0);
    let servers = scene.portwatch(&["ps", "--json"]).expect(0).json();
    let server = &servers[0];
    assert_eq!(
        (&server["port"], &server["proto"], &server["health"]),
        (&json!(port), &json!("udp"), &json!({"state": "ok"})),
        "{server}"
    );
    let table = scene.portwatch(&["ps"]).expect(0).text();
    assert!(table.contains(&format!("dns   {word}  ")), "{table}");
    scene.portwatch(&["stop", "dns"]).expect(0);
    scene.expect_nothing_left(port);
}

pub fn trials() -> Vec<Test> {
    vec![
        test("run::a_server_in_the_background_is_seen_heard_and_stopped", whole_life),
        test("run::a_server_of_udp_is_shown_as_one", of_udp),
        test("run::a_killed_supervisor_takes_the_server_along", either_supervisor_killed),
        test("run::a_record_is_believed_by_identity_only", forged_record),
        test("run::names_are_unique_and_servers_counted", names_and_limits),
        test("run::hostile_names_are_refused", hostile_names),
        test("run::a_server_that_is_not_ready_is_ended_with_its_last_words", not_ready_in_the_background),
        test("run::a_server_that_ends_at_once_is_told", over_at_once),
        test("run::the_lifetime_counts_in_the_background", its_lifetime),
        test("run::logs_are_followed_to_the_end", followed),
        test("run::logs_are_bounded_and_harmless", bounded_log),
        test("run::a_server_in_the_background_lets_go_of_its_caller", lets_go_of_its_caller),
    ]
}
