//! The recipes for CI: the very shell that they hold is run, step by step, around a job that leaks.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use nix::sys::stat::Mode;

use super::Yard;
use crate::puppet::wait_readable;
use crate::subject::{outputs, pidfd};
use crate::{Test, test};

/// The commands of the steps below `key:` in YAML: items of a list (`- command`), each on a line of its own.
fn yaml_list(text: &str, key: &str) -> String {
    let mut lines = text.lines().skip_while(|line| line.trim() != format!("{key}:"));
    let head = lines.next().unwrap_or_else(|| panic!("no {key}"));
    let indent = |line: &str| line.len() - line.trim_start().len();
    let items = lines.take_while(|line| indent(line) > indent(head));
    let commands: Vec<&str> =
        items.map(|line| line.trim().strip_prefix("- ").unwrap_or_else(|| panic!("no item: {line}"))).collect();
    assert!(!commands.is_empty(), "{key} is empty");
    commands.join("\n")
}

/// The shell of the step with this name in a workflow: `run: command`, or the lines behind `run: |`.
fn yaml_run(text: &str, name: &str) -> String {
    let mut lines = text.lines().skip_while(|line| line.trim() != format!("- name: {name}")).skip(1);
    let indent = |line: &str| line.len() - line.trim_start().len();
    let run = lines.find(|line| line.trim().starts_with("run: ")).unwrap_or_else(|| panic!("no step {name}"));
    match run.trim().strip_prefix("run: ") {
        Some("|") => {
            lines.take_while(|line| indent(line) > indent(run)).map(|line| format!("{}\n", line.trim())).collect()
        }
        command => command.expect("a command").to_owned(),
    }
}

/// The commands of `sh '…'`, in their order.
fn groovy(text: &str) -> Vec<String> {
    let command = |line: &str| Some(line.trim().strip_prefix("sh '")?.strip_suffix('\'')?.to_owned());
    let commands: Vec<String> = text.lines().filter_map(command).collect();
    assert!(commands.iter().all(|command| !command.contains(['\'', '\\'])), "{commands:?}");
    commands
}

/// Runs the steps with a `make` that leaks a server, between those two: which of `steps` fails is the last in `codes`.
fn run(steps: &[String], codes: &[i32], text: &str) {
    let Some(yard) = Yard::new(0, false) else { return };
    let stays = yard.server(0);
    stays.serve();
    let (program, control) = yard.stage.recipe();
    let go = yard.home("go");
    nix::unistd::mkfifo(&go, Mode::from_bits_truncate(0o600)).expect("a fifo");
    let make = format!(
        "#!/bin/sh\n[ \"$1\" = test ] || exit 9\n{control} {} >/dev/null 2>&1 &\nread line < {}\n",
        program.display(),
        go.display()
    );
    fs::write(yard.stage.path("make"), make).expect("a script");
    fs::set_permissions(yard.stage.path("make"), fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut leak = None;
    let mut said = String::new();
    for (step, code) in steps.iter().zip(codes) {
        let mut shell = yard.command("/bin/sh");
        for variable in ["RUNNER_TEMP", "CI_PROJECT_DIR", "WORKSPACE"] {
            shell.env(variable, yard.home(""));
        }
        shell.args(["-ec", step]).stdin(Stdio::null());
        let mut child = shell.spawn().expect("a shell");
        if step.contains("make test") {
            // It leaks while the job goes on, and the job ends when it listens.
            let puppet = yard.stage.admit();
            puppet.serve();
            leak = Some(puppet);
            fs::OpenOptions::new().write(true).open(&go).expect("a fifo").write_all(b"go\n").expect("a fifo");
        }
        let outputs = outputs(&mut child);
        assert!(wait_readable(pidfd(&child)), "the step hangs: {step}");
        let ended = child.wait().expect("wait").code();
        let (stdout, stderr) = outputs.join();
        let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        assert_eq!(ended, Some(*code), "{step}\n{stdout}\n{stderr}");
        said += &stdout;
    }
    let leak = leak.expect("a step that runs the tests");
    leak.wait();
    assert!(said.ends_with(text), "{said}");
    assert!(stays.is_alive());
    let list = yard.portwatch(&["list", "--pid", &stays.pid.to_string()]).expect(0);
    assert!(list.text().contains("puppet"), "{}", list.text());
}

/// The end of what a clean-up says that ended all.
const ENDED: &str = ": none is there any more\n";

pub fn trials() -> Vec<Test> {
    let make = || "make test".to_owned();
    vec![
        test("mark::recipe_of_github_hooks", move || {
            let started = include_str!("../../portwatch/dist/ci/github/job-started.sh").to_owned();
            let completed = include_str!("../../portwatch/dist/ci/github/job-completed.sh").to_owned();
            run(&[started, make(), completed], &[0, 0, 0], ENDED);
        }),
        test("mark::recipe_of_a_github_workflow", || {
            let text = include_str!("../../portwatch/dist/ci/github/workflow.yml");
            let steps = ["Mark what is listening", "Test", "End what the tests left behind"];
            run(&steps.map(|name| yaml_run(text, name)), &[0, 0, 1], ENDED);
            let last = text.split("- name: End what").nth(1).expect("the last step");
            assert!(last.lines().nth(1).is_some_and(|line| line.trim() == "if: always()"), "{last}");
        }),
        test("mark::recipe_of_gitlab", || {
            let text = include_str!("../../portwatch/dist/ci/gitlab/.gitlab-ci.yml");
            let steps = ["before_script", "script", "after_script"];
            run(&steps.map(|key| yaml_list(text, key)), &[0, 0, 0], ENDED);
        }),
        test("mark::recipe_of_jenkins", || {
            let text = include_str!("../../portwatch/dist/ci/jenkins/Jenkinsfile");
            run(&groovy(text), &[0, 0, 1], ENDED);
            let always = text.split("always {").nth(1).expect("post { always }");
            assert!(always.trim().starts_with("sh 'portwatch kill --since"), "{always}");
        }),
        test("mark::recipe_of_a_plain_shell", || {
            let script = include_str!("../../portwatch/dist/ci/clean-run.sh");
            run(&[format!("set -- make test\n{script}")], &[1], ENDED);
        }),
    ]
}
