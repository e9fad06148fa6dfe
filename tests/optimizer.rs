//! Gradient accumulation and AdamW, against PyTorch (tools/optimizer_fixture.py)
//! and against what they promise.

mod common;

use std::collections::{BTreeMap, HashMap};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use common::{fixtures, normal, read, relative_error};
use diffusion_sharpening::Error;
use diffusion_sharpening::nn::adamw::{self, Hyper};
use diffusion_sharpening::sdxl::weights::write_safetensors;
use diffusion_sharpening::train::optimizer::{AdamW, AdamWConfig, Gradients, Missing, Step};

type Vars = BTreeMap<String, Var>;

const NAMES: [&str; 3] = ["conv.weight", "linear.weight", "norm.bias"];

fn f32s(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    f32s(x).into_iter().map(f32::to_bits).collect()
}

fn all_bits(vars: &Vars) -> Vec<Vec<u32>> {
    vars.values().map(|v| bits(v)).collect()
}

fn var(seed: u64, shape: &[usize]) -> Var {
    Var::from_tensor(&normal(seed, shape).to_dtype(DType::F32).unwrap()).unwrap()
}

fn some_vars() -> Vars {
    let shapes: [(&str, &[usize]); 3] = [("b", &[300, 200]), ("a", &[17]), ("c", &[2, 3, 4])];
    (1..).zip(shapes).map(|(seed, (name, shape))| (name.to_owned(), var(seed, shape))).collect()
}

/// What `backward` would return, with given gradients.
fn store(given: &[(&Var, Tensor)]) -> GradStore {
    let mut grads = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap().backward().unwrap();
    for (var, grad) in given {
        grads.insert(var, grad.copy().unwrap());
    }
    grads
}

/// Random gradients for all variables.
fn random(vars: &Vars, seed: u64) -> GradStore {
    let grad = |(i, v): (usize, &Var)| {
        normal(seed * 100 + i as u64, v.dims()).to_dtype(DType::F32).unwrap()
    };
    let given: Vec<_> = vars.values().enumerate().map(|(i, v)| (v, grad((i, v)))).collect();
    store(&given)
}

fn max_relative(a: &Tensor, b: &Tensor) -> f64 {
    let pairs = f32s(a).into_iter().zip(f32s(b));
    let error = |(a, b): (f32, f32)| f64::from((a - b).abs()) / f64::from(b.abs()).max(1e-30);
    pairs.map(error).fold(0.0, f64::max)
}

fn torch_run(fixture: &HashMap<String, Tensor>, run: &str) {
    let hyper: Vec<f64> = fixture[&format!("{run}/hyper")].to_vec1().unwrap();
    let &[lr, beta1, beta2, eps, weight_decay, max_norm] = hyper.as_slice() else { panic!() };
    let vars: Vars = NAMES
        .iter()
        .map(|n| ((*n).to_owned(), Var::from_tensor(&fixture[&format!("start/{n}")]).unwrap()))
        .collect();
    let config = AdamWConfig { lr, beta1, beta2, eps, weight_decay };
    let mut optimizer = AdamW::new(&vars, config).unwrap();
    let mut gradients = Gradients::new(&vars, Missing::Allow).unwrap();
    let (mut worst, mut clipped) = (0.0_f64, 0);
    for step in 1..=5 {
        let with_gradient = vars.iter().filter(|(name, _)| {
            run != "missing" || name.as_str() != "norm.bias" || ![1, 4].contains(&step)
        });
        let given: Vec<_> = with_gradient
            .map(|(name, var)| (var, fixture[&format!("grad/{step}/{name}")].clone()))
            .collect();
        gradients.add(&mut store(&given), 1.0).unwrap();
        if max_norm > 0.0 {
            let norm = gradients.clip(max_norm).unwrap();
            let expected: Vec<f64> = fixture[&format!("{run}/norm")].to_vec1().unwrap();
            let expected = expected[step - 1];
            assert!((norm - expected).abs() < 1e-6 * expected, "{norm} {expected}");
            clipped += usize::from(norm > max_norm);
        }
        assert!(matches!(optimizer.step(&mut gradients).unwrap(), Step::Applied { .. }));
        for (name, var) in &vars {
            worst = worst.max(max_relative(var, &fixture[&format!("{run}/{step}/{name}")]));
        }
    }
    assert!(max_norm == 0.0 || (1..5).contains(&clipped), "{clipped} steps were clipped");
    let state = optimizer.state().unwrap();
    for name in NAMES {
        for moment in ["m", "v"] {
            let (ours, theirs) =
                (&state[&format!("{name}.{moment}")], &fixture[&format!("{run}/{moment}/{name}")]);
            worst = worst.max(relative_error(ours, theirs));
        }
    }
    println!("{run}: largest relative error {worst:.2e}");
    assert!(worst < 1e-6, "{run}: {worst:e}");
}

#[test]
fn it_is_pytorchs_adamw() {
    let fixture = read(&fixtures().join("optimizer.safetensors"));
    for run in ["plain", "decay", "clip", "missing", "beta"] {
        torch_run(&fixture, run);
    }
}

/// Mean over a batch of (x w + b − y)², as a model would compute it.
fn loss(vars: &Vars, x: &Tensor, y: &Tensor) -> Tensor {
    let out = x.matmul(&vars["w"]).unwrap().broadcast_add(&vars["b"]).unwrap();
    (out - y).unwrap().sqr().unwrap().mean_all().unwrap()
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    let vars: Vars = [("w".to_owned(), var(1, &[40, 30])), ("b".to_owned(), var(2, &[30]))].into();
    let (x, y) = (var(3, &[12, 40]).detach(), var(4, &[12, 30]).detach());
    let mut whole = Gradients::new(&vars, Missing::Refuse).unwrap();
    whole.add(&mut loss(&vars, &x, &y).backward().unwrap(), 1.0).unwrap();
    for k in [1, 2, 3, 4, 12] {
        let mut parts = Gradients::new(&vars, Missing::Refuse).unwrap();
        for i in 0..k {
            let part = |t: &Tensor| t.narrow(0, i * 12 / k, 12 / k).unwrap();
            let mut grads = loss(&vars, &part(&x), &part(&y)).backward().unwrap();
            parts.add(&mut grads, 1.0 / k as f64).unwrap();
            assert!(vars.values().all(|v| grads.get(v).is_none()), "a gradient was left behind");
        }
        for name in vars.keys() {
            let (part, whole) = (parts.get(name).unwrap(), whole.get(name).unwrap());
            let (part, whole) = (part.unwrap(), whole.unwrap());
            assert!(!part.track_op(), "{name} keeps a graph alive");
            let error = relative_error(&part, &whole);
            assert!(error < 1e-6, "{k} micro-batches: {name}: {error:e}");
        }
    }
}

#[test]
fn it_learns() {
    let vars: Vars = [("w".to_owned(), var(1, &[8, 3])), ("b".to_owned(), var(2, &[3]))].into();
    let (x, y) = (var(3, &[64, 8]).detach(), var(4, &[64, 3]).detach());
    let mut optimizer = AdamW::new(&vars, AdamWConfig::new(0.05)).unwrap();
    let mut gradients = Gradients::new(&vars, Missing::Refuse).unwrap();
    let value = |vars: &Vars| loss(vars, &x, &y).to_scalar::<f32>().unwrap();
    let before = value(&vars);
    for _ in 0..200 {
        gradients.add(&mut loss(&vars, &x, &y).backward().unwrap(), 1.0).unwrap();
        let _ = optimizer.step(&mut gradients).unwrap();
    }
    let after = value(&vars);
    gradients.add(&mut loss(&vars, &x, &y).backward().unwrap(), 1.0).unwrap();
    let slope = gradients.norm().unwrap();
    assert!(after < before / 5.0 && slope < 0.01, "{before} to {after}, gradient {slope}");
}

#[test]
fn clipping_scales_to_the_norm() {
    let vars: Vars = [("p".to_owned(), var(1, &[2])), ("q".to_owned(), var(2, &[1]))].into();
    let given = || {
        let tensor = |v: &[f32]| Tensor::new(v, &Device::Cpu).unwrap();
        store(&[(&vars["p"], tensor(&[1.0, -2.0])), (&vars["q"], tensor(&[2.0]))])
    };
    let mut gradients = Gradients::new(&vars, Missing::Refuse).unwrap();
    gradients.add(&mut given(), 2.0).unwrap();
    assert_eq!(gradients.clip(10.0).unwrap(), 6.0);
    assert_eq!(f32s(&gradients.get("p").unwrap().unwrap()), [2.0, -4.0]);
    assert_eq!(gradients.clip(3.0).unwrap(), 6.0);
    let p = f32s(&gradients.get("p").unwrap().unwrap());
    assert!((p[0] - 1.0).abs() < 1e-6 && (p[1] + 2.0).abs() < 1e-6, "{p:?}");
    assert!((gradients.norm().unwrap() - 3.0).abs() < 1e-5);
    // What is added later is not clipped.
    gradients.add(&mut given(), 1.0).unwrap();
    let p = f32s(&gradients.get("p").unwrap().unwrap());
    assert!((p[0] - 2.0).abs() < 1e-5 && (p[1] + 4.0).abs() < 1e-5, "{p:?}");
    assert!((gradients.norm().unwrap() - 6.0).abs() < 1e-5);
    for bad in [0.0, -1.0, f64::NAN] {
        let error = gradients.clip(bad).unwrap_err().to_string();
        assert!(error.starts_with("max_norm: "), "{error}");
    }
    // Far beyond what squares in f32 hold.
    let huge = Tensor::new(&[3e30_f32, 4e30], &Device::Cpu).unwrap();
    gradients.clear();
    let q = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
    gradients.add(&mut store(&[(&vars["p"], huge), (&vars["q"], q)]), 1.0).unwrap();
    assert!((gradients.clip(1.0).unwrap() / 5e30 - 1.0).abs() < 1e-6);
    assert!(gradients.is_finite().unwrap());
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let vars = some_vars();
    let mut optimizer = AdamW::new(&vars, AdamWConfig::new(1e-3)).unwrap();
    let mut gradients = Gradients::new(&vars, Missing::Refuse).unwrap();
    gradients.add(&mut random(&vars, 1), 1.0).unwrap();
    assert!(matches!(optimizer.step(&mut gradients).unwrap(), Step::Applied { .. }));
    let (before, state) = (all_bits(&vars), optimizer.state().unwrap());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for clip in [false, true] {
            let mut grads = random(&vars, 2);
            let mut values = f32s(grads.get(&vars["b"]).unwrap());
            values[51_234] = bad;
            let grad = Tensor::from_vec(values, (300, 200), &Device::Cpu).unwrap();
            grads.insert(&vars["b"], grad);
            gradients.add(&mut grads, 1.0).unwrap();
            assert!(!gradients.is_finite().unwrap());
            if clip {
                assert!(!gradients.clip(1.0).unwrap().is_finite());
            }
            let step = optimizer.step(&mut gradients).unwrap();
            assert!(matches!(step, Step::Skipped { norm } if !norm.is_finite()), "{step:?}");
            assert!(gradients.is_empty());
        }
    }
    assert_eq!(all_bits(&vars), before);
    assert_eq!(optimizer.steps(), 1);
    for (name, t) in optimizer.state().unwrap() {
        assert_eq!(t.to_string(), state[&name].to_string(), "{name}");
    }
}

/// Steps FROM..TO with gradients of their own, two micro-batches each.
fn train(vars: &Vars, optimizer: &mut AdamW, steps: std::ops::Range<u64>) {
    let mut gradients = Gradients::new(vars, Missing::Allow).unwrap();
    for step in steps {
        optimizer.set_lr(1e-3 / (1.0 + step as f64)).unwrap();
        for micro in 0..2 {
            let mut grads = random(vars, 2 * step + micro);
            if step == 1 {
                grads.remove(&vars["c"]);
            }
            gradients.add(&mut grads, 0.5).unwrap();
        }
        gradients.clip(100.0).unwrap();
        assert!(matches!(optimizer.step(&mut gradients).unwrap(), Step::Applied { .. }));
    }
}

#[test]
fn a_saved_run_continues_to_the_bit() {
    let config = AdamWConfig { weight_decay: 0.01, ..AdamWConfig::new(1e-3) };
    let whole = some_vars();
    let mut optimizer = AdamW::new(&whole, config).unwrap();
    train(&whole, &mut optimizer, 0..6);

    let first = some_vars();
    let mut half = AdamW::new(&first, config).unwrap();
    train(&first, &mut half, 0..3);
    let dir = tempfile::tempdir().unwrap();
    let (model, state) = (dir.path().join("model"), dir.path().join("state"));
    let tensors = first.iter().map(|(n, v)| (n.clone(), v.as_detached_tensor())).collect();
    write_safetensors(&model, &tensors, None).unwrap();
    write_safetensors(&state, &half.state_view().unwrap(), None).unwrap();
    // A copy does not follow.
    let copy = half.state().unwrap();
    let kept = bits(&copy["b.m"]);
    train(&first, &mut half, 3..4);
    assert_eq!(bits(&copy["b.m"]), kept);

    let second: Vars =
        read(&model).into_iter().map(|(n, t)| (n, Var::from_tensor(&t).unwrap())).collect();
    let mut resumed = AdamW::new(&second, config).unwrap();
    resumed.load_state(&read(&state).into_iter().collect()).unwrap();
    assert_eq!(resumed.steps(), 3);
    train(&second, &mut resumed, 3..6);
    assert_eq!(all_bits(&second), all_bits(&whole));
    let (a, b) = (resumed.state().unwrap(), optimizer.state().unwrap());
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let count = |name: &str| a[name].to_scalar::<i64>().unwrap();
    assert_eq!((count("step"), count("b.step"), count("c.step")), (6, 6, 5));
    for name in ["a.m", "a.v", "b.m", "b.v", "c.m", "c.v"] {
        assert_eq!(bits(&a[name]), bits(&b[name]), "{name}");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let vars = BTreeMap::from([("w".to_owned(), var(1, &[123_457]))]);
            let mut optimizer = AdamW::new(&vars, AdamWConfig::new(1e-3)).unwrap();
            let mut gradients = Gradients::new(&vars, Missing::Refuse).unwrap();
            let mut norms = Vec::new();
            for step in 0..3 {
                gradients.add(&mut random(&vars, step), 0.3).unwrap();
                gradients.add(&mut random(&vars, step + 10), 0.7).unwrap();
                norms.push(gradients.clip(1.0).unwrap().to_bits());
                let _ = optimizer.step(&mut gradients).unwrap();
            }
            (norms, all_bits(&vars))
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(3));
}

#[test]
fn the_composed_update_is_the_fused_one() {
    for (beta1, count) in [(0.9, 40_000), (0.2, 1000)] {
        let hyper = Hyper {
            lr: 1e-2,
            beta1,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.1,
            gradient_scale: 0.37,
        };
        let make = || {
            let moment = || Var::zeros(count, DType::F32, &Device::Cpu).unwrap();
            (var(1, &[count]), moment(), moment())
        };
        let ((p, m, v), (q, n, w)) = (make(), make());
        for step in 1..=3 {
            let g = var(step + 1, &[count]).detach();
            adamw::update_var(&p, &g, &m, &v, &hyper, step).unwrap();
            adamw::update_composed(&q, &g, &n, &w, &hyper, step).unwrap();
        }
        for (fused, composed) in [(&p, &q), (&m, &n), (&v, &w)] {
            assert_eq!(f32s(fused), f32s(composed));
        }
    }
}

#[test]
fn the_tensor_functions_take_any_layout() {
    let x = var(1, &[30, 50]).detach();
    let turned = x.t().unwrap();
    let half = adamw::take_scaled(turned.clone(), 0.5).unwrap();
    assert!(half.is_contiguous());
    assert_eq!(f32s(&half), f32s(&(&turned * 0.5).unwrap()));
    let row = adamw::take_scaled(x.narrow(0, 3, 1).unwrap(), 2.0).unwrap();
    assert_eq!(f32s(&row), f32s(&(x.narrow(0, 3, 1).unwrap() * 2.0).unwrap()));
    assert_eq!(bits(&x), bits(&var(1, &[30, 50])), "a view was scaled in place");
    let sum = adamw::add_scaled(half.copy().unwrap(), &turned, -0.25).unwrap();
    assert_eq!(f32s(&sum), f32s(&(&turned * 0.25).unwrap()));
    let squares = f32s(&x).iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    for view in [&x, &turned] {
        assert!((adamw::squared_norm_of(view).unwrap() / squares - 1.0).abs() < 1e-12);
    }
    let (short, long) = (&mut [0.0_f32; 2], &[0.0_f32; 3]);
    assert!(adamw::accumulate(short, long, 1.0).is_err());
}

#[test]
fn errors_name_what_is_wrong() {
    let vars = some_vars();
    let says = |error: Error, parts: &[&str]| {
        let message = error.to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    let mut gradients = Gradients::new(&vars, Missing::Refuse).unwrap();
    let mut optimizer = AdamW::new(&vars, AdamWConfig::new(1e-3)).unwrap();

    let mut grads = random(&vars, 1);
    grads.remove(&vars["b"]);
    says(gradients.add(&mut grads, 1.0).unwrap_err(), &["b: ", "no gradient"]);
    assert!(gradients.is_empty() && grads.get(&vars["a"]).is_some(), "half a batch was added");
    grads.insert(&vars["b"], Tensor::zeros((200, 300), DType::F32, &Device::Cpu).unwrap());
    says(gradients.add(&mut grads, 1.0).unwrap_err(), &["b: ", "[300, 200]", "[200, 300]"]);
    says(gradients.add(&mut grads, f64::NAN).unwrap_err(), &["scale: "]);
    says(optimizer.step(&mut gradients).unwrap_err(), &["gradients: ", "empty"]);
    let mut others = Gradients::new(&some_vars(), Missing::Refuse).unwrap();
    says(optimizer.step(&mut others).unwrap_err(), &["gradients: "]);

    let double = Var::from_tensor(&normal(1, &[3])).unwrap();
    let with = |name: &str, var: &Var| {
        let mut vars = vars.clone();
        vars.insert(name.to_owned(), var.clone());
        vars
    };
    for (vars, parts) in [
        (with("unet.double", &double), ["unet.double: ", "f32", "F64"]),
        (with("twice", &vars["b"]), ["twice: ", "same variable", "'b'"]),
    ] {
        says(AdamW::new(&vars, AdamWConfig::new(1e-3)).unwrap_err(), &parts);
        says(Gradients::new(&vars, Missing::Allow).unwrap_err(), &parts);
    }

    let good = optimizer.state().unwrap();
    let mut state = good.clone();
    state.remove("a.v");
    state.remove("c.step");
    state.insert("b.m".to_owned(), Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap());
    state.insert("step".to_owned(), Tensor::new(-1_i64, &Device::Cpu).unwrap());
    state.insert("d.m".to_owned(), good["a.m"].clone());
    let parts = [
        "a.v is missing",
        "c.step is missing",
        "b.m: ",
        "[300, 200]",
        "[2, 2]",
        "step: ",
        "d.m is",
    ];
    says(optimizer.load_state(&state).unwrap_err(), &parts);
    optimizer.load_state(&good).unwrap();

    says(optimizer.set_lr(-1.0).unwrap_err(), &["lr: ", "-1"]);
    assert_eq!(optimizer.config().lr, 1e-3);
    let config = |text: &str| serde_json::from_str::<AdamWConfig>(text);
    assert_eq!(config(r#"{"lr": 0.001}"#).unwrap(), AdamWConfig::new(1e-3));
    assert!(config("{}").unwrap_err().to_string().contains("lr"));
    assert!(config(r#"{"lr": 1, "beta": 1}"#).unwrap_err().to_string().contains("beta"));
    let bad = AdamWConfig { beta2: 1.0, ..AdamWConfig::new(1e-3) };
    says(AdamW::new(&vars, bad).unwrap_err(), &["beta2: ", "below 1"]);
    let bad = AdamWConfig { eps: 0.0, ..AdamWConfig::new(1e-3) };
    says(AdamW::new(&vars, bad).unwrap_err(), &["eps: "]);
}
