"""Writes the adapter files that tests/lora_files.rs reads, and checks the files that it writes.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft safetensors==0.8.0
    python tools/lora_fixture.py                          # writes tests/fixtures/lora
    cargo test --release --test lora_files                # leaves its own files in $TARGET/tmp/lora
    python tools/lora_fixture.py --check $TARGET/tmp/lora # loads them with diffusers

The model is the fixture ddim_tiny with one random adapter in its U-Net (linears and
convolutions of every kind) and both text towers, of ranks 2 and 3 and alpha 1 (diffusers 0.42
loses alphas that differ from module to module):

  kohya.safetensors      kohya's names in SGM numbering, with .alpha
  underscored.safetensors the same in diffusers' numbering (U-Net alone)
  comfy.safetensors      diffusion_model.… (U-Net alone)
  diffusers.safetensors  as diffusers' save_lora_weights writes it, alpha in lora_adapter_metadata
  old.safetensors        what diffusers' converter makes of kohya.safetensors, alpha in the up matrix
  reference.safetensors  outputs of the U-Net and the towers with the update added to the weights

diffusers must load kohya.safetensors and diffusers.safetensors to the same outputs.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from safetensors.torch import load_file, save_file

from sgm_names import rename, unet_modules

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests/fixtures/parity/ddim_tiny"
OUT = ROOT / "tests/fixtures/lora"

ALPHA = 1.0
BLOCK = "transformer_blocks.0"
UNET = [
    f"mid_block.attentions.0.{BLOCK}.attn1.to_q", f"mid_block.attentions.0.{BLOCK}.attn1.to_out.0",
    f"down_blocks.1.attentions.0.{BLOCK}.attn2.to_k", f"up_blocks.0.attentions.1.{BLOCK}.ff.net.0.proj",
    f"up_blocks.0.attentions.0.{BLOCK}.ff.net.2", f"up_blocks.0.attentions.1.{BLOCK}.attn2.to_v",
    "mid_block.attentions.0.proj_in", "up_blocks.0.attentions.0.proj_out",
    "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1", "add_embedding.linear_2",
    "conv_in", "conv_out", "down_blocks.0.resnets.0.conv1", "down_blocks.1.resnets.0.time_emb_proj",
    "mid_block.resnets.1.conv2", "up_blocks.1.resnets.1.conv_shortcut", "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.upsamplers.0.conv",
]
TOWER = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj",
         "encoder.layers.0.self_attn.k_proj", "encoder.layers.1.self_attn.v_proj",
         "encoder.layers.0.mlp.fc1", "encoder.layers.1.mlp.fc2"]


def pipeline():
    pipe = StableDiffusionXLPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def towers(pipe):
    return {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}


def bare(name):
    return name.removeprefix("text_model.")


def find(model, module):
    """A tower's module, whether or not this version of transformers has a text_model in it."""
    for name, found in model.named_modules():
        if bare(name.removeprefix("base_model.model.")) == module:
            return found
    raise KeyError(module)


def adapter(pipe):
    """{(component, module): (down, up, alpha)}"""
    torch.manual_seed(4)
    out = {}
    todo = [("unet", pipe.unet, m) for m in UNET]
    todo += [(name, tower, m) for name, tower in towers(pipe).items() for m in TOWER]
    for i, (component, model, module) in enumerate(todo):
        weight = find(model, module).weight
        rank = 2 + i % 2
        up_shape = (weight.shape[0], rank) + (1,) * (weight.ndim - 2)
        down = 0.3 * torch.randn((rank, *weight.shape[1:]))
        up = 0.3 * torch.randn(up_shape)
        # Exact in half precision.
        down, up = down.half().float(), up.half().float()
        out[component, module] = (down, up, ALPHA)
    return out


def outputs(pipe):
    given = load_file(MODEL / "reference.safetensors")
    hidden, pooled = given["hidden_states"].float(), given["pooled"].float()
    with torch.no_grad():
        result = {"unet": pipe.unet(
            given["latents"].float(), given["timesteps"], hidden,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": given["time_ids"].float()},
        ).sample}
        ids = torch.tensor([[716, 5, 40, 7, 300, 717, 717, 717], [716, 9, 717, 717, 717, 717, 717, 717]])
        for name, tower in towers(pipe).items():
            out = tower(ids, output_hidden_states=True)
            result[name] = out.hidden_states[-2]
            if hasattr(out, "text_embeds"):
                result[f"{name}.pooled"] = out.text_embeds
        result["ids"] = ids
    return result


def merged(pipe, parts):
    for (component, module), (down, up, alpha) in parts.items():
        layer = find(getattr(pipe, component), module)
        update = up.flatten(1) @ down.flatten(1) * (alpha / down.shape[0])
        layer.weight.data += update.reshape(layer.weight.shape)


def kohya(parts, names):
    tensors = {}
    for (component, module), (down, up, alpha) in parts.items():
        start = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
        name = rename(module, names) if component == "unet" else f"text_model.{module}"
        stem = f"{start}_{name}".replace(".", "_")
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down, up
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
    return {k: v.contiguous().half() for k, v in tensors.items()}


def save_by_diffusers(pipe, parts, folder):
    """save_lora_weights with alphas as PEFT's metadata."""
    layers, metadata = {}, {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        own = {m: p for (c, m), p in parts.items() if c == component}
        start = "text_model." if hasattr(getattr(pipe, component), "text_model") else ""
        layers[component] = {}
        for module, (down, up, _) in own.items():
            layers[component][f"{start}{module}.lora_A.weight"] = down.half()
            layers[component][f"{start}{module}.lora_B.weight"] = up.half()
        metadata[component] = {
            "r": 2, "lora_alpha": 8, "target_modules": [start + m for m in own],
            "rank_pattern": {f"^{start}{m}": p[0].shape[0] for m, p in own.items()},
            "alpha_pattern": {f"^{start}{m}": p[2] for m, p in own.items()},
        }
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"],
        text_encoder_2_lora_layers=layers["text_encoder_2"], weight_name="diffusers.safetensors",
        unet_lora_adapter_metadata=metadata["unet"], text_encoder_lora_adapter_metadata=metadata["text_encoder"],
        text_encoder_2_lora_adapter_metadata=metadata["text_encoder_2"],
    )


def old_names(tensors, config):
    state, alphas = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(dict(tensors), config))
    out = {}
    for key, tensor in state.items():
        if ".up." in key:
            down = state[key.replace(".up.", ".down.")]
            alpha = [v for k, v in alphas.items() if k.removesuffix(".alpha") in (
                key.split(".lora.")[0], key.removesuffix(".weight").replace(".up", ".down"), key.replace(".up.", ".down."))]
            assert len(alpha) == 1, (key, alpha)
            tensor = tensor * (alpha[0] / down.shape[0])
        out[key] = tensor.contiguous()
    return out


def compare(what, ours, theirs, bar):
    for name, expected in theirs.items():
        if name != "ids":
            error = ((ours[name] - expected).norm() / expected.norm()).item()
            print(f"{what}: {name}: relative difference {error:.1e}")
            assert error < bar, what


def write():
    pipe = pipeline()
    parts, plain = adapter(pipe), outputs(pipe)
    names = unet_modules(pipe.unet.config)
    merged(pipe, parts)
    reference = outputs(pipe)
    for name in ("unet", "text_encoder", "text_encoder_2", "text_encoder_2.pooled"):
        assert (reference[name] - plain[name]).norm() > 0.03 * plain[name].norm(), name
    OUT.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in reference.items()}, OUT / "reference.safetensors")
    all_kohya = kohya(parts, names)
    save_file(all_kohya, OUT / "kohya.safetensors", {"ss_network_module": "networks.lora"})
    unet = {k: p for k, p in parts.items() if k[0] == "unet"}
    save_file(kohya(unet, {m: m for _, m in unet}), OUT / "underscored.safetensors")
    comfy = {}
    for (_, module), (down, up, alpha) in unet.items():
        stem = "diffusion_model." + rename(module, names)
        comfy |= {f"{stem}.lora_A.weight": down.half(), f"{stem}.lora_B.weight": up.half(),
                  f"{stem}.alpha": torch.tensor(alpha)}
    save_file(comfy, OUT / "comfy.safetensors")
    save_by_diffusers(pipe, parts, OUT)
    save_file(old_names(all_kohya, pipe.unet.config), OUT / "old.safetensors")
    check(OUT)


def check(folder):
    reference = load_file(OUT / "reference.safetensors")
    for name in ("kohya", "diffusers"):
        pipe = pipeline()
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors")
        compare(f"diffusers with {folder / name}", outputs(pipe), reference, 2e-3)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", type=Path, help="a folder with kohya.safetensors and diffusers.safetensors")
    given = arguments.parse_args()
    check(given.check) if given.check else write()
