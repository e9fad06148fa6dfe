//! What a U-Net makes of texts, kept from step to step and from image to image: keys and
//! values of every cross-attention, the added embedding, and for every timestep seen the
//! residual blocks' time shifts. Everything is computed row by row as it would be in a batch,
//! so results are the same bits.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor, TensorId};

use super::denoiser::TextCond;
use crate::sdxl::{TextStates, UNet};
use crate::{Error, Result};

/// Most bytes of states that one U-Net keeps; the longest unused go first.
const KEPT_BYTES: usize = 512 << 20;
/// Timesteps that are kept for one text: more than any usual schedule has.
const KEPT_STEPS: usize = 256;

/// Which tensors and sizes: tensors are told by their identity.
type Key = (TensorId, TensorId, [u32; 6]);

/// One text, encoded.
#[derive(Debug)]
struct Text {
    key: Key,
    states: TextStates,
    /// By the bits of the timestep: a shift [1, C] for every residual block.
    shifts: Mutex<HashMap<u32, Arc<Vec<Tensor>>>>,
}

/// A batch's texts and their states together.
type Joined = (Vec<Arc<Text>>, Arc<TextStates>);

/// The texts that one U-Net has seen.
#[derive(Debug, Default)]
pub struct TextCache {
    /// In the order of their last use.
    texts: Mutex<Vec<Arc<Text>>>,
    /// The last batch, joined: the next step asks for the same.
    last: Mutex<Option<Joined>>,
}

impl TextCache {
    /// States and shifts of a batch with one timestep and text a row.
    ///
    /// # Errors
    /// The network's.
    pub fn batch(
        &self,
        unet: &UNet,
        timesteps: &[f32],
        texts: &[&TextCond],
    ) -> Result<(Arc<TextStates>, Vec<Tensor>)> {
        let texts = texts.iter().map(|text| self.text(unet, text)).collect::<Result<Vec<_>>>()?;
        let rows = texts.iter().zip(timesteps);
        let rows = rows.map(|(text, t)| text.shifts(unet, *t)).collect::<Result<Vec<_>>>()?;
        let blocks = rows.first().map_or(0, |row| row.len());
        let shift = |block: usize| -> Result<Tensor> {
            let all: Vec<&Tensor> = rows.iter().map(|row| &row[block]).collect();
            Ok(Tensor::cat(&all, 0)?)
        };
        let shifts = (0..blocks).map(shift).collect::<Result<_>>()?;
        Ok((self.join(texts)?, shifts))
    }

    /// Forgets everything, for memory that is needed elsewhere.
    pub fn clear(&self) {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner).clear();
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn text(&self, unet: &UNet, text: &TextCond) -> Result<Arc<Text>> {
        let key = (text.context.id(), text.pooled.id(), text.time_ids.map(f32::to_bits));
        let lock = || self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        let find = |texts: &mut Vec<Arc<Text>>| {
            let at = texts.iter().position(|known| known.key == key)?;
            let known = texts.remove(at);
            texts.push(known.clone());
            Some(known)
        };
        if let Some(known) = find(&mut lock()) {
            return Ok(known);
        }
        let sizes = Tensor::new(&[text.time_ids], text.context.device())?;
        let (context, pooled) = (text.context.unsqueeze(0)?, text.pooled.unsqueeze(0)?);
        let states = unet.encode_text(&context, &pooled, &sizes)?;
        let made = Arc::new(Text { key, states, shifts: Mutex::default() });
        let mut texts = lock();
        texts.push(made.clone());
        let mut bytes: usize = texts.iter().map(|t| t.states.bytes()).sum();
        while bytes > KEPT_BYTES && texts.len() > 1 {
            bytes -= texts.remove(0).states.bytes();
        }
        Ok(made)
    }

    fn join(&self, texts: Vec<Arc<Text>>) -> Result<Arc<TextStates>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, joined)) = last.as_ref()
            && known.len() == texts.len()
            && known.iter().zip(&texts).all(|(a, b)| Arc::ptr_eq(a, b))
        {
            return Ok(joined.clone());
        }
        let parts: Vec<&TextStates> = texts.iter().map(|text| &text.states).collect();
        let joined = Arc::new(TextStates::cat(&parts)?);
        *last = Some((texts, joined.clone()));
        Ok(joined)
    }
}

impl Text {
    fn shifts(&self, unet: &UNet, timestep: f32) -> Result<Arc<Vec<Tensor>>> {
        let lock = || self.shifts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&timestep.to_bits()) {
            return Ok(known.clone());
        }
        if !timestep.is_finite() {
            return Err(Error::invalid("timestep", format!("{timestep} is not a number")));
        }
        let at = Tensor::new(&[timestep], &Device::Cpu)?.to_device(self.states.device())?;
        let made = Arc::new(unet.encode_time(&at, &self.states)?);
        let mut shifts = lock();
        if shifts.len() >= KEPT_STEPS {
            shifts.clear();
        }
        shifts.insert(timestep.to_bits(), made.clone());
        Ok(made)
    }
}
