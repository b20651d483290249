//! `kill --interactive`: a list of listeners with a box to tick for each.

use std::fmt;
use std::io::{self, Write as _};

use anyhow::Context as _;
use inquire::{InquireError, MultiSelect};
use portwatch::model::Listener;
use portwatch::render::table::{Detail, table};
use portwatch::render::{View, width};

use crate::commands::{Users, columns, view_on};

/// Columns in front of a label: the cursor, the box, and blanks between.
const BOX: usize = "> [x] ".len();

/// Lines of the terminal that the list leaves to the question, the help, and a bit of what was there before.
const OTHER_LINES: usize = 5;

/// What was picked and what was not.
pub(super) struct Picked {
    pub(super) chosen: Vec<Listener>,
    pub(super) others: Vec<Listener>,
}

/// One line of the list. Everything in it is escaped and fits the terminal: it was laid out as a table's row.
struct Line {
    index: usize,
    label: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

/// Lets the user pick on the terminal; `None` where that was broken off, or nothing was ticked. The terminal is as it was
/// before in every case.
pub(super) fn pick(mut listeners: Vec<Listener>) -> anyhow::Result<Option<Picked>> {
    listeners.sort_by_key(|Listener { socket, .. }| {
        (socket.port, socket.proto, socket.address, socket.netns, socket.id.inode)
    });
    let users = Users::default();
    let name = |uid| users.name(uid);
    let stderr = io::stderr();
    let terminal = columns(&stderr);
    // One column stays free: some terminals wrap a line that is exactly full.
    let room = terminal.saturating_sub(BOX + 1);
    let rows =
        table(&listeners, Detail::Listeners, &View { width: Some(room), colours: false, ..view_on(&stderr, &name) });
    let mut lines = rows.lines().map(str::to_owned);
    let titles = lines.next().unwrap_or_default();
    let lines: Vec<Line> = lines.enumerate().map(|(index, label)| Line { index, label }).collect();
    let question = "Which to free?";
    let help =
        fitting(terminal, &["space picks, enter frees, esc leaves all alone, type to search", "space, enter, esc"]);
    writeln!(io::stderr(), "{}{titles}", " ".repeat(BOX)).context("cannot write to standard error")?;
    let height = rustix::termios::tcgetwinsize(&stderr).map_or(24, |size| usize::from(size.ws_row));
    let answer = MultiSelect::new(question, lines)
        .with_help_message(help)
        .with_page_size(height.saturating_sub(OTHER_LINES).max(3))
        .with_formatter(&|picked| format!("{} picked", picked.len()))
        .prompt_skippable();
    let lines = match answer {
        Ok(lines) => lines.unwrap_or_default(),
        Err(InquireError::OperationInterrupted) => Vec::new(),
        Err(error) => return Err(error).context("cannot show the list on this terminal; name a port instead"),
    };
    if lines.is_empty() {
        return Ok(None);
    }
    let mut picked = Picked { chosen: Vec::new(), others: Vec::new() };
    for (index, listener) in listeners.into_iter().enumerate() {
        match lines.iter().any(|line| line.index == index) {
            true => picked.chosen.push(listener),
            false => picked.others.push(listener),
        }
    }
    Ok(Some(picked))
}

/// The longest text that does not wrap.
fn fitting<'a>(terminal: usize, texts: &[&'a str]) -> &'a str {
    texts.iter().copied().find(|text| width(text) + 2 < terminal).unwrap_or("")
}
