//! A few updates on the shipped model raise the reward on fixed prompts and seeds; controls of the
//! same cost do not: RLHF that learns from shuffled rewards, SFT that learns from images with each
//! other's captions. (SFT's shuffled rewards are no control: which of several noised versions of an
//! image it learns from does not change which images it learns from.)

use std::path::{Path, PathBuf};

use diffusion_sharpening::data::images::ImageSource;
use diffusion_sharpening::data::prompts::PromptSource;
use diffusion_sharpening::data::scenes::Caption;
use diffusion_sharpening::data::scenes::layout::Scene;
use diffusion_sharpening::data::scenes::render::render;
use diffusion_sharpening::train::run::run;
use diffusion_sharpening::train::settings::{Method, Score, Select, Settings};
use diffusion_sharpening::train::setup::Setup;
use diffusion_sharpening::util::CancelToken;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const PROMPTS: [&str; 2] = ["a red circle left of a blue square", "three green stars"];
const IMAGES_A_PROMPT: usize = 32;

/// A file with every prompt `times` times.
fn prompts(folder: &Path, prompts: &[&str], times: usize) -> PromptSource {
    let path = folder.join(format!("{}-{times}.txt", prompts[0].replace(' ', "-")));
    std::fs::write(&path, format!("{}\n", prompts.join("\n")).repeat(times)).unwrap();
    PromptSource::File { path, column: None }
}

fn settings(folder: &Path, name: &str, select: Select) -> Settings {
    Settings {
        model: Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny").display().to_string(),
        out: Some(folder.join(name).display().to_string()),
        prompts: Some(prompts(folder, &PROMPTS, 1)),
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
        validation_prompts: prompts(folder, &PROMPTS, IMAGES_A_PROMPT),
        validation_steps: 8,
        ..Settings::from(Method::Rlhf)
    }
}

/// Mean rewards of the validation images before and after a run.
fn before_and_after(method: Method, settings: Settings) -> [f64; 2] {
    let out = PathBuf::from(settings.out.clone().unwrap());
    let setup = Setup::open(method, settings).unwrap();
    assert!(run(&setup, &CancelToken::default(), true).unwrap().finished);
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let found: Vec<f64> = lines.filter_map(|line| line["validation/judge"].as_f64()).collect();
    found.try_into().unwrap()
}

#[test]
fn rlhf_raises_its_reward_and_shuffled_rewards_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let trained = |name: &str, select: Select| {
        before_and_after(Method::Rlhf, settings(folder.path(), name, select))
    };
    let [base, best] = trained("best", Select::Best);
    let [_, shuffled] = trained("shuffled", Select::Random);
    assert!(best > base + 0.02, "from {base} to {best}");
    assert!(best > shuffled + 0.04, "{best} against {shuffled}");
}

/// Prompts that the base draws badly.
const HARD: [&str; 2] = ["a dotted heart left of a striped square", "two striped red stars"];

/// A folder of images of the prompts, `captions[i]` beside those of prompt i.
fn images(folder: &Path, captions: [&str; 2]) -> ImageSource {
    let mut rows = String::new();
    std::fs::create_dir_all(folder).unwrap();
    for (i, prompt) in HARD.iter().enumerate() {
        let parsed = Caption::parse(prompt).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(i as u64);
        for copy in 0..24 {
            let file = format!("{i}-{copy}.png");
            render(&Scene::sample(&parsed, &mut rng), 64, 64).save(folder.join(&file)).unwrap();
            let row = serde_json::json!({"file_name": file, "text": captions[i]});
            rows.push_str(&format!("{row}\n"));
        }
    }
    std::fs::write(folder.join("metadata.jsonl"), rows).unwrap();
    folder.display().to_string().parse().unwrap()
}

#[test]
fn sft_raises_the_reward_and_swapped_captions_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let trained = |name: &str, captions: [&str; 2]| {
        let data = Some(images(&folder.path().join(format!("{name}-images")), captions));
        let settings = Settings {
            data,
            n: 2,
            m: 2,
            steps: 32,
            batch: 8,
            micro: 8,
            lr: 2e-3,
            warmup: 0,
            ema: 0.0,
            validation_guidance: 2.0,
            chain_guidance: 1.0,
            validate_every: 32,
            validation_prompts: prompts(folder.path(), &HARD, IMAGES_A_PROMPT),
            ..settings(folder.path(), name, Select::Best)
        };
        let base = Settings::from(Method::Sft);
        let settings = Settings { score: base.score, renoise: base.renoise, ..settings };
        before_and_after(Method::Sft, settings)
    };
    let [base, best] = trained("best", HARD);
    let [_, swapped] = trained("swapped", [HARD[1], HARD[0]]);
    assert!(best > base + 0.02, "from {base} to {best}");
    assert!(best > swapped + 0.04, "{best} against {swapped}");
}
