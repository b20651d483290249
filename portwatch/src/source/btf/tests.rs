use super::format::{HEADER_LEN, MAGIC};
use super::*;

/// Writes BTF, type by type, in this machine's byte order.
struct Blob {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

/// A struct member: name, type, offset field as stored.
type Field<'n> = (&'n str, u32, u32);

impl Blob {
    fn new() -> Blob {
        Blob { types: Vec::new(), strings: vec![0], count: 0 }
    }

    fn string(&mut self, s: &str) -> u32 {
        if s.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(s.as_bytes());
        self.strings.push(0);
        at
    }

    /// The record and what follows it; returns the id of the type.
    fn add(&mut self, name: &str, kind: u8, vlen: usize, value: u32, tail: &[u32]) -> u32 {
        let name = self.string(name);
        for word in [name, u32::from(kind) << 24 | vlen as u32, value].iter().chain(tail) {
            self.types.extend(word.to_ne_bytes());
        }
        self.count += 1;
        self.count
    }

    fn int(&mut self, name: &str, size: u32) -> u32 {
        self.add(name, kind::INT, 0, size, &[size * 8])
    }

    fn composite(&mut self, kind: u8, name: &str, size: u32, fields: &[Field<'_>]) -> u32 {
        let tail: Vec<u32> = fields.iter().flat_map(|&(name, ty, offset)| [self.string(name), ty, offset]).collect();
        self.add(name, kind, fields.len(), size, &tail)
    }

    fn strukt(&mut self, name: &str, size: u32, fields: &[Field<'_>]) -> u32 {
        self.composite(kind::STRUCT, name, size, fields)
    }

    fn union(&mut self, name: &str, size: u32, fields: &[Field<'_>]) -> u32 {
        self.composite(kind::UNION, name, size, fields)
    }

    /// A struct with kind_flag: its offsets hold widths too.
    fn flagged(&mut self, name: &str, size: u32, fields: &[Field<'_>]) -> u32 {
        let at = self.types.len();
        let id = self.strukt(name, size, fields);
        let info = u32_at(&self.types, at + 4).unwrap() | 1 << 31;
        self.types[at + 4..at + 8].copy_from_slice(&info.to_ne_bytes());
        id
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_ne_bytes().to_vec();
        out.extend([VERSION, 0]);
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        for word in [HEADER_LEN as u32, 0, types, types, strings] {
            out.extend(word.to_ne_bytes());
        }
        out.extend(&self.types);
        out.extend(&self.strings);
        out
    }
}

/// A `sock` as the kernel nests it, and one struct for every other thing that a member can be.
fn sample() -> Blob {
    let mut b = Blob::new();
    let (u8_, u16_, u32_, u64_) = (b.int("u8", 1), b.int("u16", 2), b.int("u32", 4), b.int("u64", 8));
    let ptr = b.add("", kind::PTR, 0, 0, &[]);
    let be16 = b.add("__be16", kind::TYPEDEF, 0, u16_, &[]);
    let konst = b.add("", kind::CONST, 0, be16, &[]);
    let volatile = b.add("", kind::VOLATILE, 0, konst, &[]);
    let ports = b.strukt("", 4, &[("skc_dport", be16, 0), ("skc_num", volatile, 16)]);
    let portpair = b.union("", 4, &[("skc_portpair", u32_, 0), ("", ports, 0)]);
    let common = b.flagged(
        "sock_common",
        24,
        &[
            ("skc_addrpair", u64_, 0),
            ("", portpair, 64),
            ("skc_family", u16_, 96),
            ("skc_state", u8_, 112),
            ("skc_reuse", u8_, 4 << 24 | 120),
            ("skc_reuseport", u8_, 1 << 24 | 124),
            ("skc_ipv6only", u8_, 1 << 24 | 125),
            ("skc_wide", u32_, 20 << 24 | 134),
        ],
    );
    let aliased = b.add("common_t", kind::TYPEDEF, 0, common, &[]);
    let sock = b.strukt("sock", 40, &[("__sk_common", aliased, 0), ("sk_prot", ptr, 192), ("sk_type", u16_, 256)]);
    b.strukt("tcp_sock", 48, &[("inet", sock, 0), ("", common, 160)]);

    let five_bits = b.add("u32", kind::INT, 0, 4, &[5]);
    let shifted = b.add("u32", kind::INT, 0, 4, &[6 << 16 | 3]);
    let shifted = b.add("three", kind::TYPEDEF, 0, shifted, &[]);
    b.strukt(
        "old",
        8,
        &[("plain", u32_, 0), ("five", five_bits, 32), ("three", shifted, 32), ("across", five_bits, 45)],
    );

    let row = b.add("", kind::ARRAY, 0, 0, &[u16_, u32_, 3]);
    let grid = b.add("", kind::ARRAY, 0, 0, &[row, u32_, 4]);
    let flexible = b.add("", kind::ARRAY, 0, 0, &[u8_, u32_, 0]);
    b.strukt("arrays", 30, &[("row", row, 0), ("grid", grid, 48), ("tail", flexible, 240)]);

    let en = b.add("color", kind::ENUM, 1, 4, &[0, 7]);
    let en64 = b.add("wide", kind::ENUM64, 1, 8, &[0, 7, 0]);
    let float = b.add("double", kind::FLOAT, 0, 8, &[]);
    let tag = b.add("rcu", kind::TYPE_TAG, 0, en, &[]);
    let fwd = b.add("later", kind::FWD, 0, 0, &[]);
    let huge = b.add("", kind::ARRAY, 0, 0, &[u64_, u32_, u32::MAX]);
    b.strukt("kinds", 24, &[("tagged", tag, 0), ("en64", en64, 32), ("float", float, 96)]);
    b.strukt(
        "wrong",
        4,
        &[
            ("fwd", fwd, 0),
            ("void", 0, 0),
            ("nowhere", 9999, 0),
            ("beyond", u32_, 8),
            ("odd", u8_, 3),
            ("huge", huge, 0),
        ],
    );

    let left = b.strukt("", 8, &[("both", u32_, 0), ("same", u32_, 32)]);
    let right = b.strukt("", 8, &[("pad", u32_, 0), ("both", u32_, 32)]);
    let other = b.strukt("", 8, &[("same", u32_, 32)]);
    b.union("twice", 8, &[("", left, 0), ("", right, 0), ("", other, 0)]);

    b.strukt("double", 8, &[("agreed", u32_, 0), ("moved", u32_, 32)]);
    b.strukt("double", 12, &[("agreed", u32_, 0), ("moved", u32_, 64), ("new", u32_, 32)]);

    // A struct inside of itself, typedefs and arrays in a circle: each refers to what comes after it.
    let next = b.count + 1;
    b.strukt("", 4, &[("", next, 0)]);
    b.strukt("cycle", 4, &[("", next, 0), ("loop", next + 2, 0), ("ring", next + 4, 0), ("fine", u32_, 0)]);
    b.add("a", kind::TYPEDEF, 0, next + 3, &[]);
    b.add("b", kind::TYPEDEF, 0, next + 2, &[]);
    b.add("", kind::ARRAY, 0, 0, &[next + 4, u32_, 1]);
    b.strukt("turn", 4, &[("loop", next + 2, 0), ("ring", next + 4, 0), ("fine", u32_, 0)]);
    // Each level holds the next one twice: 2^30 members, were they all walked.
    let mut level = b.strukt("", 4, &[("leaf", u32_, 0)]);
    for _ in 0..30 {
        level = b.strukt("", 4, &[("", level, 0), ("", level, 0)]);
    }
    b.strukt("bomb", 4, &[("", level, 0)]);

    b.add("counter", kind::VAR, 0, u32_, &[1]);
    b.add(".data", kind::DATASEC, 1, 4, &[next, 0, 4]);
    b.add("kfunc", kind::DECL_TAG, 0, sock, &[u32::MAX]);
    let two = b.add("", kind::FUNC_PROTO, 2, u32_, &[0, ptr, 0, u32_]);
    let none = b.add("", kind::FUNC_PROTO, 0, 0, &[]);
    b.add("inet_listen", kind::FUNC, 1, two, &[]);
    b.add("nothing", kind::FUNC, 0, none, &[]);
    b.add("differs", kind::FUNC, 0, two, &[]);
    b.add("differs", kind::FUNC, 0, none, &[]);
    b.add("broken", kind::FUNC, 0, u32_, &[]);
    b
}

/// Asks for `struct.path`; the answer is "SIZE@OFFSET", "WIDTH bits SIZE@OFFSET.BIT" or the error.
#[track_caller]
fn check(btf: &Btf<'_>, input: &str, expect: &str) {
    assert_eq!(answer(btf, input), expect, "{input}");
}

fn answer(btf: &Btf<'_>, input: &str) -> String {
    let (name, path) = input.split_once('.').unwrap();
    match btf.member(name, path) {
        Ok(Member { offset, size, bit_offset: 0, bit_size: 0 }) => format!("{size}@{offset}"),
        Ok(Member { offset, size, bit_offset, bit_size }) => format!("{bit_size} bits {size}@{offset}.{bit_offset}"),
        Err(e) => e.to_string(),
    }
}

const CASES: &[(&str, &str)] = &[
    // Plain, nested, through a typedef, in anonymous structs and unions.
    ("sock_common.skc_addrpair", "8@0"),
    ("sock_common.skc_portpair", "4@8"),
    ("sock_common.skc_num", "2@10"),
    ("sock.__sk_common", "24@0"),
    ("sock.__sk_common.skc_dport", "2@8"),
    ("sock.sk_type", "2@32"),
    ("tcp_sock.inet.__sk_common.skc_num", "2@10"),
    ("tcp_sock.skc_num", "2@30"),
    // Bitfields with kind_flag.
    ("sock_common.skc_state", "1@14"),
    ("sock_common.skc_reuse", "4 bits 1@15.0"),
    ("sock_common.skc_ipv6only", "1 bits 1@15.5"),
    ("tcp_sock.skc_reuseport", "1 bits 1@35.4"),
    ("sock_common.skc_wide", "20 bits 4@16.6"),
    // Bitfields of the old style.
    ("old.plain", "4@0"),
    ("old.five", "5 bits 1@4.0"),
    ("old.three", "3 bits 2@4.6"),
    ("old.across", "5 bits 2@5.5"),
    // Arrays and other kinds.
    ("arrays.row", "6@0"),
    ("arrays.grid", "24@6"),
    ("arrays.tail", "0@30"),
    ("kinds.tagged", "4@0"),
    ("kinds.en64", "8@4"),
    ("kinds.float", "8@12"),
    // Names that are not there, or not once.
    ("nope.x", "this kernel's BTF has no struct nope"),
    ("u32.x", "this kernel's BTF has no struct u32"),
    (".x", "this kernel's BTF has no struct "),
    ("sock.skc_num", "this kernel's struct sock has no skc_num: there is no member \"skc_num\""),
    ("sock.__sk_common.skc", "this kernel's struct sock has no __sk_common.skc: there is no member \"skc\""),
    ("sock.", "this kernel's struct sock has no : there is no member \"\""),
    ("tcp_sock..skc_num", "this kernel's struct tcp_sock has no .skc_num: there is no member \"\""),
    ("sock.sk_type.x", "this kernel's struct sock has no sk_type.x: \"sk_type\" is neither struct nor union"),
    ("sock.sk_prot.x", "this kernel's struct sock has no sk_prot.x: \"sk_prot\" is neither struct nor union"),
    ("twice.pad", "4@0"),
    ("twice.same", "4@4"),
    ("twice.both", "this kernel's struct twice has no single both: several members are named \"both\""),
    ("double.agreed", "4@0"),
    ("double.moved", "this kernel's BTF has several structs double that disagree about double.moved"),
    ("double.new", "this kernel's BTF has several structs double that disagree about double.new"),
    ("double.none", "this kernel's struct double has no none: there is no member \"none\""),
    // Blobs that contradict themselves.
    ("wrong.fwd", "malformed BTF: a member has a type without a size"),
    ("wrong.void", "malformed BTF: a member has a type without a size"),
    ("wrong.nowhere", "malformed BTF: a type refers to one that does not exist"),
    ("wrong.beyond", "malformed BTF: a member is outside of its struct"),
    ("wrong.odd", "malformed BTF: a member that is no bitfield starts inside of a byte"),
    ("wrong.huge", "malformed BTF: a member's size is too large"),
    ("cycle.fine", "malformed BTF: anonymous structs are nested too deep or in a cycle"),
    ("turn.fine", "4@0"),
    ("turn.loop", "malformed BTF: typedefs are nested too deep or in a cycle"),
    ("turn.ring", "malformed BTF: arrays are nested too deep or in a cycle"),
    ("bomb.leaf", "malformed BTF: a struct has too many members"),
];

#[test]
fn members_are_found_where_c_would_find_them() {
    let bytes = sample().bytes();
    let btf = Btf::parse(&bytes).unwrap();
    for (input, expect) in CASES {
        let expect = if *input == "sock.sk_prot" { format!("{}@24", size_of::<usize>()) } else { (*expect).to_owned() };
        check(&btf, input, &expect);
    }
    assert_eq!(btf.member("sock", "sk_prot").unwrap().size as usize, size_of::<usize>());
}

#[test]
fn functions_are_found_by_name() {
    let bytes = sample().bytes();
    let btf = Btf::parse(&bytes).unwrap();
    // Of two with one name, neither can be attached to by its id.
    for (name, exists, unique) in [
        ("inet_listen", true, true),
        ("nothing", true, true),
        ("differs", true, false),
        ("inet_liste", false, false),
        ("sock", false, false),
        ("", false, false),
    ] {
        assert_eq!((btf.has_function(name), btf.function_id(name).is_some()), (exists, unique), "{name}");
    }
}

#[test]
fn a_blob_that_is_not_ours_is_refused_with_its_reason() {
    let edit = |at: usize, with: &[u8]| {
        let mut bytes = sample().bytes();
        bytes[at..at + with.len()].copy_from_slice(with);
        Btf::parse(&bytes).map(|_| ()).unwrap_err().to_string()
    };
    let word = |n: u32| n.to_ne_bytes();
    let strings = sample().types.len() + HEADER_LEN;
    for (at, with, expect) in [
        (0, &b"\x7fELF"[..], "not BTF: the magic number is missing"),
        (0, &MAGIC.swap_bytes().to_ne_bytes(), "BTF of a machine with the other byte order"),
        (2, &[9], "BTF version 9 is not supported, only 1 is"),
        (4, &word(8), "malformed BTF: the header is cut short"),
        (4, &word(u32::MAX), "malformed BTF: the header is cut short"),
        (8, &word(u32::MAX), "malformed BTF: a section reaches beyond the end"),
        (12, &word(u32::MAX), "malformed BTF: a section reaches beyond the end"),
        (12, &word(11), "malformed BTF: a section ends too early"),
        (12, &word(15), "malformed BTF: the type section ends inside of a type"),
        (20, &word(0), "malformed BTF: the strings do not start and end with a NUL"),
        (strings, b"x", "malformed BTF: the strings do not start and end with a NUL"),
        (24, &word(1 << 30), "malformed BTF: the name of a type is outside of the strings"),
        (28, &word(1 << 20), "malformed BTF: a type uses bits that have no meaning"),
        (28, &word(31 << 24), "BTF type 1 is of the unknown kind 31: this kernel is newer than portwatch knows"),
    ] {
        assert_eq!(edit(at, with), expect, "{with:?} at {at}");
    }
    assert_eq!(Btf::parse(&[][..]).unwrap_err(), BtfError::NotBtf);
}

#[test]
fn a_header_that_grew_is_still_read() {
    let mut bytes = sample().bytes();
    bytes.splice(HEADER_LEN..HEADER_LEN, [0xff; 8]);
    bytes[4..8].copy_from_slice(&(HEADER_LEN as u32 + 8).to_ne_bytes());
    check(&Btf::parse(&bytes).unwrap(), "sock.__sk_common.skc_num", "2@10");
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = sample().bytes();
    for len in 0..bytes.len() {
        assert!(Btf::parse(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
}

#[test]
fn a_large_blob_is_read_whole() {
    let mut b = Blob::new();
    let long = b.int("long", 8);
    for i in 0..50_000u32 {
        b.strukt(&format!("s{i}"), 16 + i * 8, &[("first", long, 0), ("last", long, 64 + i * 64)]);
    }
    let names: Vec<String> = (0..u32::from(u16::MAX)).map(|i| format!("m{i}")).collect();
    let fields: Vec<Field<'_>> = names.iter().zip(0..).map(|(name, i)| (name.as_str(), long, i * 64)).collect();
    b.strukt("widest", u32::from(u16::MAX) * 8, &fields);
    let bytes = b.bytes();
    let btf = Btf::parse(&bytes).unwrap();
    check(&btf, "s0.last", "8@8");
    check(&btf, "s49999.last", "8@400000");
    check(&btf, "widest.m65534", "8@524272");
}

/// Marsaglia's xorshift64 from a fixed seed: the same mutations in every run.
struct XorShift(u64);

impl XorShift {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

#[test]
fn no_mutation_panics_or_hangs_or_leaves_the_struct() {
    let pristine = sample().bytes();
    let mut random = XorShift(0x9e37_79b9_7f4a_7c15);
    let mut parsed = 0;
    for _ in 0..4_000 {
        let mut bytes = pristine.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len());
            bytes[at] = match random.below(3) {
                0 => random.below(256) as u8,
                1 => bytes[at] ^ 1 << random.below(8),
                _ => bytes[random.below(pristine.len())],
            };
        }
        let Ok(btf) = Btf::parse(&bytes) else { continue };
        parsed += 1;
        // The bomb walks up to the limit each time, which its own case covers.
        for (input, _) in CASES.iter().filter(|(input, _)| !input.starts_with("bomb")) {
            let (name, path) = input.split_once('.').unwrap();
            if let Ok(member) = btf.member(name, path) {
                assert!(member.bit_offset < 8 && (member.bit_size == 0 || member.size > 0), "{input}: {member:?}");
            }
        }
        for name in ["inet_listen", "differs", "broken"] {
            btf.function_id(name);
        }
    }
    assert!(parsed > 500, "only {parsed} mutations came through the parser: the lookups were hardly tried");
}

#[test]
fn the_running_kernel_answers() {
    let bytes = match kernel_bytes() {
        Err(e @ BtfError::NoKernelBtf) => return eprintln!("SKIPPED: {e}"),
        other => other.unwrap(),
    };
    let btf = Btf::parse(&bytes).unwrap();
    let shape = |name, path| btf.member(name, path).map(|m| (m.size, m.bit_size)).map_err(|e| e.to_string());
    let pointer = size_of::<usize>() as u32;
    for (name, path, size, bits) in [
        ("sock", "__sk_common.skc_state", 1, 0),
        ("sock", "__sk_common.skc_num", 2, 0),
        ("sock", "sk_protocol", 2, 0),
        ("sock_common", "skc_rcv_saddr", 4, 0),
        ("sock_common", "skc_family", 2, 0),
        ("sock_common", "skc_ipv6only", 1, 1),
        ("socket", "sk", pointer, 0),
        ("file", "private_data", pointer, 0),
        ("task_struct", "tgid", 4, 0),
        ("task_struct", "start_boottime", 8, 0),
        ("task_struct", "group_leader", pointer, 0),
        ("task_struct", "comm", 16, 0),
    ] {
        assert_eq!(shape(name, path), Ok((size, bits)), "{name}.{path}");
    }
    // What userspace knows of the layout: a sock starts with its sock_common.
    for path in ["skc_state", "skc_num", "skc_ipv6only"] {
        let inner = btf.member("sock_common", path).unwrap();
        assert_eq!(btf.member("sock", &format!("__sk_common.{path}")).unwrap(), inner, "{path}");
    }
    assert!(btf.has_function("inet_listen"));
    assert!(!btf.has_function("inet_listen_nope"));
    check(&btf, "sock.skc_nope", "this kernel's struct sock has no skc_nope: there is no member \"skc_nope\"");
}
