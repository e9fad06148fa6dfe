//! What a sampling method is: it plans its cost without running anything, then runs the plan.

use std::collections::BTreeMap;

use candle_core::Tensor;
use image::RgbImage;
use serde::Serialize;
use serde_json::{Map, Value};

use super::env::{EnvSpec, SearchEnv};
use crate::Result;
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::noise::NoiseKey;
use crate::util::Listing;

/// A way to make one image, possibly by looking at many.
pub trait SearchMethod: Send + Sync {
    /// Lower-case, unique: what requests call it.
    fn name(&self) -> &'static str;

    /// One line for listings.
    fn summary(&self) -> &'static str;

    /// name → {type, default, description, enum}; see `params::entry` and `one_of`.
    fn params(&self) -> Map<String, Value>;

    /// Whether it needs a reward to search for.
    fn needs_reward(&self) -> bool;

    /// Checks `params`, makes every one of them concrete within `budget` and predicts the
    /// cost. Pure.
    ///
    /// # Errors
    /// `Error::Invalid` naming "method.<param>" or "reward"; `Error::Budget` with the
    /// numbers when less than one trajectory fits.
    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan>;

    /// Runs a plan of this method. All randomness comes from `key`; at the end the meter
    /// reads what the plan predicted.
    ///
    /// # Errors
    /// `Error::Cancelled`, `Error::Budget` before an evaluation that the meter refuses, and
    /// the models'.
    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome>;

    fn listing(&self) -> Listing {
        Listing {
            name: self.name().to_owned(),
            summary: self.summary().to_owned(),
            params: self.params(),
        }
    }
}

/// A method with every parameter decided.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    pub method: &'static str,
    /// Every parameter with its effective value; planning them again gives the same plan.
    pub params: Map<String, Value>,
    pub predicted: Units,
    /// F of the budget that the plan leaves unspent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unused_f: Option<u64>,
}

impl Plan {
    /// # Errors
    /// `Error::Budget` with the numbers when the prediction exceeds the budget.
    pub fn new(
        method: &'static str,
        params: Map<String, Value>,
        predicted: Units,
        budget: &Budget,
    ) -> Result<Self> {
        crate::diffusion::meter::fits(budget, predicted)?;
        let unused_f = budget.f.map(|f| f - predicted.f);
        Ok(Self { method, params, predicted, unused_f })
    }
}

/// A finished image that improved on all before it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CurvePoint {
    pub spent: Units,
    /// As the searched reward gives it.
    pub best: f64,
}

/// One image and how it was found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// [1, C, h, w] as the trajectory ended.
    pub latents: Tensor,
    pub image: RgbImage,
    /// By the searched reward; NaN without one or when it failed.
    pub score: f64,
    /// By every reward; NaN where scoring failed.
    pub scores: BTreeMap<String, f64>,
    /// One point per improvement, scores monotone.
    pub curve: Vec<CurvePoint>,
    /// One entry per decision.
    pub trace: Vec<Value>,
    /// Non-finite scores met on the way.
    pub failed_scores: u64,
    /// F of the budget left unspent.
    pub unused_f: Option<u64>,
}
