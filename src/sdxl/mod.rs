//! Stable Diffusion XL, driven by the `config.json` files of the diffusers
//! folder layout: text towers, U-Net, VAE, tokenizers, adapters, weights.
//! This floor is the only place that knows a tensor's name.

pub mod clip;
pub mod clip_text;
pub mod config;
pub mod export;
pub mod folder;
pub mod key_names;
mod layout;
pub mod lora;
pub mod lora_convert;
mod lora_folded;
pub mod lora_names;
mod lora_peft;
mod lora_write;
pub mod merge;
mod open_ai_words;
pub mod plan;
mod resnet;
pub mod single_config;
pub mod single_file;
pub mod tensor_file;
pub mod tokenizer;
pub mod transformer;
pub mod unet;
mod unet_blocks;
pub mod vae;
mod vae_file;
pub mod vae_tiling;
pub mod weights;

pub use clip::Clip;
pub use clip_text::{ClipText, TextOutput};
pub use folder::ModelFolder;
pub use tokenizer::ClipTokenizer;
pub use unet::{TextStates, UNet};
pub use vae::Vae;
pub use weights::{Scope, Weights};
