//! U-Nets whose weights, or adapters, are variables.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use diffusion_sharpening::nn::LowRank;
use diffusion_sharpening::sdxl::config::{UNetConfig, read_json};
use diffusion_sharpening::sdxl::lora::LoraMap;
use diffusion_sharpening::sdxl::{UNet, Weights};

use super::low_rank;

pub type Vars = BTreeMap<String, Var>;

/// The U-Net of a checkpoint on the CPU, and the variables in it.
pub fn unet(model: &Path, lora: bool) -> (Vars, UNet) {
    unet_on(model, lora, &Device::Cpu, DType::F32)
}

/// The same on any device, computing in any type.
pub fn unet_on(model: &Path, lora: bool, device: &Device, computed: DType) -> (Vars, UNet) {
    let config: UNetConfig = read_json(&model.join("unet/config.json")).unwrap();
    let weights = Weights::from_folder(&model.join("unet"), DType::F32, device).unwrap();
    let weights = weights.computing_in(computed);
    if lora { adapted(&weights, &config) } else { whole(&weights, &config) }
}

fn whole(weights: &Weights, config: &UNetConfig) -> (Vars, UNet) {
    let var = |(name, t): (&String, &Tensor)| (name.clone(), Var::from_tensor(t).unwrap());
    let vars: Vars = weights.tensors().iter().map(var).collect();
    let tensors = vars.iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect();
    let weights = Weights::new(tensors, "unet").computing_in(weights.computed());
    let unet = weights.build(None, |s| UNet::load(s, config)).unwrap();
    (vars, unet)
}

/// Adapters on linear layers and 3×3 convolutions, on every second module.
fn adapted(weights: &Weights, config: &UNetConfig) -> (Vars, UNet) {
    let (mut vars, mut modules) = (Vars::new(), BTreeMap::new());
    let mut names: Vec<_> = weights.tensors().iter().filter(|(_, t)| t.rank() >= 2).collect();
    names.sort_by_key(|(name, _)| *name);
    for (i, (name, tensor)) in names.into_iter().enumerate().step_by(2) {
        let module = name.strip_suffix(".weight").unwrap();
        let (down, up) = low_rank(i as u64, tensor.dims(), 2);
        let var = |t: &Tensor| Var::from_tensor(&t.to_device(tensor.device()).unwrap()).unwrap();
        let (down, up) = (var(&down), var(&up));
        let adapter =
            LowRank { down: down.as_tensor().clone(), up: up.as_tensor().clone(), scale: 0.5 };
        modules.insert(module.to_owned(), adapter);
        vars.insert(format!("{module}.down"), down);
        vars.insert(format!("{module}.up"), up);
    }
    let unet = weights.build(Some(&LoraMap::new(modules)), |s| UNet::load(s, config)).unwrap();
    (vars, unet)
}
