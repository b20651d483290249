//! `portwatch agent`: the daemon.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use nix::unistd::{Group, Uid, User};
use portwatch::agent::{self, AlreadyRunning, Config};
use portwatch::config::{self, Access, ConfigError, LookUp};
use portwatch::history::{self, Retention};
use portwatch::rules::Rule;
use portwatch::service;
use portwatch::service::log::Filter;

use super::watch::announce;
use super::{note, own_netns};
use crate::cli::{Globals, duration};
use crate::exit_codes::{NO, Usage};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch agent
  portwatch agent --socket /run/portwatch/agent.sock --metrics 127.0.0.1:9464

In the configuration, [access] narrows what it does for others than root:
  list = \"own\"     tells each user of their own listeners only (\"all\")
  kill = \"wheel\"   ends processes for root and the members of this group only (\"all\")

A [[rule]] ends servers by itself; portwatch rules shows what each meets, and has an example.

It ends at SIGTERM and SIGINT, and reads its configuration anew at SIGHUP. As a service: portwatch/dist in the source has the units for systemd.
Exit codes: 0 told to end, 1 another agent has the socket, 2 usage or the configuration, 3 not permitted, 4 portwatch itself failed")]
pub(crate) struct AgentArgs {
    /// The configuration, which must exist [default: /etc/portwatch/config.toml, if it does]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Let the rules of the configuration tell the log what they would end, and end nothing
    #[arg(long)]
    pub(crate) dry_run_rules: bool,
    /// Answer Prometheus at this address, at /metrics
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) metrics: Option<SocketAddr>,
    /// Keep no history
    #[arg(long, conflicts_with_all = ["history_age", "history_size"])]
    pub(crate) no_history: bool,
    /// How long history is kept
    #[arg(long, default_value = "7d", value_name = "DURATION", value_parser = history_age)]
    pub(crate) history_age: Duration,
    /// How much history is kept, in MiB
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = history_size)]
    pub(crate) history_size: u64,
    /// What to log: error, warn, info, debug or trace [default: $PORTWATCH_LOG, else info]
    #[arg(long, value_name = "LEVEL")]
    pub(crate) log: Option<Filter>,
    /// Room for events that wait to be read, in bytes: a power of two of at least a page
    // Mapped twice in a row, and counted twice as resident: an eighth of what `watch` takes, so as to stay small. It holds
    // 7,710 records: a sixth of a second of listeners that eight processes open and close as fast as they can, and
    // several times what piles up while a snapshot of a large host is read. More is counted, and made good.
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20, value_parser = ring)]
    pub(crate) ring: u32,
}

/// None of it erases what is there, which is not what a bound is for.
const NOTHING_KEPT: &str = "that erases all history; to keep none from now on, use --no-history";

fn history_age(text: &str) -> Result<Duration, String> {
    let age = duration(text)?;
    if age.is_zero() { Err(NOTHING_KEPT.to_owned()) } else { Ok(age) }
}

/// In MiB, so many that their bytes can be counted.
fn history_size(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(0) => Err(NOTHING_KEPT.to_owned()),
        Ok(size) if size <= u64::MAX >> 20 => Ok(size),
        _ => Err("use a number of MiB, such as 256".to_owned()),
    }
}

fn ring(text: &str) -> Result<u32, String> {
    let page = rustix::param::page_size();
    match text.parse::<u32>() {
        Ok(bytes) if bytes.is_power_of_two() && bytes as usize >= page => Ok(bytes),
        _ => Err(format!("use a power of two of at least {page}, such as 1048576")),
    }
}

pub(crate) fn run(args: &AgentArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    // Before any thread: it takes its variables out of the environment.
    let activated = service::activated()?;
    service::log::start(args.log.clone())?;
    let retention = Retention { age: args.history_age, bytes: args.history_size << 20 };
    // The directory may be another one by the time that it is read anew.
    let file = args.config.as_ref().map(std::path::absolute).transpose().context("cannot find the configuration")?;
    let of_rules = file.clone();
    let config = Config {
        access: Box::new(move || access(file.as_deref())),
        rules: Box::new(move || rules(of_rules.as_deref())),
        dry_run_rules: args.dry_run_rules,
        socket: globals.socket.clone(),
        activated,
        metrics: args.metrics,
        history: (!args.no_history).then(|| (history::path(), retention)),
        marks: history::path().with_file_name("marks"),
        probe: globals.probe,
        ring_bytes: Some(args.ring),
    };
    match agent::run(config, |tracker| announce(tracker.live(), globals)) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.is::<AlreadyRunning>() => {
            note(&format!("error: {error}"));
            Ok(ExitCode::from(NO))
        }
        Err(error) => Err(error),
    }
}

fn access(file: Option<&Path>) -> anyhow::Result<Access> {
    let gid_of = |name: &str| Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw());
    told(config::access(file, Uid::effective().as_raw(), &gid_of))
}

/// The rules of the agent's configuration.
pub(super) fn rules(file: Option<&Path>) -> anyhow::Result<Vec<Rule>> {
    let uid_of = |name: &str| User::from_name(name).ok().flatten().map(|user| user.uid.as_raw());
    let look_up = LookUp { uid_of: &uid_of, netns: own_netns()? };
    told(config::rules(file, Uid::effective().as_raw(), &look_up))
}

fn told<T>(read: Result<T, ConfigError>) -> anyhow::Result<T> {
    match read {
        Err(ConfigError::Broken(what)) => Err(Usage(what).into()),
        Err(missing @ ConfigError::Missing(_)) => {
            Err(Usage(format!("{missing}; name another, or leave out --config")).into())
        }
        Err(ConfigError::Unreadable(path, error)) => {
            Err(error).with_context(|| format!("cannot read the configuration {}", path.display()))
        }
        Ok(found) => Ok(found),
    }
}
