//! Whether a run may go on with these settings.

use serde_json::{Map, Value};

use super::settings::{LrSchedule, Settings};
use crate::{Error, Result};

/// What may differ when a run goes on: it changes no number of what was done.
const FREE: [&str; 16] = [
    "out",
    "cache",
    "device",
    "steps",
    "rollout_batch",
    "decode_batch",
    "save_every",
    "keep",
    "validate_every",
    "validation_prompts",
    "validation_steps",
    "validation_guidance",
    "validation_images",
    "validation_data",
    "export_format",
    "export_dtype",
];

/// Checks that a run with the settings `now` may go on from a checkpoint with those of `before`.
///
/// # Errors
/// Names the settings that differ and change results.
pub(super) fn same(
    before: &Map<String, Value>,
    now: &Map<String, Value>,
    settings: &Settings,
) -> Result<()> {
    let changed = changes(before, now, settings);
    if changed.is_empty() {
        return Ok(());
    }
    let message = format!(
        "holds a run with other settings: {}; give another folder, or the settings of its \
         config.toml",
        changed.join(", ")
    );
    Err(Error::invalid("out", message))
}

/// The settings that differ and change results, each with both values.
pub fn changes(
    before: &Map<String, Value>,
    now: &Map<String, Value>,
    settings: &Settings,
) -> Vec<String> {
    let free = |key: &str| {
        let scheduled = key == "steps" && settings.lr_schedule != LrSchedule::Constant;
        FREE.contains(&key) && !scheduled
    };
    differences(before, now).into_iter().filter(|(key, _)| !free(key)).map(|(_, d)| d).collect()
}

/// The keys whose values differ, each with a text of both values.
pub fn differences(before: &Map<String, Value>, now: &Map<String, Value>) -> Vec<(String, String)> {
    let keys: std::collections::BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let shown = |value: Option<&Value>| value.map_or("nothing".into(), Value::to_string);
    keys.into_iter()
        .filter(|key| before.get(*key) != now.get(*key))
        .map(|key| {
            let both = (shown(before.get(key)), shown(now.get(key)));
            (key.clone(), format!("{key} ({}, now {})", both.0, both.1))
        })
        .collect()
}
