//! Reading kernel structs at the offsets that userspace found in the kernel's BTF.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_probe_read_kernel};
use portwatch_ebpf::{AF_INET6, Bits, Config, IPPROTO_MPTCP, IPPROTO_TCP, Offsets, flag};

/// Written by the loader before the programs are loaded, constant from then on.
#[unsafe(no_mangle)]
pub(crate) static OFFSETS: Offsets = Offsets {
    skc_family: 0,
    skc_state: 0,
    skc_num: 0,
    skc_rcv_saddr: 0,
    skc_v6_rcv_saddr: 0,
    skc_net: 0,
    skc_cookie: 0,
    sk_protocol: 0,
    sk_socket: 0,
    sk_uid: 0,
    sk_max_ack_backlog: 0,
    net_inum: 0,
    socket_sk: 0,
    socket_inode: 0,
    inode_ino: 0,
    inode_sb: 0,
    sb_magic: 0,
    file_inode: 0,
    file_private_data: 0,
    task_tgid: 0,
    task_pid: 0,
    task_group_leader: 0,
    task_start_boottime: 0,
    task_comm: 0,
    task_signal: 0,
    task_nsproxy: 0,
    signal_live: 0,
    nsproxy_net_ns: 0,
    task_cred: 0,
    cred_euid: 0,
    task_cgroups: 0,
    css_set_dfl_cgrp: 0,
    cgroup_kn: 0,
    kernfs_id: 0,
    skc_ipv6only: Bits { offset: 0, shift: 0, mask: 0 },
    sk_userlocks: Bits { offset: 0, shift: 0, mask: 0 },
    tcp_is_mptcp: Bits { offset: 0, shift: 0, mask: 0 },
};

#[unsafe(no_mangle)]
pub(crate) static CONFIG: Config =
    Config { cookie_helper: 0, sock_from_file: 0, listen_by_state: 0, port_by_sock_ops: 0 };

/// The value that the loader wrote, not the one that the compiler sees.
macro_rules! offset {
    ($($field:tt)+) => {
        // SAFETY: a field of a static, aligned and initialised.
        unsafe { core::ptr::read_volatile(&raw const $crate::kernel::OFFSETS.$($field)+) }
    };
}
pub(crate) use offset;

macro_rules! config {
    ($field:ident) => {
        // SAFETY: a field of a static, aligned and initialised.
        (unsafe { core::ptr::read_volatile(&raw const $crate::kernel::CONFIG.$field) } != 0)
    };
}
pub(crate) use config;

/// Any kernel object: `sock`, `socket`, `file`, `task_struct` …
pub(crate) type Object = *const c_void;

/// The value at `offset` of `object`, or zero where it cannot be read.
#[inline(always)]
pub(crate) fn read<T: Default>(object: Object, offset: u32) -> T {
    let mut value = T::default();
    // SAFETY: the helper checks the address; the destination is a local of the size given.
    unsafe {
        bpf_probe_read_kernel(
            ptr::from_mut(&mut value).cast(),
            size_of::<T>() as u32,
            object.cast::<u8>().wrapping_add(offset as usize).cast(),
        );
    }
    value
}

/// The pointer at `offset` of `object`.
#[inline(always)]
pub(crate) fn follow(object: Object, offset: u32) -> Object {
    read::<u64>(object, offset) as Object
}

/// The pointer at `offset` of `object`, loaded directly, so that the verifier knows its type and lets helpers take it.
/// Works because `offset` comes from a frozen read-only map: to the verifier it is a constant.
#[inline(always)]
pub(crate) fn follow_typed(object: Object, offset: u32) -> Object {
    // SAFETY: `object` is a pointer with BTF type; the verifier checks the offset against that type, and the load
    // cannot fault.
    unsafe { *object.cast::<u8>().wrapping_add(offset as usize).cast::<Object>() }
}

#[inline(always)]
pub(crate) fn bits(object: Object, field: Bits) -> u8 {
    if field.mask == 0 {
        return 0;
    }
    (u16::from(read::<u8>(object, field.offset)) >> (field.shift & 7) & field.mask) as u8
}

/// `SO_COOKIE` of a socket whose type the verifier knows; else what is stored already, 0 if nobody asked yet.
#[inline(always)]
pub(crate) fn cookie_typed(sk: Object) -> u64 {
    if config!(cookie_helper) {
        // SAFETY: `sk` is a typed pointer to a sock, or the verifier refuses the program.
        unsafe { bpf_get_socket_cookie(sk.cast_mut()) }
    } else {
        cookie_stored(sk)
    }
}

#[inline(always)]
pub(crate) fn cookie_stored(sk: Object) -> u64 {
    read(sk, offset!(skc_cookie))
}

#[inline(always)]
pub(crate) fn protocol(sk: Object) -> u16 {
    read(sk, offset!(sk_protocol))
}

#[inline(always)]
pub(crate) fn netns(sk: Object) -> u32 {
    read(follow(sk, offset!(skc_net)), offset!(net_inum))
}

/// Bound address, IPv4 in the first four bytes.
#[inline(always)]
pub(crate) fn address(sk: Object, family: u16) -> [u8; 16] {
    if family == AF_INET6 {
        read::<[u8; 16]>(sk, offset!(skc_v6_rcv_saddr))
    } else {
        let mut address = [0; 16];
        let v4: [u8; 4] = read(sk, offset!(skc_rcv_saddr));
        address[0] = v4[0];
        address[1] = v4[1];
        address[2] = v4[2];
        address[3] = v4[3];
        address
    }
}

/// [`flag`] bits of a socket.
#[inline(always)]
pub(crate) fn flags(sk: Object, protocol: u16) -> u8 {
    // include/net/sock.h: SOCK_BINDADDR_LOCK 4, SOCK_BINDPORT_LOCK 8.
    const BIND_LOCKS: u8 = 4 | 8;
    let mut flags = 0;
    if bits(sk, offset!(skc_ipv6only)) != 0 {
        flags |= flag::V6ONLY;
    }
    if protocol == IPPROTO_MPTCP || (protocol == IPPROTO_TCP && bits(sk, offset!(tcp_is_mptcp)) != 0) {
        flags |= flag::MPTCP;
    }
    if bits(sk, offset!(sk_userlocks)) & BIND_LOCKS != 0 {
        flags |= flag::BOUND;
    }
    flags
}
