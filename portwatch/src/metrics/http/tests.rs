use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// Serves on a port of its own while `test` runs.
fn with_server<T: Future>(
    limits: Limits,
    source: impl Fn() -> String + Send + Sync + 'static,
    test: impl FnOnce(SocketAddr) -> T,
) -> T::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = listener.local_addr().unwrap();
        tokio::select! {
            () = serve_within(limits, listener, source) => unreachable!("it serves for ever"),
            output = test(address) => output,
        }
    })
}

fn one() -> String {
    "a 1\n".to_owned()
}

async fn say(address: SocketAddr, words: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The server may have answered and closed before all was said.
    let _ = stream.write_all(words).await;
    stream
}

/// All that the server says until it closes, without the date.
async fn hear(mut stream: TcpStream) -> String {
    let mut heard = Vec::new();
    // A server that closes with something unread resets the connection: what came before counts.
    let _ = stream.read_to_end(&mut heard).await;
    let heard = String::from_utf8(heard).unwrap();
    heard.split_inclusive("\r\n").filter(|line| !line.starts_with("date: ")).collect()
}

#[test]
fn requests_are_answered_once_and_refused_by_the_rules() {
    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n\
        connection: close\r\ncontent-length: 4\r\n\r\n";
    // To close is that version's own way.
    const OK_1_0: &str = "HTTP/1.0 200 OK\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n\
        content-length: 4\r\n\r\na 1\n";
    const INDEX_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/html; charset=utf-8\r\nconnection: close\r\n\
        content-length: 70\r\n\r\n";
    const NOT_FOUND: &str = "HTTP/1.1 404 Not Found\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n\
        connection: close\r\ncontent-length: 23\r\n\r\nnot here; see /metrics\n";
    const NOT_ALLOWED: &str = "HTTP/1.1 405 Method Not Allowed\r\n\
        content-type: text/plain; version=0.0.4; charset=utf-8\r\nallow: GET, HEAD\r\nconnection: close\r\n\
        content-length: 24\r\n\r\nonly GET is served here\n";
    const BAD: &str = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    const TOO_LARGE: &str =
        "HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let long = format!("GET /metrics HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(MAX_HEAD_BYTES));
    let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(200));
    let fits = format!("GET /metrics HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(MAX_HEAD_BYTES - 100));
    for (request, expected) in [
        ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", format!("{OK}a 1\n")),
        ("GET /metrics?name=x HTTP/1.1\r\n\r\n", format!("{OK}a 1\n")),
        ("GET http://host:9/metrics HTTP/1.1\r\n\r\n", format!("{OK}a 1\n")),
        ("GET /metrics HTTP/1.1\r\nConnection: keep-alive\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n", format!("{OK}a 1\n")),
        ("GET /metrics HTTP/1.0\r\n\r\n", OK_1_0.to_owned()),
        ("HEAD /metrics HTTP/1.1\r\n\r\n", OK.to_owned()),
        (&fits, format!("{OK}a 1\n")),
        ("GET / HTTP/1.1\r\n\r\n", format!("{INDEX_HEAD}{INDEX}")),
        ("GET /metrics/ HTTP/1.1\r\n\r\n", NOT_FOUND.to_owned()),
        ("POST /other HTTP/1.1\r\nContent-Length: 0\r\n\r\n", NOT_FOUND.to_owned()),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", NOT_ALLOWED.to_owned()),
        ("DELETE / HTTP/1.1\r\n\r\n", NOT_ALLOWED.to_owned()),
        ("\x16\x03\x01\x02\x00\x01\x00\x01", BAD.to_owned()),
        ("hello\r\n\r\n", BAD.to_owned()),
        (&long, TOO_LARGE.to_owned()),
        (&many, TOO_LARGE.to_owned()),
    ] {
        let heard = with_server(LIMITS, one, async |address| hear(say(address, request.as_bytes()).await).await);
        assert_eq!(heard, expected, "{}", &request[..request.len().min(60)]);
    }
}

#[test]
fn a_client_that_says_nothing_or_reads_nothing_is_dropped_in_time() {
    let limits = Limits { exchange: Duration::from_millis(50), ..LIMITS };
    with_server(limits, one, async |address| {
        for words in ["", "GET /met", "GET /metrics HTTP/1.1\r\n"] {
            assert_eq!(hear(say(address, words.as_bytes()).await).await, "", "{words:?}");
        }
    });
    // More than the buffers of both ends take, so that the server cannot be done before it is read.
    let len = 64 * 1024 * 1024;
    with_server(
        limits,
        move || "x".repeat(len),
        async |address| {
            let slow = say(address, b"GET /metrics HTTP/1.1\r\n\r\n").await;
            // One that comes and is dropped later than the slow one must have been.
            hear(say(address, b"").await).await;
            assert!(hear(slow).await.len() < len);
        },
    );
}

#[test]
fn more_clients_than_allowed_wait_for_their_turn() {
    let limits = Limits { connections: 2, exchange: Duration::from_secs(60) };
    let served = std::sync::atomic::AtomicUsize::new(1);
    let source = move || served.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_string();
    with_server(limits, source, async |address| {
        let [mut first, second] = [say(address, b"GET").await, say(address, b"GET").await];
        let third = say(address, b"GET /metrics HTTP/1.1\r\n\r\n").await;
        first.write_all(b" /metrics HTTP/1.1\r\n\r\n").await.unwrap();
        assert_eq!((hear(first).await.pop(), hear(third).await.pop()), (Some('1'), Some('2')));
        drop(second);
    });
}

#[test]
fn a_port_that_is_taken_is_told_with_the_next_step() {
    with_server(LIMITS, one, async |address| {
        let error = bind(address).unwrap_err();
        let expected = format!(
            "cannot listen on {address} for --metrics; `portwatch who {address}` tells who does, port 0 takes a free \
            one: Address already in use (os error 98)"
        );
        assert_eq!(format!("{error:#}"), expected);
    });
}
