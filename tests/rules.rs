//! Rules: what is older than it should be ends by itself, with its directory, and nothing else does.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::puppet::{PATIENCE, Puppet, Sock, Stage};
use crate::subject::{Run, command, finish, pidfd};
use crate::{Test, test};

/// Nobody else on the host has it.
const USER: u32 = 60_124;

/// An agent with a configuration of its own, and what it logs.
struct Agent {
    child: Child,
    pidfd: OwnedFd,
    socket: PathBuf,
    config: PathBuf,
    metrics: SocketAddr,
    log: Receiver<String>,
}

impl Agent {
    fn start(stage: &Stage, config: &str, more: &[&str]) -> Agent {
        let (socket, file) = (stage.path("agent.sock"), stage.path("config.toml"));
        write(&file, config);
        // Given back at once: the kernel does not give it to the next who asks for any.
        let metrics = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port").local_addr().expect("its address");
        let arguments = ["agent", "--config", file.to_str().expect("a path"), "--metrics", &metrics.to_string()];
        let mut child = with_socket(&[&arguments, more].concat(), &socket).spawn().expect("cannot run the agent");
        let errors = BufReader::new(child.stderr.take().expect("piped"));
        let (lines, log) = mpsc::channel();
        thread::spawn(move || errors.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        let agent = Agent { pidfd: pidfd(&child), child, socket, config: file, metrics, log };
        agent.until_logged("watching (");
        agent
    }

    /// Waits for a line with these words; the line.
    fn until_logged(&self, words: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.log.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(words) => return line,
                Ok(line) => seen.push(line),
                Err(_) => panic!("the agent does not say '{words}', but {seen:#?}"),
            }
        }
    }

    fn portwatch(&self, arguments: &[&str]) -> Run {
        let mut command = with_socket(&[arguments, &["--agent"]].concat(), &self.socket);
        finish(command.spawn().expect("cannot run portwatch"))
    }

    /// Other rules from now on.
    fn reload(&self, config: &str) {
        write(&self.config, config);
        rustix::process::pidfd_send_signal(&self.pidfd, Signal::HUP).expect("the agent is gone");
        self.until_logged("the configuration is read anew");
    }

    fn metric(&self, line: &str) -> bool {
        let mut stream = TcpStream::connect(self.metrics).expect("metrics");
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n").expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer.lines().any(|found| found == line)
    }

    /// The latest life of the port, once it has ended in the history: nothing tells when it is written.
    fn ended(&self, port: u16) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            let lives = self.portwatch(&["history", &format!("{port}/tcp"), "--json"]).expect(0).json();
            if lives[0]["kills"][0].is_object() && !lives[0]["closed"].is_null() {
                return lives[0].clone();
            }
            assert!(Instant::now() < until, "history does not tell of the kill: {lives}");
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write(path: &Path, config: &str) {
    fs::write(path, config).expect("a configuration");
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).expect("chmod");
}

fn with_socket(arguments: &[&str], socket: &Path) -> Command {
    let mut command = command(arguments);
    command.env("PORTWATCH_SOCKET", socket).env("PORTWATCH_STATE", socket.parent().expect("a directory"));
    command
}

/// A server of the user that was started below `/tmp/web_…` and forgotten.
struct Server {
    puppet: Puppet,
    directory: TempDir,
    /// Bound, and not listening yet.
    sock: Sock,
}

impl Server {
    fn start(stage: &Stage, prefix: &str) -> Server {
        let directory = tempfile::Builder::new().prefix(prefix).tempdir().expect("a directory");
        fs::write(directory.path().join("log"), "x").expect("a file");
        let puppet = stage.puppet();
        if rustix::process::geteuid().is_root() {
            for path in [directory.path(), &directory.path().join("log")] {
                chown(path, Some(USER), Some(USER)).expect("chown");
            }
            puppet.become_user(USER);
        }
        puppet.change_directory(directory.path());
        let sock = puppet.bind("127.0.0.1:0", "");
        Server { puppet, directory, sock }
    }

    fn listen(&self) {
        self.puppet.listen(self.sock.fd);
    }

    fn port(&self) -> u16 {
        self.sock.port()
    }

    fn is_there(&self) -> bool {
        self.puppet.is_alive() && self.directory.path().join("log").exists()
    }
}

/// A rule for servers below `web_*` where temporary directories are.
fn rule(name: &str, servers: &[&Server], older_than: &str) -> String {
    let ports: Vec<u16> = servers.iter().map(|server| server.port()).collect();
    let glob = fs::canonicalize(std::env::temp_dir()).expect("a place for directories").join("web_*");
    let glob = glob.display();
    format!(
        "[[rule]]\nname = \"{name}\"\nports = {ports:?}\ncwd = \"{glob}\"\nolder_than = \"{older_than}\"\n\
         remove_cwd = \"{glob}\"\n"
    )
}

pub fn trials() -> Vec<Test> {
    vec![
        test("rules::forgotten_servers_end_with_their_directories_and_bystanders_stay", || {
            let stage = Stage::new();
            let server = || Server::start(&stage, "web_");
            let (before, after, young, other_port) = (server(), server(), server(), server());
            let elsewhere = Server::start(&stage, "elsewhere_");
            for early in [&before, &young, &other_port, &elsewhere] {
                early.listen();
            }
            let config = rule("web", &[&before, &after, &elsewhere], "1s") + &rule("patient", &[&young], "1h");
            let agent = Agent::start(&stage, &config, &[]);
            after.listen();
            for server in [&before, &after] {
                let line = agent.until_logged(&format!("{}/tcp freed: terminated", server.port()));
                let removed = format!("removed {}", server.directory.path().display());
                assert!(line.contains(&removed) && line.contains("rule=web"), "{line}");
                server.puppet.wait();
                assert!(!server.directory.path().exists());
                let life = agent.ended(server.port());
                assert_eq!(
                    (&life["kills"][0]["name"], &life["ended"]),
                    (&"rule web".into(), &"killed".into()),
                    "{life}"
                );
            }
            assert!(agent.metric(r#"portwatch_rule_kills_total{rule="web",status="cleaned"} 2"#));
            assert!(agent.metric(r#"portwatch_rule_kills_total{rule="patient",status="cleaned"} 0"#));
            for bystander in [&young, &other_port, &elsewhere] {
                assert!(bystander.is_there());
            }
            let rules = agent.portwatch(&["rules", "--json"]).expect(0).json();
            let told: Vec<(&Value, Vec<&Value>)> = rules
                .as_array()
                .expect("rules")
                .iter()
                .map(|rule| {
                    let matches = rule["matches"].as_array().expect("matches").iter();
                    (&rule["name"], matches.map(|it| &it["listener"]["port"]).collect())
                })
                .collect();
            let port = Value::from(young.port());
            assert_eq!(told, [(&"web".into(), vec![]), (&"patient".into(), vec![&port])], "{rules}");
            let text = agent.portwatch(&["rules"]).expect(0).text();
            assert!(text.contains("web: ends what is older than 1s") && text.contains("  in 59m"), "{text}");
            let history = agent.portwatch(&["history", &format!("{}/tcp", after.port())]).expect(0).text();
            assert!(history.contains("killed by rule web"), "{history}");
        }),
        test("rules::a_dry_run_tells_and_ends_nothing", || {
            let stage = Stage::new();
            let server = Server::start(&stage, "web_");
            server.listen();
            let agent = Agent::start(&stage, &rule("web", &[&server], "1ms"), &["--dry-run-rules"]);
            let line = agent.until_logged("would be freed: terminate");
            assert!(line.contains(&format!("would remove {}", server.directory.path().display())), "{line}");
            assert!(server.is_there());
            let text = agent.portwatch(&["rules"]).expect(0).text();
            assert!(text.contains("web: would end") && text.contains("again in "), "{text}");
        }),
        test("rules::whom_a_rule_meets_is_seen_when_it_fires", || {
            let stage = Stage::new();
            let server = || Server::start(&stage, "elsewhere_");
            let (moved, stays, spared) = (server(), server(), server());
            [&moved, &stays, &spared].iter().for_each(|server| server.listen());
            let all = [&moved, &stays, &spared];
            let agent = Agent::start(&stage, &rule("web", &all, "1h"), &[]);
            // Of this the kernel tells nobody.
            let directory = tempfile::Builder::new().prefix("web_").tempdir().expect("a directory");
            [&moved, &spared].iter().for_each(|server| server.puppet.change_directory(directory.path()));
            let (program, control) = stage.recipe();
            let more = format!("except = {}\nproto = \"tcp\"\naddr = \"127.0.0.1\"\n", spared.port());
            let met = rule("web", &all, "1ms") + &more + &format!("env = [\"NOBODY\", '{control}']\n");
            let not_met = |name: &str, line: &str| rule(name, &all, "1ms") + line;
            agent.reload(
                &(met
                    + &not_met("env", &format!("env = '{control}?'\n"))
                    + &not_met("cgroup", "cgroup = \"/nobody\"\n")),
            );
            agent.until_logged(&format!("{}/tcp freed: terminated", moved.port()));
            moved.puppet.wait();
            let text = agent.portwatch(&["rules"]).expect(0).text();
            assert!(text.contains(&format!("except {}, tcp, address 127.0.0.1, cwd /", spared.port())), "{text}");
            assert_eq!(text.matches("meets nothing now").count(), 3, "{text} of {}", program.display());
            assert!(stays.is_there() && spared.is_there());
        }),
        test("rules::a_report_is_told_to_the_log_once", || {
            let stage = Stage::new();
            let server = Server::start(&stage, "web_");
            server.listen();
            let config = format!(
                "[[rule]]\nname = \"tell\"\nports = {}\nolder_than = \"1ms\"\naction = \"report\"\n",
                server.port()
            );
            let agent = Agent::start(&stage, &config, &[]);
            agent.until_logged("rule=tell");
            assert!(agent.portwatch(&["rules"]).expect(0).text().contains("  reported  "));
            assert!(server.is_there());
        }),
        test("rules::they_are_read_anew_at_sighup_and_broken_ones_change_nothing", || {
            let stage = Stage::new();
            let (first, second) = (Server::start(&stage, "web_"), Server::start(&stage, "web_"));
            first.listen();
            second.listen();
            let agent = Agent::start(&stage, "", &[]);
            agent.reload(&rule("one", &[&first], "1ms"));
            first.puppet.wait();
            agent.until_logged("rule=one");
            write(&agent.config, "[[rule]]\nname = \"two\"\n");
            rustix::process::pidfd_send_signal(&agent.pidfd, Signal::HUP).expect("the agent is gone");
            agent.until_logged("config.toml:1: rule 'two': it would meet every server");
            assert!(agent.portwatch(&["rules"]).expect(0).text().starts_with("one: ends"));
            assert!(second.is_there());
        }),
        test("rules::without_an_agent_a_file_says_what_it_would_meet", || {
            let stage = Stage::new();
            let server = Server::start(&stage, "web_");
            server.listen();
            let file = stage.path("rules.toml");
            write(&file, &rule("web", &[&server], "1h"));
            let run = |arguments: &[&str]| finish(command(arguments).spawn().expect("portwatch"));
            let path = file.to_str().expect("a path");
            let rules = run(&["rules", "--json", "--config", path]).expect(0).json();
            assert_eq!(rules[0]["matches"][0]["listener"]["port"], server.port(), "{rules}");
            write(&file, "\n[[rule]]\nname = \"x\"\nport = 1\n");
            let broken = run(&["rules", "--config", path]).expect(2);
            assert!(broken.errors().contains("rules.toml:4: rule 'x': there is no 'port'"), "{}", broken.errors());
            let missing = run(&["rules", "--config", "/nonexistent/x.toml"]).expect(2);
            assert!(missing.errors().contains("/nonexistent/x.toml"), "{}", missing.errors());
        }),
    ]
}
