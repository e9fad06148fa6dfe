"""The scene world's CLIP-format BPE tokenizer.

    from scene_tokenizer import write_tokenizer
    write_tokenizer("models/tiny/tokenizer", "<|endoftext|>")     # text tower 1
    write_tokenizer("models/tiny/tokenizer_2", "!")               # text tower 2

or `python tools/scene_tokenizer.py DIR [PAD_TOKEN]`. Needs only the standard library.

The layout is CLIP's: ids 0..255 are the byte symbols in CLIP's order (so "!" is
0), 256..511 the same symbols with "</w>", then one id per merge, then
<|startoftext|> and <|endoftext|> (the last, hence the largest, id). Every word
of WORDS is one token; any other text falls back to byte pairs, so nothing is
ever unknown. The result is deterministic: same words, same files.

As in SDXL's own tokenizer_2, a pad token of "!" is a *special* token: a "!" in
a prompt then becomes id 0 (no "</w>"), wherever it stands.
"""

import json
import sys
from collections import Counter
from pathlib import Path

MODEL_MAX_LENGTH = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

SHAPES = ["circle", "square", "triangle", "star", "heart", "ring"]
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
WORDS = (
    ["a", "an", "the", "and", "of", "on", "with", "to", "in", "is", "are", "no", "not"]
    + ["left", "right", "above", "below", "next", "beside", "between", "over", "under", "near"]
    + ["one", "two", "three", "four"]
    + SHAPES
    + [s + "s" for s in SHAPES]
    + COLOURS
    + ["gray", "grey", "pink", "brown", "cyan", "beige", "light", "dark"]
    + ["plain", "striped", "dotted", "solid", "stripes", "dots"]
    + ["large", "small", "big", "tiny", "larger", "smaller", "than"]
    + ["background", "picture", "image", "scene", "shape", "shapes", "object", "objects"]
    + ["top", "bottom", "center", "corner", "side"]
)


def byte_symbols():
    """CLIP's byte alphabet: byte -> printable character, in CLIP's id order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def merge_word(symbols, pair):
    out, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def bpe(word, ranks):
    """Plain BPE of one word (byte symbols), for checking."""
    symbols = list(word[:-1]) + [word[-1] + "</w>"]
    while len(symbols) > 1:
        pair = min(zip(symbols, symbols[1:]), key=lambda p: ranks.get(p, len(ranks)))
        if pair not in ranks:
            break
        symbols = merge_word(symbols, pair)
    return symbols


def learn_merges(words):
    """Ordinary BPE training on the word list, until every word is one token."""
    split = [list(w[:-1]) + [w[-1] + "</w>"] for w in words]
    merges = []
    while True:
        pairs = Counter(p for s in split for p in zip(s, s[1:]))
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        split = [merge_word(s, best) for s in split]
    ranks = {p: i for i, p in enumerate(merges)}
    bad = [w for w in words if len(bpe(w, ranks)) != 1]
    assert not bad, f"not single tokens: {bad}"
    return merges


def build(words=WORDS):
    """(vocab: token -> id, merges: list of pairs)."""
    words = list(dict.fromkeys(words))
    merges = learn_merges(words)
    symbols = list(byte_symbols().values())
    tokens = symbols + [s + "</w>" for s in symbols]
    tokens += dict.fromkeys("".join(m) for m in merges)
    tokens += [BOS, EOS]
    vocab = {t: i for i, t in enumerate(tokens)}
    assert len(vocab) == len(tokens) and vocab["!"] == 0
    return vocab, merges


def write_tokenizer(directory, pad_token=EOS, model_max_length=MODEL_MAX_LENGTH):
    """Writes vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json.

    pad_token: "<|endoftext|>" for the first tower, "!" (id 0) for the second.
    Returns the vocabulary.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocab, merges = build()
    assert pad_token in vocab

    def dump(name, value):
        text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
        (directory / name).write_text(text, encoding="utf-8")

    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2"] + [f"{a} {b}" for a, b in merges]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def special(content):
        flags = {"lstrip": False, "normalized": content != "!", "rstrip": False, "single_word": False}
        return {"content": content, **flags}

    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token}
    dump("special_tokens_map.json", {k: special(v) if k != "pad_token" else v for k, v in names.items()})
    added = {vocab[v]: {**special(v), "special": True} for v in sorted(set(names.values()), key=vocab.get)}
    dump(
        "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(i): t for i, t in added.items()},
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": model_max_length,
            "tokenizer_class": "CLIPTokenizer",
            **names,
        },
    )
    return vocab


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    v = write_tokenizer(sys.argv[1], *sys.argv[2:3])
    print(f"{len(v)} tokens -> {sys.argv[1]}")
