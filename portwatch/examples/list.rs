//! Who has these ports? `cargo run --example list -- 3000-3999 8000/tcp`

fn main() -> anyhow::Result<()> {
    let targets: Vec<String> = std::env::args().skip(1).collect();
    for listener in portwatch::snapshot(&portwatch::selector(&targets)?)? {
        let socket = &listener.socket;
        let holders: Vec<u32> = listener.holders.iter().map(|holder| holder.process.id.pid).collect();
        println!("{} {} port {}: {holders:?}", socket.proto, socket.address, socket.port);
    }
    Ok(())
}
