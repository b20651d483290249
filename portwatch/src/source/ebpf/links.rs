//! Whether the probes are still attached. Those in the cgroups can be taken off by others (`bpftool link detach`), and
//! nothing tells of it: somebody has to look. All others stay for as long as we hold them.

use std::fs;
use std::path::PathBuf;

/// The links of this process to cgroups.
#[derive(Debug)]
pub(super) struct CgroupLinks(Vec<Link>);

#[derive(Debug)]
struct Link {
    /// Its `/proc/self/fdinfo`.
    info: PathBuf,
    id: String,
}

impl CgroupLinks {
    /// Those that there are now.
    pub(super) fn held() -> CgroupLinks {
        let infos = fs::read_dir("/proc/self/fdinfo").into_iter().flatten().flatten().map(|entry| entry.path());
        let links = infos.filter_map(|info| {
            let text = fs::read_to_string(&info).ok()?;
            let is_cgroup = field(&text, "link_type") == Some("cgroup");
            is_cgroup.then(|| Some(Link { id: field(&text, "link_id")?.to_owned(), info })).flatten()
        });
        CgroupLinks(links.collect())
    }

    /// Whether one of them leads to no cgroup any more. One that was closed meanwhile is not ours to judge.
    pub(super) fn is_broken(&self) -> bool {
        self.0.iter().any(|link| {
            let text = fs::read_to_string(&link.info).unwrap_or_default();
            field(&text, "link_id") == Some(&link.id) && field(&text, "cgroup_id") == Some("0")
        })
    }
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}
