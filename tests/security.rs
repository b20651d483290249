//! What `portwatch/SECURITY.md` says of the agent's files, its log, its clients and its user, line by line.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::libc;
use nix::sys::stat::{Mode, umask};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::agent::{Agent, with_socket};
use crate::hostile::{assert_harmless, hostile_server};
use crate::puppet::{Stage, wait_readable};
use crate::subject::{Run, binary, finish, pidfd, plain_command, skip};
use crate::{Test, test};

/// An ordinary user whom nobody else on this machine is.
const USER: u32 = 64_997;

/// As `portwatch/PROTOCOL.md` says.
const CONNECTIONS_OF_ONE: usize = 256;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).mode() & 0o7777
}

/// An agent that cannot start.
#[track_caller]
fn refuses(socket: &Path, code: i32) -> Run {
    finish(with_socket(&["agent"], socket).spawn().expect("portwatch agent")).expect(code)
}

fn modes_whatever_the_umask() {
    for mask in [0, 0o022, 0o027] {
        let stage = Stage::new();
        let socket = stage.path("run").join("agent.sock");
        let before = umask(Mode::from_bits_truncate(mask));
        let command = with_socket(&["agent"], &socket);
        let mut agent = Agent::of(command, socket.clone());
        umask(before);
        let directory = socket.parent().expect("a directory");
        assert_eq!(mode(directory), 0o755 & !mask, "umask {mask:o}: nobody else writes there");
        assert_eq!(mode(&socket), 0o666, "umask {mask:o}: everybody may connect");
        assert_eq!(mode(&directory.join("agent.sock.lock")), 0o600, "umask {mask:o}: nobody else may lock");
        // The last of history is written before it ends.
        assert_eq!(agent.end(Signal::TERM), Some(0));
        assert_eq!(mode(&directory.join("history.db")), 0o640, "umask {mask:o}: its user writes, its group reads");
    }
}

/// What is in the place of the socket is not followed, and not removed unless it is a socket.
fn links_and_files_in_the_place_of_the_socket() {
    let stage = Stage::new();
    let victim = stage.path("victim");
    fs::write(&victim, "precious").expect("a file");
    fs::set_permissions(&victim, Permissions::from_mode(0o600)).expect("chmod");
    let link = stage.path("link.sock");
    symlink(&victim, &link).expect("a link");
    let dangling = stage.path("dangling.sock");
    symlink(stage.path("nothing"), &dangling).expect("a link");
    for place in [&link, &dangling, &victim] {
        let run = refuses(place, 4);
        assert!(run.errors().contains("is no socket"), "{}", run.errors());
        assert!(fs::symlink_metadata(place).is_ok(), "{} is gone", place.display());
    }
    assert_eq!((fs::read_to_string(&victim).expect("the file"), mode(&victim)), ("precious".into(), 0o600));
    assert!(!stage.path("nothing").exists());
    // A socket that is nobody's any more goes.
    let left = stage.path("left.sock");
    drop(UnixDatagram::bind(&left).expect("a socket"));
    Agent::of(with_socket(&["agent"], &left), left.clone()).end(Signal::TERM);
}

/// Neither the lock nor the history is made where a link points.
fn links_in_the_place_of_other_files() {
    let stage = Stage::new();
    let socket = stage.path("agent.sock");
    let elsewhere = ["lock", "history"].map(|name| stage.path(name));
    symlink(&elsewhere[0], stage.path("agent.sock.lock")).expect("a link");
    let run = refuses(&socket, 4);
    assert!(run.errors().contains("agent.sock.lock"), "{}", run.errors());
    fs::remove_file(stage.path("agent.sock.lock")).expect("rm");
    symlink(&elsewhere[1], stage.path("history.db")).expect("a link");
    // It goes on without history, and says so.
    let mut agent = Agent::of(with_socket(&["agent"], &socket), socket);
    assert!(agent.portwatch(&["status"]).expect(1).text().contains("history:"));
    assert_eq!(agent.end(Signal::TERM), Some(0));
    assert!(elsewhere.iter().all(|path| !path.exists()), "a file was made where a link points");
}

/// With everything logged, to a pipe and as if to the journal.
fn names_in_the_log(is_journal: bool) {
    let stage = Stage::new();
    let socket = stage.path("agent.sock");
    let (log, stderr) = std::io::pipe().expect("a pipe");
    let mut command = with_socket(&["agent", "--log", "trace"], &socket);
    if is_journal {
        let stat = rustix::fs::fstat(&log).expect("fstat");
        command.env("JOURNAL_STREAM", format!("{}:{}", stat.st_dev, stat.st_ino));
    }
    let mut child = command.stderr(stderr).spawn().expect("portwatch agent");
    drop(command);
    let mut log = BufReader::new(log);
    let mut said = String::new();
    while !said.contains("watching (") {
        assert!(log.read_line(&mut said).expect("the log") > 0, "the agent does not start: {said}");
    }
    let (puppet, sock) = hostile_server(&stage);
    let port = sock.port().to_string();
    let ask = |arguments: &[&str]| finish(with_socket(arguments, &socket).spawn().expect("portwatch"));
    assert_harmless("list", &ask(&["list", "--agent", &port]).expect(0).stdout);
    assert_harmless("who", &ask(&["who", "--agent", &port]).expect(0).stdout);
    drop(puppet);
    let agent = pidfd(&child);
    rustix::process::pidfd_send_signal(&agent, Signal::TERM).expect("the agent is gone");
    assert!(wait_readable(&agent));
    child.wait().expect("wait");
    log.read_to_string(&mut said).expect("the log");
    assert_harmless("the log", said.as_bytes());
    for line in said.lines().filter(|line| !line.starts_with("portwatch: ")) {
        let is_plain = match line.strip_prefix('<') {
            Some(rest) => is_journal && rest.as_bytes()[0].is_ascii_digit() && rest.as_bytes()[1] == b'>',
            None => !is_journal && line.starts_with("20"),
        };
        assert!(is_plain, "no line of the log's own: {line:?}");
    }
}

/// A copy of the binary that everybody may run.
fn copy_for_all(stage: &Stage) -> std::path::PathBuf {
    let copy = stage.path("portwatch");
    fs::copy(binary(), &copy).expect("copying the binary");
    fs::set_permissions(&copy, Permissions::from_mode(0o755)).expect("chmod");
    copy
}

fn agent_of_an_ordinary_user() {
    if !rustix::process::geteuid().is_root() {
        return skip("root", "only root can become somebody else");
    }
    let stage = Stage::new();
    let (copy, own) = (copy_for_all(&stage), stage.path("own"));
    fs::create_dir(&own).expect("a directory");
    chown(&own, Some(USER), Some(USER)).expect("chown");
    let server = stage.puppet();
    let sock = server.serve();
    let target = format!("{}/tcp", sock.port());
    let as_user = |arguments: &[&str]| {
        let mut command = plain_command(&copy, arguments);
        command.uid(USER).gid(USER).current_dir("/");
        command.env("PORTWATCH_SOCKET", own.join("agent.sock")).env("PORTWATCH_STATE", &own);
        command
    };
    let agent = Agent::of(as_user(&["agent"]), own.join("agent.sock"));
    assert_eq!(agent.portwatch(&["status", "--json"]).expect(0).json()["agent"]["tier"], "poll");
    // Nor does it show root more than its user may see.
    for run in [
        agent.portwatch(&["list", "--json", &target]),
        finish(as_user(&["list", "--agent", "--json", &target]).spawn().expect("portwatch")),
    ] {
        let listeners = run.expect(0).json();
        assert_eq!((&listeners[0]["uid"], &listeners[0]["holders"]), (&json!(0), &json!([])), "{listeners}");
    }
    // Where the agent of the system belongs, it cannot be.
    let taken = stage.path("system");
    fs::create_dir(&taken).expect("a directory");
    let mut command = as_user(&["agent"]);
    let run = finish(command.env("PORTWATCH_SOCKET", taken.join("agent.sock")).spawn().expect("portwatch")).expect(3);
    assert!(run.errors().contains("Permission denied"), "{}", run.errors());
}

/// A container that was given the socket: root of its own user namespace, with PIDs and ports of its own.
fn client_in_a_container() {
    if !rustix::process::geteuid().is_root() {
        return skip("root", "the namespaces are made by root");
    }
    let stage = Stage::new();
    let server = stage.puppet();
    let sock = server.serve();
    let agent = Agent::start(&stage);
    let target = format!("{}/tcp", sock.port());
    let ask = |arguments: &[&str]| {
        // The shell stays in the namespace of PIDs that it was born in; its child is the first of a new one.
        let mut command = Command::new("sh");
        command.args(["-c", "\"$@\"; exit $?", "sh"]).arg(binary()).args(arguments).arg("--agent");
        let plain = plain_command("sh", &[]);
        command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.env("PORTWATCH_SOCKET", &agent.socket).stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let spaces = libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC;
        // SAFETY: unshare is a bare system call, which may be made between fork and exec.
        unsafe {
            command.pre_exec(move || match libc::unshare(spaces) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        command.spawn().map(finish)
    };
    let own = match ask(&["list", "--json"]) {
        Ok(run) => run.expect(0).json(),
        Err(error) => return skip("userns", &format!("no user namespace can be made: {error}")),
    };
    assert_eq!(own, json!([]), "its own namespace has no listener, and no other is meant");
    let run = ask(&["who", &target]).expect("as before").expect(1);
    assert!(run.errors().is_empty() || !run.errors().contains("puppet"), "{}", run.errors());
    // Who is given the socket may ask for all the same.
    let all = ask(&["list", "--json", "--netns", "all", &target]).expect("as before").expect(0).json();
    assert_eq!(all[0]["holders"][0]["pid"], server.pid, "{all}");
    assert!(server.is_alive());
}

/// Root of a user namespace is whoever made that: its connections count as that user's, who may have so many.
fn root_of_a_user_namespace() {
    if !rustix::process::geteuid().is_root() {
        return skip("root", "only root can become somebody else");
    }
    let stage = Stage::new();
    let copy = copy_for_all(&stage);
    let agent = Agent::start(&stage);
    let address = nix::sys::socket::UnixAddr::new(&agent.socket).expect("an address");
    // All that one user may have, held by a shell until its input ends.
    let mut crowd = Command::new("sh");
    crowd.args(["-c", "read line"]).stdin(std::process::Stdio::piped()).uid(USER).gid(USER);
    // SAFETY: bare system calls, on an address that was made before the fork.
    unsafe {
        crowd.pre_exec(move || {
            for _ in 0..CONNECTIONS_OF_ONE {
                let fd = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0);
                let size = nix::sys::socket::SockaddrLike::len(&address);
                if libc::connect(fd, nix::sys::socket::SockaddrLike::as_ptr(&address), size) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let mut crowd = crowd.spawn().expect("a crowd");
    let ask = |is_root_there: bool| {
        let mut command = plain_command(&copy, &["list", "--agent"]);
        command.env("PORTWATCH_SOCKET", &agent.socket).uid(USER).gid(USER).current_dir("/");
        // SAFETY: bare system calls, on strings that end in NUL.
        unsafe {
            command.pre_exec(move || {
                if !is_root_there {
                    return Ok(());
                }
                // Who changed its user may not write to its own /proc before.
                libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0);
                if libc::unshare(libc::CLONE_NEWUSER) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                let map = c"0 64997 1";
                let fd = libc::open(c"/proc/self/uid_map".as_ptr(), libc::O_WRONLY);
                match libc::write(fd, map.as_ptr().cast(), map.count_bytes()) {
                    written if written < 0 => Err(std::io::Error::last_os_error()),
                    _ => Ok(()),
                }
            });
        }
        command.spawn().map(finish)
    };
    for is_root_there in [false, true] {
        match ask(is_root_there) {
            Ok(run) => assert!(run.errors().contains("too many connections"), "{is_root_there}: {}", run.errors()),
            Err(error) => skip("userns", &format!("no user namespace can be made: {error}")),
        }
    }
    // Root has places that nobody else may take.
    agent.portwatch(&["list"]).expect(0);
    drop(crowd.stdin.take());
    crowd.wait().expect("wait");
}

/// No request makes the agent signal, write or run anything: what it does not know, it refuses.
fn requests_that_are_not_there() {
    use std::io::Write as _;
    let stage = Stage::new();
    let server = stage.puppet();
    server.serve();
    let agent = Agent::start(&stage);
    let stream = std::os::unix::net::UnixStream::connect(&agent.socket).expect("the agent's socket");
    stream.set_read_timeout(Some(crate::puppet::PATIENCE)).expect("a time-out");
    let mut stream = BufReader::new(stream);
    let mut ask = |line: String| -> Value {
        stream.get_mut().write_all((line + "\n").as_bytes()).expect("writing to the agent");
        let mut answer = String::new();
        stream.read_line(&mut answer).expect("an answer");
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"))
    };
    assert_eq!(ask(r#"{"request":"hello","version":1}"#.into())["response"], "hello");
    for verb in ["signal", "exec", "stop", "open", "reload", "shutdown"] {
        let answer = ask(json!({"request": verb, "pid": server.pid}).to_string());
        assert_eq!((&answer["response"], &answer["kind"]), (&json!("error"), &json!("usage")), "{answer}");
    }
    assert!(server.is_alive());
}

pub fn trials() -> Vec<Test> {
    vec![
        test("security::files_have_their_modes_whatever_the_umask", modes_whatever_the_umask),
        test(
            "security::what_is_in_the_place_of_the_socket_is_neither_followed_nor_removed",
            links_and_files_in_the_place_of_the_socket,
        ),
        test("security::neither_lock_nor_history_is_made_where_a_link_points", links_in_the_place_of_other_files),
        test("security::no_name_breaks_a_line_of_the_log", || names_in_the_log(false)),
        test("security::no_name_breaks_a_line_of_the_journal", || names_in_the_log(true)),
        test("security::an_agent_of_an_ordinary_user_tells_what_that_user_sees", agent_of_an_ordinary_user),
        test("security::a_client_in_a_container_is_in_its_own_namespace_unless_it_asks", client_in_a_container),
        test("security::root_of_a_user_namespace_is_the_user_who_made_it", root_of_a_user_namespace),
        test("security::a_request_that_is_not_in_the_protocol_does_nothing", requests_that_are_not_there),
    ]
}
