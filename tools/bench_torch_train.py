"""The training pieces that tools/bench_torch.py measures: one network, one optimiser, diffusers' way.

LoRA goes onto the projections of every attention, through peft as diffusers' training scripts
do, with the base weights frozen; `full` trains every parameter. The loss is mean((pred -
target)^2) at fixed inputs, in f32; with diffusers' gradient checkpointing where the name says recompute.
Where the networks are bf16 or f16 it is mixed precision as in those scripts: autocast over f32
weights, or over frozen weights of that type and an f32 adapter.
"""

from contextlib import nullcontext
from dataclasses import dataclass

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ADAM = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@dataclass(frozen=True)
class Training:
    lora: bool
    batch: int
    optimise: bool
    recompute: bool = False


# unet_forward_backward: gradients, set to None before each run.
# train_step: those, a step of AdamW (its default implementation), zero_grad.
TRAINING = {
    "unet_forward_backward_lora_b1": Training(lora=True, batch=1, optimise=False),
    "unet_forward_backward_full_b1": Training(lora=False, batch=1, optimise=False),
    "train_step_lora_b1": Training(lora=True, batch=1, optimise=True),
    "train_step_full_b1": Training(lora=False, batch=1, optimise=True),
    "unet_forward_backward_lora_b4": Training(lora=True, batch=4, optimise=False),
    "unet_forward_backward_full_b4": Training(lora=False, batch=4, optimise=False),
    "train_step_lora_b4": Training(lora=True, batch=4, optimise=True),
    "train_step_full_b4": Training(lora=False, batch=4, optimise=True),
    "train_step_lora_b4_recompute": Training(lora=True, batch=4, optimise=True, recompute=True),
    "train_step_full_b4_recompute": Training(lora=False, batch=4, optimise=True, recompute=True),
}


def versions():
    """Of what the adapter needs besides the rest."""
    import peft

    return {"peft": peft.__version__}


def lora():
    """The adapter: both factors random. By default one is zero, and the other's gradient with it."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False, target_modules=TARGETS)


def trained_parameters(unet, adapted):
    """Adds the adapter where there is to be one; the parameters that get gradients."""
    import torch

    unet.requires_grad_(not adapted)
    if adapted:
        torch.manual_seed(0)
        unet.add_adapter(lora())
    return [p for p in unet.parameters() if p.requires_grad]


def prepare(piece, unet, inputs, target):
    """What does the piece once on `unet`, whose keyword arguments are `inputs`, and gives the loss."""
    import torch

    stored = unet.dtype
    if not piece.lora:
        unet.float()
    parameters = trained_parameters(unet, piece.lora)
    # Counting on shapes alone knows no autocast.
    mixed = nullcontext() if stored == torch.float32 else torch.autocast(target.device.type, stored)
    if piece.recompute:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, **ADAM) if piece.optimise else None

    def run():
        if optimizer is None:
            for parameter in parameters:
                parameter.grad = None
        with mixed:
            prediction = unet(**inputs)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return run


def restore(unet, dtype):
    """Takes adapters, gradients and checkpointing off again."""
    unet.disable_gradient_checkpointing()
    if getattr(unet, "_hf_peft_config_loaded", False):
        unet.unload_lora()
    for parameter in unet.parameters():
        parameter.grad = None
    unet.requires_grad_(False).to(dtype)
