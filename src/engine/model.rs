//! One checkpoint, ready to generate.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use candle_core::DType;

use super::request::{ModelInfo, ModelRef};
use crate::data::scenes::Split;
use crate::diffusion::config::SchedulerConfig;
use crate::diffusion::guidance::Guided;
use crate::diffusion::joining::{Junction, Member};
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::diffusion::solver::SolverKind;
use crate::nn::device::Placement;
use crate::rewards::{RewardSet, registry};
use crate::sdxl::folder::OpenOptions;
use crate::sdxl::plan::{H100, MemoryPlan, Networks, Schedule, Setting};
use crate::sdxl::{ClipTokenizer, ModelFolder};
use crate::{Error, Result};

/// The paper's evaluation setting (§4.1): 50 DDIM steps, guidance 5.
pub const DEFAULT_STEPS: u32 = 50;
pub const DEFAULT_GUIDANCE: f64 = 5.0;
/// Example prompts offered to callers.
const EXAMPLES: usize = 24;

/// Memory plans that are kept.
const PLANS: usize = 256;

/// The adapter, and the channels, height and width of the latent.
type Meeting = (Option<String>, (usize, usize, usize));

/// A loaded checkpoint with everything that generation needs.
pub struct Model {
    pub id: String,
    pub sha256: String,
    pub tokenizers: [ClipTokenizer; 2],
    pub schedule: NoiseSchedule,
    pub solver: SolverKind,
    pub rewards: RewardSet,
    base: SdxlModel,
    /// Where their files are.
    adapters: RwLock<Vec<(String, PathBuf)>>,
    adapters_folder: PathBuf,
    /// Networks with an adapter in place; they share the base weights.
    adapted: Mutex<HashMap<String, SdxlModel>>,
    /// Where requests under way meet that go in the same batches.
    junctions: Mutex<HashMap<Meeting, Weak<Junction>>>,
    networks: Networks,
    /// The type in which they are stored.
    weights: DType,
    /// Of the sizes asked for lately: width, height, guided.
    plans: Mutex<HashMap<(u32, u32, bool), Arc<MemoryPlan>>>,
}

impl Model {
    /// # Errors
    /// Names the file that is missing or unusable.
    pub fn open(id: String, path: &Path, placement: &Placement) -> Result<Self> {
        let options = OpenOptions { vae: ModelFolder::vae_of(path), ..OpenOptions::default() };
        let folder = ModelFolder::open_with(path, placement, &options)?;
        let tokenizers = folder.tokenizers()?;
        let scheduler: SchedulerConfig = folder.scheduler()?;
        scheduler.validate().map_err(|e| Error::file(path, format!("scheduler: {e}")))?;
        if let Some(class) = scheduler.class_without_counterpart() {
            let solver = scheduler.default_solver().name();
            tracing::warn!(model = %id, class, solver, "no such solver here; using another by default");
        }
        let sha256 = folder.sha256()?;
        Ok(Self {
            id,
            sha256,
            tokenizers,
            solver: scheduler.default_solver(),
            schedule: NoiseSchedule::new(&scheduler)?,
            rewards: registry::for_model(path)?,
            adapters: RwLock::new(adapter_files(&ModelFolder::adapters_of(path))?),
            adapters_folder: ModelFolder::adapters_of(path),
            networks: folder.networks(),
            weights: placement.weights,
            base: SdxlModel::new(Arc::new(folder)),
            adapted: Mutex::default(),
            junctions: Mutex::default(),
            plans: Mutex::default(),
        })
    }

    /// The network, with the named adapter (loaded on first use) or without. What it makes of texts goes
    /// with it: no other request has the same encodings.
    ///
    /// # Errors
    /// `Error::Unknown` on `adapter`, or when its file does not fit.
    pub fn network(&self, adapter: Option<&str>) -> Result<Guided<SdxlModel>> {
        let Some(name) = adapter else { return Ok(Guided(self.base.with_own_texts())) };
        let path = self.adapter(name)?;
        let mut adapted = self.adapted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = adapted.get(name) {
            return Ok(Guided(model.with_own_texts()));
        }
        let model = self.base.with_adapter_file(&path)?;
        adapted.insert(name.to_owned(), model.clone());
        Ok(Guided(model))
    }

    /// A place in the batches of those who use the same adapter at the same size, of at most
    /// `most_rows` rows.
    ///
    /// # Errors
    /// As [`Model::network`].
    pub fn member(
        &self,
        adapter: Option<&str>,
        latent_shape: (usize, usize, usize),
        most_rows: usize,
    ) -> Result<Member> {
        let network = self.network(adapter)?;
        let mut junctions = self.junctions.lock().unwrap_or_else(PoisonError::into_inner);
        junctions.retain(|_, junction| junction.strong_count() > 0);
        let meeting = (adapter.map(str::to_owned), latent_shape);
        let known = junctions.get(&meeting).and_then(Weak::upgrade);
        let junction = known.unwrap_or_else(|| Junction::new(network));
        junctions.insert(meeting, Arc::downgrade(&junction));
        Ok(junction.member(most_rows))
    }

    /// What one image of this size takes; nothing for f64, which only checks gradients.
    ///
    /// # Errors
    /// When the networks cannot make that size.
    pub fn memory(&self, width: u32, height: u32, guided: bool) -> Result<Option<Arc<MemoryPlan>>> {
        if self.weights == DType::F64 {
            return Ok(None);
        }
        let size = (width, height, guided);
        let lock = || self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&size) {
            return Ok(Some(known.clone()));
        }
        let setting = Setting::one_image(width as usize, height as usize, self.weights, guided);
        let one = Schedule { micro_batch: 1, recompute: false };
        let made = Arc::new(MemoryPlan::new(&self.networks, &setting, one, H100)?);
        let mut plans = lock();
        if plans.len() >= PLANS {
            plans.clear();
        }
        plans.insert(size, made.clone());
        Ok(Some(made))
    }

    /// The file of an adapter.
    ///
    /// # Errors
    /// `Error::Unknown` listing the adapters that are there.
    pub fn adapter(&self, name: &str) -> Result<PathBuf> {
        let known = self.adapters.read().unwrap_or_else(PoisonError::into_inner);
        find_adapter(&known, name).cloned()
    }

    /// Reads an adapter of the model's folder of adapters, or reads it anew.
    ///
    /// # Errors
    /// `Error::Unknown` listing those that the folder has; or the file does not fit.
    pub fn load_adapter(&self, name: &str) -> Result<()> {
        let path = find_adapter(&adapter_files(&self.adapters_folder)?, name)?.clone();
        let model = self.base.with_adapter_file(&path)?;
        let mut known = self.adapters.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(other, _)| other != name);
        known.push((name.to_owned(), path));
        known.sort();
        self.forget_adapted(name).insert(name.to_owned(), model);
        Ok(())
    }

    /// Takes an adapter away; who uses it now keeps it.
    ///
    /// # Errors
    /// As [`Model::adapter`].
    pub fn unload_adapter(&self, name: &str) -> Result<()> {
        let mut known = self.adapters.write().unwrap_or_else(PoisonError::into_inner);
        find_adapter(&known, name)?;
        known.retain(|(other, _)| other != name);
        drop(self.forget_adapted(name));
        Ok(())
    }

    /// Who comes from now on does not meet those who use the old one.
    fn forget_adapted(&self, name: &str) -> MutexGuard<'_, HashMap<String, SdxlModel>> {
        let mut adapted = self.adapted.lock().unwrap_or_else(PoisonError::into_inner);
        adapted.remove(name);
        let mut junctions = self.junctions.lock().unwrap_or_else(PoisonError::into_inner);
        junctions.retain(|(adapter, _), _| adapter.as_deref() != Some(name));
        adapted
    }

    pub fn base(&self) -> &SdxlModel {
        &self.base
    }

    pub fn reference(&self) -> ModelRef {
        ModelRef { id: self.id.clone(), sha256: self.sha256.clone() }
    }

    pub fn info(&self) -> ModelInfo {
        let (default_width, default_height) = self.base.folder().default_size();
        // Only a model that carries the scene world's CLIP was made for its captions.
        let scenes = self.rewards.names().any(|name| name == "scene-clip");
        let example_prompts = if scenes {
            Split::Test.prompts(EXAMPLES).iter().map(ToString::to_string).collect()
        } else {
            vec!["a red circle left of a blue square".to_owned()]
        };
        ModelInfo {
            id: self.id.clone(),
            sha256: self.sha256.clone(),
            default_width,
            default_height,
            default_steps: DEFAULT_STEPS,
            default_guidance_scale: DEFAULT_GUIDANCE,
            adapters: {
                let known = self.adapters.read().unwrap_or_else(PoisonError::into_inner);
                known.iter().map(|(id, _)| id.clone()).collect()
            },
            unet_parameters: self.base.folder().unet_weights.parameters(),
            dtype: self.weights.as_str().to_owned(),
            example_prompts,
        }
    }
}

fn find_adapter<'a>(known: &'a [(String, PathBuf)], name: &str) -> Result<&'a PathBuf> {
    let found = known.iter().find(|(id, _)| id == name).map(|(_, path)| path);
    let ids = known.iter().map(|(id, _)| id.as_str());
    found.ok_or_else(|| Error::unknown("adapter", "adapter", name, ids))
}

/// `NAME.safetensors` in the model's adapters folder, by name.
fn adapter_files(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::file(folder, e))? {
        let path = entry.map_err(|e| Error::file(folder, e))?.path();
        if path.extension().is_some_and(|e| e == "safetensors")
            && let Some(stem) = path.file_stem().and_then(|s| s.to_str())
        {
            found.push((stem.to_owned(), path.clone()));
        }
    }
    found.sort();
    Ok(found)
}
