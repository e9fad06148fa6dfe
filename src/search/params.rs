//! Reading a method's parameters from JSON, with errors that name the parameter.

use serde_json::{Map, Value, json};

use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::meter::fits;
use crate::{Error, Result};

/// An entry of `SearchMethod::params`.
pub fn entry(name: &str, kind: &str, default: Value, description: &str) -> (String, Value) {
    let about = json!({ "type": kind, "default": default, "description": description });
    (name.to_owned(), about)
}

/// An entry whose value is one of the `options`; the first is the default.
pub fn one_of<T>(name: &str, options: &[(&str, T)], description: &str) -> (String, Value) {
    let names: Vec<&str> = options.iter().map(|(name, _)| *name).collect();
    let about = json!({
        "type": "string", "default": names.first(), "enum": names, "description": description,
    });
    (name.to_owned(), about)
}

/// The name of one of the `options`.
pub fn name_of<T: PartialEq>(options: &[(&'static str, T)], value: &T) -> &'static str {
    options.iter().find(|(_, option)| option == value).map_or("", |(name, _)| name)
}

/// A parameter object whose keys are all in `known` (the method's `params()`); the key
/// "name" is ignored, null counts as absent.
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    values: &'a Map<String, Value>,
}

impl<'a> Params<'a> {
    /// # Errors
    /// `Error::Invalid` on "method.<param>" for a key that is not in `known`.
    pub fn new(values: &'a Map<String, Value>, known: &Map<String, Value>) -> Result<Self> {
        let unknown = values.keys().find(|key| *key != "name" && !known.contains_key(*key));
        match unknown {
            Some(key) => {
                let known: Vec<&str> = known.keys().map(String::as_str).collect();
                let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                Err(Error::invalid(field(key), format!("unknown parameter; known: {known}")))
            }
            None => Ok(Self { values }),
        }
    }

    /// As it was written.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// # Errors
    /// `Error::Invalid` unless it is an integer in `range`.
    pub fn integer(&self, key: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                let (low, high) = (range.start(), range.end());
                let message = format!("{value} is not an integer in {low}..={high}");
                Err(Error::invalid(field(key), message))
            }
        }
    }

    /// # Errors
    /// `Error::Invalid` unless it is a number in `range`.
    pub fn number(&self, key: &str, range: std::ops::RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                let (low, high) = (range.start(), range.end());
                let message = format!("{value} is not a number in {low}..={high}");
                Err(Error::invalid(field(key), message))
            }
        }
    }

    /// # Errors
    /// `Error::Invalid` unless it is a list of integers in `range`.
    pub fn integers(
        &self,
        key: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<Vec<u64>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let inside = |v: &Value| v.as_u64().filter(|n| range.contains(n));
        let found = value.as_array().and_then(|all| all.iter().map(inside).collect());
        found.map(Some).ok_or_else(|| {
            let (low, high) = (range.start(), range.end());
            let message = format!("{value} is not a list of integers in {low}..={high}");
            Error::invalid(field(key), message)
        })
    }

    /// # Errors
    /// `Error::Invalid` unless it is true or false.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = value.as_bool().map(Some);
        found.ok_or_else(|| Error::invalid(field(key), format!("{value} is not true or false")))
    }

    /// # Errors
    /// `Error::Invalid` unless it is one of the `options`; the default is the first.
    pub fn choice<T: Copy>(&self, key: &str, options: &[(&str, T)]) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = options.iter().find(|(name, _)| value.as_str() == Some(name));
        match found {
            Some((_, option)) => Ok(Some(*option)),
            None => {
                let names: Vec<&str> = options.iter().map(|(name, _)| *name).collect();
                let message = format!("{value} is not one of: {}", names.join(", "));
                Err(Error::invalid(field(key), message))
            }
        }
    }
}

/// The largest number in `range` whose cost fits `budget`, where cost grows with it; none if not
/// even the smallest does, or if the budget bounds nothing that the cost consists of.
pub fn largest(
    range: std::ops::RangeInclusive<u64>,
    budget: &Budget,
    cost: impl Fn(u64) -> Units,
) -> Option<u64> {
    let fits = |n: u64| fits(budget, cost(n)).is_ok();
    let (mut low, mut high) = (*range.start(), *range.end());
    if low > high || !fits(low) || !budget.bounds() {
        return None;
    }
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Some(low)
}

fn field(key: &str) -> String {
    format!("method.{key}")
}
