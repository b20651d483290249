//! One port's owner, asked of a running agent: whole processes, timed in worlds of several sizes, beside `lsof` and
//! portwatch without its agent. And what the agent takes.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Effort, quantile};
use crate::world::{self, World};
use crate::{find, target};

/// What was measured in one world.
pub(super) struct Row {
    processes: usize,
    listeners: usize,
    /// Medians in ms; `None` where the program is not installed.
    asked_ms: f64,
    alone_ms: f64,
    lsof_ms: Option<f64>,
    /// Resident memory of the agent in MiB.
    memory: f64,
}

/// An agent with its files below target/; ended and reaped when dropped.
struct Agent {
    child: Child,
    home: PathBuf,
}

impl Agent {
    fn start(portwatch: &Path) -> Result<Agent> {
        let home = target().join("tmp/bench-agent");
        let _old = fs::remove_dir_all(&home);
        fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
        let mut command = Command::new(portwatch);
        command.args(["agent", "--socket"]).arg(home.join("socket")).env("PORTWATCH_STATE", &home);
        let mut child =
            command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().context("cannot start the agent")?;
        let stderr = child.stderr.take();
        let agent = Agent { child, home };
        let mut line = String::new();
        BufReader::new(stderr.context("the agent has no stderr")?).read_line(&mut line)?;
        if !line.contains("watching (") {
            bail!("the agent does not start: {}", line.trim());
        }
        Ok(agent)
    }

    fn command(&self, portwatch: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(portwatch);
        command.args(arguments).arg("--agent").arg("--socket").arg(self.home.join("socket"));
        command
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Our own unreaped child, or gone already.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
        let _cleaned = fs::remove_dir_all(&self.home);
    }
}

/// Times one run in ms; fails unless the answer names the port.
fn time(mut command: Command, port: u16) -> Result<f64> {
    let started = Instant::now();
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().context("cannot run it")?;
    let elapsed = started.elapsed().as_secs_f64() * 1e3;
    if !String::from_utf8_lossy(&output.stdout).contains(&format!(":{port}")) {
        bail!("the answer does not show port {port}");
    }
    Ok(elapsed)
}

/// Worlds of these sizes, one after the other, each with an agent of its own.
pub(super) fn measure(portwatch: &Path, worlds: &[world::Args], effort: &Effort) -> Result<Vec<Row>> {
    worlds.iter().map(|world| in_world(portwatch, *world, effort)).collect()
}

fn in_world(portwatch: &Path, args: world::Args, effort: &Effort) -> Result<Row> {
    let world = World::start(args)?;
    let port = world.ports.first().copied().context("the world has no listener")?;
    let agent = Agent::start(portwatch)?;
    let target = port.to_string();
    let lsof = find("lsof");
    let (mut asked, mut alone, mut peer) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        asked.push(time(agent.command(portwatch, &["who", &target]), port).context("who, by the agent")?);
        let mut command = Command::new(portwatch);
        command.args(["who", &target, "--no-agent"]);
        alone.push(time(command, port).context("who, without agent")?);
        if let Some(lsof) = &lsof {
            let mut command = Command::new(lsof);
            command.args(["-nP", "-i", &format!(":{port}")]);
            peer.push(time(command, port).context("lsof")?);
        }
    }
    let status = agent.command(portwatch, &["status", "--json"]).output().context("cannot ask for the status")?;
    let status: Value = serde_json::from_slice(&status.stdout).context("the status is not JSON")?;
    let bytes = status["agent"]["memory"].as_f64().context("the status does not tell the memory")?;
    Ok(Row {
        processes: args.processes,
        listeners: args.listeners,
        asked_ms: quantile(&mut asked, 0.5),
        alone_ms: quantile(&mut alone, 0.5),
        lsof_ms: (!peer.is_empty()).then(|| quantile(&mut peer, 0.5)),
        memory: bytes / f64::from(1 << 20),
    })
}

pub(super) fn markdown(rows: &[Row]) -> String {
    let mut text = "| processes | listeners | `who`, agent ms | `who --no-agent` ms | `lsof -i :PORT` ms | of lsof | agent MiB |\n\
         |--:|--:|--:|--:|--:|--:|--:|\n"
        .to_owned();
    for Row { processes, listeners, asked_ms, alone_ms, lsof_ms, memory } in rows {
        let lsof = lsof_ms.map_or_else(|| "?".to_owned(), |ms| format!("{ms:.1}"));
        let ratio = lsof_ms.map_or_else(|| "?".to_owned(), |ms| format!("1/{:.0}", ms / asked_ms));
        // Writing to a String cannot fail.
        let _infallible = writeln!(
            text,
            "| {processes} | {listeners} | {asked_ms:.2} | {alone_ms:.1} | {lsof} | {ratio} | {memory:.1} |"
        );
    }
    text
}

pub(super) fn figures(rows: &[Row]) -> Value {
    rows.iter()
        .map(|row| {
            json!({
                "processes": row.processes, "listeners": row.listeners, "who_agent_ms": row.asked_ms,
                "who_alone_ms": row.alone_ms, "lsof_ms": row.lsof_ms, "agent_mib": row.memory
            })
        })
        .collect()
}
