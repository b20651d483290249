//! Who was hit that never had the port, and whether what a command said is true. Pure: facts in, complaints out.
//!
//! Identity counts, not numbers: a PID may have been a holder's and then a bystander's.
//!
//! A claim is true or false at a moment, and the adversary goes on between a command's last look and its end. So a claim
//! that does not fit the end is *overtaken* where something that makes the difference happened less than [`STALE_NS`]
//! before, and false where the command had all the time to see it. That the old socket is gone can only become true:
//! who says so while it listens says what never was.

use serde_json::Value;

use super::cast::Part;

/// How old a look may be when a command ends.
pub(super) const STALE_NS: u64 = 100_000_000;

/// How soon who lets go of a port must end for a command to see both.
const AT_ONCE_NS: u64 = 1_000_000;

/// SIGKILL.
const KILL: u32 = 9;

/// One actor when the command had ended. Moments as on the board; 0: never.
#[derive(Clone, Debug)]
pub(super) struct Person {
    pub(super) part: Part,
    pub(super) pid: u32,
    pub(super) held: u64,
    pub(super) let_go: u64,
    pub(super) took: u64,
    pub(super) signalled: u64,
    pub(super) signal: u32,
    /// When it was reaped.
    pub(super) died: u64,
    /// Not reaped, and on its way out.
    pub(super) is_dying: bool,
    /// The signal that ended it; 0: it ended of itself.
    pub(super) killed_by: u32,
}

/// A port when the command had ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PortState {
    pub(super) port: u16,
    /// Whether anybody listens, as the kernel lists it.
    pub(super) listens: bool,
    /// Whether the very socket does that the command was to free.
    pub(super) old_listens: bool,
    /// As bind(2) has it.
    pub(super) bindable: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Ending {
    pub(super) people: Vec<Person>,
    /// That of the round first, then the neighbour's, if there is one.
    pub(super) ports: Vec<PortState>,
    /// When the command was started, and when it had ended.
    pub(super) begun: u64,
    pub(super) ended: u64,
    pub(super) code: Option<i32>,
}

#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Bystanders that got a signal: their part, and the signal.
    pub(super) hits: Vec<(Part, u32)>,
    pub(super) lies: Vec<String>,
    /// How old the look was at the end, in ns, where a claim was overtaken.
    pub(super) overtaken: Option<u64>,
    /// A holder that is said to have been killed, and ended of itself after another was signalled, or in the very moment.
    pub(super) coincidences: usize,
}

impl Person {
    /// Whoever had the round's socket, if only once, is fair game. Nobody else is.
    fn is_bystander(&self) -> bool {
        // Struck before it was handed the socket.
        self.held == 0 || (self.signalled != 0 && self.signalled < self.held)
    }

    fn first_signal(&self) -> u32 {
        if self.signal != 0 { self.signal } else { self.killed_by }
    }

    fn ends(&self) -> bool {
        self.died != 0 || self.let_go != 0 || self.is_dying
    }

    fn may_hold(&self, group: usize) -> bool {
        let of_group = if group == 0 { self.part != Part::Neighbour } else { self.part == Part::Neighbour };
        of_group && (self.held != 0 || self.took != 0)
    }
}

impl Ending {
    /// The last moment in which somebody took the port anew. Who is about to has not written it down yet.
    fn taken(&self, group: usize) -> u64 {
        let is_about_to = |p: &Person| matches!(p.part, Part::Successor | Part::Restarted) && p.died == 0;
        let of = self.people.iter().filter(|_| group == 0);
        of.map(|p| if p.took == 0 && is_about_to(p) { self.ended } else { p.took }).max().unwrap_or(0)
    }

    /// The last moment in which somebody let go of the port.
    fn freed(&self, group: usize) -> u64 {
        let of = self.people.iter().filter(|p| p.may_hold(group));
        of.map(|p| p.let_go.max(p.died)).max().unwrap_or(0)
    }

    fn age(&self, moment: u64) -> u64 {
        self.ended.saturating_sub(moment)
    }

    /// Whether the first signal may have found somebody on its way out, where nobody writes down that it came.
    fn may_have_met(&self, person: &Person) -> bool {
        let Person { let_go, died, .. } = *person;
        let gone = if died == 0 { self.ended } else { died };
        let going = if let_go == 0 { gone } else { let_go };
        gone >= self.begun && going <= self.begun + STALE_NS
    }

    fn anybody_signalled(&self) -> bool {
        self.people.iter().any(|p| p.first_signal() != 0)
    }
}

impl Verdict {
    /// Every bystander that got a signal.
    pub(super) fn of(ending: &Ending) -> Verdict {
        let hit = ending.people.iter().filter(|p| p.is_bystander() && p.first_signal() != 0);
        Verdict { hits: hit.map(|p| (p.part, p.first_signal())).collect(), ..Verdict::default() }
    }

    fn lie(&mut self, text: String) {
        self.lies.push(text);
    }

    /// The claim does not fit the end, which was brought about at `moment` (0: never).
    fn differs(&mut self, ending: &Ending, moment: u64, text: impl FnOnce() -> String) {
        let age = ending.age(moment);
        if moment == 0 || age > STALE_NS {
            let seen = if moment == 0 { String::new() } else { format!(" for {} ms", age / 1_000_000) };
            self.lie(format!("{}{seen}", text()));
        } else {
            self.overtaken = Some(self.overtaken.unwrap_or(0).max(age));
        }
    }

    fn claims_free(&mut self, ending: &Ending, group: usize, claim: &str) {
        let PortState { port, bindable, old_listens, .. } = ending.ports[group];
        if old_listens {
            self.lie(format!("{claim}, but the old socket at {port} still listens"));
        } else if !bindable {
            self.differs(ending, ending.taken(group), || format!("{claim}, but bind() to {port} fails"));
        }
    }

    /// What a peer says: exit code 0 is that the port is free.
    pub(super) fn by_code(mut self, ending: &Ending) -> Verdict {
        if ending.code == Some(0) {
            self.claims_free(ending, 0, "exit code 0");
        }
        self
    }

    /// What portwatch says: the objects of `kill --json`.
    pub(super) fn by_outcomes(mut self, ending: &Ending, outcomes: Option<&Value>) -> Verdict {
        let Some(outcomes) = outcomes.and_then(Value::as_array).filter(|all| all.len() == ending.ports.len()) else {
            self.lie(format!("no outcome for each port, and exit code {:?}", ending.code));
            return self;
        };
        let is_done = |outcome: &Value| matches!(outcome["status"].as_str(), Some("free" | "cleaned"));
        let code = if outcomes.iter().all(is_done) { 0 } else { 1 };
        if ending.code != Some(code) {
            self.lie(format!("exit code {:?} where the outcomes make {code}", ending.code));
        }
        for (group, state) in ending.ports.iter().enumerate() {
            match outcomes.iter().find(|outcome| outcome["port"] == state.port) {
                Some(outcome) => self.outcome(ending, group, outcome, is_done(outcome)),
                None => self.lie(format!("nothing is said of {}", state.port)),
            }
        }
        self
    }

    fn outcome(&mut self, ending: &Ending, group: usize, outcome: &Value, done: bool) {
        let PortState { port, listens, bindable, .. } = ending.ports[group];
        let status = outcome["status"].as_str().unwrap_or("?").to_owned();
        if done {
            self.claims_free(ending, group, &status);
        } else if bindable {
            self.differs(ending, ending.freed(group), || format!("{status}, but bind() to {port} succeeds"));
        }
        if outcome["still_listening"] != listens {
            let moment = ending.freed(group).max(ending.taken(group));
            let claim = &outcome["still_listening"];
            self.differs(ending, moment, || format!("still_listening {claim}, but it is {listens}"));
        }
        let pids = |list: &Value| -> Vec<u32> {
            let pids = list.as_array().into_iter().flatten();
            pids.filter_map(|pid| pid.as_u64().or(pid["pid"].as_u64())?.try_into().ok()).collect()
        };
        let (killed, forced) = (pids(&outcome["killed"]), pids(&outcome["forced"]));
        for &pid in &killed {
            self.killed(ending, group, pid, forced.contains(&pid));
        }
        if let Some(pid) = forced.iter().find(|pid| !killed.contains(pid)) {
            self.lie(format!("{pid} is forced, and not killed"));
        }
        for &pid in pids(&outcome["remaining_pids"]).iter().chain(&pids(&outcome["failed"])) {
            self.remains(ending, group, pid);
        }
        let omitted = |p: &&Person| {
            let is_ours = p.may_hold(group) && !p.is_bystander() && p.held != 0;
            // One who closes the port and goes on is not waited for.
            let at_once = p.let_go == 0 || p.died.saturating_sub(p.let_go) < AT_ONCE_NS;
            let ended = at_once && p.died != 0 && ending.age(p.died) > STALE_NS;
            is_ours && ended && p.first_signal() != 0 && !killed.contains(&p.pid)
        };
        if let Some(person) = ending.people.iter().find(omitted) {
            self.lie(format!("{} was signalled and ended, and is not among the killed", person.pid));
        }
    }

    /// A holder of that number must have ended, after a signal was sent.
    fn killed(&mut self, ending: &Ending, group: usize, pid: u32, forced: bool) {
        let holders: Vec<&Person> =
            ending.people.iter().filter(|p| p.pid == pid && p.held != 0 && p.may_hold(group)).collect();
        let ended: Vec<&&Person> = holders.iter().filter(|p| p.ends()).collect();
        let is_by_it = |p: &&&Person| {
            if forced { p.killed_by == KILL || p.is_dying } else { p.first_signal() != 0 || p.is_dying }
        };
        // Whoever was ended before it, or its parent, had written down who it is may be the one.
        let is_unnamed = |p: &Person| p.pid == 0 && p.held != 0 && p.may_hold(group);
        if ending.people.iter().all(|p| p.pid != pid) && ending.people.iter().any(is_unnamed) {
            return;
        }
        if holders.is_empty() {
            self.lie(format!("{pid} is said to be killed, and never held the port"));
        } else if ended.is_empty() {
            self.lie(format!("{pid} is said to be killed, and lives"));
        } else if !ending.anybody_signalled() && !ended.iter().any(|p| ending.may_have_met(p)) {
            self.lie(format!("{pid} is said to be killed, and nobody was signalled"));
        } else if !ended.iter().any(is_by_it) {
            self.coincidences += 1;
        }
    }

    /// A holder of that number must have had the port, within the time that a look may be old.
    fn remains(&mut self, ending: &Ending, group: usize, pid: u32) {
        let having: Vec<&Person> = ending.people.iter().filter(|p| p.pid == pid && p.may_hold(group)).collect();
        let has = |p: &&Person| (p.let_go == 0 || p.took != 0) && p.died == 0;
        if having.is_empty() {
            self.lie(format!("{pid} is said to have {}, and never had it", ending.ports[group].port));
        } else if !having.iter().any(has) {
            let last = having.iter().map(|p| if p.let_go != 0 { p.let_go } else { p.died }).max().unwrap_or(0);
            self.differs(ending, last, || format!("{pid} is said to have the port, and had let go of it"));
        }
    }
}

#[cfg(test)]
mod tests;
