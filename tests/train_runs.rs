//! Whole training runs on the shipped model: interrupted and resumed to the bit, exported, and
//! better by the reward that they train on.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::read;
use diffusion_sharpening::data::images::ImageSource;
use diffusion_sharpening::data::prompts::PromptSource;
use diffusion_sharpening::data::scenes::Split;
use diffusion_sharpening::train::run::{Outcome, run};
use diffusion_sharpening::train::settings::{
    ExportType, Method, Renoise, Score, Settings, Trained,
};
use diffusion_sharpening::train::setup::Setup;
use diffusion_sharpening::util::CancelToken;

/// A method and what its settings differ in.
type Case = (Method, fn(&mut Settings));

fn small(method: Method) -> Settings {
    Settings {
        model: Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny").display().to_string(),
        steps: 4,
        batch: 2,
        n: 2,
        m: 2,
        rank: 4,
        warmup: 2,
        chain_guidance: 1.0,
        score: Score::Chain,
        rollout_steps: 3,
        rollout_reuse: 1,
        data: Some(ImageSource::Scenes { split: Split::Train, count: 12, seed: 3 }),
        prompts: Some(PromptSource::Scenes { split: Split::Train, count: 12 }),
        validate_every: 0,
        ..Settings::from(method)
    }
}

fn go(method: Method, settings: Settings, out: &Path, cancel: &CancelToken) -> Outcome {
    let settings = Settings { out: Some(out.display().to_string()), ..settings };
    run(&Setup::open(method, settings).unwrap(), cancel, true).unwrap()
}

/// All tensors of a run's checkpoint, as bits.
fn bits(out: &Path, step: u64) -> BTreeMap<String, Vec<u8>> {
    let folder = out.join("checkpoints").join(format!("step-{step:06}"));
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            for (key, tensor) in read(&path) {
                let tensor = tensor.flatten_all().unwrap();
                let bytes = match tensor.dtype() {
                    candle_core::DType::F32 => tensor
                        .to_vec1::<f32>()
                        .unwrap()
                        .iter()
                        .flat_map(|v| v.to_le_bytes())
                        .collect(),
                    other => format!("{other:?} {tensor}").into_bytes(),
                };
                found.insert(format!("{name}/{key}"), bytes);
            }
        }
    }
    assert!(found.len() > 10);
    found
}

fn metrics(out: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn compare_runs(whole: &Path, parts: &Path, step: u64) {
    let (a, b) = (bits(whole, step), bits(parts, step));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, bits) in &a {
        assert!(b[name] == *bits, "{name} differs");
    }
    // Each step once, with the same numbers.
    let numbers = |out: &Path| {
        let keep = |line: serde_json::Value| {
            let mut line = line.as_object().unwrap().clone();
            line.retain(|key, _| key != "time" && !key.starts_with("seconds/"));
            line
        };
        metrics(out).into_iter().map(keep).collect::<Vec<_>>()
    };
    assert_eq!(numbers(whole), numbers(parts));
}

#[test]
fn a_resumed_run_has_the_bits_of_one_that_was_not_interrupted() {
    let cases: [Case; 3] = [
        (Method::Rlhf, |s| {
            // What a checkpoint must carry besides weights and moments.
            (s.rollout_reuse, s.ema, s.reference_refresh) = (2, 0.9, 3);
            (s.score, s.m) = (Score::Sample, 1);
        }),
        (Method::Sft, |s| s.flip = true),
        (Method::Rlhf, |s| (s.train, s.renoise) = (Trained::Full, Renoise::Reuse)),
    ];
    for (method, change) in cases {
        let mut settings = small(method);
        change(&mut settings);
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| -> PathBuf { folder.path().join(name) };
        let never = CancelToken::default();
        let outcome = go(method, settings.clone(), &at("whole"), &never);
        assert!(outcome.finished && outcome.exported.exists());
        for steps in [1, 3, 4] {
            go(method, Settings { steps, ..settings.clone() }, &at("parts"), &never);
        }
        compare_runs(&at("whole"), &at("parts"), 4);
    }
}

/// Stopped at any moment, a run is as it was after its last whole update.
#[test]
fn a_run_that_is_cancelled_goes_on_to_the_same_bits() {
    let settings = small(Method::Rlhf);
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { folder.path().join(name) };
    go(Method::Rlhf, settings.clone(), &at("whole"), &CancelToken::default());
    let mut stops = 0;
    loop {
        let cancel = CancelToken::default();
        let raised = cancel.clone();
        let timer = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(400 + 350 * stops));
            raised.cancel();
        });
        let outcome = go(Method::Rlhf, settings.clone(), &at("parts"), &cancel);
        timer.join().unwrap();
        if outcome.finished {
            break;
        }
        stops += 1;
        assert!(stops < 40, "the run makes no progress");
    }
    compare_runs(&at("whole"), &at("parts"), 4);
}

#[test]
fn a_folder_with_another_run_is_refused_by_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { steps: 1, ..small(Method::Rlhf) };
    go(Method::Rlhf, settings.clone(), folder.path(), &CancelToken::default());
    let other = Settings {
        beta: 7.0,
        steps: 2,
        out: Some(folder.path().display().to_string()),
        ..settings
    };
    let setup = Setup::open(Method::Rlhf, other).unwrap();
    let error = run(&setup, &CancelToken::default(), true).unwrap_err().to_string();
    assert!(error.contains("beta") && error.contains("7.0") && !error.contains("steps"), "{error}");
}

/// A run that begins with another's adapter begins with its weights, and in RLHF compares with them.
#[test]
fn a_run_goes_on_from_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { folder.path().join(name) };
    let never = CancelToken::default();
    let exported = |settings: &mut Settings| {
        (settings.ema, settings.export_dtype) = (0.0, ExportType::F32);
        settings.warmup = 0;
    };
    let mut first = Settings { steps: 2, lr: 1e-2, alpha: Some(8.0), ..small(Method::Sft) };
    exported(&mut first);
    let adapter = go(Method::Sft, first, &at("first"), &never).exported;

    let mut second = Settings { steps: 1, ..small(Method::Rlhf) };
    exported(&mut second);
    second.adapter = Some(adapter.display().to_string());
    let still = Settings { lr: 0.0, ..second.clone() };
    let same = go(Method::Rlhf, still, &at("same"), &never).exported;
    let product = |path: &Path| {
        let tensors = read(path);
        let modules = tensors.keys().filter_map(|k| k.strip_suffix(".lora_down.weight"));
        let module = modules.min().unwrap();
        let of = |end: &str| tensors[&format!("{module}.{end}")].flatten_all().unwrap();
        let alpha = f64::from(of("alpha").to_vec1::<f32>().unwrap()[0]);
        (of("lora_up.weight").to_vec1::<f32>().unwrap(), alpha)
    };
    let ((a, alpha_a), (b, alpha_b)) = (product(&adapter), product(&same));
    assert!(a.iter().any(|v| *v != 0.0));
    assert_eq!((alpha_a, alpha_b), (8.0, 4.0));
    let close = |(a, b): (&f32, &f32)| (2.0 * a - b).abs() <= 1e-6 * b.abs();
    assert!(a.iter().zip(&b).all(close), "the same update with the scale of the second run");

    // The first update of RLHF begins at its reference.
    go(Method::Rlhf, second.clone(), &at("on"), &never);
    let loss = metrics(&at("on"))[0]["train/loss"].as_f64().unwrap();
    assert!((loss - std::f64::consts::LN_2).abs() < 1e-4, "{loss}");

    let out = Some(at("other").display().to_string());
    let other = Settings { rank: 3, out, ..second };
    let error = run(&Setup::open(Method::Rlhf, other).unwrap(), &never, true).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("adapter.safetensors") && error.contains("rank"), "{error}");
}
