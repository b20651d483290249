//! What a subscriber has as open, told by an agent that says one line after the other.

use std::fmt::Write as _;

use super::*;
use crate::model::{Holder, SocketId};

/// Port 8000 unless a line names another; an inode or a cookie of 0 is not known.
fn listener(port: u16, inode: u64, cookie: u64, pid: u32) -> Listener {
    let socket = Socket { id: SocketId { inode, cookie }, ..Socket::example("127.0.0.1", port) };
    let process = Arc::new(Process::bare(ProcessId { pid, start: 1 }, "web"));
    Listener { socket, since: Some(1), holders: vec![Holder { process, fds: Vec::new(), binder: true }] }
}

/// `open`, `holders` and `close` are changes; `here` is one of those that are there.
fn response(line: &str) -> Response {
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |name: &str| {
        let word = words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        word.map(|word| word.parse::<u64>().unwrap())
    };
    let of = |name| number(name).unwrap_or(0);
    let narrow = |number: u64| u32::try_from(number).unwrap();
    let port = u16::try_from(number("port").unwrap_or(8000)).unwrap();
    let mut listener = listener(port, of("inode"), of("cookie"), narrow(number("pid").unwrap_or(7)));
    listener.socket.mptcp = words.contains(&"mptcp");
    let at = 5;
    match words[0] {
        "here" => Response::Listener { listener, ancestors: Vec::new(), lineage: Vec::new() },
        "watching" => Response::Watching { at, more: false, narrowed: false },
        "lagged" => Response::Lagged { lost: 3 },
        "open" => Response::Change { change: Change::Opened { at, listener } },
        "holders" => Response::Change { change: Change::Holders { at, listener } },
        "close" => Response::Change { change: Change::Closed { at, listener, by: None } },
        word => panic!("no {word}"),
    }
}

fn shown(listener: &Listener) -> String {
    let Socket { port, id: SocketId { inode, cookie }, .. } = listener.socket;
    format!("port={port} inode={inode} cookie={cookie} pid={}", listener.holders[0].process.id.pid)
}

/// What `script` makes a subscriber tell, and what is open for it at the end.
#[track_caller]
fn check(script: &str, expect: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let told = runtime.block_on(async {
        let (near, far) = UnixStream::pair().unwrap();
        let framed = |stream| Framed::new(stream, LinesCodec::new());
        let mut agent = framed(far);
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
            agent.send(serde_json::to_string(&response(line)).unwrap()).await.unwrap();
        }
        let client = Client { socket: PathBuf::new(), lines: framed(near), patience: PATIENCE };
        let mut subscription = Subscription::begin(client, Selection::default(), None).await.unwrap();
        drop(agent);
        let mut told = String::new();
        while let Ok(changes) = subscription.next().await {
            for change in changes {
                let _ = match change {
                    Change::Opened { listener, .. } => writeln!(told, "open {}", shown(&listener)),
                    Change::Closed { listener, .. } => writeln!(told, "close {}", shown(&listener)),
                    Change::Holders { listener, .. } => writeln!(told, "holders {}", shown(&listener)),
                    Change::Resync { lost, .. } => writeln!(told, "resync {lost}"),
                    Change::Conflict { .. } => writeln!(told, "conflict"),
                };
            }
        }
        for listener in subscription.listeners() {
            let _ = writeln!(told, "here {}", shown(listener));
        }
        told
    });
    let expect: Vec<&str> = expect.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(told.lines().collect::<Vec<_>>(), expect);
}

#[test]
fn what_is_closed_is_not_open_any_more_whatever_was_learnt_of_it() {
    for (half, told) in [("inode=9", "inode=9 cookie=0"), ("cookie=4", "inode=0 cookie=4")] {
        check(
            &format!("watching\n open {half}\n close inode=9 cookie=4"),
            &format!("open port=8000 {told} pid=7\n close port=8000 inode=9 cookie=4 pid=7"),
        );
        check(
            &format!("here {half}\n watching\n holders inode=9 cookie=4 pid=8\n close inode=9 cookie=4"),
            "holders port=8000 inode=9 cookie=4 pid=8
             close port=8000 inode=9 cookie=4 pid=7",
        );
        check(
            &format!("here {half}\n watching\n holders inode=9 cookie=4 pid=8"),
            "holders port=8000 inode=9 cookie=4 pid=8
             here port=8000 inode=9 cookie=4 pid=8",
        );
    }
}

#[test]
fn what_was_learnt_in_an_interruption_is_no_change() {
    check(
        "here port=1 inode=1
         here port=2 cookie=2
         here port=3 inode=3 cookie=3
         here port=4 inode=4
         watching
         lagged
         here port=1 inode=1 cookie=1
         here port=2 inode=2 cookie=2
         here port=3 inode=3 cookie=3
         here port=4 inode=4 cookie=4 pid=8
         watching
         close port=1 inode=1 cookie=1
         close port=2 inode=2 cookie=2",
        "resync 3
         holders port=4 inode=4 cookie=4 pid=8
         close port=1 inode=1 cookie=1 pid=7
         close port=2 inode=2 cookie=2 pid=7
         here port=3 inode=3 cookie=3 pid=7
         here port=4 inode=4 cookie=4 pid=8",
    );
}

#[test]
fn what_became_of_each_in_an_interruption_is_told() {
    check(
        "here port=1 inode=1 cookie=1
         here port=2 inode=2 cookie=2
         here port=3 inode=3 cookie=3
         here port=4 inode=4
         watching
         lagged
         here port=2 inode=2 cookie=20
         here port=30 inode=3 cookie=3
         here port=40 inode=4 cookie=4
         watching",
        "resync 3
         close port=1 inode=1 cookie=1 pid=7
         close port=2 inode=2 cookie=2 pid=7
         close port=3 inode=3 cookie=3 pid=7
         close port=4 inode=4 cookie=0 pid=7
         open port=2 inode=2 cookie=20 pid=7
         open port=30 inode=3 cookie=3 pid=7
         open port=40 inode=4 cookie=4 pid=7
         here port=2 inode=2 cookie=20 pid=7
         here port=30 inode=3 cookie=3 pid=7
         here port=40 inode=4 cookie=4 pid=7",
    );
}

#[test]
fn an_inode_used_again_is_another_socket() {
    // A late open, and its close, of one that had the inode before.
    check(
        "here inode=9 cookie=4
         watching
         open port=1 inode=9 cookie=3
         close port=1 inode=9 cookie=3
         holders inode=9 cookie=4 pid=8",
        "open port=1 inode=9 cookie=3 pid=7
         close port=1 inode=9 cookie=3 pid=7
         holders port=8000 inode=9 cookie=4 pid=8
         here port=8000 inode=9 cookie=4 pid=8",
    );
    // The halves of an MPTCP listener share it.
    check(
        "here inode=9 cookie=4 mptcp
         watching
         lagged
         here inode=9 cookie=3 mptcp
         watching
         close inode=9 cookie=4 mptcp",
        "resync 3
         close port=8000 inode=9 cookie=4 pid=7",
    );
}

#[test]
fn two_that_turn_out_to_be_one_socket_are_one() {
    check(
        "here cookie=4
         here inode=9
         watching
         close inode=9
         holders inode=9 cookie=4
         close inode=9 cookie=4",
        "close port=8000 inode=9 cookie=0 pid=7
         holders port=8000 inode=9 cookie=4 pid=7
         close port=8000 inode=9 cookie=4 pid=7",
    );
    check(
        "here cookie=4
         here inode=9
         watching
         lagged
         here inode=9 cookie=4
         watching",
        "resync 3
         close port=8000 inode=9 cookie=0 pid=7
         here port=8000 inode=9 cookie=4 pid=7",
    );
}
