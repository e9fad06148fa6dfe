//! Settings from their sources: defaults < preset < TOML file < environment < flags.

use std::path::Path;

use serde_json::{Map, Value};

use super::flags::Flags;
use super::latents::Crop;
use super::objective::LossKind;
use super::settings::{
    Aggregate, ChainGrad, ExportFormat, ExportType, LrSchedule, Method, ReferenceStates, Renoise,
    RewardScale, Score, Select, Settings, Target, TimestepMode, Trained,
};
use crate::data::images::ImageSource;
use crate::data::prompts::PromptSource;
use crate::data::scenes::Split;
use crate::{Error, Result};

/// Presets by name and method: the files of `configs/train`.
const PRESETS: [(&str, Method, &str); 6] = [
    ("ours", Method::Sft, include_str!("../../configs/train/sft-ours.toml")),
    ("paper", Method::Sft, include_str!("../../configs/train/sft-paper.toml")),
    ("code-compat", Method::Sft, include_str!("../../configs/train/sft-code-compat.toml")),
    ("ours", Method::Rlhf, include_str!("../../configs/train/rlhf-ours.toml")),
    ("paper", Method::Rlhf, include_str!("../../configs/train/rlhf-paper.toml")),
    ("code-compat", Method::Rlhf, include_str!("../../configs/train/rlhf-code-compat.toml")),
];

/// Modules that get adapters. Attention alone learns more slowly from preferences: among these,
/// the gradients of feed-forward, convolutions and time are the steadier ones from prompt to prompt.
const TARGETS: [&str; 12] = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
];

/// What a run does unless told otherwise: the preset `ours`.
impl From<Method> for Settings {
    fn from(method: Method) -> Self {
        let rlhf = method == Method::Rlhf;
        Self {
            model: "models/tiny".into(),
            device: Default::default(),
            dtype: Default::default(),
            vae_dtype: Default::default(),
            out: None,
            seed: 0,
            steps: if rlhf { 600 } else { 400 },
            data: (!rlhf).then_some(ImageSource::Scenes {
                split: Split::Train,
                count: 4096,
                seed: 1,
            }),
            crop: Crop::Center,
            flip: false,
            buckets: false,
            variants: 1,
            cache: None,
            prompts: rlhf.then_some(PromptSource::Scenes { split: Split::Train, count: 4096 }),
            resolution: None,
            train: Trained::Lora,
            rank: 16,
            alpha: None,
            targets: TARGETS.map(String::from).to_vec(),
            adapter: None,
            recompute: false,
            lr: if rlhf { 1e-4 } else { 3e-4 },
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
            warmup: 10,
            lr_schedule: LrSchedule::Constant,
            ema: if rlhf { 0.99 } else { 0.0 },
            batch: if rlhf { 16 } else { 8 },
            micro: 8,
            n: if rlhf { 8 } else { 4 },
            m: if rlhf { 1 } else { 3 },
            chain_steps: 25,
            eta: 0.0,
            chain_guidance: if rlhf { 5.0 } else { 1.0 },
            estimate_steps: 1,
            timesteps: TimestepMode::Uniform,
            t_min: if rlhf { 200 } else { 0 },
            t_max: if rlhf { 950 } else { 999 },
            rewards: vec!["scene-clip".into()],
            reward_scale: RewardScale::Deviation,
            aggregate: Aggregate::Mean,
            score: if rlhf { Score::Sample } else { Score::Chain },
            renoise: if rlhf { Renoise::FreshShared } else { Renoise::FreshIndep },
            chain_grad: ChainGrad::Detach,
            target: Target::EpsExact,
            select: Select::Best,
            min_gap: 0.0,
            prompt_dropout: 0.0,
            loss: LossKind::Dpo,
            beta: 500.0,
            gamma: 1.0,
            reward_eta: 1.0,
            loss_guidance: 1.0,
            anchor: 0.0,
            reference_states: ReferenceStates::All,
            reference_refresh: 0,
            rollout_steps: 5,
            rollout_solver: "dpmpp-2m".into(),
            rollout_guidance: 5.0,
            rollout_shared: false,
            rollout_reuse: 6,
            rollout_batch: 16,
            decode_batch: 16,
            save_every: 50,
            keep: 2,
            validate_every: 50,
            validation_prompts: PromptSource::Scenes { split: Split::Validation, count: 48 },
            validation_steps: 20,
            validation_guidance: 5.0,
            validation_images: 16,
            validation_data: None,
            export_format: ExportFormat::Kohya,
            export_dtype: ExportType::F16,
        }
    }
}

/// The settings of a run.
///
/// # Errors
/// Names the preset, file or key that is unknown or unusable.
pub fn configure(
    method: Method,
    preset: Option<&str>,
    file: Option<&Path>,
    flags: &Flags,
) -> Result<Settings> {
    let given = object(flags)?.into_iter().filter(|(_, value)| !value.is_null()).collect();
    let settings = read(method, preset, file, &given)?;
    settings.check(method)?;
    Ok(settings)
}

/// The settings that these sources give, `last` above all, without a check of what is possible
/// together.
///
/// # Errors
/// Names the preset, file or key that is unknown, and the key whose value is of another type.
pub fn read(
    method: Method,
    preset: Option<&str>,
    file: Option<&Path>,
    last: &Map<String, Value>,
) -> Result<Settings> {
    let known = known()?;
    let mut all = object(&Settings::from(method))?;
    let preset_text = preset.map(|name| preset_of(method, name)).transpose()?;
    let file_text = file.map(|path| {
        std::fs::read_to_string(path).map_err(|e| Error::file(path, e)).map(|text| (path, text))
    });
    if let Some(text) = preset_text {
        overlay(&mut all, text, &known, Path::new("preset"))?;
    }
    if let Some((path, text)) = file_text.transpose()? {
        overlay(&mut all, &text, &known, path)?;
    }
    for (key, value) in last {
        if !known.contains(key) {
            let message = format!("no such setting; see ds-train {} --help", method.name());
            return Err(Error::invalid(key, message));
        }
        all.insert(key.clone(), value.clone());
    }
    serde_path_to_error::deserialize(Value::Object(all))
        .map_err(|e| Error::invalid(e.path().to_string(), e.inner().to_string()))
}

fn preset_of(method: Method, name: &str) -> Result<&'static str> {
    let of_method = || PRESETS.iter().filter(|(_, of, _)| *of == method);
    let found = of_method().find(|(preset, ..)| *preset == name);
    found
        .map(|(.., text)| *text)
        .ok_or_else(|| Error::unknown("preset", "preset", name, of_method().map(|(n, ..)| *n)))
}

fn object<T: serde::Serialize>(value: &T) -> Result<Map<String, Value>> {
    match serde_json::to_value(value) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::invalid("settings", "are no table")),
        Err(e) => Err(Error::invalid("settings", e.to_string())),
    }
}

/// All keys.
fn known() -> Result<Vec<String>> {
    Ok(object(&Flags::default())?.into_iter().map(|(key, _)| key).collect())
}

fn overlay(all: &mut Map<String, Value>, text: &str, known: &[String], path: &Path) -> Result<()> {
    let table: Map<String, Value> = toml::from_str(text).map_err(|e| Error::file(path, e))?;
    for (key, value) in table {
        if !known.contains(&key) {
            return Err(Error::file(path, format!("unknown key '{key}'; see --help for all")));
        }
        all.insert(key, value);
    }
    Ok(())
}

impl Settings {
    /// The settings as a table, for a file or a comparison.
    ///
    /// # Errors
    /// None in practice: all values can be written.
    pub fn table(&self) -> Result<Map<String, Value>> {
        object(self)
    }

    /// # Errors
    /// Names the first key whose value is unusable, alone or with others.
    pub fn check(&self, method: Method) -> Result<()> {
        let at_least_one = [
            ("steps", self.steps),
            ("rank", self.rank as u64),
            ("batch", self.batch as u64),
            ("micro", self.micro as u64),
            ("n", self.n as u64),
            ("m", self.m as u64),
            ("chain_steps", self.chain_steps as u64),
            ("estimate_steps", self.estimate_steps as u64),
            ("rollout_steps", self.rollout_steps as u64),
            ("rollout_reuse", self.rollout_reuse),
            ("rollout_batch", self.rollout_batch as u64),
            ("decode_batch", self.decode_batch as u64),
            ("save_every", self.save_every),
            ("keep", self.keep as u64),
            ("variants", self.variants.into()),
            ("validation_steps", self.validation_steps as u64),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return Err(Error::invalid(*key, "expected at least 1"));
        }
        let fractions = [("ema", self.ema), ("prompt_dropout", self.prompt_dropout)];
        if let Some((key, value)) = fractions.iter().find(|(_, v)| !(0.0..1.0).contains(v)) {
            let message = format!("expected at least 0 and below 1, got {value}");
            return Err(Error::invalid(*key, message));
        }
        if !(0.0..=1.0).contains(&self.eta) {
            return Err(Error::invalid("eta", format!("expected 0 to 1, got {}", self.eta)));
        }
        let positive = [("clip", self.clip), ("beta", self.beta)];
        if let Some((key, value)) = positive.iter().find(|(_, v)| !(v.is_finite() && *v > 0.0)) {
            return Err(Error::invalid(*key, format!("expected a number above 0, got {value}")));
        }
        let numbers = [
            ("chain_guidance", self.chain_guidance),
            ("loss_guidance", self.loss_guidance),
            ("rollout_guidance", self.rollout_guidance),
            ("validation_guidance", self.validation_guidance),
            ("alpha", self.alpha.unwrap_or(1.0)),
        ];
        if let Some((key, value)) = numbers.iter().find(|(_, v)| !v.is_finite()) {
            return Err(Error::invalid(*key, format!("expected a number, got {value}")));
        }
        let from_zero = [
            ("gamma", self.gamma),
            ("reward_eta", self.reward_eta),
            ("anchor", self.anchor),
            ("min_gap", self.min_gap),
        ];
        if let Some((key, value)) = from_zero.iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
            return Err(Error::invalid(*key, format!("expected a number from 0, got {value}")));
        }
        if self.train == Trained::Full && self.adapter.is_some() {
            let message = "all weights begin with the checkpoint's: merge the adapter into it \
                           (ds-train export --adapter)";
            return Err(Error::invalid("adapter", message));
        }
        if self.anchor > 0.0 && self.reference_states != ReferenceStates::All {
            let message = "needs the reference at every state: reference_states = \"all\"";
            return Err(Error::invalid("anchor", message));
        }
        if self.loss_guidance != 1.0 && self.chain_grad == ChainGrad::Through {
            let message = "gradients through the chain are of predictions without guidance: \
                           expected 1, or chain_grad detach";
            return Err(Error::invalid("loss_guidance", message));
        }
        if self.t_min > self.t_max {
            let message = format!("{} is above t_max, {}", self.t_min, self.t_max);
            return Err(Error::invalid("t_min", message));
        }
        self.optimizer().validate()?;
        self.check_method(method)
    }

    /// What is impossible together.
    fn check_method(&self, method: Method) -> Result<()> {
        if self.n > 1 && self.rewards.is_empty() {
            return Err(Error::invalid("rewards", "give one to choose trajectories by"));
        }
        if self.n > 1 && self.prompt_dropout > 0.0 {
            let message = "captions are not dropped where images are scored against them: \
                           expected 0 with n above 1";
            return Err(Error::invalid("prompt_dropout", message));
        }
        let shared_start = match method {
            Method::Sft => true,
            Method::Rlhf => self.rollout_shared,
        };
        let one_noise = match self.renoise {
            Renoise::FreshShared => true,
            Renoise::FreshIndep => false,
            Renoise::Reuse => shared_start,
        };
        if self.n > 1 && shared_start && one_noise && self.eta == 0.0 {
            let message = "with one clean image and one noise for a group all its trajectories \
                           are the same: expected fresh-indep, or eta above 0";
            return Err(Error::invalid("renoise", message));
        }
        match method {
            Method::Sft => {
                if self.renoise == Renoise::Reuse {
                    return Err(Error::invalid("renoise", "images from data have no noise"));
                }
                if self.score == Score::Sample {
                    let message = "all trajectories of an image have the same: expected chain";
                    return Err(Error::invalid("score", message));
                }
                if self.data.is_none() {
                    return Err(Error::invalid("data", "missing: give images with captions"));
                }
            }
            Method::Rlhf => {
                if self.n < method.least_trajectories() {
                    let message = "a preference needs two trajectories: expected at least 2";
                    return Err(Error::invalid("n", message));
                }
                if self.score == Score::Sample && self.rollout_shared {
                    let message = "one generated image for a group has one score: expected chain, \
                                   or rollout_shared false";
                    return Err(Error::invalid("score", message));
                }
                if self.prompts.is_none() {
                    return Err(Error::invalid("prompts", "missing: give prompts"));
                }
            }
        }
        Ok(())
    }

    /// The optimizer's part.
    pub fn optimizer(&self) -> super::optimizer::AdamWConfig {
        super::optimizer::AdamWConfig {
            lr: self.lr,
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn flags_and_settings_have_the_same_keys() -> Result<()> {
        let text = || Some(String::new());
        let mut settings = Settings::from(Method::Sft);
        (settings.out, settings.cache) = (text(), text());
        settings.validation_data = settings.data.clone();
        settings.prompts = Settings::from(Method::Rlhf).prompts;
        (settings.resolution, settings.alpha) = (Some(1), Some(1.0));
        settings.adapter = text();
        let keys: BTreeSet<String> = settings.table()?.into_iter().map(|(k, _)| k).collect();
        assert_eq!(keys, known()?.into_iter().collect());
        Ok(())
    }

    #[test]
    fn the_preset_ours_is_the_default() -> Result<()> {
        for method in [Method::Sft, Method::Rlhf] {
            let preset = configure(method, Some("ours"), None, &Flags::default())?;
            assert_eq!(preset, Settings::from(method));
        }
        Ok(())
    }

    #[test]
    fn later_sources_win_and_unknown_keys_are_named() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.toml");
        std::fs::write(&file, "lr = 1e-3\nn = 7\n").unwrap();
        let flags = Flags { n: Some(2), ..Flags::default() };
        let settings = configure(Method::Rlhf, Some("paper"), Some(&file), &flags)?;
        assert_eq!((settings.lr, settings.n, settings.loss), (1e-3, 2, LossKind::Offset));
        std::fs::write(&file, "learning_rate = 1e-3\n").unwrap();
        let error = configure(Method::Rlhf, None, Some(&file), &flags).unwrap_err().to_string();
        assert!(error.contains("a.toml") && error.contains("learning_rate"), "{error}");
        let error = configure(Method::Rlhf, Some("best"), None, &flags).unwrap_err().to_string();
        assert!(error.contains("ours, paper, code-compat"), "{error}");
        Ok(())
    }

    #[test]
    fn impossible_settings_are_named() {
        let check = |method, change: fn(&mut Settings)| {
            let mut settings = Settings::from(method);
            change(&mut settings);
            settings.check(method).unwrap_err().to_string()
        };
        type Case = (Method, fn(&mut Settings), &'static str);
        let cases: [Case; 8] = [
            (Method::Sft, |s| s.renoise = Renoise::FreshShared, "renoise"),
            (Method::Sft, |s| s.score = Score::Sample, "score"),
            (Method::Sft, |s| s.prompt_dropout = 0.1, "prompt_dropout"),
            (Method::Rlhf, |s| s.n = 1, "n"),
            (Method::Rlhf, |s| s.rewards.clear(), "rewards"),
            (Method::Rlhf, |s| s.t_min = 1000, "t_min"),
            (Method::Rlhf, |s| s.lr = -1.0, "lr"),
            (Method::Rlhf, |s| s.batch = 0, "batch"),
        ];
        for (method, change, key) in cases {
            let error = check(method, change);
            assert!(error.starts_with(&format!("{key}:")), "{key}: {error}");
        }
    }
}
