//! Fine-tuning.
//!
//! A run is described by [`settings::Settings`], started by [`run::run`], and changes what
//! [`trainable::Trainable`] holds. `sharpen` is the method; whatever else a step needs (texts,
//! rollouts, scores, the gradient pass, checkpoints) is beside it for other methods to use.

pub mod checkpoint;
pub mod command;
pub mod configure;
pub mod dry_run;
pub mod ema;
pub mod evaluation;
pub mod feed;
pub mod flags;
pub mod latents;
pub mod lr;
pub mod metrics;
pub mod objective;
pub mod optimizer;
pub mod pass;
pub mod progress;
pub mod resume;
pub mod rollout;
pub mod run;
pub mod score;
pub mod settings;
pub mod setup;
pub mod sharpen;
pub mod source;
pub mod texts;
pub mod trainable;
pub mod validation;
