//! A row of `top`: what is shown, searched and compared of a listener. Pure.

use std::cmp::{Ordering, Reverse};

use clap::ValueEnum;
use portwatch::model::{BootNs, Listener, Socket};
use portwatch::render::{View, command_line, escape};

/// What rows are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    Port,
    /// The youngest first.
    Age,
    Name,
    User,
    Pid,
}

impl Sort {
    /// The title of the column.
    pub(super) fn title(self) -> &'static str {
        match self {
            Sort::Port => "PORT",
            Sort::Age => "AGE",
            Sort::Name => "NAME",
            Sort::User => "USER",
            Sort::Pid => "PID",
        }
    }

    pub(super) fn next(self) -> Sort {
        let all = Sort::value_variants();
        let at = all.iter().position(|sort| *sort == self).unwrap_or_default();
        all[(at + 1) % all.len()]
    }
}

/// A listener, and what there is to see of it.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) listener: Listener,
    /// Of the binder; where nobody is visible, of the socket.
    user: String,
    /// What the filter searches, in lower case.
    searched: String,
    /// When it was seen to open, for as long as it looks new.
    pub(super) opened: Option<BootNs>,
    /// When it closed; it is still shown for a moment.
    pub(super) closed: Option<BootNs>,
}

impl Row {
    /// `opened`: when it was seen to.
    pub(super) fn new(listener: Listener, opened: Option<BootNs>, view: &View<'_>) -> Row {
        let binder = listener.binder().map(|holder| &holder.process);
        let uid = binder.map_or(Some(listener.socket.uid), |process| process.uid);
        let user = uid.map(|uid| (view.users)(uid).unwrap_or_else(|| uid.to_string())).unwrap_or_default();
        let (name, command) = binder.map(|process| (escape(&process.name), command_line(process))).unwrap_or_default();
        let searched = format!("{} {name} {} {command}", listener.socket.port, escape(&user)).to_lowercase();
        Row { listener, user, searched, opened, closed: None }
    }

    /// Whether the filter, in lower case, lets it pass.
    pub(super) fn is_found(&self, needle: &str) -> bool {
        self.searched.contains(needle)
    }

    /// How it stands to another one in the order.
    pub(super) fn compare(&self, other: &Row, sort: Sort) -> Ordering {
        let by_port = |row: &Row| {
            let Socket { port, proto, address, netns, id, .. } = row.listener.socket;
            (port, proto, address, netns, id)
        };
        let name = |row: &Row| row.listener.binder().map(|holder| holder.process.name.to_lowercase());
        let pid = |row: &Row| row.listener.binder().map(|holder| holder.process.id.pid);
        let began = |row: &Row| Reverse(row.listener.began());
        let first = match sort {
            Sort::Port => Ordering::Equal,
            Sort::Age => began(self).cmp(&began(other)),
            // Who is not known comes last.
            Sort::Name => (name(self).is_none(), name(self)).cmp(&(name(other).is_none(), name(other))),
            Sort::User => self.user.cmp(&other.user),
            Sort::Pid => (pid(self).is_none(), pid(self)).cmp(&(pid(other).is_none(), pid(other))),
        };
        first.then_with(|| by_port(self).cmp(&by_port(other)))
    }
}
