"""Parameters and FLOP of the networks by PyTorch: tests/fixtures/plan.json. Nothing is computed: all tensors
are on the meta device.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0
    python tools/plan_fixture.py
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ROOT = Path(__file__).resolve().parent.parent
# Folder of config.json files, image height and width, batch, tokens.
CASES = [
    ("src/sdxl/data", 512, 512, 1, 77),
    ("src/sdxl/data", 1024, 1024, 2, 77),
    ("src/sdxl/data", 768, 1344, 1, 77),
    ("models/tiny", 64, 64, 3, 24),
    ("models/tiny", 144, 80, 1, 24),
    ("tests/fixtures/parity/ddim_tiny", 12, 16, 2, 24),
    ("tests/fixtures/parity/euler_sdxl_shape", 48, 80, 1, 16),
    ("tests/fixtures/parity/euler_v_odd", 36, 28, 3, 24),
    ("tests/fixtures/parity/euler_all_attention", 32, 32, 1, 24),
    ("tests/fixtures/parity/heun_four_level", 64, 40, 2, 20),
    ("tests/fixtures/parity/ddim_v_eight_channels", 32, 48, 2, 24),
]


def counted(network, forward):
    """What the network holds and what `forward` computes."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), counter:
        forward(network)
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": parameters, "flops": counter.get_total_flops()}


def unet(folder, height, width, batch, tokens):
    config = UNet2DConditionModel.load_config(folder / "unet")
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(config)

    def forward(network):
        conditions = None
        if config["addition_embed_type"] == "text_time":
            sizes = 6 * config["addition_time_embed_dim"]
            pooled = config["projection_class_embeddings_input_dim"] - sizes
            conditions = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}
        x = torch.empty(batch, config["in_channels"], height, width)
        text = torch.empty(batch, tokens, config["cross_attention_dim"])
        network(x, torch.empty(batch), text, added_cond_kwargs=conditions)

    return counted(network, forward)


def vae(folder, height, width, batch):
    with torch.device("meta"):
        network = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    factor = 2 ** (len(network.config.block_out_channels) - 1)
    size = (height // factor, width // factor)
    encode = counted(network, lambda n: n._encode(torch.empty(batch, n.config.in_channels, height, width)))
    decode = counted(network, lambda n: n._decode(torch.empty(batch, n.config.latent_channels, *size)))
    sizes = {"parameters": encode["parameters"], "encode_flops": encode["flops"], "decode_flops": decode["flops"]}
    return sizes, size


def text(folder, batch):
    config = json.loads((folder / "config.json").read_text())
    projects = config["architectures"] == ["CLIPTextModelWithProjection"]
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    with torch.device("meta"):
        network = kind(CLIPTextConfig(**config))
    length = config["max_position_embeddings"]

    def forward(network):
        # The tower looks for the end token in the ids' values, which meta tensors have none of.
        network(torch.empty(batch, length, dtype=torch.long))

    return counted(network, forward)


def main():
    cases = []
    for name, height, width, batch, tokens in CASES:
        folder = ROOT / name
        autoencoder, size = vae(folder, height, width, batch)
        cases.append({
            "folder": name, "height": height, "width": width, "batch": batch, "tokens": tokens,
            "unet": unet(folder, *size, batch, tokens),
            "vae": autoencoder,
            "text": [text(folder / tower, batch) for tower in ("text_encoder", "text_encoder_2")],
        })
        print(name, height, width, "done")
    versions = {"torch": torch.__version__.split("+")[0]}
    (ROOT / "tests/fixtures/plan.json").write_text(json.dumps({**versions, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
