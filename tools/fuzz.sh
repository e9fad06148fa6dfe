#!/bin/sh
# Fuzzes what reads bytes of others: requests and whole connections, bundles, weights, images and
# configuration files (fuzz/fuzz_targets).
#
#   tools/fuzz.sh [SECONDS] [TARGET...]
#
# Runs each target for SECONDS (60), from the inputs in fuzz/seeds and those that earlier runs have
# found (fuzz/corpus), and stops at the first that crashes, hangs or takes more than 4 GiB; the
# input is then in fuzz/artifacts. Takes the same Rust as the crate and a C++ compiler: libFuzzer
# comes with a dependency, and the coverage is rustc's own. With cargo-fuzz installed and a nightly
# Rust, `cargo fuzz run TARGET` runs a target with AddressSanitizer as well.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
seconds=${1:-60}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- request bundle weights image config http

cd "$here"
triple=$(rustc -vV | sed -n 's/^host: //p')
target=${CARGO_TARGET_DIR:-$here/target}/fuzz
passes="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
passes="$passes -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
passes="$passes -Cllvm-args=-sanitizer-coverage-pc-table"
passes="$passes -Cllvm-args=-sanitizer-coverage-trace-compares"
# With a target named, build scripts and macros are compiled without these.
RUSTFLAGS="--cfg fuzzing $passes" cargo build --release --locked \
  --manifest-path fuzz/Cargo.toml --target "$triple" --target-dir "$target"

# Of the files that targets write.
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
trap 'exit 130' INT TERM

for name in "$@"; do
  mkdir -p "fuzz/corpus/$name" "fuzz/artifacts/$name"
  echo "==> $name, $seconds s"
  log=$TMPDIR/log
  status=0
  "$target/$triple/release/$name" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 \
    -max_len=16384 -print_final_stats=1 -artifact_prefix="fuzz/artifacts/$name/" \
    "fuzz/corpus/$name" "fuzz/seeds/$name" >"$log" 2>&1 || status=$?
  if [ "$status" != 0 ]; then
    tail -n 60 "$log"
    echo "$name: a finding in fuzz/artifacts/$name"
    exit 1
  fi
  sed -n 's/^stat::number_of_executed_units: */executions: /p; s/^stat::peak_rss_mb: */peak MiB: /p' "$log"
  sed -n 's/.*\(cov: [0-9]*\).*/\1/p' "$log" | tail -n 1
done
