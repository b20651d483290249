//! The properties by ordinary tests: on the fuzzer's seeds, on seeds with random changes, on random bytes; and round
//! trips of random values, which random bytes seldom reach.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{TestCaseResult, TestRunner};

use super::*;
use crate::model::{Change, Holder, Listener, Process, ProcessId, Protocol, Socket, SocketId};
use crate::select::{Sets, Since, Target, parse_targets};
use crate::wire::{Request, Response, Scope, Selection};

/// Random cases of each property, which together take a second or two.
const CASES: u32 = 256;

fn crate_of_fuzzer() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn names_in(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = crate_of_fuzzer().join("corpus").join(target);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

#[test]
fn every_property_has_its_fuzz_target_and_seeds() {
    let properties: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names_in(&crate_of_fuzzer().join("fuzz_targets")), properties);
    assert_eq!(names_in(&crate_of_fuzzer().join("corpus")), properties);
    let manifest = fs::read_to_string(crate_of_fuzzer().join("Cargo.toml")).unwrap();
    for (name, _) in TARGETS {
        let bin = format!("[[bin]]\nname = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"\n");
        assert!(manifest.contains(&bin), "portwatch/fuzz/Cargo.toml lacks {bin}");
        let code = fs::read_to_string(crate_of_fuzzer().join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(code.contains(&format!("portwatch::fuzzing::{name}(data)")), "{name}.rs calls another");
        assert!(!seeds(name).is_empty(), "{name} has no seed");
    }
}

#[test]
fn properties_hold_for_the_seeds() {
    for (name, property) in TARGETS {
        for seed in seeds(name) {
            property(&seed);
        }
    }
}

/// Runs the cases and says which property it was, and with what input.
fn check<S: Strategy>(name: &str, strategy: &S, test: impl Fn(S::Value) -> TestCaseResult) {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
    if let Err(error) = TestRunner::new(config).run(strategy, test) {
        panic!("{name}: {error}");
    }
}

#[test]
fn properties_hold_for_any_bytes() {
    for (name, property) in TARGETS {
        check(name, &vec(any::<u8>(), 0..512), |bytes| {
            property(&bytes);
            Ok(())
        });
    }
}

/// Bytes that are put at a place instead of so many others.
type Edit = (Index, usize, Vec<u8>);

#[test]
fn properties_hold_for_changed_seeds() {
    // What parsers look for, and numbers at their limits.
    let piece = prop_oneof![
        vec(any::<u8>(), 0..5),
        select(&["\0", "\n", "(", ")", ",", ":", "-", "'", "\u{1b}[2J", "\u{202e}", "65536", "0", "{", "]"][..])
            .prop_map(|text| text.as_bytes().to_vec()),
        Just(vec![0xff; 4]),
    ];
    for (name, property) in TARGETS {
        let edits = vec((any::<Index>(), 0_usize..6, piece.clone()), 1..6);
        check(name, &(select(seeds(name)), edits), |(mut bytes, edits): (Vec<u8>, Vec<Edit>)| {
            for (place, removed, put) in edits {
                let at = place.index(bytes.len() + 1);
                let end = (at + removed).min(bytes.len());
                bytes.splice(at..end, put);
            }
            property(&bytes);
            Ok(())
        });
    }
}

fn protocols() -> impl Strategy<Value = Protocol> {
    select(&[Protocol::Tcp, Protocol::Udp][..])
}

fn targets_of_any_kind() -> impl Strategy<Value = Vec<Target>> {
    let ports = (1..=u16::MAX, 1..=u16::MAX).prop_map(|(a, b)| a.min(b)..=a.max(b));
    let target = (ports, proptest::option::of(protocols()), proptest::option::of(any::<IpAddr>()));
    vec(target.prop_map(|(ports, proto, address)| Target { ports, proto, address }), 0..6)
}

fn processes() -> impl Strategy<Value = Process> {
    let texts = (".{0,15}", vec(".{0,9}", 0..4), proptest::option::of(".{0,9}"), proptest::option::of("/.{0,9}"));
    (any::<[u64; 4]>(), proptest::option::of(any::<u32>()), texts).prop_map(|(numbers, uid, texts)| {
        let (name, command, exe, cwd) = texts;
        let id = ProcessId { pid: numbers[0] as u32, start: numbers[1] };
        Process { id, ppid: numbers[2] as u32, uid, name, command: command.into(), cgroup: exe.clone(), exe, cwd }
    })
}

fn listeners() -> impl Strategy<Value = Listener> {
    let socket = (any::<[u64; 4]>(), protocols(), any::<IpAddr>(), any::<(u16, bool, Option<bool>, Option<u32>)>())
        .prop_map(|(numbers, proto, address, (port, mptcp, v6only, backlog))| Socket {
            id: SocketId { inode: numbers[0], cookie: numbers[1] },
            proto,
            mptcp,
            address,
            port,
            v6only,
            netns: numbers[2] as u32,
            uid: numbers[3] as u32,
            backlog,
        });
    let holder = (processes(), vec(any::<u32>(), 0..3), any::<bool>()).prop_map(|(process, fds, binder)| Holder {
        process: Arc::new(process),
        fds,
        binder,
    });
    (socket, any::<Option<u64>>(), vec(holder, 0..3)).prop_map(|(socket, since, holders)| Listener {
        socket,
        since,
        holders,
    })
}

#[test]
fn targets_are_read_as_they_are_written() {
    check("targets", &targets_of_any_kind(), |targets| {
        let words: Vec<String> = targets.iter().map(Target::to_string).collect();
        people::targets(words.join("\n").as_bytes());
        let expected = Ok(targets);
        prop_assert_eq!(&parse_targets(&words, &Sets::new()), &expected);
        if !words.is_empty() {
            prop_assert_eq!(&parse_targets(&[words.join(",")], &Sets::new()), &expected);
        }
        Ok(())
    });
}

#[test]
fn requests_are_read_as_they_are_written() {
    let selections = (
        (targets_of_any_kind(), any::<[bool; 4]>(), vec(any::<IpAddr>(), 0..3), vec(any::<u32>(), 0..3)),
        (vec("[a-z*?]{0,9}", 0..3), any::<Option<u64>>(), any::<Option<u32>>()),
    );
    check("requests", &selections, |((targets, flags, addresses, uids), (globs, older_than_ms, netns))| {
        let selection = Selection {
            targets: targets.iter().map(Target::to_string).collect(),
            ipv4: flags[0],
            ipv6: flags[1],
            tcp: flags[2],
            udp: flags[3],
            addresses,
            pids: uids.clone(),
            uids,
            commands: globs.clone(),
            cwds: globs.clone(),
            units: globs,
            containers: Vec::new(),
            older_than_ms,
            except: targets.iter().map(Target::to_string).collect(),
            orphans: flags[0],
            cgroups: vec!["/a/b".to_owned()],
            env: vec!["CI=1".to_owned()],
            since: older_than_ms.map(Since::Mark),
            descendants_of: Vec::new(),
            netns: netns.map_or(Scope::All, Scope::Id),
        };
        // All of it arrives, and the selector that it stands for says the same again.
        let line =
            serde_json::to_string(&Request::Watch { selection: selection.clone(), since: older_than_ms }).unwrap();
        let read = serde_json::from_str(&line);
        prop_assert_eq!(read.ok(), Some(Request::Watch { selection: selection.clone(), since: older_than_ms }));
        let selector = selection.selector(None).map_err(TestCaseError::fail)?;
        prop_assert_eq!(Selection::of(&selector), selection);
        Ok(())
    });
}

#[test]
fn answers_are_read_as_they_are_written_and_shown_unharmed() {
    check("answers", &(listeners(), any::<u64>(), any::<bool>()), |(listener, at, is_change)| {
        let answer = match is_change {
            true => Response::Change { change: Change::Opened { at, listener } },
            false => Response::Listener { listener, ancestors: Vec::new(), lineage: Vec::new() },
        };
        let line = serde_json::to_string(&answer).unwrap();
        prop_assert_eq!(serde_json::from_str(&line).ok(), Some(answer));
        response(line.as_bytes());
        Ok(())
    });
}
