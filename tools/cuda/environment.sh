# The environment in which cargo builds for NVIDIA GPUs. Sourced by
# tools/cuda_build.sh and tools/cuda_check.sh, which set:
#
#   here     the repository
#   toolkit  options for tools/cuda_toolkit.sh, which runs where CUDA_HOME is not set
#   kernels  quick (tools/cuda/nvcc) or whole (the toolkit's own nvcc)
#
# Sets `target`, the folder for whatever is built.
# shellcheck shell=bash disable=SC2154

target=${CARGO_TARGET_DIR:-$here/target}
[[ $target == /* ]] || target=$PWD/$target

if [[ -z ${CUDA_HOME:-} ]]; then
  "$here/tools/cuda_toolkit.sh" "${toolkit[@]}" "$target/cuda-toolkit"
  # shellcheck disable=SC1091 # written by cuda_toolkit.sh
  . "$target/cuda-toolkit/env.sh"
else
  [[ -x $CUDA_HOME/bin/nvcc ]] || {
    echo "no nvcc in CUDA_HOME=$CUDA_HOME; unset it to install one" >&2
    exit 1
  }
  export NVCC=$CUDA_HOME/bin/nvcc PATH=$CUDA_HOME/bin:$PATH
  export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}
  export LIBRARY_PATH=$CUDA_HOME/lib64:$CUDA_HOME/lib64/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}
fi

# cudarc reads this to choose its bindings.
"$CUDA_HOME/bin/nvcc" --version | grep -q 'release 1[23]\.' || {
  echo "CUDA 12 or 13 is needed; $CUDA_HOME has: $("$CUDA_HOME/bin/nvcc" --version | tail -n 2)" >&2
  exit 1
}

[[ $kernels == whole ]] || export NVCC=$here/tools/cuda/nvcc
# cudaforge takes half the processors.
export CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-$(nproc)}
