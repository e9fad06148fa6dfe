//! Where the bench meets the rest of the crate: the in-process engine.

use std::path::Path;

use crate::Result;
use crate::engine::{Backend, Engine};
use crate::nn::device::Placement;

/// Opens the in-process engine on a folder of models.
///
/// # Errors
/// When there is no usable checkpoint.
pub fn open_engine(models: &Path, placement: &Placement) -> Result<Box<dyn Backend>> {
    Ok(Box::new(Engine::open(models, placement)?))
}
