//! Tells of the next three ports that open or close. `cargo run --example watch`

use futures_util::StreamExt as _;
use portwatch::model::Change;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let agent = std::env::var_os("PORTWATCH_SOCKET").map(std::path::PathBuf::from);
    let everything = portwatch::selector::<&str>(&[])?;
    let mut changes = portwatch::changes(everything, agent.as_deref()).await?;
    eprintln!("watching");
    let mut left = 3;
    while left > 0 {
        match changes.next().await.transpose()? {
            Some(Change::Opened { listener, .. }) => println!("opened {}", listener.socket.port),
            Some(Change::Closed { listener, .. }) => println!("closed {}", listener.socket.port),
            Some(_) => continue,
            None => break,
        }
        left -= 1;
    }
    Ok(())
}
