//! Who would start a leak again: the loops, scripts and supervisors that a job left behind with its servers.
//!
//! A server that a loop started is there again a moment after it was ended, perhaps longer after than anybody looks. What
//! started it is no bystander if it came after the mark as well: it is the job's own, and is ended with the server, and
//! before it. So the ancestors of a holder are looked at, the nearest first, as long as each
//! - started after the mark, by identity: the runner that runs the job did not, and neither did what people ran before;
//! - is of a user whose leaks are meant;
//! - is none out of whom portwatch itself came, nor the leader of its session;
//! - is no shell that somebody types into, nor hosts sessions, services or containers ([`crate::supervisor::starters`]), nor
//!   runs in another container than portwatch.
//!
//! Two are told and left to people, because a person may sit in front of them: who has a terminal, unless it is a shell
//! that runs a script, and who runs in another unit of a user's systemd, as the programs of a desktop do.
//!
//! That it started the server is not known: that it is its ancestor now is.

use std::sync::Arc;

use super::plan::{Victim, push_new};
use crate::cgroup::Container;
use crate::model::{BootNs, Process, ProcessId};
use crate::select::started_after;
use crate::source::process;
use crate::source::stat::{self, Stat};
use crate::supervisor;

/// Whose ancestors are taken for part of a job.
pub(super) struct Rule<'a> {
    /// When the mark was made.
    pub(super) since: BootNs,
    /// Whether processes of this user are meant.
    pub(super) means: &'a dyn Fn(Option<u32>) -> bool,
    pub(super) own: Own,
}

/// What is known of portwatch itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Own {
    /// Its pid, and those of its ancestors and of the leader of its session.
    pub(super) line: Vec<u32>,
    pub(super) cgroup: Option<String>,
}

/// An ancestor of holders.
#[derive(Clone, Debug)]
pub(super) struct Starter {
    pub(super) process: Arc<Process>,
    /// A holder below it.
    pub(super) above: ProcessId,
    /// Of those that it is above of: indices into the plan's groups.
    pub(super) groups: Vec<usize>,
    /// Why it is left alone, if so, and what to do about it.
    pub(super) spared: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Goes,
    Spared(&'static str),
    /// No part of the job, and neither is anybody above.
    Stranger,
}

impl std::fmt::Debug for Rule<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rule").field("since", &self.since).field("own", &self.own).finish_non_exhaustive()
    }
}

impl Own {
    pub(super) fn read() -> Own {
        let pid = std::process::id();
        let stat = |pid| stat::read(pid).ok();
        let own = stat(pid);
        let mut line = stat::ancestors(pid, &stat);
        line.extend(own.as_ref().map(|own| own.session));
        line.push(pid);
        let cgroup = own.and_then(|own| process::read_exact(own.id())).and_then(|process| process.cgroup);
        Own { line, cgroup }
    }
}

impl Rule<'_> {
    /// The starters of these victims, each once. `stat` reads now.
    pub(super) fn find(&self, victims: &[Victim], stat: &dyn Fn(u32) -> Option<Stat>) -> Vec<Starter> {
        let mut found: Vec<Starter> = Vec::new();
        for victim in victims.iter().filter(|victim| !victim.inodes.is_empty()) {
            for supervisor::Starter { stat, is_script } in supervisor::starters(&victim.process, stat) {
                if let Some(known) = found.iter_mut().find(|known| known.process.id.is_same(stat.id())) {
                    victim.groups.iter().for_each(|&group| push_new(&mut known.groups, group));
                    if known.spared.is_some() {
                        break;
                    }
                    continue;
                }
                let Some(process) = process::read_exact(stat.id()) else { break };
                let verdict = self.judge(&stat, &process, is_script);
                if verdict == Verdict::Stranger {
                    break;
                }
                let spared = match &verdict {
                    Verdict::Spared(reason) => Some(format!("{reason}; end it with: kill {}", stat.pid)),
                    _ => None,
                };
                let is_spared = spared.is_some();
                let groups = victim.groups.clone();
                found.push(Starter { process: Arc::new(process), above: victim.process.id, groups, spared });
                if is_spared {
                    break;
                }
            }
        }
        found
    }

    fn judge(&self, stat: &Stat, process: &Process, is_script: bool) -> Verdict {
        let container = |path: &Option<String>| path.as_deref().and_then(Container::of).map(|it| it.id.to_owned());
        let is_ours = started_after(stat.id(), self.since)
            && (self.means)(process.uid)
            && !self.own.line.contains(&stat.pid)
            && container(&process.cgroup) == container(&self.own.cgroup);
        if !is_ours {
            return Verdict::Stranger;
        }
        let is_of_desktop = |path: &String| path.contains("/user@") && Some(path) != self.own.cgroup.as_ref();
        match () {
            () if stat.terminal && !is_script => Verdict::Spared("somebody may sit at its terminal"),
            () if process.cgroup.as_ref().is_some_and(is_of_desktop) => {
                Verdict::Spared("it runs in a unit of its own of the user's systemd")
            }
            () => Verdict::Goes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SINCE: BootNs = 100 * ProcessId::TICK_NS;
    const APP: &str = "/user.slice/user-1000.slice/user@1000.service/app.slice/app-ide-7.scope";
    const TAB: &str = "/user.slice/user-1000.slice/user@1000.service/app.slice/tab-9.scope";

    /// What becomes of process 7 of user 1000, if all else is as with a loop of the job.
    fn judge(change: impl FnOnce(&mut Stat, &mut Process, &mut Own), is_script: bool) -> Verdict {
        let mut stat = Stat::parse(b"7 (sh) S 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 101 0 0").unwrap();
        let mut process = Process { uid: Some(1000), ..Process::bare(stat.id(), "sh") };
        let mut own = Own { line: vec![1, 50, 51], cgroup: Some("/system.slice/runner.service".to_owned()) };
        process.cgroup = own.cgroup.clone();
        change(&mut stat, &mut process, &mut own);
        Rule { since: SINCE, means: &|uid| uid == Some(1000), own }.judge(&stat, &process, is_script)
    }

    #[test]
    fn what_came_with_the_job_goes_with_it() {
        let in_cgroup = |path: &str| Some(path.to_owned());
        assert_eq!(judge(|_, _, _| {}, false), Verdict::Goes);
        // The same ten milliseconds are before the mark.
        assert_eq!(judge(|stat, _, _| stat.start = SINCE, false), Verdict::Stranger);
        assert_eq!(judge(|_, process, _| process.uid = Some(0), false), Verdict::Stranger);
        assert_eq!(judge(|_, process, _| process.uid = None, false), Verdict::Stranger);
        assert_eq!(judge(|_, _, own| own.line.push(7), false), Verdict::Stranger);
        let container = format!("/docker/{}", "ab".repeat(32));
        assert_eq!(judge(|_, process, _| process.cgroup = in_cgroup(&container), false), Verdict::Stranger);
        let both = |process: &mut Process, own: &mut Own| {
            (process.cgroup, own.cgroup) = (in_cgroup(&container), in_cgroup(&container));
        };
        assert_eq!(judge(|_, process, own| both(process, own), false), Verdict::Goes);
        // Another login's session, as `su -` makes one for each step of a job.
        let session = in_cgroup("/user.slice/user-1000.slice/session-c2.scope");
        assert_eq!(judge(|_, process, _| process.cgroup = session, false), Verdict::Goes);
    }

    #[test]
    fn who_may_have_somebody_before_it_is_spared() {
        let is_spared = |verdict| matches!(verdict, Verdict::Spared(_));
        assert!(is_spared(judge(|stat, _, _| stat.terminal = true, false)));
        assert_eq!(judge(|stat, _, _| stat.terminal = true, true), Verdict::Goes);
        let at = |process: &mut Process, own: &mut Own, place: &str| {
            (process.cgroup, own.cgroup) = (Some(APP.to_owned()), Some(place.to_owned()));
        };
        assert!(is_spared(judge(|_, process, own| at(process, own, TAB), false)));
        assert_eq!(judge(|_, process, own| at(process, own, APP), false), Verdict::Goes);
    }
}
