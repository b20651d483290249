//! Runs a command and leaves nothing of it behind. `cargo run --example supervise -- sh -c 'sleep 60 & true'`

use std::process::ExitCode;
use std::time::Duration;

use portwatch::run::{Order, supervise};

fn main() -> anyhow::Result<ExitCode> {
    let mut words = std::env::args_os().skip(1);
    let Some(program) = words.next() else { anyhow::bail!("name a command") };
    let order = Order {
        program,
        arguments: words.collect(),
        grace: Duration::from_secs(5),
        lifetime: Some(Duration::from_secs(3600)),
        background: false,
    };
    let over = supervise(&order)?;
    eprintln!("{} processes were left behind, and are gone", over.leftovers);
    Ok(ExitCode::from(over.code()))
}
