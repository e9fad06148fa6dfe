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
mod deadline;
mod distinct;
mod events;
mod export;
mod fair;
mod health;
mod health_check;
mod jobs;
mod limits;
mod live;
pub mod metrics;
pub mod problem;
mod queue;
mod ready;
mod routes;
mod server;
mod signals;
mod sites;
mod speed;
mod store;
mod sweeps;
pub mod vote;
mod worker;

pub use config::{Overrides, Settings};
pub use health_check::health_check;
pub use server::{Running, Stopper, start};
pub use signals::stop_on_signals;
