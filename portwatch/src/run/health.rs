//! Asks a server by HTTP whether it is well.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::model::Socket;

/// How long one answer may take.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// A path to ask for, such as `/healthz?full=1`.
///
/// # Errors
/// A sentence, where no request could be made of it.
pub fn path(text: &str) -> Result<String, String> {
    let is_path = text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic());
    is_path.then(|| text.to_owned()).ok_or_else(|| "use a path such as /healthz".to_owned())
}

/// Where a client on this host reaches the socket: the loopback address where it serves all.
pub fn reachable(socket: &Socket) -> SocketAddr {
    let address = match socket.address.to_canonical() {
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() && socket.v6only == Some(true) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() && socket.serves(Ipv4Addr::LOCALHOST.into()) => {
            Ipv4Addr::LOCALHOST.into()
        }
        address => address,
    };
    SocketAddr::new(address, socket.port)
}

/// The status of the answer to `GET path`.
///
/// # Errors
/// Why there is none, in few words.
pub async fn ask(address: SocketAddr, path: &str) -> Result<u16, String> {
    match tokio::time::timeout(ANSWER_WITHIN, get(address, path)).await {
        Ok(Ok(status)) => Ok(status),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(format!("no answer within {} s", ANSWER_WITHIN.as_secs())),
    }
}

/// Whether this status says that all is well.
pub fn is_well(status: u16) -> bool {
    (200..300).contains(&status)
}

async fn get(address: SocketAddr, path: &str) -> Result<u16, String> {
    let stream = TcpStream::connect(address).await.map_err(|error| format!("cannot connect: {error}"))?;
    let no_http = |error: hyper::Error| format!("no HTTP: {error}");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(no_http)?;
    let request = Request::get(path)
        .header(HOST, address.to_string())
        .header(USER_AGENT, concat!("portwatch/", env!("CARGO_PKG_VERSION")))
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let (mut answer, mut connection) = (pin!(sender.send_request(request)), pin!(connection));
    // The body is of no interest: the connection ends with this function.
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        // It may have brought the answer, and ended.
        _ = &mut connection => answer.await,
    };
    answer.map(|answer| answer.status().as_u16()).map_err(no_http)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn paths_cannot_smuggle_headers() {
        assert_eq!(path("/health?a=b%20c"), Ok("/health?a=b%20c".to_owned()));
        for bad in ["", "health", "/a b", "/a\r\nHost: x", "http://x/", "/\u{e9}"] {
            assert!(path(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_client_of_this_host_reaches_it() {
        for (address, v6only, want) in [
            ("127.0.0.1", None, "127.0.0.1:80"),
            ("0.0.0.0", None, "127.0.0.1:80"),
            ("::", Some(false), "127.0.0.1:80"),
            ("::", None, "127.0.0.1:80"),
            ("::", Some(true), "[::1]:80"),
            ("::1", None, "[::1]:80"),
            ("192.0.2.1", None, "192.0.2.1:80"),
        ] {
            let socket = Socket { v6only, ..Socket::example(address, 80) };
            assert_eq!(reachable(&socket).to_string(), want, "{address} {v6only:?}");
        }
    }

    #[test]
    fn the_status_of_the_answer_is_told() {
        let check = |answer: &'static [u8], want: Result<u16, &str>| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0u8; 1024];
                let length = stream.read(&mut request).unwrap();
                stream.write_all(answer).unwrap();
                String::from_utf8_lossy(&request[..length]).into_owned()
            });
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let told = runtime.block_on(ask(address, "/up"));
            assert!(server.join().unwrap().starts_with("GET /up HTTP/1.1\r\nhost: 127.0.0.1:"));
            match want {
                Ok(status) => assert_eq!(told, Ok(status)),
                Err(part) => assert!(told.as_ref().is_err_and(|error| error.starts_with(part)), "{told:?}"),
            }
        };
        check(b"HTTP/1.1 204 No Content\r\n\r\n", Ok(204));
        check(b"HTTP/1.0 503 Oh\r\nContent-Length: 9999\r\n\r\nx", Ok(503));
        check(b"SSH-2.0-x\r\n", Err("no HTTP"));
        check(b"", Err("no HTTP"));
    }
}
