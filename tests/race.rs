//! A process that dies, and whose PID another process gets, between any two steps of a kill: the other one lives.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::libc;

use crate::gate::{self, Moment};
use crate::puppet::Stage;
use crate::subject::{binary, command, finish, skip};
use crate::{Test, test};

/// Runs `kill` on a port whose holder dies at `moment`, its PID going to a bystander, which must live.
fn recycle(moment: Moment, is_pid: bool) {
    let stage = Stage::new();
    let maker = stage.puppet();
    let holder = stage.puppet();
    let sock = holder.serve();
    let pid = holder.pid;
    // What it dies of is up to the test, not to the first signal.
    holder.ignore_term();
    let target = format!("{}/tcp", sock.port());
    let (run, bystander) = gate::run(
        command(&["kill", &target, "--json", "--yes", "--grace", "500ms"]),
        moment,
        |argument| !is_pid || argument == u64::from(pid),
        || {
            holder.exit();
            let bystander = maker.fork_as(pid);
            // A server of its own, like any that an ordinary kill would end.
            if let Ok(bystander) = &bystander {
                bystander.serve();
            }
            bystander
        },
    );
    let bystander = match bystander {
        Some(Ok(bystander)) => bystander,
        Some(Err(refused)) => return skip("kernel", &format!("no PID can be chosen here: {}", refused.text)),
        None => panic!("kill never came to {moment:?}: {} {}", run.text(), run.errors()),
    };
    assert_eq!(bystander.pid, pid);
    assert!(bystander.is_alive(), "a bystander was ended: {}", run.text());
    let outcome = run.expect(0).json()[0].clone();
    assert_eq!(outcome["still_listening"], false, "{outcome}");
    assert_eq!(outcome["forced"], serde_json::json!([]), "{outcome}");
    // Nothing on its way either: it answers after all is over.
    bystander.serve();
}

/// Kill in a pid namespace of its own that sees the /proc of the host, as `unshare --pid --fork` leaves it: there a PID
/// of /proc and the same number given to pidfd_open(2) are different processes.
fn foreign_proc() {
    let stage = Stage::new();
    let server = stage.puppet();
    let sock = server.serve();
    let mut command = Command::new("sh");
    // The shell stays outside; its child, the first process of the new namespace, is portwatch.
    command.args(["-c", "\"$@\"; exit $?", "sh"]).arg(binary());
    command.args(["kill", &format!("{}/tcp", sock.port()), "--json"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: unshare is a bare system call, which may be made between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::unshare(libc::CLONE_NEWPID) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let run = match command.spawn() {
        Ok(child) => finish(child).expect(4),
        Err(error) => return skip("root", &format!("no pid namespace can be made: {error}")),
    };
    assert!(run.errors().contains("/proc belongs to another pid namespace"), "{}", run.errors());
    assert!(server.is_alive());
}

pub fn trials() -> Vec<Test> {
    vec![
        test("kill::where_proc_is_of_another_pid_namespace_nobody_is_signalled", foreign_proc),
        test("kill::a_pid_recycled_before_its_pidfd_is_opened_is_not_hit", || {
            recycle(Moment::Before(libc::SYS_pidfd_open), true);
        }),
        test("kill::a_pid_recycled_after_its_pidfd_is_opened_is_not_hit", || {
            recycle(Moment::After(libc::SYS_pidfd_open), true);
        }),
        test("kill::a_pid_recycled_just_before_the_signal_is_not_hit", || {
            recycle(Moment::Before(libc::SYS_pidfd_send_signal), false);
        }),
        test("kill::a_pid_recycled_after_the_signal_is_not_hit_by_the_next", || {
            recycle(Moment::After(libc::SYS_pidfd_send_signal), false);
        }),
    ]
}
