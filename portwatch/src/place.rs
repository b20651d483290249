//! Where what a user wants to be remembered is kept: servers in the background, marks by name.
//!
//! ```text
//!  $XDG_RUNTIME_DIR, /run/user/UID, for root /run, else ~/.local/state
//!    └ portwatch/servers, portwatch/ports   crate::run::register
//!      portwatch/marks                      crate::mark::store
//! ```
//! One place for all of it, so that what the one verb finds the other finds, too.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use anyhow::Context as _;

use crate::render::escape;

/// The directory in which `portwatch` is to be made, for this user. `None`: there is none.
///
/// # Errors
/// When `~/.local/state` cannot be made.
pub fn of_user(variable: &dyn Fn(&str) -> Option<OsString>, uid: u32) -> anyhow::Result<Option<PathBuf>> {
    let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    // Somebody else's is not used: sudo may leave it in the environment.
    let is_own = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir() && found.uid() == uid);
    let runtime = absolute("XDG_RUNTIME_DIR").filter(is_own);
    let runtime = runtime.or_else(|| Some(PathBuf::from(format!("/run/user/{uid}"))).filter(is_own));
    if let Some(runtime) = runtime.or_else(|| (uid == 0).then(|| PathBuf::from("/run"))) {
        return Ok(Some(runtime));
    }
    let Some(home) = absolute("HOME").filter(is_own) else { return Ok(None) };
    let state = absolute("XDG_STATE_HOME").unwrap_or_else(|| home.join(".local/state"));
    fs::create_dir_all(&state).with_context(|| format!("cannot make {}", escape(&state.to_string_lossy())))?;
    Ok(Some(state))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn it_is_the_users_own() {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path();
        let uid = nix::unistd::Uid::effective().as_raw();
        let check = |variables: &[(&str, &Path)], uid: u32, want: Option<&Path>| {
            let value = |name: &str| variables.iter().find(|(known, _)| *known == name);
            let variable = |name: &str| value(name).map(|(_, path)| path.as_os_str().to_owned());
            assert_eq!(of_user(&variable, uid).unwrap().as_deref(), want, "{variables:?} {uid}");
        };
        check(&[("XDG_RUNTIME_DIR", own), ("HOME", Path::new("/"))], uid, Some(own));
        let of_root = Some("/run/user/0").filter(|path| Path::new(path).is_dir()).unwrap_or("/run");
        // An init script and a session without a login have none of the variables.
        check(&[], 0, Some(Path::new(of_root)));
        check(&[("XDG_RUNTIME_DIR", Path::new("run"))], 0, Some(Path::new(of_root)));
        // Nobody's uid, so nothing is that user's.
        let stranger = 4_000_000;
        check(&[("XDG_RUNTIME_DIR", own), ("HOME", own)], stranger, None);
        check(&[], stranger, None);
        if uid != 0 {
            return;
        }
        std::os::unix::fs::chown(own, Some(stranger), None).unwrap();
        check(&[("HOME", own)], stranger, Some(&own.join(".local/state")));
        check(&[("HOME", own), ("XDG_STATE_HOME", &own.join("x"))], stranger, Some(&own.join("x")));
        assert!(own.join("x").is_dir() && own.join(".local/state").is_dir());
    }
}
