//! What is claimed, with its goal, and what the figures say of it.

use serde_json::Value;

pub(super) struct Claim {
    pub(super) claim: &'static str,
    pub(super) goal: &'static str,
    /// What was measured, and whether that meets the goal; `None`: nothing was.
    pub(super) measured: Option<(String, bool)>,
    /// Told where it is missed.
    pub(super) why_missed: &'static str,
}

/// A world of the bench: processes, open files of each, listeners, connections.
type World = [u64; 4];
const CROWD: World = [1000, 100, 10, 0];
const SMALL: World = [10, 100, 10, 0];
const CONNECTED: World = [1000, 100, 10, 100_000];
const GREAT: World = [5000, 100, 10, 0];

const WHO: &str = "portwatch who PORT --agent";
const LIST: &str = "portwatch list --no-agent";

/// All claims, in the order of the page. `found` has the JSON of each verb by its name, or null.
pub(super) fn all(found: &Value) -> Vec<Claim> {
    let parts = &found["bench"]["parts"];
    vec![
        Claim {
            claim: "`who PORT` through the agent, beside `lsof` (1,000 processes × 100 open files)",
            goal: "≥ 100 × faster",
            measured: times_faster(parts, CROWD, WHO, "lsof -nP -iTCP:PORT -sTCP:LISTEN", false, 100.0),
            why_missed: "what is left is the start of a process: exec, its arguments, one exchange over a socket.",
        },
        Claim {
            claim: "the same, beside `ss -ltnp sport = :PORT`",
            goal: "≥ 100 × faster",
            measured: times_faster(parts, CROWD, WHO, "ss -ltnp sport = :PORT", false, 100.0),
            why_missed: "what is left is the start of a process: exec, its arguments, one exchange over a socket.",
        },
        Claim {
            claim: "`who PORT` through the agent: 5,000 processes × 100 and 100,000 connections, beside 10 × 100",
            goal: "≤ 1.5 × (flat)",
            measured: flat(parts),
            why_missed: "the machine was busier in the larger world, or something there grows.",
        },
        Claim {
            claim: "`list` without agent as root, beside `ss -ltnp`",
            goal: "≥ 10 × faster",
            measured: times_faster(parts, CROWD, LIST, "ss -ltnp", false, 10.0),
            why_missed: "two thirds are the kernel's own walk over 100,000 descriptors (its `task_file` iterator takes a reference \
                         to each file); the rest is BTF, the verifier, and the start of a process.",
        },
        Claim {
            claim: "`list` unprivileged, beside `ss -ltnp` unprivileged",
            goal: "≥ 1.5 × faster",
            measured: times_faster(parts, CROWD, LIST, "ss -ltnp", true, 1.5),
            why_missed: "both read the same files of /proc; portwatch, which also tells namespaces and MPTCP, starts slower than \
                         a C program.",
        },
        Claim {
            claim: "listen() to the line of `watch --json`, p50, idle host",
            goal: "≤ 200 µs",
            measured: at_most(latency(parts, "p50_us"), 200.0, "µs"),
            why_missed: "the scheduler wakes two processes on the way, and the machine has few processors.",
        },
        Claim {
            claim: "the same, p99",
            goal: "≤ 2 ms",
            measured: at_most(latency(parts, "p99_us"), 2000.0, "µs"),
            why_missed: "the scheduler wakes two processes on the way, and the machine has few processors.",
        },
        Claim {
            claim: "added to connect, accept, close",
            goal: "≤ 1 % (95 % interval begins below)",
            measured: connect_cost(parts),
            why_missed: "this is the `tracepoint` tier, the one that this kernel allows: for each connection its sock_ops program runs \
                         nine times and its state tracepoint eight, each of which says no at once. The other tiers have no sock_ops.",
        },
        Claim {
            claim: "added to listen()",
            goal: "≤ 2 µs (95 % interval begins below)",
            measured: listen_cost(parts),
            why_missed: "the record of a listener is made in it.",
        },
        Claim {
            claim: "opens and closes a second that the agent bears without a loss",
            goal: "50,000, or what the machine can",
            measured: throughput(parts),
            why_missed: "on this machine those who storm and the agent share the processors; what is lost is counted, and the \
                         table is made true again.",
        },
        Claim {
            claim: "wake-ups of the idle agent with 1,000 listeners in 30 s",
            goal: "0",
            measured: parts["agent"]["idle"]["wake_ups"].as_u64().map(|count| (count.to_string(), count == 0)),
            why_missed: "the host did not leave it alone.",
        },
        Claim {
            claim: "resident memory of the agent with 1,000 listeners",
            goal: "≤ 20 MiB",
            measured: at_most(memory(parts, 1000), 20.0, "MiB"),
            why_missed: "see the table of its sizes.",
        },
        Claim {
            claim: "the same with 10,000",
            goal: "≤ 40 MiB",
            measured: at_most(memory(parts, 10_000), 40.0, "MiB"),
            why_missed: "see the table of its sizes.",
        },
        Claim {
            claim: "time to a port that can be bound, beside the best peer, each kind of server",
            goal: "≤ 1 ×; never back too early",
            measured: free(parts),
            why_missed: "what portwatch proves before it signals takes longer than a signal; it never comes back too early.",
        },
        Claim {
            claim: "bystanders hit by an adversary who recycles PIDs, forks and passes sockets on",
            goal: "0 in 10,000 rounds",
            measured: bystanders(&found["race"]),
            why_missed: "a bug: please report it.",
        },
        Claim {
            claim: "differences between the agent's table and the kernel's truth in chaos",
            goal: "0 on all kernels",
            measured: chaos(&found["chaos"]),
            why_missed: "a bug: please report it.",
        },
        Claim {
            claim: "an agent after an hour of mixed load",
            goal: "as it was before",
            measured: soak(&found["soak"]),
            why_missed: "see its verdicts. Where the table of its quarters tells of many more opens than the puppets made, and of \
                         lives not stored, others stormed on the same host meanwhile, and the agent followed them, too.",
        },
        Claim {
            claim: "inputs that break a parser",
            goal: "0",
            measured: fuzz(&found["fuzz"]),
            why_missed: "a bug: please report it.",
        },
    ]
}

fn median(parts: &Value, world: World, command: &str, unprivileged: bool) -> Option<f64> {
    let rows = parts["worlds"]["rows"].as_array()?;
    let of = |row: &Value| ["processes", "fds", "listeners", "connections"].map(|name| row["world"][name].as_u64());
    let row = rows.iter().find(|row| {
        of(row) == world.map(Some) && row["command"] == command && row["unprivileged"].as_bool() == Some(unprivileged)
    })?;
    row["median_ms"].as_f64()
}

fn times_faster(
    parts: &Value,
    at: World,
    ours: &str,
    peer: &str,
    unprivileged: bool,
    goal: f64,
) -> Option<(String, bool)> {
    let [ours, peer] = [ours, peer].map(|command| median(parts, at, command, unprivileged));
    let (ours, peer) = (ours?, peer?);
    let ratio = peer / ours;
    Some((format!("{ratio:.1} × ({ours:.2} ms, {peer:.1} ms)"), ratio >= goal))
}

fn flat(parts: &Value) -> Option<(String, bool)> {
    let [small, great, connected] = [SMALL, GREAT, CONNECTED].map(|world| median(parts, world, WHO, false));
    let (small, great, connected) = (small?, great?, connected?);
    let ratio = great.max(connected) / small;
    Some((format!("{ratio:.2} × ({small:.2}, {great:.2}, {connected:.2} ms)"), ratio <= 1.5))
}

fn at_most(value: Option<f64>, goal: f64, unit: &str) -> Option<(String, bool)> {
    value.map(|value| (format!("{value:.1} {unit}"), value <= goal))
}

fn entry(entries: &Value, is: impl Fn(&Value) -> bool) -> Option<&Value> {
    entries.as_array()?.iter().find(|entry| is(entry))
}

fn latency(parts: &Value, quantile: &str) -> Option<f64> {
    entry(&parts["latency"]["rows"], |row| row["host"] == "idle" && row["way"] == "watch")?[quantile].as_f64()
}

fn cost<'p>(parts: &'p Value, work: &str, of: &str) -> Option<&'p Value> {
    entry(&parts["cost"]["works"], |entry| entry["work"] == work).map(|entry| &entry[of])
}

/// Median, lower and upper end.
fn interval(cost: &Value) -> Option<[f64; 3]> {
    Some([cost["median"].as_f64()?, cost["low"].as_f64()?, cost["high"].as_f64()?])
}

fn connect_cost(parts: &Value) -> Option<(String, bool)> {
    let [median, low, high] = interval(cost(parts, "connect", "added_percent")?)?;
    let [_, noise_low, noise_high] = interval(cost(parts, "connect", "noise_percent")?)?;
    let shown = format!("{median:+.2} % ({low:+.2} to {high:+.2}; noise {noise_low:+.2} to {noise_high:+.2})");
    Some((shown, low <= 1.0))
}

fn listen_cost(parts: &Value) -> Option<(String, bool)> {
    let [median, low, high] = interval(cost(parts, "listen_call", "added_ns")?)?.map(|ns| ns / 1000.0);
    Some((format!("{median:+.2} µs ({low:+.2} to {high:+.2})"), low <= 2.0))
}

fn throughput(parts: &Value) -> Option<(String, bool)> {
    let it = &parts["throughput"];
    let (bears, machine) = (it["lossless_per_s"]["agent"].as_f64()?, it["machine_per_s"].as_f64()?);
    // Of what the machine can do, all but what the noise of two runs is.
    let met = bears >= 50_000.0_f64.min(0.9 * machine);
    Some((format!("{bears:.0} (the machine alone: {machine:.0})"), met))
}

fn memory(parts: &Value, listeners: u64) -> Option<f64> {
    let sizes = parts["agent"]["sizes"].as_array()?;
    let of = sizes.iter().filter(|size| size["listeners"].as_u64() == Some(listeners));
    of.filter_map(|size| size["rss_mib"].as_f64()).reduce(f64::max)
}

/// Of portwatch's ways the one that, like the peers, uses SIGKILL at once.
fn free(parts: &Value) -> Option<(String, bool)> {
    let ours: Vec<&Value> = parts["free"].as_array()?.iter().filter(|row| row["who"] == "portwatch").collect();
    let early: u64 = ours.iter().filter_map(|row| row["returned_too_early"].as_u64()).sum();
    let forced = ours.iter().filter(|row| row["command"].as_str().is_some_and(|line| line.contains("--force")));
    let ratios: Vec<(&str, f64)> =
        forced.filter_map(|row| Some((row["server"].as_str()?, row["of_best_peer"].as_f64()?))).collect();
    if ratios.is_empty() {
        return None;
    }
    let shown: Vec<String> = ratios.iter().map(|(server, ratio)| format!("{server} {ratio:.2} ×")).collect();
    let met = early == 0 && ratios.iter().all(|(_, ratio)| *ratio <= 1.0);
    Some((format!("{}; {early} times too early", shown.join(", ")), met))
}

fn bystanders(race: &Value) -> Option<(String, bool)> {
    let of = |row: &Value| Some((row["figures"]["hit"].as_u64()?, row["figures"]["rounds"].as_u64()?));
    let name = |row: &Value| row["command"].as_str().map(|line| line.split(' ').next().unwrap_or(line).to_owned());
    let rows = race["commands"].as_array()?;
    let (hit, rounds) = of(rows.first()?)?;
    let lies = rows.first()?["figures"]["untruthful"].as_u64()?;
    let peers: Vec<String> = rows[1..]
        .iter()
        .filter_map(|row| of(row).zip(name(row)).map(|((hit, rounds), name)| format!("{name} {hit} in {rounds}")))
        .collect();
    Some((
        format!("{hit} in {rounds}, {lies} untrue words ({})", peers.join(", ")),
        hit == 0 && lies == 0 && rounds >= 10_000,
    ))
}

fn chaos(rows: &Value) -> Option<(String, bool)> {
    let rows = rows.as_array().filter(|rows| !rows.is_empty())?;
    let count = |row: &Value| row["figures"]["differences"].as_array().map(Vec::len);
    let shown = |row: &Value| {
        let kernel = row["kernel"].as_str().unwrap_or("?");
        let points = row["figures"]["quiet_points"].as_u64().unwrap_or(0);
        count(row)
            .map_or_else(|| format!("{kernel}: broke off"), |count| format!("{kernel}: {count} at {points} points"))
    };
    let shown: Vec<String> = rows.iter().map(shown).collect();
    Some((shown.join(", "), rows.iter().all(|row| row["passed"] == true)))
}

fn soak(soak: &Value) -> Option<(String, bool)> {
    let verdicts = soak["verdicts"].as_array()?;
    let good = verdicts.iter().filter(|verdict| verdict["holds"] == true).count();
    let minutes = soak["minutes"].as_f64()?;
    let shown = format!("{good} of {} verdicts hold after {minutes:.0} minutes", verdicts.len());
    Some((shown, good == verdicts.len() && minutes >= 60.0))
}

fn fuzz(fuzz: &Value) -> Option<(String, bool)> {
    let targets = fuzz.as_array()?;
    let found = targets.iter().filter(|target| !target["finding"].is_null()).count();
    let inputs: u64 = targets.iter().filter_map(|target| target["inputs"].as_u64()).sum();
    let millions = inputs / 1_000_000;
    Some((format!("{found} of {} targets, {millions} million inputs", targets.len()), found == 0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_are_compared_with_goals() {
        let world = json!({"processes": 1000, "fds": 100, "listeners": 10, "connections": 0});
        let row = |command: &str, ms: f64| json!({"command": command, "unprivileged": false, "world": world, "median_ms": ms});
        let parts = json!({
            "worlds": {"rows": [row(LIST, 2.0), row("ss -ltnp", 30.0)]},
            "agent": {"sizes": [{"listeners": 1000, "rss_mib": 21.0}, {"listeners": 1000, "rss_mib": 19.0}]},
            "throughput": {"machine_per_s": 30_000.0, "lossless_per_s": {"agent": 28_000.0}},
        });
        assert_eq!(
            times_faster(&parts, CROWD, LIST, "ss -ltnp", false, 10.0),
            Some(("15.0 × (2.00 ms, 30.0 ms)".to_owned(), true))
        );
        assert_eq!(times_faster(&parts, CROWD, LIST, "ss -ltnp", true, 10.0), None);
        assert_eq!(at_most(memory(&parts, 1000), 20.0, "MiB"), Some(("21.0 MiB".to_owned(), false)));
        assert_eq!(throughput(&parts), Some(("28000 (the machine alone: 30000)".to_owned(), true)));
        let race = json!({"commands": [
            {"command": "portwatch kill", "figures": {"hit": 0, "rounds": 10_000, "untruthful": 0}},
            {"command": "fuser -k", "figures": {"hit": 7, "rounds": 1000, "untruthful": 3}},
            {"command": "killport", "skipped": "is not installed"},
        ]});
        assert_eq!(bystanders(&race), Some(("0 in 10000, 0 untrue words (fuser 7 in 1000)".to_owned(), true)));
    }
}
