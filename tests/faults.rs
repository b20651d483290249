//! What can go wrong around a running agent, each thing for itself: it goes on, says what is wrong, and once that is over
//! its table is the truth again. Nothing of it stays behind when it ends.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use nix::mount::MsFlags;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::{Value, json};

use crate::agent::{Agent, Client, with_socket};
use crate::history::{on_a_small_disk, remount};
use crate::puppet::{PATIENCE, Puppet, Stage};
use crate::subject::{finish, skip};
use crate::{Test, test};

/// How long the agent is paused.
const PAUSE: Duration = Duration::from_secs(5);

const CLIENTS: usize = 1000;

/// What clients may add to the agent's memory, whatever they do: of each the longest request, in a buffer that has doubled
/// its size for it, and what it was told and did not read.
const MOST_GROWTH: u64 = CLIENTS as u64 * (160 << 10);

/// How long somebody may wait for an answer while others do their worst.
const MOST_DELAY: Duration = Duration::from_secs(10);

impl Agent {
    pub fn status(&self) -> Value {
        let run = self.portwatch(&["status", "--json"]);
        assert!(matches!(run.code, Some(0 | 1)), "{run:?}");
        run.json()["agent"].clone()
    }

    /// Asks for its status until it is as wanted.
    #[track_caller]
    pub fn until(&self, wanted: &str, is: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let run = self.portwatch(&["status", "--json"]);
            // 4: busy for longer than the asking one waits. That may be, for a while.
            if run.code != Some(4) {
                assert!(matches!(run.code, Some(0 | 1)), "{run:?}");
                let status = run.json()["agent"].clone();
                if is(&status) {
                    return status;
                }
            }
            assert!(begun.elapsed() < PATIENCE, "never {wanted}: {run:?}");
        }
    }

    /// What it has of its own in memory, in bytes. Pages of the program's file, which a debug build has many of, come and
    /// go as they are used.
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    }

    pub fn descriptors(&self) -> Vec<u32> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("its descriptors");
        entries.map(|entry| entry.expect("an entry").file_name().to_str().expect("a number").parse().unwrap()).collect()
    }

    /// Programs, maps and links of the kernel's that it holds: what its descriptors say.
    pub fn kernel_objects(&self) -> BTreeSet<(String, u32)> {
        let infos = fs::read_dir(format!("/proc/{}/fdinfo", self.child.id())).expect("its descriptors");
        let texts = infos.filter_map(|info| read_fdinfo(&info.expect("an entry").path()));
        let ids = texts.flat_map(|text| {
            let lines = text.lines().filter_map(|line| {
                let (name, id) = line.split_once(':')?;
                let is_id = matches!(name, "prog_id" | "map_id" | "link_id");
                is_id.then(|| (name.to_owned(), id.trim().parse().expect("an id")))
            });
            lines.collect::<Vec<_>>()
        });
        ids.collect()
    }
}

fn troubles(status: &Value) -> String {
    status["troubles"].to_string()
}

/// Whether the kernel has a program, map or link of this id.
fn exists(name: &str, id: u32) -> bool {
    // enum bpf_cmd (linux/bpf.h).
    let command = match name {
        "prog_id" => 13,
        "map_id" => 14,
        _ => 30,
    };
    let mut attributes = [0_u32; 32];
    attributes[0] = id;
    // SAFETY: the kernel reads a bpf_attr of that size; what it opens is closed below.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(&attributes)) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{name} {id}: {error}");
        return false;
    }
    // SAFETY: just opened, and nobody else's.
    unsafe { libc::close(fd as i32) };
    true
}

/// `None`: closed meanwhile.
fn read_fdinfo(path: &Path) -> Option<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        text => Some(text.expect("its fdinfo")),
    }
}

/// Takes the agent's links to cgroups off, as `bpftool link detach` does; how many there were.
fn detach_cgroup_links(agent: &Agent) -> usize {
    // enum bpf_cmd (linux/bpf.h).
    const LINK_GET_FD_BY_ID: libc::c_long = 30;
    const LINK_DETACH: libc::c_long = 34;
    let bpf = |command: libc::c_long, argument: u32| {
        let mut attributes = [0_u32; 32];
        attributes[0] = argument;
        // SAFETY: the kernel reads a bpf_attr of that size.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(&attributes)) };
        assert!(result >= 0, "bpf({command}): {}", io::Error::last_os_error());
        result as u32
    };
    let infos = fs::read_dir(format!("/proc/{}/fdinfo", agent.child.id())).expect("its descriptors");
    let texts = infos.filter_map(|info| read_fdinfo(&info.expect("an entry").path()));
    let links: Vec<u32> = texts
        .filter(|text| text.contains("link_type:\tcgroup\n"))
        .filter_map(|text| text.lines().find_map(|line| line.strip_prefix("link_id:"))?.trim().parse().ok())
        .collect();
    for &id in &links {
        let link = bpf(LINK_GET_FD_BY_ID, id);
        bpf(LINK_DETACH, link);
        // SAFETY: opened above, and nobody else's.
        unsafe { libc::close(link as i32) };
    }
    links.len()
}

fn probes_taken_off(stage: &Stage) {
    if !crate::subject::event_tiers().contains(&"tracepoint") {
        return skip("tracepoint", "no other tier needs probes that somebody could take off");
    }
    let agent = Agent::start_with(stage, &["--probe", "tracepoint"]);
    let puppet = stage.puppet();
    let gone = puppet.serve();
    agent.check("the start", stage, &[&puppet]);
    let mut watch = agent.watch();
    for round in 1..=2 {
        assert!(detach_cgroup_links(&agent) > 0, "round {round}: the probes are not attached");
        let new = puppet.serve();
        puppet.udp("127.0.0.1:0", "");
        // Whoever asks is told the truth, and whoever watches that something was missed.
        agent.check("probes were taken off", stage, &[&puppet]);
        watch.until_event("open", new.inode);
        assert!(watch.lost >= round, "{}", watch.lost);
        let status = agent.status();
        assert!(status["resyncs"].as_u64() >= Some(round) && status["troubles"] == json!([]), "{status}");
    }
    puppet.close(gone.fd);
    watch.until_event("close", gone.inode);
}

/// Waits until nothing is left of what the agent had in the kernel, which frees such things a moment later.
#[track_caller]
pub fn until_freed(objects: &BTreeSet<(String, u32)>) {
    let begun = Instant::now();
    loop {
        let left: Vec<_> = objects.iter().filter(|(name, id)| exists(name, *id)).collect();
        if left.is_empty() {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "left behind: {left:?}");
        thread::yield_now();
    }
}

fn puppets(stage: &Stage, count: usize) -> Vec<Puppet> {
    (0..count).map(|_| stage.puppet()).collect()
}

/// All of them open and close listeners at once, and keep one.
fn storm(puppets: &[Puppet], listeners: usize) {
    for puppet in puppets {
        puppet.begin(&format!("storm {listeners}"));
    }
    for puppet in puppets {
        puppet.answer().expect("a storm");
        puppet.serve();
    }
}

fn a_pause(stage: &Stage) {
    let agent = Agent::start(stage);
    let puppets = puppets(stage, 4);
    let (gone, stays) = (puppets[0].serve(), puppets[1].serve());
    agent.check("the start", stage, &puppets.iter().collect::<Vec<_>>());
    agent.signal(Signal::STOP);
    let begun = Instant::now();
    puppets[0].close(gone.fd);
    while begun.elapsed() < PAUSE {
        storm(&puppets, 5000);
    }
    let heir = puppets[1].fork();
    puppets[1].close(stays.fd);
    agent.signal(Signal::CONT);
    agent.check("a pause", stage, &puppets.iter().chain([&heir]).collect::<Vec<_>>());
    let status = agent.status();
    assert_eq!(status["dropped"].as_u64() > Some(0), status["resyncs"].as_u64() > Some(0), "{status}");
    puppets[2].serve();
    agent.check("what followed", stage, &puppets.iter().chain([&heir]).collect::<Vec<_>>());
}

fn no_descriptors(stage: &Stage) {
    let agent = Agent::start(stage);
    let puppet = stage.puppet();
    puppet.serve();
    agent.check("the start", stage, &[&puppet]);
    let mut client = agent.connect().hello();
    let pid = Pid::from_child(&agent.child);
    let old = prlimit(Some(pid), Resource::Nofile, Rlimit { current: Some(0), maximum: Some(20_000) });
    let Ok(old) = old else { return skip("root", "only root limits other processes") };
    let late = stage.puppet();
    let (sock, other) = (late.serve(), puppet.serve());
    // Nobody sees to a new connection; whoever is connected is told the truth: that it is not known.
    let mut waits = agent.connect();
    waits.say(r#"{"request":"hello","version":1}"#);
    let message = client.say(r#"{"request":"list"}"#).hear_error("failed");
    assert!(message.starts_with("the table cannot be read anew: "), "{message}");
    let status = client.say(r#"{"request":"status"}"#).hear();
    assert!(troubles(&status).contains("cannot be read anew"), "{status}");
    assert_eq!(client.hear()["response"], "end");
    puppet.close(other.fd);
    prlimit(Some(pid), Resource::Nofile, old).expect("prlimit");
    assert_eq!(waits.hear()["response"], "hello");
    agent.until("well", |status| status["troubles"] == json!([]));
    agent.check("descriptors came back", stage, &[&puppet, &late]);
    // What could not be read of a process then is read now.
    let listed = agent.portwatch(&["list", "--json", &format!("{}/tcp", sock.port())]).expect(0).json();
    assert_eq!(listed[0]["holders"][0]["command"][0], "puppet", "{listed}");
}

/// An agent whose history is at `disk`.
fn agent_with_history(stage: &Stage, disk: &Path) -> Agent {
    let socket = stage.path("agent.sock");
    let mut command = with_socket(&["agent"], &socket);
    command.env("PORTWATCH_STATE", disk);
    Agent::of(command, socket)
}

fn a_full_disk(disk: &Path) {
    let stage = Stage::new();
    let agent = agent_with_history(&stage, disk);
    let puppet = stage.puppet();
    puppet.serve();
    agent.until("stored", |status| status["history"]["state"] == "ok" && status["history"]["lives"] != 0);
    let filler = disk.join("filler");
    let mut file = fs::File::create(&filler).expect("a file");
    for size in [64 << 10, 4096, 1] {
        while file.write(&vec![0; size]).is_ok() {}
    }
    let status = agent.until("full", |status| {
        puppet.serve();
        status["history"]["state"] == "disk_full"
    });
    assert!(status["history"]["reason"].as_str().is_some_and(|reason| reason.ends_with("free some disk space")));
    agent.portwatch(&["status"]).expect(1);
    agent.check("a full disk", &stage, &[&puppet]);
    let during = puppet.serve();
    drop(file);
    fs::remove_file(&filler).expect("rm");
    agent.until("well", |status| {
        puppet.serve();
        status["history"]["state"] == "ok"
    });
    agent.portwatch(&["status"]).expect(0);
    agent.check("room on the disk", &stage, &[&puppet]);
    let told = agent.portwatch(&["history", "--json", &during.port().to_string()]).expect(0).json();
    assert_eq!((&told[0]["port"], &told[0]["ended"]), (&json!(during.port()), &Value::Null), "{told}");
}

fn a_disk_that_cannot_be_written(disk: &Path) {
    let stage = Stage::new();
    fs::write(disk.join("history.db"), [0xff; 5000]).expect("a damaged file");
    let agent = agent_with_history(&stage, disk);
    let puppet = stage.puppet();
    puppet.serve();
    let status = agent.until("stored", |status| status["history"]["state"] == "ok");
    assert!(status["history"]["note"].as_str().is_some_and(|note| note.contains("set aside as")), "{status}");
    // The store has its files open for writing, which forbids to make all of it read-only: the log has to go.
    drop(agent);
    remount(disk, MsFlags::MS_RDONLY);
    let agent = agent_with_history(&stage, disk);
    puppet.serve();
    agent.until("read-only", |status| status["history"]["state"] == "read_only");
    agent.check("a read-only disk", &stage, &[&puppet]);
    remount(disk, MsFlags::empty());
    let last = puppet.serve();
    agent.until("well", |status| {
        puppet.serve();
        status["history"]["state"] == "ok"
    });
    agent.check("a disk that can be written", &stage, &[&puppet]);
    let told = agent.portwatch(&["history", "--json", &last.port().to_string()]).expect(0).json();
    assert_eq!(told[0]["port"], last.port(), "{told}");
}

/// Sets the wall clock, which only a machine of our own may have done to it.
fn the_wall_clock_is_set(stage: &Stage) {
    if std::env::var_os("PORTWATCH_TEST_EMULATED").is_none() {
        return skip("clock", "this machine's clock is not ours to set");
    }
    let step = |seconds: i64| {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).expect("CLOCK_REALTIME");
        let then = libc::timespec { tv_sec: now.tv_sec() + seconds, tv_nsec: now.tv_nsec() };
        // SAFETY: the kernel reads one timespec.
        assert_eq!(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const then) }, 0, "clock_settime");
    };
    let agent = Agent::start(stage);
    let puppet = stage.puppet();
    let socks: Vec<_> = [0, 86_400, -2 * 86_400, 86_400]
        .into_iter()
        .map(|seconds| {
            step(seconds);
            let sock = puppet.serve();
            agent.check("a step of the clock", stage, &[&puppet]);
            sock
        })
        .collect();
    for sock in &socks {
        // Old by the boot clock, whatever the other says: none has been open for an hour.
        let port = format!("{}/tcp", sock.port());
        let old = agent.portwatch(&["list", "--json", &port, "--older-than", "1h"]).expect(0).json();
        assert_eq!(old, json!([]));
        puppet.close(sock.fd);
        agent.check("a close", stage, &[&puppet]);
        agent.until("stored", |_| {
            let told = agent.portwatch(&["history", "--json", &port]).expect(0).json();
            told[0]["ended"] == "closed" && told[0]["lived_ms"].as_f64().is_none_or(|lived| lived < 3_600_000.0)
        });
    }
}

fn a_killed_agent(stage: &Stage) {
    let puppets = puppets(stage, 4);
    let mut left = BTreeSet::new();
    for round in 0..5 {
        let mut agent = Agent::start(stage);
        for puppet in &puppets {
            puppet.begin("storm 2000");
        }
        left.extend(agent.kernel_objects());
        if round > 0 {
            // Asked in the midst of it.
            assert_ne!(agent.connect().hello().say(r#"{"request":"list"}"#).hear(), Value::Null);
        }
        agent.end(Signal::KILL);
        let next = Agent::start(stage);
        for puppet in &puppets {
            puppet.answer().expect("a storm");
            puppet.serve();
        }
        next.check("a restart in a storm", stage, &puppets.iter().collect::<Vec<_>>());
        left.extend(next.kernel_objects());
    }
    if rustix::process::geteuid().is_root() {
        until_freed(&left);
    }
    // The last was ended by dropping it: SIGKILL. One that ends in good order takes its socket along.
    let mut agent = Agent::start(stage);
    assert_eq!(agent.end(Signal::TERM), Some(0));
    assert!(!agent.socket.exists());
}

fn a_vanished_socket(stage: &Stage) {
    let directory = stage.path("a/b");
    let socket = directory.join("agent.sock");
    let mut command = with_socket(&["agent"], &socket);
    command.env("PORTWATCH_STATE", stage.path("")).env("PORTWATCH_LOG", "off");
    let agent = Agent::of(command, socket.clone());
    let puppet = stage.puppet();
    let mut client = agent.connect().hello();
    let answers = |step: &str| {
        let begun = Instant::now();
        loop {
            // By connecting: that there is a file says nothing.
            if UnixStream::connect(&socket).is_ok() {
                puppet.serve();
                return agent.check(step, stage, &[&puppet]);
            }
            assert!(begun.elapsed() < PATIENCE, "no socket after {step}");
        }
    };
    fs::remove_file(&socket).expect("rm");
    answers("the socket was removed");
    fs::remove_dir_all(stage.path("a")).expect("rm -r");
    answers("its directory was removed");
    fs::rename(stage.path("a"), stage.path("moved")).expect("mv");
    answers("its directory was moved away");
    let lock = stage.path("a/b/agent.sock.lock");
    fs::remove_file(&lock).expect("rm");
    let begun = Instant::now();
    while !lock.exists() {
        assert!(begun.elapsed() < PATIENCE, "the lock is not made anew");
        thread::yield_now();
    }
    let second = finish(with_socket(&["agent"], &socket).spawn().expect("portwatch agent")).expect(1);
    assert!(second.errors().contains("serves"), "{}", second.errors());
    // A file where its directory was.
    fs::rename(stage.path("a"), stage.path("again")).expect("mv");
    fs::write(stage.path("a"), "").expect("a file");
    let mut ask = || {
        let status = client.say(r#"{"request":"status"}"#).hear();
        assert_eq!(client.hear()["response"], "end");
        status
    };
    let begun = Instant::now();
    while !troubles(&ask()).contains("is gone and cannot be made anew: cannot make") {
        assert!(begun.elapsed() < PATIENCE, "the loss is not told");
    }
    fs::remove_file(stage.path("a")).expect("rm");
    answers("there was room for its directory again");
    assert_eq!(troubles(&ask()), "[]");
    // The clean end leaves nothing that a client could take for an agent.
    let mut agent = agent;
    assert_eq!(agent.end(Signal::TERM), Some(0));
    assert!(!socket.exists());
}

fn bad_client(n: usize, socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("the agent's socket");
    stream.set_nonblocking(true).expect("O_NONBLOCK");
    let say = |bytes: &[u8]| drop((&stream).write_all(bytes));
    let hello = b"{\"request\":\"hello\",\"version\":1}\n";
    let many = |request: &[u8]| [hello, &request.repeat(200)[..]].concat();
    match n % 8 {
        // Silent.
        0 => {}
        // Slow: in the midst of a line, for ever.
        1 => say(&hello[..20]),
        // As long as a line may be, and it does not end.
        2 => say(&[b'x'; 65_000]),
        3 => say(&[b'x'; 100_000]),
        4 => say(b"\xff\xfe\0nonsense\n{}\n[]\n{\"request\":\"list\"}\n"),
        // Asks for much and reads nothing of it.
        5 => say(&many(b"{\"request\":\"list\",\"selection\":{\"netns\":\"all\"}}\n")),
        6 => say(&many(b"{\"request\":\"who\"}\n")),
        // A subscriber that hangs.
        _ => say(&[hello, &b"{\"request\":\"watch\"}\n"[..]].concat()),
    }
    stream
}

/// Every kind of bad client at once, and as many as there may be.
fn bad_clients(stage: &Stage) {
    // One descriptor each, on our side.
    let most = rustix::process::getrlimit(Resource::Nofile).maximum;
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most });
    let agent = Agent::start(stage);
    let servers = puppets(stage, 4);
    for server in &servers {
        for _ in 0..50 {
            server.serve();
        }
    }
    let all: Vec<&Puppet> = servers.iter().collect();
    agent.check("the start", stage, &all);
    let (memory, descriptors) = (agent.memory(), agent.descriptors().len());
    let mut patient = agent.connect().hello();
    // Of four users, for whom there are not quite so many places.
    let mut clients = Vec::new();
    for uid in 61_010..61_014 {
        let socket = agent.socket.clone();
        clients.extend(as_user(uid, move || (0..CLIENTS / 4).map(|n| bad_client(n, &socket)).collect::<Vec<_>>()));
    }
    let mut worst = Duration::ZERO;
    for _ in 0..5 {
        storm(&servers, 1000);
        let begun = Instant::now();
        assert_eq!(patient.say(r#"{"request":"status"}"#).hear()["response"], "status");
        assert_eq!(patient.hear()["response"], "end");
        // An ordinary user, too.
        let (socket, request) = (agent.socket.clone(), r#"{"request":"list","selection":{"targets":["1/udp"]}}"#);
        let stream = as_user(61_014, move || UnixStream::connect(socket).expect("the agent's socket"));
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        assert_eq!(Client(io::BufReader::new(stream)).hello().say(request).hear()["response"], "end");
        worst = worst.max(begun.elapsed());
    }
    let grown = agent.memory().saturating_sub(memory);
    eprintln!("NOTE: {worst:?} for an answer among 1,000 bad clients, {} KiB more memory", grown >> 10);
    assert!(worst < MOST_DELAY, "{worst:?} for an answer");
    assert!(grown < MOST_GROWTH, "{grown} bytes more memory");
    drop(clients);
    drop(patient);
    agent.until("alone", |status| status["connections"] == 1);
    agent.check("a thousand bad clients", stage, &all);
    let begun = Instant::now();
    while agent.descriptors().len() > descriptors {
        assert!(begun.elapsed() < PATIENCE, "{} descriptors, {descriptors} at first", agent.descriptors().len());
    }
    agent.portwatch(&["status"]).expect(0);
}

/// As an ordinary user, in a directory that everybody may enter.
fn as_user<T: Send + 'static>(uid: u32, run: impl FnOnce() -> T + Send + 'static) -> T {
    // The system call itself concerns this thread only.
    let thread = thread::spawn(move || {
        // SAFETY: these take integers, and a null list of length 0.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()), 0);
            assert_eq!(libc::syscall(libc::SYS_setresgid, uid, uid, uid), 0);
            assert_eq!(libc::syscall(libc::SYS_setresuid, uid, uid, uid), 0);
        }
        run()
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn too_many_requests(stage: &Stage) {
    let agent = Agent::start(stage);
    let socket = agent.socket.clone();
    as_user(61_001, move || {
        let connect = || {
            let stream = UnixStream::connect(&socket).expect("the agent's socket");
            stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
            Client(io::BufReader::new(stream))
        };
        let mut client = connect().hello();
        let mut asked = 0;
        let refusal = loop {
            // Two lines at a time are answered, so that neither side waits for the other to read.
            let answer = client.say(r#"{"request":"status"}"#).hear();
            match answer["response"].as_str() {
                Some("status") => drop(client.hear()),
                _ => break answer,
            }
            asked += 1;
            // So fast that it never comes to that.
            if asked > 50_000 {
                return;
            }
        };
        assert_eq!(refusal["kind"], "busy", "{refusal}");
        assert_eq!(client.hear(), Value::Null);
        assert!(asked >= 1900, "{asked}");
    });
    // Nobody else suffers for it.
    agent.portwatch(&["status"]).expect(0);
}

/// A test that only root can do.
pub fn root_test(name: &str, run: fn(&Stage)) -> Test {
    test(name, move || {
        if !rustix::process::geteuid().is_root() {
            return skip("root", "only root can do that to an agent");
        }
        run(&Stage::new());
    })
}

pub fn trials() -> Vec<Test> {
    let on_disk = |name: &str, run: fn(&Path)| {
        test(name, move || {
            let stage = Stage::new();
            let disk = stage.path("");
            on_a_small_disk(&stage.path(""), move || run(&disk));
        })
    };
    vec![
        root_test("faults::an_agent_that_was_paused_in_a_storm_is_true_again", a_pause),
        root_test("faults::without_descriptors_it_says_what_it_does_not_know_and_goes_on", no_descriptors),
        on_disk("a_full_disk_stops_history_and_nothing_else", a_full_disk),
        on_disk("a_damaged_or_read_only_history_stops_nothing", a_disk_that_cannot_be_written),
        root_test("faults::the_wall_clock_may_be_set_in_both_directions", the_wall_clock_is_set),
        root_test("faults::one_that_is_killed_in_a_storm_leaves_nothing_behind", a_killed_agent),
        root_test("faults::probes_that_somebody_took_off_are_attached_anew", probes_taken_off),
        root_test("faults::a_socket_that_vanished_is_made_anew", a_vanished_socket),
        root_test("faults::a_thousand_bad_clients_harm_nobody", bad_clients),
        root_test("faults::who_asks_too_much_is_told_that_it_is_busy", too_many_requests),
    ]
}
