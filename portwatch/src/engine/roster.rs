//! The running containers as an engine told them, and how a process has to do with one of them. Pure.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::EngineError;
use super::proxy::{Forward, Proxy};
use crate::cgroup;
use crate::model::{Listener, Process, Protocol, Socket};
use crate::render::escape;

/// Digits of an id that people and `docker ps` use.
const SHORT: usize = 12;

/// A running container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Letters, digits and `_.-`, which need no escaping; the short id where the engine told anything else.
    pub name: String,
    /// Hostile text.
    pub image: String,
    pub ports: Vec<PublishedPort>,
    /// In every network that it is attached to.
    pub addresses: Vec<IpAddr>,
}

/// A port of the host that leads into a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    pub proto: Protocol,
    /// `None`: not told. Unspecified: all addresses of the host.
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub container_port: u16,
}

/// Who publishes a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    pub container: Container,
    pub port: PublishedPort,
}

impl Container {
    /// The first 12 digits of the id.
    pub fn short_id(&self) -> &str {
        short(&self.id)
    }

    /// Whether `word` is its name or the beginning of its id.
    pub fn is_called(&self, word: &str) -> bool {
        self.name == word || (is_id_prefix(word) && self.id.starts_with(word))
    }

    fn publishes(&self, proto: Protocol, port: u16) -> impl Iterator<Item = &PublishedPort> {
        self.ports.iter().filter(move |published| (published.proto, published.host_port) == (proto, port))
    }
}

impl fmt::Display for Container {
    /// `web (5eed81bcd920)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.short_id())
    }
}

impl PublishedPort {
    fn reaches(&self, address: IpAddr) -> bool {
        self.host_ip.is_none_or(|ip| ip.is_unspecified() || address.is_unspecified() || ip == address)
    }
}

/// Whether the word can be the beginning of an id: 4 to 64 hexadecimal digits in lower case.
pub fn is_id_prefix(word: &str) -> bool {
    (4..=64).contains(&word.len()) && word.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether the word is a whole id.
pub fn is_id(word: &str) -> bool {
    word.len() == 64 && is_id_prefix(word)
}

fn short(id: &str) -> &str {
    id.get(..SHORT).unwrap_or(id)
}

/// Whether an engine has anything to say of a holder: it runs in a container, or stands for one.
pub fn is_involved_in(listeners: &[Listener]) -> bool {
    let is_involved = |process, socket| inside(process).is_some() || Proxy::of(process, socket).is_some();
    listeners.iter().any(|l| l.holders.iter().any(|holder| is_involved(&holder.process, &l.socket)))
}

/// The short id of the container that the process runs in.
fn inside(process: &Process) -> Option<&str> {
    process.cgroup.as_deref().and_then(cgroup::container)
}

/// What is known of the containers of this host.
#[derive(Clone, Debug, Default)]
pub struct Roster {
    answer: Answer,
    /// The short id of the container that portwatch itself runs in.
    own: Option<String>,
}

#[derive(Clone, Debug, Default)]
enum Answer {
    /// Nothing selected had to do with containers.
    #[default]
    NotAsked,
    Running {
        /// Where the engine listens.
        endpoint: String,
        containers: Vec<Container>,
    },
    Unreachable(EngineError),
}

/// How a process has to do with a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link<'a> {
    pub role: Role,
    /// `None`: no engine knows it.
    pub container: Option<&'a Container>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It holds the port for a container.
    Proxy(Proxy),
    /// It runs in the container with this short id.
    Inside(String),
}

impl Roster {
    pub fn new(endpoint: String, containers: Vec<Container>, own: Option<String>) -> Roster {
        Roster { answer: Answer::Running { endpoint, containers }, own }
    }

    pub fn unreachable(error: EngineError) -> Roster {
        Roster { answer: Answer::Unreachable(error), own: None }
    }

    pub fn containers(&self) -> &[Container] {
        match &self.answer {
            Answer::Running { containers, .. } => containers,
            Answer::NotAsked | Answer::Unreachable(_) => &[],
        }
    }

    /// Why no engine answered, if one was asked.
    pub fn error(&self) -> Option<&EngineError> {
        match &self.answer {
            Answer::Unreachable(error) => Some(error),
            Answer::NotAsked | Answer::Running { .. } => None,
        }
    }

    /// Who publishes the port, whether anybody listens on it or not.
    pub fn publishing(&self, port: u16, proto: Protocol) -> Option<Published> {
        self.containers().iter().find_map(|container| {
            let port = *container.publishes(proto, port).next()?;
            Some(Published { container: container.clone(), port })
        })
    }

    /// The container for which somebody holds this socket who is not visible, by the engine's word alone.
    pub fn publisher(&self, socket: &Socket) -> Option<&Container> {
        let publishes = |container: &&Container| {
            container.publishes(socket.proto, socket.port).any(|port| port.reaches(socket.address))
        };
        self.containers().iter().find(publishes)
    }

    /// How the holder of a socket has to do with a container.
    pub fn link(&self, process: &Process, socket: &Socket) -> Option<Link<'_>> {
        // Who runs in a container is of that container, also a docker-proxy: that of an engine in there, of whose
        // containers this host's engine knows nothing.
        if let Some(id) = inside(process) {
            let container = self.containers().iter().find(|container| container.id.starts_with(id));
            return Some(Link { role: Role::Inside(id.to_owned()), container });
        }
        let proxy = Proxy::of(process, socket)?;
        let container = self.containers().iter().find(|container| serves(container, &proxy, socket));
        Some(Link { role: Role::Proxy(proxy), container })
    }

    /// Whether portwatch runs in it.
    pub fn is_own(&self, container: &Container) -> bool {
        self.own.as_deref().is_some_and(|own| container.id.starts_with(own))
    }

    /// Why the holder is not signalled, where it holds the port for a container: what it stands for, and what to do.
    pub fn refusal(&self, link: &Link<'_>, socket: &Socket) -> String {
        let what = link.describe(socket);
        match (&link.role, link.container) {
            (Role::Proxy(proxy), Some(container)) => {
                let (command, name) = (proxy.command(), &container.name);
                format!("{what}; stop it with: {command} stop {name} (or --stop-container)")
            }
            (Role::Proxy(Proxy::Container { id }), None) => {
                format!("{what}; stop it with: podman stop {}", short(id))
            }
            _ => format!("{what}; stop that container instead ({})", self.ignorance()),
        }
    }

    /// Why the container cannot be stopped, and whether for want of permission; `None` where it can be tried.
    pub fn obstacle(&self, link: &Link<'_>, socket: &Socket) -> Option<(String, bool)> {
        let what = link.describe(socket);
        match link.container {
            Some(container) if self.is_own(container) => {
                Some((format!("{what}, in which portwatch itself runs: it is never stopped"), false))
            }
            Some(_) => None,
            None => {
                let denied = self.error().is_some_and(|error| error.denied);
                Some((format!("{what}, which cannot be stopped: {}", self.ignorance()), denied))
            }
        }
    }

    /// Why a container is not known.
    fn ignorance(&self) -> String {
        match &self.answer {
            Answer::NotAsked => "no container engine was asked".to_owned(),
            Answer::Unreachable(error) => error.message.clone(),
            Answer::Running { endpoint, .. } => format!("the engine at {endpoint} does not know it"),
        }
    }
}

impl Link<'_> {
    /// `publishes port 80 of container web (5eed81bcd920)`, `runs in container web (5eed81bcd920)`.
    pub fn describe(&self, socket: &Socket) -> String {
        let container = |id: &str| match self.container {
            Some(container) => format!("container {container}"),
            None => format!("container {}", short(id)),
        };
        match (&self.role, self.container) {
            (Role::Inside(id), _) => format!("runs in {}", container(id)),
            (Role::Proxy(Proxy::Container { id }), None) => {
                format!("publishes port {} for {}", socket.port, container(id))
            }
            (Role::Proxy(Proxy::Port(Forward { container_ip, container_port, .. })), None) => {
                format!("publishes port {container_port} of the container at {container_ip}")
            }
            (Role::Proxy(Proxy::Network { program }), None) => {
                format!("{program} holds ports for containers, and this may be one")
            }
            (Role::Proxy(_), Some(known)) => {
                let mut ports = known.publishes(socket.proto, socket.port);
                let port = ports.next().map_or(socket.port, |port| port.container_port);
                format!("publishes port {port} of container {known}")
            }
        }
    }
}

/// Whether the proxy holds the socket for this container. A process calls itself what it likes: whatever it says, the
/// engine must publish the very port that it holds.
fn serves(container: &Container, proxy: &Proxy, socket: &Socket) -> bool {
    match proxy {
        Proxy::Container { id } => {
            container.id == *id
                && container.publishes(socket.proto, socket.port).any(|port| port.reaches(socket.address))
        }
        // The address as well: another engine may publish the same port in another network namespace.
        Proxy::Port(forward) => {
            (forward.proto, forward.host_port) == (socket.proto, socket.port)
                && container.addresses.contains(&forward.container_ip)
                && container
                    .publishes(forward.proto, forward.host_port)
                    .any(|port| port.container_port == forward.container_port && port.reaches(socket.address))
        }
        Proxy::Network { .. } => {
            container.publishes(socket.proto, socket.port).any(|port| port.reaches(socket.address))
        }
    }
}

/// What `--container` names, looked up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    Container(Box<Container>),
    /// No engine answered: the beginning of an id.
    IdPrefix(String),
}

/// Why `--container` names nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Nobody could be asked for a name.
    Unreachable(EngineError),
    /// A sentence that shows what there is.
    Unknown(String),
}

/// Names of containers that a sentence shows.
const SHOWN: usize = 10;

impl Roster {
    /// The container with this name or id, or beginning of an id (4 digits at least). An id as `list --json` tells it, or
    /// a longer one, may also be of another engine's container than the one that was asked.
    pub fn find(&self, word: &str) -> Result<Wanted, Lost> {
        let word = word.strip_prefix('/').unwrap_or(word);
        let named = self.containers().iter().find(|container| container.name == word);
        let mut called = self.containers().iter().filter(|container| container.is_called(word));
        let wanted = match (named, called.next(), called.next()) {
            (Some(container), _, _) | (None, Some(container), None) => Wanted::Container(Box::new(container.clone())),
            (None, Some(_), Some(_)) => {
                return Err(Lost::Unknown(format!("more than one container has an id that begins with '{word}'")));
            }
            (None, None, _) => match &self.answer {
                Answer::Unreachable(error) if !is_id_prefix(word) => return Err(Lost::Unreachable(error.clone())),
                Answer::Unreachable(_) => Wanted::IdPrefix(word.to_owned()),
                _ if is_id_prefix(word) && word.len() >= SHORT => Wanted::IdPrefix(word.to_owned()),
                _ => {
                    return Err(Lost::Unknown(format!(
                        "no running container is called '{}'; {}",
                        escape(word),
                        self.names()
                    )));
                }
            },
        };
        Ok(wanted)
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.containers().iter().take(SHOWN).map(|container| container.name.as_str()).collect();
        match self.containers().len() {
            0 => "none runs".to_owned(),
            count if count > SHOWN => format!("running: {} and {} more", names.join(", "), count - SHOWN),
            _ => format!("running: {}", names.join(", ")),
        }
    }
}

impl Wanted {
    /// Whether the holder of the socket runs in the container, or holds the port for it.
    pub fn matches(&self, process: &Process, socket: &Socket) -> bool {
        let is_id = |id: &str| match self {
            Wanted::Container(container) => container.id.starts_with(id),
            // A cgroup is known by 12 digits: more of them cannot be compared.
            Wanted::IdPrefix(prefix) => id.starts_with(prefix.as_str()) || prefix.starts_with(id),
        };
        match (inside(process), Proxy::of(process, socket), self) {
            (Some(id), _, _) => is_id(id),
            (None, Some(Proxy::Container { id }), _) => is_id(&id),
            (None, Some(proxy), Wanted::Container(container)) => serves(container, &proxy, socket),
            (None, _, _) => false,
        }
    }
}

#[cfg(test)]
mod tests;
