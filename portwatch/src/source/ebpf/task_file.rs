//! Loads an iterator program by the bare system calls.
//!
//! The general loader parses all of the kernel's BTF, twice (2 × 15 ms for 5.5 MB), to find one function's number that
//! our own reader finds in 3 ms. For `list`, which lives for 30 ms, that is the difference. The object file is parsed
//! and relocated by the same library all the same; what is done here is to create its one map and to load its one
//! program.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, bail};
use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_map_type, bpf_prog_type};
use aya_obj::{EbpfSectionKind, Object};
use nix::libc;

/// `BPF_F_RDONLY_PROG` (include/uapi/linux/bpf.h): programs may only read the map. With the map frozen, its values are
/// constants to the verifier.
const BPF_F_RDONLY_PROG: u32 = 1 << 7;

/// A loaded iterator program.
#[derive(Debug)]
pub(super) struct TaskFile {
    program: OwnedFd,
}

impl TaskFile {
    /// Loads the only program of `object`, an iterator, after writing `globals` into its read-only data. `target` is
    /// the BTF type id of the kernel's `bpf_iter_…` function.
    pub(super) fn load(object: &[u8], globals: &[(&str, &[u8])], target: u32) -> anyhow::Result<TaskFile> {
        let mut object = Object::parse(object).context("cannot parse the iterator's object")?;
        let globals: HashMap<&str, (&[u8], bool)> =
            globals.iter().map(|&(name, bytes)| (name, (bytes, true))).collect();
        object.patch_map_data(globals).context("cannot set the iterator's constants")?;

        let mut maps = Vec::new();
        for (name, map) in &object.maps {
            if map.section_kind() != EbpfSectionKind::Rodata {
                bail!("the iterator's object has a map that is not constant: {name}");
            }
            maps.push((name.clone(), constant_map(map.data())?, map.clone()));
        }
        let text: HashSet<usize> = object.functions.keys().map(|&(section, _)| section).collect();
        object
            .relocate_maps(maps.iter().map(|(name, fd, map)| (name.as_str(), fd.as_raw_fd(), map)), &text)
            .context("cannot relocate the iterator")?;
        object.relocate_calls(&text).context("cannot relocate the iterator")?;

        let program = object.programs.values().next().context("the iterator's object has no program")?;
        let function = object.functions.get(&program.function_key()).context("the iterator has no code")?;
        let license = program.license.as_c_str();
        let mut attr = zeroed();
        // SAFETY: the member of the union that BPF_PROG_LOAD reads; all of it is zero.
        let load = unsafe { &mut attr.__bindgen_anon_3 };
        load.prog_type = bpf_prog_type::BPF_PROG_TYPE_TRACING as u32;
        load.expected_attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
        load.insns = function.instructions.as_ptr() as u64;
        load.insn_cnt = u32::try_from(function.instructions.len())?;
        load.license = license.as_ptr() as u64;
        load.attach_btf_id = target;
        // No log: the error number says what matters, and one that the verifier refuses is our mistake.
        let program = bpf(bpf_cmd::BPF_PROG_LOAD, &attr).context("cannot load iter/task_file")?;
        Ok(TaskFile { program })
    }

    /// A file that walks once from the start as it is read.
    pub(super) fn open(&self) -> io::Result<File> {
        let mut attr = zeroed();
        // SAFETY: the member of the union that BPF_LINK_CREATE reads; all of it is zero.
        let link = unsafe { &mut attr.link_create };
        link.__bindgen_anon_1.prog_fd = self.program.as_raw_fd() as u32;
        link.attach_type = bpf_attach_type::BPF_TRACE_ITER as u32;
        let link = bpf(bpf_cmd::BPF_LINK_CREATE, &attr)?;

        let mut attr = zeroed();
        attr.iter_create.link_fd = link.as_raw_fd() as u32;
        // The iterator holds the link, which may be closed.
        bpf(bpf_cmd::BPF_ITER_CREATE, &attr).map(File::from)
    }
}

/// A frozen map of one value.
fn constant_map(value: &[u8]) -> anyhow::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: the member of the union that BPF_MAP_CREATE reads; all of it is zero.
    let create = unsafe { &mut attr.__bindgen_anon_1 };
    create.map_type = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    create.key_size = 4;
    create.value_size = u32::try_from(value.len())?;
    create.max_entries = 1;
    create.map_flags = BPF_F_RDONLY_PROG;
    let map = bpf(bpf_cmd::BPF_MAP_CREATE, &attr).context("cannot create the iterator's constants")?;

    let key = 0u32;
    let mut attr = zeroed();
    // SAFETY: the member of the union that BPF_MAP_UPDATE_ELEM reads; all of it is zero.
    let update = unsafe { &mut attr.__bindgen_anon_2 };
    update.map_fd = map.as_raw_fd() as u32;
    update.key = (&raw const key) as u64;
    update.__bindgen_anon_1.value = value.as_ptr() as u64;
    bpf_unit(bpf_cmd::BPF_MAP_UPDATE_ELEM, &attr).context("cannot write the iterator's constants")?;
    freeze(map.as_fd()).context("cannot freeze the iterator's constants")?;
    Ok(map)
}

fn freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed();
    attr.__bindgen_anon_2.map_fd = map.as_raw_fd() as u32;
    bpf_unit(bpf_cmd::BPF_MAP_FREEZE, &attr)
}

fn zeroed() -> bpf_attr {
    // SAFETY: a union of plain integers; the kernel demands that what is not used is zero.
    unsafe { std::mem::zeroed() }
}

/// A command that makes a descriptor.
fn bpf(command: bpf_cmd, attr: &bpf_attr) -> io::Result<OwnedFd> {
    let fd = call(command, attr)?;
    // SAFETY: the kernel made it for this call alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf_unit(command: bpf_cmd, attr: &bpf_attr) -> io::Result<()> {
    call(command, attr).map(|_| ())
}

fn call(command: bpf_cmd, attr: &bpf_attr) -> io::Result<i32> {
    // SAFETY: `attr` is a whole, initialised bpf_attr, whose pointers the callers keep alive during the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as libc::c_long, std::ptr::from_ref(attr), size_of::<bpf_attr>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap_or(i32::MAX)) }
}
