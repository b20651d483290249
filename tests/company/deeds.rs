//! What one of a company may do. Nothing but the seed and what the kernel refuses decides what is done, and in which order.

use rustix::process::Signal;

use super::{Company, Player};
use crate::puppet::Sock;

pub type Deed = fn(&mut Company, usize);

const ANY: &str = "127.0.0.1:0";

/// Listeners of one puppet: a company does not grow without bound.
const MOST_SOCKS: usize = 12;

/// What servers do all day.
pub const STEADY: &[(usize, Deed)] = &[
    (10, listen),
    (6, close),
    (2, join_group),
    (1, duplicate),
    (2, fork),
    (1, exec),
    (1, exit),
    (2, gust),
    (2, pass),
    (1, receive),
];

/// And what they seldom do.
pub const WILD: &[(usize, Deed)] = &[
    (18, listen),
    (6, close),
    (4, shut_down),
    (4, listen_again),
    (4, join_group),
    (2, duplicate),
    (8, fork),
    (3, exec),
    (2, exit),
    (1, killed),
    (8, storm),
    (6, pass),
    (4, receive),
    (2, change_namespace),
    (2, serve_from_thread),
    (2, register_with_ring),
    (1, close_ring),
];

fn listen(company: &mut Company, n: usize) {
    let how = company.chance.below(9);
    let player = &company.players[n];
    if player.socks.len() >= MOST_SOCKS {
        return close(company, n);
    }
    let (puppet, pid) = (&player.puppet, player.puppet.pid);
    let opened = match how {
        0 => Ok(puppet.udp(ANY, "")),
        1 => Ok(puppet.tcp("[::]:0", "dual")),
        2 => Ok(puppet.tcp("[::1]:0", "v6only")),
        3 => Ok(puppet.tcp(ANY, "reuseport")),
        4 => {
            let bound = puppet.bind(ANY, "");
            Ok(puppet.listen(bound.fd))
        }
        5 => Ok(puppet.tcp(ANY, "cloexec")),
        // Not every kernel has it.
        6 => puppet.try_tcp(ANY, "mptcp"),
        7 => Ok(puppet.udp("[::]:0", "dual")),
        _ => Ok(puppet.serve()),
    };
    let what = match &opened {
        Ok(sock) => format!("{pid} kind {how}: {} inode {}", sock.address, sock.inode),
        Err(refused) => format!("{pid} kind {how}: {}", refused.text),
    };
    company.note("listen", &what);
    company.players[n].socks.extend(opened.ok());
}

/// Another listener at the same address, whoever has it.
fn join_group(company: &mut Company, n: usize) {
    let (from, which) = (company.chance.below(company.players.len()), company.chance.below(MOST_SOCKS));
    let all = &company.players[from].socks;
    let Some(sock) = all.get(which % all.len().max(1)) else { return listen(company, n) };
    let address = sock.address.to_string();
    let opened = company.players[n].puppet.try_tcp(&address, "reuseport");
    let shown = opened.as_ref().map_or_else(|refused| refused.text.clone(), |sock| format!("inode {}", sock.inode));
    let what = format!("{} at {address}: {shown}", company.players[n].puppet.pid);
    company.note("reuseport", &what);
    company.players[n].socks.extend(opened.ok());
}

/// Takes one of its sockets from it.
fn take(company: &mut Company, n: usize) -> Option<Sock> {
    let which = company.chance.below(MOST_SOCKS);
    let socks = &mut company.players[n].socks;
    (!socks.is_empty()).then(|| socks.swap_remove(which % socks.len()))
}

fn close(company: &mut Company, n: usize) {
    if let Some(sock) = take(company, n) {
        close_it(company, n, sock);
    }
}

fn close_it(company: &mut Company, n: usize, sock: Sock) {
    company.note("close", &format!("{} fd {} inode {}", company.players[n].puppet.pid, sock.fd, sock.inode));
    company.players[n].puppet.close(sock.fd);
}

/// The socket goes on without listening.
fn shut_down(company: &mut Company, n: usize) {
    let Some(sock) = take(company, n) else { return };
    let player = &mut company.players[n];
    // Of UDP that are not connected: ENOTCONN, and it has no effect.
    let done = player.puppet.attempt(&format!("shutdown {}", sock.fd));
    let what = done.as_ref().err().map_or("", |refused| &refused.text);
    let what = format!("{} fd {} inode {} {what}", player.puppet.pid, sock.fd, sock.inode);
    if done.is_ok() { &mut player.silent } else { &mut player.socks }.push(sock);
    company.note("shutdown", &what);
}

fn listen_again(company: &mut Company, n: usize) {
    let player = &mut company.players[n];
    let Some(sock) = player.silent.pop() else { return shut_down(company, n) };
    // Somebody else may have the port by now.
    let what = match player.puppet.attempt(&format!("listen {}", sock.fd)) {
        Ok(reply) => {
            player.socks.push(sock);
            reply
        }
        Err(refused) => {
            player.puppet.close(sock.fd);
            refused.text
        }
    };
    let what = format!("{} fd {} inode {}: {what}", player.puppet.pid, sock.fd, sock.inode);
    company.note("listen again", &what);
}

fn duplicate(company: &mut Company, n: usize) {
    let player = &mut company.players[n];
    let Some(&sock) = player.socks.last() else { return };
    let fd = player.puppet.dup(sock.fd);
    player.socks.push(Sock { fd, ..sock });
    let what = format!("{} fd {} inode {} as {fd}", player.puppet.pid, sock.fd, sock.inode);
    company.note("dup", &what);
}

fn fork(company: &mut Company, n: usize) {
    if company.players.len() >= company.most {
        return exit(company, n);
    }
    let player = &company.players[n];
    let child =
        Player { socks: player.socks.clone(), silent: player.silent.clone(), ..Player::new(player.puppet.fork()) };
    let what = format!("{} to {}", player.puppet.pid, child.puppet.pid);
    company.players.push(child);
    company.note("fork", &what);
}

fn exec(company: &mut Company, n: usize) {
    let player = &mut company.players[n];
    player.puppet.exec();
    // Its mailbox is closed, and so are its rings (io_uring_setup(2) makes them O_CLOEXEC) and some of its sockets.
    player.mailbox = None;
    player.rings.clear();
    let pid = player.puppet.pid;
    let is_open = |sock: &Sock| {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{}", sock.fd));
        link.is_ok_and(|link| link.to_str() == Some(&format!("socket:[{}]", sock.inode)))
    };
    player.socks.retain(is_open);
    player.silent.retain(is_open);
    company.note("exec", &pid.to_string());
}

fn exit(company: &mut Company, n: usize) {
    if company.players.len() <= 2 {
        return fork(company, n);
    }
    let player = company.players.swap_remove(n);
    company.note("exit", &player.puppet.pid.to_string());
    player.puppet.exit();
}

fn killed(company: &mut Company, n: usize) {
    if company.players.len() <= 2 {
        return fork(company, n);
    }
    let player = company.players.swap_remove(n);
    company.note("kill", &player.puppet.pid.to_string());
    player.puppet.signal(Signal::KILL);
    player.puppet.wait();
}

/// Opens and closes listeners as fast as it can, while others do something else.
fn storm(company: &mut Company, n: usize) {
    let count = company.chance.below(1500);
    blow(company, n, count);
}

fn gust(company: &mut Company, n: usize) {
    let count = company.chance.below(200);
    blow(company, n, count);
}

fn blow(company: &mut Company, n: usize, count: usize) {
    let player = &mut company.players[n];
    player.puppet.begin(&format!("storm {count}"));
    player.storms = true;
    let what = format!("{} of {count}", player.puppet.pid);
    company.note("storm", &what);
}

/// Sends a listener to another, who takes it at once or later; the sender keeps it, closes it or exits meanwhile.
fn pass(company: &mut Company, n: usize) {
    let (to, how) = (company.chance.below(company.players.len()), company.chance.below(4));
    let Some(sock) = take(company, n) else { return listen(company, n) };
    if to == n || company.players[to].mail().len() >= MOST_MAIL {
        return close_it(company, n, sock);
    }
    let receiver = &mut company.players[to];
    receiver.calm().mail().push(sock);
    let [sender, receiver] = [n, to].map(|who| &company.players[who].puppet);
    sender.send_fd(sock.fd, receiver);
    let what = format!("{} fd {} inode {} to {}, way {how}", sender.pid, sock.fd, sock.inode, receiver.pid);
    company.note("pass", &what);
    match how {
        0 => {
            company.players[n].socks.push(sock);
            receive(company, to);
        }
        1 => company.players[n].puppet.close(sock.fd),
        2 => {
            company.players[n].puppet.close(sock.fd);
            receive(company, to);
        }
        _ => exit(company, n),
    }
}

/// More than a socket's queue of datagrams (net.unix.max_dgram_qlen) would make the sender wait for ever.
const MOST_MAIL: usize = 5;

fn receive(company: &mut Company, n: usize) {
    let player = &mut company.players[n];
    if player.mail().is_empty() {
        return;
    }
    let sock = player.mail().remove(0);
    let fd = player.puppet.receive_fd();
    player.socks.push(Sock { fd, ..sock });
    let what = format!("{} inode {} as fd {fd}", player.puppet.pid, sock.inode);
    company.note("receive", &what);
}

/// What it opened stays where it was opened.
fn change_namespace(company: &mut Company, n: usize) {
    let puppet = &company.players[n].puppet;
    let what = if puppet.unshare_net() { puppet.pid.to_string() } else { String::new() };
    company.note("unshare", &what);
}

fn serve_from_thread(company: &mut Company, n: usize) {
    let player = &mut company.players[n];
    player.puppet.serve_from_thread();
    // It stays open, and nobody reads it any more.
    player.mailbox = None;
    let what = player.puppet.pid.to_string();
    company.note("leader exits", &what);
}

/// The ring keeps it open, whoever closes it; the ring itself is a descriptor that may be closed like any other.
fn register_with_ring(company: &mut Company, n: usize) {
    let player = &mut company.players[n];
    let Some(&sock) = player.socks.last() else { return };
    // Not every kernel has it, or allows it.
    let what = match player.puppet.register_with_ring(sock.fd) {
        Ok(fd) => {
            player.rings.push(fd);
            format!("as fd {fd}")
        }
        Err(refused) => refused.text,
    };
    let what = format!("{} fd {} inode {} {what}", player.puppet.pid, sock.fd, sock.inode);
    company.note("io_uring", &what);
}

/// Closes a ring, and with it what it kept.
fn close_ring(company: &mut Company, n: usize) {
    let player = &mut company.players[n];
    let Some(fd) = player.rings.pop() else { return };
    player.puppet.close(fd);
    let what = format!("{} fd {fd}", player.puppet.pid);
    company.note("close ring", &what);
}
