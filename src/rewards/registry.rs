//! Which rewards a model comes with: one line each.

use std::path::Path;
use std::sync::Arc;

use super::judge::SceneJudge;
use super::scene_clip::SceneClip;
use super::{Reward, RewardSet};
use crate::Result;

type Opener = fn(&Path) -> Result<Option<Arc<dyn Reward>>>;

/// A reward that needs no files is always there; one that does is there when its folder is.
const REWARDS: &[Opener] = &[
    |model| folder(&model.join("scene_clip"), |path| Ok(Arc::new(SceneClip::from_folder(path)?))),
    |_| Ok(Some(Arc::new(SceneJudge))),
];

fn folder(
    path: &Path,
    open: fn(&Path) -> Result<Arc<dyn Reward>>,
) -> Result<Option<Arc<dyn Reward>>> {
    if path.is_dir() { open(path).map(Some) } else { Ok(None) }
}

/// The rewards of the model in this folder.
///
/// # Errors
/// When a reward's files are there but unusable.
pub fn for_model(model: &Path) -> Result<RewardSet> {
    let mut found = Vec::new();
    for open in REWARDS {
        found.extend(open(model)?);
    }
    RewardSet::new(found)
}
