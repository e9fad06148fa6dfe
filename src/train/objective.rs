//! Preference losses of a pair, in f64, with their derivatives.
//!
//! With `l_j = mean over the states of ‖ε_θ − target‖²` of the winner and the loser, and the
//! reference's at the same states, `delta = (l_ref^w − l_θ^w) − (l_ref^l − l_θ^l)` is what the
//! model has gained on the winner beyond the loser. Only through it does a loss depend on the
//! weights, so a gradient is `derivative · ∂delta/∂θ`.

use super::settings::{Settings, choice};

choice! {
    /// Which loss a pair has.
    LossKind {
        /// softplus(−β·delta): Diffusion-DPO (arXiv 2311.12908, eq. 14 with β for βTω/2).
        Dpo,
        /// softplus(γ·gap − β·delta): Diffusion-Sharpening, eq. 11 with the gap inside the
        /// sigmoid (offset DPO, arXiv 2402.10571).
        Offset,
        /// (β·delta − η·gap)²: REBEL (arXiv 2404.16767, eq. 2).
        Rebel,
    }
}

use serde::{Deserialize, Serialize};

/// A loss with its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    pub kind: LossKind,
    pub beta: f64,
    pub gamma: f64,
    pub reward_eta: f64,
}

impl From<&Settings> for Objective {
    fn from(s: &Settings) -> Self {
        Self { kind: s.loss, beta: s.beta, gamma: s.gamma, reward_eta: s.reward_eta }
    }
}

impl Objective {
    /// The loss of a pair; `gap` is the winner's reward less the loser's.
    pub fn value(&self, delta: f64, gap: f64) -> f64 {
        match self.kind {
            LossKind::Rebel => (self.beta * delta - self.reward_eta * gap).powi(2),
            _ => softplus(-self.margin(delta, gap)),
        }
    }

    /// ∂loss/∂delta.
    pub fn derivative(&self, delta: f64, gap: f64) -> f64 {
        match self.kind {
            LossKind::Rebel => 2.0 * self.beta * (self.beta * delta - self.reward_eta * gap),
            _ => -self.beta * sigmoid(-self.margin(delta, gap)),
        }
    }

    fn margin(&self, delta: f64, gap: f64) -> f64 {
        match self.kind {
            LossKind::Offset => self.beta * delta - self.gamma * gap,
            _ => self.beta * delta,
        }
    }
}

/// ln(1 + eˣ) without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objective(kind: LossKind) -> Objective {
        Objective { kind, beta: 2500.0, gamma: 1.0, reward_eta: 0.5 }
    }

    #[test]
    fn values_where_the_model_is_the_reference() {
        let at = |kind, gap| objective(kind).value(0.0, gap);
        for gap in [0.0, 1.0, 2.0] {
            assert!((at(LossKind::Dpo, gap) - 2f64.ln()).abs() < 1e-12);
        }
        assert!((at(LossKind::Offset, 1.0) - 1.313_261_687_518_222_8).abs() < 1e-12);
        assert!((at(LossKind::Offset, 2.0) - 2.126_928_011_042_972_5).abs() < 1e-12);
        assert!((at(LossKind::Rebel, 3.0) - 2.25).abs() < 1e-12);
        // dL/dl_w = β/2 at the reference: −derivative.
        assert!((objective(LossKind::Dpo).derivative(0.0, 5.0) + 1250.0).abs() < 1e-9);
    }

    #[test]
    fn derivatives_are_those_of_the_values() {
        for kind in [LossKind::Dpo, LossKind::Offset, LossKind::Rebel] {
            let o = objective(kind);
            for delta in [-3e-3, -1e-5, 0.0, 2e-4, 1e-2] {
                for gap in [0.0, 0.3, 4.0] {
                    let h = 1e-8;
                    let numeric = (o.value(delta + h, gap) - o.value(delta - h, gap)) / (2.0 * h);
                    let exact = o.derivative(delta, gap);
                    let close = (numeric - exact).abs() <= 1e-4 * exact.abs().max(1.0);
                    assert!(close, "{kind:?} at {delta}, {gap}: {numeric} and {exact}");
                }
            }
        }
    }

    #[test]
    fn the_gap_matters_inside_and_only_there() {
        let change = |kind| {
            let o = objective(kind);
            (o.derivative(1e-4, 0.0) - o.derivative(1e-4, 100.0)).abs()
        };
        assert_eq!(change(LossKind::Dpo), 0.0);
        assert!(change(LossKind::Offset) > 100.0 && change(LossKind::Rebel) > 100.0);
    }

    #[test]
    fn nothing_overflows() {
        for kind in [LossKind::Dpo, LossKind::Offset] {
            let o = objective(kind);
            for delta in [-1e6, 1e6] {
                assert!(o.value(delta, 1.0).is_finite() && o.derivative(delta, 1.0).is_finite());
            }
        }
    }
}
