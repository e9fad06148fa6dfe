//! Sampling methods on closed-form models, through the public API.

mod bed;
mod gaussian;
mod memory;
mod methods;
mod trajectory;
