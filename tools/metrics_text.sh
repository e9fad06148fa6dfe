#!/bin/sh
# Has promtool (Debian: apt-get install prometheus) check what a running server answers at /metrics:
#   tools/metrics_text.sh [http://127.0.0.1:8080]
# With API keys, DS_API_KEY is sent.
set -eu
url=${1:-http://127.0.0.1:8080}
command -v promtool > /dev/null || { echo "promtool is not installed (Debian: prometheus)" >&2; exit 2; }
text=$(curl -fsS ${DS_API_KEY:+-H "X-API-Key: $DS_API_KEY"} "$url/metrics")
printf '%s\n' "$text" | promtool check metrics
