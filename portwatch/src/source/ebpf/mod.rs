//! Kernel programs: loading them, and turning their records into the model's terms.
//!
//! Two objects are embedded: `walk.bpf.o`, an iterator that reads every held socket at once, and `events.bpf.o`, the
//! probes. [`Kernel`] is what both need of the running kernel; making one checks the privileges first, because the
//! errors that a missing capability causes later name anything but the capability.

mod attach;
mod counters;
mod events;
mod links;
mod misses;
mod offsets;
mod processes;
pub(crate) mod record;
mod task_file;
mod walk;

use std::cell::OnceCell;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use anyhow::{Context as _, anyhow, bail};
use aya::{EbpfLoader, Pod};
use nix::unistd::geteuid;
use portwatch_ebpf::{Config, Offsets};

use super::btf::{self, Btf};

pub(super) use events::Probes;
pub(super) use walk::Walk;

/// Makes an ABI type one that aya passes to the kernel: `repr(C)`, without padding, any bits valid.
macro_rules! pod {
    ($wrapper:ident, $inner:ty) => {
        #[repr(transparent)]
        #[derive(Clone, Copy)]
        struct $wrapper($inner);
        // SAFETY: repr(transparent) over an ABI type that is plain integers without padding.
        unsafe impl Pod for $wrapper {}
    };
}
pod!(PodOffsets, Offsets);
pod!(PodConfig, Config);

/// The running kernel, as the programs must know it.
pub(super) struct Kernel {
    offsets: PodOffsets,
    config: PodConfig,
    /// The BTF id of `bpf_iter_task_file`, what the iterator attaches to.
    task_file: Option<u32>,
    /// Whether this kernel's BTF lists `__inet_listen_sk`.
    has_listen_sk: bool,
    /// Whether it lists `inet6_hash`.
    has_inet6_hash: bool,
    /// What the probes' loader resolves names with; parsed when the first probe is.
    btf: OnceCell<aya::Btf>,
}

impl Kernel {
    /// Reads what is needed of the running kernel, or says in a sentence why programs can't be loaded.
    pub(super) fn open() -> anyhow::Result<Kernel> {
        check_privileges()?;
        // Kernels before 5.11 charge maps to this limit, 64 KiB by default; where it may not be raised, newer ones do
        // not mind.
        let unlimited = rustix::process::Rlimit { current: None, maximum: None };
        let _ = rustix::process::setrlimit(rustix::process::Resource::Memlock, unlimited);
        let bytes = btf::kernel_bytes()?;
        let own = Btf::parse(&bytes)?;
        let offsets = offsets::offsets(&own)?;
        let config = offsets::config(&own);
        let has_listen_sk = own.has_function("__inet_listen_sk");
        Ok(Kernel {
            offsets: PodOffsets(offsets),
            config: PodConfig(config),
            task_file: own.function_id("bpf_iter_task_file"),
            has_listen_sk,
            has_inet6_hash: own.has_function("inet6_hash"),
            btf: OnceCell::new(),
        })
    }

    fn loader_btf(&self) -> anyhow::Result<&aya::Btf> {
        if let Some(btf) = self.btf.get() {
            return Ok(btf);
        }
        let btf = aya::Btf::from_sys_fs().context("cannot parse /sys/kernel/btf/vmlinux")?;
        Ok(self.btf.get_or_init(|| btf))
    }

    fn loader<'a>(&'a self, config: &'a PodConfig) -> anyhow::Result<EbpfLoader<'a>> {
        let mut loader = EbpfLoader::new();
        loader.btf(Some(self.loader_btf()?)).override_global("OFFSETS", &self.offsets, true);
        loader.override_global("CONFIG", config, true);
        Ok(loader)
    }
}

/// The bytes that the kernel gets of an ABI type.
fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: Pod types have no padding, and the slice lives no longer than the value.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Names the first thing that stands in the way of loading programs: an [`io::Error`] of kind `PermissionDenied` where
/// more privileges would help.
fn check_privileges() -> anyhow::Result<()> {
    // capability.h: CAP_SYS_ADMIN 21, CAP_PERFMON 38, CAP_BPF 39.
    const SYS_ADMIN: u64 = 1 << 21;
    const PERFMON: u64 = 1 << 38;
    const BPF: u64 = 1 << 39;
    let effective = effective_capabilities()?;
    if effective & SYS_ADMIN == 0 {
        for (bit, name) in [(BPF, "CAP_BPF"), (PERFMON, "CAP_PERFMON")] {
            if effective & bit == 0 {
                let sentence = if geteuid().is_root() {
                    format!("kernel programs need {name}, which this root lacks (a container?)")
                } else {
                    format!("not root: kernel programs need CAP_BPF and CAP_PERFMON (missing: {name})")
                };
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, sentence).into());
            }
        }
    }
    // PROC_PID_INIT_INO (include/linux/proc_ns.h). Records carry PIDs of the initial namespace.
    if let Ok(pidns) = fs::metadata("/proc/self/ns/pid")
        && pidns.ino() != 0xEFFF_FFFC
    {
        bail!("inside a pid namespace of its own (a container?), where the PIDs that the kernel reports mean nothing");
    }
    // "none integrity [confidentiality]": the active mode is in brackets.
    if let Ok(modes) = fs::read_to_string("/sys/kernel/security/lockdown")
        && modes.contains("[confidentiality]")
    {
        bail!("kernel lockdown is in confidentiality mode, which forbids programs to read kernel memory");
    }
    Ok(())
}

/// The effective capability set of this thread.
pub(super) fn effective_capabilities() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/thread-self/status").context("cannot read /proc/thread-self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .ok_or_else(|| anyhow!("no CapEff line in /proc/thread-self/status"))
}

/// A loader error in one line: what the kernel said, without the verifier's log.
fn brief(error: &(dyn std::error::Error + 'static)) -> String {
    let mut chain: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = chain {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return match io.raw_os_error() {
                Some(code) => format!("{}", nix::errno::Errno::from_raw(code)),
                None => io.to_string(),
            };
        }
        if let Some(aya::programs::ProgramError::LoadError { io_error, .. }) = error.downcast_ref() {
            return match io_error.raw_os_error() {
                Some(code) => format!("{}", nix::errno::Errno::from_raw(code)),
                None => io_error.to_string(),
            };
        }
        chain = error.source();
    }
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
