//! From "this method at this budget" to a request: how many steps plain
//! sampling gets, and what runs where a budget is below one trajectory.

use serde_json::{Map, Value};

use super::contract::{Contract, MethodRates};
use super::manifest::SweepConfig;
use super::replay;
use crate::diffusion::cost::Units;
use crate::engine::Backend;
use crate::engine::request::{BudgetRequest, GenerateRequest, MethodRequest};
use crate::{Error, Result};

/// The method that spends a budget on steps instead of candidates.
pub const PLAIN: &str = "plain";

/// A method of the sweep as written: `name[@adapter][:parameter=value]…`.
#[derive(Clone, Debug, PartialEq)]
pub struct MethodSpec {
    /// As written; the name of its row and line.
    pub label: String,
    pub name: String,
    pub adapter: Option<String>,
    pub params: Map<String, Value>,
}

impl MethodSpec {
    /// # Errors
    /// When a part is empty or a parameter lacks its value.
    pub fn parse(text: &str) -> Result<Self> {
        let label = text.trim().to_owned();
        let mut parts = label.split(':');
        let head = parts.next().unwrap_or_default();
        let (name, adapter) = match head.split_once('@') {
            Some((name, adapter)) => (name, Some(adapter.to_owned())),
            None => (head, None),
        };
        let bad = |what: &str| {
            Error::invalid(
                "methods",
                format!("'{text}': {what}; write name[@adapter][:key=value]…"),
            )
        };
        if name.is_empty() || adapter.as_deref() == Some("") {
            return Err(bad("an empty name"));
        }
        let mut params = Map::new();
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| bad("a parameter lacks '='"))?;
            if key.is_empty() || matches!(key, "name" | "steps" | "budget") {
                return Err(bad("this parameter cannot be set per method"));
            }
            let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
            params.insert(key.to_owned(), value);
        }
        let name = name.to_owned();
        Ok(Self { label, name, adapter, params })
    }

    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.name == PLAIN
    }

    /// Plain sampling of the same weights: what runs below one trajectory.
    #[must_use]
    pub fn plain(&self) -> Self {
        let label = match &self.adapter {
            Some(adapter) => format!("{PLAIN}@{adapter}"),
            None => PLAIN.to_owned(),
        };
        Self { label, name: PLAIN.into(), adapter: self.adapter.clone(), params: Map::new() }
    }
}

/// What a method does at a budget.
#[derive(Clone, Debug, PartialEq)]
pub enum Arm {
    Run {
        /// The method that runs.
        method: MethodSpec,
        /// The method asked for, where it is another one.
        requested: Option<String>,
        /// Everything but prompt and seed.
        request: Box<GenerateRequest>,
        /// Predicted U-Net forwards.
        f: u64,
    },
    /// Nothing can run, and why.
    Infeasible(String),
}

impl Arm {
    /// Predicted U-Net forwards.
    #[must_use]
    pub fn f(&self) -> u64 {
        match self {
            Self::Run { f, .. } => *f,
            Self::Infeasible(_) => 0,
        }
    }

    /// Whether plain sampling stands in for the method asked for.
    #[must_use]
    pub fn is_fallback(&self) -> bool {
        matches!(self, Self::Run { requested: Some(_), .. })
    }

    /// Whether the method asked for runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        matches!(self, Self::Run { requested: None, .. })
    }
}

/// Plans arms against a backend.
pub struct Planner<'a> {
    pub backend: &'a dyn Backend,
    pub config: &'a SweepConfig,
    pub contract: Contract,
    /// Where budgets are times.
    pub rates: &'a MethodRates,
}

impl Planner<'_> {
    /// What `method` does at `budget`.
    ///
    /// # Errors
    /// When a request is refused for another reason than its cost.
    pub fn arm(&self, method: &MethodSpec, budget: u64) -> Result<Arm> {
        if method.is_plain() {
            return self.plain(method, budget, None);
        }
        let with = |forwards: u64| GenerateRequest {
            steps: Some(self.config.steps),
            reward: Some(self.config.reward.clone()),
            budget: Some(BudgetRequest::Forwards(forwards)),
            ..self.request(method)
        };
        let cost = |forwards: u64| Ok(self.backend.plan(&probe(&with(forwards)))?.cost);
        let forwards = match (self.contract, self.rates.get(&method.label)) {
            (Contract::EqualF, _) => Some(budget),
            (Contract::EqualLatency, Some(rates)) => rates.most_forwards(seconds(budget), cost)?,
            (Contract::EqualLatency, None) => None,
        };
        let Some(forwards) = forwards else { return self.fallback(method, budget) };
        let request = with(forwards);
        match self.backend.plan(&probe(&request)) {
            Ok(planned) => Ok(Arm::Run {
                method: method.clone(),
                requested: None,
                request: Box::new(request),
                f: planned.cost.f,
            }),
            Err(Error::Budget(_)) => self.fallback(method, budget),
            Err(e) => Err(e),
        }
    }

    /// Plain sampling in place of `method`, which `budget` does not pay for.
    ///
    /// # Errors
    /// See [`Planner::arm`].
    pub fn fallback(&self, method: &MethodSpec, budget: u64) -> Result<Arm> {
        self.plain(&method.plain(), budget, Some(method.label.clone()))
    }

    /// Plain sampling with as many steps as `budget` pays for.
    fn plain(&self, method: &MethodSpec, budget: u64, requested: Option<String>) -> Result<Arm> {
        let with = |steps: u32| GenerateRequest { steps: Some(steps), ..self.request(method) };
        let (mut best, mut refusal) = (None, String::new());
        // Every step costs at least one forward.
        let most = match (self.contract, self.rates.get(&method.label)) {
            (Contract::EqualF, _) => budget,
            (Contract::EqualLatency, Some(rates)) => (seconds(budget) / rates.f) as u64,
            (Contract::EqualLatency, None) => 0,
        };
        let (mut low, mut high) =
            (self.config.min_steps, u32::try_from(most).unwrap_or(u32::MAX - 1));
        if high < low {
            let budget = self.contract.show(budget);
            refusal = format!("budget {budget} is below {low} steps of plain sampling");
        }
        let mut probe_at = low;
        while low <= high {
            match self.fits(method, &with(probe_at), budget)? {
                Ok(f) => {
                    best = Some((probe_at, f));
                    low = probe_at + 1;
                }
                Err(reason) => {
                    refusal = reason;
                    high = probe_at - 1;
                }
            }
            probe_at = low + high.saturating_sub(low) / 2;
        }
        Ok(match best {
            Some((steps, f)) => {
                Arm::Run { method: method.clone(), requested, request: Box::new(with(steps)), f }
            }
            None => Arm::Infeasible(refusal),
        })
    }

    /// The cost of `request` if it is at most `budget` and its steps are
    /// allowed, or why not.
    fn fits(
        &self,
        method: &MethodSpec,
        request: &GenerateRequest,
        budget: u64,
    ) -> Result<std::result::Result<u64, String>> {
        let steps = request.steps.unwrap_or_default();
        match self.backend.plan(&probe(request)) {
            Ok(planned) => Ok(match self.over(method, planned.cost, budget) {
                None => Ok(planned.cost.f),
                Some(cost) => Err(format!(
                    "{steps} steps of plain sampling cost {cost}, the budget is {}",
                    self.contract.show(budget)
                )),
            }),
            Err(Error::Budget(reason)) => Ok(Err(reason)),
            Err(Error::Invalid { field, message }) if field == "steps" => {
                Ok(Err(format!("{steps} steps: {message}")))
            }
            Err(e) => Err(e),
        }
    }

    /// What `cost` is, where it is more than the budget.
    fn over(&self, method: &MethodSpec, cost: Units, budget: u64) -> Option<String> {
        match self.contract {
            Contract::EqualF => (cost.f > budget).then(|| format!("{} forwards", cost.f)),
            Contract::EqualLatency => {
                let taken = self.rates.get(&method.label)?.seconds(cost);
                (taken > seconds(budget)).then(|| format!("{taken:.3} s"))
            }
        }
    }

    fn request(&self, method: &MethodSpec) -> GenerateRequest {
        let name = method.name.clone();
        let mut params = method.params.clone();
        if self.config.replay && name == replay::METHOD {
            params.insert("observe".to_owned(), Value::Bool(true));
        }
        GenerateRequest {
            model: Some(self.config.model.id.clone()),
            adapter: method.adapter.clone().or_else(|| self.config.adapter.clone()),
            method: Some(if params.is_empty() {
                MethodRequest::Name(name)
            } else {
                MethodRequest::Full { name, params }
            }),
            guidance_scale: Some(self.config.guidance_scale),
            n: Some(1),
            ..GenerateRequest::default()
        }
    }
}

/// Of a budget in milliseconds.
fn seconds(budget: u64) -> f64 {
    budget as f64 / 1e3
}

/// `request` with a prompt, for planning.
fn probe(request: &GenerateRequest) -> GenerateRequest {
    GenerateRequest { prompt: "a red circle".into(), seed: Some(0), ..request.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_parse() {
        let m = MethodSpec::parse("best-of-n@sharp:kernel=sde:eta=0.5").unwrap();
        assert_eq!((m.name.as_str(), m.adapter.as_deref()), ("best-of-n", Some("sharp")));
        assert_eq!(Value::from(m.params), serde_json::json!({"kernel": "sde", "eta": 0.5}));
        assert!(MethodSpec::parse("plain").unwrap().is_plain());
        for bad in ["", "@x", "plain@", "a:b", "a:=1", "a:steps=3"] {
            assert!(MethodSpec::parse(bad).is_err(), "{bad}");
        }
    }
}
