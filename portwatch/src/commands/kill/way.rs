//! The two ways of a kill, which look the same: through the agent where one answers, else alone.

use std::future::pending;
use std::ops::ControlFlow;

use nix::sys::signal::Signal;
use nix::unistd::Uid;
use portwatch::client::PlannedKill;
use portwatch::kill::{Choice, Concern, Guards, Job, Options, Outcome, Plan, Progress, concern};
use portwatch::render;
use portwatch::select::Selector;
use portwatch::source::{Scanner, netns, stat};
use portwatch::wire::Kill;
use tokio::runtime::Runtime;

use super::interrupt::Interrupts;
use super::{KillArgs, pick};
use crate::cli::Globals;
use crate::commands::{explain, hidden, note, reach_agent, runtime};

/// A kill that is planned, and by whom it is carried out.
pub(crate) enum Way {
    Agent { kill: Box<PlannedKill>, runtime: Runtime },
    Alone { job: Box<Job>, scanner: Scanner },
}

/// Why there is no plan.
pub(super) enum End {
    /// So many listeners may be meant that are [`hidden`].
    NothingThere(usize),
    NothingPicked,
}

impl Way {
    /// `None`: no agent does it, and nobody was signalled.
    pub(super) fn through_agent(
        args: &KillArgs,
        selector: &Selector,
        globals: &Globals,
    ) -> anyhow::Result<Option<Way>> {
        Way::asking(args.request(selector), globals)
    }

    fn asking(request: Kill, globals: &Globals) -> anyhow::Result<Option<Way>> {
        let runtime = runtime()?;
        let Some(client) = runtime.block_on(reach_agent(globals))? else { return Ok(None) };
        match runtime.block_on(client.plan_kill(request)) {
            Ok(kill) => Ok(Some(Way::Agent { kill: Box::new(kill), runtime })),
            // Who works alone sees no more namespaces than the agent.
            Err(error) if globals.agent || error.is::<netns::Unknown>() => Err(error),
            Err(error) => {
                note(&render::escape(&format!("{error:#}; working alone")));
                Ok(None)
            }
        }
    }

    pub(super) fn alone(
        args: &KillArgs,
        selector: &Selector,
        globals: &Globals,
    ) -> anyhow::Result<ControlFlow<End, Way>> {
        let mut scanner = open_scanner(globals)?;
        let mut choice = Choice::read(&mut scanner, selector)?;
        if choice.selected.is_empty() && (args.interactive || choice.is_empty()) {
            return Ok(ControlFlow::Break(End::NothingThere(hidden(selector, &choice.left_out))));
        }
        if args.interactive {
            let Some(picked) = pick::pick(choice.selected)? else {
                return Ok(ControlFlow::Break(End::NothingPicked));
            };
            choice.selected = picked.chosen;
            choice.left_out.extend(picked.others);
            // What was not picked is nobody's question.
            choice.named.clear();
        }
        let job =
            Job::prepare(choice, &args.terms(), Guards::current(args.force_self))?.removing(args.remove_cwd.clone());
        Ok(ControlFlow::Continue(Way::Alone { job: Box::new(job), scanner }))
    }

    pub(crate) fn plan(&self) -> &Plan {
        match self {
            Way::Agent { kill, .. } => &kill.plan,
            Way::Alone { job, .. } => job.plan(),
        }
    }

    /// What there is to think about. `chosen`: each was picked by hand.
    pub(crate) fn concerns(&self, chosen: bool) -> Vec<Concern> {
        match self {
            Way::Agent { kill, .. } => kill.concerns.clone(),
            Way::Alone { job, .. } => {
                let stat = |pid| stat::read(pid).ok();
                concern::concerns(job.plan(), Uid::effective().as_raw(), chosen, &stat)
            }
        }
    }

    /// The outcomes of a dry run.
    pub(super) fn planned(self) -> anyhow::Result<Vec<Outcome>> {
        match self {
            Way::Agent { kill, runtime } => runtime.block_on(kill.carry_out(&mut |_| {}, pending())),
            Way::Alone { job, .. } => Ok(job.planned()),
        }
    }

    /// The same, of a kill that nobody agreed to.
    pub(super) fn declined(
        self,
        args: &KillArgs,
        selector: &Selector,
        globals: &Globals,
    ) -> anyhow::Result<Vec<Outcome>> {
        let Way::Agent { kill, runtime } = self else { return self.planned() };
        // Told of no dry run, it takes what comes next for the word to begin. It ends nobody once it is left.
        drop((kill, runtime));
        let told = match Way::asking(Kill { dry_run: true, ..args.request(selector) }, globals)? {
            Some(way) => ControlFlow::Continue(way),
            None => Way::alone(args, selector, globals)?,
        };
        match told {
            ControlFlow::Continue(way) => way.planned(),
            ControlFlow::Break(_) => Ok(Vec::new()),
        }
    }

    pub(crate) fn run(self, options: Options, progress: &mut dyn FnMut(&Progress<'_>)) -> anyhow::Result<Vec<Outcome>> {
        match self {
            // It was told the options with the request.
            Way::Agent { kill, runtime } => runtime.block_on(kill.carry_out(progress, pending())),
            Way::Alone { job, mut scanner } => job.run(&mut scanner, options, progress),
        }
    }

    /// The same for who ends by SIGINT and SIGTERM: the one that came, which has stopped the kill. Alone, such a signal ends
    /// this process, and so the kill.
    pub(super) fn run_until_signalled(
        self,
        options: Options,
        progress: &mut dyn FnMut(&Progress<'_>),
    ) -> anyhow::Result<(Vec<Outcome>, Option<Signal>)> {
        let Way::Agent { kill, runtime } = self else { return Ok((self.run(options, progress)?, None)) };
        runtime.block_on(async {
            let mut interrupts = Interrupts::open()?;
            let mut by = None;
            let stop = async { by = Some(interrupts.next().await) };
            let outcomes = kill.carry_out(progress, stop).await?;
            Ok((outcomes, by))
        })
    }
}

/// A way to read who holds what, for who then signals by PID.
pub(crate) fn open_scanner(globals: &Globals) -> anyhow::Result<Scanner> {
    if std::fs::read_link("/proc/self").ok() != Some(std::process::id().to_string().into()) {
        anyhow::bail!(
            "/proc belongs to another pid namespace, so its PIDs mean nothing here; mount one of this namespace"
        );
    }
    let scanner = Scanner::open(globals.probe);
    if let Some(reason) = scanner.refusal() {
        explain(globals, &format!("holders are read from {}: {reason}", scanner.method()));
    }
    Ok(scanner)
}
