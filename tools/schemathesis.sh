#!/bin/sh
# Sends what the OpenAPI document of ds-serve allows, and what it does not, and checks every answer
# against the document: statuses, types, headers, refusals, and that what is deleted is gone.
#
#   tools/schemathesis.sh [--serve PROGRAM] [--models DIR] [--examples N] [--url URL]
#
# Starts ds-serve (target/release/ds-serve) on a free port with small limits and a history of its
# own, unless --url says where one runs. schemathesis comes from PyPI into a cache folder; what it
# finds is printed, with the curl command of each request, and nothing is left behind.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
version=4.32.5
root() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
serve=$here/target/release/ds-serve
models=$here/models
examples=20
url=""
while [ $# -gt 0 ]; do
  case $1 in
    --serve) serve=$(root "$2") ;;
    --models) models=$(root "$2") ;;
    --examples) examples=$2 ;;
    --url) url=$2 ;;
    *) echo "schemathesis: what is $1?" >&2; exit 2 ;;
  esac
  shift 2
done

cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/diffusion-sharpening/schemathesis-$version
if [ ! -x "$cache/bin/schemathesis" ]; then
  if ! python3 -m venv "$cache" 2>/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
      echo "schemathesis: please install: python3 python3-venv" >&2
      exit 2
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv >/dev/null
    rm -rf "$cache"
    python3 -m venv "$cache"
  fi
  "$cache/bin/pip" install --quiet "schemathesis==$version"
fi

data=$(mktemp -d)
server=""
finish() {
  [ -z "$server" ] || kill "$server" 2>/dev/null || true
  [ -z "$server" ] || wait "$server" 2>/dev/null || true
  rm -rf "$data"
}
trap finish EXIT INT TERM

if [ -z "$url" ]; then
  "$serve" --models "$models" --data "$data" --listen 127.0.0.1:0 --warm-up-steps 1 \
    --max-steps 4 --max-images 2 --max-request-f 64 --max-side 128 --log warn >"$data/out" &
  server=$!
fi
ended() {
  [ -z "$server" ] || kill -0 "$server" 2>/dev/null || { echo "schemathesis: $serve ended" >&2; exit 1; }
}
while [ -z "$url" ]; do
  ended
  sleep 0.2
  url=$(sed -n 's/^listening on //p' "$data/out")
done
until python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1])' "$url/readyz" 2>/dev/null; do
  ended
  sleep 0.2
done

# It leaves notes where it runs.
cd "$data"
# Models stay: what is unloaded would be missing for everything else.
SCHEMATHESIS_HOOKS=schemathesis_hooks PYTHONPATH="$here/tools" PYTHONDONTWRITEBYTECODE=1 \
  "$cache/bin/schemathesis" --config-file "$here/tools/schemathesis.toml" run "$url/openapi.json" \
  --checks all --phases examples,coverage,fuzzing,stateful \
  --max-examples "$examples" --seed 1 --workers 1 --request-timeout 60 --suppress-health-check all \
  --exclude-path-regex '^/models/'
