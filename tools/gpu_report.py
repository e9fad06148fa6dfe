"""What measurements say, for tools/gpu_check.py: rows against the targets, and Markdown."""

# Floating-point operations of one U-Net forward of one sample of SDXL, attention included.
TFLOP = {"512": 1.589, "1024": 6.761}
BATCHES = {1: "unet_forward_b2", 2: "unet_forward_b4", 8: "unet_forward_b16"}
COMPILED = ("blocks", "whole")
# Of a measured step of sharpening; targets are of one, of n = 3 trajectories of m = 3 states.
GROUPS = 4


class Row:
    """A figure with its targets. `least`: larger is better."""

    def __init__(self, metric, name, value, unit, gate=None, ambitious=None, least=False, note=""):
        self.metric, self.name, self.value, self.unit = metric, name, value, unit
        self.gate, self.ambitious, self.least, self.note = gate, ambitious, least, note

    def met(self):
        """"ambitious", "gate", "no"; None without a value or a target."""
        if self.value is None or self.gate is None:
            return None
        for name, target in (("ambitious", self.ambitious), ("gate", self.gate)):
            if target is not None and (self.value >= target if self.least else self.value <= target):
                return name
        return "no"

    def as_dict(self):
        return vars(self) | {"met": self.met()}


class Measured:
    """The measurements so far, by who made them, image size and name."""

    def __init__(self, results):
        self.all = {}
        for m in results["measurements"]:
            key = m.get("side"), m.get("size"), m["name"], m.get("vae_dtype")
            self.all[key] = m

    def get(self, side, size, name, field="seconds_median", vae="bf16"):
        return self.all.get((side, size, name, vae), {}).get(field)

    def per_forward(self, side, size, name):
        """Seconds of a U-Net forward of one sample."""
        seconds, f = self.get(side, size, name), self.get(side, size, name, "f")
        return seconds / f if seconds and f else None

    def compiled(self, size, name):
        """The faster way through torch.compile."""
        return min((s for side in COMPILED if (s := self.get(side, size, name))), default=None)


def times(factor, value):
    return None if value is None else factor * value


def ratio(a, b):
    return a / b if a and b else None


def rows(results):
    """All rows, in the order of the targets."""
    m = Measured(results)
    peak = m.get("card", None, "gemm_peak", "tflops", None)
    out = [Row("", "bf16 matrix product 8192³", peak, "TFLOP/s"),
           Row("", "copy on the device", m.get("card", None, "copy", "tb_per_s", None), "TB/s")]
    for metric, size, gate, ambitious in (("G1", "1024", 20, 13.0), ("G2", "512", 6, 3.3)):
        for batch, name in BATCHES.items():
            seconds = m.per_forward("ours", size, name)
            targets = (gate, ambitious) if batch == 1 else ()
            out.append(Row(metric, f"ms/NFE, {size}, guided, batch {batch}", times(1e3, seconds), "ms", *targets))
        share = ratio(ratio(TFLOP[size], m.per_forward("ours", size, BATCHES[1])), peak)
        out.append(Row(metric, f"the same of the matrix product's rate, {size}, batch 1", times(100, share), "%"))
    for size in ("1024", "512"):
        name = BATCHES[1]
        ours = m.get("ours", size, name)
        out.append(Row("G3", f"torch.compile / ours, U-Net {size}", ratio(m.compiled(size, name), ours), "×",
                       1.0, 1.35, least=True))
        out.append(Row("G3", f"PyTorch eager / ours, U-Net {size}", ratio(m.get("eager", size, name), ours), "×"))
    image = m.get("ours", "1024", "image_50_steps")
    out.append(Row("G4", "image, 1024, 50 steps, guided", image, "s", 2.1, 1.33))
    out.append(Row("G4", "the same in PyTorch eager", m.get("eager", "1024", "image_50_steps"), "s"))
    out.append(Row("G4", "image, 512, 50 steps, guided", m.get("ours", "512", "image_50_steps"), "s"))
    out.append(Row("G5", "images a second, 1024, 20 steps, guided, batch 8",
                   ratio(8.0, m.get("ours", "1024", "images_20_steps_b8")), "1/s", 1.3, 1.85, least=True))
    decode = m.get("ours", "1024", "vae_decode_b1")
    out.append(Row("G6", "VAE decode, 1024, bf16", times(1e3, decode), "ms", 45, 22))
    out.append(Row("G6", "VAE decode, 1024, f32", times(1e3, m.get("ours", "1024", "vae_decode_b1", vae="f32")), "ms"))
    out.append(Row("G6", "the same in PyTorch eager, bf16",
                   times(1e3, m.get("eager", "1024", "vae_decode_b1")), "ms"))
    out.append(Row("G7", "image beyond its forwards, decode and text, 1024", residue(m, image, decode), "%", 3, 0.3,
                   note="bounds the time that the GPU is idle between steps"))
    launches = m.get("ours", "1024", "image_50_steps", "kernel_launches")
    forwards = m.get("ours", "1024", "image_50_steps", "f")
    # A guided step is one forward of two samples.
    out.append(Row("G7", "launches of own kernels a step, 1024", ratio(launches, times(0.5, forwards)), "",
                   note="cuBLAS' and cuDNN's are not counted; the target of 900 counts all"))
    out += sharpening(m)
    for kind, gate, ambitious in (("lora", 40, 24), ("full", 60, 48)):
        name, what = f"train_step_{kind}_b4", {"lora": "LoRA", "full": "full"}[kind]
        peak_bytes = m.get("ours", "512", name, "peak_device_bytes")
        recomputed = m.get("ours", "512", f"{name}_recompute", "peak_device_bytes")
        theirs = m.get("eager", "512", name, "peak_device_bytes")
        out += [Row("G11", f"peak memory, {what} step, 512, batch 4", times(1e-9, peak_bytes), "GB", gate, ambitious),
                Row("G11", "the same with gradient checkpoints", times(1e-9, recomputed), "GB"),
                Row("G11", "the same in PyTorch, without", times(1e-9, theirs), "GB")]
        ours, theirs = m.get("ours", "512", name), m.get("eager", "512", name)
        out.append(Row("", f"{what} step, 512, batch 4", times(1e3, ours), "ms"))
        out.append(Row("", "PyTorch eager / ours", ratio(theirs, ours), "×"))
    out.append(Row("G12", "another adapter in place", times(1e3, m.get("ours", "1024", "adapter_switch")), "ms", 20, 2))
    out.append(Row("", "load the checkpoint", m.get("ours", "1024", "load"), "s"))
    # A rehearsal's figures are no SDXL's.
    return [row.as_dict() | ({"met": None} if results["rehearsal"] else {}) for row in out]


def sharpening(m):
    """Rows of the steps of sharpening."""
    ours = lambda name, field="seconds_median": m.get("ours", "512", name, field)  # noqa: E731
    against = lambda name, theirs="": ratio(m.get("eager", "512", name + theirs), ours(name))  # noqa: E731
    each = f"a step of {GROUPS} groups / {GROUPS}; images generated before"
    out = [Row("G8", "LoRA sharpening step of a group, 512, n = m = 3, RLHF",
               times(1e3 / GROUPS, ours("sharpen_rlhf_lora_replay")), "ms", 200, 112, note=each),
           Row("G9", "full sharpening step of a group, 512, n = m = 3, RLHF",
               times(1e3 / GROUPS, ours("sharpen_rlhf_full_replay")), "ms", 280, 155, note=each),
           Row("G10", "PyTorch's RLHF loop / ours, full, 512", against("sharpen_rlhf_full"), "×", 2, 3, least=True,
               note="images generated"),
           Row("G10", "the same, LoRA", against("sharpen_rlhf_lora"), "×"),
           Row("G10", "the same, LoRA, images generated before", against("sharpen_rlhf_lora_replay"), "×"),
           Row("G10", "PyTorch's careful RLHF loop / ours, LoRA", against("sharpen_rlhf_lora", "_careful"), "×")]
    for kind, what in (("lora", "LoRA"), ("full", "full")):
        name = f"sharpen_rlhf_{kind}"
        out += [Row("", f"RLHF step of {GROUPS} groups, 512, {what}", times(1e3, ours(name)), "ms"),
                Row("", "its peak memory", times(1e-9, ours(name, "peak_device_bytes")), "GB"),
                Row("", "the same in PyTorch", times(1e-9, m.get("eager", "512", name, "peak_device_bytes")), "GB")]
    out.append(Row("", f"SFT step of {GROUPS} groups, 512, LoRA", times(1e3, ours("sharpen_sft_lora")), "ms"))
    return out


def residue(m, image, decode):
    """Percent of an image's time that its parts, measured alone, do not explain."""
    step, text = m.get("ours", "1024", BATCHES[1]), m.get("ours", "1024", "text_encode")
    forwards = m.get("ours", "1024", "image_50_steps", "f")
    if not all((image, decode, step, text, forwards)):
        return None
    return 100 * (image - forwards / 2 * step - decode - text) / image


def figure(value):
    return "–" if value is None else f"{value:.4g}"


def table(head, lines):
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for line in lines:
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"


def markdown(results):
    machine = results["machine"]
    yield f"# {machine.get('card') or 'no GPU'}, {results['date']}"
    yield ""
    if results["rehearsal"]:
        yield ("**Rehearsal**: on the CPU, with the shipped model and small latents in place of SDXL. "
               "The figures say nothing of a GPU.")
        yield ""
    yield "; ".join(f"{key} {value}" for key, value in machine.items() if value)
    yield ""
    yield f"Commit {results['commit']}; {results['seconds']:.0f} s of {results['budget_seconds']:.0f} s."
    yield ""
    yield "## Targets"
    yield ""
    yield from table(("", "what", "value", "gate", "ambitious", "met", ""), (
        (r["metric"], r["name"], with_unit(r), bound(r, "gate"), bound(r, "ambitious"),
         r["met"] or "–", r["note"]) for r in results["rows"]))
    yield ""
    yield "## Correctness"
    yield ""
    checks = results["checks"]
    yield f"{sum(c['met'] for c in checks)} of {len(checks)} checks hold."
    yield ""
    yield from table(("what", "value", "limit", "holds"), (
        (c["check"], figure(c["value"]), bound(c, "limit"), "yes" if c["met"] else "**no**") for c in checks))
    yield ""
    yield "## Measurements"
    yield ""
    yield from table(("by", "size", "piece", "median", "runs", "peak memory"), (
        (m["side"], m["size"], m["name"], f"{1e3 * m['seconds_median']:.4g} ms", m["runs"],
         f"{m['peak_device_bytes'] / 1e9:.2f} GB" if m.get("peak_device_bytes") else "–")
        for m in results["measurements"] if "seconds_median" in m))
    yield ""
    for run in (m for m in results["measurements"] if "updates" in m):
        yield "## Training"
        yield ""
        yield f"The shipped model sharpened (part5): {in_words(run)}"
        yield ""
    yield "## Steps"
    yield ""
    yield from table(("part", "step", "outcome", "seconds", "GPU", "error"), (
        (s["part"], s["name"], s["status"], figure(s.get("seconds")),
         ", ".join(f"{key} {value:g}" for key, value in s.get("gpu", {}).items()), short(s.get("error", "")))
        for s in results["steps"]))


def in_words(run):
    """A training run: updates, their rate, and the validations' rewards."""
    rewards = (
        f"{name} {figure(r['first'][1])} (update {r['first'][0]}), {figure(r['last'][1])} (update {r['last'][0]})"
        for name, r in run["rewards"].items()
    )
    rate = f"{figure(run['updates_per_second'])} a second, validations included"
    return "; ".join([f"{run['updates']} updates", rate, *rewards]) + "."


def short(error):
    """Its beginning and its end."""
    return error if len(error) <= 400 else f"{error[:80]} … {error[-300:]}"


def with_unit(row):
    return figure(row["value"]) if row["value"] is None else f"{row['value']:.4g} {row['unit']}".strip()


def bound(row, key):
    return "–" if row[key] is None else f"{'≥' if row['least'] else '≤'} {row[key]:g}"
