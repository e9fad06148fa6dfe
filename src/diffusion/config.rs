//! diffusers' `scheduler_config.json`.

use serde::{Deserialize, Serialize};

use super::solver::SolverKind;
use crate::{Error, Result};

/// How the betas are spaced over the training timesteps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    #[default]
    Linear,
    /// Linear in sqrt(beta): Stable Diffusion's.
    ScaledLinear,
    /// Glide's cosine schedule (Nichol & Dhariwal 2021, eq. 17), beta capped at 0.999.
    SquaredcosCapV2,
}

/// What the network predicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    #[default]
    Epsilon,
    /// v = sqrt(abar) eps - sqrt(1-abar) x0 (Salimans & Ho 2022).
    VPrediction,
    Sample,
}

/// Which training timesteps a run of fewer steps visits (Lin et al. 2023, table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    Leading,
    Trailing,
    Linspace,
}

/// The keys of a scheduler configuration that this crate honours. Absent keys take
/// diffusers' defaults; keys that only matter to other schedulers are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// Selects the default solver.
    #[serde(rename = "_class_name", skip_serializing_if = "Option::is_none")]
    pub class_name: Option<String>,
    pub num_train_timesteps: usize,
    pub beta_start: f64,
    pub beta_end: f64,
    pub beta_schedule: BetaSchedule,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained_betas: Option<Vec<f64>>,
    pub rescale_betas_zero_snr: bool,
    pub prediction_type: PredictionType,
    /// Absent: the solver's own default (leading for DDIM, linspace for the others).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestep_spacing: Option<TimestepSpacing>,
    pub steps_offset: usize,
    /// DDIM only: the last step lands on abar = 1 instead of abar_0.
    pub set_alpha_to_one: bool,
    pub use_karras_sigmas: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigma_min: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigma_max: Option<f64>,
    /// Pixel-space settings, off in latent models: rejected when true.
    pub clip_sample: bool,
    pub thresholding: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interpolation_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_sigmas_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solver_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solver_order: Option<u32>,
    /// Every other key, to refuse what is set to something unsupported.
    #[serde(flatten)]
    pub rest: serde_json::Map<String, serde_json::Value>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            class_name: None,
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            trained_betas: None,
            rescale_betas_zero_snr: false,
            prediction_type: PredictionType::Epsilon,
            timestep_spacing: None,
            steps_offset: 0,
            set_alpha_to_one: true,
            use_karras_sigmas: false,
            sigma_min: None,
            sigma_max: None,
            clip_sample: false,
            thresholding: false,
            interpolation_type: None,
            final_sigmas_type: None,
            algorithm_type: None,
            solver_type: None,
            solver_order: None,
            rest: serde_json::Map::new(),
        }
    }
}

impl SchedulerConfig {
    /// The configuration of stable-diffusion-xl-base-1.0.
    pub fn sdxl() -> Self {
        Self {
            class_name: Some("EulerDiscreteScheduler".into()),
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            timestep_spacing: Some(TimestepSpacing::Leading),
            steps_offset: 1,
            set_alpha_to_one: false,
            interpolation_type: Some("linear".into()),
            ..Self::default()
        }
    }

    /// The scheduler class, when the default solver is not the same method.
    pub fn class_without_counterpart(&self) -> Option<&str> {
        const SAME: [&str; 4] = [
            "DDIMScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "DPMSolverMultistepScheduler",
        ];
        self.class_name.as_deref().filter(|class| !SAME.contains(class))
    }

    /// The solver that `_class_name` stands for; DDIM for classes without a
    /// counterpart here (and for SDXL-turbo's EulerAncestral: Euler).
    pub fn default_solver(&self) -> SolverKind {
        let class = self.class_name.as_deref().unwrap_or_default();
        if class.starts_with("Euler") {
            SolverKind::Euler
        } else if class.starts_with("Heun") {
            SolverKind::Heun
        } else if class.starts_with("DPMSolver") {
            SolverKind::DpmPp2m
        } else {
            SolverKind::Ddim
        }
    }

    /// # Errors
    /// `Error::Invalid` naming the key that asks for something this crate does not do.
    pub fn validate(&self) -> Result<()> {
        let text = |value: &Option<String>, key: &str, only: &str| match value.as_deref() {
            Some(found) if found != only => {
                Err(Error::invalid(key, format!("'{found}' is not supported, only '{only}'")))
            }
            _ => Ok(()),
        };
        text(&self.interpolation_type, "interpolation_type", "linear")?;
        text(&self.final_sigmas_type, "final_sigmas_type", "zero")?;
        text(&self.algorithm_type, "algorithm_type", "dpmsolver++")?;
        text(&self.solver_type, "solver_type", "midpoint")?;
        if self.solver_order.is_some_and(|order| order != 2) {
            return Err(Error::invalid("solver_order", "only 2 is supported"));
        }
        for (key, on) in [("clip_sample", self.clip_sample), ("thresholding", self.thresholding)] {
            if on {
                return Err(Error::invalid(key, "is for pixel-space models; set it to false"));
            }
        }
        for (key, only) in [
            ("use_exponential_sigmas", false),
            ("use_beta_sigmas", false),
            ("use_lu_lambdas", false),
            ("use_flow_sigmas", false),
            ("euler_at_final", false),
            ("lower_order_final", true),
        ] {
            let set = self.rest.get(key).and_then(serde_json::Value::as_bool);
            if set.is_some_and(|on| on != only) {
                return Err(Error::invalid(key, format!("only {only} is supported")));
            }
        }
        for key in ["lambda_min_clipped", "variance_type"] {
            if self.rest.get(key).is_some_and(|value| !value.is_null()) {
                return Err(Error::invalid(key, "is not supported; leave it out"));
            }
        }
        if self.rest.get("timestep_type").is_some_and(|kind| kind == "continuous") {
            return Err(Error::invalid("timestep_type", "only 'discrete' is supported"));
        }
        if self.num_train_timesteps < 2 {
            return Err(Error::invalid("num_train_timesteps", "must be at least 2"));
        }
        let in_unit = |beta: f64| beta > 0.0 && beta < 1.0;
        match &self.trained_betas {
            Some(betas) if betas.len() != self.num_train_timesteps => Err(Error::invalid(
                "trained_betas",
                format!("{} values for {} timesteps", betas.len(), self.num_train_timesteps),
            )),
            Some(betas) if !betas.iter().all(|b| in_unit(*b)) => {
                Err(Error::invalid("trained_betas", "every beta must lie in (0, 1)"))
            }
            None if !in_unit(self.beta_start) || !in_unit(self.beta_end) => {
                Err(Error::invalid("beta_start", "beta_start and beta_end must lie in (0, 1)"))
            }
            _ => Ok(()),
        }
    }
}
