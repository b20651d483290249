//! Debian's kernels: where their packages come from, and the few files of them that a test machine needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use crate::{must, output_of, target};

/// A kernel to test on, as a package of a Debian release.
pub(super) struct Release {
    pub(super) series: &'static str,
    /// Which of Debian's two archives has it: `Debian` or `Debian-Security`.
    label: &'static str,
    suite: &'static str,
    /// Depends on the newest kernel package of its series.
    meta: &'static str,
}

pub(super) const RELEASES: [Release; 3] = [
    Release { series: "5.10", label: "Debian", suite: "bullseye", meta: "linux-image-cloud-amd64" },
    Release { series: "6.1", label: "Debian", suite: "bookworm", meta: "linux-image-cloud-amd64" },
    Release {
        series: "6.12",
        label: "Debian-Security",
        suite: "bookworm-security",
        meta: "linux-image-6.12-cloud-amd64",
    },
];

/// What sock_diag needs, each after those it depends on. A kernel without MPTCP has no mptcp_diag.
const MODULES: [&str; 6] = ["inet_diag", "tcp_diag", "udp_diag", "raw_diag", "mptcp_diag", "unix_diag"];

/// A kernel unpacked under `target/vm/SERIES/`.
pub(super) struct Kernel {
    pub(super) series: &'static str,
    /// As in `uname -r`.
    pub(super) version: String,
    pub(super) image: PathBuf,
    /// To be loaded in this order.
    pub(super) modules: Vec<PathBuf>,
}

impl Kernel {
    /// The kernel of an earlier run, else a fresh download.
    pub(super) fn obtain(release: &Release) -> Result<Kernel> {
        let folder = target().join("vm").join(release.series);
        let ready = folder.join("root");
        if !ready.exists() {
            println!("{}: fetching {} of {}", release.series, release.meta, release.suite);
            fetch(release, &folder).with_context(|| format!("cannot fetch kernel {}", release.series))?;
        }
        Kernel::unpacked(release.series, &ready)
            .with_context(|| format!("kernel {} is not whole: remove {}", release.series, folder.display()))
    }

    fn unpacked(series: &'static str, root: &Path) -> Result<Kernel> {
        let boot = fs::read_dir(root.join("boot")).context("cannot read the package's boot/")?;
        let (version, image) = boot
            .flatten()
            .find_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                Some((name.strip_prefix("vmlinuz-")?.to_owned(), entry.path()))
            })
            .ok_or_else(|| anyhow!("no vmlinuz"))?;
        let base = [format!("lib/modules/{version}/kernel/net"), format!("usr/lib/modules/{version}/kernel/net")];
        let net = base.iter().map(|path| root.join(path)).find(|path| path.exists()).context("no modules")?;
        let mut modules = Vec::new();
        for module in MODULES {
            let homes = ["ipv4", "mptcp", "unix"].map(|home| net.join(home).join(format!("{module}.ko")));
            for plain in homes {
                let packed = plain.with_extension("ko.xz");
                if packed.exists() {
                    must(Command::new("xz").args(["--decompress", "--force"]).arg(&packed))?;
                }
                if plain.exists() {
                    modules.push(plain);
                }
            }
        }
        Ok(Kernel { series, version, image, modules })
    }
}

/// Downloads and unpacks a kernel package into `folder/root`, with an apt of its own in `folder`: the suite need not
/// be among the machine's sources, and nothing of the machine changes.
fn fetch(release: &Release, folder: &Path) -> Result<()> {
    let mirror = mirror(release.label)?;
    for made in ["etc", "state/lists/partial", "cache/archives/partial", "debs"] {
        fs::create_dir_all(folder.join(made)).with_context(|| format!("cannot make {made} in {}", folder.display()))?;
    }
    let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let source = format!("deb [signed-by={keys}] {mirror} {} main\n", release.suite);
    fs::write(folder.join("etc/sources.list"), source).context("cannot write sources.list")?;
    fs::write(folder.join("state/status"), "").context("cannot write an empty dpkg status")?;
    let apt = |program: &str| {
        let mut command = Command::new(program);
        command.current_dir(folder.join("debs"));
        for (key, path) in [
            ("Dir::Etc::sourcelist", "etc/sources.list"),
            ("Dir::Etc::sourceparts", "etc/none"),
            ("Dir::State", "state"),
            ("Dir::State::status", "state/status"),
            ("Dir::Cache", "cache"),
        ] {
            command.arg("-o").arg(format!("{key}={}", folder.join(path).display()));
        }
        // The folder need not be readable to apt's own user, and may be older than the release's last update.
        command.args(["-qq", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Check-Valid-Until=false"]);
        command.args(["-o", "Acquire::Languages=none"]);
        command
    };
    must(apt("apt-get").arg("update"))?;
    let depends = output_of(apt("apt-cache").args(["depends", "--important", release.meta]))?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-") && name.contains(&format!("-{}.", release.series)))
        .ok_or_else(|| anyhow!("{} of {} depends on no {} kernel", release.meta, release.suite, release.series))?;
    must(apt("apt-get").args(["download", package]))?;
    let deb = fs::read_dir(folder.join("debs"))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded nothing")?;
    // Renamed when it is whole, so that an interrupted run leaves no half of a kernel.
    let half = folder.join("root.part");
    must(Command::new("dpkg-deb").arg("--extract").arg(&deb).arg(&half))?;
    fs::rename(&half, folder.join("root")).context("cannot rename the unpacked package")?;
    Ok(())
}

/// The mirror of one of Debian's archives that this machine's apt uses.
fn mirror(label: &str) -> Result<String> {
    let targets = output_of(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(ORIGIN)|$(LABEL)|$(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    let wanted = format!("Debian|{label}|");
    match targets.lines().find_map(|line| line.strip_prefix(wanted.as_str())) {
        Some(uri) => Ok(uri.to_owned()),
        None => bail!("apt on this machine knows no mirror of {label}: run `apt-get update` on a Debian system"),
    }
}
