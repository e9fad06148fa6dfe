//! The configurations of a single-file checkpoint, which has none: numbers of levels, layers and
//! channels are read off the tensors' shapes, the rest is SDXL's own (the JSON files in `data`).
//! What shapes cannot say and is taken for SDXL's: heads are 64 wide, normalisations have 32
//! groups, and the VAE's scale, the images' size and the schedule.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The configuration files of a checkpoint in the diffusers layout.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Configs {
    pub unet: Value,
    pub vae: Value,
    pub text_encoder: Value,
    pub text_encoder_2: Value,
    pub scheduler: Value,
    pub model_index: Value,
}

const HEAD: usize = 64;

/// SDXL base 1.0's configuration with these changes.
fn changed(text: &str, changes: Value) -> Result<Value, String> {
    let mut value: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
    if let (Value::Object(fields), Value::Object(changes)) = (&mut value, changes) {
        fields.extend(changes);
    }
    Ok(value)
}

/// Tensors' shapes by name.
#[derive(Debug, Default)]
pub struct Shapes(BTreeMap<String, Vec<usize>>);

impl FromIterator<(String, Vec<usize>)> for Shapes {
    fn from_iter<I: IntoIterator<Item = (String, Vec<usize>)>>(all: I) -> Self {
        Self(all.into_iter().collect())
    }
}

impl Shapes {
    /// Whether a name begins so.
    pub fn any(&self, start: &str) -> bool {
        let next = self.0.range(start.to_owned()..).next();
        next.is_some_and(|(name, _)| name.starts_with(start))
    }

    /// How many of `start0.`, `start1.`, … there are.
    pub fn count(&self, start: &str) -> usize {
        (0..).take_while(|i| self.any(&format!("{start}{i}."))).count()
    }

    /// One size of a tensor.
    fn size(&self, name: &str, dimension: usize) -> Result<usize, String> {
        let shape = self.0.get(name).ok_or_else(|| format!("'{name}' is missing"))?;
        shape.get(dimension).copied().ok_or_else(|| format!("'{name}' has the shape {shape:?}"))
    }
}

impl Configs {
    /// # Errors
    /// Names the tensor that is missing or whose shape cannot be SDXL's.
    pub fn of(shapes: &Shapes) -> Result<Self, String> {
        let pooled = shapes.size(&format!("{}text_projection", SECOND.prefix), 1)?;
        let index = changed(include_str!("data/model_index.json"), json!({}))?;
        let schedule = json!({
            "prediction_type": if shapes.any("v_pred") { "v_prediction" } else { "epsilon" },
            "rescale_betas_zero_snr": shapes.any("ztsnr"),
            "timestep_spacing": if shapes.any("ztsnr") { "trailing" } else { "leading" },
        });
        Ok(Self {
            unet: unet(shapes, pooled)?,
            vae: vae(shapes, "first_stage_model.")?,
            text_encoder: tower(shapes, include_str!("data/text_encoder.json"), &FIRST, None)?,
            text_encoder_2: tower(
                shapes,
                include_str!("data/text_encoder_2.json"),
                &SECOND,
                Some(pooled),
            )?,
            scheduler: changed(include_str!("data/scheduler.json"), schedule)?,
            model_index: index,
        })
    }
}

#[derive(Clone, Copy, Default)]
struct Level {
    channels: usize,
    layers: usize,
    /// Blocks of a transformer, where the level has any.
    depth: Option<usize>,
}

fn unet(shapes: &Shapes, pooled: usize) -> Result<Value, String> {
    let at = |name: &str| format!("model.diffusion_model.{name}");
    let crossed = |block: &str| shapes.any(&at(&format!("{block}.1.proj_in.")));
    let depth = |block: &str| shapes.count(&at(&format!("{block}.1.transformer_blocks.")));
    let mut levels = vec![Level::default()];
    let mut last = "input_blocks.0".to_owned();
    for n in 1.. {
        let block = format!("input_blocks.{n}");
        if shapes.any(&at(&format!("{block}.0.op."))) {
            levels.push(Level::default());
        } else if shapes.any(&at(&format!("{block}."))) {
            let channels = shapes.size(&at(&format!("{block}.0.in_layers.2.weight")), 0)?;
            if let Some(level) = levels.last_mut() {
                let depth = crossed(&block).then(|| depth(&block));
                *level = Level { channels, layers: level.layers + 1, depth };
            }
            last = block;
        } else {
            break;
        }
    }
    let mid = shapes.any(&at("middle_block."));
    // diffusers gives the middle the depth of the last level.
    let mut depths: Vec<usize> = levels.iter().map(|l| l.depth.unwrap_or(1)).collect();
    if let (true, Some(level), Some(deepest)) = (mid, levels.last(), depths.last_mut()) {
        let middle = depth("middle_block");
        if level.depth.is_some_and(|depth| depth != middle) {
            return Err(format!(
                "the middle block has {middle} transformer blocks and '{last}' {deepest}: \
                 no such U-Net is supported"
            ));
        }
        *deepest = middle;
    }
    let mut up = Vec::new();
    let mut next = 0;
    for level in levels.iter().rev() {
        up.push(if crossed(&format!("output_blocks.{next}")) {
            "CrossAttnUpBlock2D"
        } else {
            "UpBlock2D"
        });
        next += level.layers + 1;
    }
    let down = levels.iter().map(|level| match level.depth {
        Some(_) => "CrossAttnDownBlock2D",
        None => "DownBlock2D",
    });
    let attention = if mid { "middle_block" } else { last.as_str() };
    let context = at(&format!("{attention}.1.transformer_blocks.0.attn2.to_k.weight"));
    let projection = at(&format!("{attention}.1.proj_in.weight"));
    let mut heads = Vec::new();
    for (i, level) in levels.iter().enumerate() {
        let attends = level.depth.is_some() || (mid && i + 1 == levels.len());
        heads.push(if attends {
            in_heads(level.channels, &at(&last))?
        } else {
            (level.channels / HEAD).max(1)
        });
    }
    let first = levels.first().map_or(0, |level| level.layers);
    let layers: Vec<usize> = levels.iter().map(|level| level.layers).collect();
    let even = layers.iter().all(|n| *n == first);
    let mut changes = json!({
        "in_channels": shapes.size(&at("input_blocks.0.0.weight"), 1)?,
        "out_channels": shapes.size(&at("out.2.weight"), 0)?,
        "block_out_channels": levels.iter().map(|l| l.channels).collect::<Vec<_>>(),
        "layers_per_block": if even { json!(first) } else { json!(layers) },
        "transformer_layers_per_block": depths,
        "attention_head_dim": heads,
        "down_block_types": down.collect::<Vec<_>>(),
        "up_block_types": up,
        "mid_block_type": if mid { json!("UNetMidBlock2DCrossAttn") } else { Value::Null },
        "cross_attention_dim": shapes.size(&context, 1)?,
        "use_linear_projection": shapes.size(&projection, 2).is_err(),
    });
    let added = at("label_emb.0.0.weight");
    let width = shapes.size(&added, 1)?;
    // Six numbers (sizes and crop) beside the pooled text.
    let times = width.saturating_sub(pooled);
    if times == 0 || !times.is_multiple_of(6) {
        return Err(format!(
            "'{added}' takes {width} values: not the {pooled} of the pooled text and six embeddings"
        ));
    }
    changes["projection_class_embeddings_input_dim"] = json!(width);
    changes["addition_time_embed_dim"] = json!(times / 6);
    changed(include_str!("data/unet.json"), changes)
}

/// Heads of 64 values.
fn in_heads(width: usize, name: &str) -> Result<usize, String> {
    if width == 0 || !width.is_multiple_of(HEAD) {
        return Err(format!(
            "'{name}…': {width} channels are no multiple of {HEAD}, the width of SDXL's heads, and \
             a single file does not say another"
        ));
    }
    Ok(width / HEAD)
}

/// The VAE whose tensors have Stability's names after `prefix`.
///
/// # Errors
/// Names the tensor that is missing.
pub fn vae(shapes: &Shapes, prefix: &str) -> Result<Value, String> {
    let at = |name: &str| format!("{prefix}{name}");
    let levels = shapes.count(&at("encoder.down."));
    let channels = (0..levels)
        .map(|i| shapes.size(&at(&format!("encoder.down.{i}.block.0.conv1.weight")), 0))
        .collect::<Result<Vec<_>, _>>()?;
    let changes = json!({
        "in_channels": shapes.size(&at("encoder.conv_in.weight"), 1)?,
        "out_channels": shapes.size(&at("decoder.conv_out.weight"), 0)?,
        "latent_channels": shapes.size(&at("decoder.conv_in.weight"), 1)?,
        "block_out_channels": channels,
        "layers_per_block": shapes.count(&at("encoder.down.0.block.")),
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "mid_block_add_attention": shapes.any(&at("encoder.mid.attn_1.")),
        "use_quant_conv": shapes.any(&at("quant_conv.")),
        "use_post_quant_conv": shapes.any(&at("post_quant_conv.")),
    });
    changed(include_str!("data/vae.json"), changes)
}

/// Where a text tower has its sizes.
struct TowerNames {
    prefix: &'static str,
    tokens: &'static str,
    positions: &'static str,
    layers: &'static str,
    /// In a layer.
    inner: &'static str,
}

const FIRST: TowerNames = TowerNames {
    prefix: "conditioner.embedders.0.transformer.text_model.",
    tokens: "embeddings.token_embedding.weight",
    positions: "embeddings.position_embedding.weight",
    layers: "encoder.layers.",
    inner: "mlp.fc1.weight",
};
const SECOND: TowerNames = TowerNames {
    prefix: "conditioner.embedders.1.model.",
    tokens: "token_embedding.weight",
    positions: "positional_embedding",
    layers: "transformer.resblocks.",
    inner: "mlp.c_fc.weight",
};

fn tower(
    shapes: &Shapes,
    base: &str,
    names: &TowerNames,
    projection: Option<usize>,
) -> Result<Value, String> {
    let at = |name: &str| format!("{}{name}", names.prefix);
    let (tokens, layers) = (at(names.tokens), at(names.layers));
    let width = shapes.size(&tokens, 1)?;
    changed(
        base,
        json!({
            "vocab_size": shapes.size(&tokens, 0)?,
            "max_position_embeddings": shapes.size(&at(names.positions), 0)?,
            "hidden_size": width,
            "intermediate_size": shapes.size(&format!("{layers}0.{}", names.inner), 0)?,
            "num_hidden_layers": shapes.count(&layers),
            "num_attention_heads": in_heads(width, &tokens)?,
            "projection_dim": projection.unwrap_or(width),
        }),
    )
}
