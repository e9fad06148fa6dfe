//! Cost units: what a generation spends.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Counted units of work. `f` is the paper's NFE: U-Net forwards of one sample
/// (a guided evaluation counts 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Units {
    /// U-Net forwards of one sample.
    pub f: u64,
    /// Images scored.
    pub v: u64,
    /// VAE decodes of one image.
    pub y: u64,
    /// Calls to a grader outside the process.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub l: u64,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl std::ops::Add for Units {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self { f: self.f + o.f, v: self.v + o.v, y: self.y + o.y, l: self.l + o.l }
    }
}

impl std::ops::AddAssign for Units {
    fn add_assign(&mut self, o: Self) {
        *self = *self + o;
    }
}

/// Units plus wall-clock seconds per stage ("text", "unet", "vae_decode",
/// "reward", "encode").
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Cost {
    #[serde(flatten)]
    pub units: Units,
    pub seconds: BTreeMap<String, f64>,
}

/// Upper bounds; `None` is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub y: Option<u64>,
}

impl Budget {
    /// Whether it bounds anything.
    pub fn bounds(&self) -> bool {
        self.f.or(self.v).or(self.y).is_some()
    }
}
