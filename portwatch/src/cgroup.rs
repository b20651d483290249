//! What a cgroup path tells of a process: the systemd unit and the container it runs in. Pure, no look-ups.
//!
//! A unit is a `.service` of the system or of a user's manager. A scope (a login session, a terminal's tab) is no
//! unit to restart, and neither is `user@1000.service` itself. Inside a container only the container counts: the units
//! of a systemd in there are none of this host's.

/// The innermost `.service` that the process runs in, outside any container.
pub fn unit(path: &str) -> Option<&str> {
    let mut unit = None;
    for part in path.split('/') {
        if part.ends_with(".scope") {
            unit = None;
        } else if part.ends_with(".service") {
            unit = Some(part).filter(|unit| !unit.starts_with("user@"));
        }
        if container_id(part).is_some() {
            break;
        }
    }
    unit
}

/// The first 12 digits of the id of the outermost container: the one that this host's engine knows.
pub fn container(path: &str) -> Option<&str> {
    path.split('/').find_map(container_id).map(|id| &id[..12])
}

/// The 64 hexadecimal digits in `ID` (cgroupfs driver), `docker-ID.scope`, `libpod-ID`, `cri-containerd-ID.scope` and
/// the like. `libpod-conmon-ID.scope` is the monitor of a container, which runs outside.
fn container_id(part: &str) -> Option<&str> {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    let (engine, id) = part.rsplit_once('-').unwrap_or(("", part));
    let is_id = id.len() == 64 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (is_id && !engine.ends_with("conmon")).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_containers_are_read_from_paths() {
        for (path, want_unit, want_container) in [
            ("/", None, None),
            ("", None, None),
            ("/init.scope", None, None),
            ("/system.slice/nginx.service", Some("nginx.service"), None),
            ("/system.slice/system-getty.slice/getty@tty1.service", Some("getty@tty1.service"), None),
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
            let path = path.replace("ID", &"0123456789abcdef".repeat(4));
            assert_eq!((unit(&path), container(&path)), (want_unit, want_container), "{path}");
        }
    }
}
