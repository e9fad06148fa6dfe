//! The HTTP floor: `POST /generate`, listings, health, metrics and the page.
//!
//! HTTP runs on a few actix threads that only parse, wait and write. Models run
//! on dedicated threads with a large stack, fed by a queue that is bounded by
//! count and by planned U-Net forwards (see [`crate::diffusion::cost::Units`]).
//! docs/http.md describes the contract.

mod answer;
mod assets;
mod body;
pub mod config;
mod health;
mod limits;
pub mod metrics;
pub mod problem;
mod queue;
mod routes;
mod server;
mod signals;
mod worker;

pub use config::{Overrides, Settings};
pub use server::{Running, Stopper, start};
pub use signals::stop_on_signals;
