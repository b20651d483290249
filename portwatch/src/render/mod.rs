//! Listeners and changes as text and JSON. Pure: time, names of users and the width of the terminal come in a [`View`].
//!
//! Every string of a process is hostile. Text shows it through [`escape`], JSON through `serde_json` and, because a
//! terminal obeys some characters that JSON allows, with those escaped as well.

pub mod diagnosis;
pub mod history;
pub mod json;
pub mod rules;
pub mod servers;
pub mod table;
pub mod text;

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use unicode_width::UnicodeWidthChar;

use crate::model::{BootNs, Process, Socket};

/// One moment on both clocks, by which times since boot become times of day.
#[derive(Clone, Debug)]
pub struct Clock {
    pub now_boot_ns: BootNs,
    pub now_wall: Timestamp,
    /// Where local times are shown.
    pub tz: TimeZone,
}

impl Clock {
    /// The time of day at `at`.
    pub fn wall(&self, at: BootNs) -> Timestamp {
        let ago = SignedDuration::from_nanos_i128(i128::from(self.now_boot_ns) - i128::from(at));
        self.now_wall.checked_sub(ago).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// How long ago `at` was; nothing lies in the future.
    pub fn age(&self, at: BootNs) -> Duration {
        Duration::from_nanos(self.now_boot_ns.saturating_sub(at))
    }

    /// `2026-01-01T00:00:00.000Z`.
    pub fn utc(&self, at: BootNs) -> String {
        format!("{:.3}", self.wall(at))
    }

    fn local(&self, at: BootNs, format: &str) -> String {
        self.wall(at).to_zoned(self.tz.clone()).strftime(format).to_string()
    }
}

/// What a renderer needs besides what it shows.
#[derive(Clone)]
pub struct View<'a> {
    pub clock: Clock,
    /// Name of a uid, where it has one.
    pub users: &'a dyn Fn(u32) -> Option<String>,
    /// Effective uid of the one who looks, which decides how a ghost is explained.
    pub euid: u32,
    /// Columns of the terminal; `None` (a pipe, `--wide`): nothing is cut.
    pub width: Option<usize>,
    pub colours: bool,
}

impl fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").field("clock", &self.clock).field("euid", &self.euid).finish_non_exhaustive()
    }
}

impl View<'_> {
    /// Name of the user, or the number where nobody is called so; escaped.
    pub(crate) fn user(&self, uid: u32) -> String {
        (self.users)(uid).map_or_else(|| uid.to_string(), |name| escape(&name).into_owned())
    }

    /// Why no process is shown.
    fn ghost(&self, socket: &Socket) -> String {
        if self.euid == 0 || self.euid == socket.uid {
            return "ghost: no visible holder".to_owned();
        }
        let name = (self.users)(socket.uid).map(|name| format!(" ({})", escape(&name))).unwrap_or_default();
        format!("held by uid {}{name}, not visible to you; try sudo", socket.uid)
    }

    fn paint(&self, style: anstyle::Style, text: &str) -> String {
        if self.colours { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }
}

const BOLD: anstyle::Style = anstyle::Style::new().bold();
const DIM: anstyle::Style = anstyle::Style::new().dimmed();
const RED: anstyle::Style = anstyle::AnsiColor::Red.on_default();
const GREEN: anstyle::Style = anstyle::AnsiColor::Green.on_default();
const YELLOW: anstyle::Style = anstyle::AnsiColor::Yellow.on_default();

/// The text with everything visible that would move the cursor, colour, reorder or hide: control characters, the
/// bidirectional controls, invisible characters, line separators.
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hazard) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if !is_hazard(c) => out.push(c),
            c if c < '\u{100}' => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push_str(&format!("\\u{{{:x}}}", u32::from(c))),
        }
    }
    Cow::Owned(out)
}

/// Whether a terminal would obey, reorder by or hide the character.
pub(crate) fn is_hazard(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{feff}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

/// The command line with spaces between, `[name]` where there is none, as ps shows kernel threads and zombies. Escaped.
pub fn command_line(process: &Process) -> String {
    if process.command.is_empty() {
        return format!("[{}]", escape(&process.name));
    }
    escape(&process.command.join(" ")).into_owned()
}

/// The largest whole unit: `12s`, `5m`, `3h`, `5d`.
pub fn age(age: Duration) -> String {
    match age.as_secs() {
        s @ 0..60 => format!("{s}s"),
        s @ 60..3_600 => format!("{}m", s / 60),
        s @ 3_600..86_400 => format!("{}h", s / 3_600),
        s => format!("{}d", s / 86_400),
    }
}

/// A span that somebody watched: `450µs`, `12ms`, `3.2s`, and as [`age`] from a minute on.
pub fn span(span: Duration) -> String {
    match span.as_micros() {
        us @ 0..1_000 => format!("{us}µs"),
        us @ 1_000..1_000_000 => format!("{}ms", us / 1_000),
        us @ 1_000_000..60_000_000 => format!("{}.{}s", us / 1_000_000, us / 100_000 % 10),
        _ => age(span),
    }
}

/// Columns that the text takes on a terminal.
pub fn width(text: &str) -> usize {
    text.chars().map(|c| c.width().unwrap_or(0)).sum()
}

/// At most `columns` columns of the text, with `…` at the end where something was cut off.
pub fn cut(text: &str, columns: usize) -> Cow<'_, str> {
    // Bytes are never fewer than columns: a short line needs no counting.
    if text.len() <= columns || width(text) <= columns {
        return Cow::Borrowed(text);
    }
    let mut out = String::new();
    let mut used = 1;
    for c in text.chars() {
        used += c.width().unwrap_or(0);
        if used > columns {
            break;
        }
        out.push(c);
    }
    if columns > 0 {
        out.push('…');
    }
    Cow::Owned(out)
}

#[cfg(test)]
pub(crate) mod tests;
