//! The engine: loads models, resolves and plans requests, runs them metered.
//! `serve` and `bench` reach everything below through this floor.

pub mod bundle;
pub mod encode;
pub mod latency;
pub mod local;
mod memory;
pub mod model;
pub mod request;
mod resolve;

use serde_json::Value;

use crate::Result;
use crate::diffusion::cost::Units;
pub use crate::util::CancelToken;
pub use local::Engine;
use request::{GenerateRequest, Generation, Listing, ModelInfo, Resolved};
pub use resolve::request_of;

/// A validated request with its predicted cost.
#[derive(Clone, Debug)]
pub struct Planned {
    pub resolved: Resolved,
    /// Over all `n` images.
    pub cost: Units,
}

/// What a running generation reports.
#[derive(Clone, Debug)]
pub struct Progress {
    pub spent: Units,
    pub planned: Units,
    /// A trace entry of the method, when it has just decided something.
    pub event: Option<Value>,
}

/// Anything that generates: the in-process engine, a remote server, a fake in tests.
/// All calls block; `generate` is called on dedicated threads only.
pub trait Backend: Send + Sync {
    fn models(&self) -> Vec<ModelInfo>;
    fn methods(&self) -> Vec<Listing>;
    fn rewards(&self) -> Vec<Listing>;
    /// Resolves defaults, checks every field and predicts the cost; runs nothing.
    ///
    /// # Errors
    /// `Error::Invalid` / `Error::Unknown` name the field; `Error::Budget` and
    /// `Error::InsufficientMemory` say what would be needed.
    fn plan(&self, request: &GenerateRequest) -> Result<Planned>;
    /// Runs a planned request.
    ///
    /// # Errors
    /// `Error::Cancelled`; `Error::OutOfMemory` when others hold the memory that it needs, after
    /// which everything works as before; the models'.
    fn generate(
        &self,
        planned: &Planned,
        cancel: &CancelToken,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation>;
}
