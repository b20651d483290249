//! The table of `list`, a row for each listener, and how any table is fitted to the terminal.
//!
//! Rows are never wrapped: on a terminal the command is cut, then users and names, and at last the row as a whole. Who
//! draws the cells of `list` in another way ([`columns`], [`cells`]) lays them out by [`widths`].

use super::{BOLD, DIM, GREEN, View, YELLOW, age, command_line, cut, escape, width};
use crate::model::{Holder, Listener};

/// Columns that a command is worth at least; for less, users and names give way first.
const COMMAND_MIN: usize = 16;
/// Columns below which users and names are not cut.
const NAME_MIN: usize = 8;
/// Between two columns.
pub const GAP: &str = "  ";

/// How much the table shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// One row a listener: the binder, and how many more hold it.
    Listeners,
    /// One row a holder.
    Holders,
}

/// A column of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    pub title: &'static str,
    /// Whether its cells stand at the right edge.
    pub right: bool,
}

pub(crate) const fn left(title: &'static str) -> Column {
    Column { title, right: false }
}

pub(crate) const fn right(title: &'static str) -> Column {
    Column { title, right: true }
}

/// The rows in the order given, with a header and line ends. No rows: nothing.
pub fn table(listeners: &[Listener], detail: Detail, view: &View<'_>) -> String {
    let Some(first) = listeners.first() else { return String::new() };
    let several_netns = listeners.iter().any(|listener| listener.socket.netns != first.socket.netns);
    let columns = columns(several_netns);
    let mut rows: Vec<(bool, Vec<String>)> = Vec::with_capacity(listeners.len());
    for listener in listeners {
        let ghost = listener.is_ghost();
        match detail {
            Detail::Holders if !ghost => {
                let (binder, others): (Vec<_>, Vec<_>) = listener.holders.iter().partition(|holder| holder.binder);
                for holder in binder.into_iter().chain(others) {
                    rows.push((ghost, row(listener, Some(holder), 0, several_netns, view)));
                }
            }
            _ => rows.push((ghost, cells(listener, several_netns, view))),
        }
    }
    lay_out(&columns, &rows, view)
}

/// The columns of `list`, which shows namespaces where there are several.
pub fn columns(several_netns: bool) -> Vec<Column> {
    let mut columns = vec![left("PROTO"), left("ADDRESS"), right("PORT")];
    if several_netns {
        columns.push(left("NETNS"));
    }
    columns.extend([left("PID"), left("USER"), left("NAME"), right("AGE"), left("COMMAND")]);
    columns
}

/// The row of a listener: its binder, and how many more hold it. Escaped.
pub fn cells(listener: &Listener, several_netns: bool, view: &View<'_>) -> Vec<String> {
    let more = listener.holders.len().saturating_sub(1);
    row(listener, listener.binder(), more, several_netns, view)
}

fn row(listener: &Listener, holder: Option<&Holder>, more: usize, several_netns: bool, view: &View<'_>) -> Vec<String> {
    let socket = &listener.socket;
    let proto = if socket.mptcp { format!("{}/mptcp", socket.proto) } else { socket.proto.to_string() };
    let mut row = vec![proto, socket.address.to_string(), socket.port.to_string()];
    if several_netns {
        row.push(socket.netns.to_string());
    }
    let began = listener.began().map_or_else(|| "?".to_owned(), |began| age(view.clock.age(began)));
    match holder {
        None => row.extend(["-".to_owned(), view.user(socket.uid), "-".to_owned(), began, view.ghost(socket)]),
        Some(holder) => {
            let process = &holder.process;
            let pid = process.id.pid;
            row.extend([
                if more == 0 { pid.to_string() } else { format!("{pid} +{more}") },
                process.uid.map_or_else(|| "?".to_owned(), |uid| view.user(uid)),
                escape(&process.name).into_owned(),
                began,
                command_line(process),
            ]);
        }
    }
    row
}

/// Header and rows, with line ends. A row that is marked is a ghost's. The last column is the first to be cut.
pub(crate) fn lay_out(columns: &[Column], rows: &[(bool, Vec<String>)], view: &View<'_>) -> String {
    let widths = widths(columns, rows.iter().map(|(_, row)| &row[..]), view.width);
    let titles: Vec<String> = columns.iter().map(|column| column.title.to_owned()).collect();
    let mut out = one_row(columns, &widths, &titles, &|_, text| view.paint(BOLD, text), view);
    for (ghost, cells) in rows {
        let paint = |title: &str, text: &str| match title {
            "PORT" => view.paint(BOLD, text),
            "AGE" | "LIVED" => view.paint(DIM, text),
            "ENDED" if text == "open" => view.paint(GREEN, text),
            "COMMAND" if *ghost => view.paint(YELLOW, text),
            _ => text.to_owned(),
        };
        out.push_str(&one_row(columns, &widths, cells, &paint, view));
    }
    out
}

/// How wide each column is, so that a row takes at most the columns of the terminal, if there is one: all but those that
/// are not cut, which end at its edge.
pub fn widths<'a>(columns: &[Column], rows: impl Iterator<Item = &'a [String]>, terminal: Option<usize>) -> Vec<usize> {
    let mut widths: Vec<usize> = columns.iter().map(|column| column.title.len()).collect();
    for row in rows {
        for (known, cell) in widths.iter_mut().zip(row) {
            *known = (*known).max(width(cell));
        }
    }
    if let Some(terminal) = terminal {
        fit(columns, &mut widths, terminal);
    }
    widths
}

fn one_row(
    columns: &[Column],
    widths: &[usize],
    cells: &[String],
    paint: &dyn Fn(&str, &str) -> String,
    view: &View<'_>,
) -> String {
    let mut line = String::new();
    let mut used = 0;
    for (index, ((column, cell), room)) in columns.iter().zip(cells).zip(widths).enumerate() {
        let gap = if index == 0 { 0 } else { GAP.len() };
        // Where not even the narrowed columns fit, the row ends at the edge.
        let room = view.width.map_or(*room, |terminal| (*room).min(terminal.saturating_sub(used + gap)));
        if room == 0 {
            break;
        }
        let text = cut(cell, room);
        // Nothing follows the last column, and one command may be megabytes wide.
        let padding = if index + 1 == columns.len() { 0 } else { room.saturating_sub(width(&text)) };
        let padding = " ".repeat(padding);
        let text = paint(column.title, &text);
        line.push_str(&" ".repeat(gap));
        line.push_str(&if column.right { padding + &text } else { text + &padding });
        used += gap + room;
    }
    line.truncate(line.trim_end().len());
    line.push('\n');
    line
}

/// Narrows the command, then users and names, so that a row takes at most the columns of the terminal.
fn fit(columns: &[Column], widths: &mut [usize], terminal: usize) {
    let last = widths.len() - 1;
    let gaps = GAP.len() * last;
    for (index, column) in columns.iter().enumerate() {
        let command = widths[last].min(COMMAND_MIN);
        let over = (widths[..last].iter().sum::<usize>() + gaps + command).saturating_sub(terminal);
        if matches!(column.title, "USER" | "NAME") && over > 0 {
            widths[index] = widths[index].saturating_sub(over).max(NAME_MIN.min(widths[index]));
        }
    }
    let others = widths[..last].iter().sum::<usize>() + gaps;
    widths[last] = widths[last].min(terminal.saturating_sub(others));
}
