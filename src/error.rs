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
    /// The work needs more memory than the device has in all; nothing was run.
    #[error("insufficient memory: {0}")]
    InsufficientMemory(String),
    /// The device had no memory left for the work; there may be enough at another time.
    #[error("out of memory {doing}: {help}")]
    OutOfMemory {
        doing: String,
        help: String,
        #[source]
        cause: Box<candle_core::Error>,
    },
    /// Training came to numbers that are not finite.
    #[error("training diverged: {0}")]
    Diverged(String),
    #[error("cancelled")]
    Cancelled,
    /// The time that the work had is over; see [`crate::util::CancelToken`].
    #[error("the deadline has passed")]
    Deadline,
    #[error("tensor operation failed: {0}")]
    Tensor(#[source] candle_core::Error),
}

/// How CUDA's driver and libraries say that there is no memory.
const NO_MEMORY: [&str; 5] = [
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CURAND_STATUS_ALLOCATION_FAILED",
];

/// Of [`Error::OutOfMemory`], where nothing more is known.
const DOING: &str = "in a tensor operation";
const HELP: &str = "do less at a time, or free memory of the device";

/// Told by the text: what candle wraps is behind traits that can only be shown.
fn is_out_of_memory(error: &candle_core::Error) -> bool {
    use candle_core::Error as E;
    let says = |shown: &dyn std::fmt::Display| {
        let text = shown.to_string();
        NO_MEMORY.iter().any(|name| text.contains(name))
    };
    match error {
        E::Cuda(e) => says(e),
        E::Wrapped(e) => says(e),
        E::WrappedContext { wrapped, .. } => says(wrapped),
        E::Msg(text) => says(text),
        E::Context { inner, .. } | E::WithPath { inner, .. } | E::WithBacktrace { inner, .. } => {
            is_out_of_memory(inner)
        }
        _ => false,
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        if is_out_of_memory(&error) {
            let (doing, help) = (DOING.to_owned(), HELP.to_owned());
            return Self::OutOfMemory { doing, help, cause: Box::new(error) };
        }
        Self::Tensor(error)
    }
}

impl From<Error> for candle_core::Error {
    /// The tensor operation's own error where it was one, so that it is recognised again.
    fn from(error: Error) -> Self {
        match error {
            Error::Tensor(error) => error,
            Error::OutOfMemory { cause, .. } => *cause,
            other => Self::wrap(other),
        }
    }
}

impl Error {
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), message: message.into() }
    }

    pub fn file(path: impl AsRef<Path>, message: impl ToString) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), message: message.to_string() }
    }

    /// A tensor operation's failure at a file; out of memory stays what it is.
    pub fn tensor_file(path: impl AsRef<Path>, error: candle_core::Error) -> Self {
        match Self::from(error) {
            Self::Tensor(error) => Self::file(path, error),
            other => {
                let doing = format!("while reading {}", path.as_ref().display());
                other.during(doing, "store the weights in bf16, or use a device with more memory")
            }
        }
    }

    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::OutOfMemory { .. })
    }

    /// Says what the device had no memory for and what would help, where nothing says so yet.
    #[must_use]
    pub fn during(self, doing: impl Into<String>, help: impl Into<String>) -> Self {
        match self {
            Self::OutOfMemory { doing: before, cause, .. } if before == DOING => {
                Self::OutOfMemory { doing: doing.into(), help: help.into(), cause }
            }
            other => other,
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Shown as the GPU libraries' errors are.
    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Shown(&'static str);

    fn cuda(text: &'static str) -> candle_core::Error {
        candle_core::Error::Cuda(Box::new(Shown(text)))
    }

    const DRIVER: &str = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";

    #[test]
    fn out_of_memory_is_recognised_however_it_is_wrapped() {
        use candle_core::Error as E;
        for name in NO_MEMORY {
            assert!(Error::from(cuda(name)).is_out_of_memory(), "{name}");
        }
        let context: candle_core::Result<()> =
            candle_core::Context::context(Err(Shown(DRIVER)), "in a layer");
        for error in [
            cuda(DRIVER),
            cuda(DRIVER).bt(),
            cuda(DRIVER).context("in a layer"),
            cuda(DRIVER).with_path("weights.safetensors").bt(),
            E::wrap(Shown("CUDNN_STATUS_ALLOC_FAILED")),
            E::Msg(DRIVER.into()),
            context.unwrap_err(),
        ] {
            let shown = error.to_string();
            assert!(Error::from(error).is_out_of_memory(), "{shown}");
        }
        for error in [
            cuda("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal address\")"),
            cuda("DriverError(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, \"too many resources\")"),
            E::wrap(Shown("CUDNN_STATUS_EXECUTION_FAILED")),
            E::UnwrapNone.context("out of memory"),
        ] {
            let error = Error::from(error);
            assert!(matches!(error, Error::Tensor(_)), "{error}");
        }
    }

    #[test]
    fn the_first_to_know_says_what_was_done() {
        let error = Error::from(cuda(DRIVER));
        let text = "out of memory in a tensor operation: do less at a time, or free memory of \
                    the device";
        assert_eq!(error.to_string(), text);
        let error = error.during("in the U-Net", "make smaller images").during("later", "no");
        assert_eq!(error.to_string(), "out of memory in the U-Net: make smaller images");
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        assert_eq!(cause.as_deref(), Some(DRIVER));
        // There and back: a checkpointed segment's error passes through candle's.
        assert!(Error::from(candle_core::Error::from(error)).is_out_of_memory());
        assert_eq!(Error::Cancelled.during("x", "y").to_string(), "cancelled");
    }

    #[test]
    fn a_file_that_the_device_cannot_hold_is_no_broken_file() {
        let error = Error::tensor_file("a.safetensors", cuda(DRIVER).bt());
        let text = error.to_string();
        assert!(text.starts_with("out of memory while reading a.safetensors: "), "{text}");
        let error = Error::tensor_file("a.safetensors", candle_core::Error::UnwrapNone);
        assert_eq!(error.to_string(), "a.safetensors: unwrap none");
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_driver_and_its_libraries_say_so_in_these_words() {
        use candle_core::cuda_backend::WrapErr;
        use candle_core::cuda_backend::cudarc::{cublas, curand, driver};
        let driver: Result<(), _> =
            Err(driver::DriverError(driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        let cublas: Result<(), _> = Err(cublas::result::CublasError(
            cublas::sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED,
        ));
        let curand: Result<(), _> = Err(curand::result::CurandError(
            curand::sys::curandStatus_t::CURAND_STATUS_ALLOCATION_FAILED,
        ));
        for error in [driver.w(), cublas.w(), curand.w()].map(Result::unwrap_err) {
            assert!(Error::from(error).is_out_of_memory());
        }
    }

    #[cfg(feature = "cudnn")]
    #[test]
    fn cudnn_says_so_in_these_words() {
        use candle_core::cuda_backend::cudarc::cudnn::{CudnnError, sys::cudnnStatus_t as Status};
        for status in [
            Status::CUDNN_STATUS_ALLOC_FAILED,
            Status::CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED,
        ] {
            assert!(Error::from(candle_core::Error::wrap(CudnnError(status))).is_out_of_memory());
        }
    }
}
