//! `[access]` in the agent's configuration, with real users and groups: what each is told, and who may ask for a kill.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::time::Instant;

use nix::libc;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::{Value, json};

use crate::Test;
use crate::agent::{Agent, with_socket};
use crate::faults::root_test;
use crate::puppet::{PATIENCE, Stage};
use crate::subject::finish;
use crate::watcher::Watch;

fn only_own(stage: &Stage) {
    const OWN: u32 = 61_002;
    let config = stage.path("config.toml");
    let configure = |text: &str| fs::write(&config, text).expect("a configuration");
    configure("[access]\nlist = \"own\"\n");
    let agent = Agent::start_with(stage, &["--config", config.to_str().expect("UTF-8"), "--log", "off"]);
    let copy = stage.path("portwatch");
    fs::copy(crate::subject::binary(), &copy).expect("copying the binary");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("chmod");
    let command = |arguments: &[&str]| {
        let mut command = crate::subject::plain_command(&copy, &[arguments, &["--agent"]].concat());
        command.env("PORTWATCH_SOCKET", &agent.socket).uid(OWN).gid(OWN).current_dir("/");
        command
    };
    let asked = |arguments: &[&str]| finish(command(arguments).spawn().expect("portwatch")).expect(0).json();
    let ports = |told: &Value| -> BTreeSet<u64> {
        told.as_array().expect("an array").iter().map(|one| one["port"].as_u64().expect("a port")).collect()
    };

    let (root, own) = (stage.puppet(), stage.puppet());
    let shared = root.serve();
    let heir = root.fork();
    heir.become_user(OWN);
    own.become_user(OWN);
    let (of_root, of_own) = (root.serve(), own.serve());
    agent.check("the start", stage, &[&root, &own, &heir]);
    let (hidden, seen) = (of_root.port(), BTreeSet::from([of_own.port().into(), shared.port().into()]));
    let target = hidden.to_string();
    assert_eq!(ports(&asked(&["list", "--json", "--netns", "all"])), seen);
    for selectors in
        [&["--user", "0"][..], &["--pid", &root.pid.to_string()], &["--older-than", "0"], &["--tcp"], &["1-65535"]]
    {
        let told = ports(&asked(&[&["list", "--json", "--netns", "all"], selectors].concat()));
        assert!(told.is_subset(&seen), "{selectors:?}: {told:?}");
    }
    // What is not theirs is not denied to be there.
    let said = |arguments: &[&str], code| finish(command(arguments).spawn().expect("portwatch")).expect(code).errors();
    let own_only = "this agent tells users of their own only (try --no-agent, or root)\n";
    let nothing = format!("portwatch: nothing of yours is listening on {target}; {own_only}");
    assert_eq!(said(&["list", &target], 0), nothing);
    assert_eq!(said(&["who", &target], 1), nothing);
    let missing = said(&["wait", &target, "--bound", "--timeout", "50ms"], 1);
    assert!(missing.starts_with(&format!("portwatch: nothing of yours listens on {target}")), "{missing}");
    assert!(missing.ends_with(own_only), "{missing}");
    let free = said(&["wait", &target, "--free", "--timeout", "50ms"], 2);
    assert!(free.ends_with(own_only), "{free}");
    // Where it need not be the agent, what all may see is looked at.
    let mut alone = crate::subject::plain_command(&copy, &["wait", &target, "--bound"]);
    alone.env("PORTWATCH_SOCKET", &agent.socket).uid(OWN).gid(OWN).current_dir("/");
    let bound = finish(alone.spawn().expect("portwatch")).expect(0);
    assert_eq!(
        (bound.text(), bound.errors()),
        (format!("{target}/tcp is bound by uid 0 (not visible to you; try sudo)\n"), String::new())
    );
    let mut root_s = agent.connect().hello();
    let everything = r#"{"request":"list","selection":{"targets":["1/udp"]}}"#;
    assert_eq!(root_s.say(everything).hear(), json!({"response": "end", "count": 0}));
    // Nor does a kill tell who is in the way.
    let run = finish(command(&["kill", &target, "--json", "--yes"]).spawn().expect("portwatch")).expect(1);
    let outcome = &run.json()[0];
    assert_eq!((&outcome["status"], &outcome["remaining_pids"]), (&json!("partial"), &json!([])), "{outcome}");
    let want = "held by somebody of whom the agent's configuration tells you nothing";
    assert_eq!(outcome["diagnostics"]["message"], want, "{outcome}");
    assert!(root.is_alive());
    for port in [hidden, of_own.port()] {
        let port = port.to_string();
        agent.until("stored", |_| agent.portwatch(&["history", "--json", &port]).expect(0).json() != json!([]));
    }
    let told = ports(&asked(&["history", "--json", "--netns", "all"]));
    assert!(told.is_subset(&seen) && !told.is_empty(), "{told:?}");

    let mut watch = Watch::spawn(command(&["watch", "--json", "--netns", "all"]));
    watch.wait_until_ready("agent");
    root.close(of_root.fd);
    root.serve();
    let late = own.serve();
    let event = watch.next("what is told first");
    assert_eq!(event["listener"]["inode"], late.inode, "{event}");

    // A broken configuration changes nothing, and is told.
    configure("[access]\nlist = \"all\"\nkil = \"all\"\n");
    agent.signal(Signal::HUP);
    let status = agent.until("broken", |status| status["troubles"] != json!([]));
    let want = format!(
        "the configuration stays as it was: {}:3: [access] has no 'kil'; it has list and kill",
        config.display()
    );
    assert_eq!(status["troubles"], json!([want]));
    agent.portwatch(&["status"]).expect(1);
    configure("[acces]\nlist = \"all\"\n");
    agent.signal(Signal::HUP);
    agent.until("misspelt", |status| {
        status["troubles"][0].as_str().is_some_and(|trouble| {
            trouble.starts_with("the configuration stays as it was: ")
                && trouble.contains(":1: there is no table [acces];")
        })
    });
    let new = root.serve();
    assert!(!ports(&asked(&["list", "--json"])).contains(&u64::from(new.port())));
    // One that cannot be read for want of a descriptor is read as soon as there is one.
    configure("[access]\nlist = \"all\"\n");
    let pid = Some(Pid::from_child(&agent.child));
    let mut client = agent.connect().hello();
    let none = Rlimit { current: Some(0), maximum: Some(20_000) };
    let old = prlimit(pid, Resource::Nofile, none).expect("prlimit");
    agent.signal(Signal::HUP);
    let begun = Instant::now();
    while !client.say(r#"{"request":"status"}"#).hear()["troubles"].to_string().contains("Too many open files") {
        assert_eq!(client.hear()["response"], "end");
        assert!(begun.elapsed() < PATIENCE, "a reload without descriptors went well");
    }
    prlimit(pid, Resource::Nofile, old).expect("prlimit");
    agent.until("well", |status| status["troubles"] == json!([]));
    assert!(ports(&asked(&["list", "--json"])).contains(&u64::from(new.port())));
    // Whoever watches already, too.
    let told = root.serve();
    watch.until_event("open", told.inode);
}

fn only_a_group_may_kill(stage: &Stage) {
    const USER: u32 = 61_004;
    const GROUP: u32 = 61_100;
    let config = stage.path("config.toml");
    fs::write(&config, format!("[access]\nkill = {GROUP}\n")).expect("a configuration");
    let agent = Agent::start_with(stage, &["--config", config.to_str().expect("UTF-8"), "--log", "warn"]);
    let copy = stage.path("portwatch");
    fs::copy(crate::subject::binary(), &copy).expect("copying the binary");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("chmod");
    let server = || {
        let puppet = stage.puppet();
        puppet.become_user(USER);
        let sock = puppet.serve();
        (puppet, format!("{}/tcp", sock.port()))
    };
    let kill = |target: &str, primary: u32, others: Vec<libc::gid_t>| {
        let mut command = crate::subject::plain_command(&copy, &["kill", target, "--json", "--yes", "--agent"]);
        command.env("PORTWATCH_SOCKET", &agent.socket).current_dir("/");
        // SAFETY: system calls on integers, and on a list that was made before the fork.
        unsafe {
            command.pre_exec(move || {
                let done = libc::setgroups(others.len(), others.as_ptr()) == 0
                    && libc::setresgid(primary, primary, primary) == 0
                    && libc::setresuid(USER, USER, USER) == 0;
                if done { Ok(()) } else { Err(io::Error::last_os_error()) }
            });
        }
        finish(command.spawn().expect("portwatch"))
    };
    let refusal = || loop {
        let line = agent.log.recv_timeout(PATIENCE).expect("a line about the refusal");
        if line.contains("kill refused") {
            return line;
        }
    };
    let (puppet, target) = server();
    for others in [vec![], vec![GROUP - 1, GROUP + 1], (70_000..70_200).collect()] {
        let run = kill(&target, USER, others).expect(3);
        let want = format!("the agent kills for root and the group {GROUP} only, and you are not in it; use sudo");
        assert!(run.errors().contains(&want), "{}", run.errors());
        let line = refusal();
        assert!(line.contains(&format!("uid={USER} pid=")), "{line}");
        assert!(line.contains(&format!("targets={target} reason=\"the agent kills for root and the group")), "{line}");
    }
    // Whatever else keeps one from being planned.
    let mut client = agent.connect().hello();
    for (request, want) in [
        (json!({"request": "kill"}), "uid=0 pid="),
        (json!({"request": "kill", "selection": {"targets": ["x ".repeat(999)]}}), "targets=\"x x x"),
        (json!({"request": "kill", "selection": {"targets": ["1"]}, "grace_ms": u64::MAX}), "reason=\"grace_ms is"),
    ] {
        client.say(&request.to_string()).hear_error("usage");
        let line = refusal();
        assert!(line.contains(want) && line.len() < 600, "{line}");
    }
    assert!(puppet.is_alive());
    assert_eq!(kill(&target, USER, vec![7, GROUP]).expect(0).json()[0]["status"], "cleaned");
    puppet.wait();
    let (puppet, target) = server();
    kill(&target, GROUP, vec![]).expect(0);
    puppet.wait();
    // Root is never narrowed.
    let (puppet, target) = server();
    agent.portwatch(&["kill", &target, "--json", "--yes"]).expect(0);
    puppet.wait();
}

fn a_bad_configuration(stage: &Stage) {
    let config = stage.path("config.toml");
    let refused = |text: &str, mode: u32| {
        fs::write(&config, text).expect("a configuration");
        fs::set_permissions(&config, fs::Permissions::from_mode(mode)).expect("chmod");
        let arguments = ["agent", "--config", config.to_str().expect("UTF-8")];
        let run = finish(with_socket(&arguments, &stage.path("agent.sock")).spawn().expect("portwatch")).expect(2);
        run.errors().replace(config.to_str().expect("UTF-8"), "FILE")
    };
    let begin = "portwatch: error: FILE";
    assert_eq!(
        refused("\n[access]\nkill = \"nobody in sight\"\n", 0o644),
        format!("{begin}:3: no group is called 'nobody in sight'; use a group of this host, a gid or \"all\"\n")
    );
    assert_eq!(
        refused("[access]\n", 0o666),
        format!("{begin}: everybody may write it, so the agent does not read it; run `chmod go-w` on it\n")
    );
    for (text, want) in [
        ("[acces]\nlist = \"own\"\n", ":1: there is no table [acces]; "),
        ("[access]\n[[rules]]\nname = \"x\"\n", ":2: there is no table [[rules]]; "),
        ("list = \"own\"\n", ":1: 'list' is in no table; "),
    ] {
        assert_eq!(
            refused(text, 0o644),
            format!("{begin}{want}a configuration has [sets], [access] and [[rule]]\n"),
            "{text}"
        );
    }
    let missing = ["agent", "--config", "/nonexistent/config.toml"];
    let run = finish(with_socket(&missing, &stage.path("agent.sock")).spawn().expect("portwatch")).expect(2);
    let want = "portwatch: error: cannot read the configuration /nonexistent/config.toml: there is no such file; name \
                another, or leave out --config\n";
    assert_eq!(run.errors(), want);
}

pub fn trials() -> Vec<Test> {
    vec![
        root_test("access::whoever_may_see_only_their_own_sees_nothing_else", only_own),
        root_test("access::only_a_group_may_ask_for_kills", only_a_group_may_kill),
        root_test("access::a_bad_configuration_is_named_with_its_line", a_bad_configuration),
    ]
}
