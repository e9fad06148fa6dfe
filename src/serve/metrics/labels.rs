//! What labels may be: fixed lists, and names of the registry. Never what a caller wrote.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use crate::engine::request::{Listing, ModelInfo};
use crate::serve::problem::{Kind, Problem};

/// HTTP methods; any other is counted as the last.
pub const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "other"];
/// Stages of a generation; any other is counted as the last.
pub const STAGES: &[&str] =
    &["plan", "text", "unet", "vae_decode", "reward", "observed", "encode", "store", "other"];
pub const UNITS: &[&str] = &["f", "v", "y", "l"];
/// In which phase a client left its generation.
pub const PHASES: &[&str] = &["queued", "running"];
/// Sides of squares, in pixels.
const SIDES: [(u64, &str); 7] = [
    (128, "128x128"),
    (256, "256x256"),
    (512, "512x512"),
    (768, "768x768"),
    (1024, "1024x1024"),
    (1536, "1536x1536"),
    (2048, "2048x2048"),
];
const LARGER: &str = "larger";
const UNKNOWN: &str = "unknown";

/// Problems that are counted as rejections.
pub const REJECTIONS: [Kind; 9] = [
    Kind::QueueFull,
    Kind::Budget,
    Kind::DeadlineInfeasible,
    Kind::InsufficientMemory,
    Kind::NotReady,
    Kind::Draining,
    Kind::Unauthorized,
    Kind::Forbidden,
    Kind::MisdirectedRequest,
];

/// How a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Completed,
    Cancelled,
    Deadline,
    /// It would have cost more than it may, while running.
    Budget,
    Failed,
}

impl Outcome {
    /// Of a generation that ends with a problem.
    #[must_use]
    pub fn of(problem: &Problem) -> Self {
        match problem.kind {
            Kind::Cancelled => Self::Cancelled,
            Kind::Deadline => Self::Deadline,
            Kind::Budget => Self::Budget,
            _ => Self::Failed,
        }
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Deadline => "deadline",
            Self::Budget => "budget",
            Self::Failed => "failed",
        }
    }
}

/// The one of `list` that a value is, or its last.
fn one_of(list: &'static [&'static str], value: &str) -> &'static str {
    let last = list.last().copied().unwrap_or(UNKNOWN);
    list.iter().find(|known| **known == value).copied().unwrap_or(last)
}

pub fn method(value: &str) -> &'static str {
    one_of(METHODS, value)
}

pub fn stage(value: &str) -> &'static str {
    one_of(STAGES, value)
}

/// The least square with as many pixels.
pub fn resolution(width: u32, height: u32) -> &'static str {
    let pixels = u64::from(width) * u64::from(height);
    SIDES.iter().find(|(side, _)| side * side >= pixels).map_or(LARGER, |(_, name)| name)
}

pub fn resolutions() -> Vec<&'static str> {
    SIDES.iter().map(|(_, name)| *name).chain([LARGER]).collect()
}

/// Models and methods that there are.
#[derive(Debug, Default)]
pub struct Registry(OnceLock<[BTreeSet<String>; 2]>);

impl Registry {
    /// Learns the names once.
    pub fn learn(&self, models: &[ModelInfo], unloaded: &[String], methods: &[Listing]) {
        let models = models.iter().map(|model| model.id.clone());
        let models = models.chain(unloaded.iter().cloned()).collect();
        let methods = methods.iter().map(|method| method.name.clone()).collect();
        self.0.get_or_init(|| [models, methods]);
    }

    fn known<'a>(&self, which: usize, name: &'a str) -> &'a str {
        let known = self.0.get().is_some_and(|all| all[which].contains(name));
        if known { name } else { UNKNOWN }
    }

    pub fn model<'a>(&self, name: &'a str) -> &'a str {
        self.known(0, name)
    }

    pub fn method<'a>(&self, name: &'a str) -> &'a str {
        self.known(1, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_caller_writes_is_one_of_a_list() {
        assert_eq!([method("GET"), method("get"), method("BREW")], ["GET", "other", "other"]);
        assert_eq!([stage("unet"), stage("{}\"\n")], ["unet", "other"]);
        let registry = Registry::default();
        assert_eq!(registry.method("plain"), "unknown", "nothing is known yet");
        let plain = Listing {
            name: "plain".to_owned(),
            summary: String::new(),
            params: Default::default(),
        };
        registry.learn(&[], &[], &[plain]);
        assert_eq!([registry.method("plain"), registry.method("x")], ["plain", "unknown"]);
        assert_eq!(registry.model("plain"), "unknown");
    }

    #[test]
    fn resolutions_are_few() {
        assert_eq!(resolution(128, 128), "128x128");
        assert_eq!(resolution(8, 8), "128x128");
        assert_eq!(resolution(136, 128), "256x256");
        assert_eq!(resolution(768, 1344), "1024x1024");
        assert_eq!(resolution(u32::MAX, u32::MAX), "larger");
        let mut seen = BTreeSet::new();
        for width in (8..4096).step_by(56) {
            seen.extend((8..4096).step_by(56).map(|height| resolution(width, height)));
        }
        assert_eq!(seen.len(), resolutions().len());
    }
}
