//! The VAE's two passes, as [`crate::sdxl::Vae`] runs them.

use super::trace::{Kind, Trace, Value, Window};
use super::unet::resnet;
use crate::Result;
use crate::sdxl::config::VaeConfig;

/// The encoder's operations for `batch` images of `height` × `width` pixels.
///
/// # Errors
/// When the configuration is unusable or the image too small.
pub fn encode(config: &VaeConfig, batch: usize, (height, width): (usize, usize)) -> Result<Trace> {
    config.check()?;
    let mut t = Trace::default();
    let channels = &config.block_out_channels;
    let images = t.input(batch as u64, (height as u64, width as u64), config.in_channels as u64);
    let images = t.pointwise("encoder.conv_in", Kind::Layout, &[images]);
    let mut x = t.conv("encoder.conv_in", images, Window::same(channels[0], 3), &[])?;
    for (level, &output) in channels.iter().enumerate() {
        let prefix = format!("encoder.down_blocks.{level}");
        for i in 0..config.layers_per_block {
            x = resnet(&mut t, &format!("{prefix}.resnets.{i}"), x, output, None)?;
        }
        if level + 1 < channels.len() {
            let outer = output as u64;
            let window = Window { outer, kernel: 3, stride: 2, padding: 1, enlarged: None };
            x = t.conv(&format!("{prefix}.downsamplers.0.conv"), x, window, &[])?;
        }
    }
    x = mid(&mut t, "encoder.mid_block", x, config)?;
    let x = t.norm("encoder.conv_norm_out", Kind::GroupNorm, x);
    let moments = 2 * config.latent_channels;
    let mut x = t.conv("encoder.conv_out", x, Window::same(moments, 3), &[])?;
    if config.use_quant_conv {
        x = t.conv("quant_conv", x, Window::same(moments, 1), &[])?;
    }
    t.pointwise("quant_conv", Kind::Layout, &[x]);
    Ok(t)
}

/// The decoder's operations for `batch` images of `height` × `width` pixels.
///
/// # Errors
/// When the configuration is unusable or the image too small.
pub fn decode(config: &VaeConfig, batch: usize, (height, width): (usize, usize)) -> Result<Trace> {
    config.check()?;
    let mut t = Trace::default();
    let (channels, factor) = (&config.block_out_channels, config.factor());
    let widest = channels[channels.len() - 1];
    let size = ((height / factor) as u64, (width / factor) as u64);
    let latents = t.input(batch as u64, size, config.latent_channels as u64);
    let mut x = t.pointwise("decoder.conv_in", Kind::Layout, &[latents]);
    if config.use_post_quant_conv {
        x = t.conv("post_quant_conv", x, Window::same(config.latent_channels, 1), &[])?;
    }
    x = t.conv("decoder.conv_in", x, Window::same(widest, 3), &[])?;
    x = mid(&mut t, "decoder.mid_block", x, config)?;
    for (level, &output) in channels.iter().rev().enumerate() {
        let prefix = format!("decoder.up_blocks.{level}");
        for i in 0..=config.layers_per_block {
            x = resnet(&mut t, &format!("{prefix}.resnets.{i}"), x, output, None)?;
        }
        if level + 1 < channels.len() {
            let enlarged = Some((2 * x.height, 2 * x.width));
            let window = Window { enlarged, ..Window::same(output, 3) };
            x = t.conv(&format!("{prefix}.upsamplers.0.conv"), x, window, &[])?;
        }
    }
    let h = t.norm("decoder.conv_norm_out", Kind::GroupNorm, x);
    let y = t.conv("decoder.conv_out", h, Window::same(config.out_channels, 3), &[])?;
    t.hold(&[x]);
    t.pointwise("decoder.conv_out", Kind::Layout, &[y]);
    Ok(t)
}

fn mid(t: &mut Trace, prefix: &str, x: Value, config: &VaeConfig) -> Result<Value> {
    let width = x.channels as usize;
    let mut x = resnet(t, &format!("{prefix}.resnets.0"), x, width, None)?;
    if config.mid_block_add_attention {
        let name = format!("{prefix}.attentions.0");
        let h = t.norm(&format!("{name}.group_norm"), Kind::GroupNorm, x);
        let qkv = ["to_q", "to_k", "to_v"]
            .map(|part| t.linear(&format!("{name}.{part}"), h, width, true, None));
        let h = t.attention(&name, Kind::SelfAttention, qkv, 1);
        let y = t.linear(&format!("{name}.to_out.0"), h, width, true, Some(x));
        t.hold(&qkv);
        x = y;
    }
    resnet(t, &format!("{prefix}.resnets.1"), x, width, None)
}
