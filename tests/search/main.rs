//! Sampling methods on closed-form models, through the public API.

mod bed;
mod costs;
mod gaussian;
mod laws;
mod memory;
mod methods;
mod reductions;
mod requests;
mod trajectory;
