//! A client that sends what it is given over one connection.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// A status with its media type and body.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub media_type: String,
    pub body: Vec<u8>,
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the server listens");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time limit");
    stream.set_nodelay(true).expect("no delay");
    stream
}

/// One request over the kept connection, anew when the server has closed it.
pub fn exchange(head: &str, body: &[u8]) -> Answer {
    thread_local! {
        static KEPT: RefCell<Option<BufReader<TcpStream>>> = const { RefCell::new(None) };
    }
    KEPT.with_borrow_mut(|kept| {
        for _ in 0..2 {
            let mut stream =
                kept.take().unwrap_or_else(|| BufReader::new(connect(super::server())));
            let Some((answer, close)) = ask(&mut stream, head, body) else { continue };
            if !close {
                *kept = Some(stream);
            }
            return answer;
        }
        panic!("no answer twice");
    })
}

fn ask(stream: &mut BufReader<TcpStream>, head: &str, body: &[u8]) -> Option<(Answer, bool)> {
    let length = body.len();
    let head = format!("{head}Host: localhost\r\nContent-Length: {length}\r\n\r\n");
    let bytes = [head.as_bytes(), body].concat();
    stream.get_mut().write_all(&bytes).ok()?;
    let mut line = String::new();
    stream.read_line(&mut line).ok()?;
    let status = line.get(9..12)?.parse().ok()?;
    let (mut length, mut close, mut media_type) = (0, false, String::new());
    loop {
        line.clear();
        stream.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        match (name.to_ascii_lowercase().as_str(), value.trim()) {
            ("content-length", value) => length = value.parse().ok()?,
            ("content-type", value) => value.clone_into(&mut media_type),
            ("connection", value) => close = value.eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some((Answer { status, media_type, body }, close))
}

/// What the server answers to these bytes and the end of the stream.
pub fn raw(bytes: &[u8]) -> Vec<u8> {
    let mut stream = connect(super::server());
    // The server may hang up before all is sent.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

/// Waits until the server at `address` admits work.
pub fn until_ready(address: &str) {
    for _ in 0..3000 {
        let mut stream = BufReader::new(connect(address));
        let answer = ask(&mut stream, "GET /readyz HTTP/1.1\r\n", b"");
        if answer.is_some_and(|(answer, _)| answer.status == 200) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the server was not ready within 30 s");
}
