"""Writes an SDXL-type checkpoint with random weights, to measure speed and memory on.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 safetensors==0.8.0
    python tools/random_checkpoint.py --shape mid --out checkpoints/mid

The folder has the diffusers layout (model_index.json, unet, vae, text_encoder, text_encoder_2,
scheduler; no tokenizers), and loads in diffusers and here. Its U-Net is SDXL's in
everything but width and depth: three levels, the first without attention, two residual blocks
each, linear projections, cross attention to 2048 values a token, 77 tokens, text_time
embedding of 2816 values. The VAE (8 pixels a latent) and the two text towers (2 layers each, SDXL's
widths) are small, but for sdxl.

  shape  U-Net channels  transformers  heads of   parameters
  small  64 128 256      0 1 2         32 values    47 million
  mid    160 320 640     0 2 10        64 values   728 million
  sdxl   320 640 1280    0 2 10        64 values  2567 million

sdxl is SDXL itself, with its VAE and text towers. --device cuda makes its numbers on the GPU, in
seconds, and --dtype bf16 writes 7 GB where f32 would take 14.

--scene-clip copies a scene CLIP into it, which steps of sharpening need: its scores mean nothing there.

Weights are made and written a tensor at a time, so that it takes little memory: matrices are normal
with variance 1 / inputs, so that activations stay near 1; norms' weights normal around 1 and biases
around 0, so that one left out is noticed. The same seed gives the same files on the same device.
"""

import argparse
import json
import math
import os
import shutil
import struct
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Level 0 has no attention: its transformer layers (SDXL has 1 there) and heads count for nothing.
SHAPES = {
    "small": {"block_out_channels": (64, 128, 256), "transformer_layers_per_block": (1, 1, 2), "head": 32},
    "mid": {"block_out_channels": (160, 320, 640), "transformer_layers_per_block": (1, 2, 10), "head": 64},
    "sdxl": {"block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "head": 64},
}
# VAE channels, layers of the two towers, words they know, and the latents that are the default.
REST = {"sdxl": ((128, 256, 512, 512), (12, 32), 49408, 128)}
SMALL = (32, 64, 64, 64), (2, 2), 1000, 64
TOKENS = 77
PARTS = {  # and the stems of their files
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SPREAD = 0.1  # of norms' weights and of biases
WIDTHS = 768, 1280  # of the text towers, side by side what the U-Net attends to
TIME_IDS, TIME_WIDTH = 6, 256


def unet(shape):
    from diffusers import UNet2DConditionModel

    options = dict(SHAPES[shape])
    head = options.pop("head")
    return UNet2DConditionModel(
        sample_size=REST.get(shape, SMALL)[3], in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(max(1, channels // head) for channels in options["block_out_channels"]),
        cross_attention_dim=sum(WIDTHS), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=WIDTHS[1] + TIME_IDS * TIME_WIDTH, **options,
    )


def vae(shape):
    from diffusers import AutoencoderKL

    channels, _, _, latent = REST.get(shape, SMALL)
    return AutoencoderKL(
        block_out_channels=channels, layers_per_block=2, norm_num_groups=32, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels), sample_size=8 * latent, scaling_factor=0.13025,
    )


def towers(shape):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    _, depths, words, _ = REST.get(shape, SMALL)
    classes, activations, end = (CLIPTextModel, CLIPTextModelWithProjection), ("quick_gelu", "gelu"), words - 1
    return [
        tower(CLIPTextConfig(
            vocab_size=words, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, max_position_embeddings=TOKENS, hidden_act=activation,
            projection_dim=width, bos_token_id=end - 1, eos_token_id=end, pad_token_id=padding,
        ))
        for tower, width, layers, activation, padding in zip(classes, WIDTHS, depths, activations, (end, 0))
    ]


def scheduler():
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        prediction_type="epsilon", interpolation_type="linear", timestep_spacing="leading", steps_offset=1,
    )


def draw(name, shape, generator):
    import torch

    values = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) > 1:
        return values.mul_(1 / math.sqrt(math.prod(shape[1:])))
    return values.mul_(SPREAD).add_(1 if name.endswith("weight") else 0)


def write(path, parameters, dtype, generator):
    """A safetensors file, a tensor at a time."""
    import torch

    number = getattr(torch, DTYPES[dtype])
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, p in parameters.items():
        end = at + p.numel() * number.itemsize
        header[name] = {"dtype": dtype.upper(), "shape": list(p.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, p in parameters.items():
            file.write(draw(name, p.shape, generator).to(number).cpu().view(torch.uint8).numpy())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, required=True)
    p.add_argument("--out", required=True, help="folder that is written")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu", help="where the numbers are made: cpu or cuda")
    p.add_argument("--dtype", choices=DTYPES, default="f32", help="of the files")
    p.add_argument("--scene-clip", help="folder that is copied to scene_clip")
    args = p.parse_args()

    import diffusers
    import torch
    import transformers

    for lib in (diffusers, transformers):
        lib.utils.logging.set_verbosity_error()
        lib.utils.logging.disable_progress_bar()
    with torch.device("meta"):
        text_1, text_2 = towers(args.shape)
        decoder, network = vae(args.shape), unet(args.shape)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=decoder, text_encoder=text_1, text_encoder_2=text_2, tokenizer=None, tokenizer_2=None,
        unet=network, scheduler=scheduler(), force_zeros_for_empty_prompt=True, add_watermarker=False,
    )
    pipe.save_config(args.out)
    pipe.scheduler.save_pretrained(f"{args.out}/scheduler")
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for name, stem in PARTS.items():
        network, folder = getattr(pipe, name), Path(args.out) / name
        (network.save_config if hasattr(network, "save_config") else network.config.save_pretrained)(folder)
        write(folder / f"{stem}.safetensors", dict(network.named_parameters()), args.dtype, generator)
        print(f"{name}: {network.num_parameters():,} parameters")
    if args.scene_clip:
        shutil.copytree(args.scene_clip, Path(args.out) / "scene_clip", dirs_exist_ok=True)
    size = sum(file.stat().st_size for file in Path(args.out).rglob("*") if file.is_file())
    print(f"{args.out}: {size:,} bytes")


if __name__ == "__main__":
    main()
