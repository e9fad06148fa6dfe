"""Tensor names of SDXL checkpoints in Stability's own layout (SGM), by walking its architecture.

Used by tools/lora_fixture.py and tools/single_file_fixture.py, which check the names with
diffusers' converters. Each function gives {diffusers name: SGM name} of modules or tensors.
"""


def unet_modules(config):
    """Modules of `UNet2DConditionModel`; transformers as a whole."""
    depth = config["layers_per_block"]
    down, up = config["down_block_types"], config["up_block_types"]
    names = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
    }

    def resnet(ours, theirs):
        for a, b in [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
                     ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")]:
            names[f"{ours}.{a}"] = f"{theirs}.{b}"

    for b, kind in enumerate(down):
        for layer in range(depth):
            i = 1 + b * (depth + 1) + layer
            resnet(f"down_blocks.{b}.resnets.{layer}", f"input_blocks.{i}.0")
            if "Cross" in kind:
                names[f"down_blocks.{b}.attentions.{layer}"] = f"input_blocks.{i}.1"
        names[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{(b + 1) * (depth + 1)}.0.op"
    resnet("mid_block.resnets.0", "middle_block.0")
    names["mid_block.attentions.0"] = "middle_block.1"
    resnet("mid_block.resnets.1", "middle_block.2")
    for b, kind in enumerate(up):
        for layer in range(depth + 1):
            i = b * (depth + 1) + layer
            resnet(f"up_blocks.{b}.resnets.{layer}", f"output_blocks.{i}.0")
            if "Cross" in kind:
                names[f"up_blocks.{b}.attentions.{layer}"] = f"output_blocks.{i}.1"
        place = 2 if "Cross" in kind else 1
        names[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{b * (depth + 1) + depth}.{place}.conv"
    return names


def rename(tensor, modules):
    """A tensor's name, by the longest module name that it begins with."""
    parts = tensor.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if module in modules:
            return ".".join([modules[module], *parts[end:]])
    raise KeyError(tensor)


def vae_modules(config):
    levels, depth = len(config["block_out_channels"]), config["layers_per_block"]
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        for ours, theirs in [("conv_in", "conv_in"), ("conv_out", "conv_out"), ("conv_norm_out", "norm_out"),
                             ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
                             ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
                             ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
                             ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
                             ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
                             ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")]:
            names[f"{half}.{ours}"] = f"{half}.{theirs}"
    for level in range(levels):
        up = levels - 1 - level
        for layer in range(depth + 1):
            for ours, theirs in [(f"encoder.down_blocks.{level}", f"encoder.down.{level}"),
                                 (f"decoder.up_blocks.{level}", f"decoder.up.{up}")]:
                block = f"{theirs}.block.{layer}"
                names[f"{ours}.resnets.{layer}"] = block
                names[f"{ours}.resnets.{layer}.conv_shortcut"] = f"{block}.nin_shortcut"
        names[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        names[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    return names


def open_clip(state):
    """A tower of transformers' names (text_model.…) as OpenCLIP stores it."""
    import torch

    out = {}
    for name, tensor in state.items():
        if ".self_attn.q_proj." in name:
            key = name.replace("text_model.encoder.layers", "transformer.resblocks")
            key = key.replace("self_attn.q_proj.", "attn.in_proj_")
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            out[key] = torch.cat(parts)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif name == "text_projection.weight":
            out["text_projection"] = tensor.T.contiguous()
        else:
            for ours, theirs in [("text_model.encoder.layers", "transformer.resblocks"),
                                 ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"),
                                 ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                                 ("text_model.final_layer_norm", "ln_final"),
                                 ("text_model.embeddings.token_embedding", "token_embedding"),
                                 ("text_model.embeddings.position_embedding.weight", "positional_embedding")]:
                name = name.replace(ours, theirs)
            out[name] = tensor
    return out
