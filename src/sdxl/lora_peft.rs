//! `lora_adapter_metadata`: what newer diffusers files say in their header instead of `.alpha`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::lora_names::{Network, with_text_model};
use crate::{Error, Result};

/// The entry of the header.
pub(super) const KEY: &str = "lora_adapter_metadata";

/// The fields of PEFT's `LoraConfig` that decide scales, for each network.
#[derive(Debug, Default)]
pub struct PeftMetadata([Option<Scales>; 3]);

#[derive(Debug)]
struct Scales {
    alpha: f64,
    patterns: Vec<Pattern>,
    /// alpha / √rank instead of alpha / rank (arXiv 2312.03732).
    stabilised: bool,
}

/// The alpha of the modules whose names are, or end in, `name`.
#[derive(Debug)]
struct Pattern {
    name: String,
    whole: bool,
    alpha: f64,
}

impl Pattern {
    fn fits(&self, module: &str) -> bool {
        let fits = |module: &str| {
            let rest = module.strip_suffix(self.name.as_str());
            rest.is_some_and(|rest| rest.is_empty() || (!self.whole && rest.ends_with('.')))
        };
        // Towers have their names with `text_model.` or without.
        fits(module) || module.strip_prefix("text_model.").is_some_and(fits)
    }
}

impl PeftMetadata {
    /// # Errors
    /// When the metadata of the file at `path` cannot be read, or ask for something unsupported.
    pub fn read(path: &Path, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let Some(text) = metadata.get(KEY) else { return Ok(Self::default()) };
        let fail = |message: String| Error::file(path, format!("{KEY}: {message}"));
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| fail(e.to_string()))?;
        let mut found = Self::default();
        for network in Network::ALL {
            let scales = Scales::of(&fields, network.component()).map_err(&fail)?;
            found.0[network as usize] = scales;
        }
        Ok(found)
    }

    /// The scale of a module of this rank; 1 where nothing is said.
    pub fn scale(&self, network: Network, module: &str, rank: usize) -> f64 {
        let Some(scales) = &self.0[network as usize] else { return 1.0 };
        let name = match network {
            Network::UNet => module.to_owned(),
            Network::Text1 | Network::Text2 => with_text_model(module),
        };
        let pattern = scales.patterns.iter().find(|pattern| pattern.fits(&name));
        let alpha = pattern.map_or(scales.alpha, |pattern| pattern.alpha);
        let rank = rank as f64;
        alpha / if scales.stabilised { rank.sqrt() } else { rank }
    }
}

impl Scales {
    fn of(fields: &Map<String, Value>, component: &str) -> Result<Option<Self>, String> {
        let field = |name: &str| fields.get(&format!("{component}.{name}"));
        let Some(alpha) = field("lora_alpha") else { return Ok(None) };
        let number = |value: &Value, name: &str| {
            value.as_f64().ok_or_else(|| format!("{component}.{name} is {value}, no number"))
        };
        let is = |name: &str| field(name).and_then(Value::as_bool).unwrap_or(false);
        if is("use_dora") {
            return Err(format!("{component}.use_dora: DoRA is not supported, only LoRA"));
        }
        let mut patterns = Vec::new();
        for (pattern, value) in
            field("alpha_pattern").and_then(Value::as_object).into_iter().flatten()
        {
            // PEFT takes regular expressions; what it writes itself are names, some with a '^'.
            let name = pattern.strip_prefix('^').unwrap_or(pattern);
            if !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.') {
                return Err(format!(
                    "{component}.alpha_pattern: '{pattern}' is a pattern; only names are supported"
                ));
            }
            let (whole, alpha) = (pattern.starts_with('^'), number(value, "alpha_pattern")?);
            patterns.push(Pattern { name: name.to_owned(), whole, alpha });
        }
        let alpha = number(alpha, "lora_alpha")?;
        Ok(Some(Self { alpha, patterns, stabilised: is("use_rslora") }))
    }
}
