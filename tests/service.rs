//! The unit of the service: systemd finds it tight, and portwatch works within it. What the unit takes away is taken away
//! here by hand, from the unit's own text: user, capabilities, files and system calls.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use caps::{CapSet, Capability, CapsHashSet};
use nix::libc;
use rustix::process::Signal;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use serde_json::Value;

use crate::agent::Agent;
use crate::puppet::{Puppet, Sock, Stage};
use crate::subject::{self, Run, binary, finish, plain_command, portwatch, skip};
use crate::watcher::Watch;
use crate::{Test, test, test_each_probe};

const UNIT: &str = include_str!("../portwatch/dist/portwatch.service");

/// Stands for the user that the unit names: neither root nor anybody whom a test makes a process of.
const SERVICE_USER: u32 = 64_999;

/// `nobody`: another ordinary user.
const NOBODY: u32 = 65_534;

/// The exposure that the unit may have, as `systemd-analyze security` counts it.
const MAX_EXPOSURE: f64 = 2.5;

/// What the unit says, line by line.
fn settings(key: &str) -> impl Iterator<Item = &'static str> {
    UNIT.lines().filter_map(move |line| line.strip_prefix(key)?.strip_prefix('='))
}

fn setting(key: &str) -> &'static str {
    let mut values = settings(key);
    let value = values.next().unwrap_or_else(|| panic!("the unit does not set {key}"));
    assert_eq!(values.next(), None, "the unit sets {key} twice");
    value
}

fn capabilities(key: &str) -> CapsHashSet {
    setting(key).split_whitespace().map(|name| name.parse().expect("a capability")).collect()
}

/// What the unit leaves of a process.
struct Sandbox {
    capabilities: CapsHashSet,
    /// To be taken away.
    others: Vec<Capability>,
    /// Directories with something else in their place.
    hidden: Vec<CString>,
    system_calls: Option<BpfProgram>,
    /// Found by descriptor, wherever it is.
    program: File,
}

impl Sandbox {
    /// Everything but the filter of system calls. `None`, loudly, where only root could.
    fn new() -> Option<Sandbox> {
        if !rustix::process::geteuid().is_root() {
            skip("root", "only root can become the user of the service");
            return None;
        }
        assert_eq!(setting("User"), "portwatch");
        assert_eq!(setting("NoNewPrivileges"), "yes");
        let capabilities = capabilities("CapabilityBoundingSet");
        assert_eq!(capabilities, self::capabilities("AmbientCapabilities"), "an ordinary user has no others");
        let others = caps::runtime::thread_all_supported().difference(&capabilities).copied().collect();
        assert_eq!((setting("ProtectHome"), setting("PrivateTmp")), ("yes", "yes"));
        let hidden =
            ["/home", "/root", "/run/user", "/tmp", "/var/tmp"].into_iter().filter(|path| Path::new(path).exists());
        let hidden = hidden.map(|path| CString::new(path).expect("no NUL")).collect();
        let program = File::open(binary()).expect("the binary");
        // Not where a service is passed its socket.
        let program = rustix::io::fcntl_dupfd_cloexec(&program, 10).expect("a descriptor").into();
        Some(Sandbox { capabilities, others, hidden, system_calls: None, program })
    }

    fn without(mut self, capability: Capability) -> Sandbox {
        assert!(self.capabilities.remove(&capability));
        self.others.push(capability);
        self
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = plain_command(format!("/proc/self/fd/{}", self.program.as_raw_fd()), arguments);
        command.current_dir("/");
        let (capabilities, others) = (self.capabilities.clone(), self.others.clone());
        let (hidden, system_calls) = (self.hidden.clone(), self.system_calls.clone());
        // SAFETY: system calls on what was made before the fork; the child has one thread, and is about to exec.
        unsafe {
            command.pre_exec(move || {
                hide(&hidden)?;
                // Where this machine does not allow it, its kernel is not so old as to count maps.
                let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
                libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited);
                become_service(&capabilities, &others)?;
                match &system_calls {
                    Some(filter) => seccompiler::apply_filter(filter).map_err(|_| io::Error::last_os_error()),
                    None => Ok(()),
                }
            });
        }
        command
    }

    /// The agent as systemd starts it, with a socket that was made for it.
    fn agent(&self, stage: &Stage) -> Agent {
        let socket = stage.path("agent.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let mut command = self.command(&["agent", "--no-history"]);
        command.env("LISTEN_FDS", "1");
        let fd = listener.as_raw_fd();
        // SAFETY: bare system calls on a descriptor that the parent keeps open meanwhile.
        unsafe {
            command.pre_exec(move || {
                check(libc::dup2(fd, 3))?;
                check(libc::fcntl(3, libc::F_SETFD, 0))
            });
        }
        Agent::of(command, socket)
    }

    fn portwatch(&self, arguments: &[&str]) -> Run {
        finish(self.command(arguments).spawn().expect("portwatch in the sandbox"))
    }

    /// The one listener at the socket's port.
    fn listed(&self, probe: &str, sock: &Sock) -> Value {
        let run = self.portwatch(&["--probe", probe, "list", "--json", &format!("{}/tcp", sock.port())]).expect(0);
        let listeners = run.json();
        assert_eq!(listeners.as_array().map(Vec::len), Some(1), "{listeners}");
        listeners[0].clone()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `ProtectHome`, `PrivateTmp` and `ProtectSystem=strict`: files hidden, and the rest read-only.
fn hide(hidden: &[CString]) -> io::Result<()> {
    use std::ptr::null;
    let private = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: the strings end in NUL; null where the kernel reads nothing.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        check(libc::mount(null(), c"/".as_ptr(), null(), private, null()))?;
        for path in hidden {
            check(libc::mount(c"none".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, null()))?;
        }
    }
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the kernel reads one mount_attr of that size, and a string that ends in NUL.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    // Kernels before 5.12 do not have it.
    match check(done as libc::c_int) {
        Err(error) if error.raw_os_error() != Some(libc::ENOSYS) => Err(error),
        _ => Ok(()),
    }
}

/// `User`, `CapabilityBoundingSet`, `AmbientCapabilities` and `NoNewPrivileges`.
fn become_service(capabilities: &CapsHashSet, others: &[Capability]) -> io::Result<()> {
    let failed = |_| io::Error::last_os_error();
    for &capability in others {
        caps::drop(None, CapSet::Bounding, capability).map_err(failed)?;
    }
    // SAFETY: these take integers, and a null list of length 0.
    unsafe {
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0))?;
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(SERVICE_USER, SERVICE_USER, SERVICE_USER))?;
        check(libc::setresuid(SERVICE_USER, SERVICE_USER, SERVICE_USER))?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
    }
    // Effective first: it must be a part of the permitted.
    caps::clear(None, CapSet::Effective).map_err(failed)?;
    for set in [CapSet::Permitted, CapSet::Effective, CapSet::Inheritable] {
        caps::set(None, set, capabilities).map_err(failed)?;
    }
    for &capability in capabilities {
        caps::raise(None, CapSet::Ambient, capability).map_err(failed)?;
    }
    Ok(())
}

/// What systemd means by an item of `SystemCallFilter`.
fn expand(item: &str, into: &mut BTreeSet<String>) {
    if !item.starts_with('@') {
        into.insert(item.to_owned());
        return;
    }
    let output = Command::new("systemd-analyze").args(["syscall-filter", item]).output().expect("systemd-analyze");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    for word in text.lines().filter_map(|line| line.strip_prefix("    ")).filter(|word| !word.starts_with('#')) {
        expand(word, into);
    }
}

/// `SystemCallFilter`, `RestrictAddressFamilies` and `MemoryDenyWriteExecute`; whoever breaks them dies.
fn system_calls() -> BpfProgram {
    let mut allowed = BTreeSet::new();
    for value in settings("SystemCallFilter") {
        let (items, removes) = value.strip_prefix('~').map_or((value, false), |items| (items, true));
        let mut named = BTreeSet::new();
        items.split_whitespace().for_each(|item| expand(item, &mut named));
        if removes {
            allowed.retain(|name| !named.contains(name));
        } else {
            allowed.extend(named);
        }
    }
    assert!(allowed.len() > 100, "{allowed:?}");
    let when = |argument, operator, value| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value).expect("a condition");
        SeccompRule::new(vec![condition]).expect("a rule")
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = allowed
        .iter()
        // Those of other architectures have no number here.
        .filter_map(|name| name.parse::<syscalls::Sysno>().ok())
        .map(|number| (i64::from(number.id()), Vec::new()))
        .collect();
    let families = setting("RestrictAddressFamilies").split_whitespace().map(|family| match family {
        "AF_UNIX" => libc::AF_UNIX,
        "AF_NETLINK" => libc::AF_NETLINK,
        "AF_INET" => libc::AF_INET,
        "AF_INET6" => libc::AF_INET6,
        _ => panic!("{family}"),
    });
    rules.insert(libc::SYS_socket, families.map(|family| when(0, SeccompCmpOp::Eq, family as u64)).collect());
    assert_eq!(setting("MemoryDenyWriteExecute"), "yes");
    let (write, execute) = (libc::PROT_WRITE as u64, libc::PROT_EXEC as u64);
    let masked = |mask, value| when(2, SeccompCmpOp::MaskedEq(mask), value);
    rules.insert(libc::SYS_mmap, [0, write, execute].map(|value| masked(write | execute, value)).into());
    rules.insert(libc::SYS_mprotect, vec![masked(execute, 0)]);
    let architecture = std::env::consts::ARCH.try_into().expect("an architecture");
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)
        .and_then(BpfProgram::try_from)
        .expect("a filter")
}

/// A server of root and one of somebody else, started in a directory that the sandbox hides.
struct Scene {
    root: (Puppet, Sock),
    nobody: (Puppet, Sock),
    directory: PathBuf,
    stage: Stage,
}

impl Scene {
    fn new() -> Scene {
        let stage = Stage::new();
        let (root, nobody) = (stage.puppet(), stage.puppet());
        nobody.become_user(NOBODY);
        let (of_root, of_nobody) = (root.serve(), nobody.serve());
        let directory = std::env::current_dir().expect("a directory");
        Scene { root: (root, of_root), nobody: (nobody, of_nobody), directory, stage }
    }

    /// Checks that everything of a process is told.
    #[track_caller]
    fn check(&self, process: &Value, pid: u32) {
        assert_eq!(process["pid"], pid, "{process}");
        assert_eq!(process["command"][0], "puppet", "{process}");
        assert_eq!(process["cwd"].as_str().map(Path::new), Some(&*self.directory), "{process}");
        let program = std::env::current_exe().expect("this program");
        assert_eq!(process["exe"].as_str().map(Path::new), Some(&*program), "{process}");
    }
}

/// Watches, lists and kills in the sandbox.
fn works(sandbox: &Sandbox, probe: &str) {
    let paranoid = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap_or_default();
    if probe == "kprobe" && paranoid.trim().parse().is_ok_and(|level: i32| level > 2) {
        // Debian's own patch. The next best tier serves there.
        skip("perf", "past perf_event_paranoid 2, this kernel gives kprobes to CAP_SYS_ADMIN alone");
        return;
    }
    let scene = Scene::new();
    let mut watch = Watch::spawn(sandbox.command(&["--probe", probe, "watch", "--json", "--netns", "all"]));
    watch.wait_until_ready(probe);
    for (puppet, _) in [&scene.root, &scene.nobody] {
        let sock = puppet.serve();
        let event = watch.until_event("open", sock.inode);
        scene.check(&event["process"], puppet.pid);
        puppet.close(sock.fd);
        watch.until_event("close", sock.inode);
    }
    assert_eq!(watch.interrupt(), Some(0));
    for (puppet, sock) in [&scene.root, &scene.nobody] {
        let listener = sandbox.listed(probe, sock);
        assert_eq!(listener["holders"][0]["fds"], serde_json::json!([sock.fd]), "{listener}");
        scene.check(&listener["holders"][0], puppet.pid);
        let target = format!("{}/tcp", sock.port());
        let run = sandbox.portwatch(&["--probe", probe, "kill", &target, "--json", "--yes"]).expect(0);
        assert_eq!(run.json()[0]["killed"], serde_json::json!([puppet.pid]), "{}", run.text());
        puppet.wait();
    }
    drop(scene.stage);
}

/// Whether nobody is seen to hold root's listener.
fn is_blind(sandbox: &Sandbox) -> bool {
    let scene = Scene::new();
    sandbox.listed("poll", &scene.root.1)["holders"] == serde_json::json!([])
}

/// `systemd-analyze`, if it is there.
fn analyze(arguments: &[&str]) -> Option<(bool, String)> {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/portwatch.service");
    if !Path::new(unit).exists() {
        skip("systemd", "the unit is not on this machine");
        return None;
    }
    let mut command = Command::new("systemd-analyze");
    match command.args(arguments).arg(unit).stdin(Stdio::null()).output() {
        Ok(output) => {
            let said = [output.stdout, output.stderr].concat();
            Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
        }
        Err(error) => {
            skip("systemd", &format!("systemd-analyze cannot be run: {error}"));
            None
        }
    }
}

/// What SECURITY.md says of each capability.
fn agent_without_each_capability() {
    let Some(whole) = Sandbox::new() else { return };
    let tiers = subject::event_tiers();
    let Some(&best) = tiers.first() else { return skip("kernel", "no event tier works") };
    let each = whole.capabilities.iter().map(|&capability| Some(capability)).chain([None]);
    for without in each.collect::<Vec<_>>() {
        let scene = Scene::new();
        let mut sandbox = Sandbox::new().expect("still root");
        if let Some(capability) = without {
            sandbox = sandbox.without(capability);
        }
        let mut agent = sandbox.agent(&scene.stage);
        let status = agent.portwatch(&["status", "--json"]).expect(0).json();
        let tier = status["agent"]["tier"].as_str().expect("a tier");
        let target = format!("{}/tcp", scene.root.1.port());
        let listeners = agent.portwatch(&["list", "--json", &target]).expect(0).json();
        let holders = listeners[0]["holders"].as_array().expect("holders").as_slice();
        match without {
            Some(capability @ (Capability::CAP_BPF | Capability::CAP_PERFMON)) => {
                assert_eq!(tier, "poll", "{capability}");
                assert!(status["reasons"].to_string().contains(&capability.to_string()), "{status}");
                scene.check(&holders[0], scene.root.0.pid);
            }
            Some(Capability::CAP_NET_ADMIN) => {
                let expected = tiers.iter().find(|&&tier| tier != "tracepoint").unwrap_or(&"poll");
                // Kprobes may need more than the unit has.
                assert!(tier == *expected || tier == "poll", "{tier} without CAP_NET_ADMIN");
                scene.check(&holders[0], scene.root.0.pid);
            }
            Some(Capability::CAP_SYS_PTRACE) => {
                // Who it is, the kernel programs tell, where they can; where it runs, only /proc would.
                let told = holders.first().map_or(&Value::Null, |holder| &holder["cwd"]);
                assert!(told.is_null(), "{listeners}");
            }
            Some(Capability::CAP_DAC_READ_SEARCH) if status["agent"]["holders"] == "/proc" => {
                assert!(holders.is_empty(), "{listeners}");
            }
            Some(Capability::CAP_DAC_READ_SEARCH | Capability::CAP_KILL) | None => {
                assert_eq!(tier, best, "{without:?}");
                scene.check(&holders[0], scene.root.0.pid);
            }
            Some(capability) => panic!("nothing is known to need {capability}"),
        }
        assert_eq!(agent.end(Signal::TERM), Some(0), "{without:?}");
    }
}

pub fn trials() -> Vec<Test> {
    let mut tests = test_each_probe("service::what_the_unit_leaves_of_root_is_enough", |probe| {
        let Some(sandbox) = Sandbox::new() else { return };
        works(&sandbox, probe);
    });
    tests.extend(test_each_probe("service::no_system_call_is_needed_that_the_unit_forbids", |probe| {
        let Some(mut sandbox) = Sandbox::new() else { return };
        if Command::new("systemd-analyze").arg("--version").output().is_err() {
            skip("systemd", "only systemd-analyze knows what @system-service is");
            return;
        }
        sandbox.system_calls = Some(system_calls());
        works(&sandbox, probe);
    }));
    tests.extend([
        test("service::the_agent_within_it_ends_what_its_peers_may", || {
            // The number of the descriptor that a service manager passes, so that the program has another.
            let _three = File::open("/dev/null").expect("/dev/null");
            let Some(mut sandbox) = Sandbox::new() else { return };
            if Command::new("systemd-analyze").arg("--version").output().is_ok() {
                sandbox.system_calls = Some(system_calls());
            }
            let scene = Scene::new();
            let socket = scene.stage.path("agent.sock");
            let listener = UnixListener::bind(&socket).expect("a socket");
            fs::set_permissions(&socket, Permissions::from_mode(0o666)).expect("chmod");
            let mut command = sandbox.command(&["agent", "--no-history"]);
            command.env("LISTEN_FDS", "1");
            let passed = listener.as_raw_fd();
            // SAFETY: dup2 is a bare system call, which may be made between fork and exec.
            unsafe { command.pre_exec(move || check(libc::dup2(passed, 3))) };
            let agent = Agent::of(command, socket.clone());
            let copy = scene.stage.path("portwatch");
            fs::copy(binary(), &copy).expect("copying the binary");
            let as_nobody = |sock: &Sock| {
                let target = format!("{}/tcp", sock.port());
                let mut command = plain_command(&copy, &["kill", &target, "--json", "--agent"]);
                command.env("PORTWATCH_SOCKET", &socket).uid(NOBODY).gid(NOBODY).current_dir("/");
                finish(command.spawn().expect("portwatch as nobody"))
            };
            let denied = as_nobody(&scene.root.1).expect(3).json();
            assert_eq!(denied[0]["failed"][0]["pid"], scene.root.0.pid, "{denied}");
            assert_eq!(
                as_nobody(&scene.nobody.1).expect(0).json()[0]["killed"],
                serde_json::json!([scene.nobody.0.pid])
            );
            scene.nobody.0.wait();
            agent.portwatch(&["kill", &format!("{}/tcp", scene.root.1.port())]).expect(0);
            scene.root.0.wait();
        }),
        test("service::the_best_tier_is_the_one_that_root_has", || {
            let Some(sandbox) = Sandbox::new() else { return };
            let (within, without) =
                (sandbox.portwatch(&["status", "--json"]).json(), portwatch(&["status", "--json"]).json());
            for key in ["tier", "reasons", "holders"] {
                assert_eq!(within[key], without[key], "{key}");
            }
        }),
        test("service::nothing_that_the_unit_leaves_of_root_is_to_spare", || {
            let Some(whole) = Sandbox::new() else { return };
            assert!(!is_blind(&whole));
            for &capability in &whole.capabilities {
                let sandbox = Sandbox::new().expect("still root").without(capability);
                let tier = subject::event_tiers().first();
                let watch = |tier| sandbox.portwatch(&["--probe", tier, "watch", "--for", "1ms"]).code;
                match (capability, tier) {
                    (Capability::CAP_SYS_PTRACE | Capability::CAP_DAC_READ_SEARCH, _) => {
                        assert!(is_blind(&sandbox), "{capability} is to spare");
                    }
                    (Capability::CAP_KILL, _) => {
                        let scene = Scene::new();
                        let target = format!("{}/tcp", scene.nobody.1.port());
                        sandbox.portwatch(&["kill", &target, "--yes"]).expect(3);
                        assert!(scene.nobody.0.is_alive());
                    }
                    // For the probe in the cgroups, which the better tiers do without.
                    (Capability::CAP_NET_ADMIN, _) if !subject::event_tiers().contains(&"tracepoint") => {
                        skip("tracepoint", "no other tier needs CAP_NET_ADMIN");
                    }
                    (Capability::CAP_NET_ADMIN, _) => assert_ne!(watch("tracepoint"), Some(0), "{capability}"),
                    (Capability::CAP_BPF | Capability::CAP_PERFMON, Some(tier)) => {
                        assert_ne!(watch(tier), Some(0), "{capability} is to spare");
                    }
                    (Capability::CAP_BPF | Capability::CAP_PERFMON, None) => skip("kernel", "no event tier works"),
                    _ => panic!("nothing is known to need {capability}"),
                }
            }
        }),
        test("service::an_agent_that_lacks_a_capability_is_as_told", agent_without_each_capability),
        test("service::systemd_finds_the_unit_tight", || {
            let Some((_, said)) = analyze(&["security", "--offline=true", "--no-pager"]) else { return };
            let line = said.lines().find(|line| line.contains("exposure level")).unwrap_or_default();
            let level = line.rsplit(": ").next().and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
            assert!(level.is_some_and(|level| level <= MAX_EXPOSURE), "{said}");
        }),
        test("service::systemd_understands_the_units", || {
            // It fails for the program, which is not installed here; what it says of the text comes with a line number.
            let socket = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/portwatch.socket");
            let Some((_, said)) = analyze(&["verify", "--man=no", socket]) else { return };
            let missing =
                format!("Command {} is not executable", setting("ExecStart").split(' ').next().unwrap_or_default());
            let complaints: Vec<&str> = said.lines().filter(|line| !line.contains(&missing)).collect();
            assert_eq!(complaints, [""; 0]);
        }),
    ]);
    tests
}
