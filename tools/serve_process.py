"""A ds-serve of a script's own: on a free port, with a history that goes with it."""

import http.client
import re
import subprocess
import sys
import tempfile
import time


class Served:
    """`with Served("target/release/ds-serve", "models", ["--queue", "8"]) as server:`"""

    def __init__(self, serve, models, options=()):
        self.data = tempfile.TemporaryDirectory()
        command = [serve, "--models", models, "--data", self.data.name, "--listen", "127.0.0.1:0",
                   "--log", "warn", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        line = self.process.stdout.readline()
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", line)
        if not found:
            sys.exit(f"the server ended with status {self.process.wait()}")
        self.port = int(found.group(1))
        for _ in range(1200):
            if self.process.poll() is not None:
                sys.exit(f"the server ended with status {self.process.returncode}")
            if self.get("/readyz")[0] == 200:
                return self
            time.sleep(0.1)
        sys.exit("the server was not ready within two minutes")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            print("the server did not end within a minute")
        self.data.cleanup()

    def get(self, path):
        """Status and text; status 0 when there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def metric(self, name):
        """The sum of a metric's values over its labels; `name` may begin those: `a{b="c"`."""
        text = self.get("/metrics")[1]
        lines = (line for line in text.splitlines() if not line.startswith("#"))
        rows = (re.fullmatch(r"(\w+(?:\{.*\})?) (\S+)", line) for line in lines)
        base, _, label = name.partition("{")
        return sum(float(row[2]) for row in rows
                   if row and row[1].partition("{")[0] == base and label in row[1])

    def memory(self):
        """Resident MiB."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1)) / 1024
