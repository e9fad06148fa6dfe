"""Runs the Rust crate and PyTorch/diffusers alternately on the same work and prints their ratios.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 safetensors peft
    python tools/compare_speed.py --model models/tiny --threads 1 --out docs/performance-table.md
    python tools/compare_speed.py --suite train --model models/tiny --model checkpoints/small
    python tools/compare_speed.py --suite sharpen --model models/tiny
    python tools/compare_speed.py --suite ops

The suites are those of tools/bench_torch.py: the parts of an image (model), forward, backward and
optimiser step of the U-Net (train), whole steps of Diffusion-Sharpening (sharpen, which needs a
checkpoint with a scene CLIP), and single operations (ops, which needs no model).

For every piece of work and every round: probe, Rust, probe, PyTorch, probe. The probe tells
whether the machine is steady, by a 1024x1024 f32 matrix product in PyTorch, and estimates the
processor's peak (speed_probe.py). A round whose probes differ by more than --probe-tolerance is
discarded and made again (at most as many times as there are rounds); what was discarded is
reported. Ratios are PyTorch's time over Rust's of the same round: above 1, Rust is faster.
The main figure is processor time, of all threads of the process.

Rust is a fresh process for each measurement, PyTorch one process throughout; in the suites train
and sharpen both are fresh, so that each piece's peak memory is its own.

Before anything is timed on a model, both sides compute the same outputs from the same inputs
(through `ds-bench parity`), and the comparison stops where they differ by more than --tolerance.
In the suite sharpen both also make the same steps (through `ds-bench sharpen-step`), and it stops
where the cosine of their gradients is below --cosine.

docs/performance.md explains the columns. --raw keeps every single measurement as JSON lines.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_timing import set_threads
from bench_torch import SUITES, Workload, chosen
from bench_torch_ops import Operations
from bench_torch_sharpen import SHARPEN, counterpart
from speed_check import facts, write_steps
from speed_probe import probe
from speed_table import ROOT, of_step, setting, summarise, table

LIMITS = {"model": (10, 10.0), "train": (10, 10.0), "sharpen": (3, 10.0), "ops": (300, 1.0)}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suite", choices=SUITES, default="model")
    p.add_argument("--model", action="append", help="folder in the diffusers layout; may be given again")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--runs", type=int, help="runs of a piece on each side, each round; default: 10, suites sharpen: 3, ops: 300")
    p.add_argument("--seconds", type=float, help="soft limit of those runs; default: 10, suite ops: 1")
    p.add_argument("--latent", type=int, nargs=2, metavar=("H", "W"))
    p.add_argument("--only", help="comma-separated names")
    p.add_argument("--bin", help="a built ds-bench; default: built now with cargo build --release")
    p.add_argument("--tolerance", type=float, default=1e-3, help="largest relative error between the two sides")
    p.add_argument("--cosine", type=float, default=0.9999, help="least cosine of the two sides' gradients in sharpen")
    p.add_argument("--probe-tolerance", type=float, default=0.1)
    p.add_argument("--out", help="Markdown file for the table")
    p.add_argument("--raw", help="JSON-lines file for every measurement")
    args = p.parse_args()
    if args.suite != "ops" and not args.model:
        p.error(f"--suite {args.suite} needs a --model")
    if args.suite == "ops" and (args.model or args.latent):
        p.error("--suite ops takes no --model and no --latent")
    runs, seconds = LIMITS[args.suite]
    args.runs, args.seconds = args.runs or runs, args.seconds or seconds
    try:
        args.names = chosen(args.suite, args.only)
    except KeyError as error:
        p.error(error.args[0])
    return args


def built():
    """Path of a freshly built ds-bench."""
    command = ["cargo", "build", "--release", "--bin", "ds-bench", "--message-format=json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    found = [m["executable"] for m in map(json.loads, lines) if m.get("executable")]
    return found[-1]


def row_of(command, args, model, name):
    """The one JSON row that a measuring command prints for `name`."""
    command = [*command, "--only", name, "--threads", str(args.threads),
               "--runs", str(args.runs), "--seconds", str(args.seconds)]
    if model:
        command += ["--model", model]
    if args.latent:
        command += ["--latent", *map(str, args.latent)]
    # The number of threads is the command's own to set, before its libraries start.
    env = {key: value for key, value in os.environ.items() if key != "RAYON_NUM_THREADS"}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout)


class FreshTorch:
    """PyTorch's side, a new process for each measurement."""

    def __init__(self, args, model, given):
        self.args, self.model, self.given = args, model, given

    def measure(self, name, _runs, _seconds):
        command = [sys.executable, str(Path(__file__).with_name("bench_torch.py"))]
        if name in SHARPEN:
            command += ["--given", self.given]
        return row_of(command, self.args, self.model, name)


def same_keys(suite, name):
    """What of a row has to be the same on both sides. How many forwards a step of sharpening takes is
    for each side to choose: the gradients are the same."""
    if suite == "ops":
        return ("threads",)
    return ("threads", "latent", "tokens") if name in SHARPEN else ("threads", "latent", "tokens", "f")


def one_round(program, args, model, source, name):
    """Probe, Rust, probe, PyTorch, probe."""
    import torch

    probes = [probe(torch)]
    ours = row_of([program, "speed", "--json"], args, model, counterpart(name))
    probes.append(probe(torch))
    theirs = source.measure(name, args.runs, args.seconds)
    probes.append(probe(torch))
    for key in same_keys(args.suite, name):
        if ours[key] != theirs[key]:
            sys.exit(f"{name}: the two sides do different work: {key} is {ours[key]} in Rust, {theirs[key]} in PyTorch")
    # Processor time: a neighbour that takes the core away shows less in it than on the clock.
    speeds = [p["gflops_cpu"] for p in probes]
    return {"name": name, "model": model and Path(model).resolve().name, "rust": ours, "torch": theirs,
            "probes": probes, "spread": max(speeds) / min(speeds) - 1}


def rounds_of(program, args, model, source, name, raw):
    """Enough steady rounds, and those discarded for an unsteady machine."""
    kept, discarded = [], []
    while len(kept) < args.rounds and len(kept) + len(discarded) < 2 * args.rounds:
        row = one_round(program, args, model, source, name)
        row["kept"] = row["spread"] <= args.probe_tolerance
        (kept if row["kept"] else discarded).append(row)
        if raw:
            print(json.dumps(row), file=raw, flush=True)
        key = "cpu_seconds_median" if row["rust"]["cpu_seconds_median"] else "seconds_median"
        ratio = row["torch"][key] / row["rust"][key]
        note = "" if row["kept"] else f" (probes differ by {row['spread']:.0%}: discarded)"
        print(f"{name} {len(kept)}/{args.rounds}: torch/rust {ratio:.3f}{note}", file=sys.stderr, flush=True)
    return kept, discarded


def checked(program, args, model, given):
    """The model's facts, once both sides are known to compute the same on it. `given` is a folder for
    the steps of sharpening that both make."""
    if args.suite == "sharpen":
        write_steps(program, model, args.latent, args.threads, given)
    known = facts(program, model, args.latent, args.threads, args.names, given)
    for name, error in known["errors"].items():
        print(f"{known['name']}: {name}: relative error {error:.2e}", file=sys.stderr)
    if not all(error <= args.tolerance for error in known["errors"].values()):
        sys.exit(f"the two sides do not agree within {args.tolerance:g}: their times mean nothing")
    for name, step in known["steps"].items():
        if "cosine" not in step:
            continue
        print(f"{known['name']}: {name}: {of_step(step)}", file=sys.stderr)
        if not step["cosine"] >= args.cosine:
            sys.exit(f"{name}: the two sides learn different things: their times mean nothing")
    return known


def source_of(args, model, given):
    """PyTorch's side."""
    if args.suite == "ops":
        return Operations()
    if args.suite == "model":
        return Workload(model, args.latent)
    return FreshTorch(args, model, given)


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args, folder):
    """Measures and prints; `folder` is for files on the way."""
    load = os.getloadavg()[0]
    program = str(Path(args.bin).resolve()) if args.bin else built()
    set_threads(args.threads)
    given = {model: str(folder / str(i)) for i, model in enumerate(args.model or [])}
    models = [checked(program, args, model, given[model]) for model in given]
    if load > 0.3:
        print(f"the machine is not idle (1-minute load {load:.2f}): only ratios of processor time mean much",
              file=sys.stderr)
    summaries, probes = [], []
    raw = open(args.raw, "w") if args.raw else None
    for model, known in zip(given or [None], models or [{"flop": {}, "steps": {}}]):
        source = None  # lets go of the model before
        source = source_of(args, model, given.get(model))
        for name in args.names:
            kept, discarded = rounds_of(program, args, model, source, name, raw)
            summary = summarise(kept or discarded, known["flop"].get(name))
            planned = known["steps"].get(name, {}).get("planned")
            summaries.append(summary | {
                "steady": bool(kept), "discarded": len(discarded) if kept else 0,
                "planned": planned, "flop": known["flop"],
            })
            probes += [p for r in kept or discarded for p in r["probes"]]
    versions = models[0]["versions"] if models else source.versions
    lines = [*setting(program, args, models, versions, probes, load), "", *table(args.suite, summaries)]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.out:
        Path(args.out).write_text(f"<!-- Written by tools/compare_speed.py --suite {args.suite}. -->\n\n" + text)


if __name__ == "__main__":
    main()
