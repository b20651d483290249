//! Processes that hold sockets or run services for others: to signal one of them for one port ends more than was meant.
//! Those that hold ports for containers alone are known to [`crate::engine::proxy`]. Pure.

use super::parent::is_called;
use crate::cgroup::Manager;
use crate::model::Process;

/// Why a process is not to be ended for one port, and what to do instead. Both are fixed text, safe to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Managing {
    pub reason: &'static str,
    /// A command, or several with words between.
    pub instead: &'static str,
    /// Whether all that it runs is what it was started to run: one that a job started is the job's own. In the others live
    /// the containers and sessions of anybody.
    pub is_of_starter: bool,
}

const MANAGERS: &[(&[&str], Managing)] = &[
    (
        // With the default scheduling of node's cluster module the primary listens and the workers do not.
        &["PM2"],
        Managing {
            reason: "pm2's daemon holds it for one of its apps (cluster mode), and ending it ends them all",
            instead: "pm2 list, then pm2 stop NAME",
            is_of_starter: true,
        },
    ),
    (
        &["supervisord"],
        Managing {
            reason: "supervisord runs other services, and ending it ends them all",
            instead: "supervisorctl status, then supervisorctl stop NAME; or supervisorctl shutdown",
            is_of_starter: true,
        },
    ),
    (
        &["inetd", "xinetd", "inetutils-inetd"],
        Managing {
            reason: "inetd holds it for one of its services, and ending it ends them all",
            instead: "remove the service from its configuration, then send it SIGHUP",
            is_of_starter: true,
        },
    ),
    (
        &["dockerd", "containerd", "containerd-shim", "containerd-shim-runc-v2", "crio"],
        Managing {
            reason: "it runs containers, and ending it touches them all",
            instead: "docker ps, then docker stop NAME",
            is_of_starter: false,
        },
    ),
    (
        &["kubelet", "kube-proxy", "k3s", "k3s-server", "k3s-agent", "kube-apiserver"],
        Managing {
            reason: "it is part of Kubernetes on this node",
            instead: "kubectl get services --all-namespaces, then kubectl delete service NAME",
            is_of_starter: false,
        },
    ),
    (
        &["tmux", "screen", "SCREEN"],
        Managing {
            reason: "terminal sessions live in it, and ending it ends them all",
            instead: "end the program inside the session",
            is_of_starter: false,
        },
    ),
];

const SYSTEM_SOCKET: Managing = Managing {
    reason: "systemd holds it for a .socket unit",
    instead: "systemctl list-sockets, then systemctl stop NAME.socket",
    is_of_starter: false,
};

const USER_SOCKET: Managing = Managing {
    reason: "the user's systemd holds it for a .socket unit",
    instead: "systemctl --user list-sockets, then systemctl --user stop NAME.socket",
    is_of_starter: false,
};

/// Whose systemd this process is, if it is one that has socket units: the system's or a user's.
pub fn systemd_of(process: &Process) -> Option<Manager> {
    match is_manager(process)? {
        it if it == SYSTEM_SOCKET => Some(Manager::System),
        it if it == USER_SOCKET => process.uid.map(Manager::User),
        _ => None,
    }
}

/// Why this holder is not to be ended for the sake of one port, if so. [`super::systemd::socket_unit`] can name the
/// socket unit of a systemd.
pub fn is_manager(process: &Process) -> Option<Managing> {
    if process.name == "systemd" {
        let is_of_user = process.command.iter().any(|argument| argument == "--user");
        return (process.id.pid == 1).then_some(SYSTEM_SOCKET).or(is_of_user.then_some(USER_SOCKET));
    }
    MANAGERS.iter().find(|(names, _)| is_called(process, names)).map(|(_, managing)| *managing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ProcessId;

    #[test]
    fn those_that_work_for_others_are_known() {
        for (pid, name, command, want) in [
            (1, "systemd", "/sbin/init splash", Some(SYSTEM_SOCKET.reason)),
            (9, "systemd", "/usr/lib/systemd/systemd --user", Some(USER_SOCKET.reason)),
            (9, "init", "init", None),
            (9, "PM2 v7.0.4: God", "PM2 v7.0.4: God Daemon (/home/al/.pm2)", Some(MANAGERS[0].1.reason)),
            (9, "supervisord", "/usr/bin/python3 /usr/bin/supervisord", Some(MANAGERS[1].1.reason)),
            (9, "python3", "python3 -m supervisor.supervisord", None),
            (9, "dockerd", "dockerd -H tcp://127.0.0.1:2375", Some(MANAGERS[3].1.reason)),
            (9, "tmux: server", "tmux new -d", Some(MANAGERS[5].1.reason)),
            (9, "node", "node server.js", None),
            (9, "nginx", "nginx: master process nginx", None),
        ] {
            let mut process = Process::bare(ProcessId { pid, start: 1 }, name);
            process.command = command.split(' ').map(str::to_owned).collect();
            assert_eq!(is_manager(&process).map(|managing| managing.reason), want, "{name} {command}");
        }
    }
}
