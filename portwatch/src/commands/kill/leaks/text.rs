//! What a clean-up tells people: a line for each listener and each process that was ended for it, and one for all.

use portwatch::kill::{Cleaned, Directories, Ended, Leak, Restarter, text};
use portwatch::model::{Process, Socket};
use portwatch::render::{cut, escape, span};

use crate::commands::Users;

/// Columns of a command that a line shows; the report has all of it.
const COMMAND: usize = 120;

pub(super) fn told(since: &str, cleaned: &Cleaned) -> String {
    let mut lines: String = cleaned.leaks.iter().map(line).collect();
    let users = Users::default();
    for Socket { port, proto, uid, .. } in &cleaned.hidden {
        let user =
            users.name(*uid).map_or_else(|| format!("uid {uid}"), |name| format!("{} (uid {uid})", escape(&name)));
        lines += &format!("{port}/{proto} may have been left behind: of {user}, and since when is not yours to see\n");
    }
    lines.extend(cleaned.restarters.iter().map(restarter));
    lines + &text::swept(&Directories::of(&cleaned.outcomes)) + &total(since, cleaned)
}

/// All of it in one line.
fn total(since: &str, cleaned: &Cleaned) -> String {
    let unsure = match cleaned.hidden.len() {
        0 => String::new(),
        count => {
            let listeners = if count == 1 { "1 listener".to_owned() } else { format!("{count} listeners") };
            format!(
                "; {listeners} of others may have been: run this with sudo, or start the agent, which knows their age"
            )
        }
    };
    if cleaned.leaks.is_empty() {
        let nothing = if unsure.is_empty() { "nothing" } else { "nothing that you may look at" };
        return format!("{nothing} was left behind since {since}{unsure}\n");
    }
    let count = |alive: bool| cleaned.leaks.iter().filter(|leak| (leak.ended == Ended::Alive) == alive).count();
    let listeners = if cleaned.leaks.len() == 1 { "listener was" } else { "listeners were" };
    let mut total = format!("{} {listeners} left behind since {since}", cleaned.leaks.len());
    let restarters: Vec<&Restarter> = cleaned.restarters.iter().filter(|it| it.ended == Ended::Alive).collect();
    match (count(false), count(true)) {
        (_, 0) if !restarters.is_empty() => total += ", and ended",
        (_, 0) => total += ": none is there any more",
        (0, 1) => total += ": it is still there",
        (ended, alive) => total += &format!(": {ended} ended, {alive} still there"),
    }
    if cleaned.endless {
        total += "; more and more appear: end what starts them";
        if let Some(supervisor) = &cleaned.supervisor {
            let end = supervisor.stop_command().map(|stop| format!("; end it with: {stop}")).unwrap_or_default();
            total += &escape(&format!(", {}{end}", supervisor.describe()));
        }
    }
    if !restarters.is_empty() {
        let names: Vec<String> = restarters.iter().map(|it| named(&it.process)).collect();
        let pids: Vec<String> = restarters.iter().map(|it| it.process.id.pid.to_string()).collect();
        total += &format!("; it may start again, for {} is there still: kill {}", names.join(", "), pids.join(" "));
    }
    total + &unsure + "\n"
}

/// `8000/tcp terminated: python3 (4811) in /tmp/x, lived 3.2s: python3 -m http.server`, and out of whom it came.
fn line(leak: &Leak) -> String {
    let end = end(leak.ended, leak.note.as_ref());
    let mut line = format!("{}/{} {end}: ", leak.socket.port, leak.socket.proto);
    match &leak.process {
        Some(process) => {
            let lived = leak.lived.map(|lived| format!(", lived {}", span(lived))).unwrap_or_default();
            line += &format!("{}{lived}{}", named(process), place_and_command(process));
        }
        None => line += "nobody visible",
    }
    line.push('\n');
    // That everything comes from init is no news.
    if leak.ancestors.iter().any(|ancestor| ancestor.pid != 1) {
        let names: Vec<String> =
            leak.ancestors.iter().rev().map(|a| format!("{} ({})", escape(&a.name), a.pid)).collect();
        line += &format!("  from {}\n", names.join(" → "));
    }
    line
}

/// `sh (4711) terminated, for 8000/tcp came from it, in /tmp/x: sh -c while …`.
fn restarter(restarter: &Restarter) -> String {
    let Restarter { process, ports, ended, note } = restarter;
    let ports: Vec<String> = ports.iter().map(|(port, proto)| format!("{port}/{proto}")).collect();
    let came = format!("{} came from it", ports.join(", "));
    let why = if *ended == Ended::Alive { format!("and {came}") } else { format!("for {came}") };
    format!("{} {}, {why}{}\n", named(process), end(*ended, note.as_ref()), place_and_command(process))
}

fn end(ended: Ended, note: Option<&String>) -> String {
    let ended = match ended {
        Ended::Terminated => "terminated",
        Ended::Killed => "killed",
        Ended::Stopped => "stopped",
        Ended::Exited => "ended by itself",
        Ended::Alive => "is still there",
    };
    note.map_or_else(|| ended.to_owned(), |note| format!("{ended} ({})", escape(note)))
}

fn named(process: &Process) -> String {
    format!("{} ({})", escape(&process.name), process.id.pid)
}

/// `, in /tmp/x: python3 -m http.server`.
fn place_and_command(process: &Process) -> String {
    let mut text = process.cwd.as_ref().map(|cwd| format!(", in {}", escape(cwd))).unwrap_or_default();
    if !process.command.is_empty() {
        text += &format!(": {}", cut(&escape(&process.command.join(" ")), COMMAND));
    }
    text
}
