//! From a finished generation to the bytes of its answer.

use std::collections::BTreeMap;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::live::Live;
use super::store::{Image, Name, Store};
use crate::Error;
use crate::engine::encode::{encode, encode_preview, parameters};
use crate::engine::request::{CostReport, Generation, ImageFormat, ModelRef, Preview, Resolved};

/// A finished generation could not be written; the request is not at fault.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    #[error("an image was not encoded: {0}")]
    Image(#[from] image::ImageError),
    #[error("the answer was not serialised: {0}")]
    Json(#[from] serde_json::Error),
}

/// A finished image.
#[derive(Serialize, Deserialize, ToSchema)]
pub struct AnswerImage {
    /// Base64; where images are wanted with the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
    /// Where the history serves it; null where it could not be stored.
    pub url: Option<String>,
    format: ImageFormat,
    pub seed: u64,
    pub scores: BTreeMap<String, Option<f64>>,
}

/// The answer of a finished generation, and its image files.
#[derive(Serialize, Deserialize, ToSchema)]
pub struct Answer {
    id: String,
    pub images: Vec<AnswerImage>,
    pub cost: CostReport,
    pub resolved: Resolved,
    pub model: ModelRef,
    /// What the method decided.
    #[schema(value_type = Vec<Object>)]
    pub trace: Vec<Value>,
    #[serde(skip)]
    files: Vec<Image>,
}

impl Answer {
    /// Encodes the images. Numbers that are not finite become null. Time spent here is added to
    /// the stage "encode".
    pub fn new(id: &str, generation: Generation) -> Result<Self, AnswerError> {
        let start = Instant::now();
        let Generation { images, mut cost, resolved, model, mut trace, previews } = generation;
        let format = resolved.output_format;
        let (mut described, mut files) = (Vec::new(), Vec::new());
        for image in images {
            let mut scores = image.scores;
            for score in scores.values_mut() {
                *score = score.filter(|s| s.is_finite());
            }
            let bytes = encode(&image.pixels, format, &parameters(&resolved, image.seed, &model))?;
            let name = Name::of(&bytes, format);
            let url = Some(address(&name));
            described.push(AnswerImage { data: None, url, format, seed: image.seed, scores });
            files.push(Image { name, bytes });
        }
        for preview in previews {
            let bytes = encode_preview(&preview.pixels)?;
            let name = Name::of(&bytes, ImageFormat::Png);
            let mut described = serde_json::to_value(&preview)?;
            described["url"] = address(&name).into();
            trace.push(json!({ "image": preview.image, "preview": described }));
            files.push(Image { name, bytes });
        }
        *cost.actual.seconds.entry("encode".to_owned()).or_default() +=
            start.elapsed().as_secs_f64();
        Ok(Self { id: id.to_owned(), images: described, cost, resolved, model, trace, files })
    }

    pub fn files(&self) -> &[Image] {
        &self.files
    }

    /// The files were not stored: their addresses lead nowhere.
    pub fn forget_addresses(&mut self) {
        for image in &mut self.images {
            image.url = None;
        }
        for preview in self.trace.iter_mut().filter_map(|entry| entry.get_mut("preview")) {
            preview["url"] = Value::Null;
        }
    }

    /// The JSON with images as addresses, and as bytes only where they were embedded.
    pub fn linked(&self) -> Result<String, AnswerError> {
        Ok(serde_json::to_string(self)?)
    }

    /// Puts the bytes of the images into it.
    pub fn embed(&mut self) {
        for (image, file) in self.images.iter_mut().zip(&self.files) {
            image.data = Some(STANDARD.encode(&file.bytes));
        }
    }

    /// The JSON with the bytes of the images.
    pub fn inline(mut self) -> Result<Vec<u8>, AnswerError> {
        self.embed();
        Ok(serde_json::to_vec(&self)?)
    }
}

/// Tells watchers of a preview, with its bytes: it has no address before the end.
pub fn push_preview(live: &Live, preview: &Preview) {
    match (serde_json::to_value(preview), encode_preview(&preview.pixels)) {
        (Ok(mut described), Ok(bytes)) => {
            described["data"] = STANDARD.encode(bytes).into();
            live.push("preview", &json!({ "image": preview.image, "preview": described }));
        }
        (Err(error), _) => tracing::warn!(%error, "a preview was not sent"),
        (_, Err(error)) => tracing::warn!(%error, "a preview was not sent"),
    }
}

/// Where images are served.
const IMAGES: &str = "/images/";

fn address(name: &Name) -> String {
    format!("{IMAGES}{}", name.as_str())
}

fn broken() -> Error {
    Error::invalid("history", "an answer that this program did not write")
}

/// The file that a part of a stored answer is about.
fn named(part: &Value) -> crate::Result<Name> {
    let url = part["url"].as_str().and_then(|url| url.strip_prefix(IMAGES));
    url.and_then(Name::parse).ok_or_else(broken)
}

/// The image files of an answer that [`Answer::linked`] wrote.
///
/// # Errors
/// It did not.
pub fn images(answer: &Value) -> crate::Result<Vec<Name>> {
    answer["images"].as_array().ok_or_else(broken)?.iter().map(named).collect()
}

/// The files of its previews, in the order of its trace.
///
/// # Errors
/// As [`images`].
pub fn previews(answer: &Value) -> crate::Result<Vec<Name>> {
    let trace = answer["trace"].as_array().ok_or_else(broken)?;
    trace.iter().filter_map(|entry| entry.get("preview")).map(named).collect()
}

/// Puts the bytes of stored images into the JSON of an answer.
///
/// # Errors
/// As [`images`], and when an image cannot be read.
pub fn with_bytes(linked: &str, store: &Store) -> crate::Result<Vec<u8>> {
    let mut answer: Value = serde_json::from_str(linked).map_err(|_| broken())?;
    let files = store.images(&images(&answer)?)?;
    let images = answer["images"].as_array_mut().ok_or_else(broken)?;
    for (image, bytes) in images.iter_mut().zip(files) {
        let rest = image.as_object_mut().map(std::mem::take).ok_or_else(broken)?;
        let data = ("data".to_owned(), STANDARD.encode(bytes).into());
        *image = Value::Object([data].into_iter().chain(rest).collect());
    }
    serde_json::to_vec(&answer).map_err(|_| broken())
}
