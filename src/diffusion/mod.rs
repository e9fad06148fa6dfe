//! Noise schedule, solvers, guidance, keyed noise and the cost meter.

pub mod cost;
