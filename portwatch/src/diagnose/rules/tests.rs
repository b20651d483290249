use std::net::IpAddr;

use super::super::{Published, Sysctls, Trial, Tunnel, firewall};
use super::*;
use crate::model::{Holder, ProcessId, Socket, SocketId};
use crate::source::diag::PortSocket;

const HERE: u32 = 1;
const TAKEN: Option<Errno> = Some(Errno::EADDRINUSE);

fn question() -> Question {
    Question { port: 8000, proto: Protocol::Tcp, address: None, v6only: false }
}

fn process(pid: u32, name: &str, uid: u32) -> Process {
    Process { uid: Some(uid), ..Process::bare(ProcessId { pid, start: u64::from(pid) }, name) }
}

fn listener(inode: u64, holders: Vec<Process>) -> Listener {
    Listener {
        socket: Socket { id: SocketId { inode, cookie: inode }, netns: HERE, ..Socket::example("127.0.0.1", 8000) },
        since: None,
        holders: holders
            .into_iter()
            .enumerate()
            .map(|(index, process)| Holder { process: Arc::new(process), fds: vec![3], binder: index == 0 })
            .collect(),
    }
}

fn udp(mut listener: Listener) -> Listener {
    listener.socket.proto = Protocol::Udp;
    listener
}

fn attached(state: State, peer: u16, holders: Vec<Process>) -> Attached {
    let socket = PortSocket {
        id: SocketId { inode: if state == State::TimeWait { 0 } else { u64::from(peer) }, cookie: u64::from(peer) },
        proto: Protocol::Tcp,
        state,
        local: "127.0.0.1:8000".parse().unwrap(),
        peer: SocketAddr::from(([127, 0, 0, 1], peer)),
        uid: 1000,
    };
    Attached { socket, holders: holders.into_iter().map(Arc::new).collect() }
}

fn stash(place: Place, inodes: &[u64], count: u32) -> Stash {
    Stash { place, processes: vec![process(9, "taker", 1000)], fd: 5, count, inodes: inodes.to_vec() }
}

/// The facts as uid 1000 who is refused by bind(), both ways.
fn refused() -> Facts {
    trial(TAKEN, TAKEN)
}

fn trial(plain: Option<Errno>, reuse: Option<Errno>) -> Facts {
    let trial = Trial { address: "0.0.0.0".parse::<IpAddr>().unwrap(), plain, reuse };
    let asked = [Protocol::Tcp, Protocol::Udp].map(|proto| (Question { proto, ..question() }, vec![trial]));
    Facts { netns: HERE, euid: 1000, trials: asked.into(), ..Facts::default() }
}

/// Each finding as `kind: message | evidence | next`.
#[track_caller]
fn check_as(question: Question, facts: &Facts, expected: &[&str]) {
    let found = facts.diagnose(question).findings;
    let lines: Vec<String> = found
        .iter()
        .map(|f| format!("{}: {} | {} | {}", f.kind.name(), f.message, f.evidence, f.next.as_deref().unwrap_or("-")))
        .collect();
    assert_eq!(lines, expected);
    for finding in &found {
        assert_eq!(serde_json::to_value(finding.kind).unwrap(), finding.kind.name());
    }
}

#[track_caller]
fn check(facts: &Facts, expected: &[&str]) {
    check_as(question(), facts, expected);
}

#[test]
fn a_port_with_nothing_in_the_way_has_no_findings() {
    let facts = trial(None, None);
    check(&facts, &[]);
    let diagnosis = facts.diagnose(question());
    assert_eq!((diagnosis.bindable, diagnosis.is_free()), (Some(true), true));
    let unknown = facts.diagnose(Question { port: 1, ..question() });
    assert_eq!((unknown.bindable, unknown.is_free()), (None, true));
}

#[test]
fn a_listener_is_told_with_its_holders() {
    let mut nginx = process(7, "nginx", 33);
    nginx.command = ["nginx:".into(), "master".into()].into();
    nginx.cgroup = Some("/system.slice/nginx.service".into());
    let workers = (8..10).map(|pid| process(pid, "nginx", 33));
    let listeners = vec![listener(99, std::iter::once(nginx).chain(workers).collect())];
    check(
        &Facts { listeners, ..refused() },
        &["held: nginx (7) listens on 127.0.0.1:8000; 2 other processes share the socket | its fd 3 is socket:[99]; \
           uid 33, unit nginx.service, command nginx: master | sudo portwatch kill 8000/tcp"],
    );
    for (state, tail) in [
        ('S', ""),
        ('T', "; it is stopped: until it goes on, only SIGKILL ends it"),
        ('D', "; it is in uninterruptible sleep: no signal ends it before the kernel lets go"),
    ] {
        let listeners = vec![listener(99, vec![process(7, "web", 1000)])];
        check(
            &Facts { listeners, states: [(7, state)].into(), ..refused() },
            &[&format!(
                "held: web (7) listens on 127.0.0.1:8000{tail} | its fd 3 is socket:[99]; uid 1000 | portwatch kill 8000/tcp"
            )],
        );
    }
}

#[test]
fn who_does_not_see_the_holder_is_told_to_be_root() {
    let facts = Facts { listeners: vec![listener(99, vec![])], euid: 65534, ..refused() };
    check(
        &facts,
        &["other_user: 127.0.0.1:8000 is held by a process of uid 1000 that you may not see | socket:[99] belongs to \
           uid 1000, and you are uid 65534 | sudo portwatch who 8000/tcp"],
    );
}

#[test]
fn a_ghost_is_traced_as_far_as_the_evidence_goes() {
    let ghost = || vec![listener(99, vec![])];
    let as_root = || Facts { euid: 0, listeners: ghost(), ..refused() };
    check(
        &Facts { stashes: vec![stash(Place::Queue, &[98], 1), stash(Place::Queue, &[99], 1)], ..as_root() },
        &[
            "ghost: 127.0.0.1:8000 is in flight: its descriptor waits to be received by taker (9) | socket:[99] is in the \
           queue of the unix socket that is fd 5 there | kill 9",
        ],
    );
    check(
        &Facts { stashes: vec![stash(Place::Ring, &[99], 2)], ..as_root() },
        &["ghost: 127.0.0.1:8000 is registered with an io_uring of taker (9), which needs no descriptor for it | the \
           fdinfo of fd 5 there names socket:[99] | kill 9"],
    );
    // What is in it is known, and it is something else: no suspect.
    check(
        &Facts { stashes: vec![stash(Place::Queue, &[98], 1)], ..as_root() },
        &["ghost: 127.0.0.1:8000 is held by no process: it is the kernel's own, or hidden from /proc | socket:[99] \
           belongs to uid 1000 | portwatch kill 8000/tcp --close-socket"],
    );
    check(
        &Facts { stashes: vec![stash(Place::Queue, &[], 2)], is_nested: true, ..as_root() },
        &[
            "ghost: 127.0.0.1:8000 is held by no process that can be seen | socket:[99] belongs to uid 1000; 2 descriptors \
           wait in a unix socket of taker (9); processes outside of this pid namespace are not to be seen | portwatch \
           who 8000/tcp  # on the host",
        ],
    );
    check(
        &Facts { euid: 1000, ..as_root() },
        &["ghost: 127.0.0.1:8000 is held by no process that can be seen | socket:[99] belongs to uid 1000; what the \
           processes of others have is not to be seen | sudo portwatch diagnose 8000/tcp"],
    );
}

#[test]
fn sockets_of_the_kernel_are_told_by_device_and_thread() {
    let tunnel = |kind: &str, port| Tunnel { device: "vx;0".into(), kind: kind.into(), port };
    let asked = Question { proto: Protocol::Udp, ..question() };
    let facts =
        |tunnel| Facts { euid: 0, listeners: vec![udp(listener(99, vec![]))], tunnels: vec![tunnel], ..refused() };
    check_as(
        asked,
        &facts(tunnel("vxlan", Some(8000))),
        &[
            "ghost: 127.0.0.1:8000 is the kernel's own: device vx;0 receives on it | vx;0 is of kind vxlan with port 8000 \
           | ip link delete 'vx;0'",
        ],
    );
    check_as(
        asked,
        &facts(tunnel("wireguard", None)),
        &["ghost: 127.0.0.1:8000 is held by no process that can be seen | socket:[99] belongs to uid 1000; wireguard \
           device vx;0 has a port | -"],
    );
    let mut nfs = listener(99, vec![]);
    nfs.socket.port = 2049;
    let facts = Facts { euid: 0, listeners: vec![nfs], kernel_threads: vec!["nfsd".into()], ..refused() };
    check_as(
        Question { port: 2049, ..question() },
        &facts,
        &[
            "ghost: 127.0.0.1:2049 is the kernel's own: the NFS server serves it | no process holds it, and kernel thread \
           [nfsd] runs | systemctl stop nfs-server",
        ],
    );
}

#[test]
fn other_namespaces_are_in_nobodys_way() {
    let mut far = listener(99, vec![process(7, "web", 1000)]);
    far.socket.netns = 2;
    let told = "other_namespace: web (7) listens on 127.0.0.1:8000 in network namespace 2: not here | uid 1000 | \
                portwatch kill 8000/tcp --netns 2";
    let facts = Facts { listeners: vec![far.clone()], ..trial(None, None) };
    check(&facts, &[told]);
    assert!(facts.diagnose(question()).is_free());
    let near = listener(98, vec![process(6, "near", 1000)]);
    check(
        &Facts { listeners: vec![near, far], ..refused() },
        &["held: near (6) listens on 127.0.0.1:8000 | its fd 3 is socket:[98]; uid 1000 | portwatch kill 8000/tcp"],
    );
}

#[test]
fn a_socket_that_is_only_bound_is_told() {
    for (holders, who, next) in [
        (vec![process(7, "web", 1000)], "web (7)", "kill 7"),
        (vec![process(7, "web", 0)], "web (7)", "sudo kill 7"),
        (vec![process(1, "init", 1000)], "init (1)", "-"),
        (vec![], "no process that can be seen", "-"),
    ] {
        check(
            &Facts { attached: vec![attached(State::BoundInactive, 99, holders)], ..refused() },
            &[&format!(
                "bound: 127.0.0.1:8000 is bound by {who}, and nobody listens on it | socket:[99] of uid 1000 is neither \
                 listening nor connected | {next}"
            )],
        );
    }
}

#[test]
fn connections_are_judged_by_what_bind_said() {
    let mut all: Vec<Attached> =
        (1..5).map(|peer| attached(State::Established, peer, vec![process(7, "web", 1000)])).collect();
    all.push(attached(State::CloseWait, 5, vec![process(8, "web", 1000)]));
    let what = "5 connections of web (7), web (8) (4 ESTABLISHED, 1 CLOSE_WAIT)";
    let ends =
        "127.0.0.1:8000 with 127.0.0.1:1, 127.0.0.1:8000 with 127.0.0.1:2, 127.0.0.1:8000 with 127.0.0.1:3 and 2 more";
    for (facts, verdict) in [
        (refused(), "have the port: no bind() succeeds until they end, with SO_REUSEADDR neither"),
        (trial(TAKEN, None), "have the port: bind() needs SO_REUSEADDR until they end"),
    ] {
        let facts = Facts { attached: all.clone(), ..facts };
        check(&facts, &[&format!("connections: {what} {verdict} | {ends} | kill 7 8")]);
    }
    let untried = Facts { trials: BTreeMap::new(), attached: all.clone(), ..refused() };
    check(
        &untried,
        &[&format!(
            "connections: {what} have the port: bind() may need SO_REUSEADDR until they end | {ends} | kill 7 8"
        )],
    );
    check(&Facts { attached: all.clone(), ..trial(None, None) }, &[]);
    let listeners = vec![listener(99, vec![process(7, "web", 1000)])];
    check(
        &Facts { attached: all, listeners, ..refused() },
        &[
            "held: web (7) listens on 127.0.0.1:8000 | its fd 3 is socket:[99]; uid 1000 | portwatch kill 8000/tcp",
            &format!(
                "connections: {what} will keep the port from a bind() without SO_REUSEADDR once nobody listens | {ends} | -"
            ),
        ],
    );
}

#[test]
fn connections_without_process_are_told() {
    let mut orphan = attached(State::FinWait2, 1, vec![]);
    orphan.socket.id.inode = 0;
    check(
        &Facts { attached: vec![orphan], ..trial(TAKEN, None) },
        &["connections: 1 connection (1 FIN_WAIT2) has the port: bind() needs SO_REUSEADDR until it ends | \
           127.0.0.1:8000 with 127.0.0.1:1; 1 of no process | sudo ss -Kt 'sport = :8000'"],
    );
    check(
        &Facts { attached: vec![attached(State::Established, 1, vec![])], ..trial(TAKEN, None) },
        &["connections: 1 connection (1 ESTABLISHED) has the port: bind() needs SO_REUSEADDR until it ends | \
           127.0.0.1:8000 with 127.0.0.1:1; 1 of processes that cannot be seen | sudo ss -Kt 'sport = :8000'"],
    );
}

#[test]
fn time_wait_is_judged_by_what_bind_said() {
    let lingering = || vec![attached(State::TimeWait, 1, vec![]), attached(State::TimeWait, 2, vec![])];
    let ends = "127.0.0.1:8000 with 127.0.0.1:1, 127.0.0.1:8000 with 127.0.0.1:2";
    for (facts, verdict) in [
        (refused(), "until then no bind() succeeds, with SO_REUSEADDR neither"),
        (trial(TAKEN, None), "until then bind() needs SO_REUSEADDR"),
        (Facts { trials: BTreeMap::new(), ..refused() }, "until then bind() may need SO_REUSEADDR"),
    ] {
        check(
            &Facts { attached: lingering(), euid: 0, ..facts },
            &[&format!(
                "time_wait: 2 connections linger in TIME_WAIT for at most 60 s: {verdict} | {ends} | ss -Kt state \
                 time-wait 'sport = :8000'"
            )],
        );
    }
}

#[test]
fn a_listener_that_passes_on_to_a_container_is_no_holder_to_kill() {
    let line = "docker-proxy -proto tcp -host-ip 127.0.0.1 -host-port 8000 -container-ip 172.17.0.2 -container-port 80";
    let proxy = || Process { command: line.split(' ').map(str::to_owned).collect(), ..process(7, "docker-proxy", 0) };
    let facts = |published| Facts { listeners: vec![listener(99, vec![proxy()])], published, euid: 0, ..refused() };
    let published = Published {
        port: 8000,
        proto: Protocol::Tcp,
        container: "web".to_owned(),
        engine: "docker".to_owned(),
        to: "172.17.0.2:80".to_owned(),
        next: "docker stop web".to_owned(),
    };
    check(
        &facts(vec![published]),
        &["published: docker container web answers on 127.0.0.1:8000 | docker-proxy (7) holds socket:[99]; it is \
           published to 172.17.0.2:80 | portwatch kill 8000/tcp --stop-container"],
    );
    check(
        &facts(Vec::new()),
        &[
            "published: docker-proxy (7) holds 127.0.0.1:8000 for the container at 172.17.0.2:80 | docker-proxy (7) holds \
           socket:[99] | docker ps",
        ],
    );
}

#[test]
fn what_answers_elsewhere_is_told_once() {
    let rule = |to: &str| firewall::Rule {
        proto: None,
        ports: vec![7000..=8000],
        to: to.to_owned(),
        place: "nft: here".to_owned(),
        next: "nft delete it".to_owned(),
    };
    let published = Published {
        port: 8000,
        proto: Protocol::Tcp,
        container: "web".to_owned(),
        engine: "docker".to_owned(),
        to: "172.17.0.2:80".to_owned(),
        next: "docker stop web".to_owned(),
    };
    let rules = vec![rule("172.17.0.2:80"), rule("10.0.0.1:80")];
    let dnat = "dnat: a rule sends what comes for 8000/tcp to 10.0.0.1:80: no listener here gets what it matches | nft: here | sudo \
                nft delete it";
    let facts = Facts { rules, published: vec![published], ..trial(None, None) };
    check(
        &facts,
        &[
            "published: docker container web answers on 8000/tcp | 8000/tcp is published to 172.17.0.2:80 | sudo docker \
             stop web",
            dnat,
        ],
    );
    let diagnosis = facts.diagnose(question());
    assert_eq!((diagnosis.bindable, diagnosis.is_free()), (Some(true), false));
}

#[test]
fn refusals_of_other_kinds_are_told() {
    let sysctls = Sysctls { unprivileged_start: Some(9000), ..Sysctls::default() };
    check(
        &Facts { sysctls: sysctls.clone(), ..trial(Some(Errno::EACCES), Some(Errno::EACCES)) },
        &["privileged: ports below 9000 take CAP_NET_BIND_SERVICE: run the server as root, give its program the \
           capability by setcap, or lower the limit | net.ipv4.ip_unprivileged_port_start = 9000; bind() to 0.0.0.0:8000 \
           fails with EACCES | sudo sysctl -w net.ipv4.ip_unprivileged_port_start=8000"],
    );
    check(
        &trial(Some(Errno::EPERM), Some(Errno::EPERM)),
        &["refused: a security policy (BPF, SELinux) refuses bind() | bind() to 0.0.0.0:8000 fails with EPERM | sudo \
           portwatch diagnose 8000/tcp"],
    );
    check(
        &Facts { euid: 0, ..refused() },
        &["refused: bind() is refused, and nothing that can be seen explains it | bind() to 0.0.0.0:8000 fails with \
           EADDRINUSE | -"],
    );
    check(
        &trial(Some(Errno::EADDRNOTAVAIL), Some(Errno::EADDRNOTAVAIL)),
        &["refused: 0.0.0.0 is no address of this host | bind() to 0.0.0.0:8000 fails with EADDRNOTAVAIL | ip address"],
    );
}

#[test]
fn settings_are_good_to_know_and_in_nobodys_way() {
    let with = |reserved: &str| Facts {
        sysctls: Sysctls { local_ports: Some(7000..=9000), reserved: reserved.to_owned(), unprivileged_start: None },
        ..trial(None, None)
    };
    for (reserved, told) in [
        (
            "",
            "ephemeral: 8000 is a port for clients: the kernel may give it to any connection at any moment | \
             net.ipv4.ip_local_port_range = 7000-9000 | sudo sysctl -w net.ipv4.ip_local_reserved_ports=8000",
        ),
        (
            "80,443",
            "ephemeral: 8000 is a port for clients: the kernel may give it to any connection at any moment | \
             net.ipv4.ip_local_port_range = 7000-9000 | sudo sysctl -w net.ipv4.ip_local_reserved_ports=80,443,8000",
        ),
        (
            "8000-8010",
            "reserved: 8000 is reserved: the kernel gives it to no client by itself, and bind() gets it as any other | \
             net.ipv4.ip_local_reserved_ports = 8000-8010 | -",
        ),
    ] {
        check(&with(reserved), &[told]);
        assert!(with(reserved).diagnose(question()).is_free());
    }
}
