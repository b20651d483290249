//! What the agent tells a monitoring system about itself: counters, gauges and a histogram, as Prometheus' text.
//!
//! Owns the names, the labels and the numbers; [`http`] serves them. Every series is there from the start, with 0, and
//! is found before the first event: an event costs a few atomic additions and no allocation. Nobody counts twice: rows
//! are counted once, by [`Metrics::recount`], and followed by their changes.

pub mod http;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use crate::kill::Status;
use crate::model::{BootNs, Change, Protocol};
use crate::source::Tier;
use crate::table::Table;

/// Upper bounds of the buckets in seconds: 10 µs to 1 s, three a decade.
const LATENCY_BUCKETS: [f64; 16] =
    [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0];

/// What can become of a port that is to be freed. A dry run frees nothing and is not counted.
const KILL_STATUSES: [(Status, &str); 7] = [
    (Status::Free, "free"),
    (Status::Cleaned, "cleaned"),
    (Status::Partial, "partial"),
    (Status::Ghost, "ghost"),
    (Status::Stuck, "stuck"),
    (Status::Respawned, "respawned"),
    (Status::Denied, "denied"),
];

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// The numbers. Shared by reference between the task that counts and the one that answers scrapes; nothing is locked
/// but the histogram, for as long as one addition takes.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    rows: Gauge,
    listeners: ByProtocol<Gauge>,
    opens: ByProtocol<Counter>,
    closes: ByProtocol<Counter>,
    conflicts: Counter,
    kills: [(Status, Counter); KILL_STATUSES.len()],
    rule_kills: Family<[(&'static str, String); 2], Counter>,
    dropped: Counter,
    resyncs: Counter,
    latency: Histogram,
    subscribers: Gauge,
    build: Family<Labels<2>, Gauge>,
}

/// Changes of the table by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    pub opens: u64,
    pub closes: u64,
    pub conflicts: u64,
    pub resyncs: u64,
}

#[derive(Debug)]
struct ByProtocol<M> {
    tcp: M,
    udp: M,
}

impl<M: Clone + Default + 'static> ByProtocol<M> {
    fn of(family: &Family<Labels<1>, M>) -> Self {
        let one = |proto| family.get_or_create(&[("proto", proto)]).clone();
        ByProtocol { tcp: one("tcp"), udp: one("udp") }
    }

    fn get(&self, proto: Protocol) -> &M {
        match proto {
            Protocol::Tcp => &self.tcp,
            Protocol::Udp => &self.udp,
        }
    }
}

/// A new metric, in the registry.
fn register<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

impl Metrics {
    /// Everything at 0, with `tier` as how listeners are learnt.
    pub fn new(tier: Tier) -> Metrics {
        let mut registry = Registry::with_prefix("portwatch");
        let r = &mut registry;
        // The encoder ends each help with a full stop, and the name of each counter with `_total`.
        let kills: Family<Labels<1>, Counter> =
            register(r, "kills", "Ports that were to be freed, by what became of them");
        let latency = Histogram::new(LATENCY_BUCKETS);
        r.register(
            "event_latency_seconds",
            "Time from what happened in the kernel to its row in the table",
            latency.clone(),
        );
        let metrics = Metrics {
            rows: register(r, "table_rows", "Rows of the table: listeners of all protocols"),
            listeners: ByProtocol::of(&register(r, "listeners", "Listening sockets, by protocol")),
            opens: ByProtocol::of(&register(r, "opens", "Sockets that began to listen since the agent started")),
            closes: ByProtocol::of(&register(r, "closes", "Sockets that ceased to listen since the agent started")),
            conflicts: register(r, "conflicts", "Binds and listens that failed because the address was in use"),
            kills: KILL_STATUSES.map(|(status, label)| (status, kills.get_or_create(&[("status", label)]).clone())),
            rule_kills: register(r, "rule_kills", "Ports that rules were to free, by rule and what became of them"),
            dropped: register(r, "events_dropped", "Records that the kernel could not deliver"),
            resyncs: register(r, "resyncs", "Times that the table was read anew because records were lost"),
            latency,
            subscribers: register(r, "subscribers", "Clients that follow changes"),
            build: register(r, "build_info", "Always 1: the version, and the tier of probes in use"),
            registry,
        };
        metrics.tier(tier);
        metrics
    }

    /// Takes in a change of the table.
    pub fn change(&self, change: &Change) {
        match change {
            Change::Opened { listener, .. } => {
                let proto = listener.socket.proto;
                self.opens.get(proto).inc();
                self.listeners.get(proto).inc();
                self.rows.inc();
            }
            Change::Closed { listener, .. } => {
                let proto = listener.socket.proto;
                self.closes.get(proto).inc();
                self.listeners.get(proto).dec();
                self.rows.dec();
            }
            Change::Conflict { .. } => {
                self.conflicts.inc();
            }
            Change::Resync { lost, .. } => {
                self.resyncs.inc();
                self.dropped.inc_by(*lost);
            }
            Change::Holders { .. } => {}
        }
    }

    /// What was counted since the agent started, of all protocols.
    pub fn totals(&self) -> Totals {
        let sum = |counters: &ByProtocol<Counter>| counters.tcp.get() + counters.udp.get();
        Totals {
            opens: sum(&self.opens),
            closes: sum(&self.closes),
            conflicts: self.conflicts.get(),
            resyncs: self.resyncs.get(),
        }
    }

    /// Counts the rows: once the first snapshot is read, whose rows are no changes. Costs O(rows).
    pub fn recount(&self, table: &Table) {
        let count = |proto| table.listeners().filter(|listener| listener.socket.proto == proto).count();
        let (tcp, udp) = (count(Protocol::Tcp), count(Protocol::Udp));
        // Never as many as an i64 holds.
        self.listeners.tcp.set(tcp as i64);
        self.listeners.udp.set(udp as i64);
        self.rows.set((tcp + udp) as i64);
    }

    /// Takes in when the events of a batch happened, all applied to the table by `now`.
    pub fn batch(&self, now: BootNs, events: impl IntoIterator<Item = BootNs>) {
        for at in events {
            // ns to s; a table applies nothing before it happens.
            self.latency.observe(now.saturating_sub(at) as f64 / 1e9);
        }
    }

    /// Takes in what became of a port that was to be freed.
    pub fn kill(&self, status: Status) {
        if let Some((_, counter)) = self.kills.iter().find(|(known, _)| *known == status) {
            counter.inc();
        }
    }

    /// There is a rule of this name: its counters begin at 0.
    pub fn rule(&self, name: &str) {
        for (_, status) in KILL_STATUSES {
            drop(self.rule_kills.get_or_create(&[("rule", name.to_owned()), ("status", status.to_owned())]));
        }
    }

    /// Takes in what became of a port that a rule was to free; it is among the [kills](Metrics::kill), too.
    pub fn rule_kill(&self, name: &str, status: Status) {
        if let Some((_, status)) = KILL_STATUSES.iter().find(|(known, _)| *known == status) {
            self.rule_kills.get_or_create(&[("rule", name.to_owned()), ("status", (*status).to_owned())]).inc();
        }
    }

    /// How many clients follow changes now.
    pub fn subscribers(&self, count: usize) {
        self.subscribers.set(count as i64);
    }

    /// How listeners are learnt from now on.
    pub fn tier(&self, tier: Tier) {
        let tier = match tier {
            Tier::Fexit => "fexit",
            Tier::Kprobe => "kprobe",
            Tier::Tracepoint => "tracepoint",
            Tier::Poll => "poll",
        };
        self.build.clear();
        self.build.get_or_create(&[("version", env!("CARGO_PKG_VERSION")), ("tier", tier)]).set(1);
    }

    /// All of it in Prometheus' text format, version 0.0.4.
    pub fn text(&self) -> String {
        let mut open_metrics = String::new();
        encode(&mut open_metrics, &self.registry).expect("writing to a string");
        classic(&open_metrics)
    }
}

/// OpenMetrics, the only text that the crate writes, as the older format, which every scraper and `promtool check metrics`
/// read: there, the name of a counter includes its `_total`, and nothing marks the end.
fn classic(open_metrics: &str) -> String {
    let is_counter = |line: &str| line.strip_prefix("# TYPE ")?.strip_suffix(" counter").map(str::to_owned);
    let counters: Vec<String> = open_metrics.lines().filter_map(is_counter).collect();
    let mut text = String::with_capacity(open_metrics.len() + 16 * counters.len());
    for line in open_metrics.lines().filter(|line| *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(keyword), Some(name), Some(rest)) if counters.iter().any(|counter| counter == name) => {
                text.extend(["# ", keyword, " ", name, "_total ", rest]);
            }
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests;
