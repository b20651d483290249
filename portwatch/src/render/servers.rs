//! Servers in the background, as `ps` shows them: a table for people, objects for scripts.

use std::net::SocketAddr;

use serde::Serialize;

use super::table::{lay_out, left, right};
use super::{View, age, escape};
use crate::model::Protocol;
use crate::run::register::Record;

/// What is found of a server now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Health {
    /// It listens; where it has a path to ask, it answered 2xx.
    Ok,
    /// It answered with another status.
    Status { status: u16 },
    /// It listens, and does not answer as it should.
    Silent { reason: String },
    /// Nothing of it listens on its port.
    NotListening,
    /// It has no port.
    None,
}

/// A server, as `ps --json` and `run --background --json` show it.
#[derive(Debug, Serialize)]
pub struct Server<'a> {
    pub name: &'a str,
    /// Of the command itself.
    pub pid: u32,
    pub port: Option<u16>,
    /// Where it was said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proto: Option<Protocol>,
    pub address: Option<SocketAddr>,
    pub since: String,
    pub command: &'a [String],
    pub cwd: Option<&'a str>,
    /// Of the process that ends it all on SIGTERM.
    pub watcher: u32,
    pub log: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<&'a Health>,
}

pub fn json<'a>(record: &'a Record, log: String, health: Option<&'a Health>, view: &View<'_>) -> Server<'a> {
    Server {
        name: &record.name,
        pid: record.process.pid,
        port: record.port,
        proto: record.proto,
        address: record.address,
        since: view.clock.utc(record.began),
        command: &record.command,
        cwd: record.cwd.as_deref(),
        watcher: record.watcher.pid,
        log,
        health,
    }
}

/// With line ends.
pub fn table(servers: &[(Record, Health)], view: &View<'_>) -> String {
    let columns = [left("NAME"), right("PORT"), right("PID"), right("AGE"), left("HEALTH"), left("COMMAND")];
    let rows: Vec<(bool, Vec<String>)> = servers
        .iter()
        .map(|(record, health)| {
            let proto = record.proto.map(|proto| format!("/{proto}")).unwrap_or_default();
            let port = record.port.map_or_else(|| "-".to_owned(), |port| format!("{port}{proto}"));
            let row = vec![
                record.name.clone(),
                port,
                record.process.pid.to_string(),
                age(view.clock.age(record.began)),
                in_words(health),
                escape(&record.command.join(" ")).into_owned(),
            ];
            (false, row)
        })
        .collect();
    lay_out(&columns, &rows, view)
}

fn in_words(health: &Health) -> String {
    match health {
        Health::Ok => "ok".to_owned(),
        Health::Status { status } => status.to_string(),
        Health::Silent { reason } => escape(reason).into_owned(),
        Health::NotListening => "not listening".to_owned(),
        Health::None => "-".to_owned(),
    }
}
