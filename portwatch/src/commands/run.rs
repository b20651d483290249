//! `portwatch run -- CMD`: a command on a port of its own, of which nothing is left behind.
//!
//! ```text
//!  fork the supervisor ─► choose (or free) the port ─► start ─► listens? well? ─► (background: leave) ─► over
//! ```
//! The supervisor is forked first, before there are threads; what it does is [`portwatch::run`]'s. Here is what people
//! see of it: the port, the waiting, the signals passed on, and the words.

pub(super) mod ready;

use std::cell::RefCell;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use portwatch::model::{Listener, ProcessId, Protocol};
use portwatch::render::{self, escape, json, servers};
use portwatch::run::port::{Claim, Ports};
use portwatch::run::register::{self, Locked, Record, Register};
use portwatch::run::{
    Cause, LIFETIME_OVER, Order, Over, Signals, Start, Status, Supervised, Told, health, log, with_port,
};
use portwatch::source::process;
use rustix::process::Signal;

use super::{Users, kill, note, print, view};
use crate::cli::{Globals, duration, some_duration};
use crate::exit_codes::{FAILED, NO, Usage};

/// As shells have it: the command was found and cannot be run, or was not found.
const CANNOT_RUN: u8 = 126;
const NOT_FOUND: u8 = 127;

/// A command without a port is in the background once it has gone on for so long. There is nothing that it does by which to
/// tell that it is well; that it is not, its end tells.
const AT_ONCE: Duration = Duration::from_millis(100);

/// Lines of its log that are shown of a server in the background that did not come up.
const LAST_WORDS: usize = 10;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portwatch run --port 8000 -- python3 -m http.server {port}
  portwatch run --port 3000-3010 -- npm run dev            the first free one, as $PORT
  portwatch run --port 8000 --replace -y --health /up -- ./server
  portwatch run --port 8000 --background --lifetime 1h -- ./server
  portwatch run --port 5353/udp --replace -y -- ./resolver
  portwatch run -- make test                               whatever it leaves behind is ended

When the command ends, everything that came of it is ended: SIGTERM, the grace, SIGKILL; daemons
too, and also where portwatch itself is killed. Signals to portwatch are passed on to the command;
SIGTERM ends everything.

A port is one of TCP: who has it by UDP is not in the way. A server of UDP is ready there, too; for
its port to be free by UDP, and to be freed, say /udp. With /udp or /tcp that protocol alone counts.

Exit codes: the command's own; 128+N where signal N ended it; 124 where the lifetime was over;
126 and 127 where it cannot be run; 1 where the port is taken, or it is not ready in time or ends
well before it is; 2, 3, 4 as for all verbs")]
pub(crate) struct RunArgs {
    /// Port to run it on, as $PORT and in place of {port} in the command; of a range, the first that is free
    #[arg(long, value_name = "P[-Q][/udp]")]
    pub(crate) port: Option<Ports>,
    /// Free the port first, as `portwatch kill` does; of a range where none is free, the first one
    #[arg(long, requires = "port")]
    pub(crate) replace: bool,
    /// Do not ask before the port is freed
    #[arg(short, long, requires = "replace")]
    pub(crate) yes: bool,
    /// Take the next free port above, where the port is taken
    #[arg(long, requires = "port", conflicts_with = "replace")]
    pub(crate) fallback: bool,
    /// How long it may take until it listens there, and is well
    #[arg(long, requires = "port", default_value = "30s", value_name = "DURATION", value_parser = some_duration)]
    pub(crate) wait_bound: Duration,
    /// It is ready when GET of this path answers 2xx
    #[arg(long, requires = "port", value_name = "PATH", value_parser = health::path)]
    pub(crate) health: Option<String>,
    /// End it after this time
    #[arg(long, value_name = "DURATION", value_parser = some_duration)]
    pub(crate) lifetime: Option<Duration>,
    /// How long it may take to end after SIGTERM before it gets SIGKILL; then the same for what it left behind
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = duration)]
    pub(crate) grace: Duration,
    /// Go to the background once it is ready, and print its name, PID and port
    #[arg(long)]
    pub(crate) background: bool,
    /// What to call it; by default after the program and the port
    #[arg(long, requires = "background", value_name = "NAME", value_parser = register::check_name)]
    pub(crate) name: Option<String>,
    /// Start nothing where so many servers of this user are in the background already
    #[arg(long, requires = "background", value_name = "N")]
    pub(crate) max_servers: Option<usize>,
    /// One JSON object instead of the line
    #[arg(long, requires = "background")]
    pub(crate) json: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

pub(crate) fn run(args: &RunArgs, globals: &Globals) -> anyhow::Result<ExitCode> {
    let (program, arguments) = args.command.split_first().context("clap requires a command")?;
    if program.is_empty() {
        return Err(Usage("the command is empty; try: portwatch run -- ./server".to_owned()).into());
    }
    if args.health.is_some() && args.port.is_some_and(|ports| ports.proto == Some(Protocol::Udp)) {
        return Err(Usage("--health asks by HTTP, and not by UDP; leave out one of the two".to_owned()).into());
    }
    let order = Order {
        program: program.clone(),
        arguments: arguments.to_vec(),
        grace: args.grace,
        lifetime: args.lifetime,
        background: args.background,
    };
    // Before anything starts a thread.
    let supervised = Supervised::prepare(&order)?;
    let register = if args.background { Some(Register::open()?) } else { None };
    if let Some(register) = &register
        && let Err(refusal) = admit(register, args, None)?
    {
        return no(&refusal);
    }
    let claim = match args.port {
        None => None,
        Some(ports) => match claim(ports, args, globals)? {
            Ok(claim) => Some(claim),
            Err((refusal, code)) => return refuse(&refusal, code),
        },
    };
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().thread_keep_alive(Duration::ZERO).build();
    let runtime = runtime.context("cannot start the event loop")?;
    let code = runtime.block_on(async {
        let signals = Signals::open()?;
        let word = with_port(program, claim.as_ref().map(|claim| claim.port));
        let session = Session { args, globals, supervised, signals, word };
        session.start(claim, register).await
    });
    // Where it was ready while probes were being attached, nobody waits for them.
    runtime.shutdown_background();
    code
}

fn no(refusal: &str) -> anyhow::Result<ExitCode> {
    refuse(refusal, NO)
}

fn refuse(refusal: &str, code: u8) -> anyhow::Result<ExitCode> {
    note(&format!("error: {refusal}"));
    Ok(ExitCode::from(code))
}

/// The name of a new server, or why there is to be none.
fn admit(register: &Register, args: &RunArgs, port: Option<u16>) -> anyhow::Result<Result<String, String>> {
    let living = register.living()?;
    if args.max_servers == Some(0) {
        return Ok(Err("--max-servers is 0; nothing was started".to_owned()));
    }
    if let (Some(max), Some(oldest)) = (args.max_servers, living.first())
        && living.len() >= max
    {
        let (count, name) = (living.len(), &oldest.name);
        let servers = if count == 1 { "server runs" } else { "servers run" };
        return Ok(Err(format!(
            "{count} {servers} in the background already, and --max-servers is {max}; end the oldest: portwatch stop {name}"
        )));
    }
    match &args.name {
        Some(name) if living.iter().any(|record| record.name == *name) => {
            Ok(Err(format!("a server called {name} runs already; end it: portwatch stop {name}")))
        }
        Some(name) => Ok(Ok(name.clone())),
        None => Ok(Ok(register.free_name(&register::default_name(&args.command[0], port)))),
    }
}

/// The port to use, or why there is none and the exit code that says so. It may be freed for that.
fn claim(ports: Ports, args: &RunArgs, globals: &Globals) -> anyhow::Result<Result<Claim, (String, u8)>> {
    let (locks, proto) = (register::locks(), ports.protocol());
    if let Some(claim) = Claim::first_of(ports.candidates(args.fallback), proto, locks.as_deref()) {
        return Ok(Ok(claim));
    }
    let port = ports.only(ports.first);
    let one = || Claim::one(port.first, proto, locks.as_deref());
    if args.replace {
        let refusal = |code| (format!("{port} is not free; nothing was started"), code);
        return Ok(match kill::free(port.first, proto, args.yes, args.grace, globals)? {
            0 => one().map_err(|_| refusal(NO)),
            code => Err(refusal(code)),
        });
    }
    let taken = match ready::holder(port.first, proto) {
        Some(who) => format!("{port} is taken by {who}"),
        None => match one() {
            Err(portwatch::run::port::Unclaimed::Chosen) => format!("{port} was just chosen by another portwatch run"),
            _ => format!("nothing listens on {port}, but it cannot be bound; see `portwatch diagnose {port}`"),
        },
    };
    let refusal = if args.fallback {
        format!("no port from {port} up is free: {taken}")
    } else if ports.first == ports.last {
        format!("{taken}; --replace frees it first, --fallback takes the next free port")
    } else {
        format!("no port of {ports} is free: {taken}; --replace frees {port} first")
    };
    Ok(Err((refusal, NO)))
}

/// A command under supervision, and who hears of it.
struct Session<'a> {
    args: &'a RunArgs,
    globals: &'a Globals,
    supervised: Supervised,
    signals: Signals,
    /// The program as it was typed, with the port in it.
    word: OsString,
}

/// The URL that was asked, and what came instead of 2xx, if anything did.
type Asked = (String, Option<String>);

/// A server in the background, on its way.
struct Server {
    register: Register,
    record: Record,
}

impl Session<'_> {
    async fn start(self, claim: Option<Claim>, register: Option<Register>) -> anyhow::Result<ExitCode> {
        let port = claim.as_ref().map(|claim| claim.port);
        let mut start = Start { port, ..Start::default() };
        // Held until the record is there, so that nobody else takes the name.
        let mut place: Option<(Register, Locked, String)> = None;
        if let Some(register) = register {
            let lock = register.lock()?;
            match admit(&register, self.args, port)? {
                Err(refusal) => return no(&refusal),
                Ok(name) => {
                    start.log = Some(register.log_path(&name));
                    start.record = Some(register.record_path(&name));
                    place = Some((register, lock, name));
                }
            }
        }
        let process = match self.supervised.start(start)? {
            Ok(process) => process,
            Err(error) => {
                note(&format!("error: cannot run {}: {error}", escape(&self.word.to_string_lossy())));
                self.supervised.over().await?;
                let is_missing = error.kind() == io::ErrorKind::NotFound;
                return Ok(ExitCode::from(if is_missing { NOT_FOUND } else { CANNOT_RUN }));
            }
        };
        let server = match place {
            Some((register, _lock, name)) => {
                let record = self.record(name, port, process, &register);
                register.write(&record)?;
                Some(Server { register, record })
            }
            None => None,
        };
        self.attend(claim, server).await
    }

    fn record(&self, name: String, port: Option<u16>, process: ProcessId, register: &Register) -> Record {
        let port_in = |word: &OsString| with_port(word, port).to_string_lossy().into_owned();
        Record {
            name,
            port,
            proto: self.args.port.and_then(|ports| ports.proto),
            address: None,
            health: self.args.health.clone(),
            command: self.args.command.iter().map(port_in).collect(),
            cwd: std::env::current_dir().ok().map(|path| path.to_string_lossy().into_owned()),
            process,
            watcher: self.supervised.watcher(),
            keeper: self.supervised.keeper(),
            began: process::boot_ns_now(),
            grace_ms: u64::try_from(self.args.grace.as_millis()).unwrap_or(u64::MAX),
            host: register.host().clone(),
        }
    }

    /// From the start to the end; in the background, until it is ready.
    async fn attend(self, claim: Option<Claim>, mut server: Option<Server>) -> anyhow::Result<ExitCode> {
        let port = claim.as_ref().map(|claim| claim.port);
        let mut claim = claim;
        // Where its health was asked for last, and the answer.
        let answered = RefCell::new(None);
        let mut is_ready = false;
        let mut was_late = false;
        {
            let mut over = pin!(self.supervised.over());
            let mut ready = pin!(self.ready(port, &answered));
            let mut late = pin!(tokio::time::sleep(self.args.wait_bound));
            loop {
                if is_ready && server.is_some() {
                    break;
                }
                tokio::select! {
                    biased;
                    over = &mut over => {
                        let over = over?;
                        let awaited = if is_ready { None } else { self.awaited(port) };
                        let code = self.finish(&over, awaited, was_late, server.as_ref())?;
                        if let (Cause::Ended, Some(port), false) = (over.cause, port, is_ready) {
                            self.suggest_udp(port);
                        }
                        return Ok(code);
                    }
                    told = self.signals.next() => self.pass_on(told.context("cannot read signals")?),
                    found = &mut ready, if !is_ready && !was_late => {
                        is_ready = true;
                        // It listens: nobody else will take the port for a free one.
                        claim = None;
                        match (found?, &mut server) {
                            (Some(listener), Some(server)) => {
                                server.record.address = Some(health::reachable(&listener.socket));
                                server.register.write(&server.record)?;
                            }
                            (Some(listener), None) => note(&format!("ready: {}", ready::url(&listener))),
                            (None, _) => {}
                        }
                    }
                    () = &mut late, if !is_ready && !was_late => {
                        was_late = true;
                        note(&format!("error: {}", self.why_late(port.unwrap_or(0), answered.take())));
                        self.supervised.end();
                    }
                }
            }
        }
        drop(claim);
        match server {
            Some(server) => self.leave(&server).await,
            None => Ok(ExitCode::SUCCESS),
        }
    }

    /// The name of the program, to be shown.
    fn program(&self) -> String {
        let name = Path::new(&self.word).file_name().unwrap_or(&self.word);
        escape(&name.to_string_lossy()).into_owned()
    }

    /// The port with the protocol, as it was typed.
    fn place(&self, port: u16) -> String {
        self.args.port.map_or_else(|| port.to_string(), |ports| ports.only(port).to_string())
    }

    /// What it has to come to before it may end.
    fn awaited(&self, port: Option<u16>) -> Option<String> {
        match port {
            Some(port) => Some(format!("it was ready on {}", self.place(port))),
            None => self.args.background.then(|| "it was in the background".to_owned()),
        }
    }

    /// Where it listens, once it is ready. `None`: it has no port to listen on, and has not ended at once.
    async fn ready(&self, port: Option<u16>, answered: &RefCell<Option<Asked>>) -> anyhow::Result<Option<Listener>> {
        let Some(port) = port else {
            tokio::time::sleep(AT_ONCE).await;
            return Ok(None);
        };
        // Health is asked for by HTTP.
        let named = self.args.port.and_then(|ports| ports.proto);
        let wanted = self.args.health.as_ref().map(|_| Protocol::Tcp).or(named);
        let listener = ready::bound(port, wanted, self.supervised.watcher().pid, self.globals).await?;
        if let Some(path) = &self.args.health {
            let url = format!("{}{path}", ready::url(&listener));
            *answered.borrow_mut() = Some((url.clone(), None));
            ready::well(&listener, path, &|answer| *answered.borrow_mut() = Some((url.clone(), Some(answer)))).await;
        }
        Ok(Some(listener))
    }

    fn why_late(&self, port: u16, answered: Option<Asked>) -> String {
        let (program, place, limit) = (self.program(), self.place(port), self.args.wait_bound);
        match answered {
            Some((url, Some(answer))) => {
                format!("{program} is not well after {limit:?}: GET {url}: {}", escape(&answer))
            }
            Some((url, None)) => {
                format!("{program} listens on {place}, and has not answered GET {url} within {limit:?}")
            }
            None => {
                let proto = self.args.port.map_or(Protocol::Tcp, Ports::protocol);
                let instead = ready::instead(port, proto, self.supervised.watcher().pid);
                format!("{program} does not listen on {place} after {limit:?}: {instead}")
            }
        }
    }

    /// Where it did not come to listen, and nobody said of which protocol the port is: somebody may have it by UDP.
    fn suggest_udp(&self, port: u16) {
        let is_unsaid = self.args.port.is_some_and(|ports| ports.proto.is_none()) && self.args.health.is_none();
        if is_unsaid && let Some(who) = ready::holder(port, Protocol::Udp) {
            note(&format!("{port}/udp is taken by {who}; if that is where it listens, say --port {port}/udp"));
        }
    }

    fn pass_on(&self, told: Told) {
        let ends =
            |signal: i32| [Signal::INT, Signal::QUIT, Signal::HUP].iter().any(|ending| ending.as_raw() == signal);
        match told {
            Told::End => self.supervised.end(),
            // It has no terminal: who interrupts the start of a server wants none.
            Told::Shared(signal) | Told::Forward(signal) if self.args.background && ends(signal) => {
                self.supervised.end()
            }
            Told::Forward(signal) => self.supervised.signal(signal),
            Told::Shared(_) => {}
        }
    }

    /// It is ready, and goes on without us, unless it has ended meanwhile.
    async fn leave(self, server: &Server) -> anyhow::Result<ExitCode> {
        let is_gone = {
            let mut detached = pin!(self.supervised.detach());
            loop {
                tokio::select! {
                    biased;
                    detached = &mut detached => break !detached?,
                    told = self.signals.next() => self.pass_on(told.context("cannot read signals")?),
                }
            }
        };
        if is_gone {
            let over = self.supervised.over().await?;
            return self.finish(&over, Some("it was in the background".to_owned()), false, Some(server));
        }
        let Record { name, process, port, .. } = &server.record;
        let text = if self.args.json {
            let users = Users::default();
            let user = |uid| users.name(uid);
            let log = server.register.log_path(name).to_string_lossy().into_owned();
            json::line(&servers::json(&server.record, log, None, &view(&user))) + "\n"
        } else {
            let port = port.map(|port| format!(" port {port}")).unwrap_or_default();
            format!("{name} pid {}{port}\n", process.pid)
        };
        print(&text)?;
        Ok(ExitCode::SUCCESS)
    }

    /// `awaited`: what it did not come to.
    fn finish(
        &self,
        over: &Over,
        awaited: Option<String>,
        was_late: bool,
        server: Option<&Server>,
    ) -> anyhow::Result<ExitCode> {
        let program = self.program();
        let mut code = over.code();
        match (over.cause, awaited) {
            _ if was_late => code = NO,
            (Cause::Ended, Some(awaited)) => {
                let how = match over.status {
                    Some(Status::Exited(0)) if over.leftovers > 0 => {
                        "went to the background by itself; start it in the foreground".to_owned()
                    }
                    Some(Status::Exited(code)) => format!("ended with exit code {code} before {awaited}"),
                    Some(Status::Signalled(signal)) => format!("was ended by signal {signal} before {awaited}"),
                    None => format!("ended before {awaited}"),
                };
                note(&format!("error: {program} {how}"));
                code = if code == 0 { NO } else { code };
            }
            (Cause::Abandoned, _) => note("error: the supervisor was killed; everything that it left was ended"),
            _ => {}
        }
        if code == LIFETIME_OVER
            && over.cause == Cause::Lifetime
            && let Some(lifetime) = self.args.lifetime
        {
            note(&format!("{program} was ended: its lifetime of {} is over", render::span(lifetime)));
        }
        if over.cause == Cause::Ended && over.leftovers > 0 {
            let processes = if over.leftovers == 1 { "process" } else { "processes" };
            note(&format!("ended {} {processes} that {program} left behind", over.leftovers));
        }
        if let Some(Server { register, record }) = server {
            last_words(&register.log_path(&record.name));
            // Who ended fast may have had it removed before it was written.
            let _ = register.find(&record.name);
        }
        if !over.unended.is_empty() {
            let named: Vec<String> =
                over.unended.iter().map(|left| format!("{} ({})", escape(&left.name), left.pid)).collect();
            note(&format!("error: these do not end, not even by SIGKILL: {}", named.join(", ")));
            return Ok(ExitCode::from(FAILED));
        }
        Ok(ExitCode::from(code))
    }
}

/// What a server that did not come up said last.
fn last_words(path: &Path) {
    let Ok((bytes, _)) = log::tail(path, LAST_WORDS) else { return };
    for line in String::from_utf8_lossy(&bytes).lines() {
        note(&format!("| {}", escape(line)));
    }
}
