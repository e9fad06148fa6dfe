//! The validations of a training run, with what it had cost by then.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::report::number;
use crate::Result;
use crate::train::metrics::read;

/// What the tags of validations begin with.
pub const PREFIX: &str = "validation/";

/// A validation of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Validation {
    pub step: u64,
    /// U-Net forwards, and seconds in networks and rewards, of the updates so far.
    pub f: f64,
    pub seconds: f64,
    /// By metric, without [`PREFIX`].
    pub values: BTreeMap<String, f64>,
}

/// Columns of tables of validations; those of metrics follow.
pub const COLUMNS: [&str; 3] = ["step", "f", "seconds"];

impl Validation {
    /// A row of such a table: `first`, [`COLUMNS`], and the metrics of these names.
    pub fn row<'a>(
        &self,
        first: impl IntoIterator<Item = String>,
        names: impl IntoIterator<Item = &'a String>,
    ) -> Vec<String> {
        let own = [self.step.to_string(), self.f.to_string(), self.seconds.to_string()];
        let numbers = names.into_iter().map(|name| number(self.values.get(name).copied()));
        first.into_iter().chain(own).chain(numbers).collect()
    }
}

/// The validations that the run in `dir` has recorded, by step; none where it has no records.
///
/// # Errors
/// When the records cannot be read.
pub fn of_run(dir: &Path) -> Result<Vec<Validation>> {
    Ok(validations(&read(dir)?))
}

/// The records that have a validation.
fn validations(records: &[Map<String, Value>]) -> Vec<Validation> {
    let (mut f, mut seconds) = (0.0, 0.0);
    let mut all = Vec::new();
    for record in records {
        let numbers = |prefix: &'static str| {
            record.iter().filter_map(move |(tag, value)| {
                Some((tag.strip_prefix(prefix)?.to_owned(), value.as_f64()?))
            })
        };
        f = record.get("cost/f").and_then(Value::as_f64).unwrap_or(f);
        seconds += numbers("seconds/").map(|(_, value)| value).sum::<f64>();
        let values: BTreeMap<String, f64> = numbers(PREFIX).collect();
        let step = record.get("step").and_then(Value::as_u64);
        if let (false, Some(step)) = (values.is_empty(), step) {
            all.push(Validation { step, f, seconds, values });
        }
    }
    all
}
