//! What would bring a server back is named, with the command that ends it: units, supervisors, loops. Each is real: a
//! systemd (the manager of a user, in a cgroup of its own), a runsv, a shell. The servers are puppets that they start.

use std::fs::{self, File};
use std::future::poll_fn;
use std::io::{self, Read as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};

use portwatch::cgroup::Manager;
use portwatch::model::Protocol;
use portwatch::source::{process, stat};
use portwatch::supervisor::Supervisor;
use portwatch::supervisor::systemd::{self, Stopped};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, WaitId, WaitIdOptions};
use serde_json::{Value, json};
use zbus::export::futures_core::Stream as _;

use crate::puppet::{PATIENCE, Puppet, Sock, Stage};
use crate::subject::{Run, command, finish, portwatch, program, skip};
use crate::{Test, test};

/// A process of the test's, ended and reaped when dropped.
struct Tamed(Child);

impl Tamed {
    fn end(&mut self) {
        // It is gone already, or it is killed: both are as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Tamed {
    fn drop(&mut self) {
        self.end();
    }
}

fn spawn(command: &mut Command) -> Tamed {
    Tamed(command.stdin(Stdio::null()).spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
}

/// Kills the port while its supervisor starts the next server, which takes the port; the one outcome, and that server.
fn kill_until_respawn(stage: &Stage, mut command: Command, server: &Puppet, sock: Sock) -> (Value, Puppet) {
    let target = format!("{}/tcp", sock.port());
    let killer = command.args(["kill", &target, "--json", "--settle", "20s"]).spawn().expect("portwatch");
    server.wait();
    let next = stage.admit();
    next.tcp(&sock.address.to_string(), "");
    (finish(killer).expect(1).json()[0].clone(), next)
}

/// Checks a respawn: `supervisor` is what JSON says, `started_by` what the message ends in.
#[track_caller]
fn check_respawn(outcome: &Value, next: &Puppet, supervisor: Value, started_by: &str) {
    assert_eq!(
        (&outcome["status"], &outcome["remaining_pids"]),
        (&json!("respawned"), &json!([next.pid])),
        "{outcome}"
    );
    let diagnostics = &outcome["diagnostics"];
    let name = diagnostics["new_owners"][0]["name"].as_str().expect("a name");
    let message = format!("{name} ({}) took the port again, started by {started_by}", next.pid);
    assert_eq!(diagnostics["message"], message);
    assert_eq!(diagnostics["supervisor"], supervisor);
    let finding = diagnostics["findings"][0]["message"].as_str().unwrap_or_default();
    assert!(finding.starts_with(&format!("{name} ({}) listens on ", next.pid)), "{diagnostics}");
}

/// A systemd that manages a user's services, in a cgroup of its own and a mount namespace in which systemd believes the
/// host to have been booted with it.
struct UserManager {
    process: Tamed,
    cgroup: PathBuf,
    runtime: PathBuf,
}

impl UserManager {
    /// The manager and its first puppet. `None`, loudly, where there can be none. `units` are files by name.
    fn start(stage: &Stage, units: &[(&str, String)]) -> Option<(UserManager, Puppet)> {
        if !rustix::process::geteuid().is_root() {
            skip("root", "only root makes cgroups and mount namespaces");
            return None;
        }
        let (Some(systemd), Some(dbus), Some(unshare)) =
            (program("systemd"), program("dbus-daemon"), program("unshare"))
        else {
            skip("systemd", "systemd, dbus-daemon and unshare are needed");
            return None;
        };
        let Some(hierarchy) = cgroup2() else {
            skip("systemd", "no cgroup v2 hierarchy is mounted");
            return None;
        };
        let runtime = stage.path("runtime");
        fs::create_dir(&runtime).expect("a directory");
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o700)).expect("chmod");
        let address = format!("unix:path={}", runtime.join("bus").display());

        let home = stage.path("home");
        let directory = home.join(".config/systemd/user");
        let wants = directory.join("test.target.wants");
        fs::create_dir_all(&wants).expect("a directory");
        // What is started, instead of all that this machine has for users.
        fs::write(directory.join("test.target"), "[Unit]\nDefaultDependencies=no\n").expect("a unit");
        // By these names the manager knows its bus.
        let socket = "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=%t/bus\n".to_owned();
        let service = format!(
            "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nType=notify\nNotifyAccess=main\n\
             ExecStart={} --session --address=systemd: --nofork --nopidfile --syslog-only\n",
            dbus.display()
        );
        for (name, text) in [("dbus.socket", socket), ("dbus.service", service)].iter().chain(units) {
            fs::write(directory.join(name), text).expect("a unit");
            symlink(directory.join(name), wants.join(name)).expect("a link");
        }
        // As the cgroup of root's manager is called: its services are a user's.
        let top = hierarchy.join(format!("portwatch-test-{}", std::process::id()));
        let cgroup = top.join("user@0.service");
        fs::create_dir_all(&cgroup).expect("a cgroup");
        let script = "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && echo $$ >$CGROUP/cgroup.procs \
                      && exec $SYSTEMD --user --unit=test.target";
        let process = spawn(
            Command::new(unshare)
                .args(["--mount", "--propagation", "private", "sh", "-c", script])
                .envs([("CGROUP", &cgroup), ("SYSTEMD", &systemd), ("HOME", &home), ("XDG_RUNTIME_DIR", &runtime)])
                .env_remove("DBUS_SESSION_BUS_ADDRESS")
                .env("SYSTEMD_LOG_LEVEL", "err"),
        );
        let manager = UserManager { process, cgroup: top, runtime };
        // It is started when the bus is there.
        let puppet = stage.admit();
        wait_for_name(&address, "org.freedesktop.systemd1");
        Some((manager, puppet))
    }

    /// A service that is a puppet.
    fn service(stage: &Stage, more: &str) -> String {
        let (program, variable) = stage.recipe();
        format!(
            "[Unit]\nDefaultDependencies=no\nAfter=dbus.service\n[Service]\nExecStart={}\nEnvironment={variable}\n{more}\n",
            program.display()
        )
    }

    fn portwatch(&self) -> Command {
        let mut command = command(&[]);
        command.env("XDG_RUNTIME_DIR", &self.runtime).env_remove("DBUS_SESSION_BUS_ADDRESS");
        command
    }

    fn run(&self, arguments: &[&str]) -> Run {
        finish(self.portwatch().args(arguments).spawn().expect("portwatch"))
    }

    /// Runs a command as a person would who was told to.
    fn shell(&self, line: &str) {
        let status = Command::new("sh").args(["-c", line]).env("XDG_RUNTIME_DIR", &self.runtime).status().expect("sh");
        assert!(status.success(), "{line}: {status}");
    }

    /// Calls portwatch's library with the environment of the user.
    fn as_user<T>(&self, call: impl FnOnce() -> T) -> T {
        let before = std::env::var_os("XDG_RUNTIME_DIR");
        // SAFETY: tests run one at a time, and no other thread of this program reads the environment.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", &self.runtime) };
        let result = call();
        // SAFETY: as above.
        unsafe {
            match before {
                Some(before) => std::env::set_var("XDG_RUNTIME_DIR", before),
                None => std::env::remove_var("XDG_RUNTIME_DIR"),
            }
        }
        result
    }
}

impl Drop for UserManager {
    fn drop(&mut self) {
        let members = members(&self.cgroup);
        // All in the cgroup at once, the manager too: nothing is left that could start anything.
        if let Err(error) =
            fs::write(self.cgroup.join("cgroup.kill"), "1").and_then(|()| wait_until_empty(&self.cgroup))
        {
            eprintln!("cannot end the processes of {}: {error}", self.cgroup.display());
        }
        self.process.end();
        // Its children are ours now.
        for pid in members.into_iter().filter_map(Pid::from_raw) {
            let _ = rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
        }
        remove_cgroups(&self.cgroup);
    }
}

/// The processes in a cgroup and below.
fn members(cgroup: &Path) -> Vec<i32> {
    let procs = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let own = procs.lines().filter_map(|pid| pid.parse().ok());
    own.chain(children(cgroup).iter().flat_map(|child| members(child))).collect()
}

fn children(cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// Waits until somebody on the bus has this name.
fn wait_for_name(address: &str, name: &str) {
    let wait = async {
        let bus = zbus::connection::Builder::address(address).build().await?;
        let rule = zbus::MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, name)
            .build()?;
        let mut changes = zbus::MessageStream::for_match_rule(rule, &bus, None).await?;
        let daemon = Some("org.freedesktop.DBus");
        let answer = bus.call_method(daemon, "/org/freedesktop/DBus", daemon, "NameHasOwner", &name).await?;
        if !answer.body().deserialize::<bool>()? {
            poll_fn(|context| Pin::new(&mut changes).poll_next(context)).await.expect("a bus")?;
        }
        zbus::Result::Ok(())
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("an event loop");
    let done = runtime.block_on(async { tokio::time::timeout(PATIENCE, wait).await });
    done.unwrap_or_else(|_| panic!("nobody is called {name} on the bus")).expect("D-Bus");
}

/// The kernel tells by POLLPRI that `cgroup.events` changed.
fn wait_until_empty(cgroup: &Path) -> io::Result<()> {
    let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    loop {
        let mut file = File::open(cgroup.join("cgroup.events"))?;
        let mut events = String::new();
        file.read_to_string(&mut events)?;
        if events.contains("populated 0") {
            return Ok(());
        }
        if poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&limit))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

fn remove_cgroups(cgroup: &Path) {
    children(cgroup).iter().for_each(|child| remove_cgroups(child));
    if let Err(error) = fs::remove_dir(cgroup) {
        eprintln!("cannot remove {}: {error}", cgroup.display());
    }
}

/// Where cgroup v2 is mounted.
fn cgroup2() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        file_system.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

fn respawning_unit() {
    let stage = Stage::new();
    let units = [("web.service", UserManager::service(&stage, "Restart=always\nRestartSec=0"))];
    let Some((manager, server)) = UserManager::start(&stage, &units) else { return };
    let sock = server.serve();
    let (outcome, next) = kill_until_respawn(&stage, manager.portwatch(), &server, sock);
    let supervisor = json!({
        "pid": null, "name": null, "unit": "web.service", "container": null, "kind": "systemd", "user_manager": 0,
        "command": null, "restarts": null, "stop": "systemctl --user stop web.service",
    });
    let started_by = "user unit web.service; end it with: systemctl --user stop web.service";
    check_respawn(&outcome, &next, supervisor, started_by);
    assert!(manager.as_user(|| systemd::restarts("web.service", Manager::User(0))).expect("an answer"));

    manager.shell("systemctl --user stop web.service");
    next.wait();
    let target = format!("{}/tcp", sock.port());
    assert_eq!(manager.run(&["kill", &target, "--json"]).expect(0).json()[0]["status"], "free");
}

fn selected_by_unit() {
    let stage = Stage::new();
    // systemd writes the dash of a name that it made from a path as \x2d.
    let name = r"my\x2dweb@1.service";
    let units = [(name, UserManager::service(&stage, ""))];
    let Some((manager, server)) = UserManager::start(&stage, &units) else { return };
    let (bystander, sock) = (stage.puppet(), server.serve());
    bystander.serve();
    for (unit, found) in [(name, true), (r"my\x2dweb@1", true), ("my*@?", true), ("web", false), ("my", false)] {
        let rows = manager.run(&["list", "--json", "--unit", unit]).expect(0).json();
        let pids: Vec<&Value> = rows.as_array().expect("rows").iter().map(|row| &row["holders"][0]["pid"]).collect();
        assert_eq!(pids, if found { vec![server.pid] } else { vec![] }, "--unit {unit}");
    }
    let rows = manager.run(&["who", "--unit", name, "--json"]).expect(0).json();
    let holder = &rows[0]["holders"][0];
    assert_eq!((&holder["unit"], &holder["user_manager"]), (&json!(name), &json!(0)), "{holder}");
    let text = manager.run(&["who", &format!("{}/tcp", sock.port())]).expect(0).text();
    assert!(text.lines().any(|line| line == format!("    unit       {name} of user root (0)")), "{text}");

    let process = process::read(server.pid).expect("the server");
    let mut supervisor = Supervisor::of(&process, &|pid| stat::read(pid).ok()).expect("its unit");
    assert!(supervisor.may_restart(), "for all that is known");
    manager.as_user(|| supervisor.ask());
    assert_eq!((supervisor.label().as_str(), supervisor.may_restart()), (r"user unit my\x2dweb@1.service", false));

    let outcome = manager.run(&["kill", "--unit", name, "--json"]).expect(0).json()[0].clone();
    assert_eq!((&outcome["status"], &outcome["killed"]), (&json!("cleaned"), &json!([server.pid])), "{outcome}");
    assert!(bystander.is_alive());
}

fn stopped_over_dbus() {
    let stage = Stage::new();
    let units = [("web.service", UserManager::service(&stage, "Restart=always\nRestartSec=0"))];
    let Some((manager, server)) = UserManager::start(&stage, &units) else { return };
    server.serve();
    let stop = |unit| manager.as_user(|| systemd::stop_unit(unit, Manager::User(0), PATIENCE));
    assert_eq!(stop("web.service").expect("stopped"), Stopped { triggered_by: Vec::new() });
    assert!(!server.is_alive(), "stopped is stopped");
    // Again: there is nothing to do.
    stop("web.service").expect("stopped");
    let error = stop("nosuch.service").expect_err("no such unit");
    assert_eq!(
        error.to_string(),
        "cannot stop nosuch.service: no such unit is loaded; systemctl --user list-units shows those that are"
    );
    let error = stop("not a unit").expect_err("no name of a unit").to_string();
    assert!(error.starts_with("cannot stop 'not a unit': "), "{error}");
}

fn activated_by_socket() {
    let stage = Stage::new();
    let reservation = stage.puppet();
    // Bound and not listening: the port is nobody else's meanwhile.
    let sock = reservation.bind("127.0.0.1:0", "reuseport");
    let socket = format!("[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream={}\nReusePort=yes\n", sock.address);
    let units = [("web.socket", socket), ("web.service", UserManager::service(&stage, "Restart=no"))];
    let Some((manager, server)) = UserManager::start(&stage, &units) else { return };
    let owner = Manager::User(0);
    let unit = |proto| manager.as_user(|| systemd::socket_unit(sock.address, proto, owner)).expect("an answer");
    assert_eq!(unit(Protocol::Tcp).as_deref(), Some("web.socket"));
    assert_eq!(unit(Protocol::Udp), None);
    assert!(manager.as_user(|| systemd::restarts("web.service", owner)).expect("an answer"), "by its socket");
    let stop = |unit| manager.as_user(|| systemd::stop_unit(unit, owner, PATIENCE)).expect("stopped").triggered_by;
    assert_eq!(stop("web.service"), ["web.socket"]);
    assert!(!server.is_alive());
    assert_eq!(stop("web.socket"), [""; 0]);
    assert_eq!(unit(Protocol::Tcp), None);
    assert!(!manager.as_user(|| systemd::restarts("web.service", owner)).expect("an answer"));
}

fn stopped_instead_of_signalled() {
    let stage = Stage::new();
    let units = [("web.service", UserManager::service(&stage, "Restart=always\nRestartSec=0"))];
    let Some((manager, server)) = UserManager::start(&stage, &units) else { return };
    let sock = server.serve();
    let target = format!("{}/tcp", sock.port());
    let name = process::read(server.pid).expect("the server").name;
    let dry = manager.run(&["kill", &target, "--stop-unit", "--dry-run"]).expect(0);
    let preview = format!("to stop: user unit web.service, in place of {name} ({})\n", server.pid);
    assert_eq!(dry.text(), format!("{preview}{target} would be freed: stop unit web.service\n"));
    assert!(server.is_alive());

    let run = manager.run(&["kill", &target, "--stop-unit", "--stop-container"]).expect(0);
    let text = run.text();
    let said = text.rsplit_once(" in ").map(|(said, _)| said);
    assert_eq!(said, Some(&*format!("{target} freed: stopped unit web.service")), "{text}");
    let errors = run.errors();
    let progress = format!("{preview}{name} ({}): stopping user unit web.service\n{name} ({0}): ended in ", server.pid);
    assert!(errors.starts_with(&progress) && errors.lines().count() == 3, "{errors}");
    assert!(!server.is_alive());

    manager.shell("systemctl --user start web.service");
    let next = stage.admit();
    let sock = next.serve();
    let target = format!("{}/tcp", sock.port());
    let mut outcome = manager.run(&["kill", &target, "--stop-unit", "--json"]).expect(0).json()[0].take();
    outcome.as_object_mut().expect("an object").remove("elapsed_ms");
    let expected = json!({
        "port": sock.port(), "proto": "tcp", "status": "cleaned", "killed": [], "forced": [], "failed": [],
        "stopped": [{"unit": "web.service", "user_manager": 0}], "ghost": [], "still_listening": false,
        "remaining_pids": [], "diagnostics": null,
    });
    assert_eq!(outcome, expected);
    next.wait();
}

fn no_manager_to_ask() {
    let stage = Stage::new();
    let units = [("web.service", UserManager::service(&stage, ""))];
    let Some((manager, server)) = UserManager::start(&stage, &units) else { return };
    let sock = server.serve();
    let mut command = manager.portwatch();
    // As for somebody else's shell: the bus is not where it is looked for.
    command.env("XDG_RUNTIME_DIR", stage.path("nowhere")).env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent/bus");
    command.args(["kill", &format!("{}/tcp", sock.port()), "--stop-unit", "--json"]);
    let outcome = finish(command.spawn().expect("portwatch")).expect(1).json()[0].clone();
    let reason = outcome["failed"][0]["reason"].as_str().expect("a reason");
    assert!(reason.starts_with("cannot reach the systemd of uid 0: "), "{outcome}");
    assert_eq!(
        (&outcome["status"], &outcome["failed"][0]["pid"]),
        (&json!("partial"), &json!(server.pid)),
        "{outcome}"
    );
    assert!(server.is_alive());
}

fn another_units_name() {
    let stage = Stage::new();
    let units = ["web.service", "db.service"].map(|name| (name, UserManager::service(&stage, "Delegate=yes")));
    let Some((manager, server)) = UserManager::start(&stage, &units) else { return };
    let other = stage.admit();
    let cgroup = |puppet: &Puppet| process::read(puppet.pid).and_then(|process| process.cgroup).expect("its cgroup");
    let (server, other) = if cgroup(&server).ends_with("/web.service") { (server, other) } else { (other, server) };
    // As a service may do whose cgroup is delegated to it.
    let inner = cgroup2().expect("cgroup v2").join(&cgroup(&server)[1..]).join("db.service");
    fs::create_dir(&inner).expect("a cgroup");
    fs::write(inner.join("cgroup.procs"), server.pid.to_string()).expect("a move");
    let target = format!("{}/tcp", server.serve().port());
    let outcome = manager.run(&["kill", &target, "--stop-unit", "--json"]).expect(1).json()[0].clone();
    let reason = "its cgroup names user unit db.service, and systemd says that it belongs to web.service: not stopped";
    assert_eq!(outcome["failed"], json!([{"pid": server.pid, "reason": reason}]), "{outcome}");
    assert!(server.is_alive() && other.is_alive());
}

fn socket_unit_in_the_way() {
    let stage = Stage::new();
    let reservation = stage.puppet();
    let sock = reservation.bind("127.0.0.1:0", "reuseport");
    let socket = format!("[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream={}\nReusePort=yes\n", sock.address);
    let units = [("web.socket", socket), ("web.service", UserManager::service(&stage, "Restart=no"))];
    let Some((manager, server)) = UserManager::start(&stage, &units) else { return };
    reservation.close(sock.fd);
    let target = format!("{}/tcp", sock.port());
    let systemd = manager.process.0.id();
    let reason = "systemd holds it for user unit web.socket; stop it with: systemctl --user stop web.socket \
                  (or --stop-unit)";
    let dry = manager.run(&["kill", &target, "--dry-run"]).expect(0).text();
    assert!(dry.contains(&format!("systemd ({systemd}): {reason}")), "{dry}");
    let dry = manager.run(&["kill", &target, "--stop-unit", "--dry-run"]).expect(0);
    assert!(
        dry.text().contains(&format!("to stop: user unit web.socket, in place of systemd ({systemd})\n")),
        "{dry:?}"
    );

    let outcome = manager.run(&["kill", &target, "--stop-unit", "--json"]).expect(0).json()[0].clone();
    // What it listens for goes first, so that nobody starts the service again meanwhile.
    let stopped: Vec<&Value> = outcome["stopped"].as_array().expect("stopped").iter().map(|s| &s["unit"]).collect();
    assert_eq!(
        (&outcome["status"], stopped),
        (&json!("cleaned"), vec![&json!("web.socket"), &json!("web.service")]),
        "{outcome}"
    );
    server.wait();
}

fn nothing_to_settle_for() {
    let stage = Stage::new();
    let units = [("web.service", UserManager::service(&stage, "Restart=no"))];
    let Some((manager, server)) = UserManager::start(&stage, &units) else { return };
    let target = format!("{}/tcp", server.serve().port());
    let began = std::time::Instant::now();
    let settle = format!("{}s", 2 * PATIENCE.as_secs());
    let outcome = manager.run(&["kill", &target, "--settle", &settle, "--json"]).expect(0).json()[0].clone();
    assert_eq!((&outcome["status"], &outcome["killed"]), (&json!("cleaned"), &json!([server.pid])), "{outcome}");
    assert!(began.elapsed() < PATIENCE, "it looked out for a unit that nothing starts again");
}

fn looping_shell() {
    let stage = Stage::new();
    let (program, variable) = stage.recipe();
    let script = stage.path("loop.sh");
    fs::write(&script, format!("while :; do env {variable} {}; done\n", program.display())).expect("a script");
    // dash says "Terminated" of each server that is.
    let shell = spawn(Command::new("sh").arg(&script).stderr(Stdio::null()));
    let server = stage.admit();
    let sock = server.serve();
    let (outcome, next) = kill_until_respawn(&stage, command(&[]), &server, sock);
    let pid = shell.0.id();
    let line = format!("sh {}", script.display());
    let supervisor = json!({
        "pid": pid, "name": "sh", "unit": null, "container": null, "kind": "shell", "user_manager": null,
        "command": line, "restarts": null, "stop": format!("kill {pid}"),
    });
    let started_by = format!("sh ({pid}), a shell that may start it again: {line}; end it with: kill {pid}");
    check_respawn(&outcome, &next, supervisor, &started_by);

    // What was advised, then what was asked for in the first place.
    assert!(Command::new("sh").args(["-c", &format!("kill {pid}")]).status().expect("kill").success());
    drop(shell);
    let run = portwatch(&["kill", &format!("{}/tcp", sock.port()), "--json"]).expect(0);
    assert_eq!(run.json()[0]["status"], "cleaned", "{}", run.text());
    next.wait();
}

fn supervised_by_runit() {
    let (Some(runsv), Some(sv)) = (program("runsv"), program("sv")) else {
        skip("runit", "runsv and sv are needed");
        return;
    };
    let stage = Stage::new();
    let (program, variable) = stage.recipe();
    let directory = stage.path("my service");
    fs::create_dir(&directory).expect("a directory");
    fs::write(directory.join("run"), format!("#!/bin/sh\nexec env {variable} {}\n", program.display()))
        .expect("a file");
    fs::set_permissions(directory.join("run"), fs::Permissions::from_mode(0o755)).expect("chmod");
    // As runsvdir starts it: by its name, in the directory above.
    let supervisor = spawn(Command::new(&runsv).arg("my service").current_dir(stage.path(".")));
    let server = stage.admit();
    let sock = server.serve();
    let (outcome, next) = kill_until_respawn(&stage, command(&[]), &server, sock);
    let pid = supervisor.0.id();
    let stop = format!("sv stop '{}'", directory.display());
    let expected = json!({
        "pid": pid, "name": "runsv", "unit": null, "container": null, "kind": "runit", "user_manager": null,
        "command": format!("{} my service", runsv.display()), "restarts": true, "stop": stop,
    });
    check_respawn(&outcome, &next, expected, &format!("runsv ({pid}); end it with: {stop}"));

    let line = stop.replacen("sv", sv.to_str().expect("a path without surprises"), 1);
    assert!(Command::new("sh").args(["-c", &line]).stdout(Stdio::null()).status().expect("sv").success(), "{line}");
    next.wait();
    let run = portwatch(&["kill", &format!("{}/tcp", sock.port()), "--json"]).expect(0);
    assert_eq!(run.json()[0]["status"], "free", "{}", run.text());
}

pub fn trials() -> Vec<Test> {
    vec![
        test("supervised::a_unit_that_restarts_is_named_with_the_command_that_stops_it", respawning_unit),
        test("supervised::listeners_are_selected_by_unit_and_who_tells_its_manager", selected_by_unit),
        test("supervised::a_unit_is_stopped_over_dbus", stopped_over_dbus),
        test("supervised::a_socket_unit_is_named_and_stopped", activated_by_socket),
        test("supervised::a_unit_is_stopped_in_place_of_its_processes", stopped_instead_of_signalled),
        test("supervised::a_unit_of_which_only_a_cgroup_has_the_name_is_not_stopped", another_units_name),
        test("supervised::a_unit_whose_manager_is_not_reached_stays", no_manager_to_ask),
        test("supervised::a_socket_unit_is_named_and_stopped_with_its_service", socket_unit_in_the_way),
        test("supervised::a_unit_that_is_not_restarted_is_not_waited_for", nothing_to_settle_for),
        test("supervised::a_loop_of_a_shell_is_named", looping_shell),
        test("supervised::a_service_of_runit_is_named_with_the_command_that_stops_it", supervised_by_runit),
    ]
}
