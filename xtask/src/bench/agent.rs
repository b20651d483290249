//! The agent that is measured, with files of its own.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::target;

/// A running agent with its files below target/; ended and reaped when dropped.
pub(super) struct Agent {
    child: Child,
    program: PathBuf,
    home: PathBuf,
}

impl Agent {
    /// Returns when it watches.
    pub(super) fn start(portwatch: &Path) -> Result<Agent> {
        let home = target().join("tmp/bench-agent");
        let _old = fs::remove_dir_all(&home);
        fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
        let mut command = Command::new(portwatch);
        command.args(["agent", "--socket"]).arg(home.join("socket")).env("PORTWATCH_STATE", &home);
        let mut child =
            command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().context("cannot start the agent")?;
        let stderr = child.stderr.take();
        let agent = Agent { child, program: portwatch.to_owned(), home };
        let mut line = String::new();
        BufReader::new(stderr.context("the agent has no stderr")?).read_line(&mut line)?;
        if !line.contains("watching (") {
            bail!("the agent does not start: {}", line.trim());
        }
        Ok(agent)
    }

    /// A client of this agent, which fails rather than do without it.
    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).arg("--agent").arg("--socket").arg(self.socket());
        command
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.home.join("socket")
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
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
