"""A training run with a time limit, for tools/gpu_check.py: one JSON line.

    python tools/gpu_train.py --program ds-train --model models/tiny --device cuda:0 --out DIR --seconds 60

Sharpens the model with the trainer's defaults (RLHF) and stops the run in time as Ctrl-C would, so that
it saves and exports. Of what it wrote DIR keeps the adapter, the metrics and the settings; what an earlier
run left there is removed. Options after `--` go to ds-train.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

KEPT = ("adapter.safetensors", "metrics.jsonl", "config.toml")
VALIDATE_EVERY = 100
# For saving once it is interrupted, and until its child is ended by force.
SAVING, FORCE = 12.0, 8.0
INTERRUPTED = 130  # ds-train's status where it was interrupted and has saved


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--program", required=True, help="ds-train")
    p.add_argument("--model", required=True)
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seconds", type=float, required=True, help="until it must have ended")
    p.add_argument("options", nargs="*", help="for ds-train")
    return p.parse_args()


def trained(args):
    """Runs it; its exit status."""
    command = [args.program, "rlhf", "--device", args.device, "--model", args.model, "--out", str(args.out),
               "--validate-every", str(VALIDATE_EVERY), "--quiet", *args.options]
    # Its own words are no JSON.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        return child.wait(max(1.0, args.seconds - SAVING - FORCE))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
    try:
        return child.wait(SAVING)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        sys.exit(f"gpu_train: it did not stop within {SAVING:.0f} s")


def keep(out):
    """Removes all but what is kept."""
    for entry in out.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in KEPT:
            entry.unlink()


def said(out):
    """What the metrics say: updates, their rate, and each reward's first and last validation."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if not records:
        sys.exit("gpu_train: it stopped before its first validation was done")
    first, last = records[0], records[-1]
    updates, seconds = last["step"] - first["step"], last["time"] - first["time"]
    rewards = {}
    for record in records:
        for key, value in record.items():
            name = key.removeprefix("validation/")
            if name != key and not name.endswith("_error"):
                rewards.setdefault(name, []).append((record["step"], value))
    return {
        "name": "train_rlhf", "updates": last["step"],
        # Validations among them.
        "updates_per_second": updates / seconds if updates else None,
        "rewards": {name: {"first": all_[0], "last": all_[-1]} for name, all_ in rewards.items()},
    }


def main():
    args = arguments()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    try:
        status = trained(args)
    finally:
        keep(args.out)
    if status not in (0, INTERRUPTED):
        sys.exit(f"gpu_train: ds-train ended with status {status}")
    if not (args.out / KEPT[0]).is_file():
        sys.exit(f"gpu_train: it wrote no {KEPT[0]}")
    print(json.dumps(said(args.out)), flush=True)


if __name__ == "__main__":
    main()
