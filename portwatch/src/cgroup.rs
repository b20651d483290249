//! What a cgroup path tells of a process: the systemd unit and the container it runs in. Pure, no look-ups.
//!
//! A unit is a `.service` of the system or of a user's manager. A scope (a login session, a terminal's tab) is no
//! unit to restart, and neither is `user@1000.service` itself. Inside a container only the container counts: the units
//! of a systemd in there are none of this host's.

use serde::Serialize;

/// Whose systemd it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manager {
    System,
    /// Of the user with this uid.
    User(u32),
}

impl Manager {
    /// Of the user whose it is.
    pub fn uid(self) -> Option<u32> {
        match self {
            Manager::System => None,
            Manager::User(uid) => Some(uid),
        }
    }
}

/// A systemd service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit<'a> {
    /// As systemd names it, its own escapes (`foo\x2dbar.service`) included.
    pub name: &'a str,
    pub manager: Manager,
}

/// Who runs a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    Docker,
    Podman,
    Containerd,
    Unknown,
}

/// The outermost container: the one that this host's engine knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Container<'a> {
    /// 64 hexadecimal digits.
    pub id: &'a str,
    pub engine: Engine,
    /// Whether Kubernetes runs it: it is part of a pod, and the kubelet decides whether it comes back.
    pub pod: bool,
    /// The user whose engine runs without root.
    pub rootless: Option<u32>,
}

impl<'a> Unit<'a> {
    /// The innermost `.service` that the process runs in, outside any container.
    pub fn of(path: &'a str) -> Option<Unit<'a>> {
        let mut manager = Manager::System;
        let mut unit = None;
        for part in path.split('/') {
            if container_id(part).is_some() {
                break;
            }
            if part.ends_with(".scope") {
                unit = None;
            } else if let Some(uid) = user_manager(part) {
                manager = Manager::User(uid);
                unit = None;
            } else if part.ends_with(".service") {
                unit = Some(unescape(part));
            }
        }
        unit.map(|name| Unit { name, manager })
    }
}

impl<'a> Container<'a> {
    pub fn of(path: &'a str) -> Option<Container<'a>> {
        let mut before = "";
        let mut rootless = None;
        let mut pod = false;
        for part in path.split('/') {
            if let Some(id) = container_id(part) {
                return Some(Container { id, engine: engine(part, before), pod, rootless });
            }
            rootless = rootless.or(user_manager(part));
            pod |= part.starts_with("kubepods");
            before = part;
        }
        None
    }

    /// The 12 digits that engines show.
    pub fn short_id(&self) -> &'a str {
        &self.id[..12]
    }
}

/// The name of [`Unit::of`].
pub fn unit(path: &str) -> Option<&str> {
    Unit::of(path).map(|unit| unit.name)
}

/// The first 12 digits of the id of [`Container::of`].
pub fn container(path: &str) -> Option<&str> {
    Container::of(path).map(|container| container.short_id())
}

fn user_manager(part: &str) -> Option<u32> {
    part.strip_prefix("user@")?.strip_suffix(".service")?.parse().ok()
}

/// systemd puts `_` before a name that the cgroup file system could take for its own, such as `cpu.service`
/// (cg_escape() in src/basic/cgroup-util.c).
fn unescape(part: &str) -> &str {
    part.strip_prefix('_').unwrap_or(part)
}

/// The 64 hexadecimal digits in `ID` (cgroupfs driver), `docker-ID.scope`, `libpod-ID`, `cri-containerd-ID.scope` and
/// the like. `libpod-conmon-ID.scope` is the monitor of a container, which runs outside.
fn container_id(part: &str) -> Option<&str> {
    let (engine, id) = split(part);
    let is_id = id.len() == 64 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (is_id && !engine.ends_with("conmon")).then_some(id)
}

fn split(part: &str) -> (&str, &str) {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    part.rsplit_once('-').unwrap_or(("", part))
}

/// The systemd driver names the engine before the id (`docker-ID.scope`), the cgroupfs driver has a directory of the
/// engine (`/docker/ID`), or of containerd's namespace, of which nerdctl's is `default`.
fn engine(part: &str, before: &str) -> Engine {
    match (split(part).0, before) {
        ("docker", _) | ("", "docker") => Engine::Docker,
        ("libpod" | "libpod-payload", _) | ("", "libpod_parent") => Engine::Podman,
        ("cri-containerd" | "nerdctl", _) | ("", "default") => Engine::Containerd,
        _ => Engine::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn units_and_containers_are_read_from_paths() {
        for (path, want_unit, want_container) in [
            ("/", None, None),
            ("", None, None),
            ("/init.scope", None, None),
            ("/system.slice/nginx.service", Some("nginx.service"), None),
            ("/system.slice/system-getty.slice/getty@tty1.service", Some("getty@tty1.service"), None),
            (r"/system.slice/system-foo\x2dbar.slice/foo\x2dbar@a.service", Some(r"foo\x2dbar@a.service"), None),
            ("/system.slice/_cpu.service", Some("cpu.service"), None),
            ("/system.slice/__x.service", Some("_x.service"), None),
            ("/system.slice/web.service/workers/1", Some("web.service"), None),
            ("/user.slice/user-1000.slice/session-3.scope", None, None),
            ("/user.slice/user-1000.slice/user@1000.service/init.scope", None, None),
            ("/user.slice/user-1000.slice/user@1000.service/app.slice/web.service", Some("web.service"), None),
            ("/user.slice/user-1000.slice/user@1000.service/app.slice/vte-spawn-1.scope", None, None),
            ("/system.slice/docker.service", Some("docker.service"), None),
            ("/system.slice/docker-ID.scope", None, Some("0123456789ab")),
            ("/docker/ID", None, Some("0123456789ab")),
            ("/docker/ID/system.slice/nginx.service", None, Some("0123456789ab")),
            ("/system.slice/docker-ID.scope/system.slice/nginx.service", None, Some("0123456789ab")),
            ("/machine.slice/libpod-ID.scope/container", None, Some("0123456789ab")),
            ("/machine.slice/libpod-conmon-ID.scope", None, None),
            ("/system.slice/web.service/libpod-payload-ID", Some("web.service"), Some("0123456789ab")),
            ("/user.slice/user@1000.service/user.slice/libpod-ID.scope", None, Some("0123456789ab")),
            ("/kubepods.slice/kubepods-podx.slice/cri-containerd-ID.scope", None, Some("0123456789ab")),
            ("/default/ID", None, Some("0123456789ab")),
            ("/system.slice/docker-0123.scope", None, None),
            ("/é/ééééééééééééééééééééééééééééééééé.service", Some("ééééééééééééééééééééééééééééééééé.service"), None),
        ] {
            let path = path.replace("ID", ID);
            assert_eq!((unit(&path), container(&path)), (want_unit, want_container), "{path}");
        }
    }

    #[test]
    fn units_have_a_manager() {
        for (path, want) in [
            ("/system.slice/nginx.service", Manager::System),
            ("/system.slice/user@x.service", Manager::System),
            ("/user.slice/user-1000.slice/user@1000.service/app.slice/web.service", Manager::User(1000)),
            ("/user.slice/user-0.slice/user@0.service/app.slice/app-web.slice/web@1.service", Manager::User(0)),
        ] {
            assert_eq!(Unit::of(path).map(|unit| unit.manager), Some(want), "{path}");
        }
    }

    #[test]
    fn containers_have_an_engine() {
        use Engine::{Containerd, Docker, Podman, Unknown};
        for (path, engine, pod, rootless) in [
            ("/docker/ID", Docker, false, None),
            ("/system.slice/docker-ID.scope", Docker, false, None),
            ("/user.slice/user-1000.slice/user@1000.service/user.slice/docker-ID.scope", Docker, false, Some(1000)),
            ("/machine.slice/libpod-ID.scope/container", Podman, false, None),
            ("/libpod_parent/libpod-ID", Podman, false, None),
            ("/system.slice/web.service/libpod-payload-ID", Podman, false, None),
            ("/user.slice/user-7.slice/user@7.service/user.slice/libpod-ID.scope", Podman, false, Some(7)),
            ("/system.slice/nerdctl-ID.scope", Containerd, false, None),
            ("/default/ID", Containerd, false, None),
            ("/kubepods.slice/kubepods-podx.slice/cri-containerd-ID.scope", Containerd, true, None),
            ("/kubepods/besteffort/podx/ID", Unknown, true, None),
            ("/kubepods.slice/crio-ID.scope", Unknown, true, None),
            ("/actions_job/ID", Unknown, false, None),
        ] {
            let path = path.replace("ID", ID);
            assert_eq!(Container::of(&path), Some(Container { id: ID, engine, pod, rootless }), "{path}");
        }
    }
}
