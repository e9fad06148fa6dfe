#!/usr/bin/env bash
# Installs what a build for NVIDIA GPUs needs from PyPI's wheels into a folder.
# No root, no GPU and no driver; Linux on x86-64.
#
#   tools/cuda_toolkit.sh [--cudnn] [--compiler] DIR
#   . DIR/env.sh
#
# --cudnn     cuDNN as well, for the crate's feature of that name
# --compiler  nvcc and its headers only: enough to check and to compile kernels,
#             not to link a program
#
# What is there in the right version stays; what an interrupted run left is
# replaced. CUDA 13.0 on purpose: candle carries its kernels as PTX, and a driver
# refuses PTX of a later toolkit than its own (13.0 goes with driver 580).
set -euo pipefail

readonly release=13.0
compiler=(
  nvidia-cuda-nvcc==13.0.88
  nvidia-cuda-crt==13.0.88
  nvidia-nvvm==13.0.88
  nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85
)
libraries=(
  nvidia-cublas==13.0.2.14
  nvidia-curand==10.4.0.35
  nvidia-cuda-nvrtc==13.0.88
)
# The version that cudarc's bindings were made from.
cudnn=(nvidia-cudnn-cu13==9.21.1.3)

say() { echo "cuda_toolkit: $*"; }
fail() {
  echo "cuda_toolkit: $*" >&2
  exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

# install PACKAGE, from the system's packages where that is possible.
install() {
  [[ $(id -u) == 0 ]] && has apt-get || return
  say "installing $1"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >/dev/null
}

# need COMMAND PACKAGE
need() {
  has "$1" || install "$2" || fail "no $1: please install it (Debian and Ubuntu: package $2)"
}

# A command that installs wheels, in `pip`.
find_pip() {
  pip=(python3 -m pip)
  "${pip[@]}" --version >/dev/null 2>&1 && return
  # A venv brings its own pip; making one is what fails without Debian's
  # python3-venv.
  pip=("$dir/venv/bin/python3" -m pip)
  python3 -m venv --clear "$dir/venv" >/dev/null 2>&1 && return
  rm -rf "$dir/venv"
  install python3-venv ||
    fail "python3 has neither pip nor venv: please install one (Debian and Ubuntu: package python3-venv)"
  python3 -m venv "$dir/venv"
}

# part NAME WHEEL...: the wheels, unpacked in $dir/NAME. The list of versions is
# written before the folder gets its name, so a folder with the right list is whole.
part() {
  local name=$1 into=$dir/$1 new=$dir/.new-$1
  shift
  if [[ -f $into/wheels.txt && $(<"$into/wheels.txt") == "$*" ]]; then
    return
  fi
  [[ -n ${pip[*]} ]] || find_pip
  rm -rf "$new" "$into"
  say "$name: $*"
  # Against settings of somebody's pip that contradict --target.
  PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_ROOT_USER_ACTION=ignore "${pip[@]}" install --quiet --disable-pip-version-check \
    --no-deps --no-compile --only-binary :all: --target "$new" "$@" ||
    fail "pip could not install $name (needs PyPI and pip 20.3 or later)"
  echo "$*" >"$new/wheels.txt"
  mv "$new" "$into"
}

# Every library of a part in the toolkit's lib, under its own name and under the
# one that a linker looks for, and its headers in the toolkit's include.
link_libraries() {
  local from file base
  for from in "$@"; do
    for file in "$from"/include/*; do
      base=$(basename "$file")
      [[ -e $home/include/$base ]] || ln -sfn "$file" "$home/include/$base"
    done
    for file in "$from"/lib/lib*.so.*; do
      base=$(basename "$file")
      [[ $from == "$home" ]] || ln -sfn "$file" "$home/lib/$base"
      ln -sfn "$base" "$home/lib/${base%%.so.*}.so"
    done
  done
}

# The driver's library comes with the driver only, and a linker wants one. This
# one has the driver interface's every name, from its header, and all say what
# NVIDIA's own stub says: CUDA_ERROR_STUB_LIBRARY.
driver_stub() {
  local stubs=$home/lib/stubs
  [[ $stubs/libcuda.so.1 -nt $home/include/cuda.h ]] && return
  mkdir -p "$stubs"
  grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$home/include/cuda.h" | sort -u |
    sed 's/.*/int &(void) { return 34; }/' >"$stubs/stub.c"
  "${CC:-cc}" -shared -fPIC -w -fno-builtin -Wl,-soname,libcuda.so.1 \
    -o "$stubs/libcuda.so.new" "$stubs/stub.c"
  ln -sfn libcuda.so.1 "$stubs/libcuda.so"
  mv "$stubs/libcuda.so.new" "$stubs/libcuda.so.1"
}

write_environment() {
  # Sources of 8.0 run on every later GPU: the driver compiles their PTX for it.
  cat >"$dir/env.sh.new" <<END
# Written by tools/cuda_toolkit.sh; source it in a POSIX shell.
export CUDA_HOME='$home'
export NVCC="\$CUDA_HOME/bin/nvcc"
export PATH="\$CUDA_HOME/bin:\$PATH"
export LIBRARY_PATH="\$CUDA_HOME/lib:\$CUDA_HOME/lib/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-80}"
END
  mv "$dir/env.sh.new" "$dir/env.sh"
}

main() {
  local with_cudnn="" only_compiler="" said
  dir=""
  pip=()
  while [[ $# != 0 ]]; do
    case $1 in
      --cudnn) with_cudnn=1 ;;
      --compiler) only_compiler=1 ;;
      -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        return
        ;;
      -*) fail "unknown option $1" ;;
      *)
        [[ -z $dir ]] || fail "one folder, please: $dir or $1"
        dir=$1
        ;;
    esac
    shift
  done
  [[ -n $dir ]] || fail "which folder? tools/cuda_toolkit.sh [--cudnn] [--compiler] DIR"
  mkdir -p "$dir"
  dir=$(cd "$dir" && pwd)
  case $dir in *[\ \']*) fail "nvcc needs a folder without spaces and quotes in its path: $dir" ;; esac

  # nvcc hands the host's half of a kernel to g++.
  need "${CC:-cc}" gcc
  need g++ g++
  need python3 python3
  need flock util-linux
  exec 9>"$dir/.lock"
  flock -n 9 || {
    say "another run is at work in $dir, waiting"
    flock 9
  }

  home=$dir/compiler/nvidia/cu13
  part compiler "${compiler[@]}"
  [[ -n $only_compiler ]] || part libraries "${libraries[@]}"
  [[ -z $with_cudnn ]] || part cudnn "${cudnn[@]}"

  ln -sfn lib "$home/lib64"
  link_libraries "$home"
  [[ ! -d $dir/libraries ]] || link_libraries "$dir/libraries/nvidia/cu13"
  [[ ! -d $dir/cudnn ]] || link_libraries "$dir/cudnn/nvidia/cudnn"
  driver_stub
  write_environment

  said=$("$home/bin/nvcc" --version) || fail "$home/bin/nvcc does not start"
  [[ $said == *"release $release,"* ]] || fail "expected nvcc $release, not: $said"
  say "CUDA $release is in $dir; its environment: . $dir/env.sh"
}

main "$@"
