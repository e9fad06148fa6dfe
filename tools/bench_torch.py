"""Times PyTorch/diffusers on an SDXL-type model folder, for comparison with the Rust benches.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft
    python tools/bench_torch.py --model models/tiny [--suite model] [--threads 1] [--runs 10]
    python tools/bench_torch.py --model models/tiny --only unet_forward_b1,train_step_lora_b1
    python tools/bench_torch.py --suite ops

The counterpart of `ds-bench speed --json`: the same work under the same names, one JSON line a
measurement with the same keys (and the versions). tools/compare_speed.py runs both alternately.
In f32 on the CPU, eager mode, at the model's own size (unet sample_size; --latent H W for
another), unless --device, --dtype, --vae-dtype and --compile say otherwise (operations: CPU only).
--compile goes through torch.compile: `blocks` compiles the U-Net's transformer blocks, which is
quick, `whole` the U-Net as one. The suites are

model, without gradients:
  unet_forward_b1/b2/b8  one U-Net forward of that batch (no guidance)
  vae_decode_b1          one latent to one image
  text_encode            one prompt's ids through both towers
  image_50_steps         text encoding (one prompt, zero null prompt), 50 steps of
                         the checkpoint's scheduler at guidance 5 (F = 100), decode
  and by name only       unet_forward_b16, vae_decode_b8, images_20_steps_b8 (20 steps, 8 images
                         of one prompt), adapter_switch (another LoRA of rank 16 made the one in
                         use), load (the checkpoint from its files)
train, batches of 1 and 4:
  unet_forward_b1/b4     as above
  unet_forward_backward_lora_b1/b4, _full_b1/b4
                         forward, mean squared error, backward: gradients of a LoRA
                         (rank 16 on the projections of all attentions) or of every parameter
  train_step_lora_b1/b4, _full_b1/b4
                         the same with a step of AdamW
  train_step_lora_b4_recompute, _full_b4_recompute
                         and with gradient checkpoints
sharpen, from what `ds-bench sharpen-step` wrote to the folder --given:
  unet_forward_b12, vae_decode_b12
                         what such a step is made of
  sharpen_sft_lora, sharpen_rlhf_lora, sharpen_rlhf_rollouts, sharpen_rlhf_lora_replay
                         a step of Diffusion-Sharpening on an adapter of rank 16, or a part
                         of it; and each with _careful (bench_torch_sharpen.py)
  and by name only       sharpen_rlhf_full, sharpen_rlhf_full_replay: of every weight
ops: twelve operations at SDXL's sizes, forward alone and with the backward (`_train`);
  needs no --model. Their rows also have `flop` or `bytes` (bench_torch_ops.py).

Each is warmed up once; the time is the median over the runs, or over as many
runs as fit in --seconds (at least 3; one for image_50_steps and for training).
peak_rss_bytes is the most memory that this process has had so far, so it tells
most where --only names a single piece.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import bench_torch_ops
import bench_torch_sharpen
import bench_torch_train
from bench_timing import repeated, row, set_threads
from bench_torch_ops import Operations
from bench_torch_sharpen import ADAPTED, SHARPEN
from bench_torch_train import TRAINING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL_PIECES = (
    "unet_forward_b1", "unet_forward_b2", "unet_forward_b8", "vae_decode_b1", "text_encode", "image_50_steps",
)
BY_NAME = "unet_forward_b16", "vae_decode_b8", "images_20_steps_b8", "adapter_switch", "load"
SUITES = {
    "model": list(MODEL_PIECES),
    "train": ["unet_forward_b1", "unet_forward_b4", *TRAINING],
    "sharpen": ["unet_forward_b12", "vae_decode_b12", *ADAPTED],
    "ops": bench_torch_ops.names(),
}
# At most so many runs, begun within so many seconds. Operations take many: the first few still
# pay for memory that is new to the process.
LIMITS = {"model": (10, 30.0), "train": (10, 30.0), "sharpen": (5, 60.0), "ops": (300, 1.0)}


def chosen(suite, only):
    """Names to measure, in order; KeyError with a message where `only` names none of the suite's."""
    known = SUITES[suite] if suite else list(dict.fromkeys([*sum(SUITES.values(), []), *BY_NAME, *SHARPEN]))
    if not only:
        return SUITES[suite or "model"]
    wanted = only.split(",")
    if unknown := set(wanted) - set(known):
        raise KeyError(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return [name for name in known if name in wanted]


DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Placement:
    """Where the networks are, and in which numbers."""

    device: str = "cpu"
    dtype: str = "f32"
    vae_dtype: str = "f32"
    compile: Optional[str] = None


class Workload:
    """A checkpoint with fixed inputs and the pieces of work that are measured."""

    def __init__(self, model, latent=None, placement=Placement(), given=None):
        import diffusers
        import torch
        import transformers

        for lib in (diffusers, transformers):
            lib.utils.logging.set_verbosity_error()
            lib.utils.logging.disable_progress_bar()
        self.torch, self.folder, self.placement, self.given = torch, Path(model), placement, given
        self.device = torch.device(placement.device)
        self.dtype, self.vae_dtype = (getattr(torch, DTYPES[d]) for d in (placement.dtype, placement.vae_dtype))
        self.pipe = pipe = self.load()
        pipe.set_progress_bar_config(disable=True)
        self.versions = {"torch": torch.__version__, "diffusers": diffusers.__version__,
                         "transformers": transformers.__version__}
        self.unet, self.vae = pipe.unet.eval(), pipe.vae.eval()
        self.towers = pipe.text_encoder.eval(), pipe.text_encoder_2.eval()
        size = self.unet.config.sample_size
        self.latent = tuple(latent or (size if isinstance(size, (list, tuple)) else (size, size)))
        self.factor = pipe.vae_scale_factor
        self.generator = torch.Generator().manual_seed(0)
        self.tokens = min(t.config.max_position_embeddings for t in self.towers)
        if pipe.tokenizer is not None:
            self.tokens = min(self.tokens, pipe.tokenizer.model_max_length)

        # ids: bos, a few words, eos, padding; as token ids, so that tokenisation is not timed.
        vocab = min(t.config.vocab_size for t in self.towers)
        words = torch.randint(3, vocab - 2, (min(9, self.tokens - 2),), generator=self.generator).tolist()
        row = [vocab - 2, *words, vocab - 1]
        self.ids = [torch.tensor([row + [padding] * (self.tokens - len(row))]) for padding in (vocab - 1, 0)]
        self.ids = [row.to(self.device) for row in self.ids]
        if placement.compile == "blocks":
            self.unet.compile_repeated_blocks(dynamic=False)
        elif placement.compile == "whole":
            # Not the module: its hook is to stay outside.
            self.unet.forward = torch.compile(self.unet.forward, dynamic=False)
        self.forwards = 0
        self.unet.register_forward_pre_hook(self.count, with_kwargs=True)

    def load(self):
        """The checkpoint from its files, in place."""
        import diffusers

        names = () if (self.folder / "tokenizer").exists() else ("tokenizer", "tokenizer_2")
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
            self.folder, dtype=self.dtype, local_files_only=True, add_watermarker=False, **dict.fromkeys(names)
        )
        pipe.to(self.device)
        pipe.vae.to(self.vae_dtype)
        if self.device.type == "cuda":  # what its convolutions are fastest on
            pipe.unet.to(memory_format=self.torch.channels_last)
            pipe.vae.to(memory_format=self.torch.channels_last)
        return pipe

    def count(self, _module, args, kwargs):
        self.forwards += (args[0] if args else kwargs["sample"]).shape[0]

    def latents(self, batch):
        shape = batch, self.unet.config.in_channels, *self.latent
        return self.torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def time_ids(self, batch):
        full = [side * self.factor for side in self.latent]
        row = self.torch.tensor([[*full, 0, 0, *full]], dtype=self.torch.float32, device=self.device)
        return row.repeat(batch, 1)

    def encode(self, ids=None):
        """Both towers' penultimate states side by side, and the second one's pooled output."""
        ids1, ids2 = ids or self.ids
        a = self.towers[0](ids1, output_hidden_states=True).hidden_states[-2]
        b = self.towers[1](ids2, output_hidden_states=True)
        return self.torch.cat([a, b.hidden_states[-2]], -1), b.text_embeds

    def inputs(self, batch):
        """The U-Net's keyword arguments."""
        with self.torch.no_grad():
            context, pooled = self.encode()
        return {
            "sample": self.latents(batch),
            "timestep": self.torch.full((batch,), 500, device=self.device),
            "encoder_hidden_states": context.repeat(batch, 1, 1),
            "added_cond_kwargs": {"text_embeds": pooled.repeat(batch, 1), "time_ids": self.time_ids(batch)},
            "return_dict": False,
        }

    def forward(self, batch):
        inputs = self.inputs(batch)
        return lambda: self.unet(**inputs)

    def training(self, name):
        batch = TRAINING[name].batch
        return bench_torch_train.prepare(TRAINING[name], self.unet, self.inputs(batch), self.latents(batch))

    def decoded(self, latents):
        """Images of the VAE, about [-1, 1]."""
        return self.vae.decode(latents.to(self.vae_dtype) / self.vae.config.scaling_factor, return_dict=False)[0]

    def decode(self, batch):
        z = self.latents(batch)
        return lambda: self.decoded(z)

    def sample(self, context, pooled, latents, steps, guidance, **kwargs):
        """The pipeline from unit noise, with the zero null prompt."""
        h, w = self.latent
        full = (h * self.factor, w * self.factor)
        return self.pipe(
            prompt_embeds=context, pooled_prompt_embeds=pooled,
            negative_prompt_embeds=self.torch.zeros_like(context),
            negative_pooled_prompt_embeds=self.torch.zeros_like(pooled),
            num_inference_steps=steps, guidance_scale=guidance, latents=latents.clone(),
            original_size=full, target_size=full,
            height=8 * h, width=8 * w,  # ignored but for a check: the latents and sizes above count
            **kwargs,
        )

    def images(self, steps, batch):
        x = self.latents(batch)

        def run():
            context, pooled = self.encode()
            context, pooled = context.repeat(batch, 1, 1), pooled.repeat(batch, 1)
            latents = self.sample(context, pooled, x, steps, 5.0, output_type="latent").images
            return (self.decoded(latents) / 2 + 0.5).clamp(0, 1)

        return run

    def adapter_switch(self):
        """Two adapters are in place and each run makes the other one the one in use."""
        for name in ("first", "second"):
            self.unet.add_adapter(bench_torch_train.lora(), name)
        state = {"other": "first"}

        def run():
            self.unet.set_adapter(state["other"])
            state["other"] = "second" if state["other"] == "first" else "first"

        return run

    def pieces(self):
        """Name → what sets the piece up and gives it."""
        return {
            "unet_forward_b1": lambda: self.forward(1),
            "unet_forward_b2": lambda: self.forward(2),
            "unet_forward_b4": lambda: self.forward(4),
            "unet_forward_b8": lambda: self.forward(8),
            "unet_forward_b12": lambda: self.forward(12),
            "unet_forward_b16": lambda: self.forward(16),
            "vae_decode_b1": lambda: self.decode(1),
            "vae_decode_b8": lambda: self.decode(8),
            "vae_decode_b12": lambda: self.decode(12),
            "text_encode": lambda: self.encode,
            "image_50_steps": lambda: self.images(50, 1),
            "images_20_steps_b8": lambda: self.images(20, 8),
            "adapter_switch": self.adapter_switch,
            "load": lambda: self.load,
        } | {name: lambda name=name: self.training(name) for name in TRAINING} | {
            name: lambda piece=piece: bench_torch_sharpen.prepare(piece, self, self.given)
            for name, piece in SHARPEN.items()
        }

    def measure(self, name, runs, seconds):
        """One JSON-able row."""
        work, trains, sharpens = self.pieces()[name](), name in TRAINING, name in SHARPEN
        forwards = []

        def once():
            self.forwards = 0
            work()
            forwards.append(self.forwards)

        try:
            with self.torch.inference_mode(not (trains or sharpens)):
                samples = repeated(once, runs, seconds, long=trains or sharpens or name.startswith("image"))
        finally:
            if trains or name == "adapter_switch":
                bench_torch_train.restore(self.unet, self.dtype)
        versions = self.versions | (bench_torch_train.versions() if trains or sharpens else {})
        setting = {"compile": self.placement.compile} if self.placement.compile else {}
        return row(name, samples, list(self.latent), self.tokens, forwards[0]) | setting | versions

    def flop(self, name):
        """Floating-point operations of a U-Net forward or a training piece: its matrix products,
        attention and convolutions. Counted on shapes alone; None for what has no such count."""
        from torch.utils.flop_counter import FlopCounterMode

        if name not in TRAINING and not name.startswith("unet_forward_b"):
            return None
        batch = TRAINING[name].batch if name in TRAINING else int(name.removeprefix("unet_forward_b"))
        meta = self.torch.device("meta")
        inputs = {key: moved(value, meta) for key, value in self.inputs(batch).items()}
        with meta:
            unet = type(self.unet).from_config(self.unet.config)
            if name in TRAINING:
                run = bench_torch_train.prepare(TRAINING[name], unet, inputs, inputs["sample"])
            else:
                unet.requires_grad_(False)
                run = lambda: unet(**inputs)  # noqa: E731
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()


def moved(value, device):
    """Tensors, and dictionaries of them, on another device; everything else as it is."""
    if isinstance(value, dict):
        return {key: moved(inner, device) for key, inner in value.items()}
    return value.to(device) if hasattr(value, "to") else value


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="folder in the diffusers layout; operations need none")
    p.add_argument("--suite", choices=SUITES, help="default: model, or where --only finds its names")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--runs", type=int, help="default: 10; suite ops: 300")
    p.add_argument("--seconds", type=float, help="soft limit for each measurement; default: 30, suite ops: 1")
    p.add_argument("--latent", type=int, nargs=2, metavar=("H", "W"))
    p.add_argument("--only", help="comma-separated names")
    p.add_argument("--given", metavar="DIR", help="what `ds-bench sharpen-step` wrote, for the suite sharpen")
    p.add_argument("--device", default="cpu", help="cpu or cuda:N")
    p.add_argument("--dtype", choices=DTYPES, default="f32", help="of U-Net and text towers")
    p.add_argument("--vae-dtype", choices=DTYPES, default="f32")
    p.add_argument("--compile", choices=("blocks", "whole"), help="through torch.compile")
    args = p.parse_args()
    try:
        names = chosen(args.suite, args.only)
    except KeyError as error:
        p.error(error.args[0])

    set_threads(args.threads)
    operations = [name for name in names if name in SUITES["ops"]]
    if len(operations) < len(names) and not args.model:
        p.error("--model is needed for all but operations")
    placement = Placement(args.device, args.dtype, args.vae_dtype, args.compile)
    if operations and placement != Placement():
        p.error("operations are measured on the CPU in f32")
    if placement.compile and (TRAINING | SHARPEN).keys() & set(names):
        p.error("training is measured without --compile")
    if SHARPEN.keys() & set(names) and not args.given:
        p.error("steps of sharpening need --given")
    runs, seconds = LIMITS[args.suite or "model"]
    runs, seconds = args.runs or runs, args.seconds or seconds
    workload = Workload(args.model, args.latent, placement, args.given) if len(operations) < len(names) else None
    for name in names:
        source = Operations() if name in operations else workload
        print(json.dumps(source.measure(name, runs, seconds)), flush=True)


if __name__ == "__main__":
    main()
