"""A small random CLIPModel and its embeddings, for `tests/clip.rs`.

    pip install torch transformers safetensors
    python tools/clip_fixture.py --out tests/fixtures/clip
"""
import argparse
import json
import os

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from scene_tokenizer import write_tokenizer

TEXTS = ["a red circle", "three striped blue hearts", "a dotted star above a ring", ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="tests/fixtures/clip")
    out = parser.parse_args().out
    os.makedirs(out, exist_ok=True)
    write_tokenizer(out, "<|endoftext|>")
    tokenizer = CLIPTokenizer.from_pretrained(out)
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
                max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                projection_dim=12, hidden_act="gelu")
    vision = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, image_size=16,
                  patch_size=4, projection_dim=12)
    torch.manual_seed(5)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * (0.3 if p.dim() < 2 else 0.15))
            p.copy_(p.half().float())
        images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
        mean, std = [0.4, 0.5, 0.6], [0.3, 0.25, 0.2]
        x = (images.permute(0, 3, 1, 2).float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        ids = tokenizer(TEXTS, padding="max_length", max_length=24, truncation=True, return_tensors="pt").input_ids
        result = model(input_ids=ids, pixel_values=x)
    model.half().save_pretrained(out)
    with open(os.path.join(out, "preprocessor_config.json"), "w") as f:
        json.dump({"image_mean": mean, "image_std": std}, f)
    with open(os.path.join(out, "texts.json"), "w") as f:
        json.dump(TEXTS, f)
    save_file({"images": images, "image_embeds": result.image_embeds.contiguous(),
               "text_embeds": result.text_embeds.contiguous()}, os.path.join(out, "reference.safetensors"))


if __name__ == "__main__":
    main()
