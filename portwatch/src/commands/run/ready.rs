//! When a supervised command listens: by events where the kernel or the agent tells, else by looking, as `wait` does.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use portwatch::model::{Listener, Protocol};
use portwatch::render::escape;
use portwatch::run::health;
use portwatch::select::{Filters, Selector, Target};
use portwatch::source::{Live, Probe, Scanner, Tier, diag, netns, stat};
use portwatch::tracker::Tracker;

use super::super::{explain, subscribe};
use crate::cli::Globals;
use portwatch::feed::Feed;

/// How often sockets are looked at without events, and how often a server is asked for its health: of a server that is up
/// and not well nothing tells when that changes.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Whether a descendant of this process holds it. The process must be one that lives on: its PID is believed.
pub(crate) fn is_held_below(listener: &Listener, watcher: u32) -> bool {
    listener.holders.iter().any(|holder| {
        let line = stat::ancestors(holder.process.id.pid, &|pid| stat::read(pid).ok());
        line.contains(&watcher)
    })
}

/// What of these descendants listens now, on one port or on any.
pub(crate) fn listening(watcher: u32, port: Option<u16>) -> anyhow::Result<Vec<Listener>> {
    let mut scanner = Scanner::open(Probe::Only(Tier::Poll));
    let wanted = |wanted: u16| port.is_none_or(|port| port == wanted);
    let mut listeners = scanner.scan(false, &|socket| wanted(socket.port))?.listeners;
    listeners.retain(|listener| is_held_below(listener, watcher));
    Ok(listeners)
}

/// Waits until a descendant of the watcher listens on the port, by the protocol that is `wanted`. Cancel safe.
pub(super) async fn bound(
    port: u16,
    wanted: Option<Protocol>,
    watcher: u32,
    globals: &Globals,
) -> anyhow::Result<Listener> {
    let own = netns::own()?;
    let is_it = |listener: &Listener| {
        let socket = &listener.socket;
        socket.port == port
            && wanted.is_none_or(|wanted| wanted == socket.proto)
            && socket.netns == own
            && is_held_below(listener, watcher)
    };
    let target = Target { ports: port..=port, proto: None, address: None };
    let selector = Selector::new(vec![target], Filters { netns: Some(own), ..Filters::default() });
    let mut feed = match subscribe(&selector, None, None, globals).await? {
        Some(subscription) => Feed::Agent(Box::new(subscription)),
        None => match attach(port, wanted, watcher, globals).await? {
            Attached::Found(listener) => return Ok(*listener),
            Attached::Live(live) => Feed::Own(Box::new(Tracker::follow(*live)?)),
        },
    };
    loop {
        if let Some(listener) = feed.listeners().into_iter().find(|listener| is_it(listener)) {
            return Ok(listener.clone());
        }
        feed.next().await?;
    }
}

enum Attached {
    Found(Box<Listener>),
    Live(Box<Live>),
}

/// Looks until probes are attached, which takes a tenth of a second; for good, where there are none.
async fn attach(port: u16, wanted: Option<Protocol>, watcher: u32, globals: &Globals) -> anyhow::Result<Attached> {
    let probe = globals.probe;
    let mut opening = Some(tokio::task::spawn_blocking(move || Live::open(probe, None)));
    let mut known = None;
    let mut looked = Instant::now();
    loop {
        let mut sockets = diag::dump()?.sockets;
        sockets.retain(|socket| socket.port == port && wanted.is_none_or(|wanted| wanted == socket.proto));
        // A descriptor may be passed on without a change of sockets.
        let is_old = looked.elapsed() > Duration::from_millis(500);
        if !sockets.is_empty() && (known.as_ref() != Some(&sockets) || is_old) {
            looked = Instant::now();
            let mut found = listening(watcher, Some(port))?.into_iter();
            if let Some(found) = found.find(|found| wanted.is_none_or(|wanted| wanted == found.socket.proto)) {
                return Ok(Attached::Found(Box::new(found)));
            }
        }
        known = Some(sockets);
        let attached = async {
            match &mut opening {
                Some(opening) => opening.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            live = attached => {
                opening = None;
                let live = live.context("attaching probes panicked")??;
                explain(globals, &format!("waiting for the command ({})", live.tier()));
                if live.tier().is_event_driven() {
                    return Ok(Attached::Live(Box::new(live)));
                }
            }
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

/// Waits until the server answers 2xx; `last` is told what it answered instead. Cancel safe.
pub(super) async fn well(listener: &Listener, path: &str, last: &dyn Fn(String)) {
    loop {
        match health::ask(health::reachable(&listener.socket), path).await {
            Ok(status) if health::is_well(status) => return,
            Ok(status) => last(status.to_string()),
            Err(reason) => last(reason),
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// `http://127.0.0.1:8000`, or `udp 127.0.0.1:8000`.
pub(super) fn url(listener: &Listener) -> String {
    let address = health::reachable(&listener.socket);
    match listener.socket.proto {
        Protocol::Tcp => format!("http://{address}"),
        Protocol::Udp => format!("udp {address}"),
    }
}

/// Where the command listens although nobody waits for that there, and who has the port: for the sentence that it was not
/// ready in time.
pub(super) fn instead(port: u16, proto: Protocol, watcher: u32) -> String {
    let elsewhere = listening(watcher, None).unwrap_or_default();
    let mut places: Vec<String> =
        elsewhere.iter().map(|listener| format!("{}/{}", listener.socket.endpoint(), listener.socket.proto)).collect();
    places.dedup();
    if !places.is_empty() {
        return format!("it listens on {} instead", places.join(", "));
    }
    match holder(port, proto) {
        Some(who) => format!("{who} has that port, and is none of its processes"),
        None => "it listens nowhere".to_owned(),
    }
}

/// Who listens on a port, in a few words.
pub(super) fn holder(port: u16, proto: Protocol) -> Option<String> {
    let mut scanner = Scanner::open(Probe::Only(Tier::Poll));
    let is_wanted = |socket: &portwatch::model::Socket| socket.port == port && socket.proto == proto;
    let listeners = scanner.scan(false, &is_wanted).ok()?.listeners;
    let process = listeners.iter().find_map(|listener| listener.binder()).map(|binder| &binder.process);
    match process {
        Some(process) => Some(format!("{} ({})", escape(&process.name), process.id.pid)),
        None => {
            listeners.first().map(|listener| format!("a process of uid {} that you may not see", listener.socket.uid))
        }
    }
}
