//! `portwatch history`: who had a port, when, and how it ended. Reads what the agent has stored.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use portwatch::client::Answer;
use portwatch::history::{self, Lives, Reader};
use portwatch::render;
use portwatch::render::json;
use portwatch::select::{Filters, Selector};
use portwatch::wire::{Request, Response, Selection};

use super::{OWN_ONLY, Users, ask_agent, block_on, note, print, selection, selector, view};
use crate::cli::{Globals, Selectors, TARGETS, duration};
use crate::exit_codes::{NO, Usage};

#[derive(Debug, Args)]
#[command(after_help = format!("\
Examples:
  portwatch history 8000
  portwatch history 3000-3999 --last 1d
  portwatch history --user al --command '*node*' --json

How it ended:
  open           it did not, as far as anybody knows
  closed         its holder closed it
  exited         its holder ended
  killed by X    portwatch ended its holder, at the request of X: a user, or a rule of the agent
  lost           events were lost, and it was gone afterwards
  agent stopped  it was open when the agent was stopped
  unknown        it was open when the agent died
  reboot         it was open when the host went down

An empty answer is exit code 0; without any history it is 1.

{TARGETS}"))]
// Parsed, so that whoever tries one is told why it cannot be; not offered.
#[command(
    mut_arg("variables", |arg| arg.hide(true)),
    mut_arg("descendants_of", |arg| arg.hide(true)),
    mut_arg("orphans", |arg| arg.hide(true))
)]
pub(crate) struct HistoryArgs {
    /// Ports to tell of; all without
    #[arg(value_name = "TARGET")]
    pub(crate) targets: Vec<String>,
    /// Only what was open in the last while, such as 10m or 1d
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) last: Option<Duration>,
    /// The latest so many; 0 for all
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    pub(crate) limit: usize,
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
    /// Whole commands
    #[arg(short, long)]
    pub(crate) wide: bool,
    #[command(flatten)]
    pub(crate) selectors: Selectors,
}

pub(crate) fn run(args: &HistoryArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let selector = selector(&args.targets, &args.selectors, globals)?;
    let Filters { variables, descendants_of, orphans, .. } = selector.filters();
    if *orphans || !variables.is_empty() || !descendants_of.is_empty() {
        let what =
            "--env, --descendant-of and --orphans ask processes that run; history knows --command, --cwd and --user";
        return Err(Usage(what.to_owned()).into());
    }
    let users = Users::default();
    let name = |uid| users.name(uid);
    let mut view = view(&name);
    let now = view.clock.now_wall;
    let Some((Lives { lives, more }, narrowed)) = query(args, globals, &selector, &view.clock)? else {
        if args.json {
            print("[]\n")?;
        }
        return Ok(ExitCode::from(NO));
    };
    view.clock = history::clock(now, view.clock.tz);
    if args.wide {
        view.width = None;
    }
    if args.json {
        let rows: Vec<_> = lives.iter().map(|life| render::history::json(life, &view)).collect();
        print(&json::array(&rows))?;
    } else if lives.is_empty() {
        let last = args.last.map(|last| format!(" in the last {}", render::span(last))).unwrap_or_default();
        let (of_yours, own_only) = if narrowed { (" of yours", format!("; {OWN_ONLY}")) } else { Default::default() };
        let (filters, targets) = selection(&args.targets, &selector);
        note(&format!("the history knows of nothing{of_yours}{filters}{targets}{last}{own_only}"));
    } else {
        print(&render::history::table(&lives, &view))?;
    }
    if more {
        // The agent has a limit of its own.
        let all = if args.limit == 0 { "sudo and --no-agent show" } else { "--limit 0 shows" };
        note(&format!("these are the latest {}; {all} all", lives.len()));
    }
    Ok(ExitCode::SUCCESS)
}

/// The lives, and whether they are those of the caller alone. `None`, with a word about it: there is no history.
fn query(
    args: &HistoryArgs,
    globals: &Globals,
    selector: &Selector,
    clock: &render::Clock,
) -> anyhow::Result<Option<(Lives, bool)>> {
    let now = history::clock(clock.now_wall, clock.tz.clone()).now_boot_ns;
    let last = args.last.and_then(|last| u64::try_from(last.as_nanos()).ok());
    let from = last.map_or(0, |last| now.saturating_sub(last));
    let limit = if args.limit == 0 { usize::MAX } else { args.limit };
    if let Some(mut answer) = block_on(ask_agent(&Request::Status {}, None, globals))?
        && matches!(answer.responses.pop(), Some(Response::Status(status)) if status.history.is_none())
    {
        note("the agent keeps no history; start it without --no-history");
        return Ok(None);
    }
    let request = Request::History { selection: Selection::of(selector), from, limit };
    if let Some(Answer { responses, more, narrowed }) = block_on(ask_agent(&request, None, globals))? {
        let lives = responses.into_iter().filter_map(|response| match response {
            Response::Life(life) => Some(*life),
            _ => None,
        });
        return Ok(Some((Lives { lives: lives.collect(), more }, narrowed)));
    }
    let path = history::path();
    let reader = match Reader::open(&path, clock) {
        Ok(reader) => reader,
        Err(error) => {
            return match error.downcast_ref::<io::Error>().map(io::Error::kind) {
                Some(io::ErrorKind::NotFound) => {
                    let path = path.to_string_lossy();
                    note(&format!(
                        "there is no history at {}; start the agent: portwatch agent",
                        render::escape(&path)
                    ));
                    Ok(None)
                }
                Some(io::ErrorKind::PermissionDenied) => {
                    Err(error.context("the history is not yours to read; try sudo"))
                }
                _ => Err(error),
            };
        }
    };
    let selector = selector.clone().ahead_by(now.saturating_sub(clock.now_boot_ns));
    Ok(Some((reader.lives(&selector, from, now, limit)?, false)))
}
