use serde_json::json;

use super::*;

/// ns of the end of each command here: a second.
const END: u64 = 1_000_000_000;

fn person(part: Part, pid: u32) -> Person {
    Person { part, pid, held: 0, let_go: 0, took: 0, signalled: 0, signal: 0, died: 0, is_dying: false, killed_by: 0 }
}

fn holder(pid: u32) -> Person {
    Person { held: 1, ..person(Part::Holder, pid) }
}

/// A holder that SIGTERM ended.
fn ended(pid: u32) -> Person {
    Person { signalled: END / 2, signal: 15, let_go: END / 2, died: END / 2, ..holder(pid) }
}

fn ending(people: Vec<Person>, listens: bool, code: i32) -> Ending {
    let old_listens = listens && people.iter().all(|p| p.took == 0);
    let ports = vec![PortState { port: 8000, listens, old_listens, bindable: !listens }];
    Ending { people, ports, begun: END / 4, ended: END, code: Some(code) }
}

fn outcome(status: &str, killed: &[u32], remaining: &[u32]) -> Value {
    json!([{
        "port": 8000, "status": status, "killed": killed, "forced": [], "failed": [],
        "still_listening": !remaining.is_empty(), "remaining_pids": remaining
    }])
}

#[test]
fn who_never_had_the_port_is_a_bystander_whatever_its_number() {
    let struck = |person: Person| Person { killed_by: 9, died: END, ..person };
    let heir_before = Person { signalled: 5, signal: 15, held: 7, ..person(Part::Heir, 4) };
    let heir_after = Person { signalled: 9, signal: 15, held: 7, ..person(Part::Heir, 5) };
    for (person, hit) in [
        (struck(person(Part::Recycled, 2)), Some((Part::Recycled, 9))),
        (struck(person(Part::Client, 3)), Some((Part::Client, 9))),
        (Person { took: END / 2, signal: 15, ..person(Part::Successor, 3) }, Some((Part::Successor, 15))),
        (heir_before, Some((Part::Heir, 15))),
        (heir_after, None),
        (struck(holder(2)), None),
        (person(Part::Recycled, 2), None),
    ] {
        let verdict = Verdict::of(&ending(vec![person.clone()], false, 0));
        assert_eq!(verdict.hits, Vec::from_iter(hit), "{person:?}");
    }
}

#[track_caller]
fn check(ending: &Ending, outcomes: &Value, lies: &[&str], overtaken: Option<u64>) {
    let verdict = Verdict::default().by_outcomes(ending, Some(outcomes));
    assert_eq!(
        (&verdict.lies[..], verdict.overtaken),
        (&lies.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()[..], overtaken)
    );
}

#[test]
fn a_true_outcome_is_true() {
    check(&ending(vec![ended(2)], false, 0), &outcome("cleaned", &[2], &[]), &[], None);
    check(&ending(vec![ended(2), holder(3)], true, 1), &outcome("partial", &[2], &[3]), &[], None);
    let successor = Person { took: END / 2, ..person(Part::Successor, 4) };
    check(&ending(vec![ended(2), successor], true, 1), &outcome("respawned", &[2], &[4]), &[], None);
}

#[test]
fn what_never_was_is_a_lie() {
    let fails = "cleaned, but the old socket at 8000 still listens";
    let still = "still_listening false, but it is true for 500 ms";
    check(&ending(vec![ended(2), holder(3)], true, 0), &outcome("cleaned", &[2], &[]), &[fails, still], None);
    let alive = "3 is said to be killed, and lives";
    check(&ending(vec![ended(2), holder(3)], true, 1), &outcome("partial", &[2, 3], &[3]), &[alive], None);
    let recycled = person(Part::Recycled, 9);
    let never = "9 is said to be killed, and never held the port";
    check(&ending(vec![ended(2), recycled], false, 0), &outcome("cleaned", &[2, 9], &[]), &[never], None);
    // Ended before anybody had written down its number, which nobody else has.
    let unnamed = || holder(0);
    check(&ending(vec![ended(2), unnamed()], false, 0), &outcome("cleaned", &[2, 9], &[]), &[], None);
    let recycled = person(Part::Recycled, 9);
    check(&ending(vec![ended(2), unnamed(), recycled], false, 0), &outcome("cleaned", &[2, 9], &[]), &[never], None);
    // It ended of itself: when the signal may have come, before there was a command, and long after its first signal.
    let unstruck = |let_go, died| Person { let_go, died, ..holder(2) };
    let nobody = "2 is said to be killed, and nobody was signalled";
    for (let_go, died, lies) in [
        (END / 4 - 1, END / 4 + 1, &[][..]),
        (0, END / 4 + 1, &[]),
        (END / 4 - 2, END / 4 - 1, &[nobody]),
        (END / 2, END / 2, &[nobody]),
    ] {
        check(&ending(vec![unstruck(let_go, died)], false, 0), &outcome("cleaned", &[2], &[]), lies, None);
    }
    let omitted = "2 was signalled and ended, and is not among the killed";
    check(&ending(vec![ended(2)], false, 0), &outcome("cleaned", &[], &[]), &[omitted], None);
    let code = "exit code Some(0) where the outcomes make 1";
    check(&ending(vec![ended(2), holder(3)], true, 0), &outcome("partial", &[2], &[3]), &[code], None);
}

#[test]
fn what_changed_after_the_last_look_is_no_lie_and_counted() {
    let taken = |took| ending(vec![ended(2), Person { took, ..person(Part::Successor, 4) }], true, 0);
    check(&taken(END - 1_000_000), &outcome("cleaned", &[2], &[]), &[], Some(1_000_000));
    let lies = ["cleaned, but bind() to 8000 fails for 400 ms", "still_listening false, but it is true for 400 ms"];
    check(&taken(END - 400_000_000), &outcome("cleaned", &[2], &[]), &lies, None);
}

#[test]
fn the_exit_code_of_a_peer_is_its_claim() {
    let early = Verdict::default().by_code(&ending(vec![holder(2)], true, 0));
    assert_eq!(early.lies, ["exit code 0, but the old socket at 8000 still listens"]);
    assert_eq!(Verdict::default().by_code(&ending(vec![holder(2)], true, 1)).lies, [""; 0]);
}
