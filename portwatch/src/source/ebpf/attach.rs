//! Attaching the probes of one tier, one program after the other: what a tier cannot do without fails it, the rest is
//! noted as a gap.

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use aya::Ebpf;
use aya::programs::{
    BtfTracePoint, CgroupAttachMode, CgroupSock, FEntry, FExit, KProbe, Program, ProgramError, SockOps,
};

use super::{Kernel, brief};
use crate::source::{Refusal, Tier};

/// Where a cgroup2 tree is mounted: alone, or beside version 1.
const CGROUP_ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// What came of it.
pub(super) struct Attached {
    /// What the tier has to do without.
    pub(super) gaps: Vec<Refusal>,
    /// Whether UDP sockets raise events.
    pub(super) sees_udp: bool,
}

/// Attaches the programs of an event-driven tier.
pub(super) fn attach(ebpf: &mut Ebpf, kernel: &Kernel, tier: Tier, cgroup: Option<&File>) -> anyhow::Result<Attached> {
    let mut attach = Attach { ebpf, kernel, gaps: Vec::new(), tier, sees_udp: false };
    // What decides about the tier first: where it is refused, nothing else was attached in vain. A listener that begins
    // here and ends before its end can be seen is settled by the first snapshot, which is read when all is attached.
    match tier {
        Tier::Fexit => attach.fexit()?,
        Tier::Kprobe => attach.kprobe()?,
        Tier::Tracepoint => attach.tracepoint(cgroup)?,
        Tier::Poll => {}
    }
    attach.common()?;
    match tier {
        Tier::Fexit => attach.fexit_extras(),
        Tier::Kprobe => attach.kprobe_extras(cgroup),
        Tier::Tracepoint => attach.tracepoint_extras(cgroup),
        Tier::Poll => {}
    }
    Ok(Attached { gaps: attach.gaps, sees_udp: attach.sees_udp })
}

/// The root of the cgroup2 tree, where one is mounted.
pub(super) fn open_cgroup2() -> Option<File> {
    CGROUP_ROOTS.iter().find_map(|root| {
        let file = File::open(root).ok()?;
        let kind = rustix::fs::fstatfs(&file).ok()?.f_type;
        // CGROUP2_SUPER_MAGIC (include/uapi/linux/magic.h).
        (kind == 0x6367_7270).then_some(file)
    })
}

struct Attach<'a> {
    ebpf: &'a mut Ebpf,
    kernel: &'a Kernel,
    gaps: Vec<Refusal>,
    tier: Tier,
    sees_udp: bool,
}

impl Attach<'_> {
    fn fexit(&mut self) -> anyhow::Result<()> {
        // MPTCP listeners pass the first alone; kernels before 6.5 have only the second.
        if self.kernel.has_listen_sk {
            self.exit_of("listen_sk_exit", "__inet_listen_sk")?;
        } else {
            self.exit_of("listen_exit", "inet_listen")?;
        }
        Ok(())
    }

    fn fexit_extras(&mut self) {
        let udp = self.exit_of("bind4_exit", "__inet_bind").and_then(|()| {
            let btf = self.kernel.loader_btf()?;
            let program: &mut FEntry = typed(self.ebpf, "udp_unhash_entry")?;
            program
                .load("udp_lib_unhash", btf)
                .and_then(|()| program.attach())
                .map_err(|e| refused("fentry/udp_lib_unhash", &e))?;
            Ok(())
        });
        // A module on some kernels, and then absent from the kernel's own BTF.
        let udp6 =
            if Path::new("/proc/net/if_inet6").exists() { self.exit_of("bind6_exit", "__inet6_bind") } else { Ok(()) };
        let udp = udp.and(udp6);
        self.sees_udp = udp.is_ok();
        self.gap("UDP is looked at every 500 ms", udp);
        let conflicts = self
            .exit_of("tcp_get_port_exit", "inet_csk_get_port")
            .and_then(|()| self.exit_of("udp_get_port_exit", "udp_lib_get_port"));
        self.gap("failed binds", conflicts);
    }

    fn exit_of(&mut self, program: &str, function: &str) -> anyhow::Result<()> {
        let btf = self.kernel.loader_btf()?;
        let program: &mut FExit = typed(self.ebpf, program)?;
        program
            .load(function, btf)
            .and_then(|()| program.attach())
            .map_err(|error| refused(&format!("fexit/{function}"), &error))?;
        Ok(())
    }

    fn kprobe(&mut self) -> anyhow::Result<()> {
        // Newer kernels have one function for both families.
        let functions: &[&str] = if self.kernel.has_inet6_hash { &["inet_hash", "inet6_hash"] } else { &["inet_hash"] };
        self.probe_all("hash_enter", functions)
    }

    fn kprobe_extras(&mut self, cgroup: Option<&File>) {
        match cgroup {
            Some(cgroup) => {
                let udp = self.udp_by_cgroup(cgroup);
                self.sees_udp = udp.is_ok();
                self.gap("UDP is looked at every 500 ms", udp);
            }
            None => self.limit("UDP is looked at every 500 ms: no cgroup2 tree is mounted"),
        }
        let conflicts = self
            .probe_pair("tcp_get_port_enter", "tcp_get_port_leave", "inet_csk_get_port")
            .and_then(|()| self.probe_pair("udp_get_port_enter", "udp_get_port_leave", "udp_lib_get_port"));
        self.gap("failed binds", conflicts);
    }

    /// Attaches a kprobe and its kretprobe.
    fn probe_pair(&mut self, enter: &str, leave: &str, function: &str) -> anyhow::Result<()> {
        self.probe_all(leave, &[function])?;
        self.probe_all(enter, &[function])
    }

    fn probe_all(&mut self, program: &str, functions: &[&str]) -> anyhow::Result<()> {
        let program: &mut KProbe = typed(self.ebpf, program)?;
        program.load().map_err(|error| refused(&format!("kprobe/{}", functions.join(",")), &error))?;
        for function in functions {
            program.attach(function, 0).map_err(|error| refused(&format!("kprobe/{function}"), &error))?;
        }
        Ok(())
    }

    fn tracepoint(&mut self, cgroup: Option<&File>) -> anyhow::Result<()> {
        let Some(cgroup) = cgroup else {
            self.limit(
                "no cgroup2 tree is mounted: ports of new listeners are read back, UDP is looked at every 500 ms",
            );
            return Ok(());
        };
        let program: &mut SockOps = typed(self.ebpf, "listen_succeeded")?;
        program
            .load()
            .and_then(|()| program.attach(cgroup, CgroupAttachMode::Single))
            .map_err(|error| refused("sock_ops on the cgroup2 root", &error))?;
        Ok(())
    }

    fn tracepoint_extras(&mut self, cgroup: Option<&File>) {
        if let Some(cgroup) = cgroup {
            let udp = self.udp_by_cgroup(cgroup);
            self.sees_udp = udp.is_ok();
            self.gap("UDP is looked at every 500 ms", udp);
        }
        self.limit("failed binds are not seen without fexit or kprobes");
    }

    fn udp_by_cgroup(&mut self, cgroup: &File) -> anyhow::Result<()> {
        // The release first, so that no bind goes without it.
        for name in ["udp_release", "udp_post_bind4", "udp_post_bind6"] {
            let program: &mut CgroupSock = typed(self.ebpf, name)?;
            program
                .load()
                .and_then(|()| program.attach(cgroup, CgroupAttachMode::Single))
                .map_err(|error| refused("post_bind and sock_release on the cgroup2 root", &error))?;
        }
        Ok(())
    }

    /// What all tiers share: the end of listening, and processes.
    fn common(&mut self) -> anyhow::Result<()> {
        for (program, tracepoint) in [
            ("state_changed", "inet_sock_set_state"),
            ("forked", "sched_process_fork"),
            ("execed", "sched_process_exec"),
            ("exited", "sched_process_exit"),
        ] {
            let btf = self.kernel.loader_btf()?;
            let program: &mut BtfTracePoint = typed(self.ebpf, program)?;
            program
                .load(tracepoint, btf)
                .and_then(|()| program.attach())
                .map_err(|error| refused(&format!("tp_btf/{tracepoint}"), &error))?;
        }
        Ok(())
    }

    fn limit(&mut self, reason: &str) {
        self.gaps.push(Refusal { tier: self.tier, reason: reason.to_owned() });
    }

    /// Notes a part that the tier can do without.
    fn gap(&mut self, part: &str, result: anyhow::Result<()>) {
        if let Err(error) = result {
            self.gaps.push(Refusal { tier: self.tier, reason: format!("{part}: {error:#}") });
        }
    }
}

fn typed<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut T>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).with_context(|| format!("the probes' object lacks {name}"))?;
    Ok(program.try_into()?)
}

fn refused(what: &str, error: &ProgramError) -> anyhow::Error {
    log::debug!("{what}: {error}");
    let reason = brief(error);
    let why = if what.starts_with("kprobe/") && !Path::new("/sys/bus/event_source/devices/kprobe").exists() {
        " (this kernel is built without kprobes)"
    } else if what.starts_with('f') && reason.starts_with("EPERM") {
        " (the kernel refuses trampolines)"
    } else {
        ""
    };
    anyhow!("cannot load {what}: {reason}{why}")
}
