"""A small random AutoencoderKL and what diffusers' tiled decoding and encoding make of images larger than its tiles,
for `tests/vae_tiling.rs`.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 safetensors==0.8.0
    python tools/vae_tiling_fixture.py --out tests/fixtures/vae_tiling

The folder is a component folder (config.json and weights in f16), plus reference.safetensors: for each case NAME
  NAME.latents   [B,C,h,w]   the decoder's input times scaling_factor
  NAME.decoded   [B,3,H,W]   after enable_tiling, f32
  NAME.image     [B,3,H',W'] in [-1, 1]; its sides need not be multiples of the VAE's factor
  NAME.mean, NAME.std        of the tiled posterior of the image
"""
import argparse
import shutil
from pathlib import Path

import torch

from parity_fixtures import contiguous, randomise, rel
from diffusers import AutoencoderKL
from safetensors.torch import save_file

# Latent sizes, image sizes. The tile has 8 latent positions a side, of 4 pixels each.
CASES = {
    "large": (1, (14, 19), (57, 77)),  # four tiles across, the last of one position
    "narrow": (2, (5, 13), (22, 53)),  # less than a tile high
}


@torch.no_grad()
def outputs(vae, x, dtype):
    vae.to(dtype)
    y = {}
    for name in CASES:
        latents, image = x[f"{name}.latents"].to(dtype), x[f"{name}.image"].to(dtype)
        y[f"{name}.decoded"] = vae.decode(latents / vae.config.scaling_factor).sample
        posterior = vae.encode(image).latent_dist
        y[f"{name}.mean"], y[f"{name}.std"] = posterior.mean, posterior.std
    return y


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/vae_tiling"))
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    channels = (4, 8, 8)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=channels,
        norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=32, scaling_factor=0.31, shift_factor=None,
    )
    generator = torch.Generator().manual_seed(8)
    randomise(vae, generator)
    vae.half().save_pretrained(out)
    vae = AutoencoderKL.from_pretrained(out, dtype=torch.float32).eval()
    x = {}
    for name, (batch, latents, image) in CASES.items():
        x[f"{name}.latents"] = torch.randn(batch, 4, *latents, generator=generator)
        smooth = torch.randn(batch, 3, 5, 5, generator=generator)
        x[f"{name}.image"] = torch.nn.functional.interpolate(smooth, image, mode="bicubic").clamp(-1, 1)
    whole = outputs(vae, x, torch.float32)
    vae.enable_tiling()
    y = outputs(vae, x, torch.float32)
    exact = outputs(vae, x, torch.float64)
    for key, value in y.items():
        assert value.shape == whole[key].shape and value.isfinite().all(), key
        print(f"{key:15} {list(value.shape)}, std {float(value.std()):.3f}, f32 against f64 {rel(value, exact[key]):.1e}, "
              f"against the whole {rel(value, whole[key]):.1e}")
        assert rel(value, exact[key]) < 1e-5 and rel(value, whole[key]) > 1e-2, key
    save_file(contiguous({**x, **y}), out / "reference.safetensors")


if __name__ == "__main__":
    main()
