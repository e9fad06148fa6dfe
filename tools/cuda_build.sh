#!/usr/bin/env bash
# Builds the crate for NVIDIA GPUs, on a machine with or without one.
#
#   tools/cuda_build.sh [--cudnn] [--whole] [--bins | --tests] [CARGO OPTIONS]
#
# --cudnn  convolutions through cuDNN
# --whole  candle's kernels for quantised weights too, which nothing here calls
#          and which take most of the time, see tools/cuda/nvcc
# --bins   the programs (the default)
# --tests  the tests' programs, to be run where a GPU is
#
# The toolkit is CUDA_HOME's where that is set, else one from PyPI in
# target/cuda-toolkit (tools/cuda_toolkit.sh). Everything is built in target/cuda,
# apart from builds for the CPU. Running it: docs/gpu.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

features=cuda
kernels=quick
toolkit=()
what=(build --bins)
while [[ $# != 0 ]]; do
  case $1 in
    --cudnn)
      features=cuda,cudnn
      toolkit=(--cudnn)
      ;;
    --whole) kernels=whole ;;
    --bins) what=(build --bins) ;;
    --tests) what=(test --no-run) ;;
    -h | --help)
      sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit
      ;;
    *) break ;;
  esac
  shift
done

# shellcheck source=tools/cuda/environment.sh
. "$here/tools/cuda/environment.sh"
export CARGO_TARGET_DIR=$target/cuda

# cudaforge keeps its objects by the sources' contents and does not see that
# another nvcc is to compile them.
mark=$CARGO_TARGET_DIR/kernels
if [[ -f $mark && $(<"$mark") != "$kernels" ]]; then
  cargo clean --quiet --release --package candle-kernels
fi
mkdir -p "$CARGO_TARGET_DIR"
echo "$kernels" >"$mark"

cd "$here"
cargo "${what[@]}" --release --features "$features" "$@"
echo "cuda_build: built in $CARGO_TARGET_DIR/release with $features; how to run it: docs/gpu.md"
