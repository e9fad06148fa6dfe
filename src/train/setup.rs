//! What stays the same during a run.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::score::Scorer;
use super::settings::{Method, Settings, Trained};
use crate::diffusion::config::SchedulerConfig;
use crate::diffusion::guidance::Guided;
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::rewards::RewardSet;
use crate::sdxl::ModelFolder;
use crate::sdxl::folder::OpenOptions;
use crate::{Error, Result};

/// Settings, and the checkpoint that they name.
pub struct Setup {
    pub method: Method,
    pub settings: Settings,
    pub folder: Arc<ModelFolder>,
    pub rewards: RewardSet,
    pub scheduler: SchedulerConfig,
    pub schedule: NoiseSchedule,
    /// Pixels.
    pub size: (u32, u32),
    pub out: PathBuf,
}

impl Setup {
    /// Loads the checkpoint that `settings` name.
    ///
    /// # Errors
    /// Names the setting or file at fault.
    pub fn open(method: Method, settings: Settings) -> Result<Self> {
        settings.check(method)?;
        let out =
            settings.out.clone().ok_or_else(|| Error::invalid("out", "missing: give a folder"))?;
        let placement = settings.placement()?;
        let path = Path::new(&settings.model);
        // Whatever can be wrong without the weights is found before they are read.
        let rewards = crate::rewards::registry::for_model(path)?;
        Scorer::new(&rewards, &settings)?;
        let options = OpenOptions { vae: ModelFolder::vae_of(path), ..OpenOptions::default() };
        let folder = ModelFolder::open_with(path, &placement, &options)?;
        let scheduler: SchedulerConfig = folder.scheduler()?;
        let schedule = NoiseSchedule::new(&scheduler)?;
        if settings.t_max as usize >= schedule.num_train_timesteps() {
            let last = schedule.num_train_timesteps() - 1;
            let message = format!("expected at most {last}, got {}", settings.t_max);
            return Err(Error::invalid("t_max", message));
        }
        if settings.chain_steps > schedule.num_train_timesteps() {
            return Err(Error::invalid("chain_steps", "more than the schedule has timesteps"));
        }
        let default = folder.default_size();
        let size = settings.resolution.map_or(default, |side| (side, side));
        Ok(Self {
            method,
            settings,
            folder: Arc::new(folder),
            rewards,
            scheduler,
            schedule,
            size,
            out: out.into(),
        })
    }

    /// The checkpoint as it is.
    pub fn base(&self) -> Guided<SdxlModel> {
        Guided(SdxlModel::new(self.folder.clone()))
    }

    /// What a run of this setup has exported to `path`.
    ///
    /// # Errors
    /// Names the file that is missing or does not fit the checkpoint.
    pub fn exported(&self, path: &Path) -> Result<Guided<SdxlModel>> {
        match self.settings.train {
            Trained::Lora => Ok(Guided(self.base().0.with_adapter_file(path)?)),
            Trained::Full => {
                let placement = self.settings.placement()?;
                let folder = ModelFolder::open_with(path, &placement, &OpenOptions::default())?;
                Ok(Guided(SdxlModel::new(Arc::new(folder))))
            }
        }
    }
}
