//! Turns the end of a [`Run`] into outcomes: what is said of each port.

use std::time::Duration;

use nix::unistd::{Uid, User};
use rustix::process::Signal;

use super::close::{STAYS_BOUND, Unclosed};
use super::directories::Directories;
use super::execute::Run;
use super::life::{Life, Stage};
use super::outcome::{Diagnostics, Failure, Outcome, Owner, Status, Stopped};
use super::plan::{Group, Refused, Stop, push_new, same_socket};
use super::prove::Blocked;
use super::signal::SignalName;
use super::stop::{StopError, Stopping};
use super::why;
use crate::model::{Listener, Process};
use crate::source::process::hidden_owner;
use crate::source::stat;
use crate::supervisor::Supervisor;

/// `al (uid 1000)`, or `uid 1000` for a user without a name.
pub(super) fn user(uid: u32) -> String {
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => format!("{} (uid {uid})", user.name),
        _ => format!("uid {uid}"),
    }
}

/// Why a process of this user is not signalled.
pub(crate) fn not_permitted(uid: Option<u32>) -> String {
    let owner = uid.map_or_else(|| "another user".to_owned(), user);
    format!("not permitted: it runs as {owner}; try sudo")
}

pub(super) fn planned(run: &Run) -> Vec<Outcome> {
    let each = (0..run.plan.groups.len()).map(|index| {
        let end = End::of(run, index);
        let has_plan = run.plan.closes || !end.lives.is_empty() || end.stops(run).next().is_some();
        if has_plan && !end.group.sockets.is_empty() {
            return end.outcome(run, Status::Planned, Duration::ZERO, end.refused(run), None);
        }
        // Nothing would be done, so this is how it would end.
        let status = end.status(run);
        let diagnostics = end.diagnostics(run, status);
        end.outcome(run, status, Duration::ZERO, end.refused(run), diagnostics)
    });
    each.collect()
}

/// What is said of it.
pub(super) fn hidden(uid: u32) -> String {
    format!("held by {}, whose processes are not visible; try sudo", user(uid))
}

pub(super) fn outcomes(run: &Run) -> Vec<Outcome> {
    let each = (0..run.plan.groups.len()).map(|index| {
        let end = End::of(run, index);
        let status = end.status(run);
        let mut failed = end.refused(run);
        failed.extend(end.failures(run));
        let diagnostics = end.diagnostics(run, status);
        let elapsed = run.freed[index].unwrap_or_else(|| run.started.elapsed());
        end.outcome(run, status, elapsed, failed, diagnostics)
    });
    each.collect()
}

/// One group when all is over.
struct End<'a> {
    group: &'a Group,
    index: usize,
    /// Wanted sockets that are still there.
    old: Vec<&'a Listener>,
    /// Sockets that came since.
    new: Vec<&'a Listener>,
    lives: Vec<&'a Life>,
    blocked: Option<&'a Blocked>,
}

impl<'a> End<'a> {
    fn of(run: &'a Run, index: usize) -> End<'a> {
        let group = &run.plan.groups[index];
        let on_port = run.current.iter().filter(|l| group.covers(&l.socket));
        End {
            group,
            index,
            old: on_port.filter(|l| group.wants(l.socket.id)).collect(),
            new: run.new_owners(index).collect(),
            lives: run.lives.iter().filter(|l| l.victim.groups.contains(&index)).collect(),
            blocked: run.blocked[index].as_ref(),
        }
    }

    fn unclosed<'b>(&self, run: &'b Run, listener: &Listener) -> Option<&'b Unclosed> {
        run.unclosed.iter().find(|unclosed| same_socket(unclosed.id, listener.socket.id))
    }

    /// Why sockets that were to be closed are there still, and whose they are.
    fn unclosed_here<'b>(&'b self, run: &'b Run) -> impl Iterator<Item = (&'b Listener, String)> {
        self.old.iter().filter(|_| run.plan.closes).map(|listener| {
            let reason = match self.unclosed(run, listener) {
                Some(unclosed) => unclosed.reason.clone(),
                None => format!("the socket at {} was closed, and listens again", listener.socket.endpoint()),
            };
            (*listener, reason)
        })
    }

    fn killed(&self) -> impl Iterator<Item = &'a Life> {
        self.lives.iter().copied().filter(|l| l.ended)
    }

    /// Whether the process holds a wanted socket still.
    fn still_holds(&self, life: &Life) -> bool {
        self.old.iter().any(|l| l.holds(life.victim.process.id))
    }

    fn status(&self, run: &Run) -> Status {
        if self.blocked.is_some() {
            return Status::Stuck;
        }
        if run.plan.closes && !self.old.is_empty() {
            let is_denied = |l: &&Listener| self.unclosed(run, l).is_some_and(|unclosed| unclosed.denied);
            return if self.old.iter().all(is_denied) { Status::Denied } else { Status::Partial };
        }
        if self.group.sockets.is_empty() {
            return Status::Free;
        }
        if self.old.is_empty() {
            return if self.new.is_empty() { Status::Cleaned } else { Status::Respawned };
        }
        if self.old.iter().all(|l| l.is_ghost()) {
            let was_ghost = |l: &&Listener| {
                let before = run.plan.listeners.iter().find(|b| b.socket.id == l.socket.id);
                before.is_some_and(Listener::is_ghost)
            };
            return match () {
                () if self.hidden_owner().is_some() => Status::Denied,
                () if self.old.iter().all(was_ghost) => Status::Ghost,
                () => Status::Stuck,
            };
        }
        let mut left = self.lives.iter().filter(|l| self.still_holds(l));
        if self.killed().next().is_some() || self.stopped(run).next().is_some() {
            Status::Partial
        } else if self.is_denied(run) {
            Status::Denied
        } else if !run.is_called_off && left.any(|l| l.stage == Stage::Forced) {
            Status::Stuck
        } else {
            Status::Partial
        }
    }

    /// The engine was asked before anything was done; a container that starts its process again keeps its id.
    fn name_container(&self, supervisor: &mut Supervisor) {
        let known = self.lives.iter().filter_map(|l| l.victim.supervisor.as_ref());
        let mut same = known.filter(|known| known.container.is_some() && known.container == supervisor.container);
        supervisor.container_name = same.find_map(|known| known.container_name.clone());
    }

    /// Whether nothing but want of permission is in the way: then somebody with more of it can free the port.
    fn is_denied(&self, run: &Run) -> bool {
        let left = self.lives.iter().filter(|l| self.still_holds(l));
        let left = left.map(|l| l.failure.as_ref().is_some_and(|f| f.denied));
        let refused = self.refused_here(run).map(|r| r.denied);
        let stops = self.stops(run).filter_map(|(_, result)| result?.as_ref().err()).map(|error| error.denied);
        let mut obstacles = left.chain(refused).chain(stops).peekable();
        obstacles.peek().is_some() && obstacles.all(|denied| denied)
    }

    fn refused_here<'b>(&self, run: &'b Run) -> impl Iterator<Item = &'b Refused> {
        run.plan.refused.iter().filter(|r| r.groups.contains(&self.index))
    }

    /// What is to be stopped for this port, and what became of that if it was tried.
    fn stops<'b>(&self, run: &'b Run) -> impl Iterator<Item = (&'b Stop, Option<&'b Stopping>)> {
        let results = run.stopped.iter().map(Some).chain(std::iter::repeat(None));
        let index = self.index;
        run.plan.stops.iter().zip(results).filter(move |(stop, _)| stop.groups.contains(&index))
    }

    fn stopped<'b>(&self, run: &'b Run) -> impl Iterator<Item = &'b Stop> {
        self.stops(run).filter(|(_, result)| matches!(result, Some(Ok(_)))).map(|(stop, _)| stop)
    }

    fn hidden_owner(&self) -> Option<u32> {
        self.old.iter().copied().find_map(hidden_owner)
    }

    fn refused(&self, run: &Run) -> Vec<Failure> {
        let spared = self.refused_here(run);
        spared.map(|r| Failure { pid: r.process.id.pid, reason: r.reason.clone(), refused: true }).collect()
    }

    fn failures(&self, run: &Run) -> Vec<Failure> {
        let outlived = |life: &Life, signal: Signal, otherwise: &str| {
            let why = why::why(life.pid(), signal).unwrap_or_else(|| otherwise.to_owned());
            let after = format!("still there after {}", SignalName(signal));
            if why.is_empty() { after } else { format!("{after}: {why}") }
        };
        let reason = |life: &Life| match (&life.failure, life.stage) {
            (Some(failed), _) => failed.reason.clone(),
            // It may be about to end.
            (None, stage) if run.is_called_off && stage != Stage::Unsignalled => {
                let signal = if stage == Stage::Forced { Signal::KILL } else { run.options.signal };
                format!("{} sent; the kill was called off while it was waited for", SignalName(signal))
            }
            (None, Stage::Forced) => outlived(life, Signal::KILL, "it cannot be interrupted inside the kernel"),
            (None, Stage::Soft) => outlived(life, run.options.signal, ""),
            (None, Stage::Unsignalled) if run.is_called_off => "not signalled: the kill was called off".to_owned(),
            (None, Stage::Unsignalled) => "not signalled: it could not be proved to hold the port".to_owned(),
        };
        let left = self.lives.iter().filter(|l| self.still_holds(l) || l.is_kin_left());
        let left = left.map(|l| Failure { pid: l.pid(), reason: reason(l), refused: l.stage == Stage::Unsignalled });
        let unclosed = self.unclosed_here(run).flat_map(|(listener, reason)| {
            let pids = listener.holders.iter().map(|holder| holder.process.id.pid);
            pids.map(move |pid| Failure { pid, reason: reason.clone(), refused: true })
        });
        left.chain(self.unstopped(run)).chain(unclosed).collect()
    }

    /// The holders that stay because what they belong to does.
    fn unstopped<'b>(&self, run: &'b Run) -> impl Iterator<Item = Failure> + use<'_, 'b> {
        self.stops(run).filter_map(|(stop, result)| Some((stop, result?))).flat_map(|(stop, result)| {
            let there = stop.processes.iter().filter(|p| self.old.iter().any(|l| l.holds(p.id)));
            there.map(move |process| {
                let reason = match result {
                    Ok(_) => format!("still there after {} has stopped", stop.what),
                    Err(StopError { message, .. }) => message.clone(),
                };
                Failure { pid: process.id.pid, reason, refused: true }
            })
        })
    }

    /// Why a container is still there for which nobody visible holds the port.
    fn unstopped_ghosts(&self, run: &Run) -> Option<String> {
        let mut failed = self.stops(run).filter(|(stop, _)| stop.processes.is_empty());
        failed.find_map(|(_, result)| Some(result?.as_ref().err()?.message.clone()))
    }

    /// What starts again what was stopped.
    fn triggers<'b>(&self, run: &'b Run) -> impl Iterator<Item = String> + use<'b> {
        let stopped: Vec<(&Stop, &Vec<String>)> =
            self.stops(run).filter_map(|(stop, result)| Some((stop, result?.as_ref().ok()?))).collect();
        let triggered = stopped.into_iter().filter(|(_, triggers)| !triggers.is_empty());
        triggered.map(|(stop, triggers)| {
            let is_active =
                if triggers.len() == 1 { "is active still and starts" } else { "are active still and start" };
            format!("{} {is_active} {} again", triggers.join(", "), stop.what)
        })
    }

    fn diagnostics(&self, run: &Run, status: Status) -> Option<Diagnostics> {
        let port = format!("{}/{}", self.group.port, self.group.proto);
        let mut supervisor = None;
        let mut new_owners = Vec::new();
        let message = match status {
            Status::Respawned => {
                let holders = || self.new.iter().flat_map(|l| &l.holders);
                for holder in holders() {
                    let process = &holder.process;
                    push_new(&mut new_owners, Owner { pid: process.id.pid, name: process.name.clone() });
                }
                supervisor = holders()
                    .find_map(|h| Supervisor::of(&h.process, &|pid| stat::read(pid).ok()))
                    .or_else(|| self.lives.iter().find_map(|l| l.victim.supervisor.clone()));
                if let Some(supervisor) = &mut supervisor {
                    self.name_container(supervisor);
                }
                let owner = match new_owners.first() {
                    Some(owner) => format!("{} ({})", owner.name, owner.pid),
                    None => "an owner that is not visible".to_owned(),
                };
                match &supervisor {
                    Some(supervisor) => {
                        let end = supervisor.stop_command().map(|stop| format!("; end it with: {stop}"));
                        let starter = supervisor.describe();
                        format!("{owner} took the port again, started by {starter}{}", end.unwrap_or_default())
                    }
                    None => format!("{owner} took the port again"),
                }
            }
            Status::Denied | Status::Partial if run.plan.closes => {
                // Those with holders are told with them.
                let ghosts = self.unclosed_here(run).filter(|(listener, _)| listener.is_ghost());
                let reasons: Vec<String> = ghosts.map(|(_, reason)| reason).collect();
                if reasons.is_empty() {
                    return None;
                }
                reasons.join("; ")
            }
            Status::Stuck if self.blocked.is_some() && run.plan.closes => {
                let message = self.blocked.map(|blocked| blocked.message(false)).unwrap_or_default();
                format!("{message}; {STAYS_BOUND}")
            }
            Status::Cleaned if run.plan.closes && self.holders(run).next().is_some() => {
                let names: Vec<String> = self.holders(run).map(named).collect();
                format!("bind() may need SO_REUSEADDR as long as {} keeps its descriptor", names.join(", "))
            }
            Status::Denied | Status::Ghost if self.unstopped_ghosts(run).is_some() => {
                self.unstopped_ghosts(run).unwrap_or_default()
            }
            Status::Denied => match self.hidden_owner() {
                Some(uid) => hidden(uid),
                None => return None,
            },
            Status::Ghost => format!(
                "no visible process holds {port}: the kernel itself, another pid namespace or a descriptor in \
                 flight may; portwatch who {port} shows what is known"
            ),
            Status::Stuck if self.blocked.is_some() => {
                self.blocked.map(|blocked| blocked.message(!self.group.sockets.is_empty())).unwrap_or_default()
            }
            Status::Stuck if !self.old.is_empty() && self.old.iter().all(|l| l.is_ghost()) => {
                format!("every visible holder is gone, and {port} is still taken")
            }
            Status::Partial | Status::Stuck if self.triggers(run).next().is_some() => {
                self.triggers(run).collect::<Vec<_>>().join("; ")
            }
            Status::Partial if run.is_called_off => "the kill was called off: nobody is signalled any more".to_owned(),
            Status::Partial if run.options.signal != Signal::KILL && !run.options.force => {
                format!("--no-force left those that outlived {}", SignalName(run.options.signal))
            }
            Status::Cleaned => {
                let forced = self.killed().filter(|l| l.stage == Stage::Forced);
                let mut notes: Vec<String> = forced.filter_map(outlived).collect();
                let alive = self.lives.iter().filter(|l| l.stage != Stage::Unsignalled && !l.ended);
                let names: Vec<String> = alive.map(|l| named(&l.victim.process)).collect();
                if !names.is_empty() {
                    notes.push(format!("{} let go of the port and did not end yet", names.join(", ")));
                }
                notes.extend(self.triggers(run));
                if notes.is_empty() {
                    return None;
                }
                notes.join("; ")
            }
            _ => return None,
        };
        Some(Diagnostics { message, new_owners, supervisor, findings: Vec::new() })
    }

    /// Who held the sockets in the beginning, each once.
    fn holders<'b>(&'b self, run: &'b Run) -> impl Iterator<Item = &'b Process> {
        let of_group = run.plan.victims.iter().filter(|victim| victim.groups.contains(&self.index));
        of_group.map(|victim| &*victim.process)
    }

    fn outcome(
        &self,
        run: &Run,
        status: Status,
        elapsed: Duration,
        failed: Vec<Failure>,
        diagnostics: Option<Diagnostics>,
    ) -> Outcome {
        let pid = |life: &Life| life.victim.process.id.pid;
        let there = || self.old.iter().chain(&self.new);
        let mut remaining_pids: Vec<u32> = there().flat_map(|l| &l.holders).map(|h| h.process.id.pid).collect();
        remaining_pids.extend(self.blocked.into_iter().flat_map(Blocked::pids));
        remaining_pids.sort_unstable();
        remaining_pids.dedup();
        let stopped = |stop: &Stop| Stopped::of(&stop.what);
        let pids_of = |stop: &Stop| stop.processes.iter().map(|p| p.id.pid).collect();
        let victims = self.lives.iter().map(|l| &*l.victim.process).chain(self.holders(run));
        let refused = run.plan.refused.iter().map(|r| &*r.process);
        let holders = there().flat_map(|l| &l.holders).map(|h| &*h.process);
        let mut names: Vec<(u32, String)> =
            victims.chain(refused).chain(holders).map(|p| (p.id.pid, p.name.clone())).collect();
        names.extend(self.blocked.into_iter().flat_map(Blocked::owners).map(|o| (o.pid, o.name.clone())));
        names.sort_unstable();
        names.dedup();
        let is_empty = self.group.sockets.is_empty();
        Outcome {
            port: self.group.port,
            proto: self.group.proto,
            netns: self.group.netns,
            status,
            killed: self.killed().map(pid).collect(),
            forced: self.killed().filter(|l| l.stage == Stage::Forced).map(pid).collect(),
            failed,
            stopped: self.stopped(run).map(stopped).collect(),
            closed: run.closed.iter().filter(|id| self.group.wants(**id)).map(|id| id.inode).collect(),
            directories: Directories::default(),
            closes: run.plan.closes.then(|| self.holders(run).map(|process| process.id.pid).collect()),
            gone: self.lives.iter().filter(|l| l.gone).map(|l| pid(l)).collect(),
            ghost: self.old.iter().filter(|l| l.is_ghost()).map(|l| l.socket.id.inode).collect(),
            still_listening: there().next().is_some(),
            remaining_pids,
            elapsed: if is_empty { Duration::ZERO } else { elapsed },
            diagnostics,
            addresses: Vec::new(),
            names,
            stopping: self.stops(run).map(|(stop, _)| (stopped(stop), pids_of(stop))).collect(),
        }
    }
}

fn named(process: &Process) -> String {
    format!("{} ({})", process.name, process.id.pid)
}

/// `python3 (7) ignores SIGTERM`, where it is known why it took SIGKILL.
fn outlived(life: &Life) -> Option<String> {
    let why = life.outlived.as_deref()?;
    Some(format!("{}: {why}", named(&life.victim.process)))
}
