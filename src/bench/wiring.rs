//! Where the bench meets the rest of the crate: the in-process engine and the
//! scene world's prompts, one function each.

use std::path::Path;

use crate::engine::Backend;
use crate::{Error, Result};

/// Opens the in-process engine on a folder of models.
///
/// # Errors
/// `Error::Invalid` as long as this build has no in-process engine.
pub fn open_engine(models: &Path) -> Result<Box<dyn Backend>> {
    Err(Error::invalid(
        "models",
        format!("no in-process engine to open {} with; use --url", models.display()),
    ))
}

/// The first `count` prompts of the held-out test split of the scene world.
///
/// # Errors
/// `Error::Invalid` as long as this build has no scene world, or when the split is smaller.
pub fn scene_prompts(count: usize) -> Result<Vec<String>> {
    Err(Error::invalid(
        "prompts",
        format!("no scene world to take {count} prompts from; give a prompt file"),
    ))
}
