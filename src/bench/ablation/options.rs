//! The options of an ablation: defaults < TOML file < environment < flags. Cells and training
//! settings are in the file alone.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Result;
use crate::bench::options::{Seeds, read_toml};
use crate::data::prompts::PromptSource;
use crate::train::settings::Method;

/// What cells have in common with the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Equal {
    /// The number of updates.
    Updates,
    /// F of the whole run, as planned.
    Forwards,
}

impl Equal {
    pub fn name(self) -> &'static str {
        match self {
            Self::Updates => "updates",
            Self::Forwards => "forwards",
        }
    }
}

/// Values of one training setting: a cell each.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Axis {
    /// The setting.
    pub name: String,
    pub values: Vec<Value>,
    /// What all cells of the axis have besides.
    #[serde(default)]
    pub set: Map<String, Value>,
}

/// One cell.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    pub name: String,
    #[serde(default)]
    pub set: Map<String, Value>,
}

/// `--set`: a training setting, its value as in TOML; a text needs no quotes.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment(pub String, pub Value);

impl FromStr for Assignment {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (key, value) =
            text.split_once('=').ok_or_else(|| format!("'{text}' is not like key=value"))?;
        let parsed = toml::from_str::<Map<String, Value>>(&format!("value = {value}"));
        let parsed = parsed.ok().and_then(|mut table| table.remove("value"));
        Ok(Self(key.trim().into(), parsed.unwrap_or_else(|| Value::from(value))))
    }
}

/// Options as one source gives them; `None` is left to the source below. In a TOML file the keys
/// are the flags with underscores.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Layer {
    /// Training method
    #[arg(long, env = "DS_BENCH_METHOD", value_enum)]
    pub method: Option<Method>,
    /// Preset of ds-train that every cell starts from [default: ours]
    #[arg(long, env = "DS_BENCH_PRESET", value_name = "NAME")]
    pub preset: Option<String>,
    /// File of ds-train's settings that every cell starts from, above the preset
    #[arg(long, env = "DS_BENCH_TRAIN", value_name = "FILE")]
    pub train: Option<PathBuf>,
    /// Training seeds: a half-open range 0..3, a list 0,5,7, or both [default: 0..3]
    #[arg(long, env = "DS_BENCH_SEEDS", value_name = "SEEDS")]
    pub seeds: Option<Seeds>,
    /// What cells have in common with the base, comma-separated [default: updates,forwards]
    #[arg(long, env = "DS_BENCH_EQUAL", value_delimiter = ',', value_enum)]
    pub equal: Option<Vec<Equal>>,
    /// Prompts that the trained models are measured on: scenes:SPLIT:COUNT, or a file
    /// [default: scenes:test:128]
    #[arg(long, env = "DS_BENCH_PROMPTS", value_name = "SOURCE")]
    pub prompts: Option<PromptSource>,
    /// Images of each prompt, as seeds [default: 0..1]
    #[arg(long, env = "DS_BENCH_IMAGE_SEEDS", value_name = "SEEDS")]
    pub image_seeds: Option<Seeds>,
    /// Steps of these images [default: 50]
    #[arg(long, env = "DS_BENCH_STEPS", value_name = "S")]
    pub steps: Option<usize>,
    /// Guidance scale of these images; 1 is none [default: 5]
    #[arg(long, env = "DS_BENCH_GUIDANCE", value_name = "G")]
    pub guidance: Option<f64>,
    /// Folder for runs, scores and tables; an interrupted ablation goes on there
    #[arg(long, env = "DS_BENCH_OUT", value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Training settings of all cells, above preset and file.
    #[arg(skip)]
    pub settings: Map<String, Value>,
    #[arg(skip)]
    pub axis: Vec<Axis>,
    #[arg(skip)]
    pub cells: Vec<Named>,
}

impl Layer {
    /// Reads a TOML file; unknown keys are errors.
    ///
    /// # Errors
    /// When the file cannot be read or holds something else than options.
    pub fn read(path: &Path) -> Result<Self> {
        read_toml(path)
    }

    /// These options of flags and environment, with what they lack taken from a file's.
    #[must_use]
    pub fn over(self, file: Self) -> Self {
        Self {
            method: self.method.or(file.method),
            preset: self.preset.or(file.preset),
            train: self.train.or(file.train),
            seeds: self.seeds.or(file.seeds),
            equal: self.equal.or(file.equal),
            prompts: self.prompts.or(file.prompts),
            image_seeds: self.image_seeds.or(file.image_seeds),
            steps: self.steps.or(file.steps),
            guidance: self.guidance.or(file.guidance),
            out: self.out.or(file.out),
            ..file
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_assignment_has_tomls_values_and_bare_texts() {
        for (text, key, value) in [
            ("steps=20", "steps", json!(20)),
            ("lr=1e-4", "lr", json!(1e-4)),
            ("select=random", "select", json!("random")),
            ("rewards=[\"judge\"]", "rewards", json!(["judge"])),
            ("data=scenes:train:8", "data", json!("scenes:train:8")),
        ] {
            assert_eq!(text.parse(), Ok(Assignment(key.into(), value)), "{text}");
        }
        assert!("steps".parse::<Assignment>().is_err());
    }
}
