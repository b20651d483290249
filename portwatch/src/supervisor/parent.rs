//! Which ancestor of a process would start it again. Pure: the host is handed in.

use std::cell::RefCell;
use std::collections::HashMap;

use super::{Kind, Sight, Starter, Supervisor, command_line, operand, quote};
use crate::model::{Process, ProcessId};
use crate::source::stat::{self, Stat};

/// A program that is known by name.
struct Known {
    /// The first word of its `comm` or title, or the name of its program or script.
    names: &'static [&'static str],
    role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Starts what ends, and has a command to tell it not to.
    Control(Kind),
    /// Starts its command again on some occasion; ending it is the way to end that.
    Repeat,
    /// Runs a command once and ends with it.
    Run,
    /// Sessions live in it: it, and all above it, start nothing again.
    Host,
}

use Role::{Control, Host, Repeat, Run};

/// What is known of supervisors, each by its own documentation or source.
const KNOWN: &[Known] = &[
    // lib/Daemon.js: process.title = `PM2 v${version}: God Daemon (${PM2_HOME})`.
    Known { names: &["PM2"], role: Control(Kind::Pm2) },
    // supervisord.org, "Subprocess": autorestart; supervisorctl(1).
    Known { names: &["supervisord"], role: Control(Kind::Supervisord) },
    // runsv(8): "if ./run exits, restarts it"; it changes to the service directory. sv(8): stop.
    Known { names: &["runsv"], role: Control(Kind::Runit) },
    // skarnet.org/software/s6/s6-supervise.html: changes to the service directory; s6-svc -d.
    Known { names: &["s6-supervise"], role: Control(Kind::S6) },
    // cr.yp.to/daemontools/supervise.html: "switches to the directory"; svc -d.
    Known { names: &["supervise"], role: Control(Kind::Daemontools) },
    // supervise-daemon(8) of OpenRC: its first argument is the service.
    Known { names: &["supervise-daemon"], role: Control(Kind::Openrc) },
    // cron(8), anacron(8): the next time comes.
    Known { names: &["cron", "crond", "anacron", "fcron"], role: Control(Kind::Cron) },
    // On a change of files, by their READMEs: "wait for changes before restart" and the like.
    Known {
        names: &[
            "nodemon",
            "node-dev",
            "ts-node-dev",
            "tsnd",
            "tsx",
            "chokidar-cli",
            "cargo-watch",
            "watchexec",
            "bacon",
            "entr",
            "air",
            "reflex",
            "gow",
            "wgo",
            "CompileDaemon",
            "watchmedo",
            "watchfiles",
            "hupper",
            "rerun",
        ],
        role: Repeat,
    },
    // When it ends: forever(1); watch(1) of procps runs its command every few seconds; autossh(1) its ssh.
    Known {
        names: &["forever", "watch", "autossh", "pm2-runtime", "pm2-docker", "circusd", "bluepilld"],
        role: Repeat,
    },
    // Procfile runners, by their READMEs: when one process ends, all do.
    Known { names: &["foreman", "honcho", "hivemind", "concurrently", "npm-run-all"], role: Run },
    // Package managers and build tools: they end with the script.
    Known {
        names: &[
            "npm",
            "npx",
            "yarn",
            "yarnpkg",
            "pnpm",
            "pnpx",
            "bunx",
            "make",
            "gmake",
            "just",
            "task",
            "rake",
            "bundle",
            "cargo",
            "go",
            "poetry",
            "pipenv",
            "uv",
            "uvx",
            "pdm",
            "hatch",
            "tox",
            "nox",
            "turbo",
            "nx",
            "lerna",
            "cross-env",
            "env-cmd",
            "dotenv",
            "mix",
            "mvn",
            "gradle",
        ],
        role: Run,
    },
    // Wrappers of one command, and the small inits of containers: they end with it.
    Known {
        names: &[
            "sudo",
            "doas",
            "su",
            "runuser",
            "timeout",
            "time",
            "strace",
            "ltrace",
            "script",
            "setsid",
            "flock",
            "xargs",
            "unshare",
            "nsenter",
            "bwrap",
            "setpriv",
            "faketime",
            "tini",
            "docker-init",
            "dumb-init",
            "catatonit",
            "portwatch",
        ],
        role: Run,
    },
    // Where people and machines log in, and what is above services and containers.
    Known {
        names: &[
            "tmux",
            "screen",
            "SCREEN",
            "sshd",
            "sshd-session",
            "dropbear",
            "mosh-server",
            "login",
            "systemd",
            "init",
            "containerd-shim",
            "containerd-shim-runc-v2",
            "conmon",
            "dockerd",
            "containerd",
            "runc",
            "crun",
            "gnome-terminal-",
            "gnome-terminal-server",
            "konsole",
            "xterm",
            "xfce4-terminal",
            "alacritty",
            "kitty",
            "wezterm-gui",
            "foot",
            "ghostty",
            "code",
            "code-server",
        ],
        role: Host,
    },
];

/// Programs that a person types into. With a terminal and nothing to run, they do not bring back what was killed.
const SHELLS: [&str; 14] =
    ["sh", "bash", "rbash", "dash", "ash", "zsh", "fish", "ksh", "mksh", "tcsh", "csh", "nu", "xonsh", "elvish"];

/// Programs whose name says nothing: their script does.
const INTERPRETERS: [&str; 7] = ["node", "nodejs", "python", "ruby", "perl", "bun", "deno"];

/// An ancestor and its command line.
struct Ancestor {
    stat: Stat,
    command: Vec<String>,
    place: Place,
}

/// What an ancestor may do when its child ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Known(Role),
    /// A shell with a script, or a part of one that was typed.
    Script,
    /// A shell with a command (`sh -c`) that does not look like a loop.
    Command,
    Other,
}

/// The ancestors that could start a process again, the nearest first.
pub(super) struct Line {
    process: ProcessId,
    ancestors: Vec<Ancestor>,
    /// Whether it ends at a shell that somebody types into, or at another host of sessions.
    pub(super) is_typed: bool,
}

impl Line {
    pub(super) fn of(process: &Process, sight: &Sight<'_>) -> Line {
        let mut line = Line { process: process.id, ancestors: Vec::new(), is_typed: false };
        // Each is asked for twice: while climbing and for itself.
        let known: RefCell<HashMap<u32, Option<Stat>>> = RefCell::default();
        let stat = |pid| known.borrow_mut().entry(pid).or_insert_with(|| (sight.stat)(pid)).clone();
        let pids = match stat(process.id.pid) {
            Some(own) if own.id().is_same(process.id) => stat::ancestors(own.pid, &stat),
            // It is gone: its parent was read while it was there.
            _ => [process.ppid].into_iter().chain(stat::ancestors(process.ppid, &stat)).collect(),
        };
        let stats: Vec<Stat> = pids.into_iter().take_while(|pid| *pid > 1).map_while(stat).collect();
        let mut above: Option<Vec<String>> = None;
        for (index, stat) in stats.iter().enumerate() {
            if stat.kernel_thread {
                break;
            }
            let command = above.take().unwrap_or_else(|| (sight.command)(stat.id()));
            let place = if is_shell(stat, &command) {
                above = stats.get(index + 1).map(|parent| (sight.command)(parent.id()));
                match script(&command) {
                    Script::File => Place::Script,
                    Script::Command(text) if loops(text) => Place::Script,
                    Script::Command(_) => Place::Command,
                    // A subshell has the arguments of its shell. One shell typed into another looks the same.
                    Script::None if stat.terminal && above.as_ref().is_none_or(|above| *above != command) => {
                        line.is_typed = true;
                        break;
                    }
                    Script::None => Place::Script,
                }
            } else {
                match role(&stat.name, &command) {
                    Some(Host) => {
                        line.is_typed = !matches!(stat.name.as_str(), "systemd" | "init");
                        break;
                    }
                    Some(role) => Place::Known(role),
                    None => Place::Other,
                }
            };
            if !stat.exiting {
                line.ancestors.push(Ancestor { stat: stat.clone(), command, place });
            }
        }
        line
    }

    pub(super) fn starters(self) -> Vec<Starter> {
        let starter = |Ancestor { stat, command, .. }: Ancestor| {
            let is_script = is_shell(&stat, &command) && !matches!(script(&command), Script::None);
            Starter { stat, is_script }
        };
        self.ancestors.into_iter().map(starter).collect()
    }

    /// The nearest supervisor that can be told to stop a process for good.
    pub(super) fn controlled(&self, sight: &Sight<'_>) -> Option<Supervisor> {
        self.ancestors.iter().find_map(|ancestor| {
            let Place::Known(Control(kind)) = ancestor.place else { return None };
            let mut supervisor = ancestor.supervisor(kind);
            if kind == Kind::Pm2 {
                supervisor.name = Some("pm2".to_owned());
            }
            supervisor.restarts = (kind != Kind::Cron).then_some(true);
            supervisor.stop = self.stop(kind, ancestor, sight);
            Some(supervisor)
        })
    }

    /// The nearest ancestor that may start it again for all that is known; else the nearest of all, which will not.
    pub(super) fn uncontrolled(&self) -> Option<Supervisor> {
        let kind = |ancestor: &Ancestor| match ancestor.place {
            Place::Known(Repeat) => Some(Kind::Repeater),
            Place::Script => Some(Kind::Shell),
            Place::Other => Some(Kind::Parent),
            Place::Known(_) | Place::Command => None,
        };
        if let Some((ancestor, kind)) = self.ancestors.iter().find_map(|a| Some((a, kind(a)?))) {
            let stop = Some(format!("kill {}", ancestor.stat.pid));
            return Some(Supervisor { stop, ..ancestor.supervisor(kind) });
        }
        let runner = self.ancestors.iter().find(|a| a.place == Place::Known(Run));
        match (runner, self.ancestors.first()) {
            (Some(runner), _) => Some(Supervisor { restarts: Some(false), ..runner.supervisor(Kind::Runner) }),
            // Nobody can tell what a command of several parts does next.
            (None, Some(shell)) => {
                let stop = Some(format!("kill {}", shell.stat.pid));
                Some(Supervisor { stop, ..shell.supervisor(Kind::Shell) })
            }
            (None, None) => None,
        }
    }

    /// The command that tells the supervisor; `None` where it cannot be told under which name it has the process.
    fn stop(&self, kind: Kind, ancestor: &Ancestor, sight: &Sight<'_>) -> Option<String> {
        let variable = |name: &str| (sight.variable)(self.process, name).filter(|value| !value.is_empty());
        let argument = |index: usize| ancestor.command.get(index).map(String::as_str);
        // Relative to a directory that it has left.
        let directory = || {
            (sight.cwd)(ancestor.stat.id())
                .or_else(|| argument(1).filter(|path| path.starts_with('/')).map(str::to_owned))
        };
        match kind {
            Kind::Pm2 => {
                // Set by God/ForkMode.js; in cluster mode (God/ClusterMode.js) all is in one variable.
                let name = match variable("pm_id") {
                    Some(id) => variable("name").unwrap_or(id),
                    None => {
                        let all: serde_json::Value = serde_json::from_str(&variable("pm2_env")?).ok()?;
                        all["name"].as_str().filter(|name| !name.is_empty())?.to_owned()
                    }
                };
                let title = ancestor.command.join(" ");
                let home = title.split_once('(').and_then(|(_, rest)| Some(rest.rsplit_once(')')?.0));
                let home = home.filter(|home| !home.is_empty() && !home.ends_with("/.pm2"));
                let prefix = home.map(|home| format!("PM2_HOME={} ", quote(home))).unwrap_or_default();
                Some(format!("{prefix}pm2 stop {}", operand(&name)))
            }
            Kind::Supervisord => {
                // supervisord.org, "Subprocess Environment".
                let process = variable("SUPERVISOR_PROCESS_NAME")?;
                let name = match variable("SUPERVISOR_GROUP_NAME") {
                    Some(group) if group != process => format!("{group}:{process}"),
                    _ => process,
                };
                let mut arguments = ancestor.command.iter();
                let file = arguments.find_map(|word| {
                    word.strip_prefix("--configuration=").map(str::to_owned).or_else(|| {
                        matches!(word.as_str(), "-c" | "--configuration").then_some(())?;
                        ancestor.command.iter().skip_while(|other| *other != word).nth(1).cloned()
                    })
                });
                let file = file.map(|file| format!("-c {} ", quote(&file))).unwrap_or_default();
                Some(format!("supervisorctl {file}stop {}", operand(&name)))
            }
            Kind::Runit => Some(format!("sv stop {}", quote(&directory()?))),
            Kind::S6 => Some(format!("s6-svc -d {}", quote(&directory()?))),
            Kind::Daemontools => Some(format!("svc -d {}", quote(&directory()?))),
            Kind::Openrc => Some(format!("rc-service {} stop", operand(argument(1)?))),
            _ => None,
        }
    }
}

impl Ancestor {
    fn supervisor(&self, kind: Kind) -> Supervisor {
        Supervisor {
            pid: Some(self.stat.pid),
            name: Some(self.stat.name.clone()),
            command: command_line(&self.command),
            parent: Some(self.stat.id()),
            ..Supervisor::bare(kind)
        }
    }
}

/// What the program is known for.
fn role(comm: &str, command: &[String]) -> Option<Role> {
    let names = names(comm, command);
    let known = KNOWN.iter().find(|known| names.iter().any(|name| known.names.contains(name)));
    match known.map(|known| known.role) {
        // nodejs.org, `node --watch`: starts the script again on a change of files.
        None if is_watching_node(&names, command) => Some(Repeat),
        role => role,
    }
}

/// Whether any of the names of the program is among these.
pub(super) fn is_called(process: &Process, wanted: &[&str]) -> bool {
    names(&process.name, &process.command).iter().any(|name| wanted.contains(name))
}

/// Under which names a program may be known: of its `comm`, of its program, and of the script that it interprets.
fn names<'a>(comm: &'a str, command: &'a [String]) -> Vec<&'a str> {
    let mut names = vec![first_word(comm)];
    let Some(program) = command.first() else { return names };
    // A title such as `npm run dev` or `foreman: master` is one argument.
    let program = first_word(file_name(program));
    names.push(program);
    let version = |c: char| c.is_ascii_digit() || c == '.';
    if INTERPRETERS.contains(&program.trim_end_matches(version)) {
        let mut arguments = command[1..].iter().map(String::as_str);
        while let Some(argument) = arguments.next() {
            match argument {
                "-m" => names.extend(arguments.next()),
                // Options of node that take the next argument; the others are `--name=value` or single letters.
                "-r" | "--require" | "--import" | "--loader" | "-W" | "-X" => {
                    arguments.next();
                    continue;
                }
                _ if argument.starts_with('-') => continue,
                script => {
                    let package = script.rsplit_once("/node_modules/").map(|(_, rest)| rest);
                    names.extend(package.and_then(|rest| rest.split('/').find(|part| !part.starts_with('.'))));
                    let file = file_name(script);
                    let stem = file
                        .rsplit_once('.')
                        .filter(|(_, end)| matches!(*end, "js" | "mjs" | "cjs" | "py" | "rb" | "pl"));
                    names.push(stem.map_or(file, |(stem, _)| stem));
                }
            }
            break;
        }
    }
    names
}

fn is_watching_node(names: &[&str], command: &[String]) -> bool {
    let options = command.iter().skip(1).take_while(|argument| argument.starts_with('-'));
    names.contains(&"node")
        && options.into_iter().any(|option| option == "--watch" || option.starts_with("--watch-path"))
}

fn first_word(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or(text).trim_end_matches(':')
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A script that is run by its `#!` line has its own name and the shell's arguments.
fn is_shell(stat: &Stat, command: &[String]) -> bool {
    // A login shell's name starts with a dash.
    let is_named = |name: &str| SHELLS.contains(&name.trim_start_matches('-'));
    match command.first() {
        Some(program) => is_named(file_name(program)),
        None => is_named(&stat.name),
    }
}

enum Script<'a> {
    File,
    /// The text after `-c`.
    Command(&'a str),
    None,
}

/// What a shell was given to run, by sh(1) and bash(1).
fn script(command: &[String]) -> Script<'_> {
    let mut arguments = command.iter().skip(1).map(String::as_str);
    let mut wants_command = false;
    while let Some(argument) = arguments.next() {
        match argument {
            "--rcfile" | "--init-file" | "-o" | "+o" | "-O" | "+O" => drop(arguments.next()),
            "--" | "-" => {
                return match arguments.next() {
                    Some(text) if wants_command => Script::Command(text),
                    Some(_) => Script::File,
                    None => Script::None,
                };
            }
            long if long.starts_with("--") => {}
            short if short.starts_with(['-', '+']) => wants_command |= short.starts_with('-') && short.contains('c'),
            text if wants_command => return Script::Command(text),
            _ => return Script::File,
        }
    }
    Script::None
}

/// Whether a text for a shell has a word that begins a loop.
fn loops(text: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '/' | '.');
    text.split(|c| !is_word(c)).any(|word| matches!(word, "while" | "until" | "for" | "repeat"))
}
