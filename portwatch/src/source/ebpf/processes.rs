//! What is remembered of the processes that events are about. A process that ends lets go of its sockets when /proc has
//! no more of it than a name.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::model::{Process, ProcessId};

/// How many are remembered beyond those who are followed: who tried to bind, who closed all it had, who ended. What they
/// leave behind is told within the time that a few others need.
const PASSING: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Processes {
    known: HashMap<ProcessId, Arc<Process>>,
    /// Each of them once; who is next to be forgotten first.
    order: VecDeque<ProcessId>,
}

impl Processes {
    pub(super) fn get(&self, id: ProcessId) -> Option<&Arc<Process>> {
        self.known.get(&id)
    }

    /// As it is now. `followed` are the PIDs of those who are not forgotten for it.
    pub(super) fn add(&mut self, process: Arc<Process>, followed: &HashSet<u32>) {
        let id = process.id;
        if self.known.insert(id, process).is_none() {
            self.order.push_back(id);
        }
        for _ in 0..self.order.len() {
            if self.order.len() <= PASSING + followed.len() {
                break;
            }
            let Some(oldest) = self.order.pop_front() else { break };
            if followed.contains(&oldest.pid) {
                self.order.push_back(oldest);
            } else {
                self.known.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, name: &str) -> Arc<Process> {
        Arc::new(Process::bare(ProcessId { pid, start: 7 }, name.to_owned()))
    }

    /// Those up to `last`, one after the other.
    fn added(last: u32, followed: &HashSet<u32>) -> Processes {
        let mut processes = Processes::default();
        (1..=last).for_each(|pid| processes.add(process(pid, "a"), followed));
        processes
    }

    #[test]
    fn who_is_followed_stays_and_the_latest_of_the_others() {
        let processes = added(5000, &(1..=1000).collect());
        let known = |pid| processes.get(ProcessId { pid, start: 7 }).is_some();
        assert!((1..=1000).all(known));
        assert_eq!((1001..=5000).filter(|&pid| known(pid)).collect::<Vec<_>>(), (3977..=5000).collect::<Vec<_>>());
    }

    #[test]
    fn they_are_forgotten_once_nobody_follows_them() {
        let mut processes = added(2000, &(1..=2000).collect());
        processes.add(process(2001, "a"), &HashSet::new());
        assert_eq!((processes.known.len(), processes.order.len()), (PASSING, PASSING));
        assert!(processes.get(ProcessId { pid: 2001, start: 7 }).is_some());
    }

    #[test]
    fn one_that_execs_for_ever_is_one() {
        let (mut processes, followed) = (Processes::default(), HashSet::from([1]));
        for n in 0..1000 {
            processes.add(process(1, &n.to_string()), &followed);
        }
        assert_eq!(processes.order.len(), 1);
        let id = ProcessId { pid: 1, start: 7 };
        assert_eq!(processes.get(id).map(|process| process.name.as_str()), Some("999"));
    }
}
