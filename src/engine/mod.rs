//! The engine: loads models, resolves and plans requests, runs them metered.
//! `serve` and `bench` reach everything below through this floor.

pub mod bundle;
pub mod encode;
pub mod latency;
pub mod local;
mod memory;
pub mod model;
pub mod previews;
mod registry;
pub mod request;
mod resolve;

use serde_json::Value;

use crate::diffusion::cost::Units;
use crate::nn::device_memory::DeviceMemory;
pub use crate::util::CancelToken;
use crate::{Error, Result};
pub use local::Engine;
use request::{GenerateRequest, Generation, Listing, ModelInfo, Preview, Resolved};
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
    /// An estimate of the clean image, when it has just been taken.
    pub preview: Option<Preview>,
}

/// Of backends that have the models they have.
const FIXED: &str = "what is served is fixed";

/// What is done with a loaded model before others get it.
pub type TryOut<'a> = dyn FnMut(&dyn Backend, &ModelInfo) -> Result<()> + 'a;

/// Anything that generates: the in-process engine, a remote server, a fake in tests.
/// All calls block; `generate` is called on dedicated threads only.
pub trait Backend: Send + Sync {
    /// The models that are loaded.
    fn models(&self) -> Vec<ModelInfo>;
    /// Ids of models that could be loaded.
    fn unloaded(&self) -> Vec<String> {
        Vec::new()
    }
    /// Loads a model by its id, or loads it anew. `try_out` gets a backend that has this one alone;
    /// others get it after that, unless it fails. Work that has begun keeps what it began with.
    ///
    /// # Errors
    /// `Error::Unknown` when there is none of this id; its files'; those of `try_out`. What was
    /// there before is there still then.
    fn load(&self, id: &str, try_out: &mut TryOut<'_>) -> Result<ModelInfo> {
        let _ = try_out;
        Err(Error::invalid("model", format!("'{id}' cannot be loaded: {FIXED}")))
    }
    /// Unloads a model.
    ///
    /// # Errors
    /// `Error::Unknown` when none of this id is loaded.
    fn unload(&self, id: &str) -> Result<()> {
        Err(Error::invalid("model", format!("'{id}' cannot be unloaded: {FIXED}")))
    }
    /// Reads an adapter of a loaded model, or reads it anew.
    ///
    /// # Errors
    /// `Error::Unknown` when there is none of this name; its file's.
    fn load_adapter(&self, model: &str, name: &str) -> Result<()> {
        Err(Error::invalid("adapter", format!("'{name}' of '{model}' cannot be loaded: {FIXED}")))
    }
    /// Unloads an adapter.
    ///
    /// # Errors
    /// `Error::Unknown` when none of this name is loaded.
    fn unload_adapter(&self, model: &str, name: &str) -> Result<()> {
        Err(Error::invalid("adapter", format!("'{name}' of '{model}' cannot be unloaded: {FIXED}")))
    }
    fn methods(&self) -> Vec<Listing>;
    fn rewards(&self) -> Vec<Listing>;
    /// Memory of the device that the models are on, where it is in reach and tells.
    fn memory(&self) -> Option<DeviceMemory> {
        None
    }
    /// Resolves defaults, checks every field and predicts the cost; runs nothing.
    ///
    /// # Errors
    /// `Error::Invalid` / `Error::Unknown` name the field; `Error::Budget` and
    /// `Error::InsufficientMemory` say what would be needed.
    fn plan(&self, request: &GenerateRequest) -> Result<Planned>;
    /// Runs a planned request.
    ///
    /// # Errors
    /// `Error::Cancelled`, `Error::Deadline`; `Error::OutOfMemory` when others hold the memory that it needs, after
    /// which everything works as before; the models'.
    fn generate(
        &self,
        planned: &Planned,
        cancel: &CancelToken,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation>;
}
