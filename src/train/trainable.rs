//! The weights that a run changes, and the networks that use them.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor, Var};
use rand_distr::{Distribution, StandardNormal};

use super::settings::{Settings, Trained};
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::nn::device::computed;
use crate::nn::{LowRank, Recompute};
use crate::sdxl::lora::{Adapters, LoraMap};
use crate::sdxl::{ModelFolder, UNet, Weights};
use crate::{Error, Result};

const DOWN: &str = "down";
const UP: &str = "up";

/// Variables by name, and how a U-Net is made of them. A LoRA's are `MODULE.down` [rank, in] and
/// `MODULE.up` [out, rank] (or with a kernel's dimensions), those of full fine-tuning the
/// checkpoint's own names. All f32.
#[derive(Debug)]
pub struct Trainable {
    pub vars: BTreeMap<String, Var>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Lora { scale: f64 },
    Full { computed: DType },
}

impl Trainable {
    /// Fresh variables: an adapter that changes nothing yet (down: normal with deviation
    /// 1/rank, up: zeros), or a copy of the weights.
    ///
    /// # Errors
    /// Names `targets` where no module has such a name.
    pub fn new(folder: &ModelFolder, settings: &Settings) -> Result<Self> {
        match settings.train {
            Trained::Lora => Self::lora(folder, settings),
            Trained::Full => {
                let weights = &folder.unet_weights;
                let var = |(name, tensor): (&String, &Tensor)| {
                    let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
                    Ok((name.clone(), Var::from_tensor(&tensor.copy()?)?))
                };
                let floats = weights.tensors().iter().filter(|(_, t)| t.dtype().is_float());
                let vars = floats.map(var).collect::<Result<_>>()?;
                let stored = weights.computed();
                Ok(Self { vars, kind: Kind::Full { computed: computed(stored, folder.device()) } })
            }
        }
    }

    fn lora(folder: &ModelFolder, settings: &Settings) -> Result<Self> {
        let rank = settings.rank;
        let key = NoiseKey::new(settings.seed);
        let mut vars = BTreeMap::new();
        let weights = &folder.unet_weights;
        let chosen = weights.modules().into_iter().filter(|module| {
            let ends = |t: &String| module == t || module.ends_with(&format!(".{t}"));
            settings.targets.iter().any(ends)
        });
        for (index, module) in chosen.enumerate() {
            let Some(weight) = weights.tensors().get(&format!("{module}.weight")) else { continue };
            let (mut down, mut up) = (weight.dims().to_vec(), vec![1; weight.rank()]);
            down[0] = rank;
            (up[0], up[1]) = (weight.dim(0)?, rank);
            // By place, so that the first weights do not depend on other modules' sizes.
            let normal = key.rng(Purpose::Training, u64::MAX, index as u64);
            let count = down.iter().product();
            let deviation = 1.0 / rank as f32;
            let values: Vec<f32> = StandardNormal
                .sample_iter(normal)
                .take(count)
                .map(|v: f32| v * deviation)
                .collect();
            let device = folder.device();
            let values = Tensor::from_vec(values, down, device)?;
            vars.insert(format!("{module}.{DOWN}"), Var::from_tensor(&values)?);
            vars.insert(format!("{module}.{UP}"), Var::zeros(up, DType::F32, device)?);
        }
        if vars.is_empty() {
            let message = format!("no module's name ends in one of {:?}", settings.targets);
            return Err(Error::invalid("targets", message));
        }
        let scale = settings.alpha.unwrap_or(rank as f64) / rank as f64;
        Ok(Self { vars, kind: Kind::Lora { scale } })
    }

    pub fn parameters(&self) -> u64 {
        self.vars.values().map(|var| var.elem_count() as u64).sum()
    }

    /// The network whose gradients are taken.
    ///
    /// # Errors
    /// When the variables do not fit the checkpoint.
    pub fn policy(&self, folder: &ModelFolder, recompute: bool) -> Result<UNet> {
        let tensors = self.vars.iter().map(|(name, v)| (name.clone(), v.as_tensor().clone()));
        let recompute = if recompute { Recompute::Blocks } else { Recompute::Off };
        Ok(self.network(folder, tensors.collect())?.with_recompute(recompute))
    }

    /// The network as the variables are now, without gradients. It is good until they change.
    ///
    /// # Errors
    /// When the variables do not fit the checkpoint.
    pub fn snapshot(&self, folder: &ModelFolder) -> Result<UNet> {
        let mut values = self.values();
        if let Kind::Full { computed } = self.kind {
            // Once, instead of in every pass.
            for value in values.values_mut() {
                *value = value.to_dtype(computed)?;
            }
        }
        self.network(folder, values)
    }

    /// A network with other values of the variables.
    ///
    /// # Errors
    /// When the values do not fit the checkpoint.
    pub fn network(&self, folder: &ModelFolder, values: BTreeMap<String, Tensor>) -> Result<UNet> {
        match self.kind {
            Kind::Lora { .. } => folder.unet_with(&self.adapter(values)?),
            Kind::Full { computed } => {
                let weights = Weights::new(values.into_iter().collect(), "the trained U-Net");
                let weights = weights.computing_in(computed);
                weights.build(None, |scope| UNet::load(scope, &folder.unet_config))
            }
        }
    }

    /// The variables' values. They share memory with them.
    pub fn values(&self) -> BTreeMap<String, Tensor> {
        self.vars.iter().map(|(name, v)| (name.clone(), v.as_detached_tensor())).collect()
    }

    /// A copy of the variables' values.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn copies(&self) -> Result<BTreeMap<String, Tensor>> {
        self.values().into_iter().map(|(name, t)| Ok((name, t.copy()?))).collect()
    }

    /// These values as an adapter.
    ///
    /// # Errors
    /// When the weights themselves are trained, or a matrix lacks its partner.
    fn adapter(&self, values: BTreeMap<String, Tensor>) -> Result<LoraMap> {
        let Kind::Lora { scale } = self.kind else {
            return Err(Error::invalid("train", "full fine-tuning has no adapter"));
        };
        let mut modules = BTreeMap::new();
        for (name, up) in &values {
            let Some(module) = name.strip_suffix(UP).and_then(|n| n.strip_suffix('.')) else {
                continue;
            };
            let down = values.get(&format!("{module}.{DOWN}"));
            let down = down.ok_or_else(|| Error::invalid(name, "lacks its partner"))?.clone();
            modules.insert(module.to_owned(), LowRank { down, up: up.clone(), scale });
        }
        Ok(LoraMap::new(modules))
    }

    /// These values as an adapter for a file; none where the weights themselves are trained.
    ///
    /// # Errors
    /// When a matrix lacks its partner.
    pub fn adapters(&self, values: BTreeMap<String, Tensor>) -> Result<Option<Adapters>> {
        match self.kind {
            Kind::Lora { .. } => Ok(Some(self.adapter(values)?.into())),
            Kind::Full { .. } => Ok(None),
        }
    }

    /// Gives the variables the values of an adapter file.
    ///
    /// # Errors
    /// Names the file, and its first module that is missing, surplus or of another rank.
    pub fn begin_with(&self, folder: &ModelFolder, path: &Path) -> Result<()> {
        let Kind::Lora { scale } = self.kind else {
            return Err(Error::invalid("adapter", "full fine-tuning has none"));
        };
        let names = folder.adapter_names();
        let found = Adapters::read(path, &names, DType::F32, folder.device())?;
        if found.text.iter().any(|text| !text.is_empty()) {
            return Err(Error::file(path, "adapts text encoders, which are not trained here"));
        }
        let mut values = BTreeMap::new();
        for (module, LowRank { down, up, scale: own }) in found.unet.iter() {
            values.insert(format!("{module}.{DOWN}"), down.clone());
            values.insert(format!("{module}.{UP}"), (up * (own / scale))?);
        }
        self.load(&values).map_err(|e| {
            Error::file(path, format!("does not fit the settings rank and targets: {e}"))
        })
    }

    /// Gives the variables these values.
    ///
    /// # Errors
    /// Names the first that is missing, surplus or of another shape; then nothing was changed.
    pub fn load(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        load(&self.vars, tensors)
    }
}

/// Gives variables the values of these tensors, which must be the same ones.
pub(super) fn load(vars: &BTreeMap<String, Var>, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    for (name, var) in vars {
        match tensors.get(name) {
            None => return Err(Error::invalid(name, "is missing")),
            Some(t) if t.shape() != var.shape() || t.dtype() != var.dtype() => {
                let (got, expected) = ((t.dtype(), t.dims()), (var.dtype(), var.dims()));
                return Err(Error::invalid(name, format!("expected {expected:?}, got {got:?}")));
            }
            Some(_) => {}
        }
    }
    if let Some(name) = tensors.keys().find(|name| !vars.contains_key(*name)) {
        return Err(Error::invalid(name, "is not trained here"));
    }
    for (name, var) in vars {
        var.set(&tensors[name].to_device(var.device())?)?;
    }
    Ok(())
}
