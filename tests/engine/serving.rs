//! What a server needs: requests that go together step by step, and models that come and go.

use std::sync::Barrier;

use diffusion_sharpening::engine::Progress;

use super::*;

#[test]
fn requests_go_together_and_find_what_they_find_alone() {
    let (dir, engine) = engine();
    let model = dir.path().join(&engine.models()[0].id);
    let folder = ModelFolder::adapters_of(&model);
    std::fs::create_dir_all(&folder).unwrap();
    write_adapter(
        &folder.join("other.safetensors"),
        &model,
        &["mid_block.attentions.0.proj_in"],
        3,
    );
    engine.load_adapter(&engine.models()[0].id, "other").unwrap();
    let steps = Some(12);
    let requests = [
        GenerateRequest { steps, ..request() },
        GenerateRequest { steps, seed: Some(8), guidance_scale: Some(1.0), ..request() },
        GenerateRequest {
            seed: Some(9),
            method: method("best-of-n", json!({"candidates": 2})),
            steps: Some(5),
            ..request()
        },
        GenerateRequest { steps, seed: Some(10), solver: Some("euler".into()), ..request() },
        GenerateRequest { steps, adapter: Some("other".into()), ..request() },
        GenerateRequest { steps, seed: Some(11), alone: Some(true), ..request() },
    ];
    let alone: Vec<Generation> = requests.iter().map(|r| run(&engine, r)).collect();
    let barrier = Barrier::new(requests.len());
    let together: Vec<Generation> = std::thread::scope(|scope| {
        let (engine, barrier) = (&engine, &barrier);
        let start = |request| {
            scope.spawn(move || {
                barrier.wait();
                run(engine, request)
            })
        };
        let threads: Vec<_> = requests.iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let joint = |generation: &Generation| {
        let entries = generation.trace.iter().filter(|entry| entry["together"].is_object());
        entries.map(|entry| entry["together"]["joint"].as_u64().unwrap()).sum::<u64>()
    };
    for (one, other) in alone.iter().zip(&together) {
        assert_eq!(pixels(one), pixels(other), "{:?}", other.resolved);
        assert_eq!(one.cost.actual.units, other.cost.actual.units);
        assert_eq!(joint(one), 0);
    }
    assert!(together[..4].iter().map(joint).sum::<u64>() > 0, "nobody went with another");
    // Another network is never in the same batch, nor who wants to be alone.
    assert_eq!(joint(&together[4]) + joint(&together[5]), 0);
    assert!(together[5].resolved.alone);
}

#[test]
fn models_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let parity = fixtures().join("parity");
    copy_dir(&parity.join("ddim_tiny"), &dir.path().join("b-ddim"));
    copy_dir(&parity.join("dpm_v"), &dir.path().join("a-dpm"));
    let only = ["b-ddim".to_owned()];
    let engine = Engine::open_some(dir.path(), &Placement::cpu(DType::F32), &only).unwrap();
    let ids = || engine.models().into_iter().map(|m| m.id).collect::<Vec<String>>();
    assert_eq!((ids(), engine.unloaded()), (vec!["b-ddim".to_owned()], vec!["a-dpm".to_owned()]));
    let first = || GenerateRequest { model: Some("a-dpm".into()), ..request() };
    assert_eq!(refusal(&engine, &first()).to_string(), "model: 'a-dpm' is not loaded");
    let planned = engine.plan(&request()).unwrap();
    assert_eq!(engine.load("a-dpm", &mut |_, _| Ok(())).unwrap().id, "a-dpm");
    assert_eq!(ids(), ["a-dpm", "b-ddim"]);
    assert_eq!(run(&engine, &first()).model.id, "a-dpm");
    // What is there is read anew: other weights have another hash.
    let before = engine.models()[1].sha256.clone();
    std::fs::remove_dir_all(dir.path().join("b-ddim")).unwrap();
    copy_dir(&parity.join("dpm_v"), &dir.path().join("b-ddim"));
    // One that fails when it is tried out is not served.
    let mut seen = Vec::new();
    let failed = engine.load("b-ddim", &mut |alone, model| {
        seen.push((alone.models()[0].sha256.clone(), model.sha256.clone()));
        let other = alone.plan(&first()).unwrap_err().to_string();
        Err(Error::invalid("tried", other))
    });
    assert!(failed.unwrap_err().to_string().starts_with("tried: "));
    assert!(seen[0].0 == seen[0].1 && seen[0].0 != before);
    assert_eq!(engine.models()[1].sha256, before);
    let mut served = Vec::new();
    let loaded = engine.load("b-ddim", &mut |alone, model| {
        served.push(run(alone, &request()).model.id);
        assert_eq!((model.id.as_str(), engine.models()[1].sha256.as_str()), ("b-ddim", &*before));
        Ok(())
    });
    assert_ne!(loaded.unwrap().sha256, before);
    assert_eq!(served, ["b-ddim"]);
    // A broken one leaves what was there.
    std::fs::remove_file(dir.path().join("a-dpm/scheduler/scheduler_config.json")).unwrap();
    assert_names(
        &engine.load("a-dpm", &mut |_, _| Ok(())).unwrap_err().to_string(),
        &["scheduler_config.json"],
    );
    assert_eq!(run(&engine, &first()).model.id, "a-dpm");
    engine.unload("b-ddim").unwrap();
    assert_eq!((ids(), engine.unloaded()), (vec!["a-dpm".to_owned()], vec!["b-ddim".to_owned()]));
    let error = engine.generate(&planned, &CancelToken::default(), &mut |_| {}).unwrap_err();
    assert_eq!(error.to_string(), "model: 'b-ddim' is not loaded");
    for id in ["c", "../a-dpm", "a-dpm/..", "", "."] {
        assert_names(
            &engine.load(id, &mut |_, _| Ok(())).unwrap_err().to_string(),
            &["model", "a-dpm, b-ddim"],
        );
        assert!(engine.unload(id).is_err());
    }
    engine.unload("a-dpm").unwrap();
    assert_eq!(refusal(&engine, &request()).to_string(), "model: none is loaded");
}

#[test]
fn adapters_come_and_go() {
    let (dir, engine) = engine();
    let id = engine.models()[0].id.clone();
    let model = dir.path().join(&id);
    let folder = ModelFolder::adapters_of(&model);
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("new.safetensors");
    let adapted = || GenerateRequest { adapter: Some("new".into()), ..request() };
    assert!(matches!(engine.load_adapter(&id, "new").unwrap_err(), Error::Unknown { .. }));
    write_adapter(&file, &model, &["mid_block.attentions.0.proj_in"], 3);
    assert_names(&refusal(&engine, &adapted()).to_string(), &["adapter", "new"]);
    engine.load_adapter(&id, "new").unwrap();
    assert_eq!(engine.models()[0].adapters, ["new"]);
    let first = pixels(&run(&engine, &adapted()));
    assert_ne!(first, pixels(&run(&engine, &request())));
    write_adapter(&file, &model, &["mid_block.attentions.0.proj_in"], 4);
    assert_eq!(pixels(&run(&engine, &adapted())), first, "as it was read");
    engine.load_adapter(&id, "new").unwrap();
    assert_ne!(pixels(&run(&engine, &adapted())), first);
    engine.unload_adapter(&id, "new").unwrap();
    assert!(engine.models()[0].adapters.is_empty());
    assert_names(&refusal(&engine, &adapted()).to_string(), &["adapter", "new"]);
    assert!(engine.unload_adapter(&id, "new").is_err());
    for name in ["../new", "/new", ""] {
        assert!(matches!(engine.load_adapter(&id, name).unwrap_err(), Error::Unknown { .. }));
    }
}

#[test]
fn previews_cost_what_is_planned_and_change_nothing() {
    let (_dir, engine) = engine();
    for (name, params) in [("plain", json!({})), ("best-of-n", json!({"candidates": 5}))] {
        let plain = GenerateRequest { method: method(name, params), n: Some(2), ..request() };
        let watched = GenerateRequest { previews: Some(2), ..plain.clone() };
        let (without, mut seen) = (run(&engine, &plain), Vec::new());
        let planned = engine.plan(&watched).unwrap();
        let token = CancelToken::default();
        let mut note = |p: Progress| seen.extend(p.preview.map(|p| (p.image, p.f)));
        let with = engine.generate(&planned, &token, &mut note).unwrap();
        assert_eq!(pixels(&with), pixels(&without));
        let (cost, plain_cost) = (with.cost.actual.units, without.cost.actual.units);
        assert_eq!(cost, planned.cost);
        assert_eq!(cost, Units { y: plain_cost.y + 4, ..plain_cost });
        let each = plain_cost.f / 2;
        let at: Vec<_> = with.previews.iter().map(|p| (p.image, p.f)).collect();
        assert_eq!(at, seen);
        assert_eq!(at.iter().map(|(image, _)| *image).collect::<Vec<_>>(), [0, 0, 1, 1]);
        for preview in &with.previews {
            assert_eq!(preview.of, each);
            assert!(preview.f > 0 && preview.f <= each, "{}", preview.f);
            assert_eq!(preview.scores.keys().collect::<Vec<_>>(), ["judge"]);
            assert_eq!(preview.pixels.dimensions(), with.images[0].pixels.dimensions());
        }
    }
    let refused = |previews, budget| {
        let request = GenerateRequest { previews: Some(previews), budget, ..request() };
        refusal(&engine, &request).to_string()
    };
    assert_names(&refused(17, None), &["previews", "0 to 16"]);
    let many = GenerateRequest { previews: Some(16), ..request() };
    let planned = engine.plan(&many).unwrap();
    assert_eq!((planned.resolved.previews, planned.cost.y), (2, 3), "three steps, and the image");
    let y = |y| Some(BudgetRequest::Full(Budget { y: Some(y), ..Budget::default() }));
    assert_names(&refused(2, y(2)), &["budget", "y"]);
    assert_names(&refused(2, y(1)), &["budget", "2 previews"]);
}
