//! Gradient accumulation and AdamW over named variables.
//!
//! Per parameter of 4 bytes, training holds 4 bytes of gradient sum between
//! `add` and `step` and 8 bytes of moments throughout, all f32.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::nn::adamw::{self, Hyper};
use crate::nn::autograd;
use crate::{Error, Result};

/// What `Gradients::add` does when a variable has no gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// An error that names the variable.
    Refuse,
    /// The variable's sum stays as it is.
    Allow,
}

/// Variables in the order of their names, checked: f32, contiguous, each once.
fn checked(vars: &BTreeMap<String, Var>) -> Result<Vec<(&String, &Var)>> {
    let mut seen = std::collections::HashMap::new();
    for (name, var) in vars {
        if var.dtype() != DType::F32 {
            return Err(Error::invalid(name, format!("expected f32, got {:?}", var.dtype())));
        }
        if !var.is_contiguous() {
            return Err(Error::invalid(name, "expected a contiguous variable"));
        }
        if let Some(other) = seen.insert(var.id(), name) {
            return Err(Error::invalid(name, format!("is the same variable as '{other}'")));
        }
    }
    Ok(vars.iter().collect())
}

#[derive(Debug)]
struct Sum {
    name: String,
    var: Var,
    /// f32, of the variable's shape; `None` until the first gradient.
    total: Option<Tensor>,
}

/// Sums of scaled gradients, one per variable.
#[derive(Debug)]
pub struct Gradients {
    sums: Vec<Sum>,
    missing: Missing,
    /// Clipping's factor: the gradients are `factor` · `total`.
    factor: f64,
    /// Of the gradients as they are, where it is known.
    norm: Option<f64>,
}

impl Gradients {
    /// # Errors
    /// Names a variable that is not f32, not contiguous, or there twice.
    pub fn new(vars: &BTreeMap<String, Var>, missing: Missing) -> Result<Self> {
        let sum = |(name, var): (&String, &Var)| Sum {
            name: name.clone(),
            var: var.clone(),
            total: None,
        };
        let sums = checked(vars)?.into_iter().map(sum).collect();
        Ok(Self { sums, missing, factor: 1.0, norm: None })
    }

    /// Moves every variable's gradient out of `grads` and adds `scale` times it.
    /// A variable's first gradient is kept in its own memory, so `grads` must be
    /// what `backward` returned: nothing else may use its tensors.
    ///
    /// # Errors
    /// A missing gradient (with [`Missing::Refuse`]), one of another shape, or a
    /// `scale` that is not finite; then nothing was added.
    pub fn add(&mut self, grads: &mut GradStore, scale: f64) -> Result<()> {
        if !(scale as f32).is_finite() {
            return Err(Error::invalid("scale", format!("expected a finite number, got {scale}")));
        }
        for Sum { name, var, .. } in &self.sums {
            match grads.get(var) {
                None if self.missing == Missing::Refuse => {
                    return Err(Error::invalid(name, "has no gradient"));
                }
                Some(grad) if grad.shape() != var.shape() => {
                    let (got, expected) = (grad.dims(), var.dims());
                    let message = format!("expected a gradient of shape {expected:?}, got {got:?}");
                    return Err(Error::invalid(name, message));
                }
                _ => {}
            }
        }
        self.apply_factor()?;
        for Sum { var, total, .. } in &mut self.sums {
            let Some(grad) = grads.remove(var) else { continue };
            *total = Some(match total.take() {
                None => adamw::take_scaled(grad, scale)?,
                Some(sum) => adamw::add_scaled(sum, &grad, scale)?,
            });
        }
        Ok(())
    }

    /// Runs the backward pass of `loss`, a scalar, and adds every variable's gradient times
    /// `scale`. The layers' gradients are added as they are found, so that no second copy of
    /// them ever exists.
    ///
    /// # Errors
    /// candle's, a `scale` that is not finite, a missing gradient (with [`Missing::Refuse`]).
    /// Some gradients may have been added then: clear the sums.
    pub fn backward(&mut self, loss: &Tensor, scale: f64) -> Result<()> {
        if !(scale as f32).is_finite() {
            return Err(Error::invalid("scale", format!("expected a finite number, got {scale}")));
        }
        self.apply_factor()?;
        let take =
            |s: &mut Sum| (s.var.id(), autograd::Sum { total: s.total.take(), found: false });
        let mut sums: autograd::Sums = self.sums.iter_mut().map(take).collect();
        let outcome = autograd::summing(&mut sums, || (loss * scale)?.backward());
        let mut found = Vec::with_capacity(self.sums.len());
        for Sum { var, total, .. } in &mut self.sums {
            let sum = sums.remove(&var.id()).unwrap_or_default();
            found.push(sum.found);
            *total = sum.total;
        }
        // What operations other than layers found.
        let mut rest = outcome?;
        for (Sum { name, var, total }, found) in self.sums.iter_mut().zip(found) {
            match (rest.remove(var), total.take()) {
                (Some(grad), None) => *total = Some(grad.detach()),
                (Some(grad), Some(sum)) => *total = Some(adamw::add_scaled(sum, &grad, 1.0)?),
                (None, sum) if found || self.missing == Missing::Allow => *total = sum,
                (None, _) => return Err(Error::invalid(name.clone(), "has no gradient")),
            }
        }
        Ok(())
    }

    /// Makes the sums what clipping made of them.
    fn apply_factor(&mut self) -> Result<()> {
        self.norm = None;
        let factor = std::mem::replace(&mut self.factor, 1.0);
        if factor != 1.0 {
            for total in self.sums.iter_mut().map(|s| &mut s.total) {
                *total = total.take().map(|sum| adamw::take_scaled(sum, factor)).transpose()?;
            }
        }
        Ok(())
    }

    /// ‖gradients‖₂ over all variables together.
    pub fn norm(&mut self) -> Result<f64> {
        if let Some(norm) = self.norm {
            return Ok(norm);
        }
        let mut squares = 0.0;
        for total in self.sums.iter().filter_map(|s| s.total.as_ref()) {
            squares += adamw::squared_norm_of(total)?;
        }
        let norm = squares.sqrt() * self.factor;
        self.norm = Some(norm);
        Ok(norm)
    }

    /// Scales the gradients so that their global norm is at most `max_norm`, as
    /// PyTorch's `clip_grad_norm_` does, and returns the norm from before. A
    /// norm that is not finite leaves them as they are.
    ///
    /// # Errors
    /// A `max_norm` that is not above 0.
    pub fn clip(&mut self, max_norm: f64) -> Result<f64> {
        if max_norm.is_nan() || max_norm <= 0.0 {
            let message = format!("expected a number above 0, got {max_norm}");
            return Err(Error::invalid("max_norm", message));
        }
        let norm = self.norm()?;
        let factor = max_norm / (norm + 1e-6);
        if norm.is_finite() && factor < 1.0 {
            self.factor *= factor;
            self.norm = Some(norm * factor);
        }
        Ok(norm)
    }

    /// Whether every element of every gradient is.
    pub fn is_finite(&mut self) -> Result<bool> {
        Ok(self.norm()?.is_finite())
    }

    /// Whether no variable has a gradient.
    pub fn is_empty(&self) -> bool {
        self.sums.iter().all(|s| s.total.is_none())
    }

    /// A copy of a variable's gradient: f32, of its shape; `None` if it has none.
    pub fn get(&self, name: &str) -> Result<Option<Tensor>> {
        let found = self.sums.iter().find(|s| s.name == name);
        match found.and_then(|s| s.total.as_ref()) {
            Some(total) => Ok(Some(adamw::take_scaled(total.copy()?, self.factor)?)),
            None => Ok(None),
        }
    }

    /// Forgets all gradients and frees their memory.
    pub fn clear(&mut self) {
        self.sums.iter_mut().for_each(|s| s.total = None);
        self.factor = 1.0;
        self.norm = None;
    }
}

fn beta1() -> f64 {
    0.9
}

fn beta2() -> f64 {
    0.999
}

fn eps() -> f64 {
    1e-8
}

/// Hyperparameters, with the defaults of PyTorch's `AdamW` except for `lr`,
/// which has to be given, and `weight_decay`, which is 0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamWConfig {
    pub lr: f64,
    #[serde(default = "beta1")]
    pub beta1: f64,
    #[serde(default = "beta2")]
    pub beta2: f64,
    #[serde(default = "eps")]
    pub eps: f64,
    /// Decoupled: a step multiplies parameters by 1 − lr · weight_decay.
    #[serde(default)]
    pub weight_decay: f64,
}

impl AdamWConfig {
    pub fn new(lr: f64) -> Self {
        Self { lr, beta1: beta1(), beta2: beta2(), eps: eps(), weight_decay: 0.0 }
    }

    /// # Errors
    /// Names the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let least = f64::from(f32::MIN_POSITIVE);
        let ranges = [
            ("lr", self.lr, 0.0..f64::from(f32::MAX), "a number from 0"),
            ("beta1", self.beta1, 0.0..1.0, "at least 0 and below 1"),
            ("beta2", self.beta2, 0.0..1.0, "at least 0 and below 1"),
            ("eps", self.eps, least..1.0, "above 1e-38 and below 1"),
            ("weight_decay", self.weight_decay, 0.0..f64::from(f32::MAX), "a number from 0"),
        ];
        for (field, value, range, expected) in ranges {
            if !range.contains(&value) {
                return Err(Error::invalid(field, format!("expected {expected}, got {value}")));
            }
        }
        Ok(())
    }
}

/// What `AdamW::step` did.
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use]
pub enum Step {
    /// `norm` is that of the applied, so perhaps clipped, gradients.
    Applied { norm: f64 },
    /// The norm was not finite: nothing was changed or counted.
    Skipped { norm: f64 },
}

#[derive(Debug)]
struct Slot {
    name: String,
    var: Var,
    /// First and second moment: f32, of the variable's shape.
    m: Var,
    v: Var,
    /// How often this variable was updated: t of the bias corrections.
    steps: u64,
}

/// AdamW with f32 variables and moments.
#[derive(Debug)]
pub struct AdamW {
    slots: Vec<Slot>,
    config: AdamWConfig,
    steps: u64,
}

/// Entries of the state: moments per variable, updates per variable, steps in all.
const M: &str = "m";
const V: &str = "v";
const STEP: &str = "step";

impl AdamW {
    /// # Errors
    /// Names a variable that is not f32, not contiguous, or there twice, or a
    /// hyperparameter out of range.
    pub fn new(vars: &BTreeMap<String, Var>, config: AdamWConfig) -> Result<Self> {
        config.validate()?;
        let slot = |(name, var): (&String, &Var)| {
            let zeros = || Var::zeros(var.shape(), DType::F32, var.device());
            Ok(Slot { name: name.clone(), var: var.clone(), m: zeros()?, v: zeros()?, steps: 0 })
        };
        let slots = checked(vars)?.into_iter().map(slot).collect::<Result<_>>()?;
        Ok(Self { slots, config, steps: 0 })
    }

    /// Updates every variable that has a gradient, and clears the gradients. As
    /// in PyTorch, a variable without one is left alone: neither decayed nor counted.
    ///
    /// # Errors
    /// Gradients of other variables, or none at all.
    pub fn step(&mut self, gradients: &mut Gradients) -> Result<Step> {
        let same = |(slot, sum): (&Slot, &Sum)| slot.var.id() == sum.var.id();
        if self.slots.len() != gradients.sums.len()
            || !self.slots.iter().zip(&gradients.sums).all(same)
        {
            return Err(Error::invalid("gradients", "are not of the optimizer's variables"));
        }
        if gradients.is_empty() {
            return Err(Error::invalid(
                "gradients",
                "are empty: nothing was added since the last step",
            ));
        }
        let norm = gradients.norm()?;
        if !norm.is_finite() {
            gradients.clear();
            return Ok(Step::Skipped { norm });
        }
        let AdamWConfig { lr, beta1, beta2, eps, weight_decay } = self.config;
        let gradient_scale = gradients.factor;
        let hyper = Hyper { lr, beta1, beta2, eps, weight_decay, gradient_scale };
        for (slot, sum) in self.slots.iter_mut().zip(&mut gradients.sums) {
            let Some(g) = sum.total.take() else { continue };
            slot.steps += 1;
            adamw::update_var(&slot.var, &g, &slot.m, &slot.v, &hyper, slot.steps)?;
        }
        self.steps += 1;
        gradients.clear();
        Ok(Step::Applied { norm })
    }

    /// Steps that were applied.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// # Errors
    /// A learning rate that is negative or not finite.
    pub fn set_lr(&mut self, lr: f64) -> Result<()> {
        let config = AdamWConfig { lr, ..self.config };
        config.validate()?;
        self.config = config;
        Ok(())
    }

    /// A copy of what a later run needs to continue to the bit, besides the
    /// variables and the configuration: `NAME.m` and `NAME.v` (f32, of the
    /// variable's shape), `NAME.step` (its updates) and `step` (both i64 scalars).
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.state_view()?.into_iter().map(|(name, t)| Ok((name, t.copy()?))).collect()
    }

    /// `state` without the copy, to be written at once: the next step changes it.
    pub fn state_view(&self) -> Result<BTreeMap<String, Tensor>> {
        let count = |steps: u64| Tensor::new(steps as i64, &Device::Cpu);
        let mut state = BTreeMap::from([(STEP.to_owned(), count(self.steps)?)]);
        for Slot { name, m, v, steps, .. } in &self.slots {
            state.insert(format!("{name}.{M}"), m.as_detached_tensor());
            state.insert(format!("{name}.{V}"), v.as_detached_tensor());
            state.insert(format!("{name}.{STEP}"), count(*steps)?);
        }
        Ok(state)
    }

    /// Continues from what `state` returned.
    ///
    /// # Errors
    /// One message with every missing, mis-shaped and surplus entry; then
    /// nothing was changed.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut problems = Vec::new();
        let mut known = std::collections::BTreeSet::from([STEP.to_owned()]);
        let mut steps = vec![count(state, STEP, &mut problems)];
        for Slot { name, var, .. } in &self.slots {
            let entries = [M, V, STEP].map(|entry| format!("{name}.{entry}"));
            moment(state, &entries[0], var, &mut problems);
            moment(state, &entries[1], var, &mut problems);
            steps.push(count(state, &entries[2], &mut problems));
            known.extend(entries);
        }
        let surplus = state.keys().filter(|name| !known.contains(*name));
        problems.extend(surplus.map(|name| format!("{name} is of no variable")));
        if !problems.is_empty() {
            return Err(Error::Weights(format!("optimizer state: {}", problems.join("; "))));
        }
        for slot in &self.slots {
            for (entry, into) in [(M, &slot.m), (V, &slot.v)] {
                if let Some(from) = state.get(&format!("{}.{entry}", slot.name)) {
                    into.set(&from.to_device(into.device())?)?;
                }
            }
        }
        let counters =
            std::iter::once(&mut self.steps).chain(self.slots.iter_mut().map(|s| &mut s.steps));
        counters.zip(steps).for_each(|(counter, steps)| *counter = steps);
        Ok(())
    }
}

/// Notes what is wrong with a moment of `var` in a state.
fn moment(state: &BTreeMap<String, Tensor>, name: &str, var: &Var, problems: &mut Vec<String>) {
    match state.get(name) {
        None => problems.push(format!("{name} is missing")),
        Some(t) if t.dtype() != DType::F32 || t.shape() != var.shape() => {
            let (dtype, got, expected) = (t.dtype(), t.dims(), var.dims());
            problems.push(format!("{name}: expected f32 {expected:?}, got {dtype:?} {got:?}"));
        }
        Some(_) => {}
    }
}

/// A counter of a state; notes what is wrong with it.
fn count(state: &BTreeMap<String, Tensor>, name: &str, problems: &mut Vec<String>) -> u64 {
    let Some(t) = state.get(name) else {
        problems.push(format!("{name} is missing"));
        return 0;
    };
    if let Ok(Ok(steps)) = t.to_scalar::<i64>().map(u64::try_from) {
        return steps;
    }
    let (dtype, dims) = (t.dtype(), t.dims());
    problems.push(format!("{name}: expected a count as an i64 scalar, got {dtype:?} {dims:?}"));
    0
}
