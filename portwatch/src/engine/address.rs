//! Where container engines listen. Pure but for [`Address::may_be_there`].

use std::fmt;
use std::path::Path;

use super::EngineError;

/// Where an engine listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// The path of a unix socket.
    Unix(String),
    /// `HOST:PORT`.
    Tcp(String),
}

impl Address {
    /// False only where it surely is not.
    pub(super) fn may_be_there(&self) -> bool {
        match self {
            Address::Unix(path) => Path::new(path).try_exists().unwrap_or(true),
            Address::Tcp(_) => true,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => f.write_str(&crate::render::escape(path)),
            Address::Tcp(address) => write!(f, "tcp://{}", crate::render::escape(address)),
        }
    }
}

/// What to try, in this order: what `DOCKER_HOST` says and nothing else, or the sockets where docker and podman listen by
/// default. `variable` reads the environment.
pub(super) fn candidates(variable: &dyn Fn(&str) -> Option<String>) -> Result<Vec<Address>, EngineError> {
    let variable = |name| variable(name).filter(|value| !value.is_empty());
    if let Some(host) = variable("DOCKER_HOST") {
        return named(&host, variable("DOCKER_TLS_VERIFY").is_some()).map(|address| vec![address]);
    }
    let (runtime, home) = (variable("XDG_RUNTIME_DIR"), variable("HOME"));
    let paths = [
        Some("/var/run/docker.sock".to_owned()),
        Some("/run/podman/podman.sock".to_owned()),
        runtime.as_ref().map(|runtime| format!("{runtime}/podman/podman.sock")),
        home.map(|home| format!("{home}/.docker/run/docker.sock")),
        runtime.map(|runtime| format!("{runtime}/docker.sock")),
    ];
    Ok(paths.into_iter().flatten().map(Address::Unix).collect())
}

/// Reads an address as `DOCKER_HOST` has it; `tls` is whether it is to be spoken there.
pub(super) fn named(host: &str, tls: bool) -> Result<Address, EngineError> {
    let refuse = |why: &str| {
        let host = crate::render::escape(host);
        Err(EngineError { message: format!("DOCKER_HOST is {host}: {why}"), denied: false })
    };
    match host.split_once("://") {
        Some(("unix", path)) if path.starts_with('/') => Ok(Address::Unix(path.to_owned())),
        Some(("unix", _)) => refuse("the path of a socket must begin with a slash"),
        Some(("tcp" | "http" | "https", _)) if tls => refuse("portwatch does not speak TLS; use a unix:// socket"),
        Some(("https", _)) => refuse("portwatch does not speak TLS; use a unix:// socket"),
        Some(("tcp" | "http", address)) if !address.trim_end_matches('/').is_empty() => {
            Ok(Address::Tcp(address.trim_end_matches('/').to_owned()))
        }
        Some(("ssh", _)) => refuse("an engine on another host has no ports of this one; use unix:// or tcp://"),
        _ => refuse("use unix:///path/of/socket or tcp://host:port"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(environment: &[(&str, &str)], want: &str) {
        let variable = |name: &str| environment.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        let got = match candidates(&variable) {
            Ok(addresses) => addresses.iter().map(Address::to_string).collect::<Vec<_>>().join(" "),
            Err(error) => error.message,
        };
        assert_eq!(got, want, "{environment:?}");
    }

    #[test]
    fn engines_are_looked_for_where_they_listen() {
        check(&[], "/var/run/docker.sock /run/podman/podman.sock");
        check(
            &[("HOME", "/home/al"), ("XDG_RUNTIME_DIR", "/run/user/1000"), ("DOCKER_HOST", "")],
            "/var/run/docker.sock /run/podman/podman.sock /run/user/1000/podman/podman.sock \
             /home/al/.docker/run/docker.sock /run/user/1000/docker.sock",
        );
    }

    #[test]
    fn docker_host_alone_counts_where_it_is_set() {
        for (host, want) in [
            ("unix:///tmp/d.sock", "/tmp/d.sock"),
            ("tcp://127.0.0.1:2375", "tcp://127.0.0.1:2375"),
            ("http://[::1]:2375/", "tcp://[::1]:2375"),
            ("unix://d.sock", "DOCKER_HOST is unix://d.sock: the path of a socket must begin with a slash"),
            (
                "ssh://al@far",
                "DOCKER_HOST is ssh://al@far: an engine on another host has no ports of this one; use unix:// or tcp://",
            ),
            ("https://x:2376", "DOCKER_HOST is https://x:2376: portwatch does not speak TLS; use a unix:// socket"),
            ("tcp://", "DOCKER_HOST is tcp://: use unix:///path/of/socket or tcp://host:port"),
            ("\u{1b}[2J", "DOCKER_HOST is \\x1b[2J: use unix:///path/of/socket or tcp://host:port"),
        ] {
            check(&[("DOCKER_HOST", host), ("HOME", "/root")], want);
        }
        check(
            &[("DOCKER_HOST", "tcp://127.0.0.1:2376"), ("DOCKER_TLS_VERIFY", "1")],
            "DOCKER_HOST is tcp://127.0.0.1:2376: portwatch does not speak TLS; use a unix:// socket",
        );
    }
}
