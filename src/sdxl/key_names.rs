//! The names that modules have in the layout of Stability's own code (LDM, later SGM): what
//! single-file checkpoints and kohya's adapters use. All names follow from a few pairs of
//! prefixes and the numbers of levels and layers.

use std::collections::BTreeMap;

use super::config::UNetConfig;

/// Pairs of prefixes, ours and theirs; a name takes the longest that ends at a dot.
#[derive(Clone, Debug, Default)]
pub struct NameMap {
    theirs: BTreeMap<String, String>,
    ours: BTreeMap<String, String>,
}

impl NameMap {
    /// Pairs (ours, theirs).
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut map = Self::default();
        for (ours, theirs) in pairs {
            map.ours.insert(theirs.clone(), ours.clone());
            map.theirs.insert(ours, theirs);
        }
        map
    }

    /// One that only leads to their names: a part of a fused tensor.
    pub fn with_parts(mut self, parts: impl IntoIterator<Item = (String, String)>) -> Self {
        self.theirs.extend(parts);
        self
    }

    pub fn theirs(&self, name: &str) -> Option<String> {
        renamed(&self.theirs, name)
    }

    pub fn ours(&self, name: &str) -> Option<String> {
        renamed(&self.ours, name)
    }
}

fn renamed(map: &BTreeMap<String, String>, name: &str) -> Option<String> {
    let mut end = name.len();
    loop {
        if let Some(to) = map.get(&name[..end]) {
            return Some(format!("{to}{}", &name[end..]));
        }
        end = name[..end].rfind('.')?;
    }
}

fn below<'a>(
    ours: String,
    theirs: String,
    tails: &'a [(&'a str, &'a str)],
) -> impl Iterator<Item = (String, String)> + 'a {
    tails.iter().map(move |(a, b)| (format!("{ours}.{a}"), format!("{theirs}.{b}")))
}

/// Outside the blocks.
const UNET: [(&str, &str); 7] = [
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];
const UNET_RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// The U-Net's modules. Transformers keep their inner names; blocks are numbered through.
pub fn unet(config: &UNetConfig) -> NameMap {
    let own = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
    let mut pairs: Vec<(String, String)> = UNET.iter().map(own).collect();
    let levels = config.block_out_channels.len();
    let layers = |level: usize| config.layers_per_block.at(level).unwrap_or(2);
    let mut block = |ours: String, layer: usize, theirs: String, crossed: bool| {
        let resnet = format!("{ours}.resnets.{layer}");
        pairs.extend(below(resnet, format!("{theirs}.0"), &UNET_RESNET));
        if crossed {
            pairs.push((format!("{ours}.attentions.{layer}"), format!("{theirs}.1")));
        }
    };
    let mut resamplers = Vec::new();
    let mut next = 1;
    for level in 0..levels {
        let crossed = config.down_block_types[level] == "CrossAttnDownBlock2D";
        for layer in 0..layers(level) {
            block(format!("down_blocks.{level}"), layer, format!("input_blocks.{next}"), crossed);
            next += 1;
        }
        if level + 1 < levels {
            let ours = format!("down_blocks.{level}.downsamplers.0.conv");
            resamplers.push((ours, format!("input_blocks.{next}.0.op")));
            next += 1;
        }
    }
    next = 0;
    for i in 0..levels {
        let crossed = config.up_block_types[i] == "CrossAttnUpBlock2D";
        for layer in 0..=layers(levels - 1 - i) {
            block(format!("up_blocks.{i}"), layer, format!("output_blocks.{next}"), crossed);
            next += 1;
        }
        if i + 1 < levels {
            let ours = format!("up_blocks.{i}.upsamplers.0.conv");
            let place = 1 + usize::from(crossed);
            resamplers.push((ours, format!("output_blocks.{}.{place}.conv", next - 1)));
        }
    }
    for (layer, theirs) in [(0, 0), (1, 2)] {
        let resnet = format!("mid_block.resnets.{layer}");
        pairs.extend(below(resnet, format!("middle_block.{theirs}"), &UNET_RESNET));
    }
    pairs.push(("mid_block.attentions.0".into(), "middle_block.1".into()));
    pairs.extend(resamplers);
    NameMap::new(pairs)
}

const VAE_HALF: [(&str, &str); 10] = [
    ("conv_in", "conv_in"),
    ("conv_out", "conv_out"),
    ("conv_norm_out", "norm_out"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
    ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
    ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
];

/// The modules of a VAE of this many levels and layers. Stability's decoder counts its levels
/// from the image's side.
pub fn vae(levels: usize, layers: usize) -> NameMap {
    let mut pairs: Vec<(String, String)> =
        ["quant_conv", "post_quant_conv"].map(|name| (name.to_owned(), name.to_owned())).into();
    for half in ["encoder", "decoder"] {
        pairs.extend(below(half.to_owned(), half.to_owned(), &VAE_HALF));
    }
    for level in 0..levels {
        let (down, up) =
            (format!("encoder.down_blocks.{level}"), format!("decoder.up_blocks.{level}"));
        let (their_down, their_up) =
            (format!("encoder.down.{level}"), format!("decoder.up.{}", levels - 1 - level));
        for (ours, theirs, count) in [(&down, &their_down, layers), (&up, &their_up, layers + 1)] {
            for layer in 0..count {
                let (ours, theirs) =
                    (format!("{ours}.resnets.{layer}"), format!("{theirs}.block.{layer}"));
                let shortcut = (format!("{ours}.conv_shortcut"), format!("{theirs}.nin_shortcut"));
                pairs.extend([shortcut, (ours, theirs)]);
            }
        }
        pairs
            .push((format!("{down}.downsamplers.0.conv"), format!("{their_down}.downsample.conv")));
        pairs.push((format!("{up}.upsamplers.0.conv"), format!("{their_up}.upsample.conv")));
    }
    NameMap::new(pairs)
}

/// The first text tower, which keeps transformers' names.
pub fn clip() -> NameMap {
    NameMap::new([("text_model".to_owned(), "text_model".to_owned())])
}

const OPEN_CLIP: [(&str, &str); 4] = [
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
];
const OPEN_CLIP_LAYER: [(&str, &str); 5] = [
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
];
/// Query, key and value projections are one tensor in OpenCLIP, in this order.
pub const FUSED: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

/// The second text tower, in OpenCLIP's names.
pub fn open_clip(layers: usize) -> NameMap {
    let mut pairs: Vec<(String, String)> =
        OPEN_CLIP.map(|(ours, theirs)| (ours.to_owned(), theirs.to_owned())).into();
    let mut parts = Vec::new();
    for i in 0..layers {
        let (ours, theirs) =
            (format!("text_model.encoder.layers.{i}"), format!("transformer.resblocks.{i}"));
        for part in FUSED {
            for kind in ["weight", "bias"] {
                let part = format!("{ours}.self_attn.{part}.{kind}");
                parts.push((part, format!("{theirs}.attn.in_proj_{kind}")));
            }
        }
        pairs.extend(below(ours, theirs, &OPEN_CLIP_LAYER));
    }
    NameMap::new(pairs).with_parts(parts)
}
