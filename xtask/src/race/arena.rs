//! The place where commands kill: the hidden verb `arena`. What is killed here is in here.
//!
//! Before anything is started, this process leaves the namespaces that it came in, and forks the director as the first
//! process of a pid namespace. Why nothing outside can be hit, even by a command that signals whatever it likes:
//! - **kill(2), pidfd_open(2), tgkill(2)** find processes by numbers of the caller's pid namespace and below: a process
//!   outside has no number there. `kill(-1)` reaches the namespace alone. /proc is mounted anew, so no number of outside
//!   can be read either. The director is the namespace's init, to which its own processes can send nothing that it does
//!   not handle; when it ends, by whatever, the kernel ends all the others, and it ends with the one who started it.
//! - **Asking others to kill**, such as dockerd or systemd, takes a socket. The network namespace is new, which
//!   separates TCP, UDP and abstract unix sockets; /run and /var/run, where those of the file system are, are hidden
//!   under an empty file system; the environment, which could name others, is cleared.
//! - **Ports** are those of the new network namespace, which has a loopback device and nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use fastrand::Rng;
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Uid, fork, getgid, getppid, getuid};
use serde_json::json;

use super::Contender;
use super::board::Board;
use super::cast::Part;
use super::judge::Verdict;
use super::round::{MOVES, Move, Round, play_round};

/// What a command takes before any was measured.
const FIRST_SPAN: Duration = Duration::from_millis(30);

/// Complaints that are told in full.
const TOLD: usize = 3;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    contender: Contender,
    #[arg(long)]
    rounds: usize,
    #[arg(long)]
    seed: u64,
    /// Seconds after which no round is begun
    #[arg(long)]
    limit: u64,
}

/// Plays the rounds in namespaces of their own, and prints the tally as JSON.
pub(crate) fn run(args: &Args) -> Result<()> {
    let starter = getppid();
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != starter {
        bail!("orphaned before the death signal was set");
    }
    leave_namespaces().context("cannot make namespaces")?;
    // SAFETY: this process has one thread, so that the child may go on as any program would.
    match unsafe { fork() }.context("cannot fork the director")? {
        ForkResult::Parent { child } => match waitpid(child, None).context("cannot wait for the director")? {
            WaitStatus::Exited(_, 0) => Ok(()),
            status => bail!("the director ended with {status:?}"),
        },
        ForkResult::Child => {
            let directed = prctl::set_pdeathsig(Signal::SIGKILL)
                .context("cannot set the death signal")
                .and_then(|()| settle())
                .and_then(|()| direct(args));
            if let Err(error) = &directed {
                eprintln!("xtask: arena: {error:#}");
            }
            std::process::exit(i32::from(directed.is_err()))
        }
    }
}

fn leave_namespaces() -> Result<()> {
    let (uid, gid) = (getuid(), getgid());
    let mut flags = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    if !Uid::effective().is_root() {
        // Root of a user namespace may do all that is needed here.
        flags |= CloneFlags::CLONE_NEWUSER;
    }
    unshare(flags)?;
    if flags.contains(CloneFlags::CLONE_NEWUSER) {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    }
    Ok(())
}

/// As the first process of the namespaces: /proc, the loopback device, no sockets of outside.
fn settle() -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot keep mounts to ourselves")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("cannot mount /proc")?;
    for path in ["/run", "/var/run"].map(Path::new) {
        if path.is_dir() && !path.is_symlink() {
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), none).context("cannot hide /run")?;
        }
    }
    raise_loopback().context("cannot bring lo up")?;
    // For whoever is born here: see the module `cast`.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None).context("cannot block signals")?;
    Ok(())
}

fn raise_loopback() -> Result<()> {
    let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l', b'o'].map(|byte| byte as libc::c_char));
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the kernel reads one ifreq.
    nix::errno::Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })?;
    Ok(())
}

/// What came of all rounds, by what the adversary did.
#[derive(Default)]
struct Tally {
    rounds: usize,
    bystanders: usize,
    recycled: usize,
    /// By part.
    hits: BTreeMap<String, usize>,
    rounds_with_hits: usize,
    lies: usize,
    overtaken: usize,
    oldest_look_ns: u64,
    coincidences: usize,
}

impl Tally {
    fn add(&mut self, round: &Round) {
        let verdict = &round.verdict;
        self.rounds += 1;
        self.bystanders += round.bystanders;
        self.recycled += round.recycled;
        for (part, _) in &verdict.hits {
            *self.hits.entry(name(*part).to_owned()).or_default() += 1;
        }
        self.rounds_with_hits += usize::from(!verdict.hits.is_empty());
        self.lies += usize::from(!verdict.lies.is_empty());
        self.overtaken += usize::from(verdict.overtaken.is_some());
        self.oldest_look_ns = self.oldest_look_ns.max(verdict.overtaken.unwrap_or(0));
        self.coincidences += verdict.coincidences;
    }

    fn figures(&self) -> serde_json::Value {
        json!({
            "rounds": self.rounds, "bystanders": self.bystanders, "recycled": self.recycled,
            "hit": self.hits.values().sum::<usize>(), "hit_by_part": self.hits,
            "rounds_with_hits": self.rounds_with_hits, "untruthful": self.lies,
            "overtaken": self.overtaken, "oldest_look_us": self.oldest_look_ns / 1000,
            "ended_of_themselves": self.coincidences
        })
    }
}

/// What a part is called in the tables.
fn name(part: Part) -> &'static str {
    match part {
        Part::Bystander => "other port",
        Part::Recycled => "recycled PID",
        Part::Client => "client",
        Part::Successor | Part::Restarted => "new owner",
        Part::Heir => "heir",
        Part::Holder => "child",
        Part::Neighbour => "neighbour",
    }
}

fn direct(args: &Args) -> Result<()> {
    let board = Board::new()?;
    let mut rng = Rng::with_seed(args.seed);
    let mut tallies: BTreeMap<Move, Tally> = BTreeMap::new();
    let mut whole = Tally::default();
    let mut times: Vec<f64> = Vec::new();
    let mut span = FIRST_SPAN;
    let mut told = 0;
    let started = Instant::now();
    for number in 0..args.rounds {
        if started.elapsed() > Duration::from_secs(args.limit) {
            break;
        }
        let of = MOVES[number % MOVES.len()];
        // Of its own, so that what a round does hangs on nothing that happened before.
        let mut own = Rng::with_seed(rng.u64(..));
        let round = play_round(board, &args.contender, of, span, &mut own)
            .with_context(|| format!("round {number} ({of:?}, --seed {})", args.seed))?;
        times.push(round.took.as_secs_f64() * 1e3);
        // Usual, not longest: a grace that runs out is not when things happen.
        if of == Move::Calm {
            span = span.mul_f64(0.9) + round.took.min(Duration::from_millis(200)).mul_f64(0.1);
        }
        if args.contender.is_ours() && !round.said.is_empty() && told < TOLD {
            told += 1;
            let Verdict { hits, lies, .. } = &round.verdict;
            eprintln!("round {number} ({of:?}, --seed {}): hit {hits:?}, said {lies:?}\n{}", args.seed, round.said);
        }
        tallies.entry(of).or_default().add(&round);
        whole.add(&round);
    }
    times.sort_by(f64::total_cmp);
    let mut figures = whole.figures();
    let median = times.get(times.len() / 2).copied().unwrap_or(0.0);
    figures["median_ms"] = json!((median * 10.0).round() / 10.0);
    figures["seconds"] = json!(started.elapsed().as_secs());
    figures["moves"] = tallies.iter().map(|(of, tally)| (format!("{of:?}").to_lowercase(), tally.figures())).collect();
    println!("{figures}");
    Ok(())
}
