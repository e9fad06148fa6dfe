"""What every measurement of the PyTorch side shares: threads, timed runs, the row that is printed."""

import os
import statistics
import sys
import time

LEAST_RUNS = 3


def set_threads(threads):
    """Before torch is first imported."""
    for var in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[var] = str(threads)
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)


def on_gpu():
    """Whether this process uses one."""
    import torch

    return torch.cuda.is_initialized()


def timed(work):
    """Seconds on the clock until a GPU is done too, and of processor time of all threads."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    if on_gpu():
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu


def peak_rss():
    """Most memory this process has had in RAM so far, in bytes; None where the platform does not tell.

    On Linux a process starts with the peak of the one that started it, so start it from a small one.
    """
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def repeated(work, runs, seconds, long=False):
    """(clock, processor) seconds of each run after a warm-up: as many as fit in `seconds`, within [least, runs].

    `least` is 3, and 1 for work that may be `long` where three would not fit.
    """
    if on_gpu():
        import torch

        torch.cuda.reset_peak_memory_stats()
    warm_up, samples = timed(work)[0], []
    least = 1 if long and warm_up > seconds / LEAST_RUNS else LEAST_RUNS
    began = time.perf_counter()
    while len(samples) < runs and (len(samples) < least or time.perf_counter() - began < seconds):
        samples.append(timed(work))
    return samples


def row(name, samples, latent, tokens, forwards):
    """One JSON-able row, keys as those of `ds-bench speed --json`."""
    import torch

    wall, cpu = zip(*samples)
    return {
        "name": name,
        "seconds_median": statistics.median(wall),
        "seconds_min": min(wall),
        "cpu_seconds_median": statistics.median(cpu),
        "runs": len(samples),
        "threads": torch.get_num_threads(),
        "latent": latent,
        "tokens": tokens,
        "f": forwards,
        "peak_rss_bytes": peak_rss(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu() else None,
        "kernel_launches": None,  # told by Rust alone
    }
