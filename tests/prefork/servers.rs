//! Real servers: nginx, gunicorn, php-fpm, a node cluster, and one of our own that brings back every worker it loses.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::gate;
use crate::puppet::{Sock, Stage, wait_readable};
use crate::subject::{self, command, pidfd, skip};
use crate::watcher::Watch;
use crate::{Test, test};

/// A program with a master and workers that share a port of 127.0.0.1.
struct Server {
    master: Child,
    master_pidfd: OwnedFd,
    /// The workers as they were when it was ready.
    workers: Vec<(u32, OwnedFd)>,
    said: BufReader<PipeReader>,
    directory: TempDir,
}

/// What tells that a worker is ready.
enum Ready {
    /// A line with this text for each.
    Each(&'static str),
    /// One line with this text for all.
    All(&'static str),
}

impl Server {
    /// Starts `program` in a directory with these files and waits until `workers` are ready. Both the arguments and the
    /// files may say PORT and DIR. The port is bound, with SO_REUSEADDR and not listening, by `reserve`.
    fn start(
        program: &Path,
        arguments: &[&str],
        files: &[(&str, &str)],
        reserve: &Sock,
        workers: usize,
        ready: &Ready,
    ) -> Server {
        let directory = tempfile::Builder::new().prefix("portwatch-server-").tempdir().expect("a directory");
        let place = directory.path().to_str().expect("UTF-8");
        let fill = |text: &str| text.replace("PORT", &reserve.port().to_string()).replace("DIR", place);
        for (name, text) in files {
            fs::write(directory.path().join(name), fill(text)).expect("writing a file of the server");
        }
        let (reader, writer) = std::io::pipe().expect("pipe");
        let mut command = Command::new(program);
        command.args(arguments.iter().map(|argument| fill(argument))).current_dir(directory.path());
        command.stdin(Stdio::null()).stdout(writer.try_clone().expect("dup")).stderr(writer);
        // SAFETY: prctl is async-signal-safe and takes integers.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                Ok(())
            });
        }
        let master = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        // The writing ends are the server's alone.
        drop(command);
        let master_pidfd = pidfd(&master);
        let said = BufReader::new(reader);
        let mut server = Server { master, master_pidfd, workers: Vec::new(), said, directory };
        match *ready {
            Ready::Each(text) => (0..workers).for_each(|_| server.until(text)),
            Ready::All(text) => server.until(text),
        }
        let children = children(server.master.id());
        assert_eq!(children.len(), workers, "{program:?} has other children than its workers: {children:?}");
        server.workers = children.into_iter().map(|pid| (pid, open(pid).expect("a worker"))).collect();
        server
    }

    /// Reads on to the line that has this text.
    #[track_caller]
    fn until(&mut self, text: &str) {
        let mut all = String::new();
        loop {
            let ready = !self.said.buffer().is_empty() || wait_readable(self.said.get_ref());
            assert!(ready, "the server does not say '{text}': {all}");
            let from = all.len();
            let length = self.said.read_line(&mut all).expect("reading what the server says");
            assert!(length > 0, "the server ended without '{text}': {all}");
            if all[from..].contains(text) {
                return;
            }
        }
    }

    /// Everything it said after what was waited for, once all its processes ended.
    fn rest(&mut self) -> String {
        let mut rest = String::new();
        self.said.read_to_string(&mut rest).expect("reading what the server says");
        rest
    }

    fn family(&self) -> BTreeSet<u64> {
        self.workers.iter().map(|(pid, _)| *pid).chain([self.master.id()]).map(u64::from).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Whoever is left after a test that failed; orphans of the master are given to this process. It may have
        // failed before its workers were known.
        let master = self.master.id();
        if is_alive(&self.master_pidfd) {
            let known = |pid: &u32| self.workers.iter().any(|(worker, _)| worker == pid);
            let unknown: Vec<u32> = children(master).into_iter().filter(|pid| !known(pid)).collect();
            self.workers.extend(unknown.into_iter().filter_map(|pid| Some((pid, open(pid)?))));
        }
        let pidfds = || [&self.master_pidfd].into_iter().chain(self.workers.iter().map(|(_, pidfd)| pidfd));
        for pidfd in pidfds() {
            let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
        }
        for pidfd in pidfds() {
            wait_readable(pidfd);
            let _ = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
        }
    }
}

/// `None`: it is gone.
fn open(pid: u32) -> Option<OwnedFd> {
    rustix::process::pidfd_open(Pid::from_raw(pid as i32)?, PidfdFlags::empty()).ok()
}

fn is_alive(pidfd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&now)).expect("poll") == 0
}

fn children(parent: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_child = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        rest.split_whitespace().nth(1) == Some(&parent.to_string())
    };
    pids.filter(is_child).collect()
}

/// How a server of this kind ends.
#[derive(Clone, Copy)]
struct Manner {
    /// Only the master is signalled: it sees to the rest. Else workers may get a signal after the master's end.
    by_one_signal: bool,
    /// The port is free when all have ended, no earlier. Else some may have let go of it and not come to their end.
    port_last: bool,
}

/// Kills the port of a server and checks that the master was told first, no worker while it lived, and that all is over.
#[track_caller]
fn check(program: &str, arguments: &[&str], files: &[(&str, &str)], workers: usize, ready: &Ready, manner: Manner) {
    let Some(path) = subject::program(program) else { return skip(program, &format!("{program} is not installed")) };
    let stage = Stage::new();
    let (reserve, neighbour) = (stage.puppet(), stage.puppet());
    let reserved = reserve.bind("127.0.0.1:0", "reuseaddr");
    neighbour.serve();
    let mut server = Server::start(&path, arguments, files, &reserved, workers, ready);
    reserve.close(reserved.fd);

    let family = server.family();
    let master = server.master.id();
    let mut sent: Vec<(u32, i32, bool)> = Vec::new();
    let target = format!("{}/tcp", reserved.port());
    let run = gate::signals(command(&["kill", &target, "--json", "--grace", "30s"]), |pid, signal| {
        sent.push((pid, signal, is_alive(&server.master_pidfd)));
    });
    let outcome = run.expect(0).json()[0].clone();
    let killed: Option<BTreeSet<u64>> =
        outcome["killed"].as_array().map(|pids| pids.iter().filter_map(Value::as_u64).collect());
    let killed = killed.unwrap_or_default();
    assert!(killed.is_subset(&family) && (!manner.port_last || killed == family), "{outcome}");
    let mut gist = json!({
        "port": reserved.port(), "proto": "tcp", "status": "cleaned", "killed": outcome["killed"], "forced": [],
        "failed": [], "ghost": [], "still_listening": false, "remaining_pids": [], "elapsed_ms": outcome["elapsed_ms"],
        "diagnostics": null,
    });
    if !manner.port_last {
        gist["diagnostics"] = outcome["diagnostics"].clone();
    }
    assert_eq!(outcome, gist);
    assert_eq!(sent[0], (master, libc::SIGTERM, true), "{sent:?}");
    for (pid, signal, master_lives) in &sent[1..] {
        assert!(*signal == libc::SIGTERM && !master_lives, "{pid} was signalled beside its master: {sent:?}");
    }
    assert!(!manner.by_one_signal || sent.len() == 1, "{sent:?}\n{}", server.rest());

    assert!(wait_readable(&server.master_pidfd), "the master does not end");
    assert!(server.workers.iter().all(|(_, worker)| wait_readable(worker)), "a worker does not end");
    assert!(children(master).is_empty());
    neighbour.tcp(&reserved.address.to_string(), "");
    assert!(neighbour.is_alive());
}

const NGINX: &str = "
daemon off;
worker_processes 2;
pid DIR/pid;
error_log stderr notice;
events {}
http {
    access_log off;
    client_body_temp_path DIR/body;
    proxy_temp_path DIR/proxy;
    fastcgi_temp_path DIR/fastcgi;
    uwsgi_temp_path DIR/uwsgi;
    scgi_temp_path DIR/scgi;
    server { listen 127.0.0.1:PORT; }
}
";

const PHP_FPM: &str = "
[global]
error_log = /proc/self/fd/2
log_level = debug
daemonize = no
[www]
listen = 127.0.0.1:PORT
pm = static
pm.max_children = 2
";

/// Its workers are replaced when they end, as in the documentation of node, and have the socket themselves.
const NODE: &str = "
const cluster = require('cluster');
cluster.schedulingPolicy = cluster.SCHED_NONE;
if (cluster.isPrimary) {
  for (let i = 0; i < 3; i++) cluster.fork();
  cluster.on('exit', () => cluster.fork());
  cluster.on('listening', () => console.log('a worker listens'));
} else {
  require('http').createServer().listen(PORT, '127.0.0.1');
}
";

/// Answers once somebody writes into the pipe beside it.
const WSGI: &str = "
import sys
def app(environ, start_response):
    print('serving', file=sys.stderr, flush=True)
    open('DIR/go').read()
    start_response('200 OK', [('Content-Length', '5')])
    return [b'done\\n']
";

/// Brings back whom it loses for as long as it lives; at SIGTERM it ends its workers one after the other.
const PREFORK: &str = "
import os, signal, socket
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(('127.0.0.1', PORT))
listener.listen()
workers = []
def start():
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(1, b'worker ready\\n')
        while True:
            listener.accept()
    workers.append(pid)
def stop(signum, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listener.close()
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
for _ in range(3):
    start()
while True:
    pid, _ = os.wait()
    workers.remove(pid)
    start()
";

const GUNICORN: [&str; 5] = ["--workers", "3", "--bind", "127.0.0.1:PORT", "app:app"];

pub(super) fn trials() -> Vec<Test> {
    vec![
        test("prefork::nginx_gets_one_term_and_ends_its_workers", || {
            let files = [("nginx.conf", NGINX)];
            let ready = Ready::Each("start worker process ");
            let arguments = ["-p", "DIR", "-e", "stderr", "-c", "DIR/nginx.conf"];
            check("nginx", &arguments, &files, 2, &ready, Manner { by_one_signal: true, port_last: true });
        }),
        test("prefork::gunicorn_gets_one_term_and_ends_its_workers", || {
            let ready = Ready::Each("Booting worker with pid");
            check(
                "gunicorn",
                &GUNICORN,
                &[("app.py", WSGI)],
                3,
                &ready,
                Manner { by_one_signal: true, port_last: false },
            );
        }),
        test("prefork::gunicorn_with_a_socket_for_each_worker_is_led_by_its_master_too", || {
            let arguments = [&["--reuse-port"], &GUNICORN[..]].concat();
            let ready = Ready::Each("Booting worker with pid");
            check(
                "gunicorn",
                &arguments,
                &[("app.py", WSGI)],
                3,
                &ready,
                Manner { by_one_signal: true, port_last: false },
            );
        }),
        test("prefork::php_fpm_gets_one_term_and_ends_its_workers", || {
            let ready = Ready::All("ready to handle connections");
            let arguments = ["-n", "-R", "-p", "DIR", "-y", "DIR/fpm.conf"];
            let as_root = rustix::process::geteuid().is_root();
            let user = if as_root { "user = root\ngroup = root\n" } else { "" };
            check(
                "php-fpm",
                &arguments,
                &[("fpm.conf", &[PHP_FPM, user].concat())],
                2,
                &ready,
                Manner { by_one_signal: true, port_last: true },
            );
        }),
        test("prefork::a_node_cluster_is_ended_by_its_primary", || {
            let ready = Ready::Each("a worker listens");
            check(
                "node",
                &["DIR/cluster.js"],
                &[("cluster.js", NODE)],
                3,
                &ready,
                Manner { by_one_signal: false, port_last: false },
            );
        }),
        test("prefork::a_master_that_replaces_its_workers_is_ended_first", || {
            let ready = Ready::Each("worker ready");
            check(
                "python3",
                &["DIR/prefork.py"],
                &[("prefork.py", PREFORK)],
                3,
                &ready,
                Manner { by_one_signal: true, port_last: false },
            );
        }),
        test("prefork::a_worker_finishes_its_request_though_the_master_closed_the_socket_long_ago", || {
            let Some(path) = subject::program("gunicorn") else { return skip("gunicorn", "gunicorn is not installed") };
            let stage = Stage::new();
            let reserve = stage.puppet();
            let reserved = reserve.bind("127.0.0.1:0", "reuseaddr");
            let ready = Ready::Each("Booting worker with pid");
            let files = [("app.py", WSGI)];
            let mut server = Server::start(&path, &GUNICORN, &files, &reserved, 3, &ready);
            reserve.close(reserved.fd);
            let go = server.directory.path().join("go");
            nix::unistd::mkfifo(&go, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
            let mut client = request(reserved.address);
            server.until("serving");

            let mut watch = Watch::start("poll");
            let target = format!("{}/tcp", reserved.port());
            let kill = thread::spawn(move || {
                let mut sent = Vec::new();
                let command = command(&["kill", &target, "--json", "--grace", "30s"]);
                let run = gate::signals(command, |pid, signal| sent.push((u64::from(pid), signal)));
                (run, sent)
            });
            // The master lets go of the port at once; the busy worker has it still.
            let master = u64::from(server.master.id());
            let port = reserved.port();
            watch.until("the master without the socket", |event| {
                let has_master = |holder: &Value| holder["pid"] == master;
                event["event"] == "holder"
                    && event["listener"]["port"] == port
                    && !event["listener"]["holders"].as_array().is_some_and(|all| all.iter().any(has_master))
            });
            fs::OpenOptions::new().write(true).open(&go).expect("the worker waits").write_all(b"go").expect("fifo");
            let mut answer = String::new();
            client.read_to_string(&mut answer).expect("an answer");
            assert!(answer.starts_with("HTTP/1.0 200 OK") && answer.ends_with("done\n"), "{answer}");
            let (run, sent) = kill.join().expect("the thread of kill");
            let outcome = run.expect(0).json()[0].clone();
            assert_eq!(sent, [(master, libc::SIGTERM)], "{outcome}");
            assert_eq!((&outcome["status"], &outcome["forced"]), (&json!("cleaned"), &json!([])), "{outcome}");
        }),
    ]
}

fn request(server: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(server).expect("connect");
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("a request");
    client
}
