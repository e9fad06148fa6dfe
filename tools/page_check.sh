#!/bin/sh
# Opens the comparison page in headless Chromium, generates, and checks what
# comes back at desktop and phone width. Screenshots go to --out.
#
#   tools/page_check.sh [--out DIR] [--url http://HOST:PORT]
#
# Without --url it starts ds-serve (DS_SERVE, default target/release/ds-serve)
# on a free port with the models of DS_MODELS or models/. What is missing is
# installed: Chromium and Node.js from the system's packages when root,
# playwright-core and axe-core from npm into a cache folder.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
version=1.56.1
axe=4.14.1
cache=${PAGE_CHECK_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/diffusion-sharpening/page-check-$version}

find_chromium() {
  for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome; do
    if [ -n "$name" ] && command -v "$name" >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
}

need=""
[ -n "$(find_chromium)" ] || need="$need chromium"
command -v node >/dev/null 2>&1 || need="$need nodejs"
command -v npm >/dev/null 2>&1 || need="$need npm"
if [ -n "$need" ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "page_check: please install:$need" >&2
    exit 2
  fi
  echo "page_check: installing$need"
  apt-get update -qq
  # shellcheck disable=SC2086 # a list of packages
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $need >/dev/null
fi

if [ ! -d "$cache/node_modules/playwright-core" ] || [ ! -d "$cache/node_modules/axe-core" ]; then
  mkdir -p "$cache"
  npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$cache" \
    "playwright-core@$version" "axe-core@$axe"
fi

PLAYWRIGHT_DIR="$cache" CHROMIUM="$(find_chromium)" REPOSITORY="$here" \
  exec node "$here/tools/page_check.mjs" "$@"
