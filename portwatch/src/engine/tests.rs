use std::os::unix::net::UnixListener;
use std::time::Instant;

use super::*;

fn summary(json: &str) -> Option<Container> {
    container(serde_json::from_str(json).unwrap())
}

const ID: &str = "8c684518d25e68aa869d3a17079d02d27646a0b5d15b01bba9ee16e1f523ce58";

#[test]
fn a_container_is_read_as_docker_tells_it() {
    let told = format!(
        r#"{{"Id":"{ID}","Names":["/other/alias","/web"],"Image":"busybox","State":"running","Ports":[
        {{"IP":"::","PrivatePort":80,"PublicPort":8123,"Type":"tcp"}},
        {{"IP":"127.0.0.1","PrivatePort":80,"PublicPort":8122,"Type":"tcp"}},
        {{"PrivatePort":443,"Type":"tcp"}}, {{"IP":"0.0.0.0","PrivatePort":9,"PublicPort":9,"Type":"sctp"}},
        {{"IP":"","PrivatePort":53,"PublicPort":8123,"Type":"udp"}}],
        "NetworkSettings":{{"Networks":{{"bridge":{{"IPAddress":"172.17.0.2","GlobalIPv6Address":""}}}}}}}}"#
    );
    let port = |proto, ip: &str, host_port, container_port| PublishedPort {
        proto,
        host_ip: ip.parse().ok(),
        host_port,
        container_port,
    };
    let want = Container {
        id: ID.to_owned(),
        name: "web".to_owned(),
        image: "busybox".to_owned(),
        ports: vec![
            port(Protocol::Tcp, "127.0.0.1", 8122, 80),
            port(Protocol::Tcp, "::", 8123, 80),
            port(Protocol::Udp, "", 8123, 53),
        ],
        addresses: vec!["172.17.0.2".parse().unwrap()],
    };
    assert_eq!(summary(&told), Some(want));
}

#[test]
fn a_name_that_a_shell_would_take_apart_is_not_used() {
    for (names, want) in [
        (r#"["/web_1.x-y"]"#, "web_1.x-y"),
        (r#"["/$(reboot)"]"#, "8c684518d25e"),
        (r#"["/-rf"]"#, "8c684518d25e"),
        (r#"["/a b"]"#, "8c684518d25e"),
        ("[]", "8c684518d25e"),
        ("null", "8c684518d25e"),
    ] {
        assert_eq!(summary(&format!(r#"{{"Id":"{ID}","Names":{names}}}"#)).unwrap().name, want, "{names}");
    }
    assert_eq!(summary(r#"{"Id":"../../x","Names":["/web"]}"#), None);
    assert_eq!(summary("{}"), None);
}

#[test]
fn a_hung_engine_and_a_stranger_at_the_socket_are_told_in_a_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let open = |path: &str| Engine::open(Address::Unix(path.to_owned())).map(|_| ()).unwrap_err().message;

    // Nobody accepts: the connection stands, and no answer comes.
    let hung = path("hung");
    let _listener = UnixListener::bind(&hung).unwrap();
    let started = Instant::now();
    assert_eq!(open(&hung), format!("the container engine at {hung} did not answer within 2 s"));
    assert!(started.elapsed() < TIMEOUT * 2, "{:?}", started.elapsed());

    let stale = path("stale");
    drop(UnixListener::bind(&stale).unwrap());
    assert_eq!(open(&stale), format!("no container engine answers at {stale}; is it running?"));
    assert_eq!(open(&path("none")), format!("no container engine answers at {}; is it running?", path("none")));

    let stranger = path("stranger");
    let listener = UnixListener::bind(&stranger).unwrap();
    let thread = std::thread::spawn(move || {
        use std::io::Write;
        listener.accept().unwrap().0.write_all(b"220 mail\x1b[2J\r\n").unwrap();
    });
    let message = open(&stranger);
    assert!(message.starts_with(&format!("cannot talk to the container engine at {stranger}: ")), "{message}");
    assert!(!message.contains('\u{1b}'), "{message:?}");
    thread.join().unwrap();
}

#[test]
fn a_socket_that_may_not_be_used_is_told_as_denied() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("NOT TESTED: only root can become nobody");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let path = socket.to_str().unwrap().to_owned();
    let permit = |path: &std::path::Path, mode| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    permit(&socket, 0o600);
    // First the directory may not be searched, then the socket not be connected to.
    for mode in [0o700, 0o755] {
        permit(directory.path(), mode);
        let error = std::thread::scope(|scope| {
            let nobody = scope.spawn(|| {
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
                Engine::at(&format!("unix://{path}")).unwrap_err()
            });
            nobody.join().unwrap()
        });
        let message = format!(
            "not permitted to ask the container engine at {path}; be a member of its group (docker), or use sudo"
        );
        assert_eq!(error, EngineError { message, denied: true });
    }
}
