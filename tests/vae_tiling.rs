//! A VAE in bounded memory, against diffusers' tiling (fixture: `tools/vae_tiling_fixture.py`)
//! and against itself on whole images.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{fixtures, normal, parity_models, read, relative_error, values};
use diffusion_sharpening::diffusion::denoiser::Decoder;
use diffusion_sharpening::diffusion::sdxl_model::{SdxlModel, to_images};
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::config::{VaeConfig, read_json};
use diffusion_sharpening::sdxl::vae_tiling::{Bounds, Tiling};
use diffusion_sharpening::sdxl::{ModelFolder, Vae, Weights};

const TILED: Bounds = Bounds { tiling: Tiling::Above(0), slice_bytes: 1 << 30 };
const ONE_BY_ONE: Bounds = Bounds { tiling: Tiling::Off, slice_bytes: 0 };

fn vae(dtype: DType) -> Vae {
    let folder = fixtures().join("vae_tiling");
    let config: VaeConfig = read_json(&folder.join("config.json")).unwrap();
    let weights = Weights::from_folder(&folder, dtype, &Device::Cpu).unwrap();
    weights.build(None, |scope| Vae::load(scope, &config)).unwrap()
}

fn single(seed: u64, shape: &[usize]) -> Tensor {
    normal(seed, shape).to_dtype(DType::F32).unwrap()
}

fn assert_same_bits(a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims());
    let same = values(a).iter().zip(values(b)).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same, "differ by {:e}", relative_error(a, b));
}

#[test]
fn tiles_are_those_of_diffusers() {
    let (vae, r) = (vae(DType::F32), read(&fixtures().join("vae_tiling/reference.safetensors")));
    for case in ["large", "narrow"] {
        let of = |what: &str| &r[&format!("{case}.{what}")];
        let decoded = vae.decode_within(of("latents"), &TILED).unwrap();
        let posterior = vae.encode_within(of("image"), &TILED).unwrap();
        for (what, ours) in
            [("decoded", &decoded), ("mean", &posterior.mean), ("std", &posterior.std)]
        {
            let error = relative_error(ours, of(what));
            println!("{case} {what}: {error:.1e}");
            assert!(error < 1e-4, "{case}: {what} differs by {error:.1e}");
        }
        // The case would not tell tiles from none otherwise.
        assert!(relative_error(&vae.decode(of("latents")).unwrap(), of("decoded")) > 1e-2);
    }
}

/// diffusers fails on a last tile of less than one latent position.
#[test]
fn a_remainder_below_one_latent_position_is_left_out() {
    let vae = vae(DType::F32);
    let image = single(1, &[1, 3, 50, 34]);
    let tiled = vae.encode_within(&image, &TILED).unwrap();
    assert_eq!(tiled.mean.dims(), vae.encode(&image).unwrap().mean.dims());
}

#[test]
fn tiles_begin_above_the_threshold() {
    let vae = vae(DType::F32);
    let latents = single(2, &[1, 4, 10, 12]);
    let (whole, tiled) =
        (vae.decode(&latents).unwrap(), vae.decode_within(&latents, &TILED).unwrap());
    assert!(relative_error(&tiled, &whole) > 1e-2);
    let at = |pixels| {
        let bounds = Bounds { tiling: Tiling::Above(pixels), ..TILED };
        vae.decode_within(&latents, &bounds).unwrap()
    };
    assert_same_bits(&at(40 * 48), &whole);
    assert_same_bits(&at(40 * 48 - 1), &tiled);
    // Not larger than a tile.
    let small = single(3, &[1, 4, 8, 8]);
    assert_same_bits(&vae.decode_within(&small, &TILED).unwrap(), &vae.decode(&small).unwrap());
    // What SDXL was made for is worked on whole unless someone says otherwise.
    assert_eq!(Bounds::default().tiling, Tiling::Above(1024 * 1024));
}

#[test]
fn slices_have_the_bits_of_the_batch() {
    for folder in parity_models() {
        let model = ModelFolder::open(&folder, &Placement::cpu(DType::F32)).unwrap();
        let config = model.vae.config();
        let (channels, factor) = (config.latent_channels, config.factor());
        let latents = single(4, &[5, channels, 8, 7]);
        let whole = model.vae.decode(&latents).unwrap();
        assert_same_bits(&model.vae.decode_within(&latents, &ONE_BY_ONE).unwrap(), &whole);
        let slices = model.vae.decode_slices(&latents, &ONE_BY_ONE).unwrap();
        assert_eq!(slices.count(), 5);
        let image = single(5, &[3, 3, 8 * factor, 7 * factor]);
        let posterior = model.vae.encode(&image).unwrap();
        let sliced = model.vae.encode_within(&image, &ONE_BY_ONE).unwrap();
        assert_same_bits(&sliced.mean, &posterior.mean);
        assert_same_bits(&sliced.std, &posterior.std);
    }
}

/// The decoder that everything generates through keeps to its bounds.
#[test]
fn a_model_decodes_within_its_bounds() {
    let folder =
        ModelFolder::open(&fixtures().join("parity/ddim_tiny"), &Placement::cpu(DType::F32));
    let model = SdxlModel::new(folder.unwrap().into());
    let vae = &model.folder().vae;
    // The tile of this VAE is 64 pixels.
    let latents = single(6, &[3, 4, 40, 33]);
    let expected = |bounds| to_images(&vae.decode_within(&latents, bounds).unwrap()).unwrap();
    let bounds = Bounds { slice_bytes: 0, ..TILED };
    assert_eq!(model.with_bounds(bounds).decode(&latents).unwrap(), expected(&TILED));
    assert_eq!(model.decode(&latents).unwrap(), to_images(&vae.decode(&latents).unwrap()).unwrap());
    assert_ne!(model.decode(&latents).unwrap(), expected(&TILED));
}

/// Above 1024² pixels, with nothing said.
#[test]
fn large_images_tile_by_default() {
    let folder = fixtures().join("parity/euler_sdxl_shape");
    let folder = ModelFolder::open(&folder, &Placement::cpu(DType::F32));
    let model = SdxlModel::new(folder.unwrap().into());
    let vae = &model.folder().vae;
    let latents = single(7, &[1, 4, 128, 129]);
    let ours = model.decode(&latents).unwrap();
    assert_eq!(ours[0].dimensions(), (1032, 1024));
    assert_eq!(ours, to_images(&vae.decode_within(&latents, &TILED).unwrap()).unwrap());
    assert_ne!(ours, to_images(&vae.decode(&latents).unwrap()).unwrap());
}

/// A seam would lose gradients if a blend kept only one side.
#[test]
fn tiles_pass_gradients_on() {
    let vae = vae(DType::F64);
    let latents = Var::from_tensor(&normal(8, &[1, 4, 10, 13])).unwrap();
    let loss = |x: &Tensor| vae.decode_within(x, &TILED).unwrap().sqr().unwrap().sum_all().unwrap();
    let grads = loss(&latents).backward().unwrap();
    let direction = normal(9, latents.dims());
    let analytic: f64 = values(&(grads.get(&latents).unwrap() * &direction).unwrap()).iter().sum();
    let at = |h: f64| {
        let x = (latents.as_tensor() + (&direction * h).unwrap()).unwrap();
        loss(&x).to_scalar::<f64>().unwrap()
    };
    let numeric = (at(1e-6) - at(-1e-6)) / 2e-6;
    assert!((analytic - numeric).abs() < 1e-6 * numeric.abs(), "{analytic} is not {numeric}");
}
