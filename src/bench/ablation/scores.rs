//! Files of scores: one JSON object a line, a head that says what was trained and how it is
//! measured, then every image.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::plan::{Job, Plan, Wanted};
use crate::diffusion::cost::Cost;
use crate::train::resume::{changes, differences};
use crate::util::write_atomic;
use crate::{Error, Result};

/// The first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// What the images depend on beside the trained weights.
    pub sampling: Map<String, Value>,
    /// None for the base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<Trained>,
}

/// A run up to its evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trained {
    pub updates: u64,
    pub settings: Map<String, Value>,
    /// Metered, of the updates alone.
    pub cost: Cost,
    /// Samples that went backward.
    pub backward: u64,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    pub prompt: String,
    pub prompt_index: usize,
    pub image_seed: u64,
    /// Of its noise: that of a request that makes the same image.
    pub seed: u64,
    /// Null where scoring failed.
    pub scores: BTreeMap<String, Option<f64>>,
}

/// A file of scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    pub head: Head,
    pub lines: Vec<Line>,
}

impl Line {
    pub fn new(wanted: &Wanted, scores: BTreeMap<String, f64>) -> Self {
        let finite = |(name, score): (String, f64)| (name, score.is_finite().then_some(score));
        Self {
            prompt: wanted.prompt.to_owned(),
            prompt_index: wanted.index,
            image_seed: wanted.image_seed,
            seed: wanted.seed,
            scores: scores.into_iter().map(finite).collect(),
        }
    }
}

impl Scores {
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let fail = |e: serde_json::Error| Error::file(path, e);
        let mut text = serde_json::to_string(&self.head).map_err(fail)?;
        for line in &self.lines {
            text.push('\n');
            text.push_str(&serde_json::to_string(line).map_err(fail)?);
        }
        text.push('\n');
        write_atomic(path, text.as_bytes())
    }

    /// What the file holds, where there is one.
    ///
    /// # Errors
    /// When it cannot be read or is no file of scores.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let text = match std::fs::read_to_string(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|e| Error::file(path, e))?,
        };
        let at = |i: usize, e| Error::file(path, format!("line {}: {e}", i + 1));
        let mut lines = text.lines();
        let head = lines.next().unwrap_or_default();
        let head = serde_json::from_str(head).map_err(|e| at(0, e))?;
        let line = |(i, line)| serde_json::from_str(line).map_err(|e| at(i + 1, e));
        let lines = lines.enumerate().map(line).collect::<Result<_>>()?;
        Ok(Some(Self { head, lines }))
    }

    /// The scores of the base, or of a job, where they are there.
    ///
    /// # Errors
    /// When they were made with other settings than those of the plan: names them.
    pub fn of(plan: &Plan, job: Option<&Job>) -> Result<Option<Self>> {
        let path = job.map_or_else(|| plan.base_scores(), |job| plan.scores(job));
        let Some(found) = Self::read(&path)? else { return Ok(None) };
        let mut changed: Vec<String> = differences(&found.head.sampling, &sampling(plan))
            .into_iter()
            .map(|(_, difference)| difference)
            .collect();
        if let (Some(job), Some(run)) = (job, &found.head.run) {
            let settings = plan.settings(job, &PathBuf::new());
            changed.extend(changes(&run.settings, &settings.table()?, &settings));
        }
        let wanted = plan.sampling.wanted();
        let same = |(line, wanted): (&Line, &Wanted)| {
            (line.prompt.as_str(), line.seed) == (wanted.prompt, wanted.seed)
        };
        if wanted.len() != found.lines.len() || !found.lines.iter().zip(&wanted).all(same) {
            changed.push("prompts".into());
        }
        if changed.is_empty() && found.head.run.is_some() == job.is_some() {
            return Ok(Some(found));
        }
        let message = format!(
            "was made with other settings: {}; give another --out, or the settings as they were",
            changed.join(", ")
        );
        Err(Error::file(path, message))
    }
}

/// What the images depend on beside the trained weights, for the head.
pub fn sampling(plan: &Plan) -> Map<String, Value> {
    let sampling = &plan.sampling;
    Map::from_iter([
        ("model".into(), json!(plan.base.model)),
        ("resolution".into(), json!(plan.base.resolution)),
        ("prompts".into(), json!(sampling.prompts_source)),
        ("image_seeds".into(), json!(sampling.image_seeds)),
        ("steps".into(), json!(sampling.steps)),
        ("guidance".into(), json!(sampling.guidance)),
    ])
}
