//! What a process that holds a published port stands for: docker-proxy and its kin listen on the host and pass
//! connections on to a container. Pure: told by names and command lines, which every process is free to choose. So what
//! is read here may spare a process or name a container; which container is stopped, the engine must confirm.
//!
//! | program | who starts it | what its command line tells |
//! |---|---|---|
//! | `docker-proxy`, `rootlesskit-docker-proxy` | dockerd, one for each published port | port and address in the container |
//! | `conmon` | podman as root: it keeps the published ports bound | the container's id and name |
//! | `dockerd` | itself, with `--userland-proxy=false`: it keeps the published ports bound | nothing |
//! | `rootlesskit`, `rootlessport`, `slirp4netns`, `pasta` | rootless docker, podman, nerdctl | nothing about ports |
//!
//! containerd's own tools (CNI's portmap, thus nerdctl as root and Kubernetes) publish by packet filter alone: nobody
//! holds such a port.

use std::net::IpAddr;

use super::is_id;
use crate::model::{Process, Protocol, Socket};

/// A process that holds ports for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proxy {
    /// One published port of one container.
    Port(Forward),
    /// Published ports of the container with this id (64 hexadecimal digits).
    Container { id: String },
    /// Ports of whatever containers share a network; only the engine knows which.
    Network { program: &'static str },
}

/// What a docker-proxy forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    pub proto: Protocol,
    /// Unspecified: all addresses of the host.
    pub host_ip: IpAddr,
    pub host_port: u16,
    pub container_ip: IpAddr,
    pub container_port: u16,
}

impl Proxy {
    /// What the process that holds `socket` stands for; `None` where it serves the port itself.
    pub fn of(process: &Process, socket: &Socket) -> Option<Proxy> {
        let argument = |name| value_of(&process.command, name);
        let program = program(process)?;
        match program {
            "docker-proxy" => Some(Forward::parse(&process.command).map_or(Proxy::Network { program }, Proxy::Port)),
            "conmon" => {
                let id = argument("-c").or_else(|| argument("--cid")).filter(|id| is_id(id));
                Some(id.map_or(Proxy::Network { program }, |id| Proxy::Container { id: id.to_owned() }))
            }
            // By hand, pasta runs a command of the user's: that is nobody's container.
            "pasta" => argument("--netns").map(|_| Proxy::Network { program }),
            // Its own API is no container's port.
            "dockerd" => (!names_port(&process.command, socket.port)).then_some(Proxy::Network { program }),
            _ => Some(Proxy::Network { program }),
        }
    }

    /// The command of the engine that starts such a process.
    pub fn command(&self) -> &'static str {
        match self {
            Proxy::Port(_) | Proxy::Network { program: "docker-proxy" | "dockerd" | "rootlesskit" } => "docker",
            Proxy::Container { .. } | Proxy::Network { .. } => "podman",
        }
    }
}

impl Forward {
    /// Reads the command line of a docker-proxy; `None` where a part of it is missing or makes no sense.
    fn parse(command: &[String]) -> Option<Forward> {
        let argument = |name| value_of(command, name);
        Some(Forward {
            proto: match argument("-proto")? {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                _ => return None,
            },
            host_ip: argument("-host-ip")?.parse().ok()?,
            host_port: argument("-host-port")?.parse().ok()?,
            container_ip: argument("-container-ip")?.parse().ok()?,
            container_port: argument("-container-port")?.parse().ok()?,
        })
    }
}

/// Whether it may hold ports for containers, whatever it holds now.
pub fn is_proxy(process: &Process) -> bool {
    program(process).is_some()
}

/// Which of the programs of the table it is, by the file it runs, by how it was called, or by its name, which the kernel
/// cuts to 15 bytes.
fn program(process: &Process) -> Option<&'static str> {
    let base = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let names = [process.exe.as_deref().map(base), process.command.first().map(|path| base(path))];
    names.iter().flatten().chain([&process.name]).find_map(|name| match name.as_str() {
        "docker-proxy" | "rootlesskit-docker-proxy" | "rootlesskit-doc" => Some("docker-proxy"),
        "conmon" => Some("conmon"),
        "dockerd" => Some("dockerd"),
        "rootlesskit" => Some("rootlesskit"),
        "rootlessport" | "containers-rootlessport" | "containers-rootlessport-child" | "containers-root" => {
            Some("rootlessport")
        }
        "slirp4netns" => Some("slirp4netns"),
        "pasta" | "pasta.avx2" | "passt.avx2" => Some("pasta"),
        _ => None,
    })
}

/// The value of `-name value` or `-name=value`.
fn value_of<'a>(command: &'a [String], name: &str) -> Option<&'a str> {
    let mut arguments = command.iter().skip(1).map(String::as_str);
    while let Some(argument) = arguments.next() {
        if argument == name {
            return arguments.next();
        }
        if let Some(value) = argument.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')) {
            return Some(value);
        }
    }
    None
}

/// Whether an address of this port is given, as in `-H tcp://0.0.0.0:2375` or `--metrics-addr 127.0.0.1:9323`.
fn names_port(command: &[String], port: u16) -> bool {
    command.iter().skip(1).any(|argument| argument.rsplit_once(':').is_some_and(|(_, last)| last.parse() == Ok(port)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::{process, socket};

    fn check(name: &str, command: &str, want: Option<Proxy>) {
        assert_eq!(Proxy::of(&process(name, command), &socket(8123)), want, "{command}");
    }

    #[test]
    fn docker_proxies_tell_port_and_container() {
        let forward = Forward {
            proto: Protocol::Tcp,
            host_ip: "127.0.0.1".parse().unwrap(),
            host_port: 8123,
            container_ip: "172.17.0.2".parse().unwrap(),
            container_port: 80,
        };
        let line = "-proto tcp -host-ip 127.0.0.1 -host-port 8123 -container-ip 172.17.0.2 -container-port 80";
        check("docker-proxy", &format!("/usr/bin/docker-proxy {line}"), Some(Proxy::Port(forward)));
        check(
            "docker-proxy",
            &format!("/usr/libexec/docker/docker-proxy {line} -use-listen-fd"),
            Some(Proxy::Port(forward)),
        );
        check("rootlesskit-doc", &format!("rootlesskit-docker-proxy {line}"), Some(Proxy::Port(forward)));
        check("docker-proxy", &format!("docker-proxy {}", line.replace("-ip ", "-ip=")), Some(Proxy::Port(forward)));
        let six = line.replace("127.0.0.1", "::").replace("tcp", "udp");
        let six = (six, Forward { proto: Protocol::Udp, host_ip: "::".parse().unwrap(), ..forward });
        check("docker-proxy", &format!("docker-proxy {}", six.0), Some(Proxy::Port(six.1)));
    }

    #[test]
    fn a_docker_proxy_with_a_strange_command_line_is_one_all_the_same() {
        for line in ["", "-proto sctp", "-proto tcp -host-ip", "-proto tcp -host-ip x -host-port 99999"] {
            check("docker-proxy", &format!("docker-proxy {line}"), Some(Proxy::Network { program: "docker-proxy" }));
        }
    }

    #[test]
    fn conmon_tells_the_container() {
        let id = "5eed81bcd920".repeat(5) + "0123";
        let line = format!("/usr/bin/conmon --api-version 1 -c {id} -u {id} -r /usr/bin/crun -n web --full-attach -s");
        check("conmon", &line, Some(Proxy::Container { id: id.clone() }));
        check("conmon", "conmon -c ../../etc", Some(Proxy::Network { program: "conmon" }));
    }

    #[test]
    fn rootless_forwarders_stand_for_some_container() {
        for (name, line, program) in [
            ("rootlesskit", "rootlesskit --net=slirp4netns --port-driver=builtin dockerd-rootless.sh", "rootlesskit"),
            ("exe", "/usr/bin/rootlesskit --port-driver=builtin", "rootlesskit"),
            ("rootlessport", "rootlessport", "rootlessport"),
            ("exe", "containers-rootlessport", "rootlessport"),
            ("containers-root", "containers-rootlessport-child", "rootlessport"),
            ("slirp4netns", "slirp4netns --mtu 65520 -r 3 --api-socket /run/user/1000/s.sock 77 tap0", "slirp4netns"),
            ("pasta.avx2", "/usr/bin/pasta --config-net -t 8123-8123:80-80 --netns /run/user/1000/netns/n", "pasta"),
            ("dockerd", "dockerd -H unix:///run/docker.sock --userland-proxy=false", "dockerd"),
            ("dockerd", "dockerd -H tcp://127.0.0.1:2375", "dockerd"),
        ] {
            check(name, line, Some(Proxy::Network { program }));
        }
    }

    #[test]
    fn whoever_serves_the_port_itself_is_no_proxy() {
        for (name, line) in [
            ("python3", "python3 -m http.server"),
            ("vim", "vim docker-proxy"),
            ("pasta", "pasta -t 8123 -- python3 -m http.server"),
            ("dockerd", "dockerd -H tcp://127.0.0.1:8123"),
            ("dockerd", "dockerd -H=tcp://[::1]:8123"),
            ("containerd", "containerd"),
            ("x", ""),
        ] {
            check(name, line, None);
        }
    }
}
