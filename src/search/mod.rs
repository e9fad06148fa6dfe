//! Inference-time search: one file per method, one line each in [`METHODS`].

pub mod best;
pub mod best_of_n;
pub mod chain;
pub mod demon;
pub mod edm;
pub mod env;
pub mod evo_search;
pub mod fk_steering;
pub mod free2guide;
pub mod levels;
pub mod method;
pub mod params;
pub mod paths;
pub mod plain;
pub mod step_search;
pub mod tree_search;
pub mod weights;
pub mod zero_order;

use crate::util::Listing;
use crate::{Error, Result};

pub use env::{EnvSpec, SearchEnv, SearchEvent};
pub use method::{Outcome, Plan, SearchMethod};

/// Every sampling method.
pub static METHODS: &[&dyn SearchMethod] = &[
    &plain::Plain,
    &best_of_n::BestOfN,
    &zero_order::ZeroOrder,
    &paths::Paths,
    &demon::Demon,
    &free2guide::Free2Guide,
    &fk_steering::FkSteering,
    &step_search::StepSearch,
    &evo_search::EvoSearch,
    &tree_search::TreeSearch,
];

/// # Errors
/// `Error::Unknown` listing the known names.
pub fn method(name: &str) -> Result<&'static dyn SearchMethod> {
    let found = METHODS.iter().copied().find(|method| method.name() == name);
    found.ok_or_else(|| {
        Error::unknown("method", "method", name, METHODS.iter().map(|method| method.name()))
    })
}

/// All methods with their parameters.
pub fn listings() -> Vec<Listing> {
    METHODS.iter().map(|method| method.listing()).collect()
}
