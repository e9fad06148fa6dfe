"""A small personalised data set: Microsoft's Fluent 3D emoji with their names, as an image folder.

    pip install pillow
    python tools/emoji_set.py --out runs/emoji --count 200 --resolution 64

The pictures are those of the npm package @lobehub/fluent-emoji-3d, the names those of
emojibase-data (English, without skin tones); both are under the MIT licence. `npm pack` fetches
the two packages (Node.js), unless --packages names a folder that has them. Their SHA-512 is
compared with the one written here before anything is read.

OUT gets 0000.png, 0001.png, … over white and metadata.jsonl with `file_name` and `text`, and
LICENSE.txt. A larger --count begins with the same pictures.
"""

import argparse
import base64
import hashlib
import io
import json
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

# Package, its file, and the integrity that the registry states.
PICTURES = (
    "@lobehub/fluent-emoji-3d@1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
NAMES = (
    "emojibase-data@17.0.0",
    "emojibase-data-17.0.0.tgz",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
ASSETS = "package/assets/"
# Pictures are drawn in this fixed order.
SEED = 0


def fetch(package, folder):
    """The opened archive of a package, checked; packed into `folder` where it is not there."""
    name, file, integrity = package
    path = folder / file
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True)
    data = path.read_bytes()
    found = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != integrity:
        raise SystemExit(f"{path}: SHA-512 is {found}, expected {integrity}")
    return tarfile.open(fileobj=io.BytesIO(data))


def plain(code):
    """A code point sequence without what only asks for colour."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def pairs(pictures, names):
    """Members of `pictures` and the names of what they show, in a fixed random order."""
    files = {
        plain(member.name.removeprefix(ASSETS).removesuffix(".webp")): member
        for member in pictures.getmembers()
        if member.name.startswith(ASSETS) and member.name.endswith(".webp")
    }
    known = json.load(names.extractfile("package/en/data.json"))
    known = {plain(entry["hexcode"]): entry["label"] for entry in known}
    both = sorted(code for code in files if code in known)
    random.Random(SEED).shuffle(both)
    return [(files[code], known[code]) for code in both]


def over_white(data, resolution):
    """A picture in a white square with sides of `resolution` pixels."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    picture.thumbnail((resolution, resolution), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (resolution, resolution), "white")
    corner = [(resolution - side) // 2 for side in picture.size]
    square.alpha_composite(picture, tuple(corner))
    return square.convert("RGB")


def write(out, pictures, names, count, resolution, caption):
    chosen = pairs(pictures, names)
    if count > len(chosen):
        raise SystemExit(f"--count: there are {len(chosen)} pictures with a name")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise SystemExit(f"--out: {out} is not empty")
    lines = []
    for i, (member, name) in enumerate(chosen[:count]):
        file = f"{i:04}.png"
        over_white(pictures.extractfile(member).read(), resolution).save(out / file)
        lines.append(json.dumps({"file_name": file, "text": caption.format(name=name)}))
    licence = names.extractfile("package/LICENSE").read().decode()
    notice = f"Pictures: Microsoft's Fluent Emoji, MIT licence ({PICTURES[0]}).\nNames: {NAMES[0]}:\n\n"
    (out / "LICENSE.txt").write_text(notice + licence, encoding="utf-8")
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--count", type=int, default=200, help="pictures [default: 200]")
    parser.add_argument("--resolution", type=int, default=256, help="pixels, up to 256 [default]")
    parser.add_argument(
        "--caption",
        default="a fluent emoji of {name}",
        help="with {name} in it [default: 'a fluent emoji of {name}']",
    )
    parser.add_argument("--packages", type=Path, help="a folder with the two .tgz files")
    args = parser.parse_args()
    if args.count < 1 or not 8 <= args.resolution <= 256:
        raise SystemExit("--count has to be positive, --resolution from 8 to 256")
    with tempfile.TemporaryDirectory() as folder:
        folder = args.packages or Path(folder)
        pictures, names = fetch(PICTURES, folder), fetch(NAMES, folder)
        write(args.out, pictures, names, args.count, args.resolution, args.caption)
    print(f"{args.count} pictures in {args.out}")


if __name__ == "__main__":
    main()
