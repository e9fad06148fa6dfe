//! What the engine keeps from step to step gives the same bits as computing everything anew.

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use common::{fixtures, normal, values};
use diffusion_sharpening::diffusion::denoiser::{NoiseModel, TextCond};
use diffusion_sharpening::diffusion::sdxl_model::SdxlModel;
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::ModelFolder;

const NAMES: [&str; 3] = ["ddim_tiny", "euler_sdxl_shape", "heun_four_level"];

fn fixture(name: &str) -> std::path::PathBuf {
    fixtures().join("parity").join(name)
}

fn single(seed: u64, shape: &[usize]) -> Tensor {
    normal(seed, shape).to_dtype(DType::F32).unwrap()
}

fn texts(folder: &ModelFolder, count: u64) -> Vec<TextCond> {
    let config = &folder.unet_config;
    let pooled = folder.text_2.config().projection_dim;
    let each = |i: u64| TextCond {
        context: single(100 + i, &[7, config.cross_attention_dim]),
        pooled: single(200 + i, &[pooled]),
        time_ids: [64.0 + i as f32, 64.0, 0.0, i as f32, 64.0, 64.0],
    };
    (0..count).map(each).collect()
}

/// The U-Net on the whole batch, nothing kept.
fn anew(folder: &ModelFolder, x: &Tensor, t: &Tensor, texts: &[&TextCond]) -> Vec<f64> {
    let stack = |of: fn(&TextCond) -> &Tensor| {
        Tensor::stack(&texts.iter().map(|c| of(c)).collect::<Vec<_>>(), 0).unwrap()
    };
    let sizes: Vec<f32> = texts.iter().flat_map(|c| c.time_ids).collect();
    let sizes = Tensor::from_vec(sizes, (texts.len(), 6), &Device::Cpu).unwrap();
    let (context, pooled) = (stack(|c| &c.context), stack(|c| &c.pooled));
    values(&folder.unet.forward(x, t, &context, &pooled, &sizes).unwrap())
}

#[test]
fn kept_text_and_time_change_no_bit() {
    for name in NAMES {
        let folder = ModelFolder::open(&fixture(name), &Placement::cpu(DType::F32)).unwrap();
        let folder = Arc::new(folder);
        let model = SdxlModel::new(folder.clone());
        let all = texts(&folder, 3);
        let channels = folder.unet_config.in_channels;
        // Batches of different order and size, timesteps that come again, a text twice.
        let batches: [(&[usize], &[f32]); 5] = [
            (&[0, 1], &[981.0, 981.0]),
            (&[0, 1], &[961.0, 961.0]),
            (&[1, 0, 2, 2], &[981.0, 3.0, 500.25, 981.0]),
            (&[0, 1], &[981.0, 981.0]),
            (&[2], &[981.0]),
        ];
        for (round, (rows, t)) in batches.iter().enumerate() {
            let x = single(round as u64, &[rows.len(), channels, 8, 8]);
            let t = Tensor::new(*t, &Device::Cpu).unwrap();
            let text: Vec<&TextCond> = rows.iter().map(|i| &all[*i]).collect();
            let kept = values(&model.forward(&x, &t, &text).unwrap());
            let expected = anew(&folder, &x, &t, &text);
            assert!(kept == expected, "{name}, batch {round}: kept states differ");
        }
    }
}

/// Two texts of equal values and different sizes are different; another U-Net keeps its own.
#[test]
fn nothing_is_kept_for_the_wrong_text_or_network() {
    let open = |name| ModelFolder::open(&fixture(name), &Placement::cpu(DType::F32)).unwrap();
    let folder = Arc::new(open(NAMES[0]));
    let model = SdxlModel::new(folder.clone());
    let text = texts(&folder, 1).remove(0);
    let larger = TextCond { time_ids: [512.0, 512.0, 0.0, 0.0, 512.0, 512.0], ..text.clone() };
    let x = single(1, &[1, folder.unet_config.in_channels, 8, 8]);
    let t = Tensor::new(&[500_f32], &Device::Cpu).unwrap();
    let run = |model: &SdxlModel, text| values(&model.forward(&x, &t, &[text]).unwrap());
    let first = run(&model, &text);
    assert!(run(&model, &larger) != first, "sizes are ignored");
    assert!(run(&model, &text) == first);
    // The same architecture with other weights: every weight doubled in one layer.
    let weights = folder.unet_weights.tensors().iter().map(|(name, tensor)| {
        let change = name.ends_with("attn2.to_v.weight");
        (name.clone(), if change { (tensor * 2.0).unwrap() } else { tensor.clone() })
    });
    let weights = diffusion_sharpening::sdxl::Weights::new(weights.collect(), "test");
    let unet = weights
        .build(None, |s| diffusion_sharpening::sdxl::UNet::load(s, &folder.unet_config))
        .unwrap();
    let other = model.with_unet(unet);
    assert!(run(&other, &text) != first, "another network's states were used");
    assert!(run(&model, &text) == first);
}
