use super::*;
use crate::engine::Roster;
use crate::engine::{Container, EngineError, PublishedPort};
use crate::kill::concern::{Concern, concerns};
use crate::kill::testing::family;
use crate::model::Holder;

const OWN: u32 = 500;

/// pid 1 ─ bash 400 (terminal) ─ portwatch 500; 1 ─ make 300 ─ master 10 ─ sh 11 ─ worker 12; kernel thread 60.
fn host() -> impl Fn(u32) -> Option<Stat> {
    let stat = |pid, name: &str, ppid| Stat {
        pid,
        name: name.into(),
        state: 'S',
        ppid,
        process_group: pid,
        session: pid,
        terminal: false,
        kernel_thread: false,
        exiting: false,
        start: ProcessId::TICK_NS,
    };
    family(&[
        stat(1, "init", 0),
        Stat { terminal: true, ..stat(400, "-bash", 1) },
        stat(OWN, "portwatch", 400),
        stat(401, "server", 400),
        stat(300, "make", 1),
        stat(10, "master", 300),
        stat(11, "sh", 10),
        stat(12, "worker", 11),
        Stat { kernel_thread: true, ..stat(60, "nfsd", 2) },
    ])
}

fn listener(port: u16, inode: u64, pids: &[u32]) -> Listener {
    let stat = host();
    let holder = |&pid: &u32| {
        let stat = stat(pid).unwrap();
        let mut process = Process::bare(stat.id(), stat.name);
        process.ppid = stat.ppid;
        process.uid = Some(1000);
        Holder { process: Arc::new(process), fds: vec![3], binder: false }
    };
    let socket = Socket { id: SocketId { inode, cookie: 0 }, ..Socket::example("127.0.0.1", port) };
    Listener { socket, since: None, holders: pids.iter().map(holder).collect() }
}

fn plan(listeners: Vec<Listener>, force_self: bool) -> Plan {
    let stat = host();
    Plan::new(listeners, &[], &[], &Guards::new(OWN, force_self, &stat), &stat)
}

fn victims(plan: &Plan) -> Vec<(u32, bool)> {
    plan.victims.iter().map(|v| (v.process.id.pid, v.leaders.is_empty())).collect()
}

#[test]
fn init_portwatch_its_ancestors_and_kernel_threads_are_never_victims() {
    let everybody = || vec![listener(80, 5, &[1, 10, 60, 400, OWN])];
    let plan_of = plan(everybody(), false);
    assert_eq!(victims(&plan_of), [(10, true)]);
    let reasons: Vec<(u32, &str)> = plan_of.refused.iter().map(|r| (r.process.id.pid, r.reason.as_str())).collect();
    assert_eq!(
        reasons,
        [
            (1, "init is never signalled"),
            (60, "kernel threads are never signalled"),
            (400, "portwatch was started by it; --force-self signals it all the same"),
            (OWN, "portwatch itself holds the port"),
        ]
    );
    assert_eq!(victims(&plan(everybody(), true)), [(10, true), (400, true)]);
}

/// A container whose port 80 is published as 8123 of the host, a docker-proxy for it, and a process in it.
fn web() -> (Container, [Listener; 2]) {
    let container = Container {
        id: "5eed".repeat(16),
        name: "web".to_owned(),
        image: "busybox".to_owned(),
        ports: vec![PublishedPort {
            proto: Protocol::Tcp,
            host_ip: Some("127.0.0.1".parse().unwrap()),
            host_port: 8123,
            container_port: 80,
        }],
        addresses: vec!["172.17.0.2".parse().unwrap()],
    };
    let holder = |port, pid, change: &dyn Fn(&mut Process)| {
        let mut listener = listener(port, u64::from(port), &[pid]);
        let mut process = Process::clone(&listener.holders[0].process);
        change(&mut process);
        listener.holders[0].process = Arc::new(process);
        listener
    };
    let line = "docker-proxy -proto tcp -host-ip 127.0.0.1 -host-port 8123 -container-ip 172.17.0.2 -container-port 80";
    let proxy = holder(8123, 401, &|p| p.command = line.split(' ').map(str::to_owned).collect());
    let inside = holder(80, 12, &|p| p.cgroup = Some(format!("/docker/{}", "5eed".repeat(16))));
    (container, [proxy, inside])
}

fn plan_with(roster: Roster, stop: bool) -> Plan {
    let stat = host();
    let guards = Guards::new(OWN, false, &stat).with_containers(roster, stop);
    Plan::new(web().1.to_vec(), &[], &[], &guards, &stat)
}

#[test]
fn what_publishes_a_port_is_spared_and_a_process_in_a_container_is_signalled() {
    let roster = Roster::new("/run/docker.sock".to_owned(), vec![web().0], None);
    let plan = plan_with(roster, false);
    assert_eq!((victims(&plan), plan.stops.len()), (vec![(12, true)], 0));
    assert_eq!(plan.victims[0].supervisor.as_ref().unwrap().container.as_deref(), Some("5eed5eed5eed"));
    let [refused] = &plan.refused[..] else { panic!("{plan:?}") };
    let reason =
        "publishes port 80 of container web (5eed5eed5eed); stop it with: docker stop web (or --stop-container)";
    assert_eq!((refused.process.id.pid, refused.reason.as_str(), refused.denied), (401, reason, false));
    // Without any engine, too.
    let plan = plan_with(Roster::default(), false);
    assert_eq!((victims(&plan), plan.refused[0].process.id.pid), (vec![(12, true)], 401));
}

#[test]
fn a_container_is_stopped_once_for_all_its_ports_and_its_processes_are_not_signalled() {
    let roster = Roster::new("/run/docker.sock".to_owned(), vec![web().0], None);
    let plan = plan_with(roster, true);
    assert!(plan.victims.is_empty() && plan.refused.is_empty(), "{plan:?}");
    assert_eq!(concerns(&plan, 1000, false, &host()), [Concern::Container("web".into())]);
    let [stop] = &plan.stops[..] else { panic!("{plan:?}") };
    let pids: Vec<u32> = stop.processes.iter().map(|process| process.id.pid).collect();
    let ports: Vec<u16> = stop.groups.iter().map(|&group| plan.groups[group].port).collect();
    assert_eq!(
        (stop.what.to_string().as_str(), pids, ports),
        ("container web (5eed5eed5eed)", vec![401, 12], vec![8123, 80])
    );
}

#[test]
fn a_container_is_stopped_for_a_holder_that_is_hidden_where_the_engine_has_to_do() {
    let stat = host();
    let plan = |stop, trusts, own: Option<&str>| {
        let roster = Roster::new("/run/docker.sock".to_owned(), vec![web().0], own.map(str::to_owned));
        let guards = Guards::new(OWN, false, &stat).with_containers(roster, stop);
        let guards = if trusts { guards.trusting_engine() } else { guards };
        // Of the other one nobody publishes the port.
        Plan::new(vec![listener(8123, 1, &[]), listener(8124, 2, &[])], &[], &[], &guards, &stat)
    };
    let stops = plan(true, true, None).stops;
    assert_eq!((stops.len(), &stops[0].groups[..], stops[0].processes.len()), (1, &[0][..], 0));
    for (stop, trusts, own) in [(false, true, None), (true, false, None), (true, true, Some("5eed5eed5eed"))] {
        assert!(plan(stop, trusts, own).stops.is_empty(), "{stop} {trusts} {own:?}");
    }
}

#[test]
fn a_container_that_cannot_be_stopped_keeps_its_processes() {
    let error = EngineError { message: "not permitted".to_owned(), denied: true };
    let plan = plan_with(Roster::unreachable(error), true);
    assert!(plan.victims.is_empty() && plan.stops.is_empty(), "{plan:?}");
    assert_eq!(
        plan.refused.iter().map(|r| (r.process.id.pid, r.denied)).collect::<Vec<_>>(),
        [(12, true), (401, true)]
    );
    // portwatch runs in there.
    let roster = Roster::new("/run/docker.sock".to_owned(), vec![web().0], Some("5eed5eed5eed".to_owned()));
    let plan = plan_with(roster, true);
    assert!(plan.victims.is_empty() && plan.stops.is_empty() && plan.refused.len() == 2, "{plan:?}");
}

#[test]
fn who_runs_things_for_others_is_spared_unless_named_by_pid() {
    let stat = host();
    let named = |name: &str, pid| {
        let mut listener = listener(80, 5, &[pid]);
        let process = Process { name: name.into(), ..Process::clone(&listener.holders[0].process) };
        listener.holders[0].process = Arc::new(process);
        listener
    };
    let plan = |listener, pids: &[u32]| {
        Plan::new(vec![listener], &[], &[], &Guards::new(OWN, false, &stat).with_named(pids), &stat)
    };
    let spared = plan(named("supervisord", 300), &[]);
    let reason = "supervisord runs other services, and ending it ends them all; see: supervisorctl status, then \
                  supervisorctl stop NAME; or supervisorctl shutdown; or, to end it all the same: --pid 300";
    assert_eq!((spared.refused[0].reason.as_str(), spared.refused[0].denied, spared.victims.len()), (reason, false, 0));
    assert_eq!(victims(&plan(named("supervisord", 300), &[300])), [(300, true)]);
    assert!(plan(named("supervisord", 300), &[301]).victims.is_empty());
    let marked = |name, since| {
        let guards = Guards::new(OWN, false, &stat).with_mark(since);
        Plan::new(vec![named(name, 300)], &[], &[], &guards, &stat)
    };
    // What came with a job is the job's own, unless anybody's sessions or containers live in it.
    assert_eq!(victims(&marked("supervisord", 0)), [(300, true)]);
    assert!(marked("supervisord", ProcessId::TICK_NS).victims.is_empty());
    assert!(marked("tmux", 0).victims.is_empty() && marked("dockerd", 0).victims.is_empty());
    // Which nothing overrides.
    assert_eq!(plan(named("systemd", 1), &[1]).refused[0].reason, "init is never signalled");
    let reason = "systemd holds it for a .socket unit; see: systemctl list-sockets, then systemctl stop NAME.socket";
    assert_eq!(plan(named("systemd", 1), &[]).refused[0].reason, reason);
}

#[test]
fn masters_go_first_even_with_a_process_in_between() {
    assert_eq!(victims(&plan(vec![listener(80, 5, &[10, 12])], false)), [(10, true), (12, false)]);
    // SO_REUSEPORT: a socket each, one port.
    let twins = vec![listener(80, 5, &[10]), listener(80, 6, &[12])];
    assert_eq!(victims(&plan(twins, false)), [(10, true), (12, false)]);
    // Of different ports, neither frees the other's.
    let apart = vec![listener(80, 5, &[10]), listener(81, 6, &[12])];
    assert_eq!(victims(&plan(apart, false)), [(10, true), (12, true)]);
    // Init shares the socket (socket activation) and is not signalled: nobody leads.
    assert_eq!(victims(&plan(vec![listener(80, 5, &[1, 12])], false)), [(12, true)]);
}

#[test]
fn a_process_is_one_victim_with_all_its_sockets() {
    let plan = plan(vec![listener(80, 5, &[10]), listener(80, 6, &[10]), listener(81, 7, &[10])], false);
    let [victim] = &plan.victims[..] else { panic!("{plan:?}") };
    assert_eq!((&victim.inodes[..], &victim.groups[..]), (&[5, 6, 7][..], &[0, 1][..]));
    assert_eq!(plan.groups.iter().map(|g| (g.port, g.sockets.len())).collect::<Vec<_>>(), [(80, 2), (81, 1)]);
}

#[test]
fn named_ports_are_reported_on_even_if_nobody_has_them() {
    let stat = host();
    let named = [(80, None), (90, None), (80, Some(Protocol::Udp))];
    let plan = Plan::new(vec![listener(80, 5, &[10])], &[], &named, &Guards::default(), &stat);
    let groups: Vec<_> = plan.groups.iter().map(|g| (g.port, g.proto, g.sockets.len())).collect();
    assert_eq!(groups, [(80, Protocol::Tcp, 1), (80, Protocol::Udp, 0), (90, Protocol::Tcp, 0)]);
}

#[test]
fn sockets_that_were_not_selected_are_no_new_owners() {
    let stat = host();
    let other = listener(80, 6, &[12]).socket;
    let selected = vec![listener(80, 5, &[10])];
    let plan = Plan::new(selected, std::slice::from_ref(&other), &[], &Guards::default(), &stat);
    let [group] = &plan.groups[..] else { panic!("{plan:?}") };
    assert!(group.wants(SocketId { inode: 5, cookie: 9 }) && !group.wants(other.id));
    assert!(!group.is_new(&other) && group.is_new(&listener(80, 7, &[]).socket));
    assert!(!group.is_new(&listener(81, 7, &[]).socket));
}

/// Each victim and whom it waits for.
fn led(plan: &Plan) -> Vec<(u32, Vec<u32>)> {
    let leaders = |victim: &Victim| victim.leaders.iter().map(|leader| leader.pid).collect();
    plan.victims.iter().map(|victim| (victim.process.id.pid, leaders(victim))).collect()
}

#[test]
fn a_deep_chain_goes_one_after_the_other() {
    let chain = plan(vec![listener(80, 5, &[12, 11, 10])], false);
    assert_eq!(led(&chain), [(10, vec![]), (11, vec![10]), (12, vec![10, 11])]);
    // One port in common is enough: a master that shuts down for it takes the worker along.
    let more = plan(vec![listener(80, 5, &[10, 12]), listener(81, 6, &[12])], false);
    assert_eq!(led(&more), [(10, vec![]), (12, vec![10])]);
}

#[test]
fn workers_whose_parent_holds_nothing_have_a_supervisor_and_no_leader() {
    let twins = plan(vec![listener(80, 5, &[11]), listener(80, 6, &[401])], false);
    assert_eq!(led(&twins), [(11, vec![]), (401, vec![])]);
    assert_eq!(twins.victims[0].supervisor.as_ref().and_then(|s| s.pid), Some(10));
}

#[test]
fn what_started_holders_is_ended_before_them_unless_it_is_spared() {
    let stat = host();
    let starter = |pid, groups: &[usize], spared: Option<&str>| {
        let now = stat(pid).unwrap();
        Starter {
            process: Arc::new(Process { ppid: now.ppid, ..Process::bare(now.id(), now.name) }),
            above: stat(12).unwrap().id(),
            groups: groups.to_vec(),
            spared: spared.map(str::to_owned),
        }
    };
    let mut plan = plan(vec![listener(80, 5, &[12]), listener(81, 6, &[401])], false);
    let starters = vec![
        starter(10, &[0], None),
        starter(300, &[0], Some("a terminal")),
        starter(400, &[1], None),
        starter(401, &[1], None),
    ];
    plan.take_in(starters, 0, &Guards::new(OWN, false, &stat), &stat);
    assert_eq!(led(&plan), [(10, vec![]), (401, vec![]), (12, vec![10])]);
    let reason = |spared: &Spared| match spared {
        Spared::Starter { process, reason, .. } => (process.id.pid, reason.clone()),
        other => panic!("{other:?}"),
    };
    let reasons: Vec<(u32, String)> = plan.spared.iter().map(reason).collect();
    let own = "portwatch was started by it; --force-self signals it all the same".to_owned();
    assert_eq!(reasons, [(300, "a terminal".to_owned()), (400, own)]);
}

/// A plan for port 80, held by these, with their relatives as the host has them.
fn reaching(reach: Reach, holders: &[u32], force_self: bool) -> Plan {
    let stat = host();
    let mut all: Vec<Stat> = (1..=OWN).filter_map(&stat).collect();
    // `make` and its master are one job, and so are the login shell's children.
    for (pid, group) in [(300, 300), (10, 300), (11, 300), (400, 400), (OWN, 401), (401, 401)] {
        all.iter_mut().find(|process| process.pid == pid).unwrap().process_group = group;
    }
    let stat = family(&all);
    let guards = Guards::new(OWN, force_self, &stat);
    let mut plan = Plan::new(vec![listener(80, 5, holders)], &[], &[], &guards, &stat);
    let read = |id: ProcessId| stat(id.pid).map(|stat| Process::bare(stat.id(), stat.name));
    plan.reach_out(reach, &all, 5 * ProcessId::TICK_NS, &read, &guards, &stat);
    plan
}

#[test]
fn a_tree_is_signalled_from_its_root_down() {
    assert_eq!(led(&reaching(Reach::Holders, &[10], false)), [(10, vec![])]);
    let tree = reaching(Reach::Tree, &[10], false);
    assert_eq!(led(&tree), [(10, vec![]), (11, vec![10]), (12, vec![10, 11])]);
    assert!(tree.victims.iter().all(|victim| victim.kin.is_some() && victim.groups == [0]));
    assert_eq!(tree.victims[2].inodes, [0; 0]);
}

#[test]
fn a_group_is_signalled_at_once_ancestors_included() {
    assert_eq!(led(&reaching(Reach::Group, &[11], false)), [(10, vec![]), (11, vec![]), (300, vec![])]);
}

#[test]
fn relatives_pass_the_guards() {
    // Below the login shell: portwatch itself, whatever is forced.
    let forced = reaching(Reach::Tree, &[400], true);
    assert_eq!(led(&forced), [(400, vec![]), (401, vec![400])]);
    let [Spared::Relative { process, reason }] = &forced.spared[..] else { panic!("{:?}", forced.spared) };
    assert_eq!((process.id.pid, reason.as_str()), (OWN, "portwatch itself holds the port"));
    // A holder that is refused brings nobody along.
    let refused = reaching(Reach::Tree, &[400], false);
    assert_eq!((led(&refused), refused.spared.len(), refused.refused.len()), (vec![], 0, 1));
    // portwatch's own group: the holder alone.
    let own = reaching(Reach::Group, &[401], false);
    assert_eq!((led(&own), own.spared), (vec![(401, vec![])], vec![Spared::OwnGroup(401)]));
}
