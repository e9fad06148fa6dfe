"""Writes an SDXL-type checkpoint with random weights, to measure speed and memory on.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 safetensors==0.8.0
    python tools/random_checkpoint.py --shape mid --out checkpoints/mid

The folder has the diffusers layout (model_index.json, unet, vae, text_encoder, text_encoder_2,
scheduler; no tokenizers), in f32, and loads in diffusers and here. Its U-Net is SDXL's in
everything but width and depth: three levels, the first without attention, two residual blocks
each, linear projections, cross attention to 2048 values a token, 77 tokens, text_time
embedding of 2816 values. The VAE (8 pixels a latent) and the two text towers (2 layers each, SDXL's
widths) are small.

  shape  U-Net channels  transformers  heads of   parameters
  small  64 128 256      0 1 2         32 values    47 million
  mid    160 320 640     0 2 10        64 values   728 million
  sdxl   320 640 1280    0 2 10        64 values   2567 million

Weights are PyTorch's default initialisation of a fixed seed, so activations stay finite;
the same versions of the libraries write the same files.

`sdxl` is stable-diffusion-xl-base-1.0 in everything but its weights' values, towers and VAE
included (configurations in src/sdxl/data), in bf16 or f16 (--dtype), made and written a tensor
at a time: 7 GB of disk, and memory for the largest tensor. Matrices are normal with variance
1 / inputs, norms' weights normal around 1, biases around 0.
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
}
LATENT, TOKENS, VOCABULARY = 64, 77, 1000
WIDTHS = 768, 1280  # of the text towers, side by side what the U-Net attends to
TIME_IDS, TIME_WIDTH = 6, 256
SDXL = Path(__file__).parent.parent / "src/sdxl/data"
DTYPES = {"bfloat16": "BF16", "float16": "F16"}  # and their names in files
SPREAD = 0.1  # of norms' weights and of biases, so that one left out is noticed


def unet(shape):
    from diffusers import UNet2DConditionModel

    options = dict(SHAPES[shape])
    head = options.pop("head")
    return UNet2DConditionModel(
        sample_size=LATENT, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(max(1, channels // head) for channels in options["block_out_channels"]),
        cross_attention_dim=sum(WIDTHS), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=WIDTHS[1] + TIME_IDS * TIME_WIDTH, **options,
    )


def vae():
    from diffusers import AutoencoderKL

    channels = (32, 64, 64, 64)
    return AutoencoderKL(
        block_out_channels=channels, layers_per_block=2, norm_num_groups=32, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels), sample_size=8 * LATENT, scaling_factor=0.13025,
    )


def towers():
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    classes, activations, end = (CLIPTextModel, CLIPTextModelWithProjection), ("quick_gelu", "gelu"), VOCABULARY - 1
    return [
        tower(CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
            num_attention_heads=width // 64, max_position_embeddings=TOKENS, hidden_act=activation,
            projection_dim=width, bos_token_id=end - 1, eos_token_id=end, pad_token_id=padding,
        ))
        for tower, width, activation, padding in zip(classes, WIDTHS, activations, (end, 0))
    ]


def scheduler():
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        prediction_type="epsilon", interpolation_type="linear", timestep_spacing="leading", steps_offset=1,
    )


def networks():
    """SDXL's networks without values: folder, file's stem, network."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    for part, stem, make in [
        ("unet", "diffusion_pytorch_model", UNet2DConditionModel.from_config),
        ("vae", "diffusion_pytorch_model", AutoencoderKL.from_config),
        ("text_encoder", "model", lambda config: CLIPTextModel(CLIPTextConfig(**config))),
        ("text_encoder_2", "model", lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config))),
    ]:
        config = json.loads((SDXL / part / "config.json").read_text())
        with torch.device("meta"):
            network = make(config)
        yield part, stem, network


def values(shape, generator):
    import torch

    drawn = torch.randn(shape, generator=generator)
    return drawn.mul_(1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else SPREAD)


def write_random(path, network, dtype, generator):
    """A safetensors file of a network's parameters, a tensor at a time."""
    import torch

    number, parameters = getattr(torch, dtype), dict(network.named_parameters())
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, p in parameters.items():
        end = at + p.numel() * number.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(p.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, p in parameters.items():
            drawn = values(p.shape, generator)
            if p.dim() == 1 and name.endswith("weight"):
                drawn += 1
            file.write(drawn.to(number).view(torch.uint8).numpy())


def write_sdxl(out, dtype, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    for part, stem, network in networks():
        shutil.copytree(SDXL / part, out / part, dirs_exist_ok=True)
        write_random(out / part / f"{stem}.safetensors", network, dtype, generator)
        print(f"{part}: {sum(p.numel() for p in network.parameters()):,} parameters")
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler/scheduler_config.json").write_bytes((SDXL / "scheduler.json").read_bytes())
    (out / "model_index.json").write_bytes((SDXL / "model_index.json").read_bytes())


def write_small(out, shape, seed):
    import diffusers
    import torch

    torch.manual_seed(seed)
    text_1, text_2 = towers()
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=text_1, text_encoder_2=text_2, tokenizer=None, tokenizer_2=None,
        unet=unet(shape), scheduler=scheduler(), force_zeros_for_empty_prompt=True, add_watermarker=False,
    )
    pipe.save_pretrained(out, safe_serialization=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        print(f"{name}: {sum(p.numel() for p in getattr(pipe, name).parameters()):,} parameters")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=[*SHAPES, "sdxl"], required=True)
    p.add_argument("--out", required=True, help="folder that is written")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=DTYPES, help="of sdxl's weights, bfloat16 by default; the others are in f32")
    args = p.parse_args()
    if args.dtype and args.shape != "sdxl":
        p.error("--dtype is for --shape sdxl")

    import diffusers
    import transformers

    for lib in (diffusers, transformers):
        lib.utils.logging.set_verbosity_error()
        lib.utils.logging.disable_progress_bar()
    if args.shape == "sdxl":
        write_sdxl(Path(args.out), args.dtype or "bfloat16", args.seed)
    else:
        write_small(args.out, args.shape, args.seed)
    size = sum(file.stat().st_size for file in Path(args.out).rglob("*") if file.is_file())
    print(f"{args.out}: {size:,} bytes")


if __name__ == "__main__":
    main()
