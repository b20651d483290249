//! The smallest HTTP server that a Prometheus can scrape: `GET /metrics`, one answer a connection.
//!
//! Owns its limits, because whoever reaches the port is a stranger: so many connections at a time, so many bytes of
//! request, so much time for all of it. What it serves is handed in. While nobody connects, nothing wakes.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use nix::libc;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Bytes that the head of a request may have.
const MAX_HEAD_BYTES: usize = 8 * 1024;

#[derive(Clone, Copy, Debug)]
struct Limits {
    /// More wait to be accepted.
    connections: usize,
    /// From accept to the last byte that the client takes.
    exchange: Duration,
}

const LIMITS: Limits = Limits { connections: 16, exchange: Duration::from_secs(5) };

/// How long to wait for descriptors or memory, whose return no event tells.
const EXHAUSTED_PAUSE: Duration = Duration::from_secs(1);

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const INDEX: &str = "<!DOCTYPE html><title>portwatch</title><a href=\"/metrics\">metrics</a>\n";

/// Listens for scrapers. Must be called in a tokio runtime.
///
/// # Errors
/// Where the address cannot be had, as a sentence with the next step.
pub fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(address).with_context(|| {
        format!("cannot listen on {address} for --metrics; `portwatch who {address}` tells who does, port 0 takes a free one")
    })?;
    listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener)).context("cannot serve metrics")
}

/// Answers scrapes with what `source` gives, in the text format of Prometheus (version 0.0.4), for ever. Dropping the future
/// ends it with all its connections.
pub async fn serve(listener: TcpListener, source: impl Fn() -> String + Send + Sync + 'static) {
    serve_within(LIMITS, listener, source).await;
}

async fn serve_within(limits: Limits, listener: TcpListener, source: impl Fn() -> String + Send + Sync + 'static) {
    let source = Arc::new(source);
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= limits.connections {
            connections.join_next().await;
        }
        match listener.accept().await {
            Ok((stream, _)) => {
                let source = Arc::clone(&source);
                connections.spawn(async move {
                    // A peer that goes away, talks nonsense or is slow is its own loss.
                    let _ = tokio::time::timeout(limits.exchange, exchange(stream, &*source)).await;
                });
            }
            Err(error) if is_exhausted(&error) => {
                tracing::warn!("cannot accept a scrape: {error}; trying again in {EXHAUSTED_PAUSE:?}");
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
            }
            // The connection was gone before it was accepted.
            Err(_) => {}
        }
    }
}

/// Whether the host or this process has none left of something, such as descriptors: it may again.
pub fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

async fn exchange(stream: TcpStream, source: &(impl Fn() -> String + Sync)) -> hyper::Result<()> {
    let service = service_fn(|request: Request<Incoming>| {
        let response = answer(request.method(), request.uri().path(), source);
        async { Ok::<_, Infallible>(response) }
    });
    http1::Builder::new()
        .keep_alive(false)
        // Not by hyper's clock but by ours, which covers the answer as well.
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

fn answer(method: &Method, path: &str, source: impl Fn() -> String) -> Response<Full<Bytes>> {
    let (status, kind, body) = match (path, matches!(*method, Method::GET | Method::HEAD)) {
        ("/metrics", true) => (StatusCode::OK, TEXT, source()),
        ("/", true) => (StatusCode::OK, HTML, INDEX.to_owned()),
        ("/metrics" | "/", false) => (StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET is served here\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, TEXT, "not here; see /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests;
