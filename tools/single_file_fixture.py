"""Writes tests/fixtures/single_file, and checks a single file that the crate exported.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 safetensors==0.8.0
    python tools/single_file_fixture.py
    cargo test --release --test single_file    # exports the fixture euler_sdxl_shape
    python tools/single_file_fixture.py --check $TARGET/tmp/single/model.safetensors

  sdxl.tsv, small.tsv   every tensor of SDXL, and of a reduced model: its name in the single file,
                        in the diffusers folder (none for a part of a fused tensor's), its shape in
                        the file. The names come from a walk of the architecture (sgm_names.py)
                        and are accepted when diffusers' own converters map them to exactly the
                        tensors of its networks.
  model.safetensors     the fixture euler_sdxl_shape in the single-file layout.

The check converts the file with diffusers' converters and compares every tensor with the folder.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sgm_names import open_clip, rename, unet_modules, vae_modules

ROOT = Path(__file__).resolve().parent.parent
DATA, OUT = ROOT / "src/sdxl/data", ROOT / "tests/fixtures/single_file"
MODEL = ROOT / "tests/fixtures/parity/euler_sdxl_shape"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
          "text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."}
SMALL = {
    "unet": {"block_out_channels": [32, 64, 128], "attention_head_dim": [1, 1, 2], "cross_attention_dim": 192,
             "transformer_layers_per_block": [1, 1, 2], "projection_class_embeddings_input_dim": 128 + 6 * 32,
             "addition_time_embed_dim": 32},
    "vae": {"block_out_channels": [32, 32, 64, 64]},
    "text_encoder": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 2,
                     "projection_dim": 64, "vocab_size": 100},
    "text_encoder_2": {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 3,
                       "projection_dim": 128, "vocab_size": 100},
}


def configs(changes):
    return {part: json.loads((DATA / f"{part}.json").read_text()) | changes.get(part, {}) for part in PARTS}


def with_text_model(state):
    """transformers 5 writes a tower without projection without the prefix."""
    ours = ("text_model.", "text_projection.")
    return {k if k.startswith(ours) else f"text_model.{k}": v for k, v in state.items() if "position_ids" not in k}


def empty(config):
    """The networks of these configurations without values."""
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel.from_config(config["unet"]),
            "vae": AutoencoderKL.from_config(config["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])),
        }
    states = {part: network.state_dict() for part, network in networks.items()}
    for part in ("text_encoder", "text_encoder_2"):
        states[part] = with_text_model(states[part])
    return states


def single(states, config):
    """The single file's tensors."""
    out = {}
    unet, vae = unet_modules(config["unet"]), vae_modules(config["vae"])
    for name, tensor in states["unet"].items():
        out[PREFIX["unet"] + rename(name, unet)] = tensor
    for name, tensor in states["vae"].items():
        if "attentions" in name and "to_" in name and name.endswith("weight"):
            tensor = tensor[:, :, None, None]
        out[PREFIX["vae"] + rename(name, vae)] = tensor
    out |= {PREFIX["text_encoder"] + k: v for k, v in states["text_encoder"].items()}
    out |= {PREFIX["text_encoder_2"] + k: v for k, v in open_clip(states["text_encoder_2"]).items()}
    return out


class Tower:
    """What convert_open_clip_checkpoint asks of a text model."""

    class config:
        pass

    def __init__(self, config):
        self.config.projection_dim, self.config.hidden_size = config["projection_dim"], config["hidden_size"]


def folder(tensors, config):
    """The folder's tensors, by diffusers' converters."""
    return {
        "unet": convert_ldm_unet_checkpoint(dict(tensors), config["unet"]),
        "vae": convert_ldm_vae_checkpoint(dict(tensors), config["vae"]),
        "text_encoder": with_text_model(convert_ldm_clip_checkpoint(dict(tensors), remove_prefix=PREFIX["text_encoder"])),
        "text_encoder_2": with_text_model(convert_open_clip_checkpoint(
            Tower(config["text_encoder_2"]), dict(tensors), prefix=PREFIX["text_encoder_2"])),
    }


def same_names(found, expected, what):
    for part in PARTS:
        a, b = set(found[part]), set(expected[part])
        assert a == b, (what, part, sorted(a ^ b)[:10])
        for name, tensor in expected[part].items():
            assert found[part][name].shape == tensor.shape, (what, part, name)


def write_names(path, config):
    states = empty(config)
    tensors = single(states, config)
    same_names(folder(tensors, config), states, path.name)
    # Which is which: converters keep the very tensors that they only rename.
    where = {id(t): (part, name) for part, state in folder(tensors, config).items() for name, t in state.items()}
    lines = []
    for name, tensor in tensors.items():
        part, ours = where.get(id(tensor), ("", ""))
        if not ours and name.startswith(PREFIX["vae"]):
            part, ours = "vae", next(k for k, v in vae_modules(config["vae"]).items()
                                     if name == f"{PREFIX['vae']}{v}.weight") + ".weight"
        shape = ",".join(map(str, tensor.shape))
        lines.append(f"{name}\t{ours}\t{shape}\n")
    path.write_text("".join(sorted(lines)))
    print(f"{path.name}: {len(lines)} tensors, {sum(1 for l in lines if chr(9) * 2 in l)} fused or transposed")


def read_folder(path):
    states = {}
    for part in PARTS:
        states[part] = {}
        for file in sorted((path / part).glob("*.safetensors")):
            states[part] |= load_file(file)
        config = json.loads((path / part / "config.json").read_text())
    states["text_encoder"] = with_text_model(states["text_encoder"])
    states["text_encoder_2"] = with_text_model(states["text_encoder_2"])
    return states, {part: json.loads((path / part / "config.json").read_text()) for part in PARTS}


def check(file):
    states, config = read_folder(MODEL)
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    found = folder(tensors, config)
    same_names(found, states, str(file))
    for part in PARTS:
        for name, tensor in states[part].items():
            assert torch.equal(found[part][name], tensor), (part, name)
    print(f"{file}: diffusers' converters give the folder's {sum(map(len, states.values()))} tensors")


def write():
    OUT.mkdir(exist_ok=True)
    write_names(OUT / "sdxl.tsv", configs({}))
    write_names(OUT / "small.tsv", configs(SMALL))
    states, config = read_folder(MODEL)
    tensors = {k: v.contiguous() for k, v in single(states, config).items()}
    kept = {part: config[part] for part in PARTS}
    kept["scheduler"] = json.loads((MODEL / "scheduler/scheduler_config.json").read_text().replace("Infinity", "null"))
    kept["model_index"] = json.loads((MODEL / "model_index.json").read_text())
    # Buffers that such files hold besides.
    tensors |= {"model_ema.decay": torch.tensor(0.99), "denoiser.sigmas": torch.ones(4),
                "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
                "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6)}
    save_file(tensors, OUT / "model.safetensors", {"diffusion-sharpening.configs": json.dumps(kept)})
    check(OUT / "model.safetensors")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", type=Path, help="an export of the fixture euler_sdxl_shape")
    given = arguments.parse_args()
    check(given.check) if given.check else write()
