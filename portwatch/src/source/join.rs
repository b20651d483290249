//! Joins what was read of sockets with what was read of file descriptors into listeners.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::{Holder, Listener, Process, ProcessId, Socket};

/// One file descriptor that refers to a listening socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldFd {
    /// Inode of the socket.
    pub inode: u64,
    pub process: ProcessId,
    pub fd: u32,
}

/// Sockets with their holders, `details` giving each process once. The holder that started first counts as the binder.
/// Two rows of one MPTCP listener (same inode) become one.
pub fn join(
    sockets: Vec<Socket>,
    held: Vec<HeldFd>,
    mut details: impl FnMut(ProcessId) -> Arc<Process>,
) -> Vec<Listener> {
    let mut by_inode: HashMap<u64, Vec<HeldFd>> = HashMap::new();
    for fd in held {
        by_inode.entry(fd.inode).or_default().push(fd);
    }
    let mut processes: HashMap<ProcessId, Arc<Process>> = HashMap::new();
    let mut listeners: Vec<Listener> = Vec::with_capacity(sockets.len());
    let mut index_by_inode: HashMap<u64, usize> = HashMap::new();
    for socket in sockets {
        if socket.id.inode != 0 {
            if let Some(&index) = index_by_inode.get(&socket.id.inode) {
                let twin: &mut Listener = &mut listeners[index];
                twin.socket.mptcp |= socket.mptcp;
                continue;
            }
            index_by_inode.insert(socket.id.inode, listeners.len());
        }
        let mut holders: Vec<Holder> = Vec::new();
        let mut fds = by_inode.remove(&socket.id.inode).unwrap_or_default();
        fds.sort_by_key(|held| (held.process, held.fd));
        for held in fds {
            match holders.last_mut() {
                Some(last) if last.process.id == held.process => {
                    if last.fds.last() != Some(&held.fd) {
                        last.fds.push(held.fd);
                    }
                }
                _ => {
                    let process = processes.entry(held.process).or_insert_with(|| details(held.process));
                    holders.push(Holder { process: Arc::clone(process), fds: vec![held.fd], binder: false });
                }
            }
        }
        if let Some(first) = holders.iter_mut().min_by_key(|h| (h.process.id.start, h.process.id.pid)) {
            first.binder = true;
        }
        listeners.push(Listener { socket, since: None, holders });
    }
    listeners
}
