"""Writes tests/fixtures/clip_tokens.json: texts and the ids that transformers' CLIPTokenizer gives
them with OpenAI's vocabulary (the merges file of open_clip), for both of SDXL's towers.

    pip install transformers==5.23.0 open_clip_torch
    python tools/tokenizer_fixture.py [MERGES.txt.gz]

Without a path the merges are those of the installed open_clip.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path

from transformers import CLIPTokenizer

OUT = Path(__file__).resolve().parent.parent / "tests/fixtures/clip_tokens.json"

SUBJECTS = ["a photo of a cat", "two dogs playing chess", "an astronaut riding a horse on mars", "the Eiffel Tower at night",
            "a bowl of ramen, steam rising", "portrait of an old fisherman", "cyberpunk street market", "snow-capped mountains",
            "a corgi wearing sunglasses", "isometric voxel castle", "a still life with lemons", "self-portrait"]
STYLES = ["", ", oil painting, 8k, highly detailed", " by Greg Rutkowski, trending on ArtStation", ", 35mm film, bokeh!!!",
          " (masterpiece:1.2), best quality, [blurry]", " -- v 5.2 --ar 16:9", ", award-winning; f/1.8 @ ISO 100", " #nofilter $$$ 100%"]
OTHERS = [
    "", " ", "\n\t ", "a", "A", "!", "!!", "a!b", "wow! great!", "hello world!!!", "I've don't it's we'll they'd you're I'm", "IT'S", "rock'n'roll",
    "'s", "''s", "can''t", "’s don’t", "1234567890", "3.14159", "1,000,000", "x²+y³", "½ cup", "№ 5", "e=mc^2", "C++ & C#", "a_b_c", "snake_case_name",
    "user@example.org", "https://example.org/a?b=c&d=%20", "<b>bold</b>", "<start_of_text>", "hi <start_of_text> there", "<end_of_text>", "!<end_of_text>",
    "<|startoftext|>", "<|endoftext|>", "a<|endoftext|>b", "<|EndOfText|>", "< |endoftext|>", "<|endoftext|", "caf\u00e9", "cafe\u0301", "na\u00efve fa\u00e7ade",
    "Stra\u00dfe \u1e9e", "\u0130stanbul", "\u03a3\u0399\u03a3\u03a5\u03a6\u039f\u03a3", "\u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5\u03a3 \u03c4\u03b7\u03c2", "\u041c\u043e\u0441\u043a\u0432\u0430 \u043d\u043e\u0447\u044c\u044e",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8", "\u4e00\u53ea\u732b\u5750\u5728\u7a97\u53f0\u4e0a", "\ud55c\uad6d\uc5b4 \ubb38\uc7a5", "\u1112\u1161\u11ab", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "I \u2764\ufe0f NY", "\U0001f1eb\U0001f1f7 flag", "a\u00a0b", "a\u2003b", "a\u200bb", "zero\ufeffwidth", "\u2014dash\u2013dash-", "\u201cquotes\u201d", "\u2026and so on...",
    "\u00bfQu\u00e9? \u00a1Hola!", "\u212b \u00c5 A\u030a", "\ufb01ne \ufb02ow", "\u2167 \u24b6", "\uff21\uff22\uff23 \uff11\uff12", "\u01c4 \u01c5 \u01c6", "\u1e2a\u1e96", "tab\tnew\nline\r\nend", "  lead and trail  ", "double  space",
    "ALL CAPS TEXT", "CamelCaseWord", "donaudampfschifffahrtsgesellschaft", "pneumonoultramicroscopicsilicovolcanoconiosis", "aaaaaaaaaaaaaaaaaaaaaaaa", "zzzzqqqqxxxx", "\x00\x01\x7f", "\ufffd", "\U00010348 \U0001d49c",
    "(((nested))) [[[brackets]]] {{{braces}}}", "a|b||c", "~~~", "^^", "``code``", "\\backslash\\", "50\u20ac \u00a310 \u00a5100", "5\u00b0C \u00b12%", "\u2713 \u2717 \u2605", "\u2200x\u2208\u211d",
    "word " * 90, "\u732b" * 60, "! " * 80, "supercalifragilisticexpialidocious " * 12, "a" * 300, "7" * 100,
]


def marker(token):
    """As SDXL's tokenizer_config.json has them: found in a normalised text, so in any case."""
    return {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True, "rstrip": False,
            "single_word": False}


def main():
    if len(sys.argv) > 1:
        merges = Path(sys.argv[1])
    else:
        import open_clip

        merges = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    # CLIP's own rule for its vocabulary: bytes, bytes at a word's end, 48,894 merges, two markers.
    lines = gzip.open(merges, "rt", encoding="utf-8").read().split("\n")[1:49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    single = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    words = single + [c + "</w>" for c in single] + ["".join(line.split()) for line in lines]
    words += ["<|startoftext|>", "<|endoftext|>"]
    texts = [s + style for s in SUBJECTS for style in STYLES] + OTHERS
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        vocab, rules = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        rules.write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
        for pad in ("<|endoftext|>", "!"):
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(
                {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": marker(pad),
                 "bos_token": marker("<|startoftext|>"), "eos_token": marker("<|endoftext|>"),
                 "unk_token": marker("<|endoftext|>")}))
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            for text in texts:
                ids = tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
                # Padding is the last id again and again.
                kept = len(ids)
                while kept > 1 and ids[kept - 1] == ids[kept - 2] == tokenizer.pad_token_id:
                    kept -= 1
                assert len(ids) == 77
                cases.append({"pad": pad, "text": text, "ids": ids[:kept]})
    OUT.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    print(f"{len(cases)} cases of {len(texts)} texts, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
