//! Completions in real shells, man pages in real viewers, and the configuration.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::puppet::{Puppet, Sock, Stage};
use crate::subject::{Run, binary, command, finish, portwatch, skip};
use crate::terminal::Terminal;
use crate::{Test, test};

/// A name that would do harm in any shell or terminal that took it for more than text: 15 bytes, as many as there can be.
const HOSTILE_NAME: &[u8] = b"$(x)`y:%\\\x1b[2J\n'";

/// The same, as everybody is to see it.
const HOSTILE_SHOWN: &str = "$(x)`y:%\\\\x1b[2J\\n'";

/// A directory in which `portwatch` is the binary under test, and a server with a hostile name at an address that
/// nothing else on this host has.
struct Scene {
    stage: Stage,
    sock: Sock,
    _server: Puppet,
}

impl Scene {
    /// `None`, loudly, where the machine lacks the shell.
    fn new(shell: &str) -> Option<Scene> {
        if let Err(error) = Command::new(shell).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status() {
            skip(shell, &format!("cannot run {shell}: {error}"));
            return None;
        }
        let stage = Stage::new();
        symlink(fs::canonicalize(binary()).expect("the binary"), stage.path("portwatch")).expect("a link");
        let server = stage.puppet();
        server.set_name(HOSTILE_NAME);
        let sock = server.tcp("127.93.17.5:0", "");
        Some(Scene { stage, sock, _server: server })
    }

    fn command(&self, shell: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(shell);
        let path = std::env::var("PATH").unwrap_or_default();
        command.args(arguments).env("PATH", format!("{}:{path}", self.stage.path("").display()));
        // Nobody's start-up files, no terminal's abilities.
        command
            .env("HOME", self.stage.path(""))
            .env("TERM", "dumb")
            .env_remove("XDG_CONFIG_HOME")
            .env("LC_ALL", "C.UTF-8");
        command
    }

    fn run(&self, shell: &str, arguments: &[&str]) -> Run {
        let mut command = self.command(shell, arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(command.spawn().expect("a shell"))
    }

    fn port(&self) -> String {
        self.sock.port().to_string()
    }
}

/// A shell at a terminal of its own, which ends with this.
struct Shell {
    terminal: Terminal,
    child: Child,
}

impl Shell {
    fn start(mut command: Command) -> Self {
        let terminal = Terminal::sized(50, 200);
        let child = terminal.lead(&mut command);
        Shell { terminal, child }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Types at a shell that has loaded the completions.
fn types(scene: &Scene, command: Command, load: &str) {
    let mut shell = Shell::start(command);
    let terminal = &mut shell.terminal;
    // Printed in two parts, so that the echo of the command is not taken for its output.
    terminal.type_keys(&format!("{load}; printf 'rea%s\\n' dy\n"));
    terminal.until("ready");
    // One candidate: put in, with a blank behind it.
    terminal.type_keys("portwatch kill 127.93.17.5:\t");
    terminal.until(&format!("127.93.17.5:{} ", scene.port()));
    terminal.type_keys("\x15portwatch wait 80 --bo\t");
    terminal.until("--bound ");
    terminal.type_keys("\x15portwatch who @d\t");
    terminal.until("@dev ");
    // Several: listed, with the name of the process, as text.
    terminal.type_keys("\x15portwatch kill \t\t");
    terminal.until(HOSTILE_SHOWN);
    let screen = terminal.since_typed();
    assert!(screen.contains(&scene.port()) && !screen.contains("\x1b[2J\n"), "{screen:?}");
}

fn bash() {
    let Some(scene) = Scene::new("bash") else { return };
    let ask = |line: &str, replaced: &str, kind: &str| {
        let script = "source <(portwatch completions bash)
            COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=$3; _portwatch portwatch \"$2\"
            printf '%s\\n' \"${COMPREPLY[@]}\"";
        let run = scene.run("bash", &["--norc", "--noprofile", "-c", script, "-", line, replaced, kind]).expect(0);
        assert_eq!(run.errors(), "");
        run.text().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let port = scene.port();
    for verb in ["kill", "who", "wait --bound", "list"] {
        assert!(ask(&format!("portwatch {verb} "), "", "9").contains(&port), "{verb}");
    }
    assert!(ask("portwatch kill ", "", "63").contains(&format!("{port}  ({})", HOSTILE_SHOWN)));
    assert_eq!(ask("portwatch kill 127.93.17.5:", "", "9"), [port.as_str()]);
    assert_eq!(ask(&format!("portwatch kill 1,{port}"), &format!("1,{port}"), "9"), [format!("1,{port}")]);
    assert_eq!(ask("portwatch kill --netns=a", "a", "9"), ["all"]);
    assert_eq!(ask("portwatch kill nothing", "nothing", "9"), [""]);
    let shell = scene.command("bash", &["--norc", "--noprofile", "-i"]);
    types(&scene, shell, "source <(portwatch completions bash)");
}

fn zsh() {
    let Some(scene) = Scene::new("zsh") else { return };
    let load = "autoload -Uz compinit; compinit -D -u; source <(portwatch completions zsh)";
    types(&scene, scene.command("zsh", &["-f", "-i"]), load);
    // Installed as a file, which zsh loads at the first use.
    let directory = scene.stage.path("functions");
    fs::create_dir(&directory).expect("a directory");
    fs::write(directory.join("_portwatch"), portwatch(&["completions", "zsh"]).expect(0).stdout).expect("a file");
    let load = format!("fpath=({} $fpath); autoload -Uz compinit; compinit -D -u", directory.display());
    types(&scene, scene.command("zsh", &["-f", "-i"]), &load);
}

fn fish() {
    let Some(scene) = Scene::new("fish") else { return };
    let ask = |line: &str| {
        let script = format!("portwatch completions fish | source; complete -C '{line}'");
        let run = scene.run("fish", &["--no-config", "-c", &script]).expect(0);
        assert_eq!(run.errors(), "");
        run.text()
    };
    let port = scene.port();
    for verb in ["kill", "who", "wait --bound", "list"] {
        let found = ask(&format!("portwatch {verb} "));
        assert!(found.contains(&format!("{port}\t{}\n", HOSTILE_SHOWN)), "{verb}: {found}");
        assert!(found.contains("@dev\t3000 8000 8080\n"), "{verb}: {found}");
    }
    assert_eq!(ask("portwatch kill 127.93.17.5:"), format!("127.93.17.5:{port}\t{}\n", HOSTILE_SHOWN));
    assert_eq!(ask("portwatch wait 80 --bo"), "--bound\tUntil something listens\n");
    assert_eq!(ask("portwatch kill nothing"), "");
}

fn nothing_is_said_of_a_broken_configuration_or_line() {
    let stage = Stage::new();
    let path = stage.path("config.toml");
    fs::write(&path, "[sets\n").expect("a file");
    for words in [&["portwatch", "kill", "@"][..], &["portwatch", "--nonsense", "x", ""], &["portwatch"], &[]] {
        for shell in ["bash", "zsh", "fish"] {
            let mut command = command(&[&["__complete", shell, "--"], words].concat());
            let run = finish(command.env("PORTWATCH_CONFIG", &path).spawn().expect("portwatch")).expect(0);
            assert_eq!(run.errors(), "", "{shell} {words:?}");
        }
    }
}

fn man_pages() {
    let stage = Stage::new();
    let directories = ["one", "two"].map(|name| stage.path(name));
    let pages = directories.each_ref().map(|directory| {
        fs::create_dir(directory).expect("a directory");
        let run = portwatch(&["man", directory.to_str().expect("a path")]).expect(0);
        let listed: Vec<PathBuf> = run.text().lines().map(PathBuf::from).collect();
        assert_eq!(listed.len(), fs::read_dir(directory).expect("pages").count());
        listed.iter().map(|page| fs::read_to_string(page).expect("a page")).collect::<Vec<_>>()
    });
    assert_eq!(pages[0], pages[1]);

    let help = portwatch(&["--help"]).expect(0).text();
    let verbs = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let verbs =
        verbs.filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next()).filter(|verb| *verb != "help");
    let wanted: BTreeSet<String> =
        verbs.map(|verb| format!("portwatch-{verb}.1")).chain(["portwatch.1".to_owned()]).collect();
    let name =
        |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name().into_string().expect("UTF-8");
    assert_eq!(fs::read_dir(&directories[0]).expect("pages").map(name).collect::<BTreeSet<_>>(), wanted);
    for page in &pages[0] {
        assert!(page.contains(".SH \"EXIT STATUS\"") && page.contains(".SH FILES"), "{page}");
    }
    let kill = fs::read_to_string(directories[0].join("portwatch-kill.1")).expect("a page");
    assert!(kill.contains(".SH TARGETS") && kill.contains("Every target port is free"), "{kill}");

    for (viewer, arguments) in [
        ("man", &["--warnings", "-l"][..]),
        ("groff", &["-man", "-Tutf8", "-ww"]),
        ("mandoc", &["-Tlint", "-Wwarning"]),
    ] {
        for name in &wanted {
            let page = directories[0].join(name);
            let mut command = Command::new(viewer);
            command.args(arguments).arg(&page).env("LC_ALL", "C.UTF-8").env("MANPAGER", "cat");
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    skip(viewer, &format!("cannot run {viewer}: {error}"));
                    break;
                }
            };
            let run = finish(child).expect(0);
            assert_eq!(run.errors(), "", "{viewer} {name}");
            let is_lint = viewer == "mandoc";
            assert_eq!(run.stdout.is_empty(), is_lint, "{viewer} {name}: {}", run.text());
        }
    }
    let run = portwatch(&["man"]).expect(2);
    assert!(run.errors().contains("<DIR>"), "{}", run.errors());
    let missing = stage.path("missing");
    let run = portwatch(&["man", missing.to_str().expect("a path")]).expect(4);
    assert!(run.errors().contains("name a directory that exists"), "{}", run.errors());
}

/// Runs with a configuration of these texts: by `PORTWATCH_CONFIG`, and by `XDG_CONFIG_HOME`.
fn with_config(stage: &Stage, text: &str, arguments: &[&str]) -> Run {
    let home = stage.path("home/portwatch");
    fs::create_dir_all(&home).expect("a directory");
    let path = home.join("config.toml");
    fs::write(&path, text).expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
    let run = |name: &str, value: &Path| {
        let mut command = command(arguments);
        command.env_remove("PORTWATCH_CONFIG").env_remove("XDG_CONFIG_HOME").env(name, value);
        finish(command.spawn().expect("portwatch"))
    };
    let run = [run("PORTWATCH_CONFIG", &path), run("XDG_CONFIG_HOME", &stage.path("home"))];
    assert_eq!((run[0].code, run[0].errors()), (run[1].code, run[1].errors()));
    run.into_iter().next().expect("two of them")
}

fn sets_of_the_configuration() {
    let stage = Stage::new();
    let puppet = stage.puppet();
    let socks = [puppet.serve(), puppet.serve()];
    let [first, second] = socks.map(|sock| sock.port());
    let text = format!("[sets]\nmine = [{first}]\ndev = \"{second}/tcp, 1\"\n[access]\nunknown = true\n");
    let found = |set: &str| {
        let run = with_config(&stage, &text, &["list", "--json", set]).expect(0);
        let ports =
            run.json().as_array().expect("rows").iter().map(|row| row["port"].as_u64().expect("a port")).collect();
        let ports: Vec<u64> = ports;
        ports
    };
    assert_eq!(found("@mine"), [u64::from(first)]);
    assert_eq!(found("@dev"), [u64::from(second)]);
    let run = with_config(&stage, &text, &["kill", "@mine", "--dry-run", "--json"]).expect(0);
    assert_eq!(run.json()[0]["port"], first);
    let run = with_config(&stage, &text, &["list", "@no"]).expect(2);
    assert_eq!(run.errors(), "portwatch: error: no set of ports is named '@no'; known: @dev, @mine\n");
}

fn a_broken_configuration() {
    let stage = Stage::new();
    let path = stage.path("home/portwatch/config.toml");
    for (text, want) in [
        ("[sets]\nweb = 8000\ndb = [70000]\n", ":3: set 'db': '70000' is out of range; ports go from 1 to 65535"),
        (
            "[sets]\nweb = [\"@dev\"]\n",
            ":2: set 'web': '@dev' names a set, and sets cannot contain sets; list its ports",
        ),
        ("sets = 1\n", ":1: 'sets' is not a table; write [sets] on a line of its own"),
    ] {
        let run = with_config(&stage, text, &["list", "@dev"]).expect(2);
        assert_eq!(run.errors(), format!("portwatch: error: {}{want}\n", path.display()));
        assert_eq!(run.text(), "");
        // What needs no set does not care.
        with_config(&stage, text, &["kill", "1/tcp", "--dry-run"]).expect(0);
    }
    let run = with_config(&stage, "[sets]\nweb = \n", &["list", "@dev"]).expect(2);
    assert!(run.errors().starts_with(&format!("portwatch: error: {}:2: ", path.display())), "{}", run.errors());
    assert_eq!(run.errors().lines().count(), 1, "{}", run.errors());
}

fn a_configuration_that_others_may_write() {
    if !rustix::process::geteuid().is_root() {
        skip("root", "only root is this careful");
        return;
    }
    let stage = Stage::new();
    let path = stage.path("config.toml");
    fs::write(&path, "[sets]\nmine = 1\n").expect("a file");
    let list = || {
        let mut command = command(&["list", "@mine"]);
        finish(command.env("PORTWATCH_CONFIG", &path).spawn().expect("portwatch"))
    };
    let says = |what: &str| format!("portwatch: error: {}: {what}\n", path.display());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("chmod");
    assert_eq!(
        list().expect(2).errors(),
        says("everybody may write it, so root does not read it; run `chmod go-w` on it")
    );
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
    list().expect(0);
    std::os::unix::fs::chown(&path, Some(65534), None).expect("chown");
    assert_eq!(list().expect(2).errors(), says("belongs to uid 65534, so root does not read it; chown it to root"));
    fs::remove_file(&path).expect("rm");
    let want = format!(
        "portwatch: error: cannot read the configuration {}: there is no such file; set PORTWATCH_CONFIG to another, or \
         unset it\n",
        path.display()
    );
    assert_eq!(list().expect(2).errors(), want);
}

pub fn trials() -> Vec<Test> {
    vec![
        test("shell::completions_bash_offers_what_is_listening", bash),
        test("shell::completions_zsh_offers_what_is_listening", zsh),
        test("shell::completions_fish_offers_what_is_listening", fish),
        test("shell::completions_nothing_is_said_of_what_is_broken", nothing_is_said_of_a_broken_configuration_or_line),
        test("shell::man_every_verb_has_a_page_that_renders_without_a_warning", man_pages),
        test("shell::config_sets_are_targets_of_every_verb", sets_of_the_configuration),
        test("shell::config_a_broken_file_is_told_with_its_line_where_a_set_is_named", a_broken_configuration),
        test("shell::config_root_reads_nothing_that_others_may_write", a_configuration_that_others_may_write),
    ]
}
