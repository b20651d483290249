//! Real containers with published ports: their proxy lives, they are named, and they stop on demand.

use serde_json::{Value, json};

use crate::dockerd::{self, Container};
use crate::subject::{Run, finish};
use crate::{Test, test};

/// The port of the host under which containers publish, in the daemon's own network namespace.
const PUBLISHED: &str = "127.0.0.1:8123:80";

/// The one listener of a `list --json`.
#[track_caller]
fn only(run: Run) -> Value {
    let rows = run.expect(0).json();
    assert_eq!(rows.as_array().map(Vec::len), Some(1), "{rows}");
    rows[0].clone()
}

/// The one outcome of a `kill --json`, without how long it took.
#[track_caller]
fn outcome(run: Run, code: i32) -> Value {
    let mut outcomes = run.expect(code).json();
    assert_eq!(outcomes.as_array().map(Vec::len), Some(1), "{outcomes}");
    let mut outcome = outcomes[0].take();
    assert!(outcome.as_object_mut().expect("an object").remove("elapsed_ms").expect("elapsed_ms").is_u64());
    outcome
}

/// The pids of all holders, by port.
#[track_caller]
fn holders(run: Run) -> Vec<(u64, String)> {
    let rows = run.expect(0).json();
    let rows = rows.as_array().expect("an array").iter();
    let mut holders: Vec<(u64, String)> = rows
        .flat_map(|row| {
            let holders = row["holders"].as_array().expect("holders").clone();
            let port = row["port"].as_u64().expect("a port");
            holders.into_iter().map(move |holder| (port, holder["name"].as_str().expect("a name").to_owned()))
        })
        .collect();
    holders.sort();
    holders.dedup();
    holders
}

/// `freed: … in 1.2s`, without the time.
fn without_time(text: &str) -> String {
    text.rsplit_once(" in ").map_or(text, |(rest, _)| rest).to_owned()
}

pub fn trials() -> Vec<Test> {
    vec![
        test("container::what_publishes_a_port_is_spared_and_the_container_is_named", || {
            let Some(daemon) = dockerd::shared() else { return };
            let web = Container::serving(&daemon, &["-p", PUBLISHED], 80);
            let proxy = only(daemon.portwatch(&["list", "8123", "--json"]))["holders"][0]["pid"].clone();
            let (name, id) = (&web.name, web.short_id());
            let reason = format!(
                "publishes port 80 of container {name} ({id}); stop it with: docker stop {name} (or --stop-container)"
            );
            let run = daemon.portwatch(&["kill", "8123"]).expect(1);
            assert_eq!(run.text(), format!("8123/tcp is still taken: docker-proxy ({proxy}): {reason}\n"));
            assert_eq!(run.errors(), format!("not signalling docker-proxy ({proxy}): {reason}\n"));
            let expected = json!({
                "port": 8123, "proto": "tcp", "status": "partial", "killed": [], "forced": [],
                "failed": [{"pid": proxy, "reason": reason}], "ghost": [], "still_listening": true,
                "remaining_pids": [proxy], "diagnostics": null,
            });
            assert_eq!(outcome(daemon.portwatch(&["kill", "8123", "--json", "--force"]), 1), expected);
            let after = only(daemon.portwatch(&["list", "8123", "--json"]))["holders"][0]["pid"].clone();
            assert_eq!((web.is_running(), after), (true, proxy));
            let text = daemon.portwatch(&["who", "8123"]).expect(0).text();
            let line = format!("    container  publishes port 80 of container {name} ({id})\n");
            assert!(text.contains(&line), "{text}");
        }),
        test("container::stop_container_stops_it_and_the_port_can_be_bound", || {
            let Some(daemon) = dockerd::shared() else { return };
            let web = Container::serving(&daemon, &["-p", PUBLISHED], 80);
            let neighbour = Container::serving(&daemon, &["-p", "127.0.0.1:8124:80"], 80);
            assert!(daemon.bind("127.0.0.1:8123").is_err());
            let expected = json!({
                "port": 8123, "proto": "tcp", "status": "cleaned", "killed": [], "forced": [], "failed": [],
                "stopped": [{"container": web.short_id(), "name": web.name}], "ghost": [], "still_listening": false,
                "remaining_pids": [], "diagnostics": null,
            });
            assert_eq!(outcome(daemon.portwatch(&["kill", "8123", "--stop-container", "--json"]), 0), expected);
            daemon.bind("127.0.0.1:8123").expect("the port is free");
            assert!(!web.is_running() && neighbour.is_running());
            let run = daemon.portwatch(&["kill", "8124", "--stop-container"]).expect(0);
            let expected = format!("8124/tcp freed: stopped container {}", neighbour.name);
            assert_eq!(without_time(&run.text()), expected);
            assert!(!neighbour.is_running());
        }),
        test("container::an_engine_is_asked_over_tcp_where_docker_host_says_so", || {
            let Some(daemon) = dockerd::with(&["-H", "tcp://127.0.0.1:2375", "--tls=false"]) else { return };
            let web = Container::serving(&daemon, &["-p", PUBLISHED], 80);
            let portwatch = |arguments: &[&str]| {
                let mut command = daemon.command(arguments);
                command.env("DOCKER_HOST", "tcp://127.0.0.1:2375");
                finish(command.spawn().expect("cannot run portwatch"))
            };
            // Its own API is no published port.
            let text = portwatch(&["kill", "2375", "--dry-run"]).expect(0).text();
            let stays = format!("2375/tcp would stay: dockerd ({}): it runs containers, and ending it", daemon.pid());
            assert!(text.contains(&stays), "{text}");
            let pid = daemon.pid().to_string();
            let text = portwatch(&["kill", "2375", "--pid", &pid, "--dry-run"]).expect(0).text();
            assert!(text.ends_with(&format!("\n2375/tcp would be freed: terminate dockerd ({pid})\n")), "{text}");
            let stopped = outcome(portwatch(&["kill", "8123", "--stop-container", "--json"]), 0);
            assert_eq!(stopped["stopped"], json!([{"container": web.short_id(), "name": web.name}]), "{stopped}");
            assert!(!web.is_running());
        }),
        test("container::a_container_that_ignores_sigterm_stops_after_the_grace", || {
            let Some(daemon) = dockerd::shared() else { return };
            let script = "trap '' TERM; /bin/busybox httpd -p 80 && echo ready; /bin/busybox sleep 1000";
            let web = daemon.run(&["-p", PUBLISHED], script);
            daemon.portwatch(&["kill", "8123", "--stop-container", "--grace", "500ms"]).expect(0);
            daemon.bind("127.0.0.1:8123").expect("the port is free");
            assert!(!web.is_running());
        }),
        test("container::a_dry_run_says_what_would_be_stopped_and_stops_nothing", || {
            let Some(daemon) = dockerd::shared() else { return };
            let web = Container::serving(&daemon, &["-p", PUBLISHED], 80);
            let proxy = only(daemon.portwatch(&["list", "8123", "--json"]))["holders"][0]["pid"].clone();
            let run = daemon.portwatch(&["kill", "8123", "--stop-container", "--dry-run"]).expect(0);
            let (name, id) = (&web.name, web.short_id());
            let preview = format!("to stop: container {name} ({id}), in place of docker-proxy ({proxy})\n");
            assert_eq!(run.text(), format!("{preview}8123/tcp would be freed: stop container {name}\n"));
            assert_eq!(run.errors(), "");
            assert!(web.is_running());
        }),
        test("container::without_an_engine_the_command_line_tells_what_it_can", || {
            let Some(daemon) = dockerd::shared() else { return };
            let web = Container::serving(&daemon, &["-p", PUBLISHED], 80);
            let proxy = only(daemon.portwatch(&["list", "8123", "--json"]))["holders"][0]["pid"].clone();
            let none = "no container engine is there: no socket at /nonexistent/docker.sock";
            let address = web.address();
            let run = daemon.portwatch_alone(&["kill", "8123"]).expect(1);
            let expected = format!(
                "8123/tcp is still taken: docker-proxy ({proxy}): publishes port 80 of the container at {address}; \
                 stop that container instead ({none})\n"
            );
            assert_eq!(run.text(), expected);
            let run = daemon.portwatch_alone(&["kill", "8123", "--stop-container"]).expect(1);
            let expected = format!(
                "8123/tcp is still taken: docker-proxy ({proxy}): publishes port 80 of the container at {address}, \
                 which cannot be stopped: {none}\n"
            );
            assert_eq!(run.text(), expected);
            assert!(web.is_running());
        }),
        test("container::the_selector_takes_a_name_or_an_id_and_finds_proxies_and_processes", || {
            let Some(daemon) = dockerd::shared() else { return };
            let web = Container::serving(&daemon, &["-p", PUBLISHED], 18080);
            let _other = Container::serving(&daemon, &["-p", "127.0.0.1:8124:80"], 80);
            let list = |arguments: &[&str]| daemon.portwatch(&[&["list", "--json"], arguments].concat());
            let all = [(8123, "docker-proxy".to_owned()), (18080, "busybox".to_owned())];
            for word in [&web.name, &web.id, web.short_id(), &web.id[..8]] {
                assert_eq!(holders(list(&["--container", word])), all[..1], "{word}");
                let everywhere = holders(list(&["--container", word, "--netns", "all"]));
                assert_eq!(everywhere, all, "{word}");
            }
            let run = daemon.portwatch(&["list", "--container", "nobody"]).expect(2);
            assert!(
                run.errors().contains("no running container is called 'nobody'; running: web_"),
                "{}",
                run.errors()
            );
            assert_eq!(run.errors().lines().count(), 1);

            // Without an engine: ids alone, and only whom a cgroup shows.
            let run = daemon.portwatch_alone(&["list", "--container", &web.name]).expect(4);
            assert!(run.errors().contains("cannot look up"), "{}", run.errors());
            let run = daemon.portwatch_alone(&["list", "--json", "--netns", "all", "--container", web.short_id()]);
            assert!(run.errors().contains("compared with ids alone"), "{}", run.errors());
            assert_eq!(holders(run), all[1..]);
        }),
        test("container::a_listener_in_its_network_namespace_is_hit_only_where_that_is_asked_for", || {
            let Some(daemon) = dockerd::shared() else { return };
            let web = Container::serving(&daemon, &[], 18080);
            let run = daemon.portwatch(&["kill", "18080"]).expect(0);
            assert_eq!(run.text(), "18080/tcp is free already\n");
            let netns = web.netns().to_string();
            let row = only(daemon.portwatch(&["list", "18080", "--netns", &netns, "--json"]));
            let (pid, container) = (row["holders"][0]["pid"].clone(), row["holders"][0]["container"].clone());
            assert_eq!(container, web.short_id(), "{row}");
            let text = daemon.portwatch(&["who", "18080", "--netns", &netns]).expect(0).text();
            assert!(text.contains(&format!("    container  {} ({})\n", web.name, web.short_id())), "{text}");
            let killed = outcome(daemon.portwatch(&["kill", "18080", "--netns", &netns, "--json"]), 0);
            assert_eq!((&killed["status"], &killed["killed"]), (&json!("cleaned"), &json!([pid])), "{killed}");
            assert!(web.is_running(), "its first process is another");

            // In every namespace, but of this container: others on this machine may have the port, too.
            let web = Container::serving(&daemon, &[], 18080);
            let arguments = ["kill", "18080", "--netns", "all", "--container", &web.name, "--json"];
            let killed = outcome(daemon.portwatch(&arguments), 0);
            assert_eq!(killed["status"], "cleaned", "{killed}");
            assert!(web.is_running());
        }),
        test("container::a_process_with_the_hosts_network_is_stopped_with_its_container", || {
            let Some(daemon) = dockerd::shared() else { return };
            let web = Container::serving(&daemon, &["--network", "host"], 18080);
            let stopped = outcome(daemon.portwatch(&["kill", "18080", "--stop-container", "--json"]), 0);
            let expected = json!([{"container": web.short_id(), "name": web.name}]);
            assert_eq!((&stopped["stopped"], &stopped["killed"]), (&expected, &json!([])), "{stopped}");
            assert!(!web.is_running());
        }),
        test("container::a_container_that_starts_its_process_again_is_named", || {
            let Some(daemon) = dockerd::shared() else { return };
            let script = "echo ready; exec /bin/busybox httpd -f -p 18080";
            let web = daemon.run(&["--network", "host", "--restart", "always"], script);
            // The line came before it listened.
            let listens = || daemon.portwatch(&["list", "18080", "--json"]).json()[0].is_object();
            assert!((0..1000).any(|_| listens()), "it does not listen");
            let again = outcome(daemon.portwatch(&["kill", "18080", "-9", "--settle", "20s", "--json"]), 1);
            let message = again["diagnostics"]["message"].as_str().expect("a message");
            let expected = format!("started by container {} ({})", web.name, web.short_id());
            assert!(again["status"] == "respawned" && message.contains(&expected), "{again}");
        }),
        test("container::a_port_published_without_a_proxy_is_known_and_dockerd_lives", || {
            let Some(daemon) = dockerd::with(&["--userland-proxy=false"]) else { return };
            let web = Container::serving(&daemon, &["-p", PUBLISHED], 80);
            let engine = portwatch::engine::Engine::at(&daemon.host()).expect("an engine");
            let published = engine.publishing(8123, portwatch::model::Protocol::Tcp).expect("an answer");
            let published = published.expect("the container");
            assert_eq!((&published.container.name, &published.container.id), (&web.name, &web.id));
            let port = published.port;
            let host = Some("127.0.0.1".parse().expect("an address"));
            assert_eq!((port.host_ip, port.host_port, port.container_port), (host, 8123, 80));
            let none = engine.publishing(8124, portwatch::model::Protocol::Tcp).expect("an answer");
            assert_eq!(none, None);
            // dockerd keeps the port bound itself, or nobody does.
            let run = daemon.portwatch(&["kill", "8123"]);
            let holder = format!("dockerd ({}): publishes port 80 of container {}", daemon.pid(), web.name);
            let is_kept = run.code == Some(1) && run.text().contains(&holder);
            assert!(is_kept || run.text() == "8123/tcp is free already\n", "{run:?}");
            assert!(web.is_running());
        }),
        test("container::a_published_port_is_diagnosed_with_its_container", || {
            let Some(daemon) = dockerd::shared() else { return };
            let web = Container::serving(&daemon, &["-p", PUBLISHED], 80);
            let row = only(daemon.portwatch(&["list", "8123", "--json"]));
            let (proxy, inode) = (&row["holders"][0]["pid"], &row["inode"]);
            let told = daemon.portwatch(&["diagnose", "8123", "--tcp", "--json"]).expect(1).json()[0].take();
            let expected = json!([{
                "kind": "published", "message": format!("docker container {} answers on 127.0.0.1:8123", web.name),
                "evidence": format!(
                    "docker-proxy ({proxy}) holds socket:[{inode}]; it is published to {}:80", web.address()
                ),
                "next": "portwatch kill 8123/tcp --stop-container",
            }]);
            assert_eq!(told["findings"], expected, "{told}");
            let text = daemon.portwatch_alone(&["diagnose", "8123", "--tcp"]).expect(1).text();
            let message = format!("  published: docker-proxy ({proxy}) holds 127.0.0.1:8123 for the container at ");
            assert!(text.contains(&message) && text.contains("    → docker ps\n"), "{text}");
        }),
        test("container::a_port_that_only_rules_answer_is_diagnosed_with_its_container", || {
            let Some(daemon) = dockerd::with(&["--userland-proxy=false"]) else { return };
            let web = Container::serving(&daemon, &["-p", PUBLISHED], 80);
            let listens = daemon.portwatch(&["list", "8123", "--json"]).expect(0).json()[0].is_object();
            let told = daemon.portwatch(&["diagnose", "8123", "--tcp", "--json"]).expect(1).json()[0].take();
            let finding = &told["findings"][0];
            let (on, next) = match listens {
                // Newer ones keep the port bound.
                true => ("127.0.0.1:8123", "portwatch kill 8123/tcp --stop-container".to_owned()),
                false => ("8123/tcp", format!("docker stop {}", web.name)),
            };
            let message = format!("docker container {} answers on {on}", web.name);
            assert_eq!(
                (&finding["kind"], &finding["message"], &finding["next"]),
                (&json!("published"), &json!(message), &json!(next)),
                "{told}"
            );
            let kinds = || told["findings"].as_array().expect("findings").iter().map(|finding| &finding["kind"]);
            assert!(!kinds().any(|kind| *kind == "dnat" || *kind == "held"), "its rules are told with it: {told}");
        }),
        test("container::the_daemon_ends_and_leaves_nothing_behind", || {
            // Which its end makes sure of.
            if !dockerd::end() {
                eprintln!("there was none");
            }
        }),
    ]
}
