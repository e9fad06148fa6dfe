//! The options of a sweep: defaults < TOML file < environment < flags.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::{DeserializeOwned, Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use super::contract::Contract;
use super::thinning::Thinning;
use crate::data::prompts::PromptSource;
use crate::nn::device::{DeviceChoice, NumberChoice, Placement};
use crate::{Error, Result};

/// `--seeds`: half-open ranges and single seeds, `0..3` or `0,5,7` or `0..3,10`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seeds(pub Vec<u64>);

/// More seeds than anybody means.
const MAX_SEEDS: u64 = 1_000_000;

impl FromStr for Seeds {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let bad = || format!("'{text}' is not like 0..3 (half-open) or 0,5,7");
        let number = |t: &str| t.trim().parse::<u64>().map_err(|_| bad());
        let mut seeds = Vec::new();
        for part in text.split(',') {
            match part.split_once("..") {
                Some((from, to)) => {
                    let (from, to) = (number(from)?, number(to)?);
                    if to.saturating_sub(from) > MAX_SEEDS {
                        return Err(format!("'{text}' holds more than {MAX_SEEDS} seeds"));
                    }
                    seeds.extend(from..to);
                }
                None => seeds.push(number(part)?),
            }
        }
        if seeds.is_empty() { Err(format!("'{text}' holds no seed")) } else { Ok(Self(seeds)) }
    }
}

impl fmt::Display for Seeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seeds: Vec<String> = self.0.iter().map(u64::to_string).collect();
        f.write_str(&seeds.join(","))
    }
}

impl Serialize for Seeds {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Seeds {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            List(Vec<u64>),
            Text(String),
        }
        match Raw::deserialize(d).map_err(|_| D::Error::custom("expected \"0..3\" or [0, 5]"))? {
            Raw::List(seeds) if seeds.is_empty() => Err(D::Error::custom("no seed")),
            Raw::List(seeds) => Ok(Self(seeds)),
            Raw::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

/// Options as one source gives them; `None` is left to the source below. In a
/// TOML file the keys are the flags with underscores.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Layer {
    /// Methods, comma-separated, each `name[@adapter][:parameter=value]…`
    /// [default: plain,best-of-n]
    #[arg(long, env = "DS_BENCH_METHODS", value_delimiter = ',', value_name = "LIST")]
    pub methods: Option<Vec<String>>,
    /// U-Net forwards per image (F), comma-separated; one guided evaluation is 2. Milliseconds
    /// with --contract equal-latency
    /// [default: 100,200]
    #[arg(long, env = "DS_BENCH_BUDGETS", value_delimiter = ',', value_name = "LIST")]
    pub budgets: Option<Vec<u64>>,
    /// Prompts: a file (one a line, .jsonl, .csv, .tsv or .parquet), or N for the
    /// first N of the scene world's held-out test split [default: 8]
    #[arg(long, env = "DS_BENCH_PROMPTS", value_name = "FILE|N")]
    pub prompts: Option<PromptSource>,
    /// Seeds: a half-open range 0..3, a list 0,5,7, or both [default: 0..1]
    #[arg(long, env = "DS_BENCH_SEEDS", value_name = "SEEDS")]
    pub seeds: Option<Seeds>,
    /// Folder for cells, tables and plots; an interrupted sweep resumes there
    #[arg(long, env = "DS_BENCH_OUT", value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Folder of models [default: models]
    #[arg(long, env = "DS_BENCH_MODELS", value_name = "DIR")]
    pub models: Option<PathBuf>,
    /// Device of the models here: auto, cpu or cuda:N [default: auto]
    #[arg(long, env = "DS_BENCH_DEVICE", value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
    /// Numbers of U-Net and text towers: auto, f32, bf16 or f16 [default: auto]
    #[arg(long, env = "DS_BENCH_DTYPE", value_name = "TYPE")]
    pub dtype: Option<NumberChoice>,
    /// Numbers of the VAE: auto, f32, bf16 or f16 [default: auto, which is f32]
    #[arg(long, env = "DS_BENCH_VAE_DTYPE", value_name = "TYPE")]
    pub vae_dtype: Option<NumberChoice>,
    /// Model id [default: the first]
    #[arg(long, env = "DS_BENCH_MODEL", value_name = "ID")]
    pub model: Option<String>,
    /// Adapter for every method that names none
    #[arg(long, env = "DS_BENCH_ADAPTER", value_name = "NAME")]
    pub adapter: Option<String>,
    /// Use this server instead of the models here, such as http://127.0.0.1:8080; the variable
    /// DS_API_KEY has the key for it, if it wants one
    #[arg(long, env = "DS_BENCH_URL", value_name = "URL")]
    pub url: Option<String>,
    /// Run best-of-n at the largest budget alone and derive the smaller ones from its candidates'
    /// scores: their mean over all choices of fewer candidates
    #[arg(long, env = "DS_BENCH_REPLAY", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub replay: Option<bool>,
    /// On how few prompts, the first N, budgets from F on run: they cost most [default: all]
    #[arg(long, env = "DS_BENCH_FEWER_PROMPTS", value_name = "F:N,…")]
    pub fewer_prompts: Option<Thinning>,
    /// What budgets count: U-Net forwards, or milliseconds, of which every method gets as many
    /// forwards as its measured speed leaves time for [default: equal-f]
    #[arg(long, env = "DS_BENCH_CONTRACT", value_enum, value_name = "WHAT")]
    pub contract: Option<Contract>,
    /// Reward that searches maximise, or an ensemble such as a:0.75+b:0.25 or rank(a+b) [default: the first that is not the held-out one]
    #[arg(long, env = "DS_BENCH_REWARD", value_name = "NAME")]
    pub reward: Option<String>,
    /// Reward that nothing is searched by, drawn beside it, or "none"
    /// [default: judge if there is one, else another reward]
    #[arg(long, env = "DS_BENCH_HELD_OUT", value_name = "NAME")]
    pub held_out: Option<String>,
    /// Steps of every trajectory but plain sampling's, which follow its budget [default: 50]
    #[arg(long, env = "DS_BENCH_STEPS", value_name = "S")]
    pub steps: Option<u32>,
    /// Fewest steps that plain sampling may be cut to by a small budget [default: 10]
    #[arg(long, env = "DS_BENCH_MIN_STEPS", value_name = "S")]
    pub min_steps: Option<u32>,
    /// Guidance scale; 1 turns guidance off and halves the forwards [default: the model's]
    #[arg(long, env = "DS_BENCH_GUIDANCE", value_name = "G")]
    pub guidance: Option<f64>,
    /// Budget of the plain row that differences are taken against [default: the
    /// one at which plain takes --steps steps, else its smallest]
    #[arg(long, env = "DS_BENCH_REFERENCE_BUDGET", value_name = "F")]
    pub reference_budget: Option<u64>,
}

/// A TOML file as `T`.
///
/// # Errors
/// When the file cannot be read or holds something else.
pub(super) fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    toml::from_str(&text).map_err(|e| Error::file(path, e))
}

impl Layer {
    /// Where the models here are to run.
    ///
    /// # Errors
    /// When the device is not there or does not offer the numbers.
    pub fn placement(&self) -> Result<Placement> {
        Placement::new(
            self.device.unwrap_or_default(),
            self.dtype.unwrap_or_default(),
            self.vae_dtype.unwrap_or_default(),
        )
    }

    /// Reads a TOML file; unknown keys are errors.
    ///
    /// # Errors
    /// When the file cannot be read or holds something else than options.
    pub fn read(path: &Path) -> Result<Self> {
        read_toml(path)
    }

    /// These options, with what they lack taken from `below`.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        Self {
            methods: self.methods.or(below.methods),
            budgets: self.budgets.or(below.budgets),
            prompts: self.prompts.or(below.prompts),
            seeds: self.seeds.or(below.seeds),
            out: self.out.or(below.out),
            models: self.models.or(below.models),
            device: self.device.or(below.device),
            dtype: self.dtype.or(below.dtype),
            vae_dtype: self.vae_dtype.or(below.vae_dtype),
            model: self.model.or(below.model),
            adapter: self.adapter.or(below.adapter),
            url: self.url.or(below.url),
            replay: self.replay.or(below.replay),
            fewer_prompts: self.fewer_prompts.or(below.fewer_prompts),
            contract: self.contract.or(below.contract),
            reward: self.reward.or(below.reward),
            held_out: self.held_out.or(below.held_out),
            steps: self.steps.or(below.steps),
            min_steps: self.min_steps.or(below.min_steps),
            guidance: self.guidance.or(below.guidance),
            reference_budget: self.reference_budget.or(below.reference_budget),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_half_open_ranges_and_lists() {
        let seeds = |t: &str| t.parse::<Seeds>().map(|s| s.0);
        assert_eq!(seeds("0..3"), Ok(vec![0, 1, 2]));
        assert_eq!(seeds("0,5,7"), Ok(vec![0, 5, 7]));
        assert_eq!(seeds("0..2, 9"), Ok(vec![0, 1, 9]));
        for bad in ["", "3..3", "a", "0...3", "-1", "0..99999999999"] {
            assert!(seeds(bad).is_err(), "{bad}");
        }
    }
}
