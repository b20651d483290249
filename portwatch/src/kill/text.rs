//! What a kill says to people afterwards: one line per port. Pure; text from processes is escaped.

use std::collections::BTreeSet;
use std::net::IpAddr;

use rustix::process::Signal;

use super::directories::Directories;
use super::outcome::{Outcome, Status, Stopped};
use super::signal::SignalName;
use crate::diagnose::Kind;
use crate::render::{escape, span};
use crate::sweep::{Amount, Kept, Removed};

/// One line on one port, without the line's end.
pub fn outcome(outcome: &Outcome) -> String {
    let port = format!("{}/{}", outcome.port, outcome.proto);
    let seconds = span(outcome.elapsed);
    let note = outcome.diagnostics.as_ref().map(|d| escape(&d.message).into_owned());
    let with_note = |line: String| match &note {
        Some(note) => format!("{line}; {note}"),
        None => line,
    };
    let deeds = deeds(outcome);
    match outcome.status {
        Status::Free => with_note(format!("{port} is free already{}", on(&outcome.addresses))),
        Status::Planned => preview(outcome, Signal::TERM),
        Status::Cleaned if deeds.is_empty() => with_note(format!("{port} freed in {seconds}")),
        Status::Cleaned => with_note(format!("{port} freed: {deeds} in {seconds}")),
        Status::Respawned => with_note(format!("{port} is taken again")),
        Status::Partial | Status::Stuck | Status::Denied | Status::Ghost => {
            let what = match outcome.status {
                Status::Denied => "refused",
                Status::Ghost => "has no visible holder",
                Status::Stuck if !outcome.still_listening => "cannot be bound yet",
                _ => "is still taken",
            };
            explained(format!("{port} {what}"), [deeds, failures(outcome), note.unwrap_or_default()])
        }
    }
}

/// The same of a dry run, in which `signal` would have been the first.
pub fn preview(outcome: &Outcome, signal: Signal) -> String {
    let port = format!("{}/{}", outcome.port, outcome.proto);
    let note = outcome.diagnostics.as_ref().map(|d| escape(&d.message).into_owned()).unwrap_or_default();
    match outcome.status {
        Status::Planned if outcome.closes.is_some() => match outcome.remaining_pids.len() {
            0 => format!("{port}: would close the socket, which no visible process holds"),
            count => {
                let live = if count == 1 { "lives" } else { "live" };
                let holders = list(outcome, &outcome.remaining_pids);
                format!("{port}: would close the socket of {holders}, which {live} on")
            }
        },
        Status::Planned => {
            let refused = |pid: &u32| outcome.failed.iter().any(|f| f.pid == *pid);
            let goes = |pid: &u32| outcome.stopping.iter().any(|(_, pids)| pids.contains(pid));
            let would: Vec<u32> = outcome.remaining_pids.iter().copied().filter(|p| !refused(p) && !goes(p)).collect();
            let mut parts: Vec<String> =
                outcome.stopping.iter().map(|(stop, _)| format!("stop {}", whole(stop))).collect();
            if !would.is_empty() {
                let victims = list(outcome, &would);
                parts.push(match signal {
                    Signal::TERM => format!("terminate {victims}"),
                    Signal::KILL => format!("kill by force {victims}"),
                    other => format!("send {} to {victims}", SignalName(other)),
                });
            }
            let obstacles = [failures(outcome), note];
            let end = if obstacles.iter().all(String::is_empty) { "be freed" } else { "stay" };
            parts.extend(obstacles);
            explained(format!("{port} would {end}"), parts)
        }
        Status::Denied => explained(format!("{port} would be refused"), [failures(outcome), note]),
        Status::Partial | Status::Stuck if outcome.still_listening => {
            explained(format!("{port} would stay"), [failures(outcome), note])
        }
        _ => self::outcome(outcome),
    }
}

/// What is said, and why.
fn explained(what: String, parts: impl IntoIterator<Item = String>) -> String {
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    if parts.is_empty() { what } else { format!("{what}: {}", parts.join("; ")) }
}

/// ` on 127.0.0.1, ::1`; nothing for a port that is meant at any address.
fn on(addresses: &[IpAddr]) -> String {
    let each: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    if each.is_empty() { String::new() } else { format!(" on {}", each.join(", ")) }
}

/// What was found on a port that is not free, and the outcome's line does not say: indented lines, each with its end.
/// Of what that line says, only the command to go on with.
pub fn findings(outcome: &Outcome) -> String {
    let mut out = String::new();
    let is_blocked = outcome.status == Status::Stuck && !outcome.still_listening;
    for finding in outcome.diagnostics.iter().flat_map(|d| &d.findings) {
        let (is_told, indent) = match finding.kind {
            // Who listens is named in the line; their connections matter once nobody does.
            Kind::Held => continue,
            Kind::Bound | Kind::TimeWait | Kind::Connections if !is_blocked => continue,
            Kind::Bound | Kind::TimeWait | Kind::Connections => (true, "  "),
            kind if kind.is_obstacle() => (false, "    "),
            _ => continue,
        };
        if !is_told {
            out += &format!("  {}\n", escape(&finding.message));
        }
        if let Some(next) = &finding.next {
            out += &format!("{indent}→ {}\n", escape(next));
        }
    }
    out
}

/// The directories that were removed with a port's holders, or not: indented lines, each with its end.
pub fn directories(outcome: &Outcome) -> String {
    swept(&outcome.directories)
}

/// The same of directories, whoever's they were.
pub fn swept(Directories { removed, kept, planned }: &Directories) -> String {
    let mut out = String::new();
    for Removed { path, amount } in removed {
        out += &format!("  removed {} ({})\n", escape(path), amounts(amount));
    }
    for path in planned {
        out += &format!("  would remove {}\n", escape(path));
    }
    for Kept { path, reason, amount } in kept {
        let some = if *amount == Amount::default() { String::new() } else { format!(", removed {}", amounts(amount)) };
        out += &format!("  kept {}: {}{some}\n", escape(path), escape(reason));
    }
    out
}

/// `3 files, 2 directories, 12 KiB`.
fn amounts(Amount { files, directories, bytes }: &Amount) -> String {
    let plural = |count: &u64, one: &str, many: &str| match count {
        1 => format!("1 {one}"),
        _ => format!("{count} {many}"),
    };
    let size = match *bytes {
        bytes @ 0..1_024 => format!("{bytes} bytes"),
        bytes @ 1_024..1_048_576 => format!("{} KiB", bytes >> 10),
        bytes => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
    };
    format!("{}, {}, {size}", plural(files, "file", "files"), plural(directories, "directory", "directories"))
}

/// All outcomes in one line, without the line's end; `None` where that says no more than the one outcome does.
pub fn summary(outcomes: &[Outcome]) -> Option<String> {
    let pids = |of: &dyn Fn(&Outcome) -> Vec<u32>| outcomes.iter().flat_map(of).collect::<BTreeSet<u32>>();
    let forced = pids(&|o| o.forced.clone());
    let ended = pids(&|o| o.killed.clone());
    let failed = |refused: bool| pids(&|o| o.failed.iter().filter(|f| f.refused == refused).map(|f| f.pid).collect());
    // A process that is refused for one port is refused for each.
    let (refused, alive) = (failed(true), failed(false));
    let mut gone = pids(&|o| o.gone.clone());
    gone.retain(|pid| !ended.contains(pid));
    let processes = ended.len() + refused.len() + alive.len() + gone.len();
    if outcomes.len() < 2 && processes < 2 || outcomes.iter().any(|o| o.status == Status::Planned) {
        return None;
    }
    let count = |wanted: &dyn Fn(&Outcome) -> bool| outcomes.iter().filter(|o| wanted(o)).count();
    let ports = [
        (count(&|o| o.status == Status::Cleaned), "freed"),
        (count(&|o| o.status == Status::Free), "free already"),
        (count(&|o| !o.is_done()), "not"),
    ];
    let deeds = [
        (ended.len() - forced.len(), "terminated"),
        (forced.len(), "force-killed"),
        (gone.len(), "already gone"),
        (refused.len(), "refused"),
        (alive.len(), "still there"),
    ];
    let line = counted(&ports, "port", "ports");
    Some(match counted(&deeds, "process", "processes") {
        deeds if deeds.is_empty() => line,
        deeds => format!("{line}: {deeds}"),
    })
}

/// `2 ports freed, 1 not`: the noun stands with the first number.
fn counted(counts: &[(usize, &str)], one: &str, many: &str) -> String {
    let mut noun = true;
    let there = counts.iter().filter(|(count, _)| *count > 0);
    let parts = there.map(|(count, what)| {
        let noun = std::mem::take(&mut noun).then_some(if *count == 1 { one } else { many });
        [Some(count.to_string().as_str()), noun, Some(what)].into_iter().flatten().collect::<Vec<_>>().join(" ")
    });
    parts.collect::<Vec<_>>().join(", ")
}

/// `stopped container web; terminated a (1), b (2); killed by force c (3)`.
fn deeds(outcome: &Outcome) -> String {
    let gentle: Vec<u32> = outcome.killed.iter().copied().filter(|p| !outcome.forced.contains(p)).collect();
    let mut parts = Vec::new();
    if !outcome.stopped.is_empty() {
        let names: Vec<String> = outcome.stopped.iter().map(whole).collect();
        parts.push(format!("stopped {}", names.join(", ")));
    }
    if let Some(holders) = outcome.closes.as_deref().filter(|_| !outcome.closed.is_empty()) {
        let sockets = if outcome.closed.len() == 1 { "socket" } else { "sockets" };
        parts.push(match holders.is_empty() {
            true => format!("closed the {sockets} that no visible process holds"),
            false => format!("closed the {sockets} of {}", list(outcome, holders)),
        });
    }
    if !gentle.is_empty() {
        parts.push(format!("terminated {}", list(outcome, &gentle)));
    }
    if !outcome.forced.is_empty() {
        parts.push(format!("killed by force {}", list(outcome, &outcome.forced)));
    }
    parts.join("; ")
}

/// `container web`, `unit web.service`.
fn whole(stopped: &Stopped) -> String {
    let (what, name) = stopped.describe();
    format!("{what} {}", escape(name))
}

fn failures(outcome: &Outcome) -> String {
    let each: Vec<String> =
        outcome.failed.iter().map(|f| format!("{}: {}", list(outcome, &[f.pid]), escape(&f.reason))).collect();
    each.join("; ")
}

fn list(outcome: &Outcome, pids: &[u32]) -> String {
    let name = |pid: &u32| match outcome.names.iter().find(|(p, _)| p == pid) {
        Some((_, name)) => format!("{} ({pid})", escape(name)),
        None => pid.to_string(),
    };
    pids.iter().map(name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::diagnose::Finding;
    use crate::kill::outcome::{Diagnostics, Failure};

    fn check(change: impl FnOnce(&mut Outcome), expected: &str) {
        let mut subject = sample();
        change(&mut subject);
        assert_eq!(outcome(&subject), expected);
    }

    fn sample() -> Outcome {
        Outcome {
            elapsed: Duration::from_millis(120),
            names: vec![(1, "init".into()), (7, "python3".into()), (8, "e\u{1b}[31mvil\n".into())],
            ..Outcome::example(8000, Status::Cleaned)
        }
    }

    #[test]
    fn directories_are_told_with_what_was_in_them() {
        let amount = |files, directories, bytes| Amount { files, directories, bytes };
        let path = || "/tmp/w\u{7}".to_owned();
        let mut subject = sample();
        subject.directories = Directories {
            removed: vec![Removed { path: path(), amount: amount(1, 1, 4096) }],
            kept: vec![
                Kept { path: path(), reason: "no".into(), amount: amount(0, 0, 0) },
                Kept { path: path(), reason: "e\u{1b}".into(), amount: amount(2, 0, 3 << 20) },
            ],
            planned: vec![path()],
        };
        let expected = "  removed /tmp/w\\x07 (1 file, 1 directory, 4 KiB)\n  would remove /tmp/w\\x07\n  \
            kept /tmp/w\\x07: no\n  kept /tmp/w\\x07: e\\x1b, removed 2 files, 0 directories, 3.0 MiB\n";
        assert_eq!(directories(&subject), expected);
    }

    #[test]
    fn a_summary_counts_ports_and_processes() {
        let port = |status, killed: &[u32], forced: &[u32]| {
            let mut outcome = sample();
            (outcome.status, outcome.killed, outcome.forced) = (status, killed.to_vec(), forced.to_vec());
            outcome
        };
        let failure = |pid, refused| Failure { pid, reason: String::new(), refused };
        let mut not = port(Status::Partial, &[], &[]);
        (not.failed, not.gone) = (vec![failure(5, true), failure(6, false)], vec![4]);
        for (outcomes, expected) in [
            (vec![], None),
            (vec![port(Status::Cleaned, &[1], &[])], None),
            (vec![port(Status::Planned, &[], &[]), port(Status::Planned, &[], &[])], None),
            (vec![port(Status::Cleaned, &[1, 2], &[2])], Some("1 port freed: 1 process terminated, 1 force-killed")),
            (
                vec![
                    port(Status::Cleaned, &[1], &[]),
                    port(Status::Cleaned, &[1, 2], &[]),
                    port(Status::Free, &[], &[]),
                ],
                Some("2 ports freed, 1 free already: 2 processes terminated"),
            ),
            (
                vec![port(Status::Cleaned, &[1, 3], &[3]), not],
                Some(
                    "1 port freed, 1 not: 1 process terminated, 1 force-killed, 1 already gone, 1 refused, 1 still there",
                ),
            ),
            (vec![port(Status::Free, &[], &[]), port(Status::Free, &[], &[])], Some("2 ports free already")),
        ] {
            assert_eq!(summary(&outcomes).as_deref(), expected);
        }
    }

    #[test]
    fn findings_add_what_the_line_does_not_say() {
        let finding = |kind, next: Option<&str>| Finding {
            kind,
            message: "e\u{1b}vil (7) has it".to_owned(),
            evidence: "fd 3".to_owned(),
            next: next.map(str::to_owned),
        };
        let check = |status, still_listening, findings: Vec<Finding>, expected: &str| {
            let diagnostics = Some(Diagnostics { findings, ..Diagnostics::default() });
            assert_eq!(super::findings(&Outcome { status, still_listening, diagnostics, ..sample() }), expected);
        };
        let ghost = || vec![finding(Kind::Ghost, Some("kill\t7")), finding(Kind::Ephemeral, Some("sysctl"))];
        check(Status::Ghost, true, ghost(), "  e\\x1bvil (7) has it\n    → kill\\t7\n");
        check(Status::Stuck, false, vec![finding(Kind::TimeWait, Some("ss -K"))], "  → ss -K\n");
        check(Status::Respawned, true, vec![finding(Kind::Held, Some("x")), finding(Kind::TimeWait, Some("y"))], "");
        assert_eq!(super::findings(&sample()), "");
    }

    #[test]
    fn each_outcome_is_one_line() {
        check(|o| o.status = Status::Free, "8000/tcp is free already");
        check(|o| o.killed = vec![7], "8000/tcp freed: terminated python3 (7) in 120ms");
        check(
            |o| {
                o.killed = vec![7, 8];
                o.forced = vec![8];
            },
            "8000/tcp freed: terminated python3 (7); killed by force e\\x1b[31mvil\\n (8) in 120ms",
        );
        check(
            |o| {
                o.status = Status::Denied;
                o.failed = vec![Failure { pid: 1, reason: "init is never signalled".into(), refused: true }];
            },
            "8000/tcp refused: init (1): init is never signalled",
        );
        check(
            |o| {
                o.status = Status::Respawned;
                let message = "x\x07 (9) took the port again".to_owned();
                o.diagnostics = Some(Diagnostics { message, ..Diagnostics::default() });
            },
            "8000/tcp is taken again; x\\x07 (9) took the port again",
        );
        check(
            |o| {
                o.status = Status::Planned;
                o.remaining_pids = vec![1, 7];
                o.failed = vec![Failure { pid: 1, reason: "no".into(), refused: true }];
            },
            "8000/tcp would stay: terminate python3 (7); init (1): no",
        );
        let web = || Stopped::Container { container: "5eed81bcd920".into(), name: "web".into() };
        let unit = || Stopped::Unit { unit: "w\u{7}.service".into(), user_manager: Some(1000) };
        check(
            |o| o.stopped = vec![web(), unit()],
            "8000/tcp freed: stopped container web, unit w\\x07.service in 120ms",
        );
        check(
            |o| {
                o.status = Status::Planned;
                o.remaining_pids = vec![7, 9];
                o.stopping = vec![(web(), vec![9])];
            },
            "8000/tcp would be freed: stop container web; terminate python3 (7)",
        );
        check(
            |o| (o.status, o.addresses) = (Status::Free, vec!["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()]),
            "8000/tcp is free already on 127.0.0.1, ::1",
        );
        let close = |o: &mut Outcome| (o.closes, o.closed) = (Some(Vec::new()), vec![5]);
        check(close, "8000/tcp freed: closed the socket that no visible process holds in 120ms");
        check(
            |o| {
                close(o);
                o.status = Status::Partial;
                o.diagnostics = Some(Diagnostics { message: "nobody".into(), ..Diagnostics::default() });
            },
            "8000/tcp is still taken: closed the socket that no visible process holds; nobody",
        );
    }

    #[test]
    fn a_dry_run_says_what_would_be() {
        let check = |status, still_listening, message: &str, signal, expected: &str| {
            let diagnostics =
                (!message.is_empty()).then(|| Diagnostics { message: message.to_owned(), ..Diagnostics::default() });
            let remaining_pids = vec![7];
            let subject = Outcome { status, still_listening, diagnostics, remaining_pids, ..sample() };
            assert_eq!(preview(&subject, signal), expected);
        };
        use Status::*;
        check(Planned, true, "", Signal::TERM, "8000/tcp would be freed: terminate python3 (7)");
        check(Planned, true, "", Signal::KILL, "8000/tcp would be freed: kill by force python3 (7)");
        check(Planned, true, "", Signal::INT, "8000/tcp would be freed: send SIGINT to python3 (7)");
        check(Planned, true, "x\x07", Signal::TERM, "8000/tcp would stay: terminate python3 (7); x\\x07");
        check(Denied, true, "no", Signal::TERM, "8000/tcp would be refused: no");
        check(Partial, true, "no", Signal::TERM, "8000/tcp would stay: no");
        check(Stuck, false, "no", Signal::TERM, "8000/tcp cannot be bound yet: no");
        check(Ghost, true, "no", Signal::TERM, "8000/tcp has no visible holder: no");
        check(Free, false, "no", Signal::TERM, "8000/tcp is free already; no");
    }
}
