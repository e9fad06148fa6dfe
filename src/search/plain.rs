//! Plain sampling: one trajectory, no search.

use serde_json::{Map, Value, json};

use super::best::Best;
use super::env::{EnvSpec, Kernel, SearchEnv};
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, one_of};
use crate::Result;
use crate::diffusion::cost::Budget;
use crate::diffusion::noise::NoiseKey;

/// Cost: F of one trajectory, Y = 1, V = 1 when any reward is registered.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

fn kernel(params: &Map<String, Value>) -> Result<Kernel> {
    let kernel = Params::new(params, &Plain.params())?.choice("kernel", &Kernel::OPTIONS)?;
    Ok(kernel.unwrap_or(Kernel::Ode))
}

impl SearchMethod for Plain {
    fn name(&self) -> &'static str {
        "plain"
    }

    fn summary(&self) -> &'static str {
        "One trajectory of the chosen solver, no search"
    }

    fn params(&self) -> Map<String, Value> {
        let text = "ode: the request's solver; sde: DDIM with eta 1";
        Map::from_iter([one_of("kernel", &Kernel::OPTIONS, text)])
    }

    fn needs_reward(&self) -> bool {
        false
    }

    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan> {
        let kernel = kernel(params)?;
        spec.check_steps(kernel, spec.steps)?;
        let predicted = spec.cost(spec.trajectory_f(kernel), 1);
        let params = Map::from_iter([("kernel".to_owned(), json!(kernel.name()))]);
        Plan::new(self.name(), params, predicted, budget)
    }

    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let latents = env.sample(key, kernel(&plan.params)?, &[0])?;
        Best::default().finish_with(env, &latents)
    }
}
