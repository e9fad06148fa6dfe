//! `sweep.json`: what a sweep's folder was computed with, and the refusal to
//! mix it with anything else.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::cell::Cell;
use super::contract::{Contract, MethodRates};
use super::thinning::Thinning;
use crate::engine::request::ModelRef;
use crate::util::write_atomic;
use crate::{Error, Result};

/// File name of the manifest in a sweep's folder.
pub const FILE: &str = "sweep.json";

/// Keys of [`SweepConfig`] that only say which cells there are, not what is in them.
const GRID: [&str; 7] =
    ["methods", "budgets", "seeds", "prompts", "held_out", "replay", "fewer_prompts"];

/// Everything that the cells depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SweepConfig {
    pub model: ModelRef,
    pub adapter: Option<String>,
    /// The reward that search methods maximise.
    pub reward: String,
    /// The reward that nothing was searched by.
    pub held_out: Option<String>,
    /// Steps of every method but plain sampling.
    pub steps: u32,
    /// Fewest steps that plain sampling may be cut to.
    pub min_steps: u32,
    pub guidance_scale: f64,
    pub methods: Vec<String>,
    pub budgets: Vec<u64>,
    pub seeds: Vec<u64>,
    pub prompts: Vec<String>,
    /// Whether best-of-n runs at the largest budget alone, and the others are derived.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replay: bool,
    /// Which budgets run on the first prompts alone.
    #[serde(default, skip_serializing_if = "Thinning::is_none")]
    pub fewer_prompts: Thinning,
    /// What the budgets count.
    #[serde(default, skip_serializing_if = "Contract::is_default")]
    pub contract: Contract,
    /// `i/n` when this folder holds only every n-th prompt.
    pub shard: Option<String>,
}

impl SweepConfig {
    /// Fingerprint of the settings that a cell's values depend on besides its own key.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut values = json!({
            "model": self.model.sha256, "adapter": self.adapter, "reward": self.reward,
            "steps": self.steps, "min_steps": self.min_steps, "guidance": self.guidance_scale,
        });
        // Folders of before there was a choice keep their cells.
        if !self.contract.is_default() {
            values["contract"] = json!(self.contract);
        }
        let digest = Sha256::digest(values.to_string().as_bytes());
        digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether `cell` is one of this configuration's.
    #[must_use]
    pub fn owns(&self, cell: &Cell, fingerprint: &str) -> bool {
        cell.config == fingerprint
            && self.methods.iter().any(|m| m == cell.requested())
            && self.budgets.contains(&cell.budget)
            && self.fewer_prompts.holds(cell.budget, cell.prompt_index)
            && self.seeds.contains(&cell.seed)
            && self.prompts.get(cell.prompt_index) == Some(&cell.prompt)
    }

    /// The differences from `asked`, one sentence each; with `extend` those of
    /// the grid are allowed.
    fn differences(&self, asked: &Self, extend: bool) -> Result<Vec<String>> {
        let as_value =
            |c: &Self| serde_json::to_value(c).map_err(|e| Error::invalid("sweep", e.to_string()));
        let (here, asked) = (as_value(self)?, as_value(asked)?);
        let both = [&here, &asked].into_iter().filter_map(Value::as_object);
        let keys: BTreeSet<&str> = both.flat_map(|map| map.keys().map(String::as_str)).collect();
        Ok(keys
            .into_iter()
            .filter(|key| here[*key] != asked[*key])
            .filter(|key| !(extend && GRID.contains(key)))
            .map(|key| difference(key, &here[key], &asked[key]))
            .collect())
    }
}

fn difference(key: &str, here: &Value, asked: &Value) -> String {
    if let (Value::Array(a), Value::Array(b)) = (here, asked)
        && a.len().max(b.len()) > 12
    {
        if a.len() != b.len() {
            return format!("{key}: {} there, {} asked for", a.len(), b.len());
        }
        if let Some(i) = (0..a.len()).find(|&i| a[i] != b[i]) {
            return format!("{key}: number {i} is {} there, {} asked for", a[i], b[i]);
        }
    }
    format!("{key}: {here} there, {asked} asked for")
}

/// The manifest as written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Layout of this file and of the cells.
    pub format: u32,
    pub config: SweepConfig,
    /// Budget of the plain row that differences are taken against; absent: chosen by the report.
    pub reference_budget: Option<u64>,
    /// Seconds by method, where budgets are times; measured by whoever made the folder.
    #[serde(default, skip_serializing_if = "MethodRates::is_empty")]
    pub rates: MethodRates,
    /// Where the prompts came from.
    pub prompts_source: String,
    /// The command that made this folder.
    pub command: String,
    pub version: String,
}

impl Manifest {
    /// The manifest in `dir`, if there is one.
    ///
    /// # Errors
    /// When the file is there but cannot be read.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::file(path, e)),
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::file(path, e)),
        }
    }

    /// Checks that `dir` holds nothing or the same sweep, and writes the manifest.
    ///
    /// # Errors
    /// When `dir` holds another sweep: the message names every difference.
    pub fn claim(&self, dir: &Path, extend: bool) -> Result<()> {
        let path = dir.join(FILE);
        match Self::read(dir)? {
            Some(there) => {
                let differences = there.config.differences(&self.config, extend)?;
                if !differences.is_empty() {
                    return Err(Error::file(
                        path,
                        format!(
                            "the folder holds a sweep with another configuration ({}); take \
                             another --out, the same options, or --extend if only methods, \
                             budgets, seeds, prompts, fewer_prompts, the held-out reward or replay \
                             change",
                            differences.join("; ")
                        ),
                    ));
                }
            }
            None if dir.join(super::sweep::CELLS).exists() => {
                return Err(Error::file(
                    path,
                    "missing, but the folder holds cells of a sweep that it should describe",
                ));
            }
            None => {}
        }
        self.write(dir)
    }

    /// Writes the manifest into `dir`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        let mut text = serde_json::to_string_pretty(self).map_err(|e| Error::file(&path, e))?;
        text.push('\n');
        write_atomic(&path, text.as_bytes())
    }
}
