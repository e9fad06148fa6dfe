//! The U-Net's forward pass, as [`crate::sdxl::UNet`] runs it.

use super::trace::{Kind, Trace, Value, Window};
use crate::Result;
use crate::sdxl::config::UNetConfig;

/// Sizes that do not come from the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    pub batch: usize,
    /// Of the latent.
    pub height: usize,
    pub width: usize,
    /// Of the text.
    pub tokens: usize,
}

/// A residual block and the transformer after it.
struct Block {
    resnet: String,
    output: usize,
    transformer: Option<Transformer>,
}

struct Transformer {
    name: String,
    width: usize,
    depth: usize,
    heads: usize,
}

struct Level {
    blocks: Vec<Block>,
    /// The convolution between this level and the next.
    resample: Option<String>,
}

struct Levels {
    down: Vec<Level>,
    mid: Option<Level>,
    up: Vec<Level>,
}

impl Levels {
    fn of(config: &UNetConfig) -> Self {
        let channels = &config.block_out_channels;
        let count = channels.len();
        let level =
            |prefix: String, level: usize, layers: usize, crossed: bool, sampler: Option<&str>| {
                let block = |i: usize, attention: bool| Block {
                    resnet: format!("{prefix}.resnets.{i}"),
                    output: channels[level],
                    transformer: attention.then(|| Transformer {
                        name: format!("{prefix}.attentions.{i}"),
                        width: channels[level],
                        depth: config.transformer_layers_per_block.at(level).unwrap_or(1),
                        heads: config.heads(level),
                    }),
                };
                Level {
                    blocks: match prefix.as_str() {
                        "mid_block" => vec![block(0, true), block(1, false)],
                        _ => (0..layers).map(|i| block(i, crossed)).collect(),
                    },
                    resample: sampler.map(|name| format!("{prefix}.{name}")),
                }
            };
        let layers = |level: usize| config.layers_per_block.at(level).unwrap_or(2);
        let down = |i: usize| {
            let crossed = config.down_block_types[i] == "CrossAttnDownBlock2D";
            let sampler = (i + 1 < count).then_some("downsamplers.0.conv");
            level(format!("down_blocks.{i}"), i, layers(i), crossed, sampler)
        };
        let up = |i: usize| {
            let (from, crossed) = (count - 1 - i, config.up_block_types[i] == "CrossAttnUpBlock2D");
            let sampler = (i + 1 < count).then_some("upsamplers.0.conv");
            level(format!("up_blocks.{i}"), from, layers(from) + 1, crossed, sampler)
        };
        let mid = |_: &String| level("mid_block".into(), count - 1, 2, true, None);
        Self {
            down: (0..count).map(down).collect(),
            mid: config.mid_block_type.as_ref().map(mid),
            up: (0..count).map(up).collect(),
        }
    }

    fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.down.iter().chain(&self.mid).chain(&self.up).flat_map(|level| &level.blocks)
    }
}

/// The operations of one U-Net forward of `sample`.
///
/// # Errors
/// When the configuration is unusable or the latent too small.
pub fn unet(config: &UNetConfig, sample: Sample) -> Result<Trace> {
    config.check()?;
    let mut t = Trace::default();
    let levels = Levels::of(config);
    let batch = sample.batch as u64;
    let first = config.block_out_channels[0];
    let (sources, shifts) = conditions(&mut t, config, &levels, sample);
    let mut walk = Walk { sources: sources.into_iter(), shifts: shifts.into_iter() };

    t.next_segment();
    let size = (sample.height as u64, sample.width as u64);
    let latents = t.input(batch, size, config.in_channels as u64);
    let latents = t.pointwise("conv_in", Kind::Layout, &[latents]);
    let mut x = t.conv("conv_in", latents, Window::same(first, 3), &[])?;
    let mut skips = vec![x];
    for level in &levels.down {
        let given = x;
        for block in &level.blocks {
            x = walk.block(&mut t, block, x, None, config)?;
            skips.push(x);
        }
        if let Some(name) = &level.resample {
            t.next_segment();
            let padding = 2 * config.downsample_padding as u64;
            let window =
                Window { outer: x.channels, kernel: 3, stride: 2, padding, enlarged: None };
            x = t.conv(name, x, window, &[])?;
            skips.push(x);
        }
        t.hold(&[given]);
    }
    for block in levels.mid.iter().flat_map(|mid| &mid.blocks) {
        x = walk.block(&mut t, block, x, None, config)?;
    }
    for level in &levels.up {
        let given = x;
        for block in &level.blocks {
            x = walk.block(&mut t, block, x, skips.pop(), config)?;
        }
        if let Some(name) = &level.resample {
            t.next_segment();
            let to = skips.last().map_or((2 * x.height, 2 * x.width), |s| (s.height, s.width));
            let window = Window { enlarged: Some(to), ..Window::same(x.channels as usize, 3) };
            x = t.conv(name, x, window, &[])?;
        }
        t.hold(&[given]);
    }
    t.next_segment();
    let h = t.norm("conv_norm_out", Kind::GroupNorm, x);
    let y = t.conv("conv_out", h, Window::same(config.out_channels, 3), &[])?;
    t.hold(&[x]);
    t.pointwise("conv_out", Kind::Layout, &[y]);
    Ok(t)
}

/// Every cross-attention's keys and values, and every residual block's shift.
fn conditions(
    t: &mut Trace,
    config: &UNetConfig,
    levels: &Levels,
    sample: Sample,
) -> (Vec<[Value; 2]>, Vec<Value>) {
    let (batch, first) = (sample.batch as u64, config.block_out_channels[0]);
    let wide = 4 * first;
    let two_layers = |t: &mut Trace, name: &str, x: Value| {
        let h = t.linear(&format!("{name}.linear_1"), x, wide, true, None);
        let h = t.pointwise(name, Kind::Activation, &[h]);
        t.linear(&format!("{name}.linear_2"), h, wide, true, None)
    };
    let added = match config.projection_class_embeddings_input_dim {
        Some(width) if config.addition_embed_type.is_some() => {
            let joined = t.input(batch, (1, 1), width as u64);
            Some(two_layers(t, "add_embedding", joined))
        }
        _ => None,
    };
    let context = t.input(batch, (1, sample.tokens as u64), config.cross_attention_dim as u64);
    let mut sources = Vec::new();
    for transformer in levels.blocks().filter_map(|block| block.transformer.as_ref()) {
        for i in 0..transformer.depth {
            let name = format!("{}.transformer_blocks.{i}.attn2", transformer.name);
            let project = |t: &mut Trace, part: &str| {
                t.linear(&format!("{name}.{part}"), context, transformer.width, false, None)
            };
            sources.push([project(t, "to_k"), project(t, "to_v")]);
        }
    }
    let angles = t.input(batch, (1, 1), first as u64);
    let mut time = two_layers(t, "time_embedding", angles);
    if let Some(added) = added {
        time = t.pointwise("time_embedding", Kind::Add, &[time, added]);
    }
    let time = t.pointwise("time_embedding", Kind::Activation, &[time]);
    let shift = |block: &Block| {
        t.linear(&format!("{}.time_emb_proj", block.resnet), time, block.output, true, None)
    };
    let shifts = levels.blocks().map(shift).collect();
    (sources, shifts)
}

/// What the blocks still to come take from text and time.
struct Walk {
    sources: std::vec::IntoIter<[Value; 2]>,
    shifts: std::vec::IntoIter<Value>,
}

impl Walk {
    fn block(
        &mut self,
        t: &mut Trace,
        block: &Block,
        x: Value,
        skip: Option<Value>,
        config: &UNetConfig,
    ) -> Result<Value> {
        t.next_segment();
        let joined = skip.map(|skip| t.concatenate(&block.resnet, x, skip));
        let h = resnet(t, &block.resnet, joined.unwrap_or(x), block.output, self.shifts.next())?;
        let y = match &block.transformer {
            Some(transformer) => {
                self.transformer(t, transformer, h, config.use_linear_projection)?
            }
            None => h,
        };
        t.hold(&[x]);
        t.hold(skip.as_slice());
        t.hold(joined.as_slice());
        Ok(y)
    }

    fn transformer(
        &mut self,
        t: &mut Trace,
        shape: &Transformer,
        x: Value,
        linear: bool,
    ) -> Result<Value> {
        let Transformer { name, width, depth, heads } = shape;
        let project = |t: &mut Trace, part: &str, x: Value, added: Option<Value>| {
            let name = format!("{name}.{part}");
            if linear {
                Ok(t.linear(&name, x, *width, true, added))
            } else {
                t.conv(&name, x, Window::same(*width, 1), added.as_slice())
            }
        };
        // The projections belong to the first and the last block.
        t.next_segment();
        let h = t.norm(&format!("{name}.norm"), Kind::GroupNorm, x);
        let first = project(t, "proj_in", h, None)?;
        let mut tokens = first;
        for i in 0..*depth {
            if i > 0 {
                t.next_segment();
            }
            if let Some(text) = self.sources.next() {
                let name = format!("{name}.transformer_blocks.{i}");
                tokens = transformer_block(t, &name, tokens, text, *heads);
            }
        }
        let y = project(t, "proj_out", tokens, Some(x))?;
        t.hold(&[h, first]);
        Ok(y)
    }
}

fn transformer_block(t: &mut Trace, name: &str, x: Value, text: [Value; 2], heads: usize) -> Value {
    let width = x.channels as usize;
    let norm =
        |t: &mut Trace, i: usize, x: Value| t.norm(&format!("{name}.norm{i}"), Kind::LayerNorm, x);
    let first = norm(t, 1, x);
    let [q, k, v] = ["to_q", "to_k", "to_v"]
        .map(|part| t.linear(&format!("{name}.attn1.{part}"), first, width, false, None));
    let h = t.attention(&format!("{name}.attn1"), Kind::SelfAttention, [q, k, v], heads);
    let after = t.linear(&format!("{name}.attn1.to_out.0"), h, width, true, Some(x));
    t.hold(&[k, v]);
    let h = norm(t, 2, after);
    let q = t.linear(&format!("{name}.attn2.to_q"), h, width, false, None);
    let inputs = [q, text[0], text[1]];
    let attended = t.attention(&format!("{name}.attn2"), Kind::CrossAttention, inputs, heads);
    let last = t.linear(&format!("{name}.attn2.to_out.0"), attended, width, true, Some(after));
    t.hold(&[h]);
    let normed = norm(t, 3, last);
    let wide = t.linear(&format!("{name}.ff.net.0.proj"), normed, 8 * width, true, None);
    let h = t.geglu(&format!("{name}.ff.net.0"), wide);
    t.hold(&[normed]);
    let y = t.linear(&format!("{name}.ff.net.2"), h, width, true, Some(last));
    t.hold(&[x, first, after]);
    y
}

/// The residual block of the U-Net (with `shift`) and the VAE (without).
pub(super) fn resnet(
    t: &mut Trace,
    name: &str,
    x: Value,
    output: usize,
    shift: Option<Value>,
) -> Result<Value> {
    let h = t.norm(&format!("{name}.norm1"), Kind::GroupNorm, x);
    let h = t.conv(&format!("{name}.conv1"), h, Window::same(output, 3), shift.as_slice())?;
    let h = t.norm(&format!("{name}.norm2"), Kind::GroupNorm, h);
    let residual = if x.channels == output as u64 {
        x
    } else {
        t.conv(&format!("{name}.conv_shortcut"), x, Window::same(output, 1), &[])?
    };
    let y = t.conv(&format!("{name}.conv2"), h, Window::same(output, 3), &[residual])?;
    t.hold(&[x]);
    Ok(y)
}
