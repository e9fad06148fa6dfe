//! Which checkpoints there are, and which of them are loaded.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::model::Model;
use crate::nn::device::Placement;
use crate::sdxl::ModelFolder;
use crate::{Error, Result};

/// The checkpoints of a folder, on one device. Work that has begun keeps the model that it began
/// with, whatever is loaded or unloaded meanwhile.
pub struct Registry {
    folder: PathBuf,
    placement: Placement,
    /// In the order of their ids.
    loaded: RwLock<Vec<Arc<Model>>>,
    /// One is loaded at a time.
    loading: Mutex<()>,
}

impl Registry {
    /// Opens `folder` and loads the checkpoints `only`, or all.
    ///
    /// # Errors
    /// When there is no checkpoint, none of a name in `only`, or one is unusable.
    pub fn open(folder: &Path, placement: &Placement, only: &[String]) -> Result<Self> {
        let registry = Self {
            folder: folder.to_path_buf(),
            placement: placement.clone(),
            loaded: RwLock::default(),
            loading: Mutex::default(),
        };
        let places = registry.places()?;
        if places.is_empty() {
            let message = "no checkpoint here: expected folders with a model_index.json \
                           (diffusers layout) or .safetensors files (Stability's layout)";
            return Err(Error::file(folder, message));
        }
        let all: Vec<String> = places.into_iter().map(|(id, _)| id).collect();
        for id in if only.is_empty() { &all } else { only } {
            registry.load(id, |_, _| Ok(()))?;
        }
        Ok(registry)
    }

    /// The loaded models.
    pub fn loaded(&self) -> Vec<Arc<Model>> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A loaded model; the first when none is named.
    ///
    /// # Errors
    /// `Error::Invalid` or `Error::Unknown` on `model`.
    pub fn get(&self, id: Option<&str>) -> Result<Arc<Model>> {
        let loaded = self.loaded();
        let Some(id) = id else {
            let first = loaded.into_iter().next();
            return first.ok_or_else(|| Error::invalid("model", "none is loaded"));
        };
        if let Some(found) = loaded.iter().find(|model| model.id == id) {
            return Ok(Arc::clone(found));
        }
        if self.unloaded().iter().any(|other| other == id) {
            return Err(Error::invalid("model", format!("'{id}' is not loaded")));
        }
        Err(Error::unknown("model", "model", id, loaded.iter().map(|model| model.id.as_str())))
    }

    /// Checkpoints that are there and not loaded.
    pub fn unloaded(&self) -> Vec<String> {
        let places = self.places().unwrap_or_else(|error| {
            tracing::warn!(%error, "the folder of models cannot be read");
            Vec::new()
        });
        let loaded = self.loaded();
        let ids = places.into_iter().map(|(id, _)| id);
        ids.filter(|id| loaded.iter().all(|model| model.id != *id)).collect()
    }

    /// Loads a checkpoint of the folder, or loads it anew. `try_out` gets a registry with this one
    /// alone; when it fails, what was there stays.
    ///
    /// # Errors
    /// `Error::Unknown` when the folder has none of this id; its files'; those of `try_out`.
    pub fn load(
        &self,
        id: &str,
        try_out: impl FnOnce(Self, &Model) -> Result<()>,
    ) -> Result<Arc<Model>> {
        let _one = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let places = self.places()?;
        let Some((id, path)) = places.iter().find(|(other, _)| other == id) else {
            let there = places.iter().map(|(id, _)| id.as_str());
            return Err(Error::unknown("model", "model", id, there));
        };
        tracing::info!(model = %id, "loading");
        let model = Arc::new(Model::open(id.clone(), path, &self.placement)?);
        let alone = Self {
            folder: path.clone(),
            placement: self.placement.clone(),
            loaded: RwLock::new(vec![Arc::clone(&model)]),
            loading: Mutex::default(),
        };
        try_out(alone, &model)?;
        let mut loaded = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        match loaded.binary_search_by(|other| other.id.cmp(id)) {
            Ok(at) => loaded[at] = Arc::clone(&model),
            Err(at) => loaded.insert(at, Arc::clone(&model)),
        }
        Ok(model)
    }

    /// Unloads a model; its memory is free when the work that has begun with it has ended.
    ///
    /// # Errors
    /// `Error::Unknown` when none of this id is loaded.
    pub fn unload(&self, id: &str) -> Result<()> {
        let mut loaded = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = loaded.iter().position(|model| model.id == id) else {
            let there = loaded.iter().map(|model| model.id.as_str());
            return Err(Error::unknown("model", "loaded model", id, there));
        };
        loaded.remove(at);
        tracing::info!(model = %id, "unloaded");
        Ok(())
    }

    /// Every checkpoint of the folder, or the folder itself when it is one, by its id.
    fn places(&self) -> Result<Vec<(String, PathBuf)>> {
        let folder = &self.folder;
        let mut found = Vec::new();
        if ModelFolder::is_at(folder) {
            found.push(folder.clone());
        } else {
            for entry in std::fs::read_dir(folder).map_err(|e| Error::file(folder, e))? {
                let path = entry.map_err(|e| Error::file(folder, e))?.path();
                if ModelFolder::is_at(&path) {
                    found.push(path);
                }
            }
        }
        let mut places: Vec<(String, PathBuf)> = Vec::new();
        for place in found {
            let path = place.canonicalize().map_err(|e| Error::file(&place, e))?;
            // The name as it was given: a file is often a link to one with another name.
            let name = if place.is_file() { place.file_stem() } else { path.file_name() };
            let id = name.map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
            if places.iter().any(|(other, _)| *other == id) {
                let message = format!("there is another checkpoint called '{id}' beside it");
                return Err(Error::file(&place, message));
            }
            places.push((id, path));
        }
        places.sort();
        Ok(places)
    }
}
