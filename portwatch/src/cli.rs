//! The command line: the verbs, and what they share. The arguments of a verb stand beside it in `commands`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{NonEmptyStringValueParser, TypedValueParser};
use clap::{Args, Command, CommandFactory as _, Parser, Subcommand, ValueHint};
use globset::GlobMatcher;
use portwatch::client::SOCKET;
use portwatch::model::NetnsId;
use portwatch::select::{Variable, cgroup_path, cwd_glob, glob, unit_glob};
use portwatch::source::Probe;

use crate::commands::agent::AgentArgs;
use crate::commands::completions::{CompleteArgs, CompletionsArgs};
use crate::commands::diagnose::DiagnoseArgs;
use crate::commands::history::HistoryArgs;
use crate::commands::kill::KillArgs;
use crate::commands::list::ListArgs;
use crate::commands::logs::LogsArgs;
use crate::commands::man::ManArgs;
use crate::commands::mark::MarkArgs;
use crate::commands::ps::PsArgs;
use crate::commands::rules::RulesArgs;
use crate::commands::run::RunArgs;
use crate::commands::status::StatusArgs;
use crate::commands::stop::StopArgs;
use crate::commands::top::TopArgs;
use crate::commands::wait::WaitArgs;
use crate::commands::watch::WatchArgs;
use crate::commands::who::WhoArgs;

/// For the end of the help of every verb with targets.
pub(crate) const TARGETS: &str = "\
Targets: 8000  :8000  3000,8080  3000-3005  8000/tcp  5353/udp  127.0.0.1:8000  [::1]:8000  @dev (3000, 8000, 8080)
127.0.0.1:8000 is whatever serves that address, what listens on all addresses too; --addr is that address exactly
Own sets: `web = [8000, \"3000-3005\"]` under [sets] in ~/.config/portwatch/config.toml is @web
Exit codes: 0 done, 1 the answer is no, 2 usage, 3 not permitted, 4 portwatch itself failed";

/// Which processes own which listening ports on this host, exactly; and a race-free way to free them
#[derive(Debug, Parser)]
#[command(
    version,
    arg_required_else_help = true,
    propagate_version = false,
    after_help = "\
Examples:
  portwatch list                      every listener of this network namespace
  portwatch who 8000                  everything about one port
  portwatch watch --for 10s           ports as they open and close
  portwatch kill 8000                 free a port
  portwatch top                       all of that on one screen, live
  portwatch kill @dev --older-than 24h --dry-run
  portwatch wait 5432 --bound --timeout 30s && make test"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
    #[command(flatten)]
    pub(crate) globals: Globals,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Globals {
    /// How to learn of listeners: auto, fexit, kprobe, tracepoint or poll
    ///
    /// watch, status and agent attach what is named, and fail where that is not to be had. wait attaches it only where it
    /// has to wait. The other verbs attach nothing: they read once, with poll from sock_diag and /proc, else by the kernel's
    /// iterator where it serves, whichever tier is named. Any but auto does without the agent.
    #[arg(long, global = true, default_value = "auto", value_name = "TIER", help_heading = "Global options")]
    pub(crate) probe: Probe,
    /// Where the agent listens [default: $PORTWATCH_SOCKET, else /run/portwatch/agent.sock]
    #[arg(
        long,
        global = true,
        default_value_os_t = socket(),
        hide_default_value = true,
        value_name = "PATH",
        help_heading = "Global options"
    )]
    pub(crate) socket: PathBuf,
    /// Ask the agent, or fail
    #[arg(long, global = true, conflicts_with = "no_agent", help_heading = "Global options")]
    pub(crate) agent: bool,
    /// Do not ask the agent
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) no_agent: bool,
    /// Say on stderr what was tried and refused, and what the kernel programs log
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub(crate) verbose: bool,
}

/// As the environment has it, else the usual one. A default, and not what clap calls `env`: that it takes for an option which
/// was typed, and shows in the usage as if it were required.
fn socket() -> PathBuf {
    std::env::var_os("PORTWATCH_SOCKET").filter(|path| !path.is_empty()).unwrap_or_else(|| SOCKET.into()).into()
}

// Deferred, for the arguments of all verbs take longer to make than the agent takes to answer: see command().
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(crate) enum Verb {
    /// Show listeners in a table
    List(ListArgs),
    /// Show everything about a port: holders, ancestors, directory, unit, container
    Who(WhoArgs),
    /// Show ports as they open and close, live
    Watch(WatchArgs),
    /// Free ports, by ending the processes that hold them
    Kill(KillArgs),
    /// Show listeners on the whole screen, live, and end them by key
    Top(TopArgs),
    /// Wait until ports are bound, or free
    Wait(WaitArgs),
    /// Record what is listening now, for `kill --since`
    Mark(MarkArgs),
    /// Run a command on a port of its own, and leave nothing of it behind
    Run(RunArgs),
    /// Show the servers that `run --background` started
    Ps(PsArgs),
    /// End servers that `run --background` started, with all that came of them
    Stop(StopArgs),
    /// Show what a server that `run --background` started has said
    Logs(LogsArgs),
    /// Explain why a port is or stays taken, and what to do next
    Diagnose(DiagnoseArgs),
    /// Show who had a port, when, and how it ended
    History(HistoryArgs),
    /// Show the agent's rules, what each meets and when it fires
    Rules(RulesArgs),
    /// Track listeners for everybody on this host, until it is told to end
    Agent(AgentArgs),
    /// Show the agent's health, and how listeners are learnt on this host
    Status(StatusArgs),
    /// Print the completion script of a shell
    Completions(CompletionsArgs),
    /// Write the manual pages to a directory
    Man(ManArgs),
    /// What the completion scripts ask
    #[command(name = "__complete", hide = true)]
    Complete(CompleteArgs),
}

/// The verbs with the arguments of those that `is_meant` picks: which has to be all that are parsed, shown or changed.
/// (clap would make the deferred ones by itself, too late for the global options to come last in the help.)
pub(crate) fn command(is_meant: impl Fn(&str) -> bool) -> Command {
    Cli::command().mut_subcommands(|verb| match ARGUMENTS.iter().find(|(name, _)| *name == verb.get_name()) {
        Some((name, add)) if is_meant(name) => add(verb).defer(|verb| verb),
        _ => verb,
    })
}

type AddArguments = fn(Command) -> Command;

const ARGUMENTS: [(&str, AddArguments); 19] = [
    ("list", ListArgs::augment_args),
    ("who", WhoArgs::augment_args),
    ("watch", WatchArgs::augment_args),
    ("kill", KillArgs::augment_args),
    ("top", TopArgs::augment_args),
    ("wait", WaitArgs::augment_args),
    ("mark", MarkArgs::augment_args),
    ("run", RunArgs::augment_args),
    ("ps", PsArgs::augment_args),
    ("stop", StopArgs::augment_args),
    ("logs", LogsArgs::augment_args),
    ("diagnose", DiagnoseArgs::augment_args),
    ("history", HistoryArgs::augment_args),
    ("rules", RulesArgs::augment_args),
    ("agent", AgentArgs::augment_args),
    ("status", StatusArgs::augment_args),
    ("completions", CompletionsArgs::augment_args),
    ("man", ManArgs::augment_args),
    ("__complete", CompleteArgs::augment_args),
];

const OF_SOCKETS: &str = "Selectors of sockets (all selectors must match; one given twice: either)";
const OF_HOLDERS: &str = "Selectors of holders";
const OF_ORIGIN: &str = "Selectors of age and origin";

// Filters that all verbs share. Different ones narrow each other; one given twice means either. (What documents a struct of
// arguments would describe the verb.)
#[derive(Debug, Args, Clone)]
pub(crate) struct Selectors {
    /// IPv4 sockets only
    #[arg(short = '4', long, help_heading = OF_SOCKETS)]
    pub(crate) ipv4: bool,
    /// IPv6 sockets only
    #[arg(short = '6', long, help_heading = OF_SOCKETS)]
    pub(crate) ipv6: bool,
    /// TCP only
    #[arg(long, help_heading = OF_SOCKETS)]
    pub(crate) tcp: bool,
    /// UDP only
    #[arg(long, help_heading = OF_SOCKETS)]
    pub(crate) udp: bool,
    /// Bound to exactly this address; one that listens on all addresses is not
    #[arg(long = "addr", value_name = "IP", value_parser = address, help_heading = OF_SOCKETS)]
    pub(crate) addresses: Vec<IpAddr>,
    /// Leave these out; ports, ranges and sets as in TARGET
    #[arg(long, value_name = "TARGET", help_heading = OF_SOCKETS)]
    pub(crate) except: Vec<String>,
    /// Network namespace: self, all, or its number
    #[arg(long, default_value = "self", value_name = "self|all|ID", value_parser = netns, help_heading = OF_SOCKETS)]
    pub(crate) netns: Netns,
    /// Held by a process of this user; by name or uid
    #[arg(long = "user", value_name = "NAME|UID", help_heading = OF_HOLDERS)]
    pub(crate) users: Vec<String>,
    /// Held by this process
    #[arg(long = "pid", value_name = "PID", value_parser = pid(), help_heading = OF_HOLDERS)]
    pub(crate) pids: Vec<u32>,
    /// Process name, or whole command line, matches; * matches / too
    #[arg(long = "command", value_name = "GLOB", value_parser = glob, help_heading = OF_HOLDERS)]
    pub(crate) commands: Vec<GlobMatcher>,
    /// Working directory matches; * matches / too. A relative path begins in this directory; one that begins with *, ?, [
    /// or { may match anywhere
    #[arg(long = "cwd", value_name = "GLOB", value_parser = cwd, help_heading = OF_HOLDERS)]
    pub(crate) cwds: Vec<GlobMatcher>,
    /// Held by a process of this running container, or published for it; by name, id or the beginning of an id. The
    /// container's own listeners are in its network namespace: see --netns
    #[arg(
        long = "container",
        value_name = "NAME|ID",
        value_parser = NonEmptyStringValueParser::new(),
        help_heading = OF_HOLDERS
    )]
    pub(crate) containers: Vec<String>,
    /// systemd service, of the system or of a user, with or without .service; may be a glob
    #[arg(long = "unit", value_name = "NAME", value_parser = unit_glob, help_heading = OF_HOLDERS)]
    pub(crate) units: Vec<GlobMatcher>,
    /// In this cgroup or one below it; as /proc/PID/cgroup or /sys/fs/cgroup shows it
    #[arg(long = "cgroup", value_name = "PATH", value_parser = cgroup_path, help_heading = OF_HOLDERS)]
    pub(crate) cgroups: Vec<String>,
    /// Started with this variable in its environment, or with this value of it. Of other users' processes only root may
    /// know that
    #[arg(long = "env", value_name = "NAME[=VALUE]", help_heading = OF_HOLDERS)]
    pub(crate) variables: Vec<Variable>,
    /// Listening for longer than this (else: the process running for longer), such as 24h or 90s
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = OF_ORIGIN)]
    pub(crate) older_than: Option<Duration>,
    /// Listening for no longer than this (else: the process running for no longer), such as 10m; or not there when this
    /// mark was made, a name or a file of `portwatch mark`: a server that ran then is not meant, also when it listens anew
    #[arg(long, value_name = "MARK|DURATION", value_parser = since, value_hint = ValueHint::AnyPath, help_heading = OF_ORIGIN)]
    pub(crate) since: Option<Since>,
    /// A child of this process, or a child's child, and so on. Once one between them has ended, those below it are not
    /// found any more
    #[arg(long = "descendant-of", value_name = "PID", value_parser = pid(), help_heading = OF_ORIGIN)]
    pub(crate) descendants_of: Vec<u32>,
    /// Given to init or another subreaper because the parent ended. Known of children of init and of a user's systemd, and
    /// of those whose session was begun by none of their ancestors; processes of a service or a container are none
    #[arg(long, help_heading = OF_ORIGIN)]
    pub(crate) orphans: bool,
}

/// An IPv6 address may have the brackets that it has in a target.
pub(crate) fn address(text: &str) -> Result<IpAddr, String> {
    let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let address = match inner {
        Some(inner) => inner.parse().map(IpAddr::V6).ok(),
        None => text.parse().ok(),
    };
    address.ok_or_else(|| "use an IP address such as 127.0.0.1 or ::1".to_owned())
}

fn cwd(text: &str) -> Result<GlobMatcher, String> {
    // As processes show theirs.
    let shown = |path: PathBuf| path.to_string_lossy().into_owned();
    let here = || std::env::current_dir().map(shown);
    cwd_glob(text, &|| here().map_err(|error| format!("this directory is not known ({error}); begin it with /")))
}

fn pid() -> impl TypedValueParser<Value = u32> {
    clap::value_parser!(u32).range(1..)
}

/// What `--since` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Since {
    Ago(Duration),
    /// A name or a path.
    Mark(String),
}

fn since(text: &str) -> Result<Since, String> {
    match duration(text) {
        Ok(ago) => Ok(Since::Ago(ago)),
        Err(_) if text.is_empty() => Err("use a duration such as 10m, or the name or file of a mark".to_owned()),
        Err(_) => Ok(Since::Mark(text.to_owned())),
    }
}

/// Which network namespaces are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Netns {
    Own,
    All,
    Id(NetnsId),
}

pub(crate) fn netns(text: &str) -> Result<Netns, String> {
    match text {
        "self" => Ok(Netns::Own),
        "all" => Ok(Netns::All),
        _ => text
            .parse()
            .map(Netns::Id)
            .map_err(|_| "use self, all, or the number that `readlink /proc/PID/ns/net` shows".to_owned()),
    }
}

/// Anything that people write for a length of time: `90s`, `24h`, `1h 30m`, `2 days` (of 24 hours).
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    portwatch::config::duration(text)
}

/// The same, but for none at all.
pub(crate) fn some_duration(text: &str) -> Result<Duration, String> {
    let duration = duration(text)?;
    let is_some = !duration.is_zero();
    is_some.then_some(duration).ok_or_else(|| "use a duration longer than 0, such as 250ms, 90s or 24h".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command(|_| true).debug_assert();
    }

    #[test]
    fn a_verb_has_the_same_arguments_whether_they_are_made_early_or_late() {
        let arguments = |is_meant: fn(&str) -> bool| {
            let mut command = command(is_meant);
            command.build();
            let of = |verb: &Command| {
                let mut names: Vec<String> = verb.get_arguments().map(|arg| arg.get_id().to_string()).collect();
                names.sort();
                (verb.get_name().to_owned(), verb.get_about().map(ToString::to_string), names)
            };
            command.get_subcommands().map(of).collect::<Vec<_>>()
        };
        let early = arguments(|_| true);
        assert_eq!(early, arguments(|_| false));
        assert!(ARGUMENTS.iter().all(|(name, _)| early.iter().any(|(verb, ..)| verb == name)));
        assert_eq!(ARGUMENTS.len() + 1, early.len(), "all verbs but help");
        for (verb, (name, about, _)) in Cli::command().get_subcommands().zip(early) {
            assert_eq!((verb.get_name().to_owned(), verb.get_about().map(ToString::to_string)), (name, about));
        }
    }

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, want) in [
            ("0", Some(0)),
            ("90s", Some(90_000)),
            ("250ms", Some(250)),
            ("24h", Some(86_400_000)),
            ("1h 30m", Some(5_400_000)),
            ("2 days", Some(172_800_000)),
            ("1w", Some(604_800_000)),
            ("", None),
            ("5", None),
            ("-5s", None),
            ("abc", None),
            ("1 month", None),
        ] {
            assert_eq!(duration(text).ok(), want.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn an_address_may_have_brackets_where_it_is_ipv6() {
        for (text, want) in [
            ("127.0.0.1", Some("127.0.0.1")),
            ("::1", Some("::1")),
            ("[::1]", Some("::1")),
            ("[127.0.0.1]", None),
            ("[::1", None),
            ("[::1]:80", None),
            ("localhost", None),
        ] {
            assert_eq!(address(text).ok().map(|address| address.to_string()).as_deref(), want, "{text}");
        }
    }

    #[test]
    fn namespaces_are_self_all_or_a_number() {
        assert_eq!(netns("self"), Ok(Netns::Own));
        assert_eq!(netns("all"), Ok(Netns::All));
        assert_eq!(netns("4026531833"), Ok(Netns::Id(4_026_531_833)));
        assert!(netns("blue").is_err());
    }
}
