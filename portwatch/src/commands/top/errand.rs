//! What takes time, each on a thread of its own, so that the screen stays live: a kill, and what `who` finds out. Whoever
//! drops the other end does not want to know any more.

use std::sync::mpsc as std_mpsc;
use std::thread;

use portwatch::client::Client;
use portwatch::engine::{self, Roster};
use portwatch::kill::progress::who;
use portwatch::kill::{Choice, Concern, Guards, Job, Options, Outcome, Plan, Reach, Terms};
use portwatch::model::{Listener, Socket};
use portwatch::render;
use portwatch::render::json::Ancestors;
use portwatch::select::{Filters, Selector, Target};
use portwatch::wire::{Kill, Selection};
use rustix::process::Signal;
use tokio::sync::{mpsc, oneshot};

use crate::cli::Globals;
use crate::commands::kill::{Way, open_scanner};
use crate::commands::{ancestors_of, runtime};

/// What `who` says beyond the listener itself.
#[derive(Debug, Default)]
pub(super) struct About {
    pub(super) ancestors: Ancestors,
    pub(super) containers: Roster,
}

/// Finds out what `who` says of a listener.
pub(super) fn explain(listener: Listener) -> oneshot::Receiver<About> {
    let (tell, told) = oneshot::channel();
    thread::spawn(move || {
        let listeners = [listener];
        let containers = if engine::is_involved_in(&listeners) { engine::ask().1 } else { Roster::default() };
        // Nobody there: the answer is not wanted any more.
        let _ = tell.send(About { ancestors: ancestors_of(&listeners), containers });
    });
    told
}

/// What is told of a kill, in this order.
#[derive(Debug)]
pub(super) enum Told {
    /// Nobody is signalled before [`Deed::go`]. `note`: why it was not the agent that made the plan.
    Plan {
        plan: Plan,
        concerns: Vec<Concern>,
        note: Option<String>,
    },
    /// A line, escaped.
    Progress(String),
    Done(anyhow::Result<Vec<Outcome>>),
}

/// A kill as `portwatch kill` does it. Dropped before [`Deed::go`], it signals nobody.
#[derive(Debug)]
pub(super) struct Deed {
    told: mpsc::UnboundedReceiver<Told>,
    agreed: std_mpsc::Sender<()>,
}

impl Deed {
    /// Plans to free what the listener has: through the agent where `by_agent`, else alone.
    pub(super) fn plan(socket: &Socket, force: bool, by_agent: bool, globals: &Globals) -> Deed {
        // By the exact address: one that is merely served at that address is another row.
        let target = Target { ports: socket.port..=socket.port, proto: Some(socket.proto), address: None };
        let filters = Filters { addresses: vec![socket.address], netns: Some(socket.netns), ..Filters::default() };
        let selector = Selector::new(vec![target], filters);
        let signal = if force { Signal::KILL } else { Signal::TERM };
        let options = Options { signal, ..Options::default() };
        // What it would explain on standard error would be written across the screen.
        let globals = Globals { verbose: false, ..globals.clone() };
        let (tell, told) = mpsc::unbounded_channel();
        let (agreed, agreement) = std_mpsc::channel();
        thread::spawn(move || {
            let done = carry_out(&selector, options, by_agent, &globals, &tell, &agreement);
            if let Some(done) = done.transpose() {
                let _ = tell.send(Told::Done(done));
            }
        });
        Deed { told, agreed }
    }

    /// Has it carried out.
    pub(super) fn go(&self) {
        // Nobody there: it has failed, and said so.
        let _ = self.agreed.send(());
    }

    /// What is told next; nothing more where its thread failed. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<Told> {
        self.told.recv().await
    }
}

/// `None`: nobody agreed.
fn carry_out(
    selector: &Selector,
    options: Options,
    by_agent: bool,
    globals: &Globals,
    tell: &mpsc::UnboundedSender<Told>,
    agreement: &std_mpsc::Receiver<()>,
) -> anyhow::Result<Option<Vec<Outcome>>> {
    let asked = if by_agent { through_agent(selector, options, globals) } else { Ok(None) };
    let (way, note) = match asked {
        Ok(Some(way)) => (way, None),
        Ok(None) => (alone(selector, globals)?, None),
        Err(error) if globals.agent => return Err(error),
        Err(error) => {
            (alone(selector, globals)?, Some(render::escape(&format!("{error:#}; working alone")).into_owned()))
        }
    };
    let _ = tell.send(Told::Plan { plan: way.plan().clone(), concerns: way.concerns(false), note });
    if agreement.recv().is_err() {
        return Ok(None);
    }
    let outcomes = way.run(options, &mut |progress| {
        let _ = tell.send(Told::Progress(format!("{}: {}", who(progress.process), progress.step)));
    });
    outcomes.map(Some)
}

fn through_agent(selector: &Selector, options: Options, globals: &Globals) -> anyhow::Result<Option<Way>> {
    let runtime = runtime()?;
    let Some(client) = runtime.block_on(Client::connect(&globals.socket))? else { return Ok(None) };
    let request = Kill::new(Selection::of(selector), options, Reach::Holders);
    let kill = runtime.block_on(client.plan_kill(request))?;
    Ok(Some(Way::Agent { kill: Box::new(kill), runtime }))
}

fn alone(selector: &Selector, globals: &Globals) -> anyhow::Result<Way> {
    let mut scanner = open_scanner(globals)?;
    let choice = Choice::read(&mut scanner, selector)?;
    let job = Job::prepare(choice, &Terms::default(), Guards::current(false))?;
    Ok(Way::Alone { job: Box::new(job), scanner })
}
