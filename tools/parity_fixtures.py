"""Writes the parity fixtures: small random SDXL-type models and what diffusers computes with them.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 safetensors==0.8.0 numpy
    python tools/parity_fixtures.py --out tests/fixtures/parity [--only NAME,NAME]

CPU only, about two minutes on one core. The same versions give the same inputs
and weights (seeded CPU generators); outputs may differ in the last bits between
machines. The tokenizer fixture goes to <out>/../tokenizer.

Each <out>/<name>/ is a diffusers folder written by save_pretrained, plus
  reference.safetensors  inputs and expected outputs (below)
  reference.json         options, scheduler timesteps and sigmas, prompts
  grads.safetensors      (two fixtures) PyTorch's gradients of a small U-Net
  schedulers.{json,safetensors}  (one fixture) more schedulers with the same
                         U-Net, sample 0 only, by name: [steps,1,C,h,w]
Weights are rounded to the saved dtype first; all references are then computed
in f32 from the reloaded folder. B samples, T tokens, S = 5 steps.

Inputs: latents [B,C,h,w], timesteps [B] i64, input_ids and input_ids_2 [B,T]
i64, time_ids [B,6], image [B,3,H,W].
Expected: hidden_states [B,T,D] (hidden_states[-2] of both towers, last dim
concatenated), pooled [B,P] (text_embeds of tower 2), noise_pred (U-Net at
latents, timesteps, hidden_states, pooled, time_ids; no scaling of the input),
decoded (VAE decode of latents / scaling_factor, not clamped), encoded_mean and
encoded_std (of the posterior, not times scaling_factor), trajectory
[S,B,C,h,w] (StableDiffusionXLPipeline from latents=`latents`, which it
multiplies by the scheduler's init_noise_sigma; guidance 5; zeros as null
context and pooled; time_ids of each sample; the latents after each step. Heun:
after each whole step, and trajectory_stages has the latents after each of its
2S-1 U-Net calls).
Some fixtures: trajectory_rescale (guidance_rescale 0.7), trajectory_negative
(negative_input_ids(_2) -> negative_hidden_states, negative_pooled as the null
prompt), trajectory_eta (DDIM with eta 1 and the step noises noise_eta),
trajectory_plain (guidance 1: no null prompt at all), trajectory_text and images
(the pipeline called with prompt strings: reference.json "prompts"; null prompt
by force_zeros_for_empty_prompt; images [B,3,8h,8w] in [0,1]).
"""

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from parity_configs import FIXTURES, SCHEDULERS, SD, UP  # noqa: E402
from scene_tokenizer import EOS, build, write_tokenizer  # noqa: E402

torch.set_num_threads(1)
diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

STEPS, GUIDANCE = 5, 5.0
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


# Attention that is not flat; an output small enough for guidance 5 not to make the trajectory chaotic
# (a random U-Net is far rougher than a trained one, and f32 itself must agree with f64).
GAINS = {"to_q": 1.3, "to_k": 1.3, "q_proj": 1.3, "k_proj": 1.3, "conv_out": 0.5}


# ---------------------------------------------------------------- building

@torch.no_grad()
def randomise(model, generator):
    """Healthy random weights: unit-gain matrices, norms that are not the identity, biases that are not zero."""
    for name, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            n = torch.randn(p.shape, generator=generator)
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                p.copy_(1 + 0.25 * n if key == "weight" else 0.25 * n)
            elif isinstance(module, torch.nn.Embedding):
                p.copy_(0.7 * n if "token" in name else 0.3 * n)
            elif key == "bias":
                p.copy_(0.1 * n)
            else:
                gain = GAINS.get(name.rsplit(".", 1)[-1], 1.0) if not name.startswith(("encoder.", "decoder.")) else 1.0
                p.copy_(n * gain / math.sqrt(p[0].numel()))


def token_layout(fx):
    """(vocab size, eos id, eos_token_id of the config, bos id)"""
    if fx["vocab"] == "scene":
        vocab, _ = build()
        return len(vocab), vocab[EOS], vocab[EOS], len(vocab) - 2
    if fx.get("legacy_eos"):  # configs from before transformers 4.31 say 2 and mean "the largest id"
        return fx["vocab"], fx["vocab"] - 1, 2, fx["vocab"] - 2
    # A real eos id that is not the largest: pooling must look for it, not for the maximum.
    eos = fx["vocab"] - fx["eos_from_end"]
    return fx["vocab"], eos, eos, eos - 1


def text_config(tower, vocab, eos, bos, projection, pad):
    hidden, intermediate, layers, heads, act, positions = tower
    return CLIPTextConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, hidden_act=act, max_position_embeddings=positions, projection_dim=projection,
        bos_token_id=bos, eos_token_id=eos, pad_token_id=pad,
    )


def build_pipeline(fx, scratch):
    vocab, eos, config_eos, bos = token_layout(fx)
    channels = fx.get("latent_channels", 4)
    # Layers of the same kind but different seeds, so each component has its own stream.
    gens = [torch.Generator().manual_seed(1000 * fx["seed"] + i) for i in range(4)]
    t1 = CLIPTextModel(text_config(fx["tower1"], vocab, config_eos, bos, fx["projection"], min(1, eos)))
    t2 = CLIPTextModelWithProjection(text_config(fx["tower2"], vocab, config_eos, bos, fx["projection"], 0))
    u = dict(fx["unet"])
    down = u.pop("down")
    unet = UNet2DConditionModel(
        sample_size=max(fx["latents"]), in_channels=channels, out_channels=channels, down_block_types=down,
        up_block_types=tuple(UP[b] for b in reversed(down)), mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=fx["tower1"][0] + fx["tower2"][0], addition_embed_type="text_time",
        projection_class_embeddings_input_dim=fx["projection"] + 6 * u["addition_time_embed_dim"], **u,
    )
    levels = len(fx["vae"]["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels, sample_size=8 * max(fx["latents"]), **fx["vae"],
    )
    for model, g in zip((t1, t2, unet, vae), gens):
        randomise(model, g)
    toks = (None, None)
    if fx["vocab"] == "scene":
        for i, pad in ((1, EOS), (2, "!")):
            write_tokenizer(scratch / f"tok{i}", pad)
        toks = tuple(CLIPTokenizer.from_pretrained(scratch / f"tok{i}") for i in (1, 2))
    cls, options = fx["scheduler"]
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=t1, text_encoder_2=t2, tokenizer=toks[0], tokenizer_2=toks[1], unet=unet,
        scheduler=cls(**options), force_zeros_for_empty_prompt=fx["force_zeros"], add_watermarker=False,
    )


def save_folder(fx, pipe, folder):
    pipe.to(DTYPES[fx["dtype"]])
    kwargs = {"max_shard_size": fx["shard"]} if "shard" in fx else {}
    pipe.save_pretrained(folder, safe_serialization=True, **kwargs)
    for i in ("", "_2"):  # ours, not transformers' re-serialisation (which writes only tokenizer.json)
        if (folder / f"tokenizer{i}").exists():
            shutil.rmtree(folder / f"tokenizer{i}")
            write_tokenizer(folder / f"tokenizer{i}", "!" if i else EOS)
    classic = fx.get("classic_keys", True)
    if classic:
        classic_text_keys(folder / "text_encoder", position_ids=classic == "position_ids")
        if classic == "position_ids":
            classic_text_keys(folder / "text_encoder_2", position_ids=True)


def classic_text_keys(folder, position_ids):
    """transformers 5 saves CLIPTextModel without the "text_model." prefix that every published SDXL
    checkpoint has; put it back. Old files also hold a position_ids buffer."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    rename = lambda k: k if k.startswith(("text_model.", "text_projection.")) else "text_model." + k  # noqa: E731
    for n, path in enumerate(files):
        tensors = {rename(k): v for k, v in load_file(path).items()}
        if position_ids and n == 0:
            count = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
            tensors["text_model.embeddings.position_ids"] = torch.arange(count)[None]
        save_file(tensors, path, metadata={"format": "pt"})
    if index.exists():
        doc = json.loads(index.read_text())
        doc["weight_map"] = {rename(k): v for k, v in doc["weight_map"].items()}
        if position_ids:
            doc["weight_map"]["text_model.embeddings.position_ids"] = files[0].name
        index.write_text(json.dumps(doc, indent=2, sort_keys=True) + "\n")


def load_folder(fx, folder):
    kwargs = {} if (folder / "tokenizer").exists() else {"tokenizer": None, "tokenizer_2": None}
    pipe = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, add_watermarker=False, **kwargs
    )
    pipe.set_progress_bar_config(disable=True)
    for m in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        m.eval()
        assert m.dtype == torch.float32
    return pipe


# ---------------------------------------------------------------- inputs

def random_ids(fx, generator, pads):
    """Token rows: bos, words, eos, padding; the last row is full (no padding), one row is nearly empty."""
    vocab, eos, _, bos = token_layout(fx)
    b, t = fx["batch"], fx["tokens"]
    rows = []
    for i in range(b):
        words = t - 2 if i == b - 1 else 1 + int(torch.randint(0, t // 2, (1,), generator=generator))
        ids = torch.randint(3, bos, (words,), generator=generator)
        if vocab - eos > 1 and words > 1:  # an id above eos before eos
            ids[words // 2] = vocab - 1
        rows.append([bos, *ids.tolist(), eos])
    return [torch.tensor([r + [pad] * (t - len(r)) for r in rows]) for pad in pads]


def make_inputs(fx):
    g = torch.Generator().manual_seed(77_000 + fx["seed"])
    b, (h, w), (ih, iw) = fx["batch"], fx["latents"], fx["image"]
    _, eos, _, _ = token_layout(fx)
    ids = random_ids(fx, g, (eos, 0))
    negative = random_ids(fx, g, (eos, 0))
    image = torch.randn(b, 3, 5, 5, generator=g)
    image = torch.nn.functional.interpolate(image, (ih, iw), mode="bicubic") + 0.1 * torch.randn(
        b, 3, ih, iw, generator=g
    )
    time_ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024], [737, 501, 64, 13, 768, 512], [128, 128, 7, 0, 96, 160]])
    return {
        "latents": torch.randn(b, fx.get("latent_channels", 4), h, w, generator=g),
        "timesteps": torch.tensor([981, 37, 500])[:b].clone(),
        "input_ids": ids[0],
        "input_ids_2": ids[1],
        "time_ids": time_ids[:b].clone(),
        "image": image.clamp(-1, 1),
        "negative_input_ids": negative[0],
        "negative_input_ids_2": negative[1],
    }


# ---------------------------------------------------------------- references

def encode_text(pipe, ids, ids_2):
    a = pipe.text_encoder(ids, output_hidden_states=True)
    b = pipe.text_encoder_2(ids_2, output_hidden_states=True)
    layers = pipe.text_encoder.config.num_hidden_layers
    assert len(a.hidden_states) == layers + 1
    return torch.cat([a.hidden_states[-2], b.hidden_states[-2]], -1), b.text_embeds


def trajectory(pipe, latents, time_ids, steps=STEPS, guidance=GUIDANCE, scheduler=None, noise=None, **call):
    """Runs the pipeline one sample at a time, because it has one set of time ids for a whole batch.

    `call` values that are tensors have a batch dimension. Returns [stages, B, ...] latents and the pipeline's last
    output; `noise` (a list) receives the noises that DDIM drew.
    """
    if scheduler is not None:
        pipe.scheduler = scheduler
    import diffusers.schedulers.scheduling_ddim as ddim

    original, drawn = ddim.randn_tensor, []

    def recorded(*a, **k):
        drawn.append(original(*a, **k))
        return drawn[-1]

    out, last = [], []
    for b in range(len(latents)):
        seen = []

        def keep(_, i, t, kwargs):
            seen.append(kwargs["latents"].detach().clone())
            return {}

        one = {k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        if isinstance(one.get("prompt"), list):
            one["prompt"] = one["prompt"][b]
        oh, ow, top, left, th, tw = (int(v) for v in time_ids[b])
        dtype = latents.dtype
        drawn.clear()
        ddim.randn_tensor = recorded
        try:
            result = pipe(
                height=64, width=64, num_inference_steps=steps, guidance_scale=guidance,
                latents=latents[b : b + 1].clone().to(dtype), original_size=(oh, ow), crops_coords_top_left=(top, left),
                target_size=(th, tw), callback_on_step_end=keep,
                generator=torch.Generator().manual_seed(4242 + b), **{"output_type": "latent", **one},
            ).images
        finally:
            ddim.randn_tensor = original
        assert "latents" not in call and (call.get("output_type") or torch.equal(result, seen[-1]))
        out.append(torch.cat(seen))
        last.append(result)
        if noise is not None:
            noise.append(torch.cat(drawn))
    return torch.stack(out, 1), torch.cat(last)


def whole_steps(pipe, stages, steps=STEPS):
    """Latents after whole steps: Heun makes two U-Net calls for each step but the last."""
    if pipe.scheduler.order == 1:
        assert len(stages) == steps
        return stages
    assert len(stages) == 2 * steps - 1
    return stages[[*range(1, 2 * steps - 2, 2), 2 * steps - 2]]


PROMPTS = ["a red circle left of a striped blue square", "Three small DOTTED stars, and a large  ring!"]


def references(fx, pipe, x, dtype=torch.float32):
    """All expected outputs; also run in f64, to know how well conditioned they are."""
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in x.items()}
    pipe.to(dtype)
    y = {}
    y["hidden_states"], y["pooled"] = encode_text(pipe, x["input_ids"], x["input_ids_2"])
    cond = {"text_embeds": y["pooled"], "time_ids": x["time_ids"]}
    y["noise_pred"] = pipe.unet(
        x["latents"], x["timesteps"], encoder_hidden_states=y["hidden_states"], added_cond_kwargs=cond
    ).sample
    y["decoded"] = pipe.vae.decode(x["latents"] / pipe.vae.config.scaling_factor).sample
    posterior = pipe.vae.encode(x["image"]).latent_dist
    y["encoded_mean"], y["encoded_std"] = posterior.mean, posterior.std

    text = {"prompt_embeds": y["hidden_states"], "pooled_prompt_embeds": y["pooled"]}
    null = {
        "negative_prompt_embeds": torch.zeros_like(y["hidden_states"]),
        "negative_pooled_prompt_embeds": torch.zeros_like(y["pooled"]),
    }
    run = lambda **kw: trajectory(pipe, x["latents"], x["time_ids"], **kw)  # noqa: E731
    stages, _ = run(**text, **null)
    y["trajectory"] = whole_steps(pipe, stages)
    if pipe.scheduler.order == 2:
        y["trajectory_stages"] = stages
    extras = fx["extras"]
    if "rescale" in extras:
        y["trajectory_rescale"] = whole_steps(pipe, run(**text, **null, guidance_rescale=0.7)[0])
    if "plain" in extras:
        y["trajectory_plain"] = whole_steps(pipe, run(**text, guidance=1.0)[0])
    if "negative" in extras:
        states, pooled = encode_text(pipe, x["negative_input_ids"], x["negative_input_ids_2"])
        y["negative_hidden_states"], y["negative_pooled"] = states, pooled
        stages, _ = run(**text, negative_prompt_embeds=states, negative_pooled_prompt_embeds=pooled)
        y["trajectory_negative"] = whole_steps(pipe, stages)
    if "eta" in extras and dtype == torch.float32:
        noise = []
        y["trajectory_eta"] = run(**text, **null, eta=1.0, noise=noise)[0]
        y["noise_eta"] = torch.stack(noise, 1)
    if "text" in extras:
        stages, images = run(prompt=PROMPTS, output_type="pt")
        y["trajectory_text"], y["images"] = whole_steps(pipe, stages), images
    return y


def gradients(pipe, x, y, seed):
    unet = pipe.unet
    count = sum(p.numel() for p in unet.parameters())
    assert count < 60_000, count
    target = torch.randn(x["latents"].shape, generator=torch.Generator().manual_seed(seed))
    latents = x["latents"].clone().requires_grad_()
    context = y["hidden_states"].clone().requires_grad_()
    pooled = y["pooled"].clone().requires_grad_()
    unet.zero_grad()
    unet.requires_grad_(True)
    out = unet(
        latents, x["timesteps"], encoder_hidden_states=context,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": x["time_ids"]},
    ).sample
    loss = ((out - target) ** 2).mean()
    loss.backward()
    grads = {"loss": loss.detach()[None], "target": target, "grad_latents": latents.grad,
             "grad_context": context.grad, "grad_pooled": pooled.grad}
    for name, p in unet.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        grads[f"grad.{name}"] = p.grad
    unet.requires_grad_(False)
    return grads, count


# ---------------------------------------------------------------- checks

def rel(a, b):
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def check(fx, name, folder, x, y):
    """Finite and sane; the same after a reload; f32 close to f64; every input matters."""
    for k, v in y.items():
        assert v.isfinite().all(), (name, k)
        assert v.std() < 300 and v.std() > 0.01, (name, k, float(v.std()))
    assert 0.05 < y["noise_pred"].std() < 5 and 0.05 < y["decoded"].std() < 10
    pipe = load_folder(fx, folder)
    with torch.no_grad():
        again = references(fx, pipe, x)
        assert again.keys() == y.keys() and all(torch.equal(again[k], y[k]) for k in y), name
        unet = lambda **kw: pipe.unet(  # noqa: E731
            kw.get("latents", x["latents"]), kw.get("timesteps", x["timesteps"]),
            encoder_hidden_states=kw.get("context", y["hidden_states"]),
            added_cond_kwargs={"text_embeds": kw.get("pooled", y["pooled"]),
                               "time_ids": kw.get("time_ids", x["time_ids"])},
        ).sample
        matters = {
            "timesteps": rel(unet(timesteps=x["timesteps"].roll(1)), y["noise_pred"]),
            "context": rel(unet(context=y["hidden_states"].roll(1, 0)), y["noise_pred"]),
            "pooled": rel(unet(pooled=y["pooled"].roll(1, 0)), y["noise_pred"]),
            "time_ids": rel(unet(time_ids=x["time_ids"].roll(1, 0)), y["noise_pred"]),
            "negative": rel(y.get("trajectory_negative", y["trajectory"] * 0), y["trajectory"]),
        }
        assert min(matters.values()) > 3e-3, (name, matters)
        exact = references(fx, pipe, x, torch.float64)
        errors = {k: rel(y[k], exact[k]) for k in exact}
    assert max(errors.values()) < 1e-5, (name, errors)
    return matters, max(errors.values()), max(errors, key=errors.get)


def contiguous(tensors):
    return {k: v.detach().contiguous().clone() for k, v in tensors.items()}


def scheduler_facts(s, steps):
    s.set_timesteps(steps)
    facts = {"class": type(s).__name__, "steps": steps, "timesteps": [float(t) for t in s.timesteps],
             "init_noise_sigma": float(s.init_noise_sigma)}
    if hasattr(s, "sigmas"):
        facts["sigmas"] = [float(v) for v in s.sigmas]
    return facts


def dump(path, value):
    lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
    path.write_text(f"{{\n{lines}\n}}\n")


def write_fixture(name, fx, out, scratch):
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_folder(fx, build_pipeline(fx, scratch), folder)
    pipe = load_folder(fx, folder)
    x = make_inputs(fx)
    if "negative" not in fx["extras"]:
        x = {k: v for k, v in x.items() if not k.startswith("negative")}
    with torch.no_grad():
        y = references(fx, pipe, x)
    matters, worst, where = check(fx, name, folder, x, y)
    save_file(contiguous({**x, **y}), folder / "reference.safetensors")
    u = fx["unet"]
    facts = {
        "dtype": fx["dtype"], "steps": STEPS, "guidance": GUIDANCE,
        "unet_parameters": sum(p.numel() for p in pipe.unet.parameters()),
        "scheduler": scheduler_facts(pipe.scheduler, STEPS),
        "f32_against_f64": {"worst": worst, "of": where},
        "prompts": PROMPTS[: fx["batch"]] if "text" in fx["extras"] else None,
    }
    dump(folder / "reference.json", facts)
    if "grads" in fx["extras"]:
        grads, _ = gradients(load_folder(fx, folder), x, y, fx["seed"])
        save_file(contiguous(grads), folder / "grads.safetensors")
    if "schedulers" in fx["extras"]:
        tensors, listing = {}, {}
        for key, (cls, options, steps) in SCHEDULERS.items():
            scheduler = cls(**SD, **options)
            null = {"negative_prompt_embeds": torch.zeros_like(y["hidden_states"]),
                    "negative_pooled_prompt_embeds": torch.zeros_like(y["pooled"])}
            with torch.no_grad():
                stages, _ = trajectory(pipe, x["latents"][:1], x["time_ids"], steps=steps, scheduler=scheduler,
                                       prompt_embeds=y["hidden_states"], pooled_prompt_embeds=y["pooled"], **null)
            tensors[key] = whole_steps(pipe, stages, steps)
            # With zero terminal SNR, Euler starts at sigma 4096.
            limit = 20_000 if "zero_snr" in key else 300
            assert tensors[key].isfinite().all() and tensors[key].std() < limit, (key, float(tensors[key].std()))
            config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
            config["_class_name"] = cls.__name__
            listing[key] = {"config": config, **scheduler_facts(scheduler, steps)}
        save_file(contiguous(tensors), folder / "schedulers.safetensors")
        dump(folder / "schedulers.json", listing)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    std = {k: round(float(y[k].std()), 3) for k in ("hidden_states", "pooled", "noise_pred", "decoded", "encoded_mean",
                                                    "encoded_std")}
    final = float(y["trajectory"][-1].std())
    print(f"{name}: {size / 1024:.0f} KiB, U-Net {facts['unet_parameters']} params {u['block_out_channels']}, "
          f"std {std}, trajectory end {final:.2f}, f32 vs f64 {worst:.1e} ({where}), "
          f"matters { {k: round(v, 3) for k, v in matters.items()} }", flush=True)
    return size


# ---------------------------------------------------------------- tokenizer fixture

TRICKY = [
    "", " ", "a red circle", "A RED Circle", "a  red\t circle \n", "a red circle.", "a red circle, a blue square!",
    "!!!", "! a !", "red-blue", "red/blue & (green)", "3 circles", "12345 stars", "1st 2nd circle2", "don't", "it's they've I'M we'll he'd",
    "'s", "\u2019s quoted \u201cring\u201d", "caf\u00e9 na\u00efve \u00c9T\u00c9", "cafe\u0301", "\u00fcber stra\u00dfe \u0130stanbul \u01c5",
    "\U0001f600 star \U0001f468\u200d\U0001f469\u200d\U0001f467", "\u4e00\u4e8c\u4e09 \u3042\u30a2 \uac00", "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "a\u00a0red\u3000ring\u200bx", "\u00b2 \u00bd \u2167 \u0663 x\u00b3", "a_b__c", "<|endoftext|>", "a <|startoftext|> ring<|endoftext|>star",
    "circles circlesquare starsheart", "supercalifragilisticexpialidocious", "\u0000\u0001\u007f",
    "one large striped purple triangle and two small dotted yellow hearts above three plain green rings left of four white stars below a black square",
    "word " * 100, "a" * 300, "https://example.com/?q=red+ring#1", "$5.00 @home 100% ~^*",
]


def write_tokenizer_fixture(folder):
    shutil.rmtree(folder, ignore_errors=True)
    cases = []
    toks = {}
    for part, pad in (("tokenizer", EOS), ("tokenizer_2", "!")):
        write_tokenizer(folder / part, pad)
        toks[part] = CLIPTokenizer.from_pretrained(folder / part)
    for text in TRICKY:
        case = {"text": text}
        for part, tok in toks.items():
            case[part] = {
                str(n): tok(text, padding="max_length", max_length=n, truncation=True).input_ids for n in (24, 77)
            }
            assert all(len(v) == int(n) for n, v in case[part].items())
        cases.append(case)
    assert all(toks["tokenizer"](w).input_ids[1:-1] == [i] for w, i in
               ((w, toks["tokenizer"].get_vocab()[w + "</w>"]) for w in ("circle", "striped", "above", "a")))
    lines = ",\n".join(" " + json.dumps(c, ensure_ascii=True) for c in cases)
    (folder / "expected.json").write_text(f"[\n{lines}\n]\n")
    print(f"tokenizer: {len(cases)} texts")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("tests/fixtures/parity"))
    p.add_argument("--only", help="comma-separated fixture names")
    args = p.parse_args()
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        names = args.only.split(",") if args.only else list(FIXTURES)
        total = sum(write_fixture(n, FIXTURES[n], args.out, Path(scratch)) for n in names)
    write_tokenizer_fixture(args.out.parent / "tokenizer")
    print(f"total {total / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
