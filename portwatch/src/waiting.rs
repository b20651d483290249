//! What `wait` waits for: whether listeners, as they are at one moment, make it true, and the sentence that says so.
//!
//! Pure: listeners, clock and the trial bind are handed in. A *spot* is one port as a target means it, perhaps of one
//! protocol, perhaps on one address; `3000-3005` is six of them.
//!
//! *Bound* is a spot that a matching listener is at. *Free* is one that none is at and that a new server could bind: a
//! port may stay in use after its last listener closed (connections of a server that did not set `SO_REUSEADDR`, a
//! socket that is bound and does not listen). Then it is *lingering*, which no event ends.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::model::{BootNs, Listener, Protocol};
use crate::render::escape;
use crate::select::{Selector, Target};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    Bound,
    Free,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every spot.
    All,
    /// At least one.
    Any,
}

#[derive(Clone, Debug)]
pub struct Condition {
    selector: Selector,
    goal: Goal,
    scope: Scope,
    tries_bind: bool,
    is_narrowed: bool,
}

/// Tells whether binding a socket there fails because the address is in use.
pub type InUse<'a> = dyn FnMut(Protocol, IpAddr, u16) -> bool + 'a;

impl Condition {
    /// `in_own_netns`: whether the selector means the caller's network namespace alone, the only one to try a bind in.
    pub fn new(selector: Selector, goal: Goal, scope: Scope, in_own_netns: bool) -> Self {
        // With a holder or an age named, a port that somebody else has is as good as free.
        let tries_bind = goal == Goal::Free && in_own_netns && !selector.has_process_filters();
        Condition { selector, goal, scope, tries_bind, is_narrowed: false }
    }

    /// The listeners to judge by will be the caller's own alone.
    pub fn narrow(&mut self) {
        self.is_narrowed = true;
    }

    pub fn is_narrowed(&self) -> bool {
        self.is_narrowed
    }

    pub fn selector(&self) -> &Selector {
        &self.selector
    }

    /// Judges by the listeners there are. The bind is tried only where nothing else keeps it from being true.
    pub fn look<'a>(
        &'a self,
        listeners: impl IntoIterator<Item = &'a Listener>,
        now: BootNs,
        in_use: &mut InUse<'_>,
    ) -> Look<'a> {
        let mut matched: Vec<&Listener> =
            listeners.into_iter().filter(|listener| self.selector.matches(listener, now)).collect();
        matched.sort_by_key(|listener| (listener.socket.port, listener.socket.proto, listener.socket.address));
        let mut look = Look { condition: self, matched, lingering: BTreeSet::new(), free: None, is_true: false };
        look.is_true = look.judge(in_use);
        look
    }

    /// When a listener becomes old enough to match although nothing happens; `None` where only events matter.
    pub fn due<'a>(&self, listeners: impl IntoIterator<Item = &'a Listener>, now: BootNs) -> Option<Duration> {
        let limit = self.selector.filters().older_than.filter(|_| self.goal == Goal::Bound)?;
        let left = |listener: &Listener| {
            let age = Duration::from_nanos(now.saturating_sub(listener.began()?));
            // One more, because older is not as old.
            (age <= limit).then(|| limit - age + Duration::from_millis(1))
        };
        let young = listeners.into_iter().filter(|listener| self.selector.matches_socket(&listener.socket));
        young.filter_map(left).min()
    }

    /// Addresses that a new server on this spot would bind.
    fn addresses(&self, target: &Target) -> Vec<IpAddr> {
        let filters = self.selector.filters();
        if let Some(address) = target.address {
            return vec![address];
        }
        if !filters.addresses.is_empty() {
            return filters.addresses.clone();
        }
        let unspecified: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let wanted = |address: &IpAddr| match address {
            IpAddr::V4(_) => filters.ipv4 || !filters.ipv6,
            IpAddr::V6(_) => filters.ipv6 || !filters.ipv4,
        };
        unspecified.into_iter().filter(wanted).collect()
    }

    /// The protocol of a new server on this target, where that is worth a trial: TCP unless UDP alone is meant. Of a wide
    /// range, nobody wants to bind each port.
    fn trial(&self, target: &Target) -> Option<Protocol> {
        let filters = self.selector.filters();
        let is_meant = |proto: &Protocol| target.proto.is_none_or(|wanted| wanted == *proto) && filters.allow(*proto);
        let proto = [Protocol::Tcp, Protocol::Udp].into_iter().find(is_meant);
        proto.filter(|_| self.tries_bind && target.ports.len() <= Selector::NAMED_RANGE_MAX)
    }

    /// Where such a server would be kept from binding this port.
    fn lingers(&self, target: &Target, port: u16, in_use: &mut InUse<'_>) -> Option<(u16, Protocol)> {
        let proto = self.trial(target)?;
        self.addresses(target).into_iter().any(|address| in_use(proto, address, port)).then_some((port, proto))
    }
}

/// What was found at one moment.
#[derive(Debug)]
pub struct Look<'a> {
    condition: &'a Condition,
    /// Sorted by port.
    matched: Vec<&'a Listener>,
    /// Ports without listener that cannot be bound.
    lingering: BTreeSet<(u16, Protocol)>,
    /// Where any free port will do: the first that is, as its target means it.
    free: Option<Target>,
    is_true: bool,
}

/// One port, as it was found.
#[derive(Debug)]
pub struct Spot<'a> {
    pub port: u16,
    /// `None`: either, and neither is there.
    pub proto: Option<Protocol>,
    /// As the target names it.
    pub address: Option<IpAddr>,
    pub listeners: Vec<&'a Listener>,
    /// No listener, and yet in use.
    pub is_lingering: bool,
}

impl<'a> Look<'a> {
    pub fn is_true(&self) -> bool {
        self.is_true
    }

    /// Whether only a port that lingers keeps it from being true: no event will tell when that ends.
    pub fn is_lingering(&self) -> bool {
        !self.is_true && !self.lingering.is_empty()
    }

    fn judge(&mut self, in_use: &mut InUse<'_>) -> bool {
        let targets = self.condition.selector.targets();
        match (self.condition.goal, self.condition.scope) {
            (Goal::Bound, Scope::All) if !targets.is_empty() => {
                targets.iter().all(|target| target.ports.clone().all(|port| self.is_bound(target, port)))
            }
            (Goal::Bound, _) => !self.matched.is_empty(),
            (Goal::Free, _) if targets.is_empty() => self.matched.is_empty(),
            (Goal::Free, Scope::All) => {
                if !self.matched.is_empty() {
                    return false;
                }
                let tried = targets.iter().filter(|target| self.condition.trial(target).is_some());
                let spots = tried.flat_map(|target| target.ports.clone().map(move |port| (target, port)));
                self.lingering =
                    spots.filter_map(|(target, port)| self.condition.lingers(target, port, in_use)).collect();
                self.lingering.is_empty()
            }
            (Goal::Free, Scope::Any) => {
                let mut lingering = BTreeSet::new();
                let mut is_free = |target: &Target, port| {
                    let found = self.condition.lingers(target, port, in_use);
                    lingering.extend(found);
                    found.is_none()
                };
                let found = targets.iter().find_map(|target| {
                    let port =
                        target.ports.clone().find(|&port| !self.is_bound(target, port) && is_free(target, port))?;
                    Some(Target { ports: port..=port, ..target.clone() })
                });
                (self.lingering, self.free) = (lingering, found);
                self.free.is_some()
            }
        }
    }

    fn at(&self, target: &Target, port: u16) -> impl Iterator<Item = &'a Listener> {
        let first = self.matched.partition_point(|listener| listener.socket.port < port);
        let here = self.matched[first..].iter().copied().take_while(move |listener| listener.socket.port == port);
        here.filter(move |listener| target.covers(&listener.socket))
    }

    fn is_bound(&self, target: &Target, port: u16) -> bool {
        self.at(target, port).next().is_some()
    }

    fn is_left(&self, target: &Target, port: u16) -> bool {
        self.condition.trial(target).is_some_and(|proto| self.lingering.contains(&(port, proto)))
    }

    /// Every port that a target names (of a range longer than [`Selector::NAMED_RANGE_MAX`]: that is bound, or that was to
    /// be free and is), once for each protocol; without targets, every one that a matching listener is at.
    pub fn spots(&self) -> Vec<Spot<'a>> {
        let anything = [Target { ports: 1..=u16::MAX, proto: None, address: None }];
        let targets = self.condition.selector.targets();
        let targets = if targets.is_empty() { &anything[..] } else { targets };
        let mut spots = Vec::new();
        for target in targets {
            let named = target.ports.len() <= Selector::NAMED_RANGE_MAX;
            let mut ports: Vec<u16> = self.matched.iter().map(|listener| listener.socket.port).collect();
            ports.extend(target.ports.clone().filter(|_| named));
            ports.sort_unstable();
            ports.dedup();
            for port in ports.into_iter().filter(|port| target.ports.contains(port)) {
                let found: Vec<&Listener> = self.at(target, port).collect();
                let spot = |proto, listeners| Spot {
                    port,
                    proto,
                    address: target.address,
                    listeners,
                    is_lingering: self.is_left(target, port),
                };
                if found.is_empty() && named {
                    spots.push(spot(target.proto, Vec::new()));
                }
                for proto in [Protocol::Tcp, Protocol::Udp] {
                    let of: Vec<&Listener> = found.iter().copied().filter(|l| l.socket.proto == proto).collect();
                    if !of.is_empty() {
                        spots.push(spot(Some(proto), of));
                    }
                }
            }
        }
        // What came true is told whatever the range that it is in.
        if let Some(Target { ports, proto, address }) = &self.free {
            let (port, proto, address) = (*ports.start(), *proto, *address);
            spots.push(Spot { port, proto, address, listeners: Vec::new(), is_lingering: false });
        }
        spots.sort_by_key(|spot| (spot.port, spot.proto, spot.address));
        spots.dedup_by_key(|spot| (spot.port, spot.proto, spot.address));
        spots
    }

    /// What became true, or what is still missing, for people. `after` is put where the time belongs (` after 30s`,
    /// or nothing); `euid` is who reads it.
    pub fn sentence(&self, after: &str, euid: u32) -> String {
        let selectors = if self.condition.selector.has_filters() { " that matches the selectors" } else { "" };
        match (self.condition.goal, self.is_true) {
            (Goal::Bound, true) => format!("{}{after}", self.holders("is bound by", euid)),
            (Goal::Bound, false) => {
                let of_yours = if self.condition.is_narrowed { " of yours" } else { "" };
                format!("nothing{of_yours}{selectors} listens{}{after}", on(&self.unbound()))
            }
            (Goal::Free, true) => {
                let free = match self.condition.scope {
                    Scope::All => self.condition.selector.targets().to_vec(),
                    Scope::Any => self.free.clone().into_iter().collect(),
                };
                match free.as_slice() {
                    // Others may have the port, and nothing was bound.
                    many if self.condition.selector.has_process_filters() => {
                        format!("nothing{selectors} listens{}{after}", on(many))
                    }
                    [] => format!("nothing{selectors} listens{after}"),
                    [one] if one.ports.len() == 1 => format!("{one} is free{after}"),
                    many => format!("{} are free{after}", listed(many)),
                }
            }
            (Goal::Free, false) if self.is_lingering() => {
                let name = |(port, proto): &(u16, Protocol)| match proto {
                    Protocol::Tcp => port.to_string(),
                    Protocol::Udp => format!("{port}/udp"),
                };
                let ports: Vec<String> = self.lingering.iter().map(name).collect();
                let (it, ports) = (if ports.len() == 1 { "it" } else { "they" }, listed(&ports));
                format!(
                    "nothing listens on {ports} any more, but {it} cannot be bound yet{after}: connections or a bound \
                     socket remain; see `portwatch diagnose {}`",
                    ports.replace(", ", " ")
                )
            }
            (Goal::Free, false) => format!("{}{after}", self.holders("is still held by", euid)),
        }
    }

    /// `8000/tcp is bound by python3 (123), 8080/tcp by node (7)`.
    fn holders(&self, verb: &str, euid: u32) -> String {
        let mut groups: Vec<Vec<&Listener>> = Vec::new();
        for listener in &self.matched {
            let key = |listener: &Listener| (listener.socket.port, listener.socket.proto);
            match groups.last_mut() {
                Some(group) if key(group[0]) == key(listener) => group.push(listener),
                _ => groups.push(vec![listener]),
            }
        }
        let phrase = |(index, group): (usize, &Vec<&Listener>)| {
            let (port, proto) = (group[0].socket.port, group[0].socket.proto);
            let verb = if index == 0 { verb } else { "by" };
            format!("{port}/{proto} {verb} {}", who(group, euid))
        };
        listed(&groups.iter().enumerate().map(phrase).collect::<Vec<_>>())
    }

    /// The spots without a listener that has been waited for, runs of ports joined.
    fn unbound(&self) -> Vec<Target> {
        let mut found: Vec<Target> = Vec::new();
        for target in self.condition.selector.targets() {
            let mut is_first = true;
            for port in target.ports.clone() {
                if self.is_bound(target, port) || self.is_left(target, port) {
                    continue;
                }
                match found.last_mut() {
                    Some(run) if !is_first && *run.ports.end() + 1 == port => run.ports = *run.ports.start()..=port,
                    _ => found.push(Target { ports: port..=port, ..target.clone() }),
                }
                is_first = false;
            }
        }
        found
    }
}

/// At most this many things are named in a sentence.
const NAMED: usize = 8;

fn listed(things: &[impl ToString]) -> String {
    let mut text: Vec<String> = things.iter().take(NAMED).map(ToString::to_string).collect();
    if things.len() > NAMED {
        text.push(format!("and {} more", things.len() - NAMED));
    }
    text.join(", ")
}

fn on(targets: &[Target]) -> String {
    if targets.is_empty() { String::new() } else { format!(" on {}", listed(targets)) }
}

/// `python3 (123) and 2 more`.
fn who(group: &[&Listener], euid: u32) -> String {
    let pids: BTreeSet<u32> =
        group.iter().flat_map(|listener| &listener.holders).map(|holder| holder.process.id.pid).collect();
    let Some(binder) = group.iter().find_map(|listener| listener.binder()) else {
        let uid = group[0].socket.uid;
        return if euid == 0 || euid == uid {
            "no visible process".to_owned()
        } else {
            format!("uid {uid} (not visible to you; try sudo)")
        };
    };
    let more = if pids.len() > 1 { format!(" and {} more", pids.len() - 1) } else { String::new() };
    format!("{} ({}){more}", escape(&binder.process.name), binder.process.id.pid)
}

#[cfg(test)]
mod tests;
