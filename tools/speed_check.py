"""Whether Rust and PyTorch compute the same on a checkpoint, for tools/compare_speed.py."""

import multiprocessing
import os
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import bench_torch_sharpen
import bench_torch_train
from bench_timing import set_threads
from bench_torch import Workload
from bench_torch_sharpen import SHARPEN
from bench_torch_train import TRAINING

CHECK_STEPS, CHECK_GUIDANCE = 5, 5.0
# The U-Net's forward and backward pass of one sample, which a step's planned cost refers to.
FORWARD, WITH_BACKWARD = "unet_forward_b1", "unet_forward_backward_lora_b1"


def facts(program, model, latent, threads, names, given=None):
    """What there is to say of a checkpoint, and how far Rust's outputs are from PyTorch's.

    Where `names` are steps of sharpening, the same of their gradients; `given` is then what
    `ds-bench sharpen-step` wrote.

    Found out in a process of its own, so that its memory is free again and counts for nobody's peak.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=set_threads, initargs=(threads,)) as alone:
        return alone.submit(_facts, program, model, latent, names, given).result()


def _facts(program, model, latent, names, given):
    workload = Workload(model, latent)
    counted = {FORWARD, *names} | ({WITH_BACKWARD} if SHARPEN.keys() & set(names) else set())
    peft = bench_torch_train.versions() if (TRAINING | SHARPEN).keys() & set(names) else {}
    return {
        "name": Path(model).resolve().name,
        "latent": workload.latent,
        "factor": workload.factor,
        "tokens": workload.tokens,
        "parameters": sum(p.numel() for p in workload.unet.parameters()),
        "scheduler": type(workload.pipe.scheduler).__name__,
        "versions": workload.versions | peft,
        "flop": {name: workload.flop(name) for name in counted},
        "errors": parity(program, model, workload),
        "steps": bench_torch_sharpen.agreement(workload, given, names),
    }


def write_steps(program, model, latent, threads, folder):
    """Has Rust write the steps of sharpening that both sides are to make."""
    command = [program, "sharpen-step", "--model", model, "--out", str(folder)]
    if latent:
        command += ["--latent", *map(str, latent)]
    subprocess.run(command, check=True, env=os.environ | {"RAYON_NUM_THREADS": str(threads)})


def relative_error(ours, theirs):
    """|a - b| / |b| over the whole tensor."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def parity(program, model, workload):
    """Relative errors of Rust's outputs on inputs that both sides get."""
    given = inputs(workload)
    ours, theirs = outputs(program, model, given), expected(workload, given)
    return {name: relative_error(ours[name], tensor) for name, tensor in theirs.items()}


def inputs(workload, batch=2):
    """What `ds-bench parity` takes (docs/parity.md), on the CPU."""
    import torch

    ids = [row.cpu().repeat(batch, 1) for row in workload.ids]
    ids[0][1, 1], ids[1][1, 1] = ids[0][1, 2], ids[1][1, 2]
    h, w = (side * workload.factor for side in workload.latent)
    given = {
        "latents": workload.latents(batch).float(),
        "timesteps": torch.tensor([801, 117]),
        "time_ids": workload.time_ids(batch),
        "image": torch.rand(batch, 3, h, w, generator=workload.generator) * 2 - 1,
        "input_ids": ids[0],
        "input_ids_2": ids[1],
    }
    return {name: tensor.cpu().contiguous() for name, tensor in given.items()}


def outputs(program, model, given, *flags):
    """What `ds-bench parity` makes of it."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        file, out = f"{folder}/inputs.safetensors", f"{folder}/outputs.safetensors"
        save_file(given, file)
        subprocess.run(
            [program, "parity", "--model", model, "--inputs", file, "--out", out,
             "--steps", str(CHECK_STEPS), "--guidance", str(CHECK_GUIDANCE), *flags],
            check=True,
        )
        return load_file(out)


def expected(workload, given):
    """What PyTorch makes of it."""
    torch, states = workload.torch, []
    given = {name: tensor.to(workload.device) for name, tensor in given.items()}
    x = given["latents"].to(workload.dtype)
    with torch.inference_mode():
        context, pooled = workload.encode([given["input_ids"], given["input_ids_2"]])
        cond = {"text_embeds": pooled, "time_ids": given["time_ids"]}
        noise = workload.unet(x, given["timesteps"], encoder_hidden_states=context, added_cond_kwargs=cond).sample
        result = {"hidden_states": context, "pooled": pooled, "noise_pred": noise,
                  "decoded": workload.decoded(given["latents"])}

        def keep(_pipe, _step, _t, tensors):
            states.append(tensors["latents"].clone())
            return tensors

        workload.sample(
            context, pooled, x, CHECK_STEPS, CHECK_GUIDANCE, output_type="latent",
            callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["latents"],
        )
        if len(states) > CHECK_STEPS:  # Heun: a call for each of two evaluations, one in the last step
            states = states[1::2] + states[-1:]
        result["trajectory"] = torch.stack(states)
    return {name: tensor.float().cpu() for name, tensor in result.items()}
