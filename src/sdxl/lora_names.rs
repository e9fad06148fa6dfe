//! What adapter files call the modules that they adapt: kohya's, diffusers' (old and new) and
//! ComfyUI's names, as tables of beginnings and endings.

use std::collections::HashMap;

use super::config::UNetConfig;
use super::key_names::{self, NameMap};

/// The networks that can carry adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Network {
    UNet,
    Text1,
    Text2,
}

impl Network {
    pub const ALL: [Self; 3] = [Self::UNet, Self::Text1, Self::Text2];

    /// The component's name in the diffusers layout.
    pub fn component(self) -> &'static str {
        ["unet", "text_encoder", "text_encoder_2"][self as usize]
    }

    /// What kohya's keys begin with.
    pub fn kohya(self) -> &'static str {
        ["lora_unet_", "lora_te1_", "lora_te2_"][self as usize]
    }
}

/// One matrix of an adapter, or its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Down,
    Up,
    Alpha,
}

/// Beginnings of keys. The last: old diffusers files of the U-Net alone have none.
const PREFIXES: [(&str, Network); 9] = [
    ("lora_unet_", Network::UNet),
    ("lora_te1_", Network::Text1),
    ("lora_te2_", Network::Text2),
    ("unet.", Network::UNet),
    ("text_encoder.", Network::Text1),
    ("text_encoder_2.", Network::Text2),
    ("model.diffusion_model.", Network::UNet),
    ("diffusion_model.", Network::UNet),
    ("", Network::UNet),
];

/// Endings of keys, the longer of two that end alike first.
const ENDINGS: [(&str, Part); 13] = [
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora_A.default.weight", Part::Down),
    (".lora_B.default.weight", Part::Up),
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    ("_lora.down.weight", Part::Down),
    ("_lora.up.weight", Part::Up),
    (".alpha", Part::Alpha),
];

/// Parts of keys that belong to adapters of other kinds.
const OTHER_KINDS: [(&str, &str); 14] = [
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    (".hada_", "LoHa"),
    (".lokr_", "LoKr"),
    (".lora_mid.", "LoCon with a Tucker core (lora_mid)"),
    (".oft_", "OFT"),
    (".boft_", "BOFT"),
    (".on_input", "IA3"),
    (".a1.weight", "GLoRA"),
    (".a2.weight", "GLoRA"),
    (".diff", "a full difference of weights"),
    (".lora_B.bias", "LoRA with biases"),
    (".lora_up.bias", "LoRA with biases"),
    ("bundle_emb", "a text embedding beside an adapter"),
];

/// The kind of adapter, other than LoRA, that a key belongs to.
pub fn other_kind(key: &str) -> Option<&'static str> {
    OTHER_KINDS.iter().find(|(part, _)| key.contains(part)).map(|(_, kind)| *kind)
}

/// The modules of a checkpoint that adapters can sit on, under all their names.
#[derive(Clone, Debug)]
pub struct AdapterNames {
    ldm: NameMap,
    /// By each name without its beginning, the module.
    known: [HashMap<String, String>; 3],
}

impl AdapterNames {
    /// `modules` are those of the U-Net and of the two text towers.
    pub fn new(config: &UNetConfig, modules: [Vec<String>; 3]) -> Self {
        let ldm = key_names::unet(config);
        let mut known: [HashMap<String, String>; 3] = Default::default();
        for (network, modules) in Network::ALL.into_iter().zip(modules) {
            let index = &mut known[network as usize];
            for module in modules {
                index.extend(names(network, &module, &ldm).map(|name| (name, module.clone())));
            }
        }
        Self { ldm, known }
    }

    /// What a key says: the network, its module and the part.
    pub fn parse(&self, key: &str) -> Option<(Network, &str, Part)> {
        let (stem, part) =
            ENDINGS.iter().find_map(|(end, part)| Some((key.strip_suffix(end)?, *part)))?;
        PREFIXES.iter().find_map(|(start, network)| {
            let name = stem.strip_prefix(start)?;
            let module = self.known[*network as usize].get(name)?;
            Some((*network, module.as_str(), part))
        })
    }

    /// kohya's name of a module, without the part.
    pub fn kohya(&self, network: Network, module: &str) -> Option<String> {
        let name = match network {
            Network::UNet => self.ldm.theirs(module)?,
            Network::Text1 | Network::Text2 => with_text_model(module),
        };
        Some(format!("{}{}", network.kohya(), name.replace('.', "_")))
    }

    /// diffusers' name of a module, without the part.
    pub fn diffusers(&self, network: Network, module: &str) -> String {
        let name = match network {
            Network::UNet => module.to_owned(),
            Network::Text1 | Network::Text2 => with_text_model(module),
        };
        format!("{}.{name}", network.component())
    }
}

/// A tower's module or tensor under transformers 4's name, which adapter files use;
/// transformers 5 leaves the prefix out.
pub fn with_text_model(name: &str) -> String {
    if name.starts_with("text_model.") || name.starts_with("text_projection") {
        name.to_owned()
    } else {
        format!("text_model.{name}")
    }
}

/// Every name that a file may give a module, without its beginning.
fn names(network: Network, module: &str, ldm: &NameMap) -> impl Iterator<Item = String> + use<> {
    let mut dotted = vec![module.to_owned()];
    // Old diffusers files: `attn1.processor.to_q_lora.…`, `to_out` for `to_out.0`, and the
    // same names for a tower's projections.
    let old = match network {
        Network::UNet => {
            dotted.extend(ldm.theirs(module));
            module.rsplit_once(".to_").map(|(at, layer)| (at, layer.trim_end_matches(".0")))
        }
        Network::Text1 | Network::Text2 => {
            dotted = vec![with_text_model(module)];
            dotted[0].strip_suffix("_proj").and_then(|stem| stem.rsplit_once('.'))
        }
    };
    let old =
        old.map(|(at, layer)| [format!("{at}.to_{layer}"), format!("{at}.processor.to_{layer}")]);
    dotted.extend(old.into_iter().flatten());
    let bare = dotted.iter().filter_map(|name| name.strip_prefix("text_model.").map(str::to_owned));
    dotted.extend(bare.collect::<Vec<_>>());
    let flat: Vec<String> = dotted.iter().map(|name| name.replace('.', "_")).collect();
    dotted.into_iter().chain(flat)
}
