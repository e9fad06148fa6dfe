//! What a run will take, from its settings and the checkpoint's `config.json` files alone.

use std::path::Path;

use super::settings::{ChainGrad, Method, ReferenceStates, Score, Settings, TimestepMode, Trained};
use crate::diffusion::config::SchedulerConfig;
use crate::diffusion::ddim::Ddim;
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::solver::SolverKind;
use crate::nn::device_memory::DeviceMemory;
use crate::sdxl::ModelFolder;
use crate::sdxl::plan::{H100, MemoryPlan, Mode, Networks, Schedule, Setting};
use crate::{Error, Result};

/// What an update costs on the mean over its timesteps, if no group is skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpdateCost {
    /// U-Net forwards: of generated images, of trajectories, of the reference, and with
    /// gradients.
    pub rollout: f64,
    pub chain: f64,
    pub reference: f64,
    pub policy: f64,
    /// Samples that go backward.
    pub backward: f64,
    /// Images decoded and scored.
    pub images: f64,
}

impl UpdateCost {
    /// F.
    pub fn forwards(&self) -> f64 {
        self.rollout + self.chain + self.reference + self.policy
    }

    /// # Errors
    /// Names the setting that is unusable.
    pub fn of(method: Method, s: &Settings, schedule: &NoiseSchedule) -> Result<Self> {
        let stride = (schedule.num_train_timesteps() / s.chain_steps) as f64;
        let band = f64::from(s.t_min)..=f64::from(s.t_max);
        let starts: Vec<f64> = match s.timesteps {
            TimestepMode::Uniform => (s.t_min..=s.t_max).map(f64::from).collect(),
            TimestepMode::Grid => {
                let all = Ddim::new(schedule, s.chain_steps, 0.0)?;
                all.timesteps().iter().copied().filter(|t| band.contains(t)).collect()
            }
        };
        if starts.is_empty() {
            return Err(Error::invalid("t_min", "no timestep of the sampler lies in the band"));
        }
        let of = |t: &f64| s.m.min(1 + (t / stride) as usize) as f64;
        let states = starts.iter().map(of).sum::<f64>() / starts.len() as f64;
        let (groups, n) = (s.batch as f64, s.n as f64);
        let chosen = if method == Method::Rlhf { 2.0 } else { 1.0 };
        let mut cost = Self::default();
        let scored_chains = s.n > 1 && s.score == Score::Chain;
        cost.chain = twice(s.chain_guidance)
            * groups
            * if scored_chains {
                n * states * s.estimate_steps as f64
            } else {
                chosen * (states - 1.0)
            };
        if scored_chains {
            cost.images = groups * n * states;
        }
        if method == Method::Rlhf {
            let kind: SolverKind = s.rollout_solver.parse()?;
            let images = groups * if s.rollout_shared { 1.0 } else { n };
            let reuse = s.rollout_reuse as f64;
            cost.rollout =
                images * kind.evaluations(s.rollout_steps) as f64 * twice(s.rollout_guidance)
                    / reuse;
            if s.score == Score::Sample {
                cost.images = images / reuse;
            }
            let compared = match s.reference_states {
                ReferenceStates::All => states,
                ReferenceStates::First => 1.0,
            };
            cost.reference = groups * 2.0 * compared * twice(s.loss_guidance);
        }
        cost.backward = groups * chosen * states * twice(s.loss_guidance);
        cost.policy = match (s.chain_grad, twice(s.chain_guidance)) {
            (ChainGrad::Through, 2.0) => cost.backward + groups * chosen * (states - 1.0),
            _ => cost.backward,
        };
        Ok(cost)
    }
}

/// Rows of a prediction with this guidance.
fn twice(guidance: f64) -> f64 {
    if guidance == 1.0 { 1.0 } else { 2.0 }
}

/// The memory plan of a run, and a text that says all.
///
/// # Errors
/// Names the setting or the file that is unusable; `Error::InsufficientMemory` with what would
/// help where the device has less than the run takes.
pub fn dry_run(method: Method, settings: &Settings) -> Result<String> {
    settings.check(method)?;
    if let Some(adapter) = &settings.adapter {
        std::fs::File::open(adapter).map_err(|e| Error::file(Path::new(adapter), e))?;
    }
    let path = Path::new(&settings.model);
    let networks = Networks::at(path)?;
    let scheduler: SchedulerConfig = ModelFolder::scheduler_at(path)?;
    let schedule = NoiseSchedule::new(&scheduler)?;
    let cost = UpdateCost::of(method, settings, &schedule)?;
    let placement = settings.placement()?;
    let default = crate::sdxl::plan::default_size(&networks.unet, &networks.vae);
    let (width, height) =
        settings.resolution.map_or(default, |side| (side as usize, side as usize));
    let chosen = if method == Method::Rlhf { 2 } else { 1 };
    let setting = Setting {
        width,
        height,
        batch: settings.batch,
        dtype: placement.weights,
        mode: match settings.train {
            Trained::Lora => Mode::Lora { rank: settings.rank, targets: settings.targets.clone() },
            Trained::Full => Mode::Full { reference: method == Method::Rlhf },
        },
        trajectories: settings.n.max(chosen),
        steps: settings.m,
        decode_batch: settings.decode_batch,
    };
    let rows = settings.micro.min(settings.batch) * chosen * settings.m;
    let alive = rows * twice(settings.loss_guidance) as usize;
    let cut = Schedule { micro_batch: alive, recompute: settings.recompute };
    let plan = MemoryPlan::new(&networks, &setting, cut, H100)?;
    if let Some(memory) = DeviceMemory::of(&placement.device) {
        plan.ensure_fits(memory.total).map_err(|error| match error {
            Error::InsufficientMemory(message) => Error::InsufficientMemory(format!(
                "{message}. Knobs: --micro (now {}), --recompute (now {}), --m, --rank, \
                 --resolution, --decode-batch",
                settings.micro, settings.recompute
            )),
            other => other,
        })?;
    }
    let lines = [
        ("U-Net forwards, images generated", cost.rollout),
        ("U-Net forwards, trajectories", cost.chain),
        ("U-Net forwards, reference", cost.reference),
        ("U-Net forwards with gradients", cost.policy),
        ("U-Net forwards in all (F)", cost.forwards()),
        ("samples that go backward", cost.backward),
        ("images decoded and scored (Y, V)", cost.images),
        ("F of the whole run", cost.forwards() * settings.steps as f64),
    ];
    let lines = lines.map(|(name, value)| format!("{name:<40}{value:>14.1}\n")).concat();
    Ok(format!("{plan}\nan update, on the mean over its timesteps\n{lines}"))
}
