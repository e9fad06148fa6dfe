//! The in-process engine on a small random checkpoint.

mod common;
#[path = "engine/serving.rs"]
mod serving;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::{assert_names, copy_dir, fixtures, low_rank, model_copy};
use diffusion_sharpening::Error;
use diffusion_sharpening::diffusion::cost::{Budget, Units};
use diffusion_sharpening::engine::request::{
    BudgetRequest, GenerateRequest, Generation, MethodRequest,
};
use diffusion_sharpening::engine::{Backend, CancelToken, Engine};
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::ModelFolder;
use diffusion_sharpening::sdxl::weights::write_safetensors;
use serde_json::{Map, Value, json};

const STEPS: u64 = 3;

fn engine() -> (tempfile::TempDir, Engine) {
    let (dir, _) = model_copy("ddim_tiny");
    let engine = Engine::open(dir.path(), &Placement::cpu(DType::F32)).unwrap();
    (dir, engine)
}

fn request() -> GenerateRequest {
    GenerateRequest {
        prompt: "a red circle left of a blue square".into(),
        seed: Some(7),
        steps: Some(STEPS as u32),
        ..GenerateRequest::default()
    }
}

fn method(name: &str, params: Value) -> Option<MethodRequest> {
    let params: Map<String, Value> = params.as_object().unwrap().clone();
    Some(MethodRequest::Full { name: name.into(), params })
}

fn run(engine: &dyn Backend, request: &GenerateRequest) -> Generation {
    let planned = engine.plan(request).unwrap();
    engine.generate(&planned, &CancelToken::default(), &mut |_| {}).unwrap()
}

fn pixels(generation: &Generation) -> Vec<Vec<u8>> {
    generation.images.iter().map(|i| i.pixels.as_raw().clone()).collect()
}

fn refusal(engine: &Engine, request: &GenerateRequest) -> Error {
    match engine.plan(request) {
        Ok(planned) => panic!("was planned: {:?}", planned.resolved),
        Err(error) => error,
    }
}

#[test]
fn what_is_planned_is_what_is_spent() {
    let (_dir, engine) = engine();
    let units = |f, v, y| Units { f, v, y, l: 0 };
    let budget = |f| Some(BudgetRequest::Forwards(f));
    for (what, request, expected) in [
        ("plain", request(), units(2 * STEPS, 1, 1)),
        (
            "no guidance",
            GenerateRequest { guidance_scale: Some(1.0), ..request() },
            units(STEPS, 1, 1),
        ),
        ("three images", GenerateRequest { n: Some(3), ..request() }, units(6 * STEPS, 3, 3)),
        (
            "heun",
            GenerateRequest { solver: Some("heun".into()), ..request() },
            units(2 * (2 * STEPS - 1), 1, 1),
        ),
        (
            "sde",
            GenerateRequest { method: method("plain", json!({"kernel": "sde"})), ..request() },
            units(6, 1, 1),
        ),
        (
            "plain, searched",
            GenerateRequest { reward: Some("judge".into()), ..request() },
            units(6, 1, 1),
        ),
        (
            "best of 3",
            GenerateRequest { method: method("best-of-n", json!({"candidates": 3})), ..request() },
            units(6 * STEPS, 3, 3),
        ),
        (
            "best of what 40 buys",
            GenerateRequest {
                method: method("best-of-n", json!({})),
                budget: budget(40),
                ..request()
            },
            units(6 * 6, 6, 6),
        ),
        (
            "best of 2, sde, two images",
            GenerateRequest {
                method: method("best-of-n", json!({"candidates": 2, "kernel": "sde"})),
                reward: Some("judge".into()),
                n: Some(2),
                ..request()
            },
            units(24, 4, 4),
        ),
    ] {
        let planned = engine.plan(&request).unwrap();
        assert_eq!(planned.cost, expected, "{what}");
        let mut last = Units::default();
        let mut events = 0;
        let mut progress = |p: diffusion_sharpening::engine::Progress| {
            assert!(p.spent.f >= last.f && p.spent.f <= p.planned.f, "{what}");
            last = p.spent;
            events += 1;
        };
        let made = engine.generate(&planned, &CancelToken::default(), &mut progress).unwrap();
        assert_eq!(made.cost.actual.units, expected, "{what}");
        assert_eq!(made.cost.planned, expected, "{what}");
        assert_eq!(last.f, expected.f, "{what}");
        assert!(events >= STEPS, "{what}");
        assert_eq!(made.resolved, planned.resolved, "{what}");
        assert!(made.images.iter().all(|i| i.scores["judge"].is_some()), "{what}");
        for stage in ["text", "unet", "vae_decode", "reward"] {
            assert!(made.cost.actual.seconds.contains_key(stage), "{what}: {stage}");
        }
    }
}

#[test]
fn everything_is_resolved_and_repeats_itself() {
    let (_dir, engine) = engine();
    let made = run(&engine, &request());
    let resolved = &made.resolved;
    assert_eq!((resolved.width, resolved.height), (16, 16));
    assert_eq!((resolved.model.as_str(), resolved.solver.as_str()), ("model", "ddim"));
    assert_eq!(resolved.method["name"], "plain");
    assert_eq!(resolved.method["kernel"], "ode");
    assert_eq!(made.images[0].pixels.dimensions(), (16, 16));
    assert_eq!(made.model.sha256, engine.models()[0].sha256);
    assert_eq!(
        pixels(&run(&engine, &request())),
        pixels(&made),
        "the same seed gave another image"
    );
    let other = GenerateRequest { seed: Some(8), ..request() };
    assert_ne!(pixels(&run(&engine, &other)), pixels(&made));
    // Without a seed one is drawn and reported.
    let drawn = run(&engine, &GenerateRequest { seed: None, ..request() });
    let again = GenerateRequest { seed: Some(drawn.resolved.seed), ..request() };
    assert_eq!(pixels(&run(&engine, &again)), pixels(&drawn));
}

#[test]
fn several_images_are_the_seeds_in_turn() {
    let (_dir, engine) = engine();
    let both = run(&engine, &GenerateRequest { n: Some(2), ..request() });
    let seeds: Vec<u64> = both.images.iter().map(|i| i.seed).collect();
    assert_eq!(seeds, [7, 8]);
    let alone = [7, 8]
        .map(|seed| pixels(&run(&engine, &GenerateRequest { seed: Some(seed), ..request() })));
    assert_eq!(pixels(&both), alone.concat());
    assert_ne!(alone[0], alone[1]);
    // The largest seed wraps.
    let last = run(&engine, &GenerateRequest { seed: Some(u64::MAX), n: Some(2), ..request() });
    assert_eq!(last.images[1].seed, 0);
}

#[test]
fn best_of_n_begins_with_the_plain_image() {
    let (_dir, engine) = engine();
    for kernel in ["ode", "sde"] {
        let plain =
            GenerateRequest { method: method("plain", json!({"kernel": kernel})), ..request() };
        let plain = run(&engine, &plain);
        let best = |n: u64| {
            let method = method("best-of-n", json!({"candidates": n, "kernel": kernel}));
            run(&engine, &GenerateRequest { method, reward: Some("judge".into()), ..request() })
        };
        let one = best(1);
        assert_eq!(pixels(&one), pixels(&plain), "{kernel}: best of 1 is not plain");
        assert_eq!(one.images[0].scores, plain.images[0].scores);
        let score = |g: &Generation| g.images[0].scores["judge"].unwrap();
        let mut before = score(&one);
        for n in [2, 5, 9] {
            let more = best(n);
            let first = more.trace.iter().find(|e| e["candidate"] == 0).unwrap();
            let drift = (first["score"].as_f64().unwrap() - score(&plain)).abs();
            assert!(drift < 1e-9, "{kernel}: candidate 0 of {n} scores {drift:e} off plain");
            assert!(score(&more) >= before, "{kernel}: more candidates made it worse");
            if score(&more) == score(&one) {
                // Ties go to the first, which does not depend on its company.
                assert_eq!(pixels(&more), pixels(&plain), "{kernel}: best of {n}");
            }
            println!("{kernel} best of {n}: {}", score(&more));
            before = score(&more);
        }
    }
}

#[test]
fn every_choice_changes_the_image() {
    let (_dir, engine) = engine();
    let base = pixels(&run(&engine, &request()));
    let mut seen = vec![("base", base)];
    for (what, request) in [
        ("prompt", GenerateRequest { prompt: "three dotted stars".into(), ..request() }),
        ("negative", GenerateRequest { negative_prompt: Some("a blue ring".into()), ..request() }),
        ("guidance 1", GenerateRequest { guidance_scale: Some(1.0), ..request() }),
        ("guidance 9", GenerateRequest { guidance_scale: Some(9.0), ..request() }),
        ("rescale", GenerateRequest { guidance_rescale: Some(0.7), ..request() }),
        ("steps", GenerateRequest { steps: Some(4), ..request() }),
        ("euler", GenerateRequest { solver: Some("euler".into()), ..request() }),
        ("heun", GenerateRequest { solver: Some("heun".into()), ..request() }),
        ("sde", GenerateRequest { method: method("plain", json!({"kernel": "sde"})), ..request() }),
        ("size", GenerateRequest { width: Some(20), height: Some(14), ..request() }),
    ] {
        let image = pixels(&run(&engine, &request));
        if what == "size" {
            assert_eq!(image[0].len(), 20 * 14 * 3);
        }
        for (other, pixels) in &seen {
            assert_ne!(pixels, &image, "{what} and {other} are one image");
        }
        seen.push((what, image));
    }
    // This checkpoint's null prompt is the encoding of "".
    let empty = GenerateRequest { negative_prompt: Some(String::new()), ..request() };
    assert_eq!(pixels(&run(&engine, &empty)), seen[0].1);
    // Without guidance a negative prompt has no part.
    let ignored = GenerateRequest {
        negative_prompt: Some("a blue ring".into()),
        guidance_scale: Some(1.0),
        ..request()
    };
    assert_eq!(pixels(&run(&engine, &ignored)), seen[3].1);
}

#[test]
fn refusals_name_the_field() {
    let (_dir, engine) = engine();
    let text = |s: &str| Some(s.to_owned());
    let few = Budget { v: Some(0), ..Budget::default() };
    for (request, parts) in [
        (GenerateRequest { model: text("nope"), ..request() }, ["model", "nope"]),
        (GenerateRequest { adapter: text("nope"), ..request() }, ["adapter", "nope"]),
        (
            GenerateRequest { method: Some(MethodRequest::Name("nope".into())), ..request() },
            ["method", "plain"],
        ),
        (GenerateRequest { reward: text("nope"), ..request() }, ["reward", "judge"]),
        (GenerateRequest { solver: text("nope"), ..request() }, ["solver", "dpmpp-2m"]),
        (GenerateRequest { steps: Some(0), ..request() }, ["steps", "1"]),
        (GenerateRequest { steps: Some(1001), ..request() }, ["steps", "1000"]),
        (GenerateRequest { n: Some(0), ..request() }, ["n:", "1"]),
        (GenerateRequest { n: Some(65), ..request() }, ["n:", "64"]),
        (GenerateRequest { width: Some(17), ..request() }, ["width", "multiple of 2"]),
        (GenerateRequest { height: Some(15), ..request() }, ["height", "multiple of 2"]),
        (GenerateRequest { width: Some(0), ..request() }, ["width", "0"]),
        (GenerateRequest { height: Some(5000), ..request() }, ["height", "4096"]),
        (
            GenerateRequest { guidance_scale: Some(f64::NAN), ..request() },
            ["guidance_scale", "NaN"],
        ),
        (GenerateRequest { guidance_scale: Some(-1.0), ..request() }, ["guidance_scale", "-1"]),
        (GenerateRequest { guidance_rescale: Some(1.5), ..request() }, ["guidance_rescale", "1.5"]),
        (
            GenerateRequest { method: method("plain", json!({"nope": 1})), ..request() },
            ["method.nope", "kernel"],
        ),
        (
            GenerateRequest { method: method("best-of-n", json!({"candidates": 0})), ..request() },
            ["method.candidates", "0"],
        ),
        (
            GenerateRequest { budget: Some(BudgetRequest::Forwards(5)), ..request() },
            ["6 needed", "5 allowed"],
        ),
        (
            GenerateRequest {
                method: method("best-of-n", json!({})),
                budget: Some(BudgetRequest::Forwards(5)),
                ..request()
            },
            ["6 needed", "5 allowed"],
        ),
        (
            GenerateRequest { budget: Some(BudgetRequest::Full(few)), ..request() },
            ["v: 1 needed", "0 allowed"],
        ),
    ] {
        assert_names(&refusal(&engine, &request).to_string(), &parts);
    }
    assert!(matches!(
        refusal(
            &engine,
            &GenerateRequest { budget: Some(BudgetRequest::Forwards(5)), ..request() }
        ),
        Error::Budget(_)
    ));
    assert!(matches!(
        refusal(&engine, &GenerateRequest { solver: text("nope"), ..request() }),
        Error::Unknown { .. }
    ));
    // Exactly enough is enough.
    let exact = GenerateRequest { budget: Some(BudgetRequest::Forwards(6)), ..request() };
    assert_eq!(run(&engine, &exact).cost.actual.units.f, 6);
}

#[test]
fn what_memory_cannot_hold_is_refused_before_it_runs() {
    let (_dir, engine) = engine();
    let engine = engine.with_memory(1 << 30);
    let large = GenerateRequest { width: Some(4096), height: Some(4096), ..request() };
    for (request, fits) in [
        (request(), true),
        (large.clone(), false),
        (GenerateRequest { guidance_scale: Some(1.0), ..large }, false),
    ] {
        match engine.plan(&request) {
            Ok(planned) => assert!(fits, "{:?} was planned", planned.resolved),
            Err(error) => {
                assert!(!fits && matches!(error, Error::InsufficientMemory(_)), "{error}");
                let parts = ["4096 x 4096 px", "there is 1.000 GiB", "U-Net forward"];
                assert_names(&error.to_string(), &parts);
            }
        }
    }
    assert_eq!(run(&engine, &request()).images.len(), 1);
    // Less than the weights take.
    let error = refusal(&engine.with_memory(1 << 10), &request());
    assert!(matches!(error, Error::InsufficientMemory(_)), "{error}");
}

#[test]
fn a_cancelled_request_stops() {
    let (_dir, engine) = engine();
    let cancelled = CancelToken::default();
    cancelled.cancel();
    let planned = engine.plan(&request()).unwrap();
    let result = engine.generate(&planned, &cancelled, &mut |_| panic!("went on"));
    assert!(matches!(result, Err(Error::Cancelled)));
    let long =
        GenerateRequest { method: method("best-of-n", json!({"candidates": 1000})), ..request() };
    let planned = engine.plan(&long).unwrap();
    let (token, mut steps) = (CancelToken::default(), 0);
    let result = engine.generate(&planned, &token, &mut |_| {
        steps += 1;
        token.cancel();
    });
    assert!(matches!(result, Err(Error::Cancelled)));
    assert_eq!(steps, 1, "went on after it was cancelled");
    // The engine is none the worse.
    assert_eq!(pixels(&run(&engine, &request())), pixels(&run(&engine, &request())));
}

fn write_adapter(path: &Path, model: &Path, modules: &[&str], seed: u64) {
    let folder = ModelFolder::open(model, &Placement::cpu(DType::F32)).unwrap();
    let mut tensors = BTreeMap::new();
    for module in modules {
        if let Some(tower) = module.strip_prefix("text_encoder") {
            let width = if tower.starts_with("_2") {
                folder.text_2.config()
            } else {
                folder.text_1.config()
            };
            let (down, up) = low_rank(seed, &[width.hidden_size, width.hidden_size], 2);
            tensors.insert(format!("{module}.lora_A.weight"), (down * 5.0).unwrap());
            tensors.insert(format!("{module}.lora_B.weight"), (up * 5.0).unwrap());
            continue;
        }
        let weight = &folder.unet_weights.tensors()[&format!("{module}.weight")];
        let (down, up) = low_rank(seed, weight.dims(), 2);
        tensors.insert(format!("unet.{module}.lora_A.weight"), down);
        tensors.insert(format!("unet.{module}.lora_B.weight"), up);
    }
    write_safetensors(path, &tensors, None).unwrap();
}

#[test]
fn adapters_are_listed_and_change_the_image() {
    let (dir, model) = model_copy("ddim_tiny");
    let folder = model.join("adapters");
    std::fs::create_dir(&folder).unwrap();
    let path = |name: &str| -> PathBuf { folder.join(name) };
    write_adapter(
        &path("warm.safetensors"),
        &model,
        &["mid_block.attentions.0.proj_in", "conv_in"],
        1,
    );
    write_adapter(&path("cold.safetensors"), &model, &["conv_out"], 2);
    let query = "text_model.encoder.layers.0.self_attn.v_proj";
    let [first, second] = ["text_encoder", "text_encoder_2"].map(|t| format!("{t}.{query}"));
    write_adapter(&path("words.safetensors"), &model, &[&first], 3);
    write_adapter(&path("more-words.safetensors"), &model, &[&second, "conv_out"], 2);
    std::fs::write(path("garbage.safetensors"), "not a safetensors file").unwrap();
    std::fs::write(path("notes.txt"), "no adapter").unwrap();
    let wrong = |module: &str, columns: usize| {
        let zeros = |r, c| Tensor::zeros((r, c), DType::F32, &Device::Cpu).unwrap();
        BTreeMap::from([
            (format!("unet.{module}.lora_A.weight"), zeros(2, columns)),
            (format!("unet.{module}.lora_B.weight"), zeros(12, 2)),
        ])
    };
    write_safetensors(
        &path("misfit.safetensors"),
        &wrong("mid_block.attentions.0.proj_in", 99),
        None,
    )
    .unwrap();
    write_safetensors(&path("stranger.safetensors"), &wrong("no.such.module", 12), None).unwrap();
    let engine = Engine::open(dir.path(), &Placement::cpu(DType::F32)).unwrap();
    let listed = &engine.models()[0].adapters;
    assert_eq!(listed, &["cold", "garbage", "misfit", "more-words", "stranger", "warm", "words"]);
    let with = |name: &str| GenerateRequest { adapter: Some(name.into()), ..request() };
    let plain = run(&engine, &request());
    let warm = run(&engine, &with("warm"));
    assert_eq!(warm.resolved.adapter.as_deref(), Some("warm"));
    assert_ne!(pixels(&warm), pixels(&plain));
    assert_ne!(pixels(&run(&engine, &with("cold"))), pixels(&warm));
    assert_eq!(pixels(&run(&engine, &with("warm"))), pixels(&warm), "the second use differs");
    // Adapters of the text towers: what they make of a prompt stays theirs.
    let words = run(&engine, &with("words"));
    assert_ne!(pixels(&words), pixels(&plain), "a text tower ignores its adapter");
    assert_ne!(pixels(&run(&engine, &with("more-words"))), pixels(&run(&engine, &with("cold"))));
    assert_eq!(pixels(&run(&engine, &request())), pixels(&plain), "the base's texts have changed");
    assert_eq!(pixels(&run(&engine, &with("words"))), pixels(&words));
    assert_eq!(pixels(&run(&engine, &request())), pixels(&plain), "the base has changed");
    for (name, part) in [
        ("garbage", "garbage.safetensors"),
        ("misfit", "mid_block.attentions.0.proj_in"),
        ("stranger", "no.such.module"),
    ] {
        let planned = engine.plan(&with(name)).unwrap();
        let error = engine.generate(&planned, &CancelToken::default(), &mut |_| {}).unwrap_err();
        assert_names(&error.to_string(), &[&format!("{name}.safetensors"), part]);
    }
}

#[test]
fn folders_of_models() {
    let dir = tempfile::tempdir().unwrap();
    let parity = fixtures().join("parity");
    copy_dir(&parity.join("ddim_tiny"), &dir.path().join("b-ddim"));
    copy_dir(&parity.join("dpm_v"), &dir.path().join("a-dpm"));
    std::fs::create_dir(dir.path().join("not-a-model")).unwrap();
    let engine = Engine::open(dir.path(), &Placement::cpu(DType::F32)).unwrap();
    let ids: Vec<String> = engine.models().into_iter().map(|m| m.id).collect();
    assert_eq!(ids, ["a-dpm", "b-ddim"]);
    // The first one is the default; both generate, each with its own solver and null prompt.
    let first = run(&engine, &request());
    assert_eq!((first.model.id.as_str(), first.resolved.solver.as_str()), ("a-dpm", "dpmpp-2m"));
    let second = run(&engine, &GenerateRequest { model: Some("b-ddim".into()), ..request() });
    assert_eq!((second.model.id.as_str(), second.resolved.solver.as_str()), ("b-ddim", "ddim"));
    // A checkpoint itself works in place of a folder of them.
    let one = Engine::open(&dir.path().join("b-ddim"), &Placement::cpu(DType::F32)).unwrap();
    assert_eq!(one.models()[0].id, "b-ddim");
    assert_eq!(pixels(&run(&one, &request())), pixels(&second));
    let names: Vec<String> = engine.rewards().into_iter().map(|r| r.name).collect();
    assert_eq!(names, ["judge"]);
    let names: Vec<String> = engine.methods().into_iter().map(|m| m.name).collect();
    assert!(names.contains(&"plain".to_owned()) && names.contains(&"best-of-n".to_owned()));
    for (folder, part) in [("not-a-model", "model_index.json"), ("absent", "absent")] {
        let Err(error) = Engine::open(&dir.path().join(folder), &Placement::cpu(DType::F32)) else {
            panic!("{folder} was opened")
        };
        assert_names(&error.to_string(), &[folder, part]);
    }
    std::fs::remove_file(dir.path().join("a-dpm/scheduler/scheduler_config.json")).unwrap();
    let Err(error) = Engine::open(dir.path(), &Placement::cpu(DType::F32)) else {
        panic!("opened without a scheduler")
    };
    assert_names(&error.to_string(), &["a-dpm", "scheduler_config.json"]);
}

#[test]
fn digests_say_where_two_runs_part() {
    let (_dir, engine) = engine();
    let recorded = |seed, n| {
        let request = GenerateRequest {
            seed: Some(seed),
            n: Some(n),
            digests: Some(true),
            method: method("best-of-n", json!({"candidates": 2})),
            ..request()
        };
        let entries = run(&engine, &request).trace.into_iter().filter(|e| e["digests"].is_array());
        entries.map(|e| e["digests"].as_array().unwrap().clone()).collect::<Vec<_>>()
    };
    let two = recorded(7, 2);
    // A guided prediction of each candidate at each step, image by image.
    assert_eq!(two.iter().map(Vec::len).collect::<Vec<_>>(), [6, 6]);
    assert_eq!(recorded(7, 1)[0], two[0]);
    assert_eq!(recorded(8, 1)[0], two[1]);
    assert!(two[0].iter().zip(&two[1]).all(|(a, b)| a != b));
    let plain = run(&engine, &request());
    assert!(plain.trace.iter().all(|entry| entry.get("digests").is_none()));
}
