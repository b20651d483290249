//! How the state of `top` looks on a screen of any size: a line about the host, the table, beside it (below, on a screen)
//! what was asked for, and a line to talk on. Pure; text from processes is escaped.

use portwatch::kill::preview;
use portwatch::render::table::{GAP, cells, columns, widths};
use portwatch::render::{Clock, View, cut, escape, text, width};
use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};

use super::errand::About;
use super::row::Row;
use super::state::{Mode, Planned, State, target};
use crate::commands::kill::summary;

const PLAIN: Style = Style::new();
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const FRESH: Style = BOLD.fg(Color::Green);
const CLOSED: Style = DIM.add_modifier(Modifier::CROSSED_OUT);
const WARNING: Style = Style::new().fg(Color::Yellow);
const SELECTED: Style = Style::new().add_modifier(Modifier::REVERSED);

const KEYS: &str = "q quit  / filter  s sort  r reverse  ⏎ details  x end  ? help";

const HELP: &str = "\
↑ ↓ j k, PgUp PgDn, Home End   select
/          filter by port, name, user and command as you type; Esc clears
s  r       sort by the next column; reverse
⏎ i        details: holders, ancestors, directory, unit, container
x Del F9   end who has the port, as `portwatch kill` does: shows the plan and asks first
X          the same with SIGKILL at once
q Esc ^C   quit
Green rows have just opened, struck ones have just closed.";

/// Rows of the table and its titles that are left where something is shown beside it; on a screen of fewer lines it is
/// shown alone.
const TABLE_MIN: u16 = 5;

/// Draws the whole screen. `source` says how listeners are learnt; escaped.
pub(super) fn draw(frame: &mut Frame<'_>, state: &mut State, source: &str, view: &View<'_>) {
    let area = frame.area();
    if area.is_empty() {
        return;
    }
    let columns = usize::from(area.width);
    // Text has none of its own: cells are styled here.
    let has_colours = view.colours;
    let view = &View { width: Some(columns), colours: false, ..view.clone() };
    let foot = foot(state, view);
    let foot_height = lines_of(&foot.lines).min((area.height / 2).max(1));
    let head_height = u16::from(area.height > foot_height + 2);
    let rest = area.height - foot_height - head_height;
    let pane = pane(state, view);
    let pane_height = match &pane {
        // A line more for its title.
        Some((_, lines)) => (lines_of(lines) + 1).min(if rest > 2 * TABLE_MIN { rest - TABLE_MIN } else { rest }),
        None => 0,
    };
    let slice = |y: u16, height: u16| Rect { y: area.y + y, height, ..area };
    let table_height = rest - pane_height;
    state.arrange(usize::from(table_height.saturating_sub(1)), view.clock.now_boot_ns);

    let mut canvas = Canvas { buffer: frame.buffer_mut() };
    if head_height > 0 {
        canvas.head(slice(0, 1), state, source);
    }
    canvas.table(slice(head_height, table_height), state, view);
    let room = usize::from(pane_height.saturating_sub(1));
    let lines = pane.as_ref().map_or(0, |(_, lines)| lines.len());
    let first = state.scroll.min(lines.saturating_sub(room));
    if let Some((title, lines)) = pane {
        canvas.pane(slice(head_height + table_height, pane_height), &title, &lines, first);
    }
    let foot_area = slice(area.height - foot_height, foot_height);
    for (y, line) in (foot_area.y..foot_area.bottom()).zip(&foot.lines) {
        canvas.buffer.set_stringn(area.x, y, line, columns, foot.style);
    }
    if let Some(x) = foot.cursor {
        frame.set_cursor_position((area.x + x.min(area.width - 1), foot_area.bottom() - 1));
    }
    if !has_colours {
        for cell in &mut frame.buffer_mut().content {
            (cell.fg, cell.bg) = (Color::Reset, Color::Reset);
        }
    }
    state.was_drawn(lines, room);
}

/// Lines of text, as many as a screen may have.
fn lines_of(lines: &[String]) -> u16 {
    u16::try_from(lines.len()).unwrap_or(u16::MAX - 1)
}

/// The lines to talk on.
struct Foot {
    lines: Vec<String>,
    style: Style,
    /// Where something is typed.
    cursor: Option<u16>,
}

fn foot(state: &State, view: &View<'_>) -> Foot {
    let columns = view.width.unwrap_or(80);
    let lines = |text: &str, style| Foot { lines: wrap(text, columns), style, cursor: None };
    match &state.mode {
        Mode::Filter => {
            let line = format!("/{}", escape(&state.filter));
            // The end of what is typed is what somebody looks at.
            let over = width(&line).saturating_sub(columns.saturating_sub(1));
            let line: String = if over == 0 { line } else { skip(&line, over) };
            let cursor = u16::try_from(width(&line)).ok();
            Foot { lines: vec![line], style: PLAIN, cursor }
        }
        Mode::Kill { plan: Some(planned), force, .. } => {
            lines(&question(planned, *force, view), BOLD.fg(Color::Yellow))
        }
        Mode::Kill { plan: None, .. } => lines("looking who has it; Esc: leave it", PLAIN),
        Mode::Details { .. } | Mode::Help | Mode::Report(_) => lines("Esc: back to the table  ↑↓ scroll", DIM),
        Mode::Table => match state.message() {
            Some(message) => lines(message, BOLD),
            None if state.filter.is_empty() => {
                Foot { lines: vec![cut(KEYS, columns).into_owned()], style: DIM, cursor: None }
            }
            None => {
                let line = format!("/{}  (Esc clears)  {KEYS}", escape(&state.filter));
                Foot { lines: vec![cut(&line, columns).into_owned()], style: PLAIN, cursor: None }
            }
        },
    }
}

/// What somebody is to agree to.
fn question(planned: &Planned, force: bool, view: &View<'_>) -> String {
    let Planned { plan, concerns, .. } = planned;
    let how = if force { " by SIGKILL" } else { "" };
    if !concerns.is_empty() {
        return format!("{} [y/N]", preview::question(plan, concerns, view));
    }
    match &plan.victims[..] {
        [victim] => format!("end {}{how}? [y/N]", text::named(&victim.process)),
        victims => format!("end these {} processes{how}? [y/N]", victims.len()),
    }
}

/// What is shown beside the table, and its title.
fn pane(state: &State, view: &View<'_>) -> Option<(String, Vec<String>)> {
    let columns = view.width.unwrap_or(80);
    let wrapped = |text: &str| text.lines().flat_map(|line| wrap(line, columns)).collect::<Vec<_>>();
    Some(match &state.mode {
        Mode::Table | Mode::Filter => return None,
        Mode::Help => ("keys".to_owned(), wrapped(HELP)),
        Mode::Report(text) => ("not free".to_owned(), wrapped(text)),
        Mode::Details { listener, about } => {
            let nothing = About::default();
            let About { ancestors, containers } = about.as_ref().unwrap_or(&nothing);
            let closed = if state.is_open(listener) { "" } else { ", which has closed" };
            let text = text::who(listener, ancestors, containers, view);
            // The first line is the title.
            let (title, rest) = text.split_once('\n').unwrap_or((&text, ""));
            (format!("{title}{closed}"), wrapped(rest))
        }
        Mode::Kill { socket, force, plan } => {
            let how = if *force { ", SIGKILL at once" } else { "" };
            let text = plan.as_ref().map(|planned| {
                let note = planned.note.as_ref().map(|note| format!("{note}\n")).unwrap_or_default();
                note + &summary(&planned.plan, view)
            });
            (format!("to be freed: {}{how}", target(socket)), wrapped(&text.unwrap_or_default()))
        }
    })
}

/// What is drawn on.
struct Canvas<'a> {
    buffer: &'a mut Buffer,
}

impl Canvas<'_> {
    /// Writes, and says where it ended; nothing beyond the line.
    fn write(&mut self, x: u16, area: Rect, text: &str, style: Style) -> u16 {
        let room = area.right().saturating_sub(x);
        if room == 0 {
            return x;
        }
        self.buffer.set_stringn(x, area.y, cut(text, usize::from(room)), usize::from(room), style).0
    }

    fn head(&mut self, area: Rect, state: &State, source: &str) {
        let (tcp, udp) = state.counts();
        let x = self.write(area.x, area, "portwatch top", BOLD);
        let shown = state.shown().filter(|row| row.closed.is_none()).count();
        let some = if shown == tcp + udp { String::new() } else { format!("  {shown} shown") };
        let reversed = if state.is_reversed { " reversed" } else { "" };
        let sort = state.sort.title().to_lowercase();
        let x = self.write(x, area, &format!("  tcp {tcp}  udp {udp}{some}  by {sort}{reversed}  "), PLAIN);
        let style = if source.starts_with("poll") { WARNING } else { DIM };
        self.write(x, area, source, style);
    }

    fn table(&mut self, area: Rect, state: &State, view: &View<'_>) {
        if area.height == 0 {
            return;
        }
        let netns = |row: &Row| row.listener.socket.netns;
        let first_netns = state.shown().next().map(netns);
        let several_netns = state.shown().any(|row| Some(netns(row)) != first_netns);
        let columns = columns(several_netns);
        // All of them count, so that columns stay where they are while rows are scrolled.
        let rows: Vec<(&Row, Vec<String>)> =
            state.shown().map(|row| (row, row_cells(row, several_netns, view))).collect();
        let widths = widths(&columns, rows.iter().map(|(_, cells)| &cells[..]), view.width);
        let titles: Vec<String> = columns.iter().map(|column| column.title.to_owned()).collect();
        let sorted_by = state.sort.title();
        let title_style = |title| if title == sorted_by { BOLD.add_modifier(Modifier::UNDERLINED) } else { BOLD };

        let (selected, first) = state.place();
        let lines = std::iter::once((None, &titles));
        let lines = lines.chain(rows.iter().map(|(row, cells)| (Some(*row), cells)).skip(first));
        for (index, (row, cells)) in lines.take(usize::from(area.height)).enumerate() {
            let line = Rect { y: area.y + index as u16, height: 1, ..area };
            let mut x = area.x;
            for ((column, cell), room) in columns.iter().zip(cells).zip(&widths) {
                // Where not even the narrowed columns fit, the row ends at the edge.
                let room = (*room).min(usize::from(area.right().saturating_sub(x)));
                let text = cut(cell, room);
                let padding = if column.right { room.saturating_sub(width(&text)) } else { 0 };
                let style = match row {
                    Some(row) => cell_style(row, column.title),
                    None => title_style(column.title),
                };
                self.write(x + padding as u16, line, &text, style);
                x = x.saturating_add(room as u16).saturating_add(GAP.len() as u16);
                if x >= area.right() {
                    break;
                }
            }
            if index > 0 && first + index - 1 == selected {
                self.buffer.set_style(line, SELECTED);
            }
        }
    }

    fn pane(&mut self, area: Rect, title: &str, lines: &[String], first: usize) {
        let room = usize::from(area.height.saturating_sub(1));
        let rest = if lines.len() > room {
            format!(" {}-{} of {} ", first + 1, (first + room).min(lines.len()), lines.len())
        } else {
            String::new()
        };
        let rule = "─".repeat(usize::from(area.width));
        self.write(area.x, area, &rule, DIM);
        self.write(area.right().saturating_sub(width(&rest) as u16 + 2).max(area.x), area, &rest, DIM);
        self.write(area.x, area, &format!("── {title} "), BOLD);
        for (index, line) in lines.iter().skip(first).take(room).enumerate() {
            let y = area.y + 1 + index as u16;
            self.write(area.x, Rect { y, height: 1, ..area }, line, PLAIN);
        }
    }
}

/// Of what has closed, the age that it reached.
fn row_cells(row: &Row, several_netns: bool, view: &View<'_>) -> Vec<String> {
    let Some(now_boot_ns) = row.closed else { return cells(&row.listener, several_netns, view) };
    let clock = Clock { now_boot_ns, ..view.clock.clone() };
    cells(&row.listener, several_netns, &View { clock, ..view.clone() })
}

fn cell_style(row: &Row, column: &str) -> Style {
    match column {
        _ if row.closed.is_some() => CLOSED,
        _ if row.opened.is_some() => FRESH,
        "PORT" => BOLD,
        "AGE" => DIM,
        "COMMAND" if row.listener.is_ghost() => WARNING,
        _ => PLAIN,
    }
}

/// The line in pieces of so many columns, broken between words where there are any.
fn wrap(line: &str, columns: usize) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut piece = String::new();
    let mut used = 0;
    for c in line.chars() {
        let wide = width(c.encode_utf8(&mut [0; 4]));
        if used + wide > columns && used > 0 {
            let word = piece.rfind(' ').filter(|&at| c != ' ' && !piece[..at].trim().is_empty());
            let rest = piece.split_off(word.map_or(piece.len(), |at| at + 1));
            pieces.push(std::mem::replace(&mut piece, rest));
            used = width(&piece);
            if c == ' ' {
                continue;
            }
        }
        used += wide;
        piece.push(c);
    }
    pieces.push(piece);
    pieces
}

/// The line without its first columns.
fn skip(line: &str, columns: usize) -> String {
    let mut skipped = 0;
    let rest = line.chars().skip_while(|c| {
        let is_over = skipped >= columns;
        skipped += width(c.encode_utf8(&mut [0; 4]));
        !is_over
    });
    rest.collect()
}

#[cfg(test)]
mod tests;
