"""How far results on a GPU are from those elsewhere, for tools/gpu_check.py: one JSON line a result.

    python tools/gpu_parity.py shipped --program ds-bench --model models/tiny --device cuda:0
    python tools/gpu_parity.py torch --program ds-bench --model DIR --device cuda:0 --latent 64 64
    python tools/gpu_parity.py sharpen --program ds-bench --model DIR --device cuda:0 --dtype bf16 --given OUT

`shipped` compares `ds-bench parity` on the GPU with the same program on the CPU, which computes in f32
with the same weights: every component, and the trajectory of each of the four samplers. It also
gives the PSNR of images decoded in bf16 against f32. It needs no diffusers.

`torch` compares it with diffusers, in f32 without TF32, on the same device and the same weights.
PyTorch's own bf16 is held against the same reference: the limit of bf16 follows it.

`sharpen` has Rust write a step of sharpening of an adapter into the folder --given, and gives the cosine of
its gradients, SFT's and RLHF's, with those that bench_torch_sharpen.py finds for the same choices. Images
are not generated anew: in few bits they come out different.

Errors are |a - b| / |b| over the whole tensor.
"""

import argparse
import gc
import json
import math
import subprocess
import tempfile
from pathlib import Path

import torch

from speed_check import expected, inputs, outputs, relative_error

SAMPLERS = ("DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler")
COMPONENTS = ("hidden_states", "pooled", "noise_pred", "decoded", "encoded_mean")
# PyTorch's own bf16 is 1.1e-2 off in the shipped model's `pooled`.
LIMITS = {"f32": 1e-3, "f16": 1e-2, "bf16": 2e-2}
# Five guided steps enlarge what one evaluation differs by.
TRAJECTORY_LIMITS = {"f32": 1e-3, "f16": 5e-2, "bf16": 5e-2}
# Of PyTorch's own error in bf16, and what is allowed however small that is.
SLACK, FLOORS = 1.5, {"f32": 1e-3, "bf16": 1e-2}
LEAST_PSNR = 40.0
# Of gradients of a step of sharpening; RLHF's are differences of nearly equal ones.
LEAST_COSINE = {"f32": 0.9999, "bf16": 0.98}


def report(check, value, limit, least=False):
    met = value >= limit if least else value <= limit
    print(json.dumps({"check": check, "value": value, "limit": limit, "least": least, "met": met}), flush=True)


def limit_of(name, dtype):
    return (TRAJECTORY_LIMITS if name == "trajectory" else LIMITS)[dtype]


def flags(device, dtype):
    """The CPU decodes in f32 only."""
    return "--device", device, "--dtype", dtype, "--vae-dtype", "f32" if device == "cpu" else dtype


def given_to(model):
    """Inputs for a checkpoint, without any of its networks."""
    generator = torch.Generator().manual_seed(0)
    config = lambda part: json.loads((model / part / "config.json").read_text())  # noqa: E731
    unet, vae, towers = config("unet"), config("vae"), [config("text_encoder"), config("text_encoder_2")]
    words = min(tower["vocab_size"] for tower in towers)
    tokens = min(tower["max_position_embeddings"] for tower in towers)
    side = unet["sample_size"]
    pixels = side * 2 ** (len(vae["block_out_channels"]) - 1)
    ids = torch.randint(3, words - 2, (2, tokens), generator=generator)
    ids[:, 0], ids[:, tokens // 2 :] = words - 2, words - 1
    return {
        "latents": torch.randn(2, unet["in_channels"], side, side, generator=generator),
        "timesteps": torch.tensor([801, 117]),
        "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * 2, dtype=torch.float32),
        "image": torch.rand(2, 3, pixels, pixels, generator=generator) * 2 - 1,
        "input_ids": ids,
        "input_ids_2": ids.clone(),
    }


def with_sampler(model, sampler, folder):
    """The checkpoint with another scheduler, in `folder`."""
    target = Path(folder) / sampler
    (target / "scheduler").mkdir(parents=True)
    for entry in model.iterdir():
        if entry.name != "scheduler":
            (target / entry.name).symlink_to(entry.resolve())
    name = "scheduler/scheduler_config.json"
    config = json.loads((model / name).read_text()) | {"_class_name": sampler}
    (target / name).write_text(json.dumps(config))
    return target


def psnr(ours, theirs):
    """Of images in [-1, 1], in dB."""
    difference = ours.clamp(-1, 1).double() - theirs.clamp(-1, 1).double()
    return 10 * math.log10(4 / max(difference.square().mean().item(), 1e-12))


def shipped(args):
    given = given_to(args.model)
    own = json.loads((args.model / "scheduler/scheduler_config.json").read_text())["_class_name"]
    with tempfile.TemporaryDirectory() as folder:
        for sampler in sorted(SAMPLERS, key=lambda name: name != own):
            model = str(with_sampler(args.model, sampler, folder))
            for dtype in LIMITS:
                reference = outputs(args.program, model, given, *flags("cpu", dtype))
                ours = outputs(args.program, model, given, *flags(args.device, dtype))
                for name in (*(COMPONENTS if sampler == own else ()), "trajectory"):
                    what = f"{name} of {sampler.removesuffix('Scheduler')}" if name == "trajectory" else name
                    report(f"shipped model, {dtype}: {what}", relative_error(ours[name], reference[name]),
                           limit_of(name, dtype))
            if sampler == own:
                drawn = given | {"latents": reference["trajectory"][-1].contiguous()}
                exact = outputs(args.program, model, drawn, *flags("cpu", "f32"))["decoded"]
                ours = outputs(args.program, model, drawn, *flags(args.device, "bf16"))["decoded"]
                report("shipped model: PSNR of images decoded in bf16, dB", psnr(ours, exact), LEAST_PSNR, least=True)


def against_torch(args):
    from bench_torch import Placement, Workload

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    workload = Workload(str(args.model), args.latent, Placement(args.device))
    given = inputs(workload)
    reference = expected(workload, given)
    del workload
    allowed = {}
    for dtype in ("f32", "bf16"):
        if dtype == "bf16":
            theirs = expected(Workload(str(args.model), args.latent, Placement(args.device, dtype, dtype)), given)
            allowed = {name: SLACK * relative_error(theirs[name], tensor) for name, tensor in reference.items()}
        if args.device != "cpu":  # the other program needs the memory
            gc.collect()
            torch.cuda.empty_cache()
        ours = outputs(args.program, str(args.model), given, *flags(args.device, dtype))
        for name, tensor in reference.items():
            report(f"against PyTorch in f32, {dtype}: {name}", relative_error(ours[name], tensor),
                   max(FLOORS[dtype], allowed.get(name, 0.0)))


def gradients(args):
    from bench_torch import Placement, Workload
    from bench_torch_sharpen import agreement

    dtype = args.dtype
    command = [args.program, "sharpen-step", "--model", str(args.model), "--out", str(args.given),
               *flags(args.device, dtype)]
    subprocess.run(command + (["--latent", *map(str, args.latent)] if args.latent else []), check=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    workload = Workload(str(args.model), args.latent, Placement(args.device, dtype, dtype))
    size = f"latents of {'×'.join(map(str, workload.latent))}"
    for name, step in agreement(workload, args.given, ("sharpen_sft_lora", "sharpen_rlhf_lora_replay")).items():
        what = f"gradients of {name}, {size}, {dtype}"
        report(f"{what}: cosine with PyTorch's", step["cosine"], LEAST_COSINE[dtype], least=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("shipped", "torch", "sharpen"))
    p.add_argument("--program", required=True, help="ds-bench")
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--latent", type=int, nargs=2, metavar=("H", "W"))
    p.add_argument("--dtype", choices=LEAST_COSINE, default="f32", help="of sharpen")
    p.add_argument("--given", type=Path, help="folder for the steps of sharpen")
    args = p.parse_args()
    if args.what == "sharpen" and not args.given:
        p.error("sharpen needs --given")
    {"shipped": shipped, "torch": against_torch, "sharpen": gradients}[args.what](args)


if __name__ == "__main__":
    main()
