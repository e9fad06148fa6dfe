//! The HTTP floor: `POST /generate`, listings, health, metrics and the page.
//!
//! HTTP runs on a few actix threads that only parse, wait and write. Models run
//! on dedicated threads with a large stack, fed by a queue that is bounded by
//! count and by planned U-Net forwards (see [`crate::diffusion::cost::Units`]).
//! docs/http.md describes the contract.

mod answer;
mod assets;
pub mod auth;
mod body;
mod compare;
pub mod config;
mod events;
mod fair;
mod health;
mod jobs;
mod limits;
mod live;
pub mod metrics;
pub mod problem;
mod queue;
mod routes;
mod server;
mod signals;
mod speed;
mod store;
mod worker;

pub use config::{Overrides, Settings};
pub use server::{Running, Stopper, start};
pub use signals::stop_on_signals;
