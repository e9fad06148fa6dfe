#!/usr/bin/env python3
"""What an image takes over HTTP beside its generation.

    tools/http_overhead.py [--requests 200] [--serve target/release/ds-serve] [--models models]

Starts the server on a free port and asks for one image after the other, 128 px at 8 steps, over one
connection and over one each. Of every request it takes the seconds from before it is sent to the
answer's last byte, less the time on the generation thread, as Server-Timing has it. What is left is
HTTP itself, JSON, planning, the queue and waking threads. A second line counts what the generation
thread does for HTTP as well: PNG (the answer's `encode`) and the history (the mean of the metric's
stage `store`).

Prints the median of each with a 95% bootstrap interval, and what part of the request it is. The exit
status is 1 when the first is not below 3 ms. Python's standard library only.
"""

import argparse
import http.client
import json
import random
import re
import statistics
import sys
import time

from serve_process import Served

LIMIT_MS = 3
STORE = "ds_stage_duration_seconds_{}{{stage=\"store\""


def interval(values, seed=0, rounds=2000):
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds) - 1]


def ask(connection, body):
    """Milliseconds of a request beside the generation thread, of encoding, and in all."""
    start = time.perf_counter()
    connection.request("POST", "/generate", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    seconds = time.perf_counter() - start
    if answer.status != 200:
        sys.exit(f"{answer.status}: {text.decode()}")
    encode = json.loads(text)["cost"]["actual"]["seconds"]["encode"]
    thread = float(re.search(r"generate;dur=([\d.]+)", answer.getheader("server-timing"))[1])
    return 1e3 * seconds - thread, 1e3 * encode, 1e3 * seconds


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--requests", type=int, default=200)
    options.add_argument("--serve", default="target/release/ds-serve")
    options.add_argument("--models", default="models")
    options = options.parse_args()
    ok = True
    print("| connections | beside | median ms | 95% | 99th percentile | of the request |")
    print("| --- | --- | ---: | --- | ---: | ---: |")
    with Served(options.serve, options.models) as server:
        for kept in (True, False):
            rows, connection = [], None
            for number in range(options.requests + 10):
                if connection is None or not kept:
                    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
                body = json.dumps({"prompt": "a red circle", "seed": number, "steps": 8,
                                   "width": 128, "height": 128})
                row = ask(connection, body)
                if not kept:
                    connection.close()
                # The first ones are to warm up.
                if number >= 10:
                    rows.append(row)
            store = 1e3 * server.metric(STORE.format("sum")) / server.metric(STORE.format("count"))
            request = statistics.median(row[2] for row in rows)
            lines = {
                "the generation thread": [row[0] for row in rows],
                "the same without PNG and history": [row[0] + row[1] + store for row in rows],
            }
            for name, beside in lines.items():
                median, (low, high) = statistics.median(beside), interval(beside)
                worst = sorted(beside)[int(0.99 * len(beside))]
                print(f"| {'one' if kept else 'one each'} | {name} | {median:.2f} | "
                      f"{low:.2f} … {high:.2f} | {worst:.2f} | {100 * median / request:.1f}% |")
            ok = ok and statistics.median(lines["the generation thread"]) < LIMIT_MS
    print(f"\n{'met' if ok else 'NOT MET'}: the median beside the generation thread is below {LIMIT_MS} ms")
    return 0 if ok else 1


sys.exit(main())
