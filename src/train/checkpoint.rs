//! The state of a run on disk: written whole under a temporary name, synced and renamed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::diffusion::cost::Cost;
use crate::sdxl::config::read_json;
use crate::sdxl::weights::{read_safetensors, write_safetensors};
use crate::util::write_atomic;
use crate::{Error, Result};

const FOLDER: &str = "checkpoints";
const STATE: &str = "state.json";
const PREFIX: &str = "step-";

/// What is no tensor.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Updates done.
    pub step: u64,
    pub cost: Cost,
    /// Forward and backward passes of a sample each.
    pub policy_passes: u64,
    /// Groups left out, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Updates left out because a gradient was not finite, and how many of them in a row.
    pub not_finite: u64,
    pub not_finite_in_a_row: u64,
    /// The scorer's.
    pub scorer: Vec<[u64; 2]>,
    /// The update whose generated images are kept.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub replay: Option<u64>,
}

/// A run's state after an update.
#[derive(Debug)]
pub struct Checkpoint {
    pub progress: Progress,
    /// `weights`, `optimizer`, `ema`, `reference`, `replay`: tensors by name.
    pub tensors: BTreeMap<String, BTreeMap<String, Tensor>>,
}

#[derive(Serialize, Deserialize)]
struct State {
    format: u32,
    progress: Progress,
    /// The run's settings, to be compared with those of a run that goes on.
    settings: Map<String, Value>,
    /// The files that belong to it.
    parts: Vec<String>,
}

const FORMAT: u32 = 1;

/// Checkpoints of the run in a folder.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    pub fn of(out: &Path) -> Self {
        Self { folder: out.join(FOLDER) }
    }

    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("{PREFIX}{step:06}"))
    }

    /// Steps of the checkpoints that are there, ascending.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let mut steps = Vec::new();
        if !self.folder.is_dir() {
            return Ok(steps);
        }
        for entry in fs::read_dir(&self.folder).map_err(|e| Error::file(&self.folder, e))? {
            let name = entry.map_err(|e| Error::file(&self.folder, e))?.file_name();
            let step = name.to_str().and_then(|n| n.strip_prefix(PREFIX)?.parse().ok());
            steps.extend(step.filter(|step| self.path(*step).join(STATE).is_file()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Writes a checkpoint; `extra` adds files for other programs. Then all but the last `keep`
    /// are removed.
    ///
    /// # Errors
    /// When a file cannot be written. The checkpoints that are there stay.
    pub fn save(
        &self,
        checkpoint: &Checkpoint,
        settings: &Map<String, Value>,
        keep: usize,
        extra: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let step = checkpoint.progress.step;
        fs::create_dir_all(&self.folder).map_err(|e| Error::file(&self.folder, e))?;
        let temporary = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(&self.folder)
            .map_err(|e| Error::file(&self.folder, e))?;
        let path = temporary.path();
        for (name, tensors) in &checkpoint.tensors {
            write_safetensors(&path.join(format!("{name}.safetensors")), tensors, None)?;
        }
        extra(path)?;
        let state = State {
            format: FORMAT,
            progress: checkpoint.progress.clone(),
            settings: settings.clone(),
            parts: checkpoint.tensors.keys().cloned().collect(),
        };
        let json = serde_json::to_string_pretty(&state).map_err(|e| Error::file(path, e))?;
        write_atomic(&path.join(STATE), json.as_bytes())?;
        let target = self.path(step);
        if target.exists() {
            fs::remove_dir_all(&target).map_err(|e| Error::file(&target, e))?;
        }
        let written = temporary.keep();
        fs::rename(&written, &target).map_err(|e| Error::file(&target, e))?;
        readable(&target)?;
        sync(&self.folder)?;
        let steps = self.steps()?;
        for old in steps.iter().rev().skip(keep.max(1)) {
            let old = self.path(*old);
            fs::remove_dir_all(&old).map_err(|e| Error::file(&old, e))?;
        }
        Ok(())
    }

    /// The last checkpoint, where there is one. `check` is given its settings first.
    ///
    /// # Errors
    /// `check`'s, or the file that is missing or damaged.
    pub fn load(
        &self,
        check: impl FnOnce(&Map<String, Value>) -> Result<()>,
    ) -> Result<Option<Checkpoint>> {
        let Some(step) = self.steps()?.pop() else { return Ok(None) };
        let path = self.path(step);
        let state: State = read_json(&path.join(STATE))?;
        if state.format != FORMAT {
            let message = format!("expected format {FORMAT}, got {}", state.format);
            return Err(Error::file(path.join(STATE), message));
        }
        check(&state.settings)?;
        let read = |name: &String| {
            let file = path.join(format!("{name}.safetensors"));
            let tensors = read_safetensors(&file, &Device::Cpu)?.into_iter().collect();
            Ok((name.clone(), tensors))
        };
        let tensors = state.parts.iter().map(read).collect::<Result<_>>()?;
        Ok(Some(Checkpoint { progress: state.progress, tensors }))
    }
}

/// As readable as any other folder: temporary ones are private.
fn readable(path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))
            .map_err(|e| Error::file(path, e))?;
    }
    Ok(())
}

/// Makes a folder's entries last through a crash.
fn sync(folder: &Path) -> Result<()> {
    let file = fs::File::open(folder).map_err(|e| Error::file(folder, e))?;
    file.sync_all().map_err(|e| Error::file(folder, e))
}
