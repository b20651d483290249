//! The service manager is played: its sockets, its environment, its pipe. The service is this program again, as a child.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::libc;

use super::*;

/// Set in the child.
const ROLE: &str = "PORTWATCH_TEST_ROLE";

/// What a child is given by the manager.
#[derive(Default)]
struct Given {
    variables: Vec<(&'static str, String)>,
    /// Becomes descriptor 3.
    socket: Option<std::os::fd::OwnedFd>,
    stderr: Option<std::io::PipeWriter>,
}

/// Starts `role` (a test of this file) under a shell that knows its own PID, and so the one of the service.
fn start(role: &str, given: Given) -> std::process::Child {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("service::tests::{role}"), "--nocapture", "--test-threads=1"]);
    for name in ["JOURNAL_STREAM", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", log::VARIABLE] {
        command.env_remove(name);
    }
    command.env(ROLE, role).envs(given.variables).stdin(Stdio::null()).stdout(Stdio::null());
    if let Some(stderr) = given.stderr {
        command.stderr(stderr);
    }
    if let Some(socket) = given.socket {
        // SAFETY: these calls are async-signal-safe, and the closure owns the descriptor. By way of another number, since
        // dup2 of 3 to 3 would leave it closed on exec.
        unsafe {
            command.pre_exec(move || {
                let fd = libc::fcntl(socket.as_raw_fd(), libc::F_DUPFD, 4);
                if fd < 0 || libc::dup2(fd, 3) < 0 || libc::close(fd) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
    }
    command.spawn().unwrap()
}

fn is_child(role: &str) -> bool {
    std::env::var(ROLE).is_ok_and(|value| value == role)
}

#[test]
fn role_that_tells_of_itself() {
    if !is_child("role_that_tells_of_itself") {
        return;
    }
    log::start(None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut watchdog = {
        let _guard = runtime.enter();
        Watchdog::from_env()
    };
    ready("watching (tracepoint)\nMAINPID=1");
    runtime.block_on(watchdog.beat());
    reloading();
    ready("watching (fexit)");
    status("7 listeners");
    stopping("told to");
    tracing::error!(port = 8000, "the probes are gone");
    tracing::info!(peer_uid = 1000, targets = ?[7, 9], command = "a b\"=\\\n<0>forged \x1b[31m", "a port was freed");
    tracing::info!(name = "node", nothing = "", cwd = %"/srv", "plain\nlines");
    tracing::debug!("not of interest");
    ::log::warn!("from another crate: {}", "x\ny");
    ::log::debug!(target: "aya::programs", "not of interest");
    tracing::info_span!("connection", peer_pid = 42).in_scope(|| tracing::warn!(target: "hyper", "refused"));
}

/// Runs the role with these variables beside the usual; what it told the manager, and what it logged.
fn told_and_logged(journal: bool) -> (Vec<String>, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut variables =
        vec![("NOTIFY_SOCKET", path.to_str().unwrap().to_owned()), ("WATCHDOG_USEC", "20000".to_owned())];
    // A stream that stderr once was: only its own name counts.
    let stat = rustix::fs::fstat(&writer).unwrap();
    let inode = if journal { stat.st_ino } else { stat.st_ino + 1 };
    variables.push(("JOURNAL_STREAM", format!("{}:{inode}", stat.st_dev)));
    let given = Given { variables, stderr: Some(writer), ..Given::default() };
    let mut child = start("role_that_tells_of_itself", given);
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    assert!(child.wait().unwrap().success(), "{log}");
    let mut buffer = [0; 4096];
    let mut receive = || {
        let len = manager.recv(&mut buffer)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&buffer[..len]).into_owned())
    };
    let told = (0..6).map(|_| receive().unwrap()).collect();
    manager.set_nonblocking(true).unwrap();
    assert!(receive().is_err(), "more than expected");
    (told, log)
}

#[test]
fn the_manager_is_told_and_the_journal_gets_priorities() {
    let (told, log) = told_and_logged(true);
    let (reloading, now) = told[2].split_once("MONOTONIC_USEC=").unwrap();
    assert!(now.trim_end().parse::<u64>().unwrap() > 0);
    assert_eq!(
        (&told[..2], reloading, &told[3..]),
        (
            &["READY=1\nSTATUS=watching (tracepoint)\\nMAINPID=1\n".to_owned(), "WATCHDOG=1\n".to_owned()][..],
            "RELOADING=1\n",
            &[
                "READY=1\nSTATUS=watching (fexit)\n".to_owned(),
                "STATUS=7 listeners\n".to_owned(),
                "STOPPING=1\nSTATUS=told to\n".to_owned(),
            ][..]
        )
    );
    let expected = "<3>the probes are gone port=8000\n\
        <6>a port was freed peer_uid=1000 targets=\"[7, 9]\" command=\"a b\\\"=\\\\\\n<0>forged \\x1b[31m\"\n\
        <6>plain\\nlines name=node nothing=\"\" cwd=/srv\n\
        <4>from another crate: x\\ny\n\
        <4>hyper: refused peer_pid=42\n";
    assert_eq!(log, expected);
}

#[test]
fn elsewhere_each_line_has_its_time_and_level() {
    let (_, log) = told_and_logged(false);
    let lines: Vec<(&str, &str)> = log.lines().map(|line| line.split_once(' ').unwrap()).collect();
    assert!(lines.iter().all(|(time, _)| time.parse::<jiff::Timestamp>().is_ok()), "{log}");
    let expected = [
        "error the probes are gone port=8000",
        "info a port was freed peer_uid=1000 targets=\"[7, 9]\" command=\"a b\\\"=\\\\\\n<0>forged \\x1b[31m\"",
        "info plain\\nlines name=node nothing=\"\" cwd=/srv",
        "warn from another crate: x\\ny",
        "warn hyper: refused peer_pid=42",
    ];
    assert_eq!(lines.iter().map(|(_, rest)| *rest).collect::<Vec<_>>(), expected);
}

#[test]
fn role_that_serves_one_client() {
    if !is_child("role_that_serves_one_client") {
        return;
    }
    let listener = match activated() {
        Ok(listener) => listener.expect("a socket"),
        Err(error) => {
            eprintln!("{error:#}");
            return;
        }
    };
    assert!(activated().unwrap().is_none(), "taken once");
    listener.set_nonblocking(false).unwrap();
    listener.accept().unwrap().0.write_all(b"served\n").unwrap();
}

/// What a child that is handed the socket says on stderr.
fn activate(socket: std::os::fd::OwnedFd) -> std::process::Child {
    let variables = vec![("LISTEN_FDS", "1".to_owned()), ("LISTEN_FDNAMES", "portwatch.socket".to_owned())];
    start("role_that_serves_one_client", Given { variables, socket: Some(socket), stderr: None })
}

#[test]
fn a_client_that_came_before_the_service_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    let mut child = activate(listener.into());
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "served\n");
    assert!(child.wait().unwrap().success());
}

#[test]
fn what_is_no_socket_to_listen_on_is_refused_with_the_next_step() {
    let connection = UnixStream::pair().unwrap().0;
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let cases: [(std::os::fd::OwnedFd, &str); 2] = [
        (connection.into(), "passes a connection, not a socket that listens; set Accept=no in portwatch.socket\n"),
        (
            tcp.into(),
            "cannot take the socket that the service manager passes: fd 3 is not a valid unix stream socket\n",
        ),
    ];
    for (socket, expected) in cases {
        let (mut reader, stderr) = std::io::pipe().unwrap();
        let variables = vec![("LISTEN_FDS", "1".to_owned())];
        let given = Given { variables, socket: Some(socket), stderr: Some(stderr) };
        let mut child = start("role_that_serves_one_client", given);
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert!(said.ends_with(expected), "{said}");
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn the_socket_is_found_by_its_name_unless_it_is_alone() {
    for (count, names, expected) in [
        (1, "", Some(0)),
        (1, "portwatch.socket", Some(0)),
        (2, "metrics:agent", Some(1)),
        (2, "agent:metrics", Some(0)),
        (2, "agent:agent", None),
        (2, "", None),
        (2, "a:b:agent", None),
    ] {
        assert_eq!(choose(count, names).ok(), expected, "{count} {names}");
    }
    assert_eq!(
        choose(2, "a\n:b").unwrap_err().to_string(),
        "the service manager passes 2 sockets (a\\n:b); name one of them agent (FileDescriptorName=)"
    );
}

#[test]
fn without_a_manager_there_is_nobody_to_beat_for() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut watchdog = Watchdog { due: None };
        tokio::select! {
            biased;
            () = watchdog.beat() => panic!("nobody wants it"),
            () = std::future::ready(()) => {}
        }
    });
}

#[test]
fn filters_are_levels_or_modules_and_the_loader_is_quiet() {
    use tracing::level_filters::LevelFilter;
    for (text, portwatch, aya) in [
        ("info", LevelFilter::INFO, LevelFilter::WARN),
        ("error", LevelFilter::ERROR, LevelFilter::ERROR),
        ("trace", LevelFilter::TRACE, LevelFilter::WARN),
        ("off", LevelFilter::OFF, LevelFilter::OFF),
        ("debug,aya=debug", LevelFilter::DEBUG, LevelFilter::DEBUG),
        ("warn,portwatch=trace", LevelFilter::TRACE, LevelFilter::WARN),
    ] {
        let filter: log::Filter = text.parse().unwrap();
        assert_eq!((filter.level("portwatch::agent"), filter.level("aya_obj::btf")), (portwatch, aya), "{text}");
    }
    for text in ["loud", "portwatch=loud", "a=b=c"] {
        assert!(text.parse::<log::Filter>().unwrap_err().starts_with("no level '"), "{text}");
    }
}
