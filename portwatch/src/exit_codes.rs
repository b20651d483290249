//! The exit codes of the contract, and which of them an error means. Success is 0; for `kill` that is: every target
//! port is free.

use std::fmt;
use std::io;
use std::process::ExitCode;

use portwatch::engine::EngineError;
use portwatch::source::netns;
use portwatch::supervisor::systemd;

/// The answer is no: nothing is there (`who`), something is still taken (`kill`), not healthy (`status`).
pub(crate) const NO: u8 = 1;
/// The command line means nothing; clap exits with the same code.
pub(crate) const USAGE: u8 = 2;
/// Not permitted.
pub(crate) const DENIED: u8 = 3;
/// portwatch itself failed.
pub(crate) const FAILED: u8 = 4;

/// A mistake in the command line that clap cannot find.
#[derive(Debug)]
pub(crate) struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Whether the error is that nobody reads the output any more.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    of(error).is_none()
}

/// The code for an error; `None` where whoever read the output went away, which is no error.
pub(crate) fn of(error: &anyhow::Error) -> Option<ExitCode> {
    if error.is::<Usage>() || error.is::<netns::Unknown>() {
        return Some(ExitCode::from(USAGE));
    }
    for cause in error.chain() {
        let engine = cause.downcast_ref::<EngineError>().is_some_and(|error| error.denied);
        let manager = matches!(cause.downcast_ref(), Some(systemd::Error::Denied { .. }));
        if engine || manager {
            return Some(ExitCode::from(DENIED));
        }
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        let errno = cause.downcast_ref::<nix::errno::Errno>().map(|errno| *errno as i32);
        let errno = errno.or_else(|| cause.downcast_ref::<rustix::io::Errno>().map(|errno| errno.raw_os_error()));
        match kind.or_else(|| errno.map(|errno| io::Error::from_raw_os_error(errno).kind())) {
            Some(io::ErrorKind::BrokenPipe) => return None,
            Some(io::ErrorKind::PermissionDenied) => return Some(ExitCode::from(DENIED)),
            _ => {}
        }
    }
    Some(ExitCode::from(FAILED))
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn errors_map_to_the_codes_of_the_contract() {
        let io = |kind| anyhow::Error::from(io::Error::from(kind)).context("cannot read x");
        let engine = |denied| anyhow::Error::new(EngineError { message: "x".to_owned(), denied }).context("cannot y");
        for (error, want) in [
            (anyhow::Error::from(Usage("no".to_owned())), Some(ExitCode::from(USAGE))),
            (anyhow::Error::from(Usage("no".to_owned())).context("while"), Some(ExitCode::from(USAGE))),
            (anyhow::Error::from(netns::Unknown(1)).context("while"), Some(ExitCode::from(USAGE))),
            (io(io::ErrorKind::PermissionDenied), Some(ExitCode::from(DENIED))),
            (io(io::ErrorKind::NotFound), Some(ExitCode::from(FAILED))),
            (io(io::ErrorKind::BrokenPipe), None),
            (anyhow::Error::from(nix::errno::Errno::EPERM), Some(ExitCode::from(DENIED))),
            (Err::<(), _>(rustix::io::Errno::ACCESS).context("x").unwrap_err(), Some(ExitCode::from(DENIED))),
            (engine(true), Some(ExitCode::from(DENIED))),
            (engine(false), Some(ExitCode::from(FAILED))),
            (systemd::Error::Denied { what: "x".to_owned() }.into(), Some(ExitCode::from(DENIED))),
            (anyhow::anyhow!("x"), Some(ExitCode::from(FAILED))),
        ] {
            assert_eq!(of(&error), want, "{error:#}");
        }
    }
}
