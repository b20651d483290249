use super::*;

const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const USER: &str = "/user.slice/user-1000.slice/user@1000.service/app.slice";

/// A process of the host: its `comm`, its arguments, and whether it has a terminal.
type Case<'a> = (&'a str, &'a str, bool);

/// Who supervises process 99, whose ancestors these are, the outermost first, from pid 10 on.
fn find(ancestors: &[Case<'_>], cgroup: &str, environment: &[(&str, &str)]) -> Option<Supervisor> {
    let pid_of = |index: usize| u32::try_from(index).unwrap() + 10;
    let stat = |pid: u32| {
        let index = if pid == 99 { ancestors.len() } else { usize::try_from(pid).unwrap().checked_sub(10)? };
        let (name, _, terminal) = if pid == 99 { ("server", "", false) } else { *ancestors.get(index)? };
        Some(Stat {
            pid,
            name: name.to_owned(),
            state: 'S',
            ppid: if index == 0 { 1 } else { pid_of(index - 1) },
            process_group: pid,
            session: pid,
            terminal,
            kernel_thread: false,
            exiting: false,
            start: ProcessId::TICK_NS * (1 + u64::try_from(index).unwrap()),
        })
    };
    let case = |id: ProcessId| ancestors.get(usize::try_from(id.pid).unwrap() - 10);
    let sight = Sight {
        stat: &stat,
        // Arguments are separated by `|`, so that they can have blanks.
        command: &|id| case(id).map(|case| case.1.split('|').map(str::to_owned).collect()).unwrap_or_default(),
        cwd: &|id| case(id).map(|(name, ..)| format!("/srv/{name} d")),
        variable: &|id, name| {
            let of_ours = environment.iter().filter(|_| id.pid == 99);
            of_ours.into_iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        },
        user: &|uid| (uid == 1000).then(|| "al".to_owned()),
        euid: 0,
    };
    let mut process = Process::bare(stat(99).unwrap().id(), "server");
    process.ppid = stat(99).unwrap().ppid;
    process.cgroup = Some(cgroup.to_owned());
    Supervisor::find(&process, &sight)
}

/// `want`: its description, its command (`-` for none) and whether it may restart.
#[track_caller]
fn check(ancestors: &[Case<'_>], cgroup: &str, environment: &[(&str, &str)], want: Option<(&str, &str, bool)>) {
    let found = find(ancestors, cgroup, environment);
    let got = found.as_ref().map(|it| (it.describe(), it.stop_command().unwrap_or("-").to_owned(), it.may_restart()));
    let want = want.map(|(label, stop, may)| (label.to_owned(), stop.to_owned(), may));
    assert_eq!(got, want, "{ancestors:?} {cgroup}");
}

#[test]
fn units_and_containers_are_read_from_cgroups() {
    let check = |cgroup: &str, label: &str, stop: &str| {
        check(&[], &cgroup.replace("ID", ID).replace("USER", USER), &[], Some((label, stop, true)));
    };
    check("/system.slice/nginx.service", "unit nginx.service", "systemctl stop nginx.service");
    check("/system.slice/getty@tty1.service", "unit getty@tty1.service", "systemctl stop getty@tty1.service");
    check(r"/a.slice/my\x2dweb.service", r"unit my\x2dweb.service", r"systemctl stop 'my\x2dweb.service'");
    check("/a.slice/_cpu.service", "unit cpu.service", "systemctl stop cpu.service");
    check("/a.slice/-x.service", "unit -x.service", "systemctl stop -- -x.service");
    check("/a.slice/$(id).service", "unit $(id).service", "systemctl stop '$(id).service'");
    check("USER/web.service", "user unit web.service", "systemctl --user -M al@ stop web.service");
    let nobody = "/user.slice/user-7.slice/user@7.service/app.slice/web.service";
    check(nobody, "user unit web.service", "systemctl --user -M 7@ stop web.service");
    let own = "/user.slice/user-0.slice/user@0.service/app.slice/web.service";
    check(own, "user unit web.service", "systemctl --user stop web.service");

    let label = "container 0123456789ab";
    check("/docker/ID", label, "docker stop 0123456789ab");
    check("/machine.slice/libpod-ID.scope", label, "podman stop 0123456789ab");
    check("USER/libpod-ID.scope", label, "sudo -u '#1000' podman stop 0123456789ab");
    check("/default/ID", label, "nerdctl stop 0123456789ab");
    check("/kubepods.slice/cri-containerd-ID.scope", label, "-");
    check("/kubepods.slice/docker-ID.scope", label, "-");
    check("/ci/ID", label, "-");
}

#[test]
fn supervisors_with_a_command_are_known() {
    let node = ("node", "node|/srv/app.js", false);
    let god = ("PM2 v7.0.4: God", "PM2 v7.0.4: God Daemon (/home/al/.pm2)", false);
    let elsewhere = ("PM2 v5.3.0: God", "PM2 v5.3.0: God Daemon (/srv/my pm2)", false);
    let fork = [("pm_id", "0"), ("name", "my app")];
    let cluster = [("pm2_env", r#"{"name":"web","pm_id":3}"#)];
    let group = [("SUPERVISOR_PROCESS_NAME", "web_00"), ("SUPERVISOR_GROUP_NAME", "web")];
    let single = [("SUPERVISOR_PROCESS_NAME", "web"), ("SUPERVISOR_GROUP_NAME", "web")];
    let supervisord = ("supervisord", "/usr/bin/python3|/usr/bin/supervisord|-n|-c|/etc/my web.conf", false);
    let shell = ("sh", "/bin/sh|-c|npm start", false);
    for (ancestors, environment, label, stop) in [
        (&[god][..], &fork[..], "pm2 (10)", "pm2 stop 'my app'"),
        (&[god], &[("pm_id", "4")], "pm2 (10)", "pm2 stop 4"),
        (&[god], &[("pm_id", "4"), ("name", "-x")], "pm2 (10)", "pm2 stop -- -x"),
        (&[god], &[("pm_id", "4"), ("name", "a\x1b]0;b\n")], "pm2 (10)", r"pm2 stop $'a\x1b]0;b\x0a'"),
        (&[god, node], &cluster, "pm2 (10)", "pm2 stop web"),
        (&[god], &[("pm2_env", "no json")], "pm2 (10)", "-"),
        (&[god], &[("name", "somebody else's")], "pm2 (10)", "-"),
        (&[elsewhere, shell, node], &fork, "pm2 (10)", "PM2_HOME='/srv/my pm2' pm2 stop 'my app'"),
        (&[supervisord], &group, "supervisord (10)", "supervisorctl -c '/etc/my web.conf' stop web:web_00"),
        (
            &[("supervisord", "/usr/bin/python3|/usr/bin/supervisord", false)],
            &single,
            "supervisord (10)",
            "supervisorctl stop web",
        ),
        (&[supervisord], &[], "supervisord (10)", "-"),
        (&[("runsv", "runsv|web", false), shell], &[], "runsv (10)", "sv stop '/srv/runsv d'"),
        (&[("s6-supervise", "s6-supervise|web", false)], &[], "s6-supervise (10)", "s6-svc -d '/srv/s6-supervise d'"),
        (&[("supervise", "supervise|web", false)], &[], "supervise (10)", "svc -d '/srv/supervise d'"),
        (
            &[("supervise-daemo", "supervise-daemon|web|--start|/bin/x", false)],
            &[],
            "supervise-daemo (10)",
            "rc-service web stop",
        ),
        (&[("cron", "/usr/sbin/cron|-f", false), shell], &[], "cron (10)", "-"),
    ] {
        // It knows the process better than the unit does in which all of it runs.
        for cgroup in ["/", "/system.slice/supervisor.service"] {
            check(ancestors, cgroup, environment, Some((label, stop, true)));
        }
    }
    // The nearest counts; what is in a container is stopped from outside.
    check(&[god, ("runsv", "runsv|web", false)], "/", &fork, Some(("runsv (11)", "sv stop '/srv/runsv d'", true)));
    let inside = format!("/docker/{ID}");
    check(&[god], &inside, &fork, Some(("container 0123456789ab", "docker stop 0123456789ab", true)));
}

#[test]
fn parents_that_may_start_it_again_are_told_from_those_that_do_not() {
    let bash = ("bash", "-bash", true);
    let script = ("sh", "sh|/srv/loop.sh", true);
    let make = ("make", "make|serve", true);
    let npm = ("npm run dev", "npm run dev", true);
    let command = ("sh", "sh|-c|node server.js", true);
    let said = "a shell that may start it again";
    for (ancestors, want) in [
        (&[][..], None),
        (&[bash], None),
        (&[("zsh", "zsh|-l|--login|-o|vi", true)], None),
        (&[("tmux: server", "tmux|new|-d|server", false)], None),
        (&[("sshd", "sshd: al@notty", false)], None),
        (&[("systemd", "/usr/lib/systemd/systemd|--user", false)], None),
        (&[bash, script], Some((format!("sh (11), {said}: sh /srv/loop.sh"), "kill 11", true))),
        (
            &[("loop.sh", "/bin/bash|./loop.sh", true)],
            Some((format!("loop.sh (10), {said}: /bin/bash ./loop.sh"), "kill 10", true)),
        ),
        (&[("sh", "sh", false)], Some((format!("sh (10), {said}: sh"), "kill 10", true))),
        (&[bash, ("bash", "-bash", true)], Some((format!("bash (11), {said}: -bash"), "kill 11", true))),
        (
            &[("sh", "sh|-ec|while :; do node x; done", false)],
            Some((format!("sh (10), {said}: sh -ec while :; do node x; done"), "kill 10", true)),
        ),
        (&[("sh", "sh|-c|a; b", false)], Some((format!("sh (10), {said}: sh -c a; b"), "kill 10", true))),
        (&[script, npm, command], Some((format!("sh (10), {said}: sh /srv/loop.sh"), "kill 10", true))),
        (&[bash, npm, command], Some(("npm run dev (11): npm run dev".to_owned(), "-", false))),
        (&[bash, make], Some(("make (11): make serve".to_owned(), "-", false))),
        (
            &[("foreman", "foreman: master", true), command],
            Some(("foreman (10): foreman: master".to_owned(), "-", false)),
        ),
        (
            &[("docker-init", "/sbin/docker-init|--|node|x", false)],
            Some(("docker-init (10): /sbin/docker-init -- node x".to_owned(), "-", false)),
        ),
        (
            &[("node", "node|/usr/lib/node_modules/nodemon/bin/nodemon.js|x.js", true), command],
            Some(("node (10): node /usr/lib/node_modules/nodemon/bin/nodemon.js x.js".to_owned(), "kill 10", true)),
        ),
        (&[("node", "node|--watch|x.js", true)], Some(("node (10): node --watch x.js".to_owned(), "kill 10", true))),
        (&[("node", "node|x.js|--watch", true)], Some(("node (10)".to_owned(), "kill 10", true))),
        (
            &[("cargo-watch", "/home/al/.cargo/bin/cargo-watch|watch|-x|run", true)],
            Some(("cargo-watch (10): /home/al/.cargo/bin/cargo-watch watch -x run".to_owned(), "kill 10", true)),
        ),
        (
            &[("python3", "python3|-m|honcho|start", true)],
            Some(("python3 (10): python3 -m honcho start".to_owned(), "-", false)),
        ),
        (
            &[("python3.12", "/usr/bin/python3.12|-W|x|/usr/bin/watchmedo|auto-restart", true)],
            Some((
                "python3.12 (10): /usr/bin/python3.12 -W x /usr/bin/watchmedo auto-restart".to_owned(),
                "kill 10",
                true,
            )),
        ),
        (&[make, ("runner", "runner", false)], Some(("runner (11)".to_owned(), "kill 11", true))),
    ] {
        check(ancestors, "/", &[], want.as_ref().map(|(label, stop, may)| (label.as_str(), *stop, *may)));
    }
}

#[test]
fn a_unit_is_not_blamed_for_what_somebody_typed_into_its_terminal() {
    let unit = Some(("unit web.service", "systemctl stop web.service", true));
    let script = ("sh", "sh|run.sh", false);
    let web = "/system.slice/web.service";
    check(&[("nginx", "nginx: master", false)], web, &[], unit);
    check(&[script], web, &[], unit);
    check(&[("sshd", "sshd: al@pts/0", false), ("bash", "-bash", true)], web, &[], None);
    check(&[("sshd", "sshd: al@notty", false)], web, &[], None);
    let manager = ("systemd", "/usr/lib/systemd/systemd|--user", false);
    check(
        &[manager, script],
        &format!("{USER}/web.service"),
        &[],
        Some(("user unit web.service", "systemctl --user -M al@ stop web.service", true)),
    );
}

#[test]
fn words_are_quoted_for_a_shell() {
    for (word, want) in [
        ("", "''"),
        ("web-1.2_x/y@z:a", "web-1.2_x/y@z:a"),
        ("#x", "'#x'"),
        ("~", "'~'"),
        ("a b", "'a b'"),
        ("it's", r"'it'\''s'"),
        ("$(rm)", "'$(rm)'"),
        (r"a\x2db", r"'a\x2db'"),
        ("a\n'\\", r"$'a\x0a\'\\'"),
        ("\u{202e}é", r"$'\xe2\x80\xaeé'"),
        ("é", "'é'"),
    ] {
        assert_eq!(quote(word), want);
        // A shell that reads it back: `$'…'` is not of every sh.
        let read_back = std::process::Command::new("bash").args(["-c", &format!("printf %s {want}")]).output();
        if let Ok(output) = read_back {
            assert_eq!(String::from_utf8_lossy(&output.stdout), word, "{want}");
        }
    }
}

#[test]
fn json_is_as_promised() {
    let unit = find(&[], &format!("{USER}/web.service"), &[]).unwrap();
    let expected = r#"{"pid":null,"name":null,"unit":"web.service","container":null,"kind":"systemd","user_manager":1000,"command":null,"restarts":null,"stop":"systemctl --user -M al@ stop web.service"}"#;
    assert_eq!(serde_json::to_string(&unit).unwrap(), expected);
    let runsv = find(&[("runsv", "runsv|web", false)], "/", &[]).unwrap();
    let expected = r#"{"pid":10,"name":"runsv","unit":null,"container":null,"kind":"runit","user_manager":null,"command":"runsv web","restarts":true,"stop":"sv stop '/srv/runsv d'"}"#;
    assert_eq!(serde_json::to_string(&runsv).unwrap(), expected);
}
