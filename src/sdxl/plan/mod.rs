//! What a run of a checkpoint takes in memory and arithmetic, from its `config.json` files
//! alone: [`unet`], [`encode`], [`decode`] and [`clip_text`] list the operations of the
//! networks' forward passes; [`Cost`] and [`Saving`] are read off those lists, and
//! [`MemoryPlan`] off all of them.

mod clip;
mod cost;
mod fit;
mod load;
mod memory;
mod network;
mod saved;
mod table;
mod trace;
mod unet;
mod vae;

pub use clip::clip_text;
pub use cost::{Cost, H100, Peak, launches};
pub use memory::{Item, Line, MemoryPlan, Mode, Phase, Schedule, Setting};
pub use network::{Networks, default_size};
pub use saved::{Rule, Saving, Trained};
pub use trace::{Kind, Matrix, Op, Trace, Value};
pub use unet::{Sample, unet};
pub use vae::{decode, encode};
