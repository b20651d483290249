//! One pass of the `task_file` iterator over every descriptor of every visible task.

use std::collections::HashSet;
use std::io::{ErrorKind, Read as _};

use anyhow::Context as _;
use portwatch_ebpf::Held;

use super::task_file::TaskFile;
use super::{Kernel, bytes_of, record};
use crate::model::{ProcessId, Protocol, Socket};
use crate::source::join::HeldFd;

/// The iterator, loaded and ready to be read any number of times.
pub(crate) struct Walk {
    iterator: TaskFile,
    /// Kept between passes.
    buffer: Vec<u8>,
}

/// What one pass saw.
#[derive(Debug, Default)]
pub(crate) struct Walked {
    pub(crate) sockets: Vec<Socket>,
    pub(crate) held: Vec<HeldFd>,
    /// Inodes of the UDP sockets among them that may be clients: unconnected, without a mark of bind().
    pub(crate) unmarked: HashSet<u64>,
    /// Inodes of sockets that are held and no listeners: clients with a UDP port, TCP sockets only bound.
    pub(crate) others: HashSet<u64>,
}

const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/bpf/walk.bpf.o"));

/// How often a pass is begun anew when the kernel says EAGAIN (after a million objects without output).
const MAX_RETRIES: usize = 64;

impl Walk {
    pub(crate) fn open(kernel: &Kernel) -> anyhow::Result<Walk> {
        let target = kernel.task_file.context("this kernel has no task_file iterator (it came with 5.8)")?;
        let globals = [("OFFSETS", bytes_of(&kernel.offsets)), ("CONFIG", bytes_of(&kernel.config))];
        Ok(Walk { iterator: TaskFile::load(OBJECT, &globals, target)?, buffer: vec![0; 256 << 10] })
    }

    /// Reads every listener that `keep` wants, and who holds it.
    pub(crate) fn read(&mut self, keep: &dyn Fn(&Socket) -> bool) -> anyhow::Result<Walked> {
        self.read_as(record::held_socket, keep)
    }

    /// Reads the TCP sockets that `keep` wants among those that are bound and do not listen, and who holds them.
    pub(crate) fn read_bound(&mut self, keep: &dyn Fn(&Socket) -> bool) -> anyhow::Result<Walked> {
        self.read_as(record::bound_socket, keep)
    }

    fn read_as(
        &mut self,
        socket: fn(&Held) -> Option<Socket>,
        keep: &dyn Fn(&Socket) -> bool,
    ) -> anyhow::Result<Walked> {
        let mut file = self.iterator.open().context("cannot open iter/task_file")?;
        let mut walked = Walked::default();
        let mut seen: HashSet<u64> = HashSet::new();
        let mut refused: HashSet<u64> = HashSet::new();
        let mut pending = 0;
        let mut retries = 0;
        loop {
            let count = match file.read(&mut self.buffer[pending..]) {
                Ok(0) => return Ok(walked),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock && retries < MAX_RETRIES => {
                    retries += 1;
                    continue;
                }
                Err(error) => return Err(error).context("cannot read iter/task_file"),
            };
            let end = pending + count;
            let whole = end - end % size_of::<Held>();
            for bytes in self.buffer[..whole].chunks_exact(size_of::<Held>()) {
                let Some(held) = record::parse::<Held>(bytes) else { continue };
                if !seen.contains(&held.inode) {
                    if refused.contains(&held.inode) || walked.others.contains(&held.inode) {
                        continue;
                    }
                    match socket(&held) {
                        None => {
                            walked.others.insert(held.inode);
                            continue;
                        }
                        Some(socket) if !keep(&socket) => {
                            refused.insert(held.inode);
                            continue;
                        }
                        Some(socket) => {
                            seen.insert(held.inode);
                            if socket.proto == Protocol::Udp && !record::is_bound(&held) {
                                walked.unmarked.insert(held.inode);
                            }
                            walked.sockets.push(socket);
                        }
                    }
                }
                walked.held.push(HeldFd {
                    inode: held.inode,
                    process: ProcessId { pid: held.tgid, start: held.start },
                    fd: held.fd,
                });
            }
            self.buffer.copy_within(whole..end, 0);
            pending = end - whole;
        }
    }
}
