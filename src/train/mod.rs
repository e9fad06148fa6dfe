//! Fine-tuning.

pub mod optimizer;
