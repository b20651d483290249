//! `portwatch man DIR`: the manual, a page for portwatch and one for each verb.
//!
//! The options come from the command line itself; what the pages say beyond that stands here. The same binary writes
//! the same bytes, whenever and wherever it runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Command, ValueHint};
use clap_mangen::Man;
use roff::{Roff, bold, roman};

use super::print;
use crate::cli;

/// When what is said here last changed: a page has a date, and the same binary writes the same page.
const DATE: &str = "2026-11-21";

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch man /usr/local/share/man/man1
  portwatch man . && man ./portwatch.1")]
pub(crate) struct ManArgs {
    /// Directory to write to, which must exist
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) directory: PathBuf,
}

pub(crate) fn run(args: &ManArgs) -> anyhow::Result<ExitCode> {
    let mut command = cli::command(|_| true);
    command.build();
    let verbs: Vec<&Command> =
        command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help").collect();
    let mut written = String::new();
    for page in std::iter::once(&command).chain(verbs.iter().copied()) {
        let name = page_name(page);
        let path = args.directory.join(format!("{name}.1"));
        let text = render(page, &verbs).with_context(|| format!("cannot render {name}.1"))?;
        write(&path, &text)?;
        written += &format!("{}\n", portwatch::render::escape(&path.to_string_lossy()));
    }
    print(&written)?;
    Ok(ExitCode::SUCCESS)
}

fn write(path: &Path, text: &[u8]) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}; name a directory that exists", path.display()))
}

/// `portwatch`, `portwatch-kill`.
fn page_name(command: &Command) -> String {
    command.get_display_name().unwrap_or(command.get_name()).to_owned()
}

fn render(command: &Command, verbs: &[&Command]) -> io::Result<Vec<u8>> {
    let name = page_name(command);
    let is_verb = name != "portwatch";
    // The text behind the options is for --help, where it stands as typed: here it has sections of its own.
    let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let source = concat!("portwatch ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone().after_help(None::<&str>)).title(name.to_uppercase()).section("1");
    let man = man.date(DATE).source(source).manual("User Commands");
    let mut out = Vec::new();
    man.render_title(&mut out)?;
    let mut whole = Roff::new();
    // Names of pages and options are not to be broken at a hyphen.
    whole.control("nh", []);
    whole.to_writer(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;

    let mut roff = Roff::new();
    if !is_verb {
        roff.control("SH", ["VERBS"]);
        for verb in verbs {
            let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
            tagged(&mut roff, &format!("{}(1)", page_name(verb)), &about);
        }
    }
    if !is_verb || command.get_arguments().any(|arg| arg.get_id() == "targets") {
        targets(&mut roff);
    }
    examples(&mut roff, &after);
    roff.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in exit_codes(command.get_name()) {
        tagged(&mut roff, code, meaning);
    }
    files_and_environment(&mut roff);
    roff.control("SH", ["SEE ALSO"]);
    let others = std::iter::once("portwatch".to_owned()).chain(verbs.iter().map(|verb| page_name(verb)));
    let others = others.filter(|other| *other != name).map(|other| format!("{other}(1)"));
    let others: Vec<String> = others.chain(["ss(8)", "lsof(8)", "fuser(1)"].map(str::to_owned)).collect();
    roff.text([roman(others.join(", "))]);
    roff.to_writer(&mut out)?;
    Ok(out)
}

fn tagged(roff: &mut Roff, tag: &str, text: &str) {
    roff.control("TP", []);
    roff.text([bold(tag)]);
    roff.text([roman(text)]);
}

fn targets(roff: &mut Roff) {
    roff.control("SH", ["TARGETS"]);
    roff.text([roman(
        "A verb acts on the listeners that any of its targets means and that all other selectors match.",
    )]);
    for (target, meaning) in [
        ("8000, :8000", "a port, of TCP and of UDP, on any address"),
        ("3000,8080", "several; a comma separates whole targets"),
        ("3000-3005", "a range, which costs no more than one port"),
        ("8000/tcp, 5353/udp", "of one protocol"),
        ("127.0.0.1:8000, [::1]:8000", "listeners that serve this address, those bound to all addresses included"),
        ("@NAME", "a set of the configuration; @dev is 3000, 8000 and 8080 unless that says otherwise"),
    ] {
        tagged(roff, target, meaning);
    }
}

/// The block under `Examples:` as it stands.
fn examples(roff: &mut Roff, after_help: &str) {
    let block = after_help.lines().skip_while(|line| *line != "Examples:").skip(1);
    let lines: Vec<&str> = block.take_while(|line| !line.is_empty()).collect();
    if lines.is_empty() {
        return;
    }
    roff.control("SH", ["EXAMPLES"]);
    roff.control("nf", []);
    for line in lines {
        roff.text([roman(line.trim_start())]);
    }
    roff.control("fi", []);
}

/// What the exit codes mean for a verb; for all of them where it is none.
fn exit_codes(verb: &str) -> Vec<(&'static str, &'static str)> {
    let (yes, no) = match verb {
        "list" => ("Done, also where nothing is listening.", "Not used."),
        "who" => ("Somebody is there.", "Nothing is listening there."),
        "kill" => ("Every target port is free, or it was a dry run.", "Something is still taken."),
        "wait" => ("It is true.", "Time ran out."),
        "diagnose" => ("Nothing is in the way.", "Something is."),
        "history" => ("There is a history, also where nothing in it is meant.", "There is none."),
        "run" => (
            "The command's own, as any other code of it. In the background: it is ready.",
            "The port is taken, it was not ready in time or ended well before, or there is no room for one more. Nothing \
             is left running.",
        ),
        "ps" => ("Done, also where there are none.", "Not used."),
        "stop" => ("Nothing of them is left.", "There is none by that name, or something of it does not end."),
        "logs" => ("Done.", "There is no log by that name."),
        "agent" => ("It ended as it was told to.", "Another agent serves that socket."),
        "status" => ("The agent is there and healthy.", "It is not."),
        _ => ("Done; the answer is yes.", "The answer is no."),
    };
    let mut codes = vec![
        ("0", yes),
        ("1", no),
        ("2", "The command line or the configuration means nothing."),
        ("3", "Not permitted."),
        ("4", "portwatch itself failed."),
    ];
    if verb == "run" {
        codes.extend([
            ("124", "The lifetime was over."),
            ("126, 127", "The command cannot be run, or was not found."),
            ("128+N", "Signal N ended the command."),
        ]);
    }
    codes
}

fn files_and_environment(roff: &mut Roff) {
    roff.control("SH", ["FILES"]);
    tagged(
        roff,
        "/etc/portwatch/config.toml, ~/.config/portwatch/config.toml",
        "The configuration of the host and of the user (in $XDG_CONFIG_HOME, where that is set), whose sets replace \
         those of the host. Under [sets], a line such as web = [8000, \"3000-3005\", \"8080/tcp\"] defines @web. It is \
         read only where a target names a set. As root (with sudo, too) it is root's own, and a file that anybody else \
         may write is refused.",
    );
    roff.control("SH", ["ENVIRONMENT"]);
    tagged(roff, "PORTWATCH_CONFIG", "The one configuration file to read instead of these.");
    tagged(roff, "PORTWATCH_SOCKET", "Where the agent listens, unless --socket says otherwise.");
    tagged(roff, "NO_COLOR", "No colours.");
}
