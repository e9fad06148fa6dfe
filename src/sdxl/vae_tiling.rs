//! A VAE in bounded memory: batches in slices, large images in overlapping tiles (diffusers'
//! `enable_slicing` and `enable_tiling`).

use candle_core::{Device, Tensor};

use super::config::VaeConfig;
use crate::Result;

/// Which images are worked on in overlapping tiles. A tile sees nothing of the rest of its
/// image, so tiled results are near those of whole images, but not the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tiling {
    Off,
    /// Images of more pixels than this, where a side is longer than a tile's.
    Above(usize),
}

impl Default for Tiling {
    /// What SDXL was made for is worked on whole.
    fn default() -> Self {
        Self::Above(1024 * 1024)
    }
}

/// The memory that a VAE may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub tiling: Tiling,
    /// Most bytes of activations at a time: as many images of a batch go together as are
    /// estimated to fit, at least one.
    pub slice_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { tiling: Tiling::default(), slice_bytes: 2 << 30 }
    }
}

/// Decoding or encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Decode,
    Encode,
}

/// How one batch is worked on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    tiles: Option<Tiles>,
    /// Images at a time.
    pub images: usize,
}

impl Bounds {
    /// The largest tile, in pixels, of an image [H, W] that is worked on in tiles.
    pub(super) fn tile(
        &self,
        config: &VaeConfig,
        (height, width): (usize, usize),
    ) -> Option<(usize, usize)> {
        let side = config.tile_latents() * config.factor();
        let tiled = match self.tiling {
            Tiling::Off => false,
            Tiling::Above(pixels) => height * width > pixels && height.max(width) > side,
        };
        tiled.then(|| (height.min(side), width.min(side)))
    }

    /// For images [B, H, W, ·] in pixels.
    pub(super) fn plan(
        &self,
        config: &VaeConfig,
        direction: Direction,
        (height, width): (usize, usize),
        number_bytes: usize,
    ) -> Plan {
        let tile = self.tile(config, (height, width));
        let tiles = tile.map(|_| Tiles::of(config, direction));
        let (down, across) = tile.unwrap_or((height, width));
        // What goes in or comes out, once as it was and once in another layout.
        let image = 2 * config.out_channels.max(config.in_channels) * height * width;
        let activations =
            values_per_latent(config, direction) * (down * across) / config.factor().pow(2).max(1);
        let bytes = (activations + image) * number_bytes;
        Plan { tiles, images: (self.slice_bytes / bytes.max(1)).max(1) }
    }
}

/// Most values that are alive at a time, for each position of the latent image.
fn values_per_latent(config: &VaeConfig, direction: Direction) -> usize {
    let channels = &config.block_out_channels;
    let last = channels.len().saturating_sub(1);
    let level = |(i, to): (usize, &usize)| {
        let from = match direction {
            Direction::Decode => channels[(i + 1).min(last)],
            Direction::Encode => channels[i.saturating_sub(1)],
        };
        // In a residual block: input, its norm and the first convolution's output; or input,
        // second norm, projected input and output.
        (2 * from + to).max(from + 3 * to) << (2 * (last - i))
    };
    let blocks = channels.iter().enumerate().map(level).max();
    // The attention's input, norm, queries, keys, values, their mixture and the output.
    let attention = 7 * channels.last().copied().unwrap_or(0);
    blocks.unwrap_or(0).max(attention)
}

/// Overlapping square tiles of an image [B, H, W, C].
#[derive(Clone, Copy, Debug)]
struct Tiles {
    /// Positions of the input along a side.
    side: usize,
    /// From one tile to the next.
    step: usize,
    /// Positions of the input that make one of the output, at least 1.
    least: usize,
    /// Positions of the output that are kept of a tile.
    kept: usize,
    /// Positions of the output that go over from one tile into the next.
    blended: usize,
}

impl Tiles {
    /// A quarter of a tile overlaps with the next.
    fn of(config: &VaeConfig, direction: Direction) -> Self {
        let (latents, factor) = (config.tile_latents(), config.factor());
        let (quarter, pixels) = (latents / 4, latents / 4 * factor);
        let (input, output, least) = match direction {
            Direction::Decode => (quarter, pixels, 1),
            Direction::Encode => (pixels, quarter, factor),
        };
        Self { side: 4 * input, step: 3 * input, least, kept: 3 * output, blended: output }
    }

    fn starts(self, length: usize) -> impl Iterator<Item = usize> + Clone {
        (0..length.saturating_sub(self.least - 1)).step_by(self.step)
    }

    fn run(self, x: &Tensor, each: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let (_, height, width, _) = x.dims4()?;
        let (mut rows, mut above) = (Vec::new(), Vec::<Tensor>::new());
        for top in self.starts(height) {
            let (mut row, mut lowest, mut left) = (Vec::new(), Vec::new(), None::<Tensor>);
            for (i, start) in self.starts(width).enumerate() {
                let tile = x.narrow(1, top, self.side.min(height - top))?;
                let tile = tile.narrow(2, start, self.side.min(width - start))?.contiguous()?;
                let mut tile = each(&tile)?;
                if let Some(above) = above.get(i) {
                    tile = self.blend(1, above, &tile)?;
                }
                if let Some(left) = &left {
                    tile = self.blend(2, left, &tile)?;
                }
                lowest.push(self.end(1, &tile)?);
                left = Some(self.end(2, &tile)?);
                let (down, across) = (tile.dim(1)?.min(self.kept), tile.dim(2)?.min(self.kept));
                row.push(tile.narrow(1, 0, down)?.narrow(2, 0, across)?.force_contiguous()?);
            }
            rows.push(Tensor::cat(&row, 2)?);
            above = lowest;
        }
        Ok(Tensor::cat(&rows, 1)?)
    }

    /// The last positions along `dim`, in memory of their own.
    fn end(self, dim: usize, tile: &Tensor) -> Result<Tensor> {
        let length = tile.dim(dim)?;
        let count = length.min(self.blended);
        Ok(tile.narrow(dim, length - count, count)?.force_contiguous()?)
    }

    /// `tile` with its beginning gone over to from `before`, the end of its neighbour.
    fn blend(self, dim: usize, before: &Tensor, tile: &Tensor) -> Result<Tensor> {
        let length = tile.dim(dim)?;
        let count = before.dim(dim)?.min(length);
        let before = before.narrow(dim, before.dim(dim)? - count, count)?;
        let mut shape = [1; 4];
        shape[dim] = count;
        let weights = |of: fn(f64) -> f64| -> Result<Tensor> {
            let weights: Vec<f64> = (0..count).map(|i| of(i as f64 / count as f64)).collect();
            let weights = Tensor::from_vec(weights, &shape, &Device::Cpu)?;
            Ok(weights.to_dtype(tile.dtype())?.to_device(tile.device())?)
        };
        let fading = before.broadcast_mul(&weights(|w| 1.0 - w)?)?;
        let growing = tile.narrow(dim, 0, count)?.broadcast_mul(&weights(|w| w)?)?;
        let blended = (fading + growing)?;
        if count == length {
            return Ok(blended);
        }
        Ok(Tensor::cat(&[blended, tile.narrow(dim, count, length - count)?], dim)?)
    }
}

impl Plan {
    /// What `each` makes of `x` [B, H, W, C]: as a whole, or tile by tile.
    pub fn run(self, x: &Tensor, each: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        match self.tiles {
            None => each(x),
            Some(tiles) => tiles.run(x, each),
        }
    }
}
