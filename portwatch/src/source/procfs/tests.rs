//! Real sockets, held by this process, by its threads and by children of several kinds.

use std::io::{BufRead, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{ForkResult, fork};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, kill_process, set_parent_process_death_signal, setrlimit, waitpid,
};

use super::*;
use crate::model::Protocol;

fn inode_of(socket: &impl AsRawFd) -> u64 {
    std::fs::metadata(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap().ino()
}

/// Forks a child that runs `life` and never returns from here; it is killed and reaped with the guard.
struct Child(Pid);

/// Does nothing until the process is killed.
fn rest() -> ! {
    loop {
        // SAFETY: plain system call without arguments.
        unsafe { libc::pause() };
    }
}

impl Child {
    fn new(life: impl FnOnce()) -> Child {
        // SAFETY: the child runs `life` and then waits for its end; it never returns into the test harness.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => Child(Pid::from_raw(child.as_raw()).unwrap()),
            ForkResult::Child => {
                let _ = set_parent_process_death_signal(Some(Signal::KILL));
                life();
                rest()
            }
        }
    }

    fn pid(&self) -> u32 {
        self.0.as_raw_nonzero().get().try_into().unwrap()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
        let _ = waitpid(Some(self.0), WaitOptions::empty());
    }
}

fn holders(inode: u64) -> Vec<(u32, u32)> {
    let mut holders: Vec<_> =
        held_fds(&HashSet::from([inode])).fds.into_iter().map(|held| (held.process.pid, held.fd)).collect();
    holders.sort_unstable();
    holders
}

fn own_fd(socket: &impl AsRawFd) -> (u32, u32) {
    (std::process::id(), socket.as_raw_fd().try_into().unwrap())
}

#[test]
fn socket_links() {
    for (target, expected) in [
        (&b"socket:[1]"[..], Some(1)),
        (b"socket:[4294967296]", Some(4_294_967_296)),
        (b"socket:[]", None),
        (b"socket:[-1]", None),
        (b"socket:[99999999999999999999999]", None),
        (b"socket:[12", None),
        (b"/tmp/socket:[12]", None),
        (b"pipe:[12]", None),
        (b"", None),
    ] {
        assert_eq!(parse_socket(target), expected);
    }
    for number in [0, 7, 10, 4_294_967_295] {
        assert_eq!(decimal(number, &mut [0xff; 11]).to_str().unwrap(), number.to_string());
    }
}

#[test]
fn a_scan_shows_own_listeners_with_their_holder() {
    let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
    let v6 = TcpListener::bind("[::1]:0").unwrap();
    let dual = TcpListener::bind("[::]:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let twin = v4.try_clone().unwrap();
    let ports: Vec<u16> =
        [v4.local_addr(), v6.local_addr(), dual.local_addr(), udp.local_addr()].map(|a| a.unwrap().port()).into();
    let before = process::boot_ns_now();
    let scan = super::scan(false, &|socket| ports.contains(&socket.port)).unwrap();
    assert!(scan.snapshot.at >= before);
    assert_eq!(scan.snapshot.complete, [netns::own().unwrap()]);
    let expect = |proto: Protocol, endpoint: SocketAddr, mut fds: Vec<u32>| {
        fds.sort_unstable();
        let found: Vec<_> = scan
            .snapshot
            .listeners
            .iter()
            .filter(|l| l.socket.proto == proto && l.socket.endpoint() == endpoint)
            .collect();
        assert_eq!(found.len(), 1, "{endpoint}");
        let own: Vec<_> = found[0].holders.iter().filter(|h| h.process.id.pid == std::process::id()).collect();
        assert_eq!(own.len(), 1, "{endpoint}");
        assert_eq!((&own[0].fds, own[0].binder), (&fds, true));
        assert_eq!(own[0].process.uid, Some(nix::unistd::geteuid().as_raw()));
    };
    expect(Protocol::Tcp, v4.local_addr().unwrap(), vec![own_fd(&v4).1, own_fd(&twin).1]);
    expect(Protocol::Tcp, v6.local_addr().unwrap(), vec![own_fd(&v6).1]);
    expect(Protocol::Tcp, dual.local_addr().unwrap(), vec![own_fd(&dual).1]);
    expect(Protocol::Udp, udp.local_addr().unwrap(), vec![own_fd(&udp).1]);
    assert!(holds(std::process::id(), inode_of(&v4)).unwrap());

    let (inode, port) = (inode_of(&v4), v4.local_addr().unwrap().port());
    drop((v4, twin));
    assert!(!holds(std::process::id(), inode).unwrap());
    let listeners = super::scan(true, &|s| s.proto == Protocol::Tcp && s.port == port).unwrap().snapshot.listeners;
    // Children of the other tests hold whatever was open when they were forked.
    assert!(listeners.iter().all(|l| l.socket.id.inode != inode || !l.is_ghost()));
}

#[test]
fn a_zombie_leader_holds_through_its_threads() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let inode = inode_of(&listener);
    let fd = own_fd(&listener).1;
    let child = Child::new(|| {
        std::thread::spawn(|| rest());
        // SAFETY: ends this thread alone, the leader, without unwinding; nothing of it is used afterwards.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    });
    // Nothing tells that a leader has exited while its threads go on, so look until it shows.
    let is_zombie = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.pid())).unwrap();
        stat.rsplit(')').next().is_some_and(|fields| fields.starts_with(" Z"))
    };
    while !is_zombie() {
        std::thread::yield_now();
    }
    assert!(std::fs::read_dir(format!("/proc/{}/fd", child.pid())).map_or(true, |mut fds| fds.next().is_none()));
    assert!(holders(inode).contains(&(child.pid(), fd)), "{:?}", holders(inode));
    assert!(holds(child.pid(), inode).unwrap());
    let pid = child.pid();
    drop(child);
    assert!(!holds(pid, inode).unwrap());
    assert!(holders(inode).contains(&own_fd(&listener)));
}

#[test]
fn a_thread_with_its_own_file_table_is_seen() {
    let (mut output, mut input) = std::io::pipe().unwrap();
    // In a child: a thread of this process would get a copy of every descriptor of the other tests.
    let child = Child::new(|| {
        std::thread::spawn(move || {
            // SAFETY: this thread uses no descriptors but a pipe that it owns and those that it opens afterwards.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) }.unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let fd = listener.as_raw_fd();
            let inode = std::fs::metadata(format!("/proc/thread-self/fd/{fd}")).unwrap().ino();
            writeln!(input, "{inode} {fd}").unwrap();
            rest()
        });
    });
    let mut line = String::new();
    std::io::BufReader::new(&mut output).read_line(&mut line).unwrap();
    let (inode, fd) = line.trim().split_once(' ').unwrap();
    let (inode, fd) = (inode.parse().unwrap(), fd.parse().unwrap());
    assert_eq!(holders(inode), [(child.pid(), fd)]);
    assert!(holds(child.pid(), inode).unwrap());
    drop(child);
    assert_eq!(holders(inode), []);
}

#[test]
fn every_holder_is_found_among_many_processes() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (inode, own) = (inode_of(&listener), own_fd(&listener));
    // More than SHARE_FROM, so that the walk is shared among threads.
    let children: Vec<Child> = (0..SHARE_FROM + 6).map(|_| Child::new(|| ())).collect();
    let found = holders(inode);
    assert!(found.contains(&own));
    for child in &children {
        assert!(found.contains(&(child.pid(), own.1)), "{}", child.pid());
    }
    drop(listener);
    drop(children);
    assert!(!holders(inode).contains(&own));
}

/// A child that listens in a network namespace of its own, and its port; `None` where there can be none.
fn far() -> Option<(Child, NetnsId, u16)> {
    let (output, mut input) = std::io::pipe().unwrap();
    let child = Child::new(|| {
        let told = match unshare(CloneFlags::CLONE_NEWNET) {
            Ok(()) => {
                // The loopback device is down in there: only the unspecified address can be bound.
                let listener = TcpListener::bind("0.0.0.0:0").unwrap();
                let port = listener.local_addr().unwrap().port();
                std::mem::forget(listener);
                port.to_string()
            }
            Err(errno) => errno.to_string(),
        };
        writeln!(input, "{told}").unwrap();
    });
    let mut line = String::new();
    std::io::BufReader::new(output).read_line(&mut line).unwrap();
    let Ok(port) = line.trim().parse() else {
        eprintln!("NOT TESTED: cannot make a network namespace: {line}");
        return None;
    };
    let id = netns::of_pid(child.pid()).unwrap();
    Some((child, id, port))
}

#[test]
fn more_namespaces_than_descriptors_are_read_and_opened() {
    /// Descriptors that the reader has, three and a pipe among them.
    const LIMIT: u16 = 24;
    let Some(all) = (0..LIMIT).map(|_| far()).collect::<Option<Vec<_>>>() else { return };
    let (mut output, mut input) = std::io::pipe().unwrap();
    let reader = Child::new(|| {
        let (limit, pipe) = (i32::from(LIMIT), input.as_raw_fd());
        for fd in (3..limit).filter(|&fd| fd != pipe) {
            // SAFETY: this child has copies of the descriptors of others and uses none but the pipe.
            unsafe { libc::close(fd) };
        }
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(LIMIT.into()), maximum: Some(LIMIT.into()) });
        let is_opened = |id| netns::open(id).and_then(|namespace| netns::enter(&namespace, || Ok(netns::own()?)));
        let opened = all.iter().filter(|(_, id, _)| is_opened(*id).is_ok_and(|own| own == *id)).count();
        let dumped = Namespaces::look(4).and_then(|others| dump_all(&others, &|_| true, diag::dump));
        let read = dumped.map(|dumped| {
            let is_read = |id, port| dumped.sockets.iter().any(|s| (s.netns, s.port) == (id, port));
            all.iter().filter(|&&(_, id, port)| dumped.complete.contains(&id) && is_read(id, port)).count()
        });
        let _ = writeln!(input, "{opened} opened, {} read", read.unwrap_or(0));
    });
    let mut line = String::new();
    std::io::BufReader::new(&mut output).read_line(&mut line).unwrap();
    assert_eq!(line.trim(), format!("{LIMIT} opened, {LIMIT} read"));
    drop(reader);
}

#[test]
fn a_namespace_is_found_by_whoever_is_left_in_it() {
    let Some((first, id, port)) = far() else { return };
    let (mut output, mut input) = std::io::pipe().unwrap();
    let second = Child::new(|| {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", first.pid())).unwrap();
        let entered = setns(&namespace, CloneFlags::CLONE_NEWNET);
        drop(namespace);
        writeln!(input, "{entered:?}").unwrap();
    });
    let mut line = String::new();
    std::io::BufReader::new(&mut output).read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "Ok(())");
    let (held, others) = (Namespaces::look(usize::MAX).unwrap(), Namespaces::look(0).unwrap());
    let read = |namespaces: &Namespaces| {
        let Dumped { sockets, complete, .. } = dump_all(namespaces, &|s| s.netns == id, diag::dump).unwrap();
        (complete.contains(&id), sockets.iter().map(|s| s.port).collect::<Vec<_>>())
    };
    assert_eq!(read(&others), (true, vec![port]));
    drop(first);
    // Nobody listens there any more.
    assert_eq!(read(&others), (true, vec![]));
    drop(second);
    // What cannot be read is not said to be empty; but what was kept alive is known to be.
    assert_eq!(read(&others), (false, vec![]));
    assert_eq!(read(&held), (true, vec![]));
    assert!(netns::open(id).is_err());
}
