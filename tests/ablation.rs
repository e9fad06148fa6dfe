//! `ds-bench ablation`: the shipped files, what cells are refused, and a small ablation on the
//! shipped model that is interrupted and continued.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diffusion_sharpening::bench::ablation::options::{Equal, Layer};
use diffusion_sharpening::bench::ablation::plan::Plan;
use diffusion_sharpening::bench::ablation::run::run as compute;
use diffusion_sharpening::bench::ablation::scores::Scores;
use diffusion_sharpening::bench::ablation::{Args, report, run};
use diffusion_sharpening::util::CancelToken;
use serde_json::{Value, json};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).into()
}

fn model() -> String {
    format!("model={}", root().join("models/tiny").display())
}

fn args(config: &Path, out: &Path, settings: &[&str]) -> Args {
    let own = model();
    let settings = settings.iter().chain([&own.as_str()]).map(|s| s.parse().unwrap()).collect();
    let layer = Layer { out: Some(out.into()), ..Layer::default() };
    Args { layer, config: config.into(), settings, quiet: true, ..Args::default() }
}

/// A plan of this text as its file.
fn plan(text: &str) -> Result<Plan, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.toml");
    std::fs::write(&file, text).unwrap();
    args(&file, folder.path(), &[]).plan().map_err(|e| e.to_string())
}

/// Name, updates and F of every cell at each length, and the cells without a gradient.
type Planned = (Vec<(String, u64, f64)>, Vec<String>);

fn planned(plan: &Plan) -> Planned {
    let (mut rows, mut without) = (Vec::new(), Vec::new());
    for cell in &plan.cells {
        match &cell.training {
            None => without.push(cell.name.clone()),
            Some(training) => rows.extend(training.lengths.iter().map(|length| {
                let f = training.cost.forwards() * length.updates as f64;
                (cell.name.clone(), length.updates, f)
            })),
        }
    }
    (rows, without)
}

#[test]
fn shipped_ablations_are_what_their_comments_say() {
    let dir = root().join("configs/bench");
    let mut seen = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if std::fs::read_to_string(&path).unwrap().contains("\nmethod = ") {
            let plan = args(&path, Path::new("nowhere"), &[]).plan().unwrap();
            assert!(report::describe_plan(&plan).contains("F of training"));
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            seen.insert(name, plan);
        }
    }
    assert_eq!(seen.keys().collect::<Vec<_>>(), ["ablation-m", "ablation-n", "figure-4"]);
    for (name, plan) in &seen {
        let base = plan.base_forwards * plan.base.steps as f64;
        let (rows, without) = planned(plan);
        let expected: &[&str] = if name == "ablation-n" { &["n=1"] } else { &[] };
        assert_eq!(without, expected, "{name}");
        for cell in plan.cells.iter().filter_map(|cell| cell.training.as_ref()) {
            for length in &cell.lengths {
                let f = cell.cost.forwards() * length.updates as f64;
                if length.equal.contains(&Equal::Forwards) {
                    assert!(
                        (f - base).abs() <= 0.5 * cell.cost.forwards() + 1e-6,
                        "{name}: {f}, {base}"
                    );
                }
                if length.equal.contains(&Equal::Updates) {
                    assert_eq!(length.updates, plan.base.steps);
                }
            }
            let all: usize = cell.lengths.iter().map(|length| length.equal.len()).sum();
            assert_eq!(all, 2);
        }
        // The base has one length, the others two; each is run with every seed.
        assert_eq!(plan.jobs().len(), rows.len() * 3, "{name}");
        assert_eq!(plan.cells.iter().filter(|cell| cell.differs.is_empty()).count(), 1);
    }
    let names: Vec<&str> = seen["figure-4"].cells.iter().map(|cell| cell.name.as_str()).collect();
    assert_eq!(names, ["standard", "sharpened", "random of 3", "3 states"]);
}

#[test]
fn what_cannot_be_compared_is_refused_by_name() {
    let cells = "[[axis]]\nname = \"n\"\nvalues = [2, 3]\n";
    let rlhf = format!("method = \"rlhf\"\n{cells}");
    let good = plan(&rlhf).unwrap();
    assert_eq!(good.seeds, [0, 1, 2]);
    for (text, wanted) in [
        (cells.to_owned(), "method: missing"),
        ("method = \"rlhf\"\n".into(), "cells: give [[axis]]"),
        (format!("methods = \"rlhf\"\n{cells}"), "unknown field `methods`"),
        (format!("{rlhf}set = {{ n = 3 }}\n"), "which the axis varies"),
        (format!("{rlhf}set = {{ trajectories = 3 }}\n"), "trajectories: no such setting"),
        (format!("{rlhf}set = {{ m = \"three\" }}\n"), "cell n=2 m=three: m:"),
        (format!("{rlhf}set = {{ m = 0 }}\n"), "cell n=2 m=0: m: expected at least 1"),
        (format!("{rlhf}set = {{ steps = 3 }}\n"), "steps: cells cannot differ"),
        (format!("{rlhf}[settings]\nseed = 3\n"), "seed: is the ablation's own"),
        (format!("{rlhf}[settings]\nn = 1\n"), "n: a preference needs two"),
        (format!("seeds = [1, 1]\n{rlhf}"), "seeds: 1 is given twice"),
        (format!("{rlhf}[[cells]]\nname = \"n=2\"\n"), "'n-2'"),
        // What is wrong beside the missing gradient is still said.
        (
            format!("{rlhf}[[cells]]\nname = \"one\"\nset = {{ n = 1, beta = -1.0 }}\n"),
            "cell one: beta:",
        ),
    ] {
        let error = plan(&text).unwrap_err();
        assert!(error.contains(wanted), "{text}\n{error}");
    }
}

#[test]
fn cells_with_the_same_settings_are_trained_once() {
    let text = "method = \"rlhf\"\nseeds = [0]\n[settings]\nn = 3\nm = 3\nsteps = 10\n\
                rollout_reuse = 1\n[[axis]]\nname = \"n\"\nvalues = [2, 3]\n[[axis]]\nname = \"m\"\nvalues = [1, 3]\n";
    let all = plan(text).unwrap();
    assert_eq!(all.cells.len(), 4);
    assert_eq!((&*all.cells[1].files, &*all.cells[3].files), ("n-3", "n-3"));
    assert_eq!(all.jobs().len(), 2 + 1 + 2);
    // A short run is the beginning of a long one, unless the learning rate follows a schedule.
    let folders = |plan: &Plan| {
        let of = |job| plan.run_folder(job).unwrap();
        plan.jobs().iter().map(of).collect::<std::collections::BTreeSet<_>>().len()
    };
    assert_eq!(folders(&all), 3);
    let scheduled = plan(&text.replace("steps = 10", "steps = 10\nlr_schedule = \"linear\""));
    assert_eq!(folders(&scheduled.unwrap()), 5);
}

const SMALL: &str = "
method = \"rlhf\"
seeds = \"0..2\"
prompts = \"scenes:test:3\"
image_seeds = \"0..2\"
steps = 2

[settings]
n = 2
m = 1
steps = 2
batch = 2
rank = 4
lr = 3e-3
chain_guidance = 1.0
rollout_steps = 2
rollout_reuse = 1
score = \"chain\"
ema = 0.0
validate_every = 1
validation_prompts = 2
validation_steps = 2
prompts = \"scenes:train:8\"

[[axis]]
name = \"n\"
values = [1, 2, 3]
";

/// The files of scores by name, as bytes.
fn scores(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let Ok(entries) = std::fs::read_dir(out.join("scores")) else { return BTreeMap::new() };
    entries
        .map(|entry| entry.unwrap())
        .map(|e| (e.file_name().to_string_lossy().into_owned(), std::fs::read(e.path()).unwrap()))
        .filter(|(name, _)| name.ends_with(".jsonl"))
        .collect()
}

/// The scores without the seconds that the runs took.
fn values(out: &Path) -> BTreeMap<String, String> {
    let text = |(name, bytes): (String, Vec<u8>)| {
        let text = String::from_utf8(bytes).unwrap();
        let (head, lines) = text.split_once('\n').unwrap();
        let mut head: Value = serde_json::from_str(head).unwrap();
        if let Some(run) = head.get_mut("run") {
            run["cost"].as_object_mut().unwrap().remove("seconds");
            let settings = run["settings"].as_object_mut().unwrap();
            settings.retain(|key, _| key != "out" && key != "cache");
        }
        (name, format!("{head}\n{lines}"))
    };
    scores(out).into_iter().map(text).collect()
}

/// Mean over the lines of `files`, less that over `others`, which are as many or one.
fn mean(out: &Path, files: &[&str], reward: &str, others: &[&str]) -> f64 {
    let read = |name: &str| Scores::read(&out.join("scores").join(name)).unwrap().unwrap().lines;
    let mut all = Vec::new();
    for (name, other) in files.iter().zip(others.iter().cycle()) {
        for (line, other) in read(name).iter().zip(&read(other)) {
            assert_eq!((&line.prompt, line.seed), (&other.prompt, other.seed));
            all.push(line.scores[reward].unwrap() - other.scores[reward].unwrap());
        }
    }
    assert_eq!(all.len(), 6 * files.len());
    all.iter().sum::<f64>() / all.len() as f64
}

#[test]
fn an_interrupted_ablation_goes_on_to_the_same_scores() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("small.toml");
    std::fs::write(&file, SMALL).unwrap();
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    let (plan, tally) =
        run(&args(&file, &whole, &[]), "made by", &CancelToken::default()).unwrap().unwrap();
    // n = 3 is dearer: one update for the F of the base's two. n = 1 does not run.
    assert_eq!((tally.ran, tally.remaining), (6, 0));
    let names =
        ["base", "n-2-s0-u2", "n-2-s1-u2", "n-3-s0-u1", "n-3-s0-u2", "n-3-s1-u1", "n-3-s1-u2"];
    let found = values(&whole);
    assert_eq!(found.keys().map(|n| n.trim_end_matches(".jsonl")).collect::<Vec<_>>(), names);

    // Cancelled as soon as there are scores of a run, and again while the next one trains.
    let small = args(&file, &parts, &[]);
    let mut kept = BTreeMap::new();
    for _ in 0..2 {
        let cancel = CancelToken::default();
        let (raised, out, before) = (cancel.clone(), parts.clone(), scores(&parts).len().max(1));
        let watch = std::thread::spawn(move || {
            while scores(&out).len() <= before {
                std::thread::sleep(Duration::from_millis(5));
            }
            raised.cancel();
        });
        let (_, tally) = run(&small, "made by", &cancel).unwrap().unwrap();
        watch.join().unwrap();
        assert!(tally.ran >= 1 && tally.remaining > 0, "{tally:?}");
        let now = scores(&parts);
        assert!(kept.iter().all(|(name, bytes)| now.get(name) == Some(bytes)), "written again");
        kept = now;
    }
    let (_, last) = run(&small, "made by", &CancelToken::default()).unwrap().unwrap();
    assert_eq!((last.remaining, last.kept + last.ran), (0, 6));
    assert_eq!(values(&parts), found);

    // The tables say what the files say.
    let json = std::fs::read_to_string(whole.join("summary.json")).unwrap();
    let summary: Value = serde_json::from_str(&json).unwrap();
    let rows = summary["rows"].as_array().unwrap();
    let row = |cell: &str, equal: Value| {
        rows.iter().find(|row| row["cell"] == cell && row["equal"] == equal).unwrap()
    };
    assert_eq!(rows.len(), 4);
    assert_eq!(row("n=1", json!([]))["scores"], json!({}));
    let cases = [
        (row("n=2", json!(["updates", "forwards"])), ["n-2-s0-u2.jsonl", "n-2-s1-u2.jsonl"]),
        (row("n=3", json!(["updates"])), ["n-3-s0-u2.jsonl", "n-3-s1-u2.jsonl"]),
        (row("n=3", json!(["forwards"])), ["n-3-s0-u1.jsonl", "n-3-s1-u1.jsonl"]),
    ];
    for (row, files) in cases {
        for reward in ["judge", "scene-clip"] {
            let near = |value: &Value, expected: f64| {
                let value = value.as_f64().unwrap_or_else(|| panic!("no number in {row}"));
                assert!((value - expected).abs() < 1e-12, "{row}: {value}, {expected}");
            };
            let score = &row["scores"][reward];
            let base = summary["base"][reward]["mean"].as_f64().unwrap();
            let difference = mean(&whole, &files, reward, &["base.jsonl"]);
            near(&score["mean"]["mean"], base + difference);
            near(&score["difference"]["mean"], difference);
            let by_seed = files.map(|file| mean(&whole, &[file], reward, &["base.jsonl"]));
            near(&score["by_seed"]["0"], by_seed[0]);
            near(&score["seed_deviation"], (by_seed[0] - by_seed[1]).abs() / 2f64.sqrt());
            if row["cell"] == "n=2" {
                assert_eq!(score["from_base"], Value::Null);
            } else {
                let others = ["n-2-s0-u2.jsonl", "n-2-s1-u2.jsonl"];
                near(&score["from_base"]["mean"], mean(&whole, &files, reward, &others));
            }
            assert_eq!(score["difference"]["prompts"], 3);
        }
        // Every chain of one state is within the plan's mean exactly.
        assert_eq!(row["spent"]["f"], row["spent"]["f_planned"], "{row}");
    }
    let text = std::fs::read_to_string(whole.join("summary.md")).unwrap();
    for wanted in ["| n=1 | `n=1` | no gradient |", "At equal forwards", "made by"] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    let curves = std::fs::read_to_string(whole.join("curves.csv")).unwrap();
    // Two cells, two seeds, validations after 0, 1 and 2 updates.
    assert_eq!(curves.lines().count(), 1 + 2 * 2 * 3, "{curves}");
    assert!(whole.join("curves.svg").exists());

    // Other settings are refused, before anything is trained.
    for settings in [&["lr=1e-3"][..], &["resolution=32"]] {
        let other = args(&file, &whole, settings).plan().unwrap();
        let error = compute(&other, &CancelToken::default(), true).unwrap_err().to_string();
        let key = settings[0].split('=').next().unwrap();
        assert!(error.contains("other settings") && error.contains(key), "{error}");
    }
    assert_eq!(plan.jobs().len(), 6);
}

#[test]
fn a_cell_that_diverges_leaves_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("small.toml"), folder.path().join("out"));
    let text = "
method = \"sft\"
seeds = \"0..1\"
prompts = \"scenes:test:2\"
image_seeds = \"0..1\"
steps = 2
[settings]
n = 1
m = 1
steps = 12
batch = 1
rank = 1
data = \"scenes:train:4:1\"
validate_every = 0
[[cells]]
name = \"hopeless\"
set = { lr = 1e35 }
[[cells]]
name = \"later\"
set = { batch = 2 }
";
    std::fs::write(&file, text).unwrap();
    let (_, tally) =
        run(&args(&file, &out, &[]), "made by", &CancelToken::default()).unwrap().unwrap();
    assert_eq!((tally.diverged, tally.remaining), (1, 0), "{tally:?}");
    assert!(tally.ran >= 2, "{tally:?}");
    let summary = std::fs::read_to_string(out.join("summary.json")).unwrap();
    let summary: Value = serde_json::from_str(&summary).unwrap();
    let rows = summary["rows"].as_array().unwrap();
    let scores =
        |name: &str| rows.iter().find(|row| row["cell"] == name).unwrap()["scores"].clone();
    assert_eq!(scores("hopeless")["judge"]["mean"], Value::Null);
    assert!(scores("later")["judge"]["mean"]["mean"].is_number());
}
