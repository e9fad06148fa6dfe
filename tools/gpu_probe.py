"""What the card can do at all, for tools/gpu_check.py: one JSON line a measurement.

A bf16 matrix product of 8192 x 8192 x 8192 random numbers, and a copy from device memory to device
memory (bytes read and written). On a CPU both are small: that only rehearses.
"""

import argparse
import json
import statistics
import time

import torch


def median_seconds(work, device, runs):
    for _ in range(3):
        work()
    samples = []
    for _ in range(runs):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda:0")
    args = p.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    side, size = (8192, 2**30) if gpu else (256, 2**20)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    seconds = median_seconds(lambda: torch.mm(a, b), device, 30)
    print(json.dumps({"name": "gemm_peak", "tflops": 2e-12 * side**3 / seconds, "side": side}), flush=True)
    x = torch.randn(size, device=device)
    y = torch.empty_like(x)
    seconds = median_seconds(lambda: y.copy_(x), device, 10)
    print(json.dumps({"name": "copy", "tb_per_s": 2e-12 * 4 * size / seconds}), flush=True)


if __name__ == "__main__":
    main()
