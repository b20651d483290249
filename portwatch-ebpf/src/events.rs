//! The event programs: who begins and ends to listen, which binds fail, which holders fork, exec and exit.
//!
//! Three ways to learn of a listen, of which the loader picks one: fexit, kprobe, or the state tracepoint
//! completed by sock_ops. The end of listening and the process events come from typed tracepoints in all three. All
//! programs copy facts into one ring; what did not fit is counted.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "core offers no atomic addition for BPF otherwise")]

mod kernel;
mod record;
mod ring;

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_ANY, BPF_NOEXIST, BPF_SOCK_OPS_TCP_LISTEN_CB},
    helpers::bpf_get_current_pid_tgid,
    helpers::generated::bpf_get_socket_cookie,
    macros::{btf_tracepoint, cgroup_sock, fentry, fexit, kprobe, kretprobe, map, sock_ops},
    maps::{HashMap, LruHashMap},
    programs::{
        BtfTracePointContext, FEntryContext, FExitContext, ProbeContext, RetProbeContext, SockContext, SockOpsContext,
    },
};
use aya_log_ebpf::{debug, warn};
use kernel::{Object, config, cookie_stored, cookie_typed, flags, follow, follow_typed, offset, protocol, read};
use portwatch_ebpf::{
    AF_INET, AF_INET6, IPPROTO_MPTCP, IPPROTO_TCP, IPPROTO_UDP, Record, TCP_CLOSE, TCP_LISTEN, flag, kind,
};
use record::{current, current_netns, current_tgid, inode, now, socket_record, task_record};
use ring::{count_lost, emit};

/// Linux's `EADDRINUSE`, the same number on every architecture.
const EADDRINUSE: u16 = 98;

/// Processes (tgid) whose forks, execs and exits matter. Filled here when a process begins to listen, and by userspace
/// from snapshots.
#[map]
static HOLDERS: HashMap<u32, u8> = HashMap::with_max_entries(32 << 10, 0);

/// Records of sockets that enter LISTEN, by the task in listen(), until sock_ops tells the final port in the same call.
/// An LRU: a listen may fail. An MPTCP parent, which gets no sock_ops call, is overwritten by its subflow.
#[map]
static PENDING: LruHashMap<u64, Record> = LruHashMap::with_max_entries(4 << 10, 0);

/// Function calls that a kretprobe will complete, by thread and function. An LRU, for not all are.
#[map]
static CALLS: LruHashMap<Call, Args> = LruHashMap::with_max_entries(4 << 10, 0);

/// Inode numbers of UDP sockets whose end is to be told although the kernel keeps no mark of their bind(): by cookie, or
/// by address where there is none. With post_bind and sock_release, which see no marks, all UDP sockets, and no inodes.
#[map]
static UDP_BOUND: HashMap<u64, u64> = HashMap::with_max_entries(64 << 10, 0);

#[repr(C)]
#[derive(Clone, Copy)]
struct Call {
    thread: u64,
    function: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    sk: u64,
    number: u64,
}

const TCP_GET_PORT: u64 = 1;
const UDP_GET_PORT: u64 = 2;

// ---- listening, by fexit ----------------------------------------------------------------------------------------

/// `int __inet_listen_sk(struct sock *sk, int backlog)`, 6.5 and later: TCP and MPTCP subflows.
#[fexit]
fn listen_sk_exit(ctx: FExitContext) -> i32 {
    let sk: Object = ctx.arg(0);
    // The return value follows the arguments in the context of every kernel with fexit.
    if ctx.arg::<i32>(2) == 0 {
        listening(&ctx, sk, cookie_typed(sk));
    }
    0
}

/// `int inet_listen(struct socket *sock, int backlog)`
#[fexit]
fn listen_exit(ctx: FExitContext) -> i32 {
    let socket: Object = ctx.arg(0);
    if ctx.arg::<i32>(2) == 0 {
        let sk = follow_typed(socket, offset!(socket_sk));
        listening(&ctx, sk, cookie_typed(sk));
    }
    0
}

/// `int inet_csk_get_port(struct sock *sk, unsigned short snum)`: bind and listen of TCP.
#[fexit]
fn tcp_get_port_exit(ctx: FExitContext) -> i32 {
    if ctx.arg::<i32>(2) != 0 {
        refused(&ctx, ctx.arg(0), ctx.arg(1), IPPROTO_TCP);
    }
    0
}

/// `int __inet_bind(struct sock *sk, struct sockaddr *uaddr, int addr_len, u32 flags)`: bind() of every protocol, and
/// never the port that a client is given.
#[fexit]
fn bind4_exit(ctx: FExitContext) -> i32 {
    bind_exit(&ctx)
}

/// `int __inet6_bind(…)`, the same for IPv6.
#[fexit]
fn bind6_exit(ctx: FExitContext) -> i32 {
    bind_exit(&ctx)
}

#[inline(always)]
fn bind_exit(ctx: &FExitContext) -> i32 {
    let sk: Object = ctx.arg(0);
    if ctx.arg::<i32>(4) == 0 && protocol(sk) == IPPROTO_UDP {
        udp_bound(ctx, sk, cookie_typed(sk));
    }
    0
}

/// `int udp_lib_get_port(struct sock *sk, unsigned short snum, unsigned int hash2_nulladdr)`
#[fexit]
fn udp_get_port_exit(ctx: FExitContext) -> i32 {
    if ctx.arg::<i32>(3) != 0 {
        refused(&ctx, ctx.arg(0), ctx.arg(1), IPPROTO_UDP);
    }
    0
}

/// `void udp_lib_unhash(struct sock *sk)`, before the port is forgotten.
#[fentry]
fn udp_unhash_entry(ctx: FEntryContext) -> i32 {
    let sk: Object = ctx.arg(0);
    udp_unbound(&ctx, sk);
    0
}

// ---- listening, by kprobe -----------------------------------------------------------------------------------------
//
// Not by the return of listen(): a kretprobe has as many instances as the machine has processors where the kernel is not
// preemptible, and says nothing of the calls it missed. Entries are never missed.

/// `int inet_hash(struct sock *sk)` and `inet6_hash`: the last step of listen(), with the final port. Should it fail, the
/// socket leaves LISTEN, which is told.
#[kprobe]
fn hash_enter(ctx: ProbeContext) -> u32 {
    let sk: Object = ctx.arg(0).unwrap_or(core::ptr::null());
    listening(&ctx, sk, cookie_stored(sk));
    0
}

// ---- failed binds, by kprobe + kretprobe ------------------------------------------------------------------------------

#[kprobe]
fn tcp_get_port_enter(ctx: ProbeContext) -> u32 {
    enter(TCP_GET_PORT, ctx.arg(0), ctx.arg(1).unwrap_or(0))
}

#[kretprobe]
fn tcp_get_port_leave(ctx: RetProbeContext) -> u32 {
    if let Some((sk, number)) = leave(TCP_GET_PORT)
        && ctx.ret::<i32>() != 0
    {
        refused(&ctx, sk, number, IPPROTO_TCP);
    }
    0
}

#[kprobe]
fn udp_get_port_enter(ctx: ProbeContext) -> u32 {
    enter(UDP_GET_PORT, ctx.arg(0), ctx.arg(1).unwrap_or(0))
}

#[kretprobe]
fn udp_get_port_leave(ctx: RetProbeContext) -> u32 {
    if let Some((sk, number)) = leave(UDP_GET_PORT)
        && ctx.ret::<i32>() != 0
    {
        refused(&ctx, sk, number, IPPROTO_UDP);
    }
    0
}

#[inline(always)]
fn enter(function: u64, sk: Option<u64>, number: u16) -> u32 {
    let call = Call { thread: bpf_get_current_pid_tgid(), function };
    // Should the map be full, one failed bind goes unseen.
    let _ = CALLS.insert(call, Args { sk: sk.unwrap_or(0), number: u64::from(number) }, u64::from(BPF_ANY));
    0
}

#[inline(always)]
fn leave(function: u64) -> Option<(Object, u16)> {
    let call = Call { thread: bpf_get_current_pid_tgid(), function };
    // SAFETY: the entry belongs to this thread, which is in this program.
    let args = unsafe { CALLS.get(call) }.copied()?;
    let _ = CALLS.remove(call);
    Some((args.sk as Object, args.number as u16))
}

// ---- the state tracepoint, and sock_ops -----------------------------------------------------------------------------

/// `inet_sock_set_state(const struct sock *sk, const int oldstate, const int newstate)`
#[btf_tracepoint(function = "inet_sock_set_state")]
fn state_changed(ctx: BtfTracePointContext) -> i32 {
    let (old, new): (i32, i32) = (ctx.arg(1), ctx.arg(2));
    // Not every way out of LISTEN: a connection begins as a copy of its listener and goes to SYN_RECV.
    if old == i32::from(TCP_LISTEN) && new == i32::from(TCP_CLOSE) {
        let sk: Object = ctx.arg(0);
        let cookie = cookie_typed(sk);
        emit(&ctx, socket_record(kind::CLOSED, sk, cookie));
    } else if config!(listen_by_state) && new == i32::from(TCP_LISTEN) {
        let sk: Object = ctx.arg(0);
        let cookie = cookie_typed(sk);
        if config!(port_by_sock_ops) {
            let record = socket_record(kind::OPENED, sk, cookie);
            if PENDING.insert(current() as u64, record, u64::from(BPF_ANY)).is_err() {
                count_lost();
            }
        } else {
            // The state is announced before the port is chosen; a snapshot will tell.
            hold(&ctx, current_tgid());
            emit(&ctx, socket_record(kind::UNSURE, sk, cookie));
        }
    }
    0
}

#[sock_ops]
fn listen_succeeded(ctx: SockOpsContext) -> u32 {
    if ctx.op() == BPF_SOCK_OPS_TCP_LISTEN_CB {
        let task = current() as u64;
        // SAFETY: the entry was made by this task and is used by nobody else.
        match unsafe { PENDING.get(task) }.copied() {
            Some(mut record) => {
                let _ = PENDING.remove(task);
                hold(&ctx, record.tgid);
                record.port = ctx.local_port() as u16;
                record.at = now();
                emit(&ctx, record);
            }
            None => {
                debug!(&ctx, "listen callback without a change of state");
                emit(&ctx, task_record(kind::UNSURE));
            }
        }
    }
    // 0 would deny the operation.
    1
}

// ---- UDP, by cgroup -------------------------------------------------------------------------------------------------

#[cgroup_sock(post_bind4)]
fn udp_post_bind4(ctx: SockContext) -> i32 {
    // SAFETY: the context is valid; the verifier checks each access.
    let word = unsafe { (*ctx.sock).src_ip4 };
    post_bind(&ctx, AF_INET, [word, 0, 0, 0])
}

#[cgroup_sock(post_bind6)]
fn udp_post_bind6(ctx: SockContext) -> i32 {
    // SAFETY: as above. Word by word: the verifier allows no wider access.
    let words = unsafe {
        let ip6 = &raw const (*ctx.sock).src_ip6;
        [(*ip6)[0], (*ip6)[1], (*ip6)[2], (*ip6)[3]]
    };
    post_bind(&ctx, AF_INET6, words)
}

#[inline(always)]
fn post_bind(ctx: &SockContext, family: u16, words: [u32; 4]) -> i32 {
    // SAFETY: the context is valid.
    if unsafe { (*ctx.sock).protocol } == u32::from(IPPROTO_UDP) {
        // SAFETY: the helper takes the context of a cgroup sock program; the port is readable in post_bind.
        let (cookie, port) = unsafe { (bpf_get_socket_cookie(ctx.as_ptr()), (*ctx.sock).src_port as u16) };
        let address = [words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_ne_bytes(), words[3].to_ne_bytes()];
        remember_udp(cookie, 0);
        hold(ctx, current_tgid());
        let mut record = task_record(kind::OPENED);
        record.cookie = cookie;
        record.uid = record.task_uid;
        record.netns = current_netns();
        record.protocol = IPPROTO_UDP;
        record.family = family;
        record.port = port;
        record.flags = flag::BOUND;
        let mut i = 0;
        while i < 4 {
            record.address[i * 4] = address[i][0];
            record.address[i * 4 + 1] = address[i][1];
            record.address[i * 4 + 2] = address[i][2];
            record.address[i * 4 + 3] = address[i][3];
            i += 1;
        }
        emit(ctx, record);
    }
    1
}

#[cgroup_sock(sock_release)]
fn udp_release(ctx: SockContext) -> i32 {
    // SAFETY: the context is valid.
    if unsafe { (*ctx.sock).protocol } == u32::from(IPPROTO_UDP) {
        // SAFETY: the helper takes the context of a cgroup sock program.
        let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
        if UDP_BOUND.remove(cookie).is_ok() {
            let mut record = task_record(kind::CLOSED);
            record.cookie = cookie;
            record.protocol = IPPROTO_UDP;
            emit(&ctx, record);
        }
    }
    1
}

// ---- processes ------------------------------------------------------------------------------------------------------

/// `sched_process_fork(struct task_struct *parent, struct task_struct *child)`
#[btf_tracepoint(function = "sched_process_fork")]
fn forked(ctx: BtfTracePointContext) -> i32 {
    let (parent, child): (Object, Object) = (ctx.arg(0), ctx.arg(1));
    let tgid: u32 = read(parent, offset!(task_tgid));
    if is_holder(tgid) {
        let child_tgid: u32 = read(child, offset!(task_tgid));
        if child_tgid != tgid {
            hold(&ctx, child_tgid);
            let mut record = task_record(kind::FORKED);
            record.child = child_tgid;
            record.child_start = read(child, offset!(task_start_boottime));
            emit(&ctx, record);
        }
    }
    0
}

/// `sched_process_exec(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`
#[btf_tracepoint(function = "sched_process_exec")]
fn execed(ctx: BtfTracePointContext) -> i32 {
    let task: Object = ctx.arg(0);
    if is_holder(read(task, offset!(task_tgid))) {
        emit(&ctx, task_record(kind::EXECED));
    }
    0
}

/// `sched_process_exit(struct task_struct *p)`: once per thread; the count of live threads is lowered before.
#[btf_tracepoint(function = "sched_process_exit")]
fn exited(ctx: BtfTracePointContext) -> i32 {
    let task: Object = ctx.arg(0);
    let tgid: u32 = read(task, offset!(task_tgid));
    if is_holder(tgid) && read::<u32>(follow(task, offset!(task_signal)), offset!(signal_live)) == 0 {
        let _ = HOLDERS.remove(tgid);
        emit(&ctx, task_record(kind::EXITED));
    }
    0
}

// ---- shared ---------------------------------------------------------------------------------------------------------

#[inline(always)]
fn listening<C: EbpfContext>(ctx: &C, sk: Object, cookie: u64) {
    // SMC, DCCP and others pass here too.
    let protocol = protocol(sk);
    if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
        return;
    }
    // Shut down by another thread meanwhile: the end was announced already.
    if read::<u8>(sk, offset!(skc_state)) != TCP_LISTEN {
        return;
    }
    hold(ctx, current_tgid());
    emit(ctx, socket_record(kind::OPENED, sk, cookie));
}

#[inline(always)]
fn udp_bound<C: EbpfContext>(ctx: &C, sk: Object, cookie: u64) {
    if flags(sk, IPPROTO_UDP) & flag::BOUND == 0 {
        // Port 0 of every address: bind() leaves no mark on the socket, so its end must be remembered.
        remember_udp(if cookie != 0 { cookie } else { sk as u64 }, inode(sk));
    }
    hold(ctx, current_tgid());
    emit(ctx, socket_record(kind::OPENED, sk, cookie));
}

#[inline(always)]
fn remember_udp(key: u64, inode: u64) {
    if UDP_BOUND.insert(key, inode, u64::from(BPF_ANY)).is_err() {
        count_lost();
    }
}

#[inline(always)]
fn udp_unbound<C: EbpfContext>(ctx: &C, sk: Object) {
    if protocol(sk) != IPPROTO_UDP || read::<u16>(sk, offset!(skc_num)) == 0 {
        return;
    }
    let cookie = cookie_stored(sk);
    // Both: userspace remembers it by the cookie that it was given since.
    let remembered = UDP_BOUND.remove(cookie).is_ok() | UDP_BOUND.remove(sk as u64).is_ok();
    if remembered || flags(sk, IPPROTO_UDP) & flag::BOUND != 0 {
        emit(ctx, socket_record(kind::CLOSED, sk, cookie));
    }
}

#[inline(always)]
fn refused<C: EbpfContext>(ctx: &C, sk: Object, number: u16, expected: u16) {
    let own = protocol(sk);
    if number == 0 || (own != expected && own != IPPROTO_MPTCP) {
        return;
    }
    let mut record = socket_record(kind::REFUSED, sk, 0);
    record.port = number;
    record.errno = EADDRINUSE;
    emit(ctx, record);
}

#[inline(always)]
fn is_holder(tgid: u32) -> bool {
    HOLDERS.get_ptr(tgid).is_some()
}

#[inline(always)]
fn hold<C: EbpfContext>(ctx: &C, tgid: u32) {
    if HOLDERS.insert(tgid, 1, u64::from(BPF_NOEXIST)).is_err() && !is_holder(tgid) {
        warn!(ctx, "more than 32768 holders: process {} is followed by snapshots only", tgid);
        count_lost();
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
