//! `portwatch diagnose`: why a port is or stays taken, and the next command.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;

use clap::Args;
use portwatch::diagnose::{self, Diagnosis, Extent, Facts, Published, Question};
use portwatch::engine;
use portwatch::model::{Listener, Protocol};
use portwatch::render::{diagnosis, json};
use portwatch::select::{Filters, Selector, Target, builtin_sets, parse_targets};
use portwatch::source::{Scanner, netns};
use portwatch::wire::{Request, Response, Scope, Selection};

use super::{Users, block_on, explain, note, print, view};
use crate::cli::{Globals, Netns};
use crate::exit_codes::{NO, Usage};

/// More ports than this are a survey, which `list` is for.
const MAX_PORTS: usize = 64;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch diagnose 8000
  portwatch diagnose 127.0.0.1:5432 --json
  portwatch diagnose 8000 -6
  sudo portwatch diagnose 4789/udp --netns 4026532265

Calls bind() as a server would, and lets go at once. Without a protocol TCP is told, and UDP where something has it.
Targets: 8000  :8000  3000,8080  3000-3005  8000/tcp  5353/udp  127.0.0.1:8000  [::1]:8000  @dev (3000, 8000, 8080)
Exit codes: 0 nothing is in the way of any of the ports, 1 something is, 2 usage, 3 not permitted, 4 portwatch itself failed")]
pub(crate) struct DiagnoseArgs {
    /// Ports to look at, 64 at most
    #[arg(value_name = "TARGET", required = true)]
    pub(crate) targets: Vec<String>,
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
    /// As a server of IPv4 binds, on 0.0.0.0: what has the port on IPv6 alone is not looked at
    #[arg(short = '4', long)]
    pub(crate) ipv4: bool,
    /// As a server of IPv6 alone binds, on ::
    #[arg(short = '6', long)]
    pub(crate) ipv6: bool,
    /// As a server binds that listens on this address
    #[arg(long = "addr", value_name = "IP", value_parser = crate::cli::address)]
    pub(crate) addresses: Vec<IpAddr>,
    /// TCP only
    #[arg(long, conflicts_with = "udp")]
    pub(crate) tcp: bool,
    /// UDP only
    #[arg(long)]
    pub(crate) udp: bool,
    /// Network namespace to look in: self, or its number
    #[arg(long, default_value = "self", value_name = "self|ID", value_parser = crate::cli::netns)]
    pub(crate) netns: Netns,
}

pub(crate) fn run(args: &DiagnoseArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let targets = parse_targets(&args.targets, &builtin_sets()).map_err(|bad| Usage(bad.to_string()))?;
    let asked = questions(args, &targets)?;
    let questions: Vec<Question> = asked.iter().map(|asked| asked.question).collect();
    let look = || {
        let mut scanner = Scanner::open(globals.probe);
        if let Some(reason) = scanner.refusal() {
            explain(globals, &format!("holders are read from {}: {reason}", scanner.method()));
        }
        diagnose::read(&questions, &mut scanner, Extent::Whole)
    };
    let is_own = match args.netns {
        Netns::Own => true,
        Netns::Id(id) => netns::own().is_ok_and(|own| own == id),
        Netns::All => false,
    };
    let mut facts: Facts = match args.netns {
        Netns::Own => look()?,
        Netns::Id(_) if is_own => look()?,
        Netns::Id(id) => netns::enter(&netns::open(id)?, look)?,
        Netns::All => return Err(Usage("diagnose looks in one network namespace; give its number".to_owned()).into()),
    };
    facts.learn(ask_agent(&questions, globals)?);
    ask_engine(&mut facts, &questions, is_own);
    let DiagnoseArgs { ipv4, ipv6, ref addresses, .. } = *args;
    if ipv4 != ipv6 || !addresses.is_empty() {
        let filters = Filters { ipv4, ipv6, addresses: addresses.clone(), ..Filters::default() };
        let selector = Selector::new(targets, filters);
        facts.retain(&|socket| selector.is_hindered_by(socket));
    }
    let mut diagnoses: Vec<Diagnosis> = Vec::new();
    for Asked { question, is_implied } in asked {
        let diagnosis = facts.diagnose(question);
        if !is_implied || diagnosis.findings.iter().any(|finding| finding.kind.is_owner()) {
            diagnoses.push(diagnosis);
        }
    }
    if args.json {
        print(&json::array(&diagnoses))?;
    } else {
        let users = Users::default();
        let name = |uid| users.name(uid);
        let view = view(&name);
        let blocks: Vec<String> = diagnoses.iter().map(|one| diagnosis::diagnosis(one, &view)).collect();
        print(&blocks.concat())?;
    }
    for unseen in &facts.unseen {
        note(&portwatch::render::escape(unseen));
    }
    Ok(if diagnoses.iter().all(Diagnosis::is_free) { ExitCode::SUCCESS } else { ExitCode::from(NO) })
}

/// Who holds the ports as the agent sees it; nothing where none answers.
fn ask_agent(questions: &[Question], globals: &Globals) -> anyhow::Result<Vec<Listener>> {
    let targets = questions.iter().map(|question| format!("{}/{}", question.port, question.proto)).collect();
    let selection = Selection { targets, netns: Scope::All, ..Selection::default() };
    let told = block_on(super::ask_agent(&Request::List { selection }, None, globals))?.unwrap_or_default();
    let listeners = told.responses.into_iter().filter_map(|response| match response {
        Response::Listener { listener, .. } => Some(listener),
        _ => None,
    });
    Ok(listeners.collect())
}

/// Asks the container engine who publishes the ports that a proxy holds, or nobody: packet filter rules lead into
/// containers without any listener. Those rules are of the engine's network namespace, taken to be our own.
///
/// Costs nothing where no engine has a socket, else milliseconds; a hung engine is given up.
fn ask_engine(facts: &mut Facts, questions: &[Question], is_own: bool) {
    let is_on = |listener: &&Listener, question: &Question| {
        let socket = &listener.socket;
        (socket.netns, socket.port, socket.proto) == (facts.netns, question.port, question.proto)
    };
    let is_unclear = |question: &&Question| {
        let there = facts.listeners.iter().filter(|listener| is_on(listener, question));
        let there: Vec<Listener> = there.cloned().collect();
        if there.is_empty() { is_own } else { engine::is_involved_in(&there) }
    };
    let unclear: Vec<Question> = questions.iter().filter(is_unclear).copied().collect();
    if unclear.is_empty() {
        return;
    }
    let (engine, roster) = engine::ask();
    if let Some(error) = roster.error().filter(|error| error.denied || is_proxied(facts)) {
        facts.unseen.push(format!("published ports were not looked at: {error}"));
    }
    let program = match engine.map(|engine| engine.endpoint()) {
        Some(endpoint) if endpoint.contains("podman") => "podman",
        _ => "docker",
    };
    for Question { port, proto, .. } in unclear {
        let Some(engine::Published { container, port: published }) = roster.publishing(port, proto) else { continue };
        let to = match container.addresses.first() {
            Some(address) => SocketAddr::new(*address, published.container_port).to_string(),
            None => format!("port {}", published.container_port),
        };
        facts.published.push(Published {
            port,
            proto,
            next: format!("{program} stop {}", container.name),
            container: container.name,
            engine: program.to_owned(),
            to,
        });
    }
}

/// Whether some listener here is only what publishes a container's port.
fn is_proxied(facts: &Facts) -> bool {
    let here: Vec<Listener> = facts.listeners.iter().filter(|l| l.socket.netns == facts.netns).cloned().collect();
    engine::is_involved_in(&here)
}

struct Asked {
    question: Question,
    /// Nobody named the protocol: it is UDP, of which only trouble is told.
    is_implied: bool,
}

fn questions(args: &DiagnoseArgs, targets: &[Target]) -> anyhow::Result<Vec<Asked>> {
    let count: usize = targets.iter().map(|target| target.ports.len()).sum();
    if count > MAX_PORTS {
        return Err(Usage(format!(
            "diagnose looks at {MAX_PORTS} ports at most, and these are {count}; 'portwatch list {}' shows who has them",
            args.targets.join(" ").escape_debug()
        ))
        .into());
    }
    let v6only = args.ipv6 && !args.ipv4;
    let mut asked: Vec<Asked> = Vec::new();
    for Target { ports, proto, address } in targets {
        let addresses = args.addresses_of(*address);
        for port in ports.clone() {
            for wanted in [Protocol::Tcp, Protocol::Udp] {
                let chosen = match wanted {
                    Protocol::Tcp => args.tcp || !args.udp,
                    Protocol::Udp => args.udp || !args.tcp,
                };
                if !chosen || proto.is_some_and(|proto| proto != wanted) {
                    continue;
                }
                let is_implied = wanted == Protocol::Udp && proto.is_none() && !args.udp;
                for &address in &addresses {
                    let question = Question { port, proto: wanted, address, v6only };
                    match asked.iter_mut().find(|known| known.question == question) {
                        Some(known) => known.is_implied &= is_implied,
                        None => asked.push(Asked { question, is_implied }),
                    }
                }
            }
        }
    }
    if asked.is_empty() {
        let options = "--tcp, --udp, -4, -6 or --addr";
        return Err(Usage(format!("the targets name another protocol or address than {options}")).into());
    }
    Ok(asked)
}

impl DiagnoseArgs {
    /// Where a bind is tried for a target that names this address, or none; `None`: everywhere.
    fn addresses_of(&self, named: Option<IpAddr>) -> Vec<Option<IpAddr>> {
        let is_of_family = |address: &IpAddr| match address {
            IpAddr::V4(_) => self.ipv4 || !self.ipv6,
            IpAddr::V6(_) => self.ipv6 || !self.ipv4,
        };
        let wanted: Vec<IpAddr> = match named {
            Some(named) if self.addresses.is_empty() || self.addresses.contains(&named) => vec![named],
            Some(_) => Vec::new(),
            None if !self.addresses.is_empty() => self.addresses.clone(),
            None if self.ipv4 == self.ipv6 => return vec![None],
            None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        };
        wanted.into_iter().filter(is_of_family).map(Some).collect()
    }
}
