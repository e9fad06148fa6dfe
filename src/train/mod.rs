//! Fine-tuning.

pub mod metrics;
pub mod optimizer;
pub mod progress;
