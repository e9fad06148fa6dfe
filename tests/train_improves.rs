//! A few updates on the shipped model raise the reward that is trained on, on fixed prompts and
//! seeds; a control of the same cost that learns from shuffled rewards does not.

use std::path::{Path, PathBuf};

use diffusion_sharpening::data::prompts::PromptSource;
use diffusion_sharpening::train::run::run;
use diffusion_sharpening::train::settings::{Method, Score, Select, Settings};
use diffusion_sharpening::train::setup::Setup;
use diffusion_sharpening::util::CancelToken;

const PROMPTS: [&str; 2] = ["a red circle left of a blue square", "three green stars"];
const IMAGES_A_PROMPT: usize = 32;

/// A file with every prompt `times` times.
fn prompts(folder: &Path, times: usize) -> PromptSource {
    let path = folder.join(format!("prompts-{times}.txt"));
    std::fs::write(&path, format!("{}\n", PROMPTS.join("\n")).repeat(times)).unwrap();
    PromptSource::File { path, column: None }
}

fn settings(folder: &Path, name: &str, select: Select) -> Settings {
    Settings {
        model: Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny").display().to_string(),
        out: Some(folder.join(name).display().to_string()),
        prompts: Some(prompts(folder, 1)),
        rewards: vec!["judge".into()],
        select,
        steps: 24,
        batch: 8,
        micro: 8,
        n: 6,
        m: 1,
        score: Score::Sample,
        rollout_steps: 8,
        rollout_reuse: 4,
        beta: 200.0,
        lr: 5e-4,
        warmup: 0,
        ema: 0.0,
        validate_every: 24,
        validation_prompts: prompts(folder, IMAGES_A_PROMPT),
        validation_steps: 8,
        ..Settings::from(Method::Rlhf)
    }
}

/// Mean rewards of the validation images before and after a run.
fn before_and_after(settings: Settings) -> [f64; 2] {
    let out = PathBuf::from(settings.out.clone().unwrap());
    let setup = Setup::open(Method::Rlhf, settings).unwrap();
    assert!(run(&setup, &CancelToken::default(), true).unwrap().finished);
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let found: Vec<f64> = lines.filter_map(|line| line["validation/judge"].as_f64()).collect();
    found.try_into().unwrap()
}

#[test]
fn rlhf_raises_its_reward_and_shuffled_rewards_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let trained =
        |name: &str, select: Select| before_and_after(settings(folder.path(), name, select));
    let [base, best] = trained("best", Select::Best);
    let [_, shuffled] = trained("shuffled", Select::Random);
    assert!(best > base + 0.02, "from {base} to {best}");
    assert!(best > shuffled + 0.04, "{best} against {shuffled}");
}
