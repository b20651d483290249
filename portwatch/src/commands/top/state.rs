//! What the screen of `top` shows, as plain data: rows and their order, what is selected, and which of these a key means.
//!
//! ```text
//!            x, X                     planned                  y
//!   Table ──────────► Kill, no plan ──────────► Kill, a plan ─────► Table, ending ──► the outcome, as a message
//!    ▲ │ ▲  i, ?, /                                 │ any other key                   or, where there is more to say,
//!    │ └─┴─────────► Details, Help, Filter          ▼                                 as Report
//!    └──────────────────────────────────────── nobody is signalled
//! ```
//! No IO and no clock: whoever owns it says what happened and when. It says what is to be done ([`Action`]) and when the
//! screen is to be looked at again though nothing happens ([`State::next_wake`]).

use std::time::Duration;

use portwatch::kill::plan::same_socket;
use portwatch::kill::{Concern, Outcome, Plan, text};
use portwatch::model::{BootNs, Change, Listener, Protocol, Socket, SocketId};
use portwatch::render::{self, View, escape};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::errand::About;
use super::row::{Row, Sort};

const SECOND: u64 = 1_000_000_000;
/// How long a row looks new.
const FRESH: u64 = 2 * SECOND;
/// How long the row of a listener that closed stays.
const LINGERING: u64 = 2 * SECOND;
/// Lines that a page key moves what is shown beside the table.
const PANE_PAGE: usize = 8;
/// How long a message stays.
const MESSAGE: u64 = 10 * SECOND;

/// What has the keys.
#[derive(Debug)]
pub(super) enum Mode {
    Table,
    /// The filter is being typed.
    Filter,
    Help,
    /// What `who` says; the rest of it comes a moment later.
    Details {
        listener: Listener,
        about: Option<About>,
    },
    Kill {
        socket: Socket,
        force: bool,
        plan: Option<Box<Planned>>,
    },
    /// What there is to say after a kill.
    Report(String),
}

/// A plan to decide about.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) plan: Plan,
    pub(super) concerns: Vec<Concern>,
    /// Why it was not the agent that made it.
    pub(super) note: Option<String>,
    /// Whether it has been on the screen: nobody agrees to what they did not see.
    pub(super) is_seen: bool,
}

/// What is to be done about a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Nothing,
    Quit,
    /// Stop, as a shell's job does.
    Suspend,
    /// Find out what `who` says.
    Explain(Box<Listener>),
    /// Plan to free what the listener has.
    Plan {
        socket: Socket,
        force: bool,
    },
    /// Carry the plan out.
    Agree,
    /// Forget the plan.
    Decline,
}

#[derive(Debug)]
pub(super) struct State {
    rows: Vec<Row>,
    /// Indices of the rows that are shown, in order.
    order: Vec<usize>,
    /// Whether the order may be another one by now.
    is_stale: bool,
    pub(super) sort: Sort,
    pub(super) is_reversed: bool,
    pub(super) filter: String,
    older_than: Option<Duration>,
    pub(super) mode: Mode,
    /// What is selected, wherever its row moves.
    selected: Option<SocketId>,
    /// Where it is in the order, and where the first row on the screen is.
    cursor: usize,
    first: usize,
    /// Rows on the screen.
    page: usize,
    /// The first line of what is shown beside the table.
    pub(super) scroll: usize,
    message: Option<(BootNs, String)>,
    /// Whether a kill is being carried out, and whether somebody wanted to quit meanwhile.
    is_ending: bool,
    is_leaving: bool,
    /// Whether the screen shows something else than this.
    pub(super) is_dirty: bool,
}

impl State {
    /// `older_than`: rows are shown once they are; that comes with time and no change tells of it.
    pub(super) fn new(sort: Sort, older_than: Option<Duration>) -> State {
        State {
            rows: Vec::new(),
            order: Vec::new(),
            is_stale: true,
            sort,
            is_reversed: false,
            filter: String::new(),
            older_than,
            mode: Mode::Table,
            selected: None,
            cursor: 0,
            first: 0,
            page: 1,
            scroll: 0,
            message: None,
            is_ending: false,
            is_leaving: false,
            is_dirty: true,
        }
    }

    /// These are all there are now.
    pub(super) fn refill<'a>(&mut self, listeners: impl Iterator<Item = &'a Listener>, view: &View<'_>) {
        self.rows = listeners.map(|listener| Row::new(listener.clone(), None, view)).collect();
        self.touch();
    }

    /// Takes in a change, which concerns the selection where `is_meant`. The source may tell of a socket again, and of one
    /// that is gone.
    pub(super) fn apply(&mut self, change: &Change, is_meant: bool, view: &View<'_>) -> Action {
        let now = view.clock.now_boot_ns;
        match change {
            Change::Opened { listener, .. } | Change::Holders { listener, .. } => {
                let known = self.rows.iter().position(|row| same_socket(row.listener.socket.id, listener.socket.id));
                let opened = matches!(change, Change::Opened { .. }).then_some(now);
                match (known, is_meant) {
                    (Some(at), true) => {
                        let opened = opened.or(self.rows[at].opened);
                        self.rows[at] = Row::new(listener.clone(), opened, view);
                    }
                    (Some(at), false) => drop(self.rows.remove(at)),
                    (None, true) => self.rows.push(Row::new(listener.clone(), opened, view)),
                    (None, false) => return Action::Nothing,
                }
                self.touch();
                return self.renew_details(listener);
            }
            Change::Closed { listener, .. } => {
                let closes = |row: &&mut Row| same_socket(row.listener.socket.id, listener.socket.id);
                if let Some(row) = self.rows.iter_mut().find(closes) {
                    row.closed = Some(now);
                    self.touch();
                }
            }
            Change::Conflict { .. } | Change::Resync { .. } if is_meant => {
                let line = render::text::change(change, &View { width: None, colours: false, ..view.clone() });
                self.say(line, now);
            }
            Change::Conflict { .. } | Change::Resync { .. } => {}
        }
        Action::Nothing
    }

    /// The details that are shown are those of the listener as it is now.
    fn renew_details(&mut self, now: &Listener) -> Action {
        match &mut self.mode {
            Mode::Details { listener, .. } if same_socket(listener.socket.id, now.socket.id) => {
                listener.clone_from(now);
                Action::Explain(Box::new(now.clone()))
            }
            _ => Action::Nothing,
        }
    }

    /// Whether it still listens, as far as is known.
    pub(super) fn is_open(&self, listener: &Listener) -> bool {
        let is_it = |row: &Row| same_socket(row.listener.socket.id, listener.socket.id);
        self.rows.iter().any(|row| is_it(row) && row.closed.is_none())
    }

    /// Shows a line for a while. Escaped by whoever says it.
    pub(super) fn say(&mut self, line: impl Into<String>, now: BootNs) {
        self.message = Some((now, line.into()));
        self.is_dirty = true;
    }

    pub(super) fn message(&self) -> Option<&str> {
        self.message.as_ref().map(|(_, line)| &**line)
    }

    /// TCP and UDP sockets that are open, of all that were asked for.
    pub(super) fn counts(&self) -> (usize, usize) {
        let open = self.rows.iter().filter(|row| row.closed.is_none());
        let (tcp, udp): (Vec<_>, Vec<_>) = open.partition(|row| row.listener.socket.proto == Protocol::Tcp);
        (tcp.len(), udp.len())
    }

    /// The rows to be shown, in their order.
    pub(super) fn shown(&self) -> impl ExactSizeIterator<Item = &Row> {
        self.order.iter().map(|&index| &self.rows[index])
    }

    /// Where in [`State::shown`] the selected one is, and the first one on the screen.
    pub(super) fn place(&self) -> (usize, usize) {
        (self.cursor, self.first)
    }

    pub(super) fn selected(&self) -> Option<&Row> {
        self.order.get(self.cursor).map(|&index| &self.rows[index])
    }

    fn touch(&mut self) {
        (self.is_stale, self.is_dirty) = (true, true);
    }

    /// Brings the order up to date, for a table of so many rows; to be called before it is shown.
    pub(super) fn arrange(&mut self, page: usize, now: BootNs) {
        if self.is_stale || self.older_than.is_some() {
            self.reorder(now);
        }
        self.page = page.max(1);
        self.cursor = self.cursor.min(self.order.len().saturating_sub(1));
        self.first = self.first.min(self.order.len().saturating_sub(self.page));
        self.first = self.first.clamp((self.cursor + 1).saturating_sub(self.page), self.cursor);
    }

    fn reorder(&mut self, now: BootNs) {
        let needle = escape(&self.filter).to_lowercase();
        let is_old = |row: &Row| match self.older_than {
            None => true,
            Some(age) => {
                row.listener.began().is_some_and(|began| u128::from(now.saturating_sub(began)) > age.as_nanos())
            }
        };
        let is_shown = |&index: &usize| self.rows[index].is_found(&needle) && is_old(&self.rows[index]);
        let mut order: Vec<usize> = (0..self.rows.len()).filter(is_shown).collect();
        order.sort_by(|&a, &b| {
            let ordering = self.rows[a].compare(&self.rows[b], self.sort);
            if self.is_reversed { ordering.reverse() } else { ordering }
        });
        self.order = order;
        self.is_stale = false;
        if let Some(id) = self.selected {
            let found = self.shown().position(|row| same_socket(row.listener.socket.id, id));
            // Gone: who comes next in its place.
            self.cursor = found.unwrap_or(self.cursor);
        }
        self.cursor = self.cursor.min(self.order.len().saturating_sub(1));
        self.selected = self.selected().map(|row| row.listener.socket.id);
    }

    fn go_to(&mut self, place: usize) {
        self.cursor = place.min(self.order.len().saturating_sub(1));
        self.selected = self.selected().map(|row| row.listener.socket.id);
    }

    /// What was on the screen. The lines beside the table were so many, of which so many fit.
    pub(super) fn was_drawn(&mut self, lines: usize, room: usize) {
        self.scroll = self.scroll.min(lines.saturating_sub(room));
        if let Mode::Kill { plan: Some(planned), .. } = &mut self.mode {
            planned.is_seen = true;
        }
        self.is_dirty = false;
    }

    /// Lets go of what was to be seen for a while and no longer.
    pub(super) fn tick(&mut self, now: BootNs) {
        let is_over = |since: Option<BootNs>, span| since.is_some_and(|since| now >= since.saturating_add(span));
        let before = self.rows.len();
        self.rows.retain(|row| !is_over(row.closed, LINGERING));
        self.is_stale |= self.rows.len() != before;
        for row in &mut self.rows {
            row.opened = row.opened.filter(|opened| !is_over(Some(*opened), FRESH));
        }
        if is_over(self.message.as_ref().map(|(since, _)| *since), MESSAGE) {
            self.message = None;
        }
        self.is_dirty = true;
    }

    /// When the screen changes although nothing happens: something was shown for long enough, or an age on the screen
    /// becomes another one. Ages change together, as often as the youngest does: each second, each minute, each hour.
    pub(super) fn next_wake(&self, now: BootNs) -> Option<BootNs> {
        let fresh = self.rows.iter().filter_map(|row| Some(row.opened? + FRESH));
        let lingering = self.rows.iter().filter_map(|row| Some(row.closed? + LINGERING));
        let message = self.message.as_ref().map(|(since, _)| since + MESSAGE);
        let on_screen = self.shown().skip(self.first).take(self.page).filter(|row| row.closed.is_none());
        let youngest = on_screen.filter_map(|row| row.listener.began()).max();
        // One that is hidden for its age appears with it.
        let youngest = youngest.max(self.older_than.map(|_| now.saturating_sub(60 * SECOND)));
        let age = youngest.map(|began| next_age(began, now));
        fresh.chain(lingering).chain(message).chain(age).min()
    }

    pub(super) fn key(&mut self, key: KeyEvent, now: BootNs) -> Action {
        self.is_dirty = true;
        if self.is_stale {
            self.reorder(now);
        }
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        match (key.code, &self.mode) {
            (KeyCode::Char('c'), _) if is_control => return self.quit(now),
            (KeyCode::Char('z'), _) if is_control => return Action::Suspend,
            (KeyCode::Char('u'), Mode::Filter) if is_control => self.filter_by(String::new()),
            (KeyCode::Char(_), _) if key.modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT) => {}
            (code, Mode::Table) => return self.table_key(code, key.modifiers.contains(KeyModifiers::SHIFT), now),
            (code, Mode::Filter) => self.filter_key(code),
            (code, _) => return self.pane_key(code, now),
        }
        Action::Nothing
    }

    /// What is shown beside the table has the keys.
    fn pane_key(&mut self, code: KeyCode, now: BootNs) -> Action {
        if let Some(line) = moved(code, self.scroll, PANE_PAGE) {
            self.scroll = line;
            return Action::Nothing;
        }
        let is_yes = matches!(code, KeyCode::Char('y' | 'Y'));
        match std::mem::replace(&mut self.mode, Mode::Table) {
            Mode::Kill { plan: Some(planned), .. } if is_yes && planned.is_seen => {
                self.is_ending = true;
                Action::Agree
            }
            mode @ Mode::Kill { .. } if is_yes => {
                self.mode = mode;
                Action::Nothing
            }
            Mode::Kill { .. } => {
                self.say("nobody was signalled", now);
                Action::Decline
            }
            Mode::Details { listener, .. } if matches!(code, KeyCode::Char('x' | 'X')) => {
                let is_selected = |row: &Row| same_socket(row.listener.socket.id, listener.socket.id);
                if self.selected().is_some_and(is_selected) {
                    self.table_key(code, false, now)
                } else {
                    Action::Nothing
                }
            }
            _ => Action::Nothing,
        }
    }

    fn table_key(&mut self, code: KeyCode, shift: bool, now: BootNs) -> Action {
        match code {
            KeyCode::Char('q') => return self.quit(now),
            KeyCode::Esc if self.message.is_some() => self.message = None,
            KeyCode::Esc if !self.filter.is_empty() => self.filter_by(String::new()),
            KeyCode::Esc => return self.quit(now),
            KeyCode::Char('/') => self.open(Mode::Filter),
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.open(Mode::Help),
            KeyCode::Char('s') => {
                self.sort = self.sort.next();
                self.touch();
            }
            KeyCode::Char('r') => {
                self.is_reversed = !self.is_reversed;
                self.touch();
            }
            KeyCode::Enter | KeyCode::Char('i') => {
                if let Some(listener) = self.selected().map(|row| row.listener.clone()) {
                    self.open(Mode::Details { listener: listener.clone(), about: None });
                    return Action::Explain(Box::new(listener));
                }
            }
            KeyCode::Char('x') | KeyCode::F(9) => return self.plan(false, now),
            KeyCode::Delete => return self.plan(shift, now),
            KeyCode::Char('X') => return self.plan(true, now),
            code => self.move_key(code),
        }
        Action::Nothing
    }

    fn filter_key(&mut self, code: KeyCode) {
        match code {
            KeyCode::Esc => {
                self.filter_by(String::new());
                self.open(Mode::Table);
            }
            KeyCode::Enter => self.open(Mode::Table),
            KeyCode::Char(c) => self.filter_by(format!("{}{c}", self.filter)),
            KeyCode::Backspace if self.filter.is_empty() => self.open(Mode::Table),
            KeyCode::Backspace => {
                let mut filter = std::mem::take(&mut self.filter);
                filter.pop();
                self.filter_by(filter);
            }
            code => self.move_key(code),
        }
    }

    fn filter_by(&mut self, filter: String) {
        self.filter = filter;
        self.touch();
    }

    /// Moves the selection, where the key means that.
    fn move_key(&mut self, code: KeyCode) {
        if let Some(place) = moved(code, self.cursor, self.page) {
            self.go_to(place);
        }
    }

    fn open(&mut self, mode: Mode) {
        self.mode = mode;
        self.scroll = 0;
    }

    fn plan(&mut self, force: bool, now: BootNs) -> Action {
        let Some(row) = self.selected() else { return Action::Nothing };
        let socket = row.listener.socket.clone();
        if row.closed.is_some() {
            self.say(format!("{} has closed already", target(&socket)), now);
        } else if self.is_ending {
            self.say("another port is still being freed", now);
        } else {
            self.open(Mode::Kill { socket: socket.clone(), force, plan: None });
            return Action::Plan { socket, force };
        }
        Action::Nothing
    }

    /// The plan that was asked for. Where it signals nobody, nobody needs to agree: what follows says why.
    pub(super) fn planned(&mut self, planned: Planned) -> Action {
        self.is_dirty = true;
        let Mode::Kill { plan, .. } = &mut self.mode else { return Action::Decline };
        if planned.plan.victims.is_empty() {
            self.open(Mode::Table);
            self.is_ending = true;
            return Action::Agree;
        }
        *plan = Some(Box::new(planned));
        Action::Nothing
    }

    /// What `who` says besides.
    pub(super) fn explained(&mut self, found: About) {
        if let Mode::Details { about, .. } = &mut self.mode {
            *about = Some(found);
            self.is_dirty = true;
        }
    }

    /// What became of the plan. What takes more than a line is shown beside the table, unless somebody looks at something
    /// else.
    pub(super) fn ended(&mut self, outcomes: &anyhow::Result<Vec<Outcome>>, now: BootNs) {
        (self.is_ending, self.is_leaving) = (false, false);
        let (line, report) = match outcomes {
            Ok(outcomes) => {
                let lines: Vec<String> = outcomes.iter().map(text::outcome).collect();
                let whole = outcomes.iter().zip(&lines).map(|(it, line)| format!("{line}\n{}", text::findings(it)));
                let report = (!outcomes.iter().all(Outcome::is_done)).then(|| whole.collect());
                (lines.join("; "), report)
            }
            Err(error) => {
                let line = escape(&format!("{error:#}")).into_owned();
                (line.clone(), Some(line))
            }
        };
        match (report, &self.mode) {
            (Some(report), Mode::Table | Mode::Kill { .. }) => {
                self.message = None;
                self.open(Mode::Report(report));
            }
            _ => self.say(line, now),
        }
        self.is_dirty = true;
    }

    /// A kill that is being carried out is left only on purpose.
    fn quit(&mut self, now: BootNs) -> Action {
        if self.is_ending && !self.is_leaving {
            self.is_leaving = true;
            self.say("a port is still being freed; again to leave all the same", now);
            return Action::Nothing;
        }
        Action::Quit
    }
}

/// How people name a listener: `127.0.0.1:8000/tcp`.
pub(super) fn target(socket: &Socket) -> String {
    format!("{}/{}", socket.endpoint(), socket.proto)
}

/// Where a key moves to, in lines.
fn moved(code: KeyCode, from: usize, page: usize) -> Option<usize> {
    Some(match code {
        KeyCode::Up | KeyCode::Char('k') => from.saturating_sub(1),
        KeyCode::Down | KeyCode::Char('j') => from + 1,
        KeyCode::PageUp => from.saturating_sub(page),
        KeyCode::PageDown => from + page,
        KeyCode::Home | KeyCode::Char('g') => 0,
        KeyCode::End | KeyCode::Char('G') => usize::MAX,
        _ => return None,
    })
}

/// When what [`render::age`] says of it becomes something else.
fn next_age(began: BootNs, now: BootNs) -> BootNs {
    let age = now.saturating_sub(began);
    let unit = match age / SECOND {
        0..60 => SECOND,
        60..3_600 => 60 * SECOND,
        3_600..86_400 => 3_600 * SECOND,
        _ => 86_400 * SECOND,
    };
    began + (age / unit + 1) * unit
}

#[cfg(test)]
pub(super) mod tests;
