"""Writes tests/fixtures/schedulers.json: what diffusers' schedulers do, step by step.

Run with an interpreter that has torch and diffusers (made with diffusers 0.42.1):
    python tools/scheduler_fixtures.py tests/fixtures/schedulers.json

The model is the closed form eps = 0.1*x + 0.01*t/1000 on the scaled network
input. diffusers keeps alphas_cumprod in f32, whose rounding is about 3e-5 of the
smallest sigmas; it is replaced by its f64 value here, so that the fixture pins the
rules and not that rounding.
"""

import json
import sys

import numpy as np
import torch
import diffusers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

SDXL = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="epsilon",
    steps_offset=1,
    timestep_spacing="leading",
)
SHAPE = (2, 4, 1, 3)


def abar64(config):
    n, b0, b1 = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    kind = config["beta_schedule"]
    if kind == "scaled_linear":
        betas = np.linspace(b0**0.5, b1**0.5, n) ** 2
    elif kind == "linear":
        betas = np.linspace(b0, b1, n)
    else:
        f = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        i = np.arange(n)
        betas = np.minimum(1 - f((i + 1) / n) / f(i / n), 0.999)
    abar = np.cumprod(1 - betas)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(abar)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        abar = root**2
    return abar


def numbers(tensor):
    return [float(f"{v:.8g}") for v in tensor.double().flatten().tolist()]


def case(name, cls, steps, eta=None, **changes):
    config = {**SDXL, **changes}
    if cls is DDIMScheduler:
        config = {"clip_sample": False, "set_alpha_to_one": False, **config}
    scheduler = cls(**config)
    abar = abar64(config)
    if config.get("rescale_betas_zero_snr") and cls is not DDIMScheduler:
        abar[-1] = 2.0**-24
    assert np.allclose(abar, scheduler.alphas_cumprod.double().numpy(), rtol=1e-3, atol=1e-9)
    scheduler.alphas_cumprod = torch.from_numpy(abar)
    if cls is DDIMScheduler and not config["set_alpha_to_one"]:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    unit = torch.randn(SHAPE, generator=generator, dtype=torch.float32)
    x = unit * float(scheduler.init_noise_sigma)
    noises, latents, x0s = [], [], []
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        out = (0.1 * model_input + 0.01 * float(t) / 1000).float()
        kwargs = {}
        if eta is not None:
            kwargs["eta"] = eta
            if eta > 0:
                z = torch.randn(SHAPE, generator=generator, dtype=torch.float32)
                noises.append(numbers(z))
                kwargs["variance_noise"] = z
        result = scheduler.step(out, t, x, **kwargs)
        x = result.prev_sample.float()
        latents.append(numbers(x))
        x0 = getattr(result, "pred_original_sample", None)
        if x0 is not None:
            x0s.append(numbers(x0))
    stored = {"_class_name": cls.__name__, **config}
    return {
        "name": name,
        "config": stored,
        "steps": steps,
        "eta": eta or 0.0,
        "timesteps": [float(t) for t in scheduler.timesteps],
        "sigmas": [float(s) for s in getattr(scheduler, "sigmas", [])],
        "init_noise_sigma": float(scheduler.init_noise_sigma),
        "initial": numbers(unit),
        "noise": noises,
        "latents": latents,
        "x0": x0s,
    }


CASES = [
    ("ddim leading", DDIMScheduler, 5, dict(eta=0.0)),
    ("ddim eta 1", DDIMScheduler, 4, dict(eta=1.0)),
    ("ddim eta 0.5 trailing", DDIMScheduler, 3, dict(eta=0.5, timestep_spacing="trailing")),
    ("ddim linspace linear betas, alpha to one", DDIMScheduler, 4,
     dict(eta=0.0, timestep_spacing="linspace", beta_schedule="linear", set_alpha_to_one=True)),
    ("ddim v zero snr trailing", DDIMScheduler, 4,
     dict(eta=0.0, timestep_spacing="trailing", prediction_type="v_prediction",
          rescale_betas_zero_snr=True)),
    ("ddim sample squaredcos", DDIMScheduler, 3,
     dict(eta=0.0, prediction_type="sample", beta_schedule="squaredcos_cap_v2")),
    ("euler leading", EulerDiscreteScheduler, 5, {}),
    ("euler trailing v", EulerDiscreteScheduler, 4,
     dict(timestep_spacing="trailing", prediction_type="v_prediction")),
    ("euler linspace", EulerDiscreteScheduler, 4, dict(timestep_spacing="linspace")),
    ("euler karras", EulerDiscreteScheduler, 4, dict(use_karras_sigmas=True)),
    ("euler zero snr", EulerDiscreteScheduler, 3,
     dict(timestep_spacing="trailing", prediction_type="v_prediction",
          rescale_betas_zero_snr=True)),
    ("heun leading", HeunDiscreteScheduler, 4, {}),
    ("heun karras linspace", HeunDiscreteScheduler, 4,
     dict(use_karras_sigmas=True, timestep_spacing="linspace")),
    ("heun trailing v", HeunDiscreteScheduler, 3,
     dict(timestep_spacing="trailing", prediction_type="v_prediction")),
    ("dpm leading", DPMSolverMultistepScheduler, 5, {}),
    ("dpm trailing v", DPMSolverMultistepScheduler, 4,
     dict(timestep_spacing="trailing", prediction_type="v_prediction")),
    ("dpm linspace 16", DPMSolverMultistepScheduler, 16, dict(timestep_spacing="linspace")),
    ("dpm karras", DPMSolverMultistepScheduler, 6, dict(use_karras_sigmas=True)),
]


def grids():
    """Timesteps alone, for step counts with awkward rounding."""
    out = []
    for cls in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        for spacing in ("leading", "trailing", "linspace"):
            for steps in (1, 3, 7, 16, 30):
                config = {**SDXL, "timestep_spacing": spacing}
                scheduler = cls(**config)
                scheduler.set_timesteps(steps)
                out.append({
                    "class": cls.__name__, "spacing": spacing, "steps": steps,
                    "timesteps": [float(t) for t in scheduler.timesteps],
                })
    return out


def main():
    cases = [case(name, cls, steps, **kw) for name, cls, steps, kw in CASES]
    data = {"diffusers": diffusers.__version__, "shape": SHAPE, "cases": cases, "grids": grids()}
    with open(sys.argv[1], "w") as file:
        json.dump(data, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
