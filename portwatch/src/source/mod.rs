//! Where facts come from: kernel programs ([`ebpf`]) where the kernel allows them, `sock_diag` and `/proc` elsewhere.
//!
//! Two ways to read: a [`Scanner`] reads one [`crate::model::Snapshot`] (`list`, `who`, `kill`), a [`Live`] source gives
//! events from now on (`watch`). Both try the best first by loading it, keep the reason why it was refused, and
//! go on with the next.

pub mod btf;
pub mod diag;
pub(crate) mod ebpf;
pub mod join;
pub mod netns;
pub mod origin;
pub mod process;
pub mod procfs;
pub mod released;
pub mod stat;
pub mod trial;

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use serde::{Deserialize, Serialize};

use crate::model::{BootNs, Event, Listener, NetnsId, Process, ProcessId, Snapshot, Socket, SocketId};

/// How listeners are learnt, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Fexit,
    Kprobe,
    Tracepoint,
    Poll,
}

impl Tier {
    pub const ALL: [Tier; 4] = [Tier::Fexit, Tier::Kprobe, Tier::Tracepoint, Tier::Poll];

    /// Whether the kernel tells of changes by itself.
    pub fn is_event_driven(self) -> bool {
        self != Tier::Poll
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Tier::Fexit => "fexit",
            Tier::Kprobe => "kprobe",
            Tier::Tracepoint => "tracepoint",
            Tier::Poll => "poll",
        })
    }
}

/// Which tiers may be tried: `auto`, or one by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    Auto,
    Only(Tier),
}

impl FromStr for Probe {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        if s == "auto" {
            return Ok(Probe::Auto);
        }
        Tier::ALL
            .into_iter()
            .find(|tier| tier.to_string() == s)
            .map(Probe::Only)
            .ok_or_else(|| format!("no probe '{s}'; use auto, fexit, kprobe, tracepoint or poll"))
    }
}

/// Why a tier (or a part of one) is not in use, as a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub tier: Tier,
    pub reason: String,
}

/// Reads snapshots, by the iterator where the kernel lets it be loaded, else from sock_diag and /proc.
pub struct Scanner {
    walk: Option<ebpf::Walk>,
    refusal: Option<String>,
    notes: Vec<String>,
}

impl fmt::Debug for Scanner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scanner").field("method", &self.method()).field("refusal", &self.refusal).finish()
    }
}

impl Scanner {
    /// Never fails: what is refused is kept as a reason, and /proc serves.
    pub fn open(probe: Probe) -> Scanner {
        if probe == Probe::Only(Tier::Poll) {
            return Scanner { walk: None, refusal: None, notes: Vec::new() };
        }
        Scanner::with_kernel(ebpf::Kernel::open().as_ref())
    }

    fn with_kernel(kernel: Result<&ebpf::Kernel, &anyhow::Error>) -> Scanner {
        let walk = match kernel {
            Ok(kernel) => ebpf::Walk::open(kernel).map_err(|error| format!("{error:#}")),
            Err(error) => Err(format!("{error:#}")),
        };
        match walk {
            Ok(walk) => Scanner { walk: Some(walk), refusal: None, notes: Vec::new() },
            Err(reason) => Scanner { walk: None, refusal: Some(reason), notes: Vec::new() },
        }
    }

    /// How holders are found: `task_file iterator` or `/proc`.
    pub fn method(&self) -> &'static str {
        if self.walk.is_some() { "task_file iterator" } else { "/proc" }
    }

    /// Why the iterator is not used, if it was tried.
    pub fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// What the latest scan could not see, as sentences for people.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Reads every listener that `keep` wants and who holds it: held ones of all network namespaces and ghosts of the
    /// caller's own; with `all_netns`, ghosts of every namespace that can be entered, too.
    pub fn scan(&mut self, all_netns: bool, keep: &dyn Fn(&Socket) -> bool) -> anyhow::Result<Snapshot> {
        self.scan_with(all_netns, keep, &|_| true, &mut |id| {
            Arc::new(process::read_exact(id).unwrap_or_else(|| Process::bare(id, "?")))
        })
    }

    /// Reads the listeners of one network namespace, or of all that can be seen (`None`), that `keep` wants, and who holds
    /// them. Of others there may be some, too.
    ///
    /// # Errors
    /// [`netns::Unknown`] where nothing shows that there is such a namespace, and `PermissionDenied` in the chain where the
    /// caller may not look into it: what cannot be seen must not pass for nothing.
    pub fn scan_in(&mut self, wanted: Option<NetnsId>, keep: &dyn Fn(&Socket) -> bool) -> anyhow::Result<Snapshot> {
        let own = netns::own().ok();
        let Some(id) = wanted.filter(|wanted| Some(*wanted) != own) else { return self.scan(wanted.is_none(), keep) };
        // One that nobody is in any more may live on by a socket that somebody holds.
        let is_seen = Cell::new(false);
        let snapshot = self.scan(true, &|socket| {
            is_seen.set(is_seen.get() || socket.netns == id);
            keep(socket)
        })?;
        if !snapshot.complete.contains(&id) && !is_seen.get() {
            netns::check(id)?;
        }
        Ok(snapshot)
    }

    /// TCP sockets that are bound and do not listen, of any network namespace, as far as somebody visible holds them.
    /// Empty where the iterator does not serve: `/proc` tells nothing of such sockets.
    pub fn bound(&mut self, keep: &dyn Fn(&Socket) -> bool) -> anyhow::Result<Vec<Listener>> {
        let Some(walk) = &mut self.walk else { return Ok(Vec::new()) };
        let walked = walk.read_bound(keep)?;
        Ok(join::join(walked.sockets, walked.held, |id| {
            Arc::new(process::read_exact(id).unwrap_or_else(|| Process::bare(id, "?")))
        }))
    }

    /// `is_bound` decides about UDP sockets that may have been bound to port 0 of every address, or be clients.
    fn scan_with(
        &mut self,
        all_netns: bool,
        keep: &dyn Fn(&Socket) -> bool,
        is_bound: &dyn Fn(SocketId) -> bool,
        details: &mut dyn FnMut(ProcessId) -> Arc<Process>,
    ) -> anyhow::Result<Snapshot> {
        let Some(walk) = &mut self.walk else {
            let scan = procfs::scan(all_netns, keep)?;
            self.notes = scan.notes;
            return Ok(scan.snapshot);
        };
        let at = process::boot_ns_now();
        // Sockets first: one that only the walk sees is newer. One that only netlink sees has no visible holder, or
        // was closed in between: hence the second look.
        let others = if all_netns { netns::visible()? } else { netns::Namespaces::default() };
        let dumped = procfs::dump_all(&others, keep, diag::dump)?;
        self.notes = dumped.notes;
        let mut walked = walk.read(keep)?;
        let seen: HashSet<u64> = walked.sockets.iter().map(|socket| socket.id.inode).collect();
        let mut ghosts = dumped.sockets;
        ghosts.retain(|ghost| !seen.contains(&ghost.id.inode) && !walked.others.contains(&ghost.id.inode));
        if !ghosts.is_empty() {
            let still = procfs::dump_all(&others, keep, diag::dump_roughly)?;
            let still: HashSet<u64> = still.sockets.iter().map(|socket| socket.id.inode).collect();
            ghosts.retain(|ghost| still.contains(&ghost.id.inode));
        }
        walked.sockets.retain(|socket| !walked.unmarked.contains(&socket.id.inode) || is_bound(socket.id));
        walked.sockets.extend(ghosts);
        let listeners = join::join(walked.sockets, walked.held, details);
        Ok(Snapshot { at, listeners, complete: dumped.complete, lost: 0 })
    }
}

/// Events from now on.
pub struct Live {
    feed: Feed,
    scanner: Scanner,
    refusals: Vec<Refusal>,
    /// Whether the first snapshot has been read.
    started: bool,
    /// How it was opened.
    probe: Probe,
    ring_bytes: Option<u32>,
    /// Records lost by the probes that these replaced.
    lost_before: u64,
    /// Those of them that no snapshot has made good.
    unmended: u64,
    /// When to look for what the kernel does not tell.
    look_at: tokio::time::Instant,
}

/// What a live source tells at once.
#[derive(Debug, Default)]
pub struct Batch {
    pub events: Vec<Event>,
    /// Records that the kernel could not deliver.
    pub lost: u64,
    /// The events do not tell all: a snapshot must be read.
    pub must_refresh: bool,
}

enum Feed {
    Ebpf(Box<ebpf::Probes>),
    Poll(tokio::time::Interval),
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").field("tier", &self.tier()).field("scanner", &self.scanner).finish_non_exhaustive()
    }
}

/// How often the poll tier reads a snapshot.
pub const POLL_INTERVAL: Duration = Duration::from_millis(500);

impl Live {
    /// Attaches the best probes that the kernel allows among those asked for. `ring_bytes` overrides the size of the
    /// event ring (a power of two of at least a page). Must be called in a tokio runtime.
    pub fn open(probe: Probe, ring_bytes: Option<u32>) -> anyhow::Result<Live> {
        let mut refusals = Vec::new();
        let kernel = if probe == Probe::Only(Tier::Poll) { None } else { Some(ebpf::Kernel::open()) };
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_event_driven()) {
            if probe != Probe::Auto && probe != Probe::Only(tier) {
                continue;
            }
            let probes = match &kernel {
                Some(Ok(kernel)) => ebpf::Probes::open(kernel, tier, ring_bytes),
                Some(Err(error)) => Err(anyhow!("{error:#}")),
                None => break,
            };
            match probes {
                Ok(probes) => {
                    refusals.extend_from_slice(probes.gaps());
                    let scanner = match &kernel {
                        Some(kernel) => Scanner::with_kernel(kernel.as_ref()),
                        None => Scanner::open(Probe::Only(Tier::Poll)),
                    };
                    let feed = Feed::Ebpf(Box::new(probes));
                    return Ok(Live::new(feed, scanner, refusals, probe, ring_bytes));
                }
                Err(error) => refusals.push(Refusal { tier, reason: format!("{error:#}") }),
            }
        }
        if let Probe::Only(tier) = probe
            && tier.is_event_driven()
        {
            let reason = refusals.pop().map(|refusal| refusal.reason).unwrap_or_default();
            let sentence = format!("--probe {tier} is not to be had: {reason}; leave out --probe to use the next best");
            let is_denied = |error: &anyhow::Error| {
                error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
            };
            let denied = kernel.is_some_and(|kernel| kernel.is_err_and(|error| is_denied(&error)));
            let kind = if denied { io::ErrorKind::PermissionDenied } else { io::ErrorKind::Unsupported };
            return Err(io::Error::new(kind, sentence).into());
        }
        let mut interval = tokio::time::interval(POLL_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let scanner = match kernel {
            Some(kernel) => Scanner::with_kernel(kernel.as_ref()),
            None => Scanner::open(Probe::Only(Tier::Poll)),
        };
        let feed = Feed::Poll(interval);
        Ok(Live::new(feed, scanner, refusals, probe, ring_bytes))
    }

    fn new(feed: Feed, scanner: Scanner, refusals: Vec<Refusal>, probe: Probe, ring_bytes: Option<u32>) -> Live {
        let look_at = tokio::time::Instant::now();
        Live { feed, scanner, refusals, started: false, probe, ring_bytes, lost_before: 0, unmended: 0, look_at }
    }

    pub fn tier(&self) -> Tier {
        match &self.feed {
            Feed::Ebpf(probes) => probes.tier(),
            Feed::Poll(_) => Tier::Poll,
        }
    }

    /// Why better tiers are not in use, and which parts of this one are missing.
    pub fn refusals(&self) -> &[Refusal] {
        &self.refusals
    }

    /// How holders are found.
    pub fn method(&self) -> &'static str {
        self.scanner.method()
    }

    /// Records that the kernel could not deliver since the start.
    pub fn lost(&self) -> u64 {
        let lost = match &self.feed {
            Feed::Ebpf(probes) => probes.lost(),
            Feed::Poll(_) => 0,
        };
        self.lost_before + lost
    }

    /// Whether somebody took a probe off, so that the kernel does not tell all any more: a [`Self::refresh`] attaches all of
    /// them anew. Nothing tells of it by itself.
    pub fn is_broken(&self) -> bool {
        matches!(&self.feed, Feed::Ebpf(probes) if probes.is_broken())
    }

    /// Attaches all probes anew where one was taken off. What that may have cost nobody counted: it is one record or more.
    fn mend(&mut self) -> anyhow::Result<()> {
        if self.is_broken() {
            let anew =
                Live::open(self.probe, self.ring_bytes).context("a probe was taken off and cannot be attached anew")?;
            *self = Live { lost_before: self.lost() + 1, unmended: self.unmended + 1, ..anew };
        }
        Ok(())
    }

    /// What happened next, and how many records were lost before now: more than 0 demands a [`Self::refresh`], as the
    /// poll tier does always. Cancel safe.
    pub async fn next(&mut self) -> anyhow::Result<Batch> {
        match &mut self.feed {
            Feed::Ebpf(probes) => {
                let told = if probes.sees_udp() {
                    probes.next().await
                } else {
                    // UDP has to be looked for, however much else is told.
                    let is_due = tokio::time::Instant::now() >= self.look_at;
                    let told =
                        if is_due { None } else { tokio::time::timeout_at(self.look_at, probes.next()).await.ok() };
                    let Some(told) = told else {
                        self.look_at = tokio::time::Instant::now() + POLL_INTERVAL;
                        return Ok(Batch { must_refresh: true, ..Batch::default() });
                    };
                    told
                };
                let (events, lost) = told?;
                Ok(Batch { events, lost, must_refresh: lost > 0 })
            }
            Feed::Poll(interval) => {
                interval.tick().await;
                Ok(Batch { events: Vec::new(), lost: 0, must_refresh: true })
            }
        }
    }

    /// What the kernel has told by now, at least until `at`; nothing where it tells nothing.
    pub fn pending(&mut self, at: BootNs) -> Vec<Event> {
        match &mut self.feed {
            Feed::Ebpf(probes) => probes.pending(at),
            Feed::Poll(_) => Vec::new(),
        }
    }

    /// Records that the kernel could not deliver, since this was last told here or by [`Self::next`]: more than 0 demands
    /// a [`Self::refresh`].
    pub fn losses(&mut self) -> u64 {
        match &mut self.feed {
            Feed::Ebpf(probes) => probes.losses(),
            Feed::Poll(_) => 0,
        }
    }

    /// Ends to report the forks and execs of a process that holds nothing.
    pub fn unfollow(&mut self, id: ProcessId) {
        if let Feed::Ebpf(probes) = &mut self.feed {
            probes.unfollow(id.pid);
        }
    }

    /// What was read of a process anew, so that no snapshot takes it back.
    pub fn learn(&mut self, process: &Arc<Process>) {
        if let Feed::Ebpf(probes) = &mut self.feed {
            probes.learn(process);
        }
    }

    /// Reads a snapshot now. `holders` are the processes that hold something as far as is known, by pid: the kernel
    /// goes on to report these, and those that the snapshot adds.
    ///
    /// Events that came until the snapshot was read are returned before it: it shows that a socket is gone, they tell
    /// who closed it and when. Where they are newer than the beginning of the snapshot, the table believes them.
    pub fn refresh(&mut self, holders: &HashSet<u32>, lost: u64) -> anyhow::Result<Vec<Event>> {
        self.mend()?;
        let lost = lost + self.unmended;
        let mut is_sure = true;
        let mut snapshot = match &mut self.feed {
            Feed::Ebpf(probes) => {
                probes.follow_only(holders, lost > 0);
                // Only after a loss does it matter which sockets without holder other namespaces have: of all others
                // the kernel has told.
                let first = !self.started;
                let all_netns = lost > 0 || first;
                if lost > 0 {
                    probes.recall_udp();
                }
                let probes = RefCell::new(probes);
                let mut scan = || {
                    self.scanner.scan_with(
                        all_netns,
                        &|_| true,
                        &|id| first || probes.borrow().knows_udp(id),
                        &mut |id| probes.borrow_mut().details(id),
                    )
                };
                let mut snapshot = scan()?;
                let follow = |snapshot: &Snapshot| probes.borrow_mut().follow(&snapshot.listeners, lost > 0);
                if follow(&snapshot) {
                    // What somebody new did between this look and now, nobody tells.
                    snapshot = scan()?;
                    is_sure = !follow(&snapshot);
                }
                snapshot
            }
            Feed::Poll(_) => self.scanner.scan(true, &|_| true)?,
        };
        // With none left, what was read may lack what could not be opened.
        process::check_descriptors().context("no descriptors left to read it by")?;
        (self.started, self.unmended) = (true, 0);
        snapshot.lost = lost;
        let at = process::boot_ns_now();
        let mut events = self.pending(at);
        events.push(Event::Snapshot(snapshot));
        if !is_sure {
            events.push(Event::Unsure { at });
        }
        Ok(events)
    }
}

/// What this machine allows, found by trying.
#[derive(Clone, Debug, Serialize)]
pub struct Availability {
    pub tier: Tier,
    pub refusals: Vec<Refusal>,
    pub holders: String,
}

/// Tries the tiers as `watch` would, and lets go of them again.
pub fn availability(probe: Probe) -> anyhow::Result<Availability> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _guard = runtime.enter();
    let live = Live::open(probe, None)?;
    Ok(Availability { tier: live.tier(), refusals: live.refusals().to_vec(), holders: live.method().to_owned() })
}
