//! Inference-time search: one file per method, one line each in [`METHODS`].

pub mod best;
pub mod best_of_n;
pub mod env;
pub mod method;
pub mod params;
pub mod plain;

use crate::util::Listing;
use crate::{Error, Result};

pub use env::{EnvSpec, SearchEnv, SearchEvent};
pub use method::{Outcome, Plan, SearchMethod};

/// Every sampling method.
pub static METHODS: &[&dyn SearchMethod] = &[&plain::Plain, &best_of_n::BestOfN];

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
