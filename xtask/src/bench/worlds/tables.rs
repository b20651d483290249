//! The worlds' figures for people.

use std::fmt::Write as _;

use super::growth::{Growth, Thing};
use super::{Ask, Question, Row, Way};
use crate::bench::CROWD;
use crate::world;

pub(super) fn markdown(rows: &[Row], growth: &[Growth], left_out: &[(world::Args, String)]) -> String {
    let mut text = format!(
        "{} of the processes have a listener, unless it says more; connections are held by other processes beside \
         them.\n",
        CROWD.listeners
    );
    for (question, title) in [(Question::Owner, "One port's owner"), (Question::Listeners, "All listeners")] {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.ask.question == question).collect();
        let worlds = in_order(rows.iter().map(|row| row.world));
        let (missing, asks): (Vec<_>, Vec<_>) = in_order(rows.iter().map(|row| row.ask))
            .into_iter()
            .partition(|&ask| rows.iter().filter(|row| row.ask == ask).all(|row| row.skipped.is_some()));
        let cells = |cell: &dyn Fn(&Row) -> Option<String>| -> Vec<(String, Vec<String>)> {
            let cell = |ask, world| {
                rows.iter()
                    .find(|row| row.ask == ask && row.world == world)
                    .and_then(|row| cell(row))
                    .unwrap_or("–".into())
            };
            asks.iter().map(|&ask| (ask.name(), worlds.iter().map(|&world| cell(ask, world)).collect())).collect()
        };
        let heads: Vec<String> = worlds.iter().map(|&world| label(world)).collect();

        write(&mut text, format_args!("\n#### {title}\n\nms: median (least–greatest)\n\n"));
        let times = cells(&|row| {
            let [median, min, max] = row.times()?;
            Some(format!("{} ({}–{})", three(median), three(min), three(max)))
        });
        table(&mut text, "command", &heads, &times);
        write(&mut text, format_args!("\nRatios of the medians to `ss`, each to that of the same user\n\n"));
        let mut ratios = cells(&|row| Some(ratio(row.times()?[0] / yardstick(&rows, row)?)));
        ratios.retain(|(name, _)| !name.starts_with("`ss "));
        table(&mut text, "command", &heads, &ratios);
        write(
            &mut text,
            format_args!(
                "\nWhat it takes in {}; where the agent is asked, with all that it does meanwhile\n\n",
                label(CROWD)
            ),
        );
        let costs: Vec<_> = rows.iter().filter(|row| row.world == CROWD).filter_map(|row| costs(row)).collect();
        table(&mut text, "command", &["CPU ms", "peak RSS MiB", "runs"].map(str::to_owned), &costs);

        let mut reasons = Vec::new();
        for ask in missing {
            let reason =
                rows.iter().find(|row| row.ask == ask).and_then(|row| row.skipped.as_deref()).unwrap_or_default();
            reasons.push(format!("{} {reason}", ask.name()));
        }
        for row in rows.iter().filter(|row| asks.contains(&row.ask)) {
            if let Some(reason) = &row.skipped {
                reasons.push(format!("{} in {} {reason}", row.ask.name(), label(row.world)));
            }
        }
        if !reasons.is_empty() {
            write(&mut text, format_args!("\nNo figures: {}.\n", reasons.join("; ")));
        }
    }
    text.push_str(&growths(growth));
    for (world, why) in left_out {
        write(&mut text, format_args!("\nLeft out: {} {why}.\n", label(*world)));
    }
    text
}

fn growths(growth: &[Growth]) -> String {
    let mut text = "\n#### How the cost grows\n\nms more per so many more of one thing: the difference of the medians between the two worlds \
         that differ most in it and in nothing else. In parentheses where the runs of both worlds overlap or are fewer than three: it may be nothing.\n"
        .to_owned();
    for thing in Thing::ALL {
        let mut pairs =
            in_order(growth.iter().filter(|growth| growth.thing == thing).map(|growth| (growth.from, growth.to)));
        pairs.truncate(1);
        for (from, to) in pairs {
            write(&mut text, format_args!("\n- {}: from {} to {}", thing.key(), label(from), label(to)));
        }
    }
    text.push_str("\n\n");
    let things: Vec<Thing> =
        Thing::ALL.into_iter().filter(|thing| growth.iter().any(|growth| growth.thing == *thing)).collect();
    let heads: Vec<String> =
        things.iter().map(|thing| format!("per {} {}", grouped(thing.per() as usize), thing.key())).collect();
    let slopes = |text: &mut String, cell: fn(&Growth) -> String| {
        let cell = |ask: &Ask, thing: Thing| {
            let found = growth.iter().find(|growth| growth.ask == ask && growth.thing == thing);
            found.map_or_else(|| "–".to_owned(), cell)
        };
        let lines: Vec<_> = in_order(growth.iter().map(|growth| growth.ask))
            .into_iter()
            .map(|ask| (ask.name(), things.iter().map(|&thing| cell(ask, thing)).collect()))
            .collect();
        table(text, "command", &heads, &lines);
    };
    slopes(
        &mut text,
        |growth| if growth.doubtful { format!("({:.2})", growth.ms) } else { format!("{:.2}", growth.ms) },
    );
    text.push_str("\nThe same of CPU ms\n\n");
    slopes(&mut text, |growth| format!("{:.2}", growth.cpu_ms));
    text
}

/// `ss` in the same world, asked the same by the same user.
fn yardstick(rows: &[&Row], row: &Row) -> Option<f64> {
    let unprivileged = |ask: &Ask| ask.way == Way::Unprivileged;
    let is_it = |ss: &&&Row| {
        ss.ask.line.starts_with("ss ") && ss.world == row.world && unprivileged(ss.ask) == unprivileged(row.ask)
    };
    Some(rows.iter().find(is_it)?.times()?[0])
}

fn costs(row: &Row) -> Option<(String, Vec<String>)> {
    let mib = f64::from(u32::try_from(row.rss_kib).ok()?) / 1024.0;
    Some((row.ask.name(), vec![three(row.cpu_median()?), format!("{mib:.1}"), row.ms.len().to_string()]))
}

fn table(text: &mut String, first: &str, heads: &[String], lines: &[(String, Vec<String>)]) {
    write(text, format_args!("| {first} | {} |\n|---|{}\n", heads.join(" | "), "--:|".repeat(heads.len())));
    for (name, cells) in lines {
        write(text, format_args!("| {name} | {} |\n", cells.join(" | ")));
    }
}

fn write(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _infallible = text.write_fmt(arguments);
}

/// Each once, as they come.
fn in_order<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = Vec::new();
    for value in values {
        if !seen.contains(&value) {
            seen.push(value);
        }
    }
    seen
}

/// A world's name.
pub(super) fn label(world: world::Args) -> String {
    let mut label = format!("{} × {}", grouped(world.processes), grouped(world.fds));
    if world.listeners != CROWD.listeners {
        write(&mut label, format_args!(", {} listeners", grouped(world.listeners)));
    }
    if world.connections > 0 {
        write(&mut label, format_args!(", {} connections", grouped(world.connections)));
    }
    label
}

/// With a comma for each thousand.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Three digits that count, as far as there are hundredths.
fn three(ms: f64) -> String {
    let digits = match ms {
        _ if ms < 9.995 => 2,
        _ if ms < 99.95 => 1,
        _ => 0,
    };
    format!("{ms:.digits$}")
}

/// Less than one as a fraction of one: so many times faster.
fn ratio(ratio: f64) -> String {
    if ratio > 0.0 && ratio < 0.95 { format!("1/{}", three(1.0 / ratio)) } else { three(ratio) }
}

#[cfg(test)]
mod tests {
    use super::super::ASKS;
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.123, 9.99, 9.996, 99.96, 1234.5].map(three), ["0.12", "9.99", "10.0", "100", "1234"]);
        assert_eq!([0.01, 0.5, 1.0, 2.345, 20.0].map(ratio), ["1/100", "1/2.00", "1.00", "2.35", "20.0"]);
        assert_eq!([0, 999, 1000, 100_000, 1_234_567].map(grouped), ["0", "999", "1,000", "100,000", "1,234,567"]);
    }

    #[test]
    fn worlds_have_names() {
        assert_eq!(label(CROWD), "1,000 × 100");
        let large = world::Args { listeners: 1000, connections: 100_000, ..CROWD };
        assert_eq!(label(large), "1,000 × 100, 1,000 listeners, 100,000 connections");
    }

    #[test]
    fn tables_show_times_ratios_costs_and_what_has_no_figures() {
        let find = |line: &str| ASKS.iter().find(|ask| ask.line == line && ask.way == Way::Plain).unwrap();
        let row = |line: &str, ms: f64| Row {
            ms: vec![ms, ms * 2.0, ms / 2.0],
            cpu_ms: vec![1.0, 3.0, 2.0],
            rss_kib: 2560,
            ..Row::new(find(line), CROWD)
        };
        let mut absent = row("netstat -ltnp", 1.0);
        absent.skipped = Some("is not installed".to_owned());
        let text = markdown(&[row("portwatch list --no-agent", 2.0), row("ss -ltnp", 20.0), absent], &[], &[]);
        for line in [
            "| command | 1,000 × 100 |",
            "| `portwatch list --no-agent` | 2.00 (1.00–4.00) |",
            "| `portwatch list --no-agent` | 1/10.0 |",
            "| `ss -ltnp` | 2.00 | 2.5 | 3 |",
            "No figures: `netstat -ltnp` is not installed.",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("| `netstat"), "{text}");
    }
}
