//! Why a process is still there after a signal, as `/proc` tells: its state, what it does with the signal, who traces
//! it. Reading and judging are two things, so that each can be tried alone.

use std::fs;

use rustix::process::Signal;

use super::signal::SignalName;
use crate::source::stat;

/// What `/proc/PID` says of a process that does not end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Condition {
    /// Of one task in state D that is not exiting, if any: `(wchan)`, where it may be read.
    asleep: Option<Option<String>>,
    frozen: bool,
    exiting: bool,
    /// `T` or `t` of the leader.
    stopped: Option<char>,
    tracer: Option<String>,
    /// Masks of signals: bit 0 is signal 1.
    ignored: u64,
    caught: u64,
    blocked: u64,
    threads: u64,
    /// Whether it is the init of a pid namespace.
    is_init: bool,
}

/// Why this process outlives `signal`, where that can be seen: half a sentence.
pub(super) fn why(pid: u32, signal: Signal) -> Option<String> {
    sentence(&read(pid)?, signal)
}

/// Whether a task of this process is inside the kernel where no signal reaches it, or held by a tracer that is told of
/// its end first: it need not be waited for.
pub(super) fn is_unreachable(pid: u32) -> bool {
    tasks(pid).any(|(_, stat)| matches!(stat.state, 'D' | 't') && !stat.exiting)
}

/// Whether it is stopped (`SIGSTOP`, `^Z`): what is sent stays pending until it goes on. Not so by a tracer.
pub(super) fn is_stopped(pid: u32) -> bool {
    tasks(pid).any(|(_, stat)| stat.state == 'T')
}

fn tasks(pid: u32) -> impl Iterator<Item = (String, stat::Stat)> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let paths = entries.filter_map(move |entry| Some(format!("{pid}/task/{}", entry.file_name().to_str()?)));
    paths.filter_map(|path| Some((path.clone(), stat::read_task(&path).ok()?)))
}

fn read(pid: u32) -> Option<Condition> {
    let status = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?.status().ok()?;
    let mut condition = Condition {
        tracer: u32::try_from(status.tracerpid).ok().filter(|&tracer| tracer != 0).map(|tracer| {
            let name = stat::read(tracer).map_or_else(|_| "?".to_owned(), |stat| stat.name);
            format!("{name} ({tracer})")
        }),
        ignored: status.sigign,
        caught: status.sigcgt,
        blocked: status.sigblk,
        threads: status.threads,
        // The last number is the one in its own namespace.
        frozen: is_frozen(pid).unwrap_or(false),
        is_init: status.nspid.is_some_and(|pids| pids.len() > 1 && pids.last() == Some(&1)),
        ..Condition::default()
    };
    let mut all_exit = true;
    for (path, stat) in tasks(pid) {
        // Not readable by everybody, and "0" where it does not sleep.
        let wchan = fs::read_to_string(format!("/proc/{path}/wchan")).ok().filter(|name| name != "0");
        all_exit &= stat.exiting;
        match stat.state {
            'D' if !stat.exiting => condition.asleep = Some(wchan),
            'T' | 't' => condition.stopped = Some(stat.state),
            _ => {}
        }
    }
    // A leader may be gone while its threads serve.
    condition.exiting = all_exit;
    Some(condition)
}

/// Whether its cgroup is frozen. In state and place it looks like many others.
fn is_frozen(pid: u32) -> Option<bool> {
    let mounts = procfs::process::Process::myself().ok()?.mountinfo().ok()?.0;
    let groups = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?.cgroups().ok()?.0;
    let is_frozen = |group: &procfs::ProcessCGroup| {
        let is_v2 = group.hierarchy == 0;
        if !is_v2 && !group.controllers.iter().any(|controller| controller == "freezer") {
            return false;
        }
        let mount = mounts.iter().find(|mount| match is_v2 {
            true => mount.fs_type == "cgroup2",
            false => mount.fs_type == "cgroup" && mount.super_options.contains_key("freezer"),
        });
        let directory = mount.map(|mount| mount.mount_point.join(group.pathname.trim_start_matches('/')));
        let read = |file: &str| directory.as_ref().and_then(|d| fs::read_to_string(d.join(file)).ok());
        match is_v2 {
            true => read("cgroup.events").is_some_and(|events| events.lines().any(|line| line == "frozen 1")),
            false => read("freezer.state").is_some_and(|state| state.trim_end() == "FROZEN"),
        }
    };
    Some(groups.iter().any(is_frozen))
}

fn sentence(condition: &Condition, signal: Signal) -> Option<String> {
    let name = SignalName(signal);
    let has = |mask: u64| u32::try_from(signal.as_raw() - 1).is_ok_and(|bit| mask >> bit & 1 == 1);
    if condition.frozen {
        return Some(format!("its cgroup is frozen (a paused container?), and {name} waits until it thaws"));
    }
    if let Some(wchan) = &condition.asleep {
        let place = wchan.as_ref().map(|wchan| format!(", in {wchan}")).unwrap_or_default();
        return Some(format!("it is in uninterruptible sleep (state D{place}), where {name} does not reach it"));
    }
    if condition.exiting {
        return Some("it is still being torn down by the kernel".to_owned());
    }
    if signal == Signal::KILL {
        // A tracer may ask to see each exit before it happens.
        let tracer = condition.tracer.as_ref().filter(|_| condition.stopped == Some('t'));
        return tracer.map(|tracer| format!("it is held by {tracer}, which traces it"));
    }
    match (condition.stopped, &condition.tracer) {
        (Some(_), Some(tracer)) => {
            return Some(format!("it is stopped by {tracer}, which traces it: {name} stays pending"));
        }
        (Some(_), None) => return Some(format!("it is stopped (state T): {name} stays pending until SIGCONT")),
        (None, _) => {}
    }
    if has(condition.ignored) {
        Some(format!("it ignores {name}"))
    } else if has(condition.blocked) && condition.threads == 1 {
        Some(format!("it blocks {name}"))
    } else if has(condition.caught) {
        Some(format!("it handles {name} and has not ended"))
    } else if condition.is_init {
        Some(format!("it is PID 1 of its container or pid namespace and does not handle {name}"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_sentence() {
        let term = 1 << (Signal::TERM.as_raw() - 1);
        let with = |change: &dyn Fn(&mut Condition)| {
            let mut condition = Condition { threads: 1, ..Condition::default() };
            change(&mut condition);
            [Signal::TERM, Signal::KILL].map(|signal| sentence(&condition, signal).unwrap_or_default())
        };
        let asleep =
            |name: &str| format!("it is in uninterruptible sleep (state D, in f), where {name} does not reach it");
        let torn = "it is still being torn down by the kernel".to_owned();
        let frozen =
            |name: &str| format!("its cgroup is frozen (a paused container?), and {name} waits until it thaws");
        let soft = |text: &str| [text.to_owned(), String::new()];
        type Change<'a> = &'a dyn Fn(&mut Condition);
        let cases: [(Change<'_>, [String; 2]); 10] = [
            (&|_| {}, soft("")),
            (&|c| c.ignored = term, soft("it ignores SIGTERM")),
            (&|c| c.caught = term, soft("it handles SIGTERM and has not ended")),
            (&|c| c.blocked = term, soft("it blocks SIGTERM")),
            (&|c| (c.blocked, c.threads) = (term, 2), soft("")),
            (&|c| c.is_init = true, soft("it is PID 1 of its container or pid namespace and does not handle SIGTERM")),
            (&|c| c.stopped = Some('T'), soft("it is stopped (state T): SIGTERM stays pending until SIGCONT")),
            (&|c| c.asleep = Some(Some("f".into())), [asleep("SIGTERM"), asleep("SIGKILL")]),
            (&|c| (c.asleep, c.frozen) = (Some(None), true), [frozen("SIGTERM"), frozen("SIGKILL")]),
            (&|c| c.exiting = true, [torn.clone(), torn.clone()]),
        ];
        for (change, expected) in cases {
            assert_eq!(with(change), expected);
        }
        let traced = with(&|c| (c.stopped, c.tracer) = (Some('t'), Some("gdb (7)".into())));
        assert_eq!(
            traced,
            [
                "it is stopped by gdb (7), which traces it: SIGTERM stays pending",
                "it is held by gdb (7), which traces it"
            ]
        );
    }

    #[test]
    fn this_process_is_running() {
        let own = std::process::id();
        assert!(!is_stopped(own) && !is_unreachable(own));
        assert_eq!(why(own, Signal::KILL), None);
    }
}
