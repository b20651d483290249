//! Ancestors that lie about who they are, as every process may.

use crate::model::{Process, ProcessId};
use crate::render::escape;
use crate::source::stat::Stat;
use crate::supervisor::{Sight, Supervisor};

use super::{assert_one_line, assert_shell};

/// A process with its ancestors, the nearest first: a line for each with name, working directory and arguments,
/// separated by `|`. The first line is the cgroup of the process, the second the variables of its environment.
pub fn supervisor(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.split('\n');
    let (cgroup, environment) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let people: Vec<Vec<&str>> = lines.take(32).map(|line| line.split('|').collect()).collect();
    let count = u32::try_from(people.len()).unwrap_or(0);
    let person = |pid: u32| people.get(usize::try_from(pid.checked_sub(2)?).ok()?);
    let stat = |pid: u32| {
        let person = person(pid)?;
        Some(Stat {
            pid,
            name: (*person.first()?).to_owned(),
            state: 'S',
            ppid: if pid - 1 == count { 1 } else { pid + 1 },
            process_group: pid,
            session: pid,
            terminal: person.len() % 2 == 0,
            kernel_thread: false,
            exiting: false,
            start: ProcessId::TICK_NS * u64::from(100 - pid),
        })
    };
    let command = |pid| person(pid).into_iter().flat_map(|person| person.iter().skip(2)).map(|&word| word.to_owned());
    let variable = |_, name: &str| {
        environment.split('|').find_map(|pair| Some(pair.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
    };
    let sight = Sight {
        stat: &stat,
        command: &|id| command(id.pid).collect(),
        cwd: &|id| person(id.pid)?.get(1).map(|&cwd| cwd.to_owned()),
        variable: &variable,
        user: &|uid| (uid == 1000).then(|| "al".to_owned()),
        euid: 0,
    };
    let Some(Stat { pid, name, ppid, start, .. }) = stat(2) else { return };
    let mut process = Process::bare(ProcessId { pid, start }, name);
    (process.ppid, process.command, process.cgroup) = (ppid, command(pid).collect(), Some(cgroup.to_owned()));
    let Some(found) = Supervisor::find(&process, &sight) else { return };
    if let Some(stop) = found.stop_command() {
        assert_shell(stop);
    }
    assert_one_line(&escape(&found.describe()));
}
