//! A text tower's forward pass, as [`crate::sdxl::ClipText`] runs it.

use super::trace::{Kind, Trace};
use crate::sdxl::config::ClipTextConfig;

/// Whether the tower ends in a projection of its pooled state.
fn projects(config: &ClipTextConfig) -> bool {
    let classes = config.architectures.iter().flatten();
    classes.into_iter().any(|class| class == "CLIPTextModelWithProjection")
}

/// The operations for `batch` texts of the longest length.
pub fn clip_text(config: &ClipTextConfig, batch: usize) -> Trace {
    let mut t = Trace::default();
    let (width, length) = (config.hidden_size, config.max_position_embeddings);
    let size = (batch as u64, length as u64, width);
    let embeddings = "text_model.embeddings";
    let tokens = t.embedding(&format!("{embeddings}.token_embedding"), config.vocab_size, size);
    let positions =
        t.embedding(&format!("{embeddings}.position_embedding"), length, (1, size.1, width));
    let mut x = t.pointwise(embeddings, Kind::Add, &[tokens, positions]);
    for i in 0..config.num_hidden_layers {
        let name = format!("text_model.encoder.layers.{i}");
        let h = t.norm(&format!("{name}.layer_norm1"), Kind::LayerNorm, x);
        let qkv = ["q_proj", "k_proj", "v_proj"]
            .map(|part| t.linear(&format!("{name}.self_attn.{part}"), h, width, true, None));
        let attention = format!("{name}.self_attn");
        let h = t.attention(&attention, Kind::SelfAttention, qkv, config.num_attention_heads);
        x = t.linear(&format!("{attention}.out_proj"), h, width, true, Some(x));
        let h = t.norm(&format!("{name}.layer_norm2"), Kind::LayerNorm, x);
        let h = t.linear(&format!("{name}.mlp.fc1"), h, config.intermediate_size, true, None);
        let h = t.pointwise(&format!("{name}.mlp"), Kind::Activation, &[h]);
        x = t.linear(&format!("{name}.mlp.fc2"), h, width, true, Some(x));
    }
    t.norm("text_model.final_layer_norm", Kind::LayerNorm, x);
    if projects(config) {
        let pooled = t.input(batch as u64, (1, 1), width as u64);
        t.linear("text_projection", pooled, config.projection_dim, false, None);
    }
    t
}
