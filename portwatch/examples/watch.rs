//! Tells of the next three ports that open or close. `cargo run --example watch`

use std::path::PathBuf;

use futures_util::StreamExt as _;
use portwatch::client::SOCKET;
use portwatch::model::Change;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let agent = PathBuf::from(std::env::var_os("PORTWATCH_SOCKET").unwrap_or_else(|| SOCKET.into()));
    let everything = portwatch::selector::<&str>(&[])?;
    let mut changes = portwatch::changes(everything, Some(&agent)).await?;
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
