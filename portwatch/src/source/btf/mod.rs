//! Where the kernel keeps its fields: a reader of BTF, the kernel's own description of its types.
//!
//! Owns BTF and nothing else (the layout is in `format`): bytes in, offsets out. The kernel programs are compiled without any offset; the
//! loader asks here for each field they read and writes the answer into their constants.
//!
//! [`Btf::parse`] walks the type section once and remembers where each record starts; members are read only when
//! asked for. Nothing in the bytes is trusted: every index is checked, every walk is bounded, so that a broken or
//! hostile blob gives an error, never a panic, an endless loop or an offset outside of the struct.
//!
//! The format: <https://docs.kernel.org/bpf/btf.html>.

use std::fmt;
use std::io;
use std::ops::Range;

use format::{MEMBER_LEN, RECORD_LEN, Record, VERSION, kind, sections, u32_at};

mod format;
mod kernel;

pub use kernel::KernelBytes;

/// Where the running kernel shows its types.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// The kernel's own limit on chains of types (`MAX_RESOLVE_DEPTH`).
const MAX_DEPTH: u32 = 32;
/// Members looked at for one name, anonymous members included. `task_struct`, the largest, has about 300.
const MAX_VISITED: u32 = 1 << 17;

/// Where a field is inside its struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the start of the struct. For a bitfield: the byte that holds its first bit.
    pub offset: u32,
    /// Bytes to read. For a bitfield: those that it touches. 0 for a flexible array.
    pub size: u32,
    /// The first bit of a bitfield within the byte at `offset`, 0 to 7, counted from the least significant bit on a
    /// little endian machine and from the most significant on a big endian one. 0 for other fields.
    pub bit_offset: u8,
    /// The width of a bitfield in bits, 0 when the field is none.
    pub bit_size: u8,
}

/// Why a question about the kernel's types has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BtfError {
    /// The kernel has no BTF file.
    NoKernelBtf,
    /// The kernel's BTF file cannot be read.
    Unreadable {
        reason: String,
    },
    /// The bytes do not start as BTF does.
    NotBtf,
    /// BTF of a machine with the other byte order.
    ForeignByteOrder,
    UnsupportedVersion {
        version: u8,
    },
    /// A kind of type that this reader does not know, so it cannot know where the next type starts.
    UnknownKind {
        kind: u8,
        type_id: usize,
    },
    /// The bytes contradict themselves.
    Malformed {
        what: &'static str,
    },
    MissingStruct {
        name: String,
    },
    /// Several structs of this name disagree about the member.
    AmbiguousStruct {
        name: String,
        path: String,
    },
    /// `part` is the name in `path` that was not found.
    MissingMember {
        name: String,
        path: String,
        part: String,
    },
    /// `part` is the name in `path` that was found at several places.
    AmbiguousMember {
        name: String,
        path: String,
        part: String,
    },
    /// `part` is the name in `path` that should have members but is neither struct nor union.
    NotAStruct {
        name: String,
        path: String,
        part: String,
    },
}

impl fmt::Display for BtfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BtfError::NoKernelBtf => write!(
                f,
                "this kernel exposes no BTF at {KERNEL_BTF} (CONFIG_DEBUG_INFO_BTF is off, or /sys is not mounted)"
            ),
            BtfError::Unreadable { reason } => write!(f, "cannot read the kernel's BTF at {KERNEL_BTF}: {reason}"),
            BtfError::NotBtf => write!(f, "not BTF: the magic number is missing"),
            BtfError::ForeignByteOrder => write!(f, "BTF of a machine with the other byte order"),
            BtfError::UnsupportedVersion { version } => {
                write!(f, "BTF version {version} is not supported, only {VERSION} is")
            }
            BtfError::UnknownKind { kind, type_id } => {
                write!(f, "BTF type {type_id} is of the unknown kind {kind}: this kernel is newer than portwatch knows")
            }
            BtfError::Malformed { what } => write!(f, "malformed BTF: {what}"),
            BtfError::MissingStruct { name } => write!(f, "this kernel's BTF has no struct {name}"),
            BtfError::AmbiguousStruct { name, path } => {
                write!(f, "this kernel's BTF has several structs {name} that disagree about {name}.{path}")
            }
            BtfError::MissingMember { name, path, part } => {
                write!(f, "this kernel's struct {name} has no {path}: there is no member {part:?}")
            }
            BtfError::AmbiguousMember { name, path, part } => {
                write!(f, "this kernel's struct {name} has no single {path}: several members are named {part:?}")
            }
            BtfError::NotAStruct { name, path, part } => {
                write!(f, "this kernel's struct {name} has no {path}: {part:?} is neither struct nor union")
            }
        }
    }
}

impl std::error::Error for BtfError {}

fn malformed(what: &'static str) -> BtfError {
    BtfError::Malformed { what }
}

/// A type that can be asked for by name.
#[derive(Clone, Copy)]
struct Named {
    /// Offset into the strings.
    name: u32,
    type_id: u32,
}

/// Parsed BTF. Cheap to make (one pass, no allocation per type), so there is no need to keep it.
pub struct Btf<'a> {
    data: &'a [u8],
    types: Range<usize>,
    strings: Range<usize>,
    /// The start of each record in the type section; type 1 comes first, since type 0 is void and has no record.
    records: Vec<u32>,
    structs: Vec<Named>,
    functions: Vec<Named>,
}

impl fmt::Debug for Btf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Btf")
            .field("bytes", &self.data.len())
            .field("types", &self.records.len())
            .field("structs", &self.structs.len())
            .field("functions", &self.functions.len())
            .finish()
    }
}

/// The types of the running kernel, to be parsed.
///
/// # Errors
/// [`BtfError::NoKernelBtf`] where the kernel was built without, [`BtfError::Unreadable`].
pub fn kernel_bytes() -> Result<KernelBytes, BtfError> {
    KernelBytes::open().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => BtfError::NoKernelBtf,
        _ => BtfError::Unreadable { reason: error.to_string() },
    })
}

impl<'a> Btf<'a> {
    /// Reads the header and finds every type.
    ///
    /// # Errors
    /// All that concern the blob as a whole; what is wrong inside of one struct shows when that struct is asked for.
    pub fn parse(data: &'a [u8]) -> Result<Self, BtfError> {
        let (types, strings) = sections(data)?;
        let strings_len = strings.len();
        let section = &data[types.clone()];
        // A record with what belongs to it takes 27 bytes on average in the kernels seen.
        let mut records = Vec::with_capacity(section.len() / 24);
        let (mut structs, mut functions) = (Vec::new(), Vec::new());
        let mut at = 0;
        while at < section.len() {
            let record = Record::read(section, at)?;
            let type_id = records.len() + 1;
            let name = record.name;
            if name as usize >= strings_len {
                return Err(malformed("the name of a type is outside of the strings"));
            }
            let end = at + RECORD_LEN + record.tail_len(type_id)?;
            if end > section.len() {
                return Err(malformed("the type section ends inside of a type"));
            }
            let named = Named { name, type_id: u32_of(type_id)? };
            match record.kind {
                kind::STRUCT | kind::UNION if name != 0 => structs.push(named),
                kind::FUNC => functions.push(named),
                _ => {}
            }
            records.push(u32_of(at)?);
            at = end;
        }
        Ok(Btf { data, types, strings, records, structs, functions })
    }

    /// Where `path` is inside of `struct_name` (a struct or a union).
    ///
    /// `path` is one name or several joined by dots; members of anonymous structs and unions count as members of
    /// what encloses them, as in C: both `skc_num` and `__sk_common.skc_num` are paths. Pointers are not followed.
    ///
    /// # Errors
    /// Struct or member missing, or not the only one of its name; a path through something without members;
    /// [`BtfError::Malformed`].
    pub fn member(&self, struct_name: &str, path: &str) -> Result<Member, BtfError> {
        let mut answers =
            self.named(&self.structs, struct_name).map(|type_id| self.member_of(type_id, struct_name, path));
        let first = answers.next().ok_or_else(|| BtfError::MissingStruct { name: struct_name.to_owned() })?;
        if answers.all(|other| other == first) {
            first
        } else {
            Err(BtfError::AmbiguousStruct { name: struct_name.to_owned(), path: path.to_owned() })
        }
    }

    /// Whether the kernel has a function of this name that programs can attach to by type.
    pub fn has_function(&self, name: &str) -> bool {
        self.named(&self.functions, name).next().is_some()
    }

    /// The type id of a function, by which a program that attaches to it names it; `None` if there is none, or several.
    pub fn function_id(&self, name: &str) -> Option<u32> {
        let mut ids = self.named(&self.functions, name);
        ids.next().filter(|_| ids.next().is_none())
    }

    /// The ids of those of `types` that have this name. A scan, as the few dozen names that a caller wants cost less
    /// than a map of all.
    fn named(&self, types: &[Named], name: &str) -> impl Iterator<Item = u32> {
        types.iter().filter(move |named| self.string_is(named.name, name)).map(|named| named.type_id)
    }

    fn member_of(&self, type_id: u32, struct_name: &str, path: &str) -> Result<Member, BtfError> {
        let root = self.record(type_id)?;
        let mut place = Place { type_id, bit: 0, width: 0 };
        let mut container = root;
        let mut parts = path.split('.').peekable();
        while let Some(part) = parts.next() {
            let (name, path, part) = (struct_name.to_owned(), path.to_owned(), part.to_owned());
            place = match self.find(container, place.bit, &part)? {
                Found::One(place) => place,
                Found::None => return Err(BtfError::MissingMember { name, path, part }),
                Found::Several => return Err(BtfError::AmbiguousMember { name, path, part }),
            };
            if parts.peek().is_some() {
                container = self.resolve(place.type_id)?;
                if !container.has_members() || place.width != 0 {
                    return Err(BtfError::NotAStruct { name, path, part });
                }
            }
        }
        let member = self.measure(place)?;
        if u64::from(member.offset) + u64::from(member.size) > u64::from(root.value) {
            return Err(malformed("a member is outside of its struct"));
        }
        Ok(member)
    }

    /// The member `name` of `container`, which itself starts at `base` bits, and of all that is anonymous in it.
    fn find(&self, container: Record, base: u64, name: &str) -> Result<Found, BtfError> {
        let mut found = Found::None;
        let mut visited = 0;
        let mut open = vec![(container, base, 0)];
        while let Some((container, base, depth)) = open.pop() {
            for index in 0..container.vlen {
                visited += 1;
                if visited > MAX_VISITED {
                    return Err(malformed("a struct has too many members"));
                }
                let raw = self.raw_member(&container, index)?;
                let place = Place { type_id: raw.type_id, bit: base + raw.bit, width: raw.width };
                if self.string_is(raw.name, "") {
                    // Anonymous: a nested struct or union, or padding between bitfields.
                    let nested = self.resolve(raw.type_id)?;
                    if nested.has_members() {
                        if depth == MAX_DEPTH {
                            return Err(malformed("anonymous structs are nested too deep or in a cycle"));
                        }
                        open.push((nested, place.bit, depth + 1));
                    }
                } else if self.string_is(raw.name, name) {
                    found = match found {
                        Found::None => Found::One(place),
                        Found::One(other) if other == place => found,
                        Found::One(_) | Found::Several => Found::Several,
                    };
                }
            }
        }
        Ok(found)
    }

    fn raw_member(&self, container: &Record, index: usize) -> Result<RawMember, BtfError> {
        let section = &self.data[self.types.clone()];
        let at = container.tail + index * MEMBER_LEN;
        let (name, type_id, offset) = (u32_at(section, at)?, u32_at(section, at + 4)?, u32_at(section, at + 8)?);
        if name as usize >= self.strings.len() {
            return Err(malformed("the name of a member is outside of the strings"));
        }
        let (bit, width) = if container.flag { (offset & 0x00ff_ffff, (offset >> 24) as u8) } else { (offset, 0) };
        Ok(RawMember { name, type_id, bit: u64::from(bit), width })
    }

    /// Turns a place in bits into bytes to read.
    fn measure(&self, mut place: Place) -> Result<Member, BtfError> {
        let resolved = self.resolve(place.type_id)?;
        if place.width == 0 && resolved.kind == kind::INT {
            // Before kind_flag, a bitfield was a member of an integer type made for it, with its own bits.
            let encoding = u32_at(&self.data[self.types.clone()], resolved.tail)?;
            let (shift, bits) = (encoding >> 16 & 0xff, encoding & 0xff);
            if bits == 0 || u64::from(shift) + u64::from(bits) > u64::from(resolved.value) * 8 {
                return Err(malformed("an integer's bits do not fit its bytes"));
            }
            if u64::from(bits) != u64::from(resolved.value) * 8 {
                place.bit += u64::from(shift);
                place.width = bits as u8;
            }
        }
        let offset = u32::try_from(place.bit / 8).map_err(|_| malformed("a member's offset is too large"))?;
        let bit_offset = (place.bit % 8) as u8;
        if place.width != 0 {
            let size = (u32::from(bit_offset) + u32::from(place.width)).div_ceil(8);
            return Ok(Member { offset, size, bit_offset, bit_size: place.width });
        }
        if bit_offset != 0 {
            return Err(malformed("a member that is no bitfield starts inside of a byte"));
        }
        Ok(Member { offset, size: self.size_of(place.type_id)?, bit_offset: 0, bit_size: 0 })
    }

    /// The size of a type in bytes. A pointer is as wide as this program's, since the BTF is of this machine.
    fn size_of(&self, type_id: u32) -> Result<u32, BtfError> {
        let mut record = self.resolve(type_id)?;
        let mut elements: u64 = 1;
        for _ in 0..MAX_DEPTH {
            let size = match record.kind {
                kind::ARRAY => {
                    let section = &self.data[self.types.clone()];
                    elements = elements.saturating_mul(u64::from(u32_at(section, record.tail + 8)?));
                    record = self.resolve(u32_at(section, record.tail)?)?;
                    continue;
                }
                kind::INT | kind::STRUCT | kind::UNION | kind::ENUM | kind::ENUM64 | kind::FLOAT => record.value,
                kind::PTR => size_of::<usize>() as u32,
                _ => return Err(malformed("a member has a type without a size")),
            };
            return u32::try_from(elements.saturating_mul(u64::from(size)))
                .map_err(|_| malformed("a member's size is too large"));
        }
        Err(malformed("arrays are nested too deep or in a cycle"))
    }

    /// The type behind typedefs and qualifiers.
    fn resolve(&self, type_id: u32) -> Result<Record, BtfError> {
        let mut record = self.record(type_id)?;
        for _ in 0..MAX_DEPTH {
            match record.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    record = self.record(record.value)?;
                }
                _ => return Ok(record),
            }
        }
        Err(malformed("typedefs are nested too deep or in a cycle"))
    }

    fn record(&self, type_id: u32) -> Result<Record, BtfError> {
        let Some(index) = (type_id as usize).checked_sub(1) else { return Ok(Record::VOID) };
        let at = self.records.get(index).ok_or_else(|| malformed("a type refers to one that does not exist"))?;
        Record::read(&self.data[self.types.clone()], *at as usize)
    }

    /// Whether the string at `offset` is `name`. The strings end with a NUL, so none reaches beyond them.
    fn string_is(&self, offset: u32, name: &str) -> bool {
        let strings = &self.data[self.strings.clone()];
        // The length first: that rules nearly all of them out.
        strings
            .get(offset as usize..)
            .is_some_and(|rest| rest.get(name.len()) == Some(&0) && rest.starts_with(name.as_bytes()))
    }
}

/// A member as its struct lists it.
struct RawMember {
    name: u32,
    type_id: u32,
    bit: u64,
    /// 0 when it is no bitfield, or one of the old style.
    width: u8,
}

/// A member found, in bits from the start of the outermost struct.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    type_id: u32,
    bit: u64,
    width: u8,
}

#[derive(Clone, Copy)]
enum Found {
    None,
    One(Place),
    Several,
}

fn u32_of(index: usize) -> Result<u32, BtfError> {
    u32::try_from(index).map_err(|_| malformed("there are too many types"))
}

#[cfg(test)]
mod tests;
