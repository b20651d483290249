//! A real dockerd, apart from the host: with its own network and mount namespaces, containerd, data and control groups.
//!
//! Its packet filter rules, bridge and published ports are in its network namespace, where portwatch runs as well; its
//! mounts are in its mount namespace; both are gone when it is. One serves all tests of a run, started by the first
//! that needs it. When the test program dies the kernel tells dockerd, which ends its containers.

use std::cell::Cell;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use nix::libc;
use nix::sched::{CloneFlags, setns};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde_json::Value;
use tempfile::TempDir;

use crate::puppet::{PATIENCE, sys, wait_readable};
use crate::subject::{self, Run, finish, skip};

/// The image that every container runs.
const IMAGE: &str = "portwatch-test";

/// Where control groups may be mounted: version 2 alone, or version 1 with a hierarchy each.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Where older daemons write a key, whatever they are told.
const KEY: &str = "/etc/docker/key.json";

pub struct Dockerd {
    child: Child,
    directory: TempDir,
    netns: File,
    /// The parent of its containers' control groups.
    cgroup: String,
    had_key: bool,
    containers: Mutex<u32>,
}

/// A running container, removed when dropped.
pub struct Container {
    daemon: Arc<Dockerd>,
    pub name: String,
    /// 64 digits.
    pub id: String,
}

thread_local! {
    /// Tests run in one thread, the main one: it is also whose end ends the daemon.
    static SHARED: Cell<Option<Result<Arc<Dockerd>, String>>> = const { Cell::new(None) };
}

/// The daemon of all tests; `None`, loudly, where there can be none.
#[track_caller]
pub fn shared() -> Option<Arc<Dockerd>> {
    let daemon = SHARED.take().unwrap_or_else(|| Dockerd::start(&[]).map(Arc::new));
    SHARED.set(Some(daemon.clone()));
    available(daemon)
}

/// Another daemon, for one test.
#[track_caller]
pub fn with(arguments: &[&str]) -> Option<Arc<Dockerd>> {
    available(Dockerd::start(arguments).map(Arc::new))
}

#[track_caller]
fn available(daemon: Result<Arc<Dockerd>, String>) -> Option<Arc<Dockerd>> {
    daemon.map_err(|reason| skip("docker", &reason)).ok()
}

/// Ends the daemon of all tests. False where there was none.
pub fn end() -> bool {
    matches!(SHARED.take(), Some(Ok(_)))
}

fn program(name: &str) -> Result<PathBuf, String> {
    subject::program(name).ok_or_else(|| format!("{name} is not installed"))
}

impl Dockerd {
    fn start(arguments: &[&str]) -> Result<Dockerd, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root can start dockerd".to_owned());
        }
        let (dockerd, busybox) = (program("dockerd")?, program("busybox")?);
        program("docker")?;
        program("containerd")?;
        let directory = tempfile::Builder::new().prefix("portwatch-dockerd-").tempdir().expect("a temporary directory");
        let path = |name: &str| directory.path().join(name);
        fs::write(path("daemon.json"), "{}").expect("daemon.json");
        let log = File::create(path("log")).expect("a log");
        let ready = UnixDatagram::bind(path("ready")).expect("a socket to be notified by");
        let name = directory.path().file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        let had_key = Path::new(KEY).exists();

        let mut command = Command::new(dockerd);
        command.arg("--config-file").arg(path("daemon.json")).arg("--pidfile").arg(path("pid"));
        command.arg("--data-root").arg(path("data")).arg("--exec-root").arg(path("exec"));
        command.arg("-H").arg(format!("unix://{}", path("socket").display()));
        // Whatever the host's init does: groups by path, so that their names are known.
        command.args(["--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", &format!("/{name}")]);
        command.args(["--storage-driver", "vfs", "--bip", "172.31.250.1/24"]).args(arguments);
        command.env("NOTIFY_SOCKET", path("ready")).current_dir("/");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("dup")).stderr(log);
        // SAFETY: system calls alone, on static strings: nothing that is not async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                sys::check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM, 0, 0, 0))?;
                sys::unshare_net()?;
                sys::check(libc::unshare(libc::CLONE_NEWNS))?;
                mount(c"none", c"/", None, libc::MS_REC | libc::MS_PRIVATE)?;
                // The host's containerd is not to be found, nor anything of ours to be left there.
                mount(c"run", c"/run", Some(c"tmpfs"), 0)
            });
        }
        let child = command.spawn().map_err(|error| format!("dockerd cannot be started: {error}"))?;
        let netns = File::open(format!("/proc/{}/ns/net", child.id())).expect("a network namespace");
        let daemon = Dockerd { child, directory, netns, cgroup: name, had_key, containers: Mutex::new(0) };
        if !daemon.is_ready(&ready) {
            return Err(format!("dockerd does not start: {}", daemon.last_words()));
        }
        daemon.import(&busybox)?;
        Ok(daemon)
    }

    /// Waits until it serves, as it would tell systemd; false where it ends or says nothing.
    fn is_ready(&self, ready: &UnixDatagram) -> bool {
        let mut message = [0; 256];
        loop {
            let ended = subject::pidfd(&self.child);
            let mut fds = [PollFd::new(ready, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
            let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
            match poll(&mut fds, Some(&limit)) {
                Err(rustix::io::Errno::INTR) => continue,
                other if other.expect("poll") == 0 => return false,
                _ => {}
            }
            if fds[0].revents().is_empty() {
                return false;
            }
            let length = ready.recv(&mut message).expect("a notification");
            if message[..length].split(|&byte| byte == b'\n').any(|line| line == b"READY=1") {
                return true;
            }
        }
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(5).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Makes the image: busybox and nothing else.
    fn import(&self, busybox: &Path) -> Result<(), String> {
        let root = self.directory.path().join("image");
        fs::create_dir_all(root.join("bin")).expect("a directory");
        fs::copy(busybox, root.join("bin/busybox")).expect("busybox");
        let archive = Command::new("tar").arg("-C").arg(&root).args(["-c", "."]).output().expect("tar");
        let mut import = self.client(&["import", "-", IMAGE]);
        let mut child = import.stdin(Stdio::piped()).spawn().expect("docker");
        child.stdin.take().expect("a pipe").write_all(&archive.stdout).expect("docker import");
        let output = child.wait_with_output().expect("docker");
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    fn client(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("docker").expect("docker"));
        command.args(["-H", &self.host()]).args(arguments).env_remove("DOCKER_HOST");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the docker client; what it says, without the line's end.
    #[track_caller]
    pub fn docker(&self, arguments: &[&str]) -> String {
        let output = self.client(arguments).output().expect("docker");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "docker {arguments:?}: {errors}\ndockerd: {}", self.last_words());
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// As in `DOCKER_HOST`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.directory.path().join("socket").display())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// portwatch, as it would run in the daemon's network namespace.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.enter(subject::command(arguments))
    }

    /// Whatever it is, in the daemon's network namespace and as its client.
    pub fn enter(&self, mut command: Command) -> Command {
        command.env("DOCKER_HOST", self.host());
        let netns = self.netns.try_clone().expect("dup");
        // SAFETY: setns is a system call without memory.
        unsafe { command.pre_exec(move || setns(&netns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)) };
        command
    }

    /// Lets everybody on the host ask it, as a group `docker` may.
    pub fn open_to_all(&self) {
        let open = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
        open(self.directory.path(), 0o711);
        open(&self.directory.path().join("socket"), 0o666);
    }

    pub fn portwatch(&self, arguments: &[&str]) -> Run {
        finish(self.command(arguments).spawn().expect("cannot run portwatch"))
    }

    /// Where there is no engine to be asked.
    pub fn portwatch_alone(&self, arguments: &[&str]) -> Run {
        let mut command = self.command(arguments);
        command.env("DOCKER_HOST", "unix:///nonexistent/docker.sock");
        finish(command.spawn().expect("cannot run portwatch"))
    }

    /// Binds and closes a TCP port in the daemon's network namespace.
    pub fn bind(&self, address: &str) -> io::Result<()> {
        let address: SocketAddr = address.parse().expect("an address");
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.netns, CloneFlags::CLONE_NEWNET)?;
                TcpListener::bind(address).map(drop)
            });
            inside.join().expect("a thread")
        })
    }

    /// Runs a shell script as a container; returns once it has said a line.
    pub fn run(self: &Arc<Self>, options: &[&str], script: &str) -> Container {
        let count = {
            let mut count = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
            *count += 1;
            *count
        };
        let name = format!("web_{count}");
        let before = ["run", "-d", "--name", &name];
        let id = self.docker(&[&before, options, &[IMAGE, "/bin/busybox", "sh", "-c", script]].concat());
        let container = Container { daemon: Arc::clone(self), name, id };
        let mut logs = self.client(&["logs", "-f", &container.id]).spawn().expect("docker logs");
        let mut line = String::new();
        BufReader::new(logs.stdout.take().expect("a pipe")).read_line(&mut line).expect("docker logs");
        logs.kill().expect("kill");
        logs.wait().expect("wait");
        assert!(
            !line.is_empty(),
            "container {} says nothing: {}",
            container.name,
            self.docker(&["logs", &container.id])
        );
        container
    }
}

impl Container {
    /// A web server on this port; it and the first process end at SIGTERM.
    pub fn serving(daemon: &Arc<Dockerd>, options: &[&str], port: u16) -> Container {
        let script =
            format!("trap exit TERM; /bin/busybox httpd -p {port} && echo ready; /bin/busybox sleep 1000 & wait");
        daemon.run(options, &script)
    }

    pub fn short_id(&self) -> &str {
        &self.id[..12]
    }

    fn inspect(&self) -> Value {
        serde_json::from_str::<Value>(&self.daemon.docker(&["inspect", &self.id])).expect("JSON")[0].clone()
    }

    pub fn is_running(&self) -> bool {
        self.inspect()["State"]["Running"] == true
    }

    /// Its address on the bridge.
    pub fn address(&self) -> String {
        self.inspect()["NetworkSettings"]["Networks"]["bridge"]["IPAddress"].as_str().expect("an address").to_owned()
    }

    /// The number of its network namespace.
    pub fn netns(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let pid = self.inspect()["State"]["Pid"].as_u64().expect("a pid");
        fs::metadata(format!("/proc/{pid}/ns/net")).expect("a namespace").ino()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // A failed test unwinds: its own message counts.
        let _ = self.daemon.client(&["rm", "-f", &self.id]).output();
    }
}

/// A mount in the child, between fork and exec.
fn mount(source: &CStr, target: &CStr, kind: Option<&CStr>, flags: libc::c_ulong) -> io::Result<()> {
    let kind = kind.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: the pointers are of nul-terminated strings that outlive the call, or null.
    sys::check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind, flags, ptr::null()) }).map(drop)
}

/// The processes that the daemon started, as their command lines tell: containerd and its shims.
fn processes_of(directory: &Path) -> Vec<u32> {
    let needle = directory.to_str().expect("a path without surprises");
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_ours = |pid: &u32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.windows(needle.len()).any(|part| part == needle.as_bytes())
    };
    pids.filter(is_ours).collect()
}

impl Drop for Dockerd {
    /// Ends it, and sees to it that nothing of it is left behind.
    fn drop(&mut self) {
        let pidfd = subject::pidfd(&self.child);
        // ESRCH where it never started.
        let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::TERM);
        let ended = wait_readable(&pidfd);
        let mut left = Vec::new();
        if !ended {
            left.push("dockerd itself, which does not end".to_owned());
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        for pid in processes_of(self.directory.path()) {
            let Some(pid) = Pid::from_raw(pid as i32) else { continue };
            let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { continue };
            if !wait_readable(&pidfd) {
                left.push(format!("process {}", pid.as_raw_nonzero()));
                let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
                wait_readable(&pidfd);
            }
        }
        // Shims and what they left are our children by now: this process is their subreaper.
        while rustix::process::waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
            .is_ok_and(|c| c.is_some())
        {}
        let hierarchies = fs::read_dir(CGROUPS).into_iter().flatten().flatten().map(|entry| entry.path());
        for hierarchy in hierarchies.chain([PathBuf::from(CGROUPS)]) {
            let group = hierarchy.join(&self.cgroup);
            match fs::remove_dir(&group) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    left.push(format!("{}: {error}", group.display()))
                }
                _ => {}
            }
        }
        if !self.had_key {
            let _ = fs::remove_file(KEY);
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        let ours = self.directory.path().to_str().expect("a path without surprises");
        left.extend(mounts.lines().filter(|line| line.contains(ours)).map(|line| format!("mount {line}")));
        if !thread::panicking() {
            assert!(left.is_empty(), "dockerd left behind: {left:#?}\n{}", self.last_words());
        }
    }
}
