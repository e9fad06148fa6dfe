"""Times PyTorch/diffusers on an SDXL-type model folder, for comparison with the Rust benches.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0
    python tools/bench_torch.py --model models/tiny [--threads 1] [--runs 10] [--only NAME,NAME]

The counterpart of `ds-bench speed --json`: the same work under the same names, one JSON line a
measurement with the same keys (and the versions). tools/compare_speed.py runs both alternately.
All in f32 on the CPU, eager mode, no gradients, at the model's own size (unet sample_size;
--latent H W for another):
  unet_forward_b1/b2/b8  one U-Net forward of that batch (no guidance)
  vae_decode_b1          one latent to one image
  text_encode            one prompt's ids through both towers
  image_50_steps         text encoding (one prompt, zero null prompt), 50 steps of
                         the checkpoint's scheduler at guidance 5 (F = 100), decode
Each is warmed up once; the time is the median over the runs, or over as many
runs as fit in --seconds (at least 3; one for image_50_steps).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LEAST_RUNS = 3


def set_threads(threads):
    """Before torch is first imported."""
    for var in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[var] = str(threads)
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)


class Workload:
    """A checkpoint with fixed inputs and the pieces of work that are measured."""

    def __init__(self, model, latent=None):
        import diffusers
        import torch
        import transformers

        for lib in (diffusers, transformers):
            lib.utils.logging.set_verbosity_error()
            lib.utils.logging.disable_progress_bar()
        folder = Path(model)
        no_tokenizer = {} if (folder / "tokenizer").exists() else {"tokenizer": None, "tokenizer_2": None}
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, add_watermarker=False, **no_tokenizer
        )
        pipe.set_progress_bar_config(disable=True)
        self.torch, self.pipe = torch, pipe
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
        self.forwards = 0
        self.unet.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module, args, kwargs):
        self.forwards += (args[0] if args else kwargs["sample"]).shape[0]

    def latents(self, batch):
        return self.torch.randn(batch, self.unet.config.in_channels, *self.latent, generator=self.generator)

    def time_ids(self, batch):
        full = [side * self.factor for side in self.latent]
        return self.torch.tensor([[*full, 0, 0, *full]], dtype=self.torch.float32).repeat(batch, 1)

    def encode(self, ids=None):
        """Both towers' penultimate states side by side, and the second one's pooled output."""
        ids1, ids2 = ids or self.ids
        a = self.towers[0](ids1, output_hidden_states=True).hidden_states[-2]
        b = self.towers[1](ids2, output_hidden_states=True)
        return self.torch.cat([a, b.hidden_states[-2]], -1), b.text_embeds

    def forward(self, batch):
        with self.torch.no_grad():
            context, pooled = self.encode()
        x, t = self.latents(batch), self.torch.full((batch,), 500)
        cond = {"text_embeds": pooled.repeat(batch, 1), "time_ids": self.time_ids(batch)}
        context = context.repeat(batch, 1, 1)
        return lambda: self.unet(x, t, encoder_hidden_states=context, added_cond_kwargs=cond, return_dict=False)

    def decode(self):
        z = self.latents(1) / self.vae.config.scaling_factor
        return lambda: self.vae.decode(z, return_dict=False)

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

    def image(self):
        x = self.latents(1)
        return lambda: self.sample(*self.encode(), x, 50, 5.0, output_type="pt")

    def pieces(self):
        """Name → what sets the piece up and gives it."""
        return {
            "unet_forward_b1": lambda: self.forward(1),
            "unet_forward_b2": lambda: self.forward(2),
            "unet_forward_b8": lambda: self.forward(8),
            "vae_decode_b1": self.decode,
            "text_encode": lambda: self.encode,
            "image_50_steps": self.image,
        }

    def measure(self, name, runs, seconds):
        """One JSON-able row, keys as those of `ds-bench speed --json`."""
        work, samples = self.pieces()[name](), []
        with self.torch.inference_mode():
            self.forwards = 0
            warm_up = timed(work)[0]
            forwards = self.forwards
            least = 1 if name == "image_50_steps" and warm_up > seconds / LEAST_RUNS else LEAST_RUNS
            began = time.perf_counter()
            while len(samples) < runs and (len(samples) < least or time.perf_counter() - began < seconds):
                samples.append(timed(work))
        wall, cpu = zip(*samples)
        return {
            "name": name,
            "seconds_median": statistics.median(wall),
            "seconds_min": min(wall),
            "cpu_seconds_median": statistics.median(cpu),
            "runs": len(samples),
            "threads": self.torch.get_num_threads(),
            "latent": list(self.latent),
            "tokens": self.tokens,
            "f": forwards,
        }


def timed(work):
    """Seconds on the clock, and of processor time of all threads."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--runs", type=int, default=10)
    p.add_argument("--seconds", type=float, default=30.0, help="soft limit for each measurement")
    p.add_argument("--latent", type=int, nargs=2, metavar=("H", "W"))
    p.add_argument("--only", help="comma-separated names")
    args = p.parse_args()

    set_threads(args.threads)
    workload = Workload(args.model, args.latent)
    names = list(workload.pieces())
    only = args.only.split(",") if args.only else names
    if unknown := set(only) - set(names):
        p.error(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    for name in names:
        if name in only:
            print(json.dumps(workload.measure(name, args.runs, args.seconds) | workload.versions), flush=True)


if __name__ == "__main__":
    main()
