//! The single operations whose speed is measured, at sizes of SDXL at 512 px and up, batch 1:
//! `tools/bench_torch_ops.py` does the same under the same names. The plain name is a forward
//! without gradients; with `_train` behind it, forward and backward of Σ y·fixed to the input
//! and the weights.

use candle_core::{Tensor, Var};

use super::workload::Work;
use crate::nn::autograd::attach_storage;
use crate::nn::device::{Placement, computed};
use crate::nn::{Conv2d, GroupNorm, LayerNorm, Linear, attention, geglu};
use crate::{Error, Result};

const HEAD: usize = 64;
const TRAIN: &str = "_train";

type Layer = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

#[derive(Clone, Copy)]
enum Op {
    Linear { rows: usize, from: usize, to: usize },
    Conv { from: usize, to: usize, side: usize },
    Attention { heads: usize, tokens: usize },
    GroupNormSilu { channels: usize, side: usize },
    Geglu { rows: usize, width: usize },
    LayerNorm { rows: usize, width: usize },
}

const OPS: [(&str, Op); 12] = [
    ("op_linear_1024x640x5120", Op::Linear { rows: 1024, from: 640, to: 5120 }),
    ("op_conv3x3_320_64", Op::Conv { from: 320, to: 320, side: 64 }),
    ("op_conv3x3_640_32", Op::Conv { from: 640, to: 640, side: 32 }),
    ("op_conv3x3_512_64", Op::Conv { from: 512, to: 512, side: 64 }),
    ("op_conv3x3_1280_16", Op::Conv { from: 1280, to: 1280, side: 16 }),
    ("op_conv3x3_2560to1280_16", Op::Conv { from: 2560, to: 1280, side: 16 }),
    ("op_attention_h10_t1024", Op::Attention { heads: 10, tokens: 1024 }),
    ("op_attention_h20_t256", Op::Attention { heads: 20, tokens: 256 }),
    ("op_attention_h10_t4096", Op::Attention { heads: 10, tokens: 4096 }),
    ("op_group_norm_silu_320_64", Op::GroupNormSilu { channels: 320, side: 64 }),
    ("op_geglu_1024x5120", Op::Geglu { rows: 1024, width: 5120 }),
    ("op_layer_norm_1024x640", Op::LayerNorm { rows: 1024, width: 640 }),
];

/// All forwards, then all with gradients.
pub fn names() -> impl Iterator<Item = String> {
    let plain = OPS.iter().map(|(name, _)| (*name).to_owned());
    plain.chain(OPS.iter().map(|(name, _)| format!("{name}{TRAIN}")))
}

/// The operation of this name.
///
/// # Errors
/// When there is none.
pub fn prepare(name: &str, placement: &Placement) -> Result<Work<'static>> {
    let plain = name.strip_suffix(TRAIN);
    let wanted = plain.unwrap_or(name);
    let Some((_, op)) = OPS.iter().find(|(name, _)| *name == wanted) else {
        return Err(Error::unknown("only", "operation", name, OPS.map(|(name, _)| name)));
    };
    let inputs = op.inputs(placement)?;
    if plain.is_none() {
        let run = op.layer(inputs[1..].to_vec());
        return Ok(Box::new(move || run(&inputs[0])));
    }
    let vars = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let run = op.layer(tracked[1..].to_vec());
    let fixed = Tensor::randn(0_f32, 1.0, run(&tracked[0])?.shape(), &placement.device)?;
    let fixed = fixed.to_dtype(tracked[0].dtype())?;
    Ok(Box::new(move || {
        let gradients = weighted_sum(&run(&tracked[0])?, &fixed)?.backward()?;
        let of = |v: &Var| gradients.get(v).cloned();
        of(&vars[0]).ok_or_else(|| Error::invalid("only", "the operation has no gradient"))
    }))
}

/// Σ y·fixed. candle's own operations would also compute the gradient of `fixed`, and spread
/// the sum's gradient out element by element.
fn weighted_sum(y: &Tensor, fixed: &Tensor) -> Result<Tensor> {
    let sum = (y.detach() * fixed)?.sum_all()?;
    let fixed = fixed.clone();
    let backward = move |g: &Tensor| Ok(vec![fixed.broadcast_mul(g)?]);
    let storage = sum.storage_and_layout().0.try_clone(sum.layout())?;
    Ok(attach_storage(storage, (), &[y], backward)?)
}

impl Op {
    /// The input and the weights.
    fn inputs(self, placement: &Placement) -> Result<Vec<Tensor>> {
        let dtype = computed(placement.weights, &placement.device);
        let normal = |shape: &[usize], deviation: f64| {
            let values = Tensor::randn(0_f32, 1.0, shape, &placement.device)?;
            Ok(values.affine(deviation, 0.0)?.to_dtype(dtype)?)
        };
        // Weights of unit gain, so that results are of the inputs' size.
        let unit = |inputs: usize| 1.0 / (inputs as f64).sqrt();
        match self {
            Self::Linear { rows, from, to } => Ok(vec![
                normal(&[1, rows, from], 1.0)?,
                normal(&[to, from], unit(from))?,
                normal(&[to], 1.0)?,
            ]),
            Self::Conv { from, to, side } => Ok(vec![
                normal(&[1, side, side, from], 1.0)?,
                normal(&[to, from, 3, 3], unit(9 * from))?,
                normal(&[to], 1.0)?,
            ]),
            Self::Attention { heads, tokens } => {
                (0..3).map(|_| normal(&[1, tokens, heads * HEAD], 1.0)).collect()
            }
            Self::GroupNormSilu { channels, side } => Ok(vec![
                normal(&[1, side, side, channels], 1.0)?,
                normal(&[channels], 1.0)?,
                normal(&[channels], 1.0)?,
            ]),
            Self::Geglu { rows, width } => Ok(vec![normal(&[1, rows, width], 1.0)?]),
            Self::LayerNorm { rows, width } => Ok(vec![
                normal(&[1, rows, width], 1.0)?,
                normal(&[width], 1.0)?,
                normal(&[width], 1.0)?,
            ]),
        }
    }

    /// The operation with these weights (keys and values, for attention).
    fn layer(self, weights: Vec<Tensor>) -> Layer {
        let mut weights = weights.into_iter();
        let (first, second) = (weights.next(), weights.next());
        let pair = || first.clone().zip(second.clone());
        match (self, pair()) {
            (Self::Linear { .. }, Some((weight, bias))) => {
                let layer = Linear::new(weight, Some(bias), None);
                Box::new(move |x| Ok(layer.forward(x)?))
            }
            (Self::Conv { .. }, Some((weight, bias))) => {
                let layer = Conv2d::new(weight, Some(bias), 1, 1, None);
                Box::new(move |x| Ok(layer.forward(x)?))
            }
            (Self::Attention { heads, .. }, Some((k, v))) => {
                Box::new(move |q| Ok(attention(q, &k, &v, heads, None)?))
            }
            (Self::GroupNormSilu { .. }, Some((weight, bias))) => {
                let layer = GroupNorm { groups: 32, eps: 1e-5, weight, bias };
                Box::new(move |x| Ok(layer.forward_silu(x)?))
            }
            (Self::LayerNorm { .. }, Some((weight, bias))) => {
                let layer = LayerNorm { eps: 1e-5, weight, bias };
                Box::new(move |x| Ok(layer.forward(x)?))
            }
            _ => Box::new(|x| Ok(geglu(x)?)),
        }
    }
}
