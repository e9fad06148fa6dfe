//! A generation's events as they happen: server-sent events.
//! (HTML standard, section 9.2: <https://html.spec.whatwg.org/multipage/server-sent-events.html>)

use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use actix_web::http::header;
use actix_web::web::Bytes;
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::stream;
use tokio::sync::watch;

use super::jobs;
use super::live::{Event, Live};
use super::problem::{Kind, Problem};
use super::server::Shared;
use super::store::{Record, State};

/// One event.
#[derive(utoipa::ToSchema)]
#[allow(dead_code, reason = "describes answers")]
pub struct EventBody {
    /// A number that rises.
    id: String,
    event: String,
    /// JSON.
    data: String,
}

/// A comment line this often shows that the connection lives, and notices when it does not.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// The id of the only event of a generation whose others are gone: the largest whole number that
/// JavaScript has.
const LAST_ID: u64 = (1 << 53) - 1;

/// Whether the client asks for a stream of events.
pub fn wanted(request: &HttpRequest) -> bool {
    let accept = request.headers().get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("");
    accept.split(',').any(|range| {
        let media = range.split(';').next().unwrap_or("").trim();
        media.eq_ignore_ascii_case("text/event-stream")
    })
}

/// The last event that a client has that comes back.
///
/// # Errors
/// The header is not a number.
pub fn last_seen(request: &HttpRequest) -> Result<u64, Problem> {
    let Some(value) = request.headers().get("last-event-id") else { return Ok(0) };
    let number = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    number.ok_or_else(|| {
        Problem::new(Kind::InvalidBody, "Last-Event-ID must be the id of an event: a whole number")
    })
}

/// The client of a synchronous generation, as long as it listens.
pub struct Owner {
    shared: web::Data<Shared>,
    live: Arc<Live>,
}

impl Owner {
    pub fn new(shared: &web::Data<Shared>, live: &Arc<Live>) -> Self {
        Self { shared: shared.clone(), live: Arc::clone(live) }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        jobs::leave(&self.shared, &self.live);
    }
}

struct Watcher {
    live: Arc<Live>,
    changed: watch::Receiver<()>,
    last: u64,
    begun: bool,
    ended: bool,
    _owner: Option<Owner>,
}

impl Watcher {
    /// The next bytes to send; `None` when everything has been sent.
    async fn next(&mut self) -> Option<Bytes> {
        if !self.begun {
            self.begun = true;
            return Some(Bytes::from_static(b"retry: 1000\n\n"));
        }
        loop {
            if self.ended {
                return None;
            }
            let (events, ended) = self.live.after(self.last);
            self.ended = ended;
            if let Some(event) = events.last() {
                self.last = event.id;
                let text = events.iter().fold(String::new(), |mut text, event| {
                    write(&mut text, event);
                    text
                });
                return Some(text.into());
            }
            if !ended && tokio::time::timeout(HEARTBEAT, self.changed.changed()).await.is_err() {
                return Some(Bytes::from_static(b":\n\n"));
            }
        }
    }
}

fn write(text: &mut String, event: &Event) {
    // Data is JSON in one line. Writing to a string does not fail.
    let _ = write!(text, "id: {}\nevent: {}\ndata: {}\n\n", event.id, event.name, event.data);
}

/// Streams the events after `last`, to the end. With an owner, the generation stops when the
/// client leaves.
pub fn respond(live: Arc<Live>, last: u64, owner: Option<Owner>) -> HttpResponse {
    let changed = live.watch();
    let (events, ended) = live.after(last);
    if ended && events.is_empty() {
        return nothing_more();
    }
    let id = live.id.clone();
    let watcher = Watcher { live, changed, last, begun: false, ended: false, _owner: owner };
    let bytes = stream::unfold(watcher, |mut watcher| async move {
        watcher.next().await.map(|bytes| (Ok::<_, Infallible>(bytes), watcher))
    });
    builder().insert_header(("X-Request-Id", id)).streaming(bytes)
}

/// The end of a generation whose events are gone.
pub fn respond_ended(record: &Record, last: u64) -> HttpResponse {
    if last == LAST_ID {
        return nothing_more();
    }
    let data = match record.state {
        State::Completed => record.answer.as_deref(),
        _ => record.problem.as_deref(),
    };
    let data = Arc::from(data.unwrap_or("{}"));
    let mut text = String::new();
    write(&mut text, &Event { id: LAST_ID, name: record.state.name(), data });
    builder().body(text)
}

fn builder() -> actix_web::HttpResponseBuilder {
    let mut response = HttpResponse::Ok();
    response
        .insert_header((header::CONTENT_TYPE, "text/event-stream"))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        // Asks proxies not to collect the stream.
        .insert_header(("X-Accel-Buffering", "no"));
    response
}

/// Tells a browser not to connect again.
fn nothing_more() -> HttpResponse {
    HttpResponse::NoContent().finish()
}
