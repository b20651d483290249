//! Ports on which nobody listens and bind() fails, and those that are not to be taken for that.

use std::net::{SocketAddr, UdpSocket};

use serde_json::{Value, json};

use super::{check_promise, check_status, kill, kill_text, message};
use crate::puppet::{Puppet, Stage};
use crate::subject::{event_tiers, portwatch};
use crate::{Test, test};

pub(super) fn trials() -> Vec<Test> {
    vec![
        test("stubborn::connections_without_reuseaddr_keep_the_port_and_are_told", || {
            let stage = Stage::new();
            let (server, client) = (stage.puppet(), stage.puppet());
            let sock = server.serve();
            client.connect(sock.address);
            server.accept(sock.fd);
            let (out, err) = kill_text(sock.address, &[], 1, &[(&server, "NAME")]);
            let sudo = if rustix::process::geteuid().is_root() { "" } else { "sudo " };
            assert_eq!(
                out,
                format!(
                    "PORT/tcp cannot be bound yet: terminated NAME; nobody listens, but bind() fails with EADDRINUSE: \
                     1 connection in FIN_WAIT2 of the old server, made without SO_REUSEADDR: the kernel ends it within \
                     two minutes\n  → {sudo}ss -Kt 'sport = :PORT'\n"
                )
            );
            assert_eq!(err, "NAME: SIGTERM sent\nNAME: ended in TIME\n");
            // The client closes second: the server's end has to wait.
            client.exit();
            let outcome = kill(sock.address, &[], 1);
            check_status(&outcome, "stuck", &[], &[]);
            assert_eq!(outcome["diagnostics"]["findings"][0]["kind"], "time_wait", "{outcome}");
            assert_eq!(outcome["still_listening"], false, "{outcome}");
            assert_eq!(
                message(&outcome),
                "nobody listens, but bind() fails with EADDRINUSE: 1 connection in TIME_WAIT made without \
                 SO_REUSEADDR: the kernel ends it within 60 s"
            );
        }),
        test("stubborn::connections_with_reuseaddr_are_in_nobodys_way", || {
            let stage = Stage::new();
            let (server, client) = (stage.puppet(), stage.puppet());
            let sock = server.tcp("127.0.0.1:0", "reuseaddr");
            client.connect(sock.address);
            server.accept(sock.fd);
            check_status(&kill(sock.address, &[], 0), "cleaned", &[&server], &[]);
            assert!(client.is_alive());
        }),
        test("stubborn::a_connection_that_its_worker_keeps_is_named", || {
            let stage = Stage::new();
            let (server, client) = (stage.puppet(), stage.puppet());
            let sock = server.serve();
            client.connect(sock.address);
            server.accept(sock.fd);
            server.release_on_term(sock.fd);
            let outcome = kill(sock.address, &[], 1);
            check_status(&outcome, "stuck", &[], &[]);
            assert_eq!(outcome["remaining_pids"], json!([server.pid]), "{outcome}");
            let message = message(&outcome);
            let expected = format!("({}) made without SO_REUSEADDR", server.pid);
            assert!(message.contains("1 connection in ESTABLISHED of ") && message.ends_with(&expected), "{message}");
        }),
        test("stubborn::a_socket_that_is_bound_and_does_not_listen_is_in_the_way", || {
            let stage = Stage::new();
            let squatter = stage.puppet();
            let sock = squatter.bind("127.0.0.1:0", "");
            let outcome = kill(sock.address, &[], 1);
            check_status(&outcome, "stuck", &[], &[]);
            let message = message(&outcome);
            // Kernels before 6.8 show no such socket.
            let named = format!("({}) has it bound and does not listen", squatter.pid);
            assert!(
                message.ends_with(&named) || message.ends_with("some socket has it bound and does not listen"),
                "{message}"
            );
            assert!(squatter.is_alive());
        }),
        test("stubborn::a_udp_socket_with_a_peer_keeps_its_port_until_it_is_closed", || {
            let stage = Stage::new();
            let server = stage.puppet();
            let sock = server.udp("127.0.0.1:0", "");
            server.peer(sock.fd, "127.0.0.1:9");
            server.ignore_term();
            let target = format!("{}/udp", sock.port());
            let words = ["kill", &target, "--no-agent", "--grace", "100ms", "--settle", "0", "--json"];
            // Without the iterator nothing tells whether it was bound or has its port by chance. bind() tells that it has it.
            let run = portwatch(&[&words[..], &["--probe", "poll"]].concat()).expect(1);
            let outcome = run.json()[0].take();
            check_status(&outcome, "stuck", &[], &[]);
            let named = format!("({}) has it bound and hears one peer alone", server.pid);
            assert!(message(&outcome).ends_with(&named), "{outcome}");
            assert!(UdpSocket::bind(sock.address).is_err() && server.is_alive());
            if event_tiers().is_empty() {
                return;
            }
            let run = portwatch(&words).expect(0);
            check_status(&run.json()[0], "cleaned", &[&server], &[&server]);
            UdpSocket::bind(sock.address).expect("exit code 0 means that it can be bound");
        }),
        test("stubborn::of_two_addresses_only_the_one_meant_is_freed", || {
            let stage = Stage::new();
            let (meant, other) = (stage.puppet(), stage.puppet());
            let sock = meant.serve();
            let twin = SocketAddr::from(([127, 0, 0, 2], sock.port()));
            other.tcp(&twin.to_string(), "");
            let run = portwatch(&["kill", &format!("{}/tcp", sock.address), "--json", "--settle", "0"]).expect(0);
            check_status(&run.json()[0], "cleaned", &[&meant], &[]);
            check_promise(0, &[sock.address]);
            assert!(other.is_alive());
        }),
        test(
            "stubborn::beside_a_listener_on_all_addresses_only_the_one_meant_is_ended_and_the_address_is_not_free",
            || {
                let stage = Stage::new();
                let (meant, other) = (stage.puppet(), stage.puppet());
                let sock = meant.tcp("127.0.0.1:0", "reuseport");
                other.tcp(&SocketAddr::from(([0, 0, 0, 0], sock.port())).to_string(), "reuseport");
                let arguments =
                    ["kill", &format!("{}/tcp", sock.port()), "--addr", "127.0.0.1", "--json", "--settle", "0"];
                for killed in [&[&meant][..], &[]] {
                    let run = portwatch(&arguments).expect(1);
                    let outcome = run.json()[0].take();
                    check_status(&outcome, "partial", killed, &[]);
                    assert_eq!(outcome["remaining_pids"], json!([other.pid]), "{outcome}");
                }
                assert!(other.is_alive());
            },
        ),
        test("stubborn::tcp_and_udp_of_one_port_have_an_outcome_each", || {
            let stage = Stage::new();
            let (tcp, udp) = (stage.puppet(), stage.puppet());
            let sock = tcp.serve();
            udp.udp(&sock.address.to_string(), "");
            let run = portwatch(&["kill", &sock.port().to_string(), "--json", "--settle", "0", "--yes"]).expect(0);
            let outcomes = run.json();
            let protos: Vec<&Value> = outcomes.as_array().expect("an array").iter().map(|o| &o["proto"]).collect();
            assert_eq!(protos, ["tcp", "udp"]);
            check_status(&outcomes[0], "cleaned", &[&tcp], &[]);
            check_status(&outcomes[1], "cleaned", &[&udp], &[]);
            check_promise(0, &[sock.address]);
        }),
        test("stubborn::a_whole_reuseport_group_is_freed", || {
            let stage = Stage::new();
            let group: Vec<Puppet> = (0..4).map(|_| stage.puppet()).collect();
            let sock = group[0].tcp("127.0.0.1:0", "reuseport");
            for twin in &group[1..] {
                twin.tcp(&sock.address.to_string(), "reuseport");
            }
            let outcome = kill(sock.address, &["--yes"], 0);
            check_status(&outcome, "cleaned", &group.iter().collect::<Vec<_>>(), &[]);
        }),
    ]
}
