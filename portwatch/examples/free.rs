//! Frees a port: plans, shows whom it would end, ends them. `cargo run --example free -- 8000 --yes`

use portwatch::kill::{Choice, Guards, Job, Options, Terms, exit_code};
use portwatch::{Probe, Scanner};

fn main() -> anyhow::Result<()> {
    let (options, targets): (Vec<String>, Vec<String>) = std::env::args().skip(1).partition(|it| it.starts_with('-'));
    anyhow::ensure!(!targets.is_empty(), "name a port");
    let mut scanner = Scanner::open(Probe::Auto);
    let choice = Choice::read(&mut scanner, &portwatch::selector(&targets)?)?;
    // Spares init, this process and its ancestors, and who runs things for others.
    let job = Job::prepare(choice, &Terms::default(), Guards::current(false))?;
    for victim in &job.plan().victims {
        println!("would end {} ({:?})", victim.process.id.pid, victim.process.name);
    }
    if options != ["--yes"] {
        return Ok(());
    }
    // SIGTERM, 5 s of grace, SIGKILL; each process is proved to hold the socket right before it is signalled.
    let outcomes = job.run(&mut scanner, Options::default(), &mut |_progress| ())?;
    for outcome in &outcomes {
        println!("{}/{}: {:?}", outcome.port, outcome.proto, outcome.status);
    }
    std::process::exit(exit_code(&outcomes).into());
}
