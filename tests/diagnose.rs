//! Why a port is or stays taken. Every scene is set in a network namespace of its own, where the port is nobody else's.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::Instant;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

use crate::puppet::{PATIENCE, Puppet, Sock, Stage};
use crate::subject::{Run, binary, finish, plain_command, portwatch, program, skip};
use crate::{Test, test};

/// `nobody`: an ordinary user on every machine, by number.
const NOBODY: u32 = 65534;

/// A namespace with puppets in it, and the port that everything is about. Outside of the range for clients, and
/// different in each run of the tests: other namespaces are looked at, too.
struct Scene {
    stage: Stage,
    server: Puppet,
    port: u16,
}

impl Scene {
    /// `None`, loudly, where a namespace cannot be made.
    fn new() -> Option<Scene> {
        let stage = Stage::new();
        let server = stage.puppet();
        let port = 10_000 + (std::process::id() % 20_000) as u16;
        server.unshare_net().then_some(Scene { stage, server, port })
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Another process in the same namespace.
    fn another(&self) -> Puppet {
        self.server.fork()
    }

    /// Does something in the namespace, on a thread that ends there.
    fn inside<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/proc/{}/ns/net", self.server.pid)).expect("its namespace");
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
                act()
            });
            inside.join().expect("the thread inside")
        })
    }

    fn sysctl(&self, name: &str, value: &str) {
        self.inside(|| fs::write(format!("/proc/sys/net/ipv4/{name}"), value)).expect("a sysctl of the namespace");
    }

    fn kill(&self, arguments: &[&str]) -> Run {
        let target = format!("{}/tcp", self.port);
        self.inside(|| portwatch(&[&["kill", &target], arguments].concat()))
    }

    /// The one outcome of a `kill --json`, without how long it took.
    #[track_caller]
    fn outcome(&self, arguments: &[&str], code: i32) -> Value {
        let mut outcome = self.kill(&[arguments, &["--json"]].concat()).expect(code).json()[0].take();
        outcome.as_object_mut().expect("an object").remove("elapsed_ms").expect("elapsed_ms");
        outcome
    }

    fn diagnose(&self, arguments: &[&str]) -> Run {
        let arguments = [&["diagnose"], arguments].concat();
        self.inside(|| portwatch(&arguments))
    }

    fn diagnose_as_nobody(&self, arguments: &[&str]) -> Run {
        self.as_nobody(&[&["diagnose"], arguments].concat())
    }

    /// As nobody, by a copy of the binary that everybody may run.
    fn as_nobody(&self, arguments: &[&str]) -> Run {
        let copy = self.stage.path("portwatch");
        fs::copy(binary(), &copy).expect("copying the binary");
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("chmod");
        let mut command = plain_command(&copy, arguments);
        command.uid(NOBODY).gid(NOBODY).current_dir("/");
        self.inside(|| finish(command.spawn().expect("portwatch as nobody")))
    }

    /// What is printed, with names for what varies.
    fn named(&self, text: &str, puppets: &[(&str, &Puppet)], socks: &[(&str, Sock)]) -> String {
        let mut text = text.replace(", [::]", "");
        for (name, sock) in socks {
            text = text.replace(&format!("socket:[{}]", sock.inode), &format!("socket:[{name}]"));
        }
        for (name, puppet) in puppets {
            for (before, after) in [("(", ")"), ("kill ", "\n")] {
                text = text.replace(&format!("{before}{}{after}", puppet.pid), &format!("{before}{name}{after}"));
            }
        }
        text.replace(&self.port.to_string(), "PORT")
    }

    /// Checks exit code and text, and that the JSON says the same.
    #[track_caller]
    fn check(&self, code: i32, expected: &str, puppets: &[(&str, &Puppet)], socks: &[(&str, Sock)]) {
        let target = format!("{}/tcp", self.port);
        self.check_target(&target, code, expected, puppets, socks);
    }

    #[track_caller]
    fn check_target(
        &self,
        target: &str,
        code: i32,
        expected: &str,
        puppets: &[(&str, &Puppet)],
        socks: &[(&str, Sock)],
    ) {
        let text = self.diagnose(&[target]).expect(code).text();
        assert_eq!(self.named(&text, puppets, socks), expected, "\n{text}");
        let json = self.diagnose(&[target, "--json"]).expect(code).json();
        check_json(&text, &json);
    }

    /// Waits until the server's end is in this state, by the kernel's number: what the far end sends arrives when the
    /// kernel finds time for it, and no process is told.
    #[track_caller]
    fn await_state(&self, state: u8) {
        let wanted = format!(":{:04X} 0100007F:", self.port);
        let limit = Instant::now() + PATIENCE;
        let is_there = |table: &str| {
            table
                .lines()
                .any(|line| line.contains(&wanted) && line.split(' ').any(|word| word == format!("{state:02X}")))
        };
        while !is_there(&fs::read_to_string(format!("/proc/{}/net/tcp", self.server.pid)).expect("the table")) {
            assert!(Instant::now() < limit, "the connection does not reach state {state}");
            thread::yield_now();
        }
    }

    /// A connection that a server accepted, whose listener is closed: (accepted, client with the far end).
    fn connection(&self, flags: &str) -> (i32, Puppet, Sock) {
        let client = self.another();
        let listener = self.server.tcp(&self.address(), flags);
        let far = client.connect(listener.address);
        let accepted = self.server.accept(listener.fd);
        self.server.close(listener.fd);
        (accepted, client, far)
    }
}

/// Every finding of the JSON stands in the text, and nothing else does.
#[track_caller]
fn check_json(text: &str, json: &Value) {
    let diagnoses = json.as_array().expect("an array");
    let mut blocks = 0;
    for diagnosis in diagnoses {
        let bind = diagnosis["bind"].as_array().expect("what bind said");
        assert_eq!(diagnosis["bindable"], bind.iter().all(|trial| trial["plain"] == "ok"), "{diagnosis}");
        for finding in diagnosis["findings"].as_array().expect("findings") {
            let word = |key: &str| finding[key].as_str().unwrap_or_else(|| panic!("no {key} in {finding}")).to_owned();
            let mut block = format!("  {}: {}\n    {}\n", word("kind"), word("message"), word("evidence"));
            if !finding["next"].is_null() {
                block += &format!("    → {}\n", word("next"));
            }
            assert!(text.contains(&block), "{block}\nis not in\n{text}");
            blocks += 1;
        }
    }
    let shown = text.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   ")).count();
    assert_eq!(
        (text.lines().filter(|line| !line.starts_with(' ')).count(), shown),
        (diagnoses.len(), blocks),
        "{text}"
    );
}

const REFUSED: &str = "PORT/tcp cannot be bound: bind() to 0.0.0.0, 127.0.0.1 fails with EADDRINUSE";
const FREE: &str = "nothing stands in the way of PORT/tcp: bind() to 0.0.0.0, 127.0.0.1 succeeds";

pub fn trials() -> Vec<Test> {
    let mut trials = sockets();
    trials.extend(ghosts());
    trials.extend(closed());
    trials.extend(settings());
    trials.extend(usage());
    trials
}

fn sockets() -> Vec<Test> {
    vec![
        test("diagnose::a_free_port_is_bindable_and_exit_zero", || {
            let Some(scene) = Scene::new() else { return };
            scene.check(0, &format!("{FREE}\n"), &[], &[]);
        }),
        test("diagnose::a_listener_is_named_with_the_command_that_frees_the_port", || {
            let Some(scene) = Scene::new() else { return };
            scene.server.set_name(b"my \x1b[31mserver");
            let sock = scene.server.tcp(&scene.address(), "");
            let child = scene.another();
            let expected = format!(
                "{REFUSED}\n  held: my \\x1b[31mserver (SERVER) listens on 127.0.0.1:PORT; another process shares the \
                 socket\n    its fd {} is socket:[SOCKET]; uid 0, command puppet\n    → portwatch kill PORT/tcp\n",
                sock.fd
            );
            let text = scene.diagnose(&[&scene.port.to_string()]).expect(1).text();
            assert_eq!(scene.named(&text, &[("SERVER", &scene.server)], &[("SOCKET", sock)]), expected);
            let json = scene.diagnose(&[&scene.port.to_string(), "--json"]).expect(1).json();
            let finding = json!({
                "kind": "held",
                "message": format!(
                    "my \u{1b}[31mserver ({}) listens on {}; another process shares the socket",
                    scene.server.pid,
                    sock.address
                ),
                "evidence": format!("its fd {} is socket:[{}]; uid 0, command puppet", sock.fd, sock.inode),
                "next": format!("portwatch kill {}/tcp", scene.port),
            });
            let mut got = json[0].clone();
            got["bind"] = Value::Null;
            assert_eq!(
                got,
                json!({ "port": scene.port, "proto": "tcp", "bindable": false, "bind": null, "findings": [finding] })
            );
            drop(child);
        }),
        test("diagnose::udp_is_told_unasked_only_where_something_has_it", || {
            let Some(scene) = Scene::new() else { return };
            let sock = scene.server.udp(&scene.address(), "");
            let expected = format!(
                "{FREE}\nPORT/udp cannot be bound: bind() to 0.0.0.0, 127.0.0.1 fails with EADDRINUSE\n  held: \
                 puppet (SERVER) is bound to 127.0.0.1:PORT\n    its fd {} is socket:[SOCKET]; uid 0, command \
                 puppet\n    → portwatch kill PORT/udp\n",
                sock.fd
            );
            scene.server.set_name(b"puppet");
            let puppets = [("SERVER", &scene.server)];
            scene.check_target(&scene.port.to_string(), 1, &expected, &puppets, &[("SOCKET", sock)]);
        }),
        test("diagnose::a_listener_on_another_address_is_in_nobodys_way", || {
            let Some(scene) = Scene::new() else { return };
            scene.server.tcp(&scene.address(), "");
            let target = format!("127.0.0.2:{}/tcp", scene.port);
            scene.check_target(
                &target,
                0,
                "nothing stands in the way of PORT/tcp: bind() to 127.0.0.2 succeeds\n",
                &[],
                &[],
            );
        }),
        test("diagnose::a_socket_that_is_bound_and_does_not_listen_is_found", || {
            let Some(scene) = Scene::new() else { return };
            scene.server.set_name(b"binder");
            let sock = scene.server.bind(&scene.address(), "");
            let expected = format!(
                "{REFUSED}\n  bound: 127.0.0.1:PORT is bound by binder (SERVER), and nobody listens on it\n    \
                 socket:[SOCKET] of uid 0 is neither listening nor connected\n    → kill SERVER\n"
            );
            scene.check(1, &expected, &[("SERVER", &scene.server)], &[("SOCKET", sock)]);
        }),
        test("diagnose::connections_block_according_to_the_flag_of_their_server", || {
            for (flags, heading, verdict) in [
                ("", "", "no bind() succeeds until it ends, with SO_REUSEADDR neither"),
                ("reuseaddr", "; with SO_REUSEADDR it succeeds", "bind() needs SO_REUSEADDR until it ends"),
            ] {
                let Some(scene) = Scene::new() else { return };
                scene.server.set_name(b"server");
                let (accepted, client, far) = scene.connection(flags);
                let expect = |state: &str, who: &str, tail: &str, next: &str| {
                    format!(
                        "{REFUSED}{heading}\n  connections: 1 connection{who} (1 {state}) has the port: {verdict}\n    \
                         127.0.0.1:PORT with {}{tail}\n    → {next}\n",
                        far.address
                    )
                };
                let puppets = [("SERVER", &scene.server)];
                scene.check(1, &expect("ESTABLISHED", " of server (SERVER)", "", "kill SERVER"), &puppets, &[]);
                scene.server.close(accepted);
                scene.await_state(5);
                let orphan = expect("FIN_WAIT2", "", "; 1 of no process", "ss -Kt 'sport = :PORT'");
                scene.check(1, &orphan, &puppets, &[]);
                client.close(far.fd);
                scene.await_state(6);
                let verdict = match flags {
                    "" => "no bind() succeeds, with SO_REUSEADDR neither",
                    _ => "bind() needs SO_REUSEADDR",
                };
                let lingering = format!(
                    "{REFUSED}{heading}\n  time_wait: 1 connection lingers in TIME_WAIT for at most 60 s: until then \
                     {verdict}\n    127.0.0.1:PORT with {}\n    → ss -Kt state time-wait 'sport = :PORT'\n",
                    far.address
                );
                scene.check(1, &lingering, &puppets, &[]);
            }
        }),
        test("diagnose::connections_of_a_listener_are_a_warning", || {
            let Some(scene) = Scene::new() else { return };
            scene.server.set_name(b"server");
            let client = scene.another();
            let sock = scene.server.tcp(&scene.address(), "reuseaddr");
            // It waits in the backlog: no process has it yet.
            let far = client.connect(sock.address);
            let expected = format!(
                "{REFUSED}\n  held: server (SERVER) listens on 127.0.0.1:PORT\n    its fd {} is socket:[SOCKET]; uid 0, \
                 command puppet\n    → portwatch kill PORT/tcp\n  connections: 1 connection (1 ESTABLISHED) will keep \
                 the port from a bind() without SO_REUSEADDR once nobody listens\n    127.0.0.1:PORT with {}; 1 of no \
                 process\n",
                sock.fd, far.address
            );
            scene.check(1, &expected, &[("SERVER", &scene.server)], &[("SOCKET", sock)]);
        }),
        test("diagnose::a_listener_in_another_namespace_is_found_and_not_in_the_way", || {
            let Some(scene) = Scene::new() else { return };
            let elsewhere = scene.stage.puppet();
            elsewhere.set_name(b"far");
            if !elsewhere.unshare_net() {
                return;
            }
            elsewhere.tcp(&scene.address(), "");
            let netns = fs::read_link(format!("/proc/{}/ns/net", elsewhere.pid)).expect("its namespace");
            let netns = netns.to_str().expect("text").trim_matches(|c: char| !c.is_ascii_digit()).to_owned();
            let expected = format!(
                "{FREE}\n  other_namespace: far (FAR) listens on 127.0.0.1:PORT in network namespace {netns}: not \
                 here\n    uid 0, command puppet\n    → portwatch kill PORT/tcp --netns {netns}\n"
            );
            scene.check(0, &expected, &[("FAR", &elsewhere)], &[]);
            // And from outside, by its number.
            let target = format!("{}/tcp", scene.port);
            let run = portwatch(&["diagnose", &target, "--netns", &netns]).expect(1);
            assert!(run.text().contains("\n  held: far ("), "{}", run.text());
            // There is none, or, where some processes are not even root's to see, it is not to be known.
            let run = portwatch(&["diagnose", &target, "--netns", "1"]);
            assert!(matches!(run.code, Some(2 | 3)) && run.errors().contains("network namespace 1 "), "{run:?}");
            let run = scene.diagnose_as_nobody(&[&target, "--netns", &netns]).expect(3);
            assert!(run.errors().contains("CAP_SYS_PTRACE"), "{}", run.errors());
        }),
    ]
}

fn ghosts() -> Vec<Test> {
    vec![
        test("diagnose::a_descriptor_in_flight_is_found_in_the_queue_that_it_waits_in", || {
            let Some(scene) = Scene::new() else { return };
            let taker = scene.another();
            taker.set_name(b"taker");
            taker.open_mailbox();
            let sock = scene.server.tcp(&scene.address(), "");
            scene.server.send_fd(sock.fd, &taker);
            scene.server.close(sock.fd);
            for _ in 0..2 {
                let text = scene.diagnose(&[&format!("{}/tcp", scene.port)]).expect(1).text();
                let text = scene.named(&text, &[("TAKER", &taker)], &[("SOCKET", sock)]);
                let (before, after) = text.split_once("that is fd ").expect("the descriptor of the queue");
                assert_eq!(
                    before,
                    format!(
                        "{REFUSED}\n  ghost: 127.0.0.1:PORT is in flight: its descriptor waits to be received by taker \
                         (TAKER)\n    socket:[SOCKET] is in the queue of the unix socket "
                    )
                );
                assert_eq!(after.split_once(" there\n").map(|(_, next)| next), Some("    → kill TAKER\n"), "{text}");
            }
            // A kill that finds nobody to signal says the same.
            let text = scene.named(&scene.kill(&[]).expect(1).text(), &[("TAKER", &taker)], &[]);
            assert_eq!(
                text,
                "PORT/tcp has no visible holder: no visible process holds PORT/tcp: the kernel itself, another pid \
                 namespace or a descriptor in flight may; portwatch who PORT/tcp shows what is known\n  127.0.0.1:PORT is \
                 in flight: its descriptor waits to be received by taker (TAKER)\n    → kill TAKER\n"
            );
            let outcome = scene.outcome(&[], 1);
            let found = &outcome["diagnostics"]["findings"][0];
            let expected = (&json!("ghost"), &json!("ghost"), &json!(format!("kill {}", taker.pid)));
            assert_eq!((&outcome["status"], &found["kind"], &found["next"]), expected, "{outcome}");
            // Looking left it where it was.
            let received = taker.receive_fd();
            let link = fs::read_link(format!("/proc/{}/fd/{received}", taker.pid)).expect("the descriptor");
            assert_eq!(link.to_str(), Some(format!("socket:[{}]", sock.inode).as_str()));
        }),
        test("diagnose::a_socket_registered_with_an_io_uring_is_found_there", || {
            let Some(scene) = Scene::new() else { return };
            scene.server.set_name(b"ring");
            let sock = scene.server.tcp(&scene.address(), "");
            let ring = match scene.server.register_with_ring(sock.fd) {
                Ok(ring) => ring,
                Err(refused) => return skip("io_uring", &refused.text),
            };
            scene.server.close(sock.fd);
            let info = fs::read_to_string(format!("/proc/{}/fdinfo/{ring}", scene.server.pid)).expect("fdinfo");
            let expected = if info.contains("socket:[") {
                format!(
                    "{REFUSED}\n  ghost: 127.0.0.1:PORT is registered with an io_uring of ring (SERVER), which needs no \
                     descriptor for it\n    the fdinfo of fd {ring} there names socket:[SOCKET]\n    → kill SERVER\n"
                )
            } else {
                // Older kernels tell the number of files only.
                format!(
                    "{REFUSED}\n  ghost: 127.0.0.1:PORT is held by no process that can be seen\n    socket:[SOCKET] \
                     belongs to uid 0; 1 files are registered with an io_uring of ring (SERVER)\n    → portwatch kill \
                     PORT/tcp --close-socket\n"
                )
            };
            scene.check(1, &expected, &[("SERVER", &scene.server)], &[("SOCKET", sock)]);
        }),
        test("diagnose::a_socket_of_the_kernel_is_told_with_its_device", || {
            let Some(scene) = Scene::new() else { return };
            let Some(ip) = program("ip") else { return skip("vxlan", "ip is not installed") };
            let port = scene.port.to_string();
            let made = scene.inside(|| {
                let run = |arguments: &[&str]| Command::new(&ip).args(arguments).output().expect("ip");
                let kind = ["link", "add", "tun;0", "type", "vxlan", "id", "7", "dstport", &port, "local", "127.0.0.1"];
                let made = run(&kind);
                if made.status.success() { run(&["link", "set", "tun;0", "up"]) } else { made }
            });
            if !made.status.success() {
                return skip("vxlan", &String::from_utf8_lossy(&made.stderr));
            }
            let heading = "PORT/udp cannot be bound: bind() to 0.0.0.0, 127.0.0.1 fails with EADDRINUSE";
            let expected = format!(
                "{heading}\n  ghost: 0.0.0.0:PORT is the kernel's own: device tun;0 receives on it\n    tun;0 is of \
                 kind vxlan with port PORT\n    → ip link delete 'tun;0'\n"
            );
            scene.check_target(&format!("{port}/udp"), 1, &expected, &[], &[]);
        }),
        test("diagnose::a_listener_of_another_user_is_told_with_its_uid", || {
            let Some(scene) = Scene::new() else { return };
            let sock = scene.server.tcp(&scene.address(), "");
            let run = scene.diagnose_as_nobody(&[&format!("{}/tcp", scene.port)]).expect(1);
            assert_eq!(
                scene.named(&run.text(), &[], &[("SOCKET", sock)]),
                format!(
                    "{REFUSED}\n  other_user: 127.0.0.1:PORT is held by a process of uid 0 that you may not see\n    \
                     socket:[SOCKET] belongs to uid 0, and you are uid 65534\n    → sudo portwatch who PORT/tcp\n"
                )
            );
            assert_eq!(run.errors(), "portwatch: firewall rules were not looked at: that takes root; try sudo\n");
        }),
    ]
}

/// Whether this kernel closes sockets on demand; says so loudly where it does not.
fn closes(outcome: &Value) -> bool {
    let is_unable = outcome.to_string().contains("CONFIG_INET_DIAG_DESTROY");
    if is_unable {
        skip("destroy", "the kernel was built without CONFIG_INET_DIAG_DESTROY");
    }
    !is_unable
}

/// `kill --close-socket`.
fn closed() -> Vec<Test> {
    vec![
        test("diagnose::a_socket_is_closed_and_its_holder_lives_on", || {
            let Some(scene) = Scene::new() else { return };
            scene.server.set_name(b"server");
            let sock = scene.server.tcp(&scene.address(), "reuseaddr");
            let named = |text: &str| scene.named(text, &[("SERVER", &scene.server)], &[]);
            let text = named(&scene.kill(&["--close-socket", "--dry-run"]).expect(0).text());
            assert_eq!(
                text,
                "to close: the socket 127.0.0.1:PORT/tcp of server (SERVER), which lives on\n\
                 PORT/tcp: would close the socket of server (SERVER), which lives on\n"
            );
            let outcome = scene.outcome(&["--close-socket"], 0);
            if !closes(&outcome) {
                return;
            }
            let note =
                format!("bind() may need SO_REUSEADDR as long as server ({}) keeps its descriptor", scene.server.pid);
            let expected = json!({
                "port": scene.port, "proto": "tcp", "status": "cleaned", "killed": [], "forced": [], "failed": [],
                "closed": [sock.inode], "ghost": [], "still_listening": false, "remaining_pids": [],
                "diagnostics": {"message": note, "new_owners": [], "supervisor": null},
            });
            assert_eq!(outcome, expected);
            assert!(scene.server.is_alive());
            // As the next server would.
            scene.another().tcp(&scene.address(), "reuseaddr");
        }),
        test("diagnose::a_port_that_was_bound_by_number_without_reuseaddr_stays_bound", || {
            let Some(scene) = Scene::new() else { return };
            scene.server.set_name(b"server");
            scene.server.tcp(&scene.address(), "");
            let run = scene.kill(&["--close-socket"]);
            if run.text().contains("CONFIG_INET_DIAG_DESTROY") {
                return skip("destroy", "the kernel was built without CONFIG_INET_DIAG_DESTROY");
            }
            let run = run.expect(1);
            let text = scene.named(&run.text(), &[("SERVER", &scene.server)], &[]);
            let cause = "PORT/tcp cannot be bound yet: closed the socket of server (SERVER); nobody listens, but bind() \
                         fails with EADDRINUSE: ";
            let end = "; a port that was bound by number stays bound until the process closes its descriptor: others can \
                       bind it only if both sides set SO_REUSEADDR\n";
            assert!(text.starts_with(cause) && text.contains(end), "{text}");
            let errors = scene.named(&run.errors(), &[("SERVER", &scene.server)], &[]);
            assert_eq!(
                errors,
                "to close: the socket 127.0.0.1:PORT/tcp of server (SERVER), which lives on\n\
                 server (SERVER): its socket was closed, it lives on\n"
            );
            assert!(scene.server.is_alive());
        }),
        test("diagnose::a_ghost_is_closed", || {
            let Some(scene) = Scene::new() else { return };
            let taker = scene.another();
            taker.open_mailbox();
            let sock = scene.server.tcp(&scene.address(), "reuseaddr");
            scene.server.send_fd(sock.fd, &taker);
            scene.server.close(sock.fd);
            let outcome = scene.outcome(&["--close-socket"], 0);
            if closes(&outcome) {
                assert_eq!(
                    (&outcome["status"], &outcome["closed"]),
                    (&json!("cleaned"), &json!([sock.inode])),
                    "{outcome}"
                );
                scene.server.tcp(&scene.address(), "reuseaddr");
            }
        }),
        test("diagnose::a_socket_that_cannot_be_closed_stays_and_the_reason_is_told", || {
            let Some(scene) = Scene::new() else { return };
            let udp = scene.server.udp(&scene.address(), "");
            let target = format!("{}/udp", scene.port);
            let run = scene.inside(|| portwatch(&["kill", &target, "--close-socket", "--json"])).expect(1);
            let outcome = run.json()[0].clone();
            let reason = "a UDP socket does not close so: its port would stay taken; end its holder instead";
            assert_eq!(
                (&outcome["status"], &outcome["failed"]),
                (&json!("partial"), &json!([{"pid": scene.server.pid, "reason": reason}])),
                "{outcome}"
            );
            scene.server.close(udp.fd);

            let server = scene.another();
            server.become_user(NOBODY);
            server.tcp(&scene.address(), "");
            let run = scene.as_nobody(&["kill", &format!("{}/tcp", scene.port), "--close-socket", "--json"]);
            let outcome = run.expect(3).json()[0].clone();
            assert_eq!(outcome["status"], "denied", "{outcome}");
            let sentence =
                format!("cannot close the socket at {}: that takes root (CAP_NET_ADMIN); try sudo", scene.address());
            assert!(outcome.to_string().contains(&sentence), "{outcome}");
            assert!(outcome["still_listening"] == true && outcome.get("closed").is_none(), "{outcome}");
        }),
        test("diagnose::closing_a_socket_goes_with_no_signal", || {
            for other in ["--tree", "--group", "-9", "--stop-container", "--stop-unit", "--signal=INT"] {
                let errors = portwatch(&["kill", "1", "--close-socket", other]).expect(2).errors();
                assert!(errors.contains("cannot be used with"), "{other}: {errors}");
            }
        }),
    ]
}

fn settings() -> Vec<Test> {
    vec![
        test("diagnose::a_rule_that_answers_without_listener_is_told", || {
            let Some(scene) = Scene::new() else { return };
            let Some(nft) = program("nft") else { return skip("nft", "nft is not installed") };
            let file = scene.stage.path("rules");
            let rules = format!(
                "add table ip t\nadd chain ip t pre {{ type nat hook prerouting priority -100; }}\n\
                 add rule ip t pre tcp dport {} dnat to 192.0.2.2:80\n",
                scene.port
            );
            fs::write(&file, rules).expect("a file of rules");
            let made = scene.inside(|| Command::new(nft).arg("-f").arg(&file).output().expect("nft"));
            if !made.status.success() {
                return skip("nft", &String::from_utf8_lossy(&made.stderr));
            }
            let text = scene.diagnose(&[&format!("{}/tcp", scene.port)]).expect(1).text();
            let text = scene.named(&text, &[], &[]);
            // The handle is the kernel's to choose.
            let handle = text.trim_end().rsplit(' ').next().expect("a handle").to_owned();
            assert_eq!(
                text.replace(&format!("handle {handle}"), "handle N"),
                "PORT/tcp is answered elsewhere: bind() to 0.0.0.0, 127.0.0.1 succeeds\n  dnat: a rule sends what comes \
                 for PORT/tcp to 192.0.2.2:80: no listener here gets what it matches\n    nft: table ip t, chain pre, handle N\n    \
                 → nft delete rule ip t pre handle N\n"
            );
        }),
        test("diagnose::reserved_and_client_ports_are_good_to_know", || {
            let Some(scene) = Scene::new() else { return };
            scene.sysctl("ip_local_port_range", "9000 60999");
            scene.sysctl("ip_local_reserved_ports", "80");
            let expected = format!(
                "{FREE}\n  ephemeral: PORT is a port for clients: the kernel may give it to any connection at any \
                 moment\n    net.ipv4.ip_local_port_range = 9000-60999\n    → sysctl -w \
                 net.ipv4.ip_local_reserved_ports=80,PORT\n"
            );
            scene.check(0, &expected, &[], &[]);
            scene.sysctl("ip_local_reserved_ports", &format!("80,{}", scene.port));
            let expected = format!(
                "{FREE}\n  reserved: PORT is reserved: the kernel gives it to no client by itself, and bind() gets it as \
                 any other\n    net.ipv4.ip_local_reserved_ports = 80,PORT\n"
            );
            scene.check(0, &expected, &[], &[]);
        }),
        test("diagnose::a_port_that_takes_a_privilege_is_told_to_those_without", || {
            let Some(scene) = Scene::new() else { return };
            let start = (scene.port + 1).to_string();
            scene.sysctl("ip_unprivileged_port_start", &start);
            scene.check(0, &format!("{FREE}\n"), &[], &[]);
            let run = scene.diagnose_as_nobody(&[&scene.port.to_string()]).expect(1);
            assert_eq!(
                scene.named(&run.text(), &[], &[]),
                format!(
                    "PORT/tcp cannot be bound: bind() to 0.0.0.0, 127.0.0.1 fails with EACCES\n  privileged: ports below \
                     {start} take CAP_NET_BIND_SERVICE: run the server as root, give its program the capability by \
                     setcap, or lower the limit\n    net.ipv4.ip_unprivileged_port_start = {start}; bind() to \
                     0.0.0.0:PORT fails with EACCES\n    → sudo sysctl -w net.ipv4.ip_unprivileged_port_start=PORT\n"
                )
            );
        }),
    ]
}

fn usage() -> Vec<Test> {
    vec![
        test("diagnose::ranges_are_told_port_by_port_up_to_a_limit", || {
            let Some(scene) = Scene::new() else { return };
            let sock = scene.server.tcp(&scene.address(), "");
            let range = format!("{}-{}/tcp", scene.port - 1, scene.port + 1);
            let json = scene.diagnose(&[&range, "--json"]).expect(1).json();
            let bindable: Vec<&Value> =
                json.as_array().expect("an array").iter().map(|diagnosis| &diagnosis["bindable"]).collect();
            assert_eq!(bindable, [true, false, true], "{json} {sock:?}");
            let run = portwatch(&["diagnose", "1-65"]).expect(2);
            assert_eq!(
                run.errors(),
                "portwatch: error: diagnose looks at 64 ports at most, and these are 65; 'portwatch list 1-65' shows who \
                 has them\n"
            );
        }),
        test("diagnose::a_family_or_an_address_narrows_what_is_asked", || {
            let Some(scene) = Scene::new() else { return };
            scene.server.tcp(&scene.address(), "");
            let target = format!("{}/tcp", scene.port);
            for (arguments, code) in [
                (&[][..], 1),
                (&["-4"], 1),
                (&["-6"], 0),
                (&["-4", "-6"], 1),
                (&["--addr", "127.0.0.1"], 1),
                (&["--addr", "127.0.0.2"], 0),
                (&["--addr", "[::1]"], 0),
            ] {
                let run = scene.diagnose(&[&[&*target], arguments].concat());
                assert_eq!(run.code, Some(code), "{arguments:?}: {}{}", run.text(), run.errors());
            }
            let at = format!("127.0.0.1:{target}");
            scene.diagnose(&[&at, "-6"]).expect(2);
            scene.diagnose(&[&at, "--addr", "::1"]).expect(2);
        }),
        test("diagnose::bad_usage_is_exit_two", || {
            for arguments in [
                &["diagnose"][..],
                &["diagnose", "http"],
                &["diagnose", "0"],
                &["diagnose", "80", "--netns", "all"],
                &["diagnose", "80/tcp", "--udp"],
                &["diagnose", "80", "--tcp", "--udp"],
            ] {
                let run = portwatch(arguments).expect(2);
                assert_eq!(run.text(), "", "{arguments:?}");
            }
        }),
    ]
}
