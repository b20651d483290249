//! Records: what is copied of the acting task and of a socket.

use aya_ebpf::helpers::generated::{bpf_get_current_task, bpf_get_smp_processor_id, bpf_ktime_get_boot_ns};
use portwatch_ebpf::{COMM_LEN, Record};

use crate::kernel::{Object, address, flags, follow, netns, offset, protocol, read};

#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// The acting task, nothing of a socket. Read from the task itself: sock_ops and cgroup programs lack the helpers that
/// tell PID, uid and cgroup on many kernels.
#[inline(always)]
pub(crate) fn task_record(kind: u8) -> Record {
    let task = current();
    let leader = follow(task, offset!(task_group_leader));
    // SAFETY: no arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    Record {
        at: now(),
        seq: 0,
        cookie: 0,
        inode: 0,
        start: read(leader, offset!(task_start_boottime)),
        cgroup: cgroup(task),
        child_start: 0,
        netns: 0,
        uid: 0,
        task_uid: read(follow(task, offset!(task_cred)), offset!(cred_euid)),
        tgid: read(task, offset!(task_tgid)),
        tid: read(task, offset!(task_pid)),
        child: 0,
        backlog: 0,
        errno: 0,
        cpu: cpu as u16,
        port: 0,
        protocol: 0,
        family: 0,
        kind,
        flags: 0,
        address: [0; 16],
        comm: read::<[u8; COMM_LEN]>(leader, offset!(task_comm)),
    }
}

#[inline(always)]
pub(crate) fn current() -> Object {
    // SAFETY: no arguments.
    unsafe { bpf_get_current_task() as Object }
}

#[inline(always)]
pub(crate) fn current_tgid() -> u32 {
    read(current(), offset!(task_tgid))
}

/// The id of the task's cgroup in the version 2 tree: the inode number of its directory.
#[inline(always)]
fn cgroup(task: Object) -> u64 {
    let group = follow(follow(task, offset!(task_cgroups)), offset!(css_set_dfl_cgrp));
    read(follow(group, offset!(cgroup_kn)), offset!(kernfs_id))
}

#[inline(always)]
pub(crate) fn socket_record(kind: u8, sk: Object, cookie: u64) -> Record {
    let mut record = task_record(kind);
    record.cookie = cookie;
    record.inode = inode(sk);
    record.netns = netns(sk);
    record.uid = read(sk, offset!(sk_uid));
    record.backlog = read(sk, offset!(sk_max_ack_backlog));
    record.protocol = protocol(sk);
    record.family = read(sk, offset!(skc_family));
    record.port = read(sk, offset!(skc_num));
    record.flags = flags(sk, record.protocol);
    record.address = address(sk, record.family);
    record
}

/// Inode number of the socket behind `sk`; 0 once it is orphaned.
#[inline(always)]
pub(crate) fn inode(sk: Object) -> u64 {
    let socket = follow(sk, offset!(sk_socket));
    if socket.is_null() { 0 } else { read(socket, offset!(socket_inode) + offset!(inode_ino)) }
}

#[inline(always)]
pub(crate) fn current_netns() -> u32 {
    read(follow(follow(current(), offset!(task_nsproxy)), offset!(nsproxy_net_ns)), offset!(net_inum))
}
