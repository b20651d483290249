//! A server that `bench` has ended: the hidden verb `server`. It goes with its parent, however that ends.

use std::io::{self, Read, Write as _};
use std::net::TcpListener;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::getppid;

/// Memory of a big one: what a build tool or a language server takes.
const BIG: usize = 2 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Ends at SIGTERM, at once
    Cooperative,
    /// Ignores SIGTERM
    Stubborn,
    /// Ends at SIGTERM, after the kernel has taken back 2 GiB
    Big,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    kind: Kind,
}

/// Listens on 127.0.0.1, prints the port, and serves until it is ended or stdin closes.
pub(crate) fn run(args: &Args) -> Result<()> {
    let parent = getppid();
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        bail!("orphaned before the death signal was set");
    }
    if args.kind == Kind::Stubborn {
        // SAFETY: no handler runs.
        unsafe { signal(Signal::SIGTERM, SigHandler::SigIgn) }.context("cannot ignore SIGTERM")?;
    }
    // Other than 0, so that each page is really there.
    let memory = vec![1_u8; if args.kind == Kind::Big { BIG } else { 0 }];
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("cannot listen")?;
    println!("{}", listener.local_addr()?.port());
    io::stdout().flush()?;
    io::stdin().read_to_end(&mut Vec::new()).context("cannot read stdin")?;
    drop(memory);
    Ok(())
}
