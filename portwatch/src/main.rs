//! The `portwatch` binary: parses, dispatches, prints an error once and decides the exit code.

mod cli;
mod commands;
mod exit_codes;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::cli::{Cli, Verb};
use crate::commands::note;

fn main() -> ExitCode {
    let Cli { verb, globals } = Cli::try_parse().unwrap_or_else(|error| {
        if !matches!(
            error.kind(),
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        ) {
            // clap goes on with `error: …`, in colours where they are wanted.
            let _ = write!(io::stderr(), "portwatch: ");
        }
        error.exit()
    });
    if globals.verbose {
        log_to_stderr();
    }
    run(&verb, &globals).unwrap_or_else(|error| match exit_codes::of(&error) {
        Some(code) => {
            note(&format!("error: {error:#}"));
            code
        }
        None => ExitCode::SUCCESS,
    })
}

fn run(verb: &Verb, globals: &cli::Globals) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::List(args) => commands::list::run(args, globals),
        Verb::Who(args) => commands::who::run(args, globals),
        Verb::Status(args) => commands::status::run(args, globals),
        Verb::Watch(args) => commands::watch::run(args, globals),
        Verb::Kill(args) => commands::kill::run(args, globals),
        Verb::History(args) => commands::history::run(args),
    }
}

/// Shows what the library and the kernel programs log.
fn log_to_stderr() {
    struct Stderr;

    impl log::Log for Stderr {
        /// The loader's own tracing is of interest to its developers alone.
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            metadata.level() <= log::Level::Warn || !metadata.target().starts_with("aya")
        }

        fn log(&self, record: &log::Record<'_>) {
            if !self.enabled(record.metadata()) {
                return;
            }
            note(&format!("{}: {}", record.level().as_str().to_lowercase(), record.args()));
        }

        fn flush(&self) {}
    }

    // Fails only where a logger is set already, and none is.
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(log::LevelFilter::Debug);
    }
}
