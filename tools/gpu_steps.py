"""What tools/gpu_check.py does, step by step."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
LATENTS = {"512": 64, "1024": 128}
# In place of a size: the shipped model at its own.
SHIPPED = "shipped"
# In a rehearsal, of the shipped model.
SMALL_LATENTS = {"512": 8, "1024": 16}
INFERENCE = ("unet_forward_b2", "unet_forward_b4", "unet_forward_b16", "vae_decode_b1", "text_encode", "image_50_steps")
LARGE = (*INFERENCE, "images_20_steps_b8", "adapter_switch", "load")
PEER = ("unet_forward_b2", "unet_forward_b16", "vae_decode_b1", "image_50_steps")
# Steps of sharpening, most wanted first.
SHARPEN = ("sharpen_rlhf_lora_replay", "sharpen_rlhf_lora", "sharpen_sft_lora", "sharpen_rlhf_rollouts")
SHARPEN_FULL = ("sharpen_rlhf_full_replay", "sharpen_rlhf_full")
# In a rehearsal, of training.
FEW = ("--batch", "1", "--micro", "1", "--n", "2", "--rollout-steps", "2", "--validation-steps", "2",
       "--validation-prompts", "scenes:validation:2", "--resolution", "32", "--steps", "100000")


@dataclass
class Step:
    """One command. `seconds`: its limit; `least`: with less than that left it is not begun.

    `tests`: it prints what Rust's tests print, else JSON lines, which get `tags`. `silent`: it need not.
    `{seconds}` in the command becomes the time that there is.
    """

    part: int
    name: str
    seconds: float
    command: list
    least: float = 15.0
    tags: dict = field(default_factory=dict)
    tests: bool = False
    silent: bool = False


class Setting:
    """Where the programs and models are, and how they are called."""

    def __init__(self, args, programs, checkpoint):
        self.args, self.programs = args, programs
        self.bench, self.train, self.device = str(programs / "ds-bench"), str(programs / "ds-train"), args.device
        self.shipped = str(args.model.resolve())
        self.sdxl = self.shipped if args.rehearse else str(checkpoint)
        # Of each size, what both sides' steps of sharpening take.
        self.given = {size: str(checkpoint.with_name(f"steps-{size}")) for size in ("512", SHIPPED)}
        self.latents = SMALL_LATENTS if args.rehearse else LATENTS
        # The CPU has no fast bf16, and decodes in f32 only.
        self.dtype = "f32" if self.device == "cpu" else "bf16"
        self.limits = ["--runs", "1", "--seconds", "0.5"] if args.rehearse else ["--runs", "10", "--seconds", "3"]
        self.threads = "2" if args.rehearse else "16"

    def checkpoint_command(self):
        return [*self.python("random_checkpoint.py"), "--shape", "sdxl", "--dtype", "bf16",
                "--device", self.device, "--out", self.sdxl, "--scene-clip", str(Path(self.shipped) / "scene_clip")]

    def python(self, script):
        return [sys.executable, str(TOOLS / script)]

    def model(self, size):
        """Flags for the model and the size of its latents."""
        if size == SHIPPED and not self.args.rehearse:
            return ["--model", self.shipped]
        side = str(self.latents["512" if size == SHIPPED else size])
        return ["--model", self.sdxl, "--latent", side, side]

    def speed(self, command, size, names, vae):
        return [*command, *self.model(size), "--device", self.device, "--dtype", self.dtype,
                "--vae-dtype", vae if self.device != "cpu" else "f32",
                "--threads", self.threads, *self.limits, "--only", ",".join(names)]

    def ours(self, part, name, size, names, seconds, vae="bf16", least=15.0):
        command = self.speed([self.bench, "speed", "--json"], size, names, vae)
        tags = {"side": "ours", "size": size, "vae_dtype": vae}
        return Step(part, f"ours, {size}: {name}", seconds, command, least, tags)

    def torch(self, part, name, size, names, seconds, compiled=None, least=15.0):
        command = self.speed(self.python("bench_torch.py"), size, names, "bf16")
        side = compiled or "eager"
        command += ["--compile", compiled] if compiled else []
        command += ["--given", self.given[size]] if names[0].startswith("sharpen") else []
        tags = {"side": side, "size": size, "vae_dtype": "bf16"}
        return Step(part, f"PyTorch {side}, {size}: {name}", seconds, command, least, tags)

    def parity(self, part, what, name, model, seconds, *flags):
        command = [*self.python("gpu_parity.py"), what, "--program", self.bench, *model,
                   "--device", self.device, *flags]
        return Step(part, name, seconds, command)

    def same_steps(self, size, dtype, seconds):
        """Writes the steps that both sides measure, and compares gradients."""
        dtype = dtype if self.device != "cpu" else "f32"
        return self.parity(4, "sharpen", f"gradients of sharpening against PyTorch, {size}, {dtype}",
                           self.model(size), seconds, "--dtype", dtype, "--given", self.given[size])

    def training(self, out):
        command = [*self.python("gpu_train.py"), "--program", self.train, "--model", self.shipped,
                   "--device", self.device, "--out", str(out), "--seconds", "{seconds}"]
        # What an option begins with is not to be one of the script's.
        command += ["--", *FEW] if self.args.rehearse else []
        return command


def steps(s):
    """In order of value."""
    yield Step(1, "the program starts", 20, [s.bench, "--version"], least=1, silent=True)
    yield Step(1, "the tests for GPUs", 100, [str(s.programs / "gpu"), "--test-threads=1"], tests=True,
               silent=s.args.rehearse)
    yield s.parity(1, "shipped", "the shipped model against the CPU", ["--model", s.shipped], 75)
    yield s.parity(2, "torch", "SDXL against PyTorch, 512", s.model("512"), 110)
    yield Step(3, "what the card can do", 30, [*s.python("gpu_probe.py"), "--device", s.device],
               tags={"side": "card", "size": None, "vae_dtype": None})
    yield s.ours(3, "inference", "1024", LARGE, 80)
    yield s.torch(3, "inference", "1024", PEER, 60)
    yield s.torch(3, "blocks compiled", "1024", PEER[:1], 75, compiled="blocks")
    yield s.ours(3, "inference", "512", INFERENCE, 45)
    yield s.torch(3, "inference", "512", PEER, 45)
    yield from sharpening(s)
    for kind, name in (("lora", "LoRA step"), ("full", "full step")):
        piece = f"train_step_{kind}_b4"
        yield s.ours(4, name, "512", [piece], 45)
        yield s.torch(4, name, "512", [piece], 45)
        yield s.ours(4, f"{name} with gradient checkpoints", "512", [f"{piece}_recompute"], 45)
    yield s.torch(3, "blocks compiled", "512", PEER[:1], 60, compiled="blocks")
    yield s.ours(3, "VAE in f32", "1024", ["vae_decode_b1"], 30, vae="f32")
    for size in ("1024", "512"):
        yield s.torch(3, "U-Net compiled", size, PEER[:1], 150, compiled="whole", least=40)
    # What time is left. In a rehearsal as much as shows that it stops.
    seconds = 45 if s.args.rehearse else 3600
    yield Step(5, "the shipped model sharpened", seconds, s.training(s.args.out / "part5"), 45,
               {"side": "ours", "size": SHIPPED, "vae_dtype": None})


def sharpening(s):
    """Steps of Diffusion-Sharpening: SDXL's, then the shipped model's."""
    for dtype in ("f32", "bf16") if s.device != "cpu" else ("f32",):
        yield s.same_steps(SHIPPED, dtype, 45)
    yield s.same_steps("512", "bf16", 75)
    yield s.ours(4, "RLHF of an adapter", "512", SHARPEN[:2], 60)
    yield s.torch(4, "RLHF of an adapter", "512", SHARPEN[:2], 60)
    yield s.ours(4, "RLHF of every weight", "512", SHARPEN_FULL, 75)
    yield s.torch(4, "RLHF of every weight", "512", SHARPEN_FULL[1:], 75)
    yield s.torch(4, "RLHF of an adapter, carefully", "512", [f"{SHARPEN[1]}_careful"], 45)
    yield s.ours(4, "SFT, and images alone", "512", SHARPEN[2:], 45)
    yield s.ours(4, "sharpening", SHIPPED, SHARPEN, 45)
    yield s.torch(4, "sharpening", SHIPPED, SHARPEN[1:3], 45)
