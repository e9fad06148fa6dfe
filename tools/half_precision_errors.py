#!/usr/bin/env python3
"""How far diffusers' U-Nets in bf16 are from their own f32 outputs.

Half precision has no bar of its own: what a network makes of its rounding depends on its
weights. So the GPU tests (tests/gpu/model.rs) compare with what PyTorch loses on the same
checkpoints and inputs. Writes tests/fixtures/half_precision.json: relative L2 errors of
`noise_pred` by checkpoint.

    python tools/half_precision_errors.py
"""

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"


def error(folder: Path) -> float:
    given = load_file(folder / "reference.safetensors")
    half = torch.bfloat16
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=half).eval()
    added = {"text_embeds": given["pooled"].to(half), "time_ids": given["time_ids"]}
    with torch.no_grad():
        ours = unet(
            given["latents"].to(half),
            given["timesteps"].float(),
            encoder_hidden_states=given["hidden_states"].to(half),
            added_cond_kwargs=added,
        ).sample.float()
    expected = given["noise_pred"].float()
    return float((ours - expected).norm() / expected.norm())


def main() -> None:
    folders = sorted(p.parent for p in (FIXTURES / "parity").glob("*/reference.safetensors"))
    errors = {folder.name: float(f"{error(folder):.3g}") for folder in folders}
    text = json.dumps({"bf16": errors}, indent=2) + "\n"
    (FIXTURES / "half_precision.json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
