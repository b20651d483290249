//! When each rule fires for each listener: a queue of deadlines that changes of the table keep. Pure.
//!
//! ```text
//!             opened, or holders changed                        due                kill: tried again once it is
//!   (none) ─────────────────────────────► waits for its age ─────────► fired ───── twice as old, for it is still there
//!      ▲                                       │                         │         report: never again
//!      └────────────── closed ─────────────────┴─────────────────────────┘
//! ```
//! Who holds a listener may change its title, its directory or its parent, and nobody is told: so a listener waits for its
//! age wherever its socket is met, and when it is old enough it is seen whether its holders are.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use super::{Action, Match, Rule, State};
use crate::model::{BootNs, Change, Listener, SocketId};
use crate::wire::Selection;

/// Least time after which a rule fires again for a server that it could not end.
const AGAIN: Duration = Duration::from_mins(1);

/// By cookie, or by inode where there is none.
type Key = (bool, u64);

/// What is to happen when.
#[derive(Debug, Default)]
pub struct Queue {
    rules: Vec<Rule>,
    /// Of each listener, the rules that meet it.
    entries: HashMap<Key, Vec<Entry>>,
    deadlines: BTreeSet<(BootNs, Key, usize)>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Index into [`Queue::rules`].
    rule: usize,
    id: SocketId,
    at: Option<BootNs>,
    fired: bool,
}

/// A rule that fires now.
#[derive(Clone, Debug)]
pub struct Due {
    pub rule: Rule,
    pub id: SocketId,
}

impl Queue {
    /// Other rules from now on, for these listeners, which are all that there are. What the old ones did is forgotten.
    pub fn replace<'a>(&mut self, rules: Vec<Rule>, listeners: impl IntoIterator<Item = &'a Listener>) {
        *self = Queue { rules, ..Queue::default() };
        for listener in listeners {
            self.consider(listener);
        }
    }

    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Takes in what happened.
    pub fn change(&mut self, change: &Change) {
        match change {
            Change::Opened { listener, .. } | Change::Holders { listener, .. } => self.consider(listener),
            Change::Closed { listener, .. } => drop(self.forget(listener.socket.id)),
            Change::Conflict { .. } | Change::Resync { .. } => {}
        }
    }

    /// When the next rule fires.
    pub fn next(&self) -> Option<BootNs> {
        self.deadlines.first().map(|(at, ..)| *at)
    }

    /// What fires by `now`. What is ended is gone from here with its listener; until then it is due again later.
    pub fn take_due(&mut self, now: BootNs) -> Vec<Due> {
        let mut due = Vec::new();
        while let Some(&(at, key, rule)) = self.deadlines.first().filter(|(at, ..)| *at <= now) {
            self.deadlines.remove(&(at, key, rule));
            let entry = self.entries.get_mut(&key).and_then(|all| all.iter_mut().find(|entry| entry.rule == rule));
            let (Some(entry), Some(it)) = (entry, self.rules.get(rule)) else { continue };
            entry.fired = true;
            entry.at = (it.action == Action::Kill).then(|| again(it, now));
            if let Some(at) = entry.at {
                self.deadlines.insert((at, key, rule));
            }
            due.push(Due { rule: it.clone(), id: entry.id });
        }
        due
    }

    /// What fired was not met after all. It is looked at again when its holders change; and where a rule asks for what changes
    /// by itself, such as a lost parent, once it is as old again.
    pub fn does_not_meet(&mut self, rule: &str, id: SocketId, now: BootNs) {
        let Some(index) = self.rules.iter().position(|it| it.name == rule) else { return };
        let Some(key) = keys(id).find(|key| self.entries.contains_key(key)) else { return };
        let entry = self.entries.get_mut(&key).and_then(|all| all.iter_mut().find(|entry| entry.rule == index));
        let Some(entry) = entry.filter(|entry| entry.fired) else { return };
        if let Some(at) = entry.at {
            self.deadlines.remove(&(at, key, index));
        }
        let rule = &self.rules[index];
        entry.fired = false;
        entry.at = rule.selector.needs_facts().then(|| again(rule, now));
        if let Some(at) = entry.at {
            self.deadlines.insert((at, key, index));
        }
    }

    /// The rules as they stand, for these listeners, which are all that there are.
    pub fn states<'a>(&self, listeners: impl IntoIterator<Item = &'a Listener>, dry_run: bool) -> Vec<State> {
        let state = |rule: &Rule| State {
            name: rule.name.clone(),
            action: rule.action,
            selection: Selection::of(&rule.selector),
            older_than_ms: u64::try_from(rule.older_than.as_millis()).unwrap_or(u64::MAX),
            grace_ms: u64::try_from(rule.grace.as_millis()).unwrap_or(u64::MAX),
            remove_cwd: rule.remove_cwd.as_ref().map(|glob| glob.glob().glob().to_owned()),
            dry_run,
            matches: Vec::new(),
        };
        let mut states: Vec<State> = self.rules.iter().map(state).collect();
        for listener in listeners {
            let entries = keys(listener.socket.id).find_map(|key| self.entries.get(&key));
            for Entry { rule, at, fired, .. } in entries.into_iter().flatten() {
                states[*rule].matches.push(Match { listener: listener.clone(), at: *at, fired: *fired });
            }
        }
        for state in &mut states {
            state.matches.sort_by_key(|it| (it.at.unwrap_or(BootNs::MAX), it.listener.socket.port));
        }
        states
    }

    fn consider(&mut self, listener: &Listener) {
        let before = self.forget(listener.socket.id);
        let Some(key) = keys(listener.socket.id).next() else { return };
        let mut entries = Vec::new();
        for (index, rule) in self.rules.iter().enumerate() {
            if !rule.selector.matches_socket(&listener.socket) {
                continue;
            }
            let fired = before.iter().find(|entry| entry.rule == index && entry.fired);
            let at = match fired {
                Some(fired) => fired.at,
                None => listener.began().map(|began| began.saturating_add(nanoseconds(rule.older_than))),
            };
            if let Some(at) = at {
                self.deadlines.insert((at, key, index));
            }
            entries.push(Entry { rule: index, id: listener.socket.id, at, fired: fired.is_some() });
        }
        if !entries.is_empty() {
            self.entries.insert(key, entries);
        }
    }

    /// What was known of a socket, which may have been known by less than now.
    fn forget(&mut self, id: SocketId) -> Vec<Entry> {
        let mut known = Vec::new();
        for key in keys(id) {
            for entry in self.entries.remove(&key).unwrap_or_default() {
                if let Some(at) = entry.at {
                    self.deadlines.remove(&(at, key, entry.rule));
                }
                known.push(entry);
            }
        }
        known
    }
}

fn keys(id: SocketId) -> impl Iterator<Item = Key> {
    [(true, id.cookie), (false, id.inode)].into_iter().filter(|(_, number)| *number != 0)
}

fn again(rule: &Rule, now: BootNs) -> BootNs {
    now.saturating_add(nanoseconds(rule.older_than.max(AGAIN)))
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Holder, Process, ProcessId, Socket};
    use crate::select::{Filters, Selector, Sets, glob, parse_targets};

    const SECOND: u64 = 1_000_000_000;

    fn rule(name: &str, ports: &str, seconds: u64, action: Action) -> Rule {
        Rule {
            name: name.to_owned(),
            selector: Selector::new(parse_targets(&[ports], &Sets::new()).unwrap(), Filters::default()),
            older_than: Duration::from_secs(seconds),
            action,
            grace: Duration::ZERO,
            remove_cwd: None,
        }
    }

    fn listener(port: u16, since: Option<BootNs>, started: BootNs) -> Listener {
        let process = Arc::new(Process::bare(ProcessId { pid: 7, start: started }, "x"));
        let id = SocketId { inode: u64::from(port), cookie: u64::from(port) + 100_000 };
        let socket = Socket { id, ..Socket::example("127.0.0.1", port) };
        Listener { socket, since, holders: vec![Holder { process, fds: Vec::new(), binder: true }] }
    }

    fn queue() -> Queue {
        let mut queue = Queue::default();
        let rules = vec![rule("kill", "8000-8010", 100, Action::Kill), rule("tell", "8005-8020", 10, Action::Report)];
        queue.replace(rules, &[listener(8000, Some(5 * SECOND), SECOND), listener(8006, None, 2 * SECOND)]);
        queue
    }

    fn due(queue: &mut Queue, now: BootNs) -> Vec<(String, u64)> {
        queue.take_due(now).into_iter().map(|due| (due.rule.name, due.id.inode)).collect()
    }

    #[test]
    fn a_rule_fires_when_a_listener_is_old_enough_and_not_before() {
        let mut queue = queue();
        assert_eq!(queue.next(), Some(12 * SECOND));
        assert_eq!(due(&mut queue, 12 * SECOND - 1), []);
        assert_eq!(due(&mut queue, 12 * SECOND), [("tell".to_owned(), 8006)]);
        // A report is made once; a process started 2 s after boot is 100 s old at 102.
        assert_eq!(queue.next(), Some(102 * SECOND));
        assert_eq!(due(&mut queue, 110 * SECOND), [("kill".to_owned(), 8006), ("kill".to_owned(), 8000)]);
        // They are still there: again, once they are as old again.
        assert_eq!(queue.next(), Some(210 * SECOND));
    }

    #[test]
    fn what_closes_is_forgotten_and_nothing_waits_for_nothing() {
        let mut queue = queue();
        for port in [8000, 8006] {
            let listener = listener(port, None, SECOND);
            queue.change(&Change::Closed { at: 6 * SECOND, listener, by: None });
        }
        assert_eq!(queue.next(), None);
        let opened = |port| Change::Opened { at: SECOND, listener: listener(port, Some(SECOND), 0) };
        queue.change(&opened(9000));
        assert_eq!(queue.next(), None);
        queue.change(&opened(8020));
        assert_eq!(queue.next(), Some(11 * SECOND));
    }

    #[test]
    fn what_is_known_better_later_replaces_what_was_known() {
        let mut queue = queue();
        let unknown = listener(8020, None, 0);
        queue.change(&Change::Opened { at: SECOND, listener: unknown.clone() });
        assert_eq!(queue.next(), Some(12 * SECOND), "of unknown age is not old");
        let mut by_inode = listener(8020, Some(SECOND), 0);
        by_inode.socket.id.cookie = 0;
        queue.change(&Change::Holders { at: SECOND, listener: by_inode });
        assert_eq!(queue.next(), Some(11 * SECOND));
        queue.change(&Change::Holders { at: SECOND, listener: listener(8020, Some(3 * SECOND), 0) });
        assert_eq!(queue.next(), Some(12 * SECOND));
        assert_eq!(due(&mut queue, 13 * SECOND).len(), 2);
        // What fired stays fired, whoever holds it now.
        queue.change(&Change::Holders { at: SECOND, listener: listener(8020, Some(3 * SECOND), 0) });
        assert_eq!(queue.next(), Some(102 * SECOND));
    }

    #[test]
    fn what_is_not_met_when_it_is_due_waits_for_other_holders_or_for_as_long_again() {
        let with = |name, change: fn(&mut Filters)| {
            let rule = rule(name, "8000", 100, Action::Report);
            Rule { selector: rule.selector.filtered(change), ..rule }
        };
        let mut queue = Queue::default();
        let orphans = with("orphans", |filters| filters.orphans = true);
        let named = with("named", |filters| filters.commands = vec![glob("other").unwrap()]);
        let server = listener(8000, Some(SECOND), 0);
        queue.replace(vec![orphans, named], [&server]);
        assert_eq!(due(&mut queue, 101 * SECOND).len(), 2);
        assert_eq!(queue.next(), None, "a report is made once");
        for name in ["orphans", "named", "another"] {
            queue.does_not_meet(name, server.socket.id, 101 * SECOND);
        }
        assert_eq!(queue.next(), Some(201 * SECOND), "but none was made");
        assert_eq!(due(&mut queue, 201 * SECOND), [("orphans".to_owned(), 8000)]);
        queue.change(&Change::Holders { at: 202 * SECOND, listener: server });
        assert_eq!(due(&mut queue, 202 * SECOND), [("named".to_owned(), 8000)]);
    }

    #[test]
    fn the_state_tells_what_is_met_and_when_it_fires() {
        let mut queue = queue();
        queue.take_due(20 * SECOND);
        let all = [listener(8000, Some(5 * SECOND), SECOND), listener(8006, None, 2 * SECOND), listener(1, None, 1)];
        let told: Vec<(String, Vec<_>)> = queue
            .states(&all, true)
            .into_iter()
            .map(|state| {
                assert!(state.dry_run);
                let matches = state.matches.iter().map(|it| (it.listener.socket.port, it.at, it.fired)).collect();
                (state.name, matches)
            })
            .collect();
        let expected = [
            ("kill".to_owned(), vec![(8006, Some(102 * SECOND), false), (8000, Some(105 * SECOND), false)]),
            ("tell".to_owned(), vec![(8006, None, true)]),
        ];
        assert_eq!(told, expected);
    }
}
