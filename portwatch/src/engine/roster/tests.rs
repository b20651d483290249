use super::*;
use crate::engine::testing::{container, process, socket};

fn proxy(address: &str, port: u16) -> Process {
    let line = format!(
        "docker-proxy -proto tcp -host-ip 127.0.0.1 -host-port {port} -container-ip {address} -container-port 80"
    );
    process("docker-proxy", &line)
}

fn inside_of(digit: char) -> Process {
    let mut process = process("httpd", "httpd -f");
    process.cgroup = Some(format!("/docker/{}", digit.to_string().repeat(64)));
    process
}

fn roster() -> Roster {
    let containers = vec![container('a', "web", "172.17.0.2", 8123), container('b', "db", "172.17.0.3", 5432)];
    Roster::new("/run/docker.sock".to_owned(), containers, Some("bbbbbbbbbbbb".to_owned()))
}

fn denied() -> Roster {
    Roster::unreachable(EngineError { message: "not permitted".to_owned(), denied: true })
}

#[test]
fn a_holder_is_linked_to_the_container_it_serves() {
    let roster = roster();
    let name = |process: &Process, port| {
        let link = roster.link(process, &socket(port))?;
        Some(link.container.map_or("?", |container| container.name.as_str()).to_owned())
    };
    let (web, db, unknown) = (Some("web".to_owned()), Some("db".to_owned()), Some("?".to_owned()));
    assert_eq!(name(&proxy("172.17.0.2", 8123), 8123), web);
    assert_eq!(name(&inside_of('b'), 5432), db);
    assert_eq!(name(&process("rootlesskit", "rootlesskit dockerd"), 5432), db);
    // The same port of another engine's container, in another namespace.
    assert_eq!(name(&proxy("10.0.0.9", 8123), 8123), unknown);
    assert_eq!(name(&proxy("172.17.0.2", 9999), 9999), unknown);
    assert_eq!(name(&inside_of('c'), 8123), unknown);
    assert_eq!(name(&process("rootlesskit", "rootlesskit dockerd"), 1), unknown);
    assert_eq!(name(&process("httpd", "httpd -f"), 8123), None);
    // An engine inside a container has proxies in there: they are that container's processes.
    let nested = Process { cgroup: inside_of('b').cgroup, ..proxy("172.17.0.2", 8123) };
    assert_eq!(name(&nested, 8123), db);
}

#[test]
fn a_refusal_names_container_and_command() {
    let check = |roster: &Roster, process: &Process, port, want: &str| {
        let socket = socket(port);
        let link = roster.link(process, &socket).unwrap();
        assert_eq!(roster.refusal(&link, &socket), want);
    };
    let id = "c".repeat(64);
    let conmon = process("conmon", &format!("conmon -c {id} -n x"));
    check(
        &roster(),
        &proxy("172.17.0.2", 8123),
        8123,
        "publishes port 80 of container web (aaaaaaaaaaaa); stop it with: docker stop web (or --stop-container)",
    );
    check(
        &roster(),
        &process("rootlessport", "rootlessport"),
        5432,
        "publishes port 80 of container db (bbbbbbbbbbbb); stop it with: podman stop db (or --stop-container)",
    );
    check(
        &roster(),
        &proxy("10.0.0.9", 8123),
        8123,
        "publishes port 80 of the container at 10.0.0.9; stop that container instead (the engine at /run/docker.sock \
         does not know it)",
    );
    check(
        &denied(),
        &proxy("172.17.0.2", 8123),
        8123,
        "publishes port 80 of the container at 172.17.0.2; stop that container instead (not permitted)",
    );
    check(
        &denied(),
        &conmon,
        53,
        "publishes port 53 for container cccccccccccc; stop it with: podman stop cccccccccccc",
    );
    check(
        &Roster::default(),
        &process("slirp4netns", "slirp4netns 7 tap0"),
        53,
        "slirp4netns holds ports for containers, and this may be one; stop that container instead (no container \
         engine was asked)",
    );
}

#[test]
fn what_is_not_known_or_is_ours_is_not_stopped() {
    let obstacle = |roster: &Roster, process: &Process, port| {
        let socket = socket(port);
        roster.obstacle(&roster.link(process, &socket).unwrap(), &socket)
    };
    assert_eq!(obstacle(&roster(), &proxy("172.17.0.2", 8123), 8123), None);
    assert_eq!(obstacle(&roster(), &inside_of('a'), 80), None);
    let own = "runs in container db (bbbbbbbbbbbb), in which portwatch itself runs: it is never stopped";
    assert_eq!(obstacle(&roster(), &inside_of('b'), 80), Some((own.to_owned(), false)));
    let unknown =
        "runs in container cccccccccccc, which cannot be stopped: the engine at /run/docker.sock does not know it";
    assert_eq!(obstacle(&roster(), &inside_of('c'), 80), Some((unknown.to_owned(), false)));
    let hidden = "runs in container aaaaaaaaaaaa, which cannot be stopped: not permitted";
    assert_eq!(obstacle(&denied(), &inside_of('a'), 80), Some((hidden.to_owned(), true)));
}

#[test]
fn a_published_port_is_known_without_any_listener() {
    let roster = roster();
    let published = roster.publishing(8123, Protocol::Tcp).unwrap();
    assert_eq!((published.container.name.as_str(), published.port.container_port), ("web", 80));
    assert_eq!(roster.publishing(8123, Protocol::Udp), None);
    assert_eq!(roster.publishing(80, Protocol::Tcp), None);
    assert_eq!(denied().publishing(8123, Protocol::Tcp), None);
}

#[test]
fn a_wanted_container_has_its_processes_and_its_proxies() {
    let web = Wanted::Container(Box::new(container('a', "web", "172.17.0.2", 8123)));
    let prefix = |text: &str| Wanted::IdPrefix(text.to_owned());
    let id = "a".repeat(64);
    let conmon = process("conmon", &format!("conmon -c {id}"));
    for (wanted, process, want) in [
        (&web, inside_of('a'), true),
        (&web, inside_of('b'), false),
        (&web, proxy("172.17.0.2", 8123), true),
        (&web, proxy("172.17.0.3", 8123), false),
        (&web, conmon.clone(), true),
        (&web, process("rootlessport", "rootlessport"), true),
        (&web, process("httpd", "httpd"), false),
        (&prefix("aaaa"), inside_of('a'), true),
        (&prefix(&id), inside_of('a'), true),
        (&prefix("aaab"), inside_of('a'), false),
        (&prefix("aaaa"), conmon, true),
        (&prefix("aaaa"), proxy("172.17.0.2", 8123), false),
        (&prefix("aaaa"), process("httpd", "httpd"), false),
    ] {
        assert_eq!(wanted.matches(&process, &socket(8123)), want, "{wanted:?} {process:?}");
    }
}

#[test]
fn containers_are_called_by_name_or_the_beginning_of_their_id() {
    let web = container('a', "web", "172.17.0.2", 8123);
    for (word, want) in [
        ("web", true),
        ("aaaa", true),
        (&"a".repeat(64), true),
        ("aaa", false),
        ("AAAA", false),
        ("we", false),
        ("", false),
        (&"a".repeat(65), false),
    ] {
        assert_eq!(web.is_called(word), want, "{word}");
    }
    // A name that looks like an id is a name as well.
    assert!(container('b', "aaaa", "172.17.0.3", 1).is_called("aaaa"));
}

#[test]
fn a_container_is_found_by_name_id_or_the_beginning_of_an_id() {
    let check = |roster: &Roster, word: &str, want: &str| {
        let got = match roster.find(word) {
            Ok(Wanted::Container(container)) => container.name,
            Ok(Wanted::IdPrefix(prefix)) => format!("id {prefix}"),
            Err(Lost::Unreachable(error)) => error.message,
            Err(Lost::Unknown(message)) => message,
        };
        assert_eq!(got, want, "{word}");
    };
    check(&roster(), "web", "web");
    check(&roster(), "/web", "web");
    check(&roster(), "bbbb", "db");
    check(&roster(), &"a".repeat(64), "web");
    check(&roster(), "cccc", "no running container is called 'cccc'; running: web, db");
    check(&roster(), "\u{1b}[2J", "no running container is called '\\x1b[2J'; running: web, db");
    // As another engine's container may be called.
    check(&roster(), "cccccccccccc", "id cccccccccccc");
    check(&denied(), "cccc", "id cccc");
    check(&denied(), "web", "not permitted");
    let many = |count| {
        let containers = (0..count).map(|i| container('a', &format!("x{i}"), "172.17.0.2", 1)).collect();
        Roster::new(String::new(), containers, None)
    };
    check(&many(0), "web", "no running container is called 'web'; none runs");
    let shown = "running: x0, x1, x2, x3, x4, x5, x6, x7, x8, x9 and 2 more";
    check(&many(12), "web", &format!("no running container is called 'web'; {shown}"));
    check(&many(2), "aaaa", "more than one container has an id that begins with 'aaaa'");
}

#[test]
fn a_process_that_only_claims_to_be_a_proxy_stops_no_container() {
    let roster = roster();
    let web = roster.containers()[0].clone();
    let (address, port) = (web.addresses[0].to_string(), web.ports[0].host_port);
    let id = web.id.clone();
    for liar in [proxy(&address, port), process("conmon", &format!("conmon -c {id}"))] {
        // It holds another port than the one that the engine publishes for that container.
        let link = roster.link(&liar, &socket(port + 1)).expect("spared all the same");
        assert_eq!(link.container, None, "{liar:?}");
        assert!(roster.obstacle(&link, &socket(port + 1)).is_some());
    }
}
