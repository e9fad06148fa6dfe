//! The settings as flags and environment variables: what is not given is left to the source below.

use clap::Args;
use serde::Serialize;

use super::latents::Crop;
use super::objective::LossKind;
use super::settings::{
    Aggregate, ChainGrad, ExportFormat, ExportType, LrSchedule, ReferenceStates, Renoise,
    RewardScale, Score, Select, Target, TimestepMode, Trained,
};
use crate::data::images::ImageSource;
use crate::data::prompts::PromptSource;
use crate::nn::device::{DeviceChoice, NumberChoice};

/// One field for each key of the settings, under the same name.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize)]
pub struct Flags {
    /// Checkpoint: a folder in the diffusers layout, or one file in Stability's [default: models/tiny]
    #[arg(long, env = "DS_TRAIN_MODEL", value_name = "PATH")]
    pub model: Option<String>,
    /// auto, cpu or cuda:N [default: auto]
    #[arg(long, env = "DS_TRAIN_DEVICE", value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
    /// Numbers of U-Net and text towers: auto, f32, bf16 or f16 [default: auto]. What is trained is f32
    #[arg(long, env = "DS_TRAIN_DTYPE", value_name = "TYPE")]
    pub dtype: Option<NumberChoice>,
    /// Numbers of the VAE: auto, f32, bf16 or f16 [default: auto, which is f32]
    #[arg(long, env = "DS_TRAIN_VAE_DTYPE", value_name = "TYPE")]
    pub vae_dtype: Option<NumberChoice>,
    /// Folder of the run; an interrupted run continues there
    #[arg(long, env = "DS_TRAIN_OUT", value_name = "DIR")]
    pub out: Option<String>,
    /// All randomness of the run [default: 0]
    #[arg(long, env = "DS_TRAIN_SEED", value_name = "SEED")]
    pub seed: Option<u64>,
    /// Updates
    #[arg(long, env = "DS_TRAIN_STEPS", value_name = "N")]
    pub steps: Option<u64>,
    /// sft: images with captions: a folder, file or archive (docs/data.md), or scenes:SPLIT:COUNT
    #[arg(long, env = "DS_TRAIN_DATA", value_name = "SOURCE")]
    pub data: Option<ImageSource>,
    /// What is cut off images that are no squares [sft]
    #[arg(long, env = "DS_TRAIN_CROP", value_enum)]
    pub crop: Option<Crop>,
    /// Mirror half of the views of images [sft]
    #[arg(long, env = "DS_TRAIN_FLIP", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub flip: Option<bool>,
    /// Keep images' aspect ratios, and learn from images of one ratio together [sft]
    #[arg(long, env = "DS_TRAIN_BUCKETS", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub buckets: Option<bool>,
    /// Views that are cached of each image, with other crops and flips [sft]
    #[arg(long, env = "DS_TRAIN_VARIANTS", value_name = "N")]
    pub variants: Option<u32>,
    /// Folder of cached latents [sft; default: latents in --out]
    #[arg(long, env = "DS_TRAIN_CACHE", value_name = "DIR")]
    pub cache: Option<String>,
    /// rlhf: prompts: .txt, .csv, .tsv, .jsonl or .parquet, or scenes:SPLIT:COUNT
    #[arg(long, env = "DS_TRAIN_PROMPTS", value_name = "SOURCE")]
    pub prompts: Option<PromptSource>,
    /// Pixels a side, of images that are generated, and of the area of those that are read [default: the checkpoint's]
    #[arg(long, env = "DS_TRAIN_RESOLUTION", value_name = "PX")]
    pub resolution: Option<u32>,
    /// What is trained
    #[arg(long, env = "DS_TRAIN_TRAIN", value_enum)]
    pub train: Option<Trained>,
    /// Rank of the adapters [lora]
    #[arg(long, env = "DS_TRAIN_RANK", value_name = "R")]
    pub rank: Option<usize>,
    /// Scale of an adapter times its rank [lora; default: the rank]
    #[arg(long, env = "DS_TRAIN_ALPHA", value_name = "A")]
    pub alpha: Option<f64>,
    /// Endings of the names of the modules that get adapters, comma-separated [lora]
    #[arg(long, env = "DS_TRAIN_TARGETS", value_delimiter = ',', value_name = "LIST")]
    pub targets: Option<Vec<String>>,
    /// Adapter file to begin with, of the same rank and targets; in rlhf it is the reference [lora; default: a new one]
    #[arg(long, env = "DS_TRAIN_ADAPTER", value_name = "FILE")]
    pub adapter: Option<String>,
    /// Compute every block anew in the backward pass: less memory, a forward pass more
    #[arg(long, env = "DS_TRAIN_RECOMPUTE", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub recompute: Option<bool>,
    /// Learning rate of AdamW
    #[arg(long, env = "DS_TRAIN_LR", value_name = "RATE")]
    pub lr: Option<f64>,
    /// Of AdamW's first moment
    #[arg(long, env = "DS_TRAIN_BETA1", value_name = "B")]
    pub beta1: Option<f64>,
    /// Of AdamW's second moment
    #[arg(long, env = "DS_TRAIN_BETA2", value_name = "B")]
    pub beta2: Option<f64>,
    /// Of AdamW
    #[arg(long, env = "DS_TRAIN_EPS", value_name = "E")]
    pub eps: Option<f64>,
    /// Of AdamW, decoupled
    #[arg(long, env = "DS_TRAIN_WEIGHT_DECAY", value_name = "W")]
    pub weight_decay: Option<f64>,
    /// Most norm of all gradients together
    #[arg(long, env = "DS_TRAIN_CLIP", value_name = "NORM")]
    pub clip: Option<f64>,
    /// Updates over which the learning rate rises
    #[arg(long, env = "DS_TRAIN_WARMUP", value_name = "N")]
    pub warmup: Option<u64>,
    /// Learning rate after the warm-up
    #[arg(long, env = "DS_TRAIN_LR_SCHEDULE", value_enum)]
    pub lr_schedule: Option<LrSchedule>,
    /// Average of the weights, which is then what is validated and exported; 0 is none
    #[arg(long, env = "DS_TRAIN_EMA", value_name = "DECAY")]
    pub ema: Option<f64>,
    /// Prompts or images of an update
    #[arg(long, env = "DS_TRAIN_BATCH", value_name = "GROUPS")]
    pub batch: Option<usize>,
    /// Prompts or images whose graphs are alive at once; changes memory, and results by rounding alone
    #[arg(long, env = "DS_TRAIN_MICRO", value_name = "GROUPS")]
    pub micro: Option<usize>,
    /// Trajectories of a prompt or image; 1 with m 1 is plain fine-tuning [sft]
    #[arg(long, env = "DS_TRAIN_N", value_name = "N")]
    pub n: Option<usize>,
    /// States of a trajectory
    #[arg(long, env = "DS_TRAIN_M", value_name = "M")]
    pub m: Option<usize>,
    /// Steps of the sampler whose stride trajectories have
    #[arg(long, env = "DS_TRAIN_CHAIN_STEPS", value_name = "S")]
    pub chain_steps: Option<usize>,
    /// Stochasticity of trajectories (DDIM); above 0 they branch
    #[arg(long, env = "DS_TRAIN_ETA", value_name = "ETA")]
    pub eta: Option<f64>,
    /// Guidance scale of trajectories; 1 is none
    #[arg(long, env = "DS_TRAIN_CHAIN_GUIDANCE", value_name = "W")]
    pub chain_guidance: Option<f64>,
    /// Probability-flow steps from a state to its clean-image estimate; 1 is Tweedie's formula
    #[arg(long, env = "DS_TRAIN_ESTIMATE_STEPS", value_name = "K")]
    pub estimate_steps: Option<usize>,
    /// Where trajectories start
    #[arg(long, env = "DS_TRAIN_TIMESTEPS", value_enum)]
    pub timesteps: Option<TimestepMode>,
    /// First timestep at which trajectories start
    #[arg(long, env = "DS_TRAIN_T_MIN", value_name = "T")]
    pub t_min: Option<u32>,
    /// Last timestep at which trajectories start
    #[arg(long, env = "DS_TRAIN_T_MAX", value_name = "T")]
    pub t_max: Option<u32>,
    /// Rewards, comma-separated, each name or name:weight
    #[arg(long, env = "DS_TRAIN_REWARDS", value_delimiter = ',', value_name = "LIST")]
    pub rewards: Option<Vec<String>>,
    /// Scale of each reward before they are added and compared
    #[arg(long, env = "DS_TRAIN_REWARD_SCALE", value_enum)]
    pub reward_scale: Option<RewardScale>,
    /// How the scores of a trajectory's states become one
    #[arg(long, env = "DS_TRAIN_AGGREGATE", value_enum)]
    pub aggregate: Option<Aggregate>,
    /// What is scored [rlhf]
    #[arg(long, env = "DS_TRAIN_SCORE", value_enum)]
    pub score: Option<Score>,
    /// Noise that takes images back to a trajectory's start
    #[arg(long, env = "DS_TRAIN_RENOISE", value_enum)]
    pub renoise: Option<Renoise>,
    /// Whether gradients go through the sampler's steps
    #[arg(long, env = "DS_TRAIN_CHAIN_GRAD", value_enum)]
    pub chain_grad: Option<ChainGrad>,
    /// Noise that predictions are compared with
    #[arg(long, env = "DS_TRAIN_TARGET", value_enum)]
    pub target: Option<Target>,
    /// What is learnt from in a group
    #[arg(long, env = "DS_TRAIN_SELECT", value_enum)]
    pub select: Option<Select>,
    /// Smallest difference of best and worst score that is learnt from
    #[arg(long, env = "DS_TRAIN_MIN_GAP", value_name = "GAP")]
    pub min_gap: Option<f64>,
    /// Share of captions that the null prompt replaces [sft with n 1]
    #[arg(long, env = "DS_TRAIN_PROMPT_DROPOUT", value_name = "P")]
    pub prompt_dropout: Option<f64>,
    /// Loss of a pair [rlhf]
    #[arg(long, env = "DS_TRAIN_LOSS", value_enum)]
    pub loss: Option<LossKind>,
    /// Factor of what the model gained on the pair [rlhf]
    #[arg(long, env = "DS_TRAIN_BETA", value_name = "BETA")]
    pub beta: Option<f64>,
    /// Factor of the reward gap [loss offset]
    #[arg(long, env = "DS_TRAIN_GAMMA", value_name = "G")]
    pub gamma: Option<f64>,
    /// Factor of the reward gap [loss rebel]
    #[arg(long, env = "DS_TRAIN_REWARD_ETA", value_name = "ETA")]
    pub reward_eta: Option<f64>,
    /// Guidance scale of the predictions that the loss compares: that of sampling, if it is to
    /// improve what is sampled
    #[arg(long, env = "DS_TRAIN_LOSS_GUIDANCE", value_name = "W")]
    pub loss_guidance: Option<f64>,
    /// Weight of the predictions' mean squared distance from the reference's: holds the model
    /// to it where the pair does not ask for more; needs all reference states [rlhf]
    #[arg(long, env = "DS_TRAIN_ANCHOR", value_name = "W")]
    pub anchor: Option<f64>,
    /// States at which the reference is compared with [rlhf]
    #[arg(long, env = "DS_TRAIN_REFERENCE_STATES", value_enum)]
    pub reference_states: Option<ReferenceStates>,
    /// Updates after which the model as it is becomes the reference; 0 is never [rlhf]
    #[arg(long, env = "DS_TRAIN_REFERENCE_REFRESH", value_name = "N")]
    pub reference_refresh: Option<u64>,
    /// Steps with which images are generated [rlhf]
    #[arg(long, env = "DS_TRAIN_ROLLOUT_STEPS", value_name = "S")]
    pub rollout_steps: Option<usize>,
    /// ddim, euler, heun or dpmpp-2m [rlhf]
    #[arg(long, env = "DS_TRAIN_ROLLOUT_SOLVER", value_name = "NAME")]
    pub rollout_solver: Option<String>,
    /// Guidance scale with which images are generated [rlhf]
    #[arg(long, env = "DS_TRAIN_ROLLOUT_GUIDANCE", value_name = "W")]
    pub rollout_guidance: Option<f64>,
    /// All trajectories of a prompt begin from one generated image [rlhf]
    #[arg(long, env = "DS_TRAIN_ROLLOUT_SHARED", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub rollout_shared: Option<bool>,
    /// Updates that learn from the same generated images [rlhf]
    #[arg(long, env = "DS_TRAIN_ROLLOUT_REUSE", value_name = "N")]
    pub rollout_reuse: Option<u64>,
    /// Most samples of a U-Net pass without gradients
    #[arg(long, env = "DS_TRAIN_ROLLOUT_BATCH", value_name = "ROWS")]
    pub rollout_batch: Option<usize>,
    /// Most images decoded at once
    #[arg(long, env = "DS_TRAIN_DECODE_BATCH", value_name = "IMAGES")]
    pub decode_batch: Option<usize>,
    /// Updates between checkpoints
    #[arg(long, env = "DS_TRAIN_SAVE_EVERY", value_name = "N")]
    pub save_every: Option<u64>,
    /// Checkpoints that are kept
    #[arg(long, env = "DS_TRAIN_KEEP", value_name = "N")]
    pub keep: Option<usize>,
    /// Updates between validations; 0 is none
    #[arg(long, env = "DS_TRAIN_VALIDATE_EVERY", value_name = "N")]
    pub validate_every: Option<u64>,
    /// Prompts of validations, as --prompts
    #[arg(long, env = "DS_TRAIN_VALIDATION_PROMPTS", value_name = "SOURCE")]
    pub validation_prompts: Option<PromptSource>,
    /// Steps of validation images
    #[arg(long, env = "DS_TRAIN_VALIDATION_STEPS", value_name = "S")]
    pub validation_steps: Option<usize>,
    /// Guidance scale of validation images
    #[arg(long, env = "DS_TRAIN_VALIDATION_GUIDANCE", value_name = "W")]
    pub validation_guidance: Option<f64>,
    /// Validation images that are kept as pictures
    #[arg(long, env = "DS_TRAIN_VALIDATION_IMAGES", value_name = "N")]
    pub validation_images: Option<usize>,
    /// sft: images with captions whose loss is followed, as --data
    #[arg(long, env = "DS_TRAIN_VALIDATION_DATA", value_name = "SOURCE")]
    pub validation_data: Option<ImageSource>,
    /// Names in the exported adapter
    #[arg(long, env = "DS_TRAIN_EXPORT_FORMAT", value_enum)]
    pub export_format: Option<ExportFormat>,
    /// Numbers of the exported adapter
    #[arg(long, env = "DS_TRAIN_EXPORT_DTYPE", value_enum)]
    pub export_dtype: Option<ExportType>,
}
