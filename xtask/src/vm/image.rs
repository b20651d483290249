//! The test machine's root file system: static binaries and an init, packed as an initramfs.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};

use super::kernel::Kernel;
use crate::{cargo, must, output_of, target};

/// What init prints when it begins, and when the tests have ended (followed by their exit code).
pub(super) const BOOT_MARK: &str = "VM-INIT";
pub(super) const EXIT_MARK: &str = "VM-EXIT: ";

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
/bin/busybox --install -s /bin
export PATH=/bin HOME=/tmp
echo VM-INIT
mount -t proc proc /proc
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tracefs tracefs /sys/kernel/tracing
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
for module in @MODULES@; do insmod /modules/$module || echo "init: cannot load $module"; done
ip link set lo up
ulimit -n 65536
cd /tmp
env PORTWATCH_BIN=/bin/portwatch PORTWATCH_TEST_EMULATED=1 PORTWATCH_TEST_REQUIRE=kernel,root,fexit,kprobe,tracepoint PORTWATCH_TEST_ENDS=20 PORTWATCH_TEST_SWEEPS=100 RUST_BACKTRACE=1 @VARIABLES@ /bin/scenarios --color=never --test-threads=1 @ARGS@
code=$?
echo "VM-EXIT: $code"
poweroff -f
"#;

/// The static binaries that go into every machine.
pub(super) struct Binaries {
    scenarios: PathBuf,
    portwatch: PathBuf,
    busybox: PathBuf,
}

impl Binaries {
    pub(super) fn build() -> Result<Binaries> {
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .map(PathBuf::from)
            .into_iter()
            .find(|path| path.exists())
            .ok_or_else(|| anyhow!("busybox is missing: install Debian's package busybox-static"))?;
        // Its own target directory and flags: the main cache stays as it is. Emulation is slow, so optimise a little.
        let messages = output_of(
            cargo()
                .args(["test", "--quiet", "--no-run", "--package", "portwatch", "--test", "scenarios"])
                .args(["--target", TRIPLE, "--message-format", "json-render-diagnostics", "--target-dir"])
                .arg(target().join("vm/build"))
                .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
                .env("CARGO_PROFILE_DEV_DEBUG", "0")
                .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1"),
        )
        .context("cannot build the static test binary")?;
        let executable = |kind: &str, name: &str| {
            messages
                .lines()
                .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
                .filter(|message| message["target"]["name"] == name && message["target"]["kind"][0] == kind)
                .find_map(|message| message["executable"].as_str().map(PathBuf::from))
                .ok_or_else(|| anyhow!("cargo built no {kind} called {name}"))
        };
        Ok(Binaries {
            scenarios: executable("test", "scenarios")?,
            portwatch: executable("bin", "portwatch")?,
            busybox,
        })
    }
}

/// Makes the initramfs for one kernel and returns its path.
pub(super) fn pack(
    kernel: &Kernel,
    binaries: &Binaries,
    variables: &[(&str, String)],
    test_args: &[String],
) -> Result<PathBuf> {
    let folder = target().join("vm").join(kernel.series);
    let root = folder.join("initramfs");
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    for made in ["bin", "dev", "etc", "modules", "proc", "run", "sys", "tmp", "root"] {
        fs::create_dir_all(root.join(made)).with_context(|| format!("cannot make {made} in {}", root.display()))?;
    }
    copy(&binaries.busybox, &root.join("bin/busybox"))?;
    copy(&binaries.scenarios, &root.join("bin/scenarios"))?;
    copy(&binaries.portwatch, &root.join("bin/portwatch"))?;
    let mut modules = Vec::new();
    for module in &kernel.modules {
        let name = module.file_name().unwrap_or_default();
        copy(module, &root.join("modules").join(name))?;
        modules.push(name.to_string_lossy().into_owned());
    }
    write(&root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")?;
    write(&root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    write(&root.join("etc/hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;
    let variables: Vec<String> = variables.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let init = INIT.replace("@MODULES@", &modules.join(" ")).replace("@VARIABLES@", &quoted(&variables));
    let init = init.replace("@ARGS@", &quoted(test_args));
    write(&root.join("init"), &init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).context("cannot make init executable")?;

    let archive = folder.join("initramfs.cpio");
    let out = File::create(&archive).with_context(|| format!("cannot write {}", archive.display()))?;
    let names =
        Command::new("find").arg(".").current_dir(&root).stdout(Stdio::piped()).spawn().context("cannot run find")?;
    let mut names = names;
    let list = names.stdout.take().context("find has no stdout")?;
    must(
        Command::new("cpio")
            .args(["--create", "--quiet", "--format=newc", "--owner=0:0"])
            .current_dir(&root)
            .stdin(list)
            .stdout(out),
    )?;
    if !names.wait().context("cannot wait for find")?.success() {
        bail!("find failed in {}", root.display());
    }
    Ok(archive)
}

/// Arguments as one shell line.
fn quoted(args: &[String]) -> String {
    args.iter().fold(String::new(), |mut line, arg| {
        // Writing to a String cannot fail.
        let _infallible = write!(line, "'{}' ", arg.replace('\'', r"'\''"));
        line
    })
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_arguments_reach_the_shell_unharmed() {
        assert_eq!(quoted(&["list".into(), "it's $HOME".into()]), r"'list' 'it'\''s $HOME' ");
    }
}
