//! What `portwatch run` runs in these tests: this program once more, which does what its arguments say, in order. It ends
//! with the words, and with [`LIFETIME`] whatever happens: no test leaves one behind.

use std::env;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::OpenOptionsExt;
use std::process::exit;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::libc;

use crate::puppet::sys;

/// Set: this program is such a command.
pub const VARIABLE: &str = "PORTWATCH_ACTOR";

/// Seconds after which the kernel ends any of them.
const LIFETIME: u32 = 120;

/// Exit code of a command that was told to end.
static CODE: AtomicI32 = AtomicI32::new(0);

pub fn run() -> ! {
    let words: Vec<String> = env::args().skip(1).collect();
    act(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

fn act(words: &[&str]) -> ! {
    // SAFETY: takes an integer.
    unsafe { libc::alarm(LIFETIME) };
    // As long as the process lives.
    let mut kept: Vec<TcpListener> = Vec::new();
    let mut kept_udp: Vec<UdpSocket> = Vec::new();
    for word in words {
        let (verb, value) = word.split_once('=').unwrap_or((word, ""));
        match verb {
            "serve" => kept.push(listen(if value.is_empty() { port() } else { number(value) as u16 })),
            "serve-udp" => kept_udp.push(UdpSocket::bind(("127.0.0.1", port())).unwrap_or_else(|error| {
                eprintln!("{error}");
                exit(1)
            })),
            "http" => answer(&listen(port()), value),
            "say" => say(&format!("{value}\n")),
            "complain" => eprintln!("{value}"),
            "port" => say(&format!("{}\n", env::var("PORT").unwrap_or_default())),
            "copy" => drop(io::copy(&mut io::stdin(), &mut io::stdout())),
            "flood" => (0..number(value)).for_each(|_| say(&format!("{}\n", "x".repeat(1023)))),
            "child" => {
                if fork() == 0 {
                    act(&value.split('+').collect::<Vec<_>>());
                }
            }
            "setsid" => drop(sys::check(setsid())),
            "daemon" => daemonize(),
            "ignore-term" => sys::ignore_signal(libc::SIGTERM),
            "fork-on-term" => handle(libc::SIGTERM, fork_once),
            "flee-on-term" => handle(libc::SIGTERM, flee),
            "tell-signals" => {
                for (signal, _) in TOLD {
                    handle(signal, tell);
                }
            }
            "tell-cont" => handle(libc::SIGCONT, tell_cont),
            "exit-on-usr1" => {
                CODE.store(number(value), Ordering::Relaxed);
                handle(libc::SIGUSR1, leave);
            }
            "note" => note(value),
            "host" => super::host::play(value),
            "grow" => {
                let (seed, path) = value.split_once(':').expect("grow=SEED:PATH");
                grow(&mut Dice(number(seed) as u64 * 2 + 1), 0, path);
            }
            "exit" => exit(number(value)),
            // SAFETY: takes an integer.
            "raise" => drop(sys::check(unsafe { libc::raise(number(value)) })),
            "wait" => pause(),
            _ => panic!("no such word: {word}"),
        }
    }
    exit(0)
}

fn number(word: &str) -> i32 {
    word.parse().unwrap_or_else(|_| panic!("not a number: {word}"))
}

fn port() -> u16 {
    number(&env::var("PORT").expect("PORT")) as u16
}

fn listen(port: u16) -> TcpListener {
    TcpListener::bind(("127.0.0.1", port)).unwrap_or_else(|error| panic!("bind {port}: {error}"))
}

/// The first status once, then the last for ever: `503,200`.
fn answer(listener: &TcpListener, statuses: &str) -> ! {
    let mut statuses = statuses.split(',').peekable();
    loop {
        let (mut stream, _) = listener.accept().expect("accept");
        let status = statuses.peek().copied().unwrap_or_default().to_owned();
        if statuses.clone().count() > 1 {
            statuses.next();
        }
        let mut request = [0; 1024];
        let _ = stream.read(&mut request);
        let _ = stream.write_all(format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n").as_bytes());
    }
}

fn say(text: &str) {
    let mut stdout = io::stdout().lock();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        exit(1);
    }
}

fn pause() -> ! {
    loop {
        // SAFETY: takes nothing.
        unsafe { libc::pause() };
    }
}

fn fork() -> libc::pid_t {
    // SAFETY: one thread, so the child may do anything.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
    if pid == 0 {
        // SAFETY: takes an integer. Alarms are not inherited.
        unsafe { libc::alarm(LIFETIME) };
    }
    pid
}

fn setsid() -> libc::c_int {
    // SAFETY: takes nothing.
    unsafe { libc::setsid() }
}

/// As daemon(3) and init scripts do: twice, with a session in between.
fn daemonize() {
    if fork() != 0 {
        exit(0);
    }
    setsid();
    if fork() != 0 {
        exit(0);
    }
}

const TOLD: [(libc::c_int, &[u8]); 7] = [
    (libc::SIGINT, b"INT\n"),
    (libc::SIGTERM, b"TERM\n"),
    (libc::SIGHUP, b"HUP\n"),
    (libc::SIGQUIT, b"QUIT\n"),
    (libc::SIGUSR1, b"USR1\n"),
    (libc::SIGUSR2, b"USR2\n"),
    (libc::SIGWINCH, b"WINCH\n"),
];

fn handle(signal: libc::c_int, handler: extern "C" fn(libc::c_int)) {
    // SAFETY: the handlers below make system calls that are async-signal-safe, and nothing else.
    unsafe { libc::signal(signal, handler as *const () as libc::sighandler_t) };
}

extern "C" fn tell(signal: libc::c_int) {
    if let Some((_, name)) = TOLD.iter().find(|(told, _)| *told == signal) {
        // SAFETY: the pointer and the length are those of a constant.
        unsafe { libc::write(1, name.as_ptr().cast(), name.len()) };
    }
}

extern "C" fn tell_cont(_: libc::c_int) {
    // SAFETY: as above.
    unsafe { libc::write(1, b"CONT\n".as_ptr().cast(), 5) };
}

extern "C" fn leave(_: libc::c_int) {
    // SAFETY: takes an integer.
    unsafe { libc::_exit(CODE.load(Ordering::Relaxed)) };
}

/// Both go on, and do so again.
extern "C" fn fork_once(_: libc::c_int) {
    // SAFETY: async-signal-safe in a process with one thread.
    unsafe {
        if libc::fork() == 0 {
            libc::alarm(LIFETIME);
        }
    }
}

/// Forks and exits, again and again: a process whose PID is never known in time.
extern "C" fn flee(_: libc::c_int) {
    // SAFETY: async-signal-safe in a process with one thread. The alarm is set anew by nobody: this ends with the count.
    unsafe {
        for _ in 0..1_000_000 {
            if libc::fork() != 0 {
                libc::_exit(0);
            }
        }
        libc::_exit(0);
    }
}

/// Writes down who it is: PID and start.
fn note(path: &str) {
    let start = loop {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // Nothing: a signal handler has forked meanwhile, and the file that was open is the other one's.
        if let Some(start) = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(19)) {
            break start.to_owned();
        }
    };
    let mut file = OpenOptions::new().append(true).create(true).mode(0o666).open(path).expect("notes");
    file.write_all(format!("{} {start}\n", std::process::id()).as_bytes()).expect("notes");
}

/// Enough chance to vary a tree, the same for the same seed (xorshift64).
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

/// A family of processes of all kinds.
fn grow(dice: &mut Dice, depth: u32, path: &str) {
    note(path);
    if depth == 3 {
        return;
    }
    for _ in 0..dice.below(3) + u64::from(depth == 0) {
        let seed = dice.below(1 << 40) * 2 + 1;
        if fork() != 0 {
            continue;
        }
        let mut dice = Dice(seed);
        match dice.below(4) {
            0 => drop(setsid()),
            1 => daemonize(),
            _ => {}
        }
        match dice.below(8) {
            0 | 1 => sys::ignore_signal(libc::SIGTERM),
            2 => handle(libc::SIGTERM, fork_once),
            3 => handle(libc::SIGTERM, flee),
            // Stopped: only SIGCONT or SIGKILL wakes it.
            4 if depth > 0 => {
                note(path);
                // SAFETY: takes an integer.
                unsafe { libc::raise(libc::SIGSTOP) };
            }
            _ => {}
        }
        grow(&mut dice, depth + 1, path);
        if dice.below(4) == 0 {
            // Its children are orphans.
            exit(0);
        }
        pause();
    }
}
