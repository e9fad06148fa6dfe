"""Reads a run's folder with TensorBoard's own reader and compares it with metrics.jsonl.

    pip install tensorboard
    cargo test --release --test metrics                  # leaves a run in $TARGET/tmp/metrics
    python tools/metrics_check.py $TARGET/tmp/metrics    # or any run's folder

Every scalar of metrics.jsonl must be there once, in f32 and with NaN for null, and no other; every
image must be a PNG of the width and height that it says.
"""

import argparse
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder

    # 0: all of them.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    read = {}
    for tag in events.Tags()["scalars"]:
        for scalar in events.Scalars(tag):
            assert (tag, scalar.step) not in read, f"{tag} has step {scalar.step} twice"
            read[tag, scalar.step] = scalar.value

    written = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        record.pop("time")
        written.update({(tag, step): value for tag, value in record.items()})
    assert read.keys() == written.keys(), f"only in one of both: {read.keys() ^ written.keys()}"
    for key, value in written.items():
        with np.errstate(over="ignore"):
            same = math.isnan(read[key]) if value is None else read[key] == float(np.float32(value))
        assert same, f"{key}: {read[key]} in the event file, {value} in metrics.jsonl"

    images = 0
    for tag in events.Tags()["images"]:
        for image in events.Images(tag):
            decoded = Image.open(io.BytesIO(image.encoded_image_string))
            assert decoded.format == "PNG" and decoded.size == (image.width, image.height), tag
            images += 1
    texts = [tag for tag in events.Tags()["tensors"] if events.SummaryMetadata(tag).plugin_data.plugin_name == "text"]
    for tag in texts:
        text = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        assert all(line.startswith("    ") for line in text.splitlines()), tag
    print(f"{len(read)} scalars, {images} images and {len(texts)} texts are as they were written")


if __name__ == "__main__":
    main()
