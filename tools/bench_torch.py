"""Times PyTorch/diffusers on an SDXL-type model folder, for comparison with the Rust benches.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0
    python tools/bench_torch.py --model models/tiny [--threads 1] [--runs 10] [--only NAME,NAME]

Prints one JSON line a measurement: {"name", "seconds_median", "runs"} and what
it ran on. All in f32 on the CPU, eager mode, no gradients, at the model's own
size (unet sample_size; --latent H W for another):
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

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--runs", type=int, default=10)
    p.add_argument("--seconds", type=float, default=30.0, help="soft limit for each measurement")
    p.add_argument("--latent", type=int, nargs=2, metavar=("H", "W"))
    p.add_argument("--only", help="comma-separated names")
    args = p.parse_args()

    for var in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[var] = str(args.threads)
    import diffusers
    import torch
    import transformers
    from pathlib import Path

    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    for lib in (diffusers, transformers):
        lib.utils.logging.set_verbosity_error()
        lib.utils.logging.disable_progress_bar()

    folder = Path(args.model)
    no_tokenizer = {} if (folder / "tokenizer").exists() else {"tokenizer": None, "tokenizer_2": None}
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, add_watermarker=False, **no_tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    unet, vae, t1, t2 = pipe.unet.eval(), pipe.vae.eval(), pipe.text_encoder.eval(), pipe.text_encoder_2.eval()
    size = unet.config.sample_size
    h, w = args.latent or (size if isinstance(size, (list, tuple)) else (size, size))
    g = torch.Generator().manual_seed(0)
    channels, factor = unet.config.in_channels, pipe.vae_scale_factor
    tokens = min(m.config.max_position_embeddings for m in (t1, t2))
    if pipe.tokenizer is not None:
        tokens = min(tokens, pipe.tokenizer.model_max_length)

    # ids: bos, a few words, eos, padding; as token ids, so that tokenisation is not timed.
    vocab = min(t1.config.vocab_size, t2.config.vocab_size)
    row = [vocab - 2, *torch.randint(3, vocab - 2, (min(9, tokens - 2),), generator=g).tolist(), vocab - 1]
    ids1 = torch.tensor([row + [vocab - 1] * (tokens - len(row))])
    ids2 = torch.tensor([row + [0] * (tokens - len(row))])

    def encode():
        a = t1(ids1, output_hidden_states=True).hidden_states[-2]
        b = t2(ids2, output_hidden_states=True)
        return torch.cat([a, b.hidden_states[-2]], -1), b.text_embeds

    def latents(b):
        return torch.randn(b, channels, h, w, generator=g)

    def forward(b):
        with torch.no_grad():
            context, pooled = encode()
        time_ids = torch.tensor([[h * factor, w * factor, 0, 0, h * factor, w * factor]], dtype=torch.float32)
        x, t = latents(b), torch.full((b,), 500)
        cond = {"text_embeds": pooled.repeat(b, 1), "time_ids": time_ids.repeat(b, 1)}
        context = context.repeat(b, 1, 1)
        return lambda: unet(x, t, encoder_hidden_states=context, added_cond_kwargs=cond, return_dict=False)

    def decode():
        z = latents(1) / vae.config.scaling_factor
        return lambda: vae.decode(z, return_dict=False)

    def image():
        x = latents(1)
        side = dict(height=8 * h, width=8 * w)  # ignored but for the check: the latents and sizes below count
        full = (h * factor, w * factor)

        def run():
            context, pooled = encode()
            return pipe(
                prompt_embeds=context, pooled_prompt_embeds=pooled, negative_prompt_embeds=torch.zeros_like(context),
                negative_pooled_prompt_embeds=torch.zeros_like(pooled), num_inference_steps=50, guidance_scale=5.0,
                latents=x.clone(), original_size=full, target_size=full, output_type="pt", **side,
            )

        return run

    todo = {
        "unet_forward_b1": lambda: forward(1),
        "unet_forward_b2": lambda: forward(2),
        "unet_forward_b8": lambda: forward(8),
        "vae_decode_b1": decode,
        "text_encode": lambda: encode,
        "image_50_steps": image,
    }
    for name, make in todo.items():
        if args.only and name not in args.only.split(","):
            continue
        work, times = make(), []
        with torch.inference_mode():
            start = time.perf_counter()
            work()
            first = time.perf_counter() - start
            least = 1 if name == "image_50_steps" and first > args.seconds / 3 else 3
            began = time.perf_counter()
            while len(times) < args.runs and (len(times) < least or time.perf_counter() - began < args.seconds):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
        print(
            json.dumps(
                {"name": name, "seconds_median": statistics.median(times), "runs": len(times),
                 "seconds_min": min(times), "threads": args.threads, "latent": [h, w],
                 "torch": torch.__version__, "diffusers": diffusers.__version__}
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
