//! What the agent and its clients say to one another: one JSON object a line, in both directions. Pure.
//!
//! ```text
//!  client                                agent
//!  {"request":"hello","version":1}   ──►
//!                                    ◄──  {"response":"hello","version":1,"tier":"fexit",…}
//!  {"request":"list","selection":…}  ──►
//!                                    ◄──  {"response":"listener",…}   as many as there are
//!                                    ◄──  {"response":"end","count":2}
//! ```
//! A request is answered before the next one is read. Every answer ends with `end` or `error`; that of `watch` ends
//! with the connection, and that of `kill` may wait for a `confirm` in between and be cut short by `stop`. Requests are
//! bounded to [`MAX_REQUEST`] bytes; no answer's line is longer than a listener, or the plan of a kill.
//! Times are nanoseconds since boot of the host that both share.

mod kill;

use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::time::Duration;

use globset::GlobMatcher;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

pub use self::kill::{Kill, MAX_WAIT_MS, Told};
use crate::engine::Wanted;
use crate::history::{Health, Life, Utc};
use crate::kill::{Concern, Plan, Step};
use crate::mark::Mark;
use crate::model::{Ancestor, BootNs, Change, Listener, NetnsId, ProcessId};
use crate::rules;
use crate::select::{Filters, Selector, Sets, Since, Target, cgroup_path, glob, parse_targets, unit_glob};
use crate::source::{Refusal, Tier};

/// The version of this protocol. Additions do not change it; a client that meets another version does its work itself.
pub const VERSION: u32 = 1;

/// The longest line that the agent reads, in bytes.
pub const MAX_REQUEST: usize = 64 << 10;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// The first of every connection.
    Hello { version: u32 },
    /// The listeners that the selection picks, each a `listener`.
    List {
        #[serde(default, deserialize_with = "object")]
        selection: Selection,
    },
    /// The same, with the ancestors of each holder.
    Who {
        #[serde(default, deserialize_with = "object")]
        selection: Selection,
    },
    /// The listeners that the selection picks, a `watching`, and from then on every change to them.
    Watch {
        #[serde(default, deserialize_with = "object")]
        selection: Selection,
        /// What happened from this time on (ns since 1970, UTC) until now is told first, each a `past`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        since: Option<Utc>,
    },
    /// The agent's health.
    Status {},
    /// The agent's rules, each a `rule`.
    Rules {},
    /// Who had the ports that the selection picks, the latest first, each a `life`.
    History {
        #[serde(default, deserialize_with = "object")]
        selection: Selection,
        /// Only what was open at this time or later, in ns since 1970 (UTC).
        #[serde(default)]
        from: Utc,
        limit: usize,
    },
    /// Marks what is listening now and keeps it under this name for the user who asks; the answer is the `mark`.
    Mark { name: String },
    /// The `mark` that this user has under this name.
    Marked { name: String },
    /// Free the ports that the selection picks. Whom the peer may not signal is left alone.
    Kill(Box<Kill>),
    /// Carry out the plan that was just told.
    Confirm {},
    /// Signal nobody any more in the kill that is under way, and tell what became of its ports by now.
    Stop {},
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    Hello {
        version: u32,
        /// Of the agent's program.
        program: String,
        pid: u32,
        tier: Tier,
    },
    Listener {
        #[serde(flatten)]
        listener: Listener,
        /// Of each holder, in the order of `holders`: nearest first. In answers to `who`.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ancestors: Vec<Vec<Ancestor>>,
        /// Of the binder when it opened, nearest first, those that have ended since among them. In answers to `who`, where
        /// the agent saw it open.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        lineage: Vec<Ancestor>,
    },
    /// A change from before watching began, as the history has it: every time in it is in ns since 1970, UTC, and of the
    /// holders only the binder is known. In the answer to `watch` with `since`: oldest first, before everything else.
    Past {
        #[serde(flatten)]
        change: Change,
    },
    /// All that was open when watching began has been told; changes follow.
    Watching {
        at: BootNs,
        /// Whether a limit left out the oldest of the past.
        #[serde(default, skip_serializing_if = "is_false")]
        more: bool,
        /// Whether this user is told of their own listeners only.
        #[serde(default, skip_serializing_if = "is_false")]
        narrowed: bool,
    },
    Change {
        #[serde(flatten)]
        change: Change,
    },
    /// The client did not read fast enough: so many changes were left out. Every listener follows anew, then `watching`.
    Lagged {
        lost: u64,
    },
    Status(Status),
    Life(Box<Life>),
    Mark {
        /// `null`: there is none of that name.
        mark: Option<Box<Mark>>,
    },
    /// What a kill would do. The holders of its listeners are left out: they are its victims, and those refused.
    Plan {
        plan: Box<Plan>,
        /// What a person should think about before.
        concerns: Vec<Concern>,
    },
    /// What happens to a process during a kill.
    Progress {
        pid: u32,
        /// Hostile text.
        name: String,
        #[serde(flatten)]
        step: Step,
    },
    /// What became of a port.
    Outcome(Box<Told>),
    Rule(Box<rules::State>),
    /// The answer takes its time, and is worked on. Told again and again until it begins; counts as nothing.
    Working {},
    /// The answer is complete.
    End {
        count: usize,
        /// Whether a limit left something out.
        #[serde(default, skip_serializing_if = "is_false")]
        more: bool,
        /// Whether what is not of this user was left out, whatever was asked for.
        #[serde(default, skip_serializing_if = "is_false")]
        narrowed: bool,
    },
    Error {
        kind: ErrorKind,
        message: String,
        /// With `usage`: the network namespace that the selection names and the agent finds nothing of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        netns: Option<NetnsId>,
    },
}

impl Request {
    /// What a line says.
    ///
    /// # Errors
    /// What it should have said.
    pub fn read(line: &str) -> serde_json::Result<Request> {
        let mut line = serde_json::Deserializer::from_str(line);
        let request = object(&mut line)?;
        line.end()?;
        Ok(request)
    }

    /// The line that says it.
    ///
    /// # Errors
    /// A sentence: it is more than an agent takes.
    pub fn line(&self) -> Result<String, String> {
        let selection = match self {
            Request::List { selection }
            | Request::Who { selection }
            | Request::Watch { selection, .. }
            | Request::History { selection, .. } => Some(selection),
            Request::Kill(kill) => Some(&kill.selection),
            _ => None,
        };
        selection.map_or(Ok(()), Selection::check_bounds)?;
        let line = serde_json::to_string(self).map_err(|error| error.to_string())?;
        if line.len() > MAX_REQUEST {
            return Err(format!("this would be a request of {} bytes; it takes {MAX_REQUEST}", line.len()));
        }
        Ok(line)
    }
}

/// An object and nothing else: serde would take an array, too, for the values of an object without their names, and an
/// empty one for a selection that picks everything.
fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    struct Object<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(entries))
        }
    }

    from.deserialize_map(Object(PhantomData))
}

/// What a program does about an error; the message is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request means nothing.
    Usage,
    /// The agent speaks another version.
    Version,
    /// Not permitted to this user.
    Denied,
    /// Too many connections or requests; try again later.
    Busy,
    /// The agent itself failed.
    Failed,
}

/// The agent's health.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub program: String,
    pub pid: u32,
    pub tier: Tier,
    pub reasons: Vec<Refusal>,
    /// How holders are found.
    pub holders: String,
    pub uptime_ns: u64,
    pub listeners: usize,
    pub opens: u64,
    pub closes: u64,
    pub conflicts: u64,
    pub resyncs: u64,
    /// Events that the kernel could not deliver.
    pub dropped: u64,
    pub connections: usize,
    pub subscribers: usize,
    /// Resident memory of the agent in bytes.
    pub memory: u64,
    /// What is not as it should be, as sentences for people. History tells its own.
    #[serde(default)]
    pub troubles: Vec<String>,
    /// `null` where none is kept.
    pub history: Option<Health>,
}

/// A [`Selector`] as it is sent: what names mean was found out by the client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Selection {
    /// As on the command line, without sets.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,
    #[serde(skip_serializing_if = "is_false")]
    pub ipv4: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub ipv6: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub tcp: bool,
    #[serde(skip_serializing_if = "is_false")]
    pub udp: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub uids: Vec<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pids: Vec<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub commands: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cwds: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub units: Vec<String>,
    /// Looked up by the client, for whom an engine may answer that does not for the agent.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<Wanted>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub older_than_ms: Option<u64>,
    /// The moment in ns since boot, and what is judged by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Since>,
    /// `NAME` or `NAME=VALUE`. Of processes of others than the user who asks, the agent tells root alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// By pid and start, so that nobody who has the pid later is taken for it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub descendants_of: Vec<ProcessId>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cgroups: Vec<String>,
    #[serde(skip_serializing_if = "is_false")]
    pub orphans: bool,
    /// As `targets`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub except: Vec<String>,
    #[serde(skip_serializing_if = "Scope::is_own")]
    pub netns: Scope,
}

/// Which network namespaces are meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// That of the process which opened the connection.
    #[default]
    Own,
    All,
    #[serde(untagged)]
    Id(NetnsId),
}

impl Scope {
    fn is_own(&self) -> bool {
        *self == Scope::Own
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

impl Selection {
    pub fn of(selector: &Selector) -> Selection {
        let filters = selector.filters();
        let texts = |globs: &[GlobMatcher]| globs.iter().map(|glob| glob.glob().glob().to_owned()).collect();
        Selection {
            targets: selector.targets().iter().map(ToString::to_string).collect(),
            ipv4: filters.ipv4,
            ipv6: filters.ipv6,
            tcp: filters.tcp,
            udp: filters.udp,
            addresses: filters.addresses.clone(),
            uids: filters.uids.clone(),
            pids: filters.pids.clone(),
            commands: texts(&filters.commands),
            cwds: texts(&filters.cwds),
            units: texts(&filters.units),
            containers: filters.containers.clone(),
            older_than_ms: filters.older_than.map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            since: filters.since,
            env: filters.variables.iter().map(ToString::to_string).collect(),
            descendants_of: filters.descendants_of.clone(),
            cgroups: filters.cgroups.clone(),
            orphans: filters.orphans,
            except: filters.except.iter().map(ToString::to_string).collect(),
            netns: filters.netns.map_or(Scope::All, Scope::Id),
        }
    }

    /// Whether an agent takes so much.
    fn check_bounds(&self) -> Result<(), String> {
        // Only words that are many may be too many: one names one target here.
        if self.targets.len().max(self.except.len()) > MAX_ADDRESSES {
            read_targets("targets", &self.targets, MAX_TARGETS)?;
            read_targets("exceptions", &self.except, MAX_NUMBERS)?;
        }
        self.check_lists()
    }

    /// The same of all but targets and exceptions.
    fn check_lists(&self) -> Result<(), String> {
        bounded("addresses", self.addresses.len(), MAX_ADDRESSES)?;
        bounded("uids", self.uids.len(), MAX_NUMBERS)?;
        bounded("pids", self.pids.len(), MAX_NUMBERS)?;
        for globs in [&self.commands, &self.cwds, &self.units] {
            bounded("globs of one kind", globs.len(), MAX_OF_ONE_KIND)?;
        }
        bounded("variables", self.env.len(), MAX_OF_ONE_KIND)?;
        bounded("ancestors", self.descendants_of.len(), MAX_OF_ONE_KIND)?;
        bounded("cgroups", self.cgroups.len(), MAX_OF_ONE_KIND)?;
        bounded("containers", self.containers.len(), MAX_OF_ONE_KIND)?;
        bounded("ports and addresses of containers", self.containers.iter().map(parts).sum(), MAX_NUMBERS)
    }

    /// What it picks; `own` is the network namespace of the peer, where that is known. It knows no [`crate::select::Facts`].
    ///
    /// # Errors
    /// A sentence that names the part which means nothing.
    pub fn selector(&self, own: Option<NetnsId>) -> Result<Selector, String> {
        let targets = read_targets("targets", &self.targets, MAX_TARGETS)?;
        let except = read_targets("exceptions", &self.except, MAX_NUMBERS)?;
        self.check_lists()?;
        let netns = match self.netns {
            Scope::Own => Some(own.ok_or("your network namespace cannot be read; name one by its number, or all")?),
            Scope::All => None,
            Scope::Id(id) => Some(id),
        };
        Ok(Selector::new(
            targets,
            Filters {
                ipv4: self.ipv4,
                ipv6: self.ipv6,
                tcp: self.tcp,
                udp: self.udp,
                addresses: self.addresses.clone(),
                uids: self.uids.clone(),
                pids: self.pids.clone(),
                commands: globs(&self.commands, glob)?,
                cwds: globs(&self.cwds, glob)?,
                units: globs(&self.units, unit_glob)?,
                containers: self.containers.clone(),
                older_than: self.older_than_ms.map(Duration::from_millis),
                since: self.since,
                variables: self
                    .env
                    .iter()
                    .map(|text| text.parse().map_err(|why| format!("bad variable: {why}")))
                    .collect::<Result<_, _>>()?,
                descendants_of: self.descendants_of.clone(),
                cgroups: self.cgroups.iter().map(|path| cgroup_path(path)).collect::<Result<_, _>>()?,
                orphans: self.orphans,
                except,
                netns,
            },
        ))
    }
}

/// A client may not make the agent keep more than this: globs, each compiled to a matcher that it keeps while it watches,
/// and what it has to compare every holder with.
const MAX_OF_ONE_KIND: usize = 64;

/// Numbers: the task that owns the table compares every listener with each, which is soon done.
const MAX_NUMBERS: usize = 1024;

/// Addresses, and targets with one: the same, and not so soon done.
const MAX_ADDRESSES: usize = 512;

/// Targets: those without an address are one look-up whatever their number, but kept while a client watches.
const MAX_TARGETS: usize = 4096;

fn bounded(what: &str, count: usize, most: usize) -> Result<(), String> {
    if count > most {
        return Err(format!("{count} {what}; a selection may have {most}"));
    }
    Ok(())
}

fn read_targets(what: &str, words: &[String], most: usize) -> Result<Vec<Target>, String> {
    let targets = parse_targets(words, &Sets::new()).map_err(|bad| bad.to_string())?;
    bounded(what, targets.len(), most)?;
    let placed = targets.iter().filter(|target| target.address.is_some()).count();
    bounded(&format!("{what} with an address"), placed, MAX_ADDRESSES)?;
    Ok(targets)
}

/// What has to be looked through of one container.
fn parts(wanted: &Wanted) -> usize {
    match wanted {
        Wanted::Container(container) => container.ports.len() + container.addresses.len(),
        Wanted::IdPrefix(_) => 0,
    }
}

/// As much of a bad glob as an error shows, in characters.
const SHOWN_GLOB: usize = 80;

fn globs(texts: &[String], compile: fn(&str) -> Result<GlobMatcher, String>) -> Result<Vec<GlobMatcher>, String> {
    let bad = |text: &str, why| {
        let shown: String = text.chars().take(SHOWN_GLOB).collect();
        format!("bad glob '{}': {why}", shown.escape_debug())
    };
    texts.iter().map(|text| compile(text).map_err(|why| bad(text, why))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_survives_the_wire() {
        let targets = parse_targets(&["3000-3005/tcp", "[::1]:8000", "53"], &Sets::new()).unwrap();
        let glob = |text: &str| glob(text).unwrap();
        let filters = Filters {
            ipv4: true,
            udp: true,
            addresses: vec!["::1".parse().unwrap()],
            uids: vec![0, 1000],
            pids: vec![7],
            commands: vec![glob("*python*")],
            cwds: vec![glob("/tmp/{a,b}*")],
            // A backslash is part of a unit's name.
            units: vec![unit_glob(r"my\x2dweb*").unwrap()],
            containers: vec![Wanted::IdPrefix("5eed".to_owned())],
            older_than: Some(Duration::from_secs(90)),
            since: Some(Since::Mark(12)),
            variables: vec!["CI".parse().unwrap(), "JOB=a=b c".parse().unwrap()],
            descendants_of: vec![ProcessId { pid: 7, start: 8 }],
            cgroups: vec!["/a.slice".to_owned()],
            orphans: true,
            except: parse_targets(&["3001", "[::1]:5-7/udp"], &Sets::new()).unwrap(),
            netns: Some(4_026_531_833),
            ..Filters::default()
        };
        let sent = Selection::of(&Selector::new(targets, filters));
        let line = serde_json::to_string(&sent).unwrap();
        let read: Selection = serde_json::from_str(&line).unwrap();
        assert_eq!(read, sent, "{line}");
        let selector = read.selector(None).unwrap();
        assert_eq!(Selection::of(&selector), sent);
        assert!(selector.filters().units[0].is_match(r"my\x2dweb.service"));
    }

    #[test]
    fn what_a_person_types_is_read() {
        let read = |line: &str| Request::read(line).map_err(|error| error.to_string());
        let list = |selection| Ok(Request::List { selection });
        assert_eq!(read(r#"{"request":"hello","version":1}"#), Ok(Request::Hello { version: 1 }));
        assert_eq!(read(r#"{"request":"list"}"#), list(Selection::default()));
        let all = Selection { netns: Scope::All, ..Selection::default() };
        assert_eq!(read(r#"{"request":"list","selection":{"netns":"all"}}"#), list(all));
        let one = Selection { targets: vec!["8000".into()], netns: Scope::Id(7), ..Selection::default() };
        assert_eq!(read(r#"{"request":"list","selection":{"targets":["8000"],"netns":7}}"#), list(one));
        assert_eq!(read(r#"{"request":"status"}"#), Ok(Request::Status {}));
        for wrong in [
            "",
            "{}",
            r#"{"request":"lisst"}"#,
            r#"{"request":"list","selection":{"port":8000}}"#,
            r#"{"request":"list","uid":0}"#,
            r#"{"request":"hello"}"#,
            "[1]",
            r#"["list"]"#,
            r#"["list",{}]"#,
            r#"{"request":"list","selection":[]}"#,
            r#"{"request":"kill","selection":[["8000"]]}"#,
            r#"{"request":"list"} {}"#,
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_means_nothing_is_named() {
        let error = |selection: Selection| selection.selector(Some(1)).unwrap_err();
        let targets = |target: &str| Selection { targets: vec![target.into()], ..Selection::default() };
        assert_eq!(error(targets("99999")), "'99999' is out of range; ports go from 1 to 65535");
        assert_eq!(error(targets("@dev")), "no set of ports is named '@dev'; known: none");
        let bad = Selection { cwds: vec!["[".into()], ..Selection::default() };
        assert!(error(bad).starts_with("bad glob '['"));
        let hostile = Selection { cwds: vec!["[\u{1b}-\u{7}]".into()], ..Selection::default() };
        assert_eq!(error(hostile), r"bad glob '[\u{1b}-\u{7}]': invalid range; '\x1b' > '\x07'");
        assert!(Selection::default().selector(None).is_err());
        // Compiling these would take all stack, or all memory.
        let commands = |commands: Vec<String>| Selection { commands, ..Selection::default() };
        assert!(error(commands(vec!["{".repeat(30_000) + &"}".repeat(30_000)])).contains("is too long"));
        assert!(error(commands(vec!["{a,".repeat(100) + &"}".repeat(100)])).contains("is too deep"));
        assert!(error(commands(vec!["*".to_owned(); 100])).contains("100 globs"));
    }

    #[test]
    fn a_request_that_no_agent_takes_is_not_made() {
        let list = |targets: Vec<String>| Request::List { selection: Selection { targets, ..Selection::default() } };
        let ports = |count: u16| (1..=count).map(|port| port.to_string()).collect::<Vec<_>>();
        assert!(list(ports(4096)).line().is_ok());
        assert_eq!(list(ports(4097)).line().unwrap_err(), "4097 targets; a selection may have 4096");
        let pids = Selection { pids: vec![1; 2000], ..Selection::default() };
        assert_eq!(Request::Who { selection: pids }.line().unwrap_err(), "2000 pids; a selection may have 1024");
        let long = Request::Mark { name: "x".repeat(MAX_REQUEST) }.line().unwrap_err();
        assert!(long.ends_with("bytes; it takes 65536"), "{long}");
        let fits = Request::Mark { name: "x".repeat(MAX_REQUEST - r#"{"request":"mark","name":""}"#.len()) };
        assert_eq!(fits.line().map(|line| line.len()), Ok(MAX_REQUEST));
    }

    #[test]
    fn every_list_of_a_selection_is_bounded() {
        use crate::engine::Container;

        let selection = Selection::default;
        let targets = |count: usize, address: &str| vec![format!("{address}1-65535"); count];
        let numbers = |count| -> Vec<u32> { (0..).take(count).collect() };
        let prefix = || Wanted::IdPrefix("5eed".to_owned());
        let within = |count: usize| {
            let (id, name, image) = ("5eed".repeat(16), "web".to_owned(), String::new());
            let addresses = vec!["::1".parse().unwrap(); count];
            vec![Wanted::Container(Box::new(Container { id, name, image, ports: Vec::new(), addresses }))]
        };
        type Long<'a> = &'a dyn Fn(usize) -> Selection;
        let lists: [(&str, usize, Long<'_>); 10] = [
            ("targets", MAX_TARGETS, &|n| Selection { targets: targets(n, ""), ..selection() }),
            // What one word lists counts as well.
            ("targets", MAX_TARGETS, &|n| Selection { targets: vec![targets(n, "").join(",")], ..selection() }),
            ("targets with an address", MAX_ADDRESSES, &|n| Selection {
                targets: targets(n, "127.0.0.1:"),
                ..selection()
            }),
            ("exceptions", MAX_NUMBERS, &|n| Selection { except: targets(n, ""), ..selection() }),
            ("exceptions with an address", MAX_ADDRESSES, &|n| Selection {
                except: targets(n, "127.0.0.1:"),
                ..selection()
            }),
            ("addresses", MAX_ADDRESSES, &|n| Selection { addresses: vec!["::".parse().unwrap(); n], ..selection() }),
            ("uids", MAX_NUMBERS, &|n| Selection { uids: numbers(n), ..selection() }),
            ("pids", MAX_NUMBERS, &|n| Selection { pids: numbers(n), ..selection() }),
            ("containers", MAX_OF_ONE_KIND, &|n| Selection { containers: vec![prefix(); n], ..selection() }),
            ("ports and addresses of containers", MAX_NUMBERS, &|n| Selection { containers: within(n), ..selection() }),
        ];
        for (what, most, of) in lists {
            assert!(of(most).selector(Some(1)).is_ok(), "{what}");
            let error = of(most + 1).selector(Some(1)).unwrap_err();
            assert_eq!(error, format!("{} {what}; a selection may have {most}", most + 1));
        }
    }
}
