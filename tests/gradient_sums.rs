//! `Gradients::backward`: the layers' gradients added where they are found.

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use common::{normal, relative_error, values};
use diffusion_sharpening::nn::{Activation, Conv2d, GroupNorm, Linear, LowRank};
use diffusion_sharpening::train::optimizer::{Gradients, Missing};

type Vars = BTreeMap<String, Var>;

fn single(seed: u64, shape: &[usize]) -> Tensor {
    normal(seed, shape).to_dtype(DType::F32).unwrap()
}

/// Weights of every kind of layer, one shared by two layers, and one that only a plain
/// operation uses.
fn vars() -> Vars {
    let shapes: [(&str, &[usize]); 10] = [
        ("conv", &[40, 34, 3, 3]),
        ("conv bias", &[40]),
        ("norm", &[34]),
        ("norm bias", &[34]),
        ("linear", &[34, 40]),
        ("down", &[4, 40]),
        ("up", &[34, 4]),
        ("shift", &[2, 40]),
        ("residual", &[2, 9, 8, 34]),
        ("scale", &[1]),
    ];
    let var = |seed, shape| Var::from_tensor(&(single(seed, shape) * 0.2).unwrap()).unwrap();
    (1..).zip(shapes).map(|(seed, (name, shape))| (name.to_owned(), var(seed, shape))).collect()
}

fn loss(v: &Vars, x: &Tensor) -> Tensor {
    let t = |name: &str| v[name].as_tensor().clone();
    let conv = Conv2d::new(t("conv"), Some(t("conv bias")), 1, 1, None);
    let norm = GroupNorm { groups: 2, eps: 1e-5, weight: t("norm"), bias: t("norm bias") };
    let adapter = LowRank { down: t("down"), up: t("up"), scale: 0.5 };
    let linear = Linear::new(t("linear"), None, Some(adapter));
    // Twice through the same weights, once onto a variable.
    let mut h = x.clone();
    for round in 0..2 {
        let shift = Some(&v["shift"]);
        let added =
            diffusion_sharpening::nn::Added { shift: shift.map(Var::as_tensor), residual: None };
        let inner = conv.forward_added(&norm.forward_silu(&h).unwrap(), added).unwrap();
        let onto = if round == 0 { t("residual") } else { h.clone() };
        h = linear.forward_onto(&Activation::Silu.forward(&inner).unwrap(), &onto).unwrap();
    }
    h.broadcast_mul(&t("scale")).unwrap().sqr().unwrap().mean_all().unwrap()
}

#[test]
fn sums_are_those_of_candles_backward() {
    let vars = vars();
    let batches = [single(50, &[2, 9, 8, 34]), single(51, &[2, 9, 8, 34])];
    let mut ours = Gradients::new(&vars, Missing::Refuse).unwrap();
    let mut theirs = Gradients::new(&vars, Missing::Refuse).unwrap();
    for (x, scale) in batches.iter().zip([0.25, 0.75]) {
        ours.backward(&loss(&vars, x), scale).unwrap();
        theirs.add(&mut loss(&vars, x).backward().unwrap(), scale).unwrap();
    }
    for name in vars.keys() {
        let (a, b) = (ours.get(name).unwrap().unwrap(), theirs.get(name).unwrap().unwrap());
        let error = relative_error(&a, &b);
        assert!(error < 1e-6, "{name}: {error:e}");
        assert!(!a.track_op(), "{name} keeps a graph alive");
    }
    // Clipped sums go on from what clipping made of them.
    let norm = ours.clip(1e-3).unwrap();
    assert!((norm - theirs.clip(1e-3).unwrap()).abs() < 1e-6 * norm);
    ours.backward(&loss(&vars, &batches[0]), 1.0).unwrap();
    theirs.add(&mut loss(&vars, &batches[0]).backward().unwrap(), 1.0).unwrap();
    for name in vars.keys() {
        let (a, b) = (ours.get(name).unwrap().unwrap(), theirs.get(name).unwrap().unwrap());
        assert!(relative_error(&a, &b) < 1e-6, "{name} after clipping");
    }
}

/// A sum is memory of its own: adding to it changes no other gradient and no variable.
#[test]
fn sums_share_no_memory() {
    let vars = vars();
    let x = single(50, &[2, 9, 8, 34]);
    let before: Vec<_> = vars.values().map(|v| values(v)).collect();
    let mut once = Gradients::new(&vars, Missing::Refuse).unwrap();
    once.backward(&loss(&vars, &x), 1.0).unwrap();
    let first: Vec<_> = vars.keys().map(|n| values(&once.get(n).unwrap().unwrap())).collect();
    once.backward(&loss(&vars, &x), 1.0).unwrap();
    for (name, first) in vars.keys().zip(first) {
        let twice = values(&once.get(name).unwrap().unwrap());
        let doubled = first.iter().map(|v| 2.0 * v).collect::<Vec<_>>();
        let error: f64 = twice.iter().zip(&doubled).map(|(a, b)| (a - b).abs()).sum();
        let size: f64 = doubled.iter().map(|v| v.abs()).sum();
        assert!(error < 1e-6 * size, "{name}");
    }
    assert!(before == vars.values().map(|v| values(v)).collect::<Vec<_>>());
}

#[test]
fn a_variable_without_gradient_is_named() {
    let mut vars = vars();
    vars.insert("unused".into(), Var::from_tensor(&single(1, &[3])).unwrap());
    let x = single(50, &[2, 9, 8, 34]);
    let mut strict = Gradients::new(&vars, Missing::Refuse).unwrap();
    let error = strict.backward(&loss(&vars, &x), 1.0).unwrap_err().to_string();
    assert!(error.contains("unused") && error.contains("no gradient"), "{error}");
    let mut lenient = Gradients::new(&vars, Missing::Allow).unwrap();
    lenient.backward(&loss(&vars, &x), 1.0).unwrap();
    assert!(lenient.get("unused").unwrap().is_none() && lenient.get("conv").unwrap().is_some());
    let error = lenient.backward(&loss(&vars, &x), f64::NAN).unwrap_err().to_string();
    assert!(error.contains("scale"), "{error}");
    // Another backward pass on this thread does not add to these sums.
    let before = values(&lenient.get("conv").unwrap().unwrap());
    loss(&vars, &x).backward().unwrap();
    assert!(values(&lenient.get("conv").unwrap().unwrap()) == before);
}
