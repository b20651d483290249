//! The container engine: which containers run and which ports they publish, asked over the docker-compatible API that
//! docker and podman speak, and stopping them.
//!
//! This module owns the way to the engine ([`Engine`]), what processes that hold published ports stand for ([`proxy`])
//! and how a process has to do with a container ([`roster`]). It is asked only where a container is involved: nothing
//! here runs for a plain port. Every call blocks, for at most [`TIMEOUT`]; a hung daemon hangs nobody.

mod address;
pub mod proxy;
pub mod roster;
#[cfg(test)]
mod testing;

use std::fmt;
use std::fs;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use bollard::errors::Error::{DockerResponseServerError, SocketNotFoundError};
use bollard::models::{ContainerSummary, PortSummary, PortSummaryTypeEnum};
use bollard::query_parameters::StopContainerOptionsBuilder;
use bollard::{ClientVersion, Docker};
use jiff::Timestamp;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use self::address::{Address, candidates, named};
pub use self::roster::{Container, Published, PublishedPort, Roster, Wanted, is_id, is_id_prefix, is_involved_in};
use crate::cgroup;
use crate::model::Protocol;
use crate::render::escape;

/// How long any answer may take.
pub const TIMEOUT: Duration = Duration::from_secs(2);

/// How long an engine may take to stop a container after its grace is over: it unmounts, and ends its proxies.
const STOP_MARGIN: Duration = Duration::from_secs(10);

/// Versions of the API, tried in this order: Docker 29 knows none before 1.44, and others up to Docker 24, podman among
/// them, none that is so new. What is asked for here is the same in both.
const VERSIONS: [ClientVersion; 2] =
    [ClientVersion { major_version: 1, minor_version: 44 }, ClientVersion { major_version: 1, minor_version: 24 }];

/// Why an engine could not be asked or did not obey, as one sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineError {
    pub message: String,
    /// For want of permission.
    pub denied: bool,
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for EngineError {}

/// An engine that answers.
pub struct Engine {
    docker: Docker,
    runtime: Runtime,
    address: Address,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Engine {
    /// The engine that `DOCKER_HOST` names (`unix://` or `tcp://`); without it the first that answers of the usual sockets
    /// of docker and podman, those of the caller's own among them.
    ///
    /// # Errors
    /// None answers, or none may be asked, which is said of the first that is there.
    pub fn connect() -> Result<Engine, EngineError> {
        let candidates = candidates(&|name| std::env::var(name).ok())?;
        let mut refusal = None;
        for address in candidates.iter().filter(|address| address.may_be_there()) {
            match Engine::open(address.clone()) {
                Ok(engine) => return Ok(engine),
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        let paths: Vec<String> = candidates.iter().map(Address::to_string).collect();
        Err(refusal.unwrap_or_else(|| EngineError {
            message: format!("no container engine is there: no socket at {}", paths.join(", ")),
            denied: false,
        }))
    }

    /// The engine at this address, as `DOCKER_HOST` has it.
    pub fn at(host: &str) -> Result<Engine, EngineError> {
        Engine::open(named(host, false)?)
    }

    fn open(address: Address) -> Result<Engine, EngineError> {
        let mut refusal = None;
        for version in &VERSIONS {
            let engine = Engine::speaking(address.clone(), version)?;
            match engine.runtime.block_on(async { timeout(TIMEOUT, engine.docker.ping()).await }) {
                Ok(Ok(_)) => return Ok(engine),
                // Too new for it, or too old.
                Ok(Err(error)) if status(&error) == Some(400) => refusal = Some(explain(&address, &error)),
                Ok(Err(error)) => return Err(explain(&address, &error)),
                Err(_) => return Err(engine.silence(TIMEOUT)),
            }
        }
        let message = format!("the container engine at {address} speaks no version of the API that portwatch does");
        Err(refusal.unwrap_or(EngineError { message, denied: false }))
    }

    fn speaking(address: Address, version: &ClientVersion) -> Result<Engine, EngineError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(|error| EngineError {
            message: format!("cannot start a runtime to ask the container engine: {error}"),
            denied: false,
        })?;
        // The client's own timeout counts whole seconds, and stops at the headers: ours comes first.
        let seconds = TIMEOUT.as_secs() + 1;
        let docker = match &address {
            Address::Unix(path) => Docker::connect_with_unix(path, seconds, version),
            Address::Tcp(address) => Docker::connect_with_http(address, seconds, version),
        };
        let docker = docker.map_err(|error| explain(&address, &error))?;
        Ok(Engine { docker, runtime, address })
    }

    /// Where it listens.
    pub fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// The running containers, by name.
    pub fn containers(&self) -> Result<Vec<Container>, EngineError> {
        let told = self.within(TIMEOUT, self.docker.list_containers(None))?;
        let mut containers: Vec<Container> = told.into_iter().filter_map(container).collect();
        containers.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(containers)
    }

    /// The running containers, and the one that the caller runs in.
    pub fn roster(&self) -> Result<Roster, EngineError> {
        Ok(Roster::new(self.endpoint(), self.containers()?, own_container()))
    }

    /// The container that publishes this port of the host, whether or not anybody listens on it: packet filter rules
    /// lead there without any listener.
    pub fn publishing(&self, port: u16, proto: Protocol) -> Result<Option<Published>, EngineError> {
        Ok(self.roster()?.publishing(port, proto))
    }

    /// The pid of the container's first process, in the pid namespace of the engine. `None`: it does not run.
    pub fn init_pid(&self, id: &str) -> Result<Option<u32>, EngineError> {
        let told = self.within(TIMEOUT, self.docker.inspect_container(id, None))?;
        let pid = told.state.and_then(|state| state.pid).and_then(|pid| u32::try_from(pid).ok());
        Ok(pid.filter(|pid| *pid != 0))
    }

    /// When the container was made, whether or not it was started anew since. `None`: the engine does not say.
    pub fn created(&self, id: &str) -> Result<Option<Timestamp>, EngineError> {
        let told = self.within(TIMEOUT, self.docker.inspect_container(id, None))?;
        Ok(told.created.and_then(|created| created.to_string().parse().ok()))
    }

    /// Stops these containers, all at once, each by the signal that its image asks for and after `grace` by SIGKILL. The
    /// engine counts in whole seconds: `grace` is rounded up. Returns when all have stopped or failed to, with a result
    /// for each.
    pub fn stop(&self, ids: &[&str], grace: Duration) -> Vec<Result<(), EngineError>> {
        let seconds = i32::try_from(grace.as_secs() + u64::from(grace.subsec_nanos() > 0)).unwrap_or(i32::MAX);
        let limit = Duration::from_secs(u64::try_from(seconds).unwrap_or(0)) + STOP_MARGIN;
        let docker = self.docker.clone().with_timeout(limit);
        let running: Vec<_> = ids
            .iter()
            .map(|id| {
                self.is_of_this_host(id)?;
                let (docker, id) = (docker.clone(), (*id).to_owned());
                let options = StopContainerOptionsBuilder::default().t(seconds).build();
                Ok(self.runtime.spawn(async move { docker.stop_container(&id, Some(options)).await }))
            })
            .collect();
        let wait = |task| match self.runtime.block_on(async { timeout(limit, task).await }) {
            Ok(Ok(Ok(()))) => Ok(()),
            // It had stopped already, or is gone altogether.
            Ok(Ok(Err(error))) if matches!(status(&error), Some(304 | 404)) => Ok(()),
            Ok(Ok(Err(error))) => Err(explain(&self.address, &error)),
            Ok(Err(error)) => Err(EngineError { message: format!("stopping it failed: {error}"), denied: false }),
            Err(_) => Err(self.silence(limit)),
        };
        running.into_iter().map(|task: Result<_, EngineError>| task.and_then(wait)).collect()
    }

    /// An engine at the end of a TCP connection may be another host's, whose containers have nothing to do with our ports
    /// even where everything else agrees: the first process of the container must be one of ours.
    fn is_of_this_host(&self, id: &str) -> Result<(), EngineError> {
        if matches!(self.address, Address::Unix(_)) {
            return Ok(());
        }
        let pid = self.init_pid(id)?;
        let path = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).ok());
        if path.is_some_and(|path| path.contains(id)) {
            return Ok(());
        }
        Err(EngineError {
            message: format!("the engine at {} runs it on another host than this", self.address),
            denied: false,
        })
    }

    /// The answer to a call, which must come within `limit`.
    fn within<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T, bollard::errors::Error>>,
    ) -> Result<T, EngineError> {
        match self.runtime.block_on(async { timeout(limit, call).await }) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(explain(&self.address, &error)),
            Err(_) => Err(self.silence(limit)),
        }
    }

    fn silence(&self, limit: Duration) -> EngineError {
        EngineError {
            message: format!("the container engine at {} did not answer within {} s", self.address, limit.as_secs()),
            denied: false,
        }
    }
}

/// Connects and reads the running containers; why not, where that fails, is in the roster.
pub fn ask() -> (Option<Engine>, Roster) {
    match Engine::connect().and_then(|engine| engine.roster().map(|roster| (engine, roster))) {
        Ok((engine, roster)) => (Some(engine), roster),
        Err(error) => (None, Roster::unreachable(error)),
    }
}

/// The container that this process runs in, where its cgroup shows it.
fn own_container() -> Option<String> {
    let lines = fs::read_to_string("/proc/self/cgroup").ok()?;
    lines.lines().find_map(cgroup::container).map(str::to_owned)
}

fn status(error: &bollard::errors::Error) -> Option<u16> {
    match error {
        DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

fn explain(address: &Address, error: &bollard::errors::Error) -> EngineError {
    // What went wrong is at the end of the chain.
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let kind = match error {
        // So the client calls it as well where a directory on the way may not be searched.
        SocketNotFoundError(path) => fs::metadata(path).err().map(|error| error.kind()),
        _ => cause.downcast_ref::<io::Error>().map(io::Error::kind),
    };
    let message = match (kind, error) {
        (Some(io::ErrorKind::PermissionDenied), _) => format!(
            "not permitted to ask the container engine at {address}; be a member of its group (docker), or use sudo"
        ),
        (Some(io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound), _) => {
            format!("no container engine answers at {address}; is it running?")
        }
        (_, DockerResponseServerError { status_code, message }) => {
            format!("the container engine at {address} says {status_code}: {}", escape(message.trim()))
        }
        _ => format!("cannot talk to the container engine at {address}: {}", escape(&cause.to_string())),
    };
    EngineError { message, denied: kind == Some(io::ErrorKind::PermissionDenied) }
}

/// `None` where it has no proper id, which no engine does.
pub(crate) fn container(told: ContainerSummary) -> Option<Container> {
    let id = told.id.filter(|id| is_id(id))?;
    // Under a link of another container's, docker tells `/other/alias` as well: its own name has one part.
    let names = told.names.unwrap_or_default();
    let name = names.iter().map(|name| name.trim_start_matches('/')).find(|name| is_name(name));
    let networks = told.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let addresses = networks.into_values().flat_map(|network| [network.ip_address, network.global_ipv6_address]);
    let mut ports: Vec<PublishedPort> = told.ports.unwrap_or_default().iter().filter_map(published).collect();
    ports.sort_by_key(|port| (port.host_port, port.proto, port.host_ip));
    Some(Container {
        name: name.map_or_else(|| id[..12].to_owned(), str::to_owned),
        id,
        image: told.image.unwrap_or_default(),
        ports,
        addresses: addresses.flatten().filter_map(|address| address.parse::<IpAddr>().ok()).collect(),
    })
}

/// What docker and podman allow for a name: it can be pasted into a shell.
fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

/// `None` for a port that is merely exposed, or of another protocol.
fn published(told: &PortSummary) -> Option<PublishedPort> {
    Some(PublishedPort {
        proto: match told.typ? {
            PortSummaryTypeEnum::TCP => Protocol::Tcp,
            PortSummaryTypeEnum::UDP => Protocol::Udp,
            _ => return None,
        },
        host_ip: told.ip.as_deref().and_then(|ip| ip.parse().ok()),
        host_port: told.public_port.filter(|port| *port != 0)?,
        container_port: told.private_port,
    })
}

#[cfg(test)]
mod tests;
