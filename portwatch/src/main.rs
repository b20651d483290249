//! The `portwatch` binary: parses, dispatches, prints an error once and decides the exit code.

mod cli;
mod commands;
mod exit_codes;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::FromArgMatches as _;
use clap::error::ErrorKind;

use crate::cli::{Cli, Verb};
use crate::commands::note;

fn main() -> ExitCode {
    let Cli { verb, globals } = parse().unwrap_or_else(|error| {
        if !matches!(
            error.kind(),
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        ) {
            // clap goes on with `error: …`, in colours where they are wanted.
            let _ = write!(io::stderr(), "portwatch: ");
        }
        error.exit()
    });
    // The agent logs in its own way.
    if globals.verbose && !matches!(verb, Verb::Agent(_)) {
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

fn parse() -> Result<Cli, clap::Error> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let mut command = cli::command(|verb| words.iter().any(|word| word == verb));
    let matches = command.try_get_matches_from_mut(&words)?;
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

fn run(verb: &Verb, globals: &cli::Globals) -> anyhow::Result<ExitCode> {
    if !matches!(verb, Verb::Agent(_)) {
        commands::check(globals)?;
    }
    match verb {
        Verb::List(args) => commands::list::run(args, globals),
        Verb::Who(args) => commands::who::run(args, globals),
        Verb::Rules(args) => commands::rules::run(args, globals),
        Verb::Agent(args) => commands::agent::run(args, globals),
        Verb::Status(args) => commands::status::run(args, globals),
        Verb::Watch(args) => commands::watch::run(args, globals),
        Verb::Top(args) => commands::top::run(args, globals),
        Verb::Diagnose(args) => commands::diagnose::run(args, globals),
        Verb::Kill(args) => commands::kill::run(args, globals),
        Verb::Mark(args) => commands::mark::run(args, globals),
        Verb::Wait(args) => commands::wait::run(args, globals),
        Verb::Run(args) => commands::run::run(args, globals),
        Verb::Ps(args) => commands::ps::run(args, globals),
        Verb::Stop(args) => commands::stop::run(args, globals),
        Verb::Logs(args) => commands::logs::run(args, globals),
        Verb::Completions(args) => commands::completions::run(args),
        Verb::Man(args) => commands::man::run(args),
        Verb::Complete(args) => Ok(commands::completions::answer(args)),
        Verb::History(args) => commands::history::run(args, globals),
    }
}

/// Shows what the library and the kernel programs log.
fn log_to_stderr() {
    struct Stderr;

    impl log::Log for Stderr {
        /// What the loader and the client of container engines trace is of interest to their developers alone.
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            let of_others = ["aya", "bollard"].iter().any(|name| metadata.target().starts_with(name));
            metadata.level() <= log::Level::Warn || !of_others
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
