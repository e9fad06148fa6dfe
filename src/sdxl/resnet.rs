//! The residual block of the U-Net and the VAE.

use candle_core::Tensor;

use super::weights::Scope;
use crate::Result;
use crate::nn::{Added, Conv2d, GroupNorm, Linear};

/// diffusers' `ResnetBlock2D`, with the time embedding (U-Net) or without (VAE).
#[derive(Clone, Debug)]
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    pub fn load(
        scope: &Scope,
        (input, output): (usize, usize),
        time: Option<usize>,
        groups: usize,
        eps: f64,
    ) -> Result<Self> {
        let shortcut = if input == output {
            None
        } else {
            Some(scope.at("conv_shortcut").conv(input, output, 1, 1, 0)?)
        };
        Ok(Self {
            norm1: scope.at("norm1").group_norm(groups, input, eps)?,
            conv1: scope.at("conv1").conv(input, output, 3, 1, 1)?,
            time: time.map(|t| scope.at("time_emb_proj").linear(t, output)).transpose()?,
            norm2: scope.at("norm2").group_norm(groups, output, eps)?,
            conv2: scope.at("conv2").conv(output, output, 3, 1, 1)?,
            shortcut,
        })
    }

    /// Takes the activated time embedding [B, T] to the block's shift [B, out].
    pub fn time_projection(&self) -> Option<&Linear> {
        self.time.as_ref()
    }

    /// `x` [B, H, W, in] → [B, H, W, out]; `shift` [B, out] from the time projection.
    pub fn forward(&self, x: &Tensor, shift: Option<&Tensor>) -> Result<Tensor> {
        // Assigned anew, not shadowed: each is freed when the next is there.
        let mut h = self.norm1.forward_silu(x)?;
        h = self.conv1.forward_added(&h, Added { shift, residual: None })?;
        h = self.norm2.forward_silu(&h)?;
        let projected = self.shortcut.as_ref().map(|conv| conv.forward(x)).transpose()?;
        let residual = Some(projected.as_ref().unwrap_or(x));
        Ok(self.conv2.forward_added(&h, Added { shift: None, residual })?)
    }
}
