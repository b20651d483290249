//! Shows on standard error what happens while a kill waits: on a terminal a line per process that grows as things
//! happen, elsewhere a plain line for each thing that happened. Only this module moves the cursor.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write as _};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use portwatch::kill::progress::who;
use portwatch::kill::{Progress, Step};

/// Lines that grow at once; of the processes beyond, the number is shown.
const MAX_LINES: usize = 8;

/// Where progress goes.
pub(super) enum Display {
    Silent,
    Log,
    Live(Live),
}

/// The open lines of a terminal, below those that are complete.
#[derive(Default)]
pub(super) struct Live {
    lines: MultiProgress,
    open: BTreeMap<u32, Line>,
    /// The last line, where there are more than can be shown.
    rest: Option<ProgressBar>,
}

struct Line {
    /// What happened so far.
    text: String,
    /// `None` where there is no room for it.
    bar: Option<ProgressBar>,
}

impl Display {
    pub(super) fn new(silent: bool) -> Display {
        let live = Live::default();
        match silent {
            true => Display::Silent,
            // Hidden: a terminal that cannot move its cursor.
            false if io::stderr().is_terminal() && !live.lines.is_hidden() => Display::Live(live),
            false => Display::Log,
        }
    }

    pub(super) fn show(&mut self, progress: &Progress<'_>) {
        match self {
            Display::Silent => {}
            Display::Log if matches!(progress.step, Step::Waiting { .. }) => {}
            Display::Log => {
                let _ = writeln!(io::stderr(), "{}: {}", who(progress.process), progress.step);
            }
            Display::Live(live) => live.show(progress),
        }
    }

    /// Leaves the lines as they are.
    pub(super) fn close(self) {
        if let Display::Live(mut live) = self {
            for line in std::mem::take(&mut live.open).into_values() {
                live.settle(line);
            }
            let _ = live.lines.clear();
        }
    }
}

impl Live {
    fn show(&mut self, progress: &Progress<'_>) {
        let pid = progress.process.id.pid;
        let mut line = self.open.remove(&pid).unwrap_or_else(|| Line { text: String::new(), bar: None });
        let is_passing = matches!(progress.step, Step::Waiting { .. });
        let joint = match (&line.text[..], is_passing) {
            ("", _) => format!("{}: ", who(progress.process)),
            (_, true) => ", ".to_owned(),
            (_, false) => " → ".to_owned(),
        };
        let text = format!("{}{joint}{}", line.text, progress.step);
        if !is_passing {
            line.text.clone_from(&text);
        }
        if progress.step.is_last() {
            self.settle(line);
        } else {
            if line.bar.is_none() && self.open.values().filter(|line| line.bar.is_some()).count() < MAX_LINES {
                line.bar = Some(self.bar());
            }
            if let Some(bar) = &line.bar {
                bar.set_message(text);
            }
            self.open.insert(pid, line);
        }
        self.count_rest();
    }

    /// A new line, above the one that counts the rest.
    fn bar(&self) -> ProgressBar {
        let bar = ProgressBar::no_length();
        if let Ok(style) = ProgressStyle::with_template("{wide_msg}") {
            bar.set_style(style);
        }
        self.lines.insert_from_back(usize::from(self.rest.is_some()), bar)
    }

    /// Moves a line up to those that are complete.
    fn settle(&self, line: Line) {
        if let Some(bar) = line.bar {
            bar.finish_and_clear();
            self.lines.remove(&bar);
        }
        let _ = self.lines.println(line.text);
    }

    fn count_rest(&mut self) {
        let hidden = self.open.values().filter(|line| line.bar.is_none()).count();
        match (hidden, self.rest.take()) {
            (0, Some(bar)) => {
                bar.finish_and_clear();
                self.lines.remove(&bar);
            }
            (0, None) => {}
            (_, bar) => {
                let bar = bar.unwrap_or_else(|| self.bar());
                bar.set_message(format!("and {hidden} more"));
                self.rest = Some(bar);
            }
        }
    }
}
