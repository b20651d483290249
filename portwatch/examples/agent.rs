//! Asks the agent who has a port, other users' processes included. `cargo run --example agent -- 8000`

use std::path::PathBuf;

use portwatch::client::{Client, SOCKET};
use portwatch::wire::{Request, Response, Selection};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let socket = std::env::var_os("PORTWATCH_SOCKET").unwrap_or_else(|| SOCKET.into());
    let targets: Vec<String> = std::env::args().skip(1).collect();
    let Some(mut client) = Client::connect(&PathBuf::from(socket)).await? else {
        anyhow::bail!("no agent answers; start one: portwatch agent");
    };
    let selection = Selection::of(&portwatch::selector(&targets)?);
    for response in client.ask(&Request::Who { selection }).await?.responses {
        if let Response::Listener { listener, .. } = response {
            let holder = listener.binder().map(|holder| (holder.process.id.pid, &holder.process.name));
            println!("{}: {holder:?}", listener.socket.port);
        }
    }
    Ok(())
}
