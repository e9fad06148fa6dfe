//! What a training run is told. Keys are the same in TOML files and, with dashes, as flags.

use serde::{Deserialize, Serialize};

use super::latents::Crop;
use super::objective::LossKind;
use crate::Result;
use crate::data::images::ImageSource;
use crate::data::prompts::PromptSource;
use crate::nn::device::{DeviceChoice, NumberChoice, Placement};

/// An enum whose values have kebab-case names in files, flags and messages.
macro_rules! choice {
    ($(#[$meta:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$inner])* $variant),+ }
    };
}
pub(super) use choice;

choice! {
    /// Which training method.
    Method {
        /// Diffusion-Sharpening on image-text pairs (Algorithm 1).
        Sft,
        /// Diffusion-Sharpening on prompts and a reward (Algorithm 2).
        Rlhf,
    }
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Rlhf => "rlhf",
        }
    }

    /// Fewest trajectories of a group that give a gradient: a preference needs two.
    pub fn least_trajectories(self) -> usize {
        match self {
            Self::Sft => 1,
            Self::Rlhf => 2,
        }
    }
}

choice! {
    /// What is trained.
    Trained {
        /// Low-rank adapters; the reference is the model without them.
        Lora,
        /// Every weight of the U-Net; the reference is a frozen copy.
        Full,
    }
}

choice! {
    /// The learning rate after the warm-up.
    LrSchedule { Constant, Linear, Cosine }
}

choice! {
    /// How a trajectory's scores become one.
    Aggregate {
        Mean,
        /// Eq. 8.
        Sum,
        /// That of the last state.
        Last,
    }
}

choice! {
    /// What is scored.
    Score {
        /// The clean-image estimates along the chain (the method).
        Chain,
        /// The image that was noised: RLHF's generated one. Only chosen trajectories are then
        /// rolled out.
        Sample,
    }
}

choice! {
    /// Which noise takes a clean latent back to the noise level of the chain's start.
    Renoise {
        /// Drawn once for a group, as Diffusion-DPO does for a pair.
        FreshShared,
        /// Drawn for every trajectory, as the paper has it.
        FreshIndep,
        /// That from which the latent was generated, as the released code has it.
        Reuse,
    }
}

choice! {
    /// Where a chain starts.
    TimestepMode {
        /// Any integer of the band.
        Uniform,
        /// The sampler's own timesteps within the band.
        Grid,
    }
}

choice! {
    /// Whether gradients go through the sampler's steps.
    ChainGrad { Detach, Through }
}

choice! {
    /// The noise that predictions at later states are compared with.
    Target {
        /// What took the clean latent to the chain's start, at every state.
        EpsInit,
        /// What lies between the clean latent and the state itself.
        EpsExact,
    }
}

choice! {
    /// Which trajectory of a group is learnt from.
    Select {
        Best,
        /// One by lot, the control of SFT; in RLHF scores are shuffled within the group.
        Random,
    }
}

choice! {
    /// At which states the reference is compared with.
    ReferenceStates {
        All,
        /// The chain's start alone, as the released code does.
        First,
    }
}

choice! {
    /// Whether a reward's scores are put on one scale before they are added and compared.
    RewardScale {
        None,
        /// Divided by the running deviation within groups.
        Deviation,
    }
}

choice! {
    /// Numbers of an exported adapter.
    ExportType { F16, Bf16, F32 }
}

choice! {
    /// Names in an exported adapter.
    ExportFormat { Kohya, Diffusers }
}

/// Everything a run depends on. `Option`s that are `None` are absent from files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Checkpoint: a folder in the diffusers layout or one file.
    pub model: String,
    pub device: DeviceChoice,
    pub dtype: NumberChoice,
    pub vae_dtype: NumberChoice,
    /// Where the run is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out: Option<String>,
    /// All randomness of the run.
    pub seed: u64,
    /// Optimizer updates.
    pub steps: u64,

    /// Images with captions (SFT).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<ImageSource>,
    pub crop: Crop,
    pub flip: bool,
    /// Whether images of one aspect ratio go together instead of being cut to squares.
    pub buckets: bool,
    /// Views that are cached of each image.
    pub variants: u32,
    /// Folder of cached latents; `latents` in that of the run without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<String>,
    /// Prompts (RLHF).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<PromptSource>,
    /// Pixels a side; the checkpoint's own without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolution: Option<u32>,

    pub train: Trained,
    pub rank: usize,
    /// Scale of an adapter times its rank; the rank without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Endings of the names of the modules that get adapters.
    pub targets: Vec<String>,
    /// An adapter file whose values the run begins with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// Blocks are computed anew in the backward pass.
    pub recompute: bool,

    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Most norm of all gradients together.
    pub clip: f64,
    pub warmup: u64,
    pub lr_schedule: LrSchedule,
    /// Decay of an average of the weights; none at 0.
    pub ema: f64,
    /// Groups (prompts or images) of an update.
    pub batch: usize,
    /// Groups whose graphs are alive at once.
    pub micro: usize,

    /// Trajectories of a group.
    pub n: usize,
    /// States of a trajectory.
    pub m: usize,
    /// Sampler steps whose stride the chain has.
    pub chain_steps: usize,
    /// Stochasticity of the chain.
    pub eta: f64,
    pub chain_guidance: f64,
    /// Probability-flow steps from a state to its clean-image estimate; 1 is Tweedie's formula.
    pub estimate_steps: usize,
    pub timesteps: TimestepMode,
    /// The band in which chains start, inclusive.
    pub t_min: u32,
    pub t_max: u32,
    /// Rewards, each `name` or `name:weight`.
    pub rewards: Vec<String>,
    pub reward_scale: RewardScale,
    pub aggregate: Aggregate,
    pub score: Score,
    pub renoise: Renoise,
    pub chain_grad: ChainGrad,
    pub target: Target,
    pub select: Select,
    /// Smallest difference of best and worst score that is learnt from.
    pub min_gap: f64,
    /// Share of SFT's captions that the null prompt replaces; never where scores are compared.
    pub prompt_dropout: f64,

    pub loss: LossKind,
    /// Of the implicit reward.
    pub beta: f64,
    /// Of the reward gap in `offset`.
    pub gamma: f64,
    /// Of the reward gap in `rebel`.
    pub reward_eta: f64,
    /// Guidance of the predictions that the loss compares.
    pub loss_guidance: f64,
    /// Weight of the mean squared distance of a pair's predictions from the reference's.
    pub anchor: f64,
    pub reference_states: ReferenceStates,
    /// Updates after which the reference becomes the model as it is; never at 0.
    pub reference_refresh: u64,
    /// Steps and guidance with which RLHF generates what it noises.
    pub rollout_steps: usize,
    pub rollout_solver: String,
    pub rollout_guidance: f64,
    /// Whether the trajectories of a group begin from one generated latent.
    pub rollout_shared: bool,
    /// Updates that learn from the same generated latents.
    pub rollout_reuse: u64,
    /// Most rows of a U-Net pass without gradients, and most images decoded at once.
    pub rollout_batch: usize,
    pub decode_batch: usize,

    /// Updates between checkpoints; how many are kept.
    pub save_every: u64,
    pub keep: usize,
    /// Updates between validations; never at 0.
    pub validate_every: u64,
    /// Prompts of a validation.
    pub validation_prompts: PromptSource,
    /// Steps and guidance of validation images.
    pub validation_steps: usize,
    pub validation_guidance: f64,
    /// Validation images that are kept as pictures.
    pub validation_images: usize,
    /// Images with captions whose loss is followed (SFT).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_data: Option<ImageSource>,

    pub export_format: ExportFormat,
    pub export_dtype: ExportType,
}

impl Settings {
    /// Where the networks are to run.
    ///
    /// # Errors
    /// When the device is not there or does not offer the numbers.
    pub fn placement(&self) -> Result<Placement> {
        Placement::new(self.device, self.dtype, self.vae_dtype)
    }
}
