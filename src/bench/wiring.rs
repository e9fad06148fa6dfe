//! Where the bench meets the rest of the crate: the in-process engine and the
//! scene world's prompts, one function each.

use std::path::Path;

use crate::Result;
use crate::data::scenes::Split;
use crate::engine::{Backend, Engine};
use crate::nn::device::Placement;

/// Opens the in-process engine on a folder of models.
///
/// # Errors
/// When there is no usable checkpoint.
pub fn open_engine(models: &Path, placement: &Placement) -> Result<Box<dyn Backend>> {
    Ok(Box::new(Engine::open(models, placement)?))
}

/// The first `count` prompts of the held-out test split of the scene world.
///
/// # Errors
/// None today; other prompt sources may fail.
pub fn scene_prompts(count: usize) -> Result<Vec<String>> {
    Ok(Split::Test.prompts(count).iter().map(ToString::to_string).collect())
}
