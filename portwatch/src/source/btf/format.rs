//! The layout of BTF: the header, what every type record starts with, and how long the rest of it is.

use std::ops::Range;

use super::{BtfError, malformed};

pub(super) const MAGIC: u16 = 0xeb9f;
pub(super) const VERSION: u8 = 1;
/// The header as of version 1. Newer kernels may append to it and say so in its length field.
pub(super) const HEADER_LEN: usize = 24;
/// name_off, info and size (or type): what every type record starts with.
pub(super) const RECORD_LEN: usize = 12;
/// name_off, type, offset.
pub(super) const MEMBER_LEN: usize = 12;
/// The bits of `info` with a meaning: vlen, kind and kind_flag. The kernel refuses any other; so do we, because a
/// longer vlen than we know of would put all that follows at the wrong place.
const INFO_MASK: u32 = 0x9f00_ffff;

/// The kinds of types (`BTF_KIND_*`).
pub(super) mod kind {
    pub(crate) const VOID: u8 = 0;
    pub(crate) const INT: u8 = 1;
    pub(crate) const PTR: u8 = 2;
    pub(crate) const ARRAY: u8 = 3;
    pub(crate) const STRUCT: u8 = 4;
    pub(crate) const UNION: u8 = 5;
    pub(crate) const ENUM: u8 = 6;
    pub(crate) const FWD: u8 = 7;
    pub(crate) const TYPEDEF: u8 = 8;
    pub(crate) const VOLATILE: u8 = 9;
    pub(crate) const CONST: u8 = 10;
    pub(crate) const RESTRICT: u8 = 11;
    pub(crate) const FUNC: u8 = 12;
    pub(crate) const FUNC_PROTO: u8 = 13;
    pub(crate) const VAR: u8 = 14;
    pub(crate) const DATASEC: u8 = 15;
    pub(crate) const FLOAT: u8 = 16;
    pub(crate) const DECL_TAG: u8 = 17;
    pub(crate) const TYPE_TAG: u8 = 18;
    pub(crate) const ENUM64: u8 = 19;
}

/// What every type starts with.
#[derive(Clone, Copy)]
pub(super) struct Record {
    /// Offset into the strings.
    pub(super) name: u32,
    pub(super) kind: u8,
    /// In a struct or union: the offsets of its members hold the widths of bitfields too.
    pub(super) flag: bool,
    /// How many members, arguments or the like follow.
    pub(super) vlen: usize,
    /// The size in bytes, or the id of the type that this one refers to, depending on the kind.
    pub(super) value: u32,
    /// Where in the type section that which follows starts.
    pub(super) tail: usize,
}

impl Record {
    pub(super) const VOID: Record = Record { name: 0, kind: kind::VOID, flag: false, vlen: 0, value: 0, tail: 0 };

    pub(super) fn read(section: &[u8], at: usize) -> Result<Record, BtfError> {
        let bytes: Option<&[u8; RECORD_LEN]> = section.get(at..).and_then(|rest| rest.first_chunk());
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *bytes.ok_or_else(|| malformed("a section ends too early"))?;
        let info = u32::from_ne_bytes([e, f, g, h]);
        if info & !INFO_MASK != 0 {
            return Err(malformed("a type uses bits that have no meaning"));
        }
        Ok(Record {
            name: u32::from_ne_bytes([a, b, c, d]),
            kind: (info >> 24 & 0x1f) as u8,
            flag: info >> 31 != 0,
            vlen: (info & 0xffff) as usize,
            value: u32::from_ne_bytes([i, j, k, l]),
            tail: at + RECORD_LEN,
        })
    }

    pub(super) fn has_members(&self) -> bool {
        matches!(self.kind, kind::STRUCT | kind::UNION)
    }

    /// The bytes between this record and the next.
    pub(super) fn tail_len(&self, type_id: usize) -> Result<usize, BtfError> {
        Ok(match self.kind {
            kind::PTR | kind::FWD | kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT => 0,
            kind::FUNC | kind::FLOAT | kind::TYPE_TAG => 0,
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::ENUM | kind::FUNC_PROTO => self.vlen * 8,
            kind::STRUCT | kind::UNION => self.vlen * MEMBER_LEN,
            kind::DATASEC | kind::ENUM64 => self.vlen * 12,
            kind => return Err(BtfError::UnknownKind { kind, type_id }),
        })
    }
}

/// Where the types and the strings are, from the header.
pub(super) fn sections(data: &[u8]) -> Result<(Range<usize>, Range<usize>), BtfError> {
    let magic = data.first_chunk().map(|magic| u16::from_ne_bytes(*magic)).ok_or(BtfError::NotBtf)?;
    if magic == MAGIC.swap_bytes() {
        return Err(BtfError::ForeignByteOrder);
    }
    if magic != MAGIC {
        return Err(BtfError::NotBtf);
    }
    match data.get(2) {
        Some(&VERSION) => {}
        Some(&version) => return Err(BtfError::UnsupportedVersion { version }),
        None => return Err(malformed("the header is cut short")),
    }
    let header_len = u32_at(data, 4)? as usize;
    if header_len < HEADER_LEN || header_len > data.len() {
        return Err(malformed("the header is cut short"));
    }
    let section = |at| -> Result<Range<usize>, BtfError> {
        let start = header_len.checked_add(u32_at(data, at)? as usize);
        let end = start.zip(Some(u32_at(data, at + 4)? as usize)).and_then(|(start, len)| start.checked_add(len));
        start
            .zip(end)
            .filter(|&(_, end)| end <= data.len())
            .map(|(start, end)| start..end)
            .ok_or(malformed("a section reaches beyond the end"))
    };
    let (types, strings) = (section(8)?, section(16)?);
    let bytes = &data[strings.clone()];
    if bytes.first() != Some(&0) || bytes.last() != Some(&0) {
        return Err(malformed("the strings do not start and end with a NUL"));
    }
    Ok((types, strings))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map(|chunk| u32::from_ne_bytes(*chunk))
        .ok_or_else(|| malformed("a section ends too early"))
}
