//! How many opens and closes a second are told before the first is lost.
//!
//! Figures: `processes` that storm; `machine_per_s` opens and closes a second that they produce without portwatch; `steps`,
//! each of a `reader` (`"agent"`, `"watch"`), with `asked_per_s` (`null`: as many as they can), `produced_per_s`, `listens`
//! (each opened and closed), `told_opens` and `told_closes` (of the whole host), `dropped` records (counted by the kernel,
//! told by the reader), `resyncs` (`null`: `watch` is not asked), `history_dropped` (records that the agent's history left out)
//! and `reader_cpu`, the part of one processor that the reader took; `lossless_per_s` by reader, the highest rate produced up
//! to which no step lost a record.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::storm::{Done, Storm};
use super::watch::{Counted, Tally, Watch};
use super::{PATIENCE, without_events};
use crate::bench::Effort;
use crate::bench::agent::{Agent, Connection, cpu_time};
use crate::bench::section::Section;

/// Of what is asked for: less, and the machine cannot produce it.
const ENOUGH: f64 = 0.95;

/// Nobody listens there: a question about it only makes the agent take in what happened.
const NOTHING: &str = "127.255.255.255:1/tcp";

struct Step {
    reader: &'static str,
    asked_per_s: Option<u64>,
    done: Done,
    told: Tally,
    /// What only an agent tells.
    resyncs: Option<u64>,
    history_dropped: Option<u64>,
    reader_cpu: f64,
}

/// Who takes in the events.
enum Reader {
    Agent(Agent, Connection),
    Watch(Counted),
}

/// What it took in so far.
#[derive(Clone, Copy, Default)]
struct Account {
    tally: Tally,
    resyncs: Option<u64>,
    history_dropped: Option<u64>,
    cpu: Duration,
}

impl Reader {
    fn name(&self) -> &'static str {
        match self {
            Reader::Agent(..) => "agent",
            Reader::Watch(_) => "watch",
        }
    }

    /// As soon as what was told and lost is `enough`, or when patience is at its end.
    fn account(&mut self, enough: impl Fn(Tally) -> bool) -> Result<Account> {
        match self {
            Reader::Watch(watch) => {
                let tally = watch.until(enough);
                Ok(Account { tally, cpu: cpu_time(watch.pid())?, ..Account::default() })
            }
            Reader::Agent(agent, connection) => {
                let begun = Instant::now();
                loop {
                    connection.count(NOTHING)?;
                    let status = connection.status()?;
                    let count = |name: &str| status[name].as_u64().with_context(|| format!("no {name} in the status"));
                    let tally = Tally { opens: count("opens")?, closes: count("closes")?, lost: count("dropped")? };
                    if enough(tally) || begun.elapsed() > PATIENCE {
                        let history_dropped = status["history"]["dropped"].as_u64();
                        let cpu = agent.cpu_time()?;
                        return Ok(Account { tally, resyncs: Some(count("resyncs")?), history_dropped, cpu });
                    }
                }
            }
        }
    }
}

impl Step {
    fn measure(reader: &mut Reader, storm: &mut Storm, per_s: Option<u64>, length: Duration) -> Result<Step> {
        let before = reader.account(|_| true)?;
        let begun = Instant::now();
        let done = storm.rage(per_s, length)?;
        let after = reader.account(|now| missing(done.listens, since(now, before.tally)).is_none())?;
        let seconds = begun.elapsed().as_secs_f64();
        let added = |after: Option<u64>, before: Option<u64>| Some(after?.saturating_sub(before?));
        Ok(Step {
            reader: reader.name(),
            asked_per_s: per_s,
            done,
            told: since(after.tally, before.tally),
            resyncs: added(after.resyncs, before.resyncs),
            history_dropped: added(after.history_dropped, before.history_dropped),
            reader_cpu: (after.cpu.saturating_sub(before.cpu)).as_secs_f64() / seconds,
        })
    }

    /// Whether the machine could not do what was asked of it.
    fn is_last(&self) -> bool {
        #[expect(clippy::cast_precision_loss, reason = "far from 2⁵³")]
        self.asked_per_s.is_none_or(|asked| self.done.per_s < asked as f64 * ENOUGH)
    }

    fn figures(&self) -> Value {
        json!({
            "reader": self.reader, "asked_per_s": self.asked_per_s, "produced_per_s": self.done.per_s,
            "listens": self.done.listens, "told_opens": self.told.opens, "told_closes": self.told.closes,
            "dropped": self.told.lost, "resyncs": self.resyncs, "history_dropped": self.history_dropped,
            "reader_cpu": self.reader_cpu
        })
    }
}

fn since(now: Tally, before: Tally) -> Tally {
    Tally { opens: now.opens - before.opens, closes: now.closes - before.closes, lost: now.lost - before.lost }
}

/// What was neither told nor counted as lost. A lost record leaves out one open, and the close that nothing precedes;
/// where only the close is lost, the next snapshot tells it.
fn missing(listens: u64, told: Tally) -> Option<u64> {
    let untold = listens.saturating_sub(told.opens).max(listens.saturating_sub(told.closes));
    untold.checked_sub(told.lost).filter(|missing| *missing > 0)
}

pub(in crate::bench) fn throughput(portwatch: &Path, effort: &Effort) -> Result<Section> {
    let mut section = Section {
        key: "throughput",
        title: "How many opens and closes a second, before the first is lost".into(),
        markdown: String::new(),
        figures: Value::Null,
        wrong: Vec::new(),
    };
    let mut storm = Storm::new()?;
    let machine = storm.rage(None, effort.live.step)?.per_s;
    let agent = Agent::start(portwatch, &[])?;
    if let Some(reason) = without_events(&agent.status()?) {
        section.markdown = reason;
        return Ok(section);
    }
    let connection = agent.connect()?;
    let mut steps = of(&mut Reader::Agent(agent, connection), &mut storm, effort)?;
    let mut command = Command::new(portwatch);
    command.args(["watch", "--json", "--no-agent"]);
    steps.extend(of(&mut Reader::Watch(Watch::start(command)?.count()), &mut storm, effort)?);
    // Once more: what the machine can may have changed meanwhile.
    let machine = f64::midpoint(machine, storm.rage(None, effort.live.step)?.per_s);
    for step in &steps {
        if let Some(missing) = missing(step.done.listens, step.told) {
            let (reader, listens) = (step.reader, step.done.listens);
            section.wrong.push(format!(
                "throughput, {reader}: of {listens} opens or closes {missing} neither told nor counted as lost"
            ));
        }
    }
    let lossless = |reader| lossless_per_s(steps.iter().filter(|step| step.reader == reader));
    section.figures = json!({
        "processes": storm.processes(), "machine_per_s": machine,
        "steps": steps.iter().map(Step::figures).collect::<Vec<_>>(),
        "lossless_per_s": { "agent": lossless("agent"), "watch": lossless("watch") }
    });
    section.markdown = markdown(&steps, storm.processes(), machine);
    Ok(section)
}

/// Ever more, until the machine cannot; then as much as it can.
fn of(reader: &mut Reader, storm: &mut Storm, effort: &Effort) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for &rate in effort.live.rates {
        let step = Step::measure(reader, storm, Some(rate), effort.live.step)?;
        let is_last = step.is_last();
        steps.push(step);
        if is_last {
            break;
        }
    }
    steps.push(Step::measure(reader, storm, None, effort.live.step)?);
    Ok(steps)
}

/// The highest rate below the first that lost a record; 0 where the first did.
fn lossless_per_s<'a>(steps: impl Iterator<Item = &'a Step>) -> f64 {
    let mut steps: Vec<&Step> = steps.collect();
    steps.sort_by(|a, b| a.done.per_s.total_cmp(&b.done.per_s));
    steps.iter().take_while(|step| step.told.lost == 0).last().map_or(0.0, |step| step.done.per_s)
}

fn markdown(steps: &[Step], processes: usize, machine: f64) -> String {
    let mut text = "| reader | asked per s | produced per s | opens told | closes told | records lost | resyncs | reader's CPU |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|\n"
        .to_owned();
    for step in steps {
        let asked = step.asked_per_s.map_or_else(|| "as many as it can".to_owned(), |rate| rate.to_string());
        let told = |count: u64| {
            if count < step.done.listens { format!("{count} of {}", step.done.listens) } else { count.to_string() }
        };
        let resyncs = step.resyncs.map_or_else(|| "–".to_owned(), |resyncs| resyncs.to_string());
        // Writing to a String cannot fail.
        let _infallible = writeln!(
            text,
            "| `{}` | {asked} | {:.0} | {} | {} | {} | {resyncs} | {:.0} % |",
            step.reader,
            step.done.per_s,
            told(step.told.opens),
            told(step.told.closes),
            step.told.lost,
            step.reader_cpu * 100.0,
        );
    }
    let _infallible = writeln!(
        text,
        "\n{processes} processes open and close listeners, on the same processors as who reads of it. Without portwatch this \
         machine produces {machine:.0} opens and closes a second."
    );
    for step in steps {
        if let Some(dropped) = step.history_dropped.filter(|dropped| *dropped > 0) {
            let _infallible = writeln!(
                text,
                "At {:.0} a second, the agent's history left out {dropped} of its records.",
                step.done.per_s
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_as_lost_is_not_missing() {
        for (opens, closes, lost, want) in [
            (100, 100, 0, None),
            // Listeners of other programs are told, too.
            (103, 103, 0, None),
            (99, 100, 0, Some(1)),
            (100, 97, 0, Some(3)),
            (90, 90, 10, None),
            (90, 88, 10, Some(2)),
        ] {
            assert_eq!(missing(100, Tally { opens, closes, lost }), want, "{opens}, {closes}, {lost}");
        }
    }

    #[test]
    fn what_comes_after_a_loss_is_not_lossless() {
        let step = |per_s, lost| Step {
            reader: "agent",
            asked_per_s: None,
            done: Done { listens: 1, per_s },
            told: Tally { lost, ..Tally::default() },
            resyncs: None,
            history_dropped: None,
            reader_cpu: 0.0,
        };
        assert_eq!(lossless_per_s([step(10.0, 0), step(40.0, 0), step(30.0, 1)].iter()), 10.0);
        assert_eq!(lossless_per_s([step(10.0, 0), step(20.0, 0)].iter()), 20.0);
        assert_eq!(lossless_per_s([step(10.0, 1)].iter()), 0.0);
    }
}
