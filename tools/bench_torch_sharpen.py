"""The training steps of Diffusion-Sharpening that tools/bench_torch.py measures, in PyTorch.

Both loops are this project's own, with diffusers' networks and scheduler, peft's LoRA and transformers'
CLIP, eager, on the CPU in f32 or on a GPU. In bf16 or f16 it is mixed precision, as in diffusers' training
scripts: networks that learn nothing have weights of that type, the adapter f32 ones, and U-Nets run under
autocast; the scorer, latents and losses are f32. They take their inputs (clean latents or the noise that
images are generated from, noises, timesteps, encoded texts, the adapter) from what `ds-bench
sharpen-step` wrote (docs/parity.md), so that their gradients can be compared with Rust's (`agreement`).

A step: 4 groups of n = 3 trajectories of m = 3 states, DDIM's steps of 25, no guidance; RLHF first
generates the 12 images in 25 steps. Every clean-image estimate is decoded, rounded to 8 bits and scored
by the scene CLIP. SFT learns from the best trajectory of a group, RLHF from the best against the worst
(DPO, with the reference at the same states). Then gradients are clipped and AdamW makes its step.

`Plain` is built as the method's released scripts are:
  - one group at a time, gradients accumulated over the groups; within it n rows at a time;
  - every state of every trajectory goes through the network once, with a graph; the loss that was
    chosen is then taken backward, and as the n rows share their passes, the losers' rows go
    backward too, with zeros;
  - the VAE decodes estimates that have a graph, so that it keeps one itself, though nothing flows back;
  - the caption goes through the scorer's text tower with each call;
  - the frozen reference (RLHF) sees every state of every trajectory, as it does in `ds-train`. The
    released scripts run it at each trajectory's first state only: 12 forwards where these are 36;
  - images are generated without gradients, n at a time, the adapter not merged.
It spares PyTorch what those scripts do badly beyond that: images do not go through PIL and are not
scored one by one, the reference's weights are not a second copy in memory, and frozen weights get no
gradient. Gradients do not go through the sampler's steps, which those scripts do at the same cost:
so the gradients are those of Rust.

`Careful` (names that end in _careful) is what someone who knows all that would write: two passes,
the first without graphs, over all groups at once, on a network with the adapter merged; reference
and gradients for the chosen trajectories alone; scored texts encoded once. Its ratio to Rust is that of
the implementations, Plain's also that of the method's bookkeeping.

`sharpen_rlhf_full` and `_full_replay` are Plain with every weight of the U-Net trained instead of an adapter:
f32 weights under autocast, gradient checkpoints (which those scripts need too), and a frozen copy as the
reference. They start from the same inputs, but at the checkpoint itself, and their gradients are not compared.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Piece:
    """What of a step is done: `generates` its images itself, and `learns` from images. `full`: every
    weight is trained."""

    method: str
    generates: bool
    learns: bool
    careful: bool = False
    full: bool = False

    @property
    def part(self):
        """The name of its planned cost."""
        return "rollouts" if not self.learns else "whole" if self.generates or self.method == "sft" else "replay"


PLAIN = {
    "sharpen_sft_lora": Piece("sft", generates=False, learns=True),
    "sharpen_rlhf_lora": Piece("rlhf", generates=True, learns=True),
    "sharpen_rlhf_rollouts": Piece("rlhf", generates=True, learns=False),
    "sharpen_rlhf_lora_replay": Piece("rlhf", generates=False, learns=True),
}
CAREFUL = "_careful"
ADAPTED = PLAIN | {name + CAREFUL: replace(piece, careful=True) for name, piece in PLAIN.items()}
SHARPEN = ADAPTED | {
    "sharpen_rlhf_full": Piece("rlhf", generates=True, learns=True, full=True),
    "sharpen_rlhf_full_replay": Piece("rlhf", generates=False, learns=True, full=True),
}


def counterpart(name):
    """What Rust calls the piece."""
    return name.removesuffix(CAREFUL)


# ---------------------------------------------------------------- what both sides get

class Given:
    """A step's inputs, choices and gradients as Rust wrote them, on `device`."""

    def __init__(self, folder, method, device="cpu"):
        from safetensors import safe_open

        with safe_open(Path(folder) / f"{method}.safetensors", "pt") as file:
            self.tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}
            self.about = json.loads(file.metadata()["step"])
        # Where nothing has to wait for them.
        self.tensors["timesteps"] = self.tensors["timesteps"].cpu()
        self.groups, self.n = self.tensors["renoise"].shape[:2]
        self.picks = list(zip(self["best"].tolist(), self["worst"].tolist()))

    def __getitem__(self, name):
        return self.tensors[name]

    def matrices(self, kind):
        """Of the adapter (`adapter`) or its gradients (`gradient`): MODULE.down and MODULE.up."""
        prefix = kind + "."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


class Clip:
    """The reward: cosine of image and caption by the checkpoint's scene CLIP."""

    def __init__(self, folder, device):
        import torch
        from transformers import CLIPModel, CLIPTokenizer

        self.torch, self.device = torch, device
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        about = json.loads((Path(folder) / "preprocessor_config.json").read_text())
        self.mean, self.std = (
            torch.tensor(about[key], device=device)[:, None, None] for key in ("image_mean", "image_std")
        )

    def ids(self, prompts):
        length = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True,
                              return_tensors="pt").input_ids.to(self.device)

    def pixels(self, images):
        """The tower's input of decoded images, about [-1, 1], by way of 8 bits."""
        torch, side = self.torch, self.model.config.vision_config.image_size
        bits = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
        if bits.shape[-2:] != (side, side):
            bits = torch.nn.functional.interpolate(bits, (side, side), mode="bicubic", antialias=True)
            bits = bits.round().clamp(0, 255)
        return (bits / 255 - self.mean) / self.std

    def texts(self, prompts):
        """Unit vectors."""
        embedded = self.model.text_projection(self.model.text_model(self.ids(prompts)).pooler_output)
        return embedded / embedded.norm(dim=-1, keepdim=True)

    def images(self, images):
        """Unit vectors."""
        embedded = self.model.visual_projection(self.model.vision_model(self.pixels(images)).pooler_output)
        return embedded / embedded.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------- the loops

class Loop:
    """Networks, adapter and optimiser of a step."""

    def __init__(self, workload, given, full=False):
        import diffusers

        self.torch, self.workload, self.given = workload.torch, workload, given
        scheduler = diffusers.DDIMScheduler.from_config(workload.pipe.scheduler.config, clip_sample=False)
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError("steps of sharpening are compared on models that predict noise")
        self.scheduler = scheduler
        self.scheduler.set_timesteps(given.about["rollout_steps"])
        self.reference = workload.unet.requires_grad_(False)
        self.vae = workload.vae.requires_grad_(False)
        self.clip = Clip(workload.folder / "scene_clip", workload.device)
        self.policy = self.network()
        if full:
            self.train_all()
        else:
            self.adapt()
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = self.torch.optim.AdamW(self.parameters, lr=given.about["lr"], weight_decay=0.0)

    def network(self):
        """A U-Net with the checkpoint's weights, in the same memory."""
        unet = self.workload.unet
        with self.torch.device("meta"):
            made = type(unet).from_config(unet.config)
        made.load_state_dict(unet.state_dict(), assign=True)
        made.register_forward_pre_hook(self.workload.count, with_kwargs=True)
        return made.requires_grad_(False).eval()

    def adapt(self):
        """Puts the given adapter into the policy."""
        from peft import LoraConfig

        matrices = self.given.matrices("adapter")
        self.modules = sorted({name.rsplit(".", 1)[0] for name in matrices})
        rank = matrices[f"{self.modules[0]}.down"].shape[0]
        self.policy.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=self.modules))
        with self.torch.no_grad():
            for name, parameter in self.adapter().items():
                # peft gives an adapter the type of its layer.
                parameter.data = matrices[name].clone()

    def train_all(self):
        """Makes every weight of the policy its own, in f32, and trained."""
        for parameter in self.policy.parameters():
            parameter.data = parameter.detach().to(self.torch.float32, copy=True)
        self.policy.requires_grad_(True)
        self.policy.enable_gradient_checkpointing()

    def adapter(self):
        """The policy's factors under Rust's names."""
        named = {}
        for name in self.modules:
            layer = self.policy.get_submodule(name)
            named[f"{name}.down"] = layer.lora_A["default"].weight
            named[f"{name}.up"] = layer.lora_B["default"].weight
        return named

    def predict(self, unet, x, t, groups):
        """Predictions for rows of these groups; `t` one number, or one a row."""
        given = self.given
        cond = {"text_embeds": given["pooled"][groups], "time_ids": given["time_ids"][groups]}
        with self.mixed():
            return unet(x, t, encoder_hidden_states=given["context"][groups], added_cond_kwargs=cond,
                        return_dict=False)[0].float()

    def mixed(self):
        """Autocast, where the numbers are not f32."""
        w = self.workload
        return nullcontext() if w.dtype == self.torch.float32 else self.torch.autocast(w.device.type, w.dtype)

    def rollout(self, unet, noise, groups):
        """Images' latents from unit noise, rows of these groups."""
        with self.torch.no_grad():
            x = noise
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.predict(unet, x, t, groups), t, x).prev_sample
        return x

    def errors(self, predicted, noise):
        """Mean squared error of each row."""
        return (predicted - noise).square().flatten(1).mean(1)

    def loss(self, best, worst):
        """Of a group, from (policy's, reference's) errors of its best and its worst trajectory."""
        if self.given.about["method"] == "sft":
            return best[0]
        delta = (best[1] - best[0]) - (worst[1] - worst[0])
        return -self.torch.nn.functional.logsigmoid(self.given.about["beta"] * delta)

    def begin(self):
        """What a step begins with."""

    def once(self, piece, picks=None):
        """What the piece does, short of the optimiser: the images' latents, and the scores [G, n]."""
        self.begin()
        clean = self.generate() if piece.generates else self.given["clean"]
        return clean, self.learn(clean, picks) if piece.learns else None

    def step(self, piece):
        clean, scores = self.once(piece)
        if scores is not None:
            self.torch.nn.utils.clip_grad_norm_(self.parameters, self.given.about["clip"])
            self.optimizer.step()
            self.optimizer.zero_grad()
        return clean


class Plain(Loop):
    """One group after the other, everything with a graph."""

    def generate(self):
        rows = [self.rollout(self.policy, self.given["noise"][g], [g] * self.given.n) for g in range(self.given.groups)]
        return self.torch.stack(rows)

    def learn(self, clean, picks=None):
        return self.torch.stack([
            self.learn_group(g, clean[g], picks and picks[g]) for g in range(self.given.groups)
        ])

    def learn_group(self, g, clean, pick):
        """Adds the gradients of a group; its trajectories' scores."""
        torch, given = self.torch, self.given
        noise, t, rows = given["renoise"][g], given["timesteps"][g], [g] * given.n
        x = self.scheduler.add_noise(clean, noise, t)
        scores, errors, of_reference = [], [], []
        for k in range(given.about["m"]):
            at = t - k * int(given.about["stride"])
            predicted = self.predict(self.policy, x, at, rows)
            errors.append(self.errors(predicted, noise))
            if given.about["method"] == "rlhf":
                with torch.no_grad():
                    of_reference.append(self.errors(self.predict(self.reference, x, at, rows), noise))
            moved = self.scheduler.step(predicted, at, x)
            scores.append(self.score(self.workload.decoded(moved.pred_original_sample), given.about["prompts"][g]))
            x = moved.prev_sample.detach()
        scores = torch.stack(scores).mean(0)
        best, worst = pick or (scores.argmax().item(), scores.argmin().item())
        policy = torch.stack(errors).mean(0)
        reference = torch.stack(of_reference).mean(0) if of_reference else policy.detach()
        loss = self.loss((policy[best], reference[best]), (policy[worst], reference[worst]))
        (loss / given.groups).backward()
        return scores

    def score(self, images, prompt):
        with self.torch.no_grad():
            return (self.clip.images(images) * self.clip.texts([prompt])).sum(-1)


class Careful(Loop):
    """Two passes, all groups at once."""

    def __init__(self, workload, given):
        super().__init__(workload, given)
        self.actor = self.network()
        for name in self.modules:
            # The others stay in the checkpoint's memory.
            module = self.actor.get_submodule(name)
            module.weight = self.torch.nn.Parameter(module.weight.clone(), requires_grad=False)
        with self.torch.no_grad():
            self.captions = self.clip.texts(given.about["prompts"])
        self.rows = [g for g in range(given.groups) for _ in range(given.n)]

    def begin(self):
        """Merges the adapter as it is."""
        with self.torch.no_grad():
            for name in self.modules:
                layer = self.policy.get_submodule(name)
                change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                merged = layer.base_layer.weight + layer.scaling["default"] * change
                self.actor.get_submodule(name).weight.copy_(merged)

    def generate(self):
        noise = self.given["noise"]
        return self.rollout(self.actor, noise.flatten(0, 1), self.rows).view_as(noise)

    def abar(self, t):
        """ᾱ of each row."""
        return self.scheduler.alphas_cumprod.to(t.device)[t][:, None, None, None]

    def chains(self, clean, noise, t):
        """(timesteps, states, clean-image estimates) of every level."""
        about, levels = self.given.about, []
        x = self.scheduler.add_noise(clean, noise, t)
        for _ in range(about["m"]):
            predicted, abar = self.predict(self.actor, x, t, self.rows), self.abar(t)
            estimate = (x - (1 - abar).sqrt() * predicted) / abar.sqrt()
            levels.append((t, x, estimate))
            t = t - int(about["stride"])
            if (t >= 0).all():
                abar = self.abar(t)
                x = abar.sqrt() * estimate + (1 - abar).sqrt() * predicted
        return levels

    def learn(self, clean, picks=None):
        torch, given = self.torch, self.given
        noise = given["renoise"].flatten(0, 1)
        t = given["timesteps"].repeat_interleave(given.n).to(noise.device)
        with torch.no_grad():
            levels = self.chains(clean.flatten(0, 1), noise, t)
            latents = torch.cat([estimate for _, _, estimate in levels])
            captions = self.captions[self.rows].repeat(len(levels), 1)
            size = given.about["decode_batch"]
            scores = torch.cat([
                (self.clip.images(self.workload.decoded(z)) * text).sum(-1)
                for z, text in zip(latents.split(size), captions.split(size))
            ]).view(len(levels), given.groups, given.n).mean(0)
        picks = picks or list(zip(scores.argmax(1).tolist(), scores.argmin(1).tolist()))
        # A GPU's memory is filled by the graph of few.
        micro = given.about["micro"] if noise.device.type == "cpu" else 1
        for first in range(0, given.groups, micro):
            self.learn_groups(range(first, min(first + micro, given.groups)), picks, levels, noise)
        return scores

    def learn_groups(self, groups, picks, levels, noise):
        """Adds the gradients of these groups."""
        torch, given = self.torch, self.given
        pairs = given.about["method"] == "rlhf"
        chosen = [(g, row) for g in groups for row in picks[g][: 1 + pairs]]
        index = [g * given.n + row for g, row in chosen]
        x, t = (torch.cat([level[what][index] for level in levels]) for what in (1, 0))
        rows, noise = [g for g, _ in chosen] * len(levels), noise[index].repeat(len(levels), 1, 1, 1)

        def means(unet):
            errors = self.errors(self.predict(unet, x, t, rows), noise)
            return errors.view(len(levels), len(groups), 1 + pairs).mean(0)

        with torch.no_grad():
            reference = means(self.reference) if pairs else torch.zeros(len(groups), 1, device=x.device)
        policy = means(self.policy)
        losses = self.loss((policy[:, 0], reference[:, 0]), (policy[:, -1], reference[:, -1]))
        (losses.sum() / given.groups).backward()


def loop(piece, workload, given):
    return Careful(workload, given) if piece.careful else Plain(workload, given, piece.full)


def prepare(piece, workload, folder):
    """What does the piece once."""
    one = loop(piece, workload, Given(folder, piece.method, workload.device))
    return lambda: one.step(piece)


# ---------------------------------------------------------------- whether both do the same

def agreement(workload, folder, names):
    """How each learning piece's gradients and choices agree with Rust's, and what it is to cost.

    Gradients are of Rust's choices: trajectories with nearly the same score may change places.
    """
    found = {}
    for name in names:
        piece = SHARPEN.get(name)
        if piece is None:
            continue
        given = Given(folder, piece.method, workload.device)
        found[name] = {"planned": given.about["planned"][piece.part]}
        if not piece.learns or piece.full:
            continue
        one = loop(piece, workload, given)
        clean, scores = one.once(piece, given.picks)
        own = zip(scores.argmax(1).tolist(), scores.argmin(1).tolist())
        used = 2 if piece.method == "rlhf" else 1
        same = sum(mine[:used] == theirs[:used] for mine, theirs in zip(own, given.picks))
        cosine, ratio = compared(one, given)
        found[name] |= {
            "cosine": cosine, "norm_ratio": ratio, "same_choice": same, "groups": given.groups,
            "clean_error": ((clean - given["clean"]).norm() / given["clean"].norm()).item(),
            "score_error": (scores - given["scores"]).abs().max().item(),
        }
    return found


def compared(one, given):
    """Cosine of all gradients together with Rust's, and the ratio of their norms."""
    theirs = given.matrices("gradient")
    ours = {name: parameter.grad for name, parameter in one.adapter().items()}
    a, b = (one.torch.cat([side[name].double().flatten() for name in theirs]) for side in (ours, theirs))
    return (a @ b / (a.norm() * b.norm())).item(), (a.norm() / b.norm()).item()
