"""What PyTorch's autograd saves of a U-Net's forward, batch 1: the activations in the memory formula of
docs/performance-table.md. Nothing is computed: all tensors are on the meta device.

    pip install torch==2.15.0 diffusers==0.42.1 peft
    python tools/saved_activations.py --model runs/mid --tokens 77
"""

import argparse
from pathlib import Path

RANK, TARGETS = 16, ["to_q", "to_k", "to_v", "to_out.0"]


def saved(unet, config, tokens):
    """Bytes of the storages that the graph keeps, parameters left out, shared ones once."""
    import torch

    parameters = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept, sizes = [], {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept.append(tensor)
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    side, width = config["sample_size"], config["cross_attention_dim"]
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.device("meta"):
        conditions = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        x = torch.empty(1, config["in_channels"], side, side)
        y = unet(x, torch.empty(1), torch.empty(1, tokens, width), added_cond_kwargs=conditions).sample
        torch.nn.functional.mse_loss(y, torch.empty_like(y))
    return sum(sizes.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in the diffusers layout")
    parser.add_argument("--tokens", type=int, default=77)
    args = parser.parse_args()
    import diffusers
    import torch
    from peft import LoraConfig

    config = diffusers.UNet2DConditionModel.load_config(Path(args.model) / "unet")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    print(f"all parameters: {saved(unet, config, args.tokens) / 1e6:.0f} MB")
    unet.requires_grad_(False)
    with torch.device("meta"):
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False, target_modules=TARGETS))
    print(f"LoRA: {saved(unet, config, args.tokens) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
