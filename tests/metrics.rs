//! The metrics, read by those for whom they are: a real Prometheus scrapes them, and promtool judges their names. They
//! come from the library's server, in this process.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use nix::libc;
use portwatch::kill::Status;
use portwatch::metrics::{Metrics, http};
use portwatch::model::{Change, Listener, Protocol, Socket, SocketId};
use portwatch::source::Tier;
use serde_json::Value;

use crate::puppet::{PATIENCE, Stage};
use crate::subject::{self, skip};
use crate::watcher::Watch;
use crate::{Test, test};

/// Metrics on a port of their own, until dropped.
struct Served {
    address: SocketAddr,
    /// One for each scrape, when it comes.
    scrapes: Receiver<()>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    fn start() -> Served {
        let metrics = Metrics::new(Tier::Tracepoint);
        for proto in [Protocol::Tcp, Protocol::Tcp, Protocol::Udp] {
            metrics.change(&Change::Opened { at: 1, listener: listener(proto) });
        }
        metrics.change(&Change::Resync { at: 1, lost: 5 });
        metrics.batch(1_000_000, [0, 990_000]);
        metrics.kill(Status::Cleaned);
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (scraped, scrapes) = mpsc::channel();
        let (bound, address) = mpsc::channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = http::bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a port");
                bound.send(listener.local_addr().expect("its address")).expect("the test waits");
                let source = move || {
                    // Nobody listens when the test has seen enough.
                    let _ = scraped.send(());
                    metrics.text()
                };
                tokio::select! {
                    () = http::serve(listener, source) => {}
                    _ = stopped => {}
                }
            });
        });
        let address = address.recv().expect("a server");
        Served { address, scrapes, stop: Some(stop), thread: Some(thread) }
    }

    fn wait_for_scrape(&self) {
        self.scrapes.recv_timeout(PATIENCE).expect("nobody scrapes");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.stop.take().map(|stop| stop.send(()));
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn listener(proto: Protocol) -> Listener {
    let (id, address) = (SocketId { inode: 1, cookie: 1 }, Ipv4Addr::LOCALHOST.into());
    let socket = Socket { id, proto, mptcp: false, address, port: 8000, v6only: None, netns: 1, uid: 0, backlog: None };
    Listener { socket, since: None, holders: Vec::new() }
}

/// Head and body of what an HTTP server answers.
fn get(address: SocketAddr, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).expect("a server");
    stream.set_read_timeout(Some(PATIENCE)).expect("SO_RCVTIMEO");
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an empty line");
    (head.to_owned(), body.to_owned())
}

/// A Prometheus that scrapes one target twice a second.
struct Prometheus {
    child: Child,
    address: SocketAddr,
    _stage: Stage,
}

impl Prometheus {
    /// `None`, loudly, where there is none.
    fn start(target: SocketAddr) -> Option<Prometheus> {
        let stage = Stage::new();
        let (config, data) = (stage.path("prometheus.yml"), stage.path("data"));
        let text = format!(
            "global: {{scrape_interval: 500ms, scrape_timeout: 500ms}}\n\
             scrape_configs: [{{job_name: portwatch, static_configs: [{{targets: ['{target}']}}]}}]\n"
        );
        fs::write(&config, text).expect("a configuration");
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", data.display()));
        command.args(["--web.listen-address=127.0.0.1:0", "--log.level=error"]).stdin(Stdio::null());
        // SAFETY: prctl takes integers.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                Ok(())
            });
        }
        // It does not tell which port it was given; portwatch does, the moment it listens.
        let mut watch = Watch::start(subject::event_tiers().first().unwrap_or(&"poll"));
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                skip("prometheus", &format!("it cannot be run: {error}"));
                return None;
            }
        };
        let mut prometheus = Prometheus { child, address: target, _stage: stage };
        let pid = prometheus.child.id();
        let opened =
            watch.until("Prometheus at a port", |event| event["event"] == "open" && event["process"]["pid"] == pid);
        let port = opened["listener"]["port"].as_u64().and_then(|port| port.try_into().ok()).expect("a port");
        prometheus.address = (Ipv4Addr::LOCALHOST, port).into();
        Some(prometheus)
    }

    fn api(&self, path: &str) -> Value {
        let (head, body) = get(self.address, &format!("/api/v1/{path}"));
        let answer: Value = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {head}\n{body}"));
        assert_eq!(answer["status"], "success", "{answer}");
        answer["data"].clone()
    }

    /// The value of an expression that has one.
    fn value(&self, expression: &str) -> String {
        let data = self.api(&format!("query?query={expression}"));
        let results = data["result"].as_array().expect("results");
        assert_eq!(results.len(), 1, "{expression}: {data}");
        results[0]["value"][1].as_str().expect("a value").to_owned()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn trials() -> Vec<Test> {
    vec![
        test("metrics::prometheus_scrapes_them_and_knows_their_types", || {
            let served = Served::start();
            let Some(prometheus) = Prometheus::start(served.address) else { return };
            // The second begins when the first is in the database.
            served.wait_for_scrape();
            served.wait_for_scrape();
            let target = prometheus.api("targets")["activeTargets"][0].clone();
            assert_eq!((&target["health"], &target["lastError"]), (&"up".into(), &"".into()), "{target}");
            for (expression, expected) in [
                ("up", "1"),
                ("portwatch_table_rows", "3"),
                ("portwatch_listeners{proto=\"tcp\"}", "2"),
                ("sum(portwatch_opens_total)", "3"),
                ("portwatch_kills_total{status=\"cleaned\"}", "1"),
                ("portwatch_events_dropped_total", "5"),
                ("portwatch_build_info{tier=\"tracepoint\"}", "1"),
                ("portwatch_event_latency_seconds_count", "2"),
                ("histogram_quantile(0.5,portwatch_event_latency_seconds_bucket)", "0.00001"),
            ] {
                assert_eq!(prometheus.value(expression), expected, "{expression}");
            }
            let types = prometheus.api("metadata");
            for (name, kind) in [
                ("portwatch_opens_total", "counter"),
                ("portwatch_listeners", "gauge"),
                ("portwatch_event_latency_seconds", "histogram"),
                ("portwatch_build_info", "gauge"),
            ] {
                assert_eq!(types[name][0]["type"], kind, "{types}");
            }
        }),
        test("metrics::promtool_finds_nothing_to_complain_of", || {
            let served = Served::start();
            let (head, text) = get(served.address, "/metrics");
            assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
            let mut check = Command::new("promtool");
            check.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut check = match check.spawn() {
                Ok(check) => check,
                Err(error) => return skip("prometheus", &format!("promtool cannot be run: {error}")),
            };
            check.stdin.take().expect("piped").write_all(text.as_bytes()).expect("promtool reads");
            let run = subject::finish(check).expect(0);
            assert_eq!((run.text(), run.errors()), (String::new(), String::new()), "{text}");
        }),
    ]
}
