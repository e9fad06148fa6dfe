#!/usr/bin/env bash
# Checks the code for NVIDIA GPUs without one:
#
#   tools/cuda_check.sh
#
# - the crate, its tests and its benches with the features cuda and cudnn, with
#   no warning from clippy;
# - each kernel of this crate for each architecture, with what ptxas says about
#   registers that spill to memory (shown, not refused).
#
# Installs the compiler from PyPI into target/cuda-toolkit unless CUDA_HOME is
# set. Does nothing where nothing has changed since the last success.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kernels=quick
toolkit=(--compiler)
readonly architectures=(80 86 89 90)

say() { echo "cuda_check: $*"; }

# One hash over all that can change the outcome. Any file of src can: it need not
# say cuda itself to be used by one that does.
fingerprint() {
  local inputs=(Cargo.toml Cargo.lock src static tests benches tools/cuda*)
  [[ ! -f build.rs ]] || inputs+=(build.rs)
  {
    rustc --version
    echo "${CUDA_HOME:-}"
    find "${inputs[@]}" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
  } | sha256sum
}

# compile FILE ARCHITECTURE
compile() {
  local out
  out=$(mktemp)
  echo "$1 sm_$2"
  "$CUDA_HOME/bin/nvcc" -std=c++17 -O3 -cubin -arch="sm_$2" -Xptxas -warn-spills -o "$out" "$1"
  rm "$out"
}

main() {
  local passed want
  cd "$here"
  passed=${CARGO_TARGET_DIR:-target}/cuda-check
  want=$(fingerprint)
  if [[ -f $passed && $(<"$passed") == "$want" ]]; then
    say "SKIPPED: nothing has changed since the last success ($passed)"
    return
  fi

  # shellcheck source=tools/cuda/environment.sh
  . tools/cuda/environment.sh
  # In the folder of the CPU's builds, whose dependencies are checked already.
  export CARGO_TARGET_DIR=$target
  cargo clippy --release --all-targets --features cuda,cudnn -- -D warnings

  if [[ -d src/nn/cuda/kernels ]]; then
    export -f compile
    for file in src/nn/cuda/kernels/*.cu; do
      printf '%s\n' "${architectures[@]/#/$file }"
    done | xargs -P "$(nproc)" -L 1 bash -euo pipefail -c 'compile "$0" "$1" 2>&1'
  fi
  echo "$want" >"$passed"
  say "passed"
}

main "$@"
