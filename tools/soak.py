#!/usr/bin/env python3
"""Drives ds-serve with an open loop of mixed requests, and says what it withstands.

    tools/soak.py [--minutes 30] [--serve target/release/ds-serve] [--models models]

Starts the server with a history of its own, measures what it can do when it always has something to
do, then sends requests at half, at all and at twice of that, each for a third of the time: plain
images and searches of several sizes and lengths and comparisons, for answers, for events, for later
and by PUT; some clients leave early, some work is cancelled. Meanwhile /readyz is asked ten times a
second and the memory is read once a second. Prints a table in Markdown and verdicts:

- goodput, generations completed a second as the server counts them, is at twice the capacity at
  least 95% of that at the capacity;
- the 99th percentile of /readyz is below 50 ms, and nothing but a full queue makes it 503;
- memory does not grow: Theil-Sen's slope over the second half is below 1 MiB a minute, or Sen's 95%
  interval of it has 0;
- every answer is one that docs/http.md has for this.

The exit status is 1 when a verdict is not met. Python's standard library only.
"""

import argparse
import http.client
import json
import random
import statistics
import sys
import threading
import time

from serve_process import Served

PROMPTS = ["a red circle", "two blue squares", "a green star left of a yellow ring", "three hearts"]
# 409: what was to be cancelled had ended, or was cancelled while its PUT waited.
EXPECTED = {200, 202, 409, 429}
COMPLETED = 'ds_generations_total{outcome="completed"'
# Clients that keep the server busy while its capacity is measured.
BUSY = 4


def generation(rng, seed):
    side = rng.choice([64, 128, 128, 128])
    body = {"prompt": rng.choice(PROMPTS), "seed": seed, "width": side, "height": side}
    kinds = [
        {"steps": rng.choice([2, 4, 8])},
        {"steps": rng.choice([2, 4, 8]), "adapter": "rlhf-judge", "guidance_scale": 3},
        {"steps": 4, "method": {"name": "best-of-n", "candidates": rng.choice([2, 3])}},
        {"steps": 4, "method": "demon", "budget": 40, "reward": "judge"},
        {"steps": 4, "n": 2, "output_format": "webp", "previews": 2},
    ]
    return {**body, **rng.choices(kinds, [5, 2, 2, 1, 1])[0]}


class Load:
    """Sends requests, each decided by a number, and counts what comes of them."""

    KINDS = {"answer": 50, "events": 15, "later": 10, "put": 10, "compare": 5, "leaves": 5, "cancels": 5}

    def __init__(self, port, seed):
        self.port, self.rng = port, random.Random(seed)
        self.lock = threading.Lock()
        self.outcomes, self.seconds, self.odd = {}, [], []

    def note(self, outcome, seconds=None, text=b""):
        with self.lock:
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
            if seconds is not None and outcome == 200:
                self.seconds.append(seconds)
            if outcome not in EXPECTED and outcome != "left":
                self.odd.append((outcome, text[:300].decode(errors="replace")))

    def one(self, seed):
        rng = random.Random(seed)
        kind = rng.choices(list(self.KINDS), self.KINDS.values())[0]
        method, path, body = "POST", "/generate", generation(rng, seed)
        headers = {"content-type": "application/json"}
        if kind == "events" or kind == "leaves" and rng.random() < 0.5:
            headers["accept"] = "text/event-stream"
        if kind in ("later", "cancels"):
            headers["prefer"] = "respond-async"
        if kind == "put":
            method, path = "PUT", f"/generations/soak-{seed}"
        if kind == "compare":
            path = "/compare"
            body = {"base": {"prompt": body["prompt"], "seed": seed, "steps": 2},
                    "arms": [{}, {"method": "best-of-n", "label": "search"}]}
        start = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, json.dumps(body), headers)
            if kind == "leaves":
                time.sleep(rng.random() * 0.3)
                return self.note("left")
            answer = connection.getresponse()
            text, status = answer.read(), answer.status
            if kind == "cancels" and status == 202:
                connection.request("DELETE", answer.getheader("location"))
                answer = connection.getresponse()
                text, status = answer.read(), answer.status
            if kind == "events" and status == 200 and b"event: completed" not in text:
                status = "stream without its end"
            self.note(status, time.monotonic() - start, text)
        except (OSError, http.client.HTTPException) as error:
            self.note(type(error).__name__, text=str(error).encode())
        finally:
            connection.close()

    def keep_busy(self, seconds):
        """Several clients, each with one request after the other."""
        end = time.monotonic() + seconds

        def client():
            while time.monotonic() < end:
                with self.lock:
                    seed = self.rng.randrange(1 << 32)
                self.one(seed)

        threads = [threading.Thread(target=client, daemon=True) for _ in range(BUSY)]
        for thread in threads:
            thread.start()
        time.sleep(max(0.0, end - time.monotonic()))
        return threads

    def run(self, rate, seconds):
        """Starts requests at random times, whether or not earlier ones have ended."""
        end, at, threads = time.monotonic() + seconds, time.monotonic(), []
        while at < end:
            time.sleep(max(0.0, at - time.monotonic()))
            thread = threading.Thread(target=self.one, args=(self.rng.randrange(1 << 32),), daemon=True)
            thread.start()
            threads.append(thread)
            at += self.rng.expovariate(rate)
        time.sleep(max(0.0, end - time.monotonic()))
        return threads


class Watch(threading.Thread):
    """Asks /readyz and reads the memory until it is stopped."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.stopped = server, threading.Event()
        self.ready, self.memory, self.failed = [], [], []

    def run(self):
        count = 0
        while not self.stopped.wait(0.1):
            start = time.monotonic()
            status, text = self.server.get("/readyz")
            self.ready.append((start, time.monotonic() - start))
            if status != 200:
                failing = [c["name"] for c in json.loads(text or "{}").get("checks", []) if not c["ok"]]
                if status != 503 or failing != ["queue"]:
                    self.failed.append((status, failing))
            count += 1
            if count % 10 == 0:
                self.memory.append((time.monotonic(), self.server.memory()))


def percentile(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, int(part * len(values)))] if values else float("nan")


def slope(points):
    """Theil-Sen: the median of all slopes, and Sen's 95% interval of it; a minute."""
    points = points[::max(1, len(points) // 200)]
    n = len(points)
    if n < 20:
        return float("nan"), float("nan"), float("nan")
    slopes = sorted(60 * (b - a) / (t - s) for i, (s, a) in enumerate(points) for t, b in points[i + 1:])
    half = 1.96 * (n * (n - 1) * (2 * n + 5) / 18) ** 0.5
    at = lambda rank: slopes[min(len(slopes) - 1, max(0, round(rank)))]
    return statistics.median(slopes), at((len(slopes) - half) / 2), at((len(slopes) + half) / 2)


def measure(options, server):
    part = options.minutes * 60 / 3.3
    begin, start = server.metric(COMPLETED), time.monotonic()
    threads = Load(server.port, options.seed).keep_busy(0.3 * part)
    done, seconds = server.metric(COMPLETED) - begin, time.monotonic() - start
    for thread in threads:
        thread.join()
    generations = done / seconds
    # What is sent is not what is completed: comparisons are two, some leave, some are cancelled.
    kinds = Load.KINDS
    each = sum(w * {"compare": 2, "leaves": 0, "cancels": 0}.get(k, 1) for k, w in kinds.items())
    capacity = generations / (each / sum(kinds.values()))
    print(f"capacity: {generations:.2f} generations a second, {capacity:.2f} requests\n")
    watch = Watch(server)
    watch.start()
    rows, goodput, odd = [], {}, []
    for times in (0.5, 1, 2):
        load = Load(server.port, options.seed + int(10 * times))
        begin, start = server.metric(COMPLETED), time.monotonic()
        threads = load.run(times * capacity, part)
        done, seconds = server.metric(COMPLETED) - begin, time.monotonic() - start
        ready = [took for at, took in watch.ready if at >= start]
        # The next load begins with an empty queue.
        for thread in threads:
            thread.join()
        while server.metric("ds_generations_running") + server.metric("ds_queue_depth") > 0:
            time.sleep(0.1)
        goodput[times] = done / seconds
        outcomes = ", ".join(f"{k}: {v}" for k, v in sorted(load.outcomes.items(), key=lambda kv: str(kv[0])))
        rows.append((times, len(threads), int(done), goodput[times], percentile(load.seconds, 0.5),
                     percentile(load.seconds, 0.99), 1e3 * percentile(ready, 0.5),
                     1e3 * percentile(ready, 0.99), outcomes))
        odd += load.odd
    watch.stopped.set()
    watch.join()
    print("| load | sent | completed | a second | median s | p99 s | readyz median ms | p99 ms | outcomes |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for times, sent, done, rate, half, most, ready, worst, outcomes in rows:
        print(f"| {times} | {sent} | {done} | {rate:.2f} | {half:.2f} | {most:.2f} | {ready:.1f} | {worst:.1f} | {outcomes} |")
    grows, low, high = slope(watch.memory[len(watch.memory) // 2:])
    worst = 1e3 * percentile([took for _, took in watch.ready], 0.99)
    print(f"\nmemory: {watch.memory[0][1]:.0f} MiB at first, {watch.memory[-1][1]:.0f} MiB at last, "
          f"at most {max(m for _, m in watch.memory):.0f} MiB\n")
    verdicts = [
        (f"goodput at 2x is {100 * goodput[2] / goodput[1]:.0f}% of that at 1x (at least 95%)",
         goodput[2] >= 0.95 * goodput[1]),
        (f"the 99th percentile of /readyz is {worst:.1f} ms (below 50)", worst < 50),
        (f"/readyz failed {len(watch.failed)} times for another reason than a full queue (0) {watch.failed[:3] or ''}",
         not watch.failed),
        (f"memory grows by {grows:+.2f} [{low:+.2f}, {high:+.2f}] MiB a minute over the second half (below 1, or 0 is within)",
         grows < 1 or low <= 0),
        (f"{len(odd)} answers that docs/http.md does not have for this (0) {odd[:3] or ''}", not odd),
    ]
    for text, met in verdicts:
        print(f"- {'met' if met else 'NOT MET'}: {text}")
    return 0 if all(met for _, met in verdicts) else 1


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=30)
    options.add_argument("--serve", default="target/release/ds-serve")
    options.add_argument("--models", default="models")
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args()
    with Served(options.serve, options.models, ["--queue", "8", "--keep", "200"]) as server:
        return measure(options, server)


sys.exit(main())
