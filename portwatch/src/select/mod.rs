//! Which listeners a verb acts on: targets (any of them) and filters (all of them).
//!
//! Pure: user names are resolved, sets looked up and the caller's namespace found elsewhere. [`Selector`] answers in
//! two steps, because holders are dear: [`Selector::matches_socket`] looks at the socket alone and is asked of every
//! socket, [`Selector::matches`] looks at holders and age as well. A range of ports costs as much as one port.

mod glob;
mod origin;
mod shown;
mod target;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use globset::GlobMatcher;

pub use self::glob::{cwd_glob, glob, unit_glob};
pub use self::origin::{Facts, Family, Relative, Since, Variable, cgroup_path, started_after};
pub use self::shown::Shown;
pub use self::target::{BadTarget, Sets, Target, builtin_sets, parse_targets, without};
use crate::cgroup;
use crate::engine::Wanted;
use crate::model::{BootNs, Listener, NetnsId, Process, ProcessId, Protocol, Socket};
use crate::source::process::hidden_owner;

/// Everything that narrows a selection but targets. An empty list and `None` let everything pass; several values in
/// one list mean any of them.
#[derive(Clone, Debug, Default)]
pub struct Filters {
    /// `-4`: sockets of the IPv4 family. With `ipv6` as well: either.
    pub ipv4: bool,
    pub ipv6: bool,
    pub tcp: bool,
    pub udp: bool,
    /// Bound to exactly this address.
    pub addresses: Vec<IpAddr>,
    pub uids: Vec<u32>,
    pub pids: Vec<u32>,
    /// On the process name, or on the command line joined by spaces.
    pub commands: Vec<GlobMatcher>,
    pub cwds: Vec<GlobMatcher>,
    /// Looked up.
    pub containers: Vec<Wanted>,
    /// On the name of the systemd service, of the system's or of a user's manager, with or without `.service`.
    pub units: Vec<GlobMatcher>,
    pub older_than: Option<Duration>,
    pub since: Option<Since>,
    /// In the environment that a holder was started with, where that may be read.
    pub variables: Vec<Variable>,
    /// A holder is a child of this very process, or a child's child, and so on.
    pub descendants_of: Vec<ProcessId>,
    /// A holder's cgroup is this one, or below it; as [`cgroup_path`] gives them.
    pub cgroups: Vec<String>,
    /// A holder's parent is gone, and init or another subreaper in its place.
    pub orphans: bool,
    /// Not these, whatever else says.
    pub except: Vec<Target>,
    /// `None`: every namespace.
    pub netns: Option<NetnsId>,
}

/// Picks listeners.
#[derive(Clone, Debug)]
pub struct Selector {
    targets: Vec<Target>,
    filters: Filters,
    /// The targets without an address, as bitmaps. Those with one are looked at one by one: a bitmap for each address
    /// would let a short request take much memory.
    ports: Option<Ports>,
    placed: Vec<Target>,
    only_of: Option<u32>,
    facts: Facts,
}

#[derive(Clone, Debug)]
struct Ports {
    tcp: PortSet,
    udp: PortSet,
}

impl Selector {
    /// A range of more ports than this names none of them (see [`Selector::named_ports`]).
    pub const NAMED_RANGE_MAX: usize = 16;

    /// Picks what matches one of the targets, if there are any, and all of the filters.
    pub fn new(targets: Vec<Target>, filters: Filters) -> Self {
        let (placed, anywhere): (Vec<&Target>, Vec<&Target>) =
            targets.iter().partition(|target| target.address.is_some());
        let ports = (!anywhere.is_empty()).then(|| {
            let mut ports = Ports { tcp: PortSet::new(), udp: PortSet::new() };
            for target in anywhere {
                if target.proto != Some(Protocol::Udp) {
                    ports.tcp.insert(target.ports.clone());
                }
                if target.proto != Some(Protocol::Tcp) {
                    ports.udp.insert(target.ports.clone());
                }
            }
            ports
        });
        let placed = placed.into_iter().cloned().collect();
        Selector { targets, filters, ports, placed, only_of: None, facts: Facts::NONE }
    }

    /// From now on picks only what is of this user ([`Listener::is_of`]), whatever else it picks: not what somebody asks
    /// for, but what they may see. `None` lifts that again.
    pub fn show_only(&mut self, uid: Option<u32>) {
        self.only_of = uid;
    }

    /// Whether whoever asks may see the listener.
    pub fn may_see(&self, listener: &Listener) -> bool {
        self.only_of.is_none_or(|uid| listener.is_of(uid))
    }

    /// The same, with a way to look up what `--env`, `--descendant-of` and `--orphans` ask for. Without, these match nothing.
    pub fn with_facts(self, facts: Facts) -> Self {
        Selector { facts, ..self }
    }

    /// Whose listeners are all that it picks, as [`Selector::show_only`] said.
    pub fn shows_only(&self) -> Option<u32> {
        self.only_of
    }

    /// Whether it asks for what has to be looked up of each process.
    pub fn needs_facts(&self) -> bool {
        let Filters { variables, descendants_of, orphans, .. } = &self.filters;
        *orphans || !variables.is_empty() || !descendants_of.is_empty()
    }

    /// The same without what has to be looked up: picks all that this one does, and perhaps more.
    pub fn without_facts(self) -> Self {
        self.filtered(|filters| {
            filters.orphans = false;
            filters.variables.clear();
            filters.descendants_of.clear();
        })
    }

    /// The same with other filters.
    pub fn filtered(mut self, change: impl FnOnce(&mut Filters)) -> Self {
        change(&mut self.filters);
        self
    }

    /// The same for listeners whose times are `offset` ns ahead of those since boot.
    pub fn ahead_by(self, offset: u64) -> Self {
        let later = |since| match since {
            Since::After(moment) => Since::After(moment.saturating_add(offset)),
            Since::Mark(moment) => Since::Mark(moment.saturating_add(offset)),
        };
        self.filtered(|filters| filters.since = filters.since.map(later))
    }

    /// Whether nothing says which listeners are meant: no target, address, owner, process, directory, container or age.
    /// Families, protocols and namespaces narrow a selection but do not make one: `kill --tcp` names nothing.
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty() && self.filters.addresses.is_empty() && !self.has_process_filters()
    }

    /// Whether it matters who holds a listener, or for how long.
    pub fn has_process_filters(&self) -> bool {
        let Filters { uids, older_than, since, .. } = &self.filters;
        !uids.is_empty() || older_than.is_some() || since.is_some() || self.filters.want_a_holder()
    }

    /// Whether anything but the targets and the namespace narrows the selection.
    pub fn has_filters(&self) -> bool {
        let Filters { ipv4, ipv6, tcp, udp, addresses, except, .. } = &self.filters;
        *ipv4 || *ipv6 || *tcp || *udp || !addresses.is_empty() || !except.is_empty() || self.has_process_filters()
    }

    /// The targets as given, sets expanded.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// The filters as given.
    pub fn filters(&self) -> &Filters {
        &self.filters
    }

    /// Ports that the targets name one by one, or in a range of at most [`Selector::NAMED_RANGE_MAX`]: those of which a
    /// status is owed even when nobody has them. Sorted, each once; no protocol where both are meant.
    pub fn named_ports(&self) -> Vec<(u16, Option<Protocol>)> {
        let mut named: Vec<(u16, Option<Protocol>)> = Vec::new();
        for target in self.targets.iter().filter(|target| target.ports.len() <= Self::NAMED_RANGE_MAX) {
            let protos = [Protocol::Tcp, Protocol::Udp]
                .map(|proto| target.proto.is_none_or(|wanted| wanted == proto) && self.filters.allow(proto));
            let proto = match protos {
                [true, true] => None,
                [true, false] => Some(Protocol::Tcp),
                [false, true] => Some(Protocol::Udp),
                [false, false] => continue,
            };
            named.extend(target.ports.clone().map(|port| (port, proto)));
        }
        named.sort_unstable();
        named.dedup();
        // `8000` says all that `8000/tcp` says; None sorts first.
        let mut both = None;
        named.retain(|&(port, proto)| {
            if proto.is_none() {
                both = Some(port);
            }
            proto.is_none() || both != Some(port)
        });
        named
    }

    /// The addresses at which this port is meant, as far as targets, `--addr`, `-4` and `-6` say: all of both families where
    /// they say nothing.
    pub fn named_addresses(&self, port: u16) -> Vec<IpAddr> {
        let spelt_out = self.spelt_out_addresses(port);
        match &self.filters {
            _ if !spelt_out.is_empty() => spelt_out,
            Filters { ipv4: true, ipv6: false, .. } => vec![Ipv4Addr::UNSPECIFIED.into()],
            Filters { ipv4: false, ipv6: true, .. } => vec![Ipv6Addr::UNSPECIFIED.into()],
            _ => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        }
    }

    /// Those that targets or `--addr` spell out; none where the port is meant at any.
    pub fn spelt_out_addresses(&self, port: u16) -> Vec<IpAddr> {
        let targets = self.targets.iter().filter(|target| target.ports.contains(&port));
        let named: Option<Vec<IpAddr>> = targets.map(|target| target.address).collect();
        named.filter(|named| !named.is_empty()).unwrap_or_else(|| self.filters.addresses.clone())
    }

    /// What the socket alone can tell: false means that [`Selector::matches`] is false whoever holds it.
    pub fn matches_socket(&self, socket: &Socket) -> bool {
        self.matches_ports(socket)
            && self.filters.allow(socket.proto)
            && match socket.address {
                IpAddr::V4(_) => self.filters.ipv4 || !self.filters.ipv6,
                IpAddr::V6(_) => self.filters.ipv6 || !self.filters.ipv4,
            }
            && any_or_none(&self.filters.addresses, |address| *address == socket.address)
            && self.filters.netns.is_none_or(|netns| netns == socket.netns)
            && !self.excepts(socket)
    }

    fn excepts(&self, socket: &Socket) -> bool {
        self.filters.except.iter().any(|target| target.covers(socket))
    }

    /// Whether a port is not free, as it is meant, while this socket has it: where it is meant
    /// ([`Selector::named_addresses`]), nobody else can bind it then. Who holds it does not count; what `--except` names is
    /// to stay, and `-6` means a server of IPv6 alone.
    pub fn is_hindered_by(&self, socket: &Socket) -> bool {
        let Filters { ipv4, ipv6, .. } = self.filters;
        let is_foreign = ipv6 && !ipv4 && socket.address.is_ipv4();
        let is_met = |address| socket.overlaps(address);
        !is_foreign && !self.excepts(socket) && self.named_addresses(socket.port).into_iter().any(is_met)
    }

    /// Whether the listener is left out for what cannot be known of its holder, whose processes are not visible, rather than
    /// for its address or its user.
    pub fn may_mean(&self, listener: &Listener) -> bool {
        self.matches_socket(&listener.socket)
            && any_or_none(&self.filters.uids, |uid| *uid == listener.socket.uid)
            && hidden_owner(listener).is_some()
    }

    fn matches_ports(&self, socket: &Socket) -> bool {
        let is_set = |ports: &Ports| match socket.proto {
            Protocol::Tcp => ports.tcp.contains(socket.port),
            Protocol::Udp => ports.udp.contains(socket.port),
        };
        self.targets.is_empty()
            || self.ports.as_ref().is_some_and(is_set)
            || self.placed.iter().any(|target| target.covers(socket))
    }

    /// Whether the listener is meant. One holder that passes every process filter suffices; a ghost can pass by the
    /// owner of its socket only.
    pub fn matches(&self, listener: &Listener, now: BootNs) -> bool {
        self.matches_socket(&listener.socket)
            && self.may_see(listener)
            && self.is_old_enough(listener, now)
            && self.filters.since.is_none_or(|since| since.matches(listener))
            && self.matches_holders(listener)
    }

    fn matches_holders(&self, listener: &Listener) -> bool {
        if listener.is_ghost() {
            return !self.filters.want_a_holder() && any_or_none(&self.filters.uids, |uid| *uid == listener.socket.uid);
        }
        listener.holders.iter().any(|holder| self.matches_process(&holder.process, &listener.socket))
    }

    /// Whether a holder of the socket passes the process filters: all but those of age. What has to be looked up comes last.
    pub fn matches_process(&self, process: &Process, socket: &Socket) -> bool {
        let Filters { uids, pids, commands, cwds, containers, units, cgroups, .. } = &self.filters;
        any_or_none(uids, |uid| process.uid == Some(*uid))
            && any_or_none(pids, |pid| *pid == process.id.pid)
            && (commands.is_empty() || {
                let line = process.command.join(" ");
                commands.iter().any(|glob| glob.is_match(&process.name) || (!line.is_empty() && glob.is_match(&line)))
            })
            && any_or_none(cwds, |glob| process.cwd.as_ref().is_some_and(|cwd| glob.is_match(cwd)))
            && any_or_none(containers, |container| container.matches(process, socket))
            && (units.is_empty() || {
                let unit = process.cgroup.as_deref().and_then(cgroup::unit);
                unit.is_some_and(|unit| {
                    let short = unit.strip_suffix(".service").unwrap_or(unit);
                    units.iter().any(|glob| glob.is_match(unit) || glob.is_match(short))
                })
            })
            && any_or_none(cgroups, |wanted| process.cgroup.as_ref().is_some_and(|own| origin::is_below(own, wanted)))
            && self.matches_facts(process)
    }

    fn matches_facts(&self, process: &Process) -> bool {
        let Filters { variables, descendants_of, orphans, .. } = &self.filters;
        let Facts { reader, environment, family } = self.facts;
        if *orphans || !descendants_of.is_empty() {
            let Some(family) = family(process.id) else { return false };
            if *orphans && !family.is_orphaned(process) {
                return false;
            }
            if !any_or_none(descendants_of, |id| family.descends_from(*id)) {
                return false;
            }
        }
        variables.is_empty()
            || environment(process.id, reader).is_some_and(|bytes| variables.iter().any(|wanted| wanted.is_in(&bytes)))
    }

    /// Of unknown age is not old: a clean-up must not end what it knows nothing of.
    fn is_old_enough(&self, listener: &Listener, now: BootNs) -> bool {
        self.filters.older_than.is_none_or(|limit| {
            listener.began().is_some_and(|began| u128::from(now.saturating_sub(began)) > limit.as_nanos())
        })
    }
}

impl Filters {
    /// Whether a process has to be there for a listener to match.
    fn want_a_holder(&self) -> bool {
        let Filters { pids, commands, cwds, containers, units, variables, descendants_of, cgroups, orphans, .. } = self;
        *orphans
            || !(pids.is_empty()
                && commands.is_empty()
                && cwds.is_empty()
                && containers.is_empty()
                && units.is_empty()
                && variables.is_empty()
                && descendants_of.is_empty()
                && cgroups.is_empty())
    }

    /// Whether sockets of this protocol are meant.
    pub(crate) fn allow(&self, proto: Protocol) -> bool {
        match proto {
            Protocol::Tcp => self.tcp || !self.udp,
            Protocol::Udp => self.udp || !self.tcp,
        }
    }
}

fn any_or_none<T>(wanted: &[T], matches: impl FnMut(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(matches)
}

/// A bitmap of all ports: 8 KiB, one look-up whatever the ranges.
#[derive(Clone)]
struct PortSet(Box<[u64; 1024]>);

impl PortSet {
    fn new() -> Self {
        PortSet(Box::new([0; 1024]))
    }

    /// Word by word: a request may have thousands of ranges of all ports.
    fn insert(&mut self, ports: std::ops::RangeInclusive<u16>) {
        let (first, last) = (*ports.start(), *ports.end());
        for word in first / 64..=last / 64 {
            let low = if word == first / 64 { first % 64 } else { 0 };
            let high = if word == last / 64 { last % 64 } else { 63 };
            self.0[usize::from(word)] |= u64::MAX << low & u64::MAX >> (63 - high);
        }
    }

    fn contains(&self, port: u16) -> bool {
        self.0[usize::from(port / 64)] & (1 << (port % 64)) != 0
    }
}

impl std::fmt::Debug for PortSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries((0..=u16::MAX).filter(|port| self.contains(*port))).finish()
    }
}
