"""Runs the Rust crate and PyTorch/diffusers alternately on one checkpoint and prints their ratios.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 safetensors
    python tools/compare_speed.py --model models/tiny --threads 1 --out docs/performance-table.md

For every piece of work and every round: probe, Rust, probe, PyTorch, probe. The probe is a
1024x1024 f32 matrix product in PyTorch: the machine's peak at that moment. A round whose probes
differ by more than --probe-tolerance is discarded and made again (at most as many times as
there are rounds); what was discarded is reported. Ratios are PyTorch's time over Rust's of the
same round: above 1, Rust is faster.

Before anything is timed, both sides compute the same outputs from the same inputs (through
`ds-bench parity`), and the comparison stops where they differ by more than --tolerance.

docs/performance.md explains the columns. --raw keeps every single measurement as JSON lines.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_torch import Workload, set_threads

ROOT = Path(__file__).resolve().parent.parent
CHECK_STEPS, CHECK_GUIDANCE = 5, 5.0
PROBE_SIDE, PROBE_SECONDS = 1024, 0.3


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="folder in the diffusers layout")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--runs", type=int, default=10, help="runs of a piece on each side, each round")
    p.add_argument("--seconds", type=float, default=10.0, help="soft limit of those runs")
    p.add_argument("--latent", type=int, nargs=2, metavar=("H", "W"))
    p.add_argument("--only", help="comma-separated names")
    p.add_argument("--bin", help="a built ds-bench; default: built now with cargo build --release")
    p.add_argument("--tolerance", type=float, default=1e-3, help="largest relative error between the two sides")
    p.add_argument("--probe-tolerance", type=float, default=0.1)
    p.add_argument("--out", help="Markdown file for the table")
    p.add_argument("--raw", help="JSON-lines file for every measurement")
    return p.parse_args()


def built():
    """Path of a freshly built ds-bench."""
    command = ["cargo", "build", "--release", "--bin", "ds-bench", "--message-format=json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    found = [m["executable"] for m in map(json.loads, lines) if m.get("executable")]
    return found[-1]


def relative_error(ours, theirs):
    """|a - b| / |b| over the whole tensor."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def parity(program, model, workload):
    """Relative errors of Rust's outputs on inputs that both sides get."""
    from safetensors.torch import load_file, save_file

    torch, batch = workload.torch, 2
    x, timesteps, time_ids = workload.latents(batch), torch.tensor([801, 117]), workload.time_ids(batch)
    ids = [row.repeat(batch, 1) for row in workload.ids]
    ids[0][1, 1], ids[1][1, 1] = ids[0][1, 2], ids[1][1, 2]
    h, w = (side * workload.factor for side in workload.latent)
    image = torch.rand(batch, 3, h, w, generator=workload.generator) * 2 - 1
    states = []
    with torch.inference_mode():
        context, pooled = workload.encode(ids)
        cond = {"text_embeds": pooled, "time_ids": time_ids}
        expected = {
            "hidden_states": context,
            "pooled": pooled,
            "noise_pred": workload.unet(x, timesteps, encoder_hidden_states=context, added_cond_kwargs=cond).sample,
            "decoded": workload.vae.decode(x / workload.vae.config.scaling_factor).sample,
        }

        def keep(_pipe, _step, _t, tensors):
            states.append(tensors["latents"].clone())
            return tensors

        workload.sample(
            context, pooled, x, CHECK_STEPS, CHECK_GUIDANCE, output_type="latent",
            callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["latents"],
        )
        if len(states) > CHECK_STEPS:  # Heun: a call for each of two evaluations, one in the last step
            states = states[1::2] + states[-1:]
        expected["trajectory"] = torch.stack(states)
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = f"{folder}/inputs.safetensors", f"{folder}/outputs.safetensors"
        given = {"latents": x, "timesteps": timesteps, "time_ids": time_ids, "image": image,
                 "input_ids": ids[0], "input_ids_2": ids[1]}
        save_file({name: tensor.contiguous() for name, tensor in given.items()}, inputs)
        subprocess.run(
            [program, "parity", "--model", model, "--inputs", inputs, "--out", outputs,
             "--steps", str(CHECK_STEPS), "--guidance", str(CHECK_GUIDANCE)],
            check=True,
        )
        ours = load_file(outputs)
    return {name: relative_error(ours[name], tensor) for name, tensor in expected.items()}


def probe(torch):
    """GFLOP/s of an f32 matrix product, on the clock and per processor second."""
    a, b = torch.rand(PROBE_SIDE, PROBE_SIDE), torch.rand(PROBE_SIDE, PROBE_SIDE)
    out, work = torch.empty(PROBE_SIDE, PROBE_SIDE), 2 * PROBE_SIDE**3
    torch.mm(a, b, out=out)
    wall, cpu = [], []
    end = time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < end or len(wall) < 3:
        start, start_cpu = time.perf_counter(), time.process_time()
        torch.mm(a, b, out=out)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {"gflops": work / statistics.median(wall) / 1e9, "gflops_cpu": work / statistics.median(cpu) / 1e9}


def unet_flop(workload):
    """Floating-point operations of one U-Net forward of one sample: matrix products, attention and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    run = workload.forward(1)
    with workload.torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def rust(program, args, name):
    command = [program, "speed", "--json", "--model", args.model, "--only", name, "--threads", str(args.threads),
               "--runs", str(args.runs), "--seconds", str(args.seconds)]
    if args.latent:
        command += ["--latent", *map(str, args.latent)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def one_round(program, args, workload, name):
    """Probe, Rust, probe, PyTorch, probe."""
    probes = [probe(workload.torch)]
    ours = rust(program, args, name)
    probes.append(probe(workload.torch))
    theirs = workload.measure(name, args.runs, args.seconds)
    probes.append(probe(workload.torch))
    for key in ("threads", "latent", "tokens", "f"):
        if ours[key] != theirs[key]:
            sys.exit(f"{name}: the two sides do different work: {key} is {ours[key]} in Rust, {theirs[key]} in PyTorch")
    # Processor time: a neighbour that takes the core away shows less in it than on the clock.
    speeds = [p["gflops_cpu"] for p in probes]
    return {"name": name, "rust": ours, "torch": theirs, "probes": probes, "spread": max(speeds) / min(speeds) - 1}


def rounds_of(program, args, workload, name, raw):
    """Enough steady rounds, and how many were discarded for an unsteady machine."""
    kept, discarded = [], []
    while len(kept) < args.rounds and len(kept) + len(discarded) < 2 * args.rounds:
        row = one_round(program, args, workload, name)
        row["kept"] = row["spread"] <= args.probe_tolerance
        (kept if row["kept"] else discarded).append(row)
        if raw:
            print(json.dumps(row), file=raw, flush=True)
        ratio = row["torch"]["seconds_median"] / row["rust"]["seconds_median"]
        note = "" if row["kept"] else f" (probes differ by {row['spread']:.0%}: discarded)"
        print(f"{name} {len(kept)}/{args.rounds}: torch/rust {ratio:.3f}{note}", file=sys.stderr, flush=True)
    return kept, discarded


def summarise(rows, flop):
    """Medians over rounds, paired ratios with their range, fractions of the probe's peak."""

    def median(side, key):
        return statistics.median(r[side][key] for r in rows)

    def ratio(key):
        each = [r["torch"][key] / r["rust"][key] for r in rows if r["rust"][key] and r["torch"][key]]
        return (statistics.median(each), min(each), max(each)) if each else None

    def fraction(side):
        if not rows[0]["name"].startswith("unet_forward"):
            return None
        peaks = [statistics.median(p["gflops"] for p in r["probes"]) for r in rows]
        reached = [r[side]["f"] * flop / r[side]["seconds_median"] / 1e9 for r in rows]
        return statistics.median(a / b for a, b in zip(reached, peaks))

    return {
        "name": rows[0]["name"],
        "rust": median("rust", "seconds_median"),
        "torch": median("torch", "seconds_median"),
        "ratio": ratio("seconds_median"),
        "ratio_cpu": ratio("cpu_seconds_median"),
        "fraction_rust": fraction("rust"),
        "fraction_torch": fraction("torch"),
        "rounds": len(rows),
    }


def table(summaries):
    def span(ratio):
        return "–" if ratio is None else f"**{ratio[0]:.2f}** ({ratio[1]:.2f}–{ratio[2]:.2f})"

    def share(fraction):
        return "–" if fraction is None else f"{fraction:.1%}"

    lines = [
        "| work | Rust, ms | PyTorch, ms | time PyTorch / Rust | processor time PyTorch / Rust "
        "| of peak, Rust | of peak, PyTorch | rounds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for s in summaries:
        rounds = f"{s['rounds']}" + (f" ({s['discarded']} discarded)" if s["discarded"] else "")
        name = s["name"] + ("" if s["steady"] else " †")
        cells = [name, f"{1e3 * s['rust']:.2f}", f"{1e3 * s['torch']:.2f}", span(s["ratio"]), span(s["ratio_cpu"]),
                 share(s["fraction_rust"]), share(s["fraction_torch"]), rounds]
        lines.append(f"| {' | '.join(cells)} |")
    if not all(s["steady"] for s in summaries):
        lines += ["", "† No round was steady enough, so all are counted: read these numbers with care."]
    return lines


def cpu_model():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def output_of(*command):
    """What a command prints, or nothing where it cannot be run."""
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def locked(crate):
    """The version of a crate in Cargo.lock."""
    lines = (ROOT / "Cargo.lock").read_text().splitlines()
    at = lines.index(f'name = "{crate}"')
    return lines[at + 1].split('"')[1]


def setting(program, args, workload, flop, errors, probes, load):
    """What was measured, where and with what, as Markdown list items."""
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    if commit and output_of("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    flags = os.environ.get("RUSTFLAGS")
    compiler = output_of("rustc", "--version") + (f", RUSTFLAGS {flags}" if flags else "")
    peaks = [p["gflops"] for p in probes]
    v = workload.versions
    h, w = workload.latent
    image = f"{w * workload.factor}x{h * workload.factor} px"
    check = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return [
        f"- Model `{Path(args.model).name}`: latents {h}x{w} ({image}), {workload.tokens} tokens, "
        f"{sum(p.numel() for p in workload.unet.parameters()):,} U-Net parameters, "
        f"{flop / 1e9:.4g} GFLOP a U-Net forward of one sample; scheduler {type(workload.pipe.scheduler).__name__}.",
        f"- {datetime.date.today().isoformat()}, {cpu_model()}, {os.cpu_count()} processors; "
        f"{args.threads} thread{'s' if args.threads > 1 else ''} on each side; "
        f"1-minute load {load:.2f} before the start.",
        f"- Rust: {output_of(program, '--version')} {f'({commit}) ' if commit else ''}"
        f"with candle {locked('candle-core')}, {compiler}.",
        f"- PyTorch: torch {v['torch']}, diffusers {v['diffusers']}, transformers {v['transformers']}, "
        f"Python {platform.python_version()}, eager mode.",
        f"- f32 matrix product {PROBE_SIDE}x{PROBE_SIDE} in PyTorch, {args.threads} "
        f"thread{'s' if args.threads > 1 else ''}: {statistics.median(peaks):.1f} GFLOP/s "
        f"({min(peaks):.1f}–{max(peaks):.1f}).",
        f"- Relative error of Rust's outputs against PyTorch's on the same inputs: {check}.",
        f"- Each round: median of at most {args.runs} run{'s' if args.runs > 1 else ''} of a piece on each side, "
        f"within {args.seconds:g} s. The table gives medians over rounds, and the range of the paired ratios.",
    ]


def main():
    args = arguments()
    load = os.getloadavg()[0]
    program = str(Path(args.bin).resolve()) if args.bin else built()
    set_threads(args.threads)
    workload = Workload(args.model, args.latent)
    names = list(workload.pieces())
    only = args.only.split(",") if args.only else names
    if unknown := set(only) - set(names):
        sys.exit(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    errors = parity(program, args.model, workload)
    for name, error in errors.items():
        print(f"{name}: relative error {error:.2e}", file=sys.stderr)
    if not all(error <= args.tolerance for error in errors.values()):
        sys.exit(f"the two sides do not agree within {args.tolerance:g}: their times mean nothing")
    if load > 0.3:
        print(f"the machine is not idle (1-minute load {load:.2f}): only ratios of processor time mean much",
              file=sys.stderr)
    flop = unet_flop(workload)
    summaries, probes = [], []
    raw = open(args.raw, "w") if args.raw else None
    for name in names:
        if name not in only:
            continue
        kept, discarded = rounds_of(program, args, workload, name, raw)
        summary = summarise(kept or discarded, flop)
        summaries.append(summary | {"steady": bool(kept), "discarded": len(discarded) if kept else 0})
        probes += [p for r in kept or discarded for p in r["probes"]]
    lines = [*setting(program, args, workload, flop, errors, probes, load), "", *table(summaries)]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.out:
        Path(args.out).write_text("<!-- Written by tools/compare_speed.py. -->\n\n" + text)


if __name__ == "__main__":
    main()
