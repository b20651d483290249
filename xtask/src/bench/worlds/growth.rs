//! How the cost of a command grows with the world: the slope between two worlds that differ in one thing.
//!
//! For each command and each thing, the two worlds are those which differ most in that thing and in nothing else, among
//! those in which the command has figures; of equals, those with fewer open files. The slope is the difference of the
//! medians over the difference of the worlds. It is doubtful where the runs of both worlds overlap, or are fewer than
//! three in one: it may be nothing then. The processor time, of which other work takes less, has a slope of its own.
//!
//! Figures: `{question, command, who, unprivileged, thing, per, ms, cpu_ms, doubtful, from, to}`: so many more ms, and
//! ms of processor time, per so many more of the thing, as seen from one world to the other.

use std::cmp::Reverse;

use serde_json::{Value, json};

use super::{Ask, Row, Way, world_figures};
use crate::world;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Thing {
    Processes,
    Fds,
    Connections,
    Listeners,
}

impl Thing {
    pub(super) const ALL: [Thing; 4] = [Thing::Processes, Thing::Fds, Thing::Connections, Thing::Listeners];

    pub(super) fn key(self) -> &'static str {
        match self {
            Thing::Processes => "processes",
            Thing::Fds => "fds",
            Thing::Connections => "connections",
            Thing::Listeners => "listeners",
        }
    }

    pub(super) fn per(self) -> u32 {
        match self {
            Thing::Processes | Thing::Listeners => 1000,
            Thing::Fds | Thing::Connections => 100_000,
        }
    }

    fn amount(self, world: world::Args) -> usize {
        match self {
            Thing::Processes => world.processes,
            Thing::Fds => world.processes * world.fds,
            Thing::Connections => world.connections,
            Thing::Listeners => world.listeners,
        }
    }

    /// How much more of it `to` has, if `to` has more of it and is the same in all else.
    fn more(self, from: world::Args, to: world::Args) -> Option<usize> {
        let mut same = from;
        match self {
            Thing::Processes => same.processes = to.processes,
            Thing::Fds => same.fds = to.fds,
            Thing::Connections => same.connections = to.connections,
            Thing::Listeners => same.listeners = to.listeners,
        }
        self.amount(to).checked_sub(self.amount(from)).filter(|&more| more > 0 && same == to)
    }
}

pub(super) struct Growth {
    pub(super) ask: &'static Ask,
    pub(super) thing: Thing,
    pub(super) ms: f64,
    pub(super) cpu_ms: f64,
    /// Of `ms`.
    pub(super) doubtful: bool,
    pub(super) from: world::Args,
    pub(super) to: world::Args,
}

impl Growth {
    pub(super) fn figures(&self) -> Value {
        let Growth { ask, thing, ms, cpu_ms, doubtful, from, to } = self;
        json!({
            "question": ask.question.key(), "command": ask.command(),
            "who": if ask.is_ours() { "portwatch" } else { "peer" }, "unprivileged": ask.way == Way::Unprivileged,
            "thing": thing.key(), "per": thing.per(), "ms": ms, "cpu_ms": cpu_ms, "doubtful": doubtful,
            "from": world_figures(*from), "to": world_figures(*to)
        })
    }
}

/// In the order of the rows.
pub(super) fn of(rows: &[Row]) -> Vec<Growth> {
    let mut asks: Vec<&'static Ask> = Vec::new();
    for row in rows {
        if !asks.contains(&row.ask) {
            asks.push(row.ask);
        }
    }
    let slopes = asks.into_iter().flat_map(|ask| Thing::ALL.map(|thing| slope(rows, ask, thing)));
    slopes.flatten().collect()
}

fn slope(rows: &[Row], ask: &'static Ask, thing: Thing) -> Option<Growth> {
    let measured: Vec<(&Row, [f64; 3])> =
        rows.iter().filter(|row| row.ask == ask).filter_map(|row| Some((row, row.times()?))).collect();
    let pairs = measured.iter().flat_map(|from| measured.iter().map(move |to| (from, to)));
    let differing = pairs.filter_map(|(from, to)| Some((thing.more(from.0.world, to.0.world)?, from, to)));
    let fds = |row: &Row| row.world.processes * row.world.fds;
    let (more, from, to) = differing.max_by_key(|(more, from, to)| (*more, Reverse(fds(from.0) + fds(to.0))))?;
    let (&(from, [from_ms, from_min, from_max]), &(to, [to_ms, to_min, to_max])) = (from, to);
    let per = f64::from(thing.per()) / f64::from(u32::try_from(more).ok()?);
    Some(Growth {
        ask,
        thing,
        ms: (to_ms - from_ms) * per,
        cpu_ms: (to.cpu_median()? - from.cpu_median()?) * per,
        doubtful: (from_min <= to_max && to_min <= from_max) || from.ms.len().min(to.ms.len()) < 3,
        from: from.world,
        to: to.world,
    })
}

#[cfg(test)]
mod tests {
    use super::super::ASKS;
    use super::{Row, Thing, of};
    use crate::world;

    const fn world(processes: usize, fds: usize, connections: usize) -> world::Args {
        world::Args { processes, fds, listeners: 10, each: 1, connections }
    }

    fn row(world: world::Args, ms: [f64; 3]) -> Row {
        Row { ms: ms.to_vec(), cpu_ms: ms.to_vec(), ..Row::new(&ASKS[0], world) }
    }

    fn check(rows: &[Row], thing: Thing, expected: Option<(f64, bool, world::Args)>) {
        let found = of(rows).into_iter().find(|growth| growth.thing == thing);
        assert_eq!(found.map(|growth| (growth.ms, growth.doubtful, growth.to)), expected, "{thing:?}");
    }

    #[test]
    fn slopes_are_between_worlds_that_differ_most_in_one_thing() {
        let rows = [
            row(world(10, 10, 0), [1.0, 1.1, 1.2]),
            row(world(1000, 10, 0), [3.0, 3.1, 3.2]),
            row(world(1000, 100, 0), [5.0, 5.1, 4.0]),
            row(world(3010, 10, 0), [7.0, 7.1, 7.2]),
            row(world(3010, 100, 0), [9.0, 60.0, 61.3]),
            row(world(1000, 100, 50_000), [5.0, 5.5, 4.9]),
        ];
        // 6 ms in 3,000 processes; 52.9 ms in 270,900 open files; hardly anything in 50,000 connections.
        check(&rows, Thing::Processes, Some((2.0, false, world(3010, 10, 0))));
        check(&rows, Thing::Fds, Some(((60.0 - 7.1) * (1e5 / 270_900.0), false, world(3010, 100, 0))));
        check(&rows, Thing::Connections, Some((0.0, true, world(1000, 100, 50_000))));
        check(&rows, Thing::Listeners, None);
    }

    #[test]
    fn of_equal_differences_the_one_with_fewer_open_files_counts() {
        let rows = [
            row(world(10, 100, 0), [2.0; 3]),
            row(world(10, 10, 0), [1.0; 3]),
            row(world(1010, 10, 0), [3.0; 3]),
            row(world(1010, 100, 0), [9.0; 3]),
        ];
        check(&rows, Thing::Processes, Some((2.0, false, world(1010, 10, 0))));
    }

    #[test]
    fn a_slope_of_few_runs_is_doubtful() {
        let mut rows = [row(world(10, 10, 0), [1.0; 3]), row(world(1010, 10, 0), [3.0; 3])];
        rows[1].ms.pop();
        check(&rows, Thing::Processes, Some((2.0, true, world(1010, 10, 0))));
    }

    #[test]
    fn a_world_without_figures_is_no_end_of_a_slope() {
        let mut rows =
            [row(world(10, 10, 0), [1.0; 3]), row(world(1010, 10, 0), [3.0; 3]), row(world(5010, 10, 0), [9.0; 3])];
        rows[2].skipped = Some("takes more than 30 s".to_owned());
        check(&rows, Thing::Processes, Some((2.0, false, world(1010, 10, 0))));
    }
}
