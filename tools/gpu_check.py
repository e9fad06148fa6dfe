"""Checks and measures the crate on a machine with an NVIDIA GPU; tools/gpu_check.sh starts it.

    tools/gpu_check.sh --bundle DIR --out DIR [--minutes 9] [--only 1,3]

The parts, in order of value:
  1  correctness: the tests for GPUs, and the shipped model against the CPU
  2  SDXL with random weights against PyTorch
  3  speed of inference, ours and PyTorch's, beside what the card can do at all
  4  steps of sharpening, and plain training steps, ours and PyTorch's, with peak memory
  5  in the minutes that are left: the shipped model sharpened, into --out/part5
Part 3 ends with what matters least (torch.compile of the whole U-Net), after part 4.

Writes results.json and results.md into --out after every result, so that what is known stays when
something fails, hangs or is killed. A step that fails or runs past its limit leaves the others be.
The exit status is 1 where a check failed or a step did not end well.
"""

import argparse
import json
import lzma
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import datetime, timezone
from pathlib import Path

import gpu_report
from gpu_child import TAIL, Failed, Watch, lines, stop
from gpu_steps import Setting, steps

ROOT = Path(__file__).resolve().parent.parent
# Kept for writing the results when the time is over.
RESERVE = 5.0


def unpack(bundle, into):
    """The bundle's programs and wheels; its manifest."""
    for packed in sorted((bundle / "bin").glob("*.xz")):
        program = into / "bin" / packed.stem
        program.parent.mkdir(exist_ok=True)
        with lzma.open(packed) as source, open(program, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        program.chmod(0o755)
    for wheel in sorted((bundle / "wheels").glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(into / "site")
    return json.loads((bundle / "manifest.json").read_text())


def libraries():
    """Folders of CUDA's libraries among Python's packages."""
    try:
        import nvidia
    except ImportError:
        return []
    folders = [Path(base) / part for base in nvidia.__path__ for part in ("cu13/lib", "cudnn/lib")]
    return [str(folder) for folder in folders if folder.is_dir()]


def environment(site):
    """For the children: Python's wheels of the bundle first, CUDA's libraries on the search path."""
    env = dict(os.environ)
    for name, values in (("PYTHONPATH", [str(site)]), ("LD_LIBRARY_PATH", libraries())):
        env[name] = ":".join(filter(None, [*values, env.get(name)]))
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    env.pop("RAYON_NUM_THREADS", None)
    return env


def machine(env):
    """What this machine is."""
    facts = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
             "python": platform.python_version()}
    fields = {"card": "name", "driver": "driver_version", "memory": "memory.total", "sm clock at most": "clocks.max.sm",
              "memory clock at most": "clocks.max.mem", "power limit": "power.limit"}
    code = ("import importlib.metadata as m, json\nfound = {}\n"
            "for n in ('torch', 'triton', 'diffusers', 'transformers', 'peft', 'nvidia-cublas', 'nvidia-cudnn-cu13'):\n"
            "    try: found[n] = m.version(n)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))")
    for command, read in (
        (["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"],
         lambda text: dict(zip(fields, map(str.strip, text.splitlines()[0].split(","))))),
        ([sys.executable, "-c", code], json.loads),
    ):
        try:
            said = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=30).stdout
            facts |= read(said)
        except (OSError, subprocess.SubprocessError, IndexError, ValueError):
            continue  # no such program or card: the table says so by leaving it out
    return facts


def read_row(line, step):
    """What a line of a child says: (kind, result), or None."""
    if step.tests:
        found = re.match(r"test (\S+) \.\.\. .*?(ok|FAILED)$", line)
        if not found:
            return None
        passed = found[2] == "ok"
        return "checks", {"check": f"test {found[1]}", "value": None, "limit": None, "least": False, "met": passed}
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    return ("checks", row) if "check" in row else ("measurements", step.tags | row)


class Run:
    """The results so far, and the time there is."""

    def __init__(self, args, facts, commit):
        self.args, self.began = args, time.monotonic()
        self.results = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "commit": commit,
            "rehearsal": args.rehearse, "budget_seconds": 60 * args.minutes, "seconds": 0.0, "machine": facts,
            "rows": [], "checks": [], "measurements": [], "steps": [],
        }

    def left(self):
        return 60 * self.args.minutes - (time.monotonic() - self.began) - RESERVE

    def save(self):
        results = self.results
        results["seconds"] = time.monotonic() - self.began
        results["rows"] = gpu_report.rows(results)
        texts = {"results.json": json.dumps(results, indent=1), "results.md": "\n".join(gpu_report.markdown(results))}
        for name, text in texts.items():
            new = self.args.out / f".{name}.new"
            new.write_text(text + "\n")
            new.replace(self.args.out / name)

    def step(self, step, env, watch):
        """Does it, or notes why not."""
        note = {"part": step.part, "name": step.name, "status": "running"}
        self.results["steps"].append(note)
        limit = min(step.seconds, self.left())
        if limit < step.least:
            left = max(0.0, self.left())
            note |= {"status": "skipped", "error": f"{left:.0f} s are left, it takes {step.least:.0f} s"}
            self.save()
            return
        self.save()
        print(f"gpu_check: {step.name} (at most {limit:.0f} s)", flush=True)
        start, mark, got = time.monotonic(), len(watch.samples), 0
        try:
            command = [part.replace("{seconds}", f"{limit:.0f}") for part in step.command]
            for line in lines(command, limit, env, ROOT):
                if found := read_row(line, step):
                    kind, row = found
                    self.results[kind].append(row)
                    got += 1
                    self.save()
            note["status"] = "ok" if got or step.silent else "failed"
            if note["status"] == "failed":
                note["error"] = "it gave no result"
        except Failed as error:
            note |= {"status": "failed", "error": str(error)}
            print(f"gpu_check: {step.name} {error}", file=sys.stderr, flush=True)
        except (KeyboardInterrupt, SystemExit):
            note |= {"status": "interrupted"}
            raise
        finally:
            note |= {"seconds": time.monotonic() - start, "gpu": watch.since(mark)}
            self.save()

    def ended_well(self):
        return all(c["met"] for c in self.results["checks"]) and all(s["status"] == "ok" for s in self.results["steps"])


def room(need):
    """A folder for the random checkpoint: in memory where that has room."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > need else None


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", type=Path, required=True, help="folder of tools/gpu_bundle.sh")
    p.add_argument("--out", type=Path, required=True, help="folder for results.json and results.md")
    p.add_argument("--minutes", type=float, default=9.0, help="for everything")
    p.add_argument("--only", help="comma-separated parts; default: all")
    p.add_argument("--device", help="default: cuda:0")
    p.add_argument("--model", type=Path, default=ROOT / "models/tiny", help="the shipped model")
    p.add_argument("--rehearse", action="store_true",
                   help="on the CPU, the shipped model with small latents in place of SDXL: tries the script itself")
    args = p.parse_args()
    args.device = args.device or ("cpu" if args.rehearse else "cuda:0")
    try:
        args.parts = {int(part) for part in args.only.split(",")} if args.only else {1, 2, 3, 4, 5}
    except ValueError:
        args.parts = set()
    if not args.parts or not args.parts <= {1, 2, 3, 4, 5}:
        p.error("--only: parts are 1 to 5")
    args.out = args.out.resolve()
    return args


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as place, \
            tempfile.TemporaryDirectory(prefix="gpu-check-", dir=room(20e9)) as large:
        place = Path(place)
        manifest = unpack(args.bundle, place)
        env = environment(place / "site")
        run = Run(args, machine(env), manifest["commit"])
        link_root(manifest["root"])
        setting = Setting(args, place / "bin", Path(large) / "sdxl")
        watch = Watch()
        checkpoint = None
        try:
            if args.parts & {2, 3, 4} and not args.rehearse:
                checkpoint = Checkpoint(setting.checkpoint_command(), env, place / "checkpoint.log")
            for step in steps(setting):
                if step.part not in args.parts:
                    continue
                if step.part in (2, 3, 4) and checkpoint:
                    checkpoint.finish(run)
                    checkpoint = None
                run.step(step, env, watch)
        finally:
            if checkpoint:
                checkpoint.close()
            watch.close()
            run.save()
    print(f"gpu_check: {args.out / 'results.md'}")
    sys.exit(0 if run.ended_well() else 1)


class Checkpoint:
    """The random checkpoint, made beside part 1, in which nothing is timed."""

    def __init__(self, command, env, log):
        self.log, self.began = log, time.monotonic()
        with open(log, "w") as said:
            self.child = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                          start_new_session=True)

    def finish(self, run):
        """Waits for it and notes how it went; steps that miss it say so themselves."""
        note = {"part": 2, "name": "random weights of SDXL's shape", "status": "ok"}
        try:
            if self.child.wait(max(1.0, min(120.0, run.left()))):
                note |= {"status": "failed", "error": self.log.read_text()[-TAIL:]}
        except subprocess.TimeoutExpired:
            note |= {"status": "failed", "error": "took too long"}
        finally:
            self.close()
        run.results["steps"].append(note | {"seconds": time.monotonic() - self.began})
        run.save()

    def close(self):
        if self.child.poll() is None:
            stop(self.child)


def link_root(built):
    """Test programs look for their fixtures where they were built."""
    built = Path(built)
    if not built.exists():
        try:
            built.parent.mkdir(parents=True, exist_ok=True)
            built.symlink_to(ROOT)
        except OSError as error:
            print(f"gpu_check: {built} cannot be made: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
