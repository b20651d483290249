use std::collections::BTreeSet;
use std::sync::Arc;

use super::*;
use crate::model::{Attempt, Event, Listener, Process, ProcessId, Snapshot, Socket, SocketId};

fn listener(proto: Protocol, inode: u64) -> Listener {
    let address = std::net::Ipv4Addr::LOCALHOST.into();
    let id = SocketId { inode, cookie: inode };
    let socket = Socket { id, proto, mptcp: false, address, port: 8000, v6only: None, netns: 1, uid: 0, backlog: None };
    Listener { socket, since: None, holders: Vec::new() }
}

fn conflict() -> Change {
    let listener = listener(Protocol::Tcp, 1);
    let by = Arc::new(Process::bare(ProcessId { pid: 7, start: 1 }, "evil\n\"name\\"));
    let Socket { proto, address, port, netns, .. } = listener.socket;
    let attempt = Attempt { proto, address, port, netns, errno: 98, by };
    Change::Conflict { at: 1, attempt, held_by: Some(listener) }
}

/// Some of everything.
fn busy() -> Metrics {
    let metrics = Metrics::new(Tier::Fexit);
    let mut table = Table::new();
    let listeners = vec![listener(Protocol::Tcp, 1), listener(Protocol::Tcp, 2), listener(Protocol::Udp, 3)];
    table.apply(Event::Snapshot(Snapshot { at: 1, listeners, complete: vec![1], lost: 0 }));
    metrics.recount(&table);
    metrics.change(&Change::Opened { at: 1, listener: listener(Protocol::Tcp, 4) });
    metrics.change(&Change::Opened { at: 1, listener: listener(Protocol::Udp, 5) });
    metrics.change(&Change::Holders { at: 1, listener: listener(Protocol::Udp, 5) });
    metrics.change(&Change::Closed { at: 1, listener: listener(Protocol::Udp, 3), by: None });
    metrics.change(&Change::Closed { at: 1, listener: listener(Protocol::Udp, 5), by: None });
    metrics.change(&conflict());
    metrics.change(&Change::Resync { at: 1, lost: 40 });
    metrics.change(&Change::Resync { at: 1, lost: 2 });
    // 15 µs, 1 ms, 3 s, and an event that claims to come from the future.
    metrics.batch(10_000_000_000, [9_999_985_000, 9_999_000_000, 7_000_000_000, 10_000_000_001]);
    metrics.kill(Status::Cleaned);
    metrics.kill(Status::Cleaned);
    metrics.kill(Status::Denied);
    metrics.kill(Status::Planned);
    metrics.subscribers(3);
    metrics.tier(Tier::Tracepoint);
    metrics
}

/// The order of series within a family is not defined.
fn samples(text: &str) -> BTreeSet<&str> {
    text.lines().filter(|line| !line.starts_with('#')).collect()
}

#[test]
fn everything_is_counted_under_its_name() {
    let build = format!("portwatch_build_info{{version=\"{}\",tier=\"tracepoint\"}} 1", env!("CARGO_PKG_VERSION"));
    let mut expected: BTreeSet<String> = [
        "portwatch_table_rows 3",
        "portwatch_listeners{proto=\"tcp\"} 3",
        "portwatch_listeners{proto=\"udp\"} 0",
        "portwatch_opens_total{proto=\"tcp\"} 1",
        "portwatch_opens_total{proto=\"udp\"} 1",
        "portwatch_closes_total{proto=\"tcp\"} 0",
        "portwatch_closes_total{proto=\"udp\"} 2",
        "portwatch_conflicts_total 1",
        "portwatch_kills_total{status=\"free\"} 0",
        "portwatch_kills_total{status=\"cleaned\"} 2",
        "portwatch_kills_total{status=\"partial\"} 0",
        "portwatch_kills_total{status=\"ghost\"} 0",
        "portwatch_kills_total{status=\"stuck\"} 0",
        "portwatch_kills_total{status=\"respawned\"} 0",
        "portwatch_kills_total{status=\"denied\"} 1",
        "portwatch_events_dropped_total 42",
        "portwatch_resyncs_total 2",
        "portwatch_event_latency_seconds_sum 3.001015",
        "portwatch_event_latency_seconds_count 4",
        "portwatch_subscribers 3",
        &build,
    ]
    .map(str::to_owned)
    .into();
    let buckets = ["0.00001 1", "0.00002 2", "0.00005 2", "0.0001 2", "0.0002 2", "0.0005 2", "0.001 3", "0.002 3"];
    let more = ["0.005 3", "0.01 3", "0.02 3", "0.05 3", "0.1 3", "0.2 3", "0.5 3", "1.0 3", "+Inf 4"];
    for (bound, count) in buckets.iter().chain(&more).map(|bucket| bucket.split_once(' ').unwrap()) {
        expected.insert(format!("portwatch_event_latency_seconds_bucket{{le=\"{bound}\"}} {count}"));
    }
    let text = busy().text();
    assert_eq!(samples(&text), expected.iter().map(String::as_str).collect(), "{text}");
}

#[test]
fn every_series_is_there_before_anything_happens() {
    let names = |text: &str| -> BTreeSet<String> {
        samples(text).iter().filter_map(|line| Some(line.rsplit_once(' ')?.0.replace("tracepoint", "fexit"))).collect()
    };
    assert_eq!(names(&Metrics::new(Tier::Fexit).text()), names(&busy().text()));
}

#[test]
fn a_counter_is_declared_by_its_whole_name() {
    let open_metrics = "# HELP a_b Help of a_b counter.\n# TYPE a_b counter\na_b_total{x=\"# TYPE c counter\"} 1\n\
        # HELP c More.\n# TYPE c gauge\nc 2\n# EOF\n";
    let expected = "# HELP a_b_total Help of a_b counter.\n# TYPE a_b_total counter\na_b_total{x=\"# TYPE c counter\"} 1\n\
        # HELP c More.\n# TYPE c gauge\nc 2\n";
    assert_eq!(classic(open_metrics), expected);
}
