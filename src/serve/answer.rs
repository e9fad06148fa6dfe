//! From a finished generation to the bytes of its answer.

use std::collections::BTreeMap;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::store::{Image, Name, Store};
use crate::Error;
use crate::engine::encode::{encode, parameters};
use crate::engine::request::{CostReport, Generation, ImageFormat, ModelRef, Resolved};

/// A finished generation could not be written; the request is not at fault.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    #[error("an image was not encoded: {0}")]
    Image(#[from] image::ImageError),
    #[error("the answer was not serialised: {0}")]
    Json(#[from] serde_json::Error),
}

/// A finished image.
#[derive(Serialize, ToSchema)]
struct AnswerImage {
    /// Base64; where images are wanted with the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
    /// Where the history serves it; null where it could not be stored.
    url: Option<String>,
    format: ImageFormat,
    seed: u64,
    scores: BTreeMap<String, Option<f64>>,
}

/// The answer of a finished generation, and its image files.
#[derive(Serialize, ToSchema)]
pub struct Answer {
    id: String,
    images: Vec<AnswerImage>,
    cost: CostReport,
    resolved: Resolved,
    model: ModelRef,
    /// What the method decided.
    #[schema(value_type = Vec<Object>)]
    trace: Vec<Value>,
    #[serde(skip)]
    files: Vec<Image>,
}

impl Answer {
    /// Encodes the images. Numbers that are not finite become null. Time spent here is added to
    /// the stage "encode".
    pub fn new(id: &str, generation: Generation) -> Result<Self, AnswerError> {
        let start = Instant::now();
        let Generation { images, mut cost, resolved, model, trace } = generation;
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
    }

    /// The JSON with images as addresses.
    pub fn linked(&self) -> Result<String, AnswerError> {
        Ok(serde_json::to_string(self)?)
    }

    /// The JSON with the bytes of the images.
    pub fn inline(mut self) -> Result<Vec<u8>, AnswerError> {
        for (image, file) in self.images.iter_mut().zip(&self.files) {
            image.data = Some(STANDARD.encode(&file.bytes));
        }
        Ok(serde_json::to_vec(&self)?)
    }
}

/// Where an image is served.
fn address(name: &Name) -> String {
    format!("/images/{}", name.as_str())
}

fn broken() -> Error {
    Error::invalid("history", "an answer that this program did not write")
}

/// The bytes of the images that a stored answer names.
///
/// # Errors
/// An image cannot be read, or the answer was not written by [`Answer::linked`].
pub fn files(answer: &Value, store: &Store) -> crate::Result<Vec<Vec<u8>>> {
    let images = answer["images"].as_array().ok_or_else(broken)?;
    let read = |image: &Value| {
        let url = image["url"].as_str().unwrap_or("");
        let name = url.strip_prefix("/images/").and_then(Name::parse).ok_or_else(broken)?;
        store.image(&name)?.ok_or_else(|| Error::file(url, "is not there any more"))
    };
    images.iter().map(read).collect()
}

/// Puts the bytes of stored images into the JSON of an answer.
///
/// # Errors
/// As [`files`].
pub fn with_bytes(linked: &str, store: &Store) -> crate::Result<Vec<u8>> {
    let mut answer: Value = serde_json::from_str(linked).map_err(|_| broken())?;
    let files = files(&answer, store)?;
    let images = answer["images"].as_array_mut().ok_or_else(broken)?;
    for (image, bytes) in images.iter_mut().zip(files) {
        let rest = image.as_object_mut().map(std::mem::take).ok_or_else(broken)?;
        let data = ("data".to_owned(), STANDARD.encode(bytes).into());
        *image = Value::Object([data].into_iter().chain(rest).collect());
    }
    serde_json::to_vec(&answer).map_err(|_| broken())
}
