"""Compares every component of a full-size SDXL, with random weights, with diffusers.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 safetensors==0.8.0
    cargo build --release --bin ds-bench
    python tools/parity_full_size.py --dir runs/full-size

In --dir, which takes about 7 GB, it

1. writes the checkpoint `sdxl` of random_checkpoint.py (bf16), where it is not there already;
2. draws inputs: latents of 64 x 64 (512 px), 77 token ids for each tower, one image;
3. lets diffusers and transformers compute every output in f32 from those weights, one component
   in memory at a time;
4. lets `ds-bench parity` compute the same, as a child process;
5. writes parity.json and parity.md: of each output the relative error |a - b| / |b| over the whole
   tensor and the largest difference, and of each piece of work seconds and the most memory
   (VmHWM) of either process.

An error beyond --bar ends it with exit status 1. The U-Net is 10.3 GB in f32: that much is needed
for step 3, and for step 4 with --dtype bf16 the 7 GB of weights, up to DS_PACKED_MIB of packed
ones, and activations. What diffusers made is kept and used again with --keep-reference.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TOOLS = Path(__file__).parent
OUTPUTS = "hidden_states", "pooled", "noise_pred", "decoded", "encoded_mean"
LATENT, TOKENS, VOCABULARY, END = 64, 77, 49408, 49407
GIB = 2**30


def inputs(path, seed):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    pixels = 8 * LATENT

    def prompt(words):
        ids = torch.randint(0, END - 1, (1, TOKENS))
        ids[0, 0], ids[0, words + 1:] = END - 1, END
        return ids

    save_file({
        "latents": torch.randn(1, 4, LATENT, LATENT),
        "timesteps": torch.tensor([601]),
        "input_ids": prompt(9),
        "input_ids_2": prompt(9),
        "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=torch.float32),
        "image": torch.rand(1, 3, pixels, pixels) * 2 - 1,
    }, path)


class Stages:
    """Seconds and peak memory of each piece of work, as `ds-bench parity` prints them."""

    def __init__(self):
        self.rows = []

    def run(self, stage, work):
        Path("/proc/self/clear_refs").write_text("5")
        start, cpu = time.perf_counter(), time.process_time()
        made = work()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        self.rows.append({
            "stage": stage, "seconds": seconds, "cpu_seconds": cpu, "peak_rss_bytes": int(peak.split()[1]) * 1024,
        })
        return made


def reference(model, x, stages, wanted):
    """diffusers' outputs; one component at a time."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    def opened(cls, part):
        return stages.run(f"load {part}", lambda: cls.from_pretrained(model / part, dtype=torch.float32).eval())

    def tower(cls, part, ids):
        network = opened(cls, part)
        return stages.run(part, lambda: network(ids, output_hidden_states=True))

    y = {}
    one = tower(CLIPTextModel, "text_encoder", x["input_ids"])
    gc.collect()
    two = tower(CLIPTextModelWithProjection, "text_encoder_2", x["input_ids_2"])
    gc.collect()
    y["hidden_states"] = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
    y["pooled"] = two.text_embeds
    if "noise_pred" in wanted:
        unet = opened(UNet2DConditionModel, "unet")
        added = {"text_embeds": y["pooled"], "time_ids": x["time_ids"]}
        y["noise_pred"] = stages.run("noise_pred", lambda: unet(
            x["latents"], x["timesteps"], encoder_hidden_states=y["hidden_states"], added_cond_kwargs=added,
        ).sample)
        del unet
        gc.collect()
    if {"decoded", "encoded_mean"} & wanted:
        vae = opened(AutoencoderKL, "vae")
        y["decoded"] = stages.run("decoded", lambda: vae.decode(x["latents"] / vae.config.scaling_factor).sample)
        y["encoded_mean"] = stages.run("encoded_mean", lambda: vae.encode(x["image"]).latent_dist.mean)
    return {name: tensor.contiguous() for name, tensor in y.items() if name in wanted}


def ours(args, out):
    command = [args.bin.resolve(), "parity", "--model", args.dir / "sdxl", "--inputs", args.dir / "inputs.safetensors",
               "--out", out, "--device", args.device, "--dtype", args.dtype, "--steps", "0",
               "--only", ",".join(args.only)]
    run = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def compare(a, b):
    difference = a.double() - b.double()
    return {
        "relative": float(difference.norm() / b.double().norm()),
        "largest": float(difference.abs().max()),
        "largest_value": float(b.double().abs().max()),
    }


def in_words(report):
    lines = [f"`ds-bench parity --device {report['device']} --dtype {report['dtype']}`, {report['threads']} threads", "",
             "| output | relative error | largest difference | largest value |", "| --- | --: | --: | --: |"]
    for name, row in report["outputs"].items():
        lines.append(f"| `{name}` | {row['relative']:.1e} | {row['largest']:.1e} | {row['largest_value']:.2f} |")
    lines += ["", "| piece of work | seconds | processor seconds | most memory, GiB |", "| --- | --: | --: | --: |"]
    for who in ("ours", "diffusers"):
        for row in report[who]:
            peak = row["peak_rss_bytes"]
            peak = f"{peak / GIB:.2f}" if peak else "–"
            lines.append(f"| {who}: {row['stage']} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {peak} |")
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dir", required=True, type=Path)
    p.add_argument("--bin", default=Path("target/release/ds-bench"), type=Path)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="bf16", help="of the stored weights of U-Net and towers")
    p.add_argument("--only", default=",".join(OUTPUTS), help="outputs, separated by commas")
    p.add_argument("--bar", type=float, default=1e-4, help="largest relative error")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--keep-reference", action="store_true")
    args = p.parse_args()
    args.only = args.only.split(",")
    if strangers := set(args.only) - set(OUTPUTS):
        p.error(f"--only: unknown {', '.join(sorted(strangers))}; known are {', '.join(OUTPUTS)}")

    import torch
    from safetensors.torch import load_file, save_file

    model, theirs, facts = args.dir / "sdxl", args.dir / "reference.safetensors", args.dir / "reference.json"
    if not (model / "model_index.json").is_file():
        make = [sys.executable, TOOLS / "random_checkpoint.py", "--shape", "sdxl", "--dtype", "bf16", "--out", model]
        subprocess.run(make, check=True)
    if not (args.keep_reference and facts.is_file()):
        inputs(args.dir / "inputs.safetensors", args.seed)
        stages = Stages()
        with torch.no_grad():
            y = reference(model, load_file(args.dir / "inputs.safetensors"), stages, set(args.only))
        save_file(y, theirs)
        facts.write_text(json.dumps(stages.rows))
        del y
    stages = ours(args, args.dir / "ours.safetensors")
    a, b = load_file(args.dir / "ours.safetensors"), load_file(theirs)
    report = {
        "device": args.device, "dtype": args.dtype, "threads": os.cpu_count(),
        "outputs": {name: compare(a[name], b[name]) for name in args.only},
        "ours": stages, "diffusers": json.loads(facts.read_text()),
    }
    (args.dir / "parity.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.dir / "parity.md").write_text(in_words(report))
    print(in_words(report))
    beyond = [name for name, row in report["outputs"].items() if not row["relative"] <= args.bar]
    if beyond:
        sys.exit(f"beyond {args.bar:g}: {', '.join(beyond)}")


if __name__ == "__main__":
    main()
