//! `run` in the foreground: the port, the waiting, signals, streams and exit codes; and that nothing is left.

pub mod actor;
mod ends;
mod host;
mod scene;
mod servers;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::subject::{program, skip};
use crate::terminal::Terminal;
use crate::{Test, test};
use scene::{Scene, kill, with_input};

fn exit_codes() {
    let scene = Scene::new();
    for (words, code) in [(&["exit=0"][..], 0), (&["exit=7"], 7), (&["exit=255"], 255), (&[], 0)] {
        let run = scene.run(&[], words).expect(code);
        assert_eq!((run.text(), run.errors()), (String::new(), String::new()), "{words:?}");
    }
    // A signal of the real-time kind is one as well.
    for (word, code) in [("raise=9", 137), ("raise=15", 143), ("raise=40", 168)] {
        let run = scene.run(&[], &[word]).expect(code);
        assert_eq!(run.errors(), "");
    }
    for (program, code, reason) in [
        ("/nonexistent/x\u{1b}[2J", 127, "cannot run /nonexistent/x\\x1b[2J: No such file or directory (os error 2)"),
        ("/proc/self/status", 126, "cannot run /proc/self/status: Permission denied (os error 13)"),
    ] {
        let run = scene.portwatch(&["run", "--", program]).expect(code);
        assert_eq!(run.errors(), format!("portwatch: error: {reason}\n"));
    }
    let run = scene.run(&["--lifetime", "10ms"], &["wait"]).expect(124);
    assert!(run.errors().contains("was ended: its lifetime of 10ms is over"), "{}", run.errors());
    let ignoring = scene.run(&["--lifetime", "10ms", "--grace", "50ms"], &["ignore-term", "wait"]);
    ignoring.expect(124);
}

fn usage() {
    let scene = Scene::new();
    for (arguments, want) in [
        (&["--"][..], "<CMD>"),
        (&["--", ""], "the command is empty"),
        (&["--port", "0", "--", "true"], "use a port such as 8000 or 5353/udp, or a range such as 8000-8010"),
        (&["--port", "8000/sctp", "--", "true"], "use a port such as 8000"),
        (&["--port", "9-8", "--", "true"], "use a port such as 8000"),
        (&["--replace", "--", "true"], "--port <P[-Q][/udp]>"),
        (&["--port", "8000", "--replace", "--fallback", "--", "true"], "cannot be used with"),
        (&["--port", "8000", "--health", "up", "--", "true"], "use a path such as /healthz"),
        (&["--port", "8000/udp", "--health", "/", "--", "true"], "--health asks by HTTP, and not by UDP"),
        (&["--port", "8000", "--wait-bound", "0", "--", "true"], "use a duration longer than 0"),
        (&["--lifetime", "0s", "--", "true"], "use a duration longer than 0"),
        (&["--name", "x", "--", "true"], "--background"),
        (&["--background", "--name", "a/b", "--", "true"], "a name is made of A-Z"),
    ] {
        let run = scene.portwatch(&[&["run"], arguments].concat()).expect(2);
        assert!(run.errors().contains(want), "{arguments:?}: {}", run.errors());
        // That the environment names a socket makes it no part of what is to be typed.
        assert!(!run.errors().contains("--socket"), "{arguments:?}: {}", run.errors());
    }
}

fn streams() {
    let scene = Scene::new();
    let run = with_input(scene.run_command(&[], &["copy", "complain=oh"]), "one\0\ntwo").expect(0);
    assert_eq!((run.text(), run.errors()), ("one\0\ntwo".to_owned(), "oh\n".to_owned()));
}

fn the_port_is_given() {
    let scene = Scene::new();
    let port = scene.port();
    let word = port.to_string();
    let running =
        scene.start(&["--port", &word], &["say={port}:{port}", "port", "serve={port}", "exit-on-usr1=3", "wait"]);
    assert_eq!(running.said, format!("portwatch: ready: http://127.0.0.1:{port}\n"));
    running.signal(Signal::USR1);
    let run = running.finish().expect(3);
    assert_eq!(run.text(), format!("{port}:{port}\n{port}\n"));
    scene.expect_nothing_left(port);
    // Without a port, the braces are the command's own.
    assert_eq!(scene.run(&[], &["say={port}"]).expect(0).text(), "{port}\n");
    // The program may be one of several, by port.
    let actor = std::env::current_exe().expect("this program");
    std::os::unix::fs::symlink(actor, scene.stage.path(&format!("web-{port}"))).expect("a link");
    let program = scene.stage.path("web-{port}");
    let program = program.to_str().expect("UTF-8");
    let told = scene.portwatch(&["run", "--port", &word, "--", program, "say=here", "exit=4"]).expect(4);
    assert_eq!(told.text(), "here\n");
    let missing = scene.portwatch(&["run", "--port", &word, "--", "/nonexistent/web-{port}"]).expect(127);
    assert_eq!(
        missing.errors(),
        format!("portwatch: error: cannot run /nonexistent/web-{port}: No such file or directory (os error 2)\n")
    );
}

fn a_descendant_may_listen() {
    let scene = Scene::new();
    let port = scene.port();
    let running = scene
        .start(&["--port", &port.to_string(), "--grace", "50ms"], &["child=daemon+serve+ignore-term+wait", "wait"]);
    running.signal(Signal::TERM);
    running.finish().expect(143);
    scene.expect_nothing_left(port);
}

fn a_taken_port() {
    let scene = Scene::new();
    let holder = scene.bystander();
    let port = holder.serve().port();
    let word = port.to_string();
    let run = scene.run(&["--port", &word], &["say=started"]).expect(1);
    let name = fs::read_to_string(format!("/proc/{}/comm", holder.pid)).expect("comm");
    let who = format!("{} ({})", name.trim(), holder.pid);
    assert_eq!(
        (run.text(), run.errors()),
        (
            String::new(),
            format!(
                "portwatch: error: {port} is taken by {who}; --replace frees it first, --fallback takes the next free port\n"
            )
        )
    );
    let range = format!("{port}-{port}");
    scene.run(&["--port", &range], &["say=started"]).expect(1);
    // A socket that is bound and does not listen is in the way as well.
    let bound = holder.bind("127.0.0.1:0", "").port();
    let run = scene.run(&["--port", &bound.to_string()], &["say=started"]).expect(1);
    assert!(run.errors().contains(&format!("see `portwatch diagnose {bound}`")), "{}", run.errors());
    assert!(holder.is_alive());
}

fn fallback() {
    let scene = Scene::new();
    let holder = scene.bystander();
    let taken = holder.serve().port();
    // Two at once, neither of which listens before both have chosen: each waits for a line that tells of the other.
    let word = taken.to_string();
    let one = scene.start(&["--port", &word, "--fallback"], &["port", "serve", "exit-on-usr1=0", "wait"]);
    let other = scene.start(&["--port", &word, "--fallback"], &["port", "serve", "exit-on-usr1=0", "wait"]);
    let ports = [one, other].map(|running| {
        running.signal(Signal::USR1);
        let run = running.finish().expect(0);
        run.text().trim().parse::<u16>().expect("a port")
    });
    assert!(ports[0] > taken && ports[1] > ports[0], "{taken}: {ports:?}");
    assert!(holder.is_alive());
}

/// Several that are started at the same time, and take their time to listen, choose different ports.
fn fallback_race() {
    let scene = Scene::new();
    let first = scene.bystander().serve().port();
    let word = first.to_string();
    let (mut children, mut inputs) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let mut command =
            scene.run_command(&["--port", &word, "--fallback"], &["port", "copy", "serve", "exit-on-usr1=0", "wait"]);
        let mut child = command.stdin(std::process::Stdio::piped()).spawn().expect("portwatch");
        inputs.push(child.stdin.take().expect("piped"));
        children.push(child);
    }
    let mut ports = Vec::new();
    let mut outputs = Vec::new();
    for child in &mut children {
        // It has its port, and does not listen: it reads.
        let mut output = std::io::BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        std::io::BufRead::read_line(&mut output, &mut line).expect("a port");
        ports.push(line.trim().parse::<u16>().expect("a port"));
        outputs.push(output);
    }
    drop(inputs);
    for mut child in children {
        let mut errors = std::io::BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        std::io::BufRead::read_line(&mut errors, &mut line).expect("ready");
        assert!(line.starts_with("portwatch: ready: "), "{line}");
        rustix::process::pidfd_send_signal(crate::subject::pidfd(&child), Signal::USR1).expect("signal");
        assert_eq!(child.wait().expect("wait").code(), Some(0));
    }
    let count = ports.len();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), count, "{ports:?}");
    assert_eq!(fs::read_dir(scene.stage.path("runtime/portwatch/ports")).expect("locks").count(), 0);
}

fn replace() {
    let scene = Scene::new();
    let holder = scene.bystander();
    let port = holder.serve().port();
    let running =
        scene.start(&["--port", &port.to_string(), "--replace", "-y"], &["serve", "say=up", "exit-on-usr1=0", "wait"]);
    assert!(!holder.is_alive());
    assert!(running.said.contains(&format!("portwatch: {port}/tcp freed: terminated ")), "{}", running.said);
    running.signal(Signal::USR1);
    let run = running.finish().expect(0);
    assert_eq!(run.text(), "up\n", "what is said of the kill is on stderr");
    scene.expect_nothing_left(port);
    // A port that nobody has needs no kill.
    let running = scene.start(&["--port", &port.to_string(), "--replace"], &["serve", "exit-on-usr1=0", "wait"]);
    assert_eq!(running.said, format!("portwatch: ready: http://127.0.0.1:{port}\n"));
    running.signal(Signal::USR1);
    running.finish().expect(0);
}

/// What `kill` may not do, `run --replace` may not do either, and says so in the same way.
fn replace_without_permission() {
    if !rustix::process::geteuid().is_root() {
        skip("root", "somebody has to be another user");
        return;
    }
    let scene = Scene::of(Some(scene::NOBODY));
    let holder = scene.bystander();
    let word = holder.serve().port().to_string();
    scene.portwatch(&["kill", "-y", &word]).expect(3);
    let run = scene.run(&["--port", &word, "--replace", "-y"], &["say=started"]).expect(3);
    assert_eq!(run.text(), "");
    assert!(run.errors().ends_with(&format!("error: {word} is not free; nothing was started\n")), "{}", run.errors());
    assert!(holder.is_alive());
}

/// A server of UDP: its port is free, freed and waited for by UDP, where that is said.
fn udp() {
    let scene = Scene::new();
    let holder = scene.bystander();
    let port = scene.port();
    holder.udp(&format!("127.0.0.1:{port}"), "");
    let (plain, udp) = (port.to_string(), format!("{port}/udp"));
    let serve = ["port", "serve-udp", "exit-on-usr1=0", "wait"];

    let taken = scene.run(&["--port", &udp], &["say=started"]).expect(1).errors();
    assert!(taken.starts_with(&format!("portwatch: error: {udp} is taken by ")), "{taken}");
    let next = scene.start(&["--port", &udp, "--fallback"], &serve);
    assert!(next.said.starts_with("portwatch: ready: udp 127.0.0.1:"), "{}", next.said);
    next.signal(Signal::USR1);
    assert!(next.finish().expect(0).text().trim().parse::<u16>().expect("a port") > port);

    // To a web server, that is no matter.
    for more in [&[][..], &["--replace", "-y"], &["--fallback"]] {
        let web = scene.start(&[&["--port", &plain], more].concat(), &["serve", "exit-on-usr1=0", "wait"]);
        assert_eq!(web.said, format!("portwatch: ready: http://127.0.0.1:{port}\n"));
        web.signal(Signal::USR1);
        web.finish().expect(0);
        assert!(holder.is_alive());
    }
    // Who meant UDP and did not say so is told.
    let unsaid = scene.run(&["--port", &plain], &["serve-udp", "wait"]).expect(1).errors();
    assert!(unsaid.contains(&format!("; if that is where it listens, say --port {udp}\n")), "{unsaid}");

    let running = scene.start(&["--port", &udp, "--replace", "-y"], &serve);
    assert!(!holder.is_alive());
    assert!(running.said.contains(&format!("portwatch: {udp} freed: terminated ")), "{}", running.said);
    assert!(running.said.ends_with(&format!("portwatch: ready: udp 127.0.0.1:{port}\n")), "{}", running.said);
    running.signal(Signal::USR1);
    running.finish().expect(0);

    // What listens by the other one is not ready; without a word about it, it is.
    for (proto, words, instead) in [("udp", ["serve", "wait"], "tcp"), ("tcp", ["serve-udp", "wait"], "udp")] {
        let place = format!("{port}/{proto}");
        let late = scene.run(&["--port", &place, "--wait-bound", "1s"], &words).expect(1).errors();
        let want = format!("does not listen on {place} after 1s: it listens on 127.0.0.1:{port}/{instead} instead\n");
        assert!(late.ends_with(&want), "{late}");
    }
    let running = scene.start(&["--port", &plain], &serve);
    running.signal(Signal::USR1);
    running.finish().expect(0);
    scene.expect_nothing_left(port);
}

/// Where an agent answers, it tells when the command listens.
fn told_by_the_agent() {
    let scene = Scene::new();
    let socket = scene.stage.path("agent.sock");
    let socket = socket.to_str().expect("UTF-8");
    let mut agent = scene.command(&["agent", "--socket", socket]).spawn().expect("an agent");
    let mut line = String::new();
    let mut errors = std::io::BufReader::new(agent.stderr.take().expect("piped"));
    std::io::BufRead::read_line(&mut errors, &mut line).expect("the agent's stderr");
    assert!(line.contains("watching ("), "the agent does not start: {line}");
    let port = scene.port();
    let arguments = ["--socket", socket, "--agent", "--port", &port.to_string()];
    // Its listener is a descendant's, and comes when the agent looks on already.
    let running = scene.start(&arguments, &["child=daemon+serve+wait", "exit-on-usr1=0", "wait"]);
    running.signal(Signal::USR1);
    running.finish().expect(0);
    agent.kill().expect("kill");
    agent.wait().expect("wait");
    scene.expect_nothing_left(port);
}

fn not_ready() {
    let scene = Scene::new();
    let (port, elsewhere) = (scene.port(), scene.port());
    let (word, serve) = (port.to_string(), format!("serve={elsewhere}"));
    let limits = ["--port", &word, "--wait-bound", "1s"];
    let run = scene.run(&limits, &[&serve, "wait"]).expect(1);
    let instead = format!("does not listen on {port} after 1s: it listens on 127.0.0.1:{elsewhere}/tcp instead\n");
    assert!(run.errors().ends_with(&instead), "{}", run.errors());
    scene.expect_nothing_left(elsewhere);
    let run = scene.run(&["--port", &word, "--wait-bound", "100ms"], &["wait"]).expect(1);
    assert!(run.errors().ends_with(&format!("does not listen on {port} after 100ms: it listens nowhere\n")));
    // A stranger who is quicker is none of its own.
    let stranger = scene.bystander();
    let command = scene.run_command(&["--port", &word, "--wait-bound", "2s"], &["say=started", "wait"]);
    let stranger_takes_it = |mut command: std::process::Command| {
        let mut child = command.spawn().expect("portwatch");
        let mut output = std::io::BufReader::new(child.stdout.take().expect("piped"));
        std::io::BufRead::read_line(&mut output, &mut String::new()).expect("a line");
        stranger.tcp(&format!("127.0.0.1:{port}"), "");
        crate::subject::finish(child)
    };
    let run = stranger_takes_it(command).expect(1);
    assert!(run.errors().ends_with(" has that port, and is none of its processes\n"), "{}", run.errors());
    assert!(stranger.is_alive());
    drop(stranger);
    // Nor is it ready when it ends; a daemon of its own making ends with it.
    let run = scene.run(&limits, &["exit=4"]).expect(4);
    assert!(
        run.errors().ends_with(&format!("ended with exit code 4 before it was ready on {port}\n")),
        "{}",
        run.errors()
    );
    let run = scene.run(&limits, &["child=setsid+wait", "exit=0"]).expect(1);
    assert!(run.errors().contains("went to the background by itself; start it in the foreground"), "{}", run.errors());
    scene.expect_nothing_left(port);
}

fn healthy() {
    let scene = Scene::new();
    let port = scene.port();
    let word = port.to_string();
    let running = scene.start(&["--port", &word, "--health", "/up"], &["http=503,404,200"]);
    running.signal(Signal::TERM);
    running.finish().expect(143);
    let run = scene.run(&["--port", &word, "--health", "/up", "--wait-bound", "1s"], &["http=503"]).expect(1);
    let want = format!("is not well after 1s: GET http://127.0.0.1:{port}/up: 503\n");
    assert!(run.errors().ends_with(&want), "{}", run.errors());
    scene.expect_nothing_left(port);
    // It listens, so it is not looked for elsewhere; but it does not answer.
    let run = scene.run(&["--port", &word, "--health", "/up", "--wait-bound", "1s"], &["serve", "wait"]).expect(1);
    let want = format!("listens on {port}, and has not answered GET http://127.0.0.1:{port}/up within 1s\n");
    assert!(run.errors().ends_with(&want), "{}", run.errors());
    scene.expect_nothing_left(port);
}

fn signals_are_passed_on() {
    let scene = Scene::new();
    let port = scene.port();
    let running = scene.start(&["--port", &port.to_string(), "--grace", "100ms"], &["tell-signals", "serve", "wait"]);
    for signal in [Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2, Signal::WINCH] {
        running.signal(signal);
    }
    // This one ends it, by force after the grace.
    running.signal(Signal::TERM);
    let run = running.finish().expect(137);
    let mut told: Vec<&str> = std::str::from_utf8(&run.stdout).expect("names").lines().collect();
    told.sort_unstable();
    assert_eq!(told, ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "WINCH"]);
    scene.expect_nothing_left(port);
}

/// SIGKILL for both supervisors: the command itself dies of it.
fn both_killed() {
    let scene = Scene::new();
    let port = scene.port();
    let running = scene.start(&["--port", &port.to_string()], &["serve", "ignore-term", "wait"]);
    let (keeper, watcher) = (running.keeper(), running.watcher());
    // The keeper first, stopped, so that it does nothing meanwhile.
    let stopped = rustix::process::Pid::from_raw(keeper as i32).expect("a pid");
    rustix::process::kill_process(stopped, Signal::STOP).expect("signal");
    kill(watcher);
    kill(keeper);
    let run = running.finish().expect(4);
    assert!(run.errors().contains("both supervisors were killed, and the command with them"), "{}", run.errors());
    scene.expect_nothing_left(port);
}

/// SIGKILL for portwatch and its watcher at once: all that came of the command is ended by the third.
fn front_and_watcher_killed() {
    let scene = Scene::new();
    let port = scene.port();
    let running = scene.start(&["--port", &port.to_string()], &["child=daemon+ignore-term+serve+wait", "wait"]);
    let watcher = running.watcher();
    running.signal(Signal::STOP);
    kill(watcher);
    running.signal(Signal::KILL);
    assert_eq!(running.finish().code, None);
    scene.expect_nothing_left(port);
}

/// Who waits for the end of portwatch finds nothing of it any more.
fn no_supervisor_outlives_the_front() {
    let scene = Scene::new();
    for _ in 0..20 {
        scene.run(&[], &["child=daemon+wait", "exit=0"]).expect(0);
        assert_eq!(scene.child(), None);
    }
    scene.portwatch(&["run", "--", "/nonexistent/x"]).expect(127);
    assert_eq!(scene.child(), None);
}

/// Orphans are reaped as they end, not at the end.
fn zombies() {
    let scene = Scene::new();
    let port = scene.port();
    let words = ["child=daemon+exit=0", "child=daemon+exit=0", "serve", "wait"];
    let running = scene.start(&["--port", &port.to_string()], &words);
    let (watcher, command) = (running.watcher(), running.command());
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let children = fs::read_to_string(format!("/proc/{watcher}/task/{watcher}/children")).expect("children");
        if children.trim() == command.to_string() {
            break;
        }
        assert!(Instant::now() < until, "children of the supervisor: {children}, the command is {command}");
        std::thread::yield_now();
    }
    running.signal(Signal::TERM);
    running.finish().expect(143);
    scene.expect_nothing_left(port);
}

fn bystanders() {
    let scene = Scene::new();
    let bystander = scene.bystander();
    let sock = bystander.serve();
    // In the process group of the front, and no descendant of it.
    let port = scene.port();
    let running = scene.start(&["--port", &port.to_string(), "--grace", "0"], &["child=setsid+wait", "serve", "wait"]);
    running.signal(Signal::TERM);
    running.finish();
    scene.expect_nothing_left(port);
    assert!(bystander.is_alive());
    bystander.connect(sock.address);
}

/// A script that starts a helper and becomes portwatch: the helper is portwatch's child, and no part of what it runs.
fn children_from_before() {
    let scene = Scene::new();
    let (port, note) = (scene.port(), scene.stage.path("helper"));
    let plain =
        scene.run_command(&["--port", &port.to_string(), "--grace", "0"], &["child=daemon+wait", "serve", "wait"]);
    let mut script = Command::new("sh");
    script.args(["-c", "sleep 1000 >/dev/null 2>&1 & echo $! >\"$0\"; exec \"$@\""]).arg(&note);
    script.arg(plain.get_program()).args(plain.get_args());
    script.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    script.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let running = Scene::start_command(&mut script);
    let helper: u32 = fs::read_to_string(&note).expect("a note").trim().parse().expect("a pid");
    let front = running.child.id();
    let children = fs::read_to_string(format!("/proc/{front}/task/{front}/children")).expect("children");
    let mut children = children.split_whitespace().map(|pid| pid.parse().expect("a pid"));
    kill(scene::only_child(children.find(|pid| *pid != helper).expect("the keeper")));
    running.finish().expect(137);
    // It is ours now, and nothing has ended it.
    assert!(scene::children().contains(&helper));
    let stat = fs::read_to_string(format!("/proc/{helper}/stat")).expect("the helper");
    assert!(stat.contains("(sleep) S"), "{stat}");
    kill(helper);
    scene.expect_nothing_left(port);
}

fn interrupted_at_a_terminal() {
    let scene = Scene::new();
    let port = scene.port();
    let mut terminal = Terminal::new(100);
    let word = port.to_string();
    let child = terminal.lead(
        &mut scene
            .run_command(&["--port", &word], &["tell-signals", "serve", "child=exit=0", "exit-on-usr1=9", "wait"]),
    );
    terminal.until("ready: http://127.0.0.1");
    terminal.type_keys("\u{3}");
    terminal.until("INT\n");
    // The terminal gave it to the command once, and portwatch did not pass it on again.
    rustix::process::pidfd_send_signal(crate::subject::pidfd(&child), Signal::USR1).expect("signal");
    let code = terminal.end(child);
    assert_eq!(terminal.said.matches("INT\n").count(), 1, "{}", terminal.said);
    assert_eq!(code, Some(9));
    // As a command takes it that does nothing about it.
    let mut terminal = Terminal::new(100);
    let child = terminal.lead(&mut scene.run_command(&["--port", &word], &["serve", "wait"]));
    terminal.until("ready: ");
    terminal.type_keys("\u{3}");
    assert_eq!(terminal.end(child), Some(130));
    scene.expect_nothing_left(port);
}

/// Job control of a shell: stopped by Ctrl-Z with all that it runs, and brought back.
fn stopped_at_a_terminal() {
    if program("bash").is_none() {
        skip("bash", "a shell with job control is needed");
        return;
    }
    let scene = Scene::new();
    let port = scene.port();
    let mut terminal = Terminal::new(200);
    let run = scene.run_command(&["--port", &port.to_string()], &["tell-cont", "serve", "wait"]);
    let words: Vec<String> = std::iter::once(run.get_program())
        .chain(run.get_args())
        .map(|word| format!("'{}'", word.to_str().expect("UTF-8")))
        .collect();
    let mut shell = std::process::Command::new("bash");
    shell.args(["--norc", "--noprofile", "-i"]).env("PS1", "$ ").env("TERM", "xterm").env("HISTFILE", "");
    for (name, value) in run.get_envs() {
        shell.env(name, value.unwrap_or_default());
    }
    let child = terminal.lead(&mut shell);
    terminal.answer("$ ", &format!("{}\n", words.join(" ")));
    terminal.until("ready: http://");
    terminal.type_keys("\u{1a}");
    terminal.until("Stopped");
    terminal.answer("$ ", "fg\n");
    // The shell has given it the terminal by then.
    terminal.until("CONT\n");
    terminal.type_keys("\u{3}");
    terminal.answer("$ ", "echo code=$?; exit\n");
    terminal.until("code=130");
    terminal.end(child);
    scene.expect_nothing_left(port);
}

pub fn trials() -> Vec<Test> {
    let mut tests = vec![
        test("run::exit_codes_are_the_commands_own", exit_codes),
        test("run::a_bad_command_line_is_a_usage_error", usage),
        test("run::streams_pass_through", streams),
        test("run::the_port_is_given_to_the_command", the_port_is_given),
        test("run::a_descendant_may_be_the_one_that_listens", a_descendant_may_listen),
        test("run::a_taken_port_is_refused_with_its_holder", a_taken_port),
        test("run::fallback_takes_the_next_free_port", fallback),
        test("run::runs_at_once_choose_different_ports", fallback_race),
        test("run::replace_frees_the_port_first", replace),
        test("run::replace_is_denied_as_kill_is", replace_without_permission),
        test("run::a_server_of_udp_has_a_port_of_udp", udp),
        test("run::the_agent_tells_when_it_is_ready", told_by_the_agent),
        test("run::who_is_not_ready_in_time_is_ended", not_ready),
        test("run::ready_is_who_answers_2xx", healthy),
        test("run::signals_are_passed_on", signals_are_passed_on),
        test("run::the_command_dies_with_both_supervisors", both_killed),
        test("run::the_keeper_ends_what_portwatch_and_the_watcher_leave", front_and_watcher_killed),
        test("run::no_supervisor_outlives_portwatch", no_supervisor_outlives_the_front),
        test("run::orphans_are_reaped", zombies),
        test("run::nobody_else_is_hit", bystanders),
        test("run::children_from_before_go_on", children_from_before),
        test("run::ctrl_c_reaches_the_command_once", interrupted_at_a_terminal),
        test("run::ctrl_z_stops_it_and_fg_brings_it_back", stopped_at_a_terminal),
    ];
    tests.extend(servers::trials());
    tests.extend(host::trials());
    tests.extend(ends::trials());
    tests
}
