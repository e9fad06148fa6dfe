//! What a forward pass costs: parameters, arithmetic, traffic and kernel launches.

use std::collections::BTreeMap;

use serde::Serialize;

use super::saved::{Trained, tracked};
use super::trace::{Kind, Op, Trace};

/// A sum over operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    pub ops: u64,
    pub parameters: u64,
    /// 2 per multiply-add of linear layers, convolutions and attention; nothing else counts,
    /// as in PyTorch's `FlopCounterMode`.
    pub flops: u64,
    /// Every operation reads its inputs and weights once and writes its output once.
    pub bytes: u64,
    /// Kernels on a GPU, see [`launches`].
    pub launches: u64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, o: Self) {
        self.ops += o.ops;
        self.parameters += o.parameters;
        self.flops += o.flops;
        self.bytes += o.bytes;
        self.launches += o.launches;
    }
}

/// How fast a processor can be, for [`Cost`]'s lower bound.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Peak {
    pub flops_per_second: f64,
    pub bytes_per_second: f64,
}

/// An H100 SXM's ceilings as measured on such a card: a bf16 product of 8192³, a copy.
pub const H100: Peak = Peak { flops_per_second: 790e12, bytes_per_second: 3.0e12 };

/// Kernels that an operation takes on a GPU when it is fused as on the CPU: a matrix product
/// or cuDNN convolution and one pass for bias, shift and residual, one more where a
/// convolution's input has to be enlarged first; group norm's partial sums, statistics and
/// values; one for everything else. Adapters are merged.
pub fn launches(op: &Op) -> u64 {
    match op.kind {
        Kind::Linear | Kind::Convolution => 1 + u64::from(op.finished) + u64::from(op.enlarged),
        Kind::GroupNorm => 3,
        _ => 1,
    }
}

impl Trace {
    /// `element`: bytes of a value and of a weight.
    fn cost_of(&self, op: &Op, element: u64) -> Cost {
        let inputs: u64 = op.inputs.iter().map(|id| self.values[*id]).sum();
        // Of a table, the rows that are asked for.
        let weights = match op.kind {
            Kind::Embedding => self.values[op.output],
            _ => op.parameters,
        };
        Cost {
            ops: 1,
            parameters: op.parameters,
            flops: op.flops,
            bytes: element * (inputs + weights + self.values[op.output]),
            launches: launches(op),
        }
    }

    /// By kind of operation, `element` bytes a value.
    pub fn costs(&self, element: u64) -> BTreeMap<Kind, Cost> {
        let mut all: BTreeMap<Kind, Cost> = BTreeMap::new();
        for op in &self.ops {
            *all.entry(op.kind).or_default() += self.cost_of(op, element);
        }
        all
    }

    pub fn cost(&self, element: u64) -> Cost {
        let mut sum = Cost::default();
        self.ops.iter().for_each(|op| sum += self.cost_of(op, element));
        sum
    }

    pub fn parameters(&self) -> u64 {
        self.ops.iter().map(|op| op.parameters).sum()
    }

    pub fn flops(&self) -> u64 {
        self.ops.iter().map(|op| op.flops).sum()
    }

    /// Seconds below which this pass cannot be: each operation takes its arithmetic or its
    /// traffic, whichever is longer.
    pub fn least_seconds(&self, element: u64, peak: Peak) -> f64 {
        let seconds = |op: &Op| {
            let cost = self.cost_of(op, element);
            let arithmetic = cost.flops as f64 / peak.flops_per_second;
            arithmetic.max(cost.bytes as f64 / peak.bytes_per_second)
        };
        self.ops.iter().map(seconds).sum()
    }

    /// Arithmetic of the backward pass: a product for each gradient that is wanted, and five
    /// for attention's two, whose scores are computed again.
    pub fn backward_flops(&self, trained: Trained) -> u64 {
        let tracked = tracked(self, trained);
        let flops = |op: &Op| {
            let input = op.inputs.iter().any(|id| tracked[*id]);
            match op.matrix {
                Some(matrix) => {
                    let input = op.inputs.first().is_some_and(|id| tracked[*id]);
                    let products = u64::from(input) + u64::from(trained.weights(op));
                    let small = 2 * matrix.rows * trained.adapter(op);
                    products * op.flops + small * (1 + u64::from(input))
                }
                None if input => op.flops / 2 * 5,
                None => 0,
            }
        };
        self.ops.iter().map(flops).sum()
    }
}
