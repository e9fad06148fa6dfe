//! Optimizer steps and gradient sums.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use diffusion_sharpening::train::optimizer::{AdamW, AdamWConfig, Gradients, Missing, Step};

use super::common::{normal, relative_error};
use super::{on_cpu, on_gpu};

/// Five accumulated, clipped steps on both devices.
#[test]
fn steps_are_those_of_the_cpu() {
    let start = normal(1, &[37, 53]).to_dtype(DType::F32).unwrap();
    let inputs = normal(2, &[20, 53]).to_dtype(DType::F32).unwrap();
    let run = |place: &dyn Fn(&Tensor) -> Tensor| -> (Tensor, Vec<f64>) {
        let var = Var::from_tensor(&place(&start)).unwrap();
        let vars = BTreeMap::from([("w".to_owned(), var.clone())]);
        let mut gradients = Gradients::new(&vars, Missing::Refuse).unwrap();
        let mut optimizer = AdamW::new(&vars, AdamWConfig::new(0.01)).unwrap();
        let x = place(&inputs);
        let mut norms = Vec::new();
        for _ in 0..5 {
            for scale in [0.3, 0.7] {
                let y = x.matmul(&var.as_tensor().t().unwrap()).unwrap();
                let loss = (y.sin().unwrap().sqr().unwrap().mean_all().unwrap() * scale).unwrap();
                gradients.backward(&loss, 1.0).unwrap();
            }
            norms.push(gradients.clip(0.02).unwrap());
            let step = optimizer.step(&mut gradients).unwrap();
            assert!(matches!(step, Step::Applied { .. }), "{step:?}");
        }
        (var.as_detached_tensor(), norms)
    };
    let (expected, norms) = run(&|x| x.clone());
    let (got, gpu_norms) = run(&|x| on_gpu(x, DType::F32));
    let error = relative_error(&on_cpu(&got), &expected);
    assert!(error < 1e-5, "weights differ by {error:.1e}");
    for (a, b) in norms.iter().zip(&gpu_norms) {
        assert!((a - b).abs() < 1e-5 * a, "norms {norms:?} and {gpu_norms:?}");
    }
    assert!(relative_error(&expected, &start) > 0.01, "nothing was learned");
}
