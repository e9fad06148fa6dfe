"""The Markdown that tools/compare_speed.py writes: summaries of rounds, tables, and what was measured."""

import datetime
import os
import platform
import statistics
import subprocess
from pathlib import Path

from bench_torch_ops import OPS, TRAIN
from bench_torch_sharpen import SHARPEN
from speed_check import FORWARD, WITH_BACKWARD

ROOT = Path(__file__).resolve().parent.parent


def summarise(rows, flop):
    """Medians over rounds, paired ratios with their range, fractions of the peak; by side where both have one."""

    def median(side, key):
        each = [r[side].get(key) for r in rows]
        return None if None in each else statistics.median(each)

    def ratio(key):
        each = [r["torch"][key] / r["rust"][key] for r in rows if r["rust"][key] and r["torch"][key]]
        return (statistics.median(each), min(each), max(each)) if each else None

    def per_probe(side, of, probe_key):
        """Median over rounds of `of`(processor seconds, this round's probe in GFLOP/s)."""
        each = [
            of(r[side]["cpu_seconds_median"], statistics.median(p[probe_key] for p in r["probes"]))
            for r in rows if r[side]["cpu_seconds_median"]
        ]
        return statistics.median(each) if each else None

    def sides(value):
        return {side: value(side) for side in ("rust", "torch")}

    flop, moved = rows[0]["torch"].get("flop", flop), rows[0]["torch"].get("bytes")
    return {
        "name": rows[0]["name"],
        "model": rows[0]["model"],
        "seconds_cpu": sides(lambda side: median(side, "cpu_seconds_median")),
        "memory": sides(lambda side: median(side, "peak_rss_bytes")),
        "ratio": ratio("seconds_median"),
        "ratio_cpu": ratio("cpu_seconds_median"),
        "fraction": sides(lambda side: flop and per_probe(side, lambda s, p: flop / s / 1e9 / p, "peak_gflops_cpu")),
        "bandwidth": sides(lambda side: moved and per_probe(side, lambda s, _: moved / s, "gflops_cpu")),
        # Work in units of the probe, which is comparable between rounds of different speed.
        "effort": sides(lambda side: per_probe(side, lambda s, p: s * p, "gflops_cpu")),
        "forwards": sides(lambda side: rows[0][side]["f"]),
        "rounds": len(rows),
    }


def over_forward(summaries):
    """Adds what each training piece costs in forwards of its own model, batch and side."""
    forwards = {(s["model"], s["name"]): s for s in summaries if s["name"].startswith("unet_forward_b")}
    for s in summaries:
        forward = forwards.get((s["model"], "unet_forward_" + s["name"].rsplit("_", 1)[-1]))
        s["over_forward"] = {
            side: effort / forward["effort"][side] if effort and forward and forward["effort"][side] else None
            for side, effort in s["effort"].items()
        }


BATCH = 12


def in_forwards(summaries):
    """Adds what each step of sharpening costs in U-Net forwards of one sample (measured in batches of
    12, same side), and how much more that is than planned.

    Planned are the forwards without and with gradients, for each backward pass of a sample what it
    takes beyond its forward by their floating-point operations, and the decodes as measured. What
    scoring, the optimiser and making the policy's networks take is not in it.
    """
    pieces = {(s["model"], s["name"]): s["effort"] for s in summaries}
    for s in summaries:
        forward = pieces.get((s["model"], f"unet_forward_b{BATCH}"))
        decode = pieces.get((s["model"], f"vae_decode_b{BATCH}"))
        step = s["name"] in SHARPEN and forward
        s["in_forwards"] = {
            side: effort / (forward[side] / BATCH) if step and effort and forward[side] else None
            for side, effort in s["effort"].items()
        }
        s["plan"] = s["over_plan"] = None
        if step and decode and s["in_forwards"]["rust"] and decode["rust"]:
            plan, flop = s["planned"], s["flop"]
            backward = flop[WITH_BACKWARD] / flop[FORWARD] - 1
            s["plan"] = (plan["forwards"] + plan["backward"] * backward
                         + plan["images"] * decode["rust"] / forward["rust"])
            s["over_plan"] = s["in_forwards"]["rust"] / s["plan"]


# ---------------------------------------------------------------- tables

def cell(form):
    """Formats a value, or a dash where there is none."""
    return lambda value: "–" if value is None else form(value)


def both(title, value, form):
    """A column for each side."""
    show = cell(form)
    return [(f"{title}, {label}", lambda s, side=side: show(value(s)[side]))
            for label, side in (("Rust", "rust"), ("PyTorch", "torch"))]


def reached(s):
    """Share of the peak, or GB/s, of each side, as text."""
    shown = {}
    for side in ("rust", "torch"):
        share, rate = s["fraction"][side], s["bandwidth"][side]
        shown[side] = f"{share:.1%}" if share else f"{rate / 1e9:.2f} GB/s" if rate else None
    return shown


def columns(suite):
    """(title, text of a summary) of every column."""
    span = cell(lambda r: f"{r[0]:.2f} ({r[1]:.2f}–{r[2]:.2f})")
    bold = cell(lambda r: f"**{r[0]:.2f}** ({r[1]:.2f}–{r[2]:.2f})")
    parts = [] if suite == "ops" else [("model", lambda s: s["model"])]
    parts += [("operation" if suite == "ops" else "work", lambda s: s["name"] + ("" if s["steady"] else " †"))]
    parts += both("ms of processor time", lambda s: s["seconds_cpu"], lambda v: f"{1e3 * v:.2f}")
    parts += [
        ("processor time PyTorch / Rust", lambda s: bold(s["ratio_cpu"])),
        ("time PyTorch / Rust", lambda s: span(s["ratio"])),
    ]
    if suite != "sharpen":
        parts += both("of peak (or GB/s)" if suite == "ops" else "of peak", reached, str)
    if suite == "train":
        parts += both("× forward", lambda s: s["over_forward"], lambda v: f"{v:.2f}")
    if suite == "sharpen":
        parts += both("F", lambda s: s["forwards"], str)
        parts += both("in forwards", lambda s: s["in_forwards"], lambda v: f"{v:.1f}")
        parts += [("planned", lambda s: cell(lambda v: f"{v:.1f}")(s["plan"])),
                  ("over plan", lambda s: cell(lambda v: f"{v:.2f}")(s["over_plan"]))]
    if suite in ("train", "sharpen"):
        parts += both("peak memory, MiB", lambda s: s["memory"], lambda v: f"{v / 2**20:,.0f}")
    parts += [("rounds", lambda s: f"{s['rounds']}" + (f" ({s['discarded']} discarded)" if s["discarded"] else ""))]
    return parts


def table(suite, summaries):
    over_forward(summaries)
    in_forwards(summaries)
    parts = columns(suite)
    words = sum(title in ("model", "work", "operation") for title, _ in parts)
    lines = [f"| {' | '.join(title for title, _ in parts)} |", "|" + "---|" * words + "--:|" * (len(parts) - words)]
    lines += [f"| {' | '.join(text(s) for _, text in parts)} |" for s in summaries]
    if suite == "ops":
        lines += ["", *digest(summaries)]
    if not all(s["steady"] for s in summaries):
        lines += ["", "† No round was steady enough, so all are counted: read these numbers with care."]
    return lines


def digest(summaries):
    """Geometric mean and worst of the ratios, of the forwards and of the passes with gradients."""
    lines = []
    for label, ending in (("Forward", ""), ("Forward and backward", TRAIN)):
        names = [name + ending for name in OPS]
        ratios = {s["name"]: s["ratio_cpu"][0] for s in summaries if s["name"] in names and s["ratio_cpu"]}
        if ratios:
            worst = min(ratios, key=ratios.get)
            which = "" if len(ratios) == len(names) else f"of {len(names)} "
            lines.append(
                f"- {label}, {len(ratios)} {which}operations: geometric mean of the processor-time ratios "
                f"**{statistics.geometric_mean(ratios.values()):.2f}**, "
                f"worst **{ratios[worst]:.2f}** (`{worst}`)."
            )
    return lines


# ---------------------------------------------------------------- what was measured

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


def of_model(facts):
    """A checkpoint, as Markdown list items."""
    (h, w), factor = facts["latent"], facts["factor"]
    check = ", ".join(f"{name} {error:.1e}" for name, error in facts["errors"].items())
    return [
        f"- Model `{facts['name']}`: latents {h}x{w} ({w * factor}x{h * factor} px), {facts['tokens']} tokens, "
        f"{facts['parameters']:,} U-Net parameters, {facts['flop']['unet_forward_b1'] / 1e9:.4g} GFLOP a U-Net "
        f"forward of one sample; scheduler {facts['scheduler']}. Relative error of Rust's outputs against "
        f"PyTorch's on the same inputs: {check}.",
        *(f"- `{name}` against Rust's step: {of_step(step)}." for name, step in facts["steps"].items()
          if "cosine" in step),
    ]


def of_step(step):
    """How a step of sharpening agrees with Rust's, in words."""
    return (f"cosine of the gradients 1 − {1 - step['cosine']:.1e}, ratio of their norms {step['norm_ratio']:.6f}; "
            f"the same choice in {step['same_choice']} of {step['groups']} groups, scores within "
            f"{step['score_error']:.1e}, clean latents within {step['clean_error']:.1e}")


def setting(program, args, models, versions, probes, load):
    """What was measured, where and with what, as Markdown list items."""

    def rates(key):
        values = [p[key] for p in probes]
        return f"{statistics.median(values):.1f} GFLOP/s ({min(values):.1f}–{max(values):.1f})"

    commit = output_of("git", "rev-parse", "--short", "HEAD")
    if commit and output_of("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    flags = os.environ.get("RUSTFLAGS")
    compiler = output_of("rustc", "--version") + (f", RUSTFLAGS {flags}" if flags else "")
    threads = f"{args.threads} thread{'s' if args.threads > 1 else ''}"
    peak_of = statistics.mode(p["peak_of"] for p in probes)
    return [
        *(line for facts in models for line in of_model(facts)),
        f"- {datetime.date.today().isoformat()}, {cpu_model()}, {os.cpu_count()} processors; "
        f"{threads} on each side; 1-minute load {load:.2f} before the start.",
        f"- Rust: {output_of(program, '--version')} {f'({commit}) ' if commit else ''}"
        f"with candle {locked('candle-core')}, {compiler}.",
        f"- PyTorch: {', '.join(f'{name} {version}' for name, version in versions.items())}, "
        f"Python {platform.python_version()}, eager mode.",
        f"- f32 1024x1024 matrix product in PyTorch, {threads}, per processor second: {rates('gflops_cpu')}. "
        f"Peak: the fastest short burst of several products and a convolution there, mostly the {peak_of}: "
        f"{rates('peak_gflops_cpu')}, a lower bound of what the processor can do.",
        f"- Each round: median of at most {args.runs} run{'s' if args.runs > 1 else ''} of a piece on each side, "
        f"within {args.seconds:g} s. The table gives medians over rounds, and the range of the paired ratios.",
    ]
