use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::engine::Container;
use crate::kill::life::stat_of;
use crate::kill::outcome::Status;
use crate::kill::plan::Stop;
use crate::kill::target::Target;
use crate::kill::testing::*;
use crate::kill::{StopError, Whole};

/// A plan for a port as it is now, by the guards of this process.
fn plan(port: &Port) -> Plan {
    Plan::new(scan(port.port), &[], &[(port.port, None)], &Guards::current(false), &stat_of)
}

fn quick() -> Options {
    // Long enough for a shell to act on a signal on a busy machine, where that is what a test waits for.
    Options { settle: Duration::ZERO, ..Options::default() }
}

fn run_with(plan: Plan, port: u16, options: Options, holds: &dyn Fn(u32, u64) -> io::Result<bool>) -> Outcome {
    let guards = Guards::current(false);
    let mut world = World {
        rescan: &mut || Ok(scan(port)),
        holds,
        guards: &guards,
        stop: &mut nothing,
        addresses: &|_| Vec::new(),
        progress: &mut |_| {},
        called_off: &AtomicBool::new(false),
    };
    let mut outcomes = execute(plan, options, &mut world).unwrap();
    assert_eq!(outcomes.len(), 1, "{outcomes:?}");
    outcomes.remove(0)
}

fn run(port: &Port, options: Options) -> Outcome {
    run_with(plan(port), port.port, options, &holds)
}

#[test]
fn term_ends_a_polite_server() {
    let (server, port) = serve(POLITE);
    let outcome = run(&port, quick());
    assert_eq!((outcome.status, &outcome.killed[..]), (Status::Cleaned, &[server.pid()][..]), "{outcome:?}");
    assert!(outcome.forced.is_empty() && outcome.failed.is_empty() && !outcome.still_listening);
    assert!(outcome.remaining_pids.is_empty() && outcome.diagnostics.is_none(), "{outcome:?}");
}

/// Somebody else asks: what it may do is decided again right before the signal, of the very process.
#[test]
fn permission_that_was_lost_since_the_plan_is_denied() {
    let (server, port) = serve(POLITE);
    let is_allowed = Arc::new(AtomicBool::new(true));
    let asked = Arc::clone(&is_allowed);
    let forbidden = move |_| (!asked.load(Ordering::Relaxed)).then(|| "not permitted: x".to_owned());
    let guards = Guards::for_peer(std::process::id(), false, &stat_of, forbidden);
    let plan = Plan::new(scan(port.port), &[], &[], &guards, &stat_of);
    assert_eq!((plan.victims.len(), plan.refused.len()), (1, 0));
    is_allowed.store(false, Ordering::Relaxed);
    let outcome = execute(
        plan,
        quick(),
        &mut World {
            rescan: &mut || Ok(scan(port.port)),
            holds: &holds,
            guards: &guards,
            stop: &mut nothing,
            addresses: &|_| Vec::new(),
            progress: &mut |progress| assert!(!matches!(progress.step, Step::Sent { .. }), "{progress:?}"),
            called_off: &AtomicBool::new(false),
        },
    );
    let outcome = outcome.unwrap().remove(0);
    assert_eq!((outcome.status, &outcome.failed[0].reason[..]), (Status::Denied, "not permitted: x"), "{outcome:?}");
    assert_eq!(outcome.remaining_pids, [server.pid()]);
}

#[test]
fn kill_follows_when_term_is_ignored() {
    let (server, port) = serve(DEAF);
    let outcome = run(&port, Options { grace: Duration::from_millis(150), ..quick() });
    assert_eq!(outcome.status, Status::Cleaned, "{outcome:?}");
    assert_eq!((&outcome.killed, &outcome.forced), (&vec![server.pid()], &vec![server.pid()]));
    assert!(outcome.elapsed >= Duration::from_millis(150), "{outcome:?}");
}

#[test]
fn force_begins_with_kill() {
    let (server, port) = serve(DEAF);
    let outcome = run(&port, Options { signal: Signal::KILL, grace: Duration::from_secs(60), ..quick() });
    assert_eq!((outcome.status, &outcome.forced[..]), (Status::Cleaned, &[server.pid()][..]), "{outcome:?}");
}

#[test]
fn no_force_leaves_a_survivor() {
    let (mut server, port) = serve(DEAF);
    let outcome = run(&port, Options { grace: Duration::from_millis(100), force: false, ..quick() });
    assert_eq!((outcome.status, &outcome.remaining_pids[..]), (Status::Partial, &[server.pid()][..]), "{outcome:?}");
    assert_eq!(outcome.failed[0].reason, "still there after SIGTERM: it ignores SIGTERM");
    assert!(outcome.still_listening && server.is_alive());
}

#[test]
fn what_is_called_off_ends_as_it_stands() {
    let (mut server, port) = serve(DEAF);
    let (guards, called_off) = (Guards::current(false), AtomicBool::new(false));
    let run = |called_off: &AtomicBool| {
        let mut world = World {
            rescan: &mut || Ok(scan(port.port)),
            holds: &holds,
            guards: &guards,
            stop: &mut nothing,
            addresses: &|_| Vec::new(),
            progress: &mut |progress| called_off.store(matches!(progress.step, Step::Sent { .. }), Ordering::Relaxed),
            called_off,
        };
        execute(plan(&port), Options { grace: Duration::from_secs(600), ..quick() }, &mut world).unwrap().remove(0)
    };
    for sent in
        ["SIGTERM sent; the kill was called off while it was waited for", "not signalled: the kill was called off"]
    {
        // The second time it is called off before it begins.
        let outcome = run(&called_off);
        assert_eq!((outcome.status, &outcome.failed[0].reason[..]), (Status::Partial, sent), "{outcome:?}");
        assert_eq!((outcome.failed[0].pid, outcome.still_listening), (server.pid(), true));
    }
    assert!(server.is_alive());
}

#[test]
fn every_holder_of_a_shared_socket_ends() {
    let listener = listen();
    let (one, two) = (Helper::start(POLITE, &[&listener]), Helper::start(DEAF, &[&listener]));
    let mut pids = vec![one.pid(), two.pid()];
    pids.sort_unstable();
    let port = leave_to(listener, &pids);
    let mut outcome = run(&port, Options { grace: Duration::from_millis(300), ..quick() });
    outcome.killed.sort_unstable();
    assert_eq!((outcome.status, &outcome.killed), (Status::Cleaned, &pids), "{outcome:?}");
    assert_eq!(outcome.forced, [two.pid()]);
}

#[test]
fn a_worker_follows_its_master_before_the_grace_is_over() {
    // The orphan becomes our child, so that it can be reaped.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let listener = listen();
    let master = Helper::start(MASTER, &[&listener]);
    let worker: u32 = master.said.parse().unwrap();
    let mut pids = vec![master.pid(), worker];
    pids.sort_unstable();
    let port = leave_to(listener, &pids);
    let plan = plan(&port);
    assert_eq!(plan.victims.iter().map(|v| v.leaders.is_empty()).collect::<Vec<_>>(), [true, false]);
    let outcome = run_with(plan, port.port, Options { grace: Duration::from_secs(60), ..quick() }, &holds);
    assert_eq!(outcome.status, Status::Cleaned, "{outcome:?}");
    assert_eq!((&outcome.killed[..], &outcome.forced[..]), (&[master.pid(), worker][..], &[][..]));
    assert!(outcome.elapsed < Duration::from_secs(30), "{outcome:?}");
    drop(master);
    let orphan = nix::unistd::Pid::from_raw(worker.cast_signed());
    nix::sys::wait::waitpid(orphan, None).unwrap();
}

#[test]
fn no_worker_is_signalled_while_its_master_shuts_down() {
    let listener = listen();
    let master = Helper::start(GRACEFUL_MASTER, &[&listener]);
    let worker: u32 = master.said.parse().unwrap();
    let mut pids = vec![master.pid(), worker];
    pids.sort_unstable();
    let port = leave_to(listener, &pids);
    let guards = Guards::current(false);
    let mut signalled = Vec::new();
    let mut world = World {
        rescan: &mut || Ok(scan(port.port)),
        holds: &holds,
        guards: &guards,
        stop: &mut nothing,
        addresses: &|_| Vec::new(),
        called_off: &AtomicBool::new(false),
        progress: &mut |progress| match progress.step {
            Step::Sent { .. } => signalled.push(progress.process.id.pid),
            // A second later, the master ends its worker in its own way: the worker's parent, it keeps the PID in use.
            Step::Waiting { left } if left < Duration::from_secs(59) => {
                let worker = nix::unistd::Pid::from_raw(worker.cast_signed());
                nix::sys::signal::kill(worker, nix::sys::signal::SIGKILL).unwrap();
            }
            _ => {}
        },
    };
    let options = Options { grace: Duration::from_secs(60), ..quick() };
    let outcome = execute(plan(&port), options, &mut world).unwrap().remove(0);
    assert_eq!((outcome.status, &signalled[..]), (Status::Cleaned, &[master.pid()][..]), "{outcome:?}");
    assert!(outcome.killed.contains(&worker), "{outcome:?}");
}

#[test]
fn a_port_let_go_is_free_whether_or_not_its_holder_lives() {
    let (mut server, port) = serve(RELEASING);
    let outcome = run(&port, quick());
    assert_eq!((outcome.status, &outcome.killed[..]), (Status::Cleaned, &[][..]), "{outcome:?}");
    let message = outcome.diagnostics.unwrap().message;
    assert!(message.ends_with(&format!("({}) let go of the port and did not end yet", server.pid())), "{message}");
    assert!(server.is_alive());
}

#[test]
fn where_sockets_cannot_be_watched_full_scans_serve() {
    // No namespace has this number, so there is none to look into.
    let scan_elsewhere = |port: u16| {
        let mut found = scan(port);
        found.iter_mut().for_each(|l| l.socket.netns = 1);
        found
    };
    for (script, ended) in [(POLITE, true), (RELEASING, false)] {
        let (mut server, port) = serve(script);
        let guards = Guards::current(false);
        let plan = Plan::new(scan_elsewhere(port.port), &[], &[], &guards, &stat_of);
        let mut world = World {
            rescan: &mut || Ok(scan_elsewhere(port.port)),
            holds: &holds,
            guards: &guards,
            stop: &mut nothing,
            addresses: &|_| Vec::new(),
            progress: &mut |_| {},
            called_off: &AtomicBool::new(false),
        };
        let outcome =
            execute(plan, Options { grace: Duration::from_secs(60), ..quick() }, &mut world).unwrap().remove(0);
        assert_eq!((outcome.status, outcome.killed.is_empty()), (Status::Cleaned, !ended), "{outcome:?}");
        assert_eq!(server.is_alive(), !ended);
        assert!(outcome.elapsed < Duration::from_secs(30), "{outcome:?}");
    }
}

#[test]
fn what_happens_is_told_in_order() {
    let (server, port) = serve(DEAF);
    let guards = Guards::current(false);
    let mut told = Vec::new();
    let mut world = World {
        rescan: &mut || Ok(scan(port.port)),
        holds: &holds,
        guards: &guards,
        stop: &mut nothing,
        addresses: &|_| Vec::new(),
        called_off: &AtomicBool::new(false),
        progress: &mut |progress| {
            assert_eq!(progress.process.id.pid, server.pid());
            told.push(progress.step.clone());
        },
    };
    execute(plan(&port), Options { grace: Duration::from_millis(100), ..quick() }, &mut world).unwrap();
    told.retain(|step| !matches!(step, Step::Waiting { .. }));
    let why = Some("it ignores SIGTERM".to_owned());
    let grace = Duration::from_millis(100);
    assert_eq!(told[0], Step::Sent { signal: SignalName(Signal::TERM), resumed: false });
    assert_eq!(told[1], Step::Outlived { grace, why });
    assert_eq!(told[2], Step::Sent { signal: SignalName(Signal::KILL), resumed: false });
    assert!(matches!(told[3], Step::Ended { after } if after >= grace), "{told:?}");
    assert_eq!(told.len(), 4, "{told:?}");
}

#[test]
fn a_holder_forked_after_the_plan_ends_as_well() {
    let listener = listen();
    let first = Helper::start(POLITE, &[&listener]);
    let planned = Plan::new(
        scan(listener.local_addr().unwrap().port())
            .into_iter()
            .map(|mut l| {
                l.holders.retain(|h| h.process.id.pid == first.pid());
                l
            })
            .collect(),
        &[],
        &[],
        &Guards::current(false),
        &stat_of,
    );
    let late = Helper::start(POLITE, &[&listener]);
    let mut pids = vec![first.pid(), late.pid()];
    pids.sort_unstable();
    let port = leave_to(listener, &pids);
    let mut outcome = run_with(planned, port.port, quick(), &holds);
    outcome.killed.sort_unstable();
    assert_eq!((outcome.status, outcome.killed), (Status::Cleaned, pids));
}

#[test]
fn a_new_owner_is_reported_with_who_started_it() {
    let (server, port) = serve(POLITE);
    let plan = plan(&port);
    let again: RefCell<Option<(Helper, Port)>> = RefCell::new(None);
    let guards = Guards::current(false);
    let mut world = World {
        rescan: &mut || Ok(scan(port.port)),
        holds: &holds,
        guards: &guards,
        stop: &mut nothing,
        addresses: &|_| Vec::new(),
        called_off: &AtomicBool::new(false),
        progress: &mut |progress| {
            // The test process, parent of the server, is the supervisor: it starts another once the port is free.
            if matches!(progress.step, Step::Ended { .. }) {
                let listener = std::net::TcpListener::bind(("127.0.0.1", port.port)).unwrap();
                let helper = Helper::start(POLITE, &[&listener]);
                let port = leave_to(listener, &[helper.pid()]);
                again.replace(Some((helper, port)));
            }
        },
    };
    let options = Options { settle: Duration::from_secs(20), ..Options::default() };
    let outcome = execute(plan, options, &mut world).unwrap().remove(0);
    let (mut new, _) = again.into_inner().unwrap();
    assert_eq!((outcome.status, &outcome.killed[..]), (Status::Respawned, &[server.pid()][..]), "{outcome:?}");
    assert_eq!(outcome.remaining_pids, [new.pid()]);
    let diagnostics = outcome.diagnostics.unwrap();
    assert_eq!(diagnostics.new_owners[0].pid, new.pid());
    assert_eq!(diagnostics.supervisor.unwrap().pid, Some(std::process::id()));
    assert!(new.is_alive(), "a new owner is never signalled");
}

#[test]
fn a_free_port_and_a_dry_run_touch_nothing() {
    let (mut server, port) = serve(POLITE);
    let outcomes = planned(plan(&port), &|_| Vec::new());
    assert_eq!((outcomes[0].status, &outcomes[0].remaining_pids[..]), (Status::Planned, &[server.pid()][..]));
    assert!(server.is_alive());
    server.end();
    let outcome = run(&port, quick());
    assert_eq!((outcome.status, outcome.still_listening), (Status::Free, false));
}

#[test]
fn the_test_process_is_refused_as_itself() {
    let own = listen();
    let port = Port { port: own.local_addr().unwrap().port(), inode: 0 };
    let mut plan = plan(&port);
    plan.listeners.iter_mut().for_each(|l| l.holders.retain(|h| h.process.id.pid == std::process::id()));
    plan.victims.clear();
    let outcome = run_with(plan, port.port, quick(), &holds);
    assert_eq!((outcome.status, &outcome.remaining_pids[..]), (Status::Partial, &[std::process::id()][..]));
    assert_eq!(outcome.failed[0].reason, "portwatch itself holds the port");
}

/// A plan to stop a container in place of the port's holder, carried out by `stop`.
fn run_stopping(port: &Port, stop: &mut crate::kill::Stopper<'_>) -> Outcome {
    let mut plan = plan(port);
    let container = Container {
        id: "5eed".repeat(16),
        name: "web".to_owned(),
        image: "busybox".to_owned(),
        ports: Vec::new(),
        addresses: Vec::new(),
    };
    let processes = plan.victims.drain(..).map(|victim| victim.process).collect();
    plan.stops.push(Stop { what: Whole::Container(container), groups: vec![0], processes });
    let guards = Guards::current(false);
    let mut world = World {
        rescan: &mut || Ok(scan(port.port)),
        holds: &holds,
        guards: &guards,
        stop: &mut |wholes, grace| stop(wholes, grace),
        addresses: &|_| Vec::new(),
        progress: &mut |_| {},
        called_off: &AtomicBool::new(false),
    };
    execute(plan, quick(), &mut world).unwrap().remove(0)
}

#[test]
fn a_container_is_stopped_and_its_processes_are_not_signalled() {
    let (server, port) = serve(DEAF);
    let mut server = Some(server);
    let outcome = run_stopping(&port, &mut |containers, grace| {
        assert_eq!((containers.len(), grace), (1, quick().grace));
        // As the engine would.
        server.take().unwrap().end();
        vec![Ok(Vec::new())]
    });
    assert_eq!((outcome.status, outcome.stopped.len()), (Status::Cleaned, 1), "{outcome:?}");
    assert!(outcome.killed.is_empty() && outcome.failed.is_empty(), "{outcome:?}");
}

#[test]
fn a_container_that_does_not_stop_keeps_its_port_and_its_processes() {
    let (mut server, port) = serve(POLITE);
    for (denied, status) in [(true, Status::Denied), (false, Status::Partial)] {
        let outcome =
            run_stopping(&port, &mut |_, _| vec![Err(StopError { message: "cannot stop it".to_owned(), denied })]);
        assert_eq!((outcome.status, outcome.still_listening), (status, true), "{outcome:?}");
        assert_eq!(outcome.failed[0].reason, "cannot stop it");
        assert!(outcome.stopped.is_empty() && outcome.killed.is_empty() && server.is_alive(), "{outcome:?}");
    }
    let outcome = run_stopping(&port, &mut |_, _| vec![Ok(Vec::new())]);
    assert_eq!((outcome.status, outcome.stopped.len()), (Status::Partial, 1), "{outcome:?}");
    assert_eq!(outcome.failed[0].reason, "still there after container web (5eed5eed5eed) has stopped");
    assert!(server.is_alive());
}

/// Runs as nobody, in a thread of its own: the kernel keeps users by thread.
fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("NOT TESTED: only root can become nobody");
        return None;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let nobody = rustix::process::Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            work()
        });
        Some(thread.join().unwrap())
    })
}

#[test]
fn anothers_process_is_denied_and_lives() {
    let (mut server, port) = serve(POLITE);
    let plan = plan(&port);
    // The first would not let us look; the second lets us, and still the kernel refuses the signal.
    let refuses = |_, _| Err(io::ErrorKind::PermissionDenied.into());
    let confirms = |_, _| Ok(true);
    let answers: [&(dyn Fn(u32, u64) -> io::Result<bool> + Sync); 2] = [&refuses, &confirms];
    for holds in answers {
        let plan = plan.clone();
        let found = scan(port.port);
        let Some(outcome) = as_nobody(|| {
            let guards = Guards::current(false);
            let mut world = World {
                rescan: &mut || Ok(found.clone()),
                holds: &holds,
                guards: &guards,
                stop: &mut nothing,
                addresses: &|_| Vec::new(),
                progress: &mut |_| {},
                called_off: &AtomicBool::new(false),
            };
            execute(plan, quick(), &mut world).unwrap().remove(0)
        }) else {
            return;
        };
        assert_eq!(outcome.status, Status::Denied, "{outcome:?}");
        assert_eq!(outcome.failed[0].reason, "not permitted: it runs as root (uid 0); try sudo");
        assert_eq!(crate::kill::exit_code(&[outcome]), 3);
    }
    assert!(server.is_alive());
}

#[test]
fn a_listener_whose_holders_are_hidden_is_denied_or_a_ghost() {
    let (_server, port) = serve(POLITE);
    let hidden = || {
        let mut found = scan(port.port);
        found[0].holders.clear();
        Plan::new(found, &[], &[], &Guards::current(false), &stat_of)
    };
    let outcome = run_with(hidden(), port.port, quick(), &holds);
    if nix::unistd::Uid::effective().is_root() {
        assert_eq!((outcome.status, &outcome.ghost[..]), (Status::Ghost, &[port.inode][..]), "{outcome:?}");
    }
    let Some(outcome) = as_nobody(|| run_with(hidden(), port.port, quick(), &holds)) else { return };
    assert_eq!(outcome.status, Status::Denied);
    assert_eq!(outcome.diagnostics.unwrap().message, "held by root (uid 0), whose processes are not visible; try sudo");
}

/// Ends the victim and starts a stranger under its PID, one that holds another socket if `serving`.
fn recycle(victim: Helper, serving: bool) -> Option<(Helper, Option<Port>)> {
    let pid = victim.pid();
    victim.end();
    if !serving {
        return Some((Helper::start_as(pid, POLITE, &[])?, None));
    }
    let listener = listen();
    let helper = Helper::start_as(pid, POLITE, &[&listener])?;
    let port = leave_to(listener, &[pid]);
    Some((helper, Some(port)))
}

#[test]
fn a_pid_recycled_before_the_pidfd_is_opened_harms_nobody() {
    for serving in [false, true] {
        let (victim, port) = serve(POLITE);
        let plan = plan(&port);
        let Some((mut bystander, _other)) = recycle(victim, serving) else { return };
        let outcome = run_with(plan, port.port, quick(), &holds);
        assert!(bystander.is_alive());
        assert_eq!((outcome.status, &outcome.killed[..]), (Status::Cleaned, &[][..]), "{outcome:?}");
    }
}

#[test]
fn a_pid_recycled_between_pidfd_and_verification_harms_nobody() {
    for serving in [false, true] {
        let (victim, port) = serve(POLITE);
        let plan = plan(&port);
        let victim = RefCell::new(Some(victim));
        let bystander = RefCell::new(None);
        // The check itself is when it happens; and it says yes, as if it had read of the victim just before.
        let racing = |_, _| {
            if let Some(victim) = victim.take() {
                bystander.replace(recycle(victim, serving));
            }
            Ok(true)
        };
        let outcome = run_with(plan, port.port, quick(), &racing);
        let Some((mut bystander, _other)) = bystander.into_inner() else { return };
        assert!(bystander.is_alive());
        assert_eq!((outcome.status, &outcome.killed[..]), (Status::Cleaned, &[][..]), "{outcome:?}");
    }
}

#[test]
fn a_pid_recycled_around_verification_is_told_apart_at_each_step() {
    for serving in [false, true] {
        // Before the pidfd: it is the stranger's, and the stranger is no holder, by its socket and by its start.
        let (victim, port) = serve(POLITE);
        let target = Target { id: victim.id(), inodes: vec![port.inode], kin: None };
        let Some((mut stranger, _other)) = recycle(victim, serving) else { return };
        let open = target.open().unwrap();
        let verdict = open.verify(&mut |id, inodes| prove_by_proc(id, inodes, &holds), &|_| None);
        assert!(matches!(verdict, Verdict::NotHolder), "{verdict:?}");
        assert!(stranger.is_alive());

        // After the pidfd, before the check.
        let (victim, port) = serve(POLITE);
        let open = Target { id: victim.id(), inodes: vec![port.inode], kin: None }.open().unwrap();
        let Some((mut stranger, _other)) = recycle(victim, serving) else { return };
        let verdict = open.verify(&mut |_, _| Ok(true), &|_| None);
        assert!(matches!(verdict, Verdict::Gone), "{verdict:?}");
        assert!(stranger.is_alive());

        // After the check, before the signal.
        let (victim, port) = serve(POLITE);
        let open = Target { id: victim.id(), inodes: vec![port.inode], kin: None }.open().unwrap();
        let Verdict::Verified(verified) = open.verify(&mut |id, inodes| prove_by_proc(id, inodes, &holds), &|_| None)
        else {
            panic!("the victim is not verified");
        };
        let Some((mut stranger, _other)) = recycle(victim, serving) else { return };
        let sent = verified.signal(Signal::KILL);
        assert!(matches!(sent, Err(SignalError::Gone)), "{sent:?}");
        assert!(stranger.is_alive());
    }
}
