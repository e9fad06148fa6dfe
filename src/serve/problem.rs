//! RFC 9457 problem details: every error that the server answers.

use std::fmt;

use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, ResponseError};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::store::State;
use crate::Error;

/// The catalogue of problems. 400 is a body that is not the documented shape,
/// 422 is the right shape with a value that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    MalformedJson,
    InvalidBody,
    InvalidQuery,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    BodyTimeout,
    Cancelled,
    Conflict,
    Expired,
    BodyTooLarge,
    UnsupportedMediaType,
    MisdirectedRequest,
    InvalidValue,
    UnknownName,
    Budget,
    DeadlineInfeasible,
    InsufficientMemory,
    QueueFull,
    VoteLimit,
    Internal,
    OutOfMemory,
    NotReady,
    Draining,
    Deadline,
}

impl Kind {
    /// All of them, for documentation and tests.
    pub const ALL: [Self; 26] = [
        Self::MalformedJson,
        Self::InvalidBody,
        Self::InvalidQuery,
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::BodyTimeout,
        Self::Cancelled,
        Self::Conflict,
        Self::Expired,
        Self::BodyTooLarge,
        Self::UnsupportedMediaType,
        Self::MisdirectedRequest,
        Self::InvalidValue,
        Self::UnknownName,
        Self::Budget,
        Self::DeadlineInfeasible,
        Self::InsufficientMemory,
        Self::QueueFull,
        Self::VoteLimit,
        Self::Internal,
        Self::OutOfMemory,
        Self::NotReady,
        Self::Draining,
        Self::Deadline,
    ];

    fn parts(self) -> (u16, &'static str, &'static str) {
        match self {
            Self::MalformedJson => (400, "malformed-json", "The body is not JSON"),
            Self::InvalidBody => (400, "invalid-body", "The body has the wrong shape"),
            Self::InvalidQuery => (400, "invalid-query", "The query has the wrong shape"),
            Self::Unauthorized => (401, "unauthorized", "An API key is needed"),
            Self::Forbidden => (403, "forbidden", "This is not allowed"),
            Self::NotFound => (404, "not-found", "No such resource"),
            Self::MethodNotAllowed => {
                (405, "method-not-allowed", "The resource does not take this method")
            }
            Self::BodyTimeout => (408, "body-timeout", "The body took too long to arrive"),
            Self::Cancelled => (409, "cancelled", "The generation was cancelled"),
            Self::Conflict => (409, "conflict", "The resource is in another state"),
            Self::Expired => (410, "expired", "It is too late for this"),
            Self::BodyTooLarge => (413, "body-too-large", "The body is too large"),
            Self::UnsupportedMediaType => {
                (415, "unsupported-media-type", "The body must be application/json")
            }
            Self::MisdirectedRequest => {
                (421, "misdirected-request", "The server is not reached under this name")
            }
            Self::InvalidValue => (422, "invalid-value", "A value cannot be used"),
            Self::UnknownName => (422, "unknown-name", "Nothing is registered under this name"),
            Self::Budget => (422, "budget", "The work does not fit its budget"),
            Self::DeadlineInfeasible => {
                (422, "deadline-infeasible", "The work cannot be done in time")
            }
            Self::InsufficientMemory => {
                (422, "insufficient-memory", "The work does not fit the device's memory")
            }
            Self::QueueFull => (429, "queue-full", "The queue is full"),
            Self::VoteLimit => (429, "vote-limit", "Enough votes for today"),
            Self::Internal => (500, "internal", "The server failed"),
            Self::OutOfMemory => (503, "out-of-memory", "The device has no memory left for now"),
            Self::NotReady => (503, "not-ready", "The server is not ready yet"),
            Self::Draining => (503, "draining", "The server is shutting down"),
            Self::Deadline => (504, "deadline", "The work was not done in time"),
        }
    }

    /// The last part of the problem's `type`.
    #[must_use]
    pub fn slug(self) -> &'static str {
        self.parts().1
    }

    /// The HTTP status that answers it.
    #[must_use]
    pub fn status(self) -> u16 {
        self.parts().0
    }

    /// What the problem is, the same for every occurrence.
    #[must_use]
    pub fn title(self) -> &'static str {
        self.parts().2
    }
}

/// One error answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub kind: Kind,
    pub detail: String,
    /// The request field at fault, as a path: `method.name`.
    pub field: Option<String>,
    /// Names the log line of an internal failure.
    pub instance: Option<String>,
    /// Seconds.
    pub retry_after: Option<u64>,
    /// The methods that the resource does take.
    pub allow: Option<&'static str>,
    /// Members of its own kind; most have none.
    pub members: Option<Box<Map<String, Value>>>,
}

/// The answer's body, in the words of RFC 9457.
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct Body {
    /// A URN; its last part names the kind of problem.
    r#type: String,
    title: String,
    status: u16,
    detail: String,
    /// The field at fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
    /// Names the line in the server's log.
    #[serde(skip_serializing_if = "Option::is_none")]
    instance: Option<String>,
}

impl Problem {
    /// A problem of one kind with what is particular to this occurrence.
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            detail: detail.into(),
            field: None,
            instance: None,
            retry_after: None,
            allow: None,
            members: None,
        }
    }

    /// A problem with one field of the request; the detail starts with its name.
    pub fn field(kind: Kind, field: impl Into<String>, message: impl fmt::Display) -> Self {
        let field = field.into();
        let mut problem = Self::new(kind, format!("{field}: {message}"));
        problem.field = Some(field);
        problem
    }

    /// The same problem with one more member.
    #[must_use]
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.members.get_or_insert_default().insert(name.to_owned(), value);
        self
    }

    /// The same problem with a field that is inside another one.
    #[must_use]
    pub fn within(mut self, place: &str) -> Self {
        if let Some(field) = self.field.take() {
            let whole = format!("{place}.{field}");
            if let Some(rest) = self.detail.strip_prefix(&format!("{field}: ")) {
                self.detail = format!("{whole}: {rest}");
            }
            self.field = Some(whole);
        }
        self
    }

    /// An internal failure: the log gets the cause, the caller its identifier.
    pub fn internal(cause: impl fmt::Display) -> Self {
        let id = uuid::Uuid::now_v7();
        tracing::error!(instance = %id, "{cause}");
        let mut problem = Self::new(
            Kind::Internal,
            "the request was understood but running it failed; the server's log has the cause \
             under this instance",
        );
        problem.instance = Some(format!("urn:uuid:{id}"));
        problem
    }

    /// The state of a generation that ends with it.
    #[must_use]
    pub fn state(&self) -> State {
        if self.kind == Kind::Cancelled { State::Cancelled } else { State::Failed }
    }

    /// The answer's body.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let body = Body {
            r#type: format!("urn:problem-type:diffusion-sharpening:{}", self.kind.slug()),
            title: self.kind.title().to_owned(),
            status: self.kind.status(),
            detail: self.detail.clone(),
            field: self.field.clone(),
            instance: self.instance.clone(),
        };
        // Strings and numbers only: this always serialises.
        let mut body = serde_json::to_value(&body).unwrap_or_default();
        if let (Some(object), Some(members)) = (body.as_object_mut(), &self.members) {
            object.extend(members.iter().map(|(name, value)| (name.clone(), value.clone())));
        }
        body
    }

    /// The problem that [`Problem::to_json`] wrote, without what was of the moment.
    #[must_use]
    pub fn from_json(body: &Value) -> Option<Self> {
        let slug = body["type"].as_str()?.rsplit(':').next()?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.slug() == slug)?;
        let text = |name: &str| body[name].as_str().map(str::to_owned);
        let (field, instance) = (text("field"), text("instance"));
        Some(Self { field, instance, ..Self::new(kind, text("detail")?) })
    }

    /// Tells the caller when to try again.
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid { field, message } => Self::field(Kind::InvalidValue, field, message),
            Error::Unknown { ref field, .. } => {
                let field = field.clone();
                let mut problem = Self::new(Kind::UnknownName, error.to_string());
                problem.field = Some(field);
                problem
            }
            Error::Budget(_) => {
                let mut problem = Self::new(Kind::Budget, error.to_string());
                problem.field = Some("budget".to_owned());
                problem
            }
            Error::InsufficientMemory(_) => Self::new(Kind::InsufficientMemory, error.to_string()),
            Error::OutOfMemory { .. } => Self::new(Kind::OutOfMemory, error.to_string()),
            // Only a stopping server cancels work whose client still waits.
            Error::Cancelled => Self::new(
                Kind::Draining,
                "the server stopped before this work was finished; send it again later",
            ),
            Error::Deadline => Self::new(Kind::Deadline, error.to_string()),
            error @ (Error::File { .. }
            | Error::Weights(_)
            | Error::Tensor(_)
            | Error::Diverged(_)) => Self::internal(error),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.title(), self.detail)
    }
}

impl std::error::Error for Problem {}

impl ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        StatusCode::from_u16(self.kind.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status_code());
        response.insert_header((header::CONTENT_TYPE, "application/problem+json"));
        response.insert_header((header::CACHE_CONTROL, "no-store"));
        if let Some(seconds) = self.retry_after {
            response.insert_header((header::RETRY_AFTER, seconds.to_string()));
        }
        if self.kind == Kind::Unauthorized {
            response.insert_header((header::WWW_AUTHENTICATE, "Bearer"));
        }
        if let Some(allow) = self.allow {
            response.insert_header((header::ALLOW, allow));
        }
        response.body(self.to_json().to_string())
    }
}
