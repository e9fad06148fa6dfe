"""How fast the machine is at this moment, for tools/compare_speed.py: its f32 rate in PyTorch."""

import statistics
import time

STEADY_SIDE, STEADY_SECONDS = 1024, 0.2
SIDES, BURST, BURSTS = (384, 512, 640, 768, 1024), 0.01, 6
KERNEL, CHANNELS, SIDE = 5, 128, 32


def candidates(torch):
    """What may come close to the processor's peak, by name: (work, floating-point operations)."""

    def product(side):
        a, b, out = torch.rand(side, side), torch.rand(side, side), torch.empty(side, side)
        return lambda: torch.mm(a, b, out=out), 2 * side**3

    def convolution():
        x, weight = torch.rand(1, CHANNELS, SIDE, SIDE), torch.rand(CHANNELS, CHANNELS, KERNEL, KERNEL)
        run = lambda: torch.nn.functional.conv2d(x, weight, padding=KERNEL // 2)  # noqa: E731
        return run, 2 * (CHANNELS * KERNEL * SIDE) ** 2

    named = {f"{side}x{side} matrix product": product(side) for side in SIDES}
    return named | {f"{KERNEL}x{KERNEL} convolution of {CHANNELS} channels": convolution()}


def probe(torch):
    """GFLOP/s.

    gflops, gflops_cpu        a 1024x1024 matrix product, median, on the clock and per processor
                              second: what tells whether the machine is steady
    peak_gflops_cpu, peak_of  the fastest of short bursts of several matrix products and a
                              convolution, per processor second, and which it was: a lower bound
                              of the processor's fused multiply-add peak, and near it where the
                              convolution is computed directly from registers
    """
    with torch.inference_mode():
        runs = candidates(torch)
        steady, work = runs[f"{STEADY_SIDE}x{STEADY_SIDE} matrix product"]
        steady()
        wall, cpu = [], []
        end = time.perf_counter() + STEADY_SECONDS
        while time.perf_counter() < end or len(wall) < 3:
            start, start_cpu = time.perf_counter(), time.process_time()
            steady()
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        peaks = {name: flop / fastest_burst(run) / 1e9 for name, (run, flop) in runs.items()}
    best = max(peaks, key=peaks.get)
    return {
        "gflops": work / statistics.median(wall) / 1e9,
        "gflops_cpu": work / statistics.median(cpu) / 1e9,
        "peak_gflops_cpu": peaks[best],
        "peak_of": best,
    }


def fastest_burst(run):
    """Processor seconds of one run, in the best of a few bursts."""
    start = time.process_time()
    run()
    count = max(1, round(BURST / max(time.process_time() - start, 1e-6)))
    best = float("inf")
    for _ in range(BURSTS):
        start = time.process_time()
        for _ in range(count):
            run()
        best = min(best, (time.process_time() - start) / count)
    return best
