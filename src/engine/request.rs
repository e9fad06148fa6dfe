//! What a caller asks of the engine, and what it gets back. The server's JSON
//! bodies are these types.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::diffusion::cost::{Budget, Cost, Units};
pub use crate::util::Listing;

/// A generation request as a caller writes it: everything but the prompt is
/// optional and resolved against the model's defaults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerateRequest {
    #[schema(min_length = 1, pattern = r"\S")]
    pub prompt: String,
    /// Absent: the checkpoint's null conditioning (zeros or the empty string).
    #[serde(default)]
    pub negative_prompt: Option<String>,
    /// Model id; absent: the first model.
    #[serde(default)]
    pub model: Option<String>,
    #[serde(default)]
    pub adapter: Option<String>,
    /// `"best-of-n"` or `{"name": "best-of-n", "kernel": "sde"}`.
    #[serde(default)]
    pub method: Option<MethodRequest>,
    #[serde(default)]
    pub seed: Option<u64>,
    #[serde(default)]
    #[schema(minimum = 1)]
    pub width: Option<u32>,
    #[serde(default)]
    #[schema(minimum = 1)]
    pub height: Option<u32>,
    #[serde(default)]
    #[schema(minimum = 1)]
    pub steps: Option<u32>,
    #[serde(default)]
    #[schema(minimum = 0, maximum = 100)]
    pub guidance_scale: Option<f64>,
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1)]
    pub guidance_rescale: Option<f64>,
    /// "ddim", "euler", "heun", "dpmpp-2m".
    #[serde(default)]
    pub solver: Option<String>,
    /// Images to return (seeds seed, seed+1, …).
    #[serde(default)]
    #[schema(minimum = 1)]
    pub n: Option<u32>,
    /// The reward that a search maximises.
    #[serde(default)]
    pub reward: Option<String>,
    /// A number (U-Net forwards per image) or `{"f":…, "v":…, "y":…}`.
    #[serde(default)]
    pub budget: Option<BudgetRequest>,
    /// "png" (default), "jpeg", "webp".
    #[serde(default)]
    pub output_format: Option<ImageFormat>,
    /// Whether the trace has digests of the network's predictions, to find where two runs part.
    #[serde(default)]
    pub digests: Option<bool>,
    /// Estimates of each image on the way, each for a Y; at most 16, and fewer than evaluations.
    #[serde(default)]
    #[schema(maximum = 16)]
    pub previews: Option<u32>,
    /// Whether its predictions never go in one batch with those of other requests.
    #[serde(default)]
    pub alone: Option<bool>,
    /// Milliseconds from its acceptance after which nobody wants the answer any more. The server
    /// keeps it: it refuses what cannot be in time, and stops what is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 604_800_000)]
    pub deadline_ms: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum MethodRequest {
    Name(String),
    Full {
        name: String,
        #[serde(flatten)]
        #[schema(value_type = HashMap<String, Value>)]
        params: serde_json::Map<String, Value>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum BudgetRequest {
    Forwards(u64),
    Full(Budget),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    #[default]
    Png,
    Jpeg,
    Webp,
}

impl ImageFormat {
    /// As in a request, and as a file's extension.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::Webp => "webp",
        }
    }
}

/// Every effective value of a request, after defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Resolved {
    pub prompt: String,
    pub negative_prompt: Option<String>,
    pub model: String,
    pub adapter: Option<String>,
    /// Method name and every parameter, the planned ones (candidates, steps) included.
    #[schema(value_type = Object)]
    pub method: serde_json::Map<String, Value>,
    pub seed: u64,
    pub width: u32,
    pub height: u32,
    pub steps: u32,
    pub guidance_scale: f64,
    pub guidance_rescale: f64,
    pub solver: String,
    pub n: u32,
    pub reward: Option<String>,
    /// Per image.
    pub budget: Budget,
    pub output_format: ImageFormat,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub digests: bool,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub previews: u32,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub alone: bool,
}

impl Resolved {
    /// The name of the method.
    #[must_use]
    pub fn method_name(&self) -> &str {
        self.method.get("name").and_then(Value::as_str).unwrap_or("other")
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// An estimate of a clean image on the way to it.
#[derive(Clone, Debug, Serialize)]
pub struct Preview {
    #[serde(skip)]
    pub image: u32,
    /// U-Net forwards spent on the image when it was taken,
    pub f: u64,
    /// of those that are planned.
    pub of: u64,
    /// The timestep of the prediction.
    pub t: f64,
    /// Every reward that needs no call outside; `None` where scoring failed.
    pub scores: BTreeMap<String, Option<f64>>,
    #[serde(skip)]
    pub pixels: image::RgbImage,
}

/// One finished image.
#[derive(Clone, Debug)]
pub struct GeneratedImage {
    pub pixels: image::RgbImage,
    pub seed: u64,
    /// Every registered reward; `None` where scoring failed.
    pub scores: BTreeMap<String, Option<f64>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CostReport {
    pub planned: Units,
    pub actual: Cost,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelRef {
    pub id: String,
    /// Over the weights files, in name order.
    pub sha256: String,
}

#[derive(Clone, Debug)]
pub struct Generation {
    pub images: Vec<GeneratedImage>,
    pub cost: CostReport,
    pub resolved: Resolved,
    pub model: ModelRef,
    /// One entry per decision of the method, see each method.
    pub trace: Vec<Value>,
    /// Where they were asked for, in the order in which they were taken.
    pub previews: Vec<Preview>,
}

/// A model as listed to callers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelInfo {
    pub id: String,
    pub sha256: String,
    pub default_width: u32,
    pub default_height: u32,
    pub default_steps: u32,
    pub default_guidance_scale: f64,
    pub adapters: Vec<String>,
    /// Parameters of the U-Net.
    pub unet_parameters: u64,
    /// Of the U-Net's numbers: "f32", "bf16", "f16".
    #[serde(default)]
    pub dtype: String,
    pub example_prompts: Vec<String>,
}
