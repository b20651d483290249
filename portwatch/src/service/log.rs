//! The log of the service, on stderr: what `tracing` and, bridged, the `log` crate are told.
//!
//! Each event is one line, fields at its end: `2026-01-01T00:00:00.000Z info a port was freed port=8000 peer_uid=1000`.
//! Under systemd the journal has the time itself, and learns the priority from a prefix: `<6>a port was freed …`. Not by
//! the journal's own protocol, which would keep the fields out of what `journalctl` shows, and needs its socket.
//!
//! Whatever stands in a message or a field may come from a hostile process. It is escaped, so that it neither ends the
//! line nor moves a cursor, and a value that could look like other fields is quoted. Give such strings as fields.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::str::FromStr;

use anyhow::{Context, anyhow};
use jiff::Timestamp;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_log::NormalizeEvent;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::render::escape;

/// What is logged where nobody says.
const DEFAULT: &str = "info";

/// The variable that says what is logged.
pub const VARIABLE: &str = "PORTWATCH_LOG";

/// What is logged: a level (`error`, `warn`, `info`, `debug`, `trace` or `off`), or several by module, such as
/// `warn,portwatch::agent=debug`.
#[derive(Clone, Debug)]
pub struct Filter(Targets);

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refusal = || format!("no level '{}'; use error, warn, info, debug, trace or MODULE=LEVEL,…", escape(text));
        // A level that is misspelt would be taken for a module, all of which is logged, and nothing else.
        let is_clear = |part: &str| part.contains('=') || part.parse::<LevelFilter>().is_ok();
        if !text.split(',').all(is_clear) {
            return Err(refusal());
        }
        let targets: Targets = text.parse().map_err(|_| refusal())?;
        // What the loader of kernel programs does is of interest to its developers alone, who name it.
        let is_named = targets.iter().any(|(target, _)| target.starts_with("aya"));
        let general = targets.default_level().unwrap_or(LevelFilter::OFF);
        Ok(Filter(if is_named { targets } else { targets.with_target("aya", general.min(LevelFilter::WARN)) }))
    }
}

#[cfg(test)]
impl Filter {
    /// The most that is logged of a module.
    pub(super) fn level(&self, target: &str) -> LevelFilter {
        [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE]
            .into_iter()
            .take_while(|level| self.0.would_enable(target, level))
            .last()
            .map_or(LevelFilter::OFF, LevelFilter::from_level)
    }
}

/// Logs to stderr from now on. `filter` is what the command line says; else `$PORTWATCH_LOG`, else `info`.
///
/// # Errors
/// Where the variable means nothing, or something logs already.
pub fn start(filter: Option<Filter>) -> anyhow::Result<()> {
    let Filter(targets) = match (filter, std::env::var(VARIABLE)) {
        (Some(filter), _) => filter,
        (None, Ok(text)) if !text.is_empty() => text.parse().map_err(|error| anyhow!("${VARIABLE}: {error}"))?,
        (None, _) => DEFAULT.parse().map_err(|error| anyhow!("{error}"))?,
    };
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let journal = is_journal(&stream, io::stderr());
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Line { journal })
        .fmt_fields(Fields)
        // Where stderr cannot be written, there is nobody to tell, and nothing to panic about.
        .log_internal_errors(false)
        .with_writer(io::stderr);
    tracing_subscriber::registry().with(lines).with(targets).try_init().context("cannot start the log")
}

/// Whether `stream`, the value of `$JOURNAL_STREAM` (`DEVICE:INODE`), names this descriptor: a child whose stderr was
/// redirected inherits the variable, too.
fn is_journal(stream: &str, stderr: impl AsFd) -> bool {
    let Ok(stat) = rustix::fs::fstat(stderr) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

/// How an event becomes a line.
struct Line {
    journal: bool,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let bridged = event.normalized_metadata();
        let metadata = bridged.as_ref().unwrap_or_else(|| event.metadata());
        let (name, priority) = level(*metadata.level());
        if self.journal {
            write!(out, "<{priority}>")?;
        } else {
            write!(out, "{:.3} {name} ", Timestamp::now())?;
        }
        if !metadata.target().starts_with("portwatch") {
            write!(out, "{}: ", escape(metadata.target()))?;
        }
        let mut text = Text::default();
        event.record(&mut text);
        write!(out, "{}{}", text.message, text.fields)?;
        for span in context.event_scope().into_iter().flatten() {
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>() {
                write!(out, "{fields}")?;
            }
        }
        writeln!(out)
    }
}

/// The name of a level, and its priority in syslog(3).
fn level(level: Level) -> (&'static str, u8) {
    match level {
        Level::ERROR => ("error", 3),
        Level::WARN => ("warn", 4),
        Level::INFO => ("info", 6),
        Level::DEBUG => ("debug", 7),
        Level::TRACE => ("trace", 7),
    }
}

/// The fields of a span as they stand in each of its lines.
struct Fields;

impl<'writer> FormatFields<'writer> for Fields {
    fn format_fields<R: RecordFields>(&self, mut out: Writer<'writer>, fields: R) -> fmt::Result {
        let mut text = Text::default();
        fields.record(&mut text);
        out.write_str(&text.fields)
    }
}

/// What an event says: the message, and ` key=value` for each field.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(&escape(value)),
            // Where a record of the `log` crate came from; not data.
            name if name.starts_with("log.") => {}
            name => {
                self.fields.extend([" ", name, "="]);
                quote(value, &mut self.fields);
            }
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// Appends the value, escaped, and in quotes where it could not be told from what follows.
fn quote(value: &str, out: &mut String) {
    let is_plain = !value.is_empty() && !value.contains(|c: char| c.is_whitespace() || matches!(c, '"' | '\\' | '='));
    if is_plain {
        out.push_str(&escape(value));
        return;
    }
    out.push('"');
    out.push_str(&escape(&value.replace('\\', "\\\\").replace('"', "\\\"")));
    out.push('"');
}
