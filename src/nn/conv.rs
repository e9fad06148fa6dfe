//! 2-D convolution of channels-last images.

use candle_core::{Result, Tensor};

use super::affine::Map;
use super::kernel::{Place, place};
use super::layer::{Added, LowRank, PackedWeight, Weights, apply};
use super::resample::nearest;
use super::window::Window;

/// A convolution with square stride, optionally with a low-rank adapter (a k×k convolution
/// down to the rank, then a 1×1 one up).
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// [out, in, kh, kw], as checkpoints have it.
    weight: Tensor,
    /// [out]
    bias: Option<Tensor>,
    stride: usize,
    padding: Padding,
    adapter: Option<LowRank>,
    packed: PackedWeight,
}

/// Rows and columns of zeros around an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padding {
    /// Above and left.
    pub before: usize,
    /// Below and right.
    pub after: usize,
}

impl From<usize> for Padding {
    fn from(all: usize) -> Self {
        Self { before: all, after: all }
    }
}

impl Conv2d {
    /// `weight` [out, in, kh, kw], `bias` [out].
    pub fn new(
        weight: Tensor,
        bias: Option<Tensor>,
        stride: usize,
        padding: impl Into<Padding>,
        adapter: Option<LowRank>,
    ) -> Self {
        let (padding, packed) = (padding.into(), PackedWeight::default());
        Self { weight, bias, stride, padding, adapter, packed }
    }

    /// [B, H, W, in] → [B, Ho, Wo, out].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_added(x, Added::default())
    }

    /// `forward(x)` plus a shift per image and channel and a residual, where given.
    pub fn forward_added(&self, x: &Tensor, added: Added) -> Result<Tensor> {
        let (_, height, width, _) = x.dims4()?;
        self.run(x, (height, width), added)
    }

    /// The convolution of `x` enlarged to `size` (height, width) by nearest neighbours, as
    /// PyTorch's `interpolate(mode="nearest")`.
    pub fn forward_enlarged(&self, x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
        self.run(x, size, Added::default())
    }

    fn run(&self, x: &Tensor, enlarged: (usize, usize), added: Added) -> Result<Tensor> {
        let (window, outer) = self.window(x, enlarged)?;
        if place(x) == Place::Other {
            return self.composed(x, enlarged, added);
        }
        let weights = Weights {
            weight: &self.weight,
            bias: self.bias.as_ref(),
            adapter: self.adapter.as_ref(),
            packed: &self.packed,
        };
        let shape = (window.batch, window.out.0, window.out.1, outer);
        let map = Map::images(window, outer);
        apply(map, x, weights, added, shape)
    }

    fn window(&self, x: &Tensor, enlarged: (usize, usize)) -> Result<(Window, usize)> {
        let (batch, height, width, channels) = x.dims4()?;
        let (outer, inner, kh, kw) = self.weight.dims4()?;
        let all = self.padding.before + self.padding.after;
        let (down, across) = (enlarged.0 + all, enlarged.1 + all);
        if inner != channels || down < kh || across < kw || self.stride == 0 || height * width == 0
        {
            candle_core::bail!(
                "conv2d: input {:?} (channels last) does not fit weight {:?}",
                x.dims(),
                self.weight.dims()
            );
        }
        let window = Window {
            batch,
            height,
            width,
            channels,
            enlarged,
            kernel: (kh, kw),
            stride: self.stride,
            padding: self.padding.before,
            out: ((down - kh) / self.stride + 1, (across - kw) / self.stride + 1),
        };
        Ok((window, outer))
    }

    /// From candle's operations, for other devices and types.
    fn composed(
        &self,
        x: &Tensor,
        (height, width): (usize, usize),
        added: Added,
    ) -> Result<Tensor> {
        let x = nearest(x, height, width)?.permute((0, 3, 1, 2))?.contiguous()?;
        let Padding { before, after } = self.padding;
        let x = x.pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?;
        // candle's backward takes the height's remainder under the stride for the width's too,
        // so the input is cut to leave none.
        let (_, _, kh, kw) = self.weight.dims4()?;
        let rest = |size: usize, k: usize| size.saturating_sub(k) % self.stride;
        let (rows, columns) = (x.dim(2)? - rest(x.dim(2)?, kh), x.dim(3)? - rest(x.dim(3)?, kw));
        let x = x.narrow(2, 0, rows)?.narrow(3, 0, columns)?.contiguous()?;
        let conv = |x: &Tensor, w: &Tensor, stride| x.conv2d(&w.contiguous()?, 0, stride, 1, 1);
        let mut y = conv(&x, &self.weight, self.stride)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
        }
        if let Some(adapter) = &self.adapter {
            let low = conv(&x, &adapter.down, self.stride)?;
            y = (y + (conv(&low, &adapter.up, 1)? * adapter.scale)?)?;
        }
        let mut y = y.permute((0, 2, 3, 1))?.contiguous()?;
        if let Some(shift) = added.shift {
            let (images, outer) = shift.dims2()?;
            y = y.broadcast_add(&shift.reshape((images, 1, 1, outer))?)?;
        }
        added.residual.map_or(Ok(y.clone()), |residual| y + residual)
    }
}
