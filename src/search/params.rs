//! Reading a method's parameters from JSON, with errors that name the parameter.

use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// One entry of `SearchMethod::params`.
pub fn describe(kind: &str, default: Value, description: &str) -> Value {
    json!({ "type": kind, "default": default, "description": description })
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

    fn get(&self, key: &str) -> Option<&'a Value> {
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

fn field(key: &str) -> String {
    format!("method.{key}")
}
