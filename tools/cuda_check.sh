#!/usr/bin/env bash
# Checks the code for NVIDIA GPUs without one:
#
#   tools/cuda_check.sh
#
# - the crate, its tests and its benches with the features cuda and cudnn, with
#   no warning from clippy;
# - each kernel of this crate compiled for each architecture, without registers
#   that spill, and run on the CPU against references (tools/kernel_check.sh);
# - tests/gpu, that is every operation with its gradients, networks, training
#   passes and images, on libraries that stand in for NVIDIA's and execute on the
#   CPU (tools/cuda_emulator).
#
# Installs CUDA from PyPI into target/cuda-toolkit unless CUDA_HOME is set. Does
# nothing where nothing has changed since the last success.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kernels=quick
toolkit=()

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

# The GPU's tests on a machine without one: linked and run with the emulator's
# libraries.
emulated_tests() {
  local emulator=$target/cuda-emulator
  tools/cuda_emulator/build.sh "$emulator"
  DS_EMULATOR_LIBRARIES=$emulator LD_LIBRARY_PATH=$emulator CARGO_TARGET_DIR=$target/cuda \
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER=$here/tools/cuda_emulator/emulator-gcc \
    cargo test --release --features cuda,cudnn --test gpu
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

  BUILD_DIR=$target/kernel_check tools/kernel_check.sh
  emulated_tests
  echo "$want" >"$passed"
  say "passed"
}

main "$@"
