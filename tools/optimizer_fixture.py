"""Five steps of torch.optim.AdamW on given gradients, for `tests/optimizer.rs`.

    pip install torch==2.15.0 safetensors==0.8.0 numpy
    python tools/optimizer_fixture.py --out tests/fixtures/optimizer.safetensors

Three parameters NAME; tensors, all f32 except where noted:
  start/NAME             before the first step
  grad/STEP/NAME         the given gradients, STEP from 1
  RUN/hyper              f64 [6]: lr, beta1, beta2, eps, weight_decay, max_norm (0: not clipped)
  RUN/norm               f64 [5]: what clip_grad_norm_ returned (clipped runs only)
  RUN/STEP/NAME          after each step
  RUN/m/NAME, RUN/v/NAME the moments (exp_avg, exp_avg_sq) after the last
Runs: plain; decay (weight decay 0.1); clip (both, clipped to the norm 3, which some of
the gradients exceed); missing (norm.bias has no gradient in steps 1 and 4); beta (beta1 = 0.3:
torch's lerp takes its other branch).
"""
import argparse

import torch
from safetensors.torch import save_file

STEPS = 5
SHAPES = {"conv.weight": (4, 3, 3, 3), "linear.weight": (7, 5), "norm.bias": (11,)}
# Of the gradients, by parameter and step: norm.bias has some near eps, and zeros.
SCALES = {"conv.weight": [0.3, 1, 0.01, 1, 0.1], "linear.weight": [1, 1e-3, 0.1, 2, 0.03],
          "norm.bias": [1e-8, 1e-7, 0, 1e-3, 1]}
HYPER = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, max_norm=0.0)
RUNS = {"plain": {}, "decay": dict(weight_decay=0.1), "clip": dict(weight_decay=0.1, max_norm=3.0),
        "missing": dict(weight_decay=0.1), "beta": dict(beta1=0.3)}
MISSING = {("missing", "norm.bias", 1), ("missing", "norm.bias", 4)}


def run(name, start, grads, out):
    hyper = {**HYPER, **RUNS[name]}
    out[f"{name}/hyper"] = torch.tensor(list(hyper.values()), dtype=torch.float64)
    params = {n: torch.nn.Parameter(p.clone()) for n, p in start.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=hyper["lr"], betas=(hyper["beta1"], hyper["beta2"]),
                                  eps=hyper["eps"], weight_decay=hyper["weight_decay"])
    norms = []
    for step in range(1, STEPS + 1):
        for n, p in params.items():
            p.grad = None if (name, n, step) in MISSING else grads[step, n].clone()
        if hyper["max_norm"]:
            norms.append(torch.nn.utils.clip_grad_norm_(params.values(), hyper["max_norm"]).double())
        optimizer.step()
        for n, p in params.items():
            out[f"{name}/{step}/{n}"] = p.detach().clone()
    for n, p in params.items():
        out[f"{name}/m/{n}"] = optimizer.state[p]["exp_avg"]
        out[f"{name}/v/{n}"] = optimizer.state[p]["exp_avg_sq"]
    if norms:
        out[f"{name}/norm"] = torch.stack(norms)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="tests/fixtures/optimizer.safetensors")
    path = parser.parse_args().out
    torch.manual_seed(7)
    start = {n: torch.randn(shape) for n, shape in SHAPES.items()}
    grads = {(step, n): torch.randn(shape) * SCALES[n][step - 1]
             for step in range(1, STEPS + 1) for n, shape in SHAPES.items()}
    out = {f"start/{n}": p for n, p in start.items()}
    out |= {f"grad/{step}/{n}": g for (step, n), g in grads.items()}
    for name in RUNS:
        run(name, start, grads, out)
    save_file(out, path)


if __name__ == "__main__":
    main()
