"""Pre-trains the shipped model `models/tiny` on the scene world with PyTorch and diffusers.

    pip install torch diffusers transformers safetensors pillow
    cargo run --release --bin ds-train -- export-scenes --out work/train.safetensors --count 40000
    cargo run --release --bin ds-train -- export-scenes --out work/val.safetensors --split validation --count 2000 --seed 1
    python tools/pretrain.py vae    --work work --steps 2400
    python tools/pretrain.py decoder --work work --steps 300
    python tools/pretrain.py base   --work work --steps 2300
    python tools/pretrain.py clip   --work work --steps 1200
    python tools/pretrain.py export --work work --out models/tiny
    python tools/pretrain.py evaluate-clip --work work
    python tools/pretrain.py reconstruct --work work
    cargo run --release --bin ds-train -- judge --images work/reconstructed.safetensors --captions work/reconstructed.jsonl

Every stage writes `work/<stage>.pt` (temporary file, then rename) every 200 steps
and resumes from it. `--device cuda` runs the same recipe on a GPU.
"""
import argparse
import json
import math
import os
import shutil
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from scene_tokenizer import write_tokenizer

TEXT_LENGTH = 24
VAE_CONFIG = dict(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32, 64),
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1, norm_num_groups=8, sample_size=64, force_upcast=False,
)
UNET_CONFIG = dict(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 96, 128),
    layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 3, 4), norm_num_groups=16,
    cross_attention_dim=192, use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=32, projection_class_embeddings_input_dim=128 + 6 * 32,
)
TEXT_1 = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
              hidden_act="quick_gelu", projection_dim=64)
TEXT_2 = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
              hidden_act="gelu", projection_dim=128)
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                 prediction_type="epsilon", timestep_spacing="leading", steps_offset=1)


def scenes(path):
    """Images u8 [N, H, W, 3] and the captions beside them."""
    lines = [json.loads(line) for line in open(os.path.splitext(path)[0] + ".jsonl")]
    return load_file(path)["images"], [line["text"] for line in lines], [line["category"] for line in lines]


def to_float(images, device):
    return images.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def save(state, path):
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)


def cosine_lr(step, steps, peak, warm=100):
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


class Run:
    """The loop that all stages share: learning rate, clipping, EMA, log, checkpoint, resume."""

    def __init__(self, name, args, modules, peak_lr, ema_decay=0.999, weight_decay=0.0):
        self.name, self.args, self.modules, self.peak = name, args, modules, peak_lr
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak_lr, betas=(0.9, 0.99),
                                           weight_decay=weight_decay, fused=True)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.decay, self.start, self.path = ema_decay, 0, os.path.join(args.work, name + ".pt")
        if os.path.exists(self.path):
            state = torch.load(self.path, map_location=args.device)
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema = [e.to(args.device) for e in state["ema"]]
            self.start = state["step"]

    def checkpoint(self, step):
        save({"modules": {k: m.state_dict() for k, m in self.modules.items()}, "ema": self.ema,
              "optimizer": self.optimizer.state_dict(), "step": step}, self.path)

    def use_ema(self):
        for p, e in zip(self.parameters, self.ema):
            p.data.copy_(e)

    def train(self, loss_of):
        began, average = time.time(), None
        for step in range(self.start, self.args.steps):
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
            for group in self.optimizer.param_groups:
                group["lr"] = cosine_lr(step, self.args.steps, self.peak)
            loss, extra = loss_of(step, generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            if not torch.isfinite(norm):
                print(f"step {step}: non-finite gradient, skipped", flush=True)
                continue
            self.optimizer.step()
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            if step % 50 == 0 or step + 1 == self.args.steps:
                rate = (step + 1 - self.start) / (time.time() - began)
                left = (self.args.steps - step - 1) / max(rate, 1e-9) / 60
                print(f"{self.name} step {step} loss {average:.5f} {extra} {1 / rate:.2f} s/step, {left:.0f} min left",
                      flush=True)
            if (step + 1) % 200 == 0 or step + 1 == self.args.steps:
                self.checkpoint(step + 1)


def make_vae(args):
    from diffusers import AutoencoderKL
    torch.manual_seed(args.seed)
    return AutoencoderKL(**VAE_CONFIG).to(args.device, memory_format=torch.channels_last)


def train_vae(args):
    images, _, _ = scenes(os.path.join(args.work, "train.safetensors"))
    vae = make_vae(args)
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    run = Run("vae", args, {"vae": vae}, args.lr or 2e-3)

    def loss_of(step, generator):
        index = torch.randint(len(images), (args.batch or 16,), generator=generator)
        x = to_float(images[index], args.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        # Object pixels are few, so they weigh more: distance from the image's own row-wise background.
        background = x.median(dim=3, keepdim=True).values
        weight = 1.0 + 3.0 * ((x - background).abs().amax(1, keepdim=True) > 0.12)
        error = (weight * (y - x) ** 2).mean() + 0.1 * (weight * (y - x).abs()).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error + 1e-5 * kl, f"mse {F.mse_loss(y, x).item():.5f} kl {kl.item():.2f}"

    run.train(loss_of)


def freeze_encoder(vae):
    """Latents stay what the base model was trained on."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


def load_vae(args):
    vae = make_vae(args)
    Run("vae", args, {"vae": vae}, 1e-3).use_ema()
    if os.path.exists(os.path.join(args.work, "decoder.pt")):
        freeze_encoder(vae)
        Run("decoder", args, {"vae": vae}, 1e-3).use_ema()
    return vae.eval().requires_grad_(False)


def train_decoder(args):
    """Sharpens the decoder on a frozen encoder: half of each batch shows textures, and
    differences between neighbouring pixels count too."""
    images, texts, _ = scenes(os.path.join(args.work, "train.safetensors"))
    textured = torch.tensor([i for i, t in enumerate(texts) if "dotted" in t or "striped" in t])
    vae = make_vae(args)
    Run("vae", args, {"vae": vae}, 1e-3).use_ema()
    freeze_encoder(vae)
    run = Run("decoder", args, {"vae": vae}, args.lr or 1e-3)

    def loss_of(step, generator):
        half = (args.batch or 16) // 2
        index = torch.cat([torch.randint(len(images), (half,), generator=generator),
                           textured[torch.randint(len(textured), (half,), generator=generator)]])
        x = to_float(images[index], args.device)
        with torch.no_grad():
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(x)
        y = vae.decode(z).sample
        error = y - x
        steps = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = 4 * (error ** 2).mean() + error.abs().mean() + 0.5 * steps
        return loss, f"mse {F.mse_loss(y, x).item():.5f}"

    run.train(loss_of)


@torch.no_grad()
def encode_all(vae, images, device, batch=64):
    """Posterior means and standard deviations, f16, unscaled."""
    out = []
    for i in range(0, len(images), batch):
        d = vae.encode(to_float(images[i:i + batch], device)).latent_dist
        out.append(torch.cat([d.mean, d.std], 1).half().cpu())
    return torch.cat(out)


@torch.no_grad()
def reconstruct(args):
    """Validation images through the VAE, for `ds-train judge`."""
    from safetensors.torch import save_file
    images, _, _ = scenes(os.path.join(args.work, "val.safetensors"))
    vae, out = load_vae(args), []
    for i in range(0, len(images), 64):
        y = vae.decode(vae.encode(to_float(images[i:i + 64], args.device)).latent_dist.mean).sample
        out.append(((y.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    path = os.path.join(args.work, "reconstructed.safetensors")
    save_file({"images": torch.cat(out).contiguous()}, path)
    shutil.copy(os.path.join(args.work, "val.jsonl"), os.path.join(args.work, "reconstructed.jsonl"))


def towers(args):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    tokenizer, tokenizer_2 = tokenizers(args)
    common = dict(vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH,
                  bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(args.seed + 1)
    first = CLIPTextModel(CLIPTextConfig(**TEXT_1, **common, pad_token_id=tokenizer.pad_token_id))
    second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2, **common, pad_token_id=tokenizer_2.pad_token_id))
    # The library's initialisation is meant for large widths; a tiny tower learns faster from a larger one.
    for tower in (first, second):
        for name, p in tower.named_parameters():
            if name.endswith("embedding.weight"):
                torch.nn.init.normal_(p, std=0.5 / math.sqrt(p.shape[1]) * 4)
            elif p.dim() == 2:
                torch.nn.init.xavier_uniform_(p)
    return first.to(args.device), second.to(args.device), tokenizer, tokenizer_2


def tokenizers(args):
    from transformers import CLIPTokenizer
    out = []
    for folder, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        path = os.path.join(args.work, folder)
        write_tokenizer(path, pad)
        out.append(CLIPTokenizer.from_pretrained(path))
    return out


def ids(tokenizer, texts):
    return tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").input_ids


def encode_text(first, second, a, b):
    """SDXL's text conditioning: penultimate states of both towers, projected pooled output of the second."""
    h1 = first(a, output_hidden_states=True).hidden_states[-2]
    out = second(b, output_hidden_states=True)
    return torch.cat([h1, out.hidden_states[-2]], -1), out.text_embeds


def train_base(args):
    from diffusers import DDPMScheduler, UNet2DConditionModel
    images, texts, _ = scenes(os.path.join(args.work, "train.safetensors"))
    vae = load_vae(args)
    cache = os.path.join(args.work, "latents.pt")
    if not os.path.exists(cache):
        save(encode_all(vae, images, args.device), cache)
    latents = torch.load(cache)
    std = latents[:, :4].float().std().item()
    scale = 1.0 / std
    print(f"latent std {std:.4f}, scaling factor {scale:.5f}")
    del images
    torch.manual_seed(args.seed + 2)
    unet = UNet2DConditionModel(**UNET_CONFIG).to(args.device)
    first, second, tokenizer, tokenizer_2 = towers(args)
    ids_1, ids_2 = ids(tokenizer, texts), ids(tokenizer_2, texts)
    print(f"unet: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters")
    modules = {"unet": unet, "text_encoder": first, "text_encoder_2": second}
    run = Run("base", args, modules, args.lr or 1e-3, ema_decay=0.999)
    alphas = DDPMScheduler(**{k: v for k, v in SCHEDULER.items()}).alphas_cumprod.to(args.device)
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]], device=args.device)

    def loss_of(step, generator):
        index = torch.randint(len(latents), (args.batch or 48,), generator=generator)
        sample = latents[index].float().to(args.device)
        mean, deviation = sample.chunk(2, 1)
        draw = lambda: torch.randn(mean.shape, generator=generator).to(args.device)
        x0 = (mean + deviation * draw()) * scale
        # A horizontal mirror image would turn left into right, so there is no flip.
        context, pooled = encode_text(first, second, ids_1[index].to(args.device), ids_2[index].to(args.device))
        keep = (torch.rand(len(index), generator=generator) >= 0.1).float().to(args.device)
        context, pooled = context * keep[:, None, None], pooled * keep[:, None]
        t = torch.randint(1000, (len(index),), generator=generator).to(args.device)
        noise = draw()
        a = alphas[t][:, None, None, None]
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        added = {"text_embeds": pooled, "time_ids": time_ids.expand(len(index), -1)}
        prediction = unet(x, t, context, added_cond_kwargs=added).sample
        return F.mse_loss(prediction, noise), ""

    run.train(loss_of)


COLOURS = "red green blue yellow purple orange white black".split()
SHAPES = "circle square triangle star heart ring".split()
TEXTURES = "plain striped dotted".split()
COUNTS = "one two three four".split()
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def wrong_caption(text, pick):
    """The caption with one claim changed; `pick(n)` draws an index below n."""
    words = text.split()
    places = [i for i, w in enumerate(words) if w in OPPOSITE or any(w.rstrip("s") in g for g in (SHAPES, COLOURS, TEXTURES, COUNTS))]
    i = places[pick(len(places))]
    word = words[i]
    if word in OPPOSITE:
        words[i] = OPPOSITE[word]
    elif word in COUNTS:
        # Singular and plural must not give the answer away, so only counts above one are swapped.
        others = [c for c in COUNTS[1:] if c != word] if word != "one" else []
        if others:
            words[i] = others[pick(len(others))]
        else:
            colour = next((k for k in range(i, len(words)) if words[k] in COLOURS), None)
            i, word = (colour, words[colour]) if colour is not None else (i, word)
            words[i] = [c for c in COLOURS if c != word][pick(len(COLOURS) - 1)]
    else:
        stem, plural = (word[:-1], "s") if word.endswith("s") and word[:-1] in SHAPES else (word, "")
        group = next(g for g in (SHAPES, COLOURS, TEXTURES) if stem in g)
        words[i] = [w for w in group if w != stem][pick(len(group) - 1)] + plural
    for i, word in enumerate(words[:-1]):
        if word in ("a", "an"):
            words[i] = "an" if words[i + 1][0] in "aeiou" else "a"
    return " ".join(words)


def make_clip(args, tokenizer):
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(args.seed + 3)
    text = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, projection_dim=96)
    vision = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=64,
                  patch_size=8, projection_dim=96)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=96, logit_scale_init_value=2.6592)
    model = CLIPModel(config)
    for name, p in model.named_parameters():
        if name.endswith("embedding.weight") and p.dim() == 2:
            torch.nn.init.normal_(p, std=0.1)
        elif p.dim() == 2:
            torch.nn.init.xavier_uniform_(p)
    return model.to(args.device)


def train_clip(args):
    images, texts, _ = scenes(os.path.join(args.work, "train.safetensors"))
    tokenizer = tokenizers(args)[0]
    ids_true = ids(tokenizer, texts)
    model = make_clip(args, tokenizer)
    print(f"clip: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    run = Run("clip", args, {"clip": model}, args.lr or 1e-3, weight_decay=0.01)

    def loss_of(step, generator):
        pick = lambda n: int(torch.randint(n, (1,), generator=generator))
        index = torch.randint(len(images), (args.batch or 128,), generator=generator)
        hard = ids(tokenizer, [wrong_caption(texts[i], pick) for i in index.tolist()])
        # Small shifts in brightness and noise, so that the score does not hang on exact pixels.
        x = to_float(images[index], args.device)
        x = x + 0.03 * torch.randn(len(index), 3, 1, 1, generator=generator).to(x)
        x = x + 0.04 * torch.randn(x.shape, generator=generator).to(x)
        out = model(input_ids=torch.cat([ids_true[index], hard]).to(args.device), pixel_values=x)
        logits = out.logits_per_image
        target = torch.arange(len(index), device=args.device)
        # Equal captions in one batch are not wrong answers for each other.
        rows = ids_true[index]
        same = (rows[:, None] == rows[None]).all(-1).fill_diagonal_(False)
        n = len(index)
        to_text = logits.clone()
        to_text[:, :n] = to_text[:, :n].masked_fill(same.to(args.device), -1e4)
        to_image = logits[:, :n].T.masked_fill(same.to(args.device), -1e4)
        loss = 0.5 * (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target))
        accuracy = (to_text.argmax(1) == target).float().mean().item()
        return loss, f"accuracy {accuracy:.3f}"

    run.train(loss_of)


@torch.no_grad()
def evaluate_clip(args):
    """Retrieval on the validation split: 1 of 100 captions, and true against one changed claim."""
    images, texts, _ = scenes(os.path.join(args.work, "val.safetensors"))
    tokenizer = tokenizers(args)[0]
    model = make_clip(args, tokenizer)
    Run("clip", args, {"clip": model}, 1e-3).use_ema()
    model.eval()
    generator = torch.Generator().manual_seed(9)
    pick = lambda n: int(torch.randint(n, (1,), generator=generator))
    hits = pairs = total = 0
    for i in range(0, len(images) - 99, 100):
        group = texts[i:i + 100]
        hard = [wrong_caption(t, pick) for t in group]
        out = model(input_ids=ids(tokenizer, group + hard).to(args.device), pixel_values=to_float(images[i:i + 100], args.device))
        logits = out.logits_per_image
        true = logits.diagonal()
        best = logits[:, :100].argmax(1).tolist()
        hits += sum(group[b] == group[k] for k, b in enumerate(best))
        pairs += (true > logits[:, 100:].diagonal()).sum().item()
        total += 100
    result = {"images": total, "retrieval_1_of_100": hits / total, "true_over_one_changed_claim": pairs / total}
    print(json.dumps(result))
    return result


def export(args):
    """Writes the diffusers folder in f16, with the scene CLIP beside it."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    vae = load_vae(args)
    std = torch.load(os.path.join(args.work, "latents.pt"))[:, :4].float().std().item()
    vae.register_to_config(scaling_factor=round(1.0 / std, 5))
    unet = UNet2DConditionModel(**UNET_CONFIG).to(args.device)
    first, second, tokenizer, tokenizer_2 = towers(args)
    run = Run("base", args, {"unet": unet, "text_encoder": first, "text_encoder_2": second}, 1e-3)
    run.use_ema()
    scheduler = DDIMScheduler(**SCHEDULER, clip_sample=False, set_alpha_to_one=False)
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=first, text_encoder_2=second, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        unet=unet, scheduler=scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False)
    pipe.to("cpu", torch.float16).save_pretrained(args.out, safe_serialization=True)
    # The plain vocabulary and merges, which every CLIP reader understands.
    for folder, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_tokenizer(os.path.join(args.out, folder), pad)
    if os.path.exists(os.path.join(args.work, "clip.pt")):
        clip = make_clip(args, tokenizer)
        Run("clip", args, {"clip": clip}, 1e-3).use_ema()
        folder = os.path.join(args.out, "scene_clip")
        clip.to("cpu", torch.float16).save_pretrained(folder)
        write_tokenizer(folder, "<|endoftext|>")
        with open(os.path.join(folder, "preprocessor_config.json"), "w") as f:
            json.dump({"image_processor_type": "CLIPImageProcessor", "size": 64, "crop_size": 64,
                       "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, f, indent=2)
    print(f"base step {run.start}: written to {args.out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "decoder", "base", "clip", "evaluate-clip", "reconstruct", "export"])
    parser.add_argument("--work", default="work")
    parser.add_argument("--out", default="models/tiny")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    os.makedirs(args.work, exist_ok=True)
    stages = {"vae": train_vae, "decoder": train_decoder, "base": train_base, "clip": train_clip, "evaluate-clip": evaluate_clip,
              "reconstruct": reconstruct, "export": export}
    stages[args.stage](args)


if __name__ == "__main__":
    main()
