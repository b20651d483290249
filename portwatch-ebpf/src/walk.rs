//! The `task_file` iterator: every descriptor of every visible task that is a bound or listening socket.
//!
//! One read of the iterator's file walks all tasks in the kernel and returns [`Held`] records, nothing else.
#![no_std]
#![no_main]

mod kernel;

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::helpers::generated::{bpf_seq_write, bpf_sock_from_file};
use kernel::{
    Object, address, config, cookie_stored, cookie_typed, flags, follow, follow_typed, netns, offset, protocol, read,
};
use portwatch_ebpf::{AF_INET, AF_INET6, Held, IPPROTO_MPTCP, IPPROTO_TCP, IPPROTO_UDP, TCP_CLOSE, TCP_LISTEN, flag};

/// `struct bpf_iter_meta` (kernel/bpf/bpf_iter.c).
#[repr(C)]
struct Meta {
    seq: *mut c_void,
    session_id: u64,
    seq_num: u64,
}

/// `struct bpf_iter__task_file`.
#[repr(C)]
struct TaskFile {
    meta: *const Meta,
    task: Object,
    fd: u32,
    file: Object,
}

/// `SOCKFS_MAGIC` (include/uapi/linux/magic.h).
const SOCKFS_MAGIC: u64 = 0x534F_434B;

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn held_sockets(ctx: *const TaskFile) -> i32 {
    // SAFETY: the kernel gives a valid context; task and file are null in the last call only.
    let (meta, task, fd, file) = unsafe { ((*ctx).meta, (*ctx).task, (*ctx).fd, (*ctx).file) };
    if task.is_null() || file.is_null() {
        return 0;
    }
    let (sk, cookie) = if config!(sock_from_file) {
        // SAFETY: `file` is a typed pointer that is not null.
        let socket = unsafe { bpf_sock_from_file(file.cast_mut().cast()) }.cast_const().cast::<c_void>();
        if socket.is_null() {
            return 0;
        }
        let sk = follow_typed(socket, offset!(socket_sk));
        if sk.is_null() || !is_candidate(sk) {
            return 0;
        }
        (sk, cookie_typed(sk))
    } else {
        let inode = follow(file, offset!(file_inode));
        if read::<u64>(follow(inode, offset!(inode_sb)), offset!(sb_magic)) != SOCKFS_MAGIC {
            return 0;
        }
        let sk = follow(follow(file, offset!(file_private_data)), offset!(socket_sk));
        if sk.is_null() || !is_candidate(sk) {
            return 0;
        }
        (sk, cookie_stored(sk))
    };
    let protocol = protocol(sk);
    let family = read(sk, offset!(skc_family));
    let leader = follow(task, offset!(task_group_leader));
    let held = Held {
        inode: read(follow(file, offset!(file_inode)), offset!(inode_ino)),
        cookie,
        start: read(leader, offset!(task_start_boottime)),
        netns: netns(sk),
        uid: read(sk, offset!(sk_uid)),
        tgid: read(task, offset!(task_tgid)),
        fd,
        backlog: read(sk, offset!(sk_max_ack_backlog)),
        protocol,
        family,
        port: read(sk, offset!(skc_num)),
        state: read(sk, offset!(skc_state)),
        flags: flags(sk, protocol),
        reserved: 0,
        address: address(sk, family),
    };
    // SAFETY: the record is a whole local without padding; `seq` comes from the kernel.
    unsafe { bpf_seq_write((*meta).seq.cast(), ptr::from_ref(&held).cast(), size_of::<Held>() as u32) };
    0
}

/// A TCP or MPTCP socket that listens or is bound, or a UDP socket that has a port.
#[inline(always)]
fn is_candidate(sk: Object) -> bool {
    let family: u16 = read(sk, offset!(skc_family));
    if family != AF_INET && family != AF_INET6 {
        return false;
    }
    let state: u8 = read(sk, offset!(skc_state));
    if state == TCP_LISTEN {
        let protocol = protocol(sk);
        return protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
    }
    if read::<u16>(sk, offset!(skc_num)) == 0 {
        return false;
    }
    // Clients too: userspace must know that a UDP socket which netlink shows has a holder and is no listener.
    protocol(sk) == IPPROTO_UDP
        || (state == TCP_CLOSE
            && (protocol(sk) == IPPROTO_TCP || protocol(sk) == IPPROTO_MPTCP)
            && flags(sk, IPPROTO_TCP) & flag::BOUND != 0)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
