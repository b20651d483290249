//! What the kernel programs must know of the running kernel, from its BTF.

use portwatch_ebpf::{Bits, Config, Offsets};

use crate::source::btf::{Btf, BtfError};

/// Where the running kernel keeps every field that the programs read.
pub(super) fn offsets(btf: &Btf<'_>) -> Result<Offsets, BtfError> {
    let at = |name: &str, path: &str| btf.member(name, path).map(|member| member.offset);
    // Fields that a kernel may be built without; the programs then read nothing.
    let bits = |name: &str, path: &str| match btf.member(name, path) {
        Ok(member) => Ok(Bits {
            offset: member.offset,
            shift: u16::from(member.bit_offset),
            mask: if member.bit_size == 0 { 0xff } else { (1 << member.bit_size.min(8)) - 1 },
        }),
        Err(BtfError::MissingMember { .. }) => Ok(Bits::default()),
        Err(error) => Err(error),
    };
    Ok(Offsets {
        skc_family: at("sock_common", "skc_family")?,
        skc_state: at("sock_common", "skc_state")?,
        skc_num: at("sock_common", "skc_num")?,
        skc_rcv_saddr: at("sock_common", "skc_rcv_saddr")?,
        // Absent without IPv6, and then there is no socket of that family to read it from.
        skc_v6_rcv_saddr: at("sock_common", "skc_v6_rcv_saddr").or_else(|_| at("sock_common", "skc_rcv_saddr"))?,
        skc_net: at("sock_common", "skc_net.net")?,
        skc_cookie: at("sock_common", "skc_cookie")?,
        sk_protocol: at("sock", "sk_protocol")?,
        sk_socket: at("sock", "sk_socket")?,
        sk_uid: at("sock", "sk_uid")?,
        sk_max_ack_backlog: at("sock", "sk_max_ack_backlog")?,
        net_inum: at("net", "ns.inum")?,
        socket_sk: at("socket", "sk")?,
        socket_inode: at("socket_alloc", "vfs_inode")?.wrapping_sub(at("socket_alloc", "socket")?),
        inode_ino: at("inode", "i_ino")?,
        inode_sb: at("inode", "i_sb")?,
        sb_magic: at("super_block", "s_magic")?,
        file_inode: at("file", "f_inode")?,
        file_private_data: at("file", "private_data")?,
        task_tgid: at("task_struct", "tgid")?,
        task_pid: at("task_struct", "pid")?,
        task_group_leader: at("task_struct", "group_leader")?,
        task_start_boottime: at("task_struct", "start_boottime")?,
        task_comm: at("task_struct", "comm")?,
        task_signal: at("task_struct", "signal")?,
        task_nsproxy: at("task_struct", "nsproxy")?,
        signal_live: at("signal_struct", "live")?,
        nsproxy_net_ns: at("nsproxy", "net_ns")?,
        task_cred: at("task_struct", "cred")?,
        cred_euid: at("cred", "euid")?,
        task_cgroups: at("task_struct", "cgroups")?,
        css_set_dfl_cgrp: at("css_set", "dfl_cgrp")?,
        cgroup_kn: at("cgroup", "kn")?,
        kernfs_id: at("kernfs_node", "id")?,
        skc_ipv6only: bits("sock_common", "skc_ipv6only")?,
        sk_userlocks: bits("sock", "sk_userlocks")?,
        tcp_is_mptcp: bits("tcp_sock", "is_mptcp")?,
    })
}

/// Which helpers the running kernel has, by the functions behind them.
pub(super) fn config(btf: &Btf<'_>) -> Config {
    Config {
        cookie_helper: btf.has_function("bpf_get_socket_ptr_cookie").into(),
        sock_from_file: btf.has_function("bpf_sock_from_file").into(),
        ..Config::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::btf;

    #[test]
    fn the_running_kernel_has_every_field() {
        let bytes = match btf::kernel_bytes() {
            Ok(bytes) => bytes,
            Err(BtfError::NoKernelBtf) => {
                eprintln!("skipped: this kernel exposes no BTF");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let offsets = offsets(&Btf::parse(&bytes).unwrap()).unwrap();
        assert_eq!(offsets.skc_num % 2, 0);
        assert!(offsets.sk_userlocks.mask >= 0xf, "{:?}", offsets.sk_userlocks);
    }
}
