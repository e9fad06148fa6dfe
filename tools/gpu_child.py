"""Child processes with time limits, and what the GPU does meanwhile, for tools/gpu_check.py."""

import os
import queue
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time

TAIL = 3000
POLL = 0.5


class Failed(Exception):
    """A child that ended badly, or ran past its limit."""


def stop(child):
    """Ends a child and whatever it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def lines(command, seconds, env, cwd):
    """The lines that a command prints, as it prints them; Failed once it ends badly or `seconds` are over."""
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=errors,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )
        said, arrived = [], queue.Queue()

        def read():
            for line in child.stdout:
                arrived.put(line.rstrip("\n"))
            arrived.put(None)

        threading.Thread(target=read, daemon=True).start()
        end = time.monotonic() + seconds
        try:
            while True:
                line = arrived.get(timeout=max(0.01, end - time.monotonic()))
                if line is None:
                    break
                said.append(line)
                yield line
            child.wait(max(0.01, end - time.monotonic()))
        except (queue.Empty, subprocess.TimeoutExpired):
            raise Failed(f"took longer than {seconds:.0f} s" + told(errors, said)) from None
        finally:
            if child.poll() is None:
                stop(child)
        if child.returncode:
            raise Failed(f"ended with status {child.returncode}" + told(errors, said))


def told(errors, said):
    """The end of what a child wrote."""
    errors.seek(0)
    text = (errors.read().strip() or "\n".join(said[-20:])).strip()
    return f": {text[-TAIL:]}" if text else ""


def number(text):
    """None for what the card does not tell."""
    try:
        return float(text)
    except ValueError:
        return None


class Watch:
    """Memory, clock, power and temperature of the first GPU, read every half second where nvidia-smi is."""

    KEYS = ("memory_mib", "sm_mhz", "power_w", "temperature_c")
    QUERY = "memory.used,clocks.sm,power.draw,temperature.gpu"

    def __init__(self):
        self.samples, self.child = [], None
        if not shutil.which("nvidia-smi"):
            return
        # To a terminal a program writes each line at once.
        screen, terminal = os.openpty()
        self.child = subprocess.Popen(
            ["nvidia-smi", "--id=0", f"--query-gpu={self.QUERY}", "--format=csv,noheader,nounits",
             f"--loop-ms={round(1000 * POLL)}"],
            stdin=subprocess.DEVNULL, stdout=terminal, stderr=subprocess.DEVNULL, start_new_session=True,
        )
        os.close(terminal)
        threading.Thread(target=self._read, args=(os.fdopen(screen),), daemon=True).start()

    def _read(self, screen):
        try:
            for line in screen:
                values = [number(value) for value in line.split(",")]
                if len(values) == len(self.KEYS):
                    self.samples.append(values)
        except OSError:  # the terminal is closed once the program has ended
            pass

    def since(self, mark):
        """Most of each, and the median clock, in the samples after `mark` (a count of samples)."""
        samples = self.samples[mark:]
        if not samples:
            return {}
        columns = {key: [v for v in column if v is not None] for key, column in zip(self.KEYS, zip(*samples))}
        most = {f"{key}_max": max(column) for key, column in columns.items() if column}
        clocks = columns["sm_mhz"]
        return most | ({"sm_mhz_median": statistics.median(clocks)} if clocks else {})

    def close(self):
        if self.child:
            stop(self.child)
