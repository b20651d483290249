//! Processes, sockets and containers for the tests of this module.

use super::{Container, PublishedPort};
use crate::model::{Process, ProcessId, Protocol, Socket, SocketId};

pub(super) fn process(name: &str, command: &str) -> Process {
    let mut process = Process::bare(ProcessId { pid: 7, start: 1 }, name);
    process.command = command.split_whitespace().map(str::to_owned).collect();
    process
}

pub(super) fn socket(port: u16) -> Socket {
    Socket { id: SocketId { inode: 5, cookie: 0 }, uid: 0, ..Socket::example("127.0.0.1", port) }
}

/// A container whose port 80 is published on 127.0.0.1. The digit makes its id: `aaaa…`.
pub(super) fn container(digit: char, name: &str, address: &str, host_port: u16) -> Container {
    Container {
        id: digit.to_string().repeat(64),
        name: name.to_owned(),
        image: "busybox".to_owned(),
        ports: vec![PublishedPort {
            proto: Protocol::Tcp,
            host_ip: Some("127.0.0.1".parse().unwrap()),
            host_port,
            container_port: 80,
        }],
        addresses: vec![address.parse().unwrap()],
    }
}
