//! What the kernel tells in binary form.

use portwatch_ebpf::{AF_INET, COMM_LEN, Held, Record};

use crate::diagnose::kernel::read_links;
use crate::model::Protocol;
use crate::source::btf::Btf;
use crate::source::diag;
use crate::source::ebpf::record as records;

/// Some structs and members that portwatch asks for, of each kind; the seeds have them.
const ASKED: &[(&str, &str)] = &[
    ("sock", "__sk_common.skc_num"),
    ("sock", "sk_type"),
    ("sock_common", "skc_ipv6only"),
    ("task_struct", "start_boottime"),
    ("old", "three"),
    ("arrays", "grid"),
    ("", ""),
    ("sock", "."),
];

/// Answers lie inside of what they describe.
pub fn btf(data: &[u8]) {
    let Ok(btf) = Btf::parse(data) else { return };
    for (name, path) in ASKED {
        match btf.member(name, path) {
            Ok(member) => {
                let bits = u32::from(member.bit_offset) + u32::from(member.bit_size);
                assert!(member.bit_offset < 8 && bits <= member.size.saturating_mul(8), "{member:?}");
                member.offset.checked_add(member.size).expect("inside of a struct");
            }
            Err(error) => super::assert_one_line(&error.to_string()),
        }
    }
    if let Some(id) = btf.function_id("inet_listen") {
        assert!(id != 0 && btf.has_function("inet_listen"));
    }
}

/// Records of the ring and of the iterator, one after the other, at any alignment.
pub fn record(data: &[u8]) {
    let shifted = [&[0], data].concat();
    for (at, bytes) in data.chunks(size_of::<Record>()).enumerate() {
        let Some(record) = records::parse::<Record>(bytes) else {
            assert!(bytes.len() < size_of::<Record>());
            continue;
        };
        let again = records::parse::<Record>(&shifted[1 + at * size_of::<Record>()..]).expect("the same bytes");
        let socket = records::socket(&record);
        assert_eq!(socket, records::socket(&again));
        let name = records::name(&record.comm);
        assert!(name.chars().count() <= COMM_LEN && !name.contains('\0'));
        if let Some(socket) = socket {
            assert_eq!(socket.address.is_ipv4(), record.family == AF_INET);
            assert!(socket.address.is_ipv6() || socket.v6only.is_none());
            assert_eq!(socket.backlog.is_some(), socket.proto == Protocol::Tcp);
            assert_eq!((socket.id.inode, socket.id.cookie), (record.inode, record.cookie));
        }
    }
    for held in data.chunks(size_of::<Held>()).filter_map(records::parse::<Held>) {
        let (listens, bound) = (records::held_socket(&held), records::bound_socket(&held));
        assert!(listens.is_none() || bound.is_none(), "{listens:?} {bound:?}");
        assert!(bound.is_none_or(|socket| socket.proto == Protocol::Tcp));
    }
}

/// The first number of a link's dumps, as the seeds have it.
const SEQUENCE: u32 = 1;

/// One datagram of `sock_diag`, then taken for one of rtnetlink.
pub fn netlink(data: &[u8]) {
    let (mut rows, mut consistent) = (Vec::new(), true);
    let read = diag::read_messages(data, SEQUENCE, &mut rows, &mut consistent);
    // 72 bytes is the least that a row takes, its header not counted.
    assert!(rows.len() <= data.len() / 72, "{} rows in {} bytes", rows.len(), data.len());
    for proto in [Protocol::Tcp, Protocol::Udp] {
        for row in &rows {
            let socket = diag::socket_of(row, proto, 1);
            assert_eq!(socket.is_none(), row.header.socket_id.source_port == 0);
            if let (Some(socket), Some(attached)) = (socket, diag::port::port_socket(row, proto)) {
                assert_eq!((socket.id, socket.endpoint()), (attached.id, attached.local));
            }
        }
    }
    drop(read);
    let mut tunnels = Vec::new();
    let _ = read_links(data, &mut tunnels);
    assert!(tunnels.len() <= data.len() / 16);
}
