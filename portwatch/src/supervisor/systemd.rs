//! Asks systemd, over D-Bus, to stop a unit, and what would start it again.
//!
//! A manager is reached by its bus. (Its private socket, which systemctl prefers as root, names a sender that D-Bus does
//! not allow, `:1`, and zbus refuses such a reply.) The functions block, each on an event loop of its own: call them
//! outside of any.

use std::env;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Uid;
use zbus::connection::Builder;
use zbus::export::futures_core::Stream;
use zbus::{Connection, MatchRule, Message, MessageStream, OwnedObjectPath, OwnedVariant, Variant, fdo};

use super::operand;
use crate::cgroup::Manager;
use crate::model::Protocol;
use crate::render::escape;

const SERVICE: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// How long a manager may take to answer anything but a job. It answers at once, or hangs.
const ANSWER: Duration = Duration::from_secs(1);

/// What became of a unit that was to be stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Active units, such as `web.socket`, that start it again at the next connection: they hold its port still.
    pub triggered_by: Vec<String>,
}

/// Why a manager did not do what it was asked. Its text is one line, safe to print.
#[derive(Clone, Debug)]
pub enum Error {
    /// No manager can be reached.
    NoManager {
        manager: Manager,
        cause: Arc<io::Error>,
    },
    /// It refuses this to us. Exit code 3.
    Denied {
        what: String,
    },
    NoSuchUnit {
        unit: String,
        manager: Manager,
    },
    /// The job ended otherwise than done: `failed`, `timeout`, `canceled` …
    Job {
        unit: String,
        manager: Manager,
        result: String,
    },
    /// It took longer than that.
    Timeout {
        what: String,
        after: Duration,
    },
    /// Anything else that D-Bus says.
    Other {
        what: String,
        cause: Box<zbus::Error>,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NoManager { manager: Manager::System, cause } => {
                write!(f, "cannot reach the system's systemd: {}; does systemd run this host?", Plain(cause))
            }
            Error::NoManager { manager: Manager::User(uid), cause } => write!(
                f,
                "cannot reach the systemd of uid {uid}: {}; is that user logged in, and XDG_RUNTIME_DIR set?",
                Plain(cause)
            ),
            Error::Denied { what } => write!(f, "cannot {what}: not permitted; try sudo"),
            Error::NoSuchUnit { unit, manager } => {
                let systemctl = systemctl(*manager);
                let unit = operand(unit);
                write!(f, "cannot stop {unit}: no such unit is loaded; {systemctl} list-units shows those that are")
            }
            Error::Job { unit, manager, result } => {
                let (systemctl, unit, result) = (systemctl(*manager), operand(unit), escape(result));
                write!(f, "cannot stop {unit}: its job ended as '{result}'; see: {systemctl} status {unit}")
            }
            Error::Timeout { what, after } => write!(f, "cannot {what}: no end after {:.1} s", after.as_secs_f64()),
            Error::Other { what, cause } => write!(f, "cannot {what}: {}", escape(&cause.to_string())),
        }
    }
}

fn systemctl(manager: Manager) -> String {
    super::systemctl(manager, Uid::effective().as_raw(), &super::user_name)
}

// Its text says all of it, the cause too: whoever prints chains of causes prints none of it twice.
impl std::error::Error for Error {}

/// An error of the system without the number that its own text ends in.
struct Plain<'a>(&'a io::Error);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        f.write_str(text.split(" (os error").next().unwrap_or(&text))
    }
}

/// Stops a unit, by its full name, and waits until it is stopped, at most `timeout`: services are given time to end
/// by systemd (`TimeoutStopSec=`, 90 s as a rule).
pub fn stop_unit(unit: &str, manager: Manager, timeout: Duration) -> Result<Stopped, Error> {
    let what = format!("stop {}", operand(unit));
    run(timeout, &what, async {
        let bus = Bus::connect(manager).await?;
        let failed = |error: zbus::Error| match &error {
            zbus::Error::MethodError(name, ..) if name.as_str() == "org.freedesktop.systemd1.NoSuchUnit" => {
                Error::NoSuchUnit { unit: unit.to_owned(), manager }
            }
            _ => other(&what, error),
        };
        // First of all: a job may be over before the answer is here.
        let mut removed = bus.jobs_removed().await.map_err(|error| other(&what, error))?;
        let reply = bus.manage("StopUnit", &(unit, "replace")).await.map_err(failed)?;
        let job: OwnedObjectPath = reply.body().deserialize().map_err(|error| other(&what, error))?;
        let result = loop {
            let Some(signal) = next(&mut removed).await else {
                return Err(other(&what, zbus::Error::Failure("it went away meanwhile".to_owned())));
            };
            let signal = signal.map_err(|error| other(&what, error))?;
            let body = signal.body();
            let (_, path, _, result): (u32, OwnedObjectPath, String, String) =
                body.deserialize().map_err(|error| other(&what, error))?;
            if path == job {
                break result;
            }
        };
        if result != "done" {
            return Err(Error::Job { unit: unit.to_owned(), manager, result });
        }
        Ok(Stopped { triggered_by: bus.active_triggers(unit).await.map_err(|error| other(&what, error))? })
    })
}

/// Whether there may be a bus by which this manager can be reached: a host without systemd has none.
pub fn is_there(manager: Manager) -> bool {
    addresses(manager).iter().any(|address| match address {
        Address::Bus(address) => address.strip_prefix("unix:path=").is_none_or(|path| {
            let path = path.split([',', ';']).next().unwrap_or(path);
            std::path::Path::new(path).exists()
        }),
        Address::OfUser(_, path) => std::path::Path::new(path).exists(),
    })
}

/// Whether the manager may start the service again when its process ends (any `Restart=` but `no`: which of them
/// applies depends on how the process takes a signal), or when somebody connects (socket activation).
pub fn restarts(unit: &str, manager: Manager) -> Result<bool, Error> {
    let what = format!("ask for the Restart= of {}", operand(unit));
    run(ANSWER, &what, async {
        let bus = Bus::connect(manager).await?;
        let restart: String = bus.property(unit, "Service", "Restart").await.map_err(|error| other(&what, error))?;
        if restart != "no" {
            return Ok(true);
        }
        let triggers = bus.active_triggers(unit).await.map_err(|error| other(&what, error))?;
        Ok(!triggers.is_empty())
    })
}

/// The unit that the manager itself counts this process to. A cgroup's path may name another one: of a systemd inside a
/// container, or whatever a service that was delegated its cgroup made up.
pub fn unit_of(pid: u32, manager: Manager) -> Result<Option<String>, Error> {
    let what = format!("ask for the unit of process {pid}");
    run(ANSWER, &what, async {
        let bus = Bus::connect(manager).await?;
        let path: OwnedObjectPath = match bus.manage("GetUnitByPID", &pid).await {
            Ok(reply) => reply.body().deserialize().map_err(|error| other(&what, error))?,
            Err(zbus::Error::MethodError(name, ..)) if name.as_str() == "org.freedesktop.systemd1.NoUnitForPID" => {
                return Ok(None);
            }
            Err(error) => return Err(other(&what, error)),
        };
        let id: String = bus.property_at(path, "Unit", "Id").await.map_err(|error| other(&what, error))?;
        Ok(Some(id))
    })
}

/// The active `.socket` unit for which the manager listens there.
pub fn socket_unit(endpoint: SocketAddr, proto: Protocol, manager: Manager) -> Result<Option<String>, Error> {
    let what = "ask for socket units".to_owned();
    run(ANSWER, &what, async {
        let bus = Bus::connect(manager).await?;
        let units = bus.active_sockets().await.map_err(|error| other(&what, error))?;
        for unit in units {
            let listen: Vec<(String, String)> =
                bus.property(&unit, "Socket", "Listen").await.map_err(|error| other(&what, error))?;
            if listen.iter().any(|(kind, address)| listens(kind, address, endpoint, proto)) {
                return Ok(Some(unit));
            }
        }
        Ok(None)
    })
}

/// Whether an entry of `Listen=`, as systemd normalizes it (`Stream`, `[::]:80`), is this socket.
fn listens(kind: &str, address: &str, endpoint: SocketAddr, proto: Protocol) -> bool {
    let of_proto = match proto {
        Protocol::Tcp => kind == "Stream",
        Protocol::Udp => kind == "Datagram",
    };
    // A scope (`[fe80::1%2]:80`) is no part of what the kernel shows as the address.
    let address = match address.split_once('%') {
        Some((before, after)) => format!("{before}{}", after.find(']').map_or("", |end| &after[end..])),
        None => address.to_owned(),
    };
    of_proto && address.parse() == Ok(endpoint)
}

/// Waits for it on an event loop of this thread's.
fn run<T>(timeout: Duration, what: &str, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| other(what, zbus::Error::InputOutput(Arc::new(error))))?;
    runtime.block_on(async {
        tokio::time::timeout(timeout, work)
            .await
            .unwrap_or_else(|_| Err(Error::Timeout { what: what.to_owned(), after: timeout }))
    })
}

/// The error of D-Bus as one of ours.
fn other(what: &str, error: zbus::Error) -> Error {
    let denied = match &error {
        zbus::Error::FDO(error) => {
            matches!(**error, fdo::Error::AccessDenied(_) | fdo::Error::InteractiveAuthorizationRequired(_))
        }
        _ => false,
    };
    let what = what.to_owned();
    if denied { Error::Denied { what } } else { Error::Other { what, cause: Box::new(error) } }
}

async fn next(stream: &mut MessageStream) -> Option<zbus::Result<Message>> {
    poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
}

/// A connection to a manager.
struct Bus(Connection);

impl Bus {
    async fn connect(manager: Manager) -> Result<Bus, Error> {
        let mut refusal = io::Error::from(io::ErrorKind::NotFound);
        for address in addresses(manager) {
            let builder = match &address {
                Address::Bus(address) => Ok(Builder::address(address.as_str())),
                Address::OfUser(uid, path) => {
                    connect_as(*uid, path).map(|stream| Builder::unix_stream(stream).user_id(*uid))
                }
            };
            let connected = match builder {
                Ok(builder) => Self::open(builder).await,
                Err(error) => Err(zbus::Error::InputOutput(Arc::new(error))),
            };
            let error = match connected {
                Ok(Some(bus)) => return Ok(bus),
                Ok(None) => io::Error::other("it is not on its bus"),
                Err(zbus::Error::InputOutput(error) | zbus::Error::Connection(error, _)) => {
                    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
                }
                // A bus lets in whom it knows.
                Err(zbus::Error::Handshake(_)) => io::ErrorKind::PermissionDenied.into(),
                Err(error) => io::Error::other(error.to_string()),
            };
            // That something is there and will not answer says more than that another is not there.
            if refusal.kind() == io::ErrorKind::NotFound {
                refusal = error;
            }
        }
        let cause = Arc::new(refusal);
        Err(match (cause.kind(), manager) {
            (io::ErrorKind::PermissionDenied, Manager::System) => {
                Error::Denied { what: "reach the system's systemd".to_owned() }
            }
            (io::ErrorKind::PermissionDenied, Manager::User(uid)) => {
                Error::Denied { what: format!("reach the systemd of uid {uid}") }
            }
            _ => Error::NoManager { manager, cause },
        })
    }

    /// `None`: a bus without a manager, as `dbus-run-session` makes them.
    async fn open(builder: Builder<'_>) -> zbus::Result<Option<Bus>> {
        let connection = builder.build().await?;
        let daemon = Some("org.freedesktop.DBus");
        let path = "/org/freedesktop/DBus";
        let reply = connection.call_method(daemon, path, daemon, "NameHasOwner", &SERVICE).await?;
        let is_there: bool = reply.body().deserialize()?;
        Ok(is_there.then_some(Bus(connection)))
    }

    async fn manage<B>(&self, method: &str, body: &B) -> zbus::Result<Message>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType,
    {
        self.0.call_method(Some(SERVICE), OBJECT, Some(MANAGER), method, body).await
    }

    /// The signals that tell of jobs that are over.
    async fn jobs_removed(&self) -> zbus::Result<MessageStream> {
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .interface(MANAGER)
            .member("JobRemoved")
            .path(OBJECT)
            .build()?;
        let stream = MessageStream::for_match_rule(rule, &self.0, None).await?;
        // A manager signals only while somebody has asked for it.
        self.manage("Subscribe", &()).await?;
        Ok(stream)
    }

    /// A property of a unit, of the interface of its type (`Unit` for what all have).
    async fn property<T>(&self, unit: &str, interface: &str, name: &str) -> zbus::Result<T>
    where
        T: TryFrom<OwnedVariant>,
        T::Error: Into<zbus::Error>,
    {
        let path: OwnedObjectPath = self.manage("LoadUnit", &unit).await?.body().deserialize()?;
        self.property_at(path, interface, name).await
    }

    async fn property_at<T>(&self, path: OwnedObjectPath, interface: &str, name: &str) -> zbus::Result<T>
    where
        T: TryFrom<OwnedVariant>,
        T::Error: Into<zbus::Error>,
    {
        let interface = format!("{SERVICE}.{interface}");
        let reply =
            self.0.call_method(Some(SERVICE), path, Some(PROPERTIES), "Get", &(interface.as_str(), name)).await?;
        let body = reply.body();
        let value: Variant<'_> = body.deserialize()?;
        T::try_from(value.try_to_owned()?).map_err(Into::into)
    }

    /// Units that start this one when something happens, and are on the look-out now.
    async fn active_triggers(&self, unit: &str) -> zbus::Result<Vec<String>> {
        let triggers: Vec<String> = self.property(unit, "Unit", "TriggeredBy").await?;
        let mut active = Vec::new();
        for trigger in triggers {
            let state: String = self.property(&trigger, "Unit", "ActiveState").await?;
            if state == "active" {
                active.push(trigger);
            }
        }
        Ok(active)
    }

    async fn active_sockets(&self) -> zbus::Result<Vec<String>> {
        type Unit = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);
        let reply = self.manage("ListUnitsByPatterns", &(["active"].as_slice(), ["*.socket"].as_slice())).await?;
        let units: Vec<Unit> = reply.body().deserialize()?;
        Ok(units.into_iter().map(|unit| unit.0).collect())
    }
}

enum Address {
    Bus(String),
    /// The socket of the bus of another user, who must be the one to connect.
    OfUser(u32, String),
}

/// Where a manager may be reached, the best first.
fn addresses(manager: Manager) -> Vec<Address> {
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    // In an address all but plain characters would be escaped; these paths have none.
    let socket = |path: String| Address::Bus(format!("unix:path={path}"));
    match manager {
        Manager::System => {
            let address = variable("DBUS_SYSTEM_BUS_ADDRESS").map(Address::Bus);
            vec![address.unwrap_or_else(|| socket("/run/dbus/system_bus_socket".to_owned()))]
        }
        Manager::User(uid) if uid == Uid::effective().as_raw() => {
            let session = variable("DBUS_SESSION_BUS_ADDRESS").map(Address::Bus);
            let runtime = variable("XDG_RUNTIME_DIR").map(|directory| socket(format!("{directory}/bus")));
            session.into_iter().chain(runtime).chain([socket(format!("/run/user/{uid}/bus"))]).collect()
        }
        Manager::User(uid) => vec![Address::OfUser(uid, format!("/run/user/{uid}/bus"))],
    }
}

/// Connects as that user: a session's bus refuses even root. It goes by whom the kernel names as the peer, which is the
/// effective uid of the thread at this moment (SO_PEERCRED in unix(7)).
fn connect_as(uid: u32, path: &str) -> io::Result<UnixStream> {
    let own = rustix::process::geteuid();
    rustix::thread::set_thread_res_uid(None, rustix::process::Uid::from_raw(uid), None)?;
    let stream = UnixStream::connect(path);
    // Back to what the saved uid still is.
    rustix::thread::set_thread_res_uid(None, own, None)?;
    stream
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do_next() {
        let missing = || Arc::new(io::Error::from_raw_os_error(nix::libc::ENOENT));
        let unit = || "a b.service".to_owned();
        for (error, want) in [
            (
                Error::NoManager { manager: Manager::System, cause: missing() },
                "cannot reach the system's systemd: No such file or directory; does systemd run this host?",
            ),
            (
                Error::NoManager { manager: Manager::User(7), cause: missing() },
                "cannot reach the systemd of uid 7: No such file or directory; is that user logged in, and \
                 XDG_RUNTIME_DIR set?",
            ),
            (Error::Denied { what: "stop a b.service".to_owned() }, "cannot stop a b.service: not permitted; try sudo"),
            (
                Error::NoSuchUnit { unit: unit(), manager: Manager::System },
                "cannot stop 'a b.service': no such unit is loaded; systemctl list-units shows those that are",
            ),
            (
                Error::Job { unit: unit(), manager: Manager::System, result: "timeout".to_owned() },
                "cannot stop 'a b.service': its job ended as 'timeout'; see: systemctl status 'a b.service'",
            ),
            (
                Error::Timeout { what: "stop a b.service".to_owned(), after: Duration::from_millis(1500) },
                "cannot stop a b.service: no end after 1.5 s",
            ),
        ] {
            assert_eq!(error.to_string(), want);
        }
    }

    #[test]
    fn a_manager_that_is_not_there_cannot_be_reached() {
        // A uid that nobody has: 2^32-2 and below are for no one.
        let error = stop_unit("web.service", Manager::User(4_294_967_290), Duration::from_secs(20)).unwrap_err();
        assert!(matches!(error, Error::NoManager { .. } | Error::Denied { .. }), "{error:?}");
    }

    #[test]
    fn entries_of_listen_are_matched() {
        for (kind, address, endpoint, proto, want) in [
            ("Stream", "127.0.0.1:80", "127.0.0.1:80", Protocol::Tcp, true),
            ("Stream", "[::]:80", "[::]:80", Protocol::Tcp, true),
            ("Stream", "[::]:80", "0.0.0.0:80", Protocol::Tcp, false),
            ("Stream", "[fe80::1%2]:80", "[fe80::1]:80", Protocol::Tcp, true),
            ("Stream", "127.0.0.1:80", "127.0.0.1:80", Protocol::Udp, false),
            ("Datagram", "0.0.0.0:53", "0.0.0.0:53", Protocol::Udp, true),
            ("Stream", "/run/x.socket", "0.0.0.0:53", Protocol::Tcp, false),
            ("FIFO", "127.0.0.1:80", "127.0.0.1:80", Protocol::Tcp, false),
        ] {
            assert_eq!(listens(kind, address, endpoint.parse().unwrap(), proto), want, "{kind} {address} {endpoint}");
        }
    }
}
