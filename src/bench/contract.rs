//! What a budget of a sweep counts: U-Net forwards, or time.

use std::collections::BTreeMap;
use std::time::Instant;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::arm::{Arm, MethodSpec, Planner};
use super::manifest::SweepConfig;
use crate::Result;
use crate::engine::latency::Rates;
use crate::engine::request::GenerateRequest;
use crate::engine::{Backend, CancelToken};

/// What is equal along a row of budgets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contract {
    /// Budgets are U-Net forwards.
    #[default]
    EqualF,
    /// Budgets are milliseconds: every method gets the forwards for which its measured seconds of
    /// a forward, a score and a decode leave time.
    EqualLatency,
}

impl Contract {
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// A budget with its unit.
    #[must_use]
    pub fn show(self, budget: u64) -> String {
        match self {
            Self::EqualF => budget.to_string(),
            Self::EqualLatency => format!("{budget} ms"),
        }
    }
}

/// By label of a method.
pub type MethodRates = BTreeMap<String, Rates>;

/// Trajectories of the images that rates are measured on; the first that pays for a method.
const MEASURED: [u64; 4] = [1, 4, 16, 64];

/// Seconds of each method's units, and of plain sampling with the same weights, in `known` or
/// else measured: an image each, after one that warms up. A method that no budget tried pays for
/// has none.
///
/// # Errors
/// As the backend's.
pub fn measure(
    backend: &dyn Backend,
    config: &SweepConfig,
    methods: &[MethodSpec],
    known: MethodRates,
    cancel: &CancelToken,
) -> Result<MethodRates> {
    let mut rates = known;
    let planner = Planner { backend, config, contract: Contract::EqualF, rates: &BTreeMap::new() };
    let mut warm = false;
    for method in methods.iter().flat_map(|m| [m.plain(), m.clone()]) {
        if rates.contains_key(&method.label) {
            continue;
        }
        // As many as a search has at once: rates of full batches. Plain sampling has one.
        let trajectory = 2 * u64::from(config.steps);
        let tried = MEASURED.into_iter().skip(usize::from(!method.is_plain()));
        for budget in tried.map(|n| n * trajectory) {
            let Arm::Run { requested: None, request, .. } = planner.arm(&method, budget)? else {
                continue;
            };
            let prompt = config.prompts.first().cloned().unwrap_or_default();
            let request = GenerateRequest { prompt, seed: Some(0), ..*request };
            let planned = backend.plan(&request)?;
            if !std::mem::replace(&mut warm, true) {
                backend.generate(&planned, cancel, &mut |_| {})?;
            }
            let start = Instant::now();
            let cost = backend.generate(&planned, cancel, &mut |_| {})?.cost.actual;
            let measured = Rates::measured(&cost, start.elapsed().as_secs_f64())?;
            rates.insert(method.label, measured);
            break;
        }
    }
    Ok(rates)
}
