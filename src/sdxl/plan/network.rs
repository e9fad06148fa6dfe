//! The configurations of a checkpoint, without its weights.

use std::path::Path;

use super::{clip_text, decode, encode};
use crate::Error;
use crate::Result;
use crate::sdxl::config::{ClipTextConfig, UNetConfig, VaeConfig, parse_json, read_json};

/// stable-diffusion-xl-base-1.0's files.
const SDXL: [&str; 4] = [
    include_str!("../data/unet/config.json"),
    include_str!("../data/vae/config.json"),
    include_str!("../data/text_encoder/config.json"),
    include_str!("../data/text_encoder_2/config.json"),
];

/// Width and height in pixels of the images that a checkpoint was made for.
pub fn default_size(unet: &UNetConfig, vae: &VaeConfig) -> (usize, usize) {
    let side = |i: usize| {
        let latent = unet.sample_size.as_ref().and_then(|s| s.at(i)).unwrap_or(128);
        latent * vae.factor()
    };
    (side(1), side(0))
}

/// The networks of one checkpoint.
#[derive(Clone, Debug)]
pub struct Networks {
    pub unet: UNetConfig,
    pub vae: VaeConfig,
    pub text: [ClipTextConfig; 2],
}

impl Networks {
    /// stable-diffusion-xl-base-1.0.
    ///
    /// # Errors
    /// None: the files are part of the program.
    pub fn sdxl() -> Result<Self> {
        let [unet, vae, first, second] = SDXL;
        let wrong = |message: String| Error::file("sdxl/data", message);
        Ok(Self {
            unet: parse_json(unet).map_err(wrong)?,
            vae: parse_json(vae).map_err(wrong)?,
            text: [parse_json(first).map_err(wrong)?, parse_json(second).map_err(wrong)?],
        })
    }

    /// The `config.json` files of a folder in the diffusers layout.
    ///
    /// # Errors
    /// Names the file that is missing or unusable.
    pub fn read(path: &Path) -> Result<Self> {
        let file = |component: &str| path.join(component).join("config.json");
        let networks = Self {
            unet: read_json(&file("unet"))?,
            vae: read_json(&file("vae"))?,
            text: [read_json(&file("text_encoder"))?, read_json(&file("text_encoder_2"))?],
        };
        networks.unet.check()?;
        networks.vae.check()?;
        Ok(networks)
    }

    /// Tokens of a prompt: what both towers take.
    pub fn tokens(&self) -> usize {
        let [first, second] = &self.text;
        first.max_position_embeddings.min(second.max_position_embeddings)
    }

    /// The latent's height and width for an image.
    ///
    /// # Errors
    /// Names the side that the VAE's factor does not divide.
    pub fn latent(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let factor = self.vae.factor();
        for (field, side) in [("height", height), ("width", width)] {
            if side == 0 || !side.is_multiple_of(factor) {
                let message = format!("expected a positive multiple of {factor}, got {side}");
                return Err(Error::invalid(field, message));
            }
        }
        Ok((height / factor, width / factor))
    }

    /// Parameters of the VAE, both halves.
    ///
    /// # Errors
    /// When its configuration is unusable.
    pub fn vae_parameters(&self) -> Result<u64> {
        let size = (16 * self.vae.factor(), 16 * self.vae.factor());
        let halves = [encode(&self.vae, 1, size)?, decode(&self.vae, 1, size)?];
        Ok(halves.iter().map(super::Trace::parameters).sum())
    }

    /// Parameters of each text tower.
    pub fn text_parameters(&self) -> [u64; 2] {
        self.text.each_ref().map(|config| clip_text(config, 1).parameters())
    }
}
