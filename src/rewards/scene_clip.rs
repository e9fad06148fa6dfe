//! CLIP score by the small CLIP that was trained in the scene world.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Tensor};
use image::RgbImage;

use super::Reward;
use crate::Result;
use crate::nn::threads;
use crate::sdxl::Clip;

/// Texts whose embeddings are kept; a search scores thousands of images of one prompt.
const REMEMBERED: usize = 256;

/// Cosine of image and text embeddings. It knows scenes and their captions only.
pub struct SceneClip {
    clip: Clip,
    texts: Mutex<HashMap<String, Tensor>>,
}

impl SceneClip {
    /// # Errors
    /// Names the file of the folder that is missing or does not fit.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        Ok(Self { clip: Clip::from_folder(folder)?, texts: Mutex::default() })
    }

    fn text(&self, prompt: &str) -> Result<Tensor> {
        let known = self.texts.lock().unwrap_or_else(PoisonError::into_inner).get(prompt).cloned();
        if let Some(embedding) = known {
            return Ok(embedding);
        }
        let embedding = self.clip.embed_texts(&[prompt])?;
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if texts.len() >= REMEMBERED {
            texts.clear();
        }
        texts.insert(prompt.to_owned(), embedding.clone());
        Ok(embedding)
    }
}

impl Reward for SceneClip {
    fn name(&self) -> &str {
        "scene-clip"
    }

    fn summary(&self) -> &str {
        "Cosine similarity of image and prompt by the scene world's own small CLIP"
    }

    fn range(&self) -> Option<(f64, f64)> {
        Some((-1.0, 1.0))
    }

    fn score(&self, images: &[RgbImage], prompts: &[&str]) -> Result<Vec<f64>> {
        if images.is_empty() {
            return Ok(Vec::new());
        }
        let texts = prompts.iter().map(|p| self.text(p)).collect::<Result<Vec<_>>>()?;
        let texts = Tensor::cat(&texts, 0)?;
        let images = threads::within(|| self.clip.embed_images(images))?;
        let cosine = (images * texts)?.sum(1)?;
        Ok(cosine.to_dtype(DType::F64)?.to_vec1()?)
    }
}
