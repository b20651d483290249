//! `portwatch completions SHELL`, and what its scripts ask at run time.
//!
//! ```text
//!  <TAB> ─► script of the shell ─► portwatch __complete SHELL -- WORDS ─► clap's engine ─► candidates, one a line
//! ```
//! The scripts are short and know nothing of the command line: that, and the ports that listen now, is asked of
//! portwatch itself. Everything that goes to a shell is made harmless here: no candidate has a control character,
//! descriptions are escaped and cut, and errors are dropped, since the prompt is no place for them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use clap::{Args, Command, ValueEnum};
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate, complete};
use nix::unistd::{Uid, User};
use portwatch::model::{Holder, Listener, Protocol};
use portwatch::render::{cut, escape};
use portwatch::select::builtin_sets;
use portwatch::source::{Probe, Scanner, Tier};
use portwatch::{cgroup, config};

use super::print;
use crate::cli;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch completions bash > /etc/bash_completion.d/portwatch
  portwatch completions zsh > /usr/local/share/zsh/site-functions/_portwatch
  portwatch completions fish > ~/.config/fish/completions/portwatch.fish
  source <(portwatch completions bash)

`portwatch kill <TAB>` then offers the ports that are listening at that moment.")]
pub(crate) struct CompletionsArgs {
    /// Whose script to print: bash, zsh or fish
    #[arg(hide_possible_values = true)]
    pub(crate) shell: Shell,
}

// What a script asks.
#[derive(Debug, Args)]
pub(crate) struct CompleteArgs {
    shell: Shell,
    /// zsh and fish: the words so far; bash: the line so far, the part of it that bash would replace, and `COMP_TYPE`
    #[arg(last = true)]
    words: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

// Bash cuts words at `:` and `@`, so it hands over the line and is given what to put in place of its last piece.
const BASH: &str = r#"# bash completion for portwatch
_portwatch() {
    mapfile -t COMPREPLY < <(portwatch __complete bash -- "${COMP_LINE:0:COMP_POINT}" "$2" "$COMP_TYPE" 2>/dev/null)
}
complete -o nosort -F _portwatch portwatch
"#;

const ZSH: &str = r#"#compdef portwatch
_portwatch() {
    local -a candidates
    candidates=("${(@f)$(portwatch __complete zsh -- "${(@Q)words[1,CURRENT]}" 2>/dev/null)}")
    candidates=("${(@)candidates:#}")
    (( $#candidates )) && _describe -V portwatch candidates
}
if [[ $funcstack[1] == _portwatch ]]; then
    _portwatch "$@"
else
    compdef _portwatch portwatch
fi
"#;

const FISH: &str = "\
# fish completion for portwatch
complete -c portwatch -f -k -a '(portwatch __complete fish -- (commandline -opc) (commandline -ct) 2>/dev/null)'
";

pub(crate) fn run(args: &CompletionsArgs) -> anyhow::Result<ExitCode> {
    print(match args.shell {
        Shell::Bash => BASH,
        Shell::Zsh => ZSH,
        Shell::Fish => FISH,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Answers a script. There is nobody to tell of an error.
pub(crate) fn answer(args: &CompleteArgs) -> ExitCode {
    let _ = print(&lines(args.shell, &args.words, &mut |words| candidates(words)));
    ExitCode::SUCCESS
}

/// A value to put in place of the last word, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    value: String,
    help: Option<String>,
}

/// The answer in the words of the shell. `candidates` completes the last of the words.
fn lines(shell: Shell, words: &[OsString], candidates: &mut dyn FnMut(Vec<OsString>) -> Vec<Candidate>) -> String {
    let text = |index: usize| words.get(index).map(|word| word.to_string_lossy().into_owned()).unwrap_or_default();
    let lines: Vec<String> = match shell {
        Shell::Bash => {
            let (typed, replaced, kind) = (split(&text(0)), text(1), text(2));
            // What bash keeps of the last word.
            let kept = typed.last().and_then(|word| word.strip_suffix(&replaced)).unwrap_or_default().to_owned();
            let found = candidates(typed.into_iter().map(OsString::from).collect());
            // When bash only lists (`?`, and `!` and `@` of readline's show-all variables), it lists what it is given.
            let lists = found.len() > 1 && matches!(kind.as_str(), "63" | "33" | "64");
            let line = |Candidate { value, help }: &Candidate| {
                let value = quote_for_bash(value.strip_prefix(&kept)?);
                Some(match help.as_ref().filter(|_| lists) {
                    Some(help) => format!("{value}  ({help})"),
                    None => value,
                })
            };
            found.iter().filter_map(line).collect()
        }
        Shell::Zsh => {
            let line = |Candidate { value, help }: Candidate| {
                let value = value.replace('\\', "\\\\").replace(':', "\\:");
                help.map_or(value.clone(), |help| format!("{value}:{}", help.replace('\\', "\\\\")))
            };
            candidates(words.to_vec()).into_iter().map(line).collect()
        }
        Shell::Fish => {
            let line =
                |Candidate { value, help }: Candidate| help.map_or(value.clone(), |help| format!("{value}\t{help}"));
            candidates(words.to_vec()).into_iter().map(line).collect()
        }
    };
    lines.into_iter().map(|line| line + "\n").collect()
}

/// The words of a line as a shell would see them, the last one perhaps unfinished or empty. Expands nothing.
fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut is_word = false;
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\'', None) | ('"', None) => (quote, is_word) = (Some(c), true),
            (c, Some(open)) if c == open => quote = None,
            ('\\', None | Some('"')) => {
                word.extend(chars.next());
                is_word = true;
            }
            (c, None) if c.is_whitespace() => {
                if std::mem::take(&mut is_word) {
                    words.push(std::mem::take(&mut word));
                }
            }
            (c, _) => {
                word.push(c);
                is_word = true;
            }
        }
    }
    words.push(word);
    words
}

/// Bash puts a candidate into the line as it is.
fn quote_for_bash(value: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "_@%+=:,./-".contains(c);
    value.chars().flat_map(|c| (!is_plain(c)).then_some('\\').into_iter().chain([c])).collect()
}

/// Descriptions longer than this make a menu hard to read.
const HELP_COLUMNS: usize = 50;

/// What may stand in place of the last word.
fn candidates(mut words: Vec<OsString>) -> Vec<Candidate> {
    if words.is_empty() {
        return Vec::new();
    }
    let last = words.len() - 1;
    let wants_option = words[last].to_string_lossy().starts_with('-');
    // A word in another encoding names nothing that could be completed.
    words.iter_mut().for_each(|word| *word = word.to_string_lossy().into_owned().into());
    let directory = std::env::current_dir().ok();
    let found = complete(&mut command(), words, last, directory.as_deref()).unwrap_or_default();
    let mut found: Vec<Candidate> = found.iter().filter_map(harmless).collect();
    // Somebody who wants an option begins one; until then they would bury the ports.
    if !wants_option && found.iter().any(|candidate| !candidate.value.starts_with('-')) {
        found.retain(|candidate| !candidate.value.starts_with('-'));
    }
    found
}

/// `None` for a value that could not be typed.
fn harmless(candidate: &CompletionCandidate) -> Option<Candidate> {
    let value = candidate.get_value().to_str()?;
    if value.is_empty() || escape(value) != value {
        return None;
    }
    let help = candidate.get_help().map(ToString::to_string).filter(|help| !help.is_empty());
    let help = help.map(|help| cut(&escape(help.lines().next().unwrap_or_default()), HELP_COLUMNS).into_owned());
    Some(Candidate { value: value.to_owned(), help })
}

/// The command line, with the arguments that name what is listening now.
fn command() -> Command {
    let globals = cli::command(|_| true).mut_args(|arg| match arg.get_id().as_str() {
        "probe" => {
            let tiers = || Tier::ALL.map(|tier| (tier.to_string(), String::new()));
            let values = move || [("auto".to_owned(), String::new())].into_iter().chain(tiers()).collect();
            arg.add(ArgValueCompleter::new(move |current: &OsStr| offer("", current, values())))
        }
        _ => arg,
    });
    globals.mut_subcommands(|verb| {
        verb.mut_args(|arg| {
            let values: fn(&[Listener]) -> Values = match arg.get_id().as_str() {
                "targets" | "except" => return arg.add(ArgValueCompleter::new(targets)),
                "addresses" => addresses,
                "users" => users,
                "pids" => pids,
                "cgroups" => cgroups,
                "commands" => commands,
                "units" => units,
                "signal" => {
                    |_| ["TERM", "INT", "HUP", "QUIT", "KILL", "USR1", "USR2"].map(|name| owned((name, ""))).into()
                }
                "netns" => |_| [("self", "this namespace"), ("all", "every one")].map(owned).into(),
                _ => return arg,
            };
            arg.add(ArgValueCompleter::new(move |current: &OsStr| offer("", current, values(&listening()))))
        })
    })
}

/// Values with their descriptions, in the order in which they are offered.
type Values = Vec<(String, String)>;

fn owned((value, help): (&str, &str)) -> (String, String) {
    (value.to_owned(), help.to_owned())
}

/// Those that go on as `current` begins, after what stands before it in the same word.
fn offer(before: &str, current: &OsStr, values: Values) -> Vec<CompletionCandidate> {
    let current = current.to_string_lossy();
    let fits = values.into_iter().filter(|(value, _)| value.starts_with(&*current));
    // Escaped before clap sees it, which drops what looks like a colour and leaves no trace.
    let candidate = |(value, help): (String, String)| {
        CompletionCandidate::new(format!("{before}{value}")).help(Some(escape(&help).into_owned().into()))
    };
    fits.map(candidate).collect()
}

/// Every listener of this network namespace, in the quickest way there is; none where that fails.
fn listening() -> Vec<Listener> {
    let snapshot = Scanner::open(Probe::Only(Tier::Poll)).scan(false, &|_| true);
    snapshot.map(|snapshot| snapshot.listeners).unwrap_or_default()
}

/// Ports and sets; behind a comma, the next one.
fn targets(word: &OsStr) -> Vec<CompletionCandidate> {
    let word = word.to_string_lossy();
    let (before, current) = word.split_at(word.rfind(',').map_or(0, |comma| comma + 1));
    let values = if current.starts_with('@') {
        sets()
    } else if current.contains([':', '[']) {
        endpoints(&listening())
    } else {
        let mut values = ports(&listening());
        values.extend(sets());
        values
    };
    offer(before, OsStr::new(current), values)
}

fn sets() -> Values {
    // Whoever uses a set is told what is wrong with the configuration; a prompt is not.
    let sets = config::sets(&|name| std::env::var_os(name), Uid::effective().as_raw());
    let sets = sets.unwrap_or_else(|_| builtin_sets());
    let text = |targets: &[_]| targets.iter().map(ToString::to_string).collect::<Vec<String>>().join(" ");
    sets.iter().map(|(name, targets)| (format!("@{name}"), text(targets))).collect()
}

fn ports(listeners: &[Listener]) -> Values {
    let mut ports: BTreeMap<u16, Vec<&Listener>> = BTreeMap::new();
    for listener in listeners {
        ports.entry(listener.socket.port).or_default().push(listener);
    }
    ports.into_iter().map(|(port, here)| (port.to_string(), who(&here))).collect()
}

fn endpoints(listeners: &[Listener]) -> Values {
    let mut endpoints: BTreeMap<_, Vec<&Listener>> = BTreeMap::new();
    for listener in listeners {
        endpoints.entry(listener.socket.endpoint()).or_default().push(listener);
    }
    endpoints.into_iter().map(|(endpoint, here)| (endpoint.to_string(), who(&here))).collect()
}

/// `python3, node`, or the owner where no process is visible.
fn who(listeners: &[&Listener]) -> String {
    let mut names: Vec<String> = Vec::new();
    for listener in listeners {
        let name = listener.binder().map(|binder| binder.process.name.clone());
        let name = name.unwrap_or_else(|| format!("uid {}", listener.socket.uid));
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let is_udp = listeners.iter().all(|listener| listener.socket.proto == Protocol::Udp);
    names.join(", ") + if is_udp { " udp" } else { "" }
}

fn addresses(listeners: &[Listener]) -> Values {
    by(listeners, |listener| Some(listener.socket.address), |_| None)
}

fn users(listeners: &[Listener]) -> Values {
    let uid = |holder: &Holder| holder.process.uid;
    let mut values = by(listeners, |listener| Some(listener.socket.uid), uid);
    for (value, _) in &mut values {
        let uid = value.parse().ok().map(Uid::from_raw);
        if let Some(user) = uid.and_then(|uid| User::from_uid(uid).ok().flatten()) {
            *value = user.name;
        }
    }
    values
}

fn pids(listeners: &[Listener]) -> Values {
    let mut values: BTreeMap<u32, String> = BTreeMap::new();
    for holder in listeners.iter().flat_map(|listener| &listener.holders) {
        values.insert(holder.process.id.pid, holder.process.name.clone());
    }
    values.into_iter().map(|(pid, name)| (pid.to_string(), name)).collect()
}

fn commands(listeners: &[Listener]) -> Values {
    by(listeners, |_| None, |holder| Some(globset::escape(&holder.process.name)))
}

fn cgroups(listeners: &[Listener]) -> Values {
    by(listeners, |_| None, |holder| holder.process.cgroup.clone())
}

fn units(listeners: &[Listener]) -> Values {
    by(listeners, |_| None, |holder| holder.process.cgroup.as_deref().and_then(cgroup::unit).map(globset::escape))
}

/// What listeners or their holders have in common, with the ports of each.
fn by<T: Ord + ToString>(
    listeners: &[Listener],
    of_listener: impl Fn(&Listener) -> Option<T>,
    of_holder: impl Fn(&Holder) -> Option<T>,
) -> Values {
    let mut ports: BTreeMap<T, BTreeSet<u16>> = BTreeMap::new();
    for listener in listeners {
        let keys = of_listener(listener).into_iter().chain(listener.holders.iter().filter_map(&of_holder));
        for key in keys {
            ports.entry(key).or_default().insert(listener.socket.port);
        }
    }
    let text = |ports: BTreeSet<u16>| ports.iter().map(u16::to_string).collect::<Vec<_>>().join(" ");
    ports.into_iter().map(|(key, ports)| (key.to_string(), text(ports))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_split_as_a_shell_would() {
        for (line, want) in [
            ("", &[""][..]),
            ("portwatch", &["portwatch"]),
            ("portwatch kill ", &["portwatch", "kill", ""]),
            ("portwatch  kill\t80", &["portwatch", "kill", "80"]),
            ("p --cwd '/a b", &["p", "--cwd", "/a b"]),
            ("p '' \"\" ", &["p", "", "", ""]),
            ("p a\\ b \"c\\\"d\"e", &["p", "a b", "c\"de"]),
            ("p \\", &["p", ""]),
        ] {
            assert_eq!(split(line), want, "{line}");
        }
    }

    #[test]
    fn candidates_are_told_in_the_words_of_each_shell() {
        let some = |value: &str, help: Option<&str>| Candidate { value: value.into(), help: help.map(str::to_owned) };
        let both = [some("127.0.0.1:80", Some("a\\b: c")), some("@dev", None)];
        for (shell, words, offered, want) in [
            (Shell::Fish, &["p", "kill", ""][..], &both[..], "127.0.0.1:80\ta\\b: c\n@dev\n"),
            (Shell::Zsh, &["p", "kill", ""], &both, "127.0.0.1\\:80:a\\\\b: c\n@dev\n"),
            (Shell::Bash, &["p kill ", "", "9"], &both, "127.0.0.1:80\n@dev\n"),
            (Shell::Bash, &["p kill ", "", "63"], &both, "127.0.0.1:80  (a\\b: c)\n@dev\n"),
            (Shell::Bash, &["p kill ", "", "63"], &both[..1], "127.0.0.1:80\n"),
            // Bash goes on behind the last of the characters at which it cuts words.
            (Shell::Bash, &["p kill 127.0.0.1:8", "8", "9"], &both[..1], "80\n"),
            (Shell::Bash, &["p kill @d", "d", "9"], &both[1..], "dev\n"),
            (Shell::Bash, &["p kill @d", "@d", "9"], &both[1..], "@dev\n"),
            (Shell::Bash, &["p kill ", "", "9"], &[some("a b$(x)`;'", None)], "a\\ b\\$\\(x\\)\\`\\;\\'\n"),
            (Shell::Bash, &[], &[], ""),
        ] {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            assert_eq!(lines(shell, &words, &mut |_| offered.to_vec()), want, "{shell:?} {words:?}");
        }
    }

    #[test]
    fn no_control_character_reaches_a_shell() {
        let candidate = |value: &str, help: &str| offer("", OsStr::new(""), vec![owned((value, help))]).remove(0);
        for (value, help, want) in [
            ("80", "ok", Some(("80", "ok".to_owned()))),
            ("80", "a\u{1b}[31m\tb", Some(("80", "a\\x1b[31m\\tb".to_owned()))),
            ("80", &"x".repeat(99), Some(("80", "x".repeat(49) + "…"))),
            ("a\nb", "", None),
            ("a\u{202e}b", "", None),
        ] {
            let want = want.map(|(value, help)| Candidate { value: value.to_owned(), help: Some(help) });
            assert_eq!(harmless(&candidate(value, help)), want, "{value:?} {help:?}");
        }
    }

    #[test]
    fn the_command_line_is_completed() {
        let complete = |line: &str| {
            let found = candidates(line.split(' ').map(OsString::from).collect());
            found.into_iter().map(|candidate| candidate.value).collect::<Vec<_>>()
        };
        assert!(complete("portwatch ").starts_with(&["list", "who", "watch", "kill"].map(str::to_owned)));
        assert!(!complete("portwatch ").contains(&"__complete".to_owned()));
        assert_eq!(complete("portwatch wait 8000 --b"), ["--bound"]);
        assert_eq!(complete("portwatch kill --netns "), ["self", "all"]);
        assert_eq!(complete("portwatch completions "), ["bash", "zsh", "fish"]);
        assert!(complete("portwatch kill @").contains(&"@dev".to_owned()));
        assert!(complete("portwatch kill 1,2,@d").contains(&"1,2,@dev".to_owned()));

        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap();
        let port = endpoint.port().to_string();
        for line in ["kill ", "who ", "list --tcp ", "wait --bound "] {
            assert!(complete(&format!("portwatch {line}")).contains(&port), "{line}");
        }
        assert_eq!(complete(&format!("portwatch kill {port}")), [port.as_str()]);
        assert!(complete("portwatch kill 127.0.0.1:").contains(&endpoint.to_string()));
        assert!(complete("portwatch kill --pid ").contains(&std::process::id().to_string()));
        assert!(complete("portwatch list --addr 127").contains(&"127.0.0.1".to_owned()));
        assert_eq!(complete("portwatch kill nothing"), Vec::<String>::new());
    }
}
