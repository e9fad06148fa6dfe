//! The library's error type: every message names the field or file at fault.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request or configuration value is unusable.
    #[error("{field}: {message}")]
    Invalid { field: String, message: String },
    /// A named thing (model, adapter, method, reward …) is not registered.
    #[error("{field}: unknown {what} '{name}'; known: {known}")]
    Unknown { field: String, what: &'static str, name: String, known: String },
    /// A file cannot be read, written or understood.
    #[error("{path}: {message}", path = path.display())]
    File { path: PathBuf, message: String },
    /// A checkpoint does not hold the tensors that its configuration asks for.
    #[error("{0}")]
    Weights(String),
    /// The work would cost more than its budget allows; nothing was run.
    #[error("budget: {0}")]
    Budget(String),
    #[error("cancelled")]
    Cancelled,
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), message: message.into() }
    }

    pub fn file(path: impl AsRef<Path>, message: impl ToString) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), message: message.to_string() }
    }

    pub fn unknown<'a>(
        field: impl Into<String>,
        what: &'static str,
        name: impl Into<String>,
        known: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let known = known.into_iter().collect::<Vec<_>>().join(", ");
        Self::Unknown { field: field.into(), what, name: name.into(), known }
    }
}
