//! Prompts, encoded once.

use std::collections::HashMap;

use candle_core::Tensor;

use crate::Result;
use crate::diffusion::denoiser::{Conditioning, TextCond};
use crate::diffusion::sdxl_model::SdxlModel;
use crate::sdxl::ClipTokenizer;

/// Most bytes of encoded prompts that are kept; beyond them all are forgotten.
const KEPT_BYTES: usize = 1 << 30;
/// Prompts that the towers take at a time.
const BATCH: usize = 32;

/// The text towers of a checkpoint with what they made of prompts, for images of one size.
pub struct Texts {
    model: SdxlModel,
    tokenizers: [ClipTokenizer; 2],
    size: (u32, u32),
    null: TextCond,
    known: HashMap<String, TextCond>,
    bytes: usize,
    /// Prompts that have more tokens than the towers take.
    truncated: usize,
}

impl Texts {
    /// For images of `size` (width, height) pixels.
    ///
    /// # Errors
    /// The tokenizers' and the towers'.
    pub fn new(model: SdxlModel, size: (u32, u32)) -> Result<Self> {
        let tokenizers = model.folder().tokenizers()?;
        let null = model.null(&tokenizers, size)?;
        let (known, bytes, truncated) = (HashMap::new(), 0, 0);
        Ok(Self { model, tokenizers, size, null, known, bytes, truncated })
    }

    /// The null conditioning of sampling.
    pub fn null(&self) -> &TextCond {
        &self.null
    }

    /// Distinct prompts so far that were cut to the towers' length.
    pub fn truncated(&self) -> usize {
        self.truncated
    }

    /// The prompts' encodings, in order. The same prompt gives the same tensors for as long as
    /// it is kept, so that networks recognise it.
    ///
    /// # Errors
    /// The tokenizers' and the towers'.
    pub fn encode(&mut self, prompts: &[&str]) -> Result<Vec<TextCond>> {
        let bytes = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let mut missing: Vec<&str> = Vec::new();
        for &prompt in prompts {
            if !self.known.contains_key(prompt) && !missing.contains(&prompt) {
                missing.push(prompt);
            }
        }
        if self.bytes > KEPT_BYTES && !missing.is_empty() {
            self.known.clear();
            self.bytes = 0;
            missing = prompts.to_vec();
            missing.sort_unstable();
            missing.dedup();
        }
        for part in missing.chunks(BATCH) {
            let made = self.model.encode(&self.tokenizers, part, self.size)?;
            for (prompt, text) in part.iter().zip(made) {
                self.bytes += bytes(&text.context) + bytes(&text.pooled);
                self.truncated += usize::from(self.tokenizers[0].truncates(prompt)?);
                self.known.insert((*prompt).to_owned(), text);
            }
        }
        Ok(prompts.iter().filter_map(|prompt| self.known.get(*prompt).cloned()).collect())
    }

    /// The conditioning of sampling at a guidance scale.
    pub fn conditioning(&self, positive: TextCond, guidance_scale: f64) -> Conditioning {
        let negative = (guidance_scale != 1.0)
            .then(|| TextCond { time_ids: positive.time_ids, ..self.null.clone() });
        Conditioning { positive, negative, guidance_scale, guidance_rescale: 0.0 }
    }
}

/// Rows of texts as a network takes them: states [B, T, D], pooled [B, P], sizes [B, 6] f32.
///
/// # Errors
/// When the texts differ in length.
pub fn rows(texts: &[&TextCond]) -> Result<[Tensor; 3]> {
    let stack = |of: fn(&TextCond) -> &Tensor| {
        Tensor::stack(&texts.iter().map(|t| of(t)).collect::<Vec<_>>(), 0)
    };
    let context = stack(|t| &t.context)?;
    let sizes: Vec<f32> = texts.iter().flat_map(|t| t.time_ids).collect();
    let sizes = Tensor::from_vec(sizes, (texts.len(), 6), context.device())?;
    Ok([context, stack(|t| &t.pooled)?, sizes])
}
