//! Who listens: whole commands, timed from spawn to exit, in worlds of many sizes. What a command costs is measured as
//! its caller pays it: start, answer, end.
//!
//! In each world the commands are run in rounds, each once per round, so that what else the machine does meets all of
//! them. Every answer of every run is checked: it has to show each port asked for, and who holds it where it may know.
//!
//! Figures: `{rows, growth, left_out}`.
//! - A row is `{question (owner|listeners), command, who (portwatch|peer), unprivileged, shows (ports|holders), world,
//!   median_ms, min_ms, max_ms, runs, cpu_ms, rss_kib, skipped}`. `world` is `{processes, fds, listeners,
//!   connections}`, where `fds` are the open files of each process; servers that hold connections have a listener each,
//!   too. Times are null and `runs` is 0 where `skipped` says why. `cpu_ms` is the median of user and system time, with
//!   all that the agent does meanwhile where it is asked. `rss_kib` is the largest resident set in any run.
//! - `growth`: see its module.
//! - What is left out is `{world, why}`.

mod growth;
mod tables;

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::time::clock_getcpuclockid;
use nix::unistd::{Pid, Uid};
use serde_json::{Value, json};

use super::agent::Agent;
use super::section::Section;
use super::stopwatch::{self, Run};
use super::{Effort, quantile};
use crate::find;
use crate::world::{self, Listener, World};

/// A command that takes longer has no figure.
const LIMIT: Duration = Duration::from_secs(30);

/// A command that takes longer is run only in every fifth round.
const SLOW_MS: f64 = 2000.0;
const SLOW_EVERY: usize = 5;

/// A command that takes less is run in every round, even when those who take seconds have used up the time.
const QUICK_MS: f64 = 250.0;

/// nobody and nogroup.
const NOBODY: u32 = 65534;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Question {
    Owner,
    Listeners,
}

impl Question {
    fn key(self) -> &'static str {
        match self {
            Question::Owner => "owner",
            Question::Listeners => "listeners",
        }
    }

    /// Which of the world's listeners the answer is about.
    fn about(self, listeners: &[Listener]) -> &[Listener] {
        match self {
            Question::Owner => &listeners[..1],
            Question::Listeners => listeners,
        }
    }
}

/// How a command is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Plain,
    /// It asks the agent that watches this world.
    Agent,
    /// As a user who may not look into the processes of others.
    Unprivileged,
}

/// A command that answers a question. `PORT` stands for the port.
#[derive(PartialEq, Eq, Debug)]
struct Ask {
    question: Question,
    line: &'static str,
    way: Way,
    /// Whether it can know who holds a listener, and show the process by its number.
    shows_holders: bool,
}

impl Ask {
    fn is_ours(&self) -> bool {
        self.line.starts_with("portwatch ")
    }

    /// As it would be typed.
    fn command(&self) -> String {
        let agent = if self.way == Way::Agent { " --agent" } else { "" };
        format!("{}{agent}", self.line)
    }

    /// For people.
    fn name(&self) -> String {
        let user = if self.way == Way::Unprivileged { ", unprivileged" } else { "" };
        format!("`{}`{user}", self.command())
    }
}

const fn owner(line: &'static str, way: Way) -> Ask {
    Ask { question: Question::Owner, line, way, shows_holders: !matches!(way, Way::Unprivileged) }
}

const fn listeners(line: &'static str, way: Way) -> Ask {
    Ask { question: Question::Listeners, line, way, shows_holders: !matches!(way, Way::Unprivileged) }
}

/// killport says a process's command line, without its number. fkill cannot be asked without killing.
const ASKS: &[Ask] = &[
    owner("portwatch who PORT", Way::Agent),
    owner("portwatch who PORT --no-agent", Way::Plain),
    owner("portwatch who PORT --no-agent --probe poll", Way::Plain),
    owner("portwatch who PORT --no-agent", Way::Unprivileged),
    owner("ss -ltnp sport = :PORT", Way::Plain),
    owner("ss -ltnp sport = :PORT", Way::Unprivileged),
    owner("lsof -nP -iTCP:PORT -sTCP:LISTEN", Way::Plain),
    owner("fuser PORT/tcp", Way::Plain),
    Ask { shows_holders: false, ..owner("killport --dry-run PORT", Way::Plain) },
    owner("somo -t -l -p PORT --no-pager", Way::Plain),
    listeners("portwatch list", Way::Agent),
    listeners("portwatch list --no-agent", Way::Plain),
    listeners("portwatch list --no-agent --probe poll", Way::Plain),
    listeners("portwatch list --no-agent", Way::Unprivileged),
    listeners("ss -ltnp", Way::Plain),
    listeners("ss -ltnp", Way::Unprivileged),
    listeners("netstat -ltnp", Way::Plain),
    listeners("lsof -nP -iTCP -sTCP:LISTEN", Way::Plain),
    listeners("lsof -nP -iTCP -sTCP:LISTEN", Way::Unprivileged),
    listeners("somo -t -l --no-pager", Way::Plain),
];

/// One command in one world.
struct Row {
    ask: &'static Ask,
    world: world::Args,
    /// Why there are no figures.
    skipped: Option<String>,
    ms: Vec<f64>,
    cpu_ms: Vec<f64>,
    rss_kib: i64,
}

impl Row {
    fn new(ask: &'static Ask, world: world::Args) -> Row {
        Row { ask, world, skipped: None, ms: Vec::new(), cpu_ms: Vec::new(), rss_kib: 0 }
    }

    /// Median, least and greatest time in ms; none where there are no figures.
    fn times(&self) -> Option<[f64; 3]> {
        let mut ms = self.ms.clone();
        (self.skipped.is_none() && !ms.is_empty()).then(|| [0.5, 0.0, 1.0].map(|part| quantile(&mut ms, part)))
    }

    fn cpu_median(&self) -> Option<f64> {
        self.times().map(|_| quantile(&mut self.cpu_ms.clone(), 0.5))
    }

    fn complaint(&self) -> Option<String> {
        let reason = self.skipped.as_ref().filter(|_| self.ask.is_ours())?;
        Some(format!("{} in {} {reason}", self.ask.name(), tables::label(self.world)))
    }

    fn figures(&self) -> Value {
        let times = self.times();
        let at = |index: usize| times.map(|times| times[index]);
        json!({
            "question": self.ask.question.key(), "command": self.ask.command(),
            "who": if self.ask.is_ours() { "portwatch" } else { "peer" },
            "unprivileged": self.ask.way == Way::Unprivileged,
            "shows": if self.ask.shows_holders { "holders" } else { "ports" },
            "world": world_figures(self.world),
            "median_ms": at(0), "min_ms": at(1), "max_ms": at(2), "runs": if times.is_some() { self.ms.len() } else { 0 },
            "cpu_ms": self.cpu_median(), "rss_kib": times.map(|_| self.rss_kib), "skipped": self.skipped
        })
    }
}

fn world_figures(world: world::Args) -> Value {
    json!({
        "processes": world.processes, "fds": world.fds, "listeners": world.listeners, "connections": world.connections
    })
}

/// The programs that are run, and as whom.
struct Programs {
    portwatch: PathBuf,
    /// portwatch where every user may execute it, which is often not so of a checkout.
    public: Option<Public>,
}

impl Programs {
    /// Fails with the reason why it cannot be run here.
    fn command(&self, ask: &Ask, listener: Listener, agent: &Agent) -> Result<Command, String> {
        let line = ask.line.replace("PORT", &listener.port.to_string());
        let words: Vec<&str> = line.split(' ').collect();
        let mut command = match (ask.way, ask.is_ours()) {
            (Way::Agent, _) => return Ok(agent.command(&words[1..])),
            (Way::Plain, true) => Command::new(&self.portwatch),
            (Way::Unprivileged, true) => {
                Command::new(self.public.as_ref().map_or(&self.portwatch, |copy| &copy.program))
            }
            (_, false) => Command::new(find(words[0]).ok_or("is not installed")?),
        };
        command.args(&words[1..]);
        if ask.way == Way::Unprivileged {
            if !Uid::effective().is_root() {
                return Err("takes root, to become another user".to_owned());
            }
            // std leaves the supplementary groups, too.
            command.uid(NOBODY).gid(NOBODY).env("HOME", "/");
        }
        Ok(command)
    }
}

/// A copy of portwatch that every user may execute. Removed when dropped.
struct Public {
    folder: PathBuf,
    program: PathBuf,
}

impl Public {
    fn make(portwatch: &Path) -> Result<Public> {
        let folder = std::env::temp_dir().join(format!("portwatch-bench-{}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let copy = Public { program: folder.join("portwatch"), folder };
        fs::copy(portwatch, &copy.program).with_context(|| format!("cannot copy {}", portwatch.display()))?;
        for path in [&copy.folder, &copy.program] {
            fs::set_permissions(path, Permissions::from_mode(0o755))
                .with_context(|| format!("cannot open {} to everybody", path.display()))?;
        }
        Ok(copy)
    }
}

impl Drop for Public {
    fn drop(&mut self) {
        let _cleaned = fs::remove_dir_all(&self.folder);
    }
}

pub(super) fn run(portwatch: &Path, effort: &Effort) -> Result<Section> {
    let public = if Uid::effective().is_root() { Some(Public::make(portwatch)?) } else { None };
    let programs = Programs { portwatch: portwatch.to_owned(), public };
    let (mut rows, mut left_out) = (Vec::new(), Vec::new());
    for &args in effort.worlds {
        let world = match args.lacks() {
            Some(why) => Err(why),
            None => World::start(args).map_err(|error| format!("{error:#}")),
        };
        match world {
            Ok(world) => rows.extend(in_world(&programs, args, &world.listeners, effort)?),
            Err(why) => left_out.push((args, why)),
        }
    }
    if rows.is_empty() {
        bail!("no world at all: {}", left_out.into_iter().map(|(_, why)| why).collect::<Vec<_>>().join("; "));
    }
    let growth = growth::of(&rows);
    Ok(Section {
        key: "worlds",
        title: "Who listens? In worlds of processes × open files of each".to_owned(),
        markdown: tables::markdown(&rows, &growth, &left_out),
        figures: json!({
            "rows": rows.iter().map(Row::figures).collect::<Vec<_>>(),
            "growth": growth.iter().map(growth::Growth::figures).collect::<Vec<_>>(),
            "left_out": left_out
                .iter()
                .map(|(world, why)| json!({"world": world_figures(*world), "why": why}))
                .collect::<Vec<_>>()
        }),
        wrong: rows.iter().filter_map(Row::complaint).collect(),
    })
}

/// Every command in one world, with an agent that watches it.
fn in_world(programs: &Programs, world: world::Args, listeners: &[Listener], effort: &Effort) -> Result<Vec<Row>> {
    let agent = Agent::start(&programs.portwatch, &[])?;
    let mut rows: Vec<Row> = ASKS.iter().map(|ask| Row::new(ask, world)).collect();
    let first = listeners.first().copied().context("the world has no listener")?;
    let started = Instant::now();
    for round in 0..effort.rounds {
        for row in rows.iter_mut().filter(|row| row.skipped.is_none()) {
            let takes_more_than = |limit| row.ms.last().is_some_and(|&ms| ms > limit);
            let slow = takes_more_than(SLOW_MS);
            let late = started.elapsed() > effort.rounds_limit && takes_more_than(QUICK_MS);
            if late || (slow && round % SLOW_EVERY != 0) {
                continue;
            }
            let asked = row.ask.question.about(listeners);
            let run = programs.command(row.ask, first, &agent).and_then(|mut command| {
                let run = timed(&mut command, (row.ask.way == Way::Agent).then_some(&agent))?;
                wrong(&run.output, asked, row.ask.shows_holders).map_or(Ok(run), Err)
            });
            match run {
                Ok(run) => {
                    row.ms.push(run.ms);
                    row.cpu_ms.push(run.cpu_ms);
                    row.rss_kib = row.rss_kib.max(run.rss_kib);
                }
                Err(reason) => row.skipped = Some(reason),
            }
        }
    }
    Ok(rows)
}

/// One run; the agent's processor time is part of it if it is asked.
fn timed(command: &mut Command, agent: Option<&Agent>) -> Result<Run, String> {
    let before = agent.map(cpu_ms).transpose();
    let run = stopwatch::run(command, LIMIT);
    let after = agent.map(cpu_ms).transpose();
    let timed = before.and_then(|before| {
        let mut run = run?;
        run.cpu_ms += after?.zip(before).map_or(0.0, |(after, before)| after - before);
        Ok(run)
    });
    timed.map_err(|error: anyhow::Error| format!("{error:#}"))
}

/// The processor time of all threads of the agent so far.
fn cpu_ms(agent: &Agent) -> Result<f64> {
    let pid = Pid::from_raw(agent.pid().cast_signed());
    let time = clock_getcpuclockid(pid).and_then(|clock| clock.now()).context("the agent has no clock")?;
    Ok(Duration::from(time).as_secs_f64() * 1e3)
}

/// What the answer should show and does not. Numbers are compared as words.
fn wrong(output: &str, listeners: &[Listener], holders: bool) -> Option<String> {
    let words: HashSet<&str> = output.split(|c: char| !c.is_ascii_digit()).collect();
    let hidden = |number: u32| !words.contains(number.to_string().as_str());
    let all = listeners.len();
    let ports = listeners.iter().filter(|listener| hidden(listener.port.into())).count();
    let unowned = listeners.iter().filter(|listener| holders && hidden(listener.pid)).count();
    match (ports, unowned) {
        (0, 0) => None,
        (0, _) => Some(format!("does not show the holders of {unowned} of {all} ports")),
        _ => Some(format!("does not show {ports} of {all} ports")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Listener, wrong};

    #[test]
    fn an_answer_shows_ports_and_holders_as_whole_numbers() {
        let listeners = [Listener { port: 40001, pid: 77 }, Listener { port: 40002, pid: 78 }];
        for (output, holders, complaint) in [
            ("127.0.0.1:40001 (77)\n127.0.0.1:40002 (78)\n", true, None),
            ("127.0.0.1:40001\n127.0.0.1:40002\n", false, None),
            ("127.0.0.1:40001 (77)\n127.0.0.1:40002 (177)\n", true, Some("does not show the holders of 1 of 2 ports")),
            ("127.0.0.1:40001 (77)\n127.0.0.1:4000 (78)\n", true, Some("does not show 1 of 2 ports")),
            ("", false, Some("does not show 2 of 2 ports")),
        ] {
            assert_eq!(wrong(output, &listeners, holders).as_deref(), complaint, "{output}");
        }
    }
}
