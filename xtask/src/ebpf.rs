//! `cargo xtask ebpf`: the kernel objects, built reproducibly and committed under `portwatch/bpf/`.
//!
//! Building them needs a compiler whose library source is at hand: Debian's own pair, or a rustup nightly with
//! rust-src. So they are committed, for everyone else to build with plain stable Rust, and `BUILD.txt` beside them
//! records what they were made of and with. `--check` fails when source and objects have drifted apart: the recorded
//! hashes are compared always, and the bytes are built again where the recorded toolchain is at hand.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use object::build::elf::{Builder, SectionData};
use object::elf::SHT_STRTAB;
use sha2::{Digest, Sha256};

use crate::{output_of, root, target};

/// The bin targets of portwatch-ebpf; each becomes `NAME.bpf.o`.
const PROGRAMS: [&str; 2] = ["events", "walk"];

/// The linker's version, as `cargo install bpf-linker --version …` wants it.
const LINKER_VERSION: &str = "0.10.3";

/// What the objects are compiled with, over and above the workspace's release profile. Part of the source hash.
const FLAGS: [&str; 3] = ["-Clinker=bpf-linker", "-Cdebuginfo=2", "-Clink-arg=--btf"];

const TRIPLE: &str = "bpfel-unknown-none";

const RECORD: &str = "BUILD.txt";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Change nothing: fail if the committed objects are not what the source makes
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let source = source_hash()?;
    if args.check { check(&source) } else { rebuild(&source) }
}

fn rebuild(source: &str) -> Result<()> {
    let toolchain = Toolchain::find()?;
    let folder = committed();
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut record = Record {
        compiler: toolchain.version.clone(),
        linker: toolchain.linker_version.clone(),
        source: source.to_owned(),
        objects: BTreeMap::new(),
    };
    for (name, bytes) in toolchain.build()? {
        write(&folder.join(&name), &bytes)?;
        println!("{name}: {} bytes", bytes.len());
        record.objects.insert(name, hash(&bytes));
    }
    write(&folder.join(RECORD), record.to_string().as_bytes())
}

fn check(source: &str) -> Result<()> {
    let folder = committed();
    let path = folder.join(RECORD);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}: make it with `cargo xtask ebpf`", path.display()))?;
    let record = Record::parse(&text).with_context(|| format!("{} is malformed", path.display()))?;
    if record.source != source {
        bail!("the kernel programs' source changed after the objects were built: run `cargo xtask ebpf` and commit");
    }
    let mut objects = BTreeMap::new();
    for program in PROGRAMS {
        let name = object_name(program);
        let bytes = fs::read(folder.join(&name)).with_context(|| format!("cannot read {name}"))?;
        if record.objects.get(&name) != Some(&hash(&bytes)) {
            bail!("{name} is not the object that {RECORD} records: run `cargo xtask ebpf` and commit");
        }
        objects.insert(name, bytes);
    }
    println!("source and objects match {RECORD}");
    let toolchain = match Toolchain::find() {
        Ok(toolchain) => toolchain,
        Err(error) => {
            println!("not built again: {error:#}");
            return Ok(());
        }
    };
    if toolchain.version != record.compiler || toolchain.linker_version != record.linker {
        println!(
            "not built again: recorded are {} and {}, here are {} and {}",
            record.compiler, record.linker, toolchain.version, toolchain.linker_version
        );
        return Ok(());
    }
    for (name, bytes) in toolchain.build()? {
        if objects.get(&name) != Some(&bytes) {
            bail!(
                "{name} built again from the same source differs from the committed one: the build is not reproducible"
            );
        }
    }
    println!("built again by {}: the same bytes", record.compiler);
    Ok(())
}

/// A compiler, its library's source, and a linker: all that the objects are built with.
struct Toolchain {
    cargo: Command,
    /// One line that names compiler and LLVM.
    version: String,
    linker_version: String,
    linker: PathBuf,
    /// Where the compiler's own libLLVM is, alone: the linker loads the first that it finds there.
    llvm: PathBuf,
    /// Names that the library's source goes by, and none of which may reach the object.
    std_source: Vec<PathBuf>,
}

impl Toolchain {
    /// Debian's pair where it is installed, else rustup's nightly.
    fn find() -> Result<Toolchain> {
        if Path::new("/usr/bin/rustc").exists() && library(Path::new("/usr")).is_some() {
            let mut cargo = Command::new("/usr/bin/cargo");
            cargo.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
            return Toolchain::with(cargo, || Command::new("/usr/bin/rustc"));
        }
        let nightly = |program: &str| {
            let mut command = Command::new(program);
            command.arg("+nightly");
            command
        };
        let sysroot = nightly("rustc").args(["--print", "sysroot"]).stderr(Stdio::null()).output();
        if let Ok(output) = sysroot
            && output.status.success()
            && library(Path::new(String::from_utf8_lossy(&output.stdout).trim())).is_some()
        {
            return Toolchain::with(nightly("cargo"), || nightly("rustc"));
        }
        bail!(
            "no compiler here has its library's source: install Debian's packages rustc-web, cargo-web and rust-web-src, \
             or run `rustup toolchain install nightly --component rust-src`"
        )
    }

    fn with(mut cargo: Command, rustc: impl Fn() -> Command) -> Result<Toolchain> {
        // This xtask runs under a toolchain of its own, whose variables would lead another compiler astray.
        let foreign = ["RUSTUP_TOOLCHAIN", "LD_LIBRARY_PATH", "CARGO", "RUSTFLAGS", "RUSTC_WRAPPER"];
        foreign.iter().for_each(|name| {
            cargo.env_remove(name);
        });
        let ask = |args: &[&str]| {
            let mut rustc = rustc();
            foreign.iter().for_each(|name| {
                rustc.env_remove(name);
            });
            output_of(rustc.args(args))
        };
        let verbose = ask(&["-vV"])?;
        let sysroot = PathBuf::from(ask(&["--print", "sysroot"])?.trim());
        let first = verbose.lines().next().unwrap_or_default().trim();
        let llvm_version = verbose.lines().find_map(|line| line.strip_prefix("LLVM version: ")).unwrap_or("?").trim();
        let llvm = isolate_llvm(&sysroot, llvm_version)?;
        let linker = find_linker()?;
        let linker_line = output_of(Command::new(&linker).arg("--version").env("LD_LIBRARY_PATH", &llvm))
            .context("bpf-linker does not run: it loads the compiler's libLLVM")?;
        let given = library(&sysroot).ok_or_else(|| anyhow!("{} has no library source", sysroot.display()))?;
        let real = fs::canonicalize(&given).with_context(|| format!("cannot resolve {}", given.display()))?;
        Ok(Toolchain {
            cargo,
            version: format!("{first}, LLVM {llvm_version}"),
            linker_version: linker_line.trim().to_owned(),
            linker,
            llvm,
            std_source: vec![given, real],
        })
    }

    /// Builds every object, stripped, as (file name, bytes).
    fn build(mut self) -> Result<Vec<(String, Vec<u8>)>> {
        let build_dir = target().join("bpf");
        let rustflags = self.rustflags()?.join("\u{1f}");
        let mut path = vec![self.linker.parent().map(Path::to_path_buf).unwrap_or_default()];
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        self.cargo
            .current_dir(root())
            .args([
                "build",
                "--quiet",
                "--locked",
                "--release",
                "--package",
                "portwatch-ebpf",
                "--features",
                "programs",
            ])
            .args(["--target", TRIPLE, "-Zbuild-std=core", "--target-dir"])
            .arg(&build_dir)
            .env("PATH", std::env::join_paths(path)?)
            .env("LD_LIBRARY_PATH", &self.llvm)
            // What the committed objects were built with, whatever the release profile says.
            .env("CARGO_PROFILE_RELEASE_DEBUG", "line-tables-only")
            .env("CARGO_ENCODED_RUSTFLAGS", rustflags);
        for program in PROGRAMS {
            self.cargo.args(["--bin", program]);
        }
        crate::must(&mut self.cargo).context("cannot build the kernel objects")?;
        PROGRAMS
            .iter()
            .map(|program| {
                let path = build_dir.join(TRIPLE).join("release").join(program);
                let linked = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
                let stripped = strip(&linked).with_context(|| format!("cannot strip {}", path.display()))?;
                self.refuse_paths(program, &stripped)?;
                Ok((object_name(program), stripped))
            })
            .collect()
    }

    fn rustflags(&self) -> Result<Vec<String>> {
        let mut flags: Vec<String> = FLAGS.iter().map(|&flag| flag.to_owned()).collect();
        for (from, to) in self.private_paths()? {
            flags.push(format!("--remap-path-prefix={}={to}", from.display()));
        }
        Ok(flags)
    }

    /// Where this machine keeps the sources, and what the object says instead. The last match counts to rustc, so the
    /// narrower come later.
    fn private_paths(&self) -> Result<Vec<(PathBuf, String)>> {
        let home = std::env::var_os("HOME").map(PathBuf::from).ok_or_else(|| anyhow!("HOME is not set"))?;
        let cargo_home = std::env::var_os("CARGO_HOME")
            .filter(|path| !path.is_empty())
            .map_or_else(|| home.join(".cargo"), PathBuf::from);
        let mut paths = vec![(root(), "/portwatch".to_owned()), (cargo_home.clone(), "/cargo".to_owned())];
        if let Ok(registries) = fs::read_dir(cargo_home.join("registry/src")) {
            paths.extend(registries.flatten().map(|entry| (entry.path(), "/registry".to_owned())));
        }
        paths.extend(self.std_source.iter().map(|path| (path.clone(), "/rust".to_owned())));
        Ok(paths)
    }

    fn refuse_paths(&self, program: &str, object: &[u8]) -> Result<()> {
        for (path, _) in self.private_paths()? {
            let text = path.to_string_lossy();
            if object.windows(text.len()).any(|window| window == text.as_bytes()) {
                bail!("{program} has the build path {text} inside: it would differ from machine to machine");
            }
        }
        Ok(())
    }
}

/// The library's source, as build-std looks for it.
fn library(sysroot: &Path) -> Option<PathBuf> {
    let source = sysroot.join("lib/rustlib/src/rust");
    source.join("library/core/Cargo.toml").exists().then_some(source)
}

/// A folder with nothing but the libLLVM of the compiler whose sysroot this is: bitcode is read best by the very LLVM
/// that wrote it, and the linker takes whichever library it finds first.
fn isolate_llvm(sysroot: &Path, version: &str) -> Result<PathBuf> {
    let major = version.split('.').next().unwrap_or_default();
    let wanted = [format!("libLLVM-{major}"), format!("libLLVM.so.{major}")];
    let folders = [
        sysroot.join("lib"),
        sysroot.join(format!("lib/llvm-{major}/lib")),
        sysroot.join(format!("lib/{}-linux-gnu", std::env::consts::ARCH)),
    ];
    let library = folders
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flat_map(Iterator::flatten)
        .map(|entry| entry.path())
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            wanted.iter().any(|start| name.starts_with(start.as_str()))
                && path.metadata().is_ok_and(|meta| meta.len() > 4096)
        })
        .ok_or_else(|| anyhow!("no libLLVM {major} below {}: bpf-linker needs the compiler's", sysroot.display()))?;
    let folder = target().join("tools/llvm");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let link = folder.join("libLLVM.so");
    if fs::read_link(&link).ok().as_deref() != Some(library.as_path()) {
        let _absent = fs::remove_file(&link);
        symlink(&library, &link).with_context(|| format!("cannot link {}", link.display()))?;
    }
    Ok(folder)
}

/// The project's own bpf-linker, else one on the PATH.
fn find_linker() -> Result<PathBuf> {
    let own = target().join("tools/bin/bpf-linker");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(own)
        .chain(std::env::split_paths(&path).map(|folder| folder.join("bpf-linker")))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| {
            anyhow!(
                "bpf-linker is missing: run `LD_LIBRARY_PATH=$(rustc --print sysroot)/lib cargo install bpf-linker \
                 --version {LINKER_VERSION} --locked --root target/tools`"
            )
        })
}

/// Drops DWARF (.BTF says what the kernel needs), so that the object is small and knows no build paths.
fn strip(linked: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Builder::read(linked)?;
    for section in &mut elf.sections {
        let name = section.name.as_slice();
        if name.starts_with(b".debug") || name.starts_with(b".rel.debug") || name == b".llvm_addrsig" {
            section.delete = true;
        }
    }
    elf.delete_orphans();
    // LLVM keeps the names of sections and of symbols in one table; the writer wants two.
    if !elf.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = elf.sections.add();
        names.name = b".shstrtab"[..].into();
        names.sh_type = SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    if !elf
        .sections
        .iter()
        .any(|section| section.name.as_slice() == b".BTF" && matches!(section.data, SectionData::Data(_)))
    {
        bail!("the linker left no .BTF");
    }
    let mut bytes = Vec::new();
    elf.write(&mut bytes)?;
    Ok(bytes)
}

/// SHA-256 over all that the objects are made of: sources by name and content, locked versions of the packages that
/// run in the kernel, and the compiler's flags.
fn source_hash() -> Result<String> {
    let package = root().join("portwatch-ebpf");
    let mut files = vec![package.join("Cargo.toml")];
    files_below(&package.join("src"), &mut files)?;
    files.sort();
    let mut hasher = Sha256::new();
    let mut feed = |part: &[u8]| {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    };
    for file in &files {
        let name = file.strip_prefix(&package)?.to_string_lossy().into_owned();
        feed(name.as_bytes());
        feed(&fs::read(file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    let lock = fs::read_to_string(root().join("Cargo.lock")).context("cannot read Cargo.lock")?;
    for line in kernel_packages(&lock) {
        feed(line.as_bytes());
    }
    for flag in FLAGS {
        feed(flag.as_bytes());
    }
    Ok(format!("{:x}", hasher.finalize()))
}

/// "name version" of the locked packages that end up in the objects, in the lock file's order.
fn kernel_packages(lock: &str) -> Vec<String> {
    let value = |line: Option<&str>, key: &str| {
        Some(line?.strip_prefix(key)?.trim_start_matches([' ', '=']).trim_matches('"').to_owned())
    };
    lock.split("[[package]]")
        .filter_map(|entry| {
            let mut lines = entry.trim_start().lines();
            let name = value(lines.next(), "name")?;
            let version = value(lines.next(), "version")?;
            let ours = name.starts_with("aya-ebpf") || name.starts_with("aya-log-ebpf") || name == "aya-log-common";
            ours.then(|| format!("{name} {version}"))
        })
        .collect()
}

fn files_below(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files_below(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// What `BUILD.txt` says.
#[derive(Debug, PartialEq)]
struct Record {
    compiler: String,
    linker: String,
    source: String,
    /// File name → SHA-256.
    objects: BTreeMap<String, String>,
}

const NOTE: &str = "# What the kernel objects beside this file were made of and with; written by `cargo xtask ebpf`.";

impl std::fmt::Display for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{NOTE}\ncompiler: {}\nlinker: {}\nsource: {}", self.compiler, self.linker, self.source)?;
        self.objects.iter().try_for_each(|(name, hash)| writeln!(f, "{name}: {hash}"))
    }
}

impl Record {
    fn parse(text: &str) -> Result<Record> {
        let mut fields: BTreeMap<String, String> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split_once(": "))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let mut take = |key: &str| fields.remove(key).ok_or_else(|| anyhow!("no `{key}:` line"));
        Ok(Record { compiler: take("compiler")?, linker: take("linker")?, source: take("source")?, objects: fields })
    }
}

fn committed() -> PathBuf {
    root().join("portwatch/bpf")
}

fn object_name(program: &str) -> String {
    format!("{program}.bpf.o")
}

fn hash(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        // Writing to a String cannot fail.
        let _infallible = write!(text, "{byte:02x}");
    }
    text
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        let record = Record {
            compiler: "rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8".into(),
            linker: "bpf-linker 0.10.3".into(),
            source: hash(b"source"),
            objects: BTreeMap::from([("events.bpf.o".into(), hash(b"events")), ("walk.bpf.o".into(), hash(b"walk"))]),
        };
        assert_eq!(Record::parse(&record.to_string()).unwrap(), record);
        assert_eq!(Record::parse("compiler: rustc\n").unwrap_err().to_string(), "no `linker:` line");
    }

    #[test]
    fn only_packages_that_run_in_the_kernel_count_for_the_source_hash() {
        let lock = "version = 4\n\n[[package]]\nname = \"aya\"\nversion = \"0.14.0\"\n\n[[package]]\nname = \"aya-ebpf\"\n\
                    version = \"0.2.0\"\nsource = \"x\"\n\n[[package]]\nname = \"syn\"\nversion = \"2.0.1\"\n";
        assert_eq!(kernel_packages(lock), ["aya-ebpf 0.2.0"]);
    }
}
